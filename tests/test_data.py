"""data/prepare.py and data/embedded.py: what is written and printed."""

import argparse
import gzip
import hashlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import threading
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data.embedded import docs, docstring_paragraphs, is_prose, names
from engine.corpus import GPT2, Corpus, load_encoding
from engine.config import UserError
from tests.helpers import ROOT, load, refuse, run_module, script, write_jsonl

SMALL_BPE = ["--encoding=bpe", "--vocab_size=280"]


def prepare(*arguments):
    script("data/prepare.py", *arguments)


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text())


def ids_of(folder, split):
    return np.fromfile(folder / f"{split}.bin", meta_of(folder)["dtype"]).tolist()


def texts_of(folder, split):
    """The documents of a split, as bytes. The last is what follows the last end-of-text."""
    meta = meta_of(folder)
    encoding = load_encoding(meta)
    found = [[]]
    for token in ids_of(folder, split):
        found[-1].append(token)
        if token == meta["eot"]:
            found.append([])
    assert found[:-1] == [] or all(document[-1] == meta["eot"] for document in found[:-1])
    return [encoding.decode_bytes([x for x in d if x != meta["eot"]]) for d in found]


def need_gpt2():
    try:
        load_encoding(GPT2)
    except UserError:
        pytest.skip("GPT-2's BPE is not in tiktoken's cache, and there is no network")


# ---- What is written -----------------------------------------------------------------------------


def test_the_tokens_of_a_text_by_hand(tmp_path):
    (tmp_path / "a.txt").write_text("abab abab")  # ab, a token 256, occurs most often
    prepare(tmp_path / "a.txt", "--vocab_size=258", "--val_fraction=0.4", "--out", tmp_path / "out")
    assert ids_of(tmp_path / "out", "train") == [256, 256, 32, 256]
    assert ids_of(tmp_path / "out", "val") == [256, 257], "its last 0.4, with an end-of-text"
    expected = dict(encoding="bpe", vocab_size=258, eot=257, dtype="uint16", layout="stream")
    expected |= dict(tokens=dict(train=4, val=2), documents=dict(train=1, val=1), longest=6)
    expected |= dict(sha256=hashlib.sha256(b"abab abab\0").hexdigest())
    expected |= dict(source=[str(tmp_path / "a.txt")])
    meta = meta_of(tmp_path / "out")
    assert {key: meta[key] for key in expected} == expected
    assert meta.keys() == expected.keys() | {"bpe", "unicode"}


@pytest.mark.parametrize("encoding", ["bpe", "gpt2"])
def test_any_text_comes_back_in_its_order(tmp_path, monkeypatch, encoding):
    rng = np.random.default_rng(0)
    texts = ["a\r\nb\x00c\u2028d \n\n ", "<|endoftext|>", " ", "\n", "x" * 3000]
    texts += ["word " * int(n) + "ö" for n in rng.integers(0, 300, 400)]
    texts += ["".join(map(chr, rng.integers(0xE000, 0x110000, 50))) for _ in range(50)]
    if encoding == "gpt2":
        need_gpt2()
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    val = write_jsonl(tmp_path / "val.jsonl", texts[::-1])
    module = load("data/prepare.py")
    module.JOB = 5000
    options = SMALL_BPE if encoding == "bpe" else ["--encoding=gpt2"]
    options = [*options, "--val", val, "--out", tmp_path / "out"]
    run_module(module, "data/prepare.py", source, *options)
    expected = [text.encode() for text in texts]
    assert texts_of(tmp_path / "out", "train") == [*expected, b""]
    assert texts_of(tmp_path / "out", "val") == [*expected[::-1], b""]
    digest = hashlib.sha256(b"".join(text + b"\0" for text in expected + expected[::-1]))
    meta = meta_of(tmp_path / "out")
    assert meta["sha256"] == digest.hexdigest() and meta["dtype"] == "uint16"


