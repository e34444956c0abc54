"""What bench/evaluate.py, bench/plots.py and bench/speed.py make of texts, and what they refuse."""

import json
import math
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import evaluate, metrics, plots
from bench.evaluate import Judge, System, beginnings_of_words, make_benchmark
from bench.speed import cached_gpt, median_of
from engine.config import UserError, command_line
from engine.corpus import Corpus
from tests.helpers import load, refuse, run_module, script
from textldm import GPT, TransformerConfig, row_seeds

CPU = "--device=cpu"


# ---- The judge


class Words:
    """An encoding of words."""

    def encode(self, text, disallowed_special):
        return text.split()

    decode = staticmethod(" ".join)


def by_hand(prompts, texts):
    """Judge.judge, of texts that say their NLL and their token: a text "3 7" has 3 nats in two
    tokens, 7 and 7."""
    numbers = [[float(x) for x in text.split()] for text, _ in texts]
    nll = np.array([x for x, _ in numbers])
    tokens = [np.array([int(token)] * 2) for _, token in numbers]
    written, ended = zip(*texts)
    of_words = dict(word_nll=10 * nll, words=np.full(len(texts), 5))
    half = dict(nll=nll, tokens=tokens, count=np.full(len(texts), 2), features=nll[:, None])
    return dict(half, **of_words, prompts=prompts, texts=written, ended=ended)


@pytest.fixture
def judge(monkeypatch):
    """A Judge of four prompts. Real texts have 4 nats in the first half, and 8 in the second."""
    judge = object.__new__(Judge)
    judge.lines = []
    for i, reference in enumerate(["4 1", "4 2", "8 3", "8 4"]):
        judge.lines.append(dict(prompt=f"p{i}", ids=[i], reference=reference, ended=True))
    judge.seed, judge.training, judge.judge = 1, None, by_hand
    judge.corpus = SimpleNamespace(N=9, encoding=Words())
    judge.autocast = torch.autocast("cpu", enabled=False)
    judge.clusters, judge.count = 2, 2
    judge.chosen_by, judge.real, _ = judge.measure(System(evaluate.references), {})
    monkeypatch.setattr(metrics, "mauve", lambda *given: tuple(x.tolist() for x in given[:2]))
    monkeypatch.setattr(metrics, "copied", lambda texts, prompts, training: (texts, prompts))
    monkeypatch.setattr(metrics, "known", lambda texts, prompts, training: (prompts, 0.0))
    monkeypatch.setattr(metrics, "repeated", lambda texts, prompts: (texts, prompts))
    return judge


# Nats of a text in the first half, and in the second.
NATS = {1: (4, 2), 2: (9, 4), 3: (1, 8)}


def write(lines, knob, seeds):
    assert seeds == row_seeds([[0], [1], [2], [3]], 1)
    texts = []
    for line in lines:
        (i,) = line["ids"]
        texts.append((f"{NATS[knob['x']][i // 2] + i % 2} {i}", i != 3))
    return texts, 30


def test_settings_are_chosen_on_one_half_and_reported_on_the_other(judge):
    """In the first half knob 1 is near the 4 nats of real text there. In the second, which has 8,
    it would be knob 3; and knob 2 if the halves were mixed up. MAUVE compares with the first."""
    knobs = [dict(x=x) for x in (3, 2, 1)]
    row, frontier, per_text = judge.try_all(System(write, knobs), SimpleNamespace(update=int))
    assert row["knob"] == dict(x=1)
    assert per_text == dict(texts=("2 2", "3 3"), nll=[2, 3], tokens=[2, 2])
    assert [point["nll"] for point in frontier] == [17 / 4, 9 / 4, 5 / 4]
    assert [point["nll_word"] for point in frontier] == [17, 9, 5]
    assert [point["knob"] for point in frontier] == knobs
    assert (row["nll"][0], row["nll_word"][0]) == (5 / 4, 50 / 10), "nats a token, and a word"
    assert row["mauve"] == ([[4], [4]], [[2], [3]])
    assert (row["copied_prompt"], row["copied_train"]) == (("2 2", "3 3"), ["p2", "p3"])
    assert (row["words_known"], row["repeated"]) == (["p2", "p3"], (("2 2", "3 3"), ["p2", "p3"]))
    assert (row["ended"], row["evaluations"]) == (50, 30) and row["seconds"] < 9


def test_a_text_is_cut_to_the_room_of_its_row(judge):
    for N, expected in ((3, ("4 1", False)), (4, ("4 1", True)), (2, ("4", False))):
        judge.corpus.N = N
        assert judge.fit(dict(ids=[0]), "4 1", True) == expected


