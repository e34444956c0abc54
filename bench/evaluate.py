"""Judges continuations: TextLDM beside the autoregressive GPT, between real text and a floor.

    python baselines/gpt.py --seed=1234 --n_layer=6 --n_head=4 --n_embd=256 --max_steps=1000 \\
        --out=out/evaluator                               # the judge, once
    python bench/evaluate.py                              # names, with the models in out/
    python bench/evaluate.py --systems="real,gpt,with=textldm:out,without=textldm:out/norepa"
    python bench/evaluate.py --evaluator=gpt2-large --benchmark=stories.jsonl --texts=theirs.jsonl

Validation documents are cut in prompt and reference, and every system continues the same prompts.
NLL and entropy must both be those of real text: a system that collapses has a low NLL at a low
entropy. NLL says that a text is fluent, not that it is relevant. Rows of the table:

    real      the references. Their MAUVE is that of two disjoint halves: the ceiling
    unigram   words of the training text, drawn independently: the floor
    gpt       the autoregressive baseline
    masked    masked diffusion
    textldm   a folder with dit.pt and vae.pt, or a checkpoint of any kind with vae.pt beside it

KIND:PATH names another checkpoint. LABEL=KIND:PATH gives the row a name. Knobs are a sampler's
settings. They are chosen on one half of the prompts, to be nearest to real text in NLL and entropy,
and reported on the other half. The sweep on that other half is the frontier.

Writes OUT/eval.json (everything) and OUT/eval.md (the table). bench/plots.py draws the frontier.
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
from bench.metrics import interval, per_token
from bench.ngram import WORD, WordModel
from engine.checkpoint import build, load_gpt_state, write_whole
from engine.config import UserError, command_line
from engine.corpus import Corpus, encode
from engine.prompts import fit, read_lines, room_for_prompts
from engine.terminal import pick_device, run_script
from textldm import GPT, Sampling, TransformerConfig, option, row_seeds
from variants.writers import load_writer

MODELS = dict(gpt="gpt.pt", masked="masked.pt", textldm="dit.pt")  # kinds, and their files
SPEC = r"(?:(.+?)=)?(\w+)(?::(.+))?|.*"  # of a row of the table: label, kind and path


@dataclass
class EvalConfig:
    data: str = option("data/names", "folder of the prepared corpus that the models know")
    out: str = option("out", "folder of the models; the reports go there too")
    benchmark: str = option("", 'JSON lines {"prompt", "reference"} (made from val, in --data)')
    n: int = option(1000, "prompts", 8)
    unprompted: bool = option(False, "empty prompts: whole documents, compared with whole ones")
    seed: int = option(1, "of the benchmark, of the texts and of the intervals", 0, 2**31)
    systems: str = option("real,unigram,gpt,textldm", "rows: [LABEL=]KIND[:PATH], ...")
    texts: str = option("", 'JSON lines {"prompt", "text"} that another system wrote')
    evaluator: str = option("", "GPT that scores (OUT/evaluator/gpt.pt); or gpt2-large")
    cfg: str = option("1,1.5,2,3,5", "guidance scales to choose from")
    steps: str = option("10,20", "Euler steps to choose from")
    temperature: str = option("0.7,0.85,1", "temperatures to choose from")
    keep: str = option("0", "tokens to keep each time that the rest is written again; 0: all")
    top_p: str = option("0.9,1", "nuclei of the GPT to choose from")
    clusters: int = option(50, "of MAUVE; only equal ones compare", 2)
    batch_size: int = option(250, "prompts at once", 1)
    likeness: bool = option(False, "ROUGE and BERTScore too: pip install rouge-score bert-score")
    device: str = option("auto", "cpu, cuda, mps, or auto")


def make_benchmark(corpus, path, options):
    """Writes validation documents that fit a row, cut in prompt and reference. Raises UserError.

    The cut is where the word begins that is nearest to a place drawn in 40-60% of the characters,
    or at the start if unprompted. Documents of a stream end after a row."""
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
        if cuts and text.strip():
            cut = min(cuts, key=lambda i: abs(i - place))
            line = dict(prompt=text[:cut], reference=text[cut:], ended=len(ids) < corpus.N)
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        if len(lines) == options.n:
            break
    if len(lines) < options.n:
        raise UserError(
            f"--n={options.n}, but only {len(lines)} documents of {corpus.path} fit a row and have "
            "a place between two words; lower --n, prepare more, or name a --benchmark"
        )
    write_whole(path, "".join(lines))


def beginnings_of_words(text):
    """The places of spaces with words before and after. Where there is none, those between two
    characters of a script without spaces."""
    places = [i for i, sign in enumerate(text) if sign.isspace() and text[:i].strip()]
    places = [i for i in places if text[i:].strip()]
    words = list(regex.finditer(WORD, text))
    return places or [b.start() for a, b in zip(words, words[1:]) if a.end() == b.start()]


def load_benchmark(options, corpus):
    """The path of the benchmark, and a list of n dicts with the prompt, its ids, the reference and
    whether it ended. The corpus's own is made if it is not there yet. Raises UserError."""
    end = "_unprompted" if options.unprompted else ""
    own = f"{options.data}/benchmark_{options.n}_{options.seed}_{corpus.N}{end}.jsonl"
    path = options.benchmark or own
    if options.benchmark and options.unprompted:
        raise UserError(f"{path} is cut already, so --unprompted has no use; leave one of them out")
    if not options.benchmark and not Path(own).exists():
        make_benchmark(corpus, own, options)
    lines = read_lines(path, ("prompt", "reference"))
    for i, line in enumerate(lines, start=1):
        if not line["reference"].strip():
            raise UserError(f"{path}, line {i}: the reference is empty; leave the line out")
    if len(lines) < options.n:
        raise UserError(f"--n={options.n}, but {path} has {len(lines)} lines; lower --n")
    # Shuffled, because one half is compared with the other.
    order = np.random.default_rng(options.seed).permutation(len(lines))
    lines = [lines[i] for i in order[: options.n]]
    room = room_for_prompts(0, corpus.N)
    for i, line in enumerate(lines):
        line["ids"] = fit(encode(corpus.encoding, line["prompt"]), room, i + 1)
        line["ended"] = bool(line.get("ended", True))
    return path, lines


