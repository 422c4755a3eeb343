"""An operation that a tape recorded, and one step of a derivative through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jpyfunc._interpreters.linearization import Linearization, UncachedLinearization
from jpyfunc._interpreters.operations import Operation
from jpyfunc._types import Array, Value

Apply = Callable[[Operation, Sequence[Value]], list[Array]]


class TapeEntry:
    """An operation of a run, with what its derivatives need.

    Each value that depends on what the tape watches has a slot, which is a number. While a
    derivative is computed, a list has the tangent or cotangent of each slot, or None for
    zero.

    Attributes:
        linear: the operation, linearized.
        inputs: the slots of its operands `linear.active`.
        first: the slot of the first of its results `linear.of`, which have those that
            follow.
        values: all its operands.
        residuals: what its derivatives need of the run.
    """

    __slots__ = ("first", "inputs", "linear", "residuals", "values")

    def __init__(
        self,
        linear: Linearization | UncachedLinearization,
        inputs: list[int],
        first: int,
        values: list[Any],
        residuals: list[Value],
    ) -> None:
        self.linear = linear
        self.inputs = inputs
        self.first = first
        self.values = values
        self.residuals = residuals

    @property
    def outputs(self) -> range:
        """The slots of its results `linear.of`."""
        return range(self.first, self.first + len(self.linear.of))

    def jvp(self, known: list[Array | None], apply: Apply) -> None:
        """Set the tangents of the results from those of the operands.

        Args:
            known: the tangent of each slot.
            apply: executes an operation.
        """
        given = tuple([k for k, s in enumerate(self.inputs) if known[s] is not None])
        if given:
            tangents = [x for s in self.inputs if (x := known[s]) is not None]
            results = apply(self.linear.jvp(given), [*self.residuals, *tangents])
            known[self.first : self.first + len(results)] = results

    def vjp(self, known: list[Array | None], apply: Apply) -> None:
        """Take away the cotangents of the results, and add to those of the operands.

        Args:
            known: the cotangent of each slot.
            apply: executes an operation.
        """
        linear, first = self.linear, self.first
        given = tuple([k for k in range(len(linear.of)) if known[first + k] is not None])
        if not given:
            return
        # One value may be several operands. What it has from later entries is added in
        # the same operation, which saves a call for each.
        slots = list(dict.fromkeys(self.inputs))
        targets = tuple([slots.index(s) for s in self.inputs])
        sums = tuple([k for k, s in enumerate(slots) if known[s] is not None])
        operands = [
            *self.residuals,
            *[known[first + k] for k in given],
            *[known[slots[k]] for k in sums],
        ]
        for k in given:
            known[first + k] = None
        results = apply(linear.vjp(given, targets, sums), operands)
        if isinstance(linear, Linearization) and linear.operation.is_orphan:
            linear.forget()
        for slot, cotangent in zip(slots, results, strict=True):
            known[slot] = cotangent
