"""Refuses a body that closes over a traced value, which it could not see."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import jax

from jpyfunc._inference import is_abstract


def refuse_traced_closure(func: Any, where: str) -> None:
    """Raise if `func` holds a value that a transform is tracing.

    Looks into closures, defaults, `functools.partial`, bound instances and wrapped
    functions, and into the pytrees and functions that they hold.

    Raises:
        TypeError: it does; the text says which variable, and to pass it.
    """
    for path, value in _held(func, set()):
        if isinstance(value, jax.core.Tracer) and not is_abstract(value):
            raise TypeError(
                f"{where}: the body holds a traced value, {value.aval.str_short()}, as "
                f"{path}. It runs outside the transform that traces it, and would get "
                "neither its value nor its gradient. Pass it as an argument."
            )


def _held(value: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """The leaves that a callable holds, each with where."""
    if id(value) in seen or not callable(value):
        return
    seen.add(id(value))
    parts: list[tuple[str, Any]] = []
    if isinstance(value, functools.partial):
        parts = [
            ("an argument of functools.partial", (value.args, value.keywords)),
            ("", value.func),
        ]
    elif isinstance(value, types.MethodType):
        parts = [("an attribute of its instance", value.__self__), ("", value.__func__)]
    elif isinstance(value, types.FunctionType):
        names = value.__code__.co_freevars
        for name, cell in zip(names, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # a name that is not bound yet
                parts.append((f"the variable {name!r}", cell.cell_contents))
        parts.append(("a default", (value.__defaults__, value.__kwdefaults__)))
    elif hasattr(value, "__wrapped__"):
        parts = [("", value.__wrapped__)]
    elif not isinstance(value, type) and hasattr(value, "__dict__"):
        parts = [("an attribute of its instance", vars(value))]
    for path, part in parts:
        for leaf in jax.tree.leaves(part):
            yield path, leaf
            if isinstance(leaf, jax.core.Tracer):
                continue
            if (
                not callable(leaf)
                and path.endswith("instance")
                and hasattr(leaf, "__dict__")
            ):
                for attribute in jax.tree.leaves(vars(leaf)):
                    yield path, attribute
            for inner, held in _held(leaf, seen):
                yield inner or path, held
