"""Each notebook is committed as executed, and runs top to bottom in a kernel of its own.

What a notebook claims, its own cells check; a check that fails is an error of its cell.
"""

import itertools
import os
import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from programs import xla_flags

import jpyfunc

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
CELL_LIMIT_S = 120

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    """Yield the texts that a reader of the cell's outputs sees."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output.text
        else:
            yield from (v for k, v in output.data.items() if k.startswith("text/"))


def shown(cell):
    """Return the kinds of output of a cell: whether it prints, and its plots' formats."""
    printed = [o.name for o in cell.outputs if o.output_type == "stream"]
    plots = [sorted(o.data) for o in cell.outputs if o.output_type != "stream"]
    # Warnings about the machine (such as a missing GPU driver) are no part of a notebook.
    return "stdout" in printed, plots


@pytest.fixture
def kernel_environment(monkeypatch, tmp_path):
    """The environment of a user's kernel: one device, inline plots, this jpyfunc."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    environment = {**os.environ, "XLA_FLAGS": xla_flags(devices=1)}
    for name in ("MPLBACKEND", "PYTHONBREAKPOINT"):
        environment.pop(name, None)
    parts = [str(Path(jpyfunc.__file__).parents[1]), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, parts))
    return environment


def test_all_are_listed():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_log_huber",
        "02_debugging",
        "03_python_control_flow",
        "04_costs",
        "05_staged",
        "06_simulator",
    ]


@each_notebook
def test_committed_as_executed(path):
    assert b"\r" not in path.read_bytes()
    notebook = read(path)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert output.get("text", "").strip() or output.get("data")
        assert all(text.strip() for text in texts(cell))
    plots = [o for cell in cells for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(plots) >= 2


@each_notebook
def test_committed_for_any_machine(path):
    notebook = read(path)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }, "executing adds the version of Python here; drop it again"
    for cell in notebook.cells:
        assert cell.metadata == {}, "executing adds times of day here; drop them again"
        assert cell.source == cell.source.strip()
    for cell in code_cells(notebook):
        for text in texts(cell):
            # An absolute path, a kernel's temporary file, an address, a terminal's colour.
            assert not re.search(r"(?<![\w.])/\w+/\w|\b[A-Z]:\\|ipykernel_\d", text), text
            assert not re.search(r"0x[0-9a-f]{6}|\x1b\[", text), text


@each_notebook
def test_text_comes_before_code(path):
    kinds = [cell.cell_type for cell in read(path).cells]
    assert kinds[0] == "markdown"
    # Imports, and a helper right after them, need no words of their own.
    for before, kind in list(itertools.pairwise(kinds))[3:]:
        assert (before, kind) != ("code", "code")


@each_notebook
def test_runs_top_to_bottom(path, kernel_environment):
    committed = read(path)
    fresh = read(path)
    for cell in code_cells(fresh):
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        fresh,
        timeout=CELL_LIMIT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env=kernel_environment)  # raises the error of a cell
    for was, now in zip(code_cells(committed), code_cells(fresh), strict=True):
        assert shown(now) == shown(was), was.source
        assert now.execution_count == was.execution_count


def test_a_debugger_prompts_in_a_compiled_program(kernel_environment):
    """The notebook on debugging promises this."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env=kernel_environment)
    client = manager.client()
    client.start_channels()
    answers = iter(["p float(x)", "p 10 * y", "c"])
    printed = []

    def output(message):
        if message["msg_type"] == "stream":
            printed.append(message["content"]["text"])

    try:
        client.wait_for_ready(timeout=CELL_LIMIT_S)
        reply = client.execute_interactive(
            "import jax, pdb\n"
            "from jpyfunc import py_func\n"
            "@jax.jit\n"
            "@py_func(Tout=lambda x: x)\n"
            "def f(x):\n"
            "    y = x * 2\n"
            "    pdb.set_trace()\n"
            "    return y\n"
            "print('result', f(1.5))\n",
            stdin_hook=lambda message: client.input(next(answers)),
            output_hook=output,
            allow_stdin=True,
            timeout=CELL_LIMIT_S,
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
    text = "".join(printed)
    assert reply["content"]["status"] == "ok", text
    assert re.search(r"1\.5\n.*Array\(30\., .*\n.*result 3\.0", text, re.DOTALL), text
