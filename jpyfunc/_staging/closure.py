"""Search what a body holds besides its arguments, and refuse traced values in it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jpyfunc._errors import see
from jpyfunc._interpreters.batch_tracer import is_batch_tracer
from jpyfunc._interpreters.tape_tracer import value_if_over
from jpyfunc._limits import (
    MAX_HELD_OBJECTS,
    MAX_OPENED_CONTAINERS,
)
from jpyfunc._staging.abstract_tracer import is_abstract

CONTAINERS = (dict, list, tuple, set, frozenset)  # these classes alone, no subclasses
ATOMS = (str, bytes, int, float, complex, bool, type(None), np.ndarray, np.generic)
ITERATING = ("builtins", "itertools")  # modules whose iterators hold what they yield
LIBRARIES = ("builtins", "jax", "jaxlib", "jpyfunc", "numpy")


def refuse_traced_closure(body: Callable[..., Any], where: str) -> None:
    """Raise if `body` holds a value that a transform is tracing.

    Looks into closures, defaults, `functools.partial`, methods, wrapped functions and
    the attributes of objects, and into the containers that these hold.

    Raises:
        TypeError: it does; the text says where, and to pass it.
    """
    for path, value in _traced(body):
        # An equinox module or a `jax.tree_util.Partial` passes as an argument itself.
        is_pytree = not jax.tree_util.all_leaves([body])
        how = ", with the function: wrap lambda f, *args: f(*args)" if is_pytree else ""
        raise TypeError(
            f"{where}: the body holds a traced value, {value.aval.str_short()}, as "
            f"{path}. It runs outside the transform that traces it, and would get "
            f"neither its value nor its gradient. Pass it as an argument{how}."
            + see("Closes over a traced value")
        )


def refuse_traced_leaf(leaf: Any, where: str) -> None:
    """Raise if a leaf of the arguments that is not an array holds a traced value.

    Raises:
        TypeError: it does; the text says how to make a pytree of such an object.
    """
    for path, value in _traced(leaf):
        kind = type(leaf).__name__
        remedy = (
            "Pass jax.tree_util.Partial(function, value)"
            if isinstance(leaf, types.FunctionType | types.MethodType | functools.partial)
            else f"Register {kind} with jax.tree_util.register_dataclass"
            if dataclasses.is_dataclass(leaf)
            else f"Register {kind} with jax.tree_util.register_pytree_node_class"
        )
        raise TypeError(
            f"{where}: a {kind} holds a traced value, {value.aval.str_short()}, as {path}, "
            f"and JAX does not look into a {kind}, which is not a pytree. {remedy}, or "
            "pass the value as an argument of its own." + see("Closes over a traced value")
        )


def _traced(value: Any) -> Iterator[tuple[str, Any]]:
    """Find the values that `value` holds and a transform traces.

    A body may leave its own values in what it holds, and replace them in its next run.
    Those of a run that is over are not traced any more; using one is refused where it is
    used.
    """
    for path, item in held(value, with_globals=False):
        value = value_if_over(item)
        is_left = is_abstract(item) or (is_batch_tracer(value) and not value.is_running)
        if isinstance(value, Tracer) and not is_left:
            yield path, item


def held(body: Any, with_globals: bool) -> Iterator[tuple[str, Any]]:
    """Find everything that `body` holds, each object once, with the name that it goes by.

    Args:
        body: any object.
        with_globals: whether to look at the global variables that functions name, too.
    """
    # A stack in the place of recursion: a body may hold a list of any length that is linked
    # by attributes. `seen` keeps the objects alive, so that no other one gets an id in it.
    seen: dict[int, Any] = {}
    opened: dict[int, Any] = {}
    stack: list[tuple[str, Any]] = [("itself", body)]
    while stack:
        path, value = stack.pop()
        if type(value) in CONTAINERS:
            stack.extend((path, item) for item in _contents(value, opened))
            continue
        if id(value) in seen or isinstance(value, ATOMS):
            continue
        if len(seen) == MAX_HELD_OBJECTS:
            return
        seen[id(value)] = value
        yield path, value
        try:
            stack.extend(held_directly(value, path))
            if with_globals and isinstance(value, types.FunctionType):
                stack.extend(_globals(value))
        except Exception:  # noqa: BLE001 - from attributes of a user's object
            continue


def _contents(container: Any, opened: dict[int, Any]) -> list[Any]:
    """Flatten a container, and those inside it, to what is neither a container nor an atom.

    A body may hold a data set of millions of numbers in lists, and each traced call comes
    here. So each level is opened by one call of the garbage collector's own traversal, and
    sorted by functions in C: 4 ms for 20,000 lists, in the place of 30. A user's objects
    inside containers are opened in the same way, because there may be as many.

    Args:
        container: one of `CONTAINERS`.
        opened: those that were opened before, by id. They are skipped, and added to.
    """
    contents: list[Any] = []
    level = {id(container): container}
    while len(opened) < MAX_OPENED_CONTAINERS:
        if not level.keys().isdisjoint(opened.keys()):
            level = {i: level[i] for i in level.keys() - opened.keys()}
        if not level:
            break
        opened.update(level)
        items = gc.get_referents(*level.values())
        level = {}
        kinds = set(map(type, items))
        for kind in kinds.difference(ATOMS):
            of_kind = [x for x in items if type(x) is kind] if len(kinds) > 1 else items
            distinct = dict(zip(map(id, of_kind), of_kind, strict=True))
            if kind in CONTAINERS or is_user_class(kind):
                level |= distinct
            else:
                contents += distinct.values()
    return contents


def is_user_class(kind: type) -> bool:
    """Tell whether a class is a user's, so that its objects hold only their attributes."""
    is_made_by_python = kind.__flags__ & 1 << 9  # Py_TPFLAGS_HEAPTYPE
    return bool(is_made_by_python) and not (
        issubclass(kind, type | jax.Array | Tracer) or is_library(kind.__module__)
    )


