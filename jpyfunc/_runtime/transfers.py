"""Arrays from the host to a device: without copies, exempt from `jax.transfer_guard`."""

from __future__ import annotations

import contextlib
import functools
import operator
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray

from jpyfunc import _compat
from jpyfunc._limits import LARGE_ARRAY_BYTES

_GUARDS = tuple(
    _compat.config_states[f"jax_transfer_guard_{direction}"]
    for direction in ("host_to_device", "device_to_device", "device_to_host")
)
_TO_DEVICE = _GUARDS[0]
_UNGUARDED_VALUES = {None, "allow"}
_UNGUARDED = contextlib.nullcontext()
_value_of = operator.attrgetter("value")


def put(
    value: np.ndarray, aval: ShapedArray, device: _compat.Device, copy: bool = False
) -> jax.Array:
    """Make `value` an uncommitted array on `device`, sharing its memory where XLA can.

    `jax.device_put` commits to the device and drops the weak type, and `jnp.asarray` under
    `jax.default_device` takes ten times as long.

    Args:
        value: of the shape and dtype of `aval`.
        aval: of the result.
        device: where the result is.
        copy: whether the array must not share memory with `value`, to which somebody else
            may write.
    """
    value = (
        value.copy() if copy and value.nbytes < LARGE_ARRAY_BYTES else _aligned(value, copy)
    )
    arguments = (aval, _sharding_on(device), [value], [device], False)
    if _TO_DEVICE.value in _UNGUARDED_VALUES:
        return _compat.batched_device_put(*arguments)
    with jax.transfer_guard_host_to_device("allow"):
        return _compat.batched_device_put(*arguments)


def _aligned(value: np.ndarray, copy: bool) -> np.ndarray:
    """Align `value` if it is large, so that XLA takes it without a copy of its own.

    XLA copies an array that does not begin at a multiple of 64 bytes, as NumPy's usually do
    not, and a large one on another thread. NumPy copies 64 MB four times as fast as XLA,
    because it asks for huge pages.
    """
    if value.nbytes < LARGE_ARRAY_BYTES or (value.ctypes.data % 64 == 0 and not copy):
        return value
    buffer = np.empty(value.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    aligned = buffer[start : start + value.nbytes].view(value.dtype).reshape(value.shape)
    np.copyto(aligned, value)
    return aligned


@functools.cache
def _sharding_on(device: _compat.Device) -> jax.sharding.SingleDeviceSharding:
    return jax.sharding.SingleDeviceSharding(device)


def are_guarded() -> bool:
    """Whether `jax.transfer_guard` logs or forbids some transfer on this thread."""
    return not {*map(_value_of, _GUARDS)} <= _UNGUARDED_VALUES


def allowed_transfers() -> contextlib.AbstractContextManager[Any]:
    """Exempt what this library itself puts or reads from `jax.transfer_guard`."""
    return jax.transfer_guard("allow") if are_guarded() else _UNGUARDED
