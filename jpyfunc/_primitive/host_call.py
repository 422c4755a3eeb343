"""The host call: what a compiled program calls, with NumPy arrays, to run a body."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import set_current_trace

from jpyfunc import _compat
from jpyfunc._bodies.body import Body
from jpyfunc._bodies.user_function import UserFunction
from jpyfunc._errors import UnsupportedError, see
from jpyfunc._interpreters.on_device import OnDeviceTrace
from jpyfunc._primitive.failure_report import report_of
from jpyfunc._runtime.configuration import Config, enter_config
from jpyfunc._runtime.context import Context
from jpyfunc._runtime.exceptions import caller, failure_text, leave_host_call
from jpyfunc._runtime.profile import measured
from jpyfunc._runtime.running_bodies import running_body
from jpyfunc._staging.closure import held


class HostCall:
    """A function of NumPy arrays that runs a body for a compiled program.

    The body runs on the thread that calls, its operations on a device of a private client,
    under the JAX configuration that was in force where the call was traced.

    Args:
        body: what to run.
        config: that configuration.
        device: that device, as `body_device` gave it.
        reports: whether a failure is returned as a report, as `failure_report` says, and
            not raised.
        raises_at_once: as in `leave_host_call`.
    """

    __slots__ = (
        "_body",
        "_config",
        "_context",
        "_on_device",
        "_profile_row",
        "_raises_at_once",
        "_reports",
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
        self._profile_row = body.profile_row
        self._reports = reports
        self._raises_at_once = raises_at_once
        # Operations then miss JAX's fast path, some 60 us each, so only where needed.
        self._on_device = _holds_array_elsewhere(body.function, device)

    def __call__(self, *operands: np.ndarray) -> tuple[np.ndarray, ...]:
        try:
            with running_body():
                results = measured(self._profile_row, self._context, operands, self._run)
        except BaseException as error:  # noqa: BLE001 - it leaves as a text
            text = failure_text(error, self._body.function.label, self._raises_at_once)
        else:
            return (*results, report_of("")) if self._reports else results
        if not self._reports:
            leave_host_call(text, self._raises_at_once)
        zeros = (np.zeros(aval.shape, aval.dtype) for aval in self._body.out_avals)
        return (*zeros, report_of(text))

    def _run(
        self, context: Context, operands: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, ...]:
        device: _compat.Device = context.device
        with enter_config(self._config, device), _thread_hooks():
            if self._on_device:
                with set_current_trace(OnDeviceTrace(device)):
                    results = self._body.evaluate(context, operands)
            else:
                results = self._body.evaluate(context, operands)
            return tuple(np.asarray(result) for result in results)

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            f"{self._body.function.label}: a program that calls it cannot be "
            "pickled or serialized, because its body is a Python function of this "
            "process and not part of the program. Save what the body computes, or the "
            "source, and compile again where it is loaded." + see("Export and pickling")
        )


def _thread_hooks() -> AbstractContextManager[None]:
    """Follow a thread of XLA's in the way that `threading` follows its own threads.

    Debuggers, profilers and coverage see threads through `threading.settrace` and
    `threading.setprofile`, which do not reach threads that Python has not started.
    """
    if (threading.gettrace() or threading.getprofile()) and caller() is None:
        return _entered_thread_hooks()
    return _NO_HOOKS


_NO_HOOKS = nullcontext()


@contextmanager
def _entered_thread_hooks() -> Iterator[None]:
    entered: list[Callable[[Any], None]] = []
    hooks: list[tuple[object, object, Callable[[Any], None]]] = [
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


def _holds_array_elsewhere(function: UserFunction, device: _compat.Device) -> bool:
    """Whether a function uses an array that is not on `device`, from globals for example.

    Raises:
        UnsupportedError: it uses an array that is in part on devices of other processes.
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
                + see("Under shard_map and over several processes")
            )
        elsewhere = elsewhere or value.sharding.device_set != {device}
    return elsewhere
