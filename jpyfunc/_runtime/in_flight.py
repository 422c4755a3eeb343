"""Programs in flight: which of them a block has dispatched, and to wait for those."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import itertools
import os
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import set_current_trace
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpyfunc import _compat
from jpyfunc._limits import (
    PATIENCE,
    PATIENCE_AT_EXIT,
    PATIENCE_BEFORE,
    QUIET,
)
from jpyfunc._runtime.clients import is_in_body, is_private

# By thread, the clock of its time on a CPU, and the number, of the body that runs there.
_running: dict[int, tuple[int, int]] = {}
_numbers = itertools.count()

# Of the programs with bodies, the devices of this process that each is over.
_assignments: set[tuple[_compat.Device, ...]] = set()


def note_devices(devices: Sequence[_compat.Device]) -> None:
    """Note what devices of this process a program with bodies is over."""
    if devices and not is_private(devices[0]):
        _assignments.add(tuple(devices))
        _assignments.update((device,) for device in devices)


class running_body:  # noqa: N801 - a context manager
    """Notes that a body of a compiled program runs on this thread."""

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        self._before = _running.get(self._thread)
        if self._before is None:
            _running[self._thread] = (_clock_of(self._thread), next(_numbers))

    def __exit__(self, *exc_info: object) -> None:
        if self._before is None:
            del _running[self._thread]


# On Windows a thread has none, and its body counts as one that waits.
_clock_of = getattr(time, "pthread_getcpuclockid", lambda thread: 0)


class Flight:
    """What this thread dispatches from now on.

    It is told from what was dispatched before by a fence, a program that is in flight
    now: programs run in the order in which a thread dispatches them. So nothing need be
    known of each of them, nor of the arrays that they compute.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self._number = next(_numbers)
        self._before = _fences()

    def has_dispatched_all(self) -> bool:
        """Whether what is in flight now was dispatched since, all of it."""
        return all(fence.is_ready() for fence in self._before)

    def wait(self) -> None:
        """Wait for what this thread has dispatched since.

        It ends early in a body, where that would be to wait for what waits for the body,
        and where a body that runs has itself done nothing but wait for `PATIENCE`.
        """
        fences, idle = _fences(), _Idle()
        for pause in _pauses():
            if all(fence.is_ready() for fence in fences):
                return
            waiting = idle.seconds()
            if any(
                seconds > (PATIENCE_BEFORE if number < self._number else PATIENCE)
                for number, seconds in waiting.items()
            ):
                return
            time.sleep(pause)


def taken(flights: list[Any]) -> Any:
    """Take out of `flights`, which several threads may share, the last of this thread."""
    here = threading.get_ident()
    last = max(i for i, flight in enumerate(flights) if flight.thread == here)
    return flights.pop(last)


def _fences() -> list[Any]:
    """Fences behind all that this thread has dispatched; in a body, none."""
    if is_in_body():
        return []
    return [_fence(devices) for devices in _assignments.copy()]


def _fence(devices: tuple[_compat.Device, ...]) -> jax.Array:
    """An array that is ready when all that this thread has dispatched to `devices` is done.

    Programs of one thread run in the order in which it dispatches them: those over one
    device among each other, and those over several.

    Args:
        devices: of a program, those of this process.
    """
    with contextlib.ExitStack() as stack:
        for refusal in _REFUSALS:
            if refusal.value:  # which is about what the user runs
                stack.enter_context(refusal(False))
        program, operand = _fence_over(devices)
        return program(operand)


_REFUSALS = tuple(
    _compat.config_states[name]
    for name in ("jax_disable_jit", "jax_no_tracing", "jax_no_execution")
)


@functools.cache
def _fence_over(devices: tuple[_compat.Device, ...]) -> tuple[Any, jax.Array]:
    # Compiled ahead, for no trace of the caller's has a part in its call.
    sharding = NamedSharding(
        Mesh(np.array(devices), ("devices",)), PartitionSpec("devices")
    )
    with (
        set_current_trace(_compat.eval_trace),
        _compat.no_mesh(),
        jax.transfer_guard("allow"),
    ):
        operand = jax.device_put(np.zeros(len(devices), np.float32), sharding)
        return jax.jit(lambda x: x + 1).lower(operand).compile(), operand


def _pauses() -> Iterable[float]:
    """Seconds from one look to the next: short ones first."""
    pause = 2e-5
    while True:
        yield pause
        pause = min(2 * pause, 0.01)


class _Idle:
    """How long each body that runs has done nothing."""

    def __init__(self) -> None:
        self._since: dict[
            int, tuple[float, float]
        ] = {}  # by number: its CPU time, and when

    def seconds(self) -> dict[int, float]:
        """By the number of each body, for how long its thread has used no CPU."""
        now = time.monotonic()
        used = {number: _time_of(clock) for clock, number in _running.copy().values()}
        self._since = {
            number: self._since[number]
            if number in self._since and self._since[number][0] == seconds
            else (seconds, now)
            for number, seconds in used.items()
        }
        return {number: now - since for number, (_, since) in self._since.items()}


def _time_of(clock: int) -> float:
    with contextlib.suppress(OSError, AttributeError):  # the thread has ended meanwhile
        return time.clock_gettime(clock) if clock else 0.0
    return 0.0


_process = os.getpid()


@atexit.register  # after JAX's own, which is imported before: so it is called before them
def _wait_at_exit() -> None:
    """Wait for the programs with bodies in flight, of all threads, before Python ends.

    A thread of XLA's that comes to a body after that is ended by Python from within XLA,
    which aborts the process (before Python 3.14). JAX waits only for what has effects,
    and was dispatched by the main thread.

    What the main thread has dispatched is before its fences, and what other threads have
    is known by its results. Of results that another thread has dropped nothing is known
    until a body begins: hence `QUIET`. A daemon thread may dispatch more at any time, and
    is not waited for.

    It is not to wait for ever: for bodies that themselves wait, nor for what else may be
    stuck. In a child of a fork there are none of the parent's threads to wait for.
    """
    if not _assignments or os.getpid() != _process:
        return
    clients = {devices[0].client: devices[0] for devices in _assignments}
    arrays = [x for device in clients.values() for x in device.client.live_arrays()]
    pending: Sequence[Any] = [*_fences(), *arrays]
    idle, last = _Idle(), time.monotonic()
    for pause in _pauses():
        pending = [x for x in pending if not x.is_deleted() and not x.is_ready()]
        waiting, now = idle.seconds(), time.monotonic()
        if waiting:
            last = now
        elif not pending and now > last + QUIET:
            return
        if now > last + PATIENCE_AT_EXIT or any(
            seconds > PATIENCE for seconds in waiting.values()
        ):
            break
        time.sleep(pause)
    for client in clients:  # which waits for its threads when it is deleted, so never
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(client))
