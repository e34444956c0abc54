"""data/bpe.py: its merges are those of a few plain lines."""

import base64
from collections import Counter

import numpy as np
import pytest
import regex

import data.bpe
from data.bpe import train_bpe
from engine.corpus import GPT2_SPLIT

ENGLISH = "the cat sat on the mat, then the other cat ate the thin rat. That's that! "
MIXED = "你好，世界。你好吗？世界你好 😀😀😀👍 café naïve Ünïcödé e\u0301 \u200d 12 345 12 345\n\n\t \0\0"


def tokens_of(ranks):
    """The tokens of a list in the file format of tiktoken, in the order of their ranks."""
    lines = [line.split() for line in ranks.splitlines()]
    assert [int(rank) for _, rank in lines] == list(range(len(lines)))
    return [base64.b64decode(token) for token, _ in lines]


def merge_word(word, pair):
    """A word with each pair as one token, from left to right."""
    merged = []
    while word:
        n = 2 if tuple(word[:2]) == pair else 1
        merged.append(b"".join(word[:n]))
        word = word[n:]
    return merged


def plain_bpe(texts, vocab_size):
    """The tokens of a BPE that counts all pairs of all words again at each merge."""
    tokens = [bytes([byte]) for byte in range(256)]
    words = []
    for text in texts:
        for word in regex.findall(GPT2_SPLIT, text):
            words.append([bytes([byte]) for byte in word.encode()])
    while len(tokens) < vocab_size - 1:
        pairs = Counter()
        for word in words:
            pairs.update(zip(word, word[1:]))
        frequency, pair = max([(pairs[pair], pair) for pair in pairs], default=(0, None))
        if frequency < 2:
            break
        tokens.append(pair[0] + pair[1])
        words = [merge_word(word, pair) for word in words]
    return tokens


def draw(rng, alphabet, n):
    return "".join(rng.choice(list(alphabet), n))


def texts_of(kind, rng):
    """A few short texts of a kind."""
    if kind == "english":
        words = rng.permutation((ENGLISH * 4).split(" "))
        return [ENGLISH, " ".join(words[:30]), "", " ".join(words[30:])]
    if kind == "ties":
        return [draw(rng, "ab", 100), draw(rng, "abc ", 150), draw(rng, "ba", 40)]
    if kind == "runs":
        runs = [draw(rng, "ab ", 1) * n for n in rng.integers(1, 12, 25)]
        return ["".join(runs), "aaa aaaa aaaaa", "b" * 33]
    if kind == "unicode":
        return [MIXED, draw(rng, MIXED, 150)]
    assert kind == "long words"
    return [draw(rng, "ACGT", 1100), "z" * int(rng.integers(1000, 1100))]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["english", "ties", "runs", "unicode", "long words"])
def test_merges_are_those_of_a_plain_bpe(kind, seed):
    texts = texts_of(kind, np.random.default_rng(seed))
    for vocab_size in (257, 258, 290, 400):
        ranks, size = train_bpe(iter(texts), vocab_size)
        assert tokens_of(ranks) == plain_bpe(texts, vocab_size)
        assert size == len(tokens_of(ranks)) + 1
    assert train_bpe(texts[::-1], 400) == (ranks, size), "the order of texts does not matter"


def test_merges_by_hand():
    ranks, size = train_bpe(["abcd abcd", "xy"], 1000)
    assert tokens_of(ranks)[256:] == [b"cd", b"bcd", b"abcd"], "of equal pairs, the last bytes"
    assert size == 256 + 3 + 1, "no other pair occurs twice"


@pytest.mark.parametrize("texts", [[], [""], ["a b c"], ["\ud800 \udc00"]])
def test_any_text_gives_at_least_the_bytes(texts):
    ranks, size = train_bpe(texts, 300)
    assert size == 257
    assert tokens_of(ranks) == [bytes([byte]) for byte in range(256)]


# A word counts once, with its bytes. An emoji has four.
MANY_WORDS = ["a" * 10] * 9 + ["é" * 10, "😀", "😀", "😀😀", "c", "d"]


@pytest.mark.parametrize(
    "limit, texts", [("BPE_SAMPLE", ["é" * 10] * 4 + ["b", "c", "d"]), ("WORD_SAMPLE", MANY_WORDS)]
)
def test_a_bpe_reads_its_sample_alone(monkeypatch, limit, texts):
    """40 characters, or 40 bytes of different words, and the text that goes beyond them."""
    monkeypatch.setattr(data.bpe, limit, 40)
    texts = iter(texts)
    train_bpe(texts, 300)
    assert list(texts) == ["c", "d"]
