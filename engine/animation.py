"""Texts as they form, in place in a terminal: sample.py --trace."""

import os
import shutil
import time
import unicodedata
from itertools import zip_longest
from typing import Callable, NamedTuple

FRAMES_A_SECOND = 10
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
BACK_BY = "\x1b[{}F\x1b[J"  # so many lines up; clear all below


class Side(NamedTuple):
    """What one model writes: a column of the screen."""

    title: str
    decode: Callable  # ids -> text
    steps: list  # (label, ids of each text): at the beginning, and after each step
    cost: int  # evaluations of the network for a step of a text

    def lines(self, i, prompt, k, width):
        """Text i after k steps, in lines of `width` columns. Tokens that will change are dim."""
        ids, *later = (texts[i] for _, texts in self.steps[k:])
        signs = [(sign, False) for sign in f"{prompt}|"]
        for n, token in enumerate(ids):
            is_dim = any(other[n : n + 1] != [token] for other in later)
            text = f"{prompt}|{self.decode(ids[: n + 1])}".rstrip("\ufffd")  # half a character
            signs += [(sign, is_dim) for sign in text[len(signs) :]]
        lines, room = [""], width
        for sign, is_dim in signs:
            sign = sign if sign.isprintable() else " "  # what moves the cursor does not print
            columns = 2 if unicodedata.east_asian_width(sign) in "WF" else 1
            if columns > room:
                lines[-1] += " " * room
                lines, room = [*lines, ""], width
            is_plain = not is_dim or os.environ.get("NO_COLOR")
            lines[-1] += sign if is_plain else f"{DIM}{sign}{PLAIN}"
            room -= columns
        return [*lines[:-1], lines[-1] + " " * room]


def play(prompts, sides):
    """Shows all sides in place, at equal numbers of evaluations."""
    size = shutil.get_terminal_size()
    width = max((size.columns - 1) // len(sides) - 2, 2)
    drawn = 0  # lines
    for evaluations in range(max(side.cost * (len(side.steps) - 1) for side in sides) + 1):
        at = [min(evaluations // side.cost, len(side.steps) - 1) for side in sides]
        heads = [f"{s.title}, {s.steps[k][0]}: {k * s.cost} evaluations" for s, k in zip(sides, at)]
        screen = [[head[:width].ljust(width) for head in heads]]
        for i, prompt in enumerate(prompts):
            cells = [side.lines(i, prompt, k, width) for side, k in zip(sides, at)]
            screen += zip_longest(*cells, fillvalue=" " * width)
        lines = ["  ".join(line) + "\n" for line in screen[: size.lines - 1]]
        print((BACK_BY.format(drawn) if drawn else "") + "".join(lines), end="", flush=True)
        drawn = len(lines)
        time.sleep(1 / FRAMES_A_SECOND)