def test_what_tiktoken_refuses_is_encoded_in_halves():
    class OfShortTexts:
        def encode_to_numpy(self, text, disallowed_special):
            if len(text) > 2:
                raise ValueError
            return np.frombuffer(text.encode(), np.uint8)

    found = load("data/prepare.py").encode(OfShortTexts(), "abcdefg")
    assert found.tolist() == list(b"abcdefg")


def numbered(n):
    return [f"document {i}" for i in range(n)]


SHARES = {"a.jsonl": 0.1, "names": 0.05, "large": 0.005, "--val_fraction=0.25": 0.25}


@pytest.mark.parametrize("name", SHARES)
def test_a_hash_of_its_text_puts_a_document_in_val(tmp_path, name):
    texts = numbered(3000)
    module = load("data/prepare.py")
    module.EMBEDDED = {"names": lambda: iter(texts)}
    source = "names"
    if name != "names":
        source = write_jsonl(tmp_path / "a.jsonl", texts[::-1])
    if name == "large":
        module.SMALL = 2000
    options = [name] if name.startswith("--") else []
    options += [*SMALL_BPE, "--out", tmp_path / "out"]
    run_module(module, "data/prepare.py", source, *options)
    expected = []
    for text in texts:
        position = int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16)
        if position / 2**64 < SHARES[name]:
            expected.append(text.encode())
    assert sorted(texts_of(tmp_path / "out", "val")[:-1]) == sorted(expected)
    assert meta_of(tmp_path / "out")["documents"]["train"] == 3000 - len(expected)


CUTS = {  # options, and how many documents end in train and in val
    "--val_fraction=0.25": (15, 5),
    "--val_fraction=0.04": (19, 1),  # within a document: val would hold less than one
    "--val_fraction=0.04 --layout=documents": (19, 1),
}


@pytest.mark.parametrize("options", CUTS)
def test_with_few_documents_the_last_ones_are_val(tmp_path, options):
    source = write_jsonl(tmp_path / "few.jsonl", [f"{i:04}{i:04}" for i in range(20)])
    prepare(source, "--out", tmp_path / "out", "--vocab_size=258", *options.split())
    assert tuple(meta_of(tmp_path / "out")["documents"].values()) == CUTS[options]
    train, val = [texts_of(tmp_path / "out", split) for split in ("train", "val")]
    assert (train[-1] == b"") == (options != "--val_fraction=0.04")
    whole = b"".join([*train, *val])
    assert whole == "".join(f"{i:04}{i:04}" for i in range(20)).encode()


@pytest.mark.parametrize("long, expected", [(2, 2), (3, 10)])
def test_rows_hold_99_of_100_documents(tmp_path, long, expected):
    source = write_jsonl(tmp_path / "a.jsonl", ["a"] * (200 - long))
    val = write_jsonl(tmp_path / "val.jsonl", ["bcdefghij"] * long)
    prepare(source, "--val", val, "--out", tmp_path / "out", *SMALL_BPE)
    assert meta_of(tmp_path / "out")["longest"] == expected
    assert Corpus(tmp_path / "out", "train", 8).N == min(expected, 8)


