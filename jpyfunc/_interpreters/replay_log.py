"""The operations of a run by branch, replayed for the elements that leave it at a split.

A Python function cannot be resumed in the middle, so elements that leave a run at a split
run the body again from its start. What they computed up to the split, together with the
others, need not be computed again: the log of that run has it, as arrays of the larger
subset, of which they take their rows.

A log is a list of entries (operation, operands, results), one for each operation up to the
split, in order. The k-th operation of the later run takes the results of entry k if it is
the same operation on the same operands, and if all operations before it were replayed, too.
These results are then right whatever else the body does, because operations in a log are
pure. In particular, the body need not be deterministic: where it departs from the earlier
run, the log ends, and operations are executed from there on.

When is an operand the same?

- A batch tracer is the same if it is the same object. The operands of the body are made
  once for all these runs, and a replayed operation returns the tracers of the earlier run.
  So, by induction over k, a body that does the same does it with the same tracers.
- Any other operand is the same if it has the same type, shape and bits. A body makes new
  objects for its constants in each run, such as `np.arange(3)`, so their identity says
  nothing. Equality would not do either: 0.0 == -0.0, of which a body may take the sign,
  and NaN != NaN.
- A NumPy array is copied into the log, because the body may write to its own afterwards.
  In the later run, the same object may then hold other values.

A log also ends where it would grow beyond `MAX_LOG_BYTES`: an operation for which there is
no room is left out with all that follow it. With a hole in the log, later operations would
be compared with the entries of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jpyfunc._interpreters.batch_tracer import BatchTracer, data_of
from jpyfunc._interpreters.operations import CompiledOperation
from jpyfunc._limits import MAX_LOG_BYTES
from jpyfunc._types import Value

# An operation, its operands and its results.
LogEntry = tuple[CompiledOperation, Sequence[Value], Sequence[Value]]


class ReplayLog:
    """The log of a run, which begins with the entries of the run that it split from."""

    def __init__(self, entries: Sequence[LogEntry] = ()) -> None:
        # A copy: all subsets that leave at one split begin with the same entries.
        self._entries = [*entries]
        self._position = 0  # of the next operation
        self._nbytes = sum(map(_nbytes, entries))

    def replay(
        self, operation: CompiledOperation, operands: Sequence[Value]
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
        self,
        operation: CompiledOperation,
        operands: Sequence[Value],
        results: Sequence[Value],
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


def _unchanging(operand: Value) -> Value:
    return np.array(operand) if isinstance(operand, np.ndarray) else operand


def _is_same(x: object, before: object) -> bool:
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