# ---- The systems


class System(NamedTuple):
    """What writes. write(lines, knob, seeds) continues the prompts of lines, dicts of the
    benchmark, by one of the settings in `knobs`, with a seed for each line. It returns a list of
    (text, whether it ended), and how often a network is evaluated for a text, on average."""

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
    texts = [decode(row, corpus)[0] for row in rows.tolist()]
    words = np.array(" ".join(texts).split())

    def write(lines, knob, seeds):
        rng = np.random.default_rng(seeds)
        texts = []
        for other in [*lines[-1:], *lines[:-1]]:
            drawn = rng.choice(words, len(other["reference"].split()))
            texts.append(("".join(" " + word for word in drawn), True))
        return texts, 0

    return System(write)


def given_texts(path):
    """What another system wrote: a file of JSON lines, matched by prompt."""
    left = {}
    for line in read_lines(path, ("prompt", "text")):
        left.setdefault(line["prompt"], []).append(line)

    def write(lines, knob, seeds):
        texts = []
        for line in lines:
            prompt = line["prompt"]
            if not left.get(prompt):
                raise UserError(f"{path} has no text for the prompt {prompt!r} of the benchmark")
            found = left[prompt].pop(0)  # prompts may repeat; each takes its next text
            texts.append((found["text"], bool(found.get("ended", True))))
        return texts, 0

    return System(write)


def settings(options, names):
    """All combinations of the numbers of these options: a list of dicts. Raises UserError."""
    values = []
    for name in names:
        text = getattr(options, name)
        try:
            numbers = [float(x) for x in text.split(",")]
        except ValueError:
            numbers = [math.nan]
        if not all((name == "steps") <= x < 1e6 for x in numbers):
            raise UserError(f"--{name}={text}: expected numbers in range, with commas between")
        values.append(numbers)
    return [dict(zip(names, chosen)) for chosen in product(*values)]


def evaluations_of(writer, knob, length):
    """How often a network is evaluated for a text of `length` tokens."""
    if writer.kind == "gpt":
        return length
    passes = 2 if knob.get("cfg", 1) != 1 else 1  # with and without the context
    part = writer.block or knob.get("keep")
    return knob["steps"] * passes * (math.ceil(length / part) if part else 1)


def decode(row, corpus):
    """Ids as (text, whether it ended)."""
    return corpus.encoding.decode([i for i in row if i != corpus.eot]), corpus.eot in row


