"""A body whose arrays are all on one device, wherever they came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray, eval_jaxpr
from jax.extend.core import ClosedJaxpr, Primitive, set_current_trace
from jax.extend.core.primitives import jit_p

from jpyfunc import _compat
from jpyfunc._interpreters.base_trace import BodyTrace
from jpyfunc._runtime.transfers import put
from jpyfunc._types import Value


class OnDeviceTrace(_compat.EvalTrace, BodyTrace):
    """Run each operation when it is bound, on one device, wherever its operands are.

    A body may hold arrays on other devices, as global variables for example. JAX would let
    the client of such a device copy an operand, or run the operation there if the operand
    is committed. In a host call, that client may be the one whose program waits for the
    call, so that both would wait forever. Arrays are moved through NumPy instead.
    """

    _is_transparent = True

    def __init__(self, device: _compat.Device) -> None:
        super().__init__()
        self._device = device

    def process_primitive(
        self, primitive: Primitive, args: Sequence[Value], params: dict[str, Any], /
    ) -> Any:
        with set_current_trace(_compat.eval_trace):
            args = [self.move(x) for x in args]
            if primitive is not jit_p:
                return primitive.bind(*args, **params)
            # The arrays that a jitted function closes over are no operands of its bind.
            jaxpr = params["jaxpr"]
            return _jitted(jaxpr)([self.move(x) for x in jaxpr.consts], *args)

    def move(self, x: Any) -> Any:
        """Return `x`, on the device if it is an array."""
        if not isinstance(x, jax.Array) or x.sharding.device_set == {self._device}:
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            dtype = cast(Any, x.dtype)
            with set_current_trace(_compat.eval_trace):
                data = self.move(jax.random.key_data(x))
                return jax.random.wrap_key_data(data, dtype=dtype)
        aval = ShapedArray(x.shape, x.dtype, x.aval.weak_type)
        return put(np.asarray(x), aval, self._device)


@_compat.weakref_lru_cache
def _jitted(jaxpr: ClosedJaxpr) -> Callable[..., list[jax.Array]]:
    return jax.jit(lambda consts, *args: eval_jaxpr(jaxpr.jaxpr, consts, *args))
