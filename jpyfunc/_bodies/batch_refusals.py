"""Remembers which calls run their batches one by one, and why.

To find out costs a run by branch whose results are dropped, so it is found out once: for a
function, for one kind of call, or for batches of a kind up to some size.
"""

from __future__ import annotations

import contextlib
import enum
from typing import Any

from jpyfunc._bodies.batch_columns import BatchLayout
from jpyfunc._interpreters.lru_cache import LruCache
from jpyfunc._limits import REFUSAL_CACHE_SIZE


class Scope(enum.IntEnum):
    """The calls that a refusal holds for, as an index into their keys."""

    FUNCTION = 0  # all of the function
    KIND = 1  # with the same operands, and the same derivative
    SIZE = 2  # of these, batches of up to the same power of two


_refusals: LruCache = LruCache(REFUSAL_CACHE_SIZE)


def remembered_refusal(layout: BatchLayout) -> str:
    """Why a batch is to run one by one as others did before; empty if nothing is known."""
    return next(filter(None, map(_refusals.get, _keys(layout)[0])), "")


def remember_refusal(layout: BatchLayout, scope: Scope, why: str) -> None:
    """Run such calls one by one from now on."""
    keys, function = _keys(layout)
    with contextlib.suppress(TypeError):  # a built-in function has no weak references
        _refusals.put(keys[scope], why, [function])


def _keys(layout: BatchLayout) -> tuple[list[Any], Any]:
    """The keys of a call, a `Scope` each, and the function, which must live for them."""
    function = layout.base.function.callable
    # A bound method is a new object each time, so its function is the one.
    function = getattr(function, "__func__", function)
    kind = (id(function), layout.base.title, layout.base.in_avals)
    size = (layout.count - 1).bit_length()
    return [id(function), kind, (*kind, size)], function
