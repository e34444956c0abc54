"""The systems that bench/evaluate.py compares: real text, a floor, texts of others, and models.

A system has `knobs`, a list of the settings to choose from (dicts), and `write`.
"""

import math
from pathlib import Path

import numpy as np

from baselines.gpt import generate
from engine.checkpoint import build, load_checkpoint, load_gpt_state
from engine.corpus import Corpus
from engine.prompts import read_lines
from engine.script import UserError
from textldm import GPT, Sampling, TransformerConfig
from variants.writers import load_writer

KINDS = "real, unigram, gpt, masked, textldm or texts"


def make_system(kind, path, options, corpus, device):
    """The System of an entry KIND:PATH. path may be empty: then it is the kind's own. Raises
    UserError."""
    if kind == "real":
        return References()
    if kind == "unigram":
        return RandomWords(options.data, corpus)
    if kind == "texts":
        return GivenTexts(path)
    if kind == "gpt":
        return Autoregressive(path or f"{options.out}/gpt.pt", options, corpus, device)
    if kind == "masked":
        path = path or f"{options.out}/masked.pt"
        # Checked before load_writer, which takes all kinds.
        load_checkpoint(path, "masked", "python baselines/masked.py makes one", corpus.tokenizer)
        return Diffusion(load_writer(path, "", device), path, options, corpus)
    if kind == "textldm":
        return make_textldm(Path(path or options.out), options, corpus, device)
    raise UserError(f"--systems: there is no kind {kind!r}; {KINDS}")


def make_textldm(path, options, corpus, device):
    """The System of a folder with dit.pt, or of a checkpoint of any kind. The VAE is vae.pt beside
    it."""
    if not path.is_file():
        path = path / "dit.pt"
    writer = load_writer(path, path.with_name("vae.pt"), device)
    if writer.kind == "gpt":
        return Autoregressive(path, options, corpus, device)
    return Diffusion(writer, path, options, corpus)


class System:
    knobs = [{}]
    longest_row = math.inf  # in tokens, of a prompt and what follows it

    def write(self, lines, knob, seed):
        """Continues the prompts of lines, the dicts of the benchmark. seed is a list of one for
        each line. Returns a list of (text, whether it ended), and how often a network is evaluated
        for one text."""
        raise NotImplementedError


class References(System):
    def write(self, lines, knob, seed):
        return [(line["reference"], line["ended"]) for line in lines], 0


class RandomWords(System):
    """Words of the training text, drawn independently: no order. A text has as many as another
    prompt's reference."""

    def __init__(self, folder, corpus):
        train = Corpus(folder, "train", corpus.N)
        count = 500 if train.is_stream else 20_000
        rows = train.batch(np.random.default_rng(0), count, train.N).tokens
        words = []
        for text, _ in decode(rows.tolist(), corpus):
            words += text.split()
        self.words = np.array(words)

    def write(self, lines, knob, seed):
        rng = np.random.default_rng(seed)
        texts = []
        for line in lines:
            drawn = rng.choice(self.words, len(line["next"].split()))
            texts.append(("".join(" " + word for word in drawn), True))
        return texts, 0


class GivenTexts(System):
    """What another system wrote: a file of JSON lines, matched by prompt."""

    def __init__(self, path):
        self.path = path
        self.texts = {}
        for line in read_lines(path, ("prompt", "text")):
            text = (line["text"], bool(line.get("ended", True)))
            self.texts.setdefault(line["prompt"], []).append(text)

    def write(self, lines, knob, seed):
        # Prompts may repeat. Each takes the next of its texts.
        left = {prompt: list(texts) for prompt, texts in self.texts.items()}
        found = []
        for line in lines:
            prompt = line["prompt"]
            if not left.get(prompt):
                raise UserError(
                    f"{self.path} does not match the benchmark: no text for the prompt {prompt!r}"
                )
            found.append(left[prompt].pop(0))
        return found, 0


class Autoregressive(System):
    """A GPT. Its settings are the temperature and the nucleus."""

    def __init__(self, path, options, corpus, device):
        state = load_gpt_state(str(path))
        check_tokenizer(path, state["tokenizer"], corpus)
        if Path(path).resolve() == Path(options.evaluator).resolve():
            raise UserError(
                f"{path} cannot be judged by itself; train another --evaluator, with another --seed"
            )
        self.corpus = corpus
        self.gpt = build(GPT, TransformerConfig, state).to(device)
        self.longest_row = self.gpt.config.block_size - 1  # it reads an end-of-text token first
        self.knobs = []
        for top_p in numbers_of(options, "top_p"):
            for temperature in numbers_of(options, "temperature"):
                self.knobs.append(dict(temperature=temperature, top_p=top_p))

    def write(self, lines, knob, seed):
        prompts = [line["ids"] for line in lines]
        rows = generate(self.gpt, prompts, 0, seed=seed, **knob)
        evaluations = sum(len(row) for row in rows) / len(rows)
        return decode(rows, self.corpus), evaluations


class Diffusion(System):
    """A model that writes in steps. Its settings are the steps, the guidance scale where it has
    one, and the temperature where it has one."""

    def __init__(self, writer, path, options, corpus):
        check_tokenizer(path, writer.tokenizer, corpus)
        self.writer = writer
        self.corpus = corpus
        self.longest_row = writer.block_size
        self.knobs = [dict(steps=steps) for steps in numbers_of(options, "steps")]
        if writer.kind != "masked":
            self.knobs = combined(self.knobs, "cfg", numbers_of(options, "cfg"))
        if options.keep != "0" and not writer.block:
            self.knobs = combined(self.knobs, "keep", numbers_of(options, "keep"))
        if writer.has_temperature:
            self.knobs = combined(self.knobs, "temperature", numbers_of(options, "temperature"))

    def write(self, lines, knob, seed):
        prompts = [line["ids"] for line in lines]
        scale = knob.get("cfg", 1.0)
        sampling = Sampling(int(knob["steps"]), scale, knob.get("temperature", 1.0), seed)
        keep = int(knob.get("keep", 0))
        rows = self.writer.write(prompts, 0, sampling, keep=keep)
        evaluations = sampling.steps
        if scale != 1:
            evaluations *= 2  # with and without the context
        part = self.writer.block or keep
        if part:
            parts = sum(math.ceil(len(row) / part) for row in rows)
            evaluations *= parts / len(rows)
        return decode(rows, self.corpus), evaluations


def combined(knobs, name, values):
    """Each of the settings with each of the values of one more."""
    more = []
    for knob in knobs:
        for value in values:
            more.append(dict(knob, **{name: value}))
    return more


def decode(rows, corpus):
    """Lists of ids -> (text, whether it ended) of each."""
    texts = []
    for row in rows:
        text = corpus.encoding.decode([i for i in row if i != corpus.eot])
        texts.append((text, corpus.eot in row))
    return texts


def check_tokenizer(path, tokenizer, corpus):
    if tokenizer != corpus.tokenizer:
        raise UserError(
            f"{path} was trained with another vocabulary than {corpus.path.parent}; "
            "name the right --data"
        )


def numbers_of(options, name):
    """The numbers of an option that is a list of them. Raises UserError."""
    text = getattr(options, name)
    try:
        numbers = [float(x) for x in text.split(",")]
    except ValueError:
        raise UserError(f"--{name}={text}: expected numbers with commas between") from None
    low = 1 if name == "steps" else 0
    if not all(low <= x < 1e6 for x in numbers):
        raise UserError(f"--{name}={text}: out of range")
    return numbers
