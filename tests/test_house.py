"""What the pages and files promise: links, snippets, diffs, names and packages."""

import ast
import re

import pytest

from tests.helpers import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
ROOMS = ("", "engine", "data", "variants", "baselines", "bench", "tests")
CODE = [path for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]
AT_THE_TOP = {"textldm.py", "train_vae.py", "train_dit.py", "sample.py", "test_textldm.py"}


def name_of(path):
    return str(path.relative_to(ROOT))


def test_at_the_top_are_only_the_programs_of_the_readme():
    assert {path.name for path in ROOT.glob("*.py")} == AT_THE_TOP


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_no_line_is_too_long(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [n for n, line in enumerate(lines, 1) if len(line) > 100] == []


def test_textldm_needs_torch_alone():
    """And the scripts that prepare data no network."""
    for path, forbidden in (("textldm.py", ""), ("data/prepare.py", "textldm engine.train")):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None) or node.names[0].name
                assert module not in forbidden.split(), path
                if path == "textldm.py":
                    allowed = {"torch", "collections", "dataclasses", "math", "typing", "zlib"}
                    assert module.split(".")[0] in allowed


def anchors_in(page):
    """GitHub's anchors of the headings of a page, and those that rows of its tables have."""
    found = re.findall(r'<a id="(.*?)">', page)
    for heading in re.findall(r"(?m)^#+ (.*)$", page):
        kept = [c for c in heading.strip().lower() if c.isalnum() or c in "-_ "]
        found.append("".join(kept).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.exists(), target
            assert not anchor or anchor in anchors_in(path.read_text()), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_scripts_that_pages_name_are_there(page):
    """Where a command names a commit, it may be a script of that commit."""
    for line in page.read_text().splitlines():
        if "commit" not in line:
            for name in re.findall(r"(?:python|bash) ((?:\w+/)*\w+\.(?:py|sh))", line):
                assert (ROOT / name).exists(), line


def test_each_snippet_of_from_gpt_stands_in_the_file():
    """Its lines stand there one after another, but where `...` leaves some out."""
    lines = [line.strip() for line in (ROOT / "textldm.py").read_text().splitlines()]
    page = (ROOT / "docs/from_gpt.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(snippets) >= 6
    for snippet in snippets:
        at = 0
        for part in re.split(r"^ *\.\.\.\n", snippet, flags=re.M):
            part = [line.strip() for line in part.splitlines()]
            while lines[at : at + len(part)] != part:
                at += 1
                assert at < len(lines), "\n".join(part)
            at += len(part)


def test_each_solution_of_the_tour_fits_the_files():
    """What a diff removes or shows stands in one place of one file."""
    files = [(ROOT / name).read_text() for name in ("textldm.py", "sample.py")]
    diffs = re.findall(r"^```diff\n(.*?)^```", (ROOT / "docs/tour.md").read_text(), re.M | re.S)
    assert len(diffs) >= 9
    for diff in diffs:
        old = "".join(line[1:] + "\n" for line in diff.splitlines() if line[0] in " -")
        assert sum(text.count(old) for text in files) == 1, old
