"""Properties of bench/: what the judge makes of texts that are bad in a known way, and speeds."""

import json
import math
import time

import numpy as np
import pytest
import torch

from bench.ngram import WordModel
from bench.speed import cached_gpt, median_of
from tests.helpers import load, refuse, run_module, script, write_jsonl
from textldm import GPT, TransformerConfig

NOUNS = ["cat", "dog", "bird", "fox", "owl"]
VERBS = ["sees", "hears", "finds", "loves"]
PLACES = ["wood", "house", "river", "sky"]


def sentences():
    """Different sentences that a GPT learns in seconds."""
    rng = np.random.default_rng(0)
    columns = []
    for words in (NOUNS, VERBS, NOUNS, PLACES, NOUNS, VERBS, NOUNS, PLACES):
        columns.append(rng.choice(words, 600))
    texts = set()
    for a, v, b, p, c, w, d, q in zip(*columns):
        texts.add(f"the {a} {v} the {b} near the {p} and then the {c} {w} the {d} near the {q}")
    return sorted(texts)


def judge(folder, *more):
    options = ["--n=60", "--clusters=8", "--device=cpu"]
    where = ["--data", folder / "data", "--out", folder / "out"]
    script("bench/evaluate.py", *where, *options, *more)


def benchmark_of(folder, end=""):
    (path,) = (folder / "data").glob(f"benchmark_60_1_*{end}.jsonl")
    return path


