"""Graph tensors as `py_func` knows them: a call on one is left to its graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Symbol:
    """A value that a graph will have when it runs, and that has none yet."""

    __slots__ = ()

    def call_py_func(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make a node of `func(*args, **kwargs)` in the graph of this symbol."""
        raise NotImplementedError


def noting(func: Callable[..., Any], note: str) -> Callable[..., Any]:
    """Return `func`, with `note` added to an exception that leaves it."""

    @functools.wraps(func, updated=())
    def noted(*args: Any, **kwargs: Any) -> Any:
        try:
            return func(*args, **kwargs)
        except Exception as error:
            add_note(error, note)
            raise

    return noted


def add_note(error: BaseException, note: str) -> None:
    """Add `note` to an exception that may have it: a body may raise one object twice."""
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)
