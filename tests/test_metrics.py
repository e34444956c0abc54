"""What bench/metrics.py and bench/ngram.py report, by hand on a few tokens."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench import metrics
from bench.ngram import END, Counts, WordModel
from engine.corpus import Corpus
from tests.helpers import randomised
from textldm import GPT, TransformerConfig

LETTERS = SimpleNamespace(encode=lambda text, disallowed_special: [ord(x) - 97 for x in text])


def test_an_entropy_is_of_equally_many_tokens_of_texts_in_random_orders():
    one_other = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))  # 4, 1, 1; and 0: 1, 1, 1
    rows = [np.array([1, 1, 1]), np.array([4])]
    orders = np.random.default_rng(0)
    values = [(0, one_other)[orders.permutation(2)[0]] for _ in range(20)]
    expected = np.mean(values), 1.96 * np.std(values, ddof=1) * math.sqrt(3 / 1)  # 3, and 1 is left
    assert metrics.entropy(rows, 3, np.random.default_rng(0)) == pytest.approx(expected)
    assert math.isnan(metrics.entropy(rows, 4, None)[0])


def test_an_interval_is_of_a_ratio_of_sums():
    for nll, count, expected in (
        ([1.0, 7], [1, 3], (2, (7 / 3 - 1) / 2)),  # each text alone: 1 of 1, and 7 of 3
        ([0.0, 0, 1], [1, 1, 1], (1 / 3, 1 / 2)),  # 1 in 27 draws, 3.7%, has the 1 three times
        ([1.0, 1, 0], [1, 1, 1], (2 / 3, 1 / 2)),
    ):
        values = metrics.per_token(nll, count, np.random.default_rng(0))
        assert metrics.interval(values) == pytest.approx(expected) and len(values) == 1001


def test_the_point_nearest_to_real_text_in_nll_and_entropy_is_chosen():
    points = [(2.0, 4.0), (2.6, 5.1), (1.9, 5.4), (math.nan, 5.0), (9.0, 5.0)]
    points = [dict(nll=nll, entropy=entropy) for nll, entropy in points]
    assert metrics.choose(points, dict(nll=2.2, entropy=5.0)) == 1


def test_nll_at_an_entropy_is_of_the_best_curve_that_reaches_it():
    points = []
    for steps, temperature, entropy, nll in (
        (10, 1.0, 5, 3.0),
        (10, 0.7, 4, 2.0),
        (20, 0.7, 4, 3.0),
        (20, 1.0, 6, 3.0),
        (20, 1.3, math.nan, 0.0),
    ):
        knob = dict(steps=steps, temperature=temperature)
        points.append(dict(knob=knob, entropy=entropy, nll=nll, nll_word=10 * nll))
    assert metrics.at_entropy(points, 4.25, "nll") == 2 + 0.25, "the other curve has 3"
    assert metrics.at_entropy(points, 4.25, "nll_word") == 22.5
    assert metrics.at_entropy(points, 5.5, "nll") == 3
    assert metrics.at_entropy(points, 6.5, "nll") == "no curve has it"
    by_guidance = [dict(knob=dict(steps=1, cfg=w), entropy=w, nll=w) for w in (1, 3)]
    assert metrics.at_entropy(by_guidance, 2, "nll") == 2


def test_a_gpt_scores_the_tokens_after_the_prompt_and_the_end(monkeypatch):
    gpt = GPT(TransformerConfig(n_layer=1, n_head=1, n_embd=8, block_size=6, vocab_size=27))
    gpt.load_state_dict(randomised(dict(model=gpt.state_dict()))["model"])
    monkeypatch.setattr(metrics, "load_encoding", lambda tokenizer: LETTERS)
    prompts = ["ab", "", "abcdefg", "a"]
    texts = [("c", True), ("abc", False), ("de", True), ("bcdefgh", True)]
    found = metrics.score(gpt, dict(eot=26), prompts, texts, torch.autocast("cpu", enabled=False))
    tokens = [row.tolist() for row in found["tokens"]]
    assert tokens == [[2], [0, 1, 2], [3, 4], [1, 2, 3, 4, 5]]
    assert found["count"].tolist() == [2, 3, 3, 5]
    whole = [[26, 0, 1, 2, 26], [26, 0, 1, 2], [4, 5, 6, 3, 4, 26], [0, 1, 2, 3, 4, 5]]
    for i, (row, count, last) in enumerate(zip(whole, (2, 3, 3, 5), (3, 3, 4, 5))):
        x = torch.tensor([row])
        with torch.no_grad():
            h = gpt.ln_f(gpt.hidden_states(x, 1))[0]
        loss = F.cross_entropy(h[:-1] @ gpt.wte.weight.T, x[0, 1:], reduction="none")
        assert found["nll"][i] == pytest.approx(loss[-count:].sum().item(), rel=1e-4)
        assert found["features"][i] == pytest.approx(h[last].numpy(), rel=1e-3, abs=1e-5)


def test_copied_4_grams_are_of_the_own_prompt_and_of_the_training_text(monkeypatch):
    monkeypatch.setattr(metrics, "PIECE", 3)
    tokens = np.array(LETTERS.encode("bcdewxyzz", ()), dtype=np.uint16)
    training = SimpleNamespace(encoding=LETTERS, tokens=tokens)
    found = metrics.copied(["abcde", "wxyz"], ["abcdef", "abcde"], training)
    assert found == pytest.approx((200 / 3, 200 / 3)), "abcd and bcde; bcde and wxyz"
    assert metrics.copied(["wxyz", "abcd"], ["abcd", "wxyz"], training)[0] == 0, "of others"
    assert math.isnan(metrics.copied(["abc"], ["abc"], training)[0])


def test_words_and_documents_of_the_training_text_are_known():
    training = SimpleNamespace(words={"the", "cat"}, documents={"the cat"})
    found = metrics.known(["t", " dog"], ["the ca", "the"], training)
    assert found == (50, 50), "the word `cat` begins in the prompt; `the` is all of the prompt's"


def test_the_training_text_is_train_and_not_val_and_no_empty_document(home):
    val, train = (Corpus(home / "data", split, 64) for split in ("val", "train"))
    training = metrics.TrainingText(val)
    assert training.tokens.tolist() == train.tokens.tolist()
    whole = train.encoding.decode(train.tokens.tolist()).split("<|endoftext|>")
    assert whole.pop() == "" and training.documents == set(whole)


def test_words_that_repeat_the_word_before_are_counted():
    found = metrics.repeated([" the cat, thou", " Thou thou"], ["of THE", ""])
    assert found == pytest.approx(40), "2 of 5: `the` after the prompt's, and the last"
    assert math.isnan(metrics.repeated(["", "!"], ["a", "b"]))


def test_counts_are_interpolated_as_witten_and_bell_do():
    counts = Counts([("a", "b"), ("a", "b"), ("a", "c")], 2, lambda symbol: 0.1)
    p = (2 + 3 * 0.1) / (6 + 3)  # `b` is two of six, of three types
    assert counts.probability(("x", "b"), 1) == pytest.approx(p), "an unknown context"
    assert counts.probability(("a", "b"), 1) == pytest.approx((2 + 2 * p) / (3 + 2))


def test_unknown_words_are_spelled_and_ends_are_expected():
    model = WordModel(["a"])
    u = 2**-16
    b = 2 * u / (2 + 2) * (1 + 2 * u) / (2 + 2)  # `b` and its end, of two types in two characters
    end = (1 + 2 * 1e-3) / (2 + 2)
    expected = [2 * b / (2 + 2), (1 + end) / (1 + 1)]
    nats, count = model.score(["", "a"], [("b", False), ("", True)])
    assert np.exp(-nats) == pytest.approx(expected) and count.tolist() == [1, 1]


def test_words_are_scored_from_the_one_that_the_prompt_begins_to_the_end():
    model = WordModel(["the cat sat", "the cat ran", "a dog sat"] * 3)
    for prompt, text, ended, sequence, first in (
        ("the cat ", "ran", False, ("the", "cat", "ran"), 2),
        ("the c", "at", False, ("the", "cat"), 1),
        ("the cat ", "ran", True, ("the", "cat", "ran", END), 2),
        ("the, ", "cat sat", False, ("the", ",", "cat", "sat"), 2),
    ):
        places = range(first, len(sequence))
        p = [model.words.probability(sequence, i) for i in places]
        nats, count = model.score([prompt], [(text, ended)])
        assert (nats, count) == (pytest.approx(-np.log(p).sum()), len(places))


def test_rouge_counts_words_of_any_script_and_characters_where_words_have_no_spaces():
    pytest.importorskip("rouge_score")
    texts = ["a naïve кот", "我喜欢猫", "a b_c d"]
    references = ["THE nai\u0308ve КОТ", "我喜欢狗狗", "a c b d"]
    ones, twos, longest = metrics.rouge(texts, references)
    assert ones.tolist() == pytest.approx([200 / 3, 100 * 2 * 3 / (4 + 5), 100])
    assert (twos[0], longest[2]) == (50, 75)
    assert metrics.rouge(["a"], ["..."]) == ["no reference has a word"] * 3


def test_bert_score_is_f1_times_100_or_says_why_there_is_none(monkeypatch):
    def score(texts, references, lang):
        if texts == ["none"]:
            raise OSError("roberta-large does not appear to have a file named config.json")
        assert (texts, references, lang) == (["a", "b"], ["c", "e"], "en")
        return torch.zeros(2), torch.ones(2), torch.tensor([0.25, 1.0])

    monkeypatch.setitem(sys.modules, "bert_score", SimpleNamespace(score=score))
    assert metrics.bert_score(["a", " ", "b"], ["c", "d", "e"]).tolist() == [25, 0, 100]
    assert metrics.bert_score(["none"], ["a"]) == "roberta-large is not on this machine"
    assert metrics.bert_score(["кот"], ["кот спит a"]) == "its model reads English"
    assert metrics.bert_score([" "], ["a cat"]) == "all texts are empty"


def test_mauve_is_100_of_equal_sets_and_its_interval_is_of_halves(monkeypatch):
    pytest.importorskip("mauve")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 4))
    assert metrics.mauve(x, x, 2, rng)[0] == 100 > 50 > metrics.mauve(x, x + 50, 2, rng)[0]
    assert metrics.mauve(x, x, 1, None) == "too few prompts; --n=16 or more"
    sizes = []

    def mauve_of(package, p, q, clusters):
        sizes.append((len(np.unique(p, axis=0)), len(np.unique(q, axis=0))))
        return len(sizes) % 2  # 1, 0, 1 ...: a spread of sqrt(8 * 0.25 / 7)

    monkeypatch.setattr(metrics, "quiet_mauve", mauve_of)
    assert metrics.mauve(x, x[:6], 2, rng) == pytest.approx((1, 1.96 * math.sqrt(2 / 7)))
    assert sizes == [(4, 3)] * 8 + [(8, 6)]
