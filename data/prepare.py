"""Encodes text as tokens. Writes train.bin, val.bin and meta.json, and prints what to run next.

Examples:

    python data/prepare.py                           # names: the names of Unicode characters
    python data/prepare.py docs                      # prose in docstrings of Python packages
    python data/prepare.py input.txt                 # any text
    python data/prepare.py names.txt --lines         # a text with a document in each line
    python data/prepare.py openwebtext2.jsonl.zst.tar --out=data/owt2
    python data/prepare.py my_folder --val=val.jsonl --encoding=gpt2

names and docs need no download. Files may hold text, or JSON lines with the document in their field
"text", and may lie in tar and zip archives and in compressed files. The line <|endoftext|> divides
a text file into documents.

Each .bin file is an array of token ids: uint16, or uint32 if the vocabulary needs it. One
end-of-text token follows each document. Files are read as a stream, once. All CPU cores encode.

A hash of its text decides whether a document belongs to train or to val, so the order of the
documents has no influence. If the first 100 MB hold few documents, the end of all is val.
"""

import argparse
import collections
import hashlib
import itertools
import json
import os
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.advice import next_commands
from data.bpe import train_bpe
from data.embedded import EMBEDDED
from data.reading import OUTPUTS, Reader, plural
from engine.checkpoint import temporary_path
from engine.corpus import GPT2, load_encoding
from engine.config import UserError
from engine.terminal import lock, run_script

SMALL = 100 << 20  # characters. A text of up to this size gets a BPE of its own.
FEW = 100  # documents. So few are not divided by their hashes.
SEVERAL = 10  # documents. Of fewer, a part of one may be val.
LONGEST_ROW = 64  # tokens. Where nearly all documents are shorter, each is a row by itself.
BLOCK = 8 << 20  # characters that are encoded at once
JOBS_PER_CORE = 4  # a block is encoded in this many jobs per core


# --------------------------------------------------------------------------------------------------
# Encoding