LAYOUTS = {  # number of documents, tokens in each, option
    (100, 64, ""): "documents",
    (100, 65, ""): "stream",
    (99, 9, ""): "stream",
    (99, 9, "--layout=documents"): "documents",
    (99, 9, "--lines"): "documents",
    (100, 65, "--lines"): "stream",
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_short_documents_are_rows(tmp_path, case):
    number, size, option = case
    (tmp_path / "b.txt").write_text("b")
    # Of different bytes a BPE merges the last pair, and an end-of-text follows.
    documents = ["".join(map(chr, range(33, 33 + size)))] * number
    text = ("\n" if option == "--lines" else "\n<|endoftext|>\n").join(documents)
    (tmp_path / "a.txt").write_text(text)
    options = ["--encoding=bpe", "--vocab_size=258", "--out", tmp_path / "out", *option.split()]
    prepare(tmp_path / "a.txt", "--val", tmp_path / "b.txt", *options)
    assert meta_of(tmp_path / "out")["layout"] == LAYOUTS[case]


@pytest.mark.parametrize("letters, size", [(10**4, 512), (2 * 10**5, 1142), (10**6, 4096)])
def test_a_long_text_gets_a_large_vocabulary(tmp_path, letters, size):
    module = load("data/prepare.py")
    asked = []

    def train(texts, vocab_size):
        asked.append(vocab_size)
        raise UserError("enough")

    module.train_bpe = train
    (tmp_path / "a.txt").write_text("word " * (letters // 5))
    with pytest.raises(SystemExit):
        run_module(module, "data/prepare.py", tmp_path / "a.txt", "--out", tmp_path / "out")
    assert asked == [size]
    assert not (tmp_path / "out").exists(), "nothing half written"


@pytest.mark.parametrize("has_gpt2", [True, False])
def test_a_large_text_gets_gpt2s_bpe_if_it_is_there(tmp_path, capsys, has_gpt2):
    if has_gpt2:
        need_gpt2()
    module = load("data/prepare.py")
    module.SMALL = 1000

    def load_or_fail(tokenizer):
        if tokenizer["encoding"] == "gpt2" and not has_gpt2:
            raise UserError("no network")
        return load_encoding(tokenizer)

    module.load_encoding = load_or_fail
    (tmp_path / "a.txt").write_text("some text " * 500)
    run_module(module, "data/prepare.py", tmp_path / "a.txt", "--out", tmp_path / "out")
    assert meta_of(tmp_path / "out")["encoding"] == ("gpt2" if has_gpt2 else "bpe")
    assert ("a new BPE takes its place" in capsys.readouterr().out) != has_gpt2


# ---- What is printed -----------------------------------------------------------------------------


COMMANDS = {  # printed for a text; both: the folders of this corpus
    "stream": """
        baselines/gpt.py {both} --batch_size=96 --block_size={row} --max_steps=400
        variants/cola_dlm.py vae {both} --batch_size=96 --block_size={row} --max_steps=400
        variants/cola_dlm.py dit {both} --batch_size=96 --block_size={row} --latent_block=4
            --max_steps=2500
        sample.py --out='out/my text' --prompt='{prompt}' --length=300""",
    "documents": """
        baselines/gpt.py {both}
        train_vae.py {both}
        train_dit.py {both}
        sample.py --out='out/my text' --n=5""",
    "gpt2": """
        train_vae.py {both} --preset=small --teacher=gpt2 --no-muon --compile --max_steps=6000
            --beta_warmup=2000
        train_dit.py {both} --preset=small --compile --max_steps=20000
        sample.py --out='out/my text' --n=4""",
}


class Parsed(Exception):
    """Ends a script whose options are parsed."""


@pytest.mark.parametrize("kind", [*COMMANDS, "short stream"])
def test_the_printed_commands_are_of_this_corpus(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    if kind == "gpt2":
        need_gpt2()
    numbers = [f"{number} it's" for number in range(40 if kind == "short stream" else 9000)]
    Path("my text.txt").write_text(("\n" if kind == "documents" else " ").join(numbers))
    options = {"documents": ["--lines"], "gpt2": ["--encoding=gpt2"]}
    prepare("my text.txt", *options.get(kind, []))
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:7] == "python "]
    found = [shlex.split(line)[1:] for line in lines]
    for command in found:
        command[0] = str(Path(command[0]).resolve().relative_to(ROOT))
    folder = Path("data/my text")
    row = min(32, meta_of(folder)["tokens"]["val"] - 1)
    assert (row < 32) == (kind == "short stream")
    prompt = " ".join(texts_of(folder, "val")[0].decode().split()[1:4]).replace("'", "'\"'\"'")
    both = "--data='data/my text' --out='out/my text'"
    expected = COMMANDS[kind.split()[-1]].format(both=both, row=row, prompt=prompt)
    assert sum(found, []) == shlex.split(expected)

    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(parser):
        parse(parser)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    for path, *arguments in found:
        with pytest.raises(Parsed):
            script(path, *arguments)


TOO_SHORT = {"a.md": ("plain text\n", []), "a.txt": ("a few words\n" * 3, ["--lines"])}


@pytest.mark.parametrize("name", TOO_SHORT)
def test_a_text_that_fills_no_row_gets_no_commands(tmp_path, capsys, name):
    text, options = TOO_SHORT[name]
    (tmp_path / name).write_text(text)
    prepare(tmp_path / name, "--out", tmp_path / "out", "--vocab_size=2048", *options)
    said = capsys.readouterr().out
    assert "too short to train on" in said and "\npython" not in said
    size = meta_of(tmp_path / "out")["vocab_size"]
    assert size < 300 and f"no use for more than {size} tokens" in said
    assert ("with --lines" in said) == (not options)


# ---- Where it is read and written ----------------------------------------------------------------


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A text in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some text " * 99)
    return Path("a.txt")


def test_val_within_the_folder_is_not_trained_on(tmp_path):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in/a.jsonl", ["for training"] * 9)
    val = write_jsonl(tmp_path / "in/val.jsonl", ["for val"] * 7)
    prepare(tmp_path / "in", "--val", val, "--out", tmp_path / "out", *SMALL_BPE)
    assert texts_of(tmp_path / "out", "train") == [b"for training"] * 9 + [b""]
    assert texts_of(tmp_path / "out", "val") == [b"for val"] * 7 + [b""]


def test_a_pipe_is_read_once_and_a_dash_is_stdin(text):
    os.mkfifo("pipe")
    writer = threading.Thread(target=Path("pipe").write_bytes, args=[text.read_bytes()])
    writer.start()
    prepare("pipe")
    writer.join()
    command = [sys.executable, ROOT / "data/prepare.py", "-"]
    subprocess.run(command, input=text.read_bytes(), check=True, capture_output=True)
    for folder in ("data/pipe", "data/stdin"):
        found = texts_of(Path(folder), "train") + texts_of(Path(folder), "val")
        assert b"".join(found) == text.read_bytes()


def test_a_folder_comes_before_the_embedded_corpus_of_its_name(tmp_path, monkeypatch):
    module = load("data/prepare.py")
    monkeypatch.setattr(sys, "argv", ["prepare.py", "docs"])
    monkeypatch.chdir(ROOT)
    assert module.parse_arguments().embedded == "docs", "the pages of this project are no corpus"
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    assert module.parse_arguments().embedded is None


def test_home_is_found_and_links_stay(text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("large disk").mkdir()
    Path("out").mkdir()
    Path("out/train.bin").symlink_to(tmp_path / "large disk/train.bin")
    prepare("~/a.txt", "--out=~/out")
    assert Path("out/train.bin").is_symlink()
    assert Path("large disk/train.bin").stat().st_size > 100
    assert not list(tmp_path.rglob("*.tmp"))


def test_another_corpus_of_the_same_name_is_replaced_only_where_asked(text, capsys):
    prepare("a.txt")
    Path("b").mkdir()
    Path("b/a.txt").write_text("text of b " * 99)
    refuse(capsys, "holds a corpus of a.txt", "data/prepare.py", "b/a.txt", keep="data")
    prepare("a.txt")
    prepare("b/a.txt", "--out=data/a")
    assert texts_of(Path("data/a"), "train")[0].startswith(b"text of b")
    Path("data/a/meta.json").unlink()
    refuse(capsys, "train.bin of another program", "data/prepare.py", "a.txt", keep="data")


def test_a_second_process_is_refused_and_harms_nothing(text, capsys):
    code = "import sys, engine.terminal as s; s.lock(sys.argv[1]); print(flush=True); input()"
    command = [sys.executable, "-c", code, Path.cwd()]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as first:
        first.stdout.readline()
        Path("train.bin.tmp").write_text("of the first")
        refuse(capsys, "another process writes to", "data/prepare.py", text, "--out=.", keep=".")
        first.kill()
    prepare(text, "--out=.")


REFUSED = {
    "a.txt --val_fraction=2": "must lie between 0 and 1",
    "a.txt --vocab_size=257": "at least 258",
    "a.txt --vocab_size=2048 --encoding=gpt2": "--vocab_size is for --encoding=bpe",
    "a.txt --val=a.txt --val_fraction=0.1": "no effect with --val",
    "a.txt --val=a.txt": "none is left for train",
    "a.txt --layout=documents": "only one document",
    "a.txt names": "names is missing",
    "names --lines": "--lines is for text files",
    "a.txt --out=a.txt": "cannot write --out=a.txt",
    "many.jsonl --val_fraction=0.0000001": "val gets no document",
    "cut.jsonl.gz": "broken, cut off",
    "a.jsonl.zst": "pip install zstandard",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_is_refused_changes_nothing(text, monkeypatch, capsys, arguments):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    noise = np.random.default_rng(0).bytes(300000).hex()
    many = write_jsonl(Path("many.jsonl"), numbered(150))
    Path("cut.jsonl.gz").write_bytes(gzip.compress(many.read_bytes() + noise.encode())[:-100])
    Path("a.jsonl.zst").write_bytes(b"x")
    prepare(many, "--out=out", *SMALL_BPE)
    out = [] if "--out" in arguments else ["--out=out"]
    refuse(capsys, REFUSED[arguments], "data/prepare.py", *arguments.split(), *out, keep=".")


# ---- The embedded corpora ------------------------------------------------------------------------


def test_names_are_those_of_unicode_without_numbered_ones():
    found = list(names())
    assert "greek small letter alpha" in found and "hangul syllable ga" not in found
    if unicodedata.unidata_version == "14.0.0":
        assert len(found) == len(set(found)) == 26015


PROSE = {
    "Return the height of the figure.": True,
    "return the height of the figure.": False,
    "Return the height of the figure": False,
    "Return x[0] + y[1] * (z - 2).": False,
    ">>> Return the height of the figure.": False,
    "It is too short too.": True,
    "Is too short by one.": True,
    "This is too short.": False,
}


def test_prose_is_found_in_docstrings(tmp_path):
    lines = "\n\n    ".join(PROSE)
    (tmp_path / "a.py").write_text(f"def f():\n    '''Two\n    lines.\n\n    {lines}'''")
    found = list(docstring_paragraphs(tmp_path / "a.py"))
    assert found == ["", "Two lines.", *PROSE], "the module has none"
    assert [is_prose(text) for text in found] == [False, False, *PROSE.values()]


def test_docs_are_paragraphs_of_packages_each_once(tmp_path, monkeypatch):
    first = '"""The first paragraph is here.\n\nThe second paragraph is here."""'
    files = {"a.py": first, "b/c.py": first.replace("here", "HERE")}
    files["tests/d.py"] = first.replace("here", "in a test")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "broken.py").write_text("def")
    origin = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: origin)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    expected = ["The first paragraph is here.", "The second paragraph is here."]
    assert list(docs()) == expected


def test_each_command_for_a_gpu_has_options_of_its_script(tmp_path):
    """The scripts that train have the folder of this corpus, and sample.py has no --data."""
    tokens = dict(train=10**7, val=10**5)
    meta = dict(tokens=tokens, layout="stream", encoding="gpt2", longest=99)
    text = load("data/prepare.py").next_commands(tmp_path / "owt2", meta)
    found = re.findall(r"python (?:\S*/)?(\w+\.py) (.*)", text)
    names = {script: re.findall(r"--(?:no-)?(\w+)", options) for script, options in found}
    assert list(names) == ["train_vae.py", "train_dit.py", "sample.py"]
    for script, options in names.items():
        assert ("data" in options) == (script != "sample.py")
    assert f"--data={tmp_path}/owt2" in found[0][1]
