"""What bench/evaluate.py, bench/plots.py and bench/speed.py make of texts, and what they refuse."""

import json
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import evaluate, metrics, plots
from bench.evaluate import Judge, Measured, System, beginnings_of_words, make_benchmark
from bench.speed import cached_gpt, median_of
from engine.corpus import Corpus
from engine.config import UserError
from tests.helpers import load, refuse, run_module, script
from textldm import GPT, TransformerConfig, row_seeds

CPU = "--device=cpu"


def lines_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- The judge


def by_hand(prompts, texts, costs):
    """Judge.judge, of texts that say their NLL and their token: a text "3 7" has 3 nats in two
    tokens, 7 and 7."""
    numbers = [[float(x) for x in text.split()] for text, _ in texts]
    nll = np.array([x for x, _ in numbers])
    tokens = [np.array([int(token)] * 2) for _, token in numbers]
    n = len(texts)
    features = nll[:, None]
    ended = [ended for _, ended in texts]
    words = 10 * nll, np.full(n, 5)
    return Measured(
        prompts, [t for t, _ in texts], ended, nll, tokens, np.full(n, 2), features, *words, *costs
    )


@pytest.fixture
def judge(monkeypatch):
    """A Judge of four prompts. Real texts have 4 nats in the first half, and 8 in the second."""
    judge = object.__new__(Judge)
    references = ["4 1", "4 2", "8 3", "8 4"]
    judge.lines = []
    for i, reference in enumerate(references):
        judge.lines.append(dict(prompt=f"p{i}", ids=[i], reference=reference, ended=True))
    judge.options = SimpleNamespace(seed=1, batch_size=3, likeness=False)
    judge.judge = by_hand
    encoding = SimpleNamespace(encode=lambda text, disallowed_special: text.split())
    judge.corpus = SimpleNamespace(N=9, encoding=encoding)
    judge.autocast = torch.autocast("cpu", enabled=False)
    judge.training = SimpleNamespace(
        words=set(), documents={"p2x"}, encoding=encoding, tokens=np.zeros(0)
    )
    judge.clusters, judge.count = 2, 2
    judge.chosen_by, judge.real = judge.measure(System(evaluate.references), {})
    monkeypatch.setattr(metrics, "mauve", lambda *given: tuple(x.tolist() for x in given[:2]))
    monkeypatch.setattr(metrics, "copied", lambda texts, prompts, training: (texts, prompts))
    monkeypatch.setattr(metrics, "known", lambda texts, prompts, training: (prompts, 0.0))
    monkeypatch.setattr(metrics, "repeated", lambda texts, prompts: (texts, prompts))
    return judge


# Nats of a text in the first half, and in the second.
NATS = {1: (4, 2), 2: (9, 4), 3: (1, 8)}


def write(lines, knob, seeds):
    texts = []
    for line in lines:
        (i,) = line["ids"]
        texts.append((f"{NATS[knob['x']][i // 2] + i % 2} {i}", i != 3))
    return texts, 10 * len(lines)


def test_settings_are_chosen_on_one_half_and_reported_on_the_other(judge):
    """In the first half knob 1 is near the 4 nats of real text there. In the second, which has 8,
    it would be knob 3; and knob 2 if the halves were mixed up."""
    knobs = [dict(x=x) for x in (3, 2, 1)]
    row, frontier, per_text = judge.try_all(System(write, knobs), SimpleNamespace(update=int))
    assert row["knob"] == dict(x=1)
    assert per_text == dict(texts=["2 2", "3 3"], nll=[2, 3], tokens=[2, 2])
    assert [point["nll"] for point in frontier] == [17 / 4, 9 / 4, 5 / 4]
    assert [point["nll_word"] for point in frontier] == [17, 9, 5]
    assert [point["knob"] for point in frontier] == knobs
    assert row["nll"][0] == 5 / 4, "nats a token"
    assert row["nll_byte"][0] == 5 / 6
    assert row["nll_word"][0] == 50 / 10
    assert row["tokens"] == 2 and row["ended"] == 50
    assert row["evaluations"] == pytest.approx((3 * 30 + 10) / 4), "of batches of 3 and 1"
    assert row["copied_prompt"] == ["2 2", "3 3"] and row["copied_train"] == ["p2", "p3"]
    assert row["words_known"] == ["p2", "p3"] and row["repeated"] == (["2 2", "3 3"], ["p2", "p3"])
    assert judge.try_all(System(evaluate.references), SimpleNamespace(update=int))[1] == []


