"""The cache of tapes, from the run of a call to its derivatives.

A program carries a ticket from the call to its derivatives, which find the tape here. For
a pure body, the cache is a matter of speed alone: a derivative that finds no tape runs the
body again. So the cache is bounded, and any ticket may find nothing. Tickets of another
process, even of the parent of a fork, never find anything.
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
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from jpyfunc._errors import see
from jpyfunc._limits import (
    ARRAY_OVERHEAD,
    DEFAULT_TAPE_LIMIT,
    MAX_REFERENTS,
    MAX_RESIDUALS_OF_UNKNOWN_SIZE,
    SPENT_SHARE,
    SPENT_STATEFUL_SHARE,
)
from jpyfunc._runtime.context import running_batch
from jpyfunc._runtime.tickets import name_of, names_of, ticket_of, tickets_of_run
from jpyfunc._types import Array, Avals


class AnyTape(Protocol):
    """The record of a run for its derivatives: its operations, or a rule's residuals."""

    @property
    def subset(self) -> Any:
        """The elements that the run was of, or None if it was not by branch."""

    def arrays(self) -> Iterator[object]:
        """Every array that the tape holds, some more than once."""
        ...


def set_tape_limit(nbytes: int) -> int:
    """Set how much memory the tapes of differentiated bodies may take.

    A call that is differentiated leaves a tape, the arrays of its operations, so that the
    derivative need not run the body again. A tape whose derivative has been taken is
    spent. It stays for a derivative that is taken again, by a second call of what `jax.vjp`
    or `jax.linearize` returned. Spent tapes hold 1/256 of the limit at most, or 1/64 those
    of stateful bodies. Tapes that still wait for their derivative may hold the rest. Where
    there is no room, spent tapes are evicted first, and the least recently used of each
    kind before the others.

    A derivative whose tape has been evicted runs the body again, with the same result. If
    the body is stateful or ordered, it raises `TapeLostError` instead.

    Args:
        nbytes: the limit in bytes; 1 GiB by default, and 0 for no tapes. An array that
            several tapes share counts once, and each array counts 4 KiB more for the
            objects that hold it. Residuals of a rule count by their `nbytes`, or else by
            what Python knows of their size, and as 1/256 of the limit at least.

    Returns:
        The limit that was in force.

    Raises:
        ValueError: `nbytes` is negative, or not an integer.

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
            + see("An invalid option")
        )
    return tapes.set_limit(int(nbytes))


def tape_bytes() -> int:
    """Return how many bytes the tapes of differentiated bodies hold now.

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
    return tapes.nbytes


class EvictionQueue:
    """Tapes that are evicted for the same reason, in LRU order.

    Attributes:
        names: of the tapes, the least recently used first.
        nbytes: what they hold, arrays of several tapes counted for each.
        share: the part of the limit that they may hold.
        least: how many stay within the limit, whatever their share.
    """

    def __init__(self, share: float, least: int = 0) -> None:
        self.names: OrderedDict[bytes, None] = OrderedDict()
        self.nbytes = 0
        self.share = share
        self.least = least

    def is_over(self, limit: int) -> bool:
        """Whether the tapes hold more than their share of `limit`."""
        return len(self.names) > self.least and self.nbytes > self.share * limit


@dataclasses.dataclass(slots=True)
class CachedTape:
    """A tape in the cache.

    Attributes:
        tape: what is cached.
        in_avals: of the operands of its run.
        owner: the id of its function.
        arrays: what it holds, by id.
        nbytes: of these.
        queue: where it waits to be evicted.
    """

    tape: AnyTape
    in_avals: Avals
    owner: int
    arrays: dict[int, object]
    nbytes: int
    queue: EvictionQueue


