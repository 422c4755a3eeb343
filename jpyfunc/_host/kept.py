"""The runs of bodies that derivatives are taken of, kept until memory is needed.

A run is known by a ticket, which travels with the primals through the program. Keeping
it is a matter of speed alone, for a body may be run again: so what is kept is bounded,
and a ticket may well find nothing. Those of another process, or of an earlier life of
this one, never find anything.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
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


def set_tape_limit(nbytes: int) -> int:
    """Set how much memory the kept runs of differentiated bodies may take.

    A call that is differentiated keeps its run, so that the derivative need not run the
    body again: the arrays of its operations, by a bound, 1 GiB unless set. Those that were
    used least recently go first. A derivative whose run is gone runs the body again, with
    the same result, unless the body is stateful or ordered: then it raises `TapeLostError`.

    Args:
        nbytes: the bound in bytes, arrays that several runs share counted once, each with
            4 KiB for the objects that hold it; 0 keeps nothing.

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
        self._records: OrderedDict[bytes, tuple[Run, Avals, int]] = OrderedDict()
        self._shared: dict[int, int] = {}  # by id, how many records have an array
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
        arrays = {id(x): x for x in record.arrays()}
        shared = self._shared
        with self._lock:
            size = sum([_size(x) for i, x in arrays.items() if i not in shared])
            if size > self.limit:
                return 0
            for i in arrays:
                shared[i] = shared.get(i, 0) + 1
            self.nbytes += size
            owner = self._own(unwrapped(primal.func), name)
            self._records[name] = (record, primal.in_avals, owner)
            dropped = self._shrink()
        del dropped
        return size

    def find(self, name: bytes, primal: Primal) -> Run | None:
        with self._lock:
            record, in_avals, _ = self._records.get(name, (None, None, 0))
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

    def _drop(self, name: bytes) -> Run | None:
        record, _, owner = self._records.pop(name, (None, None, 0))
        if record:
            self._functions.get(owner, set()).discard(name)
            shared = self._shared
            for i, x in {id(x): x for x in record.arrays()}.items():
                if shared[i] > 1:
                    shared[i] -= 1
                else:
                    del shared[i]
                    self.nbytes -= _size(x)
        return record

    def _shrink(self) -> list[Run | None]:
        dropped = []
        while self.nbytes > self.limit:
            dropped.append(self._drop(next(iter(self._records))))
        return dropped


def _size(x: Any) -> int:
    if isinstance(x, np.ndarray):
        return x.nbytes + ARRAY_OVERHEAD
    if not isinstance(x, jax.Array):
        return sys.getsizeof(x) + ARRAY_OVERHEAD
    aval = aval_of(x)
    return math.prod(aval.shape) * aval.dtype.itemsize + ARRAY_OVERHEAD


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