def load_model(kind, path, options, corpus, device):
    """The System of a checkpoint, or of a folder of one. Its VAE is vae.pt beside it.

    The settings of a GPT are the nucleus and the temperature. Those of other models are the steps,
    and where they have them the guidance scale, the tokens to keep and the temperature."""
    path = os.path.expanduser(path or f"{options.out}/{MODELS[kind]}")
    if kind == "textldm" and Path(path).is_dir():
        path = f"{path}/dit.pt"
    writer = load_writer(path, Path(path).with_name("vae.pt"), device)
    if kind not in (writer.kind, "textldm"):
        raise UserError(f"--systems: {path} holds a {writer.kind}, and no {kind}")
    if writer.tokenizer != corpus.tokenizer:
        raise UserError(f"{path} has another vocabulary than {options.data}; name the right --data")
    if writer.kind == "gpt":
        if Path(path).resolve() == Path(options.evaluator).resolve():
            raise UserError(f"{path} cannot be judged by itself; train one with another --seed")
        gpt = build(GPT, TransformerConfig, load_gpt_state(path)).to(device)
        names = ["top_p", "temperature"]
    else:
        names = ["steps"]
        if writer.kind != "masked":
            names.append("cfg")
        if options.keep != "0" and not writer.block:
            names.append("keep")
        if writer.has_temperature:
            names.append("temperature")

    def continue_prompts(prompts, knob, seeds):
        if writer.kind == "gpt":
            return generate(gpt, prompts, 0, seed=seeds, **knob)
        scale, temperature = knob.get("cfg", 1.0), knob.get("temperature", 1.0)
        sampling = Sampling(int(knob["steps"]), scale, temperature, seeds)
        return writer.write(prompts, 0, sampling, keep=int(knob.get("keep", 0)))

    def write(lines, knob, seeds):
        rows = []
        for start in range(0, len(lines), options.batch_size):
            batch = slice(start, start + options.batch_size)
            prompts = [line["ids"] for line in lines[batch]]
            rows += continue_prompts(prompts, knob, seeds[batch])
        evaluations = [evaluations_of(writer, knob, len(row)) for row in rows]
        return [decode(row, corpus) for row in rows], float(np.mean(evaluations))

    return System(write, settings(options, names), writer.block_size)


def make_systems(options, corpus, device):
    """The systems by label, and the labels of those of kind textldm. Lowers corpus.N to the longest
    row that all of them can write. Raises UserError."""
    systems = {}
    ours = []
    specs = [spec.strip() for spec in options.systems.split(",")]
    if options.texts:
        specs.append(f"{Path(options.texts).name}=texts:{options.texts}")
    for spec in specs:
        label, kind, path = re.fullmatch(SPEC, spec).groups()
        label = label or spec
        if label in systems or kind not in ("real", "unigram", "texts", *MODELS):
            raise UserError(
                f"--systems: {spec!r}: expected [LABEL=]KIND[:PATH], with a LABEL of its own; "
                f"KIND is real, unigram, texts, {', '.join(MODELS)}"
            )
        if kind == "real":
            systems[label] = System(references)
        elif kind == "unigram":
            systems[label] = random_words(corpus)
        elif kind == "texts":
            systems[label] = given_texts(path or "")
        else:
            systems[label] = load_model(kind, path, options, corpus, device)
        corpus.N = min(corpus.N, systems[label].longest_row)
        if kind == "textldm":
            ours.append(label)
    return systems, ours


# ---- The judge


