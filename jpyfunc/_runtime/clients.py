"""Private CPU clients for the operations of bodies, one for each level of nesting.

While a body runs, its callback occupies a thread of the client that runs the program. If
the operations of the body ran on that client, they would need another one of its threads.
With several programs in flight, callbacks may occupy all of them while each waits for one:
a deadlock, which `jax.pure_callback` has (jax-ml/jax#24255, #25861). So what a body waits
for must never need a thread of the client that the body is called from:

    the program's client   runs the user's programs, whose bodies run operations on
    private client 0       which also runs programs that those bodies call, whose bodies use
    private client 1       and so on.

Each client waits only for the next one and the last one for none, so there is no cycle. The
chain is as long as programs and bodies are nested, which is rarely more than two.

The clients are synchronous: an operation runs on the thread that dispatches it, which saves
a change of thread for each. JAX has no public way to make a second client. With a version
that has none at all, bodies share the client of the programs, and may deadlock.
"""

from __future__ import annotations

import functools
import threading
import warnings

import jax
from jax.interpreters import mlir

from jpyfunc import _compat
from jpyfunc._errors import see

_clients: list[_compat.Client] = []
_lock = threading.Lock()


def body_device(ctx: mlir.LoweringRuleContext) -> _compat.Device:
    """Return the device for the operations of the bodies of the program being lowered."""
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
        "jax that this version of jpyfunc supports."
        + see("A version of JAX that is not supported"),
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
