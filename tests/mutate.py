"""Breaks one line at a time, and runs the tests: what lives through them is guarded by none.

    python tests/mutate.py                       # every mistake of tests/mutations.json
    python tests/mutate.py 12 40                 # only these, counted from 0

Each mistake is made in a copy of the repository. The files of tests that name the broken module run
first, then all others, and the first failure ends the run. A minute and more for each that lives.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = sorted([*ROOT.glob("test_*.py"), *ROOT.glob("tests/test_*.py")])
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]


def nearest_first(path):
    """The files of tests: first those that name the module at path, most often first."""
    name = Path(path).stem
    return sorted(TESTS, key=lambda test: -test.read_text().count(name) / len(test.read_text()))


def is_caught(mistake):
    """Whether a test fails. Raises ValueError if the text to replace is not there once."""
    text = (ROOT / mistake["file"]).read_text()
    if text.count(mistake["old"]) != 1:
        raise ValueError(f"{mistake['file']}: {mistake['old']!r} is there not once")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "out", "*.bin"))
        (copy / mistake["file"]).write_text(text.replace(mistake["old"], mistake["new"]))
        tests = [str(test.relative_to(ROOT)) for test in nearest_first(mistake["file"])]
        return subprocess.run(PYTEST + tests, cwd=copy, capture_output=True).returncode == 1


def main():
    mistakes = json.loads((ROOT / "tests/mutations.json").read_text())
    numbers = [int(number) for number in sys.argv[1:]] or range(len(mistakes))
    caught = 0
    for number in numbers:
        was_caught = is_caught(mistakes[number])
        caught += was_caught
        what = "caught" if was_caught else "LIVES "
        mistake = mistakes[number]
        print(f"{number:3} {what} {mistake['file']}: {mistake['why']}", flush=True)
    print(f"{caught} of {len(numbers)} caught")


if __name__ == "__main__":
    main()