class Encoder:
    """Encodes pieces of documents as arrays of token ids."""

    def __init__(self, encoding, eot, dtype):
        self.encoding = encoding
        self.eot = eot
        self.dtype = dtype
        # The main thread must encode first. Measured: if a thread of the pool is the first to use
        # tiktoken's regex, all threads take 1.5 times as long.
        encoding.encode("the main thread goes first")

    def encode(self, text):
        """Returns the token ids of text, without an end-of-text token."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            # tiktoken fails on a million spaces in a row, but not on each half of them.
            middle = len(text) // 2
            return np.append(self.encode(text[:middle]), self.encode(text[middle:]))

    def encode_all(self, pieces):
        """Returns a list with one array per piece. A document's last piece gets an end-of-text.

        Threads can run this in parallel: tiktoken releases Python's global lock while it encodes.
        """
        arrays = []
        for text, is_end in pieces:
            token_ids = self.encode(text)
            if is_end:
                token_ids = np.append(token_ids, self.eot)
            arrays.append(token_ids.astype(self.dtype))
        return arrays


class BinWriter:
    """Encodes documents in blocks with a thread pool, and writes them to files in their order.

    The pool encodes one block while the next one is read. Raises OSError if it cannot write.

    count       count[split] is [tokens, documents]
    lengths     a Counter of the numbers of tokens per document
    """

    def __init__(self, paths, encoder, pool):
        """paths: a dict from "train" and "val" to the path of a file."""
        self.encoder = encoder
        self.pool = pool
        self.count = {"train": [0, 0], "val": [0, 0]}
        self.lengths = collections.Counter()
        self.length = 0  # tokens of the current document
        self.marks = []  # the split and is_end of each piece in the current block
        self.pieces = []
        self.block_size = 0  # characters
        self.pending = collections.deque()  # blocks in the pool, as (marks, results)
        self.files = {split: open(path, "wb") for split, path in paths.items()}

    def add(self, split, text, is_end):
        """Appends a piece of a document to a split. is_end: whether the document ends with it."""
        self.marks.append((split, is_end))
        self.pieces.append((text, is_end))
        self.block_size += len(text)
        if self.block_size > BLOCK:
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
        # Job k gets the pieces k, k + number_of_jobs, and so on, so jobs have similar sizes.
        results = []
        for job in range(number_of_jobs):
            of_job = self.pieces[job::number_of_jobs]
            results.append(self.pool.submit(self.encoder.encode_all, of_job))
        self.pending.append((self.marks, results))
        self.marks = []
        self.pieces = []
        self.block_size = 0

    def write_oldest_block(self):
        """Waits for the oldest block in the pool, and writes it."""
        marks, results = self.pending.popleft()
        for index, (split, is_end) in enumerate(marks):
            job = index % len(results)
            token_ids = results[job].result()[index // len(results)]
            self.files[split].write(token_ids.data)
            self.count[split][0] += len(token_ids)
            self.length += len(token_ids)
            if is_end:
                self.count[split][1] += 1
                self.lengths[self.length] += 1
                self.length = 0


def split_by_hash(raw, val_fraction):
    """Returns "train" or "val" for a document. raw: its text as UTF-8 bytes."""
    digest = hashlib.blake2b(raw, digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64  # uniform between 0 and 1
    if position < val_fraction:
        return "val"
    return "train"


def write_documents(writer, pieces, split, val_fraction, digest):
    """Gives documents to a BinWriter.

    pieces: pairs (text, is_end).
    split: "train", "val", or "by hash", which divides the documents between both. The first piece
        of a document decides.
    digest: a hashlib object, to which the text is added.
    """
    chosen = None
    for text, is_end in pieces:
        raw = text.encode()
        digest.update(raw)
        if chosen is None:
            chosen = split_by_hash(raw, val_fraction) if split == "by hash" else split
        writer.add(chosen, text, is_end)
        if is_end:
            digest.update(b"\0")
            chosen = None


def cut_off_val(paths, dtype, eot, val_fraction, is_between_documents):
    """Moves the end of the train file to the val file.

    is_between_documents: whether to cut between two documents, or at any token.

    Returns count: see BinWriter. Raises UserError if there is no place to cut.
    """
    tokens = np.memmap(paths["train"], dtype, "r")
    cut = min(max(round(len(tokens) * (1 - val_fraction)), 1), len(tokens) - 1)
    if is_between_documents:
        ends = np.flatnonzero(tokens[:-1] == eot) + 1
        if not len(ends):
            raise UserError(
                "there is only one document, and val needs one too; "
                "give --val=FILE, or --layout=stream"
            )
        cut = ends[np.abs(ends - cut).argmin()]
    parts = {"train": tokens[:cut], "val": tokens[cut:]}
    count = {}
    for split, part in parts.items():
        count[split] = [len(part), max(int((part == eot).sum()), 1)]
    with open(paths["val"], "wb") as file:
        file.write(parts["val"].data)
        file.flush()
        os.fsync(file.fileno())
    os.truncate(paths["train"], parts["train"].nbytes)
    return count


# --------------------------------------------------------------------------------------------------
# The script


def parse_arguments():
    """Returns the options of the command line.

    A wrong option ends the script with a message and exit code 2.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "paths",
        nargs="*",
        default=["names"],
        metavar="names|docs|PATH",
        help="an embedded corpus (default: names), or files, folders and pipes",
    )
    parser.add_argument("--out", help="folder to write (default: data/ and the name of the corpus)")
    parser.add_argument(
        "--val", help="file or folder of val documents, instead of a share of the others"
    )
    parser.add_argument(
        "--val_fraction",
        type=float,
        help="share of val (default: 0.1; names, docs: 0.05; more than 100 MB: 0.005)",
    )
    parser.add_argument(
        "--encoding",
        choices=["gpt2", "bpe"],
        help="GPT-2's BPE (default for more than 100 MB of text), or a new BPE (default for less)",
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        help="number of tokens of a new BPE (default: by the size of the text, at most 4096)",
    )
    parser.add_argument(
        "--layout",
        choices=["documents", "stream"],
        help="a training row is one document (default where documents are short), "
        "or a window of the stream of all documents",
    )
    parser.add_argument(
        "--lines", action="store_true", help="each line of a text file is a document"
    )
    args = parser.parse_args()
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        parser.error("--val_fraction must lie between 0 and 1")
    if args.val and args.val_fraction is not None:
        parser.error("--val_fraction has no effect with --val; leave one of them out")
    if args.vocab_size is not None and args.encoding == "gpt2":
        parser.error("--vocab_size is for --encoding=bpe; GPT-2's has 50257 tokens")
    if args.vocab_size is not None and not 258 <= args.vocab_size <= 2**31:
        parser.error("--vocab_size must be at least 258: 256 bytes, end-of-text and one merge")
    args.embedded = find_embedded(args.paths)
    if args.embedded and args.lines:
        parser.error(f"--lines is for text files; {args.embedded} has documents")
    return args


def find_embedded(paths):
    """Returns the name of the embedded corpus that paths ask for, or None.

    A file or folder of that name in the working directory comes first. This project's own folder
    docs holds no corpus.
    """
    name = paths[0]
    if len(paths) > 1 or name not in EMBEDDED:
        for path in paths:
            if path in EMBEDDED and not Path(path).exists():
                raise UserError(f"{path} is an embedded corpus, which is prepared by itself")
        return None
    here = Path(name).resolve()
    if here.exists() and here.parent != Path(__file__).resolve().parent.parent:
        print(f"prepare: {name} is the one in this folder, and not the embedded corpus")
        return None
    return name


