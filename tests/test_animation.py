"""Texts as they form in a terminal."""

import re

import pytest

from engine.animation import DIM, PLAIN, Side, play


def letters(ids):
    return "".join("ABC"[i] for i in ids)


@pytest.fixture
def terminal(monkeypatch, capsys):
    """play, in a terminal of some size that does not wait. Returns its screens, each of which takes
    the place of the one before."""

    def run(prompts, sides, columns=80, rows=24):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(rows))
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        play(prompts, sides)
        out = capsys.readouterr().out.replace(DIM, "").replace(PLAIN, "")
        first, *others = re.split(r"\x1b\[(\d+)F\x1b\[J", out)
        screens = [screen.split("\n")[:-1] for screen in (first, *others[1::2])]
        assert [int(up) for up in others[::2]] == [len(screen) for screen in screens[:-1]]
        return screens

    return run


@pytest.mark.parametrize("k, shown", [(0, "p|Abc "), (1, "p|Acc "), (2, "p|AB  ")])
def test_tokens_that_will_change_are_dim_unless_nothing_has_a_colour(monkeypatch, k, shown):
    versions = [[0, 1, 2], [0, 2, 2], [0, 1]]
    side = Side("", letters, [("", [ids]) for ids in versions], 1)
    (line,) = side.lines(0, "p", k, 6)
    dim = re.escape(DIM) + "(.)" + re.escape(PLAIN)
    assert re.sub(dim, lambda found: found[1].lower(), line) == shown
    monkeypatch.setenv("NO_COLOR", "1")
    assert side.lines(0, "p", k, 6) == [f"p|{letters(versions[k])}".ljust(6)]


@pytest.mark.parametrize(
    "prompt, text, width, lines",
    [
        ("語語", b"AC", 3, ["語 ", "語|", "AC "]),
        ("語", b"AC", 4, ["語|A", "C   "]),
        ("a\tb", b"\x1bA\n", 4, ["a b|", " A  "]),
        ("", "☕".encode()[:2], 4, ["|   "]),
        ("", "☕".encode(), 4, ["|☕ "]),
    ],
)
def test_a_text_fills_lines_by_the_columns_of_its_whole_characters(prompt, text, width, lines):
    side = Side("", lambda ids: bytes(ids).decode("utf-8", "replace"), [("", [list(text)])], 1)
    assert side.lines(0, prompt, 0, width) == lines


def test_both_sides_are_shown_after_as_many_evaluations(terminal):
    steps = [(f"n={n}", [[0, 1, 2][:n], [1]]) for n in range(4)]
    gpt = Side("GPT", letters, steps, 1)
    steps = [("t=1.0", [[1], [2]]), ("t=0.5", [[2], [2]]), ("t=0.0", [[0], [2]])]
    diffusion = Side("TextLDM", letters, steps, 2)
    screens = terminal(["p", "q"], [gpt, diffusion])
    expected = [
        ("n=0: 0", "t=1.0: 0", "p|", "p|B"),
        ("n=1: 1", "t=1.0: 0", "p|A", "p|B"),
        ("n=2: 2", "t=0.5: 2", "p|AB", "p|C"),
        ("n=3: 3", "t=0.5: 2", "p|ABC", "p|C"),
        ("n=3: 3", "t=0.0: 4", "p|ABC", "p|A"),
    ]
    for screen, (left, right, *first) in zip(screens, expected, strict=True):
        heads = [f"GPT, {left} evaluations", f"TextLDM, {right} evaluations"]
        cells = [re.split(" {2,}", line.strip()) for line in screen]
        assert cells == [heads, first, ["q|B", "q|C"]]


@pytest.mark.parametrize("columns, rows", [(80, 8), (20, 6), (10, 2)])
@pytest.mark.parametrize("n_sides", [1, 2])
def test_a_screen_takes_the_place_of_the_one_before_and_fits(terminal, n_sides, columns, rows):
    texts = [[[0] * 9 * k] * 9 for k in range(4)]  # the left cells are higher
    sides = [Side("TextLDM", letters, [("", text) for text in texts], cost) for cost in (1, 2)]
    for screen in terminal(["long\n\tprompt of 語 lines"] * 9, sides[:n_sides], columns, rows):
        assert len(screen) == rows - 1
        (width,) = {len(line) + line.count("語") for line in screen}
        assert width < columns
