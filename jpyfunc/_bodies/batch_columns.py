"""Operands and results of all elements of a batch, as columns: a row for each element.

An operand that all elements share is one array, and a result that is summed over the batch
is one sum, so the row of an element is found by its place in the column.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.core import ShapedArray

from jpyfunc import _compat
from jpyfunc._bodies.body import Body
from jpyfunc._conversion import sum_dtype
from jpyfunc._interpreters.batch_tracer import BatchTracer
from jpyfunc._interpreters.by_branch import ByBranchTrace
from jpyfunc._interpreters.subset import Subset
from jpyfunc._runtime.transfers import put
from jpyfunc._types import Array


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """A batch, or batches of batches as if they were one.

    Attributes:
        base: the body of one element.
        sizes: of the batch axes, outermost first.
        stacked_in: for each operand, which of these axes it has.
        stacked_out: for each result, which it has; it is summed over the others.
    """

    base: Body
    sizes: tuple[int, ...]
    stacked_in: list[tuple[bool, ...]]
    stacked_out: list[tuple[bool, ...]]

    @functools.cached_property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.sizes)

    def places(self, stacked: Sequence[bool]) -> np.ndarray:
        """The place of each element in an array with some of the axes, raveled to one."""
        numbers = np.arange(self.count)
        if all(stacked):
            return numbers
        places = np.zeros_like(numbers)
        indices = np.unravel_index(numbers, self.sizes)
        for size, index, has in zip(self.sizes, indices, stacked, strict=True):
            places = places * size + index if has else places
        return places


class OperandColumn:
    """An operand of all elements."""

    def __init__(
        self,
        operand: Array,
        places: np.ndarray,
        aval: ShapedArray,
        device: _compat.Device | None,
    ) -> None:
        """Lay an operand out for the elements.

        Args:
            operand: an array, with the batch axes that `places` is of.
            places: of the elements in it.
            aval: of the operand of one element.
            device: where the body takes it; None for a host function, which takes NumPy.
        """
        self._places = places
        self._aval = aval
        self._device = device
        self._shared: Any = None
        self._rows: np.ndarray | None = None
        if places[-1]:
            # In NumPy, where a slice takes a tenth of the time of an operation of JAX.
            self._rows = np.asarray(operand).reshape(places[-1] + 1, *aval.shape)
            return
        if np.shape(operand) != aval.shape:
            operand = np.asarray(operand).reshape(aval.shape)
        if isinstance(operand, np.ndarray) and device is not None:
            operand = put(operand, aval, device)  # once, not for every element
        self._shared = operand

    @property
    def nbytes(self) -> int:
        """Bytes that each element has for itself."""
        return 0 if self._rows is None else self._rows[0].nbytes

    def element(self, number: int) -> Array:
        # A 0-d slice must stay an array: an index gives a NumPy scalar.
        return self._shared if self._rows is None else self._rows[self._places[number], ...]

    def rows(self, elements: np.ndarray) -> np.ndarray:
        """The rows of some elements."""
        if self._rows is None:
            return np.broadcast_to(self._shared, (len(elements), *self._aval.shape))
        return self._rows[self._places[elements]]

    def batched(self, trace: ByBranchTrace, subset: Subset) -> Array | BatchTracer:
        if self._rows is None:
            return self._shared
        rows = self.rows(subset.pad(subset.elements))
        aval = ShapedArray(rows.shape, rows.dtype, self._aval.weak_type)
        return BatchTracer(trace, subset, put(rows, aval, self._device))


class TicketColumn(OperandColumn):
    """The tickets of all elements; those of a subset are of one tape, or of none."""

    def batched(self, trace: ByBranchTrace, subset: Subset) -> Array | BatchTracer:
        return self.element(subset.elements[0])


class ResultColumn:
    """A result of all elements: a row for each, or sums."""

    def __init__(self, aval: ShapedArray, places: np.ndarray, is_stacked: bool) -> None:
        dtype = aval.dtype if is_stacked else sum_dtype(aval.dtype)
        self.array = np.zeros((places[-1] + 1, *aval.shape), dtype)
        self._places, self._is_stacked = places, is_stacked

    def add(self, number: int, value: np.ndarray) -> None:
        """Add the result of one element."""
        if self._is_stacked:
            self.array[number] = value
        else:
            self.array[self._places[number]] += value.astype(self.array.dtype)

    def add_rows(self, elements: np.ndarray, values: np.ndarray) -> None:
        """Add the results of some elements."""
        if self._is_stacked:
            self.array[elements] = values
        elif len(self.array) == 1:
            self.array[0] += values.sum(0, dtype=self.array.dtype)
        else:
            np.add.at(self.array, self._places[elements], values.astype(self.array.dtype))
