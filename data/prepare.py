"""Encodes documents as tokens. Writes train.bin, val.bin and meta.json.

Examples:

    python data/prepare.py                           # names: the names of Unicode characters
    python data/prepare.py docs                      # prose in docstrings of Python packages
    python data/prepare.py openwebtext2.jsonl.zst.tar --out=data/owt2
    python data/prepare.py my_folder --val=val.jsonl --encoding=gpt2

names and docs need no download. Files may be .txt, .jsonl, .jsonl.gz, .jsonl.zst, or a .tar of
these. A .jsonl file holds one JSON object per line, with the document in its field "text".

Each .bin file is an array of token ids: uint16, or uint32 if the vocabulary needs it. One
end-of-text token follows each document. Files are read as a stream, so memory use does not grow
with their size. All CPU cores encode.

A hash of its text decides whether a document belongs to train or to val. The order of the documents
has no influence.
"""

import argparse
import ast
import base64
import collections
import gzip
import hashlib
import json
import os
import sys
import sysconfig
import tarfile
import time
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import regex  # tiktoken depends on it too
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.config import UserError, run_script
from engine.corpus import GPT2_SPLIT, load_encoding

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".tar")
SUFFIXES_IN_TAR = SUFFIXES[:-1]
OUTPUTS = ("train.bin", "val.bin", "meta.json")

PIECE = 1 << 20  # bytes per read
BLOCK_PIECES = 8  # a block of documents to encode has about BLOCK_PIECES * PIECE bytes
JOBS_PER_CORE = 4  # a block is encoded in this many jobs per core
BPE_SAMPLE = 32 << 20  # characters from which a BPE is learned

# Names with these prefixes only number their characters.
NUMBERED_NAMES = (
    "CJK UNIFIED IDEOGRAPH",
    "CJK COMPATIBILITY IDEOGRAPH",
    "HANGUL SYLLABLE",
    "TANGUT IDEOGRAPH",
    "TANGUT COMPONENT",
    "NUSHU CHARACTER",
    "KHITAN SMALL SCRIPT CHARACTER",
    "EGYPTIAN HIEROGLYPH",
    "ANATOLIAN HIEROGLYPH",
    "CUNEIFORM SIGN",
    "SIGNWRITING",
    "VARIATION SELECTOR",
    "BAMUM LETTER",
    "YI SYLLABLE",
    "LINEAR A SIGN",
)

# Folders of packages that are not read for docs.
SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "site-packages", "idlelib", "lib2to3"}


# --------------------------------------------------------------------------------------------------
# Embedded corpora


def names():
    """Yields the name of each Unicode character in lower case. Skips NUMBERED_NAMES."""
    for code_point in range(sys.maxunicode + 1):
        name = unicodedata.name(chr(code_point), "")
        if name and not name.startswith(NUMBERED_NAMES):
            yield name.lower()


def docs():
    """Yields paragraphs of prose from the docstrings of the standard library, torch and numpy.

    The source files are parsed, not imported. Each paragraph comes once.
    """
    import torch  # only to find its folder

    roots = [
        Path(sysconfig.get_paths()["stdlib"]),
        Path(torch.__file__).parent,
        Path(np.__file__).parent,
    ]
    seen = set()
    for root in roots:
        for path in python_files(root):
            for text in docstring_paragraphs(path):
                if is_prose(text) and text.lower() not in seen:
                    seen.add(text.lower())
                    yield text


def python_files(root):
    """Yields the .py files under the folder root, sorted, without those in SKIPPED_FOLDERS."""
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if not SKIPPED_FOLDERS.intersection(folders):
            yield path


