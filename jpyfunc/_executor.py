"""Where a body runs: the private CPU client, the caller's settings, values in and out.

`_evaluate` is the one place that runs bodies of the primitive, eagerly and from
compiled programs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import set_current_trace

from jpyfunc import _compat
from jpyfunc._body import Batch, Body, Primal
from jpyfunc._closure import holds_array_elsewhere
from jpyfunc._errors import UnsupportedError, mark_crossing
from jpyfunc._profile import Run, annotated, kind_of, measure_body, open_profiles


def evaluate(body: Body, operands: Sequence[Any], device: _compat.Device) -> list[Any]:
    """Run a body on concrete operands.

    Args:
        body: what to run.
        operands: NumPy or JAX arrays, one per `body.in_avals`.
        device: where NumPy operands are put.

    Returns:
        One NumPy or JAX array per `body.out_avals`.
    """
    if open_profiles:
        execute = functools.partial(_evaluate, body, operands, device)
        return measure_body(body, operands, execute)
    return _evaluate(body, operands, device, annotated)


def _evaluate(
    body: Body, operands: Sequence[Any], device: _compat.Device, run: Run
) -> list[Any]:
    if isinstance(body, Batch):
        return _evaluate_batch(body, operands, device, run)
    if not body.primal.numpy:
        operands = [
            x if isinstance(x, jax.Array) else _compat.put(x, aval, device)
            for x, aval in zip(operands, body.in_avals, strict=True)
        ]
    name = body.primal.name
    if not isinstance(body, Primal):
        name = f"{name} ({kind_of(body)})"
    return run(name, body, operands)


def _evaluate_batch(
    batch: Batch, operands: Sequence[Any], device: _compat.Device, run: Run
) -> list[np.ndarray]:
    # Slices and stacks are made in NumPy, at a tenth of the cost of JAX operations.
    columns = [
        _elements(operand) if stacked else _shared(batch, i, operand, device)
        for i, (operand, stacked) in enumerate(zip(operands, batch.stacked_in, strict=True))
    ]
    out_avals = batch.out_avals
    results = [
        np.zeros(aval.shape, _accumulator(aval, stacked))
        for aval, stacked in zip(out_avals, batch.stacked_out, strict=True)
    ]
    for i in range(batch.size):
        element = _evaluate(batch.base, [column(i) for column in columns], device, run)
        for result, value, stacked in zip(results, element, batch.stacked_out, strict=True):
            if stacked:
                result[i] = np.asarray(value)
            else:
                result += np.asarray(value).astype(result.dtype)
    return [
        result.astype(aval.dtype, copy=False)
        for result, aval in zip(results, out_avals, strict=True)
    ]


def _elements(operand: Any) -> Callable[[int], np.ndarray]:
    array = np.asarray(operand)
    # A 0-d slice must stay an array: an index gives a NumPy scalar.
    return lambda i: array[i, ...]


def _shared(
    batch: Batch, index: int, operand: Any, device: _compat.Device
) -> Callable[[int], Any]:
    """An operand of every element, put on the device once unless it is sliced again."""
    if isinstance(operand, np.ndarray) and not (
        isinstance(batch.base, Batch) or batch.primal.numpy
    ):
        operand = _compat.put(operand, batch.base.in_avals[index], device)
    return lambda _: operand


def _accumulator(aval: ShapedArray, stacked: bool) -> Any:
    """The dtype to sum in: half precision loses terms of long sums, as XLA knows."""
    if not stacked and jnp.issubdtype(aval.dtype, jnp.floating) and aval.dtype.itemsize < 4:
        return np.float32
    return aval.dtype


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
        self._on_device = holds_array_elsewhere(body.primal.held, device)

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
                with set_current_trace(_compat.OnDevice(device)):
                    results = _evaluate(self._body, operands, device, run)
            else:
                results = _evaluate(self._body, operands, device, run)
            return tuple(np.asarray(result) for result in results)
        except BaseException as error:
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
