"""Documents -> train.bin, val.bin and meta.json, streamed, on all cores.

    python data/prepare.py                        # names: the names of Unicode's characters, no download
    python data/prepare.py docs                   # prose from the docstrings of Python, numpy and torch
    python data/prepare.py openwebtext2.jsonl.zst.tar --out=data/owt2       # OpenWebText2 as it comes
    python data/prepare.py my_folder --val=val.jsonl --encoding=gpt2        # .txt .jsonl .jsonl.gz .jsonl.zst

Every document is followed by one end-of-text token; the bins are memmaps of uint16 (uint32 where the
vocabulary needs it). Which documents are val is decided by a hash of their text, so by nothing else.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import regex  # tiktoken needs it too
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from textldm import GPT2_SPLIT, UserError, load_encoding, run

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".tar")
PIECE = 1 << 20                 # bytes read at once
BPE_SAMPLE = 32 << 20           # characters from which a BPE is learnt
UNNAMED = (  # ideographs and syllables whose names only enumerate them
    "CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH", "HANGUL SYLLABLE", "TANGUT IDEOGRAPH", "TANGUT COMPONENT",
    "NUSHU CHARACTER", "KHITAN SMALL SCRIPT CHARACTER", "EGYPTIAN HIEROGLYPH", "ANATOLIAN HIEROGLYPH", "CUNEIFORM SIGN",
    "SIGNWRITING", "VARIATION SELECTOR", "BAMUM LETTER", "YI SYLLABLE", "LINEAR A SIGN")


# ---------------------------------------------------------------------------------------------------------
# Where documents come from. Every source is a function of no arguments, so that it can be read twice.


def names():
    """The name of every character that has one of its own, in lower case."""
    for c in range(sys.maxunicode + 1):
        name = unicodedata.name(chr(c), "")
        if name and not name.startswith(UNNAMED):
            yield name.lower()


def docs():
    """Paragraphs of prose in the docstrings of the standard library, torch and numpy. Files are parsed,
    not imported."""
    import torch
    seen, skip = set(), {"test", "tests", "testing", "_vendor", "site-packages", "idlelib", "lib2to3"}
    for root in (sysconfig.get_paths()["stdlib"], Path(torch.__file__).parent, Path(np.__file__).parent):
        for path in sorted(Path(root).rglob("*.py")):
            if skip & set(path.relative_to(root).parts[:-1]):
                continue
            try:
                tree = ast.parse(path.read_bytes())
            except (OSError, SyntaxError, ValueError, RecursionError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    for paragraph in regex.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                        text = " ".join(paragraph.split())
                        if is_prose(text) and text.lower() not in seen:
                            seen.add(text.lower())
                            yield text


def is_prose(text):
    plain = sum(c.isalpha() or c in " ,.'" for c in text)
    return len(text) >= 20 and text[0].isupper() and text[-1] == "." and plain >= 0.93 * len(text) and ">>>" not in text


class Files:
    """Documents of files and folders; counts what it skips, and moves a progress bar by bytes read."""

    def __init__(self, paths):
        self.paths, self.bad = [], 0
        for path in map(Path, paths):
            found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES)) if path.is_dir() else [path]
            if not path.exists() or not found:
                raise UserError(f"{path} is missing or holds no file that ends in {', '.join(SUFFIXES)}")
            self.paths += found

    def __call__(self):
        self.bad, self.good = 0, 0
        with tqdm(total=sum(p.stat().st_size for p in self.paths), unit="B", unit_scale=True, desc="read", mininterval=1) as bar:
            for path in self.paths:
                before = self.good
                try:
                    with open(path, "rb") as f:
                        yield from self.documents(path.name, Counted(f, bar))
                except (EOFError, OSError, tarfile.TarError, gzip.zlib.error) as e:
                    raise UserError(f"{path} is broken, cut off or unreadable ({type(e).__name__}: {e}); fetch it again") from None
                if self.good == before:
                    raise UserError(f"no usable document in {path}: expected text, or lines of JSON with a text field")

    def documents(self, name, f):
        if name.endswith(".tar"):
            for member in (tar := tarfile.open(fileobj=f, mode="r|", tarinfo=WholeTar)):
                if member.isfile() and member.name.endswith(SUFFIXES[:-1]):
                    yield from self.documents(member.name, tar.extractfile(member))
                tar.members = []  # or they pile up
            return
        pieces = iter(lambda: f.read(PIECE), b"")
        if name.endswith(".gz"):
            unpacked = gzip.GzipFile(fileobj=f)
            pieces = iter(lambda: unpacked.read(PIECE), b"")
        elif name.endswith(".zst"):
            pieces = unzstd(pieces)
        if name.endswith(".txt"):
            # a file is a document; a long one is several, cut at line ends, so that memory stays flat
            for text in chunks(pieces):
                yield self.count(text.decode("utf-8", "replace"))
            return
        for block in chunks(pieces):
            for line in block.splitlines():
                try:
                    text = json.loads(line)["text"]
                    if not encodable(text):  # JSON may hold half characters
                        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    self.bad += bool(line.strip())
                    continue
                if text:
                    yield self.count(text)

    def count(self, text):
        self.good += 1
        return text


class WholeTar(tarfile.TarInfo):
    """Members of a tar that must end as tars do: tarfile takes a damaged header, or none, for the end."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as e:
            raise OSError(f"{e} at byte {tar.offset}") from None


