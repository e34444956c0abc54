"""Prompts: files of JSON lines, and prompts that fit a row."""

import json
import sys
from pathlib import Path

from engine.script import UserError


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


def fit(prompts, length, block_size):
    """Cuts the beginnings of prompts (lists of ids) that leave no room for `length` new tokens, or
    for an eighth of a row where length is 0. Raises UserError if a row has no room for `length` at
    all."""
    if length >= block_size:
        raise UserError(
            f"--length={length} does not fit the model's rows of {block_size} tokens; "
            f"at most {block_size - 1}"
        )
    room = block_size - (length or max(block_size // 8, 1))
    fitting = []
    for i, prompt in enumerate(prompts):
        if len(prompt) > room:
            print(
                f"warning: prompt {i + 1} has {len(prompt)} tokens, {len(prompt) - room} more than "
                "fit; its beginning is cut off",
                file=sys.stderr,
            )
        fitting.append(prompt[-room:])
    return fitting
