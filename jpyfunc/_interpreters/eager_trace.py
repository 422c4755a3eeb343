"""Base of the traces that run a body on values: operations are executed at once.

An operation is compiled when it is first met, and found again by its primitive, parameters
and avals. The traces differ in what becomes of its operands and results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.core import Trace
from jax.extend.core import ClosedJaxpr, Primitive, set_current_trace
from jax.extend.core.primitives import cond_p, convert_element_type_p, jit_p

from jpyfunc import _compat
from jpyfunc._interpreters.base_trace import BodyTrace
from jpyfunc._interpreters.host_primitive import HostPrimitive
from jpyfunc._interpreters.on_device import OnDeviceTrace
from jpyfunc._interpreters.operation_cache import (
    Uncacheable,
    bind_function,
    operation_of,
    operation_of_jit,
)
from jpyfunc._interpreters.operations import Operation, UncachedOperation, aval_of
from jpyfunc._runtime.configuration import Config, current_config
from jpyfunc._types import Array, Value

_config_numbers: dict[Config, int] = {}  # for the keys of operations; there are few


class EagerTrace(BodyTrace):
    """Execute operations at once.

    Attributes:
        parent: the trace below.
        move: moves an array to the device of an `OnDeviceTrace` below; None without one.
    """

    def __init__(self, parent: Trace) -> None:
        super().__init__()
        self.parent = parent
        self.move = parent.move if isinstance(parent, OnDeviceTrace) else None
        config = current_config()
        self._config: Config | None = config
        self._config_number = _config_numbers.setdefault(config, len(_config_numbers))

    def apply(self, operation: Operation, operands: Sequence[Value]) -> list[Array]:
        """Execute an operation."""
        raise NotImplementedError

    def apply_uncacheable(
        self, operation: UncachedOperation, operands: Sequence[Value]
    ) -> list[Array]:
        """Execute a bind that may do something else in every call."""
        return self.apply(operation, operands)

    def apply_function(
        self, call: Callable[..., list[Array]], operands: Sequence[Value]
    ) -> list[Array]:
        return self.apply(UncachedOperation(call), operands)

    def process_primitive(
        self, primitive: Primitive, tracers: Sequence[Any], params: dict[str, Any], /
    ) -> Any:
        if primitive is jit_p:
            return self._call_jitted(params["jaxpr"], tracers)
        if primitive is cond_p:
            # The branch that is taken, of which elements of a batch may take several.
            taken = params["branches"][int(tracers[0])]
            return self._call_jitted(taken, tracers[1:])
        if isinstance(primitive, HostPrimitive):
            with set_current_trace(self):
                return primitive.evaluate(tracers, params)
        if primitive is convert_element_type_p and _is_identity(*tracers, **params):
            return tracers[0]
        try:
            self._check_config()
            operation = operation_of(primitive, tracers, params, self._config_number)
        except Uncacheable:
            bind = bind_function(primitive, params)
            results = self.apply_uncacheable(UncachedOperation(bind), tracers)
        else:
            results = self.apply(operation, tracers)
        return results if primitive.multiple_results else results[0]

    def _call_jitted(self, jaxpr: ClosedJaxpr, operands: Sequence[Value]) -> list[Array]:
        try:
            self._check_config()
            operation = operation_of_jit(jaxpr, self._config_number)
        except Uncacheable:
            operation = None
        if operation is None:
            # What runs Python or has an effect happens once, in whatever order of
            # derivative, so its equations are executed one by one.
            with set_current_trace(self):
                return _compat.opened(jaxpr)(*jaxpr.consts, *operands)
        return self.apply(operation, [*jaxpr.consts, *operands])

    def _check_config(self) -> None:
        """Raise `Uncacheable` once the body has changed JAX's configuration.

        For the rest of the run, even if it changes it back: arrays may have dtypes by then
        that are not enabled.
        """
        if current_config() != self._config:
            self._config = None
        if self._config is None:
            raise Uncacheable


def _is_identity(
    x: Any, new_dtype: Any, weak_type: bool = False, sharding: Any = None, **_: object
) -> bool:
    """Whether a conversion changes nothing; JAX binds it for any operand with a value."""
    aval = aval_of(x)
    return aval.dtype == new_dtype and aval.weak_type == weak_type and sharding is None


def runs_now() -> bool:
    """Whether operations on this thread are executed when they are bound."""
    return isinstance(_compat.current_trace(), EagerTrace | _compat.EvalTrace)


def ground() -> Trace:
    """The trace below those that run a body, in which nothing is traced."""
    trace = _compat.current_trace()
    while isinstance(trace, EagerTrace):
        trace = trace.parent
    return trace


def execute(trace: Trace, operation: Operation, operands: Sequence[Value]) -> list[Array]:
    """Execute an operation under `trace`: compiled, unless it is a transform of JAX's."""
    if isinstance(trace, EagerTrace):
        return trace.apply(operation, operands)
    if isinstance(trace, _compat.EvalTrace):
        if _compat.is_eager():
            return operation.run(*operands)
        with set_current_trace(_compat.eval_trace):
            return operation.run(*operands)
    with set_current_trace(trace):
        return operation.call(*operands)
