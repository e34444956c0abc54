"""data/bpe.py: its merges are those of a few plain lines."""

import base64
import random
from collections import Counter

import pytest
import regex

import data.bpe
from data.bpe import train_bpe
from engine.corpus import GPT2_SPLIT

PARTS = {  # of which texts are drawn
    "words": ["the ", "then ", "other ", "that's ", "rat! "],
    "ties": ["a", "b", "c "],
    "runs": ["a" * 5, "b" * 3, "a", "b", "b" * 33, " "],
    "unicode": list("你好，世界。😀👍é e\u0301\u200d 1\n\t\0"),
    "long words": list("ACGT"),
}


def tokens_of(ranks):
    """The tokens of a list in the file format of tiktoken, in the order of their ranks."""
    lines = [line.split() for line in ranks.splitlines()]
    assert [int(rank) for _, rank in lines] == list(range(len(lines)))
    return [base64.b64decode(token) for token, _ in lines]


def plain_bpe(texts, vocab_size):
    """The tokens of a BPE that counts all pairs again at each merge. A token is a character."""
    tokens = {chr(byte): bytes([byte]) for byte in range(256)}
    words = [word for text in texts for word in regex.findall(GPT2_SPLIT, text)]
    words = [word.encode().decode("latin-1") for word in words]
    while len(tokens) < vocab_size - 1:
        pairs = Counter()
        for word in words:
            pairs.update(zip(word, word[1:]))
        ordered = [(pairs[a, b], tokens[a], tokens[b], a + b) for a, b in pairs]
        frequency, first, second, pair = max(ordered, default=(0, b"", b"", ""))
        if frequency < 2:
            break
        words = [word.replace(pair, chr(len(tokens))) for word in words]
        tokens[chr(len(tokens))] = first + second
    return list(tokens.values())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", PARTS)
def test_merges_are_those_of_a_plain_bpe(kind, seed):
    rng = random.Random(seed)
    texts = ["".join(rng.choices(PARTS[kind], k=k)) for k in (0, 30, 200, 900)]
    for vocab_size in (257, 258, 290, 400):
        ranks, size = train_bpe(iter(texts), vocab_size)
        assert tokens_of(ranks) == plain_bpe(texts, vocab_size)
    assert train_bpe(texts[::-1], 400) == (ranks, size), "the order of texts does not matter"


def test_merges_by_hand():
    ranks, size = train_bpe(["abcd abcd", "xy"], 1000)
    assert tokens_of(ranks)[256:] == [b"cd", b"bcd", b"abcd"], "of equal pairs, the last bytes"
    assert size == 256 + 3 + 1, "no other pair occurs twice"


@pytest.mark.parametrize("texts", [[], ["", "a b c"], ["\ud800 \udc00"]])
def test_any_text_gives_at_least_the_bytes(texts):
    ranks, size = train_bpe(texts, 300)
    assert (tokens_of(ranks), size) == ([bytes([byte]) for byte in range(256)], 257)


SAMPLES = {  # The sample is the first 40 characters, or 40 bytes of different words.
    "BPE_SAMPLE": ["é" * 10] * 4 + ["b", "c", "d"],
    "WORD_SAMPLE": ["a" * 10] * 9 + ["é" * 10, "😀", "😀", "😀😀", "c", "d"],
}


@pytest.mark.parametrize("limit", SAMPLES)
def test_a_bpe_reads_its_sample_alone(monkeypatch, limit):
    monkeypatch.setattr(data.bpe, limit, 40)
    texts = iter(SAMPLES[limit])
    train_bpe(texts, 300)
    assert list(texts) == ["c", "d"]
