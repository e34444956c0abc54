"""Rules for the files themselves: lines, imports, parameters, and the links between pages."""

import ast
import re
import subprocess

import pytest

from tests.helpers import ROOT

LONGEST_LINE = 100
MOST_PARAMETERS = 6
AT_THE_TOP = {
    "textldm.py",
    "train_vae.py",
    "train_dit.py",
    "sample.py",
    "test_textldm.py",
    "README.md",
    "requirements.txt",
    "LICENSE",
}
ROOMS = ("engine", "variants", "baselines", "bench", "data", "tests")
SCRIPTS = ("train_vae", "train_dit", "sample")
# What the engine may know of textldm.py: rows and what is done with any DiT, and no network.
KNOWN_TO_THE_ENGINE = {
    "Batch",
    "make_batch",
    "CONTEXT",
    "TARGET",
    "PADDING",
    "TAIL_WEIGHT",
    "option",
    "Sampling",
    "continue_texts",
    "denoising_loss",
    "weighted_mean",
    "teacher_features",
}


def files_of_git():
    """All files that git knows or would add. None where there is no git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    if found.returncode or not found.stdout:
        return None
    paths = [ROOT / name for name in found.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def python_files():
    paths = files_of_git()
    if paths is None:
        paths = list(ROOT.glob("*.py"))
        for room in ROOMS:
            paths += (ROOT / room).rglob("*.py")
    return sorted({path for path in paths if path.suffix == ".py"})


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def is_ours(module):
    first = module.split(".")[0]
    return (ROOT / f"{first}.py").is_file() or first in ROOMS


def imports_of(path):
    """The imports of a file, anywhere in it: pairs of a module and a name of it, which is None
    where the whole module is imported."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add((alias.name, None))
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: a relative import"
            for alias in node.names:
                found.add((node.module, alias.name))
    return found


def our_imports_of(path):
    return {(module, name) for module, name in imports_of(path) if is_ours(module)}


FILES = python_files()
all_files = pytest.mark.parametrize("path", FILES, ids=name_of)


def files_in(*rooms):
    return [path for path in FILES if name_of(path).split("/")[0] in rooms]


def test_there_are_files_to_look_at():
    names = {name_of(path) for path in FILES}
    for name in ("textldm.py", "engine/loop.py", "baselines/gpt.py", "variants/ldlm.py"):
        assert name in names
    assert len(names) > 20


@all_files
def test_no_line_is_too_long(path):
    long_lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if len(line) > LONGEST_LINE:
            long_lines.append(f"{name_of(path)}:{number} has {len(line)} columns")
    assert not long_lines, "\n".join(long_lines)


def test_textldm_imports_torch_and_the_standard_library():
    allowed = {"collections", "dataclasses", "math", "typing", "zlib"}
    for module, _ in imports_of(ROOT / "textldm.py"):
        first = module.split(".")[0]
        assert first == "torch" or first in allowed, module


@pytest.mark.parametrize("path", files_in("engine"), ids=name_of)
def test_the_engine_imports_no_network_and_no_other_room(path):
    for module, name in our_imports_of(path):
        first = module.split(".")[0]
        assert first in ("engine", "textldm"), f"{name_of(path)} imports {module}"
        if first == "textldm":
            assert name in KNOWN_TO_THE_ENGINE, f"{name_of(path)} imports {name} of textldm"


ARROWS = {
    "baselines": {"engine", "textldm"},
    "variants": {"engine", "textldm", "baselines", "variants"},
    "data": {"engine", "textldm", "data"},
    "bench": {"engine", "textldm", "baselines", "variants", "bench", "data"},
    "train_vae.py": {"engine", "textldm"},
    "train_dit.py": {"engine", "textldm"},
    "sample.py": {"engine", "textldm", "variants"},
}


@pytest.mark.parametrize("path", files_in(*ARROWS), ids=name_of)
def test_the_arrows_of_imports_go_one_way(path):
    allowed = ARROWS[name_of(path).split("/")[0]]
    imported = {module.split(".")[0] for module, _ in our_imports_of(path)}
    assert imported <= allowed


@pytest.mark.parametrize("path", files_in("variants"), ids=name_of)
def test_only_the_writers_import_several_variants(path):
    imported = {module for module, _ in our_imports_of(path) if module.startswith("variants")}
    if path.name != "writers.py":
        assert not imported


@all_files
def test_nothing_imports_a_script(path):
    if path.parent.name == "tests":
        return
    imported = {module.split(".")[0] for module, _ in our_imports_of(path)}
    assert not imported & set(SCRIPTS)


def test_at_the_top_are_only_the_files_of_the_readme():
    paths = files_of_git()
    if paths is None:
        paths = list(ROOT.glob("*.py"))
    names = {path.name for path in paths if path.parent == ROOT}
    unexpected = {name for name in names - AT_THE_TOP if not name.startswith(".")}
    assert not unexpected


def parameters_of(function):
    arguments = function.args
    parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    for more in (arguments.vararg, arguments.kwarg):
        if more is not None:
            parameters.append(more)
    return [p.arg for p in parameters if p.arg not in ("self", "cls")]


SCRIPT_FILES = [f"{name}.py" for name in SCRIPTS]
CODE = files_in("textldm.py", "engine", "variants", "baselines", *SCRIPT_FILES)


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_no_function_has_too_many_parameters(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            parameters = parameters_of(node)
            found = f"{name_of(path)}:{node.lineno} {node.name} has {len(parameters)} parameters"
            assert len(parameters) <= MOST_PARAMETERS, found


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_no_lambda_has_a_name(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Assign):
            assert not isinstance(node.value, ast.Lambda), f"{name_of(path)}:{node.lineno}"


PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 2000


def anchor_of(heading):
    """GitHub's name of a heading's anchor."""
    kept = [c for c in heading.strip().lower() if c.isalnum() or c in "-_ "]
    return "".join(kept).replace(" ", "-")


def anchors_in(page):
    """Anchors of the headings of a page, and those that rows of its tables have."""
    headings = re.findall(r"(?m)^#+ (.*)$", page)
    return [anchor_of(heading) for heading in headings] + re.findall(r'<a id="(.*?)">', page)


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors_in(path.read_text()), target


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
