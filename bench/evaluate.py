"""Judges continuations: TextLDM beside the autoregressive GPT, between real text and a floor.

    python baselines/gpt.py --seed=1234 --n_layer=6 --n_head=4 --n_embd=256 --max_steps=1000 \\
        --out=out/evaluator                               # the judge, once
    python bench/evaluate.py                              # names, with the models in out/
    python bench/evaluate.py --systems="real,gpt,with=textldm:out,without=textldm:out/norepa"
    python bench/evaluate.py --evaluator=gpt2-large --benchmark=stories.jsonl --texts=theirs.jsonl

Validation documents are cut in prompt and reference. Every system continues the same prompts,
within the same length, to the end of text. No one number tells how good the texts are. NLL and
entropy must both be those of real text, because a system that collapses has a low NLL at a low
entropy. NLL says that a text is fluent, not that it is relevant. ROUGE rewards frequent words. So
the table has a row that is bad in a known way, its floor, and rows of models:

    real      the references. Their MAUVE is that of two disjoint halves: the ceiling
    unigram   words of the training text, drawn independently: no order
    gpt       the autoregressive baseline (gpt:CHECKPOINT)
    masked    masked diffusion (masked:CHECKPOINT)
    textldm   a folder with dit.pt and vae.pt, or a checkpoint of any kind with vae.pt beside it

KIND:PATH names another checkpoint. LABEL=KIND:PATH gives the row a name. Knobs are a sampler's
settings: guidance, steps, temperature, nucleus. They are chosen on one half of the prompts, to be
nearest to real text in NLL and entropy, and reported on the other half. The sweep on that other
half is the frontier.

Writes OUT/eval.json (everything) and OUT/eval.md (the tables). bench/plots.py draws the frontier.
"""

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex  # tiktoken depends on it too
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines.gpt import generate
from bench import metrics
from bench.metrics import at_entropy, at_equal_count, interval, rng_of
from bench.ngram import WORD, WordModel
from engine.checkpoint import build, load_gpt_state, write_whole
from engine.config import command_line
from engine.corpus import Corpus, encode
from engine.loop import pick_device
from engine.prompts import fit, read_lines, room_for_prompts
from engine.script import UserError, run_script
from textldm import GPT, Sampling, TransformerConfig, option, row_seeds
from variants.writers import load_writer

KINDS = dict(gpt="gpt.pt", masked="masked.pt", textldm="dit.pt")  # of models, and their files
# The columns of a table: the field of a row, the title, and the format.
COLUMNS = (
    ("nll", "NLL/token", "{:.2f}"),
    ("nll_byte", "NLL/byte", "{:.2f}"),
    ("nll_word", "NLL/word by counts", "{:.2f}"),
    ("entropy", "entropy", "{:.2f}"),
    ("distinct_2", "distinct-2", "{:.1f}"),
    ("mauve", "MAUVE", "{:.1f}"),
    ("copied_prompt", "4-grams of prompt", "{:.1f}%"),
    ("copied_train", "of training", "{:.1f}%"),
    ("words_known", "words known", "{:.1f}%"),
    ("copies", "copies", "{:.1f}%"),
    ("repeated", "words repeated", "{:.1f}%"),
    ("tokens", "tokens", "{:.1f}"),
    ("ended", "ended", "{:.0%}"),
    ("evaluations", "NFE", "{:.0f}"),
    ("seconds", "seconds", "{:.1f}"),
)
LIKENESS = (
    ("rouge_1", "R-1", "{:.1f}"),
    ("rouge_2", "R-2", "{:.1f}"),
    ("rouge_l", "R-L", "{:.1f}"),
    ("bertscore", "BERTScore", "{:.1f}"),
)


