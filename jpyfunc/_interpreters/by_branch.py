"""Runs a body on many elements of a batch at once, and splits them where it branches.

Each operation is run on arrays with one row per element. Where a truth test or a read finds
elements that differ, those that agree go on. The others are run again from the start, where
the operations up to the split are not: what they gave is taken over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
import numpy as np
from jax.extend.core import set_current_trace
from jax.extend.core.primitives import stop_gradient_p

from jpyfunc import _compat
from jpyfunc._interpreters.batch_tracer import (
    BatchTracer,
    CannotBatch,
    data_of,
)
from jpyfunc._interpreters.eager import EagerTrace, ground, run
from jpyfunc._interpreters.operations import CompiledOperation, UncachedOperation
from jpyfunc._interpreters.subset import Subset
from jpyfunc._limits import (
    MAX_LOG_BYTES,
)
from jpyfunc._runtime.context import enter_batch

# An operation of a run, its operands and its results.
Entry = tuple[CompiledOperation, Sequence[Any], list[Any]]


class ByBranchTrace(EagerTrace):
    """Runs operations on a subset of a batch, which gets smaller where elements differ.

    Attributes:
        subset: the elements that run now.
        waiting: the subsets that were split off, each with the operations before.
        refused: why something could not be done for many elements, so that what the run
            returns is nothing; the body may have caught the exception. Empty if nothing.
        label: what errors call the function that is run.
        sizes: the axes of the batch.
    """

    def __init__(self, label: str, sizes: tuple[int, ...]) -> None:
        super().__init__(ground())
        self.label = label
        self.sizes = sizes
        self.subset: Subset
        self.waiting: list[tuple[Subset, Sequence[Entry]]] = []
        self.refused = ""
        self._log: list[Entry] = []
        self._done = 0  # how many operations of the log this run has come to
        self._nbytes = 0  # of what the log holds
        self._primitive: Any = None  # that was bound last

    @contextmanager
    def running(self, subset: Subset, log: Sequence[Entry]) -> Iterator[None]:
        """Run what is called in the block on `subset`, which did `log` already."""
        # A list of its own: one log belongs to all subsets that were split off at one read.
        self.subset, self._log, self._done = subset, [*log], 0
        self._nbytes = sum(map(_nbytes, log))
        try:
            with enter_batch(self), set_current_trace(self):
                yield
        finally:
            self._log = []

    def cannot(self, why: str) -> NoReturn:
        """End a run that cannot be of many elements."""
        self.refused = why
        raise CannotBatch

    def number(self, row: int) -> int | tuple[int, ...]:
        """What the user calls an element."""
        return number_of(row, self.sizes)

    def agree(self, rows: np.ndarray) -> Any:
        """Go on with elements that have one value; return it.

        Args:
            rows: a value for each element of the subset.
        """
        flat = rows.reshape(len(rows), -1)
        if len(rows) > 1 and flat.shape[1]:
            bits = np.ascontiguousarray(flat).view(np.uint8)
            if (bits != bits[:1]).any():
                whole = bits.view(np.dtype((np.void, bits.shape[1]))).ravel()
                return rows[self._split(whole)]
        return rows[0]

    def _split(self, values: np.ndarray) -> int:
        """Go on with the most elements that have one value; return where one of them is."""
        _, labels, counts = np.unique(values, return_inverse=True, return_counts=True)
        places = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
        groups = sorted(places, key=lambda group: group[0], reverse=True)
        largest = max(groups, key=lambda group: (len(group), -group[0]))
        subset, log = self.subset, tuple(self._log[: self._done])
        self.waiting += [(subset.take(g), log) for g in groups if g is not largest]
        self.subset = subset.take(largest)
        return int(largest[0])

    def batched(self, value: Any) -> BatchTracer:
        """An array with a row for each element of the subset, padded."""
        return BatchTracer(self, self.subset, value)

    def apply(
        self, operation: CompiledOperation | UncachedOperation, operands: Sequence[Any]
    ) -> list[Any]:
        """Run an operation on all elements of the subset."""
        if isinstance(operation, UncachedOperation):
            with set_current_trace(self):
                return operation.call(*operands)
        if self._done < len(self._log):
            known, before, results = self._log[self._done]
            if known is operation and all(map(_is_same, operands, before)):
                self._done += 1
                return [*results]
            del self._log[self._done :]  # the body is not as it was
        axes = tuple([0 if type(x) is BatchTracer else None for x in operands])
        if 0 not in axes:
            # A reference is read and written once for each element.
            if operation.is_stateful:
                self.cannot("a stateful call in a loop or a branch of JAX")
            if any(isinstance(x, jax.Ref) for x in operands):
                self.cannot("a jax.Ref is read or written")
            with enter_batch(None):
                results = run(self.parent, operation, operands)
        else:
            if operation.is_wide:
                self.cannot("arrays of 64 bits while these are off")
            function = operation.batched(axes)
            if function is None:
                self.cannot(operation.refusal)
            subset = self.subset = self.subset.with_arrays_of(operation.nbytes)
            values = [
                x.padded_rows(subset) if type(x) is BatchTracer else x for x in operands
            ]
            if self.move is not None:
                values = [self.move(x) for x in values]
            with set_current_trace(_compat.eval_trace):
                results = [self.batched(y) for y in function(*values)]
        self._note(operation, operands, results)
        return [*results]

    def _note(
        self, operation: CompiledOperation, operands: Any, results: list[Any]
    ) -> None:
        # What has no room ends the log: the run that takes it over goes on from there.
        self._nbytes += _nbytes((operation, operands, results))
        if self._nbytes <= MAX_LOG_BYTES:
            self._log.append((operation, [*map(_unchanging, operands)], results))
            self._done += 1

    def process_primitive(self, primitive: Any, tracers: Any, params: Any, /) -> Any:
        if primitive is stop_gradient_p:
            return tracers[0]
        if "debug" in primitive.name:  # once for each element, whatever it prints
            self.cannot(f"{primitive.name} runs for each element")
        self._primitive = primitive
        return super().process_primitive(primitive, tracers, params)

    def apply_uncacheable(
        self, loose: UncachedOperation, operands: Sequence[Any]
    ) -> list[Any]:
        self.cannot(f"{self._primitive.name} may be another operation in every run")

    def process_shard_map(self, *_: Any, **__: Any) -> Any:
        self.cannot("shard_map")


def number_of(row: int, sizes: tuple[int, ...]) -> int | tuple[int, ...]:
    """What the user calls an element of a batch with axes of these sizes."""
    if len(sizes) == 1:
        return row
    return tuple(int(i) for i in np.unravel_index(row, sizes))


def _nbytes(entry: Entry) -> int:
    """What an entry of a log keeps alive: arrays of many elements, and copies."""
    _, operands, results = entry
    size = 0  # in loops, because this is on the way of every operation
    for x in results:
        if type(x) is BatchTracer:
            size += x.value.nbytes
    for x in operands:
        if isinstance(x, np.ndarray):
            size += x.nbytes
    return size


def _unchanging(x: Any) -> Any:
    """An operand as it is now: the body may write to an array of NumPy's later."""
    return np.array(x) if isinstance(x, np.ndarray) else x


def _is_same(x: Any, before: Any) -> bool:
    """Whether an operand has the value that it had in the run before.

    The same object will do for what cannot change, which an array of NumPy's can. What a
    body makes anew in each run, as `np.arange(3)`, is the same by its content.
    """
    if type(x) is BatchTracer or type(before) is BatchTracer:
        return x is before
    if isinstance(x, np.ndarray):
        return isinstance(before, np.ndarray) and _has_bits_of(x, before)
    if x is before:
        return True
    if type(x) is not type(before):
        return False
    if isinstance(x, jax.Array | np.generic):
        is_weak = getattr(x, "weak_type", False)
        return is_weak == getattr(before, "weak_type", False) and _has_bits_of(x, before)
    # 0.0 equals -0.0, of which a body may take the sign.
    return isinstance(x, bool | int | float | complex) and repr(x) == repr(before)


def _has_bits_of(x: Any, before: Any) -> bool:
    if x.shape != before.shape or x.dtype != before.dtype:
        return False
    bits, others = (np.ascontiguousarray(data_of(y)).view(np.uint8) for y in (x, before))
    return np.array_equal(bits, others)
