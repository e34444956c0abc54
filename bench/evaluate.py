"""Judges continuations: TextLDM beside the autoregressive GPT, between real text and a floor.

    python baselines/gpt.py --seed=1234 --n_layer=6 --n_head=4 --n_embd=256 --max_steps=1000 \\
        --out=out/evaluator                               # the judge, once
    python bench/evaluate.py                              # names, with the models in out/
    python bench/evaluate.py --systems="real,gpt,with=textldm:out,without=textldm:out/norepa"
    python bench/evaluate.py --evaluator=gpt2-large --benchmark=stories.jsonl --texts=theirs.jsonl

Validation documents are cut in prompt and reference. Every system continues the same prompts,
within the same length, to the end of text. No one number tells how good the texts are. NLL and
entropy must both be those of real text, because a system that collapses has a low NLL at a low
entropy. NLL says that a text is fluent, not that it is relevant. Rows of the table:

    real      the references. Their MAUVE is that of two disjoint halves: the ceiling
    unigram   words of the training text, drawn independently: the floor
    gpt       the autoregressive baseline (gpt:CHECKPOINT)
    masked    masked diffusion (masked:CHECKPOINT)
    textldm   a folder with dit.pt and vae.pt, or a checkpoint of any kind with vae.pt beside it

KIND:PATH names another checkpoint. LABEL=KIND:PATH gives the row a name. Knobs are a sampler's
settings. They are chosen on one half of the prompts, to be nearest to real text in NLL and entropy,
and reported on the other half. The sweep on that other half is the frontier.

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
from typing import Callable, NamedTuple

import numpy as np
import regex  # tiktoken depends on it too
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines.gpt import generate
from bench import metrics
from bench.metrics import at_entropy, interval, rng_of
from bench.ngram import WORD, WordModel
from engine.checkpoint import build, load_gpt_state, write_whole
from engine.config import UserError, command_line
from engine.corpus import Corpus, encode
from engine.terminal import pick_device, run_script
from engine.prompts import fit, read_lines, room_for_prompts
from textldm import GPT, Sampling, TransformerConfig, option, row_seeds
from variants.writers import load_writer

MODELS = dict(gpt="gpt.pt", masked="masked.pt", textldm="dit.pt")  # kinds, and their files


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


def make_benchmark(corpus, path, options):
    """Writes validation documents, of at most a row, cut in prompt and reference. Raises UserError.

    The cut is where the word begins that is nearest to a place drawn in 40-60% of the characters,
    or at the start if unprompted. A stream has no short documents, so its documents end after a
    row."""
    rng = np.random.default_rng(options.seed)
    ends = np.flatnonzero(corpus.tokens == corpus.eot) + 1
    lines = []
    for d in rng.permutation(len(ends)):
        first = ends[d - 1] if d else 0
        ids = corpus.tokens[first : ends[d] - 1].tolist()
        if len(ids) >= corpus.N and not corpus.is_stream:
            continue
        text = corpus.encoding.decode(ids[: corpus.N]).rstrip("\ufffd")
        place = rng.uniform(0.4, 0.6) * len(text)
        cuts = [0] if options.unprompted else beginnings_of_words(text)
        if cuts:
            cut = min(cuts, key=lambda i: abs(i - place))
            line = dict(prompt=text[:cut], reference=text[cut:], ended=len(ids) < corpus.N)
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        if len(lines) == options.n:
            break
    if len(lines) < options.n:
        remedy = f"--n={len(lines)}" if len(lines) >= 8 else "prepare more, or name a --benchmark"
        raise UserError(
            f"--n={options.n}, but only {len(lines)} documents of {corpus.path} fit a row and have "
            f"a place between two words; {remedy}"
        )
    write_whole(path, "".join(lines))


def beginnings_of_words(text):
    """The places of spaces with words before and after. Where there is none, those between two
    characters of a script without spaces."""
    places = []
    for i in range(1, len(text) - 1):
        if text[i].isspace() and text[:i].strip() and text[i:].strip():
            places.append(i)
    words = list(regex.finditer(WORD, text))
    return places or [b.start() for a, b in zip(words, words[1:]) if a.end() == b.start()]


def load_benchmark(options, corpus):
    """The path of the benchmark, which is made if it is the corpus's own and is not there yet, and
    a list of n dicts with the prompt, its ids, the reference, whether it ended, and in `next` the
    reference of another prompt. Raises UserError."""
    path = options.benchmark
    if not path:
        end = "_unprompted" if options.unprompted else ""
        path = f"{options.data}/benchmark_{options.n}_{options.seed}_{corpus.N}{end}.jsonl"
        if not Path(path).exists():
            make_benchmark(corpus, path, options)
    elif options.unprompted:
        raise UserError(
            f"--unprompted cuts val documents, and --benchmark={path} is cut already; "
            "leave one of them out"
        )
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
    return path, lines


# ---- The systems


class System(NamedTuple):
    """What writes. `write` continues the prompts of lines, dicts of the benchmark, by one of the
    settings in `knobs`, with a seed for each line: write(lines, knob, seeds). It returns a list of
    (text, whether it ended), and how often a network is evaluated for one text."""

    write: Callable
    knobs: list = [{}]
    longest_row: float = math.inf  # in tokens, of a prompt and what follows it


def references(lines, knob, seeds):
    return [(line["reference"], line["ended"]) for line in lines], 0


def random_words(corpus):
    """Draws words of the training text independently: no order. A text has as many as another
    prompt's reference."""
    train = Corpus(corpus.path.parent, "train", corpus.N)
    count = 500 if train.is_stream else 20_000
    rows = train.batch(np.random.default_rng(0), count, train.N).tokens
    texts = [text for text, _ in decode(rows.tolist(), corpus)]
    words = np.array(" ".join(texts).split())

    def write(lines, knob, seeds):
        rng = np.random.default_rng(seeds)
        texts = []
        for line in lines:
            drawn = rng.choice(words, len(line["next"].split()))
            texts.append(("".join(" " + word for word in drawn), True))
        return texts, 0

    return System(write)