def docstring_paragraphs(path):
    """Yields each paragraph of each docstring in a Python file, with single spaces between words.

    A file that cannot be read or parsed yields nothing.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node) or ""
            for paragraph in regex.split(r"\n\s*\n", docstring):
                yield " ".join(paragraph.split())


def is_prose(text):
    """Returns whether text looks like sentences, not like code, a list or a table."""
    if len(text) < 20 or ">>>" in text:
        return False
    if not text[0].isupper() or text[-1] != ".":
        return False
    plain = 0
    for character in text:
        if character.isalpha() or character in " ,.'":
            plain += 1
    return plain >= 0.93 * len(text)


EMBEDDED = {"names": names, "docs": docs}


# --------------------------------------------------------------------------------------------------
# Files and folders


class Files:
    """The documents of files and folders. Each call returns a new iterator over all of them.

    paths: the files, in the order in which they are read.
    bad: the number of lines that the last iteration skipped because they hold no document.

    Raises UserError if a path does not exist, or is a folder without any usable file. Iteration
    raises UserError if a file is damaged or holds no document.
    """

    def __init__(self, paths):
        self.paths = []
        self.bad = 0
        for path in map(Path, paths):
            found = [path]
            if path.is_dir():
                found = usable_files(path)
            if not path.exists() or not found:
                suffixes = ", ".join(SUFFIXES)
                raise UserError(f"{path} is missing or holds no file that ends in {suffixes}")
            self.paths += found

    def exclude(self, other):
        """Removes the files that another Files object reads."""
        excluded = {path.resolve() for path in other.paths}
        self.paths = [path for path in self.paths if path.resolve() not in excluded]

    def __call__(self):
        """Yields each document as a string, and shows the share of bytes read in a progress bar."""
        self.bad = 0
        total = sum(path.stat().st_size for path in self.paths)
        with tqdm(total=total, unit="B", unit_scale=True, desc="read", mininterval=1) as bar:
            for path in self.paths:
                yield from self.documents_of_path(path, bar)

    def documents_of_path(self, path, bar):
        """Yields the documents of one file. Raises UserError if it is damaged or has none."""
        is_empty = True
        try:
            with open(path, "rb") as file:
                for text in self.documents(path.name, ProgressReader(file, bar)):
                    is_empty = False
                    yield text
        except (EOFError, OSError, tarfile.TarError, zlib.error) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{path} is broken, cut off or unreadable ({reason}); fetch it again"
            ) from None
        if is_empty:
            raise UserError(
                f"no usable document in {path}: expected text, or lines of JSON with a text field"
            )

    def documents(self, name, file):
        """Yields the documents of an open file. The name determines the format."""
        if name.endswith(".tar"):
            yield from self.documents_of_tar(file)
        elif name.endswith(".txt"):
            yield from documents_of_text(file)
        else:
            yield from self.documents_of_json_lines(name, file)

    def documents_of_tar(self, file):
        """Yields the documents of all usable members of a tar archive, in one pass over it."""
        with tarfile.open(fileobj=file, mode="r|", tarinfo=StrictTarInfo) as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(SUFFIXES_IN_TAR):
                    yield from self.documents(member.name, tar.extractfile(member))
                # tarfile keeps a record of each member. A long archive would fill the memory.
                tar.members = []

    def documents_of_json_lines(self, name, file):
        """Yields the document of each line. Counts lines that hold none in self.bad."""
        for chunk in chunks_of_lines(decompressed_pieces(name, file)):
            for line in chunk.splitlines():
                try:
                    text = document_of_json(line)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    if line.strip():
                        self.bad += 1
                    continue
                if text:
                    yield text


def usable_files(folder):
    """Returns the sorted paths of all files under a folder that end in one of SUFFIXES."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and path.name.endswith(SUFFIXES):
            found.append(path)
    return sorted(found)


def documents_of_text(file):
    """Yields a text file as one document.

    A long file is cut at line ends into several documents, so that memory use stays constant.
    """
    for chunk in chunks_of_lines(read_pieces(file)):
        yield chunk.decode("utf-8", "replace")


def document_of_json(line):
    """Returns the text field of a JSON object. line: bytes.

    If the line holds no such object, raises ValueError, KeyError, TypeError, AttributeError or
    RecursionError.
    """
    text = json.loads(line)["text"]
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can hold half of a surrogate pair. UTF-8 cannot encode it, so it is replaced.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


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


class ProgressReader:
    """A binary file that adds the number of bytes of each read to a tqdm bar."""

    def __init__(self, file, bar):
        self.file = file
        self.bar = bar

    def read(self, size=-1):
        """Returns up to size bytes, or all that remain if size is -1."""
        data = self.file.read(size)
        self.bar.update(len(data))
        return data


def read_pieces(file):
    """Yields the bytes of a file in pieces of at most PIECE bytes."""
    while True:
        piece = file.read(PIECE)
        if not piece:
            return
        yield piece


