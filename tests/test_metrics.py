"""What bench/metrics.py reports, by hand, and what has no value."""

import json
import math
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from bench.evaluate import beginnings_of_words, make_benchmark
from bench.metrics import bert_score, mauve, repeated, rouge
from engine.corpus import Corpus
from engine.script import UserError
from tests.helpers import script


def lines_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


needs_rouge = pytest.mark.skipif(find_spec("rouge_score") is None, reason="pip install rouge-score")
needs_mauve = pytest.mark.skipif(find_spec("mauve") is None, reason="pip install mauve-text")


@needs_rouge
@pytest.mark.parametrize(
    "text",
    [
        " кот видит сегодня книгу",
        "Ελλάδα και Κύπρος",
        "قطة ترى كتابا",
        "हिन्दी में लिखा हुआ",
        "안녕 하세요 여러분",
        "私は猫です。",
        "ภาษาไทยง่าย",
        "naïve café",
    ],
)
def test_rouge_of_a_text_with_itself_is_100_in_every_script(text):
    assert rouge([text], [text]).tolist() == [[100, 100, 100]]


@needs_rouge
def test_rouge_counts_words_of_any_script_and_characters_where_words_have_no_spaces():
    """ROUGE-1 by hand: 2 of 3 words, of which the case and the form of an accent do not count."""
    ((one, two, longest),) = rouge(["a naïve кот"], ["THE nai\u0308ve КОТ"])
    assert (one, longest) == pytest.approx((200 / 3, 200 / 3))
    assert two == pytest.approx(50)
    ((one, _, _),) = rouge(["我喜欢猫"], ["我喜欢狗狗"])
    assert one == pytest.approx(100 * 2 * 3 / (4 + 5))
    assert rouge(["na"], ["naïve"]).tolist() == [[0, 0, 0]], "no piece of a word is one"


@needs_rouge
def test_rouge_is_as_the_package_has_it_on_english():
    from rouge_score.rouge_scorer import RougeScorer

    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"])
    pairs = [("The cat's 2 dogs, ran_away!", "the cat 2 dogs ran"), ("a-b c", "a b c d")]
    for text, reference in pairs:
        expected = [100 * s.fmeasure for s in theirs.score(reference, text).values()]
        assert rouge([text], [reference])[0] == pytest.approx(expected)


def test_mauve_of_one_cluster_is_absent():
    x = np.random.default_rng(0).normal(size=(8, 4))
    assert mauve(x, x + 5, 1, np.random.default_rng(0)) == "too few prompts; --n=16 or more"


@needs_mauve
def test_mauve_of_two_clusters_tells_two_sets_apart():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 4))
    same, _ = mauve(x, x, 2, rng)
    other, _ = mauve(x, x + 50, 2, rng)
    assert same > 99 > 50 > other


def test_bert_score_is_f1_times_100_or_says_what_it_lacks(monkeypatch):
    def score(texts, references, lang):
        assert lang == "en"
        if texts == ["none"]:
            raise OSError("roberta-large does not appear to have a file named config.json")
        nothing = torch.zeros(len(texts))
        return nothing, nothing, torch.tensor([0.25, 1.0])

    module = type(sys)("bert_score")
    module.score = score
    monkeypatch.setitem(sys.modules, "bert_score", module)
    assert bert_score(["a", "b"], ["c", "d"]).tolist() == [25, 100]
    assert bert_score(["none"], ["a"]) == "roberta-large is not on this machine"


def test_words_that_repeat_the_word_before_are_counted_by_hand():
    """Of 5 words 2: "the" after the prompt's "the", and the second "thou"."""
    assert repeated([" the cat, thou", " Thou thou"], ["of THE", ""]) == pytest.approx(40)
    assert math.isnan(repeated(["", "!"], ["a", "b"]))


@pytest.mark.parametrize(
    "text, places",
    [
        ("one two three", [3, 7]),
        ("one-two", []),
        ("word", []),
        ("我喜欢猫", [1, 2, 3]),
        ("我 喜欢", [1]),
        ("abc猫", [3]),
    ],
)
def test_documents_are_cut_between_words_or_between_characters_of_scripts_without_spaces(
    text, places
):
    assert beginnings_of_words(text) == places


def test_texts_without_spaces_have_a_benchmark(tmp_path, monkeypatch):
    signs = "我你他喜欢看书猫狗鸟鱼大小多少"
    rng = np.random.default_rng(0)
    lines = ["".join(rng.choice(list(signs), 8)) for _ in range(400)]
    (tmp_path / "in.txt").write_text("\n".join(lines))
    script("data/prepare.py", tmp_path / "in.txt", "--lines", "--out", tmp_path / "data")
    corpus = Corpus(tmp_path / "data", "val", 64)
    make_benchmark(corpus, tmp_path / "b.jsonl", 20, 1, False)
    for line in lines_in(tmp_path / "b.jsonl"):
        assert line["prompt"] + line["reference"] in lines
        assert 3 <= len(line["prompt"]) <= 5
    with pytest.raises(UserError, match=r"; --n=\d+$"):
        make_benchmark(corpus, tmp_path / "b.jsonl", 9999, 1, False)


def test_where_nothing_can_be_cut_the_advice_is_not_to_lower_n(tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(f"word{i}" for i in range(400)))
    script("data/prepare.py", tmp_path / "in.txt", "--lines", "--out", tmp_path / "data")
    corpus = Corpus(tmp_path / "data", "val", 64)
    with pytest.raises(UserError, match="only 0 documents.*prepare more, or name a --benchmark"):
        make_benchmark(corpus, tmp_path / "b.jsonl", 8, 1, False)