def test_a_report_compares_all_with_ours(judge):
    """All points have the entropy of real text, and that of knob 2 is the best there."""
    knobs = dict(gpt=[dict(x=3), dict(x=2)], ours=[dict(x=2)])
    systems = {name: System(write, knobs[name]) for name in knobs}
    judge.count = 3
    systems["real"] = System(evaluate.references)
    result = evaluate.judge_all(judge, systems, ["ours"])
    real = result["real"]
    assert (real["nll"], real["nll_word"]) == (4, 16)
    assert list(result["frontier"]) == ["gpt", "ours"]
    rows = result["systems"]
    assert [rows[name]["nll_above_ours"][0] for name in ("gpt", "ours", "real")] == [2, 0, 1.75]
    assert rows["gpt"]["nll_above_ours"] == (2, 0), "4 nats more in each text of two tokens"
    assert rows["gpt"]["nll_at_real_entropy"] == 9 / 4
    assert rows["gpt"]["nll_word_at_real_entropy"] == 9
    assert math.isnan(rows["real"]["nll_at_real_entropy"])


def test_the_table_has_settings_numbers_and_intervals():
    row = dict(knob=dict(steps=20.0, cfg=1.5), nll_word=(2, 0.25), mauve="none", ended=1 / 3)
    names = "command commit machine n benchmark row evaluator clusters count"
    setting = dict.fromkeys(names.split())
    lines = evaluate.report_of(dict(systems=dict(a=row), setting=setting)).splitlines()[-3:]
    assert lines[0] == "| | knob | nll word | mauve | ended |" and lines[1].count("---|") == 5
    assert lines[2] == "| a | steps 20 cfg 1.5 | 2.00 ± 0.25 | none | 0.33 |"


# ---- Systems


class Model(SimpleNamespace):
    """A Writer that notes what it is asked for, and writes the length of a prompt."""

    def write(self, prompts, length, sampling, keep):
        self.asked += [(sampling, keep)]
        return [[len(prompt)] * len(prompt) for prompt in prompts]


def test_settings_are_all_combinations_and_prompts_go_in_batches_with_their_seeds(monkeypatch):
    model = Model(kind="dit", block=0, block_size=7, has_temperature=True, tokenizer={}, asked=[])
    monkeypatch.setattr(evaluate, "load_writer", lambda path, vae_path, device: model)
    encoding = SimpleNamespace(decode=str)
    corpus = SimpleNamespace(eot=2, tokenizer={}, encoding=encoding)
    config = evaluate.EvalConfig(steps="4", cfg="1,3", keep="0,2", temperature="0.5,1")
    config.batch_size = 2
    system = evaluate.load_model("textldm", "x/dit.pt", config, corpus, "cpu")
    assert len(system.knobs) == 8 and system.longest_row == 7
    assert system.knobs[1] == dict(steps=4, cfg=1, keep=0, temperature=1)
    lines = [dict(ids=[1] * length) for length in (1, 2, 6)]
    texts, evaluations = system.write(lines, system.knobs[-2], [5, 6, 7])
    assert texts == [("[1]", False), ("[]", True), ("[6, 6, 6, 6, 6, 6]", False)]
    assert evaluations == 4 * 2 * (1 + 1 + 3) / 3
    (first, keep), (second, _) = model.asked
    assert (first.seed, second.seed, keep) == ([5, 6], [7], 2)
    assert (first.steps, first.cfg_scale, first.temperature) == (4, 3, 0.5)
    model.kind, model.block = "masked", 2
    system = evaluate.load_model("masked", "", config, corpus, "cpu")
    assert system.knobs == [dict(steps=4, temperature=0.5), dict(steps=4, temperature=1)]


def test_evaluations_are_counted_for_a_text_of_five_tokens():
    def count(kind, block, **knob):
        return evaluate.evaluations_of(SimpleNamespace(kind=kind, block=block), knob, 5)

    assert count("gpt", 0) == 5
    assert (count("dit", 0, steps=4, cfg=1), count("dit", 0, steps=4, cfg=3)) == (4, 8)
    assert (count("dit", 0, steps=4, keep=2), count("cola_dlm", 4, steps=4)) == (12, 8)


def test_drawn_words_are_of_the_training_text_and_as_many_as_anothers(home):
    corpus = Corpus(home / "data", "val", 64)
    lines = [dict(reference="d"), dict(reference="e f g")]
    texts, _ = evaluate.random_words(corpus).write(lines, {}, [1, 2])
    train = Corpus(home / "data", "train", 64)
    words = set(corpus.encoding.decode(train.tokens.tolist()).replace("<|endoftext|>", " ").split())
    assert [len(text.split()) for text, _ in texts] == [3, 1]
    assert all(text[0] == " " and set(text.split()) <= words for text, _ in texts)