def decompressed_pieces(name, file):
    """Yields the bytes of a file in pieces. Decompresses them if the name ends in .gz or .zst.

    Damaged data raises EOFError, OSError or zlib.error.
    """
    if name.endswith(".gz"):
        file = gzip.GzipFile(fileobj=file)
    pieces = read_pieces(file)
    if name.endswith(".zst"):
        pieces = decompress_zstd(pieces)
    return pieces


def decompress_zstd(pieces):
    """Yields the decompressed bytes of zstandard frames. Several frames may follow each other.

    Raises UserError if the zstandard package is missing, OSError if the data are damaged, and
    EOFError if the last frame is incomplete.
    """
    try:
        import zstandard
    except ImportError:
        raise UserError(".zst files need one more package: pip install zstandard") from None

    def new_frame():
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    frame = new_frame()
    try:
        for piece in pieces:
            while piece:
                if frame.eof:
                    frame = new_frame()
                yield frame.decompress(piece)
                # If the frame ends within the piece, the rest belongs to the next frame.
                piece = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from None
    if not frame.eof:
        raise EOFError("the stream ends in the middle of a frame")


def chunks_of_lines(pieces):
    """Joins pieces of bytes into chunks of at least PIECE bytes. Each chunk ends at a line end.

    The last chunk may be shorter and may end without a line end.
    """
    parts = []
    size = 0
    for piece in pieces:
        end = piece.rfind(b"\n") + 1
        if end and size + end >= PIECE:
            parts.append(piece[:end])
            chunk = b"".join(parts)
            parts = []
            size = 0
            piece = piece[end:]
            yield chunk
        parts.append(piece)
        size += len(piece)
    if size:
        yield b"".join(parts)


# --------------------------------------------------------------------------------------------------
# A small byte-level BPE


def train_bpe(documents, vocab_size):
    """Learns a byte-level BPE from the first BPE_SAMPLE characters of the documents.

    The vocabulary starts with 256 bytes and the end-of-text token. Merges of frequent pairs of
    tokens add the other vocab_size - 257 tokens.

    Returns the tokens in the file format of tiktoken: one line per token, with the token in base64
    and its rank. End-of-text is not in the list. Raises UserError if the documents have too few
    frequent pairs.
    """
    words = Words(count_words(documents))
    tokens = [bytes([byte]) for byte in range(256)]
    known = set(tokens)
    with tqdm(total=vocab_size - 257, desc="bpe", mininterval=1) as bar:
        while len(tokens) < vocab_size - 1:
            pair = words.most_frequent_pair()
            if pair is None:
                raise UserError(
                    f"the corpus is too small for --vocab_size={vocab_size}; "
                    f"it has {len(tokens) + 1} useful tokens"
                )
            token = pair[0] + pair[1]
            if token not in known:  # an earlier merge of another pair may give the same bytes
                tokens.append(token)
                known.add(token)
                bar.update()
            words.merge(pair)
    lines = []
    for rank, token in enumerate(tokens):
        lines.append(f"{base64.b64encode(token).decode()} {rank}\n")
    return "".join(lines)


def count_words(documents):
    """Returns a Counter of the words in the first BPE_SAMPLE characters.

    The regular expression GPT2_SPLIT defines words.
    """
    counts = collections.Counter()
    size = 0
    for text in documents:
        counts.update(regex.findall(GPT2_SPLIT, text))
        size += len(text)
        if size > BPE_SAMPLE:
            break
    return counts


class Words:
    """The different words of a text as lists of tokens, and the frequencies of adjacent tokens.

    A merge changes only the words that contain its pair. An index finds these words.
    """

    def __init__(self, word_counts):
        self.words = []
        self.weights = []  # how often each word occurs in the text
        self.pairs = collections.Counter()  # how often each pair of tokens occurs in the text
        self.where = collections.defaultdict(set)  # pair: indices of words that may contain it
        for index, (word, weight) in enumerate(word_counts.items()):
            self.words.append([bytes([byte]) for byte in word.encode()])
            self.weights.append(weight)
            self.add_pairs(index)

    def add_pairs(self, index):
        """Counts the pairs of one word."""
        word = self.words[index]
        for pair in zip(word, word[1:]):
            self.pairs[pair] += self.weights[index]
            self.where[pair].add(index)

    def remove_pairs(self, index):
        """Subtracts the pairs of one word from the counts."""
        word = self.words[index]
        for pair in zip(word, word[1:]):
            self.pairs[pair] -= self.weights[index]

    def most_frequent_pair(self):
        """Returns the most frequent pair, or None if no pair occurs twice.

        If several pairs have the highest frequency, returns the one that is last in byte order.
        The result does not depend on the order of the words.
        """
        best = max(self.pairs, key=lambda pair: (self.pairs[pair], pair), default=None)
        if best is None or self.pairs[best] < 2:
            return None
        return best

    def merge(self, pair):
        """Replaces the pair by one token in all words."""
        for index in self.where.pop(pair):
            self.remove_pairs(index)
            self.words[index] = merge_pair(self.words[index], pair)
            self.add_pairs(index)
        del self.pairs[pair]


