"""The tapes that derivatives are taken of, kept until these have been taken.

A tape is known by a ticket, which travels with the primals through the program. For a pure
body, keeping it is a matter of speed alone, because the body may be run again: so what is
kept is bounded, and a ticket may well find nothing. Those of another process, or of an
earlier life of this one, never find anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jpyfunc._bodies.custom_rules import RuleResiduals
from jpyfunc._bodies.derived import TICKET, AtTape, WithTape
from jpyfunc._bodies.primal import (
    Avals,
    Primal,
)
from jpyfunc._hashable import unwrapped
from jpyfunc._interpreters.operations import aval_of
from jpyfunc._interpreters.subset import Subset
from jpyfunc._interpreters.tape import Tape
from jpyfunc._limits import (
    ARRAY_OVERHEAD,
    DEFAULT_TAPE_LIMIT,
    MAX_REFERENTS,
    MAX_RESIDUALS_OF_UNKNOWN_SIZE,
    SPENT_SHARE,
    SPENT_STATEFUL_SHARE,
)
from jpyfunc._runtime.context import running_batch

AnyTape = Tape | RuleResiduals

_NOT_ITS_OWN = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)


def set_tape_limit(nbytes: int) -> int:
    """Set how much memory the tapes of differentiated bodies may take.

    A call that is differentiated keeps its tape, the arrays of its operations, so that the
    derivative need not run the body again. A tape whose derivative has been taken is
    spent. Spent ones hold 1/256 of the limit at most (1/64 those of stateful bodies), for
    a derivative that is taken at the same point again (a second call of what `jax.vjp` or
    `jax.linearize` returned). Tapes that still wait for their derivative hold the rest, by
    default 1 GiB in all. Where there is no room, spent tapes go first, and of each kind
    the least recently used.

    A derivative whose tape has gone runs the body again, with the same result, unless the
    body is stateful or ordered: then it raises `TapeLostError`.

    Args:
        nbytes: the limit in bytes, arrays that several tapes share counted once, each with
            4 KiB for the objects that hold it; 0 keeps no tape. Residuals of a rule count
            by their `nbytes`, or else by what Python knows of their size, and as 1/256 of
            the limit at least.

    Returns:
        The limit that was in force.

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
            f"{nbytes!r}; write set_tape_limit(2**30), for example."
        )
    return _cache.set_limit(int(nbytes))


def tape_bytes() -> int:
    """How many bytes the tapes of differentiated bodies hold now.

    Returns:
        Bytes, counted as `set_tape_limit` says. `profile` tells them apart by function.

    Example:
        >>> import jax, jax.numpy as jnp, jpyfunc
        >>> f = jpyfunc.py_func(jnp.sin, Tout=jax.ShapeDtypeStruct((), jnp.float32))
        >>> before = jpyfunc.tape_bytes()
        >>> value, pullback = jax.vjp(f, 1.0)  # its tape waits for the pullback
        >>> jpyfunc.tape_bytes() > before
        True
    """
    return _cache.nbytes


class EvictionQueue:
    """Tapes in the order in which they go.

    Attributes:
        names: of the tapes, the least recently used first.
        nbytes: what they hold, arrays of several tapes counted for each.
        share: of the limit that they may hold,
        least: but for so many that stay whatever they hold, within the limit.
    """

    def __init__(self, share: float, least: int = 0) -> None:
        self.names: OrderedDict[bytes, None] = OrderedDict()
        self.nbytes = 0
        self.share = share
        self.least = least


@dataclasses.dataclass(slots=True)
class CachedTape:
    """A tape in the cache.

    Attributes:
        run: the tape.
        in_avals: of the operands that it is of.
        owner: the key of its function.
        arrays: what it holds, by id.
        nbytes: of these.
        queue: where it stands.
    """

    run: AnyTape
    in_avals: Avals
    owner: int
    arrays: dict[int, Any]
    nbytes: int
    queue: EvictionQueue