def is_library(module: str) -> bool:
    """Tell whether a module is of a library whose objects are not looked into."""
    return module.partition(".")[0] in LIBRARIES


def named_globals(function: types.FunctionType) -> list[Any]:
    """Collect the global variables that a function names, and attributes of modules."""
    named: list[Any] = []
    codes = [function.__code__]
    for code in codes:  # grows by the functions defined in the function
        codes.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
        found = [function.__globals__.get(name) for name in code.co_names]
        for module in [m for m in found if isinstance(m, types.ModuleType)]:
            if not is_library(module.__name__):
                found.extend(vars(module).get(name) for name in code.co_names)
        named += found
    return named


def _globals(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for value in named_globals(function):
        if (
            isinstance(value, Tracer | jax.Array)
            or not is_library(getattr(value, "__module__", None) or type(value).__module__)
            or isinstance(value, dict | list | tuple)
        ):
            yield "a global", value


def held_directly(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield what `value` holds directly, each with a name.

    Args:
        value: any object.
        path: the name that `value` goes by, which items of containers and methods take
            over.
    """
    if isinstance(value, dict):
        yield from ((path, item) for item in value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((path, item) for item in value)
    elif isinstance(value, functools.partial):
        yield path, value.func
        yield "an argument of functools.partial", (value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        yield path, value.__func__
        yield path, value.__self__
    elif isinstance(value, types.FunctionType):
        names = value.__code__.co_freevars
        for name, cell in zip(names, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # a name that is not bound yet
                yield f"the variable {name!r}", cell.cell_contents
        yield "a default", (value.__defaults__, value.__kwdefaults__)
    elif type(value).__module__ in ITERATING and isinstance(value, Iterator):
        yield from ((path, item) for item in gc.get_referents(value))
    elif isinstance(value, types.ModuleType | Tracer | jax.Array):
        return
    else:
        owner = value if isinstance(value, type) else type(value)
        if not is_library(owner.__module__):
            if owner is value:
                for name, item in vars(owner).items():
                    yield f"the attribute {name!r}", item
            else:
                yield path, owner
                for name in vars(owner).get("__slots__", ()):
                    yield f"the attribute {name!r}", getattr(value, name, None)
        if not isinstance(value, type):
            for name, item in getattr(value, "__dict__", {}).items():
                yield f"the attribute {name!r}", item
        # Statically: some objects make up whatever attribute they are asked for.
        yield path, inspect.getattr_static(value, "__wrapped__", None)
