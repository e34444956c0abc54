"""Reads the documents of files and folders as strings. Memory use does not grow with the files.

The content of a file decides what it is: compressed data, an archive, lines of JSON, text, or
binary data. What comes out of an archive is looked at in the same way.
"""

import bz2
import codecs
import functools
import io
import itertools
import json
import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter, defaultdict

from tqdm import tqdm

from engine.config import UserError

READ = 1 << 16  # bytes per read. The first of them decide what a file is.
PIECE = 1 << 20  # characters per read of text
LONGEST = 1 << 24  # characters. A longer text without separators is divided at line ends.

SEPARATOR = "<|endoftext|>"  # divides documents in text files
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
OUTPUTS = ("train.bin", "val.bin", "meta.json")  # what prepare.py writes
SYSTEM_FILES = ("__MACOSX", "Thumbs.db", "desktop.ini")
# What damaged files raise. RuntimeError is of a password, or of an archive that holds itself.
DAMAGE = (EOFError, OSError, RuntimeError, tarfile.TarError, zipfile.BadZipFile)
DAMAGE += (lzma.LZMAError, zlib.error)
UNDECODABLE = "signs U+FFFD, for bytes that are no UTF-8 (iconv -f LATIN1 -t UTF-8 converts them)"


class Reader:
    """The documents of files and folders, in one pass.

    paths: files, folders and pipes; "-" is stdin. A file that is reached by two paths is read once.
    lines: whether each line of a text file is a document.
    files_read: their number. notes: a Counter of the names of files for each line of report.

    Raises UserError if a path does not exist, or is a folder without any file to read.
    """

    def __init__(self, paths, lines=False):
        self.paths = ["/dev/stdin" if path == "-" else os.path.expanduser(path) for path in paths]
        self.lines = lines
        self.files = {}  # real path: (path, whether it is one of paths)
        self.files_read = 0
        self.notes = defaultdict(Counter)
        for path in self.paths:
            if not os.path.exists(path):
                raise UserError(f"{path} is missing")
            is_named = not os.path.isdir(path)
            files = [path] if is_named else list(self.files_under(path))
            if not files:
                raise UserError("; ".join([f"{path} holds nothing to read", *self.report()]))
            for file in files:
                self.files.setdefault(os.path.realpath(file), (file, is_named))

    def files_under(self, folder):
        """Yields the paths of files under a folder, always in the same order. Follows links."""

        def leave_out_folder(error):
            self.leave_out("unreadable", error.filename)

        visited = set()
        for parent, folders, names in os.walk(folder, onerror=leave_out_folder, followlinks=True):
            if os.path.realpath(parent) in visited:
                folders.clear()
                continue
            visited.add(os.path.realpath(parent))
            folders[:] = [name for name in sorted(folders) if self.is_wanted(name, parent)]
            for name in [name for name in sorted(names) if self.is_wanted(name, parent)]:
                path = os.path.join(parent, name)
                if os.path.isfile(path) and os.access(path, os.R_OK):
                    yield path
                else:
                    self.leave_out("unreadable, a pipe or a device", path)

    def is_wanted(self, name, parent):
        """Returns whether to read what has this name in a folder or archive. If not, notes it."""
        is_junk = name.startswith(".") or name.endswith("~") or name in SYSTEM_FILES
        is_output = name.removesuffix(".tmp") in OUTPUTS
        if is_junk or is_output:
            reason = "hidden or of the system" if is_junk else "written by prepare.py"
            self.leave_out(reason, f"{parent}/{name}")
        return not (is_junk or is_output)

    def leave_out(self, reason, name):
        self.notes[f"left out ({reason})"][name] += 1

    def report(self):
        """Returns lines that say what was read, replaced, skipped and left out."""
        lines = [f"files read: {self.files_read:,}"]
        for note, names in self.notes.items():
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            lines.append(f"{note}: {names.total():,}, of {next(iter(names))}{more}")
        return lines

    def __iter__(self):
        """Yields documents, each as one string. A progress bar shows the share of bytes read.

        Raises UserError if a file is damaged or misread, if a file of paths is binary, or if there
        is no document at all.
        """
        total = sum(os.path.getsize(path) for path in self.files if os.path.exists(path))
        with tqdm(total=total or None, unit="B", unit_scale=True, desc="read") as bar:
            for path, is_named in self.files.values():
                try:
                    with open(path, "rb", READ) as file:
                        stream = file if file.seekable() else stream_of(file)
                        before = bar.n
                        for text in self.read(path, stream, is_named):
                            if stream is file:
                                bar.update(before + file.tell() - bar.n)
                            yield text
                except DAMAGE as error:
                    text = f"is broken, cut off or unreadable ({type(error).__name__}: {error})"
                    raise UserError(f"{path} {text}; fetch or unpack it") from None
        if not self.files_read:
            paths = ", ".join(self.paths)
            raise UserError("; ".join([f"no usable document in {paths}", *self.report()]))

    def read(self, name, stream, is_named=False):
        """Yields the documents of a file, or of all files in an archive.

        Raises UserError and DAMAGE. A binary file raises UserError only if it is one of paths.
        """
        head = stream.peek(READ)
        base, suffix = os.path.splitext(name)
        suffix = suffix.lower()
        kind = suffix.removeprefix(".").removeprefix("t")  # .tgz is .tar.gz
        # Whatever only has the suffix is damaged. Decompression says so.
        matching = [kind] if kind in COMPRESSIONS else []
        matching += [k for k, (beginning, _) in COMPRESSIONS.items() if re.match(beginning, head)]
        if not head:
            self.leave_out("empty", name)
        elif matching:
            pieces = decompress(stream, COMPRESSIONS[matching[-1]][1])
            if kind in COMPRESSIONS:
                name = base + (".tar" if suffix.startswith(".t") else "")
            yield from self.read(name, stream_of(pieces), is_named)
        elif suffix == ".tar" or head[257:262] == b"ustar":
            yield from self.read_members(name, members_of_tar(stream))
        elif suffix == ".zip" or suffix == "" and head.startswith(b"PK\3\4"):
            # Zip files with other suffixes are documents and packages, such as .docx and .npz.
            yield from self.read_members(name, members_of_zip(stream))
        elif not is_binary(head):
            yield from self.read_text(name, suffix, stream, is_named)
        elif is_named:
            raise UserError(
                f"{name} is no text; save it as plain text (UTF-16 needs a byte order mark)"
            )
        else:
            self.leave_out("binary", name)

    def read_members(self, archive, members):
        """Yields the documents of the files in an archive. members: see members_of_tar."""
        for member, file in members:
            parts = [part for part in member.split("/") if part not in ("", ".", "..")]
            if file is None:
                self.leave_out("link or device", f"{archive}/{member}")
            elif all(self.is_wanted(part, archive) for part in parts):
                yield from self.read(f"{archive}/{member}", stream_of(file))

    def read_text(self, name, suffix, stream, is_named):
        """Yields the documents of a file of text or JSON. Raises UserError if it is misread."""
        # Any line end becomes "\n".
        file = io.TextIOWrapper(stream, encoding_of(stream.peek(READ)), "replace")
        is_json = suffix in JSON_SUFFIXES
        lines = iter(functools.partial(file.readline, -1 if is_json else LONGEST), "")
        first = list(itertools.islice(lines, 4))
        first_texts = list(map(text_of, first))
        if is_json or any(first_texts) and None not in first_texts:
            texts = map(text_of, itertools.chain(first, lines))
        else:
            texts = split_text("".join(first), file, self.lines)
        documents = unusable = 0
        for text in texts:
            unusable += text is None
            if text:
                documents += 1
                if "\ufffd" in text:
                    self.notes[UNDECODABLE][name] += text.count("\ufffd")
                yield text
        if suffix == ".json" and not is_named and not documents:
            self.leave_out("JSON without a text", name)
        elif unusable > documents:
            raise UserError(
                f'{name} is no text in JSON: {unusable} lines are no objects with a field "text"; '
                "rename the field, or a file of text to X.txt"
            )
        elif not documents:
            self.leave_out("empty", name)
        else:
            self.files_read += 1
            if unusable:
                self.notes["skipped unusable lines"][name] = unusable