class TapeCache:
    """Tapes by name, bounded in bytes."""

    def __init__(self, limit: int) -> None:
        # Reentrant, because freeing arrays may run finalizers that come here.
        self._lock = threading.RLock()
        self._entries: dict[bytes, CachedTape] = {}
        # Spent tapes by whether their body can be run again. Where it cannot, a pullback
        # that is called twice finds its tape or fails, so these hold more, and the last
        # one stays whatever it holds.
        self._spent = {
            True: EvictionQueue(SPENT_SHARE),
            False: EvictionQueue(SPENT_STATEFUL_SHARE, least=1),
        }
        self._waiting = EvictionQueue(math.inf)
        # By id of an array: how many tapes have it, and its size.
        self._shared: dict[int, tuple[int, int]] = {}
        self._functions: dict[int, set[bytes]] = {}  # by id, the names of their tapes
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

    def add(self, name: bytes, run: AnyTape, primal: Primal) -> None:
        """Keep a tape, if there is room."""
        # One that has none is not for nothing.
        arrays = {id(x): x for x in run.arrays()} or {id(run): run}
        shared = self._shared
        with self._lock:
            sizes = {
                i: shared[i][1] if i in shared else _size(x) for i, x in arrays.items()
            }
            added = sum(size for i, size in sizes.items() if i not in shared)
            if added > self.limit:
                return
            for i, size in sizes.items():
                shared[i] = (shared.get(i, (0,))[0] + 1, size)
            self.nbytes += added
            owner = self._own(unwrapped(primal.func), name)
            nbytes = sum(sizes.values())
            entry = CachedTape(run, primal.in_avals, owner, arrays, nbytes, self._waiting)
            self._entries[name] = entry
            self._enqueue(name, entry, self._waiting)
            dropped = self._shrink()
        del dropped

    def find(self, name: bytes, primal: Primal) -> AnyTape | None:
        with self._lock:
            entry = self._entries.get(name)
            if entry is None or entry.in_avals != primal.in_avals:
                return None
            entry.queue.names.move_to_end(name)
            return entry.run

    def spend(self, name: bytes, repeatable: bool) -> None:
        """Say that the derivative of a tape has been taken."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                return
            self._dequeue(name, entry)
            self._enqueue(name, entry, self._spent[repeatable])
            dropped = self._shrink()
        del dropped

    def bytes_of(self, functions: Iterable[int]) -> int:
        """What the tapes of some functions hold, which are given by their ids."""
        with self._lock:
            names = [name for key in functions for name in self._functions.get(key, ())]
            ids = {i for name in names for i in self._entries[name].arrays}
            return sum(self._shared[i][1] for i in ids)

    @staticmethod
    def _enqueue(name: bytes, entry: CachedTape, queue: EvictionQueue) -> None:
        entry.queue = queue
        queue.names[name] = None
        queue.nbytes += entry.nbytes

    @staticmethod
    def _dequeue(name: bytes, entry: CachedTape) -> None:
        del entry.queue.names[name]
        entry.queue.nbytes -= entry.nbytes

    def _own(self, function: Any, name: bytes) -> int:
        """Evict a tape when its function is garbage-collected.

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
        """Drop a tape; returns what is to be freed outside the lock."""
        entry = self._entries.pop(name)
        self._dequeue(name, entry)
        self._functions.get(entry.owner, set()).discard(name)
        for i in entry.arrays:
            count, size = self._shared.pop(i)
            if count > 1:
                self._shared[i] = (count - 1, size)
            else:
                self.nbytes -= size
        return entry

    def _shrink(self) -> list[Any]:
        """Drop what there is no room for; returns what is to be freed outside the lock."""
        dropped = []
        for queue in (*self._spent.values(), self._waiting):
            while queue.names and (
                self.nbytes > self.limit
                or (
                    len(queue.names) > queue.least
                    and queue.nbytes > queue.share * self.limit
                )
            ):
                dropped.append(self._drop(next(iter(queue.names))))
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
    so of objects without `nbytes` no more than `MAX_RESIDUALS_OF_UNKNOWN_SIZE` are kept.
    """
    if x is None or isinstance(x, bool | int | float | complex | str | bytes | AnyTape):
        return sys.getsizeof(x)
    told = getattr(x, "nbytes", None)
    if isinstance(told, int):
        return told
    seen: dict[int, Any] = {}
    todo, size = [x], 0
    while todo and len(seen) < MAX_REFERENTS:
        each = todo.pop()
        if id(each) in seen or isinstance(each, _NOT_ITS_OWN):
            continue
        seen[id(each)] = each
        size += each.nbytes if isinstance(each, jax.Array) else sys.getsizeof(each)
        todo.extend(gc.get_referents(each))
    return max(size, _cache.limit // MAX_RESIDUALS_OF_UNKNOWN_SIZE)


_cache = TapeCache(DEFAULT_TAPE_LIMIT)


def _forget() -> None:
    """Start anew in a child process, which has its parent's memory."""
    global _cache
    _cache = TapeCache(_cache.limit)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def keeps() -> bool:
    """Whether anything is kept at all."""
    return _cache.limit > 0


