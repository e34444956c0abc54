"""The embedded corpora: texts that Python and its packages carry, so that they need no download."""

import ast
import importlib.util
import os
import re
import sys
import sysconfig
import unicodedata
from pathlib import Path

# Names with these beginnings only number their characters.
NUMBERED_NAMES = re.compile(
    "CJK (UNIFIED|COMPATIBILITY) IDEOGRAPH|TANGUT (IDEOGRAPH|COMPONENT)|HANGUL SYLLABLE|"
    "NUSHU CHARACTER|KHITAN SMALL SCRIPT CHARACTER|(EGYPTIAN|ANATOLIAN) HIEROGLYPH|CUNEIFORM SIGN|"
    "SIGNWRITING|VARIATION SELECTOR|BAMUM LETTER|YI SYLLABLE|LINEAR A SIGN"
)
# Folders of packages that are not read for docs.
SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "site-packages", "idlelib", "lib2to3"}


def names():
    """Yields the name of each Unicode character in lower case. Skips NUMBERED_NAMES."""
    for code_point in range(sys.maxunicode + 1):
        name = unicodedata.name(chr(code_point), "")
        if name and not NUMBERED_NAMES.match(name):
            yield name.lower()


def docs():
    """Yields paragraphs of prose from the docstrings of the standard library, torch and numpy.

    The source files are parsed, not imported. Each paragraph comes once.
    """
    packages = [importlib.util.find_spec(name).origin for name in ("torch", "numpy")]
    roots = [sysconfig.get_paths()["stdlib"], *map(os.path.dirname, packages)]
    seen = set()
    for root in roots:
        for path in sorted(Path(root).rglob("*.py")):
            if SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1]):
                continue
            for text in docstring_paragraphs(path):
                if is_prose(text) and text.lower() not in seen:
                    seen.add(text.lower())
                    yield text


def docstring_paragraphs(path):
    """Yields each paragraph of each docstring in a Python file, with single spaces between words.

    A file that cannot be read or parsed yields nothing.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node) or ""
            for paragraph in re.split(r"\n\s*\n", docstring):
                yield " ".join(paragraph.split())


def is_prose(text):
    """Returns whether text looks like sentences, not like code, a list or a table."""
    if len(text) < 20 or ">>>" in text or not text[0].isupper() or text[-1] != ".":
        return False
    plain = sum(character.isalpha() or character in " ,.'" for character in text)
    return plain >= 0.93 * len(text)


EMBEDDED = {"names": names, "docs": docs}
