"""The layout that CONTRIBUTING.md states: imports, JAX's private names, sizes, names."""

import ast
import functools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jpyfunc"
MODULES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
each_module = pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE))
)


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
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_every_module_is_listed_once():
    order = stated_order()
    assert sorted(order) == sorted({unit(path) for path in MODULES})


@each_module
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


@each_module
def test_private_names_of_jax_stay_in_compat(path):
    if unit(path) != "_compat":
        assert not [
            name
            for name in imported(path)
            if name.startswith(("jax._src", "jaxlib._", "jaxlib.xla", "jaxlib.mlir"))
        ]
        assert "._src" not in path.read_text(encoding="utf-8")


def is_private(name: object) -> bool:
    return isinstance(name, str) and bool(re.match(r"_(?!_)", name))


@functools.cache
def own_private_names() -> set[str]:
    """Return private names that the package defines, and JAX's own traces do not have."""
    names = {path.stem for path in MODULES} | {path.parent.name for path in MODULES}
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(ast.Name("self" | "cls"), attr=name, ctx=ast.Store()):
                names.add(name)
    return names - {*jax.core.Trace.__slots__, *jax.core.Tracer.__slots__}


def private_attributes(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Attributes that a module reads, writes or overrides by their private names."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(ast.Name("sys"), attr="_getframe" | "_current_frames"):
                continue
            case ast.Attribute(attr=name):
                pass
            case ast.Call(
                ast.Name("getattr" | "setattr" | "hasattr"), [_, ast.Constant(name), *_]
            ):
                pass
            case ast.ClassDef(body=body):
                for method in body:
                    if isinstance(method, ast.FunctionDef) and is_private(method.name):
                        yield method.name, method.lineno
                continue
            case _:
                continue
        if is_private(name):
            yield name, node.lineno


@each_module
def test_private_attributes_of_jax_stay_in_compat(path):
    if unit(path) != "_compat":
        assert not [
            f"{path.name}:{line}: {name}"
            for name, line in private_attributes(TREES[path])
            if name not in own_private_names()
        ]


@each_module
def test_files_classes_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (
        250 if unit(path) == "_compat" else 450
    )
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            limit = 250 if isinstance(node, ast.ClassDef) else 60
            if node.name not in ("py_func", "numpy_func"):  # nearly all docstring
                assert lines <= limit, f"{node.name} has {lines} lines"


def test_names_of_modules_and_classes_are_unique():
    modules = Counter(
        path.stem
        for path in MODULES
        if path.stem != "__init__"
        and not unit(path).startswith("tf1")  # TensorFlow's names
    )
    classes = Counter(
        node.name
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, n in [*modules.items(), *classes.items()] if n > 1]


@each_module
def test_tunable_numbers_are_in_limits(path):
    """No other module has a numeric constant."""
    numbers = []
    for node in TREES[path].body:
        match node:
            case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(
                ast.Name(name), _, value
            ):
                parts = [*ast.walk(value)] if value else []
                is_number = parts and all(
                    isinstance(part, ast.BinOp | ast.UnaryOp | ast.operator | ast.unaryop)
                    or (isinstance(part, ast.Constant) and type(part.value) in (int, float))
                    for part in parts
                )
                numbers += [name] if is_number and name.isupper() else []
    assert unit(path) == "_limits" or not numbers