def test_mauve_compares_with_references_of_other_prompts(judge):
    row = judge.row(judge.measure(System(write, []), dict(x=2))[1])
    assert row["mauve"] == ([[4], [4]], [[4], [5]]), "real ones of the first half"
    assert judge.row(judge.real)["mauve"] == ([[4], [4]], [[8], [8]])


def test_each_text_has_the_seed_of_its_prompt(judge):
    seen = []

    def note(lines, knob, seeds):
        seen.extend(seeds)
        return write(lines, knob, seeds)

    judge.write(System(note), dict(x=1))
    assert seen == row_seeds([[0], [1], [2], [3]], judge.options.seed)


def test_entropy_is_of_as_many_tokens_for_each_system(judge):
    """Of two texts of two equal tokens two are taken; with three there are both kinds."""
    assert judge.point(judge.real)["entropy"] == 0
    judge.count = 3
    expected = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert judge.row(judge.real)["entropy"][0] == pytest.approx(expected)


def test_a_text_is_cut_to_the_room_of_its_row(judge):
    judge.corpus.encoding.decode = " ".join
    for N, expected in ((3, ("4 1", False)), (4, ("4 1", True)), (2, ("4", False))):
        judge.corpus.N = N
        assert judge.write(System(evaluate.references), {})[0][0] == expected


def test_a_report_compares_all_with_ours(judge):
    systems = {}
    for name, x in (("real", 0), ("GPT", 3), ("ours", 2)):
        system = System(write, [dict(x=x, top_p=1.0)] * 1) if x else System(evaluate.references)
        systems[name] = system
    result = evaluate.judge_all(judge, systems, ["ours"])
    assert result["real"] == dict(nll=4, nll_word=16, entropy=0)
    mean, half = result["differences"]["GPT"]["ours"]
    assert mean == (17 - 9) / 4 and half == 0, "4 nats more in each text of two tokens"
    assert result["differences"]["ours"] == {}
    assert list(result["frontier"]) == ["GPT", "ours"]


def test_the_frontier_is_told_relative_to_the_first_gpt():
    rows = dict(a=dict(knob=dict(top_p=1)), b=dict(knob={}), c=dict(knob={}))
    result = dict(
        systems=rows,
        real=dict(nll=2, entropy=5, nll_word=3),
        nll_at_real_entropy=dict(a=2.5, b=3.5, c=None),
        nll_word_at_real_entropy=dict(a=4.0, b=6.0, c=None),
        differences=dict(a={"b": (-1.25, 0.5)}, b={}, c={"b": (0.5, 0.25)}),
    )
    assert evaluate.frontier_lines(result, ["b"])[-3:] == [
        "| a | 2.50 | 1.00 x | 4.00 | -1.25 ± 0.50 |",
        "| b | 3.50 | 2.72 x | 6.00 |  |",
        "| c | not reached |  |  | 0.50 ± 0.25 |",
    ]


# ---- Systems


def options_of(**given):
    options = dict(steps="4", cfg="1,3", keep="0", temperature="0.5,1", top_p="1", evaluator="e")
    return SimpleNamespace(**dict(options, **given))


def test_settings_are_all_combinations_and_evaluations_are_counted():
    """Two rows of 3 and 5 tokens: in parts of 2 they are 2 and 3 parts."""
    corpus = SimpleNamespace(eot=9, encoding=SimpleNamespace(decode=lambda ids: str(ids)))
    asked = []

    def write(prompts, length, sampling, keep):
        asked.append((sampling, keep))
        return [[1, 2, 9], [1, 2, 3, 4, 5]]

    writer = SimpleNamespace(kind="dit", block=0, block_size=7, has_temperature=True, write=write)
    system = evaluate.diffusion(writer, options_of(keep="0,2"), corpus)
    assert len(system.knobs) == 8 and system.longest_row == 7
    assert system.knobs[1] == dict(steps=4, cfg=1, keep=0, temperature=1)
    lines = [dict(ids=[1]), dict(ids=[2])]
    expected = {(1, 0): 4, (3, 0): 8, (1, 2): 10, (3, 2): 20}
    for knob in system.knobs:
        texts, evaluations = system.write(lines, knob, [5, 6])
        assert texts == [("[1, 2]", True), ("[1, 2, 3, 4, 5]", False)]
        assert evaluations == expected[knob["cfg"], knob["keep"]]
        sampling, keep = asked[-1]
        assert (sampling.cfg_scale, keep, sampling.seed) == (knob["cfg"], knob["keep"], [5, 6])
        assert (sampling.temperature, sampling.steps) == (knob["temperature"], 4)
    writer.kind, writer.block = "masked", 2
    system = evaluate.diffusion(writer, options_of(keep="2"), corpus)
    assert system.knobs == [dict(steps=4, temperature=0.5), dict(steps=4, temperature=1)]
    assert system.write(lines, system.knobs[0], [5, 6])[1] == 10