def output_folder(args):
    """Returns the folder to write as a Path. The default has the name of the first path."""
    if args.out:
        return Path(args.out).expanduser()
    path = Path(args.paths[0]).expanduser()
    name = "stdin" if path.name == "-" else path.name
    if name in ("", ".."):
        name = path.resolve().name
    return Path("data") / (name.strip(".").split(".")[0] or "text")


def open_sources(args):
    """Returns the readers of train documents and of val documents.

    The second is None without --val. Both yield pairs (text, is_end). Raises UserError if a path
    is missing.
    """
    val = Reader([args.val], args.lines) if args.val else None
    if args.embedded:
        print("prepare: names take a few seconds, docs take half a minute", flush=True)
        bar = tqdm(EMBEDDED[args.embedded](), desc="read", unit=" documents", mininterval=1)
        return ((text, True) for text in bar), val
    train = Reader(args.paths, args.lines)
    if val:
        train.exclude(val)  # val documents may lie in a folder that is read for train
        if not train.files:
            raise UserError(f"--val={args.val} names all files; none is left for train")
    return train, val


def read_up_to(size, pieces):
    """Reads pieces until they have more than size characters.

    Returns a list of them, and whether these are all.
    """
    found = []
    for text, is_end in pieces:
        found.append((text, is_end))
        size -= len(text)
        if size < 0:
            return found, False
    return found, True


def default_encoding(args, is_all):
    """Returns "bpe" for a small text, and "gpt2" for a large one. is_all: whether it is small."""
    if is_all or args.vocab_size:
        return "bpe"
    try:
        load_encoding(GPT2)
    except UserError as error:
        print(f"prepare: {error}; a new BPE takes its place")
        return "bpe"
    return "gpt2"


