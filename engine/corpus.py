"""Corpora: a memmap of tokens that data/prepare.py wrote, and batches of training rows of it."""

import base64
import codecs
import json
import sys
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from engine.config import UserError
from textldm import CONTEXT, TAIL_WEIGHT, TARGET, Batch, make_batch

# How GPT-2 cuts text into words before it merges bytes (its published pattern). Our own BPEs do the
# same.
GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# What reading a damaged or foreign file may raise.
BROKEN = (
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    IndexError,
    RuntimeError,
)
GPT2 = dict(encoding="gpt2", vocab_size=50257, eot=50256)
# nanoGPT's folders have no meta.json.
NANOGPT = GPT2 | dict(dtype="uint16", layout="stream")
LLMC_HEADERS = (20240520, 20240801)  # of tokens as uint16 and as uint32


def load_encoding(tokenizer, source="the checkpoint and its tokenizer"):
    """The tiktoken.Encoding of a `tokenizer` dict, as meta.json and every checkpoint hold it:
    GPT-2's, or a small BPE of ours. A UserError names `source` if the dict is damaged."""
    try:
        if tokenizer["encoding"] == "bpe":
            ranks = {}
            for rank, line in enumerate(tokenizer["bpe"].splitlines()):
                ranks[base64.b64decode(line.split()[0])] = rank
            encoding = tiktoken.Encoding(
                "bpe",
                pat_str=GPT2_SPLIT,
                mergeable_ranks=ranks,
                special_tokens={"<|endoftext|>": tokenizer["eot"]},
            )
        else:
            encoding = tiktoken.get_encoding(tokenizer["encoding"])
        known = encoding.token_byte_values()
        has_all_bytes = {bytes([b]) for b in range(256)} <= set(known)
        is_last = len(known) == tokenizer["eot"] == tokenizer["vocab_size"] - 1
        if not (has_all_bytes and is_last):
            raise ValueError("other tokens than it claims")
        return encoding
    except OSError as e:
        name = type(e).__name__
        raise UserError(
            f"cannot download GPT-2's BPE ({name}); set TIKTOKEN_CACHE_DIR to its folder"
        ) from None
    except BROKEN as e:
        reason = f"{type(e).__name__}: {e}"
        raise UserError(f"{source} do not fit ({reason}); prepare or train again") from None


def encode(encoding, text):
    """A string as ids; an end-of-text mark in it is ordinary text. Raises UserError where tiktoken
    gives up. (There its `encode_ordinary` panics, which no `except Exception` catches.)"""
    try:
        return encoding.encode(text, disallowed_special=())
    except ValueError as e:
        raise UserError(
            f"tiktoken cannot cut a text of {len(text):,} characters into words ({str(e)[:60]!r}); "
            "shorten it"
        ) from None


