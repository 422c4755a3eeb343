"""The runs of bodies that derivatives are taken of, kept until memory is needed.

A run is known by a ticket, which travels with the primals through the program. Keeping
it is a matter of speed alone, for a body may be run again: so what is kept is bounded,
and a ticket may well find nothing. Those of another process, or of an earlier life of
this one, never find anything.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import sys
import threading
import types
import weakref
from collections import OrderedDict
from typing import Any

import jax
import numpy as np

from jpyfunc._body.derived import TICKET, Recorded, Recording
from jpyfunc._body.primal import Avals, Primal, unwrapped
from jpyfunc._host.rules import Residuals
from jpyfunc._traces.batched import Part, running_batch
from jpyfunc._traces.operations import aval_of
from jpyfunc._traces.record import Record

Run = Record | Residuals

# What an array takes beside its data, in objects of XLA, JAX and Python, as measured.
ARRAY_OVERHEAD = 4096
DEFAULT_LIMIT = 2**30
MAX_OBJECTS = 256  # that are kept of those whose size is unknown
MAX_SEARCHED = 1000  # objects that one refers to
_NOT_ITS_OWN = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)


def set_tape_limit(nbytes: int) -> int:
    """Set how much memory the kept runs of differentiated bodies may take.

    A call that is differentiated keeps its run, so that the derivative need not run the
    body again: the arrays of its operations, by a bound, 1 GiB unless set. Those that were
    used least recently go first. A derivative whose run is gone runs the body again, with
    the same result, unless the body is stateful or ordered: then it raises `TapeLostError`.

    Args:
        nbytes: the bound in bytes, arrays that several runs share counted once, each with
            4 KiB for the objects that hold it; 0 keeps nothing. Residuals of a rule count
            by their `nbytes`, or else by what Python knows of their size, and as 1/256 of
            the bound at least.

    Returns:
        The bound that was in force.

    Raises:
        ValueError: `nbytes` is negative, or no integer.

    Example:
        >>> import jpyfunc
        >>> before = jpyfunc.set_tape_limit(2**20)
        >>> jpyfunc.set_tape_limit(before)
        1048576
    """
    if not isinstance(nbytes, int | np.integer) or isinstance(nbytes, bool) or nbytes < 0:
        raise ValueError(
            f"set_tape_limit: expected nbytes to be a number of bytes, 0 or more, got "
            f"{nbytes!r}; write set_tape_limit(2**30), say."
        )
    return _kept.set_limit(int(nbytes))


class _Kept:
    """Records by name, the least recently used of which goes."""

    def __init__(self, limit: int) -> None:
        # Reentrant, because freeing arrays may run finalizers that come here.
        self._lock = threading.RLock()
        # By name: what it is, of which operands, the key of its function, its arrays by id.
        self._records: OrderedDict[bytes, tuple[Run, Avals, int, Any]] = OrderedDict()
        # By id of an array: how many records have it, and its size.
        self._shared: dict[int, tuple[int, int]] = {}
        self._functions: dict[int, set[bytes]] = {}  # by id, the names of their runs
        self._nonce = os.urandom(6)
        self._last = 0
        self.limit = limit
        self.nbytes = 0

    def set_limit(self, limit: int) -> int:
        with self._lock:
            before, self.limit = self.limit, limit
            dropped = self._shrink()
        del dropped  # outside the lock
        return before

    def new_name(self) -> bytes:
        """What no run was ever called: 6 bytes say which process, 6 say which run."""
        with self._lock:
            self._last += 1
            return self._nonce + self._last.to_bytes(6)

    def add(self, name: bytes, record: Run, primal: Primal) -> int:
        """Keep a record, if there is room; returns how many bytes that takes."""
        # One that has none is not for nothing.
        arrays = {id(x): x for x in record.arrays()} or {id(record): record}
        shared = self._shared
        with self._lock:
            sizes = {i: _size(x) for i, x in arrays.items() if i not in shared}
            size = sum(sizes.values())
            if size > self.limit:
                return 0
            for i in arrays:
                count, each = shared.get(i) or (0, sizes[i])
                shared[i] = (count + 1, each)
            self.nbytes += size
            owner = self._own(unwrapped(primal.func), name)
            self._records[name] = (record, primal.in_avals, owner, arrays)
            dropped = self._shrink()
        del dropped
        return size

    def find(self, name: bytes, primal: Primal) -> Run | None:
        with self._lock:
            record, in_avals, *_ = self._records.get(name, (None, None))
            if record is None or in_avals != primal.in_avals:
                return None
            self._records.move_to_end(name)
            return record

    def _own(self, function: Any, name: bytes) -> int:
        """See to it that a record goes when the function does whose run it is of.

        Returns:
            The key of the function.
        """
        key = id(function)
        if key not in self._functions:
            with contextlib.suppress(TypeError):  # built in, say, and lives on
                weakref.finalize(function, self._drop_function, key).atexit = False
            self._functions[key] = set()
        self._functions[key].add(name)
        return key

    def _drop_function(self, key: int) -> None:
        with self._lock:
            names = self._functions.pop(key, set())
            dropped = [self._drop(name) for name in names]
        del dropped

    def _drop(self, name: bytes) -> Any:
        """Drop a record; returns what is to be freed outside the lock."""
        record, _, owner, arrays = self._records.pop(name, (None, None, 0, {}))
        self._functions.get(owner, set()).discard(name)
        shared = self._shared
        for i in arrays:
            count, size = shared.pop(i)
            if count > 1:
                shared[i] = (count - 1, size)
            else:
                self.nbytes -= size
        return record, arrays

    def _shrink(self) -> list[Any]:
        dropped = []
        while self.nbytes > self.limit:
            dropped.append(self._drop(next(iter(self._records))))
        return dropped


def _size(x: Any) -> int:
    if isinstance(x, np.ndarray):
        return x.nbytes + ARRAY_OVERHEAD
    if not isinstance(x, jax.Array):
        return _size_of_object(x) + ARRAY_OVERHEAD
    aval = aval_of(x)
    return math.prod(aval.shape) * aval.dtype.itemsize + ARRAY_OVERHEAD


def _size_of_object(x: Any) -> int:
    """The size of a Python object by its `nbytes`, or else with what it refers to.

    What a library has beside that is unknown, as SciPy has its factors of sparse matrices;
    so of objects without `nbytes` no more than `MAX_OBJECTS` are kept.
    """
    if x is None or isinstance(x, bool | int | float | complex | str | bytes | Run):
        return sys.getsizeof(x)
    told = getattr(x, "nbytes", None)
    if isinstance(told, int):
        return told
    seen: dict[int, Any] = {}
    todo, size = [x], 0
    while todo and len(seen) < MAX_SEARCHED:
        each = todo.pop()
        if id(each) in seen or isinstance(each, _NOT_ITS_OWN):
            continue
        seen[id(each)] = each
        size += each.nbytes if isinstance(each, jax.Array) else sys.getsizeof(each)
        todo.extend(gc.get_referents(each))
    return max(size, _kept.limit // MAX_OBJECTS)


_kept = _Kept(DEFAULT_LIMIT)


def _forget() -> None:
    """Start anew in a child process, which has its parent's memory."""
    global _kept
    _kept = _Kept(_kept.limit)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def keeps() -> bool:
    """Whether anything is kept at all."""
    return _kept.limit > 0