def given_texts(path):
    """What another system wrote: a file of JSON lines, matched by prompt."""
    given = read_lines(path, ("prompt", "text"))

    def write(lines, knob, seeds):
        left = {}
        for line in given:
            left.setdefault(line["prompt"], []).append(line)
        texts = []
        for line in lines:
            prompt = line["prompt"]
            if not left.get(prompt):
                raise UserError(
                    f"{path} does not match the benchmark: no text for the prompt {prompt!r}"
                )
            found = left[prompt].pop(0)  # prompts may repeat; each takes its next text
            texts.append((found["text"], bool(found.get("ended", True))))
        return texts, 0

    return System(write)


def autoregressive(path, options, corpus, device):
    """A GPT. Its settings are the nucleus and the temperature."""
    if Path(path).resolve() == Path(options.evaluator).resolve():
        raise UserError(
            f"{path} cannot be judged by itself; train another --evaluator, with another --seed"
        )
    gpt = build(GPT, TransformerConfig, load_gpt_state(str(path))).to(device)

    def write(lines, knob, seeds):
        rows = generate(gpt, [line["ids"] for line in lines], 0, seed=seeds, **knob)
        return decode(rows, corpus), sum(len(row) for row in rows) / len(rows)

    knobs = settings(options, ["top_p", "temperature"])
    return System(write, knobs, gpt.config.block_size - 1)  # it reads an end-of-text token first


def diffusion(writer, options, corpus):
    """A model that writes in steps. Its settings are the steps, and where it has them the guidance
    scale, the tokens to keep and the temperature."""

    def write(lines, knob, seeds):
        scale, keep = knob.get("cfg", 1.0), int(knob.get("keep", 0))
        sampling = Sampling(int(knob["steps"]), scale, knob.get("temperature", 1.0), seeds)
        rows = writer.write([line["ids"] for line in lines], 0, sampling, keep=keep)
        evaluations = sampling.steps
        if scale != 1:
            evaluations *= 2  # with and without the context
        if part := writer.block or keep:
            evaluations *= sum(math.ceil(len(row) / part) for row in rows) / len(rows)
        return decode(rows, corpus), evaluations

    names = ["steps"]
    if writer.kind != "masked":
        names.append("cfg")
    if options.keep != "0" and not writer.block:
        names.append("keep")
    if writer.has_temperature:
        names.append("temperature")
    return System(write, settings(options, names), writer.block_size)