def merge_pair(word, pair):
    """Returns the tokens of a word after each occurrence of the pair became one token."""
    merged = []
    position = 0
    while position < len(word):
        if tuple(word[position : position + 2]) == pair:
            merged.append(pair[0] + pair[1])
            position += 2
        else:
            merged.append(word[position])
            position += 1
    return merged


# --------------------------------------------------------------------------------------------------
# Writing train.bin and val.bin


def write_bins(out, encoding, eot, dtype, sources, val_fraction):
    """Encodes all documents, and writes them to train.bin.tmp and val.bin.tmp in the folder out.

    encoding: a tiktoken.Encoding.
    eot: the id of the end-of-text token.
    dtype: the type of token ids in the files.
    sources: pairs (split, source). source() returns the documents. The split is "train", "val", or
        "by hash", which divides the documents between both.
    val_fraction: the share of documents that "by hash" gives to val.

    Returns count, lengths and digest. count[split] is [tokens, documents]. lengths is a Counter of
    the numbers of tokens per document. digest is the SHA-256 of all text, in hexadecimal.
    """
    digest = hashlib.sha256()
    encoder = Encoder(encoding, eot, dtype)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        writer = BinWriter(out, encoder, pool)
        for split, source in sources:
            for text in source():
                raw = text.encode()
                digest.update(raw + b"\0")
                if split == "by hash":
                    writer.add(split_by_hash(raw, val_fraction), text, len(raw))
                else:
                    writer.add(split, text, len(raw))
        writer.finish()
    return writer.count, writer.lengths, digest.hexdigest()