class Counted:
    """A file whose reads move a bar."""

    def __init__(self, file, bar):
        self.file, self.bar = file, bar

    def read(self, n=-1):
        data = self.file.read(n)
        self.bar.update(len(data))
        return data


def encodable(text):
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def unzstd(pieces):
    """Unpacks zstandard frames, one after another; raises EOFError where the last one is cut off."""
    try:
        import zstandard
    except ImportError:
        raise UserError(".zst files need one more package: pip install zstandard") from None
    frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    try:
        for piece in pieces:
            while piece:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                yield frame.decompress(piece)
                piece = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as e:
        raise OSError(str(e)) from None
    if not frame.eof:
        raise EOFError("the stream ends in the middle of a frame")


def chunks(pieces):
    """Regroups bytes to chunks of at least PIECE that end at a line's end."""
    parts = []
    size = 0
    for piece in pieces:
        end = piece.rfind(b"\n") + 1
        if end and size + end >= PIECE:
            yield b"".join((*parts, piece[:end]))
            parts, size, piece = [], 0, piece[end:]
        parts.append(piece)
        size += len(piece)
    if size:
        yield b"".join(parts)


# ---------------------------------------------------------------------------------------------------------
# A small byte-level BPE


def train_bpe(documents, vocab_size):
    """Learns vocab_size - 257 merges (256 bytes and the end-of-text are tokens from the start) from the
    first BPE_SAMPLE characters. Returns tiktoken's file format: a line a token, base64 and rank."""
    counts, size = collections.Counter(), 0
    for text in documents:
        counts.update(regex.findall(GPT2_SPLIT, text))
        size += len(text)
        if size > BPE_SAMPLE:
            break
    words = [[bytes([b]) for b in word.encode()] for word in counts]
    weights = list(counts.values())
    pairs, where = collections.Counter(), collections.defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += weights[i]
            where[pair].add(i)
    tokens = [bytes([b]) for b in range(256)]
    known = set(tokens)
    bar = tqdm(total=vocab_size - 257, desc="bpe", mininterval=1)
    while len(tokens) < vocab_size - 1:
        best = max(pairs, key=lambda p: (pairs[p], p), default=None)
        if best is None or pairs[best] < 2:
            raise UserError(f"the corpus is too small for --vocab_size={vocab_size}; it has {len(tokens) + 1} useful tokens")
        merged = best[0] + best[1]
        if merged not in known:  # another pair may have spelt it before
            tokens.append(merged)
            known.add(merged)
            bar.update()
        for i in where.pop(best):
            word, new, at = words[i], [], 0
            for pair in zip(word, word[1:]):
                pairs[pair] -= weights[i]
            while at < len(word):
                n = 2 if tuple(word[at : at + 2]) == best else 1
                new.append(b"".join(word[at : at + n]))
                at += n
            words[i] = new
            for pair in zip(new, new[1:]):
                pairs[pair] += weights[i]
                where[pair].add(i)
        del pairs[best]
    bar.close()
    return "".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens))


# ---------------------------------------------------------------------------------------------------------


