"""What bench/metrics.py and bench/ngram.py report, by hand on a few tokens."""

import contextlib
import math
import sys
from importlib.util import find_spec
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

needs_rouge = pytest.mark.skipif(not find_spec("rouge_score"), reason="pip install rouge-score")
needs_mauve = pytest.mark.skipif(not find_spec("mauve"), reason="pip install mauve-text")
NO_AUTOCAST = contextlib.nullcontext()


def test_entropy_is_in_nats():
    expected = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert metrics.entropy(np.array([7, 7, 9])) == pytest.approx(expected)


def test_a_statistic_of_equally_many_items_of_texts_in_random_orders():
    """Of two texts one comes first. A draw takes half of all items, so its spread counts once."""
    rows = [np.array([1, 1]), np.array([4, 4])]
    mean, half = metrics.at_equal_count(np.mean, rows, 2, np.random.default_rng(0))
    orders = np.random.default_rng(0)
    firsts = [(1, 4)[orders.permutation(2)[0]] for _ in range(20)]
    assert mean == pytest.approx(np.mean(firsts)) and 1 < mean < 4
    assert half == pytest.approx(1.96 * np.std(firsts, ddof=1))
    texts = [np.array([i]) for i in range(6)]
    _, half = metrics.at_equal_count(np.sum, texts, 2, np.random.default_rng(0))
    orders = np.random.default_rng(0)
    sums = [orders.permutation(6)[:2].sum() for _ in range(20)]
    assert half == pytest.approx(1.96 * np.std(sums, ddof=1) * math.sqrt(2 / 4)), "2 of 6"
    assert math.isnan(metrics.at_equal_count(np.mean, rows, 4, np.random.default_rng(0))[0])


def test_an_interval_is_of_a_ratio_of_sums():
    """8 nats of 4 tokens: 2; drawn twice alone, the texts have 2 of 1, and 6 of 3, or 7 and 1. Of
    two values 0 and 1 more than 2.5% of the draws are both 0, and both 1."""
    rng = np.random.default_rng(0)
    assert metrics.interval(np.array([2.0, 6]), rng, np.array([1, 3])) == (2, 0)
    assert metrics.interval(np.array([1.0, 7]), rng, np.array([1, 3])) == (2, (7 / 3 - 1) / 2)
    assert metrics.interval(np.array([0.0, 1]), rng) == (0.5, 0.5)


def test_a_difference_is_of_the_first_minus_the_second_paired_by_prompt():
    """6 nats of 3 tokens, and 3 nats of 3; then the same in each text: no spread at all."""
    a = dict(nll=[2.0, 4.0], tokens=[1, 2])
    b = dict(nll=[1.0, 2.0], tokens=[1, 2])
    assert metrics.difference(a, b, np.random.default_rng(0)) == (1, 0)
    assert metrics.difference(b, a, np.random.default_rng(0)) == (-1, 0)
    c = dict(nll=[1.0, 5.0], tokens=[1, 1])
    mean, half = metrics.difference(c, dict(nll=[1, 1], tokens=[1, 1]), np.random.default_rng(0))
    assert (mean, half) == (2, 2), "0, 2 or 4, by which texts are drawn"


def test_the_generators_of_metrics_are_their_own():
    def draw(*given):
        return metrics.rng_of(*given).integers(2**60)

    assert draw(1, "nll") == draw(1, "nll")
    assert len({draw(1, "nll"), draw(2, "nll"), draw(1, "mauve")}) == 3


def test_the_point_nearest_to_real_text_in_nll_and_entropy_is_chosen():
    points = [(2.0, 4.0), (2.6, 5.1), (1.9, 5.4), (math.nan, 5.0), (9.0, 5.0)]
    points = [dict(nll=nll, entropy=entropy) for nll, entropy in points]
    assert metrics.choose(points, dict(nll=2.2, entropy=5.0)) == 1


