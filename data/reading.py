"""Reads the documents of files and folders as a stream. Memory use does not grow with their size.

The content of a file decides what it is: compressed data, an archive, lines of JSON, text, or
binary data. What comes out of an archive is looked at in the same way. Each step is a generator:
open, unwrap, decode, split.
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
from tqdm.utils import CallbackIOWrapper

from engine.config import UserError

PIECE = 1 << 20  # characters of text in a piece of a document
READ = 1 << 16  # bytes per read
HEAD = 1 << 16  # bytes at the beginning of a file that decide what it is
FIRST_LINES = 1 << 24  # characters of the first lines that decide whether they are JSON

SEPARATOR = "<|endoftext|>"  # divides documents in text files
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
OUTPUTS = ("train.bin", "val.bin", "meta.json")  # what prepare.py writes
SYSTEM_FILES = ("__macosx", "thumbs.db", "desktop.ini")

# UTF-32 comes first: its mark begins with the mark of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}
# All control characters but \b \t \n \v \f \r and escape.
CONTROL = bytes(set(range(32)) - set(b"\b\t\n\v\f\r\x1b")) + b"\x7f"
MOST_CONTROL = 0.03  # the share of them above which a file is binary

# What damaged archives and compressed files raise.
DAMAGE = (
    EOFError,
    OSError,
    RecursionError,  # an archive that holds itself
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)


class Reader:
    """The documents of files and folders, in one pass.

    paths: files, folders and pipes; "-" is stdin. A file that is reached by two paths is read once.
    lines: whether each line of a text file is a document.
    kinds: a Counter of the files that were read: "text" (one document), "separated" (several
        documents with separators between them), "lines" and "json".

    Raises UserError if a path does not exist, or is a folder without any file to read.
    """

    def __init__(self, paths, lines=False):
        self.paths = []
        for path in paths:
            self.paths.append("/dev/stdin" if path == "-" else os.path.expanduser(path))
        self.lines = lines
        self.files = {}  # real path: (path, whether it is one of paths)
        self.kinds = Counter()
        self.suffixes = Counter()  # of the files that were read
        self.left_out = defaultdict(list)  # reason: names
        self.undecodable = Counter()  # name: bytes
        self.skipped = Counter()  # name: lines
        for path in self.paths:
            if not os.path.exists(path):
                raise UserError(f"{path} is missing")
            is_named = not os.path.isdir(path)
            files = [path] if is_named else list(self.files_under(path))
            if not files:
                raise UserError(f"{path} holds nothing to read: {self.summary_of_left_out()}")
            for file in files:
                self.files.setdefault(os.path.realpath(file), (file, is_named))

    def exclude(self, other):
        """Removes the files that another Reader reads."""
        for real_path in other.files:
            self.files.pop(real_path, None)

    def has_one_text(self):
        """Returns whether all that was read is one text without separators."""
        return self.kinds == {"text": 1}

    def files_under(self, folder):
        """Yields the paths of files under a folder, always in the same order. Follows links."""

        def leave_out_folder(error):
            self.left_out["unreadable"].append(error.filename)

        visited = set()
        for parent, folders, names in os.walk(folder, onerror=leave_out_folder, followlinks=True):
            real_path = os.path.realpath(parent)
            if real_path in visited:
                folders.clear()
                continue
            visited.add(real_path)
            folders[:] = [name for name in sorted(folders) if self.is_wanted(name, parent)]
            for name in sorted(names):
                path = os.path.join(parent, name)
                if not self.is_wanted(name, parent):
                    continue
                if not os.access(path, os.R_OK):
                    self.left_out["unreadable"].append(path)
                elif not os.path.isfile(path):
                    self.left_out["pipe or device"].append(path)
                else:
                    yield path

    def is_wanted(self, name, parent):
        """Returns whether to read what has this name in a folder or archive. If not, notes it."""
        if name.startswith(".") or name.endswith("~") or name.lower() in SYSTEM_FILES:
            self.left_out["hidden or of the system"].append(f"{parent}/{name}")
        elif name.removesuffix(".tmp") in OUTPUTS:
            self.left_out["written by prepare.py"].append(f"{parent}/{name}")
        else:
            return True
        return False

    def __iter__(self):
        """Yields pairs (text, is_end): a piece of a document, and whether the document ends there.

        Shows the share of bytes read in a progress bar. Raises UserError if a file is damaged or
        misread, if a file of paths is binary, or if there is no document at all.
        """
        total = 0
        for path, _ in self.files.values():
            if os.path.exists(path):
                total += os.stat(path).st_size
        options = dict(unit="B", unit_scale=True, desc="read", mininterval=1)
        with tqdm(total=total or None, **options) as bar:  # a pipe has size 0
            for path, is_named in self.files.values():
                try:
                    with open(path, "rb") as file:
                        counted = CallbackIOWrapper(bar.update, file, "read")
                        stream = Stream(counted, counted if file.seekable() else None)
                        yield from self.read(path, stream, is_named)
                except DAMAGE as error:
                    if getattr(error, "errno", None):  # of the system: no permission, a full disk
                        raise UserError(f"cannot read {path} ({error})") from None
                    reason = f"{type(error).__name__}: {error}"
                    raise UserError(
                        f"{path} is broken, cut off or unreadable ({reason}); fetch it again"
                    ) from None
        if not self.kinds:
            paths = ", ".join(self.paths)
            raise UserError(f"no usable document in {paths}: {self.summary_of_left_out()}")

    def read(self, name, stream, is_named=False):
        """Yields the pieces of a file, or of all files in an archive.

        Raises UserError and DAMAGE. A binary file raises UserError only if it is one of paths.
        """
        head = stream.head()
        base, suffix = os.path.splitext(name)
        suffix = suffix.lower()
        new_decompressor = decompressor_of(suffix, head)
        if not head:
            self.left_out["empty"].append(name)
        elif new_decompressor:
            if suffix in SUFFIXES:
                name = base + SUFFIXES[suffix]
            yield from self.read(name, Stream(decompress(stream, new_decompressor)), is_named)
        elif suffix == ".tar" or head[257:262] == b"ustar":
            yield from self.read_members(name, members_of_tar(stream))
        elif suffix == ".zip" or suffix == "" and head.startswith(b"PK\3\4"):
            # Zip files with other suffixes are documents and packages, such as .docx and .npz.
            yield from self.read_members(name, members_of_zip(name, stream))
        elif not is_binary(head):
            yield from self.read_text(name, suffix, stream, is_named)
        elif is_named:
            raise UserError(
                f"{name} is no text; save it as plain text (UTF-16 needs a byte order mark)"
            )
        else:
            self.left_out["binary"].append(name)

    def read_members(self, archive, members):
        """Yields the pieces of the files in an archive. members: see members_of_tar."""
        for member, file in members:
            parts = [part for part in member.split("/") if part not in ("", ".", "..")]
            if file is None:
                self.left_out["link or device"].append(f"{archive}/{member}")
            elif all(self.is_wanted(part, archive) for part in parts):
                yield from self.read(f"{archive}/{member}", Stream(file))

    def read_text(self, name, suffix, stream, is_named):
        """Yields the pieces of a file of text or JSON. Raises UserError if it is misread."""
        first_lines, pieces = peek_lines(self.decode(name, stream))
        is_json = suffix in JSON_SUFFIXES or are_json(first_lines)
        lines = Counter()  # "usable" and "unusable"
        if is_json:
            is_array = suffix == ".json" and "".join(first_lines).lstrip().startswith("[")
            documents = split_json(pieces, is_array, lines)
        else:
            documents = split_text(pieces, self.lines)
        count = 0
        for text, is_end in documents:
            count += is_end
            yield text, is_end

        unusable = lines["unusable"]
        if unusable and not lines["usable"] and suffix == ".json" and not is_named:
            self.left_out["JSON without a text"].append(name)
            return
        if unusable > lines["usable"]:
            raise UserError(
                f"{name} is no text in JSON: {unusable} of {plural(lines.total(), 'line')} are no "
                'objects with a field "text"; rename the field, or a file of text to X.txt'
            )
        if unusable:
            self.skipped[name] = unusable
        if not count:
            self.left_out["empty"].append(name)
            return
        kind = "separated" if count > 1 else "text"
        if self.lines:
            kind = "lines"
        self.kinds["json" if is_json else kind] += 1
        self.suffixes[suffix or "no suffix"] += 1

    def decode(self, name, stream):
        """Yields the text of a stream in pieces. Counts the bytes that cannot be decoded."""
        encoding, mark = encoding_of(stream.head())
        stream.read(len(mark))
        decoder = codecs.getincrementaldecoder(encoding)("replace_and_count")
        # Any line end becomes "\n".
        decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
        is_end = False
        while not is_end:
            data = stream.read(READ)
            is_end = not data
            before = REPLACED["bytes"]
            text = decoder.decode(data, is_end)
            if REPLACED["bytes"] > before:
                self.undecodable[name] += REPLACED["bytes"] - before
            if text:
                yield text

    def report(self):
        """Returns lines that say what was read, replaced, skipped and left out."""
        lines = [f"read {plural(self.suffixes.total(), 'file')}: {most_frequent(self.suffixes)}"]
        if self.left_out:
            lines.append(self.summary_of_left_out())
        if self.undecodable:
            count = plural(self.undecodable.total(), "byte")
            files = plural(len(self.undecodable), "file")
            lines.append(
                f"{count} in {files} cannot be decoded and became U+FFFD "
                f"(first: {next(iter(self.undecodable))}); "
                "convert to UTF-8, as with iconv -f LATIN1 -t UTF-8"
            )
        if self.skipped:
            names = first_of(list(self.skipped))
            lines.append(f"skipped {self.skipped.total():,} unusable lines of {names}")
        return lines

    def summary_of_left_out(self):
        """Returns a line that counts the files and folders left out."""
        count = 0
        parts = []
        for reason, names in self.left_out.items():
            count += len(names)
            parts.append(f"{len(names):,} {reason} ({first_of(names)})")
        if not parts:
            return "there is no file"
        return f"left out {plural(count, 'file')}: {', '.join(parts)}"


def plural(count, noun):
    """Returns a number and its noun, as in "1 file" and "2,000 files"."""
    return f"{count:,} {noun}" + ("s" if count != 1 else "")


def first_of(names):
    """Returns the first of some names, and dots if there are more."""
    return names[0] + (", ..." if len(names) > 1 else "")


def most_frequent(counts):
    """Returns the five most frequent keys of a Counter, as in "40 .txt, 1 .jsonl"."""
    parts = []
    others = counts.total()
    for key, count in counts.most_common(5):
        parts.append(f"{count:,} {key}")
        others -= count
    if others:
        parts.append(f"{others:,} others")
    return ", ".join(parts)


# --------------------------------------------------------------------------------------------------
# Bytes


class Stream:
    """Bytes of an open file, or of an iterator of bytes. The first of them can be looked at.

    file: the open file if a place in it can be sought, else None.
    """

    def __init__(self, source, file=None):
        self.file = file
        self.pieces = source
        if hasattr(source, "read"):
            self.pieces = iter(functools.partial(source.read, READ), b"")
        self.buffer = b""

    def fill(self, size):
        """Reads until the buffer holds size bytes, or more, or the source ends."""
        parts = [self.buffer]
        missing = size - len(self.buffer)
        while missing > 0:
            piece = next(self.pieces, None)
            if piece is None:
                break
            parts.append(piece)
            missing -= len(piece)
        self.buffer = b"".join(parts)

    def head(self):
        """Returns the first HEAD bytes, if none was read yet."""
        self.fill(HEAD)
        return self.buffer[:HEAD]

    def read(self, size):
        """Returns the next size bytes, or fewer at the end."""
        self.fill(size)
        data = self.buffer[:size]
        self.buffer = self.buffer[size:]
        return data


def new_gzip():
    """Returns a decompressor of gzip."""
    return zlib.decompressobj(16 + zlib.MAX_WBITS)


def new_zstd():
    """Returns a decompressor of zstandard. Raises UserError if the package is missing."""
    try:
        import zstandard
    except ImportError:
        raise UserError(".zst files need one more package: pip install zstandard") from None
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


# How compressed data begins, the suffixes of such files, and what decompresses them. A suffix has
# another in its place when the data are decompressed.
COMPRESSIONS = (
    (rb"\x1f\x8b\x08", {".gz": "", ".tgz": ".tar"}, new_gzip),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", {".bz2": "", ".tbz2": ".tar"}, bz2.BZ2Decompressor),
    (rb"\xfd7zXZ\0", {".xz": "", ".txz": ".tar"}, lzma.LZMADecompressor),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", {".zst": "", ".tzst": ".tar"}, new_zstd),
)
SUFFIXES = {}
for _, suffixes_of_kind, _ in COMPRESSIONS:
    SUFFIXES |= suffixes_of_kind


def decompressor_of(suffix, head):
    """Returns the function that makes a decompressor of a file, or None if it is not compressed."""
    for beginning, _, new_decompressor in COMPRESSIONS:
        if re.match(beginning, head):
            return new_decompressor
    # Whatever only has the suffix is damaged. Decompression says so.
    for _, suffixes, new_decompressor in COMPRESSIONS:
        if suffix in suffixes:
            return new_decompressor
    return None


def decompress(stream, new_decompressor):
    """Yields the bytes of a compressed stream. Several compressed files may follow each other.

    Raises OSError if the data are damaged, and EOFError if they are cut off.
    """
    decompressor = new_decompressor()
    data = stream.read(READ)
    while data:
        if decompressor.eof:
            decompressor = new_decompressor()
        try:
            piece = decompressor.decompress(data)
        except Exception as error:  # each package has its own class of errors
            raise OSError(str(error)) from None
        yield piece
        data = b""
        if decompressor.eof:
            # What remains belongs to the next file. Zeros may fill up a block.
            data = decompressor.unused_data.lstrip(b"\0")
        data = data or stream.read(READ)
    if not decompressor.eof:
        raise EOFError("compressed data end too early")


class StrictTarInfo(tarfile.TarInfo):
    """Reads the header of a tar member. Raises OSError if it is damaged or missing.

    tarfile itself takes a damaged or missing header for the end of the archive, so a part of the
    documents would be lost without a message.
    """

    @classmethod
    def fromtarfile(cls, tar):
        """Returns the next member of tar."""
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise  # this header marks the regular end of an archive
        except tarfile.HeaderError as error:
            raise OSError(f"{error} at byte {tar.offset}") from None


def members_of_tar(stream):
    """Yields the members of a tar archive: pairs (name, open file). Leaves out folders.

    The file is None for links and devices. Raises DAMAGE if the archive is damaged.
    """
    options = dict(mode="r|", bufsize=READ, tarinfo=StrictTarInfo)
    with tarfile.open(fileobj=stream, **options) as archive:
        for member in archive:
            if not member.isdir():
                yield member.name, archive.extractfile(member) if member.isfile() else None
            # tarfile keeps a record of each member. A long archive would fill the memory.
            archive.members = []


def members_of_zip(name, stream):
    """Yields the members of a zip archive, as members_of_tar does.

    Raises UserError if a member is encrypted or has an unknown compression. The table of a zip
    archive is at its end, so a copy is made of what is no file.
    """
    with tempfile.TemporaryFile() as copy:
        file = stream.file or copy
        if file is copy:
            shutil.copyfileobj(stream, copy, READ)
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if member.is_dir():
                    continue
                if stat.S_ISLNK(member.external_attr >> 16):
                    yield member.filename, None
                    continue
                try:
                    with archive.open(member) as opened:
                        yield member.filename, opened
                except RuntimeError as error:
                    raise UserError(f"{name} must be unpacked first ({error})") from None


def encoding_of(head):
    """Returns the encoding that a byte order mark names, and the mark."""
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding, mark
    return "utf-8", b""


def is_binary(head):
    """Returns whether the first bytes of a file are no text."""
    encoding, _ = encoding_of(head)
    text = head.decode(encoding, "replace").encode()
    controls = len(text) - len(text.translate(None, CONTROL))
    is_pdf = head.startswith(b"%PDF-")  # the first part of a PDF may be text
    return is_pdf or b"\0" in text or controls > MOST_CONTROL * len(text)


REPLACED = Counter()


def replace_and_count(error):
    """Handles a decoding error: U+FFFD replaces the bytes, and REPLACED["bytes"] counts them."""
    REPLACED["bytes"] += error.end - error.start
    return "\ufffd", error.end


codecs.register_error("replace_and_count", replace_and_count)


# --------------------------------------------------------------------------------------------------
# Text


def peek_lines(pieces):
    """Returns the first two lines that are not blank, or fewer, and an iterator over all pieces."""
    head = ""
    for piece in pieces:
        head += piece
        if head.lstrip().count("\n") > 1 or len(head) > FIRST_LINES:
            break
    lines = [line for line in head.split("\n") if line and not line.isspace()]
    return lines[:2], itertools.chain([head], pieces)


def are_json(lines):
    """Returns whether each line is a JSON object with a text, and there is one."""
    return bool(lines) and all(text_of_json(parse_json(line)) is not None for line in lines)


def split_text(pieces, lines):
    """Divides text into documents, and yields pairs (text, is_end) as Reader does.

    Separators divide, and so do line ends if lines is set. A document does not include the line
    ends around a separator. Blank documents are dropped.
    """
    divider = "\n" if lines else SEPARATOR
    buffer = ""  # what was not yielded of the current document
    is_new = False  # whether a divider came before the buffer
    for piece in pieces:
        buffer += piece
        if lines:
            buffer = buffer.replace(SEPARATOR, divider)
        *ended, buffer = buffer.split(divider)
        for text in ended:
            text = text.rstrip("\n")
            if is_new:
                text = text.lstrip("\n")
            if text and not text.isspace():
                yield from pieces_of(text)
            is_new = True
        if is_new:
            buffer = buffer.lstrip("\n")
        *parts, buffer = cut(buffer)
        for part in parts:
            is_new = False
            yield part, False
    if buffer and not buffer.isspace():
        yield from pieces_of(buffer)


def split_json(pieces, is_array, counts):
    """Yields the documents of lines of JSON, or of one array, as pairs (text, is_end).

    counts: a Counter that gets the numbers of "usable" and "unusable" values.
    """
    values = values_of_array(pieces) if is_array else map(parse_json, lines_of(pieces))
    for value in values:
        text = text_of_json(value)
        counts["unusable" if text is None else "usable"] += 1
        if text:
            yield from pieces_of(text)


def pieces_of(text):
    """Yields pairs (text, is_end) for a document, or for its rest."""
    *parts, last = cut(text)
    for part in parts:
        yield part, False
    yield last, True


def cut(text):
    """Yields a text in pieces of at most PIECE characters, and last what remains.

    Cuts after a line end, else before a space, else anywhere. The last piece may be longer: it
    holds a visible character, and what may be the beginning of a separator.
    """
    start = 0
    stop = 0
    if len(text) > PIECE:
        stop = len(text[: 1 - len(SEPARATOR)].rstrip()) - 1
    while start < stop and len(text) - start > PIECE:
        end = min(start + PIECE, stop)
        place = text.rfind("\n", start, end) + 1
        if not place:
            place = text.rfind(" ", start + 1, end)
        if place < 0:
            place = end
        yield text[start:place]
        start = place
    yield text[start:]


def lines_of(pieces):
    """Yields the lines that are not blank. Only "\\n" ends a line: a string may hold others."""
    rest = []
    for piece in itertools.chain(pieces, ["\n"]):
        first, *others = piece.split("\n")
        rest.append(first)
        if others:
            for line in ["".join(rest), *others[:-1]]:
                if line and not line.isspace():
                    yield line
            rest = [others[-1]]


def values_of_array(pieces):
    """Returns the elements of a JSON array. A string is a text too."""
    values = parse_json("".join(pieces))
    if not isinstance(values, list):
        return [None]
    return [{"text": value} if isinstance(value, str) else value for value in values]


def parse_json(text):
    """Returns the value that a text in JSON describes, or None if it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def text_of_json(value):
    """Returns the field "text" of a JSON object, or None if it has no such string."""
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        return None
    if text.isascii():
        return text  # at once: this is the most frequent case
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can hold half of a surrogate pair. UTF-8 cannot encode it, so it is replaced.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