@dataclass
class EvalConfig:
    data: str = option("data/names", "folder of the prepared corpus that the models know")
    out: str = option("out", "folder of the models; the reports go there too")
    benchmark: str = option(
        "", 'JSON lines {"prompt", "reference"}; default: made once from val, in --data'
    )
    n: int = option(1000, "prompts", 8)
    unprompted: bool = option(False, "empty prompts: whole documents, compared with whole ones")
    seed: int = option(1, "of the benchmark, of the texts and of the intervals", 0, 2**31)
    systems: str = option(
        "real,unigram,gpt,textldm", "rows of the table: [LABEL=]KIND[:PATH], ..."
    )
    texts: str = option(
        "", 'what another system wrote: JSON lines {"prompt", "text"}, matched by prompt'
    )
    evaluator: str = option(
        "",
        "GPT that scores: a checkpoint (OUT/evaluator/gpt.pt), gpt2-large, or a folder of one",
    )
    cfg: str = option("1,1.5,2,3,5", "guidance scales to choose from")
    steps: str = option("10,20", "Euler steps to choose from")
    temperature: str = option("0.7,0.85,1", "temperatures to choose from")
    keep: str = option("0", "tokens to keep each time that the rest is written again; 0: all")
    top_p: str = option("0.9,1", "nuclei of the GPT to choose from")
    clusters: int = option(50, "of MAUVE; only equal ones compare", 2)
    batch_size: int = option(250, "prompts at once", 1)
    likeness: bool = option(
        False, "columns of ROUGE and BERTScore too: pip install rouge-score bert-score"
    )
    device: str = option("auto", "cpu, cuda, mps, or auto")


# ---- The benchmark -------------------------------------------------------------------------------


def make_benchmark(corpus, path, n, seed, unprompted):
    """Writes n validation documents, of at most a row, cut in prompt and reference.

    The cut is where the word begins that is nearest to a place drawn in 40-60% of the characters,
    or at the start if unprompted. A stream has no short documents, so its documents end after a
    row."""
    rng = np.random.default_rng(seed)
    ends = np.flatnonzero(corpus.tokens == corpus.eot) + 1
    lines = []
    for d in rng.permutation(len(ends)):
        first = ends[d - 1] if d else 0
        ids = corpus.tokens[first : ends[d] - 1].tolist()
        if len(ids) >= corpus.N and not corpus.is_stream:
            continue
        text = corpus.encoding.decode(ids[: corpus.N]).rstrip("\ufffd")
        place = rng.uniform(0.4, 0.6) * len(text)
        cuts = [0] if unprompted else beginnings_of_words(text)
        if cuts:
            cut = min(cuts, key=lambda i: abs(i - place))
            ended = len(ids) < corpus.N
            lines.append(dict(prompt=text[:cut], reference=text[cut:], ended=ended))
        if len(lines) == n:
            break
    if len(lines) < n:
        remedy = f"--n={len(lines)}" if len(lines) >= 8 else "prepare more, or name a --benchmark"
        raise UserError(
            f"--n={n}, but only {len(lines)} documents of {corpus.path} fit a row and have a place "
            f"between two words; {remedy}"
        )
    out = []
    for line in lines:
        out.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_whole(path, "".join(out))


def beginnings_of_words(text):
    """The places of spaces with words before and after. Where there is none, those between two
    characters of a script without spaces."""
    places = []
    for i in range(1, len(text) - 1):
        if text[i].isspace() and text[:i].strip() and text[i:].strip():
            places.append(i)
    words = list(regex.finditer(WORD, text))
    return places or [b.start() for a, b in zip(words, words[1:]) if a.end() == b.start()]


def benchmark_path(options, corpus):
    """The path of the benchmark, which is made if it is the corpus's own and is not there yet."""
    if options.benchmark and options.unprompted:
        raise UserError(
            f"--unprompted cuts val documents, and --benchmark={options.benchmark} is cut already; "
            "leave one of them out"
        )
    if options.benchmark:
        return Path(options.benchmark)
    name = f"benchmark_{options.n}_{options.seed}_{corpus.N}"
    if options.unprompted:
        name += "_unprompted"
    path = Path(f"{options.data}/{name}.jsonl")
    if not path.exists():
        make_benchmark(corpus, path, options.n, options.seed, options.unprompted)
    return path