def refuse_other_files(path, tokens):
    """Raises UserError if a .bin file without meta.json does not hold GPT-2's tokens as uint16."""
    found = None
    head = tokens[:512].tobytes()  # 1 kB
    magic = int.from_bytes(head[:4], "little")
    if magic in LLMC_HEADERS and len(head) == 1024:
        found = "has the header of llm.c and modded-nanogpt"
    elif head.startswith(b"\x93NUMPY"):
        found = "is a .npy file"
    elif head.startswith((b"PK\x03\x04", b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
        found = "is a compressed file"
    elif is_text(head):
        found = "is text"
    elif any(not tokens[k::2].any() for k in range(min(2, len(tokens)))):
        found = "has zeros in every second place, as numbers of 4 or 8 bytes have"
    else:
        # One pass, so that no bad token ends a run after hours.
        largest = 0
        for start in tqdm(range(0, len(tokens), 2**24), desc=str(path), delay=2, leave=False):
            largest = max(largest, int(tokens[start : start + 2**24].max()))
        if largest >= GPT2["vocab_size"]:
            found = f"has a token {largest}, and GPT-2 has {GPT2['vocab_size']}"
        elif largest < 256:
            found = f"has no token above {largest}, so these are characters or bytes"
    if found:
        raise UserError(
            f"{path} has no meta.json beside it, and {found}; without one it must hold GPT-2's "
            "tokens as uint16 (nanoGPT's files) and nothing else; data/prepare.py makes such a "
            "folder of the text"
        )


def is_text(head):
    """Whether the first bytes of a file are UTF-8 without control characters."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # its end may cut a character
    except UnicodeDecodeError:
        return False
    return all(sign >= " " or sign in "\t\n\r" for sign in text)


class Corpus:
    """One split of a prepared corpus.

    In the layout "documents" a row of up to N tokens is of one document. In the layout "stream" it
    is a window of all documents in a row, and attention and loss cross end-of-texts.

    path, meta, tokenizer, encoding: of the corpus. eot: the end-of-text token. tokens: the memmap.
    ends: where documents end. N: the length of the longest rows, at most block_size."""

    def __init__(self, folder, split, block_size):
        self.path = Path(folder) / f"{split}.bin"
        path = self.path
        if not path.exists() or not path.stat().st_size:
            raise UserError(
                f"{path} is missing or empty; python data/prepare.py makes it (see its --help)"
            )
        try:
            self.read(split, block_size)
        except (OSError, *BROKEN) as e:
            reason = f"{type(e).__name__}: {e}"
            raise UserError(
                f"{path} and meta.json do not fit ({reason}); prepare them again"
            ) from None
        if len(self.tokens) < self.N or not len(self.ends):
            raise UserError(
                f"{path} has {len(self.tokens)} tokens, less than one row of {self.N}; "
                "prepare more text"
            )
        self.fixed_batches(1, "cpu")  # bad tokens show here, before any file is written

    def read(self, split, block_size):
        self.meta = dict(NANOGPT)
        if self.path.with_name("meta.json").exists():
            self.meta = json.loads(self.path.with_name("meta.json").read_text())
        elif self.path.with_name("meta.pkl").exists():
            raise UserError(
                f"{self.path.parent} is a folder of nanoGPT's with a vocabulary of its own "
                "(meta.pkl); make a corpus of its text with data/prepare.py"
            )
        self.eot = self.meta["eot"]
        self.tokenizer = {}
        for key in ("encoding", "vocab_size", "eot", "bpe"):
            if key in self.meta:
                self.tokenizer[key] = self.meta[key]
        dtype = dict(uint16=np.uint16, uint32=np.uint32)[self.meta["dtype"]]
        self.tokens = np.memmap(self.path, dtype, "r")  # ValueError: not a whole number of tokens
        if self.meta == NANOGPT:
            refuse_other_files(self.path, self.tokens)
        self.encoding = load_encoding(self.tokenizer, f"{self.path} and meta.json")
        if len(self.tokens) != self.meta.get("tokens", {}).get(split, len(self.tokens)):
            raise ValueError("another number of tokens")
        self.is_stream = self.meta["layout"] != "documents"
        if self.is_stream:
            self.ends = np.array([len(self.tokens)])  # as if it were one endless document
            self.N = block_size
        else:
            self.ends = np.flatnonzero(self.tokens == self.eot) + 1
            self.N = min(block_size, max(int(self.meta["longest"]), 2))

    @property
    def identity(self):
        """What tells this corpus from others, for a checkpoint."""
        return dict(tokenizer=self.tokenizer, data=self.meta.get("sha256", len(self.tokens)))

    def batch(self, rng, B, N):
        """A Batch of B rows of N tokens. Each row is cut in context and target at a place drawn
        anew: at the start or between two tokens, so any number of tokens may be a prompt.
        unspecified: the paper cuts rows, and does not say where."""
        tokens = np.full((B, N), self.eot)
        lengths = np.zeros(B, int)
        cuts = np.zeros(B, int)
        for i in range(B):
            row, begins_text = self.stretch(rng, N)
            lengths[i] = len(row)
            cuts[i] = min(self.cut(rng, len(row), begins_text), N - 1)
            tokens[i, : len(row)] = row
        place = np.arange(N)
        segment = np.where(place < cuts[:, None], CONTEXT, TARGET)  # (B, N)
        weight = np.where(place < lengths[:, None], 1, TAIL_WEIGHT).astype(np.float32)  # (B, N)
        return make_batch(*map(torch.from_numpy, (tokens, segment, weight)))

    def stretch(self, rng, N):
        """N tokens, or a whole shorter document, and whether a text begins with them."""
        d = rng.integers(len(self.ends))
        first = self.ends[d - 1] if d else 0
        end = self.ends[d]
        start = first + rng.integers(max(end - first - N, 0) + 1)
        row = self.tokens[start : min(end, start + N)].tolist()
        if max(row) >= self.meta["vocab_size"]:
            raise UserError(
                f"{self.path}: token {max(row)} is beyond its vocabulary of "
                f"{self.meta['vocab_size']}"
            )
        return row, bool(start == first or self.is_stream)

    def cut(self, rng, length, begins_text):
        """How many tokens of a row of this length are context."""
        cut = 0
        if rng.random() > 0.1:
            cut = rng.integers(length)
        if not begins_text:
            cut = max(cut, 1)  # only the beginning of a text follows nothing
        return cut

    def fixed_batches(self, n, device):
        """n batches of up to 16,384 tokens. They are always the same, so any two checkpoints
        compare."""
        B = max(1, min(256, 2**14 // self.N))
        batches = []
        for i in tqdm(range(n), desc="rows", delay=2, leave=False):
            batch = self.batch(np.random.default_rng((0, i)), B, self.N)
            batches.append(to_device(batch, device))
        return batches


def shorten_rows(corpora, longest, model):
    """Lowers the N of corpora to `longest`, what a model (its name) can read. A warning says so.
    Long rows get a multiple of 64 tokens, for which GPUs are fastest (GPT-2 reads 1,023)."""
    wanted = max(corpus.N for corpus in corpora)
    if wanted <= longest:
        return
    rows = longest if longest < 512 else longest // 64 * 64
    print(
        f"warning: {model} reads rows of at most {longest} tokens, so rows have {rows} "
        f"instead of {wanted}; train {model} with --block_size={wanted}, or give "
        f"--block_size={rows} here",
        file=sys.stderr,
    )
    for corpus in corpora:
        corpus.N = min(corpus.N, rows)


def to_device(batch, device):
    """A batch on a device. A GPU copies from pinned memory while it computes."""
    device = torch.device(device)
    moved = []
    for x in batch:
        if device.type == "cuda" and not x.is_cuda:
            x = x.pin_memory()
        moved.append(x.to(device, non_blocking=device.type == "cuda"))
    return Batch(*moved)
