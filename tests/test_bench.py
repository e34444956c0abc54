"""What bench/evaluate.py, bench/plots.py and bench/speed.py make of texts, and what they refuse."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import evaluate, metrics, plots
from bench.evaluate import Judge, System, beginnings_of_words, make_benchmark
from bench.speed import cached_gpt, median_of
from engine.config import UserError
from engine.corpus import Corpus
from tests.helpers import load, randomised, refuse, run_module, script
from textldm import GPT, TransformerConfig, row_seeds


def by_hand(prompts, texts):
    """Judge.judge, of texts that say their NLL and their token: a text "3 7" has 3 nats in two
    tokens, 7 and 7."""
    numbers = [[float(x) for x in text.split()] for text, _ in texts]
    nll = np.array([x for x, _ in numbers])
    tokens = [np.array([int(token)] * 2) for _, token in numbers]
    written, ended = zip(*texts)
    half = dict(nll=nll, tokens=tokens, count=np.full(len(nll), 2), features=nll.tolist())
    half.update(word_nll=10 * nll, words=np.full(len(nll), 5))
    return dict(half, prompts=prompts, texts=written, ended=ended)


@pytest.fixture
def judge(monkeypatch):
    """A Judge of four prompts. Real texts have 4 nats in the first half, and 8 in the second."""
    judge = object.__new__(Judge)
    judge.lines = []
    for i, reference in enumerate(["4 1", "4 2", "8 3", "8 4"]):
        judge.lines.append(dict(prompt=f"p{i}", ids=[i], reference=reference, ended=True))
    judge.seed, judge.training, judge.judge, judge.likeness = 1, None, by_hand, True
    words = SimpleNamespace(encode=lambda text, disallowed_special: text.split(), decode=" ".join)
    judge.corpus = SimpleNamespace(N=9, encoding=words)
    judge.autocast = torch.autocast("cpu", enabled=False)
    judge.clusters, judge.count = 2, 2
    judge.chosen_by, judge.real, _ = judge.measure(System(evaluate.references), {})
    for name in ("mauve", "copied", "known", "repeated"):
        monkeypatch.setattr(metrics, name, lambda *given: given[:2])
    monkeypatch.setattr(metrics, "rouge", lambda *given: ([1.0, 3.0], *map(str, given)))
    monkeypatch.setattr(metrics, "bert_score", lambda texts, references: "absent")
    return judge


NATS = {1: (4, 2), 2: (9, 4), 3: (1, 8)}  # of a text in the first half, and in the second
PAIR = "{}\u00a0{}"  # the space has two bytes


def write(lines, knob, seeds):
    assert seeds == row_seeds([[0], [1], [2], [3]], 1)
    texts = []
    for line in lines:
        (i,) = line["ids"]
        texts.append((PAIR.format(NATS[knob["x"]][i // 2] + i % 2, i), i != 3))
    return texts, 30


def test_settings_are_chosen_on_one_half_and_reported_on_the_other(judge):
    # Knob 1 is nearest to real text in the first half. Knob 3 is, in the second.
    knobs = [dict(x=x) for x in (3, 2, 1)]
    row, frontier, per_text = judge.try_all(System(write, knobs), SimpleNamespace(update=int))
    texts, prompts = (PAIR.format(2, 2), PAIR.format(3, 3)), ["p2", "p3"]
    assert row["knob"] == dict(x=1)
    assert per_text == dict(texts=texts, nll=[2, 3], tokens=[2, 2])
    points = [(point["knob"]["x"], point["nll"], point["nll_word"]) for point in frontier]
    assert points == [(3, 17 / 4, 17), (2, 9 / 4, 9), (1, 5 / 4, 5)]
    nll = {name: row[name][0] for name in ("nll", "nll_byte", "nll_word")}
    assert nll == dict(nll=5 / 4, nll_byte=5 / 8, nll_word=50 / 10)
    assert row["mauve"] == ([4, 4], [2, 3]), "the references of the first half"
    given = (row["copied_prompt"], row["copied_train"]), (row["words_known"], row["copies"])
    assert (*given, row["repeated"]) == ((texts, prompts),) * 3
    assert (row["tokens"], row["ended"], row["evaluations"]) == (2, 50, 30)
    assert (row["rouge_1"][0], row["rouge_2"], row["bertscore"]) == (2, str(texts), "absent")
    assert row["rouge_l"] == str(("8 3", "8 4")), "the references of the same prompts"
    draws = [judge.rng(name).integers(2**60) for name in ("nll", "nll", "mauve")]
    assert draws[0] == draws[1] != draws[2], "a metric has a generator of its own"


def test_a_text_is_cut_to_the_room_of_its_row(judge):
    for N, expected in ((3, ("4 1", False)), (4, ("4 1", True)), (2, ("4", False))):
        judge.corpus.N = N
        assert judge.fit(dict(ids=[0]), "4 1", True) == expected


def test_a_report_compares_all_with_ours(judge):
    # All points have the entropy of real text, and that of knob 2 is the best there.
    systems = dict(gpt=System(write, [dict(x=3), dict(x=2)]), ours=System(write, [dict(x=2)]))
    systems["real"] = System(evaluate.references)
    judge.count = 3
    result = evaluate.judge_all(judge, systems, ["ours"])
    entropy = np.log(3) - 2 / 3 * np.log(2)  # of three tokens, two of which are equal
    assert result["real"] == pytest.approx(dict(nll=4, nll_word=16, entropy=entropy))
    rows = result["systems"]
    assert rows["gpt"]["nll_above_ours"] == (2, 0), "4 nats more in each text of two tokens"
    assert [rows[name]["nll_above_ours"][0] for name in ("ours", "real")] == [0, 1.75]
    there = [(row["nll_at_real_entropy"], row["nll_word_at_real_entropy"]) for row in rows.values()]
    assert there == [(9 / 4, 9), (9 / 4, 9), ("no curve has it", "no curve has it")]


def test_the_table_has_settings_numbers_and_intervals():
    row = dict(knob=dict(steps=20.0, cfg=1.5), nll_word=(2, 0.25), mauve="none", ended=1 / 3)
    names = "command commit machine n benchmark row evaluator clusters count".split()
    report = evaluate.report_of(dict(systems=dict(a=row), setting=dict.fromkeys(names)))
    lines = report.splitlines()[-3:]
    assert lines[0] == "| | knob | nll word | mauve | ended |" and lines[1].count("---|") == 5
    assert lines[2] == "| a | steps 20 cfg 1.5 | 2.00 ± 0.25 | none | 0.33 |"


def test_settings_are_all_combinations_and_prompts_go_in_batches_with_their_seeds(monkeypatch):
    asked = []

    def write(prompts, length, sampling, keep):
        asked.append((sampling, keep))
        return [[len(prompt)] * len(prompt) for prompt in prompts]

    model = SimpleNamespace(kind="dit", block=0, block_size=7, write=write)
    model.has_temperature, model.tokenizer = True, {}
    monkeypatch.setattr(evaluate, "load_writer", lambda path, vae_path, device: model)
    corpus = SimpleNamespace(eot=2, N=9, tokenizer={}, encoding=SimpleNamespace(decode=str))
    config = evaluate.EvalConfig(steps="4", cfg="1,3", keep="0,2", temperature="0.5,1")
    config.batch_size, config.systems = 2, "real, a b=textldm:x/y=1/dit.pt"
    systems, ours = evaluate.make_systems(config, corpus, "cpu")
    assert list(systems) == ["real", "a b"] and ours == ["a b"] and corpus.N == 7
    system = systems["a b"]
    assert len(system.knobs) == 8
    assert system.knobs[1] == dict(steps=4, cfg=1, keep=0, temperature=1)
    lines = [dict(ids=[1] * length) for length in (1, 2, 6)]
    texts, evaluations = system.write(lines, system.knobs[-2], [5, 6, 7])
    assert texts == [("[1]", False), ("[]", True), ("[6, 6, 6, 6, 6, 6]", False)]
    assert evaluations == 4 * 2 * (1 + 1 + 3) / 3
    (first, keep), (second, _) = asked
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
    words = set(" ".join(metrics.TrainingText(corpus).texts).split())
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


def test_documents_are_cut_between_words_or_characters_of_scripts_without_spaces():
    places = {"one two three": [3, 7], "one-two": []}
    places |= {"我喜欢": [1, 2], "我 喜欢": [1], "abc猫": [3]}
    assert {text: beginnings_of_words(text) for text in places} == places


def test_a_benchmark_has_documents_that_fit_a_row_cut_near_their_middle(tmp_path):
    # Each letter is a token. In 15 letters, 40 to 60% is nearest to the second of three spaces.
    documents = [f"{x}b cdef ghij kl" for x in "nopqrs"] + ["longerthan a row!", " ", "word"]
    tokens = np.array([ord(x) for x in "".join(text + "\0" for text in documents)])
    encoding = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
    corpus = SimpleNamespace(tokens=tokens, eot=0, N=16, encoding=encoding, path="val.bin")

    def made(n, is_stream, unprompted=False):
        corpus.is_stream = is_stream
        options = SimpleNamespace(n=n, seed=1, unprompted=unprompted)
        make_benchmark(corpus, tmp_path / "b.jsonl", options)
        lines = map(json.loads, (tmp_path / "b.jsonl").read_text().splitlines())
        return sorted((*line.values(),) for line in lines)

    cut = [(f"{x}b cdef", " ghij kl", True) for x in "nopqrs"]
    assert made(6, False) == cut
    assert made(7, True) == [("longerthan", " a row", False), *cut]
    assert made(8, True, unprompted=True)[-1] == ("", "word", True)
    with pytest.raises(UserError, match="--n=7, but only 6 documents of val.bin fit"):
        made(7, False)


def test_lines_are_shuffled_and_know_their_tokens(home, tmp_path):
    lines = [json.dumps(dict(prompt="a", reference=f"{i}", ended=i > 4)) for i in range(9)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    corpus = Corpus(home / "data", "val", 64)
    options = evaluate.EvalConfig(benchmark=str(tmp_path / "b.jsonl"), n=8)
    _, lines = evaluate.load_benchmark(options, corpus)
    expected = [(f"{i}", i > 4) for i in np.random.default_rng(options.seed).permutation(9)[:8]]
    assert [(line["reference"], line["ended"]) for line in lines] == expected
    assert lines[0]["ids"] == corpus.encoding.encode("a")


def test_the_whole_report_is_of_models_by_their_files_or_folders(home, random_out, tmp_path):
    gpt, dit = random_out / "gpt.pt", random_out / "dit.pt"
    systems = f"real,unigram,a=gpt:{gpt},b=textldm:{random_out},c=textldm:{dit},d=textldm:{gpt}"
    where = ["--data", home / "data", "--out", tmp_path, "--evaluator", home / "out/gpt.pt"]
    options = ["--n=16", "--device=cpu", "--steps=2", "--cfg=1,2", "--temperature=1", "--top_p=1"]
    script("bench/evaluate.py", *where, *options, "--systems", systems)
    (path,) = (home / "data").glob("benchmark_*")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    result = json.loads((tmp_path / "eval.json").read_text())
    assert "| unigram |" in (tmp_path / "eval.md").read_text()
    a, b, c, d = (result["texts"][name] for name in "abcd")
    assert a == d != b == c, "a kind or a folder, and its file"
    assert len(a["texts"]) == 8 and result["setting"]["clusters"] == 16 // 8
    encoding = Corpus(home / "data", "val", 64).encoding
    chosen_by = [lines[i]["reference"] for i in np.random.default_rng(1).permutation(16)[:8]]
    assert result["setting"]["count"] == sum(map(len, map(encoding.encode, chosen_by))) // 2


BAD_OPTIONS = [
    ("fit a row and have a place between two words; lower --n", ["--n=5000"]),
    ("KIND is real, unigram", ["--systems=real,fake"]),
    ("a LABEL of its own", ["--systems=few.jsonl=real", "--texts={tmp}/few.jsonl"]),
    ("--top_p=1,x", ["--systems=gpt", "--top_p=1,x"]),
    ("--steps=0: expected", ["--systems=textldm", "--steps=0"]),
    ("cut already", ["--benchmark={tmp}/few.jsonl", "--unprompted"]),
    ("has 2 lines; lower --n", ["--benchmark={tmp}/few.jsonl"]),
    ("line 2: the reference is empty", ["--benchmark={tmp}/empty.jsonl"]),
    ("holds a gpt, and no masked", ["--systems=masked:{home}/out/gpt.pt"]),
    ("judged by itself", ["--systems=gpt", "--evaluator={home}/out/gpt.pt"]),
]


@pytest.mark.parametrize("words, options", BAD_OPTIONS)
def test_bad_options_are_refused(home, random_out, tmp_path, capsys, words, options):
    for name, references in (("few", "bc"), ("empty", "b ")):
        lines = [json.dumps(dict(prompt="a", text="", reference=x)) for x in references]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    options = [option.format(home=home, tmp=tmp_path) for option in options]
    where = ["--data", home / "data", "--out", home / "out", "--evaluator", random_out / "gpt.pt"]
    refuse(capsys, words, "bench/evaluate.py", *where, "--device=cpu", *options, keep=home)


def test_the_frontier_has_the_points_of_the_sweep_and_of_real_text(tmp_path, capsys):
    plt = pytest.importorskip("matplotlib.pyplot")
    refuse(capsys, "eval.json is missing", "bench/plots.py", "--out", tmp_path)
    frontier = {}
    for name, shift in (("GPT 1", 0), ("GPT 2", 1), ("other", 2)):
        hot, cold = (dict(knob=dict(temperature=t, top_p=1), entropy=4 + t) for t in (1.0, 0.5))
        frontier[name] = [dict(hot, nll=2 + shift), dict(cold, nll=1 + shift)]
    real = dict(nll=2.5, entropy=5.25)
    (tmp_path / "eval.json").write_text(json.dumps(dict(frontier=frontier, real=real)))
    options = plots.PlotConfig(out=str(tmp_path), systems="GPT", title="so")
    (axes,) = plots.frontier(plt, options).axes
    curves = [line.get_xydata().tolist() for line in axes.lines]
    assert curves == [[[4.5, 1], [5, 2]], [[4.5, 2], [5, 3]], [[5.25, 2.5]]]
    first, second, real = [line.get_color() for line in axes.lines]
    assert first == second != real
    written = [(text.get_text(), tuple(text.xy)) for text in axes.texts]
    assert written[:2] == [("0.5", (4.5, 1)), ("1", (5, 2))]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["GPT", "real text"] and axes.get_title() == "so"
    script("bench/plots.py", "--out", tmp_path)
    assert (tmp_path / "pictures/frontier.png").exists()


def test_a_gpt_with_a_cache_writes_what_it_does_without():
    gpt = GPT(TransformerConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=50))
    gpt.load_state_dict(randomised(dict(model=gpt.state_dict()))["model"])
    row = [7, 1, 4, 2, 9]
    while len(row) < 12:
        row.append(gpt(torch.tensor([row]))[0, -1].argmax().item())
    assert cached_gpt(gpt, torch.tensor([row[:5]]), 7, torch.float32).tolist() == [row[5:]]


def test_speed_tells_the_milliseconds_of_a_step_and_tokens_a_second(home, monkeypatch, capsys):
    assert 0.02 < median_of(lambda: time.sleep(0.02), 0.1) < 0.05
    module = load("bench/speed.py")
    monkeypatch.setattr(module, "median_of", lambda work: (work(), 0.25)[1])
    where = ["--data", home / "data", "--device=cpu", "--out"]
    run_module(module, "bench/speed.py", *where, home / "out", "--new=5")
    out = capsys.readouterr().out
    rows = [f"| {stage} | 250 |" for stage in ("gpt", "vae", "dit")]
    rows += [f"| {n} tokens | {name} | 20.0 |" for n in (16, 256) for name in ("TextLDM", "GPT")]
    assert [line for line in out.splitlines() if line in rows] == rows
    assert out.startswith(f"commit {evaluate.commit()}, ") and f"torch {torch.__version__}" in out
    refuse(capsys, "gpt.pt is missing; train it", "bench/speed.py", *where, home / "none")
