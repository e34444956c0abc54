"""data/prepare.py and data/embedded.py: what is written and printed."""

import argparse
import base64
import gzip
import hashlib
import json
import os
import random
import shlex
import sys
import threading
import unicodedata
from pathlib import Path
from subprocess import PIPE, Popen
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from data.embedded import docs, names
from engine.corpus import load_encoding
from engine.config import UserError
from tests.helpers import ROOT, load, refuse, run_module, script, write_jsonl


def prepare(*arguments):
    script("data/prepare.py", *arguments)


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text())


def texts_of(folder, split):
    """The documents of a split, as bytes. The last is what follows the last end-of-text."""
    meta = meta_of(folder)
    ids = np.fromfile(folder / f"{split}.bin", meta["dtype"])
    documents = np.split(ids, np.flatnonzero(ids == meta["eot"]) + 1)
    decode = load_encoding(meta).decode_bytes
    return [decode(document[document != meta["eot"]].tolist()) for document in documents]


def bytes_and_pairs(texts, size):
    """The tokens of a BPE of any size, as train_bpe returns them."""
    tokens = [bytes([a]) for a in range(256)]
    tokens += [a + b for a in tokens for b in tokens]
    tokens = [base64.b64encode(token).decode() for token in tokens[: size - 1]]
    return "".join(f"{token} {rank}\n" for rank, token in enumerate(tokens)), size