def test_nll_at_an_entropy_is_of_the_best_curve_that_reaches_it():
    """Between entropies 4 and 5 a quarter of the way: 2 + 0.25; the other curve has 3."""
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
    assert metrics.at_entropy(points, 4.25, "nll") == 2.25
    assert metrics.at_entropy(points, 4.25, "nll_word") == 22.5
    assert metrics.at_entropy(points, 5.5, "nll") == 3
    assert metrics.at_entropy(points, 6.5, "nll") is None
    by_guidance = [dict(knob=dict(steps=1, cfg=w), entropy=w, nll=w) for w in (1, 3)]
    assert metrics.at_entropy(by_guidance, 2, "nll") == 2
    assert [[p["nll"] for p in curve] for curve in metrics.curves_of(points)] == [[2, 3], [3, 3]]


class Letters:
    """A vocabulary of letters."""

    def encode(self, text, disallowed_special=()):
        return [ord(letter) - ord("a") for letter in text]


def test_a_gpt_scores_the_tokens_after_the_prompt_and_the_end(monkeypatch):
    """Each row as it is alone, without padding, with a batch for each."""
    torch.manual_seed(0)
    config = TransformerConfig(n_layer=1, n_head=1, n_embd=8, block_size=6, vocab_size=27)
    gpt = GPT(config)
    gpt.load_state_dict(randomised(dict(model=gpt.state_dict()))["model"])
    monkeypatch.setattr(metrics, "load_encoding", lambda tokenizer: Letters())
    prompts, texts = ["ab", "", "abcdefg"], [("c", True), ("abc", False), ("de", True)]
    nll, rows, features = metrics.score(gpt, dict(eot=26), prompts, texts, NO_AUTOCAST)
    assert rows == [[2, 26], [0, 1, 2], [3, 4, 26]]
    whole = [[26, 0, 1, 2, 26], [26, 0, 1, 2], [5, 6, 3, 4, 26]]
    whole[2] = [26, 0, 1, 2, 3, 4, 5, 6, 3, 4, 26][-6:]
    for i, (row, new, last) in enumerate(zip(whole, rows, (3, 3, 4))):
        x = torch.tensor([row])
        with torch.no_grad():
            h = gpt.ln_f(gpt.hidden_states(x, 1))[0]
        loss = F.cross_entropy(h[:-1] @ gpt.wte.weight.T, x[0, 1:], reduction="none")
        assert nll[i] == pytest.approx(loss[-len(new) :].sum().item(), rel=1e-4)
        assert features[i] == pytest.approx(h[last].numpy(), rel=1e-3, abs=1e-5)


def test_copied_4_grams_are_of_the_own_prompt_and_of_the_training_text(monkeypatch):
    """Of abcde and wxyz: abcd and bcde are in the first prompt; bcde and wxyz are trained on."""
    monkeypatch.setattr(metrics, "PIECE", 3)
    tokens = np.array(Letters().encode("bcdewxyzz"), dtype=np.uint16)
    training = SimpleNamespace(encoding=Letters(), tokens=tokens)
    in_prompt, in_training = metrics.copied(["abcde", "wxyz"], ["abcdef", "abcde"], training)
    assert (in_prompt, in_training) == pytest.approx((200 / 3, 200 / 3))
    in_prompt, _ = metrics.copied(["wxyz", "abcd"], ["abcd", "wxyz"], training)
    assert in_prompt == 0, "of another prompt"
    assert math.isnan(metrics.copied(["abc"], ["abc"], training)[0])


def test_words_and_documents_of_the_training_text_are_known():
    training = SimpleNamespace(words={"the", "cat"}, documents={"the cat"})
    found = metrics.known(["t", " dog"], ["the ca", "the"], training)
    assert found == (50, 50), "the word `cat` begins in the prompt; `the` is all of the prompt's"


def test_the_training_text_is_train_and_not_val(home):
    corpus = Corpus(home / "data", "val", 64)
    training = metrics.TrainingText(corpus)
    assert training.tokens.tolist() == Corpus(home / "data", "train", 64).tokens.tolist()
    assert "" not in training.documents, "a text that says nothing is no copy"
    assert len(training.documents) > 100 and "letter" in training.words
    val = corpus.encoding.decode(corpus.tokens[:50].tolist()).split("<|endoftext|>")[0]
    assert val not in training.documents


