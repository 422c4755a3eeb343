"""Tell whether two calls are of the same function with the same arguments, by value."""

from __future__ import annotations

import functools
import gc
import types
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from jax.core import Tracer

from jpyfunc._hashable import ById
from jpyfunc._limits import (
    MAX_FINGERPRINT_BYTES,
    MAX_FINGERPRINT_OBJECTS,
)
from jpyfunc._staging.closure import (
    CONTAINERS,
    held_directly,
    is_library,
    is_user_class,
    named_globals,
)


def fingerprint(values: Sequence[Any]) -> Hashable | None:
    """Return what `values` are and hold, by value; equal only if nothing of it differs.

    A function is told by its code and by what it holds, so that one that is defined again
    in each run of another is the same. A traced value is told by its aval, an array of
    NumPy by its content, and what cannot be looked into by its identity. What a body draws
    from a generator, or reads from a file, is not seen.

    Returns:
        A hashable value, or None if there is too much to look at.
    """
    found: list[Any] = []
    numbers: dict[int, int] = {}  # of the objects, by id: what is shared is told once
    stack: list[Any] = [values]
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
                identity, held = _look_into(value)
            except Exception:  # noqa: BLE001 - from attributes of a user's object
                return None
            found.append((identity, len(held)))
            stack += held
    return tuple(found)


def _is_large(value: Any) -> bool:
    return isinstance(value, np.ndarray) and (
        value.nbytes > MAX_FINGERPRINT_BYTES or value.dtype.hasobject
    )


def _look_into(value: Any) -> tuple[Hashable, list[Any]]:
    """Return what `value` is apart from what it holds, and what it holds."""
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
    module = getattr(value, "__module__", None) or kind.__module__
    if not is_function and is_library(module):
        return ById(value), []
    named = [*held_directly(value, "")]
    names, held = tuple(name for name, _ in named), [item for _, item in named]
    if is_function:
        # A library's function may hold a user's, as what `jax.vmap` returns does, but its
        # global variables are the library's.
        is_users = not is_library(value.__globals__.get("__name__", ""))
        return (value.__code__, names), [*held, *(named_globals(value) if is_users else ())]
    if not isinstance(value, type):
        held += gc.get_referents(value)  # such as the items of a deque
    # Not by `value.__module__`: a wrapped function has that of what it wraps.
    is_told_by_contents = (
        is_user_class(kind)
        or is_library(kind.__module__)
        or kind in (functools.partial, types.MethodType)
    )
    return (kind if is_told_by_contents else ById(value), names), held
