"""Fences: arrays that are ready once all that a thread has dispatched before is done.

JAX does not tell which programs a thread has dispatched, nor when they are done, other than
by the arrays that they return, which the user may have dropped. But the programs that one
thread dispatches to one device run in the order in which it dispatches them, and so do
those over one set of devices. So a trivial program of our own, dispatched now, ends after
all of them: its result is a fence. There is one for each set of devices that programs with
bodies run over, and one for each device in it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import set_current_trace
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpyfunc import _compat
from jpyfunc._runtime.clients import is_private
from jpyfunc._runtime.running_bodies import is_in_body

Fence = Any  # a `jax.Array`, whose `is_ready` type checkers do not know

# The sets of devices of this process that programs with bodies run over.
_device_sets: set[tuple[_compat.Device, ...]] = set()


def add_fences(devices: Sequence[_compat.Device]) -> None:
    """Add fences for the devices of this process that a program runs over."""
    if devices and not is_private(devices[0]):
        _device_sets.add(tuple(devices))
        _device_sets.update((device,) for device in devices)


def fences() -> list[Fence]:
    """Fences behind all that this thread has dispatched; in a body, none."""
    if is_in_body():
        return []
    return [_fence(devices) for devices in _device_sets.copy()]


def fenced_clients() -> list[_compat.Client]:
    """The clients of all devices that have fences."""
    return list({devices[0].client for devices in _device_sets})


def _fence(devices: tuple[_compat.Device, ...]) -> Fence:
    with contextlib.ExitStack() as stack:
        for refusal in _REFUSALS:
            if refusal.value:  # the user means their own programs
                stack.enter_context(refusal(False))
        program, operand = _compiled_fence(devices)
        return program(operand)


_REFUSALS = tuple(
    _compat.config_states[name]
    for name in ("jax_disable_jit", "jax_no_tracing", "jax_no_execution")
)


@functools.cache
def _compiled_fence(devices: tuple[_compat.Device, ...]) -> tuple[Any, jax.Array]:
    # Compiled ahead, so that no trace which is current where it is called sees it.
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
