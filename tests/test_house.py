"""What the pages and files promise: names, lines, links, snippets and diffs."""

import re

import pytest

from tests.helpers import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
ROOMS = ("", "engine", "data", "variants", "baselines", "bench", "tests")
AT_THE_TOP = {"textldm.py", "train_vae.py", "train_dit.py", "sample.py", "test_textldm.py"}


def test_at_the_top_are_only_the_programs_of_the_readme():
    assert {path.name for path in ROOT.glob("*.py")} == AT_THE_TOP


def test_no_line_is_too_long():
    for room in ROOMS:
        for path in (ROOT / room).glob("*.py"):
            lines = path.read_text(encoding="utf-8").splitlines()
            assert [n for n, line in enumerate(lines, 1) if len(line) > 100] == [], path


def anchors_in(page):
    """GitHub's anchors of the headings of a page, and those that rows of its tables have."""
    found = re.findall(r'<a id="(.*?)">', page)
    for heading in re.findall(r"(?m)^#+ (.*)$", page):
        kept = [c for c in heading.strip().lower() if c.isalnum() or c in "-_ "]
        found.append("".join(kept).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_and_scripts_of_a_page_are_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.exists(), target
            assert not anchor or anchor in anchors_in(path.read_text()), target
    for line in text.splitlines():
        if "commit" not in line:  # the script may be of that commit
            for name in re.findall(r"(?:python|bash) ((?:\w+/)*\w+\.(?:py|sh))", line):
                assert (ROOT / name).exists(), line


def blocks_of(name, language):
    page = (ROOT / "docs" / name).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


def test_each_snippet_of_from_gpt_stands_in_the_file():
    lines = [line.strip() for line in (ROOT / "textldm.py").read_text().splitlines()]
    snippets = blocks_of("from_gpt.md", "python")
    assert len(snippets) >= 6
    for snippet in snippets:
        at = 0
        for part in re.split(r"^ *\.\.\.\n", snippet, flags=re.M):  # it leaves some lines out
            part = [line.strip() for line in part.splitlines()]
            while lines[at : at + len(part)] != part:
                at += 1
                assert at < len(lines), "\n".join(part)
            at += len(part)


def test_each_solution_of_the_tour_fits_the_files():
    files = [(ROOT / name).read_text() for name in ("textldm.py", "sample.py")]
    diffs = blocks_of("tour.md", "diff")
    assert len(diffs) >= 9
    for diff in diffs:
        old = "".join(line[1:] + "\n" for line in diff.splitlines() if line[0] in " -")
        assert sum(text.count(old) for text in files) == 1, old