def settings(options, names):
    """All combinations of the numbers of these options: a list of dicts. Raises UserError."""
    values = []
    for name in names:
        text = getattr(options, name)
        try:
            values.append([float(x) for x in text.split(",")])
        except ValueError:
            raise UserError(f"--{name}={text}: expected numbers with commas between") from None
        if not all((name == "steps") <= x < 1e6 for x in values[-1]):
            raise UserError(f"--{name}={text}: out of range")
    return [dict(zip(names, chosen)) for chosen in product(*values)]


def decode(rows, corpus):
    """Lists of ids -> (text, whether it ended) of each."""
    texts = []
    for row in rows:
        text = corpus.encoding.decode([i for i in row if i != corpus.eot])
        texts.append((text, corpus.eot in row))
    return texts


def load_model(kind, path, options, corpus, device):
    """The System of a checkpoint, or of a folder of one. Its VAE is vae.pt beside it."""
    path = path or f"{options.out}/{MODELS[kind]}"
    if kind == "textldm" and Path(path).is_dir():
        path = f"{path}/dit.pt"
    writer = load_writer(path, Path(path).with_name("vae.pt"), device)
    if kind not in (writer.kind, "textldm"):
        raise UserError(f"--systems: {path} holds a {writer.kind}, and no {kind}")
    if writer.tokenizer != corpus.tokenizer:
        raise UserError(
            f"{path} was trained with another vocabulary than {options.data}; name the right --data"
        )
    if writer.kind == "gpt":
        return autoregressive(path, options, corpus, device)
    return diffusion(writer, options, corpus)


def make_systems(options, corpus, device):
    """The systems by label, and the labels of those of kind textldm. Lowers corpus.N to the longest
    row that all of them can write. Raises UserError."""
    specs = [spec.strip() for spec in options.systems.split(",")]
    if options.texts:
        specs.append(f"{Path(options.texts).name}=texts:{options.texts}")
    systems = {}
    ours = []
    for spec in specs:
        label, _, rest = spec.rpartition("=")
        label = label or rest
        kind, _, path = rest.partition(":")
        if label in systems:
            raise UserError(
                f"--systems: two rows are called {label!r}; name them apart, LABEL=KIND:PATH"
            )
        if kind == "real":
            systems[label] = System(references)
        elif kind == "unigram":
            systems[label] = random_words(corpus)
        elif kind == "texts":
            systems[label] = given_texts(path)
        elif kind in MODELS:
            systems[label] = load_model(kind, path, options, corpus, device)
        else:
            kinds = ", ".join(MODELS)
            raise UserError(f"--systems: there is no kind {kind!r}; real, unigram, {kinds}")
        corpus.N = min(corpus.N, systems[label].longest_row)
        if kind == "textldm":
            ours.append(label)
    return systems, ours


# ---- The judge


class Measured(NamedTuple):
    """What a system wrote to one half of the prompts, with one setting, and what the judges make of
    it."""

    prompts: list  # n strings
    texts: list  # n strings
    ended: list  # n bools
    nll: np.ndarray  # (n,), in nats
    tokens: list  # n arrays, without the end-of-text
    count: np.ndarray  # (n,), numbers of tokens, with it
    features: np.ndarray  # (n, E)
    word_nll: np.ndarray  # (n,), in nats, by counts of words
    word_count: np.ndarray  # (n,)
    evaluations: float  # of a network, for a text
    seconds: float  # for all prompts, of both halves


