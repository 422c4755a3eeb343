"""The import order that CONTRIBUTING.md states, and where private names of JAX may be."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jpyfunc"
MODULES = sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    """Return the name of a module in the list: its path, without `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "/".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def stated_order() -> list[str]:
    """Read the list, top down; an indented name belongs to the wing named last."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"## Layout.*?```\n(.*?)```", text, re.DOTALL)
    order: list[str] = []
    for line in block[1].splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            wing = order[-1].partition("/")[0]
            name = f"{wing}/{name}"
        order.append(name)
    return order


def imported(path: Path) -> set[str]:
    """Return the full names of all modules that a module imports, anywhere in its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_every_module_is_listed_once():
    order = stated_order()
    assert sorted(order) == sorted({unit(path) for path in MODULES})


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    order = stated_order()
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "jpyfunc" or unit(path) == "__init__":
            continue
        used = next(
            (u for n in (4, 3, 2) if (u := "/".join(parts[1:n])) in order), "__init__"
        )
        if unit(path) == "__main__" and used == "__init__":
            continue  # a user's program
        assert used == unit(path) or order.index(used) > order.index(unit(path)), (
            f"{path.name} imports {name}, which is not below it"
        )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_of_jax_stay_in_compat(path):
    if unit(path) != "_compat":
        assert not [
            name
            for name in imported(path)
            if name.startswith(("jax._src", "jaxlib._", "jaxlib.xla", "jaxlib.mlir"))
        ]
        assert "._src" not in path.read_text(encoding="utf-8")