# ---- Bytes ---------------------------------------------------------------------------------------


class Bytes(io.RawIOBase):
    """The bytes of an iterator, as a file. A read is as long as it asks for, but at the end."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.buffer = bytearray()

    def readable(self):
        return True

    def readinto(self, target):
        while len(self.buffer) < len(target) and (piece := next(self.pieces, None)) is not None:
            self.buffer += piece
        size = min(len(target), len(self.buffer))
        target[:size] = self.buffer[:size]
        del self.buffer[:size]
        return size


def stream_of(source):
    """Returns the bytes of an open file, or of an iterator, as a file with a peek of READ bytes."""
    if hasattr(source, "read"):
        source = iter(functools.partial(source.read, READ), b"")
    return io.BufferedReader(Bytes(source), READ)


def new_zstd():
    """Returns a decompressor of zstandard. Raises UserError if the package is missing."""
    try:
        import zstandard
    except ImportError:
        raise UserError(".zst files need one more package: pip install zstandard") from None
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


# How compressed data begins, and what decompresses it, by the suffix of such a file.
COMPRESSIONS = {
    "gz": (rb"\x1f\x8b\x08", functools.partial(zlib.decompressobj, 16 + zlib.MAX_WBITS)),
    "bz2": (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.BZ2Decompressor),
    "xz": (rb"\xfd7zXZ\0", lzma.LZMADecompressor),
    "zst": (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", new_zstd),
}


def decompress(stream, new_decompressor):
    """Yields the bytes of a compressed stream. Several compressed files may follow each other.

    Raises OSError if the data are damaged, and EOFError if they are cut off.
    """
    decompressor = new_decompressor()
    while data := stream.read(READ):
        while data:
            if decompressor.eof:
                decompressor = new_decompressor()
            try:
                piece = decompressor.decompress(data)
            except Exception as error:  # each package has its own class of errors
                raise OSError(str(error)) from None
            yield piece
            # What remains belongs to the next file. Zeros may fill up a block.
            data = decompressor.unused_data.lstrip(b"\0") if decompressor.eof else b""
    if not decompressor.eof:
        raise EOFError("compressed data end too early")


class StrictTarInfo(tarfile.TarInfo):
    """The header of a tar member. tarfile takes a damaged one for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):
                raise  # the regular end
            raise OSError(f"{error} at byte {tar.offset}") from None


