"""Every notebook runs top to bottom in a kernel, and is committed as it ran."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell):
    return [output.output_type for output in cell.outputs]


def read(path):
    return nbformat.read(path, as_version=4)


def test_all_are_there():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_as_it_ran(path):
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all("error" not in shown(cell) for cell in cells)
    assert any("image/png" in o.get("data", {}) for cell in cells for o in cell.outputs)
    text = path.read_text(encoding="utf-8")
    assert not [word for word in ("/tmp/", "/root/", "/home/", "Traceback") if word in text]


@pytest.mark.filterwarnings(  # pyzmq's event loop policy on some platforms, not ours
    "ignore::DeprecationWarning", "ignore::RuntimeWarning", "ignore::ResourceWarning"
)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_top_to_bottom(path):
    notebook = read(path)
    kept = ("XLA_FLAGS", "MPLBACKEND")  # the kernel is a user's, not the test session's
    environment = {k: v for k, v in os.environ.items() if k not in kept}
    environment["PYTHONPATH"] = str(ROOT)
    client = NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env=environment)  # an exception in a cell is raised here
    committed = code_cells(read(path))
    for cell, before in zip(code_cells(notebook), committed, strict=True):
        assert set(shown(cell)) == set(shown(before)), cell.source
