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
import struct
import threading
import weakref
from collections import OrderedDict
from typing import Any

import numpy as np

from jpyfunc._body.derived import TICKET, Recorded, Recording
from jpyfunc._body.primal import Avals, Primal, unwrapped
from jpyfunc._traces.operations import aval_of
from jpyfunc._traces.record import Record

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
    """Records by number, the least recently used of which goes."""

    def __init__(self, limit: int) -> None:
        # Reentrant, because freeing arrays may run finalizers that come here.
        self._lock = threading.RLock()
        self._records: OrderedDict[int, tuple[Record, Avals, int]] = OrderedDict()
        self._shared: dict[int, int] = {}  # by id, how many records have an array
        self._functions: dict[int, set[int]] = {}  # by id, the numbers of their runs
        self._next = 1
        self.limit = limit
        self.nbytes = 0

    def set_limit(self, limit: int) -> int:
        with self._lock:
            before, self.limit = self.limit, limit
            dropped = self._shrink()
        del dropped  # outside the lock
        return before

    def number(self, count: int) -> int:
        """The first of `count` numbers that were never given before."""
        with self._lock:
            self._next += count
            return self._next - count

    def add(self, number: int, record: Record, primal: Primal) -> int:
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
            owner = self._own(unwrapped(primal.func), number)
            self._records[number] = (record, primal.in_avals, owner)
            dropped = self._shrink()
        del dropped
        return size

    def find(self, number: int, primal: Primal) -> Record | None:
        with self._lock:
            record, in_avals, _ = self._records.get(number, (None, None, 0))
            if record is None or in_avals != primal.in_avals:
                return None
            self._records.move_to_end(number)
            return record

    def _own(self, function: Any, number: int) -> int:
        """See to it that a record goes when the function does whose run it is of.

        Returns:
            The key of the function.
        """
        key = id(function)
        if key not in self._functions:
            with contextlib.suppress(TypeError):  # built in, say, and lives on
                weakref.finalize(function, self._drop_function, key).atexit = False
            self._functions[key] = set()
        self._functions[key].add(number)
        return key

    def _drop_function(self, key: int) -> None:
        with self._lock:
            numbers = self._functions.pop(key, set())
            dropped = [self._drop(number) for number in numbers]
        del dropped

    def _drop(self, number: int) -> Record | None:
        record, _, owner = self._records.pop(number, (None, None, 0))
        if record:
            self._functions.get(owner, set()).discard(number)
            shared = self._shared
            for i, x in {id(x): x for x in record.arrays()}.items():
                if shared[i] > 1:
                    shared[i] -= 1
                else:
                    del shared[i]
                    self.nbytes -= _size(x)
        return record

    def _shrink(self) -> list[Record | None]:
        dropped = []
        while self.nbytes > self.limit:
            dropped.append(self._drop(next(iter(self._records))))
        return dropped


def _size(x: Any) -> int:
    aval = aval_of(x)
    return math.prod(aval.shape) * aval.dtype.itemsize + ARRAY_OVERHEAD


_kept = _Kept(DEFAULT_LIMIT)
_nonce = os.urandom(8)


def _forget() -> None:
    """Start anew in a child process, which has its parent's memory."""
    global _kept, _nonce
    _kept, _nonce = _Kept(_kept.limit), os.urandom(8)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def keeps() -> bool:
    """Whether anything is kept at all."""
    return _kept.limit > 0


def keep(recording: Recording, record: Record | None) -> tuple[np.ndarray, int]:
    """Keep the record of a run, if there is one and there is room.

    Returns:
        The ticket, an array of shape `(*recording.widths, 4)`, and the bytes kept.
    """
    count = math.prod(recording.widths)
    first = _kept.number(count)
    size = _kept.add(first, record, recording.base) if record else 0
    tickets = np.frombuffer(_tickets(first, count), TICKET.dtype)
    return tickets.reshape(*recording.widths, *TICKET.shape), size


def find(recorded: Recorded, ticket: Any) -> Record | None:
    """The record of the run that a ticket is of, if it is kept."""
    data = np.asarray(ticket).tobytes()
    if not data:
        return None
    _, first = _TICKET.unpack_from(data)
    # All elements of a whole batch, and in their order; and of this process.
    if data != _tickets(first, len(data) // _TICKET.size):
        return None
    return _kept.find(first, recorded.base)


def is_void(ticket: Any) -> bool:
    """Whether a ticket is of no run: zeros, which JAX puts for a branch not taken."""
    return not np.asarray(ticket).any()


_TICKET = struct.Struct("=8sQ")  # the process, the run


def _tickets(first: int, count: int) -> bytes:
    return b"".join([_TICKET.pack(_nonce, n) for n in range(first, first + count)])
