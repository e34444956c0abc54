"""data/reading.py: every file that holds text gives its documents, whole."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import tarfile
import threading
import zipfile

import pytest

import data.reading as reading
from data.reading import SEPARATOR, Reader
from engine.config import UserError
from tests.helpers import DOCUMENTS, write_jsonl

LATIN1 = "schöne grüße\n".encode("latin-1")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def read(*paths, lines=False):
    return list(Reader(paths, lines))


def report_of(*paths):
    reader = Reader(paths)
    list(reader)
    return "\n".join(reader.report())


def refusal(path):
    with pytest.raises(UserError) as error:
        read(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def tar_of(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.type = tarfile.SYMTYPE if name == "link" else tarfile.REGTYPE
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zip_of(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (0o120777 if name == "link" else 0o100644) << 16
            archive.writestr(info, data, zipfile.ZIP_DEFLATED)
    return file.getvalue()


COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
COMPRESSIONS[".zst"] = lambda data: pytest.importorskip("zstandard").compress(data)
ARCHIVES = {".tar": tar_of, ".zip": zip_of}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_every_wrapper_gives_the_same_documents(tmp_path, suffix):
    compress = COMPRESSIONS[suffix]
    parts = [compress(b"some "), compress(b""), compress("tëxt\r\n".encode())]  # they are one file
    zeros = bytes(500) if suffix else b""  # they fill up a block
    members = {
        "./folder/a.jsonl" + suffix: compress(write_jsonl(tmp_path / "a", DOCUMENTS).read_bytes()),
        "folder/b.txt" + suffix: b"".join(parts) + zeros,
    }
    files = dict(members)
    for archive, pack in ARCHIVES.items():
        data = compress(pack(members))
        files[f"outer_{archive[1:]}.tgz"] = gzip.compress(tar_of({f"x{archive}": data}))
        files[f"no_suffix_{archive[1:]}"] = files[f"x{archive}{suffix}"] = data
    for name, data in files.items():
        write(tmp_path / "in" / name, data)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=[data], daemon=True).start()
    assert read(tmp_path / "in", pipe) == [*DOCUMENTS, "some tëxt\n"] * 8


TEXTS = ["a\u2028b\x85c\x0b", "x " * 3000000, *DOCUMENTS[:6], SEPARATOR, " ", "\n\n", "\ud83d"]
JSON_LINES = "\n \n" + "\r\n".join(json.dumps({"id": 3, "text": text}) for text in TEXTS)
DIVIDED = f"\n one\r\n\u2028{SEPARATOR}\r\n two \n\n{SEPARATOR}\n \n{SEPARATOR}three\n\n"
FILES = {
    "a.md": ("{so} [it] is\n\n", ["{so} [it] is\n\n"]),
    "a.gz.txt": ('"quoted"\n', ['"quoted"\n']),
    "a.txt": (DIVIDED, ["\n one\n\u2028", " two ", "three\n\n"]),
    "begin.txt": (f"{SEPARATOR}\none\n{SEPARATOR}\n", ["one"]),
    "mac.txt": ("an old\rMac's\r", ["an old\nMac's\n"]),
    "blank.txt": ("\n\n\n\n\n\nx", ["\n\n\n\n\n\nx"]),
    "first.txt": ('{"text": "one"}\nwas JSON.', ['{"text": "one"}\nwas JSON.']),
    "utf8.txt": ("\ufeffgrün", ["grün"]),
    "utf16.txt": ("grün ☕\r\n".encode("utf-16"), ["grün ☕\n"]),
    "utf16.jsonl": ('\ufeff{"text": "☕"}\n'.encode("utf-16-be"), ["☕"]),
    "colours.txt": ("\x1b[1mgood\x1b[0m \f\b\t", ["\x1b[1mgood\x1b[0m \f\b\t"]),
    "lines.txt": (f"\n 1\r\n\n \ntwo{SEPARATOR}\nthree\u2028 4\n", [" 1", "two", "three\u2028 4"]),
    "lines.jsonl": ('{"text": "x\\ny"}', ["x\ny"]),
    "latin1.txt": (LATIN1 + b"\xef\xbf\xbd \xf0\x9f\x98", ["sch�ne gr��e\n� �"]),
}
for name in ("a.jsonl", "a.NDJSON", "a.json", "a", "b.txt"):
    FILES[name] = (JSON_LINES, [*TEXTS[:-1], "\ufffd"])

BROKEN = "is broken, cut off"
LOCKED = zip_of({"a.txt": b"secret"}).replace(b"\x14\0\0\0\x08", b"\x14\0\1\0\x08")  # a flag
FILES |= {  # the words of a refusal
    "half.jsonl": ('{"text": "one"}\nx\nx\n', "2 lines are no objects with a field"),
    "poem.json": ("roses are red\nviolets are blue\n", "2 lines are no objects"),
    "deep.jsonl": ("[" * 99999, "1 lines are no objects"),
    "number.jsonl": ('{"text": 3}\n{"text": null}\n[1]\n{"a": "1"}', "4 lines are no objects"),
    "a.png": (PNG, "is no text"),
    "a.pdf": (b"%PDF-1.4\nonly text\n", "is no text"),
    "a.docx": (zip_of({"[Content_Types].xml": b"<xml>"}), "is no text"),
    "nul.txt": (b"text " * 99 + b"\0" + b"text " * 99, "is no text"),
    "a.gz": (gzip.compress(PNG), "is no text"),
    "empty.txt": ("", "no usable document"),
    "blank.txt.gz": (gzip.compress(b" \n\n\t" * 99), "no usable document"),
    "none.jsonl": ('{"text": ""}\n', "no usable document"),
    "none.zip": (zip_of({}), "no usable document"),
    "bad.gz": (b"<html>not found</html>" * 99, BROKEN),
    "bad.tbz2": (b"not found", BROKEN),
    "bad.tar": (b"not a tar at all" * 99, BROKEN),
    "bad.zip": (b"not a zip at all" * 99, BROKEN),
    "locked.zip": (LOCKED, "password required"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_its_documents_or_is_refused_by_name(tmp_path, name):
    content, expected = FILES[name]
    path = write(tmp_path / name, content)
    if isinstance(expected, list):
        assert read(path, lines=name.startswith("lines")) == expected
    else:
        message = refusal(path)
        assert expected in message and str(path).removesuffix(".gz") in message


@pytest.mark.parametrize("piece", [7, 100, 1 << 20])
def test_pieces_of_any_size_give_the_same_documents(tmp_path, monkeypatch, piece):
    rng = random.Random(0)
    words = ["a", "é", "☕", "😀", " ", "\n", "<|endo", "ftext|>", "<|", "word" * 5]
    texts = ["x" + "".join(rng.choices(words, k=k)) + "x" for k in [1, 5, 20, 100, 500] * 4]
    texts = [text.replace(SEPARATOR, "") for text in texts]
    ends = [SEPARATOR, f"\n{SEPARATOR}", f"{SEPARATOR}\n", f"\r\n\n{SEPARATOR}\n"]
    separated = "".join(text + rng.choice(ends) for text in texts)
    write(tmp_path / "a.txt", separated)
    write(tmp_path / "b.gz", gzip.compress(separated.encode("utf-16")))
    write(tmp_path / "c.tar", tar_of({"a": separated.encode()}))
    monkeypatch.setattr(reading, "PIECE", piece)
    monkeypatch.setattr(reading, "READ", max(piece, 500))
    assert read(tmp_path) == texts * 3
    expected = [line for text in texts for line in text.split("\n") if line.strip()]
    assert read(tmp_path / "a.txt", lines=True) == expected


def test_a_long_text_is_divided_at_line_ends_where_it_has_them(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 10)
    monkeypatch.setattr(reading, "LONGEST", 100)
    lines = "\n".join(["ten words"] * 5)
    path = write(tmp_path / "a.txt", "ten words\n" * 90)
    assert read(path) == [lines] * 16 + [f"{lines}\n{lines}\n"]
    assert read(write(path, "x" * 210)) == ["x" * 50] * 3 + ["x" * 60]


LEFT_OUT = {
    "a.png": (PNG, "left out (binary): 1, of {}/a.png"),
    "a.txt": ("", "left out (empty): 1, of {}/a.txt"),
    "a.json": ('{"txt": 1}', "left out (JSON without a text): 1, of {}/a.json"),
    "a.jsonl": ('x\n\n[1]\n{"text": "1"}\n{"text": "2"}\n', "unusable lines: 2, of {}/a.jsonl"),
    "l.txt": (LATIN1 * 10, "(iconv -f LATIN1 -t UTF-8 converts them): 30, of {}/l.txt"),
    "a.tar": (tar_of({"b.txt": b"b", "link": b""}), "(link or device): 1, of {}/a.tar/link"),
    "a.zip": (zip_of({"b.txt": b"b", "link": b""}), "(link or device): 1, of {}/a.zip/link"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_report_says_what_was_left_out_of_a_folder(tmp_path, name):
    write(tmp_path / "good.txt", "good")
    content, words = LEFT_OUT[name]
    write(tmp_path / name, content)
    report = report_of(tmp_path)
    assert words.format(tmp_path) in report
    assert len(report.splitlines()) == 2, "all that was read, and one note"


def test_junk_is_left_out_of_folders_and_archives(tmp_path):
    names = [".hidden", ".git/config", "a.txt~", "__MACOSX/a.txt", "Thumbs.db", "desktop.ini"]
    names += ["train.bin", "val.bin", "meta.json", "train.bin.tmp"]
    for name in names:
        write(tmp_path / "in" / name, "not to be read")
    assert "holds nothing to read" in refusal(tmp_path / "in")
    members = dict.fromkeys(names, b"not to be read") | {"good/a.txt": b"good"}
    write(tmp_path / "in/a.tar", tar_of(members))
    assert read(tmp_path / "in") == ["good"]
    report = report_of(tmp_path / "in")
    assert "left out (hidden or of the system): 12, of " in report
    assert "left out (written by prepare.py): 8, of " in report
    assert read(tmp_path / "in/.hidden") == ["not to be read"], "it was asked for"


def test_a_folder_is_read_in_order_and_each_file_once(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    names = [*"BCDabcd", "F/f", "G/f", "H/f", "H/d/e", "f/f", "g/f", "h/f", "other/f"]
    for name in [*names[:-1], "secret"]:
        write(folder / name, name)
    write(tmp_path / "linked/f", "other/f")
    links = {"loop": folder, "other": tmp_path / "linked", "z": folder / "a", "broken": "x"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe")
    monkeypatch.setattr(os, "access", lambda path, mode: not path.endswith("secret"))
    assert read(folder, folder / "z") == names
    words = f"left out (unreadable, a pipe or a device): 3, of {folder}/broken and 2 more"
    assert words in report_of(folder).splitlines()


@pytest.mark.parametrize("suffix", [*ARCHIVES, ".gz", ".bz2", ".xz", ".zst"])
def test_damaged_files_are_refused_or_lose_no_document(tmp_path, suffix):
    text = bytes(range(32, 127)) * 9
    members = {"a.txt": b"first text" * 9, "b.txt": text}
    data = ARCHIVES[suffix](members) if suffix in ARCHIVES else COMPRESSIONS[suffix](text)
    path = write(tmp_path / f"x{suffix}", data)
    expected = len(read(path))
    # Blocks of 512 zeros end a tar file. One of them suffices.
    needed = 6 * 512 if suffix == ".tar" else len(data)
    for size in range(1, needed, 1 + len(data) // 40):
        assert BROKEN in refusal(write(path, data[:size]))
    end = data.find(b"PK\1\2") % len(data)  # nothing protects the table of a zip file
    for place in range(0, end, 1 + end // 60):
        write(path, data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            found = read(path)
        except UserError:
            continue
        assert len(found) == expected
