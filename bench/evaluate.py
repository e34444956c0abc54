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
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex  # tiktoken depends on it too
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.metrics import (
    TrainingText,
    at_entropy,
    at_equal_count,
    bert_score,
    choose,
    copied,
    difference,
    different,
    entropy,
    interval,
    known,
    mauve,
    repeated,
    rouge,
    score,
    words_and_pairs,
)
from bench.ngram import WORD, WordModel
from bench.report import commit, machine, report_of
from bench.systems import References, make_system
from engine.checkpoint import build, load_gpt_state, write_whole
from engine.config import command_line
from engine.corpus import Corpus, encode
from engine.prompts import fit, read_lines, room_for_prompts
from engine.loop import pick_device
from engine.script import UserError, run_script
from textldm import GPT, TransformerConfig, option, row_seeds


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


# ---- The judge -----------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What a system wrote to all n prompts, with one setting, and what the evaluator makes of
    it."""

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
        self.rng = np.random.default_rng(options.seed)
        half = len(lines) // 2
        self.choosing = slice(0, half)
        self.reporting = slice(half, None)
        self.training = TrainingText(corpus)
        self.word_model = WordModel(self.training.texts)
        self.clusters = min(options.clusters, half // 4)  # the same for halves as for wholes
        self.truth = self.measure(References(), {})
        # Half of what real text has: all of it would not be a draw.
        self.count_of_words = sum(len(x) for x in self.truth.words[self.choosing]) // 2
        self.count_of_pairs = sum(len(x) for x in self.truth.pairs[self.choosing]) // 2

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
        encoding = self.corpus.encoding
        for i, (text, ended) in enumerate(texts):
            ids = encode(encoding, text)
            room = self.corpus.N - len(self.lines[i]["ids"])
            if len(ids) + ended > room:
                texts[i] = encoding.decode(ids[:room]).rstrip("\ufffd"), False
        return texts, evaluations, seconds

    def measure(self, system, knob):
        texts, evaluations, seconds = self.write(system, knob)
        prompts = [line["prompt"] for line in self.lines]
        nll, rows, features = score(self.evaluator, self.tokenizer, prompts, texts, self.autocast)
        words, pairs = words_and_pairs(rows, self.tokenizer["eot"])
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
            pairs=pairs,
        )

    def point(self, measured, part):
        """NLL per token by the GPT, NLL per word by counts, and entropy, of a half of the
        prompts."""
        nll = float(measured.nll[part].sum() / max(measured.tokens[part].sum(), 1))
        by_words = float(measured.word_nll[part].sum() / max(measured.word_count[part].sum(), 1))
        spread, _ = at_equal_count(entropy, measured.words[part], self.count_of_words, self.rng)
        return dict(nll=nll, nll_word=by_words, entropy=spread)

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
        best = choose(points, self.point(self.truth, self.choosing))
        measured = tried[best]
        row = dict(knob=system.knobs[best], **self.row(measured))
        per_text = dict(
            texts=measured.texts[self.reporting],
            nll=measured.nll[self.reporting].tolist(),
            tokens=measured.tokens[self.reporting].tolist(),
        )
        return row, frontier, per_text

    def row(self, measured):
        """The columns of a system, of the reported half."""
        part = self.reporting
        rng = self.rng
        texts = measured.texts[part]
        nll = measured.nll[part]
        tokens = measured.tokens[part]
        size = np.array([len(text.encode("utf-8", "replace")) for text in texts])
        prompts = [line["prompt"] for line in self.lines[part]]
        real = self.truth.features[self.choosing]

        # The order of these lines is that of the random draws.
        row = dict(nll=interval(nll, rng, tokens), nll_byte=interval(nll, rng, size))
        row["nll_word"] = interval(measured.word_nll[part], rng, measured.word_count[part])
        words = measured.words[part]
        row["entropy"] = at_equal_count(entropy, words, self.count_of_words, rng)
        pairs = measured.pairs[part]
        row["distinct_2"] = at_equal_count(different, pairs, self.count_of_pairs, rng)
        row["mauve"] = mauve(real, measured.features[part], self.clusters, rng)
        if self.options.likeness:
            references = self.truth.texts[part]
            scores = rouge(texts, references)
            for i, name in enumerate(("rouge_1", "rouge_2", "rouge_l")):
                row[name] = interval(scores[:, i], rng)
            likeness = bert_score(texts, references)
            is_absent = isinstance(likeness, str)
            row["bertscore"] = likeness if is_absent else interval(likeness, rng)
        row["copied_prompt"], row["copied_train"] = copied(texts, prompts, self.training)
        row["words_known"], row["copies"] = known(texts, prompts, self.training)
        row["repeated"] = repeated(texts, prompts)
        row["tokens"] = float(tokens.mean())
        row["ended"] = float(np.mean(measured.ended[part]))
        row["evaluations"] = float(measured.evaluations)
        row["seconds"] = measured.seconds
        return row


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


def make_systems(options, corpus, device):
    """The systems by label, and the labels of those of kind textldm. Lowers corpus.N to the longest
    row that all of them can write."""
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
        systems[label] = make_system(kind, path, options, corpus, device)
        corpus.N = min(corpus.N, systems[label].longest_row)
        if kind == "textldm":
            ours.append(label)
    return systems, ours


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
    nll_at_real_entropy = {}
    nll_word_at_real_entropy = {}
    differences = {}
    for name, points in frontier.items():
        nll_at_real_entropy[name] = at_entropy(points, real["entropy"], "nll")
        nll_word_at_real_entropy[name] = at_entropy(points, real["entropy"], "nll_word")
        differences[name] = {}
        for other in ours:
            if other != name:
                more = difference(texts[name], texts[other], judge.rng)
                differences[name][other] = more
    return dict(
        systems=rows,
        frontier=frontier,
        real=real,
        nll_at_real_entropy=nll_at_real_entropy,
        nll_word_at_real_entropy=nll_word_at_real_entropy,
        differences=differences,
        texts=texts,
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
