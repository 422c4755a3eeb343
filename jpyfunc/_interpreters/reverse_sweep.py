"""Pulls cotangents back through the operations of a run: one by one, or all in one program.

One by one nothing ever depends on the structure of the whole, so a loop whose length is
another in each run compiles nothing new. Where the same few operations come in the same
order again and again, they are compiled as one program, which saves most of the calls.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from jpyfunc._interpreters.operation_cache import LruCache
from jpyfunc._interpreters.operations import (
    CompiledOperation,
    Linearization,
    UncachedLinearization,
    UncachedOperation,
)
from jpyfunc._limits import (
    MAX_SWEEP_ENTRIES,
    MAX_SWEEP_STRUCTURES,
    MIN_SWEEPS,
    SWEEP_CACHE_SIZE,
)

Apply = Callable[[CompiledOperation | UncachedOperation, Sequence[Any]], list[Any]]


class Step(Protocol):
    """One operation of a run: the slots of its operands, and the first of its results."""

    operation: CompiledOperation | UncachedOperation
    linear: Linearization | UncachedLinearization
    inputs: list[int]
    first: int


def pull(
    steps: Sequence[Step], known: list[Any], residuals: Sequence[Any], apply: Apply
) -> None:
    """Pull cotangents back, operation by operation.

    Args:
        steps: the operations, in the order in which they were run.
        known: the cotangent of each slot, or None; those of operands are added.
        residuals: of each operation.
        apply: runs an operation.
    """
    for step, kept in zip(reversed(steps), reversed(residuals), strict=True):
        linear, n = step.linear, step.first
        given = tuple([k for k in range(len(linear.of)) if known[n + k] is not None])
        if not given:
            continue
        slots = list(dict.fromkeys(step.inputs))
        targets = tuple([slots.index(s) for s in step.inputs])
        sums = tuple([k for k, s in enumerate(slots) if known[s] is not None])
        operands = [*kept, *[known[n + k] for k in given], *[known[slots[k]] for k in sums]]
        for k in given:
            known[n + k] = None
        results = apply(linear.pull(given, targets, sums), operands)
        if step.operation.is_orphan and isinstance(linear, Linearization):
            linear.forget()
        for slot, cotangent in zip(slots, results, strict=True):
            known[slot] = cotangent


def whole_pull(
    steps: Sequence[Step], of: Sequence[int], wrt: Sequence[int]
) -> Callable[[Any, Any], list[Any]] | None:
    """A compiled function for runs of this structure, if it was met often enough.

    Args:
        steps: the operations of a run.
        of: slots whose cotangents are given.
        wrt: slots whose cotangents are wanted.

    Returns:
        From residuals, a list for each step, and cotangents to cotangents; or None.
    """
    if not 1 < len(steps) <= MAX_SWEEP_ENTRIES or any(
        type(s.linear) is UncachedLinearization for s in steps
    ):
        return None
    # Runs of one function begin with the same operation.
    family = _families.get(id(steps[0].linear))
    if family is None:
        family = {}
        _families.put(id(steps[0].linear), family, [steps[0].linear])
    key = (
        tuple(of),
        tuple(wrt),
        tuple([(id(step.linear), step.first, *step.inputs) for step in steps]),
    )
    known = family.get(key)
    if known is None:
        if len(family) < MAX_SWEEP_STRUCTURES:
            family[key] = SweepStructure(steps, of, wrt)
        return None
    if len(family) == MAX_SWEEP_STRUCTURES:
        return None
    return known.function(steps)


class SweepStructure:
    """What is known of runs of one structure; it keeps no operation alive."""

    def __init__(
        self, steps: Sequence[Step], of: Sequence[int], wrt: Sequence[int]
    ) -> None:
        self._linears = [weakref.ref(step.linear) for step in steps]
        self._places = [(step.first, step.inputs) for step in steps]
        self._of, self._wrt = of, wrt
        self._runs = 1
        self._compiled = jax.jit(self._pull)

    def function(self, steps: Sequence[Step]) -> Callable[[Any, Any], list[Any]] | None:
        for reference, step in zip(self._linears, steps, strict=True):
            if reference() is not step.linear:  # another, with the id of one that died
                return None
        self._runs += 1
        return self._compiled if self._runs >= MIN_SWEEPS else None

    def _pull(self, residuals: Any, cotangents: Any) -> list[Any]:
        # Only traced while a run has these operations, so all of them live.
        steps: Any = [
            types.SimpleNamespace(
                operation=UncachedOperation, linear=reference(), first=first, inputs=inputs
            )
            for reference, (first, inputs) in zip(self._linears, self._places, strict=True)
        ]
        known: list[Any] = [None] * (steps[-1].first + len(steps[-1].linear.of))
        for slot, cotangent in zip(self._of, cotangents, strict=True):
            known[slot] = cotangent
        pull(steps, known, residuals, lambda operation, xs: operation.call(*xs))
        return [known[slot] for slot in self._wrt]


_families: LruCache = LruCache(SWEEP_CACHE_SIZE)