def make_tokenizer(args, first, is_all):
    """Returns a dict that describes the tokenizer, as meta.json and checkpoints hold it.

    first: the first pieces of the text. is_all: whether these are all.
    """
    encoding = args.encoding or default_encoding(args, is_all)
    if encoding == "gpt2":
        return GPT2
    wanted = args.vocab_size
    if wanted is None:
        size = sum(len(text) for text, _ in first)
        # A token should occur often enough that its embedding is learnt.
        wanted = 4096 if args.embedded else min(4096, max(512, size // 175))
    ranks, size = train_bpe((text for text, _ in first), wanted)
    if args.vocab_size and size < wanted:
        print(f"prepare: the text has no use for more than {size} tokens; --vocab_size={size}")
    return {"encoding": "bpe", "vocab_size": size, "eot": size - 1, "bpe": ranks}


def write_bins(out, args, tokenizer, pieces, val):
    """Encodes all documents into train.bin.tmp and val.bin.tmp in the folder out.

    pieces, val: pairs (text, is_end). val is None if a share of the others is val.
    args: with args.val_fraction and args.is_few, which tells to take the end of the text as val.

    Returns the fields of meta.json that follow from the text. Raises UserError if a source is
    unusable or a split gets no document, and OSError if out cannot be written.
    """
    eot = tokenizer["eot"]
    dtype = "uint16" if eot < 2**16 else "uint32"
    paths = {split: temporary_path(out / f"{split}.bin") for split in ("train", "val")}
    is_cut = args.is_few and val is None
    split = "train" if is_cut or val is not None else "by hash"
    digest = hashlib.sha256()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        writer = BinWriter(paths, Encoder(load_encoding(tokenizer), eot, dtype), pool)
        write_documents(writer, pieces, split, args.val_fraction, digest)
        if val is not None:
            write_documents(writer, val, "val", args.val_fraction, digest)
        writer.finish()
    longest = length_of_share(writer.lengths, 0.99)
    layout = args.layout or default_layout(args, longest)
    count = writer.count
    if is_cut:
        is_between_documents = layout == "documents" or count["train"][1] >= SEVERAL
        count = cut_off_val(paths, dtype, eot, args.val_fraction, is_between_documents)
    check_splits(count, args.val_fraction)
    return {
        "dtype": dtype,
        "layout": layout,
        "tokens": {split: tokens for split, (tokens, _) in count.items()},
        "documents": {split: documents for split, (_, documents) in count.items()},
        "sha256": digest.hexdigest(),
        # Training on documents uses rows of this length. Longer documents are rare.
        "longest": longest,
    }


def check_splits(count, val_fraction):
    """Raises UserError if a split has no document. count: see BinWriter."""
    for split, (_, documents) in count.items():
        if not documents:
            raise UserError(
                f"none of the documents fell to {split}; give --val=FILE, or another "
                f"--val_fraction than {val_fraction}"
            )


def default_val_fraction(args, is_all):
    """Returns the share of val. is_all: whether the text is small."""
    if args.embedded:
        return 0.05
    return 0.1 if is_all else 0.005


def default_layout(args, longest):
    """Returns "documents" if nearly all documents fit a row. longest: see length_of_share."""
    is_short = longest <= LONGEST_ROW and (args.lines or not args.is_few)
    return "documents" if args.embedded or is_short else "stream"


def length_of_share(lengths, share):
    """Returns the smallest length that at least this share of documents does not exceed.

    lengths: a Counter, from the number of tokens to the number of documents.
    """
    table = np.array(sorted(lengths.items()))
    documents_up_to = table[:, 1].cumsum()
    row = np.searchsorted(documents_up_to, share * documents_up_to[-1])
    return int(table[row, 0])


def spare_other_corpus(out, args):
    """Raises UserError if out holds files that the user may not know to be there."""
    if not (out / "train.bin").exists():
        return
    if not (out / "meta.json").exists():
        raise UserError(f"{out} holds a train.bin of another program; give another --out")
    try:
        source = json.loads((out / "meta.json").read_text())["source"]
    except (ValueError, KeyError, TypeError):
        return  # damaged
    if not args.out and source != args.paths:
        raise UserError(
            f"{out} holds a corpus of {', '.join(map(str, source))}; give --out={out} to replace "
            "it, or another --out"
        )


def remove_leftovers(out, is_new):
    """Removes temporary files in out. Removes out too if it is new and empty."""
    for name in OUTPUTS:
        temporary_path(out / name).unlink(missing_ok=True)
    if is_new and not any(out.iterdir()):
        out.rmdir()


def print_report(meta, seconds, readers):
    """Prints a summary. seconds: of reading and encoding. readers: of files."""
    total = sum(meta["tokens"].values())
    # bench/speed.py reads this line.
    print(
        f"{total:,} tokens in {seconds:.1f} seconds, {total / seconds / 1e6:.2f} million a second"
    )
    for split, tokens in meta["tokens"].items():
        documents = plural(meta["documents"][split], "document")
        print(f"{split}: {documents}, {plural(tokens, 'token')}")
    for reader in readers:
        for line in reader.report():
            print(line)
    print(
        f"sha256 {meta['sha256'][:16]}, Unicode {meta['unicode']}, layout {meta['layout']}, "
        f"99% of documents have at most {meta['longest']:,} tokens"
    )


def prepare(args, out, train, val):
    """Writes the corpus of the readers train and val to the folder out.

    Returns the content of meta.json, and the seconds of reading and encoding. Existing files are
    replaced only when all new files are complete.
    """
    start = time.time()
    rest = iter(train)
    first, is_all = read_up_to(SMALL, rest)
    args.is_few = sum(is_end for _, is_end in first) < FEW
    if args.val_fraction is None:
        args.val_fraction = default_val_fraction(args, is_all)
    start_of_bpe = time.time()
    tokenizer = make_tokenizer(args, first, is_all)
    seconds_of_bpe = time.time() - start_of_bpe
    print(
        f"prepare: {tokenizer['encoding']} of {tokenizer['vocab_size']} tokens "
        f"(after {seconds_of_bpe:.1f} seconds) -> {out}",
        flush=True,
    )
    meta = write_bins(out, args, tokenizer, itertools.chain(first, rest), val)
    meta = tokenizer | meta | dict(source=args.paths, unicode=unicodedata.unidata_version)
    seconds = time.time() - start - seconds_of_bpe
    temporary_path(out / "meta.json").write_text(json.dumps(meta, indent=1))
    for name in OUTPUTS:
        os.replace(temporary_path(out / name), os.path.realpath(out / name))
    return meta, seconds


def main():
    """Runs the script with the options of the command line."""
    args = parse_arguments()
    out = output_folder(args)
    train, val = open_sources(args)
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder --out={out} ({error})") from None
    lock(out)
    spare_other_corpus(out, args)
    try:
        meta, seconds = prepare(args, out, train, val)
    except OSError as error:
        raise UserError(f"cannot write --out={out} ({error})") from None
    finally:
        remove_leftovers(out, is_new)
    print_report(meta, seconds, [source for source in (train, val) if isinstance(source, Reader)])
    if isinstance(train, Reader) and train.has_one_text():
        print("If each line is a text of its own, prepare it again with --lines.")
    print(next_commands(out, meta))


if __name__ == "__main__":
    run_script(main)
