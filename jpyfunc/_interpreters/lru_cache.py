"""An LRU cache that grows to the set of keys that come back."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from jpyfunc._limits import MAX_EVICTED_KEYS


class LruCache:
    """An LRU cache that grows to the set of keys that come back.

    A body of more distinct operations than the cache has room for would evict, in each
    call, just those that the next call begins with, and compile all of them again. So when
    a key comes back that was evicted, the cache doubles. If keys never come back, such
    as those of functions that are made in each call, it stays as small as it was.

    Args:
        size: how many entries it has room for at first.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        # Entries of dead owners are dropped by the garbage collector, which may run in
        # the middle of `put`, on the same thread.
        self._lock = threading.RLock()
        self._entries: OrderedDict[Hashable, tuple[Any, object]] = OrderedDict()
        self._evicted: OrderedDict[int, None] = OrderedDict()  # hashes of keys

    def get(self, key: Hashable) -> Any:
        """The value for `key`, or None."""
        # Without the lock, because every operation comes here.
        entry = self._entries.get(key)
        if entry is None:
            return None
        with contextlib.suppress(KeyError):  # it was evicted meanwhile
            self._entries.move_to_end(key)
        return entry[0]

    def put(
        self,
        key: Hashable,
        value: object,
        owners: Sequence[object] = (),
        on_death: Callable[[], None] | None = None,
    ) -> None:
        """Store `value`, for as long as all `owners` live.

        Args:
            key: to find it by; it may contain ids of `owners`.
            value: not None.
            owners: objects, which it does not keep alive.
            on_death: called when the first of them has died.
        """

        def drop(_: object, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
            if is_finalizing():  # modules are gone
                return
            if self._entries.pop(key, None) is not None and on_death is not None:
                on_death()

        references = [weakref.ref(x, drop) for x in owners]
        with self._lock:
            self._entries[key] = (value, references)
            if len(self._entries) > self._size:
                self._make_room(key)

    def _make_room(self, key: Hashable) -> None:
        if hash(key) in self._evicted:
            self._size *= 2
            self._evicted.clear()
            return
        evicted, _ = self._entries.popitem(last=False)
        self._evicted[hash(evicted)] = None
        if len(self._evicted) > MAX_EVICTED_KEYS:
            self._evicted.popitem(last=False)