def test_the_tokens_of_a_text_by_hand(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abab abab")  # ab, a token 256, occurs most often
    options = ["--val_fraction=0.4", "--out", tmp_path / "out"]
    prepare(tmp_path / "a.txt", "--vocab_size=300", *options)
    assert "no use for more than 259 tokens" in capsys.readouterr().out, "ab and abab"
    prepare(tmp_path / "a.txt", "--vocab_size=258", *options)
    said = capsys.readouterr().out
    assert "no use for more" not in said and "too short to train on" in said
    assert "train: documents 1, tokens 4\nval: documents 1, tokens 2\nfiles read: 1\n" in said
    train, val = [np.fromfile(tmp_path / f"out/{name}.bin", "uint16") for name in ("train", "val")]
    assert train.tolist() == [256, 256, 32, 256]
    assert val.tolist() == [256, 257], "its last 0.4, with an end-of-text"
    meta = meta_of(tmp_path / "out")
    assert len(meta.pop("bpe").splitlines()) == 257
    expected = dict(encoding="bpe", vocab_size=258, eot=257, dtype="uint16", layout="stream")
    expected |= dict(tokens=dict(train=4, val=2), documents=dict(train=1, val=1), longest=6)
    expected |= dict(source=[str(tmp_path / "a.txt")], unicode=unicodedata.unidata_version)
    assert meta == expected | dict(sha256=hashlib.sha256(b"abab abab\0").hexdigest())


@pytest.mark.parametrize("size, dtype", [(2**16, "uint16"), (65537, "uint32")])
def test_any_text_comes_back_in_its_order(tmp_path, size, dtype):
    rng = random.Random(0)
    texts = ["a\r\nb\x00c\u2028d \n\n ", "<|endoftext|>", " ", "\n", "x" * 3000]
    texts += ["word " * rng.randrange(300) + "ö" for _ in range(400)]
    texts += ["".join(map(chr, rng.choices(range(0xE000, 0x110000), k=50))) for _ in range(50)]
    write_jsonl(tmp_path / "in.jsonl", texts)
    val = write_jsonl(tmp_path / "val.jsonl", texts[::-1])
    module = load("data/prepare.py")
    module.JOB = 5000
    module.train_bpe = bytes_and_pairs
    out = tmp_path / "out"
    options = ["--val", val, "--out", out, f"--vocab_size={size}"]
    run_module(module, "data/prepare.py", tmp_path, *options)  # val lies in the folder of train
    expected = [text.encode() for text in texts]
    assert texts_of(out, "train") == [*expected, b""]
    assert texts_of(out, "val") == [*expected[::-1], b""]
    digest = hashlib.sha256(b"".join(text + b"\0" for text in expected + expected[::-1]))
    assert meta_of(out)["sha256"] == digest.hexdigest() and meta_of(out)["dtype"] == dtype


def test_what_tiktoken_refuses_is_encoded_in_halves():
    encoding = Mock()
    encoding.encode_to_numpy.side_effect = [ValueError, [1], ValueError, [2, 3], [4]]
    assert load("data/prepare.py").encode(encoding, "abcdefg").tolist() == [1, 2, 3, 4]
    texts = [call.args[0] for call in encoding.encode_to_numpy.call_args_list]
    assert texts == ["abcdefg", "abc", "defg", "de", "fg"]


# So many of 3,000 documents have hashes below 0.1, 0.05, 0.005 and 0.25 of 2**64.
SHARES = {"a.jsonl": 330, "names": 168, "large": 17, "--val_fraction=0.25": 750}


@pytest.mark.parametrize("name", SHARES)
def test_a_hash_of_its_text_puts_a_document_in_val(tmp_path, name):
    texts = [f"document {i}" for i in range(3000)]
    module = load("data/prepare.py")
    module.EMBEDDED = {"names": lambda: iter(texts)}
    if name == "large":
        module.SMALL = 2000
    source = write_jsonl(tmp_path / "a.jsonl", texts[::-1])
    options = ["--vocab_size=280", "--out", tmp_path / "out"]
    options += [name] if name.startswith("--") else []
    run_module(module, "data/prepare.py", name if name == "names" else source, *options)
    number = SHARES[name]
    assert meta_of(tmp_path / "out")["documents"] == dict(train=3000 - number, val=number)


CUTS = {  # options, and how many documents end in train
    "--val_fraction=0.27": 15,  # the nearest end
    "--val_fraction=0.04": 19,  # within a document: val would hold less than one
    "--val_fraction=0.0001": 19,  # val has one token
    "--val_fraction=0.01 --layout=documents": 19,
}


@pytest.mark.parametrize("options", CUTS)
def test_with_few_documents_the_last_ones_are_val(tmp_path, options):
    texts = [f"{i:04}{i:04}" for i in range(20)]
    source = write_jsonl(tmp_path / "few.jsonl", texts)
    prepare(source, "--out", tmp_path / "out", "--vocab_size=258", *options.split())
    number = CUTS[options]
    assert meta_of(tmp_path / "out")["documents"] == dict(train=number, val=20 - number)
    train, val = [texts_of(tmp_path / "out", split) for split in ("train", "val")]
    assert (train[-1] == b"") == (options not in list(CUTS)[1:3])
    assert b"".join([*train, *val]).decode() == "".join(texts)


LAYOUTS = {  # numbers of short and long documents, tokens in a long one, option
    (198, 2, 65, ""): ("documents", 2),  # 99 of 100 are short
    (197, 3, 65, ""): ("stream", 65),
    (0, 100, 64, ""): ("documents", 64),
    (0, 99, 9, ""): ("stream", 9),
    (0, 99, 9, "--layout=documents"): ("documents", 9),
    (0, 99, 9, "--lines"): ("documents", 9),
    (0, 100, 65, "--lines"): ("stream", 65),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_short_documents_are_rows(tmp_path, capsys, case):
    short, long, size, option = case
    (tmp_path / "b.txt").write_text("b")
    # Of different bytes a BPE merges the last pair, and an end-of-text follows.
    documents = ["a"] * short + ["".join(map(chr, range(33, 33 + size)))] * long
    text = ("\n" if option == "--lines" else "\n<|endoftext|>\n").join(documents)
    (tmp_path / "a.txt").write_text(text)
    options = ["--encoding=bpe", "--vocab_size=258", "--out", tmp_path / "out", *option.split()]
    prepare(tmp_path / "a.txt", "--val", tmp_path / "b.txt", *options)
    meta = meta_of(tmp_path / "out")
    assert (meta["layout"], meta["longest"]) == LAYOUTS[case]
    is_asked = short + long < 100 and option != "--lines"
    assert ("with --lines" in capsys.readouterr().out) == is_asked


TOKENIZERS = {  # options, letters, whether they are all, whether GPT-2's BPE is there
    ("a.txt", 2 * 10**5, True, True): ("bpe", 1142),
    ("a.txt", 10**6, True, True): ("bpe", 4096),
    ("a.txt", 10**4, False, True): ("gpt2", 50257),
    ("a.txt", 10**4, False, False): ("bpe", 512),
    ("a.txt --vocab_size=300", 10**4, False, True): ("bpe", 300),
    ("a.txt --encoding=gpt2", 10**4, True, True): ("gpt2", 50257),
    ("names", 10**4, True, True): ("bpe", 4096),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_the_size_of_a_text_decides_its_tokenizer(monkeypatch, capsys, case):
    options, letters, is_all, has_gpt2 = case
    module = load("data/prepare.py")
    module.load_encoding = Mock(side_effect=None if has_gpt2 else UserError("no network"))
    module.train_bpe = bytes_and_pairs
    monkeypatch.setattr(sys, "argv", ["prepare.py", *options.split()])
    texts = ["word "] * (letters // 5)
    tokenizer = module.make_tokenizer(module.parse_arguments(), texts, is_all)
    assert (tokenizer["encoding"], tokenizer["vocab_size"]) == TOKENIZERS[case]
    assert ("a new BPE takes its place" in capsys.readouterr().out) != has_gpt2


STREAM = """
    baselines/gpt.py BOTH --batch_size=96 ROW --max_steps=400
    variants/cola_dlm.py vae BOTH --batch_size=96 ROW --max_steps=400
    variants/cola_dlm.py dit BOTH --batch_size=96 ROW --latent_block=4 --max_steps=2500
    sample.py --out='out/my text' --prompt="it's two three" --length=300"""
DOCUMENTS = """
    baselines/gpt.py BOTH
    train_vae.py BOTH
    train_dit.py BOTH
    sample.py --out='out/my text' --n=5"""
GPU = """
    train_vae.py BOTH --preset=small ROW --teacher=gpt2 --no-muon --compile --max_steps=6000
        --beta_warmup=2000
    train_dit.py BOTH --preset=small ROW --compile --max_steps=20000
    sample.py --out='out/my text' --n=4"""
COMMANDS = {  # layout, encoding, tokens of the longest document and of val
    ("stream", "bpe", 99, 34): (STREAM, "--block_size=32"),
    ("stream", "bpe", 99, 9): (STREAM, "--block_size=8"),
    ("stream", "bpe", 99, 8): ("", ""),
    ("documents", "bpe", 12, 13): (DOCUMENTS, ""),
    ("documents", "bpe", 12, 12): ("", ""),
    ("documents", "bpe", 99, 65): (DOCUMENTS, ""),
    ("documents", "bpe", 99, 64): ("", ""),
    ("stream", "gpt2", 99, 1025): (GPU, ""),
    ("stream", "gpt2", 99, 9): (GPU, "--block_size=8"),
    ("stream", "gpt2", 99, 8): ("", ""),
}


@pytest.mark.parametrize("platform, device", [("linux", ""), ("darwin", "--device=cpu")])
@pytest.mark.parametrize("case", COMMANDS)
def test_the_printed_commands_are_of_this_corpus(tmp_path, monkeypatch, case, platform, device):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "platform", platform)
    layout, encoding, longest, tokens = case
    folder = Path("data/my text")
    folder.mkdir(parents=True)
    np.array([*b"ut it's", 256, *b"\xff two three four"], "uint16").tofile(folder / "val.bin")
    ranks, size = bytes_and_pairs([], 257)
    meta = dict(encoding=encoding, vocab_size=size, eot=256, bpe=ranks, dtype="uint16")
    meta |= dict(layout=layout, longest=longest, tokens=dict(train=9999, val=tokens))
    text = load("data/prepare.py").next_commands(folder, meta)
    found = [shlex.split(line)[1:] for line in text.splitlines() if line[:7] == "python "]
    for command in found:
        command[0] = os.path.relpath(Path(command[0]).resolve(), ROOT)
    expected, row = COMMANDS[case]
    expected = expected.replace("BOTH", f"--data='data/my text' --out='out/my text' {device}")
    assert sum(found, []) == shlex.split(expected.replace("ROW", row))
    assert ("too short to train on" in text) == (not found)
    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda p: sys.exit(parse(p) and 0))
    for path, *arguments in found:
        script(path, *arguments)  # a wrong option is exit code 2


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some text " * 99)
    return Path("a.txt")


def test_a_path_names_the_corpus_and_comes_before_an_embedded_one(tmp_path, monkeypatch):
    module = load("data/prepare.py")
    found = {"names": "names", "-": "stdin", "../x/": "x", ".a.jsonl.zst.tar": "a", "...": "text"}
    for path, name in found.items():
        args = SimpleNamespace(out=None, paths=[path])
        assert module.output_folder(args) == Path("data") / name
    monkeypatch.setattr(sys, "argv", ["prepare.py", "docs"])
    monkeypatch.chdir(ROOT)
    assert module.parse_arguments().embedded == "docs", "the pages of this project are no corpus"
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    assert module.parse_arguments().embedded is None


def test_home_is_found_and_links_stay(text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("out").mkdir()
    Path("out/train.bin").symlink_to(tmp_path / "train on a large disk")
    prepare("~/a.txt", "--out=~/out")
    assert Path("out/train.bin").is_symlink()
    assert Path("train on a large disk").stat().st_size > 100
    assert not list(tmp_path.rglob("*.tmp"))


def test_another_corpus_of_the_same_name_is_replaced_only_where_asked(text, capsys):
    prepare("a.txt")
    assert "--data=data/a --out=out/a" in capsys.readouterr().out
    Path("b").mkdir()
    Path("b/a.txt").write_text("text of b " * 99)
    refuse(capsys, "holds a corpus of a.txt", "data/prepare.py", "b/a.txt", keep="data")
    prepare("a.txt")
    prepare("b/a.txt", "--out=data/a")
    assert texts_of(Path("data/a"), "train")[0].startswith(b"text of b")
    Path("data/a/meta.json").unlink()
    refuse(capsys, "train.bin of another program", "data/prepare.py", "a.txt", keep="data")


def test_a_second_process_is_refused_while_the_first_reads_its_pipes(text, capsys):
    os.mkfifo("pipe")
    long = b"val " * 50000  # more than a pipe holds
    Path("train.bin.tmp").write_text("of the first")
    command = [sys.executable, ROOT / "data/prepare.py", "-", "--val=pipe", "--out=."]
    with Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE) as first:
        first.stderr.read(1)  # of its progress bar
        refuse(capsys, "another process writes to", "data/prepare.py", text, "--out=.", keep=".")
        threading.Thread(target=Path("pipe").write_bytes, args=[long], daemon=True).start()
        first.communicate(text.read_bytes())
    assert texts_of(Path(), "train") == [text.read_bytes(), b""]
    assert texts_of(Path(), "val") == [long, b""]


REFUSED = {
    "a.txt --val_fraction=0": "must lie between 0 and 1",
    "a.txt --val_fraction=1": "must lie between 0 and 1",
    "a.txt --vocab_size=257": "at least 258",
    "a.txt --vocab_size=2048 --encoding=gpt2": "--vocab_size is for --encoding=bpe",
    "a.txt --val=a.txt --val_fraction=0.1": "no effect with --val",
    "a.txt --val=a.txt": "none is left for train",
    "a.txt --layout=documents": "only one document",
    "names a.txt": "names is missing",
    "names --lines": "--lines is for text files",
    "a.txt --out=a.txt": "cannot write --out=a.txt",
    "many.jsonl --val_fraction=0.0000001 --out=new": "val gets no document",
    "cut.jsonl.gz": "broken, cut off",
    "a.jsonl.zst": "pip install zstandard",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_is_refused_changes_nothing(text, monkeypatch, capsys, arguments):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    noise = np.random.default_rng(0).bytes(300000).hex()
    many = write_jsonl(Path("many.jsonl"), map(str, range(150)))
    Path("cut.jsonl.gz").write_bytes(gzip.compress(many.read_bytes() + noise.encode())[:-100])
    Path("a.jsonl.zst").write_bytes(b"x")
    prepare(many, "--out=out", "--vocab_size=280")
    options = ["--out=out", *arguments.split()]  # the last --out counts
    refuse(capsys, REFUSED[arguments], "data/prepare.py", *options, keep=".")
    assert not Path("new").exists()


def test_names_are_those_of_unicode_without_numbered_ones():
    found = list(names())
    assert "greek small letter alpha" in found and "hangul syllable ga" not in found
    if unicodedata.unidata_version == "14.0.0":
        assert len(found) == len(set(found)) == 26015


def test_docs_are_paragraphs_of_prose_each_once(tmp_path, monkeypatch):
    prose = ["Return the height of the figure.", "It is too short too.", f"A{'b' * 91}{'1' * 7}."]
    no_prose = [
        "return the height of the figure.",
        "Return the height of the figure",
        f"A{'b' * 90}{'1' * 8}.",  # 92 of 100 are letters or a full stop
        ">>> Return the height of the figure.",
        "It is short by one.",
    ]
    paragraphs = "\n\n".join(["Two lines\nof good prose.", *prose, *no_prose])
    files = {
        "lib/a.py": f"'''{paragraphs}'''",
        "lib/broken.py": "def",
        "lib/tests/b.py": "'''A paragraph in a test.'''",
        "lib/site-packages/c.py": "'''A paragraph in a package.'''",
        "torch/d/e.py": f"async def f():\n    '''{prose[0].upper()}\n\n    This one is another.'''",
        "numpy/f.py": "class A: '''It is of a class too.'''\ndef f(): '''It is of a function.'''",
    }
    folder = tmp_path / "tests"  # folders above a package do not matter
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    packages = {name: SimpleNamespace(origin=folder / name / "x.py") for name in ("torch", "numpy")}
    monkeypatch.setattr("importlib.util.find_spec", packages.get)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(folder / "lib")})
    expected = ["Two lines of good prose.", *prose, "This one is another."]
    assert list(docs()) == [*expected, "It is of a class too.", "It is of a function."]
