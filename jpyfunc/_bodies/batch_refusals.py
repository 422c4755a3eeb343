"""Remember which calls run their batches one by one, and why.

To find out costs a run by branch whose results are dropped, so it is done once: for all
calls of a function, for those with one signature, or for those of one size, too.
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
    SIGNATURE = 1  # with operands of the same shapes and dtypes, and the same derivative
    SIZE = 2  # of these, batches whose sizes round up to the same power of two


_refusals: LruCache = LruCache(REFUSAL_CACHE_SIZE)


def remembered_refusal(layout: BatchLayout) -> str:
    """Why a batch is to run one by one, as earlier ones did; empty if nothing is known."""
    return next(filter(None, map(_refusals.get, _keys(layout)[0])), "")


def remember_refusal(layout: BatchLayout, scope: Scope, why: str) -> None:
    """Run such calls one by one from now on."""
    keys, function = _keys(layout)
    with contextlib.suppress(TypeError):  # a built-in function has no weak references
        _refusals.put(keys[scope], why, [function])


def _keys(layout: BatchLayout) -> tuple[list[Any], Any]:
    """The keys of a call, one per `Scope`, and the function that they are valid with."""
    function = layout.base.function.callable
    # A bound method is a new object each time that it is looked up; its function is not.
    function = getattr(function, "__func__", function)
    signature = (id(function), layout.base.title, layout.base.in_avals)
    size = (layout.count - 1).bit_length()
    return [id(function), signature, (*signature, size)], function
