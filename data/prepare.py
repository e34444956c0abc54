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
end-of-text token follows each document.

A hash of its text decides whether a document belongs to train or to val, so the order of the
documents has no influence. If the first 100 million characters hold less than 100 documents, the
end of all is val.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import shlex
import sys
import time
import unicodedata
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.bpe import train_bpe
from data.embedded import EMBEDDED
from data.reading import OUTPUTS, Reader
from engine.checkpoint import temporary_path
from engine.config import UserError
from engine.corpus import GPT2, load_encoding
from engine.terminal import lock, run_script

SMALL = 100 << 20  # characters. A text of up to this size gets a BPE of its own.
FEW = 100  # documents. So few are not divided by their hashes.
JOB = 1 << 18  # characters that a thread encodes at once
# Tokens in a row.
LONGEST_ROW = 64  # Where nearly all documents are shorter, each is a row by itself.
TEXT_ROW = 32  # of running text, on a CPU
GPU_ROW = 1024  # of the preset small
SHORTEST_ROW = 8  # of running text. For less no commands are printed.


def parse_arguments():
    """Returns the options of the command line. A wrong one ends the script with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    text = "an embedded corpus (default: names), or files, folders and pipes"
    add("paths", nargs="*", default=["names"], metavar="names|docs|PATH", help=text)
    add("--out", help="folder to write (default: data/ and the name of the corpus)")
    add("--val", help="file or folder of val documents, instead of a share of the others")
    text = "share of val (default: 0.1; names, docs: 0.05; more than 100 million characters: 0.005)"
    add("--val_fraction", type=float, help=text)
    text = "GPT-2's BPE (default for more than 100 million characters), or a new BPE (for less)"
    add("--encoding", choices=["gpt2", "bpe"], help=text)
    text = "number of tokens of a new BPE (default: by the size of the text, at most 4096)"
    add("--vocab_size", type=int, help=text)
    text = "a row is one document (default where they are short), or a window of all of them"
    add("--layout", choices=["documents", "stream"], help=text)
    add("--lines", action="store_true", help="each line of a text file is a document")
    args = parser.parse_args()
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        parser.error("--val_fraction must lie between 0 and 1")
    if args.val and args.val_fraction is not None:
        parser.error("--val_fraction has no effect with --val; leave one of them out")
    if args.vocab_size is not None and args.encoding == "gpt2":
        parser.error("--vocab_size is for --encoding=bpe; GPT-2's has 50257 tokens")
    if args.vocab_size is not None and not 258 <= args.vocab_size <= 2**31:
        parser.error("--vocab_size must be at least 258: 256 bytes, end-of-text and one merge")
    # args gets one field that is no option: the name of the embedded corpus to read, or None.
    name = args.paths[0]
    # A file or folder of that name comes first, except for the docs of this project.
    is_path = Path(name).exists() and Path(name).resolve().parent != ROOT
    args.embedded = name if args.paths[1:] == [] and name in EMBEDDED and not is_path else None
    if args.embedded and args.lines:
        parser.error(f"--lines is for text files; {name} has documents")
    return args


def output_folder(args):
    """Returns the folder to write as a Path. The default has the name of the first path."""
    if args.out:
        return Path(args.out).expanduser()
    path = Path("stdin" if args.paths[0] == "-" else args.paths[0]).expanduser()
    name = os.path.basename(os.path.abspath(path))
    return Path("data") / (name.strip(".").split(".")[0] or "text")


def spare_other_corpus(out, args):
    """Raises UserError if out holds files that the user may not know to be there."""
    if (out / "train.bin").exists() and not (out / "meta.json").exists():
        raise UserError(f"{out} holds a train.bin of another program; give another --out")
    try:
        source = json.loads((out / "meta.json").read_text())["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # it is missing or damaged
    if not args.out and source != args.paths:
        paths = ", ".join(map(str, source))
        raise UserError(f"{out} holds a corpus of {paths}; --out={out} replaces it")


def open_sources(args):
    """Returns iterables of the train documents and of the val documents, each one a string.

    The second is None without --val. Raises UserError if a path is missing.
    """
    val = Reader([args.val], args.lines) if args.val else None
    if args.embedded:
        documents = EMBEDDED[args.embedded]()
        return tqdm(documents, desc="read", unit=" documents", mininterval=1), val
    train = Reader(args.paths, args.lines)
    if val:
        for path in val.files:  # val documents may lie in a folder that is read for train
            train.files.pop(path, None)
        if not train.files:
            raise UserError(f"--val={args.val} names all files; none is left for train")
    return train, val


def make_tokenizer(args, first, is_all):
    """Returns a dict that describes the tokenizer, as meta.json and checkpoints hold it.

    first: the first documents. is_all: whether these are all.
    """
    encoding = args.encoding
    if not (encoding or is_all or args.vocab_size):
        try:
            load_encoding(GPT2)
            encoding = "gpt2"
        except UserError as error:
            print(f"prepare: {error}; a new BPE takes its place")
    if encoding == "gpt2":
        return GPT2
    wanted = args.vocab_size
    if wanted is None:
        # A token should occur often enough that its embedding is learnt.
        wanted = 4096 if args.embedded else min(4096, max(512, sum(map(len, first)) // 175))
    ranks, size = train_bpe(first, wanted)
    if args.vocab_size and size < wanted:
        print(f"prepare: the text has no use for more than {size} tokens; --vocab_size={size}")
    return {"encoding": "bpe", "vocab_size": size, "eot": size - 1, "bpe": ranks}


def choose_splits(documents, val, val_fraction, digest):
    """Yields a pair ("train" or "val", text) for each document. The hash of its text decides.

    val: iterable of val documents. val_fraction: the share of the other documents that is val too.
    digest: a hashlib object, to which the texts are added.
    """
    for texts, share in ((documents, val_fraction), (val, 1)):
        for text in texts:
            raw = text.encode()
            digest.update(raw + b"\0")
            position = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")
            yield "val" if position < share * 2**64 else "train", text


def encode(encoding, text):
    """Returns the token ids of text as an array, without an end-of-text token."""
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except ValueError:
        # tiktoken fails on a million spaces in a row, but not on each half of them.
        middle = len(text) // 2
        return np.append(encode(encoding, text[:middle]), encode(encoding, text[middle:]))


def encode_all(documents, encoding, eot):
    """Yields a pair (split, token ids and eot) for each pair (split, text) of documents, in order.

    Threads encode: tiktoken releases Python's global lock. Meanwhile the next documents are read.
    """

    def encode_job(job):
        return [(split, np.append(encode(encoding, text), eot)) for split, text in job]

    # Measured: if a thread of the pool uses tiktoken's regex first, all take 1.5 times as long.
    encode(encoding, "the main thread goes first")
    pending = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        job, size = [], 0
        for split, text in documents:
            job.append((split, text))
            size += len(text)
            if size > JOB:
                pending.append(pool.submit(encode_job, job))
                job, size = [], 0
            if len(pending) > 2 * os.cpu_count():
                yield from pending.popleft().result()
        for future in pending:
            yield from future.result()
        yield from encode_job(job)


def write_bins(paths, tokenizer, dtype, documents):
    """Encodes documents into the files paths["train"] and paths["val"].

    documents: a pair (split, text) for each. Returns three Counters: the tokens of each split, its
    documents, and how many documents have each length in tokens.
    """
    tokens, number, lengths = Counter(train=0, val=0), Counter(train=0, val=0), Counter()
    with open(paths["train"], "wb") as train_file, open(paths["val"], "wb") as val_file:
        files = {"train": train_file, "val": val_file}
        for split, ids in encode_all(documents, load_encoding(tokenizer), tokenizer["eot"]):
            files[split].write(ids.astype(dtype).data)
            tokens[split] += len(ids)
            number[split] += 1
            lengths[len(ids)] += 1
    return tokens, number, lengths


def cut_off_val(paths, dtype, eot, val_fraction, is_whole):
    """Moves the end of the train file to the val file: whole documents if is_whole, else tokens.

    Returns the numbers of tokens and of documents: two dicts by split. Raises UserError.
    """
    ids = np.memmap(paths["train"], dtype, "r")
    cut = min(max(round(len(ids) * (1 - val_fraction)), 1), len(ids) - 1)
    if is_whole:
        ends = np.flatnonzero(ids[:-1] == eot) + 1
        if not len(ends):
            raise UserError("there is only one document; give --val=FILE, or --layout=stream")
        cut = ends[np.abs(ends - cut).argmin()]
    parts = {"train": ids[:cut], "val": ids[cut:]}
    tokens = {split: len(part) for split, part in parts.items()}
    documents = {split: max(int((part == eot).sum()), 1) for split, part in parts.items()}
    parts["val"].tofile(paths["val"])
    os.truncate(paths["train"], parts["train"].nbytes)
    return tokens, documents


def prepare(args, out, train, val):
    """Writes the corpus of the documents train and val (None without --val) to the folder out.

    Returns the content of meta.json. Existing files are replaced when all new ones are complete.
    Raises UserError if a source is unusable or a split gets no document, and OSError.
    """
    rest = iter(train)
    first = []
    size = 0
    while size <= SMALL and (text := next(rest, None)) is not None:
        first.append(text)
        size += len(text)
    is_all = size <= SMALL
    is_few = len(first) < FEW
    tokenizer = make_tokenizer(args, first, is_all)
    print(f"prepare: {tokenizer['encoding']} of {tokenizer['vocab_size']} tokens -> {out}")
    if is_few and not args.lines:
        print("If each line is a text of its own, prepare it again with --lines.")
    dtype = "uint16" if tokenizer["eot"] < 2**16 else "uint32"
    val_fraction = args.val_fraction or (0.05 if args.embedded else 0.1 if is_all else 0.005)
    # Val is one of three: the documents of --val, the end of few documents, or those of many that
    # their hashes choose.
    share = 0 if val is not None or is_few else val_fraction
    digest = hashlib.sha256()
    documents = choose_splits(itertools.chain(first, rest), val or (), share, digest)
    paths = {split: temporary_path(out / f"{split}.bin") for split in ("train", "val")}
    tokens, number, lengths = write_bins(paths, tokenizer, dtype, documents)
    values, counts = np.array(sorted(lengths.items())).T
    longest = int(values[np.searchsorted(counts.cumsum(), 0.99 * counts.sum())])
    is_short = longest <= LONGEST_ROW and (args.lines or not is_few)
    layout = args.layout or ("documents" if args.embedded or is_short else "stream")
    if is_few and val is None:
        # In a stream, a val text of less than one document is the end of the last document.
        is_whole = layout == "documents" or number["train"] * val_fraction >= 1
        tokens, number = cut_off_val(paths, dtype, tokenizer["eot"], val_fraction, is_whole)
    for split, path in paths.items():
        if not number[split]:
            raise UserError(f"{split} gets no document; give --val=FILE, or another --val_fraction")
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    # Training on documents has rows of the length "longest".
    meta = tokenizer | dict(dtype=dtype, layout=layout, tokens=tokens, documents=number)
    meta |= dict(sha256=digest.hexdigest(), longest=longest)
    meta |= dict(source=args.paths, unicode=unicodedata.unidata_version)
    temporary_path(out / "meta.json").write_text(json.dumps(meta, indent=1))
    for name in OUTPUTS:
        os.replace(temporary_path(out / name), os.path.realpath(out / name))
    return meta


# ---- What is printed -----------------------------------------------------------------------------


def next_commands(out, meta):
    """Returns the commands that train on the corpus in the folder out, as text.

    out: as the user wrote it. meta: the content of its meta.json.
    """
    tokens = min(meta["tokens"].values())
    is_stream = meta["layout"] == "stream"
    on_gpu = meta["encoding"] == "gpt2"
    longest_row = GPU_ROW if on_gpu else TEXT_ROW if is_stream else LONGEST_ROW
    if tokens <= (SHORTEST_ROW if is_stream else min(longest_row, meta["longest"])):
        return f"\nIt is too short to train on: one split has only {tokens} tokens."
    row = min(longest_row, tokens - 1)  # a row of the GPT has one token more
    to = f"--out={shlex.quote(f'out/{out.resolve().name}')}"
    both = f"--data={shlex.quote(str(out))} {to}"
    if sys.platform == "darwin":
        both += " --device=cpu"  # untried on the GPU of a Mac
    if on_gpu:
        where = "on a GPU"
        both += " --preset=small" if row == GPU_ROW else f" --preset=small --block_size={row}"
        vae = "--teacher=gpt2 --no-muon --compile --max_steps=6000 --beta_warmup=2000"
        commands = [
            f"train_vae.py {both} {vae}",
            f"train_dit.py {both} --compile --max_steps=20000",
            f"sample.py {to} --n=4",
        ]
    elif is_stream:
        # Cola DLM with blocks of 4 tokens: on prose it is better than TextLDM.
        where = "a book of 1 MB took 19 minutes on two cores of an EPYC (Zen 4) in fp32"
        start = np.fromfile(out / "val.bin", meta["dtype"], 40).tolist()
        words = re.findall("[^\\s\ufffd]+", load_encoding(meta).decode(start))
        prompt = " ".join(words[1:4]).replace("<|endoftext|>", "")  # the first word may be cut
        both += f" --batch_size=96 --block_size={row}"
        commands = [
            f"baselines/gpt.py {both} --max_steps=400",
            f"variants/cola_dlm.py vae {both} --max_steps=400",
            f"variants/cola_dlm.py dit {both} --latent_block=4 --max_steps=2500",
            f"sample.py {to} --prompt={shlex.quote(prompt)} --length=300",
        ]
    else:
        where = "names took 10 minutes on two cores of an EPYC (Zen 4) in fp32"
        scripts = ["baselines/gpt.py", "train_vae.py", "train_dit.py"]
        commands = [*[f"{script} {both}" for script in scripts], f"sample.py {to} --n=5"]
    root = "" if ROOT == Path.cwd() else shlex.quote(os.path.relpath(ROOT)) + "/"
    lines = [f"python {root}{command}" for command in commands]
    return "\n".join([f"\nTo train on it ({where}):\n", *lines])


def main():
    """Runs the script with the options of the command line."""
    args = parse_arguments()
    out = output_folder(args)
    train, val = open_sources(args)
    is_new = not out.exists()
    start = time.time()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock(out)
        spare_other_corpus(out, args)
        try:
            meta = prepare(args, out, train, val)
        finally:
            for name in OUTPUTS:
                temporary_path(out / name).unlink(missing_ok=True)
            if is_new and not any(out.iterdir()):
                out.rmdir()
    except OSError as error:
        raise UserError(f"cannot write --out={out} ({error})") from None
    total = sum(meta["tokens"].values())
    seconds = time.time() - start
    speed = f"{total / seconds / 1e6:.2f} million a second"
    print(f"{total:,} tokens in {seconds:.1f} seconds, {speed}")
    for split, tokens in meta["tokens"].items():
        print(f"{split}: documents {meta['documents'][split]:,}, tokens {tokens:,}")
    for source in (train, val):
        if isinstance(source, Reader):
            print("\n".join(source.report()))
    longest = f"99% of documents have at most {meta['longest']:,} tokens"
    print(f"sha256 {meta['sha256'][:16]}, layout {meta['layout']}, {longest}")
    print(next_commands(out, meta))


if __name__ == "__main__":
    run_script(main)