def test_drawn_words_are_of_the_training_text_and_as_many_as_anothers(home):
    corpus = Corpus(home / "data", "val", 64)
    lines = [dict(next="a b c", reference="d"), dict(next="e", reference="f g")]
    texts, _ = evaluate.random_words(corpus).write(lines, {}, [1, 2])
    train = Corpus(home / "data", "train", 64)
    words = set(corpus.encoding.decode(train.tokens.tolist()).replace("<|endoftext|>", " ").split())
    assert [len(text.split()) for text, _ in texts] == [3, 1]
    assert all(text[0] == " " and set(text.split()) <= words for text, _ in texts)


def test_given_texts_are_matched_by_prompt(tmp_path):
    lines = [("a", "1"), ("b", "2"), ("a", "3")]
    lines = [json.dumps(dict(prompt=p, text=t, ended=t != "3")) for p, t in lines]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    system = evaluate.given_texts(tmp_path / "texts.jsonl")
    for _ in range(2):
        texts, _ = system.write([dict(prompt=p) for p in "aba"], {}, [])
        assert texts == [("1", True), ("2", True), ("3", False)]
    with pytest.raises(UserError, match="no text for the prompt 'b'"):
        system.write([dict(prompt="b"), dict(prompt="b")], {}, [])


# ---- The benchmark


PLACES = {"one two three": [3, 7], "one-two": [], "我喜欢猫": [1, 2, 3], "我 喜欢": [1], "abc猫": [3]}


@pytest.mark.parametrize("text", PLACES)
def test_documents_are_cut_between_words_or_characters_of_scripts_without_spaces(text):
    assert beginnings_of_words(text) == PLACES[text]


def test_a_benchmark_has_val_documents_cut_near_their_middle(home, tmp_path):
    corpus = Corpus(home / "data", "val", 64)
    documents = corpus.encoding.decode(corpus.tokens.tolist()).split("<|endoftext|>")
    options = SimpleNamespace(n=12, seed=1, unprompted=False)
    make_benchmark(corpus, tmp_path / "b.jsonl", options)
    lines = lines_in(tmp_path / "b.jsonl")
    assert len({line["prompt"] + line["reference"] for line in lines}) == 12
    for line in lines:
        assert line["prompt"] + line["reference"] in documents and line["ended"]
        cuts = beginnings_of_words(line["prompt"] + line["reference"])
        length = len(line["prompt"] + line["reference"])
        distance = abs(len(line["prompt"]) - length / 2)
        assert distance <= 0.1 * length + min(abs(cut - length / 2) for cut in cuts)
    make_benchmark(corpus, tmp_path / "b.jsonl", SimpleNamespace(n=9, seed=1, unprompted=True))
    assert {line["prompt"] for line in lines_in(tmp_path / "b.jsonl")} == {""}
    with pytest.raises(UserError, match=r"; --n=\d+$"):
        make_benchmark(corpus, tmp_path / "b.jsonl", SimpleNamespace(**vars(options) | {"n": 999}))