def write_bins(out, encoding, eot, dtype, sources, val_fraction):
    """Encodes documents by blocks, on all cores, and appends each to the .tmp bin of its split. Returns
    tokens and documents per split, the lengths of documents, and a hash of all text."""
    digest, lengths = hashlib.sha256(), collections.Counter()
    count = {"train": [0, 0], "val": [0, 0]}
    files = {split: open(out / f"{split}.bin.tmp", "wb") for split in count}
    # measured: where a worker is the first to use tiktoken's regex, all of them take half as long again
    encoding.encode_ordinary("the main thread goes first")
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def ids(text):
            try:
                return encoding.encode_to_numpy(text, disallowed_special=())
            except ValueError:  # tiktoken gives up on a million spaces in a row, but not on half of them
                return np.append(ids(text[: len(text) // 2]), ids(text[len(text) // 2 :]))

        def encode(texts):  # one job is many documents; tiktoken lets go of the interpreter's lock while it works
            return [np.append(ids(t), eot).astype(dtype) for t in texts]

        pending = []  # the block being encoded while the next one is read

        def flush(block):
            jobs = [[t for _, t in block[i::os.cpu_count() * 4]] for i in range(os.cpu_count() * 4)]
            pending.append((block, [pool.submit(encode, job) for job in jobs]))
            while len(pending) > bool(block):
                done, jobs = pending.pop(0)
                for k, (split, _) in enumerate(done):
                    ids = jobs[k % len(jobs)].result()[k // len(jobs)]
                    files[split].write(ids.data)
                    count[split][0] += len(ids)
                    count[split][1] += 1
                    lengths[len(ids)] += 1

        for split, documents in sources:
            block, size = [], 0
            for text in documents():
                raw = text.encode()
                digest.update(raw + b"\0")
                into = split
                if into == "by hash":
                    h = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") / 2**64
                    into = "val" if h < val_fraction else "train"
                block.append((into, text))
                size += len(raw)
                if size > 8 * PIECE:
                    flush(block)
                    block, size = [], 0
            flush(block)
            flush([])
    for f in files.values():
        f.flush()
        os.fsync(f.fileno())
        f.close()
    return count, lengths, digest.hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("paths", nargs="*", default=["names"], metavar="names|docs|PATH", help="a corpus that needs no download, or files and folders")
    parser.add_argument("--out", help="folder to write (data/ and the name of the corpus)")
    parser.add_argument("--val", help="file or folder of val documents, instead of a share of the others")
    parser.add_argument("--val_fraction", type=float, default=None, help="share of val documents (0.05 for names and docs, else 0.005)")
    parser.add_argument("--encoding", choices=["gpt2", "bpe"], help="GPT-2's BPE (default for files), or one of our own (names, docs)")
    parser.add_argument("--vocab_size", type=int, default=4096, help="of our own BPE (4096)")
    parser.add_argument("--layout", choices=["documents", "stream"],
                        help="a training row is one document (names, docs), or a window of all of them (files)")
    args = parser.parse_args()
    embedded = args.paths in (["names"], ["docs"])
    fraction = args.val_fraction if args.val_fraction is not None else 0.05 if embedded else 0.005
    if not 0 < fraction < 1:
        parser.error("--val_fraction must lie between 0 and 1")
    if not 258 <= args.vocab_size <= 2**31:
        parser.error("--vocab_size must be at least 258: 256 bytes, end-of-text and a merge")
    if embedded:
        print("prepare: a few seconds for names, half a minute for docs", flush=True)
        documents = list({"names": names, "docs": docs}[args.paths[0]]())
    source = (lambda: documents) if embedded else Files(args.paths)
    val = Files([args.val]) if args.val else None
    if val and not embedded:  # val documents within the folder of the others are not for training
        source.paths = [p for p in source.paths if p.resolve() not in {q.resolve() for q in val.paths}]
    out = Path(args.out or Path("data") / Path(args.paths[0]).resolve().name.split(".")[0])

    tokenizer = {"encoding": args.encoding or ("bpe" if embedded else "gpt2"), "vocab_size": 50257, "eot": 50256}
    if tokenizer["encoding"] == "bpe":
        tokenizer.update(vocab_size=args.vocab_size, eot=args.vocab_size - 1, bpe=train_bpe(source(), args.vocab_size))
    encoding = load_encoding(tokenizer)
    dtype = "uint16" if tokenizer["vocab_size"] <= 2**16 else "uint32"
    print(f"prepare: {', '.join(args.paths)} -> {out}, {tokenizer['encoding']} of {tokenizer['vocab_size']} tokens", flush=True)
    fresh = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        sources = [("train", source), ("val", val)] if val else [("by hash", source)]
        start = time.time()
        count, lengths, digest = write_bins(out, encoding, tokenizer["eot"], dtype, sources, fraction)
        for split, (tokens, documents) in count.items():
            if not documents:
                raise UserError(f"none of {sum(c[1] for c in count.values())} documents fell to {split}; give --val=FILE, more "
                                f"documents, or another --val_fraction than {fraction}")
        length, often = np.array(sorted(lengths.items())).T
        meta = dict(tokenizer, dtype=dtype, layout=args.layout or ("documents" if embedded else "stream"),
                    tokens={s: c[0] for s, c in count.items()}, documents={s: c[1] for s, c in count.items()},
                    source=args.paths, sha256=digest, unicode=unicodedata.unidata_version,
                    # a row as long as all but one document of a hundred, for training on documents
                    longest=int(length[np.searchsorted(often.cumsum(), 0.99 * often.sum())]))
        (out / "meta.json.tmp").write_text(json.dumps(meta, indent=1))
        for name in ("train.bin", "val.bin", "meta.json"):
            os.replace(out / f"{name}.tmp", out / name)
    except OSError as e:
        raise UserError(f"cannot write --out={out} ({e})") from None
    finally:
        for name in ("train.bin", "val.bin", "meta.json"):
            if out.is_dir():
                (out / f"{name}.tmp").unlink(missing_ok=True)
        if fresh and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
    total, seconds = sum(c[0] for c in count.values()), time.time() - start
    print(f"{total:,} tokens in {seconds:.1f} seconds, {total / seconds / 1e6:.2f} million a second")
    for split, (tokens, documents) in count.items():
        print(f"{split}: {documents:,} documents, {tokens:,} tokens")
    for files in (source, val):
        if isinstance(files, Files) and files.bad:
            print(f"skipped {files.bad} unusable lines of {', '.join(map(str, files.paths[:3]))}")
    print(f"sha256 {digest[:16]}, Unicode {unicodedata.unidata_version}, 99% of documents have at most {meta['longest']} tokens")


if __name__ == "__main__":
    run(main)