def load_benchmark(path, options, corpus):
    """A list of n dicts with the prompt, its ids, the reference, whether it ended, and in `next`
    the reference of another prompt."""
    lines = read_lines(path, ("prompt", "reference"))
    for i, line in enumerate(lines):
        if not line["reference"].strip():
            raise UserError(f"{path}, line {i + 1}: the reference is empty; leave the line out")
    if len(lines) < options.n:
        raise UserError(f"--n={options.n}, but {path} has {len(lines)} lines; lower --n")
    # Shuffled, because one half is compared with the other.
    order = np.random.default_rng(options.seed).permutation(len(lines))
    lines = [lines[i] for i in order[: options.n]]
    room = room_for_prompts(0, corpus.N)
    for i, line in enumerate(lines):
        line["ids"] = fit(encode(corpus.encoding, line["prompt"]), room, i + 1)
        line["ended"] = bool(line.get("ended", True))
        line["next"] = lines[i - 1]["reference"]
    return lines


# ---- The systems ---------------------------------------------------------------------------------
#
# A system has `knobs`, a list of the settings to choose from (dicts), and `longest_row`, in tokens.
# Its write(lines, knob, seeds) continues the prompts of lines, dicts of the benchmark. seeds has
# one for each. It returns a list of (text, whether it ended), and how often a network is evaluated
# for one text.


class References:
    knobs = [{}]
    longest_row = math.inf

    def write(self, lines, knob, seeds):
        return [(line["reference"], line["ended"]) for line in lines], 0


class RandomWords(References):
    """Words of the training text, drawn independently: no order. A text has as many as another
    prompt's reference."""

    def __init__(self, corpus):
        train = Corpus(corpus.path.parent, "train", corpus.N)
        count = 500 if train.is_stream else 20_000
        rows = train.batch(np.random.default_rng(0), count, train.N).tokens
        words = []
        for text, _ in decode(rows.tolist(), corpus):
            words += text.split()
        self.words = np.array(words)

    def write(self, lines, knob, seeds):
        rng = np.random.default_rng(seeds)
        texts = []
        for line in lines:
            drawn = rng.choice(self.words, len(line["next"].split()))
            texts.append(("".join(" " + word for word in drawn), True))
        return texts, 0


class GivenTexts(References):
    """What another system wrote: a file of JSON lines, matched by prompt."""

    def __init__(self, path):
        self.path = path
        self.texts = read_lines(path, ("prompt", "text"))

    def write(self, lines, knob, seeds):
        left = {}
        for line in self.texts:
            text = line["text"], bool(line.get("ended", True))
            left.setdefault(line["prompt"], []).append(text)
        found = []
        for line in lines:
            prompt = line["prompt"]
            if not left.get(prompt):
                raise UserError(
                    f"{self.path} does not match the benchmark: no text for the prompt {prompt!r}"
                )
            found.append(left[prompt].pop(0))  # prompts may repeat; each takes its next text
        return found, 0


class Autoregressive:
    """A GPT. Its settings are the nucleus and the temperature."""

    def __init__(self, path, options, corpus, device):
        if Path(path).resolve() == Path(options.evaluator).resolve():
            raise UserError(
                f"{path} cannot be judged by itself; train another --evaluator, with another --seed"
            )
        self.gpt = build(GPT, TransformerConfig, load_gpt_state(str(path))).to(device)
        self.longest_row = self.gpt.config.block_size - 1  # it reads an end-of-text token first
        self.corpus = corpus
        top_p, temperature = numbers_of(options, "top_p"), numbers_of(options, "temperature")
        self.knobs = combined(top_p=top_p, temperature=temperature)

    def write(self, lines, knob, seeds):
        rows = generate(self.gpt, [line["ids"] for line in lines], 0, seed=seeds, **knob)
        evaluations = sum(len(row) for row in rows) / len(rows)
        return decode(rows, self.corpus), evaluations