class Judge:
    """Measures what systems write, each half of the prompts apart. corpus.N is the longest row, a
    prompt and its text, that all systems can write."""

    def __init__(self, options, corpus, lines, evaluator):
        """evaluator: the state of a checkpoint of a GPT."""
        self.seed, self.corpus, self.lines = options.seed, corpus, lines
        self.likeness = options.likeness
        # The kind of attention depends on the length of rows.
        device, self.autocast = pick_device(options.device, corpus.N)
        self.tokenizer = evaluator["tokenizer"]
        self.evaluator = build(GPT, TransformerConfig, evaluator).to(device)
        self.training = metrics.TrainingText(corpus)
        self.word_model = WordModel(self.training.texts)
        self.clusters = min(options.clusters, len(lines) // 8)  # the same for halves as for wholes
        self.chosen_by, self.real, _ = self.measure(System(references), {})
        # Half of what real text has: all of it would not be a draw.
        self.count = sum(len(ids) for ids in self.chosen_by["tokens"]) // 2

    def measure(self, system, knob):
        """What a system writes with these settings: the half of the prompts by which settings are
        chosen, the half that is reported (both as `judge` returns them), and what both cost."""
        began = time.time()
        seeds = row_seeds([line["ids"] for line in self.lines], self.seed)
        with self.autocast, torch.no_grad():
            texts, evaluations = system.write(self.lines, knob, seeds)
        costs = dict(evaluations=float(evaluations), seconds=time.time() - began)
        texts = [self.fit(line, *text) for line, text in zip(self.lines, texts)]
        half = len(texts) // 2
        prompts = [line["prompt"] for line in self.lines]
        choosing = self.judge(prompts[:half], texts[:half])
        return choosing, self.judge(prompts[half:], texts[half:]), costs

    def fit(self, line, text, ended):
        """A (text, ended), cut to the room that a row leaves after its prompt."""
        ids = encode(self.corpus.encoding, text)
        room = self.corpus.N - len(line["ids"])
        if len(ids) + ended > room:
            return self.corpus.encoding.decode(ids[:room]).rstrip("\ufffd"), False
        return text, ended

    def judge(self, prompts, texts):
        """What metrics.score says of n (text, ended), and prompts, texts and ended, n each."""
        written, ended = zip(*texts)
        scores = metrics.score(self.evaluator, self.tokenizer, prompts, texts, self.autocast)
        scores["word_nll"], scores["words"] = self.word_model.score(prompts, texts)
        return dict(scores, prompts=prompts, texts=written, ended=ended)

    def rng(self, name):
        """The generator of one metric, by its name. So no metric moves the draws of another."""
        return np.random.default_rng([self.seed, *name.encode()])

    def numbers(self, half):
        """NLL per token by the GPT, NLL per word by counts, and entropy, with half an interval."""
        nll = per_token(half["nll"], half["count"], self.rng("nll"))
        by_words = per_token(half["word_nll"], half["words"], self.rng("nll_word"))
        entropy = metrics.entropy(half["tokens"], self.count, self.rng("entropy"))
        return dict(nll=interval(nll), nll_word=interval(by_words), entropy=entropy)

    def point(self, half):
        """Its numbers without intervals."""
        return {name: value for name, (value, _) in self.numbers(half).items()}

    def row(self, half):
        """The columns of a system, without its settings and costs."""
        texts, prompts, row = half["texts"], half["prompts"], self.numbers(half)
        size = [len(text.encode("utf-8", "replace")) for text in texts]
        row["nll_byte"] = interval(per_token(half["nll"], size, self.rng("nll_byte")))
        # Of other prompts, so that real text is not compared with itself.
        features = self.chosen_by["features"], half["features"]
        row["mauve"] = metrics.mauve(*features, self.clusters, self.rng("mauve"))
        row["copied_prompt"], row["copied_train"] = metrics.copied(texts, prompts, self.training)
        row["words_known"], row["copies"] = metrics.known(texts, prompts, self.training)
        row["repeated"] = metrics.repeated(texts, prompts)
        row["tokens"] = float(half["count"].mean())
        row["ended"] = metrics.percent(half["ended"])
        if self.likeness:
            references = self.real["texts"]
            names = ("rouge_1", "rouge_2", "rouge_l", "bertscore")
            scores = *metrics.rouge(texts, references), metrics.bert_score(texts, references)
            for name, found in zip(names, scores):
                if not isinstance(found, str):
                    found = interval(per_token(found, np.ones(len(found)), self.rng(name)))
                row[name] = found
        return row

    def try_all(self, system, bar):
        """Tries all settings of a system. Returns its row of the table, its points of the frontier
        (none, if it has no settings), and numbers of each text."""
        tried = []
        for knob in system.knobs:
            tried.append(self.measure(system, knob))
            bar.update()
        points = [self.point(choosing) for choosing, _, _ in tried]
        frontier = []
        for knob, (_, reporting, _) in zip(system.knobs, tried):
            if knob:
                frontier.append(dict(self.point(reporting), knob=knob))
        best = metrics.choose(points, self.point(self.chosen_by))
        _, half, costs = tried[best]
        row = dict(knob=system.knobs[best], **self.row(half), **costs)
        numbers = dict(nll=half["nll"].tolist(), tokens=half["count"].tolist())
        return row, frontier, dict(numbers, texts=half["texts"])


def judge_all(judge, systems, ours):
    """The dict of eval.json, without its settings. ours: the labels of the rows with which all
    others are compared."""
    real = judge.point(judge.real)
    rows = {}
    frontier = {}
    texts = {}
    with tqdm(total=sum(len(s.knobs) for s in systems.values()), desc="evaluate") as bar:
        for name, system in systems.items():
            rows[name], points, texts[name] = judge.try_all(system, bar)
            if points:
                frontier[name] = points
    drawn = {}
    for name, of in texts.items():
        drawn[name] = per_token(of["nll"], of["tokens"], judge.rng("difference"))
    for name, row in rows.items():
        for key in ("nll", "nll_word"):
            points = frontier.get(name, [])
            row[f"{key}_at_real_entropy"] = metrics.at_entropy(points, real["entropy"], key)
        for other in ours:
            row[f"nll_above_{other}"] = interval(drawn[name] - drawn[other])
    return dict(systems=rows, frontier=frontier, real=real, texts=texts)


# ---- The report


def report_of(result):
    """The text of eval.md, from the dict of eval.json."""
    setting, rows = result["setting"], result["systems"]
    lines = [
        f"`{setting['command']}`, commit {setting['commit']}, {setting['machine']}.\n\n"
        f"Half of {setting['n']} prompts of {setting['benchmark']} (knobs chosen on the other). "
        f"Rows of at most {setting['row']} tokens; NLL and MAUVE by {setting['evaluator']}, "
        f"{setting['clusters']} clusters; entropy of {setting['count']} tokens. NLL is in nats: a "
        "token, by the GPT; a word, by counts; at the entropy of real text, by all knobs; above a "
        "system, paired by prompt. Tokens and evaluations of a network are for a text, seconds for "
        "all prompts, and the rest is in percent. ± is half of a 95% interval.\n",
    ]
    for name, row in rows.items():
        if len(lines) == 1:
            lines.append(f"| | {' | '.join(row).replace('_', ' ')} |")
            lines.append("|" + "---|" * (1 + len(row)))
        lines.append(f"| {name} | {' | '.join(map(cell, row.values()))} |")
    return "\n".join(lines) + "\n"


def cell(x):
    """Settings, a number, a (number, half an interval), or a string that says why there is none."""
    if isinstance(x, dict):
        return " ".join(f"{key} {value:g}" for key, value in x.items())
    if isinstance(x, str):
        return x
    return " ± ".join(f"{number:.2f}" for number in (x if isinstance(x, tuple) else [x]))


def machine(device):
    """Processor and accelerator, in words."""
    info = Path("/proc/cpuinfo")
    found = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    text = f"{os.cpu_count()} x {[platform.processor(), *found][-1]}"
    return f"{text}, {torch.cuda.get_device_name()}" if device.type == "cuda" else text


def commit():
    """The commit of this code, and whether it was changed since."""
    command = f'git -C "{Path(__file__).parent}" describe --always --dirty --exclude="*"'
    status, text = subprocess.getstatusoutput(command)
    return "unknown" if status else text


def main():
    (options,) = command_line(__doc__, EvalConfig)
    if options.likeness and not (find_spec("rouge_score") and find_spec("bert_score")):
        raise UserError("--likeness needs more packages: pip install rouge-score bert-score")
    options.evaluator = options.evaluator or f"{options.out}/evaluator/gpt.pt"
    evaluator = load_gpt_state(options.evaluator)
    device, _ = pick_device(options.device)
    corpus = Corpus(options.data, "val", 1024)
    systems, ours = make_systems(options, corpus, device)
    path, lines = load_benchmark(options, corpus)
    judge = Judge(options, corpus, lines, evaluator)
    result = judge_all(judge, systems, ours)
    setting = dict(asdict(options), benchmark=path, row=corpus.N)
    setting.update(clusters=judge.clusters, count=judge.count)
    setting.update(command=" ".join(sys.argv), commit=commit(), machine=machine(device))
    result = dict(setting=setting, **result)
    text = report_of(result)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "eval.json", json.dumps(result, default=float))
    write_whole(out / "eval.md", text)
    print(text)


if __name__ == "__main__":
    run_script(main)
