"""Properties of data/prepare.py, and of the corpora that training reads."""

import gzip
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tarfile
import threading
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import engine.corpus
from data.advice import next_commands
from data.bpe import train_bpe
from data.embedded import is_prose, names
from engine.corpus import Corpus, load_encoding
from engine.config import UserError
from tests.helpers import DOCUMENTS, ROOT, load, refuse, run_module, script, write_jsonl
from textldm import CONTEXT, TAIL_WEIGHT, TARGET


def prepare(*arguments):
    script("data/prepare.py", *arguments)


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text())


def documents_of(corpus):
    """The tokens of each document, with its end-of-text token."""
    documents = np.split(corpus.tokens, corpus.ends)
    assert not len(documents[-1])
    return documents[:-1]


def read_back(folder):
    """All documents of a prepared folder, as bytes."""
    texts = []
    for split in ("train", "val"):
        corpus = Corpus(folder, split, 2)
        ends = np.flatnonzero(corpus.tokens == corpus.eot) + 1  # also of a stream
        for document in np.split(corpus.tokens, ends)[:-1]:
            texts.append(corpus.encoding.decode_bytes(document[:-1].tolist()))
    return texts


def any_text(rng, n):
    """Any valid Unicode but surrogates."""
    text = ""
    for bound in rng.choice([0x80, 0x800, 0x10000, 0x110000], n):
        point = int(rng.integers(bound))
        if not 0xD800 <= point < 0xE000:
            text += chr(point)
    return text


# ---- Any text, of any source


@pytest.mark.parametrize("encoding", ["bpe", "gpt2"])
def test_prepare_gives_back_any_text(tmp_path, encoding):
    if encoding == "gpt2":
        try:
            load_encoding(dict(encoding="gpt2", vocab_size=50257, eot=50256))
        except UserError:
            pytest.skip("GPT-2's BPE is not in tiktoken's cache, and there is no network")
    rng = np.random.default_rng(0)
    texts = [any_text(rng, 50) for _ in range(200)]
    texts += ["a\r\nb\x00c\u2028d \n\n ", "<|endoftext|>", " ", "\n", "lone \ud800 half"]
    texts += DOCUMENTS[:7]
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    options = [f"--encoding={encoding}", "--val_fraction=0.3"]
    if encoding == "bpe":
        options.append("--vocab_size=280")
    prepare(source, "--out", tmp_path / "out", *options)
    expected = []
    for text in texts:
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        expected.append(whole.encode())
    assert sorted(read_back(tmp_path / "out")) == sorted(expected)