class Judge:
    """Measures what systems write. Settings are chosen on one half of the prompts; the other is
    reported.

    corpus.N is the longest row, a prompt and its text, that all systems can write."""

    def __init__(self, options, corpus, lines, evaluator):
        """evaluator: the state of a checkpoint of a GPT."""
        self.options, self.corpus, self.lines = options, corpus, lines
        # The kind of attention depends on the length of rows.
        device, self.autocast = pick_device(options.device, corpus.N)
        self.tokenizer = evaluator["tokenizer"]
        self.evaluator = build(GPT, TransformerConfig, evaluator).to(device)
        self.training = metrics.TrainingText(corpus)
        self.word_model = WordModel(self.training.texts)
        self.clusters = min(options.clusters, len(lines) // 8)  # the same for halves as for wholes
        self.chosen_by, self.real = self.measure(System(references), {})
        # Half of what real text has: all of it would not be a draw.
        self.count = sum(len(ids) for ids in self.chosen_by.tokens) // 2

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
        """What a system writes with these settings: a Measured of the half of the prompts by which
        settings are chosen, and one of the half that is reported."""
        texts, *costs = self.write(system, knob)
        prompts = [line["prompt"] for line in self.lines]
        half = len(texts) // 2
        choosing = self.judge(prompts[:half], texts[:half], costs)
        return choosing, self.judge(prompts[half:], texts[half:], costs)

    def judge(self, prompts, texts, costs):
        nll, rows, features = metrics.score(
            self.evaluator, self.tokenizer, prompts, texts, self.autocast
        )
        eot = self.tokenizer["eot"]
        tokens = [np.array([i for i in row if i != eot], dtype=np.int64) for row in rows]
        count = np.array([len(row) for row in rows])
        by_words = self.word_model.score(prompts, texts)
        written, ended = zip(*texts)
        return Measured(
            prompts, list(written), ended, nll, tokens, count, features, *by_words, *costs
        )

    def rng(self, name):
        return rng_of(self.options.seed, name)

    def entropy(self, measured):
        rng = self.rng("entropy")
        return metrics.at_equal_count(metrics.entropy, measured.tokens, self.count, rng)

    def point(self, measured):
        """NLL per token by the GPT, NLL per word by counts, and entropy."""
        nll = measured.nll.sum() / max(measured.count.sum(), 1)
        by_words = measured.word_nll.sum() / max(measured.word_count.sum(), 1)
        spread, _ = self.entropy(measured)
        return dict(nll=float(nll), nll_word=float(by_words), entropy=spread)

    def try_all(self, system, bar):
        """Tries all settings of a system. Returns its row of the table, its points of the frontier
        (none, if it has no settings), and numbers of each text."""
        points = []
        reported = []
        for knob in system.knobs:
            choosing, reporting = self.measure(system, knob)
            points.append(self.point(choosing))
            reported.append(reporting)
            bar.update()
        frontier = []
        if system.knobs[0]:
            for knob, measured in zip(system.knobs, reported):
                frontier.append(dict(self.point(measured), knob=knob))
        best = metrics.choose(points, self.point(self.chosen_by))
        row = dict(knob=system.knobs[best], **self.row(reported[best]))
        nll, tokens = reported[best].nll.tolist(), reported[best].count.tolist()
        return row, frontier, dict(texts=reported[best].texts, nll=nll, tokens=tokens)

    def row(self, measured):
        """The columns of a system."""
        texts, prompts = measured.texts, measured.prompts
        size = np.array([len(text.encode("utf-8", "replace")) for text in texts])
        row = dict(nll=interval(measured.nll, self.rng("nll"), measured.count))
        row["nll_byte"] = interval(measured.nll, self.rng("nll_byte"), size)
        row["nll_word"] = interval(measured.word_nll, self.rng("nll_word"), measured.word_count)
        row["entropy"] = self.entropy(measured)
        # Of other prompts, so that real text is not compared with itself.
        references = self.chosen_by.features
        rng = self.rng("mauve")
        row["mauve"] = metrics.mauve(references, measured.features, self.clusters, rng)
        copied = metrics.copied(texts, prompts, self.training)
        row["copied_prompt"], row["copied_train"] = copied
        row["words_known"], row["copies"] = metrics.known(texts, prompts, self.training)
        row["repeated"] = metrics.repeated(texts, prompts)
        row["tokens"] = float(measured.count.mean())
        row["ended"] = metrics.percent(measured.ended)
        row["evaluations"] = float(measured.evaluations)
        row["seconds"] = measured.seconds
        if self.options.likeness:
            values = {}
            scores = metrics.rouge(texts, self.real.texts)
            for k, name in enumerate(("rouge_1", "rouge_2", "rouge_l")):
                values[name] = scores if isinstance(scores, str) else np.array(scores)[:, k]
            values["bertscore"] = metrics.bert_score(texts, self.real.texts)
            for name, value in values.items():
                is_absent = isinstance(value, str)
                row[name] = value if is_absent else interval(value, self.rng(name))
        return row


def judge_all(judge, systems, ours):
    """The dict of eval.json, without its settings."""
    rows = {}
    frontier = {}
    texts = {}
    total = sum(len(system.knobs) for system in systems.values())
    with tqdm(total=total, desc="evaluate") as bar:
        for name, system in systems.items():
            rows[name], points, texts[name] = judge.try_all(system, bar)
            if points:
                frontier[name] = points
    result = dict(systems=rows, frontier=frontier, real=judge.point(judge.real), texts=texts)
    for key in ("nll", "nll_word"):
        there = {}
        for name, points in frontier.items():
            there[name] = at_entropy(points, result["real"]["entropy"], key)
        result[f"{key}_at_real_entropy"] = there
    result["differences"] = {name: {} for name in frontier}
    for name, found in result["differences"].items():
        for other in ours:
            if other != name:
                rng = judge.rng("difference")
                found[other] = metrics.difference(texts[name], texts[other], rng)
    return result


# ---- The report


def report_of(result, ours):
    """The text of eval.md, from the dict of eval.json. ours: the names of the rows that all others
    are compared with."""
    setting = result["setting"]
    lines = [
        f"`{setting['command']}`, commit {setting['commit']}, {setting['machine']}.\n\n"
        f"{setting['n'] - setting['n'] // 2} prompts of {setting['benchmark']} (knobs chosen on "
        f"the other half), rows of at most {setting['row']} tokens; NLL and MAUVE's features: "
        f"{setting['evaluator']}, {setting['clusters']} clusters; entropy of {setting['count']} "
        "tokens. NLL is in nats. What is copied, known, repeated or ended, and MAUVE, is in "
        f"percent. ± is half of a 95% interval. Seconds are for {setting['n']} prompts.\n",
    ]
    for name, row in result["systems"].items():
        if len(lines) == 1:
            lines += head_of([title.replace("_", " ") for title in row])
        knob, *numbers = row.values()
        knob = " ".join(f"{key} {value:g}" for key, value in knob.items())
        lines.append(line_of([name, knob, *map(cell, numbers)]))
    if result["frontier"]:
        lines += frontier_lines(result, ours)
    return "\n".join(lines) + "\n"


def head_of(titles):
    return [line_of(["", *titles]), "|" + "---|" * (1 + len(titles))]


def line_of(cells):
    return "| " + " | ".join(cells) + " |"


def cell(x):
    """A number, a (number, half an interval), or a string that says why there is none."""
    if isinstance(x, str):
        return x
    return " ± ".join(f"{number:.2f}" for number in (x if isinstance(x, tuple) else [x]))


def frontier_lines(result, ours):
    """NLL at the entropy of real text, and differences between systems."""
    real = result["real"]
    there = result["nll_at_real_entropy"]
    gpts = [nll for name, nll in there.items() if "top_p" in result["systems"][name]["knob"]]
    lines = [
        "\nFrontier: NLL a token at the entropy of real text (which has "
        f"{real['nll']:.2f} at {real['entropy']:.2f}), its perplexity as a multiple of the first "
        f"GPT's, and NLL a word by counts there (real text: {real['nll_word']:.2f}). Then how much "
        "more NLL a token a row has than a column, at the chosen knobs, paired by prompt:\n",
        *head_of(["NLL there", "perplexity", "by counts", *[f"than {name}" for name in ours]]),
    ]
    for name, nll in there.items():
        cells = ["not reached", "", ""]
        if nll is not None:
            has_base = gpts and gpts[0] is not None
            times = f"{math.exp(nll - gpts[0]):.2f} x" if has_base else ""
            cells = [f"{nll:.2f}", times, f"{result['nll_word_at_real_entropy'][name]:.2f}"]
        differences = result["differences"][name]
        cells += [cell(differences.get(other, "")) for other in ours]
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
    except OSError:
        return "unknown"
    return done.stdout.strip()


def main():
    (options,) = command_line(__doc__, EvalConfig)
    missing = [name for name in ("rouge_score", "bert_score") if not find_spec(name)]
    if options.likeness and missing:
        raise UserError("--likeness needs more packages: pip install rouge-score bert-score")
    options.evaluator = options.evaluator or f"{options.out}/evaluator/gpt.pt"
    evaluator = load_gpt_state(options.evaluator)
    device, _ = pick_device(options.device)
    corpus = Corpus(options.data, "val", 1024)
    systems, ours = make_systems(options, corpus, device)
    path, lines = load_benchmark(options, corpus)
    judge = Judge(options, corpus, lines, evaluator)
    result = judge_all(judge, systems, ours)
    setting = dict(
        asdict(options),
        command=" ".join(sys.argv),
        commit=commit(),
        machine=machine(device),
        benchmark=path,
        row=corpus.N,
        clusters=judge.clusters,
        count=judge.count,
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