def test_given_texts_are_matched_by_prompt(tmp_path):
    given = [("a", "1", True), ("b", "2", True), ("a", "3", False)]
    lines = [json.dumps(dict(zip(("prompt", "text", "ended"), line))) for line in given]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    system = evaluate.given_texts(tmp_path / "texts.jsonl")
    assert system.write([dict(prompt=p) for p in "aba"], {}, [])[0] == [x[1:] for x in given]
    with pytest.raises(UserError, match="no text for the prompt 'b'"):
        system.write([dict(prompt="b")], {}, [])


# ---- The benchmark


PLACES = {"one two three": [3, 7], "one-two": [], "我喜欢猫": [1, 2, 3], "我 喜欢": [1], "abc猫": [3]}


def test_documents_are_cut_between_words_or_characters_of_scripts_without_spaces():
    assert {text: beginnings_of_words(text) for text in PLACES} == PLACES


def test_a_benchmark_has_val_documents_cut_near_their_middle(home):
    corpus = Corpus(home / "data", "val", 64)
    documents = corpus.encoding.decode(corpus.tokens.tolist()).split("<|endoftext|>")
    options = SimpleNamespace(n=12, seed=1, unprompted=False)
    lines = make_benchmark(corpus, options)
    assert len({line["prompt"] + line["reference"] for line in lines}) == 12
    for line in lines:
        assert line["prompt"] + line["reference"] in documents and line["ended"]
        cuts = beginnings_of_words(line["prompt"] + line["reference"])
        length = len(line["prompt"] + line["reference"])
        distance = abs(len(line["prompt"]) - length / 2)
        assert distance <= 0.1 * length + min(abs(cut - length / 2) for cut in cuts)
    options.unprompted = True
    assert {line["prompt"] for line in make_benchmark(corpus, options)} == {""}