class Diffusion:
    """A model that writes in steps. Its settings are the steps, and where it has them the guidance
    scale, the tokens to keep and the temperature."""

    def __init__(self, writer, options, corpus):
        self.writer = writer
        self.corpus = corpus
        self.longest_row = writer.block_size
        settings = dict(steps=numbers_of(options, "steps"))
        if writer.kind != "masked":
            settings["cfg"] = numbers_of(options, "cfg")
        if options.keep != "0" and not writer.block:
            settings["keep"] = numbers_of(options, "keep")
        if writer.has_temperature:
            settings["temperature"] = numbers_of(options, "temperature")
        self.knobs = combined(**settings)

    def write(self, lines, knob, seeds):
        scale = knob.get("cfg", 1.0)
        sampling = Sampling(int(knob["steps"]), scale, knob.get("temperature", 1.0), seeds)
        keep = int(knob.get("keep", 0))
        rows = self.writer.write([line["ids"] for line in lines], 0, sampling, keep=keep)
        evaluations = sampling.steps
        if scale != 1:
            evaluations *= 2  # with and without the context
        part = self.writer.block or keep
        if part:
            parts = sum(math.ceil(len(row) / part) for row in rows)
            evaluations *= parts / len(rows)
        return decode(rows, self.corpus), evaluations


def combined(**values):
    """The settings of all combinations: for each name a list of values -> a list of dicts."""
    return [dict(zip(values, chosen)) for chosen in product(*values.values())]


def decode(rows, corpus):
    """Lists of ids -> (text, whether it ended) of each."""
    texts = []
    for row in rows:
        text = corpus.encoding.decode([i for i in row if i != corpus.eot])
        texts.append((text, corpus.eot in row))
    return texts


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


def load_model(kind, path, options, corpus, device):
    """The system of a checkpoint, or of a folder of one. Its VAE is vae.pt beside it."""
    path = path or f"{options.out}/{KINDS[kind]}"
    if kind == "textldm" and Path(path).is_dir():
        path = f"{path}/dit.pt"
    writer = load_writer(path, Path(path).with_name("vae.pt"), device)
    if kind not in (writer.kind, "textldm"):
        raise UserError(f"--systems: {path} holds a {writer.kind}, and no {kind}")
    if writer.tokenizer != corpus.tokenizer:
        raise UserError(
            f"{path} was trained with another vocabulary than {corpus.path.parent}; "
            "name the right --data"
        )
    if writer.kind == "gpt":
        return Autoregressive(path, options, corpus, device)
    return Diffusion(writer, options, corpus)


def make_systems(options, corpus, device):
    """The systems by label, and the labels of those of kind textldm. Lowers corpus.N to the longest
    row that all of them can write. Raises UserError."""
    specs = [spec.strip() for spec in options.systems.split(",")]
    if options.texts:
        specs.append(f"texts:{options.texts}")
    systems = {}
    ours = []
    for spec in specs:
        label, _, rest = spec.rpartition("=")
        kind, _, path = rest.partition(":")
        if not label:
            label = Path(path).name if kind == "texts" else rest
        if label in systems:
            raise UserError(
                f"--systems: two rows are called {label!r}; name them apart, LABEL=KIND:PATH"
            )
        if kind == "real":
            systems[label] = References()
        elif kind == "unigram":
            systems[label] = RandomWords(corpus)
        elif kind == "texts":
            systems[label] = GivenTexts(path)
        elif kind in KINDS:
            systems[label] = load_model(kind, path, options, corpus, device)
        else:
            raise UserError(
                f"--systems: there is no kind {kind!r}; real, unigram, texts, {', '.join(KINDS)}"
            )
        corpus.N = min(corpus.N, systems[label].longest_row)
        if kind == "textldm":
            ours.append(label)
    return systems, ours


# ---- The judge -----------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What a system wrote to all n prompts, with one setting, and what the judges make of it."""

    texts: list  # n strings
    ended: list  # n bools
    evaluations: float  # of a network, for a text
    seconds: float  # of the writing alone
    nll: np.ndarray  # (n,), in nats
    word_nll: np.ndarray  # (n,), in nats, by counts of words
    word_count: np.ndarray  # (n,)
    features: np.ndarray  # (n, E)
    tokens: np.ndarray  # (n,), numbers of tokens
    words: list  # n arrays of tokens, without the end-of-text
    pairs: list  # n arrays of pairs of neighbouring tokens


