"""What the traces that run a body on values have in common: operations run at once.

Each operation is compiled when it is met first, and found again by what it is. What
becomes of its operands and results is what the traces differ in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import set_current_trace
from jax.extend.core.primitives import jit_p

from jpyfunc import _compat
from jpyfunc._interpreters.base_trace import BodyTrace
from jpyfunc._interpreters.on_device import OnDevice
from jpyfunc._interpreters.operation_cache import (
    Uncacheable,
    binding,
    operation_of,
    operation_of_jit,
)
from jpyfunc._interpreters.operations import CompiledOperation, UncachedOperation, aval_of
from jpyfunc._runtime.configuration import Config, current_config

# Primitives that run Python, each with what is called in their place, under the trace,
# with operands and parameters: what Python does goes to the same trace.
CALLS: dict[Any, Callable[[Sequence[Any], dict[str, Any]], Any]] = {}

# Of these, whether a call is differentiated by rules of its own, given its parameters.
HAVE_RULES: dict[Any, Callable[[dict[str, Any]], bool]] = {}

_contexts: dict[Config, int] = {}  # configurations are few


def runs_now() -> bool:
    """Whether operations run at once on this thread, for all that traces them."""
    return isinstance(_compat.current_trace(), EagerTrace | _compat.EvalTrace)


def ground() -> Any:
    """The trace below those that run a body, in which nothing is traced."""
    trace = _compat.current_trace()
    while isinstance(trace, EagerTrace):
        trace = trace.parent
    return trace


class EagerTrace(BodyTrace):
    """Runs operations at once.

    Attributes:
        parent: the trace below.
    """

    def __init__(self, parent: Any) -> None:
        super().__init__()
        self.parent = parent
        # What an array is put through before an operation takes it.
        self.move = parent.move if isinstance(parent, OnDevice) else None
        config = current_config()
        self._config: Config | None = config
        self._context = _contexts.setdefault(config, len(_contexts))

    def apply(
        self, operation: CompiledOperation | UncachedOperation, operands: Sequence[Any]
    ) -> list[Any]:
        """Run an operation."""
        raise NotImplementedError

    def apply_uncacheable(
        self, loose: UncachedOperation, operands: Sequence[Any]
    ) -> list[Any]:
        """Run a bind that may be another in every call."""
        return self.apply(loose, operands)

    def apply_function(
        self, call: Callable[..., list[Any]], operands: Sequence[Any]
    ) -> list[Any]:
        return self.apply(UncachedOperation(call), operands)

    def process_primitive(self, primitive: Any, tracers: Any, params: Any, /) -> Any:
        if primitive is jit_p:
            return self._call_jitted(params["jaxpr"], tracers)
        if primitive is jax.lax.cond_p:
            # The branch that is taken, of which elements of a batch may take several.
            taken = params["branches"][int(tracers[0])]
            return self._call_jitted(taken, tracers[1:])
        if primitive in CALLS:
            with set_current_trace(self):
                return CALLS[primitive](tracers, params)
        if primitive is jax.lax.convert_element_type_p and _is_identity(*tracers, **params):
            return tracers[0]
        try:
            self._check_config()
            operation = operation_of(primitive, tracers, params, self._context)
        except Uncacheable:
            results = self.apply_uncacheable(
                UncachedOperation(binding(primitive, params)), tracers
            )
        else:
            results = self.apply(operation, tracers)
        return results if primitive.multiple_results else results[0]

    def _call_jitted(self, jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
        try:
            self._check_config()
            operation = operation_of_jit(jaxpr, self._context, _is_opaque)
        except Uncacheable:
            operation = None
        if operation is None:
            # What runs Python or has an effect happens once, in whatever order of
            # derivative, so what surrounds it is taken apart.
            with set_current_trace(self):
                return _compat.opened(jaxpr)(*jaxpr.consts, *operands)
        return self.apply(operation, [*jaxpr.consts, *operands])

    def _check_config(self) -> None:
        """Raise `Uncacheable` once the body has changed the JAX configuration."""
        if current_config() != self._config:
            self._config = None  # and of what it leaves, dtypes that are off again
        if self._config is None:
            raise Uncacheable


def _is_identity(
    x: Any, new_dtype: Any, weak_type: bool = False, sharding: Any = None, **_: Any
) -> bool:
    """Whether a conversion, which JAX binds for what has a value, changes nothing."""
    aval = aval_of(x)
    return aval.dtype == new_dtype and aval.weak_type == weak_type and sharding is None


@_compat.weakref_lru_cache
def _is_opaque(jaxpr: Any) -> bool:
    """Whether a jitted function calls Python at once, or has an effect."""
    return bool(jaxpr.effects) or any(
        eqn.primitive in CALLS
        or (eqn.primitive is jit_p and _is_opaque(eqn.params["jaxpr"]))
        for eqn in jaxpr.eqns
    )


def run(
    trace: Any, operation: CompiledOperation | UncachedOperation, operands: Sequence[Any]
) -> list[Any]:
    """Run an operation under `trace`: compiled, where nothing else looks on."""
    if isinstance(trace, EagerTrace):
        return trace.apply(operation, operands)
    if isinstance(trace, _compat.EvalTrace):
        if _compat.is_eager():
            return operation.run(*operands)
        with set_current_trace(_compat.eval_trace):
            return operation.run(*operands)
    with set_current_trace(trace):
        return operation.call(*operands)
