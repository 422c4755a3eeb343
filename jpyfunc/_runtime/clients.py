"""Private CPU clients, one for each level of bodies in programs in bodies.

A callback holds a thread of the client that its program runs on, for as long as its body
runs. A body that runs operations on that same client needs another thread of it, while
callbacks of other programs hold the others, and wait for threads, too: nobody goes on
(jax-ml/jax#24255, #25861; it is how bodies of `jax.pure_callback` deadlock). So what a
body waits for must not need a thread of the client that the body is called from:

    the program's client      runs the user's programs; their bodies run on
    private client 0          which also runs programs that bodies call; their bodies on
    private client 1          and so on

Each client waits only for the next one, and the last one for none, so there is no cycle.
The chain is as long as bodies are nested in programs in bodies, which is one or two.

The clients are synchronous: an operation runs on the thread that dispatches it, which
saves a change of thread for each. JAX has no public way to make a second client. Where a
version has none at all, bodies share JAX's client, and may deadlock.
"""

from __future__ import annotations

import functools
import threading
import warnings

import jax
from jax.interpreters import mlir

from jpyfunc import _compat

_clients: list[_compat.Client] = []
_lock = threading.Lock()


def body_device(ctx: mlir.LoweringRuleContext) -> _compat.Device:
    """The device on which the bodies of the program that is being lowered run."""
    if _compat.make_cpu_client is None:
        _warn_of_shared_client()
        return jax.local_devices(backend="cpu")[0]
    program_client = ctx.module_context.get_backend(optional=True)
    with _lock:
        level = 0
        if program_client in _clients:
            level = _clients.index(program_client) + 1
        if level == len(_clients):
            _clients.append(_compat.make_cpu_client(asynchronous=False))
        return _clients[level].local_devices()[0]


@functools.cache
def _warn_of_shared_client() -> None:
    warnings.warn(
        f"jax {jax.__version__} has no make_cpu_client, so the bodies of compiled programs "
        "run their operations on the CPU client that the programs run on. They may then "
        "deadlock, as those of jax.pure_callback do (jax-ml/jax#24255). Use a version of "
        "jax that this version of jpyfunc supports.",
        RuntimeWarning,
        stacklevel=2,
    )


def is_private(device: _compat.Device) -> bool:
    """Test whether a device is reserved for bodies."""
    return device.client in _clients


def default_device() -> _compat.Device:
    """Return the device where JAX puts an uncommitted array on this thread."""
    device = _compat.default_device.value
    if device is None or isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return device