class Judge:
    """Measures what systems write. Settings are chosen on one half of the prompts; the other is
    reported.

    corpus.N is the longest row, a prompt and its text, that all systems can write."""

    def __init__(self, options, corpus, lines, autocast, device):
        self.options = options
        self.corpus = corpus
        self.lines = lines
        self.autocast = autocast
        state = load_gpt_state(options.evaluator)
        self.tokenizer = state["tokenizer"]
        self.evaluator = build(GPT, TransformerConfig, state).to(device)
        half = len(lines) // 2
        self.choosing = slice(0, half)
        self.reporting = slice(half, None)
        self.training = metrics.TrainingText(corpus)
        self.word_model = WordModel(self.training.texts)
        self.clusters = min(options.clusters, half // 4)  # the same for halves as for wholes
        self.truth = self.measure(References(), {})
        # Half of what real text has: all of it would not be a draw.
        self.count_of_words = sum(len(x) for x in self.truth.words[self.choosing]) // 2
        self.count_of_pairs = sum(len(x) for x in self.truth.pairs[self.choosing]) // 2

    def rng(self, name):
        return rng_of(self.options.seed, name)

    def write(self, system, knob):
        """(text, whether it ended) for all lines, each cut to the room that a row leaves after its
        prompt; evaluations of a network for a text; seconds."""
        began = time.time()
        texts = []
        evaluations = 0
        size = self.options.batch_size if knob else len(self.lines)
        seeds = row_seeds([line["ids"] for line in self.lines], self.options.seed)
        for start in range(0, len(self.lines), size):
            some = self.lines[start : start + size]
            with self.autocast, torch.no_grad():
                new, of_each = system.write(some, knob, seeds[start : start + size])
            texts += new
            evaluations += of_each * len(some) / len(self.lines)
        seconds = time.time() - began
        for i, (text, ended) in enumerate(texts):
            ids = encode(self.corpus.encoding, text)
            room = self.corpus.N - len(self.lines[i]["ids"])
            if len(ids) + ended > room:
                texts[i] = self.corpus.encoding.decode(ids[:room]).rstrip("\ufffd"), False
        return texts, evaluations, seconds

    def measure(self, system, knob):
        texts, evaluations, seconds = self.write(system, knob)
        prompts = [line["prompt"] for line in self.lines]
        nll, rows, features = metrics.score(
            self.evaluator, self.tokenizer, prompts, texts, self.autocast
        )
        words = []
        for row in rows:
            words.append(np.array([i for i in row if i != self.tokenizer["eot"]], dtype=np.int64))
        word_nll, word_count = self.word_model.score(prompts, texts)
        return Measured(
            texts=[text for text, _ in texts],
            ended=[ended for _, ended in texts],
            evaluations=evaluations,
            seconds=seconds,
            nll=nll,
            word_nll=word_nll,
            word_count=word_count,
            features=features,
            tokens=np.array([len(row) for row in rows]),
            words=words,
            pairs=[metrics.pairs_of(ids) for ids in words],
        )

    def point(self, measured, part):
        """NLL per token by the GPT, NLL per word by counts, and entropy, of a half of the
        prompts."""
        nll = measured.nll[part].sum() / max(measured.tokens[part].sum(), 1)
        by_words = measured.word_nll[part].sum() / max(measured.word_count[part].sum(), 1)
        spread, _ = self.entropy(measured, part)
        return dict(nll=float(nll), nll_word=float(by_words), entropy=spread)

    def entropy(self, measured, part):
        words = measured.words[part]
        return at_equal_count(metrics.entropy, words, self.count_of_words, self.rng("entropy"))

    def judge(self, system, bar):
        """Tries all settings of a system. Returns its row of the table, its points of the frontier
        (none, if it has no settings), and numbers of each text."""
        tried = []
        for knob in system.knobs:
            tried.append(self.measure(system, knob))
            bar.update()
        frontier = []
        if system.knobs[0]:
            for knob, measured in zip(system.knobs, tried):
                frontier.append(dict(self.point(measured, self.reporting), knob=knob))
        points = [self.point(measured, self.choosing) for measured in tried]
        best = metrics.choose(points, self.point(self.truth, self.choosing))
        row = dict(knob=system.knobs[best], **self.row(tried[best]))
        per_text = dict(
            texts=tried[best].texts[self.reporting],
            nll=tried[best].nll[self.reporting].tolist(),
            tokens=tried[best].tokens[self.reporting].tolist(),
        )
        return row, frontier, per_text

    def row(self, measured):
        """The columns of a system, of the reported half."""
        part = self.reporting
        texts, nll, tokens = measured.texts[part], measured.nll[part], measured.tokens[part]
        size = np.array([len(text.encode("utf-8", "replace")) for text in texts])
        prompts = [line["prompt"] for line in self.lines[part]]
        row = dict(nll=interval(nll, self.rng("nll"), tokens))
        row["nll_byte"] = interval(nll, self.rng("nll_byte"), size)
        words = measured.word_count[part]
        row["nll_word"] = interval(measured.word_nll[part], self.rng("nll_word"), words)
        row["entropy"] = self.entropy(measured, part)
        row["distinct_2"] = at_equal_count(
            metrics.different, measured.pairs[part], self.count_of_pairs, self.rng("distinct_2")
        )
        # Against the references of the other half, so that real text is not compared with itself.
        real = self.truth.features[self.choosing]
        features = measured.features[part]
        row["mauve"] = metrics.mauve(real, features, self.clusters, self.rng("mauve"))
        copies = metrics.copied(texts, prompts, self.training)
        row["copied_prompt"], row["copied_train"] = copies
        row["words_known"], row["copies"] = metrics.known(texts, prompts, self.training)
        row["repeated"] = metrics.repeated(texts, prompts)
        row["tokens"] = float(tokens.mean())
        row["ended"] = float(np.mean(measured.ended[part]))
        row["evaluations"] = float(measured.evaluations)
        row["seconds"] = measured.seconds
        if self.options.likeness:
            row |= self.likeness(texts)
        return row

    def likeness(self, texts):
        """Columns that compare texts with the references of their prompts."""
        references = self.truth.texts[self.reporting]
        values = dict(zip(("rouge_1", "rouge_2", "rouge_l"), metrics.rouge(texts, references).T))
        values["bertscore"] = metrics.bert_score(texts, references)
        for name, value in values.items():
            if not isinstance(value, str):
                values[name] = interval(value, self.rng(name))
        return values


def judge_all(judge, systems, ours):
    """The dict of eval.json, without its settings."""
    rows = {}
    frontier = {}
    texts = {}
    total = sum(len(system.knobs) for system in systems.values())
    with tqdm(total=total, desc="evaluate") as bar:
        for name, system in systems.items():
            rows[name], points, texts[name] = judge.judge(system, bar)
            if points:
                frontier[name] = points
    real = judge.point(judge.truth, judge.reporting)
    at_real = {}
    differences = {}
    for name, points in frontier.items():
        at_real[name] = {k: at_entropy(points, real["entropy"], k) for k in ("nll", "nll_word")}
        differences[name] = {}
        for other in ours:
            if other != name:
                more = metrics.difference(texts[name], texts[other], judge.rng("difference"))
                differences[name][other] = more
    return dict(
        systems=rows,
        frontier=frontier,
        real=real,
        nll_at_real_entropy={name: at["nll"] for name, at in at_real.items()},
        nll_word_at_real_entropy={name: at["nll_word"] for name, at in at_real.items()},
        differences=differences,
        texts=texts,
    )


# ---- The report ----------------------------------------------------------------------------------


def report_of(result, ours):
    """The text of eval.md, from the dict of eval.json. ours: the names of the rows that all others
    are compared with."""
    setting = result["setting"]
    first = next(iter(result["texts"].values()))
    columns = COLUMNS + LIKENESS if setting["likeness"] else COLUMNS
    lines = [
        f"`{setting['command']}`, commit {setting['commit']}, {setting['machine']}.\n\n"
        f"{len(first['nll'])} prompts of {setting['benchmark']} (knobs chosen on the other half), "
        f"rows of at most {setting['row']} tokens; NLL and MAUVE's features: "
        f"{setting['evaluator']}, {setting['clusters']} clusters; entropy of {setting['count']} "
        "tokens. ± is half of a 95% interval. "
        f"Seconds are for {setting['n']} prompts.\n",
        line_of(["", "knobs", *[title for _, title, _ in columns]]),
        "|" + "---|" * (2 + len(columns)),
    ]
    for name, row in result["systems"].items():
        knob = " ".join(f"{key} {value:g}" for key, value in row["knob"].items())
        cells = [cell(row[field], form) for field, _, form in columns]
        lines.append(line_of([name, knob, *cells]))
    if result["frontier"]:
        lines += frontier_lines(result, ours)
    return "\n".join(lines) + "\n"


def line_of(cells):
    return "| " + " | ".join(cells) + " |"


def cell(x, form):
    """A number, a (number, half an interval), or a string that says why there is none."""
    if isinstance(x, str):
        return x
    if isinstance(x, tuple):
        return f"{form.format(x[0])} ± {form.format(x[1])}"
    return form.format(x)


def frontier_lines(result, ours):
    """NLL at the entropy of real text, and differences between systems."""
    real = result["real"]
    there = result["nll_at_real_entropy"]
    gpts = [name for name in there if "top_p" in result["systems"][name]["knob"]]
    base = there[gpts[0]] if gpts else None
    lines = [
        "",
        "Frontier: NLL a token at the entropy of real text (which has "
        f"{real['nll']:.2f} at {real['entropy']:.2f}), its perplexity as a multiple of the first "
        f"GPT's, and NLL a word by counts there (real text: {real['nll_word']:.2f}). Then how much "
        "more NLL a token a row has than a column, at the chosen knobs, paired by prompt:",
        "",
        line_of(["", "NLL there", "perplexity", "by counts", *[f"than {name}" for name in ours]]),
        "|" + "---|" * (4 + len(ours)),
    ]
    for name, nll in there.items():
        cells = ["not reached", "", ""]
        if nll is not None:
            by_counts = result["nll_word_at_real_entropy"][name]
            times = "" if base is None else f"{math.exp(nll - base):.2f} x"
            cells = [f"{nll:.2f}", times, f"{by_counts:.2f}"]
        differences = result["differences"][name]
        cells += [cell(differences.get(other, ""), "{:.2f}") for other in ours]
        lines.append(line_of([name, *cells]))
    return lines


def machine(device):
    """Processor and accelerator, in words."""
    names = [platform.processor()]
    if Path("/proc/cpuinfo").exists():
        names += re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    text = f"{os.cpu_count()} x {names[-1]}"
    if device.type == "cuda":
        text += f", {torch.cuda.get_device_name()}"
    return text


def commit():
    """The commit of this code, and whether it was changed since."""
    command = ("git", "describe", "--always", "--dirty", "--exclude=*")
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip()
    except OSError:
        return "unknown"


# ---- The run -------------------------------------------------------------------------------------


def name_evaluator(options):
    """Sets the default of --evaluator. Raises UserError if it is missing."""
    if options.evaluator:
        return
    options.evaluator = f"{options.out}/evaluator/gpt.pt"
    if not Path(options.evaluator).is_file():
        raise UserError(
            f"{options.evaluator} is missing; make it with baselines/gpt.py --data={options.data} "
            "--seed=1234 --n_layer=6 --n_head=4 --n_embd=256 --max_steps=1000 "
            f"--out={options.out}/evaluator, or name another --evaluator"
        )


def main():
    (options,) = command_line(__doc__, EvalConfig)
    missing = [name for name in ("rouge_score", "bert_score") if not find_spec(name)]
    if options.likeness and missing:
        raise UserError("--likeness needs more packages: pip install rouge-score bert-score")
    device, _ = pick_device(options.device)
    name_evaluator(options)
    corpus = Corpus(options.data, "val", 1024)
    systems, ours = make_systems(options, corpus, device)
    path = benchmark_path(options, corpus)
    lines = load_benchmark(path, options, corpus)
    _, autocast = pick_device(options.device, corpus.N)  # the kind of attention depends on it
    judge = Judge(options, corpus, lines, autocast, device)
    result = judge_all(judge, systems, ours)
    setting = dict(
        asdict(options),
        command=" ".join(sys.argv),
        commit=commit(),
        machine=machine(device),
        benchmark=str(path),
        row=corpus.N,
        clusters=judge.clusters,
        count=judge.count_of_words,
    )
    result = dict(setting=setting, **result)
    text = report_of(result, ours)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "eval.json", json.dumps(result, default=float))
    write_whole(out / "eval.md", text)
    print(text)


if __name__ == "__main__":
    run_script(main)