def split_by_hash(raw, val_fraction):
    """Returns "train" or "val" for a document. raw: its text as UTF-8 bytes."""
    digest = hashlib.blake2b(raw, digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64  # uniform between 0 and 1
    if position < val_fraction:
        return "val"
    return "train"


class Encoder:
    """Encodes documents as arrays of token ids, each followed by an end-of-text token."""

    def __init__(self, encoding, eot, dtype):
        self.encoding = encoding
        self.eot = eot
        self.dtype = dtype
        # The main thread must encode first. Measured: if a thread of the pool is the first to use
        # tiktoken's regex, all threads take 1.5 times as long.
        encoding.encode_ordinary("the main thread goes first")

    def encode(self, text):
        """Returns the token ids of text, without an end-of-text token."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            # tiktoken fails on a million spaces in a row, but not on each half of them.
            middle = len(text) // 2
            return np.append(self.encode(text[:middle]), self.encode(text[middle:]))

    def encode_all(self, texts):
        """Returns a list with one array per text.

        Threads can run this in parallel: tiktoken releases Python's global lock while it encodes.
        """
        arrays = []
        for text in texts:
            arrays.append(np.append(self.encode(text), self.eot).astype(self.dtype))
        return arrays


class BinWriter:
    """Encodes documents in blocks with a thread pool, and writes them to files in their order.

    The pool encodes one block while the next one is read. Raises OSError if it cannot write.
    """

    def __init__(self, out, encoder, pool):
        self.encoder = encoder
        self.pool = pool
        self.count = {"train": [0, 0], "val": [0, 0]}  # tokens, documents
        self.lengths = collections.Counter()  # number of tokens: number of documents
        self.splits = []  # the split of each document in the current block
        self.texts = []  # the text of each document in the current block
        self.block_size = 0  # bytes
        self.pending = collections.deque()  # blocks in the pool, as pairs (splits, results)
        self.files = {}
        for split in self.count:
            self.files[split] = open(out / f"{split}.bin.tmp", "wb")

    def add(self, split, text, size):
        """Appends a document to a split. size: its number of bytes."""
        self.splits.append(split)
        self.texts.append(text)
        self.block_size += size
        if self.block_size > BLOCK_PIECES * PIECE:
            self.submit_block()
            if len(self.pending) > 1:
                self.write_oldest_block()

    def finish(self):
        """Writes what remains, and closes the files."""
        self.submit_block()
        while self.pending:
            self.write_oldest_block()
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def submit_block(self):
        """Gives the current block to the pool, and starts a new block."""
        number_of_jobs = os.cpu_count() * JOBS_PER_CORE
        # Job k gets the documents k, k + number_of_jobs, and so on, so jobs have similar sizes.
        results = []
        for job in range(number_of_jobs):
            job_texts = self.texts[job::number_of_jobs]
            results.append(self.pool.submit(self.encoder.encode_all, job_texts))
        self.pending.append((self.splits, results))
        self.splits = []
        self.texts = []
        self.block_size = 0

    def write_oldest_block(self):
        """Waits for the oldest block in the pool, and writes it."""
        splits, results = self.pending.popleft()
        for index, split in enumerate(splits):
            job = index % len(results)
            token_ids = results[job].result()[index // len(results)]
            self.files[split].write(token_ids.data)
            self.count[split][0] += len(token_ids)
            self.count[split][1] += 1
            self.lengths[len(token_ids)] += 1


# --------------------------------------------------------------------------------------------------
# The script


def parse_arguments():
    """Returns the options of the command line, with defaults that depend on the corpus.

    A wrong option ends the script with a message and exit code 2.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    args = parser.parse_args()
    fill_defaults(args)
    if not 0 < args.val_fraction < 1:
        parser.error("--val_fraction must lie between 0 and 1")
    if not 258 <= args.vocab_size <= 2**31:
        parser.error("--vocab_size must be at least 258: 256 bytes, end-of-text and one merge")
    return args


def add_options(parser):
    """Adds all options to an argparse parser."""
    parser.add_argument(
        "paths",
        nargs="*",
        default=["names"],
        metavar="names|docs|PATH",
        help="an embedded corpus (default: names), or files and folders",
    )
    parser.add_argument(
        "--out",
        help="folder to write (default: data/ and the name of the corpus)",
    )
    parser.add_argument(
        "--val",
        help="file or folder of val documents, instead of a share of the other documents",
    )
    parser.add_argument(
        "--val_fraction",
        type=float,
        help="share of val documents (default: 0.05 for names and docs, 0.005 for files)",
    )
    parser.add_argument(
        "--encoding",
        choices=["gpt2", "bpe"],
        help="GPT-2's BPE (default for files), or a new BPE (default for names and docs)",
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=4096,
        help="number of tokens of a new BPE (default: 4096)",
    )
    parser.add_argument(
        "--layout",
        choices=["documents", "stream"],
        help="a training row is one document (default for names and docs), "
        "or a window of the stream of all documents (default for files)",
    )


def fill_defaults(args):
    """Sets the options that were not given and whose defaults depend on the corpus."""
    args.is_embedded = len(args.paths) == 1 and args.paths[0] in EMBEDDED
    if args.val_fraction is None:
        args.val_fraction = 0.05 if args.is_embedded else 0.005
    if args.encoding is None:
        args.encoding = "bpe" if args.is_embedded else "gpt2"
    if args.layout is None:
        args.layout = "documents" if args.is_embedded else "stream"


def open_source(args):
    """Returns a function that returns the documents. It can be called several times.

    Raises UserError if a path is missing.
    """
    if not args.is_embedded:
        return Files(args.paths)
    print("prepare: names take a few seconds, docs take half a minute", flush=True)
    documents = list(EMBEDDED[args.paths[0]]())

    def source():
        return documents

    return source


def output_folder(args):
    """Returns the folder to write as a Path. The default has the name of the first path."""
    if args.out:
        return Path(args.out)
    name = Path(args.paths[0]).resolve().name
    return Path("data") / name.split(".")[0]


def make_tokenizer(args, source):
    """Returns a dict that describes the tokenizer, as meta.json and checkpoints hold it.

    Learns a BPE from the source if the options ask for it. Raises UserError if it cannot.
    """
    if args.encoding == "gpt2":
        return {"encoding": "gpt2", "vocab_size": 50257, "eot": 50256}
    return {
        "encoding": "bpe",
        "vocab_size": args.vocab_size,
        "eot": args.vocab_size - 1,
        "bpe": train_bpe(source(), args.vocab_size),
    }


def write_corpus(out, args, tokenizer, encoding, sources):
    """Writes train.bin, val.bin and meta.json to the folder out. Returns the content of meta.json.

    sources: see write_bins. Existing files are replaced only when all new files are complete.
    Raises UserError if a source is unusable, a split gets no document, or out cannot be written.
    """
    is_new = not out.exists()
    dtype = "uint16" if tokenizer["vocab_size"] <= 2**16 else "uint32"
    try:
        out.mkdir(parents=True, exist_ok=True)
        count, lengths, digest = write_bins(
            out, encoding, tokenizer["eot"], dtype, sources, args.val_fraction
        )
        check_splits(count, args.val_fraction)
        meta = {
            **tokenizer,
            "dtype": dtype,
            "layout": args.layout,
            "tokens": {split: count[split][0] for split in count},
            "documents": {split: count[split][1] for split in count},
            "source": args.paths,
            "sha256": digest,
            "unicode": unicodedata.unidata_version,
            # Training on documents uses rows of this length. Longer documents are rare.
            "longest": length_of_share(lengths, 0.99),
        }
        (out / "meta.json.tmp").write_text(json.dumps(meta, indent=1))
        for name in OUTPUTS:
            os.replace(out / f"{name}.tmp", out / name)
    except OSError as error:
        raise UserError(f"cannot write --out={out} ({error})") from None
    finally:
        remove_leftovers(out, is_new)
    return meta


def check_splits(count, val_fraction):
    """Raises UserError if a split has no document. count: see write_bins."""
    total = count["train"][1] + count["val"][1]
    for split in count:
        if not count[split][1]:
            raise UserError(
                f"none of {total} documents fell to {split}; give --val=FILE, more documents, "
                f"or another --val_fraction than {val_fraction}"
            )


def length_of_share(lengths, share):
    """Returns the smallest length that at least this share of documents does not exceed.

    lengths: a Counter, from the number of tokens to the number of documents.
    """
    table = np.array(sorted(lengths.items()))
    documents_up_to = table[:, 1].cumsum()
    row = np.searchsorted(documents_up_to, share * documents_up_to[-1])
    return int(table[row, 0])


def remove_leftovers(out, is_new):
    """Removes temporary files in out. Removes out too if it is new and empty."""
    if not out.is_dir():
        return
    for name in OUTPUTS:
        (out / f"{name}.tmp").unlink(missing_ok=True)
    if is_new and not any(out.iterdir()):
        out.rmdir()


def print_report(meta, seconds, sources):
    """Prints a summary. sources: see write_bins."""
    total = sum(meta["tokens"].values())
    rate = total / seconds / 1e6
    # bench/speed.py reads this line.
    print(f"{total:,} tokens in {seconds:.1f} seconds, {rate:.2f} million a second")
    for split in meta["tokens"]:
        documents = meta["documents"][split]
        tokens = meta["tokens"][split]
        print(f"{split}: {documents:,} documents, {tokens:,} tokens")
    for split, source in sources:
        if isinstance(source, Files) and source.bad:
            first_paths = ", ".join(map(str, source.paths[:3]))
            print(f"skipped {source.bad} unusable lines of {first_paths}")
    print(
        f"sha256 {meta['sha256'][:16]}, Unicode {meta['unicode']}, "
        f"99% of documents have at most {meta['longest']} tokens"
    )


def main():
    """Runs the script with the options of the command line."""
    args = parse_arguments()
    source = open_source(args)
    sources = [("by hash", source)]
    if args.val:
        val = Files([args.val])
        if not args.is_embedded:
            source.exclude(val)  # val documents may lie in a folder that is read for train
        sources = [("train", source), ("val", val)]

    out = output_folder(args)
    tokenizer = make_tokenizer(args, source)
    encoding = load_encoding(tokenizer)
    print(
        f"prepare: {', '.join(args.paths)} -> {out}, "
        f"{tokenizer['encoding']} of {tokenizer['vocab_size']} tokens",
        flush=True,
    )

    start = time.time()
    meta = write_corpus(out, args, tokenizer, encoding, sources)
    seconds = time.time() - start
    print_report(meta, seconds, sources)


if __name__ == "__main__":
    run_script(main)
