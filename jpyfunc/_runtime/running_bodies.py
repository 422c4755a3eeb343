"""The bodies of compiled programs that run now, and for how long each has been idle."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator

# By thread, the clock of its CPU time, and the number, of the body that runs there.
_running: dict[int, tuple[int, int]] = {}
start_numbers = itertools.count()  # of bodies and blocks, in the order in which they began

# On Windows threads have no clock, and each body counts as one that waits.
_clock_of = getattr(time, "pthread_getcpuclockid", lambda thread: 0)
# A clock that never stands still.
_CLOCK_OF_BUSY = getattr(time, "CLOCK_MONOTONIC", 0)


class running_body:  # noqa: N801 - a context manager
    """A block in which the body of a compiled program runs on this thread."""

    __slots__ = ("_is_outermost", "_thread")

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        self._is_outermost = self._thread not in _running
        if self._is_outermost:
            _running[self._thread] = (_clock_of(self._thread), next(start_numbers))

    def __exit__(self, *exc_info: object) -> None:
        if self._is_outermost:
            del _running[self._thread]


@contextlib.contextmanager
def waiting_for_others() -> Iterator[None]:
    """A block in which what runs on this thread waits for other threads or processes.

    They do its work, so it does not count as idle, though it uses no CPU.
    """
    thread = threading.get_ident()
    running = _running.get(thread)
    if running is None:
        yield
        return
    _running[thread] = (_CLOCK_OF_BUSY, running[1])
    try:
        yield
    finally:
        _running[thread] = running


def is_in_body() -> bool:
    """Whether a compiled program's body runs on this thread, where nothing may wait."""
    return threading.get_ident() in _running


class IdleTimes:
    """For how long each body has done nothing, seen from one look to the next."""

    def __init__(self) -> None:
        # By the number of a body, its CPU time and when that was last seen to change.
        self._last: dict[int, tuple[float, float]] = {}

    def seconds(self) -> dict[int, float]:
        """By the number of each body that runs, for how long its thread used no CPU."""
        now = time.monotonic()
        used = {number: _time_of(clock) for clock, number in _running.copy().values()}
        self._last = {
            number: last
            if (last := self._last.get(number)) is not None and last[0] == seconds
            else (seconds, now)
            for number, seconds in used.items()
        }
        return {number: now - since for number, (_, since) in self._last.items()}


def cpu_seconds(thread: int) -> float:
    """The CPU time of a thread; 0.0 if it has ended, or threads have no clock."""
    return _time_of(_clock_of(thread))


def _time_of(clock: int) -> float:
    with contextlib.suppress(OSError, AttributeError):  # the thread has ended meanwhile
        return time.clock_gettime(clock) if clock else 0.0
    return 0.0
