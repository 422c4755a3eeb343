"""What a body holds besides its arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import inspect
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jpyfunc._hashable import ById
from jpyfunc._interpreters.batch_tracer import is_batch_tracer
from jpyfunc._interpreters.tape_tracer import value_if_over
from jpyfunc._limits import (
    MAX_FINGERPRINT_BYTES,
    MAX_FINGERPRINT_OBJECTS,
    MAX_HELD_OBJECTS,
    MAX_OPENED_CONTAINERS,
)
from jpyfunc._staging.abstract import is_abstract

CONTAINERS = (dict, list, tuple, set, frozenset)  # themselves, and not what derives of them
ATOMS = (str, bytes, int, float, complex, bool, type(None), np.ndarray, np.generic)
ITERATING = ("builtins", "itertools")  # modules whose iterators hold what they give
LIBRARIES = ("builtins", "jax", "jaxlib", "jpyfunc", "numpy")


def refuse_traced_closure(body: Any, where: str) -> None:
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
        )


def refuse_traced_leaf(leaf: Any, where: str) -> None:
    """Raise if a leaf of the arguments that is no array holds a value that is traced.

    Raises:
        TypeError: it does; the text says how JAX takes such an object apart.
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
            f"and JAX does not look into a {kind}, which is no pytree. {remedy}, or pass "
            "the value as an argument of its own."
        )


def _traced(value: Any) -> Iterator[tuple[str, Any]]:
    """What `value` holds that a transform traces.

    What a body has left in it in a run that is over is no value any more, or its own: a
    body may leave it there, and put another in its place. If it is used, that is refused.
    """
    for path, item in held(value, with_globals=False):
        value = value_if_over(item)
        is_left = is_abstract(item) or (is_batch_tracer(value) and not value.is_running)
        if isinstance(value, Tracer) and not is_left:
            yield path, item


def held(body: Any, with_globals: bool) -> Iterator[tuple[str, Any]]:
    """Everything that `body` holds, each with the name that it goes by."""
    # Not by recursion: what a body holds may be a list of any length, linked by
    # attributes. `seen` keeps what was searched, so that no other takes its id.
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
            stack.extend(_parts(value, path))
            if with_globals and isinstance(value, types.FunctionType):
                stack.extend(_globals(value))
        except Exception:  # noqa: BLE001 - from attributes of a user's object
            continue


def _contents(container: Any, opened: dict[int, Any]) -> list[Any]:
    """What is in a container and in those in it, down to what is no container, or an atom.

    A body may hold a data set of millions of numbers in lists, and this is on the way of
    every call that is traced. So each level is opened by one call of the collector's own
    traversal, and sorted by functions in C: 4 ms for 20,000 lists, not 30. Objects in
    containers are opened as these are, because there may be as many.

    Args:
        container: one of `CONTAINERS`.
        opened: those that were opened before, by id, which are not opened again.
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
            if kind in CONTAINERS or _is_users(kind):
                level |= distinct
            else:
                contents += distinct.values()
    return contents


def _is_users(kind: type) -> bool:
    """Whether a class is a user's, so that its objects hold their attributes alone."""
    is_made_by_python = kind.__flags__ & 1 << 9  # Py_TPFLAGS_HEAPTYPE
    return bool(is_made_by_python) and not (
        issubclass(kind, type | jax.Array | Tracer) or _is_library(kind.__module__)
    )


def fingerprint(values: Any) -> Any:
    """What `values` are and hold, by value, to tell whether any of it is another by now.

    Functions are told apart by their code and by what they hold, so that one that is
    defined again in each run of another is the same; traced values by their avals; arrays
    of NumPy by their content; what cannot be looked into by itself. What a body draws
    from a generator, or reads from a file, is not seen.

    Returns:
        A hashable value, or None if there is too much to look at.
    """
    found: list[Any] = []
    numbers: dict[int, int] = {}
    stack = [values]
    while stack:
        value = stack.pop()
        if isinstance(value, str | bytes | int | float | complex | type(None)):
            found.append((type(value), value))
        elif id(value) in numbers:
            found.append(numbers[id(value)])
        elif len(numbers) == MAX_FINGERPRINT_OBJECTS or _is_large(value):
            return None
        else:
            numbers[id(value)] = len(numbers)
            try:
                identity, parts = _looked_into(value)
            except Exception:  # noqa: BLE001 - from attributes of a user's object
                return None
            found.append((identity, len(parts)))
            stack += parts
    return tuple(found)


def _is_large(value: Any) -> bool:
    return isinstance(value, np.ndarray) and (
        value.nbytes > MAX_FINGERPRINT_BYTES or value.dtype.hasobject
    )


def _looked_into(value: Any) -> tuple[Any, list[Any]]:
    """What `value` is by itself, and what it holds."""
    kind = type(value)
    if isinstance(value, Tracer):
        return value.aval, []
    if isinstance(value, np.ndarray):
        return (value.shape, value.dtype, value.tobytes()), []
    if kind is dict:
        return kind, [*value.keys(), *value.values()]
    if kind in CONTAINERS:
        return kind, list(value)
    is_function = isinstance(value, types.FunctionType)
    if not is_function and _is_library(
        getattr(value, "__module__", None) or kind.__module__
    ):
        return ById(value), []
    names_and_parts = [*_parts(value, "")]
    names = tuple(name for name, _ in names_and_parts)
    parts = [part for _, part in names_and_parts]
    if is_function:
        # Those of libraries may hold a user's, as what `jax.vmap` returns does.
        is_users = not _is_library(value.__globals__.get("__name__", ""))
        return (value.__code__, names), [*parts, *(_named(value) if is_users else ())]
    if not isinstance(value, type):
        parts += gc.get_referents(value)  # the items of a deque, which are no attributes
    # A wrapped function has the `__module__` of what it wraps.
    is_its_parts = _is_users(kind) or _is_library(kind.__module__)
    is_its_parts = is_its_parts or kind in (functools.partial, types.MethodType)
    return (kind if is_its_parts else ById(value), names), parts


def _globals(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The global variables that a function names, and the module attributes."""
    for value in _named(function):
        if (
            isinstance(value, Tracer | jax.Array)
            or not _is_library(getattr(value, "__module__", None) or type(value).__module__)
            or isinstance(value, dict | list | tuple)
        ):
            yield "a global", value


def _named(function: types.FunctionType) -> list[Any]:
    """Values of the global variables that a function names, and module attributes."""
    named: list[Any] = []
    codes = [function.__code__]
    for code in codes:
        codes.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
        found = [function.__globals__.get(name) for name in code.co_names]
        for module in [m for m in found if isinstance(m, types.ModuleType)]:
            if not _is_library(module.__name__):
                found.extend(vars(module).get(name) for name in code.co_names)
        named += found
    return named


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in LIBRARIES


def _parts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What `value` holds directly; containers and methods go by the name of their own."""
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
        if not _is_library(owner.__module__):
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
