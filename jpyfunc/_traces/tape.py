"""Runs a body on values and notes its operations.

A tape is a trace whose tracers carry values: each operation is run at once, compiled, and
noted if its results depend on what the tape watches. Tapes nest: the operations of a
derivative that is itself differentiated go to the next tape, which is how there are
derivatives of every order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Trace
from jax.extend.core import set_current_trace

from jpyfunc import _compat
from jpyfunc._errors import NotDifferentiableError
from jpyfunc._traces.cache import (
    Uncacheable,
    binding,
    operation_of,
    operation_of_custom,
    operation_of_jit,
)
from jpyfunc._traces.on_device import OnDevice
from jpyfunc._traces.operations import Linear, Loose, LooseLinear, Operation, aval_of
from jpyfunc._traces.taped import Taped

Indices = tuple[int, ...]

# Primitives that run Python, each with what is called in their place, under the tape,
# with operands and parameters: what Python does goes on the same tape.
CALLS: dict[Any, Callable[[Sequence[Any], dict[str, Any]], Any]] = {}

_contexts: dict[tuple[Any, ...], int] = {}  # settings are few


def runs_now() -> bool:
    """Whether operations run at once on this thread: nothing but tapes is tracing."""
    return isinstance(_compat.current_trace(), Tape | _compat.EvalTrace)


def is_tape(trace: Any) -> bool:
    """Whether `trace` is a tape."""
    return type(trace) is Tape


class Note:
    """One operation of a run, with what its derivatives need."""

    __slots__ = ("active", "first", "inputs", "linear", "operation", "residuals", "values")

    def __init__(
        self,
        operation: Operation | Loose,
        linear: Linear | LooseLinear,
        active: Indices,
        inputs: list[int],
        values: list[Any],
        residuals: list[Any],
        first: int,
    ) -> None:
        self.operation = operation
        self.linear = linear
        self.active = active  # the operands that have a slot,
        self.inputs = inputs  # and which
        self.values = values  # of all operands
        self.residuals = residuals
        self.first = first  # slot of the first of the results `linear.of`


class Tape(Trace):
    """Runs operations at once, and notes those that depend on what it watches.

    Attributes:
        label: what errors call the function that is run.
        is_open: whether the function is still running; afterwards, no operation takes
            what was watched.
        reads: where values were read that gradients flow through.
        notes: the operations.
        slots: how many values there are that depend on what is watched.
    """

    def __init__(self, label: str) -> None:
        super().__init__()
        _compat.share_state(self)
        self.label = label
        self.parent = _compat.current_trace()
        # What an array is put through before an operation takes it.
        self._move = self.parent.move if isinstance(self.parent, OnDevice) else None
        self.is_open = True
        self.reads: list[str] = []
        self.notes: list[Note] = []
        self.slots = 0
        settings = _compat.current_settings()
        self._settings: tuple[Any, ...] | None = settings
        self._context = _contexts.setdefault(settings, len(_contexts))

    def watch(self, values: Sequence[Any], wrt: Indices) -> list[Any]:
        """`values`, those at `wrt` such that what depends on them is noted."""
        watched = list(values)
        for i in wrt:
            watched[i] = self._new(watched[i])
        return watched

    def close(self) -> None:
        """End the run: values that outlive it no longer lead to what was noted."""
        self.notes, self.is_open = [], False
        if is_tape(self.parent):
            self.parent.reads.extend(self.reads)

    def _new(self, value: Any) -> Taped:
        self.slots += 1
        return Taped(self, value, self.slots - 1)

    def owns(self, value: Any) -> bool:
        return type(value) is Taped and value._trace is self

    def _active(self, operands: Sequence[Any]) -> Indices:
        return tuple([i for i, x in enumerate(operands) if self.owns(x)])

    def _value(self, operand: Any) -> Any:
        """An operand as this tape's parent takes it."""
        if type(operand) is not Taped:
            return operand
        if operand._trace is self:
            return operand.value
        self._check_open(operand)
        return operand

    def _check_open(self, operand: Taped) -> None:
        tape = operand._trace
        if not tape.is_open:
            raise NotDifferentiableError(
                f"{self.label} uses an array that {tape.label} kept from a run that is "
                "over, as an attribute, a global variable or one of a function that JAX "
                "traced then. Keep jax.lax.stop_gradient(x), or pass it as an argument."
            )

    def apply(self, operation: Operation | Loose, operands: Sequence[Any]) -> list[Any]:
        """Run an operation, and note it if it is to be differentiated."""
        # One loop, because this is on the way of every operation.
        values, active, inputs = [], [], []
        for i, x in enumerate(operands):
            if type(x) is Taped:
                if x._trace is self:
                    active.append(i)
                    inputs.append(x.slot)
                    x = x.value
                else:
                    self._check_open(x)
            elif not isinstance(x, jax.Array) and getattr(x, "ndim", 0):
                x = np.array(x)  # a copy, because its owner may write to it
            values.append(x)
        if self._move is not None:
            values = [self._move(x) for x in values]
        if not active:
            return run(self.parent, operation, values)
        active = tuple(active)
        if isinstance(operation, Operation) and operation.is_wide:
            operation = Loose(operation.call)
        if isinstance(operation, Loose):
            with set_current_trace(self.parent):
                results, linear = operation.linearized(values, active)
        else:
            linear = operation.linear(active)
            if not linear.of:
                return run(self.parent, operation, values)
            results = run(self.parent, linear.forward, values)
        residuals = linear.residuals(values, results)
        results = results[: linear.size]
        first = self.slots
        self.notes.append(Note(operation, linear, active, inputs, values, residuals, first))
        for i in linear.of:
            results[i] = self._new(results[i])
        return results

    def stage_value(self, val: Any) -> Any:
        return val if isinstance(val, jax.Array) else _compat.eval_trace.stage_value(val)

    def process_primitive(self, primitive: Any, tracers: Any, params: Any, /) -> Any:
        if primitive is _compat.jit_p:
            return self._call_jitted(params["jaxpr"], tracers)
        if primitive in CALLS:
            with set_current_trace(self):
                return CALLS[primitive](tracers, params)
        if primitive is _compat.stop_gradient_p:
            return self._bind(primitive, tracers, params)
        if primitive is jax.lax.convert_element_type_p and _is_identity(*tracers, **params):
            return tracers[0]
        try:
            self._check_settings()
            operation = operation_of(primitive, tracers, params, self._context)
        except Uncacheable:
            operation = Loose(binding(primitive, params))
        results = self.apply(operation, tracers)
        return results if primitive.multiple_results else results[0]

    def _bind(self, primitive: Any, operands: Sequence[Any], params: Any) -> Any:
        """Bind `primitive` below this tape, which differentiates nothing of it."""
        with set_current_trace(self.parent):
            return primitive.bind(*map(self._value, operands), **params)

    def _call_jitted(self, jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
        try:
            self._check_settings()
            operation = operation_of_jit(jaxpr, self._context, _is_opaque)
        except Uncacheable:
            operation = None
        if operation is None:
            # What runs Python or has an effect happens once, in whatever order of
            # derivative, so what surrounds it is taken apart.
            with set_current_trace(self):
                return _compat.opened(jaxpr)(*jaxpr.consts, *operands)
        return self.apply(operation, [*jaxpr.consts, *operands])

    def process_custom_jvp_call(
        self, primitive: Any, fun: Any, jvp: Any, tracers: Any, /, **params: Any
    ) -> Any:
        return self._call_custom(primitive, (fun, jvp), tracers, params)

    def process_custom_vjp_call(
        self, primitive: Any, fun: Any, fwd: Any, bwd: Any, tracers: Any, /, **params: Any
    ) -> Any:
        return self._call_custom(primitive, (fun, fwd, bwd), tracers, params)

    def _call_custom(
        self, primitive: Any, functions: Any, operands: Sequence[Any], params: Any
    ) -> list[Any]:
        if not self._active(operands):
            return self._bind(primitive, operands, {"subfuns": functions, **params})
        try:
            self._check_settings()
            operation = operation_of_custom(
                primitive, functions, operands, params, self._context
            )
        except Uncacheable:
            bound = {"subfuns": functions, **params}
            return self.apply(Loose(lambda *xs: primitive.bind(*xs, **bound)), operands)
        results = self.apply(operation, operands)
        for rule in functions[1:]:
            operation.stores.extend(_compat.taken(rule))
        return results

    def process_shard_map(
        self, primitive: Any, fun: Any, tracers: Any, /, **params: Any
    ) -> Any:
        structure: list[Any] = []

        def call(*operands: Any) -> list[Any]:
            results = primitive.bind(*operands, subfuns=(fun,), **params)
            structure[:] = [results]
            return [*results]

        results = self.apply(Loose(call), tracers)
        return structure[0].update(results)  # a flat tree of JAX

    def _check_settings(self) -> None:
        """Raise `Uncacheable` once the body has changed the settings."""
        if _compat.current_settings() != self._settings:
            self._settings = None  # and of what it leaves, dtypes that are off again
        if self._settings is None:
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
        or (eqn.primitive is _compat.jit_p and _is_opaque(eqn.params["jaxpr"]))
        for eqn in jaxpr.eqns
    )


def run(trace: Any, operation: Operation | Loose, operands: Sequence[Any]) -> list[Any]:
    """Run an operation under `trace`: compiled, where nothing else looks on."""
    if type(trace) is Tape:
        return trace.apply(operation, operands)
    if isinstance(trace, _compat.EvalTrace):
        if _compat.is_eager():
            return operation.run(*operands)
        with set_current_trace(_compat.eval_trace):
            return operation.run(*operands)
    with set_current_trace(trace):
        return operation.call(*operands)
