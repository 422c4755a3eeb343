"""Subsets of a batch that run together, and how long the arrays of their elements are.

How long? XLA compiles an operation for one shape, at tens of milliseconds, and a batch that
splits at branches leaves subsets of any size: exact lengths would compile every operation
for every size that ever occurs. So an array has at least as many rows as its subset has
elements, and its length is one of few. The rows that are left over repeat the first
element: real values, which cannot raise floating-point errors or run a loop for longer than
the elements themselves do, as zeros might.

How few? An operation on a small array costs much the same for 20 rows as for 1000, because
dispatch dominates, so small arrays have lengths that grow eightfold: 128, 1024, 8192. On
a large array, padded rows cost memory and time, and lengths are powers of two, so that
less than half of an array is padding. `MAX_PADDED_BYTES` says what is small. A length
depends on the largest array of the subset so far: all arrays of one subset have the same.
"""

from __future__ import annotations

import numpy as np

from jpyfunc._limits import MAX_PADDED_BYTES, ROWS_GROWTH, SHORTEST_ROWS


def padded_length(count: int, nbytes: int) -> int:
    """The length of arrays of `count` elements, each of which takes up to `nbytes`."""
    length = SHORTEST_ROWS
    while length < count:
        length *= ROWS_GROWTH
    return length if length * nbytes <= MAX_PADDED_BYTES else 1 << (count - 1).bit_length()


class Subset:
    """Elements of a batch that run together.

    Attributes:
        elements: their numbers in the batch.
        nbytes: bytes of one element in the largest array so far.
        length: the length of arrays of these elements, padding included.
        parent: the subset that it was taken from, or None.
        index: the places of its elements in `parent`.
    """

    __slots__ = ("elements", "index", "length", "nbytes", "parent")

    def __init__(
        self, elements: np.ndarray, parent: Subset | None, index: np.ndarray, nbytes: int
    ) -> None:
        self.elements = elements
        self.nbytes = nbytes
        self.length = padded_length(len(elements), nbytes)
        self.parent = parent
        self.index = index

    def take(self, index: np.ndarray) -> Subset:
        """The subset of the elements at these places."""
        return Subset(self.elements[index], self, index, self.nbytes)

    def with_arrays_of(self, nbytes: int) -> Subset:
        """The same elements, once an array takes `nbytes` for each.

        Returns:
            This subset, or a new one whose arrays are shorter, because long ones of this
            size would be padded too much.
        """
        if nbytes > self.nbytes:
            if padded_length(len(self.elements), nbytes) != self.length:
                return Subset(self.elements, self, np.arange(len(self.elements)), nbytes)
            self.nbytes = nbytes
        return self

    def places_in(self, ancestor: Subset) -> np.ndarray | None:
        """The places of its elements in `ancestor`, or None if it was not taken from it."""
        index, subset = np.arange(len(self.elements)), self
        while subset is not ancestor:
            if subset.parent is None:
                return None
            index, subset = subset.index[index], subset.parent
        return index

    def pad(self, index: np.ndarray) -> np.ndarray:
        """`index`, which has an entry for each element, padded to `length`."""
        return np.concatenate([index, np.repeat(index[:1], self.length - len(index))])
