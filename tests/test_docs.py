"""Every example runs: those of docstrings, of the README, and of the documentation."""

import ast
import doctest
import importlib
import inspect
import itertools
import json
import linecache
import pkgutil
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

import jpyfunc
import jpyfunc.tf1
from jpyfunc import _conversion

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
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
        *("py_func", "numpy_func", "explain", "profile", "progress", "raise_original"),
        "range",
        *("set_tape_limit", "tape_bytes", "tf1"),
        *("PyFuncError", "InferenceError", "NotDifferentiableError", "ResultError"),
        *("TapeLostError", "UnsupportedError", "ExecutorError", "GradientCutWarning"),
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
    assert inside is None, "a fenced block is not closed"
    return blocks


def test_fenced_blocks_are_found():
    text = "a\n```python\nx = 1\n\ny = 2\n```\n```sh\nls\n```\n```\nz\n```\n"
    assert fenced(text) == [
        ("python", 3, "x = 1\n\ny = 2\n"),
        ("sh", 8, "ls\n"),
        ("", 11, "z\n"),
    ]


def examples_in(text):
    """`(line number, code, the text block below it or None)` of each Python block."""
    pairs = itertools.pairwise([*fenced(text), ("", 0, "")])
    for (info, line, code), (below, _, said) in pairs:
        if info.lower().startswith("py"):
            assert info == "python", f"line {line}: {info!r} would not be run"
            yield line, code, said if below == "text" else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page(page, monkeypatch, tmp_path, capsys):
    """Each Python block runs, and does what a text block below it says.

    That is what it prints and, as the last line, the exception or warning that it raises.
    """
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for line, code, expected in examples_in(page.read_text(encoding="utf-8")):
        # Errors quote the line of the body: it is found where a file would be looked up.
        linecache.cache["example.py"] = 0, None, code.splitlines(True), "example.py"
        capsys.readouterr()
        raised = ""
        try:
            exec(compile(code, "example.py", "exec"), namespace)
        except Exception as error:
            notes = getattr(error, "__notes__", [])
            # JAX adds one on the frames that it left out.
            ours = [note for note in notes if "JAX_TRACEBACK_FILTERING" not in note]
            raised = "\n".join([f"{type(error).__name__}: {error}", *ours])
            if not expected or f"{type(error).__name__}: " not in expected:
                error.add_note(f"in the block at {page.name}:{line}")
                raise
        said = capsys.readouterr().out + raised
        if expected is not None:
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            same = doctest.OutputChecker().check_output(expected, said, flags)
            assert same, f"{page.name}:{line}: expected\n{expected}\ngot\n{said}"


def test_every_public_name_is_in_the_reference():
    pages = "".join(
        page.read_text(encoding="utf-8") for page in DOCS.glob("reference/*.md")
    )
    documented = set(re.findall(r"auto\w+:: (\S+)", pages))
    documented |= {f"jpyfunc.tf1.{name}" for name in re.findall(r"`(?:tf\.)?(\w+)`", pages)}
    assert {f"{module.__name__}.{name}" for module, name in PUBLIC} <= documented


ERRORS = (DOCS / "errors.md").read_text(encoding="utf-8")
# Headings with what stands below them, without those that have headings below them.
CAUSES = {
    lines.partition("\n")[0]: lines
    for section in re.split(r"^## ", ERRORS, flags=re.MULTILINE)[1:]
    for lines in re.split(r"^### ", section, flags=re.MULTILINE)[
        1 if "\n### " in section else 0 :
    ]
}
# Functions that make an error or warning whose last line does not name a heading.
WITHOUT_HEADING = {
    ("base_tracer", "__bool__"),  # as arrays raise it
    ("base_tracer", "__index__"),  # as arrays raise it
    ("abstract_tracer", "concrete"),  # an InferenceError is raised in its place
    ("inference", "no_result"),  # `_why_no_result` names it
    ("exceptions", "leave_host_call"),  # `failure_text` names it
    ("_apply", "_without_shape"),  # the error that it quotes names it
    ("loop_primitive", "_traced"),  # our own mistakes alone raise these
    ("loop_primitive", "next_carry"),
    ("loop_primitive", "_promoted"),
    ("while_loop", "while_loop"),
    ("while_loop", "scalar_test"),
    ("_frames", "warn_at"),  # its callers name it
    ("_frames", "warn_at_function"),  # its callers name it
}


def errors_made(module):
    """`(function, source)` of each expression that makes an error or a warning."""
    source = inspect.getsource(module)
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                # Python shows the text of a KeyError as a literal, in one line; that of an
                # UnseenStateError is a reason, which `explain` shows.
                is_shown = name not in ("KeyError", "UnseenStateError")
                if is_shown and re.search(
                    r"(Error|[Ww]arn(ing)?|warn_at(_function)?)$", name
                ):
                    yield function.name, ast.get_source_segment(source, node)


def test_every_error_names_its_heading():
    """In its last line, which `see` makes; and each heading is of some error."""
    named = {role.heading for role in (_conversion.RESULT, _conversion.ARGUMENT)}
    for name in MODULES:
        module = importlib.import_module(name)
        named |= set(re.findall(r'see\(\s*"(.+?)"', inspect.getsource(module)))
        for function, code in errors_made(module):
            known = (name.rpartition(".")[2], function) in WITHOUT_HEADING
            assert ("see(" in code) != known, f"{name}.{function}: {code}"
    assert named == set(CAUSES)


# What their programs would need is not installed, or does not exist yet.
WITHOUT_PROGRAM = {"A progress bar without tqdm", "A version of JAX that is not supported"}


@pytest.mark.parametrize("heading", [x for x in CAUSES if x not in WITHOUT_PROGRAM])
def test_a_cause_has_a_program_that_raises_the_error_and_one_that_works(heading):
    *_, raises, works = [*examples_in(CAUSES[heading])]
    for text, expected in ((raises[2], {heading}), (works[2] or "", set())):
        assert set(re.findall(r'See\s+"(.+?)"\s+in\s+docs/errors.md', text)) == expected


def test_every_class_of_errors_has_a_heading():
    headings = re.findall(r"^## (\w+)$", ERRORS, re.MULTILINE)
    assert {
        name
        for module, name in PUBLIC
        if module is jpyfunc
        and isinstance(thing := getattr(module, name), type)
        and issubclass(thing, Exception)
    } <= {*headings, "PyFuncError"}


def test_numbers_of_the_benchmarks_are_those_that_were_measured():
    plot = runpy.run_path(str(DOCS / "benchmarks" / "plot.py"))
    results = json.loads((DOCS / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    table = (DOCS / "benchmarks" / "table.md").read_text(encoding="utf-8")
    assert table == plot["table"](results["about"], results["rows"])
    assert plot["claims"](results["rows"]) in PAGES[0].read_text(encoding="utf-8")


def test_links_of_the_readme():
    """Sphinx checks the links of `docs`."""
    for link in re.findall(
        r"\]\(([^):]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")
    ):
        assert (ROOT / link).exists(), link
