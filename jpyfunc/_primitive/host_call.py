"""What a compiled program calls on the host."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray, Tracer
from jax.extend.core import set_current_trace

from jpyfunc import _compat
from jpyfunc._bodies.body import Body
from jpyfunc._bodies.user_function import UserFunction
from jpyfunc._errors import UnsupportedError
from jpyfunc._interpreters.on_device import OnDeviceTrace
from jpyfunc._limits import (
    REPORT_BYTES,
)
from jpyfunc._runtime.configuration import Config, enter_config
from jpyfunc._runtime.context import Context
from jpyfunc._runtime.exceptions import caller, failing, leave
from jpyfunc._runtime.profile import measured
from jpyfunc._runtime.running_bodies import running_body
from jpyfunc._staging.closure import held

# What a call says of its failure where others must know: a text, zeros if there is none.
REPORT = ShapedArray((REPORT_BYTES,), np.uint8)


def raise_reported(raises_at_once: bool, report: np.ndarray) -> tuple[np.ndarray]:
    """Raise what a call has reported; True if that is nothing."""
    text = bytes(np.asarray(report)).rstrip(b"\0").decode("utf-8", "replace")
    if text:
        leave(text, raises_at_once)
    return (np.asarray(True),)


class HostCall:
    """What a compiled program calls on the host: runs a body on NumPy operands.

    The body runs on the thread of the program that calls, on the private client, under
    the configuration that was in force where the call was traced.

    Args:
        body: what to run.
        config: as `current_config` gave it.
        device: the private one for the program, as `body_device` gave it.
        reports: whether it returns what it raises, as `failure_report` says.
        raises_at_once: as of `leave`.
    """

    __slots__ = (
        "_body",
        "_config",
        "_context",
        "_on_device",
        "_raises_at_once",
        "_reports",
        "_row",
    )

    def __init__(
        self,
        body: Body,
        config: Config,
        device: _compat.Device,
        reports: bool,
        raises_at_once: bool,
    ) -> None:
        self._body = body
        self._config = config
        self._context = Context(device)
        self._row = body.row
        self._reports = reports
        self._raises_at_once = raises_at_once
        # It costs each operation JAX's fast path, some 60 us, so only where needed.
        self._on_device = _holds_array_elsewhere(body.function, device)

    def __call__(self, *operands: np.ndarray) -> tuple[np.ndarray, ...]:
        try:
            with running_body():
                results = measured(self._row, self._context, operands, self._cross)
        except BaseException as error:  # noqa: BLE001 - it is raised, as XLA takes it
            text = failing(error, self._body.function.label, self._raises_at_once)
        else:
            return (*results, _report("")) if self._reports else results
        if not self._reports:
            leave(text, self._raises_at_once)
        zeros = (np.zeros(aval.shape, aval.dtype) for aval in self._body.out_avals)
        return (*zeros, _report(text))

    def _cross(self, context: Context, operands: Sequence[Any]) -> tuple[np.ndarray, ...]:
        device: Any = context.device
        with enter_config(self._config, device), _thread_hooks():
            if self._on_device:
                with set_current_trace(OnDeviceTrace(device)):
                    results = self._body.evaluate(context, operands)
            else:
                results = self._body.evaluate(context, operands)
            return tuple(np.asarray(result) for result in results)

    def __reduce__(self) -> Any:
        raise UnsupportedError(
            f"{self._body.function.label}: a program that calls it cannot be "
            "pickled or serialized, because its body is a Python function of this "
            "process and not part of the program. Save what the body computes, or the "
            "source, and compile again where it is loaded."
        )


def _thread_hooks() -> AbstractContextManager[None]:
    """Trace this thread as `threading` does those that it starts, if it is one of XLA's.

    Debuggers, coverage and profilers follow a program's threads by `threading.settrace`
    and `threading.setprofile`, which know none that Python has not started.
    """
    if (threading.gettrace() or threading.getprofile()) and caller() is None:
        return _entered_thread_hooks()
    return _NO_HOOKS


_NO_HOOKS = nullcontext()


@contextmanager
def _entered_thread_hooks() -> Iterator[None]:
    entered: list[Callable[[Any], None]] = []
    hooks: list[tuple[Any, Any, Callable[[Any], None]]] = [
        (threading.gettrace(), sys.gettrace(), sys.settrace),
        (threading.getprofile(), sys.getprofile(), sys.setprofile),
    ]
    for wanted, current, enter in hooks:
        if wanted is not None and current is None:
            enter(wanted)
            entered.append(enter)
    try:
        yield
    finally:
        for enter in entered:
            enter(None)


def _report(text: str) -> np.ndarray:
    """`text` as a report, without its middle if it is long."""
    data = text.encode()
    half = REPORT.size // 2
    if len(data) > REPORT.size:
        data = data[: half - 5] + b"\n...\n" + data[-half:]
    report = np.zeros(REPORT.shape, REPORT.dtype)
    report[: len(data)] = np.frombuffer(data, REPORT.dtype)
    return report


def _holds_array_elsewhere(function: UserFunction, device: _compat.Device) -> bool:
    """Whether a body holds a JAX array that is not on `device`, global ones included.

    Raises:
        UnsupportedError: it holds one that other processes hold in part.
    """
    elsewhere = False
    for path, value in held(function.held, with_globals=True):
        if isinstance(value, Tracer) or not isinstance(value, jax.Array):
            continue
        if not value.is_fully_addressable:
            raise UnsupportedError(
                f"{function.label}: the body holds {value.aval.str_short()}, an array over "
                f"several processes, as {path}. It runs in one of them, which does not "
                "have all of its values. Pass it as an argument."
            )
        elsewhere = elsewhere or value.sharding.device_set != {device}
    return elsewhere
