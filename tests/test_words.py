"""The words of the code and the documentation: those of JAX and of plain English.

A word that has been replaced does not come back, so that a concept has one name. Private
vocabulary takes every reader time to learn, and users meet it in errors.
"""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "jpyfunc").rglob("*.py"))
DOCUMENTS = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# What is not written, as a regular expression, with what is written instead.
REPLACED = {
    r"foresee|foreseen": "trace, stage out",
    r"\banew\b": "again",
    r", say,": "for example, such as",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bonce in all\b": "once in total",
    r"\b(has|have|had) not[.,;:)]": "lacks, does not have",
    r"\b(a|each|per|one|every|more|many) turns?\b|\bturns\b(?=[.,;:)]| of )": "iteration",
    r"\bruns? (is|are|was|were) (not )?kept\b|\bkept runs?\b": "cached tape",
    r"\bopaque\b": "host function",
    r"\bloose\b|\bLoose": "uncached",
    r"\bsettings?\b|\bSETTINGS\b": "configuration",
    r"\bparts? of (a|the) batch\b": "subset",
    r"\b(the|its|both|which) sides\b|\b(each|every|one|other) side\b(?! effect)": "branch",
    r"\bdecisions?\b": "branch point",
    r"\bways\b": "paths",
    r"\bcrosses\b|crossing": "host round trip, overhead",
    r"\bas ever\b": "as usual",
    r"\bwithout a word\b": "silently",
    r"\b(push|pull)\(|\bdef (push|pull)\b": "jvp, vjp",
    r"\bcuts? (a |the |its )?gradients?\b|\bcut off\b": "detaches",
    r"\bnote\(": "record, count",
    r"\bby (x|operands?)\b": "with respect to",
    r"\bleast recently used of which\b": "LRU cache",
}
# The first words of a docstring that do not say what something does or is.
FIRST_WORDS = "It|What|Those|That|Which|As|They|How|Where|All|Of|So|Here"


def texts(path):
    """Yield the lines of a file that people read, with their numbers."""
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
    return enumerate(lines, 1)


@pytest.mark.parametrize("word", REPLACED)
def test_replaced_words_do_not_come_back(word):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*SOURCES, *DOCUMENTS, *NOTEBOOKS]
        for number, line in texts(path)
        if re.search(word, line)
    ]
    assert not found, f"write {REPLACED[word]!r}:\n" + "\n".join(found)


def test_docstrings_begin_with_what_is_done_or_is():
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                if re.match(rf"({FIRST_WORDS})\b", text):
                    line = getattr(node, "lineno", 1)
                    found.append(f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}")
    assert not found, "\n".join(found)