def test_every_format_gives_the_same_corpus(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    lines = [json.dumps({"text": f"{text} {i}"}) + "\n" for i, text in enumerate(DOCUMENTS)]
    plain = "".join(lines).encode()
    # Archives are often appended to, so a file may hold several frames.
    frames = zstandard.compress(plain[:5000]) + zstandard.compress(plain[5000:])
    files = {"a.jsonl": plain, "b.jsonl.gz": gzip.compress(plain), "c.jsonl.zst": frames}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        tar.add(tmp_path / "c.jsonl.zst", "openwebtext2/c.jsonl.zst")
    options = ["--encoding=bpe", "--vocab_size=280", "--val_fraction=0.2"]
    found = []
    for name in [*files, "d.tar"]:
        prepare(tmp_path / name, "--out", tmp_path / "out", *options)
        digest = meta_of(tmp_path / "out")["sha256"]
        found.append((digest, (tmp_path / "out/train.bin").read_bytes()))
    assert len(found) == 4
    assert len(set(found)) == 1


def test_every_document_is_followed_by_an_end_of_text(tmp_path):
    """Documents of any length, in however many blocks they are encoded, and in their order."""
    rng = np.random.default_rng(0)
    texts = ["x" * 3000, "\n", " ", "a\n\n", "b " * 5000]
    texts += ["word " * int(n) + "end" for n in rng.integers(0, 300, 400)]
    texts += ["y" * 70000, "z"]
    module = load("data/prepare.py")
    module.BLOCK = 1 << 15
    ranks, _ = train_bpe(texts, 280)
    tokenizer = dict(encoding="bpe", vocab_size=280, eot=279, bpe=ranks)
    encoding = load_encoding(tokenizer)
    # A long document comes in pieces.
    pieces = []
    for text in texts:
        for start in range(0, len(text), 40000):
            pieces.append((text[start : start + 40000], start + 40000 >= len(text)))
    paths = {split: tmp_path / f"{split}.bin" for split in ("train", "val")}
    with ThreadPoolExecutor(2) as pool:
        writer = module.BinWriter(paths, module.Encoder(encoding, 279, "uint16"), pool)
        module.write_documents(writer, pieces, "train", 0.5, hashlib.sha256())
        writer.finish()
    lengths = [len(encoding.encode_ordinary(text)) + 1 for text in texts if len(text) < 40000]
    assert not Counter(lengths) - writer.lengths
    assert writer.lengths.total() == writer.count["train"][1] == len(texts)
    meta = dict(tokenizer, dtype="uint16", layout="documents", longest=99)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    corpus = Corpus(tmp_path, "train", 2)
    found = [corpus.encoding.decode(d[:-1].tolist()) for d in documents_of(corpus)]
    assert found == texts


# ---- Training and validation data


def test_val_within_the_folder_is_not_trained_on(tmp_path):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in/a.jsonl", ["for training"] * 9)
    val = write_jsonl(tmp_path / "in/val.jsonl", ["for val"] * 9)
    options = ["--encoding=bpe", "--vocab_size=260"]
    prepare(tmp_path / "in", "--val", val, "--out", tmp_path / "out", *options)
    assert meta_of(tmp_path / "out")["documents"] == {"train": 9, "val": 9}


def test_the_split_depends_on_the_text_alone(tmp_path):
    texts = [f"document {i}" for i in range(300)]
    options = ["--encoding=bpe", "--vocab_size=270", "--val_fraction=0.2"]
    vals = []
    for name, order in (("forth", texts), ("back", texts[::-1])):
        source = write_jsonl(tmp_path / f"{name}.jsonl", order)
        prepare(source, "--out", tmp_path / name, *options)
        corpus = Corpus(tmp_path / name, "val", 64)
        text = corpus.encoding.decode(corpus.tokens.tolist())
        vals.append(sorted(text.split("<|endoftext|>")))
    assert vals[0] == vals[1]
    assert 30 < len(vals[0]) < 90


def test_text_files_and_val_files(tmp_path):
    (tmp_path / "txt").mkdir()
    expected = []
    for i in range(5):
        content = f"file {i} äöü\r\n\n".encode() * 9
        (tmp_path / "txt" / f"{i}.txt").write_bytes(content)
        expected.append(content.replace(b"\r", b""))
    (tmp_path / "val.txt").write_text("file of val")
    options = ["--encoding=bpe", "--vocab_size=264"]
    prepare(tmp_path / "txt", "--val", tmp_path / "val.txt", "--out", tmp_path / "out", *options)
    assert read_back(tmp_path / "out") == [*expected, b"file of val"]


def test_rows_are_as_long_as_nearly_all_documents_need(home):
    meta = meta_of(home / "data")
    lengths = [len(d) for d in documents_of(Corpus(home / "data", "train", 64))]
    lengths += [len(d) for d in documents_of(Corpus(home / "data", "val", 64))]
    assert np.quantile(lengths, 0.9) <= meta["longest"] <= max(lengths)
    assert Corpus(home / "data", "train", 64).N == meta["longest"]
    assert Corpus(home / "data", "train", 8).N == 8


# ---- The embedded corpora


def test_names_are_those_of_unicode():
    found = list(names())
    assert len(set(found)) == len(found)
    assert len(found) > 25000
    assert "greek small letter alpha" in found
    if unicodedata.unidata_version == "14.0.0":
        assert len(found) == 26015


PROSE = [
    ("Return the height of the figure.", True),
    ("return the height of the figure.", False),
    ("Return x[0] + y[1] * (z - 2).", False),
    ("Too short.", False),
]


@pytest.mark.parametrize("text, expected", PROSE)
def test_prose_is_told_from_code(text, expected):
    assert is_prose(text) == expected


# ---- One text, with no option but its path


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """The path of a text of 20 kB."""
    rng = np.random.default_rng(0)
    words = ["sea", "ship", "captain", "island", "the", "of", "and", "said", "Aye", "rum", "kö"]
    lines = [" ".join(rng.choice(words, 8)) + ".\n" for _ in range(450)]
    path = tmp_path_factory.mktemp("book") / "my book.txt"
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("options, share", [([], 0.1), (["--val_fraction=0.5"], 0.5)])
def test_the_end_of_a_single_text_is_val(book, tmp_path, options, share):
    prepare(book, "--out", tmp_path / "out", *options)
    splits = [Corpus(tmp_path / "out", split, 8) for split in ("train", "val")]
    tokens = np.concatenate([corpus.tokens for corpus in splits]).tolist()
    assert splits[0].encoding.decode(tokens) == book.read_text() + "<|endoftext|>"
    assert abs(len(splits[1].tokens) - share * len(tokens)) < 1
    meta = meta_of(tmp_path / "out")
    assert meta["encoding"] == "bpe" and meta["layout"] == "stream"


def test_a_long_vocabulary_is_of_a_long_text(book, tmp_path):
    sizes = []
    for times in (1, 5):
        words = [f" {number**3:x}" for number in range(times * 6_000)] * 2
        (tmp_path / "text").write_text("".join(words))
        prepare(tmp_path / "text", "--out", tmp_path / "out")
        sizes.append(meta_of(tmp_path / "out")["vocab_size"])
    assert 512 <= sizes[0] < sizes[1] <= 4096


def test_no_token_is_one_that_the_text_does_not_need(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one one one one two")
    prepare(tmp_path / "a.txt", "--vocab_size=2048", "--out", tmp_path / "out")
    size = meta_of(tmp_path / "out")["vocab_size"]
    assert size < 270
    assert f"no use for more than {size} tokens" in capsys.readouterr().out
    assert "too short to train on" not in (tmp_path / "out/meta.json").read_text()


def commands_in(said):
    return [shlex.split(line) for line in said.splitlines() if line.startswith("python ")]


@pytest.mark.parametrize("layout", ["stream", "documents"])
def test_the_printed_commands_train_and_write(book, tmp_path, monkeypatch, capsys, layout):
    monkeypatch.chdir(tmp_path)
    prepare(book, *(["--lines"] if layout == "documents" else []))
    assert meta_of(tmp_path / "data/my book")["layout"] == layout
    commands = commands_in(capsys.readouterr().out)
    assert len(commands) == 4
    small = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--batch_size=8", "--max_steps=2"]
    for _, path, *arguments in commands[:3]:
        script(ROOT / (tmp_path / path).resolve().relative_to(ROOT), *arguments, *small)
    capsys.readouterr()
    script("sample.py", *commands[3][2:], "--length=8", "--steps=2")
    assert "|" in capsys.readouterr().out


def test_the_commands_for_a_large_vocabulary_are_for_a_gpu(tmp_path, monkeypatch):
    meta = dict(vocab_size=50257, layout="stream", tokens={}, documents={})
    commands = commands_in(next_commands(tmp_path / "owt", meta))
    assert [Path(path).name for _, path, *_ in commands] == [
        "train_vae.py",
        "train_dit.py",
        "sample.py",
    ]
    assert "--preset=small" in commands[0]


@pytest.mark.parametrize("has_gpt2", [True, False])
def test_a_large_text_gets_gpt2s_bpe_if_it_is_there(book, tmp_path, monkeypatch, capsys, has_gpt2):
    module = load("data/prepare.py")
    module.SMALL = 1000

    def load_or_fail(tokenizer):
        if tokenizer["encoding"] == "gpt2" and not has_gpt2:
            raise UserError("no network")
        return load_encoding(tokenizer)

    module.load_encoding = load_or_fail
    if has_gpt2:
        try:
            load_encoding(module.GPT2)
        except UserError:
            pytest.skip("GPT-2's BPE is not in tiktoken's cache, and there is no network")
    run_module(module, "data/prepare.py", book, "--out", tmp_path / "out")
    assert meta_of(tmp_path / "out")["encoding"] == ("gpt2" if has_gpt2 else "bpe")
    assert ("a new BPE takes its place" in capsys.readouterr().out) != has_gpt2
    whole = book.read_bytes()
    assert sum(meta_of(tmp_path / "out")["tokens"].values()) > len(whole) / 10


@pytest.mark.parametrize("lines", [3, 300])
def test_documents_that_fill_no_row_get_no_commands(tmp_path, capsys, lines):
    (tmp_path / "a.txt").write_text("".join(f"line {i} of a few words\n" for i in range(lines)))
    prepare(tmp_path / "a.txt", "--lines", "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert ("too short to train on" in said) == (lines == 3)
    assert bool(commands_in(said)) == (lines == 300)
    assert "with --lines" not in said


def test_a_text_of_a_few_letters_is_said_to_be_too_short(tmp_path, capsys):
    (tmp_path / "a.md").write_text("plain text\n")
    prepare(tmp_path / "a.md", "--out", tmp_path / "out")
    assert "too short to train on" in capsys.readouterr().out


# ---- Few documents, and lines


@pytest.mark.parametrize("layout", ["documents", "stream"])
def test_with_few_documents_the_last_ones_are_val(tmp_path, layout):
    texts = [f"document {i}" for i in range(20)]
    source = write_jsonl(tmp_path / "few.jsonl", texts)
    layout = f"--layout={layout}"
    prepare(source, "--out", tmp_path / "out", "--val_fraction=0.25", layout)
    val = Corpus(tmp_path / "out", "val", 2)
    assert read_back(tmp_path / "out") == [text.encode() for text in texts]
    assert (val.tokens == val.eot).sum() == 5
    assert meta_of(tmp_path / "out")["documents"] == {"train": 15, "val": 5}


def test_a_single_document_is_not_divided_into_documents(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one text " * 99)
    options = ["--out", tmp_path / "new", "--layout=documents"]
    refuse(capsys, "only one document", "data/prepare.py", tmp_path / "a.txt", *options)
    assert not (tmp_path / "new").exists()


def test_each_line_is_a_document_where_asked(tmp_path):
    (tmp_path / "names.txt").write_text("".join(f"name {i}\n\n" for i in range(300)))
    prepare(tmp_path / "names.txt", "--lines", "--out", tmp_path / "out")
    assert sorted(read_back(tmp_path / "out")) == sorted(f"name {i}".encode() for i in range(300))
    assert meta_of(tmp_path / "out")["layout"] == "documents"


def test_short_documents_are_rows_and_long_ones_a_stream(tmp_path):
    for words, layout in ((3, "documents"), (300, "stream")):
        source = write_jsonl(tmp_path / "a.jsonl", [f"{'word ' * words}{i}" for i in range(200)])
        prepare(source, "--out", tmp_path / "out")
        assert meta_of(tmp_path / "out")["layout"] == layout


# ---- What paths may be


def test_a_pipe_is_read_once(book, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(book.read_bytes(),))
    writer.start()
    prepare(tmp_path / "pipe", "--out", tmp_path / "out", "--encoding=bpe")
    writer.join()
    prepare(book, "--out", tmp_path / "other")
    assert meta_of(tmp_path / "out")["sha256"] == meta_of(tmp_path / "other")["sha256"]


def test_a_dash_is_stdin(book, tmp_path):
    command = [sys.executable, ROOT / "data/prepare.py", "-"]
    subprocess.run(command, cwd=tmp_path, input=book.read_bytes(), check=True, capture_output=True)
    assert b"captain" in read_back(tmp_path / "data/stdin")[0]


def test_a_folder_comes_before_the_embedded_corpus_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    write_jsonl(tmp_path / "docs/a.jsonl", ["mine"] * 9)
    prepare("docs", "--out", tmp_path / "out")
    assert read_back(tmp_path / "out")[0].startswith(b"mine")
    module = load("data/prepare.py")
    monkeypatch.chdir(ROOT)
    assert module.find_embedded(["docs"]) == "docs", "the pages of this project are no corpus"


def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("a text " * 99)
    prepare("~/a.txt", "--out=~/out")
    assert (tmp_path / "out/train.bin").exists()


def test_links_to_outputs_stay_links(book, tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/train.bin").symlink_to(tmp_path / "large disk/train.bin")
    prepare(book, "--out", tmp_path / "out")
    assert (tmp_path / "out/train.bin").is_symlink()
    assert (tmp_path / "large disk/train.bin").stat().st_size > 1000
    assert not list(tmp_path.rglob("*.tmp"))


def test_another_corpus_of_the_same_name_is_replaced_only_where_asked(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "input.txt").write_text(f"a text of {folder} " * 99)
    prepare("a/input.txt")
    words = "holds a corpus of a/input.txt"
    refuse(capsys, words, "data/prepare.py", "b/input.txt", keep=tmp_path / "data")
    prepare("a/input.txt")
    prepare("b/input.txt", "--out=data/input")
    assert b"a text of b" in read_back(tmp_path / "data/input")[0]


def test_the_files_of_another_program_stay(book, tmp_path, capsys):
    np.arange(99, dtype=np.uint16).tofile(tmp_path / "train.bin")
    words = "train.bin of another program"
    refuse(capsys, words, "data/prepare.py", book, "--out", tmp_path, keep=tmp_path)


def test_a_second_process_is_refused_and_harms_nothing(book, tmp_path, capsys):
    code = "import sys, engine.script as s; s.lock(sys.argv[1]); print(flush=True); input()"
    command = [sys.executable, "-c", code, tmp_path]
    first = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        first.stdout.readline()
        (tmp_path / "train.bin.tmp").write_text("of the first")
        words = "another process writes to"
        refuse(capsys, words, "data/prepare.py", book, "--out", tmp_path, keep=tmp_path)
    finally:
        first.kill()
        first.wait()
    prepare(book, "--out", tmp_path)


# ---- Rows


def test_nanogpt_bins_are_gpt2_streams(tmp_path, monkeypatch):
    def no_encoding(tokenizer, source=""):
        return tokenizer

    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    monkeypatch.setattr(engine.corpus, "load_encoding", no_encoding)
    corpus = Corpus(tmp_path, "train", 64)
    assert corpus.encoding["encoding"] == "gpt2"
    assert corpus.is_stream
    batch = corpus.batch(np.random.default_rng(0), 16, 32)
    assert (batch.tokens.diff(dim=1) == 1).all()
    assert len(set(batch.tokens[:, 0].tolist())) > 8
    assert batch.counted.all()


@pytest.fixture(scope="module")
def rows(home):
    """500 rows of documents: (tokens of the text, context, target, row, segment, weight) each."""
    corpus = Corpus(home / "data", "train", 64)
    batch = corpus.batch(np.random.default_rng(0), 500, 64)
    found = []
    for row, segment, weight in zip(batch.tokens, batch.segment, batch.weight):
        n = row.tolist().index(corpus.eot) + 1
        text = row[: n - 1]
        sides = []
        for side in (CONTEXT, TARGET):
            sides.append(corpus.encoding.decode(text[segment[: n - 1] == side].tolist()))
        found.append((text.tolist(), *sides, row, segment, weight))
    return corpus, found


def test_a_row_is_a_document_and_a_tail_of_end_of_texts(rows):
    corpus, found = rows
    documents = {corpus.encoding.decode(d[:-1].tolist()) for d in documents_of(corpus)}
    for text, context, target, row, _, weight in found:
        n = len(text) + 1
        assert context + target in documents, "a cut inside a word loses no character"
        assert (row[n - 1 :] == corpus.eot).all()
        assert (weight[:n] == 1).all()
        assert (weight[n:] == TAIL_WEIGHT).all()


def test_a_context_is_tokenised_as_a_prompt_is(rows):
    corpus, found = rows
    for _, context, _, row, segment, _ in found:
        assert corpus.encoding.encode(context) == row[segment == CONTEXT].tolist()


def test_rows_are_cut_anywhere(rows):
    corpus, found = rows
    empty = inside_words = 0
    for _, context, target, *_ in found:
        empty += not context
        inside_words += context[-1:].isalpha() and target[:1].isalpha()
    assert empty > 40
    assert inside_words > 50


def test_only_beginnings_have_an_empty_context(home):
    corpus = Corpus(home / "data", "train", 8)
    beginnings = set()
    for document in documents_of(corpus):
        beginnings.add((*document.tolist(), *[corpus.eot] * 8)[:8])
    batch = corpus.batch(np.random.default_rng(0), 500, 8)
    empty = []
    for row, segment in zip(batch.tokens.tolist(), batch.segment):
        if (segment == TARGET).all():
            empty.append(tuple(row))
    assert len(empty) > 20
    assert set(empty) <= beginnings
    assert not {tuple(row) for row in batch.tokens.tolist()} <= beginnings


def test_the_places_of_targets_are_known_without_a_gpu(rows, home):
    corpus, _ = rows
    batch = corpus.batch(np.random.default_rng(1), 20, 16)
    assert batch.targets.tolist() == np.flatnonzero(batch.segment.flatten() == TARGET).tolist()


def test_documents_are_drawn_equally_often(home):
    corpus = Corpus(home / "data", "train", 64)
    batch = corpus.batch(np.random.default_rng(0), 20 * len(corpus.ends), 64)
    seen = Counter(tuple(row) for row in batch.tokens.tolist())
    assert len(seen) == len(corpus.ends)
    assert max(seen.values()) < 60


def test_fixed_batches_are_always_the_same(home):
    a = Corpus(home / "data", "val", 16).fixed_batches(2, "cpu")
    b = Corpus(home / "data", "val", 16).fixed_batches(2, "cpu")
    for one, other in zip(a, b):
        assert (one.tokens == other.tokens).all()
        assert (one.segment == other.segment).all()
    assert a[0].tokens.tolist() != a[1].tokens.tolist()


# ---- Bad sources


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with good.jsonl, and with what it makes in out/."""
    folder = tmp_path_factory.mktemp("prepared")
    good = write_jsonl(folder / "good.jsonl", DOCUMENTS)
    options = ["--encoding=bpe", "--vocab_size=280", "--val_fraction=0.2"]
    prepare(good, "--out", folder / "out", *options)
    return folder


def cut_tar(folder, tmp_path):
    (tmp_path / "a.jsonl").write_bytes((folder / "good.jsonl").read_bytes()[:500])
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        tar.add(tmp_path / "a.jsonl", "a.jsonl")
        tar.add(folder / "good.jsonl", "good.jsonl")
    return (tmp_path / "whole.tar").read_bytes()[:1024]


def long_lines(folder):
    """Lines whose compressed file is large."""
    noise = np.random.default_rng(0).bytes(300000).hex().encode()
    return (folder / "good.jsonl").read_bytes() + noise


def cut_zst(folder, tmp_path):
    return pytest.importorskip("zstandard").compress(long_lines(folder))[:-100]


def bad_zst(folder, tmp_path):
    pytest.importorskip("zstandard")
    return b"not zstandard at all"


def cut_gz(folder, tmp_path):
    return gzip.compress(long_lines(folder))[:-100]


BROKEN = "broken, cut off"
NO_DOCUMENT = "no usable document"
MISREAD = "is no text in JSON"
BAD_FILES = {
    "cut.jsonl.zst": (cut_zst, BROKEN),
    "bad.jsonl.zst": (bad_zst, BROKEN),
    "cut.jsonl.gz": (cut_gz, BROKEN),
    "bad.jsonl.gz": (b"not gzip at all", BROKEN),
    "bad.tar": (b"not a tar at all" * 99, BROKEN),
    "cut.tar": (cut_tar, BROKEN),
    "none.jsonl": (b'{"txt": "wrong field"}\nnot json\n[1]\n{"text": 3}\n\n', MISREAD),
    "empty.jsonl": (b"", NO_DOCUMENT),
    "deep.jsonl": (b"[" * 99999 + b"\n", MISREAD),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_and_nothing_is_changed(prepared, tmp_path, capsys, name):
    data, words = BAD_FILES[name]
    if callable(data):
        data = data(prepared, tmp_path)
    (tmp_path / name).write_bytes(data)
    out = prepared / "out"
    options = ["--out", out, "--encoding=bpe", "--vocab_size=259"]
    refuse(capsys, words, "data/prepare.py", tmp_path / name, *options, keep=out)


def test_bad_options_are_refused_and_nothing_is_changed(prepared, tmp_path, capsys):
    good, out = prepared / "good.jsonl", prepared / "out"
    where = ["--out", out]
    refuse(capsys, "missing", "data/prepare.py", tmp_path / "nothing.jsonl", *where, keep=out)
    bad = {
        "--val_fraction=2": "must lie between 0 and 1",
        "--vocab_size=20": "at least 258",
        "--vocab_size=2048 --encoding=gpt2": "--vocab_size is for --encoding=bpe",
        f"--val={good} --val_fraction=0.1": "no effect with --val",
        f"--val={good}": "none is left for train",
    }
    for options, words in bad.items():
        refuse(capsys, words, "data/prepare.py", good, *where, *options.split(), keep=out)
    refuse(capsys, "names is an embedded corpus", "data/prepare.py", good, "names", keep=out)
    refuse(capsys, "cannot make the folder", "data/prepare.py", good, f"--out={good}", keep=out)
    refuse(capsys, "--lines is for", "data/prepare.py", "names", "--lines", *where, keep=out)


def test_single_bad_lines_are_skipped_and_counted(prepared, tmp_path, capsys):
    lines = (prepared / "good.jsonl").read_bytes()
    (tmp_path / "some.jsonl").write_bytes(b"nonsense\n" + lines)
    options = ["--encoding=bpe", "--vocab_size=280", "--val_fraction=0.2"]
    prepare(tmp_path / "some.jsonl", "--out", tmp_path / "out", *options)
    assert "skipped 1 unusable lines of" in capsys.readouterr().out


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    options = ["--out", tmp_path / "out", "--encoding=bpe"]
    words = "pip install zstandard"
    refuse(capsys, words, "data/prepare.py", tmp_path / "a.jsonl.zst", *options)


@pytest.mark.parametrize("change", [{"eot": 3}, {"vocab_size": 7}, {"bpe": "%%"}, {"bpe": ""}])
def test_a_damaged_tokenizer_is_refused(home, change):
    tokenizer = dict(Corpus(home / "data", "train", 8).tokenizer, **change)
    with pytest.raises(UserError, match="do not fit"):
        load_encoding(tokenizer)
