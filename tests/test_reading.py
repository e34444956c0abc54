"""Properties of data/reading.py: every file that holds text gives its documents, whole."""

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

import numpy as np
import pytest

import data.reading as reading
from data.reading import SEPARATOR, Reader
from engine.config import UserError
from tests.helpers import DOCUMENTS

LATIN1 = "schöne grüße\n".encode("latin-1")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def documents(*paths, lines=False):
    """All documents of paths, and their Reader."""
    reader = Reader(paths, lines)
    found = []
    parts = []
    for text, is_end in reader:
        assert text
        parts.append(text)
        if is_end:
            found.append("".join(parts))
            parts = []
    assert not parts, "the last document has no end"
    return found, reader


def read(*paths, lines=False):
    return documents(*paths, lines=lines)[0]


def write(path, data):
    """Writes a file and its folders. data: bytes or text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def report_of(*paths):
    return "\n".join(documents(*paths)[1].report())


def refusal(*paths):
    with pytest.raises(UserError) as error:
        documents(*paths)
    message = str(error.value)
    assert "\n" not in message
    return message


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def plain(data):
    return data


def zstd(data):
    return pytest.importorskip("zstandard").compress(data)


def tar_of(members, format=tarfile.PAX_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def old_tar_of(members):
    """A tar archive as before POSIX: without its magic number."""
    data = bytearray(tar_of(members, tarfile.USTAR_FORMAT))
    for start in range(0, len(data), 512):
        if data[start + 257 : start + 262] == b"ustar":
            data[start + 257 : start + 265] = bytes(8)
            header = data[start : start + 512]
            header[148:156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    return bytes(data)


def zip_of(members, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


COMPRESSIONS = {"": plain, ".gz": gzip.compress, ".bz2": bz2.compress}
COMPRESSIONS |= {".xz": lzma.compress, ".zst": zstd}
ARCHIVES = {".tar": tar_of, ".zip": zip_of}


# ---- What a file is


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("archive", ["", *ARCHIVES])
def test_every_wrapper_gives_the_same_documents(tmp_path, archive, suffix):
    compress = COMPRESSIONS[suffix]
    members = {
        "./folder/a.jsonl" + suffix: compress(json_lines(DOCUMENTS)),
        "folder/b.txt" + suffix: compress(b"some text\r\n"),
    }
    if archive:
        data = compress(ARCHIVES[archive](members))
        write(tmp_path / f"in/x{archive}{suffix}", data)
        # A second archive around it, and no suffix that tells what it is.
        inner = {f"x{archive}": data}
        write(tmp_path / "outer.tgz", gzip.compress(tar_of(inner)))
        assert read(tmp_path / "outer.tgz") == [*DOCUMENTS, "some text\n"]
        write(tmp_path / "no_suffix", data)
        assert read(tmp_path / "no_suffix") == [*DOCUMENTS, "some text\n"]
    else:
        for name, data in members.items():
            write(tmp_path / "in" / name, data)
    assert read(tmp_path / "in") == [*DOCUMENTS, "some text\n"]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_several_compressed_files_in_a_row_are_one(tmp_path, suffix):
    compress = COMPRESSIONS[suffix]
    parts = [compress(b"first \n"), compress(b""), compress("zwölf".encode())]
    write(tmp_path / "a", b"".join(parts))
    assert read(tmp_path / "a") == ["first \nzwölf"]
    if suffix:
        write(tmp_path / "a", b"".join(parts) + bytes(500))
        assert read(tmp_path / "a") == ["first \nzwölf"], "zeros fill up a block"


def test_old_archives_are_known_by_their_suffix(tmp_path):
    data = old_tar_of({"a": b"text of a", "b": b"text of b"})
    assert b"ustar" not in data
    write(tmp_path / "old.TAR", data)
    write(tmp_path / "old.tgz", gzip.compress(data))
    assert read(tmp_path / "old.TAR", tmp_path / "old.tgz") == ["text of a", "text of b"] * 2


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.TXT", "a.csv", "a", "a.b.c", "a.gz.txt"])
def test_text_is_text_whatever_its_name(tmp_path, name):
    assert read(write(tmp_path / name, "{so} [it] is\n\n")) == ["{so} [it] is\n\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.json", "a", "a.txt"])
@pytest.mark.parametrize("before", ["", "\n \n"])
def test_lines_of_json_are_known_by_their_name_or_their_first_lines(tmp_path, name, before):
    texts = ["a\u2028b\x85c\x0b", "x" * 100000, *DOCUMENTS, SEPARATOR, " ", "\n\n"]
    found = []
    for text in texts:
        found.append(json.dumps({"id": 3, "text": text}, ensure_ascii=False))
    path = write(tmp_path / name, before + "\r\n".join(found))
    assert read(path) == texts
    assert documents(path)[1].kinds == {"json": 1}


def test_a_long_first_line_of_json_is_json(tmp_path):
    text = "x " * (2 * reading.PIECE)
    write(tmp_path / "a", json_lines([text, "b"]))
    assert read(tmp_path / "a") == [text, "b"]


def test_lone_surrogates_are_replaced(tmp_path):
    write(tmp_path / "a.jsonl", '{"text": "\\ud83d \\ud83d\\ude00"}\n')
    assert read(tmp_path / "a.jsonl") == ["\ufffd \U0001f600"]


def test_an_array_of_json_is_its_elements(tmp_path):
    values = [{"text": "one"}, "two", {"text": ""}, {"txt": "x"}]
    write(tmp_path / "a.json", "\n" + json.dumps(values, indent=1))
    assert read(tmp_path / "a.json") == ["one", "two"]
    assert "skipped 1 unusable lines of" in report_of(tmp_path / "a.json")


MISREAD = {
    "pretty.json": json.dumps({"text": "one", "id": 2}, indent=2),
    "field.jsonl": '{"content": "one"}\n',
    "half.jsonl": '{"text": "one"}\nx\nx\n',
    "poem.json": "roses are red\nviolets are blue\n",
    "deep.jsonl": "[" * 99999,
    "deep.json": "[" * 99999,
    "number.jsonl": '{"text": 3}\n{"text": null}\n',
}


@pytest.mark.parametrize("name", MISREAD)
def test_misread_formats_are_refused(tmp_path, name):
    write(tmp_path / name, MISREAD[name])
    assert "are no objects with a field" in refusal(tmp_path / name)
    write(tmp_path / "good.txt", "good")
    if name.endswith(".json"):  # in a folder it may be anything
        assert read(tmp_path) == ["good"]
        assert "1 JSON without a text" in report_of(tmp_path)
    else:
        assert "are no objects with a field" in refusal(tmp_path)


def test_single_unusable_lines_are_skipped_and_counted(tmp_path):
    write(tmp_path / "a.jsonl", b'nonsense\n\n{"text": 3}\n[1]\n' + json_lines(DOCUMENTS[:3]))
    assert read(tmp_path) == DOCUMENTS[:3]
    assert f"skipped 3 unusable lines of {tmp_path}/a.jsonl" in report_of(tmp_path)


# ---- Pieces


def any_text(rng, length):
    """Text of few words, with line ends, spaces, multi-byte characters and parts of separators."""
    words = ["a", "é", "☕", "😀", " ", "\n", "\r\n", "<|endo", "ftext|>", "<|", "word" * 5]
    return "".join(rng.choice(words) for _ in range(length))


@pytest.mark.parametrize("piece", [7, 100, 1 << 20])
def test_pieces_of_any_size_give_the_same_documents(tmp_path, monkeypatch, piece):
    rng = random.Random(0)
    texts = []
    for length in [1, 2, 5, 20, 100, 500] * 4:
        text = any_text(rng, length).replace(SEPARATOR, "").strip()
        texts.append(text or "x")
    separated = ""
    for text in texts:
        around = [rng.choice(["", "\n", "\r\n", "\n\n\n"]) for _ in range(2)]
        separated += text + SEPARATOR.join(around)
    write(tmp_path / "a.txt", separated)
    write(tmp_path / "b.jsonl", json_lines([SEPARATOR, *texts]))
    write(tmp_path / "c.gz", gzip.compress(separated.encode("utf-16")))
    write(tmp_path / "d.tar", tar_of({"a": separated.encode()}))
    monkeypatch.setattr(reading, "PIECE", piece)
    monkeypatch.setattr(reading, "READ", piece)
    assert read(tmp_path / "b.jsonl") == [SEPARATOR, *texts]
    texts = [text.replace("\r\n", "\n") for text in texts]
    for name in ("a.txt", "c.gz", "d.tar"):
        assert read(tmp_path / name) == texts
    expected = []
    for text in texts:
        expected += [line for line in text.split("\n") if line.strip()]
    assert read(tmp_path / "a.txt", lines=True) == expected


def test_long_documents_come_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 100)
    text = "some words \n and é " * 400 + "x" * 1000 + SEPARATOR + " y" * 300 + "\n" * 50
    write(tmp_path / "a.txt", text)
    write(tmp_path / "b.jsonl", json_lines([text]))
    for name in ("a.txt", "b.jsonl"):
        pieces = [text for text, _ in Reader([tmp_path / name])]
        assert "".join(pieces).replace(SEPARATOR, "") == text.replace(SEPARATOR, "")
        assert max(map(len, pieces[:-1])) <= 200
        for before, after in zip(pieces, pieces[1:]):
            if "x" not in before + after:
                assert before.endswith("\n") or after.startswith((" ", "<"))
        assert [p for p in pieces if SEPARATOR in p] == [p for p in pieces if "<|" in p]


def test_a_text_file_is_one_document_with_plain_line_ends(tmp_path):
    text = "\n\r\n first\u2028" + "line\n" * 500000 + "end \r\n\n"
    write(tmp_path / "a.txt", text)
    found, reader = documents(tmp_path / "a.txt")
    assert found == [text.replace("\r\n", "\n")]
    assert reader.has_one_text()
    write(tmp_path / "old.txt", "an old\rMac's\r")
    assert read(tmp_path / "old.txt") == ["an old\nMac's\n"]


def test_a_text_may_begin_with_a_line_of_json(tmp_path):
    text = '{"text": "one"}\nis a line of JSON.\nAnd this is none.'
    write(tmp_path / "a.txt", text)
    assert read(tmp_path / "a.txt") == [text]


def test_separators_divide_documents(tmp_path):
    write(tmp_path / "a.txt", f"\n one\n{SEPARATOR}\r\n two \n\n{SEPARATOR}\n \n{SEPARATOR}three\n")
    write(tmp_path / "b.txt", f"{SEPARATOR}\none\n{SEPARATOR}\n")
    found, reader = documents(tmp_path)
    assert found == ["\n one", " two ", "three\n", "one"]
    assert reader.kinds == {"separated": 1, "text": 1}


def test_lines_are_documents_where_asked(tmp_path):
    write(tmp_path / "a.txt", f"\n one\r\n\n \ntwo{SEPARATOR}\nthree\u2028 four\n{SEPARATOR}\nfive")
    write(tmp_path / "b.jsonl", json_lines(["x\ny"]))
    found, reader = documents(tmp_path, lines=True)
    assert found == [" one", "two", "three\u2028 four", "five", "x\ny"]
    assert reader.kinds == {"lines": 1, "json": 1}


# ---- Encodings


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_a_byte_order_mark_names_the_encoding(tmp_path, encoding):
    text = "schöne ☕ 😀\n" * 9
    mark = "" if encoding in ("utf-8-sig", "utf-16", "utf-32") else "\ufeff"
    write(tmp_path / "a.txt", (mark + text).encode(encoding))
    lines = json_lines([text, "b"]).decode()
    write(tmp_path / "b.jsonl", (mark + lines).encode(encoding))
    found, reader = documents(tmp_path)
    assert found == [text, text, "b"]
    assert not reader.undecodable


@pytest.mark.parametrize("piece", [1, 100])
def test_bytes_that_cannot_be_decoded_are_counted(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(reading, "READ", piece)
    write(tmp_path / "a.txt", "\ufffd is a character ☕")
    write(tmp_path / "b.txt", LATIN1 * 10)
    write(tmp_path / "c.txt", b"cut \xf0\x9f\x98")
    found, reader = documents(tmp_path)
    assert found[0] == "\ufffd is a character ☕"
    assert found[1] == "sch\ufffdne gr\ufffd\ufffde\n" * 10
    assert found[2] == "cut \ufffd"
    report = "\n".join(reader.report())
    assert "33 bytes in 2 files" in report
    assert f"first: {tmp_path}/b.txt" in report and "iconv" in report


TOKENS = np.random.default_rng(0).integers(256, 50257, 100).astype(np.uint16).tobytes()
BINARY = {
    "a.png": PNG,
    "a.pdf": b"%PDF-1.4\nonly text\n",
    "tokens": TOKENS,
    "a.docx": zip_of({"[Content_Types].xml": b"<xml>"}),
    "a.npz": zip_of({"a.txt": b"text"}),
    "a.txt": b"text " * 99 + b"\0" + b"text " * 99,
    "controls": b"\x01text\x02 \x03\x7f" * 9,
    "utf16.txt": "no mark".encode("utf-16-le"),
    "a.dat.gz": gzip.compress(PNG),
}


@pytest.mark.parametrize("name", BINARY)
def test_binary_files_are_refused_or_left_out(tmp_path, name):
    write(tmp_path / name, BINARY[name])
    assert "is no text" in refusal(tmp_path / name)
    assert "1 binary" in refusal(tmp_path), "nothing remains"
    write(tmp_path / "good.txt", "\x1b[1mgood\x1b[0m \f\b\t")
    assert read(tmp_path) == ["\x1b[1mgood\x1b[0m \f\b\t"]
    assert f"left out 1 file: 1 binary ({tmp_path}/" in report_of(tmp_path)


# ---- Folders


def test_junk_is_left_out_of_folders_and_archives(tmp_path):
    names = [".hidden", ".git/config", "a.txt~", "__MACOSX/a.txt", "Thumbs.db", "desktop.ini"]
    outputs = ["train.bin", "val.bin", "meta.json", "train.bin.tmp"]
    members = {"good/a.txt": b"good"}
    for name in names + outputs:
        members[name] = b"not to be read"
    for name, data in members.items():
        write(tmp_path / "in" / name, data)
    write(tmp_path / "a.tar", tar_of(members))
    write(tmp_path / "a.zip", zip_of(members))
    for name in ("in", "a.tar", "a.zip"):
        assert read(tmp_path / name) == ["good"]
        report = report_of(tmp_path / name)
        assert "left out 10 files: " in report
        assert "6 hidden or of the system" in report
        assert "4 written by prepare.py" in report
    assert read(tmp_path / "in/.hidden") == ["not to be read"], "it was asked for"


def test_links_are_followed_and_each_file_is_read_once(tmp_path):
    write(tmp_path / "in/a.txt", "a")
    write(tmp_path / "other/b.txt", "b")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/other").symlink_to(tmp_path / "other")
    (tmp_path / "in/z.txt").symlink_to(tmp_path / "in/a.txt")
    (tmp_path / "in/broken").symlink_to(tmp_path / "nothing")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    assert read(tmp_path / "link") == ["a", "b"]
    assert read(tmp_path / "in", tmp_path / "link", tmp_path / "in/z.txt") == ["a", "b"]
    assert f"1 unreadable ({tmp_path}/in/broken)" in report_of(tmp_path / "in")


def test_links_in_archives_are_not_read(tmp_path):
    (tmp_path / "link").symlink_to("/etc/hostname")
    write(tmp_path / "a.txt", "a")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.txt", "a.txt")
        tar.add(tmp_path / "link", "link")
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "a")
        archive.writestr(info, "/etc/hostname")
    for name in ("a.tar", "a.zip"):
        assert read(tmp_path / name) == ["a"]
        assert "1 link or device" in report_of(tmp_path / name)


def test_files_without_permission_are_left_out(tmp_path):
    write(tmp_path / "in/a.txt", "a")
    write(tmp_path / "in/b.txt", "b").chmod(0)
    write(tmp_path / "in/c/c.txt", "c")
    (tmp_path / "in/c").chmod(0)
    if os.access(tmp_path / "in/b.txt", os.R_OK):
        pytest.skip("the superuser may read everything")
    try:
        assert read(tmp_path / "in") == ["a"]
        assert "left out 2 files: 2 unreadable" in report_of(tmp_path / "in")
    finally:
        (tmp_path / "in/c").chmod(0o700)


def test_pipes_are_read_where_they_are_named(tmp_path):
    write(tmp_path / "in/a.txt", "a")
    os.mkfifo(tmp_path / "in/pipe")
    assert read(tmp_path / "in") == ["a"]
    assert "1 pipe or device" in report_of(tmp_path / "in")
    sources = {
        "text": b"one\n" * 50000,
        "json": json_lines(DOCUMENTS),
        "zip": zip_of({"a.txt": b"one\n" * 50000}),
        "gz": gzip.compress(tar_of({"b.jsonl": json_lines(DOCUMENTS)})),
    }
    for name, data in sources.items():
        writer = threading.Thread(target=(tmp_path / "in/pipe").write_bytes, args=[data])
        writer.start()
        found = read(tmp_path / "in/pipe")
        writer.join()
        assert found == (["one\n" * 50000] if name in ("text", "zip") else DOCUMENTS)


def test_the_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    names = ["b.txt", "a/z.txt", "a.txt", "c/d/e.txt", "c/a.txt", "B.txt"]
    for name in names:
        write(tmp_path / "in" / name, name)
    first = read(tmp_path / "in")
    assert sorted(first) == sorted(names)
    walk = os.walk

    def walk_backwards(*arguments, **options):
        for parent, folders, files in walk(*arguments, **options):
            folders.reverse()
            yield parent, folders, files[::-1]

    monkeypatch.setattr(os, "walk", walk_backwards)
    assert read(tmp_path / "in") == first


def test_empty_files_are_left_out(tmp_path):
    for name in ("a.txt", "b.jsonl", "c", "d.json", "e.gz"):
        write(tmp_path / name, "")
    write(tmp_path / "f.txt.gz", gzip.compress(b" \n\n\t" * 99))
    write(tmp_path / "g.jsonl", '{"text": ""}\n')
    assert "left out 7 files: 7 empty" in refusal(tmp_path)
    assert "no usable document" in refusal(tmp_path / "a.txt", tmp_path / "b.jsonl")
    write(tmp_path / "good.txt", "good")
    assert read(tmp_path) == ["good"]
    assert read(tmp_path / "a.txt", tmp_path / "good.txt") == ["good"]


def test_nothing_to_read_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is missing"):
        Reader([tmp_path / "nothing"])
    write(tmp_path / "in/.hidden", "x")
    with pytest.raises(UserError, match="nothing to read.*1 hidden"):
        Reader([tmp_path / "in"])
    write(tmp_path / "a.zip", zip_of({}))
    assert "no usable document" in refusal(tmp_path / "a.zip")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/in/.hidden") == ["x"]


def test_excluded_files_are_not_read(tmp_path):
    for name in "abc":
        write(tmp_path / f"in/{name}.txt", name)
    (tmp_path / "link").symlink_to(tmp_path / "in/b.txt")
    reader = Reader([tmp_path / "in"])
    reader.exclude(Reader([tmp_path / "link"]))
    assert [text for text, _ in reader] == ["a", "c"]


def test_the_report_counts_files_by_their_suffix(tmp_path):
    for i in range(12):
        write(tmp_path / f"{i}.txt", "x")
    for name in ("a", "a.md", "b.MD", "c.jsonl.gz", "a.c", "a.h", "a.py"):
        write(tmp_path / name, '{"text": "x"}')
    write(tmp_path / "c.jsonl.gz", gzip.compress(b'{"text": "x"}'))
    report = report_of(tmp_path)
    assert report.startswith("read 19 files: 12 .txt, 2 .md, ")
    assert report.endswith(", 2 others")
    assert report_of(tmp_path / "a") == "read 1 file: 1 no suffix"


# ---- Damage


def damaged(data):
    """The data with one byte changed, at many places. Nothing protects the table of a zip file."""
    end = data.find(b"PK\1\2") % len(data)
    for place in range(0, end, 1 + end // 80):
        changed = bytearray(data)
        changed[place] ^= 0xFF
        yield bytes(changed)


TWO = {"a.txt": b"first text" * 9, "b.txt": bytes(range(32, 127)) * 9}
PACKED = {
    "x.tar": tar_of(TWO),
    "x.zip": zip_of(TWO),
    "x.txt.gz": gzip.compress(TWO["b.txt"]),
    "x.txt.bz2": bz2.compress(TWO["b.txt"]),
    "x.txt.xz": lzma.compress(TWO["b.txt"]),
    "x.tgz": gzip.compress(tar_of(TWO)),
    "x.txt.zst": TWO["b.txt"],
}


@pytest.mark.parametrize("name", PACKED)
def test_files_that_are_cut_off_are_refused(tmp_path, name):
    data = PACKED[name]
    if name.endswith(".zst"):
        data = zstd(data)
    write(tmp_path / "in/good.txt", "good")
    for size in range(1, len(data), 1 + len(data) // 40):
        if name == "x.tar" and size > len(data) - tarfile.RECORDSIZE + 5 * 512:
            continue  # only zeros are lost
        write(tmp_path / "in" / name, data[:size])
        assert "is broken, cut off or unreadable" in refusal(tmp_path / "in")


@pytest.mark.parametrize("name", PACKED)
def test_damaged_files_lose_no_document_silently(tmp_path, name):
    data = PACKED[name]
    if name.endswith(".zst"):
        data = zstd(data)
    expected = len(read(write(tmp_path / "whole" / name, data)))
    for changed in damaged(data):
        write(tmp_path / name, changed)
        try:
            found = read(tmp_path / name)
        except UserError:
            continue
        assert len(found) == expected


@pytest.mark.parametrize(
    "name", ["a.gz", "a.bz2", "a.xz", "a.zst", "a.tar", "a.zip", "a.tgz", "a.txt.GZ"]
)
def test_what_only_has_the_suffix_of_an_archive_is_refused(tmp_path, name):
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    write(tmp_path / "in" / name, b"<html>not found</html>" * 99)
    assert "broken" in refusal(tmp_path / "in")


def test_encrypted_archives_are_refused(tmp_path):
    data = bytearray(zip_of({"a.txt": b"secret"}))
    data[6] |= 1  # in the header of the member
    data[data.index(b"PK\1\2") + 8] |= 1  # and in the table
    assert "unpacked first" in refusal(write(tmp_path / "a.zip", bytes(data)))
    data = bytearray(zip_of({"a.txt": b"text"}, zipfile.ZIP_STORED))
    data[8] = data[data.index(b"PK\1\2") + 10] = 97  # an unknown compression
    assert "unpacked first" in refusal(write(tmp_path / "a.zip", bytes(data)))


def test_every_file_is_closed(tmp_path):
    write(tmp_path / "in/a.txt", "a")
    write(tmp_path / "in/b.jsonl", json_lines(DOCUMENTS))
    write(tmp_path / "in/c.zip", zip_of(TWO))
    write(tmp_path / "in/d.tar", tar_of({"c.zip": zip_of(TWO), ".junk": b"x", "e.png": PNG}))
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("this system does not list open files")
    before = len(os.listdir("/proc/self/fd"))
    read(tmp_path / "in")
    iterator = iter(Reader([tmp_path / "in/d.tar"]))
    next(iterator)
    iterator.close()
    assert len(os.listdir("/proc/self/fd")) == before
