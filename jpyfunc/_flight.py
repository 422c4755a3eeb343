"""Programs in flight: which of them a block has dispatched, and to wait for those."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from typing import Any

import jax

from jpyfunc import _compat

# Seconds for which a body may wait itself, for a lock, say, before nobody waits for it.
PATIENCE = 5.0

_clocks: dict[int, int] = {}  # by thread, the clock of its time on a CPU, of running bodies


class running_body:  # noqa: N801 - a context manager
    """Notes that a body of a compiled program runs on this thread."""

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        self._before = _clocks.get(self._thread)
        _clocks[self._thread] = self._before or _clock_of(self._thread)

    def __exit__(self, *exc_info: object) -> None:
        if self._before is None:
            del _clocks[self._thread]


# On Windows a thread has none, and its body counts as one that waits.
_clock_of = getattr(time, "pthread_getcpuclockid", lambda thread: 0)


class Flight:
    """What is in flight now, not to be waited for later."""

    def __init__(self) -> None:
        self._arrays = {id(x): weakref.ref(x) for x in jax.live_arrays()}
        self._tokens = {id(token): token for token in _compat.tokens()}

    def wait(self) -> list[Exception]:
        """Wait for what was dispatched since: its effects, and results that still live.

        It ends early in a body, where that would be to wait for what waits for the body,
        and where a body that runs has itself done nothing but wait for `PATIENCE`.

        Returns:
            The failures.
        """
        failures: list[Exception] = []
        if _compat.is_in_body():
            return failures
        waited = threading.Event()
        arguments = (failures, waited)
        # Not a daemon: one that is in XLA when Python ends would end the process badly.
        threading.Thread(target=self._wait, args=arguments).start()
        idle: dict[int, tuple[float, float]] = {}  # by thread: its time, and since when
        while not waited.wait(0.2 if idle else 0.01):
            now = time.monotonic()
            times = {thread: _time_of(clock) for thread, clock in _clocks.copy().items()}
            idle = {
                thread: idle[thread]
                if idle.get(thread, (None,))[0] == used
                else (used, now)
                for thread, used in times.items()
            }
            if any(now - since > PATIENCE for _, since in idle.values()):
                break
        return failures.copy()

    def _wait(self, failures: list[Exception], waited: threading.Event) -> None:
        tokens = [t for t in _compat.tokens() if id(t) not in self._tokens]
        arrays = [x for x in jax.live_arrays() if not self._has(x)]
        for each in (*tokens, *arrays):
            try:
                each.block_until_ready()
            except Exception as error:  # noqa: BLE001 - for the caller to judge
                failures.append(error)
        waited.set()

    def _has(self, x: Any) -> bool:
        reference = self._arrays.get(id(x))
        return reference is not None and reference() is x


def _time_of(clock: int) -> float:
    with contextlib.suppress(OSError, AttributeError):  # the thread has ended meanwhile
        return time.clock_gettime(clock) if clock else 0.0
    return 0.0
