"""engine/corpus.py: the rows that training makes of a prepared folder."""

from collections import Counter

import numpy as np
import pytest

import engine.corpus
from engine.corpus import Corpus, load_encoding
from engine.config import UserError
from tests.helpers import DOCUMENTS
from textldm import CONTEXT, TAIL_WEIGHT, TARGET


def test_nanogpt_bins_are_gpt2_streams(tmp_path, monkeypatch):
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    monkeypatch.setattr(engine.corpus, "load_encoding", lambda tokenizer, source="": tokenizer)
    corpus = Corpus(tmp_path, "train", 64)
    assert corpus.encoding["encoding"] == "gpt2" and corpus.is_stream
    batch = corpus.batch(np.random.default_rng(0), 16, 32)
    assert (batch.tokens.diff(dim=1) == 1).all() and batch.counted.all()
    assert len(set(batch.tokens[:, 0].tolist())) > 8
    # A window begins a text wherever it is, so a tenth of the rows have no context.
    assert {corpus.stretch(np.random.default_rng(i), 32)[1] for i in range(9)} == {True}
    whole = corpus.batch(np.random.default_rng(0), 400, 32).segment.all(dim=1)
    assert 20 < whole.sum() < 75


def test_a_row_is_a_document_cut_in_two_and_a_tail(home):
    corpus = Corpus(home / "data", "train", 64)
    documents = {f"{text} {i}" for i, text in enumerate(DOCUMENTS)}
    batch = corpus.batch(np.random.default_rng(0), 500, 64)
    empty = inside_words = 0
    for row, segment, weight in zip(batch.tokens, batch.segment, batch.weight):
        n = row.tolist().index(corpus.eot) + 1
        ids, segment = row[: n - 1], segment[: n - 1]
        context, target = [
            corpus.encoding.decode(ids[segment == side].tolist()) for side in (CONTEXT, TARGET)
        ]
        assert context + target in documents, "a cut inside a word loses no character"
        assert corpus.encoding.encode(context) == ids[segment == CONTEXT].tolist()
        assert (row[n - 1 :] == corpus.eot).all()
        assert (weight[:n] == 1).all() and (weight[n:] == TAIL_WEIGHT).all()
        empty += not context
        inside_words += context[-1:].isalpha() and target[:1].isalpha()
    assert empty > 40 and inside_words > 50
    assert batch.targets.tolist() == np.flatnonzero(batch.segment.flatten() == TARGET).tolist()


def test_only_beginnings_have_an_empty_context(home):
    corpus = Corpus(home / "data", "train", 8)
    beginnings = set()
    for document in np.split(corpus.tokens, corpus.ends)[:-1]:
        beginnings.add((*document.tolist(), *[corpus.eot] * 8)[:8])
    batch = corpus.batch(np.random.default_rng(0), 500, 8)
    rows = [tuple(row) for row in batch.tokens.tolist()]
    empty = [row for row, segment in zip(rows, batch.segment) if (segment == TARGET).all()]
    assert len(empty) > 20 and set(empty) <= beginnings
    assert not set(rows) <= beginnings


def test_documents_are_drawn_equally_often(home):
    corpus = Corpus(home / "data", "train", 64)
    batch = corpus.batch(np.random.default_rng(0), 20 * len(corpus.ends), 64)
    seen = Counter(tuple(row) for row in batch.tokens.tolist())
    assert len(seen) == len(corpus.ends) and max(seen.values()) < 60


def test_fixed_batches_are_always_the_same(home):
    a, b = [Corpus(home / "data", "val", 16).fixed_batches(2, "cpu") for _ in range(2)]
    for one, other in zip(a, b):
        assert (one.tokens == other.tokens).all() and (one.segment == other.segment).all()
    assert a[0].tokens.tolist() != a[1].tokens.tolist()


@pytest.mark.parametrize("change", [{"eot": 3}, {"vocab_size": 7}, {"bpe": "%%"}, {"bpe": ""}])
def test_a_damaged_tokenizer_is_refused(home, change):
    with pytest.raises(UserError, match="do not fit"):
        load_encoding(Corpus(home / "data", "train", 8).tokenizer | change)