class TapeCache:
    """Tapes by name, bounded in bytes.

    A tape is spent once a derivative has been taken of it. It stays all the same, because
    nobody can tell whether another will follow: what `jax.vjp` or `jax.linearize` returned
    may be called any number of times, and a stateful body cannot run again for it. But most
    are called once, so spent tapes have a small share of the limit and are evicted first.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.clear()

    def clear(self) -> None:
        """Evict all tapes, and draw names that none of them had.

        The child of a fork must call this. It has a copy of its parent's memory, and would
        give its tapes the same names. Also, another thread of the parent may have held the
        lock.
        """
        # Reentrant, because freeing arrays may run finalizers that come here.
        self._lock = threading.RLock()
        self._entries: dict[bytes, CachedTape] = {}
        # Spent tapes by whether their body can run again. Where it cannot, a pullback that
        # is called twice finds its tape or fails. So these may hold more, and the last one
        # stays whatever it holds.
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
        self.nbytes = 0

    def set_limit(self, limit: int) -> int:
        """Bound the cache by `limit` bytes; return the previous bound."""
        with self._lock:
            before, self.limit = self.limit, limit
            evicted = self._shrink()
        del evicted  # outside the lock
        return before

    @property
    def is_enabled(self) -> bool:
        """Whether the cache holds anything at all."""
        return self.limit > 0

    def store(
        self,
        tape: AnyTape | None,
        function: Callable[..., object],
        in_avals: Avals,
        batch_shape: tuple[int, ...] = (),
    ) -> np.ndarray:
        """Cache the tape of a run, if there is one and room for it.

        Args:
            tape: what the run left.
            function: the user's, with which the tape goes.
            in_avals: of the operands of the run.
            batch_shape: of the elements, if the function takes whole batches at once.

        Returns:
            The ticket, or one for each element: an array of shape `(*batch_shape, 4)`.
        """
        with self._lock:
            self._last += 1
            name = self._nonce + self._last.to_bytes(6)
        if tape is not None:
            self._add(name, tape, function, in_avals)
        ticket = ticket_of(name)
        if not batch_shape:
            return ticket
        tickets = tickets_of_run(ticket, math.prod(batch_shape))
        return tickets.reshape(*batch_shape, *ticket.shape)

    def lookup(self, ticket: Array, in_avals: Avals) -> AnyTape | None:
        """Find the tape that a run with this ticket can use.

        Args:
            ticket: one ticket, or those of a whole batch that a function takes at once.
            in_avals: of the operands of the run. They tell apart the run of one element
                and that of a batch of one which a function takes at once.
        """
        data = np.asarray(ticket)
        if not data.size:
            return None
        first = data.reshape(-1, 4)[0]
        # A batch that is taken at once has one tape, of all elements in their order.
        if data.ndim > 1:
            own = tickets_of_run(first, data.size // 4)
            if (data.reshape(-1, 4) != own).any():
                return None
        tape = self._find(name_of(first), in_avals)
        if tape is None or tape.subset is None:
            return None if first[3] else tape
        # The arrays of a tape by branch have a row for each element. A run by branch takes
        # those of its own elements; any other run has no use for them.
        batch = running_batch()
        is_of_these = batch and batch.subset.places_in(tape.subset) is not None
        return tape if is_of_these else None

    def subset_of(self, ticket: np.ndarray, in_avals: Avals) -> tuple[bool, Any]:
        """Return whether the tape of a ticket is cached, and the subset it is of."""
        tape = self._find(name_of(ticket), in_avals)
        return tape is not None, tape and tape.subset

    def spend(self, tickets: Array, repeatable: bool) -> None:
        """Record that a derivative has been taken of tapes.

        It is called at the end of a host call, not for each of its elements: those of
        `jax.jacrev` are all of one tape.

        Args:
            tickets: of the tapes.
            repeatable: whether their body can run again without them.
        """
        with self._lock:
            for name in names_of(np.asarray(tickets)):
                entry = self._entries.get(name)
                if entry is not None:
                    self._dequeue(name, entry)
                    self._enqueue(name, entry, self._spent[repeatable])
            evicted = self._shrink()
        del evicted

    def bytes_of(self, functions: Iterable[int]) -> int:
        """Return how many bytes the tapes of some functions hold, given their ids."""
        with self._lock:
            names = [name for key in functions for name in self._functions.get(key, ())]
            ids = {i for name in names for i in self._entries[name].arrays}
            return sum(self._shared[i][1] for i in ids)

    def _find(self, name: bytes, in_avals: Avals) -> AnyTape | None:
        with self._lock:
            entry = self._entries.get(name)
            if entry is None or entry.in_avals != in_avals:
                return None
            entry.queue.names.move_to_end(name)
            return entry.tape

    def _add(
        self, name: bytes, tape: AnyTape, function: Callable[..., object], in_avals: Avals
    ) -> None:
        # A tape without arrays still takes a slot.
        arrays = {id(x): x for x in tape.arrays()} or {id(tape): None}
        shared = self._shared
        with self._lock:
            sizes = {
                i: shared[i][1] if i in shared else self._size(x) for i, x in arrays.items()
            }
            added = sum(size for i, size in sizes.items() if i not in shared)
            if added > self.limit:
                return
            for i, size in sizes.items():
                shared[i] = (shared.get(i, (0,))[0] + 1, size)
            self.nbytes += added
            owner = self._own(function, name)
            nbytes = sum(sizes.values())
            entry = CachedTape(tape, in_avals, owner, arrays, nbytes, self._waiting)
            self._entries[name] = entry
            self._enqueue(name, entry, self._waiting)
            evicted = self._shrink()
        del evicted

    @staticmethod
    def _enqueue(name: bytes, entry: CachedTape, queue: EvictionQueue) -> None:
        entry.queue = queue
        queue.names[name] = None
        queue.nbytes += entry.nbytes

    @staticmethod
    def _dequeue(name: bytes, entry: CachedTape) -> None:
        del entry.queue.names[name]
        entry.queue.nbytes -= entry.nbytes

    def _own(self, function: Callable[..., object], name: bytes) -> int:
        """Evict a tape when its function is garbage-collected.

        Returns:
            The id of the function.
        """
        key = id(function)
        if key not in self._functions:
            with contextlib.suppress(TypeError):  # a built-in function, which lives on
                weakref.finalize(function, self._evict_all_of, key).atexit = False
            self._functions[key] = set()
        self._functions[key].add(name)
        return key

    def _evict_all_of(self, function: int) -> None:
        with self._lock:
            names = self._functions.pop(function, set())
            evicted = [self._evict(name) for name in names]
        del evicted

    def _evict(self, name: bytes) -> CachedTape:
        """Evict a tape; the caller frees what is returned outside the lock."""
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

    def _shrink(self) -> list[CachedTape]:
        """Evict what there is no room for; the caller frees it outside the lock."""
        evicted = []
        for queue in (*self._spent.values(), self._waiting):
            while queue.names and (self.nbytes > self.limit or queue.is_over(self.limit)):
                evicted.append(self._evict(next(iter(queue.names))))
        return evicted

    def _size(self, x: object) -> int:
        """Return the bytes that an array, or an object in residuals, counts as."""
        if isinstance(x, np.ndarray):
            return x.nbytes + ARRAY_OVERHEAD
        if isinstance(x, jax.Array):
            aval = x.aval  # `jax.typeof` takes ten times as long
            return math.prod(aval.shape) * aval.dtype.itemsize + ARRAY_OVERHEAD
        return _size_of_object(x, self.limit // MAX_RESIDUALS_OF_UNKNOWN_SIZE)


_NOT_OWNED = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)


def _size_of_object(x: object, least: int) -> int:
    """The size of a Python object by its `nbytes`, or else with what it refers to.

    Python does not know what a library holds beside that, as SciPy holds the factors of a
    sparse matrix. So an object without `nbytes` counts as `least` bytes at least, which
    bounds how many of them are cached.
    """
    if x is None or isinstance(x, bool | int | float | complex | str | bytes):
        return sys.getsizeof(x) + ARRAY_OVERHEAD
    stated = getattr(x, "nbytes", None)
    if isinstance(stated, int):
        return stated + ARRAY_OVERHEAD
    seen: dict[int, object] = {}
    pending, size = [x], 0
    while pending and len(seen) < MAX_REFERENTS:
        each = pending.pop()
        if id(each) in seen or isinstance(each, _NOT_OWNED):
            continue
        seen[id(each)] = each
        size += each.nbytes if isinstance(each, jax.Array) else sys.getsizeof(each)
        pending.extend(gc.get_referents(each))
    return max(size, least) + ARRAY_OVERHEAD


tapes = TapeCache(DEFAULT_TAPE_LIMIT)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=tapes.clear)
