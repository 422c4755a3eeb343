"""The iterator of `jpyfunc.range` in a body that runs on abstract values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class RangeBounds:
    """The integers of a `jpyfunc.range`: numbers, or arrays.

    Attributes:
        start: the first integer.
        step: from one to the next.
        length: how many there are.
    """

    __slots__ = ("length", "start", "step")

    def __init__(self, start: Any, step: Any, length: Any) -> None:
        self.start = start
        self.step = step
        self.length = length

    @property
    def state(self) -> list[Any]:
        """Everything that it holds."""
        return [self.start, self.step, self.length]


class RangeIterator:
    """Yield integers that are arrays; whether there is another one is a truth test.

    It counts the iterations down: the number after the last one may not fit in the dtype,
    so that a comparison with it would not end the loop. If there is a first iteration for
    sure, that is not tested, because what the body does without it might be an error.
    """

    __slots__ = ("__weakref__", "_left", "_next", "_step", "_variable")

    def __init__(self, bounds: RangeBounds, variable: Callable[[Any], Any]) -> None:
        """Begin.

        Args:
            bounds: of the integers.
            variable: makes an array of an integer, and returns an array as it is.
        """
        # Sums are arrays of its own, which a loop may carry: others may hold the bounds.
        length = bounds.length
        self._next = variable(bounds.start) + 0
        self._step = bounds.step
        self._left = length if isinstance(length, int) else length + 0
        self._variable = variable

    @property
    def state(self) -> list[Any]:
        """Everything that changes, and that decides how."""
        return [self._left, self._next, self._step]

    def __iter__(self) -> RangeIterator:
        return self

    def __next__(self) -> Any:
        if self._left > 0:
            number = self._next
            self._next = number + self._step
            self._left = self._variable(self._left - 1)
            return number
        raise StopIteration