def members_of_tar(stream):
    """Yields the members of a tar archive: pairs (name, open file). Leaves out folders.

    The file is None for links and devices. Raises DAMAGE if the archive is damaged.
    """
    with tarfile.open(None, "r|", stream, READ, tarinfo=StrictTarInfo) as archive:
        for member in archive:
            if not member.isdir():
                yield member.name, archive.extractfile(member) if member.isfile() else None
            # tarfile keeps a record of each member. A long archive would fill the memory.
            archive.members = []


def members_of_zip(stream):
    """Yields the members of a zip archive, as members_of_tar does."""
    with tempfile.TemporaryFile() as copy:
        if not stream.seekable():  # the table of a zip archive is at its end
            shutil.copyfileobj(stream, copy, READ)
            stream = copy
        with zipfile.ZipFile(stream) as archive:
            for member in archive.infolist():
                if stat.S_ISLNK(member.external_attr >> 16):
                    yield member.filename, None
                elif not member.is_dir():
                    with archive.open(member) as file:
                        yield member.filename, file


# ---- Text ----------------------------------------------------------------------------------------


def encoding_of(head):
    """Returns the encoding of a text by its first bytes. It drops the byte order mark."""
    is_utf_16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "utf-16" if is_utf_16 else "utf-8-sig"


def is_binary(head):
    """Returns whether the first bytes of a file are no text."""
    # The first part of a PDF may be text.
    return head.startswith(b"%PDF-") or "\0" in head.decode(encoding_of(head), "replace")


def split_text(first, file, lines):
    """Yields the documents of a text, without the line ends around a separator, or "" if blank.

    first: the part of the text that comes before file. lines: whether line ends divide too.
    """
    divider = "\n" if lines else SEPARATOR
    text = ""  # of the current document
    is_first = True
    for piece in itertools.chain([first], iter(functools.partial(file.read, PIECE), "")):
        text += piece
        if lines:
            text = text.replace(SEPARATOR, divider)
        *ended, text = text.split(divider)
        while len(text) > LONGEST:
            place = text.rfind("\n", 0, LONGEST // 2) + 1 or LONGEST // 2
            ended.append(text[:place])
            text = text[place:]
        for document in ended:
            document = document if is_first else document.lstrip("\n")
            yield "" if document.isspace() else document.rstrip("\n")
            is_first = False
    text = text if is_first else text.lstrip("\n")
    yield "" if text.isspace() else text


def text_of(line):
    """Returns the field "text" of a JSON object, "" for a blank line, or None if there is none."""
    if line.isspace():
        return ""
    try:
        raw = json.loads(line)["text"].encode("utf-16", "surrogatepass")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    # JSON can hold half of a surrogate pair. UTF-8 cannot encode it, so it is replaced.
    return raw.decode("utf-16", "replace")
