"""Prompts: files of JSON lines, tokens, and prompts that fit a row."""

import json
import sys
from pathlib import Path

import regex  # tiktoken depends on it too

from engine.corpus import GPT2_SPLIT, encode
from engine.config import UserError

END_OF_TEXT = "<|endoftext|>"


def read_lines(path, wanted, option=""):
    """The dicts of a file of JSON lines, each with the wanted fields as text. option is what named
    the file. Raises UserError."""
    if not Path(path).exists() or Path(path).is_dir():
        raise UserError(f"{option}{path} does not exist, or is a folder")
    lines = []
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    for i, line in enumerate(text.strip("\n").split("\n")):
        try:
            content = json.loads(line)
            is_good = all(isinstance(content[key], str) for key in wanted)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            is_good = False
        if not is_good:
            expected = ", ".join(f'"{key}": "..."' for key in wanted)
            raise UserError(f"{path}, line {i + 1}: expected {{{expected}}}")
        lines.append(content)
    return lines


class Prompt(list):
    """The ids of a prompt without its end, and `rest`: the bytes of that end. The text repeats
    these before it goes on."""

    rest = b""


def make_prompts(encoding, texts, room, can_complete):
    """Strings as Prompts. `rest` is the white space at the end of a string or, if there is none and
    the model can complete words, its last piece, as GPT-2 cuts text into pieces. So each id of a
    Prompt is one that a longer text has there too.

    The beginnings of those with more than `room` tokens are cut off, with a warning. Raises
    UserError where tiktoken cannot encode a string."""
    prompts = []
    for number, text in enumerate(texts, start=1):
        before, _, text = text.rpartition(END_OF_TEXT)
        if before:
            warn(number, f"what stands before {END_OF_TEXT} is another document; it is left out")
        kept = text.rstrip()
        if kept == text and can_complete:
            kept = "".join(regex.findall(GPT2_SPLIT, text)[:-1])
        ids, end = encode(encoding, kept), encode(encoding, text[len(kept) :])
        ids = fit(ids + end, room, number)
        end = end[-room:]  # a cut may reach into it
        prompt = Prompt(ids[: len(ids) - len(end)])
        prompt.rest = encoding.decode_bytes(end)
        prompts.append(prompt)
    return prompts


def fit(ids, room, number):
    """The last `room` ids of a prompt. A warning names its number, if it has more."""
    if len(ids) > room:
        more = len(ids) - room
        warn(number, f"{len(ids)} tokens, {more} more than fit; its beginning is cut off")
    return ids[-room:]


def warn(number, text):
    print(f"warning: prompt {number}: {text}", file=sys.stderr)


def room_for_prompts(length, block_size):
    """The tokens that a prompt may have, if `length` more are to fit a row, or an eighth of a row
    where length is 0. Raises UserError if a row has no room for `length` at all."""
    if length >= block_size:
        raise UserError(
            f"--length={length} does not fit the model's rows of {block_size} tokens; "
            f"at most {block_size - 1}"
        )
    return block_size - (length or max(block_size // 8, 1))