def test_words_that_repeat_the_word_before_are_counted():
    """Of 5 words 2: "the" after the prompt's "the", and the second "thou"."""
    assert metrics.repeated([" the cat, thou", " Thou thou"], ["of THE", ""]) == pytest.approx(40)
    assert math.isnan(metrics.repeated(["", "!"], ["a", "b"]))


# ---- Counts of words


def test_counts_are_interpolated_as_witten_and_bell_do():
    """After `a`, two types in three occurrences: (2 + 2 p) / (3 + 2), where p of `b` without
    context is (2 + 3 u) / (6 + 3), of three types in six tokens."""
    u = 0.1
    counts = Counts([("a", "b"), ("a", "b"), ("a", "c")], 2, lambda symbol: u)
    p = (2 + 3 * u) / (6 + 3)
    assert counts.probability(("x", "b"), 1) == pytest.approx(p), "an unknown context"
    assert counts.probability(("a", "b"), 1) == pytest.approx((2 + 2 * p) / (3 + 2))


def test_words_are_scored_from_the_one_that_the_prompt_begins_to_the_end():
    model = WordModel(["the cat sat", "the cat ran", "a dog sat"] * 3)
    prompts = ["the cat ", "the c", "the cat ", "the, "]
    texts = [("ran", False), ("at", False), ("ran", True), ("cat sat", False)]
    nats, count = model.score(prompts, texts)
    assert count.tolist() == [1, 1, 2, 2]

    def nats_of(*sequence):
        return -math.log(model.words.probability(sequence, len(sequence) - 1))

    assert nats[0] == pytest.approx(nats_of("the", "cat", "ran"))
    assert nats[1] == pytest.approx(nats_of("the", "cat"))
    assert nats[2] == pytest.approx(nats[0] + nats_of("the", "cat", "ran", END))
    assert nats[3] == pytest.approx(nats_of("the", ",", "cat") + nats_of("the", ",", "cat", "sat"))
    assert model.spelling("catt") > model.spelling("qzzk") > 0


# ---- Likeness


@needs_rouge
def test_rouge_counts_words_of_any_script_and_characters_where_words_have_no_spaces():
    """ROUGE-1: 2 of 3 words, of which the case and the form of an accent do not count."""
    found = metrics.rouge(["a naïve кот", "我喜欢猫", "na"], ["THE nai\u0308ve КОТ", "我喜欢狗狗", "naïve"])
    assert [row[0] for row in found] == pytest.approx([200 / 3, 100 * 2 * 3 / (4 + 5), 0])
    assert found[0][1] == pytest.approx(50)
    crossed = metrics.rouge(["a b c d"], ["a c b d"])
    assert (crossed[0][0], crossed[0][2]) == (100, 75)


def test_outside_their_domain_likeness_says_why_it_is_absent():
    assert metrics.rouge(["a"], ["..."]) == "no reference has a word"
    assert metrics.bert_score(["кот"], ["кот спит"]) == "its model reads English"
    assert metrics.bert_score([" "], ["a cat"]) == "all texts are empty"


def test_bert_score_is_f1_times_100_or_says_what_it_lacks(monkeypatch):
    def score(texts, references, lang):
        assert lang == "en"
        if texts == ["none"]:
            raise OSError("roberta-large does not appear to have a file named config.json")
        return torch.zeros(2), torch.zeros(2), torch.tensor([0.25, 1.0])

    monkeypatch.setitem(sys.modules, "bert_score", SimpleNamespace(score=score))
    assert metrics.bert_score(["a", "b"], ["c", "d"]).tolist() == [25, 100]
    assert metrics.bert_score(["none"], ["a"]) == "roberta-large is not on this machine"


@needs_mauve
def test_mauve_tells_two_sets_apart_and_needs_two_clusters():
    x = np.random.default_rng(0).normal(size=(8, 4))
    same, half = metrics.mauve(x, x, 2, np.random.default_rng(0))
    other, _ = metrics.mauve(x, x + 50, 2, np.random.default_rng(0))
    assert same == 100 > 50 > other and half >= 0
    assert metrics.mauve(x, x, 1, None) == "too few prompts; --n=16 or more"
