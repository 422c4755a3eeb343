"""What a compiled program calls on the host."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import set_current_trace

from jpyfunc import _compat
from jpyfunc._body.closure import held
from jpyfunc._body.derived import Body
from jpyfunc._errors import UnsupportedError, mark_crossing, pass_on_interrupt
from jpyfunc._host.evaluate import evaluate_with
from jpyfunc._host.profile import Run, annotated, measure_body, open_profiles
from jpyfunc._traces.on_device import OnDevice


class HostCall:
    """What a compiled program calls on the host: runs a body on NumPy operands.

    The body runs on the thread of the program that calls, on the private client, under
    the settings that were in force where the call was traced.

    Args:
        body: what to run.
        settings: as `_compat.current_settings` gave them.
        device: the private one for the program, as `_compat.body_device` gave it.
    """

    __slots__ = ("_body", "_device", "_on_device", "_settings")

    def __init__(
        self, body: Body, settings: tuple[Any, ...], device: _compat.Device
    ) -> None:
        self._body = body
        self._settings = settings
        self._device = device
        # It costs each operation JAX's fast path, some 60 us, so only where needed.
        self._on_device = _holds_array_elsewhere(body.primal.held, device)

    def __call__(self, *operands: np.ndarray) -> tuple[np.ndarray, ...]:
        if open_profiles:
            execute = functools.partial(self._cross, operands)
            return measure_body(self._body, operands, execute)
        return self._cross(operands, annotated)

    def _cross(self, operands: Sequence[Any], run: Run) -> tuple[np.ndarray, ...]:
        device = self._device
        entered = _compat.enter_settings(self._settings, device)
        try:
            if self._on_device:
                with set_current_trace(OnDevice(device)):
                    results = evaluate_with(self._body, operands, device, run)
            else:
                results = evaluate_with(self._body, operands, device, run)
            return tuple(np.asarray(result) for result in results)
        except BaseException as error:
            pass_on_interrupt(error)
            mark_crossing(error)
            raise
        finally:
            _compat.leave_settings(entered)

    def __reduce__(self) -> Any:
        raise UnsupportedError(
            f"{self._body.primal.label}: a program that calls it cannot be "
            "pickled or serialized, because its body is a Python function of this "
            "process and not part of the program. Save what the body computes, or the "
            "source, and compile again where it is loaded."
        )


def _holds_array_elsewhere(body: Any, device: _compat.Device) -> bool:
    """Whether `body` holds a JAX array that is not on `device`, global ones included."""
    return any(
        isinstance(value, jax.Array)
        and not isinstance(value, Tracer)
        and value.sharding.device_set != {device}
        for _, value in held(body, with_globals=True)
    )
