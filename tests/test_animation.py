"""Properties of texts as they form in a terminal."""

import random
import re

import pytest

from engine import animation
from engine.animation import DIM, PLAIN, Side, play

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def letters(ids):
    return "".join(LETTERS[i] for i in ids)


def random_side(rng, title, n_texts, n_steps, cost):
    """Texts of few letters, so that some of their tokens stay for a while."""

    def text():
        return [rng.randrange(3) for _ in range(rng.randrange(9))]

    steps = [(f"step {k}", [text() for _ in range(n_texts)]) for k in range(n_steps + 1)]
    return Side(title, letters, steps, cost)


def frames(out):
    """The screens one after another, as a terminal would show them: lists of lines."""
    screens = []
    lines = []
    for part in re.split(r"(\x1b\[\d+F\x1b\[J)", out):
        if part.startswith("\x1b["):
            up = int(re.findall(r"\d+", part)[0])
            lines = lines[: len(lines) - up]
        else:
            lines = lines + part.split("\n")[:-1]
            screens.append(lines)
    return screens


def plain(line):
    return line.replace(DIM, "").replace(PLAIN, "")


@pytest.fixture
def terminal(monkeypatch, capsys):
    """play, in a terminal of some size that does not wait. Returns its screens."""

    def run(prompts, sides, columns=80, rows=24):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(rows))
        monkeypatch.setattr(animation.time, "sleep", lambda seconds: None)
        play(prompts, sides)
        return frames(capsys.readouterr().out)

    return run


def test_tokens_that_will_change_are_dim_and_others_plain():
    rng = random.Random(0)
    side = random_side(rng, "", 1, 6, 1)
    versions = [texts[0] for _, texts in side.steps]
    for k, ids in enumerate(versions):
        line = "".join(side.lines(0, "", k, 40)).rstrip()
        found = re.findall(rf"({re.escape(DIM)})?([A-Z])", line)
        assert "".join(letter for _, letter in found) == letters(ids)
        for n, (dim, _) in enumerate(found):
            stays = all(later[n : n + 1] == [ids[n]] for later in versions[k:])
            assert bool(dim) != stays


def test_both_sides_are_shown_after_as_many_evaluations(terminal):
    rng = random.Random(1)
    sides = [random_side(rng, "GPT", 2, 3, 1), random_side(rng, "TextLDM", 2, 5, 2)]
    screens = terminal(["p", "q"], sides)
    assert len(screens) == 11, "ten evaluations of the slower side, and the beginning"
    for evaluations, (head, *texts) in enumerate(screens):
        left, right = min(evaluations, 3), evaluations // 2
        assert re.split(r"  +", head.strip()) == [
            f"GPT, step {left}: {left} evaluations",
            f"TextLDM, step {right}: {2 * right} evaluations",
        ]
        for i, line in enumerate(texts):
            assert plain(line).split() == [
                "pq"[i] + "|" + letters(side.steps[k][1][i])
                for side, k in zip(sides, (left, right))
            ]


@pytest.mark.parametrize("n_sides", [1, 2])
def test_a_screen_takes_the_place_of_the_one_before_and_fits(terminal, n_sides):
    rng = random.Random(2)
    sides = [random_side(rng, "TextLDM", 9, 7, 2) for _ in range(n_sides)]
    for columns, rows in ((80, 24), (20, 6), (10, 2)):
        for screen in terminal(["a long\n\tprompt\x1b of 語 lines"] * 9, sides, columns, rows):
            assert len(screen) < rows
            for line in map(plain, screen):
                assert line.isprintable()
                assert len(line) + line.count("語") < columns


def test_without_colour_nothing_is_dim(monkeypatch):
    side = random_side(random.Random(3), "", 1, 6, 1)
    assert any(DIM in line for k in range(7) for line in side.lines(0, "", k, 9))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not any(DIM in line for k in range(7) for line in side.lines(0, "", k, 9))
