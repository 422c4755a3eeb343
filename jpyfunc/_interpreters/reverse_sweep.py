"""Reverse sweeps through the entries of a tape, each compiled as one program.

Entry by entry, a sweep takes a call of XLA for each, some 10 us, and as much again in
Python. As one program it takes a single call. But XLA compiles that for up to a second, and
every sequence of operations is another program: a loop whose length depends on the data
would compile in every run. So a sweep is compiled only

- of at most `MAX_SWEEP_ENTRIES` entries, for which XLA takes a second;
- once `MIN_SWEEPS` tapes of exactly this structure were met, after which more are likely to
  follow;
- while fewer than `MAX_SWEEP_STRUCTURES` structures begin with the same operation. If a
  function has more, it may have any number.

The structure of a tape is its operations, with the slots that they connect, and which
derivative is asked for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jpyfunc._interpreters.linearization import Linearization
from jpyfunc._interpreters.lru_cache import LruCache
from jpyfunc._interpreters.tape_entry import TapeEntry
from jpyfunc._limits import (
    MAX_SWEEP_ENTRIES,
    MAX_SWEEP_STRUCTURES,
    MIN_SWEEPS,
    SWEEP_CACHE_SIZE,
)
from jpyfunc._types import Array, Value

# From the residuals of each entry and the cotangents of some slots to those of others.
Sweep = Callable[[list[list[Value]], list[Value]], list[Array]]


def compiled_sweep(
    entries: Sequence[TapeEntry], of: Sequence[int], wrt: Sequence[int]
) -> Sweep | None:
    """A compiled reverse sweep for tapes of this structure, if enough of them were met.

    Args:
        entries: the operations of a run.
        of: slots whose cotangents are given.
        wrt: slots whose cotangents are wanted.
    """
    if not 1 < len(entries) <= MAX_SWEEP_ENTRIES or any(
        type(entry.linear) is not Linearization for entry in entries
    ):
        return None
    first = entries[0].linear
    family = _families.get(id(first))
    if family is None:
        family = {}
        _families.put(id(first), family, [first])
    key = (
        tuple(of),
        tuple(wrt),
        tuple([(id(entry.linear), entry.first, *entry.inputs) for entry in entries]),
    )
    known = family.get(key)
    if known is None:
        if len(family) < MAX_SWEEP_STRUCTURES:
            family[key] = SweepStructure(entries, of, wrt)
        return None
    if len(family) == MAX_SWEEP_STRUCTURES:
        return None
    return known.sweep(entries)


class SweepStructure:
    """The sweep of tapes of one structure; it keeps no operation alive."""

    def __init__(
        self, entries: Sequence[TapeEntry], of: Sequence[int], wrt: Sequence[int]
    ) -> None:
        self._linears: list[Any] = [weakref.ref(entry.linear) for entry in entries]
        self._slots = [(entry.inputs, entry.first) for entry in entries]
        self._of, self._wrt = of, wrt
        self._met = 1
        self._compiled = jax.jit(self._vjp)

    def sweep(self, entries: Sequence[TapeEntry]) -> Sweep | None:
        """The compiled sweep for the entries of one more tape, or None so far."""
        for reference, entry in zip(self._linears, entries, strict=True):
            if reference() is not entry.linear:  # another, with the id of one that died
                return None
        self._met += 1
        return self._compiled if self._met >= MIN_SWEEPS else None

    def _vjp(self, residuals: list[list[Value]], cotangents: list[Value]) -> list[Array]:
        # It is only traced for a tape with these operations, so all of them live.
        entries = [
            TapeEntry(reference(), inputs, first, [], values)
            for reference, (inputs, first), values in zip(
                self._linears, self._slots, residuals, strict=True
            )
        ]
        known: list[Any] = [None] * entries[-1].outputs.stop
        for slot, cotangent in zip(self._of, cotangents, strict=True):
            known[slot] = cotangent
        for entry in reversed(entries):
            entry.vjp(known, lambda operation, operands: operation.call(*operands))
        return [known[slot] for slot in self._wrt]


# By the id of the first operation: tapes of one function begin with the same one.
_families: LruCache = LruCache(SWEEP_CACHE_SIZE)