def test_lines_are_shuffled_and_know_the_reference_of_another(home, tmp_path):
    lines = [json.dumps(dict(prompt="a", reference=f"{i}", ended=i > 4)) for i in range(9)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    corpus = Corpus(home / "data", "val", 64)
    options = SimpleNamespace(benchmark=str(tmp_path / "b.jsonl"), n=8, seed=1, unprompted=False)
    _, lines = evaluate.load_benchmark(options, corpus)
    references = [line["reference"] for line in lines]
    assert references != sorted(references) and len(set(references)) == 8
    assert [line["next"] for line in lines] == [references[-1], *references[:-1]]
    assert all(line["ended"] == (int(line["reference"]) > 4) for line in lines)
    assert lines[0]["ids"] == corpus.encoding.encode("a")


# ---- The whole


@pytest.fixture(scope="module")
def judged(home, random_out, tmp_path_factory):
    """A folder with eval.json and eval.md of random models, and the options that made them."""
    out = tmp_path_factory.mktemp("judged")
    systems = f"real,unigram,a=gpt:{random_out / 'gpt.pt'},b=textldm:{random_out},"
    systems += f"c=textldm:{random_out / 'dit.pt'},d=textldm:{random_out / 'gpt.pt'}"
    where = ["--data", home / "data", "--out", out, "--evaluator", home / "out/gpt.pt"]
    options = [*where, "--n=16", CPU, "--steps=2", "--cfg=1,2", "--temperature=1", "--top_p=1"]
    script("bench/evaluate.py", *options, "--systems", systems)
    yield out, options
    for path in (home / "data").glob("benchmark_*"):
        path.unlink()


def test_the_whole_report_agrees_with_the_texts(judged):
    out, _ = judged
    result = json.loads((out / "eval.json").read_text())
    assert list(result["systems"]) == ["real", "unigram", "a", "b", "c", "d"]
    for name, row in result["systems"].items():
        texts = result["texts"][name]
        assert len(texts["texts"]) == 8
        expected = sum(texts["nll"]) / sum(texts["tokens"])
        assert row["nll"][0] == pytest.approx(expected)
        assert f"| {name} |" in (out / "eval.md").read_text()
    assert result["systems"]["b"]["copies"] == 0
    assert result["texts"]["b"] == result["texts"]["c"], "a folder and its file"
    assert result["texts"]["a"] == result["texts"]["d"], "a kind and its file"
    assert set(result["differences"]["a"]) == {"b", "c", "d"}
    assert [point["knob"]["cfg"] for point in result["frontier"]["b"]] == [1, 2]
    assert result["systems"]["real"]["ended"] == 100


BAD_OPTIONS = [
    ("; --n=", ["--n=5000"]),
    ("kind 'fake'", ["--systems=real,fake"]),
    ("--top_p=1,x", ["--systems=gpt", "--top_p=1,x"]),
    ("--steps=0: out of range", ["--systems=textldm", "--steps=0"]),
    ("two rows", ["--systems=real,real"]),
    ("does not exist", ["--benchmark=none"]),
    ("cut already", ["--benchmark=none", "--unprompted"]),
    ("none.pt is missing", ["--evaluator=none.pt"]),
    ("holds a gpt, and no masked", ["--systems=masked:{home}/out/gpt.pt"]),
    ("judged by itself", ["--systems=gpt", "--evaluator={home}/out/gpt.pt"]),
    ("line 1: expected", ["--benchmark={home}/docs.jsonl"]),
]


@pytest.mark.parametrize("words, options", BAD_OPTIONS)
def test_bad_options_are_refused(home, judged, capsys, words, options):
    where = ["--data", home / "data", "--out", home / "out", "--evaluator", judged[0] / "gpt.pt"]
    (judged[0] / "gpt.pt").write_bytes((home / "out/gpt.pt").read_bytes())
    options = [option.format(home=home) for option in options]
    refuse(capsys, words, "bench/evaluate.py", *where, "--n=16", CPU, *options, keep=home)


def test_lines_without_a_reference_and_too_few_are_refused(home, judged, capsys, tmp_path):
    for line, words in ((" ", "line 1: the reference is empty"), ("b", "has 1 lines")):
        file = tmp_path / "benchmark.jsonl"
        file.write_text(json.dumps(dict(prompt="a", reference=line)) + "\n")
        options = [*judged[1], "--systems=real", f"--benchmark={file}"]
        refuse(capsys, words, "bench/evaluate.py", *options, keep=home)


# ---- Pictures and speed


def test_the_frontier_has_the_points_of_the_sweep_and_of_real_text(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    frontier = {}
    for name, shift in (("GPT 1", 0), ("GPT 2", 1), ("other", 2)):
        points = []
        for t in (1.0, 0.5):
            point = dict(knob=dict(temperature=t, top_p=1), entropy=4 + t, nll=2 * t + shift)
            points.append(point)
        frontier[name] = points
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


def test_pictures_are_written_or_what_is_missing_is_named(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    options = ["--out", tmp_path]
    refuse(capsys, "eval.json is missing", "bench/plots.py", *options)
    result = dict(frontier={}, real=dict(nll=2.5, entropy=5.25))
    (tmp_path / "eval.json").write_text(json.dumps(result))
    script("bench/plots.py", *options)
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["frontier.png", "pipeline.png"]


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
