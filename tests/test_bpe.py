"""Properties of data/bpe.py: its merges are those of a few plain lines."""

import base64
from collections import Counter

import numpy as np
import pytest
import regex

import data.bpe
from data.bpe import train_bpe
from engine.corpus import GPT2_SPLIT, load_encoding

KINDS = ["english", "ties", "runs", "unicode", "long words"]
ENGLISH = "the cat sat on the mat, then the other cat ate the thin rat. That's that! "
MIXED = "你好，世界。你好吗？世界你好 😀😀😀👍 café naïve Ünïcödé e\u0301 \u200d 12 345 12 345\n\n\t \0\0"


def tokens_of(ranks):
    """The tokens of a list in the file format of tiktoken, in the order of their ranks."""
    tokens = []
    for line in ranks.splitlines():
        token, rank = line.split()
        assert int(rank) == len(tokens)
        tokens.append(base64.b64decode(token))
    return tokens


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
        assert pair[0] + pair[1] not in tokens  # two merges never give the same bytes
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
        runs = []
        for n in rng.integers(1, 12, 25):
            runs.append(draw(rng, "ab ", 1) * n)
        return ["".join(runs), "aaa aaaa aaaaa", "b" * 33]
    if kind == "unicode":
        return [MIXED, draw(rng, MIXED, 150)]
    assert kind == "long words"
    return [draw(rng, "ACGT", 1100), "z" * int(rng.integers(1000, 1100))]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KINDS)
def test_merges_are_those_of_a_plain_bpe(monkeypatch, kind, seed):
    monkeypatch.setattr(data.bpe, "CHUNK", 20)
    rng = np.random.default_rng(seed)
    texts = texts_of(kind, rng)
    for vocab_size in (257, 258, 262, 290, 400):
        ranks, size = train_bpe(iter(texts), vocab_size)
        tokens = tokens_of(ranks)
        assert tokens == plain_bpe(texts, vocab_size)
        assert size == len(tokens) + 1 <= vocab_size
        assert len(set(tokens)) == len(tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoding_of_a_bpe_gives_text_back(kind):
    texts = texts_of(kind, np.random.default_rng(5))
    ranks, size = train_bpe(texts, 330)
    encoding = load_encoding(dict(encoding="bpe", vocab_size=size, eot=size - 1, bpe=ranks))
    for text in [*texts, ENGLISH, MIXED]:
        encoded = encoding.encode_ordinary(text)
        assert encoding.decode(encoded) == text
        assert max(encoded, default=0) < size - 1


def test_merges_end_where_no_pair_occurs_twice():
    ranks, size = train_bpe(["abcd abcd", "xy"], 1000)
    assert tokens_of(ranks)[256:] == [b"cd", b"bcd", b"abcd"]
    assert size == 256 + 3 + 1


@pytest.mark.parametrize("texts", [[], [""], ["a"], ["a b c"], ["\ud800 \udc00"]])
def test_any_text_gives_at_least_the_bytes(texts):
    ranks, size = train_bpe(texts, 300)
    assert size == 257
    assert tokens_of(ranks) == [bytes([byte]) for byte in range(256)]


def test_the_order_of_texts_does_not_matter():
    texts = texts_of("ties", np.random.default_rng(0)) + texts_of("runs", np.random.default_rng(1))
    assert train_bpe(texts, 300) == train_bpe(texts[::-1], 300)


def test_a_bpe_reads_at_most_its_sample_of_characters(monkeypatch):
    monkeypatch.setattr(data.bpe, "BPE_SAMPLE", 40)
    texts = iter(["é" * 10] * 4 + ["b", "c", "d"])
    train_bpe(texts, 300)
    assert list(texts) == ["c", "d"]


def test_a_bpe_reads_at_most_its_sample_of_different_words(monkeypatch):
    """A word counts once, with its bytes. An emoji has four."""
    monkeypatch.setattr(data.bpe, "WORD_SAMPLE", 40)
    texts = iter(["a" * 10] * 9 + ["é" * 10, "😀", "😀", "😀😀", "c", "d"])
    train_bpe(texts, 300)
    assert list(texts) == ["c", "d"]
