"""Programs in flight: waiting for those of a block, and for all before Python ends."""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import threading
import time
from collections.abc import Iterator
from typing import TypeVar

from jpyfunc._limits import (
    LONGEST_PAUSE,
    PATIENCE,
    PATIENCE_AT_EXIT,
    PATIENCE_BEFORE,
    QUIET,
    SHORTEST_PAUSE,
)
from jpyfunc._runtime.fences import Fence, fenced_clients, fences
from jpyfunc._runtime.running_bodies import IdleTimes, start_numbers


class Flight:
    """The programs that this thread dispatches from now on.

    Fences from before tell them from earlier programs, so nothing need be known of each
    program or of the arrays that it returns.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self._number = next(start_numbers)
        self._before = fences()

    def has_dispatched_all(self) -> bool:
        """Test whether everything that is in flight now has been dispatched since."""
        return all(fence.is_ready() for fence in self._before)

    def wait(self) -> None:
        """Wait for what this thread has dispatched since.

        It ends early in a body, which would wait for what waits for the body itself, and
        where a body that runs has itself done nothing but wait for `PATIENCE`.
        """
        behind, idle = fences(), IdleTimes()
        for pause in _pauses():
            if all(fence.is_ready() for fence in behind):
                return
            waiting = idle.seconds()
            if any(
                seconds > (PATIENCE_BEFORE if number < self._number else PATIENCE)
                for number, seconds in waiting.items()
            ):
                return
            time.sleep(pause)


FlightT = TypeVar("FlightT", bound=Flight)


def take_last(flights: list[FlightT]) -> FlightT:
    """Take the last flight of this thread from a list that several threads may share."""
    here = threading.get_ident()
    last = max(i for i, flight in enumerate(flights) if flight.thread == here)
    return flights.pop(last)


def _pauses() -> Iterator[float]:
    """Seconds from one look to the next."""
    pause = SHORTEST_PAUSE
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE)


_process = os.getpid()


@atexit.register  # later than JAX's handlers, so Python calls this one before them
def _wait_at_exit() -> None:
    """Wait for the programs with bodies in flight, of all threads, before Python ends.

    A thread of XLA's that comes to a body after that is ended by Python from within XLA,
    which aborts the process (before Python 3.14). JAX waits only for programs that have
    effects and were dispatched by the main thread.

    Fences tell when the programs of the main thread are done, and live arrays tell it of
    the programs of other threads. If another thread has dropped the results of a program,
    nothing shows that it is in flight until its body begins: hence `QUIET`. A daemon thread
    may dispatch more at any time. Where one is alive, bodies that begin during the wait may
    be its own, and they prolong it by `PATIENCE` at most.

    The wait ends for bodies that themselves wait, and for whatever else may be stuck. In
    the child of a fork there are none of the parent's threads to wait for.
    """
    clients = fenced_clients()
    if not clients or os.getpid() != _process:
        return
    arrays = [x for client in clients for x in client.live_arrays()]
    pending: list[Fence] = [*fences(), *arrays]
    idle, last = IdleTimes(), time.monotonic()
    until = last + PATIENCE if _has_daemons() else math.inf
    number = next(start_numbers)
    for pause in _pauses():
        pending = [x for x in pending if not x.is_deleted() and not x.is_ready()]
        waiting, now = idle.seconds(), time.monotonic()
        if not pending and now > until and all(each > number for each in waiting):
            break
        if waiting:
            last = now
        elif not pending and now > last + QUIET:
            return
        if now > last + PATIENCE_AT_EXIT or any(
            seconds > PATIENCE for seconds in waiting.values()
        ):
            break
        time.sleep(pause)
    # A client that is deleted waits for its threads, so these are never deleted.
    for client in clients:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(client))


def _has_daemons() -> bool:
    """Whether a daemon thread is alive that Python code has started.

    A thread of XLA's whose body asks `threading` for the current thread, as logging does,
    is a daemon named "Dummy-1" from then on.
    """
    return any(
        thread.daemon and not thread.name.startswith("Dummy-")
        for thread in threading.enumerate()
    )
