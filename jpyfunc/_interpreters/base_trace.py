"""Base of the traces that run a body: what JAX asks of each of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Trace
from jax.extend.core import Primitive, set_current_trace

from jpyfunc import _compat
from jpyfunc._types import Array, PyTreeDef, Value


class BodyTrace(_compat.KeyedTrace):
    """A trace under which a body runs.

    All traces of one class share a key in the caches of `jax.jit`, which contain a weak
    reference to the current trace. A body runs under a new trace each time; with a key
    of its own for each, every jitted function that the body calls would be traced again in
    every run, and its entries pile up in one bucket that is searched linearly.

    `jax.extend.core.get_opaque_trace_state` compares the same reference. Libraries that
    forbid changing in one trace what was made in another (flax, haiku) build on it. So it
    alone gets a reference to the trace itself or, in a class with `_is_transparent`, whose
    values are ordinary arrays, what it gets where nothing is traced.
    """

    _is_transparent = False

    def __init_subclass__(cls) -> None:
        cls._stand_in = Trace()  # JAX holds the key weakly
        cls.shared_key = weakref.ref(cls._stand_in)

    @property
    def state_key(self) -> Any:
        return _compat.EVAL_TRACE_KEY if self._is_transparent else self.own_key

    def stage_value(self, val: object) -> Any:
        return val if isinstance(val, jax.Array) else _compat.eval_trace.stage_value(val)

    def process_custom_jvp_call(
        self,
        primitive: Primitive,
        fun: Any,
        jvp: Callable[..., object],
        tracers: Sequence[Value],
        /,
        **params: object,
    ) -> Any:
        return self.call_custom(primitive, (fun, jvp), tracers, params)

    def process_custom_vjp_call(
        self,
        primitive: Primitive,
        fun: Any,
        fwd: Callable[..., object],
        bwd: Callable[..., object],
        tracers: Sequence[Value],
        /,
        **params: object,
    ) -> Any:
        return self.call_custom(primitive, (fun, fwd, bwd), tracers, params)

    def call_custom(
        self,
        primitive: Primitive,
        functions: Sequence[Any],
        operands: Sequence[Value],
        params: dict[str, object],
    ) -> Sequence[Array]:
        """Call a function that has a custom derivative rule; here, without its rule.

        Args:
            primitive: that of `jax.custom_jvp` or `jax.custom_vjp`.
            functions: the function, then its rules, as JAX wraps them.
            operands: flat.
            params: the other parameters of the bind.
        """
        with set_current_trace(self):
            return functions[0].call_wrapped(*operands)

    def process_shard_map(
        self,
        primitive: Primitive,
        fun: Any,
        tracers: Sequence[Value],
        /,
        **params: object,
    ) -> Any:
        # JAX expects the results in a flat tree of its own, which also knows their
        # structure. So the tree of the call is kept, and its leaves replaced.
        trees: list[PyTreeDef] = []

        def call(*operands: Value) -> list[Array]:
            trees[:] = [primitive.bind(*operands, subfuns=(fun,), **params)]
            return [*trees[0]]

        results = self.apply_function(call, tracers)
        return trees[0].update(results)

    def apply_function(
        self, call: Callable[..., list[Array]], operands: Sequence[Value]
    ) -> Sequence[Array]:
        """Run a function of JAX, from operands to a list of results, as one operation."""
        raise NotImplementedError