def lines_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data/, with a GPT in out/ and its judge in out/evaluator/."""
    folder = tmp_path_factory.mktemp("judged")
    source = write_jsonl(folder / "texts.jsonl", sentences())
    options = ["--encoding=bpe", "--vocab_size=300", "--layout=documents", "--val_fraction=0.2"]
    script("data/prepare.py", source, "--out", folder / "data", *options)
    options = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--max_steps=150", "--batch_size=32"]
    options += ["--learning_rate=1e-2", "--warmup=10", "--device=cpu"]
    for seed, out in ((1, "out"), (2, "out/evaluator")):
        where = ["--data", folder / "data", "--out", folder / out]
        script("baselines/gpt.py", *where, f"--seed={seed}", *options)
    return folder


@pytest.fixture(scope="module")
def judged(trained):
    """The folder, and a file of texts that have collapsed: "the the the"."""
    folder = trained
    judge(folder, "--systems=real")  # makes the benchmark
    collapsed = []
    for line in lines_in(benchmark_of(folder)):
        text = " the" * len(line["reference"].split())
        collapsed.append(json.dumps(dict(prompt=line["prompt"], text=text)) + "\n")
    theirs = folder / "theirs.jsonl"
    theirs.write_text("".join(collapsed))
    judge(folder, "--systems=real,unigram,gpt", f"--texts={theirs}")
    report = json.loads((folder / "out/eval.json").read_text())
    return folder, theirs, report, (folder / "out/eval.md").read_text()


@pytest.fixture(scope="module")
def systems(judged):
    """The rows of the report by name, with those of the file as "collapsed"."""
    _, theirs, report, _ = judged
    rows = dict(report["systems"])
    rows["collapsed"] = rows.pop(theirs.name)
    assert list(rows) == ["real", "unigram", "gpt", "collapsed"]
    return rows


# ---- What the judge says


def test_what_has_no_order_is_improbable(systems):
    nll = {name: row["nll"][0] for name, row in systems.items()}
    assert nll["real"] + 1 < nll["unigram"]


def test_counts_of_words_rank_as_the_gpt_does_and_know_no_long_range(systems):
    nll = {name: row["nll_word"][0] for name, row in systems.items()}
    assert abs(nll["gpt"] - nll["real"]) < 0.3
    assert nll["real"] + 0.5 < nll["unigram"]


def test_counts_of_words_are_a_distribution():
    documents = ["the cat sat", "the cat ran", "a dog sat"] * 3
    model = WordModel(documents)
    letters = "abcdefghijklmnopqrstuvwxyz"
    seen = ["the", "cat", "sat", "ran", "a", "dog"]
    for before in ((), ("the",), ("the", "cat"), ("unknown",)):
        known = sum(model.words.probability((*before, word), len(before)) for word in seen)
        end = model.words.probability((*before, None), len(before))
        assert 0.5 < known + end < 1, "unknown words have the rest"
    after = [model.letters.probability(("c", letter), 1) for letter in letters]
    assert 0.5 < sum(after) < 1


def test_counts_of_words_tell_what_follows():
    model = WordModel(["the cat sat", "the cat ran", "a dog sat"] * 3)
    prompts = ["the cat ", "the cat ", "the cat ", "the c"]
    texts = [("ran", False), ("dog", False), ("xqzk", False), ("at", False)]
    nats, count = model.score(prompts, texts)
    assert count.tolist() == [1, 1, 1, 1]
    assert nats[0] < nats[1] < nats[2]
    assert nats[0] == pytest.approx(-math.log(model.words.probability(("the", "cat", "ran"), 2)))
    assert nats[3] < 1, "cat begins in the prompt"
    ended, count = model.score(["the cat "], [("ran", True)])
    assert count[0] == 2 and ended[0] > nats[0]


def test_a_trained_model_is_near_real_text(systems):
    gpt, real = systems["gpt"], systems["real"]
    assert abs(gpt["nll"][0] - real["nll"][0]) < 0.2
    assert abs(gpt["entropy"][0] - real["entropy"][0]) < 0.2


def test_a_collapse_shows_in_entropy_and_pairs(systems):
    collapsed, real = systems["collapsed"], systems["real"]
    assert collapsed["entropy"][0] < 0.5 < real["entropy"][0] - 0.5
    assert collapsed["distinct_2"][0] < 0.5 * real["distinct_2"][0]


def test_random_words_are_the_words_of_real_text(systems):
    unigram, real = systems["unigram"], systems["real"]
    assert abs(unigram["entropy"][0] - real["entropy"][0]) < 0.5


def test_what_is_copied_shows(systems):
    assert systems["unigram"]["copied_train"] < 0.5 * systems["real"]["copied_train"]
    assert systems["real"]["copies"] == 0
    assert systems["unigram"]["words_known"] > 99


def test_mauve_tells_good_texts_from_floors(systems):
    if isinstance(systems["real"]["mauve"], str):
        pytest.skip(systems["real"]["mauve"])
    mauve = {name: row["mauve"][0] for name, row in systems.items()}
    good = min(mauve[name] for name in ("real", "gpt"))
    bad = max(mauve[name] for name in ("unigram", "collapsed"))
    assert good > 2 * bad


def test_a_system_is_reported_at_a_setting_of_its_frontier(judged):
    _, _, report, text = judged
    points = report["frontier"]["gpt"]
    assert len(points) == 6, "two nuclei and three temperatures"
    assert report["systems"]["gpt"]["knob"] in [point["knob"] for point in points]
    assert text.count("| gpt |") == 2


def test_texts_do_not_depend_on_how_many_are_written_at_once(judged, tmp_path):
    folder, _, report, _ = judged
    out = folder / "out"
    options = [f"--systems=real,gpt=gpt:{out / 'gpt.pt'}", "--batch_size=7"]
    judge(folder, "--out", tmp_path, "--evaluator", out / "evaluator/gpt.pt", *options)
    texts = json.loads((tmp_path / "eval.json").read_text())["texts"]["gpt"]["texts"]
    same = sum(a == b for a, b in zip(texts, report["texts"]["gpt"]["texts"]))
    assert same >= 0.95 * len(texts), "up to rounding"


def test_whole_documents_are_judged_too(judged, tmp_path):
    folder = judged[0]
    out = folder / "out"
    options = ["--unprompted", f"--systems=real,unigram,gpt=gpt:{out / 'gpt.pt'}"]
    judge(folder, "--out", tmp_path, "--evaluator", out / "evaluator/gpt.pt", *options)
    rows = json.loads((tmp_path / "eval.json").read_text())["systems"]
    for line in lines_in(benchmark_of(folder, "_unprompted")):
        assert line["prompt"] == ""
        assert line["reference"].startswith("the ")
    assert abs(rows["gpt"]["nll"][0] - rows["real"]["nll"][0]) < 0.3
    assert rows["unigram"]["nll"][0] > rows["real"]["nll"][0] + 1
    assert rows["real"]["copies"] == 0


def test_the_kind_textldm_takes_a_folder_or_a_checkpoint_of_any_kind(home, tmp_path):
    """The VAE of a checkpoint is beside it."""
    dit = home / "out/dit.pt"
    gpt = home / "out/gpt.pt"
    systems = f"--systems=folder=textldm:{home / 'out'},file=textldm:{dit},gpt=textldm:{gpt}"
    (tmp_path / "evaluator").mkdir()
    (tmp_path / "evaluator/gpt.pt").write_bytes(gpt.read_bytes())
    options = ["--n=8", "--clusters=2", "--device=cpu"]
    options += ["--steps=2", "--cfg=1,2", "--temperature=1", "--top_p=1", "--keep=0,2"]
    where = ["--data", home / "data", "--out", tmp_path]
    script("bench/evaluate.py", *where, *options, systems)
    report = json.loads((tmp_path / "eval.json").read_text())
    folder, file = report["frontier"]["folder"], report["frontier"]["file"]
    assert [point["knob"] for point in folder] == [point["knob"] for point in file]
    assert len(folder) == 4
    assert [point["knob"]["keep"] for point in folder] == [0, 2, 0, 2]
    assert report["texts"]["folder"] == report["texts"]["file"]
    assert [point["knob"] for point in report["frontier"]["gpt"]] == [dict(temperature=1, top_p=1)]
    (benchmark,) = (home / "data").glob("benchmark_8_1_*.jsonl")
    benchmark.unlink()


# ---- Bad benchmarks


@pytest.fixture
def refuse_judging(judged, capsys):
    """Judging with these options is refused with these words, and changes nothing."""
    folder = judged[0]

    def check(words, *more):
        options = ["--data", folder / "data", "--out", folder / "out", "--n=60", "--device=cpu"]
        options += ["--systems=real", *more]
        refuse(capsys, words, "bench/evaluate.py", *options, keep=folder)

    return check


BAD_OPTIONS = [
    ("; --n=", ["--n=5000"]),
    ("kind 'fake'", ["--systems=real,fake"]),
    ("--top_p=1,x", ["--systems=gpt", "--top_p=1,x"]),
    ("two rows", ["--systems=real,real"]),
]


@pytest.mark.parametrize("words, options", BAD_OPTIONS)
def test_bad_options_are_refused(refuse_judging, words, options):
    refuse_judging(words, *options)


BAD_LINES = [
    ('{"prompt": "a"}', 'line 1: expected {"prompt"'),
    ("[1]", "line 1"),
    ("{", "line 1"),
    ('{"prompt": "a", "reference": " "}', "the reference is empty"),
    ('{"prompt": "a", "reference": "b"}', "has 1 lines"),
]


@pytest.mark.parametrize("line, words", BAD_LINES)
def test_bad_benchmarks_are_refused(refuse_judging, tmp_path, line, words):
    file = tmp_path / "benchmark.jsonl"
    file.write_text(line + "\n")
    refuse_judging(words, f"--benchmark={file}")


def test_a_missing_benchmark_is_refused(refuse_judging, tmp_path):
    refuse_judging("does not exist", f"--benchmark={tmp_path / 'none'}")


def test_texts_of_other_prompts_are_refused(refuse_judging, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"prompt": "a", "text": "b"}\n')
    refuse_judging("does not match the benchmark", f"--texts={file}")


def test_a_benchmark_is_not_cut_again(refuse_judging, tmp_path):
    file = tmp_path / "benchmark.jsonl"
    file.write_text('{"prompt": "a", "reference": "b"}\n')
    refuse_judging("leave one of them out", f"--benchmark={file}", "--unprompted")


def test_a_missing_evaluator_is_refused(refuse_judging, tmp_path):
    refuse_judging("evaluator/gpt.pt is missing", "--out", tmp_path)


def test_a_model_does_not_judge_itself(refuse_judging, judged):
    evaluator = f"--evaluator={judged[0] / 'out/gpt.pt'}"
    refuse_judging("judged by itself", "--systems=gpt", evaluator)


# ---- Speed


def test_a_gpt_with_a_cache_writes_what_it_does_without():
    torch.manual_seed(3)
    gpt = GPT(TransformerConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=50))
    for name, p in gpt.named_parameters():
        p.data = 0.5 * torch.randn(p.shape) + (".ln_" in f".{name}" and name.endswith("weight"))
    rows = []
    for prompt in torch.randint(0, 50, (2, 1, 5)):
        row = prompt[0].tolist()
        while len(row) < 12:
            row.append(gpt(torch.tensor([row]))[0, -1].argmax().item())
        found = cached_gpt(gpt, prompt, 7, torch.float32)
        assert found.tolist() == [row[5:]]
        rows += row
    assert len(set(rows)) > 10


def test_speed_tells_the_milliseconds_of_a_step_and_tokens_a_second(home, monkeypatch, capsys):
    """Each step is said to take 0.25 seconds, and each text of 5 tokens as long."""
    module = load("bench/speed.py")
    calls = []

    def median_of(work):
        calls.append(work())
        return 0.25

    monkeypatch.setattr(module, "median_of", median_of)
    where = ["--data", home / "data", "--out", home / "out"]
    run_module(module, "bench/speed.py", *where, "--new=5", "--device=cpu")
    out = capsys.readouterr().out
    for stage in ("gpt", "vae", "dit"):
        assert f"| {stage} | 250 |" in out
    for prompt in (16, 256):
        for system in ("TextLDM", "GPT"):
            assert f"| {prompt} tokens | {system} | 20.0 |" in out
    assert [len(texts[0]) <= 5 for texts in calls[3:]] == [True] * 4
    assert "torch" in out.splitlines()[0] and "commit" in out.splitlines()[0]


def test_a_median_is_of_the_seconds_of_a_call():
    assert 0.02 < median_of(lambda: time.sleep(0.02), 0.1) < 0.05


def test_speed_says_what_is_missing(home, tmp_path, capsys):
    where = ["--data", home / "data", "--out", tmp_path]
    refuse(capsys, "gpt.pt is missing; train it", "bench/speed.py", *where)
