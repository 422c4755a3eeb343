"""Runs a body with all its arrays on one device, wherever they came from."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray, eval_jaxpr
from jax.extend.core import set_current_trace
from jax.extend.core.primitives import jit_p

from jpyfunc import _compat
from jpyfunc._interpreters.base_trace import BodyTrace
from jpyfunc._runtime.transfers import put


class OnDevice(_compat.EvalTrace, BodyTrace):
    """Evaluates operations at once and on one device, wherever their operands are.

    An operand on another device, such as a global array, would be copied by the client
    of that device, and if committed take the operation there. In a host call that is
    the client of the program that waits for the call, and so may wait for it in turn.
    """

    _is_transparent = True

    def __init__(self, device: _compat.Device) -> None:
        super().__init__()
        self._device = device

    def process_primitive(self, primitive: Any, args: Any, params: Any, /) -> Any:
        with set_current_trace(_compat.eval_trace):
            args = [self.move(x) for x in args]
            if primitive is not jit_p:
                return primitive.bind(*args, **params)
            # The arrays that a jitted function closes over are no operands of its bind.
            jaxpr = params["jaxpr"]
            return _jitted(jaxpr)([self.move(x) for x in jaxpr.consts], *args)

    def move(self, x: Any) -> Any:
        """`x`, on the device if it is an array."""
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
def _jitted(jaxpr: Any) -> Any:
    return jax.jit(lambda consts, *args: eval_jaxpr(jaxpr.jaxpr, consts, *args))
