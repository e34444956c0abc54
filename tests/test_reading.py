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
from tests.helpers import DOCUMENTS

LATIN1 = "schöne grüße\n".encode("latin-1")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def read(*paths, lines=False):
    return list(Reader(paths, lines))


def report_of(*paths):
    reader = Reader(paths)
    list(reader)
    return "\n".join(reader.report())


def refusal(*paths):
    with pytest.raises(UserError) as error:
        read(*paths)
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path, data):
    """Writes a file and its folders. data: bytes or text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zstd(data):
    return pytest.importorskip("zstandard").compress(data)


def tar_of(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zip_of(members, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def with_link(archive):
    """A zip archive with a link to a.txt beside its members."""
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    file = io.BytesIO(archive)
    with zipfile.ZipFile(file, "a") as opened:
        opened.writestr(info, "a.txt")
    return file.getvalue()


COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}
COMPRESSIONS |= {".xz": lzma.compress, ".zst": zstd}
ARCHIVES = {".tar": tar_of, ".zip": zip_of}


# ---- What a file is ------------------------------------------------------------------------------


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
        write(tmp_path / "outer.tgz", gzip.compress(tar_of({f"x{archive}": data})))
        assert read(tmp_path / "outer.tgz") == [*DOCUMENTS, "some text\n"]
        assert read(write(tmp_path / "no_suffix", data)) == [*DOCUMENTS, "some text\n"]
    else:
        for name, data in members.items():
            write(tmp_path / "in" / name, data)
    assert read(tmp_path / "in") == [*DOCUMENTS, "some text\n"]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_several_compressed_files_in_a_row_are_one(tmp_path, suffix):
    compress = COMPRESSIONS[suffix]
    parts = [compress(b"first \n"), compress(b""), compress("zwölf".encode())]
    zeros = bytes(500) if suffix else b""  # they fill up a block
    assert read(write(tmp_path / "a", b"".join(parts) + zeros)) == ["first \nzwölf"]


TEXTS = ["a\u2028b\x85c\x0b", "x " * 3000000, *DOCUMENTS[:6], SEPARATOR, " ", "\n\n", "\ud83d"]
JSON_LINES = "\n \n" + "\r\n".join(json.dumps({"id": 3, "text": text}) for text in TEXTS)
FILES = {
    "a.md": ("{so} [it] is\n\n", ["{so} [it] is\n\n"]),
    "a.gz.txt": ('"quoted"\n', ['"quoted"\n']),
    "a.txt": (f"\n one\r\n\u2028{SEPARATOR}\r\n two \n\n{SEPARATOR}\n \n{SEPARATOR}three\n\n",)
    + (["\n one\n\u2028", " two ", "three\n\n"],),
    "begin.txt": (f"{SEPARATOR}\none\n{SEPARATOR}\n", ["one"]),
    "mac.txt": ("an old\rMac's\r", ["an old\nMac's\n"]),
    "blank.txt": ("\n\n\n\n\n\nx", ["\n\n\n\n\n\nx"]),
    "first.txt": ('{"text": "one"}\nwas JSON.', ['{"text": "one"}\nwas JSON.']),
    "utf8.txt": ("\ufeffgrün", ["grün"]),
    "utf16.txt": ("grün ☕\r\n".encode("utf-16"), ["grün ☕\n"]),
    "utf16.jsonl": ('\ufeff{"text": "☕"}\n'.encode("utf-16-be"), ["☕"]),
    "colours.txt": ("\x1b[1mgood\x1b[0m \f\b\t", ["\x1b[1mgood\x1b[0m \f\b\t"]),
}
for name in ("a.jsonl", "a.NDJSON", "a.json", "a", "b.txt"):
    FILES[name] = (JSON_LINES, [*TEXTS[:-1], "\ufffd"])


@pytest.mark.parametrize("name", FILES)
def test_the_documents_of_a_file(tmp_path, name):
    content, expected = FILES[name]
    assert read(write(tmp_path / name, content)) == expected


def test_lines_are_documents_where_asked(tmp_path):
    write(tmp_path / "a.txt", f"\n one\r\n\n \ntwo{SEPARATOR}\nthree\u2028 four\n{SEPARATOR}\nfive")
    write(tmp_path / "b.jsonl", json_lines(["x\ny"]))
    expected = [" one", "two", "three\u2028 four", "five", "x\ny"]
    assert read(tmp_path, lines=True) == expected


@pytest.mark.parametrize("piece", [7, 100, 1 << 20])
def test_pieces_of_any_size_give_the_same_documents(tmp_path, monkeypatch, piece):
    rng = random.Random(0)
    words = ["a", "é", "☕", "😀", " ", "\n", "\r\n", "<|endo", "ftext|>", "<|", "word" * 5]
    texts = []
    for length in [1, 2, 5, 20, 100, 500] * 4:
        text = "".join(rng.choice(words) for _ in range(length))
        texts.append(text.replace(SEPARATOR, "").replace("\r", "").strip() or "x")
    separated = ""
    for text in texts:
        separated += text + rng.choice(["", "\n", "\r\n\n"]) + SEPARATOR + rng.choice(["", "\n"])
    write(tmp_path / "a.txt", separated)
    write(tmp_path / "b.gz", gzip.compress(separated.encode("utf-16")))
    write(tmp_path / "c.tar", tar_of({"a": separated.encode()}))
    monkeypatch.setattr(reading, "PIECE", piece)
    monkeypatch.setattr(reading, "READ", max(piece, 500))
    assert read(tmp_path) == texts * 3
    expected = [line for text in texts for line in text.split("\n") if line.strip()]
    assert read(tmp_path / "a.txt", lines=True) == expected


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_long_text_is_divided_at_line_ends(tmp_path, monkeypatch, end):
    monkeypatch.setattr(reading, "PIECE", 10)
    monkeypatch.setattr(reading, "LONGEST", 100)
    found = read(write(tmp_path / "a.txt", f"ten words{end}" * 90))
    assert 10 < len(found) and max(map(len, found)) <= 100
    assert "".join(found).replace("\n", "") == "ten words" * 90
    if end:
        assert all(document.strip("\n").count("ten words\n") > 2 for document in found)


# ---- What is said --------------------------------------------------------------------------------


REFUSED = {
    "pretty.jsonl": (json.dumps({"text": "one"}, indent=2), "3 lines are no objects with a field"),
    "field.jsonl": ('{"content": "one"}\n', "1 lines are no objects"),
    "half.jsonl": ('{"text": "one"}\nx\nx\n', "2 lines are no objects"),
    "poem.json": ("roses are red\nviolets are blue\n", "2 lines are no objects"),
    "deep.jsonl": ("[" * 99999, "1 lines are no objects"),
    "number.jsonl": ('{"text": 3}\n{"text": null}\n[1]\n', "3 lines are no objects"),
    "a.png": (PNG, "is no text"),
    "a.pdf": (b"%PDF-1.4\nonly text\n", "is no text"),
    "a.docx": (zip_of({"[Content_Types].xml": b"<xml>"}), "is no text"),
    "nul.txt": (b"text " * 99 + b"\0" + b"text " * 99, "is no text"),
    "utf16.txt": ("no mark".encode("utf-16-le"), "is no text"),
    "a.gz": (gzip.compress(PNG), "is no text"),
    "a.txt": ("", "no usable document"),
    "blank.txt.gz": (gzip.compress(b" \n\n\t" * 99), "no usable document"),
    "none.jsonl": ('{"text": ""}\n', "no usable document"),
    "none.zip": (zip_of({}), "no usable document"),
    "bad.gz": (b"<html>not found</html>" * 99, "is broken, cut off"),
    "bad.tbz2": (b"not found", "is broken, cut off"),
    "bad.tar": (b"not a tar at all" * 99, "is broken, cut off"),
    "bad.zip": (b"not a zip at all" * 99, "is broken, cut off"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_without_usable_text_are_refused_by_name(tmp_path, name):
    content, words = REFUSED[name]
    message = refusal(write(tmp_path / name, content))
    assert words in message and str(tmp_path / name).removesuffix(".gz") in message


LEFT_OUT = {
    "a.png": (PNG, "left out (binary): 1, of {}/a.png"),
    "a.txt": ("", "left out (empty): 1, of {}/a.txt"),
    "a.json": ('{"txt": 1}', "left out (JSON without a text): 1, of {}/a.json"),
    "a.jsonl": ('x\n\n[1]\n{"text": "1"}\n{"text": "2"}\n', "unusable lines: 2, of {}/a.jsonl"),
    "l.txt": (LATIN1 * 10 + b"cut \xf0\x9f\x98 \xef\xbf\xbd", "(iconv -f LATIN1 -t UTF-8 converts")
    + ("them): 32, of {}/l.txt",),
    "a.zip": (with_link(zip_of({"b.txt": b"b"})), "left out (link or device): 1, of {}/a.zip/link"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_report_says_what_was_left_out_of_a_folder(tmp_path, name):
    write(tmp_path / "good.txt", "good")
    content, *words = LEFT_OUT[name]
    write(tmp_path / name, content)
    report = report_of(tmp_path)
    assert " ".join(words).format(tmp_path) in report
    assert len(report.splitlines()) == 2, "all that was read, and one note"


def test_bytes_that_cannot_be_decoded_become_signs(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "READ", 300)
    path = write(tmp_path / "a.txt", LATIN1 * 2 + b"\xef\xbf\xbd cut \xf0\x9f\x98")
    assert read(path) == ["sch\ufffdne gr\ufffd\ufffde\n" * 2 + "\ufffd cut \ufffd"]


def test_junk_is_left_out_of_folders_and_archives(tmp_path):
    names = [".hidden", ".git/config", "a.txt~", "__MACOSX/a.txt", "Thumbs.db", "desktop.ini"]
    names += ["train.bin", "val.bin", "meta.json", "train.bin.tmp"]
    members = dict.fromkeys(names, b"not to be read") | {"good/a.txt": b"good"}
    for name, data in members.items():
        write(tmp_path / "in" / name, data)
    write(tmp_path / "a.tar", tar_of(members))
    for path in (tmp_path / "in", tmp_path / "a.tar"):
        assert read(path) == ["good"]
        report = report_of(path)
        assert "files read: 1\n" in report
        assert "left out (hidden or of the system): 6, of " in report
        assert "left out (written by prepare.py): 4, of " in report
    assert read(tmp_path / "in/.hidden") == ["not to be read"], "it was asked for"
    (tmp_path / "in/good/a.txt").unlink()
    assert "holds nothing to read" in refusal(tmp_path / "in")


# ---- Folders and pipes ---------------------------------------------------------------------------


def test_links_are_followed_and_each_file_is_read_once(tmp_path):
    write(tmp_path / "in/a.txt", "a")
    write(tmp_path / "other/b.txt", "b")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/other").symlink_to(tmp_path / "other")
    (tmp_path / "in/z.txt").symlink_to(tmp_path / "in/a.txt")
    (tmp_path / "in/broken").symlink_to(tmp_path / "nothing")
    assert read(tmp_path / "in", tmp_path / "other", tmp_path / "in/z.txt") == ["a", "b"]
    assert f"device): 1, of {tmp_path}/in/broken" in report_of(tmp_path / "in")


@pytest.mark.parametrize("kind", ["text", "json", "zip", "gz"])
def test_pipes_are_read_where_they_are_named(tmp_path, kind):
    write(tmp_path / "in/a.txt", "a")
    os.mkfifo(tmp_path / "in/pipe")
    assert read(tmp_path / "in") == ["a"]
    data = {
        "text": b"one\n" * 50000,
        "json": json_lines(DOCUMENTS),
        "zip": zip_of({"a.txt": b"one\n" * 50000}),
        "gz": gzip.compress(tar_of({"b.jsonl": json_lines(DOCUMENTS)})),
    }[kind]
    writer = threading.Thread(target=(tmp_path / "in/pipe").write_bytes, args=[data])
    writer.start()
    found = read(tmp_path / "in/pipe")
    writer.join()
    assert found == (["one\n" * 50000] if kind in ("text", "zip") else DOCUMENTS)


def test_the_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    names = ["B.txt", "a.txt", "b.txt", "a/z.txt", "c/a.txt", "c/d/e.txt"]
    for name in names[::-1]:
        write(tmp_path / name, name)
    walk = os.walk

    def walk_backwards(*arguments, **options):
        for parent, folders, files in walk(*arguments, **options):
            folders.sort(reverse=True)
            yield parent, folders, sorted(files, reverse=True)

    monkeypatch.setattr(os, "walk", walk_backwards)
    assert read(tmp_path) == names


def test_a_file_in_a_folder_of_no_permission_is_told(tmp_path, monkeypatch):
    write(tmp_path / "in/a.txt", "a")
    write(tmp_path / "in/b.txt", "b")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path[-5] != "b" and access(path, mode))
    assert read(tmp_path / "in") == ["a"]
    assert "left out (unreadable, a pipe or a device): 1" in report_of(tmp_path / "in")


# ---- Damage --------------------------------------------------------------------------------------

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
def test_damaged_files_are_refused_or_lose_no_document(tmp_path, name):
    data = zstd(PACKED[name]) if name.endswith(".zst") else PACKED[name]
    path = tmp_path / name
    expected = len(read(write(path, data)))
    for size in range(1, len(data), 1 + len(data) // 40):
        if name != "x.tar" or size <= len(data) - tarfile.RECORDSIZE + 5 * 512:  # zeros beyond it
            assert "is broken, cut off or unreadable" in refusal(write(path, data[:size]))
    end = data.find(b"PK\1\2") % len(data)  # nothing protects the table of a zip file
    for place in range(0, end, 1 + end // 60):
        write(path, data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            found = read(path)
        except UserError:
            continue
        assert len(found) == expected


def test_encrypted_archives_are_refused(tmp_path):
    data = bytearray(zip_of({"a.txt": b"secret"}))
    data[6] |= 1  # in the header of the member
    data[data.index(b"PK\1\2") + 8] |= 1  # and in the table
    assert "password required" in refusal(write(tmp_path / "a.zip", bytes(data)))


def test_every_file_is_closed(tmp_path):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("this system does not list open files")
    members = {"c.zip": zip_of(TWO), "d.jsonl": json_lines(DOCUMENTS), "e.png": PNG}
    write(tmp_path / "a.tar", tar_of(members))
    write(tmp_path / "b.txt", "b")
    before = len(os.listdir("/proc/self/fd"))
    read(tmp_path)
    iterator = iter(Reader([tmp_path]))
    next(iterator)
    iterator.close()
    assert len(os.listdir("/proc/self/fd")) == before