def keep(recording: Recording, record: Run | None) -> tuple[np.ndarray, int]:
    """Keep the record of a run, if there is one and there is room.

    Returns:
        The ticket, an array of shape `(*recording.widths, 4)`, and the bytes kept.
    """
    name = _kept.new_name()
    size = _kept.add(name, record, recording.base) if record else 0
    ticket = np.frombuffer(name + bytes(4), TICKET.dtype)
    if not recording.widths:
        return ticket, size
    tickets = of_rows(ticket, math.prod(recording.widths))
    return tickets.reshape(*recording.widths, *TICKET.shape), size


def of_rows(ticket: np.ndarray, count: int) -> np.ndarray:
    """The tickets of the rows of a run of `count` elements, whose ticket is given."""
    tickets = np.tile(ticket, (count, 1))
    tickets[:, 3] = np.arange(count)
    return tickets


def find(recorded: Recorded, ticket: Any) -> Any:
    """The record of the run that a ticket is of, if it is kept."""
    data = np.asarray(ticket)
    if not data.size:
        return None
    first = data.reshape(-1, 4)[0]
    # All elements of a whole batch, and in their order.
    if data.ndim > 1 and (data.reshape(-1, 4) != of_rows(first, data.size // 4)).any():
        return None
    record = _kept.find(first[:3].tobytes(), recorded.base)
    if record is None or record.part is None:
        return None if first[3] else record
    # A run by branch serves parts of its own alone.
    batch = running_batch()
    return record if batch and batch.part.places_in(record.part) is not None else None


def part_of(recorded: Recorded, ticket: np.ndarray) -> tuple[bool, Part | None]:
    """Whether the run is kept that a ticket is of, and the elements it was of by branch."""
    record = _kept.find(ticket[:3].tobytes(), recorded.base)
    return record is not None, record and record.part


def is_void(ticket: Any) -> bool:
    """Whether a ticket is of no run: zeros, which JAX puts for a branch not taken."""
    return not np.asarray(ticket).any()