def keep(recording: WithTape, tape: AnyTape | None) -> np.ndarray:
    """Keep the record of a run, if there is one and there is room.

    Returns:
        The ticket, an array of shape `(*recording.widths, 4)`.
    """
    name = _cache.new_name()
    if tape:
        _cache.add(name, tape, recording.base)
    ticket = np.frombuffer(name + bytes(4), TICKET.dtype)
    if not recording.widths:
        return ticket
    tickets = of_rows(ticket, math.prod(recording.widths))
    return tickets.reshape(*recording.widths, *TICKET.shape)


def of_rows(ticket: np.ndarray, count: int) -> np.ndarray:
    """The tickets of the rows of a run of `count` elements, whose ticket is given."""
    tickets = np.tile(ticket, (count, 1))
    tickets[:, 3] = np.arange(count)
    return tickets


def find(recorded: AtTape, ticket: Any) -> Any:
    """The record of the run that a ticket is of, if it is kept."""
    data = np.asarray(ticket)
    if not data.size:
        return None
    first = data.reshape(-1, 4)[0]
    # All elements of a whole batch, and in their order.
    if data.ndim > 1 and (data.reshape(-1, 4) != of_rows(first, data.size // 4)).any():
        return None
    tape = _cache.find(first[:3].tobytes(), recorded.base)
    if tape is None or tape.subset is None:
        return None if first[3] else tape
    # A run by branch serves subsets of its own alone.
    batch = running_batch()
    return tape if batch and batch.subset.places_in(tape.subset) is not None else None


def subset_of(recorded: AtTape, ticket: np.ndarray) -> tuple[bool, Subset | None]:
    """Whether the run is kept that a ticket is of, and the elements it was of by branch."""
    tape = _cache.find(ticket[:3].tobytes(), recorded.base)
    return tape is not None, tape and tape.subset


def spend(recorded: AtTape, tickets: Any) -> None:
    """Say that a derivative has been taken of the runs of these tickets.

    It is said at the end of a host call, not of each of its elements, which may all be of
    one run (`jax.jacrev`).
    """
    names = np.ascontiguousarray(np.asarray(tickets).reshape(-1, 4)[:, :3])
    for name in set(names.view("V12").ravel().tolist()):
        _cache.spend(name, recorded.repeatable)


def bytes_of(functions: Iterable[int]) -> int:
    """How many bytes the tapes of some functions hold, which are given by their ids."""
    return _cache.bytes_of(functions)


def is_void(ticket: Any) -> bool:
    """Whether a ticket is of no run: zeros, which JAX puts for a branch not taken."""
    return not np.asarray(ticket).any()
