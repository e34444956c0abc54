"""engine/corpus.py: the rows that training makes of a prepared folder."""

import base64
import json
from collections import Counter

import numpy as np
import pytest

import engine.corpus
from engine.config import UserError
from engine.corpus import Corpus, load_encoding
from textldm import TAIL_WEIGHT

BYTES = "".join(base64.b64encode(bytes([b])).decode() + f" {b}\n" for b in range(256))
TOKENIZER = dict(encoding="bpe", vocab_size=257, eot=256, bpe=BYTES)
END = 256


def documents_in(folder, longest=5):
    """A corpus of two documents: of the tokens 1 to 4, and of the token 5."""
    np.array([1, 2, 3, 4, END, 5, END], np.uint16).tofile(folder / "train.bin")
    meta = dict(TOKENIZER, dtype="uint16", layout="documents", longest=longest)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_rows_of_documents_by_hand(tmp_path):
    corpus = Corpus(documents_in(tmp_path), "train", 3)
    batch = corpus.batch(np.random.default_rng(0), 6000, 3)
    cuts = (batch.segment == 0).sum(1).tolist()
    seen = Counter(zip(map(tuple, batch.tokens.tolist()), cuts))
    begin, middle, end, short = (1, 2, 3), (2, 3, 4), (3, 4, END), (5, END, END)
    # A tenth has no context, and so has one cut of each length.
    share = {(begin, 0): (0.1 + 0.3) / 6, (begin, 1): 0.3 / 6, (begin, 2): 0.3 / 6}
    for row in (middle, end):  # a context of one token stands for none
        share |= {(row, 1): (0.1 + 0.6) / 6, (row, 2): 0.3 / 6}
    share |= {(short, 0): (0.1 + 0.45) / 2, (short, 1): 0.45 / 2}
    assert seen.keys() == share.keys()
    assert {key: n / 6000 for key, n in seen.items()} == pytest.approx(share, abs=0.02)
    assert (batch.segment.diff(dim=1) >= 0).all(), "context, then target"
    weight = (batch.tokens == END).cumsum(1) > 1
    assert np.allclose(batch.weight, np.where(weight, TAIL_WEIGHT, 1))
    assert batch.targets.tolist() == np.flatnonzero(batch.segment.flatten()).tolist()


def test_rows_of_a_stream_are_windows_and_any_may_begin_a_text(tmp_path, monkeypatch):
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    monkeypatch.setattr(engine.corpus, "load_encoding", lambda tokenizer, source="": tokenizer)
    corpus = Corpus(tmp_path, "train", 64)
    assert corpus.encoding["encoding"] == "gpt2" and corpus.N == 64
    batch = corpus.batch(np.random.default_rng(0), 400, 32)
    assert (batch.tokens.diff(dim=1) == 1).all() and batch.counted.all()
    assert len(set(batch.tokens[:, 0].tolist())) > 300
    assert 20 < batch.segment.all(dim=1).sum() < 75


@pytest.mark.parametrize("block_size, longest, N", [(3, 5, 3), (64, 5, 5), (64, 1, 2)])
def test_no_row_is_longer_than_asked_or_than_documents(tmp_path, block_size, longest, N):
    assert Corpus(documents_in(tmp_path, longest), "train", block_size).N == N


def test_fixed_batches_are_the_same_each_time_and_differ(home):
    one, other = [Corpus(home / "data", "val", 16).fixed_batches(2, "cpu") for _ in range(2)]
    for a, b in zip(one, other):
        assert a.tokens.equal(b.tokens) and a.segment.equal(b.segment)
    assert not one[0].tokens.equal(one[1].tokens)
    assert one[0].tokens.shape == (256, 16)


@pytest.mark.parametrize("change", [{"eot": 3}, {"vocab_size": 7}, {"bpe": "%%"}, {"bpe": ""}])
def test_a_damaged_tokenizer_is_refused(change):
    assert load_encoding(TOKENIZER).decode([104, 105]) == "hi"
    with pytest.raises(UserError, match="do not fit"):
        load_encoding(TOKENIZER | change)