def test_lines_are_shuffled_and_whole_documents_if_unprompted(home, tmp_path):
    lines = [json.dumps(dict(prompt="a", reference=f"{i}", ended=i > 4)) for i in range(9)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    corpus = Corpus(home / "data", "val", 64)
    options = evaluate.EvalConfig(benchmark=str(tmp_path / "b.jsonl"), n=8)
    _, lines = evaluate.load_benchmark(options, corpus)
    references = [line["reference"] for line in lines]
    assert references != sorted(references) and len(set(references)) == 8
    assert all(line["ended"] == (int(line["reference"]) > 4) for line in lines)
    assert lines[0]["ids"] == corpus.encoding.encode("a")
    options.unprompted = True
    _, lines = evaluate.load_benchmark(options, corpus)
    assert [line["reference"] for line in lines] == [f"a{x}" for x in references]
    assert all(line["prompt"] == "" and line["ids"] == [] for line in lines)


# ---- The whole


def test_the_whole_report_agrees_with_the_texts(home, random_out, tmp_path):
    out = tmp_path / "out"
    gpt, dit = random_out / "gpt.pt", random_out / "dit.pt"
    systems = f"real,unigram,a=gpt:{gpt},b=textldm:{random_out},c=textldm:{dit},d=textldm:{gpt}"
    where = ["--data", home / "data", "--out", out, "--evaluator", home / "out/gpt.pt"]
    options = ["--n=16", "--device=cpu", "--steps=2", "--cfg=1,2", "--temperature=1", "--top_p=1"]
    script("bench/evaluate.py", *where, *options, "--systems", systems)
    (made,) = (home / "data").glob("benchmark_*")
    made.unlink()
    result = json.loads((out / "eval.json").read_text())
    for name in ("real", "unigram", "a", "b", "c", "d"):
        texts = result["texts"][name]
        assert len(texts["texts"]) == 8
        expected = sum(texts["nll"]) / sum(texts["tokens"])
        assert result["systems"][name]["nll"][0] == pytest.approx(expected)
        assert f"| {name} |" in (out / "eval.md").read_text()
    a, b, c, d = (result["texts"][name] for name in "abcd")
    assert a == d != b == c, "a kind or a folder, and its file"
    ours = [title for title in result["systems"]["a"] if "above" in title]
    assert ours == ["nll_above_b", "nll_above_c", "nll_above_d"]
    assert [point["knob"]["cfg"] for point in result["frontier"]["b"]] == [1, 2]
    assert (result["systems"]["real"]["ended"], result["setting"]["clusters"]) == (100, 2)


BAD_OPTIONS = [
    ("val.bin has 63 usable texts; lower --n", ["--n=5000"]),
    ("KIND is real, unigram", ["--systems=real,fake"]),
    ("a LABEL of its own", ["--systems=real,real"]),
    ("--top_p=1,x", ["--systems=gpt", "--top_p=1,x"]),
    ("--steps=0: expected", ["--systems=textldm", "--steps=0"]),
    ("does not exist", ["--benchmark=none"]),
    ("has 280 usable texts", ["--benchmark={tmp}/benchmark.jsonl", "--n=300"]),
    ("none.pt is missing", ["--evaluator=none.pt"]),
    ("holds a gpt, and no masked", ["--systems=masked:{home}/out/gpt.pt"]),
    ("judged by itself", ["--systems=gpt", "--evaluator={home}/out/gpt.pt"]),
    ("line 1: expected", ["--benchmark={home}/docs.jsonl"]),
]


@pytest.mark.parametrize("words, options", BAD_OPTIONS)
def test_bad_options_are_refused(home, tmp_path, capsys, words, options):
    text = (home / "docs.jsonl").read_text().replace('"text"', '"prompt": "", "reference"')
    (tmp_path / "benchmark.jsonl").write_text(text)
    shutil.copy(home / "out/gpt.pt", tmp_path / "judge.pt")
    options = [option.format(home=home, tmp=tmp_path) for option in options]
    where = ["--data", home / "data", "--out", home / "out", "--evaluator", tmp_path / "judge.pt"]
    refuse(capsys, words, "bench/evaluate.py", *where, "--device=cpu", *options, keep=home)


def test_paths_of_options_may_begin_at_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    for config_type, names in (
        (evaluate.EvalConfig, ("benchmark", "texts", "evaluator", "data", "out")),
        (plots.PlotConfig, ("evaluation", "pictures")),
    ):
        monkeypatch.setattr("sys.argv", ["x", *(f"--{name}=~/x" for name in names)])
        (config,) = command_line("", config_type)
        assert {getattr(config, name) for name in names} == {"/h/x"}


# ---- Pictures and speed


def test_the_frontier_has_the_points_of_the_sweep_and_of_real_text(tmp_path, capsys):
    plt = pytest.importorskip("matplotlib.pyplot")
    refuse(capsys, "eval.json is missing", "bench/plots.py", "--out", tmp_path)
    frontier = {}
    for name, shift in (("GPT 1", 0), ("GPT 2", 1), ("other", 2)):
        frontier[name] = []
        for t in (1.0, 0.5):
            knob = dict(temperature=t, top_p=1)
            frontier[name].append(dict(knob=knob, entropy=4 + t, nll=2 * t + shift))
    result = dict(frontier=frontier, real=dict(nll=2.5, entropy=5.25))
    (tmp_path / "eval.json").write_text(json.dumps(result))
    options = plots.PlotConfig(out=str(tmp_path), systems="GPT", title="so")
    (axes,) = plots.frontier(plt, options).axes
    first, second, real = axes.lines
    assert first.get_xydata().tolist() == [[4.5, 1], [5, 2]]
    assert second.get_xydata().tolist() == [[4.5, 2], [5, 3]]
    assert real.get_xydata().tolist() == [[5.25, 2.5]]
    assert first.get_color() == second.get_color() != real.get_color()
    written = [(text.get_text(), tuple(text.xy)) for text in axes.texts]
    assert written[:2] == [("0.5", (4.5, 1)), ("1", (5, 2))]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["GPT", "real text"] and axes.get_title() == "so"
    script("bench/plots.py", "--out", tmp_path)
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["frontier.png", "pipeline.png"]


def test_a_gpt_with_a_cache_writes_what_it_does_without():
    gpt = GPT(TransformerConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=50))
    for name, p in gpt.named_parameters():
        p.data = 0.5 * torch.randn(p.shape) + (".ln_" in f".{name}" and name.endswith("weight"))
    prompt = torch.randint(0, 50, (1, 5))
    row = prompt[0].tolist()
    while len(row) < 12:
        row.append(gpt(torch.tensor([row]))[0, -1].argmax().item())
    assert cached_gpt(gpt, prompt, 7, torch.float32).tolist() == [row[5:]]
    assert len(set(row)) > 5


def test_speed_tells_the_milliseconds_of_a_step_and_tokens_a_second(home, monkeypatch, capsys):
    """Each step is said to take 0.25 seconds, and each text of 5 tokens as long."""
    assert 0.02 < median_of(lambda: time.sleep(0.02), 0.1) < 0.05
    module = load("bench/speed.py")
    calls = []

    def median(work):
        calls.append(work())
        return 0.25

    monkeypatch.setattr(module, "median_of", median)
    where = ["--data", home / "data", "--device=cpu", "--out"]
    run_module(module, "bench/speed.py", *where, home / "out", "--new=5")
    out = capsys.readouterr().out.splitlines()
    rows = [f"| {stage} | 250 |" for stage in ("gpt", "vae", "dit")]
    rows += [f"| {n} tokens | {name} | 20.0 |" for n in (16, 256) for name in ("TextLDM", "GPT")]
    assert [line for line in out if line in rows] == rows
    assert [len(texts[0]) <= 5 for texts in calls[3:]] == [True] * 4
    assert "torch" in out[0] and "commit" in out[0]
    refuse(capsys, "gpt.pt is missing; train it", "bench/speed.py", *where, home / "none")
