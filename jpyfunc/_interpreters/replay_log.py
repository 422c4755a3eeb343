"""The operations of a run by branch, replayed for the elements that leave it at a split.

Python cannot be resumed in the middle of a function, so elements that leave a run at a
split execute the body again from its start. What they computed together with the others up
to the split need not be computed again: the log of the run has it, as rows of arrays of the
larger subset.

A log is a list of entries (operation, operands, results), one for each operation up to the
split, in order. The k-th operation of the later run takes the results of entry k if it is
the same operation on the same operands, and all operations before it were replayed too.
Then its results are right whatever the body does otherwise, because an operation in a log
is pure. In particular, a body need not be deterministic: where it does something else than
in the earlier run, the log ends, and the operations from there on are executed.

When is an operand the same?

- A batch tracer is the same if it is the same object. The operands of the body are made
  once for all runs of a subset, and the results of a replayed operation are the very
  tracers of the earlier run. So by induction over k, as long as the body does the same, it
  does so with the same tracers.
- Any other operand is the same if it has the same type, shape and bits. A body makes
  constants anew in each run, such as `np.arange(3)` or `jnp.zeros(2)`, so their identity
  says nothing. Bits, because 0.0 == -0.0, of which a body may take the sign, and because
  NaN != NaN.
- A NumPy array is copied into the log. The body may write to its array afterwards, and the
  log must have what the operation was given; the same object may differ by then.

A log also ends where it grows beyond `MAX_LOG_BYTES`. An operation that has no room is left
out with all that follow it: a log with a hole would pair later operations with the entries
of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jpyfunc._interpreters.batch_tracer import BatchTracer, data_of
from jpyfunc._interpreters.operations import CompiledOperation
from jpyfunc._limits import MAX_LOG_BYTES

# An operation, its operands and its results.
LogEntry = tuple[CompiledOperation, Sequence[Any], Sequence[Any]]


class ReplayLog:
    """The log of a run, which begins with the entries of the run that it split from."""

    def __init__(self, entries: Sequence[LogEntry] = ()) -> None:
        # A copy: all subsets that leave at one split begin with the same entries.
        self._entries = [*entries]
        self._position = 0  # of the next operation
        self._nbytes = sum(map(_nbytes, entries))

    def replay(
        self, operation: CompiledOperation, operands: Sequence[Any]
    ) -> list[Any] | None:
        """The results of the next operation, or None if it is to be executed."""
        if self._position == len(self._entries):
            return None
        known, before, results = self._entries[self._position]
        if known is operation and all(map(_is_same, operands, before)):
            self._position += 1
            return [*results]
        del self._entries[self._position :]
        return None

    def record(
        self, operation: CompiledOperation, operands: Sequence[Any], results: Sequence[Any]
    ) -> None:
        """Add an operation that was executed, if there is room."""
        self._nbytes += _nbytes((operation, operands, results))
        if self._nbytes <= MAX_LOG_BYTES:
            self._entries.append((operation, [*map(_unchanging, operands)], results))
            self._position += 1

    def so_far(self) -> tuple[LogEntry, ...]:
        """The entries up to here, for the elements that leave."""
        return tuple(self._entries[: self._position])


def _nbytes(entry: LogEntry) -> int:
    """Bytes that an entry keeps alive: arrays of many elements, and copies."""
    _, operands, results = entry
    size = 0  # in loops, because this is done for every operation
    for x in results:
        if type(x) is BatchTracer:
            size += x.value.nbytes
    for x in operands:
        if isinstance(x, np.ndarray):
            size += x.nbytes
    return size


def _unchanging(operand: Any) -> Any:
    return np.array(operand) if isinstance(operand, np.ndarray) else operand


def _is_same(x: Any, before: Any) -> bool:
    """Whether an operand has the value that it had in the earlier run."""
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
    return isinstance(x, bool | int | float | complex) and repr(x) == repr(before)


def _has_bits_of(x: Any, before: Any) -> bool:
    if x.shape != before.shape or x.dtype != before.dtype:
        return False
    bits, others = (np.ascontiguousarray(data_of(y)).view(np.uint8) for y in (x, before))
    return np.array_equal(bits, others)
