"""Every example in the docs runs: those of docstrings, and the code of the README."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

import jpyfunc
import jpyfunc.tf1

README = Path(__file__).parent.parent / "README.md"
MODULES = ["jpyfunc"] + [
    module.name for module in pkgutil.walk_packages(jpyfunc.__path__, "jpyfunc.")
]
PUBLIC = [
    (module, name)
    for module in (jpyfunc, jpyfunc.tf1)
    for name in sorted(vars(module))
    if not name.startswith("_")
]


def examples(name):
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for test in finder.find(importlib.import_module(name)) if test.examples]


TESTS = [test for name in MODULES for test in examples(name)]


@pytest.fixture(autouse=True)
def _leave_no_graph():
    yield
    jpyfunc.tf1.reset_default_graph()


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.name)
def test_docstring(test):
    said = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not said, "".join(said)


def test_public_names():
    """The names of TensorFlow 1 are those of `jpyfunc.tf1`."""
    assert {name for name in vars(jpyfunc) if not name.startswith("_")} == {
        *("py_func", "numpy_func", "explain", "profile", "raise_original"),
        *("set_tape_limit", "tape_bytes", "tf1"),
        *("PyFuncError", "InferenceError", "NotDifferentiableError", "ResultError"),
        *("TapeLostError", "UnsupportedError", "GradientCutWarning"),
    }


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_public_objects_have_a_docstring_and_an_example(module, name):
    thing = getattr(module, name)
    if isinstance(thing, np.dtype):
        return
    assert inspect.getdoc(thing)
    # JAX's functions with TensorFlow's names have a single line.
    if getattr(thing, "__module__", "").startswith(
        ("jpyfunc.tf1._arrays", "jpyfunc.tf1.math")
    ):
        return
    # An exception is shown where it is raised, and operations are not created directly.
    if callable(thing) and not (isinstance(thing, type) and issubclass(thing, Exception)):
        assert ">>>" in everything_said_about(thing)


def everything_said_about(thing):
    members = vars(thing).values() if isinstance(thing, type) else ()
    return "".join(inspect.getdoc(x) or "" for x in (thing, *members))


def fenced(text):
    """`(info string, line number of the code, code)` of each fenced block."""
    blocks, inside = [], None
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        fence = re.match(r" {0,3}```(.*)", line)
        if inside is None and fence:
            inside = (fence[1].strip(), number + 1, [])
        elif inside is not None and fence and not fence[1].strip():
            blocks.append((inside[0], inside[1], "".join(inside[2])))
            inside = None
        elif inside is not None:
            inside[2].append(line)
    assert inside is None, "a block of the README is not closed"
    return blocks


def test_fenced_blocks_are_found():
    text = "a\n```python\nx = 1\n\ny = 2\n```\n```sh\nls\n```\n```\nz\n```\n"
    assert fenced(text) == [
        ("python", 3, "x = 1\n\ny = 2\n"),
        ("sh", 8, "ls\n"),
        ("", 11, "z\n"),
    ]


def test_readme(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for info, line, code in fenced(README.read_text(encoding="utf-8")):
        if not info.lower().startswith("py"):
            continue
        assert info == "python", f"README line {line}: a {info!r} block would not be run"
        # The line numbers in a traceback are then those of the README.
        source = "\n" * (line - 1) + code
        exec(compile(source, str(README), "exec"), namespace)
