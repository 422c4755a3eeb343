"""Runs a body on values and notes its operations.

A tape is a trace whose tracers carry values: each operation is run at once, compiled, and
noted if its results depend on what the tape watches. Tapes nest: the operations of a
derivative that is itself differentiated go to the next tape, which is how there are
derivatives of every order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import set_current_trace
from jax.extend.core.primitives import stop_gradient_p

from jpyfunc import _compat
from jpyfunc._errors import NotDifferentiableError
from jpyfunc._interpreters.eager import HAVE_RULES, EagerTrace, run
from jpyfunc._interpreters.operation_cache import Uncacheable, binding, operation_of_custom
from jpyfunc._interpreters.operations import (
    CompiledOperation,
    Linearization,
    UncachedLinearization,
    UncachedOperation,
)
from jpyfunc._interpreters.tape_tracer import TapeTracer

Indices = tuple[int, ...]


def is_tape_trace(trace: Any) -> bool:
    """Whether `trace` is a tape."""
    return type(trace) is TapeTrace


class TapeEntry:
    """One operation of a run, with what its derivatives need."""

    __slots__ = ("active", "first", "inputs", "linear", "operation", "residuals", "values")

    def __init__(
        self,
        operation: CompiledOperation | UncachedOperation,
        linear: Linearization | UncachedLinearization,
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


class TapeTrace(EagerTrace):
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
        super().__init__(_compat.current_trace())
        self.label = label
        self.is_open = True
        self.reads: list[str] = []
        self.notes: list[TapeEntry] = []
        self.slots = 0

    def watch(self, values: Sequence[Any], wrt: Indices) -> list[Any]:
        """`values`, those at `wrt` such that what depends on them is noted."""
        watched = list(values)
        for i in wrt:
            watched[i] = self._new(watched[i])
        return watched

    def close(self) -> None:
        """End the run: values that outlive it no longer lead to what was noted."""
        self.notes, self.is_open = [], False
        if is_tape_trace(self.parent):
            self.parent.reads.extend(self.reads)

    def _new(self, value: Any) -> TapeTracer:
        self.slots += 1
        return TapeTracer(self, value, self.slots - 1)

    def owns(self, value: Any) -> bool:
        return type(value) is TapeTracer and value._trace is self

    def _active(self, operands: Sequence[Any]) -> Indices:
        return tuple([i for i, x in enumerate(operands) if self.owns(x)])

    def _value(self, operand: Any) -> Any:
        """An operand as this tape's parent takes it."""
        if type(operand) is not TapeTracer:
            return operand
        if operand._trace is self:
            return operand.value
        self._check_open(operand)
        return operand

    def _check_open(self, operand: TapeTracer) -> None:
        tape = operand._trace
        if not tape.is_open:
            raise NotDifferentiableError(
                f"{self.label} uses an array that {tape.label} kept from a run that is "
                "over, as an attribute, a global variable or one of a function that JAX "
                "traced then. Keep jax.lax.stop_gradient(x), or pass it as an argument."
            )

    def apply(
        self, operation: CompiledOperation | UncachedOperation, operands: Sequence[Any]
    ) -> list[Any]:
        """Run an operation, and note it if it is to be differentiated."""
        # One loop, because this is on the way of every operation.
        values, active, inputs = [], [], []
        for i, x in enumerate(operands):
            if type(x) is TapeTracer:
                if x._trace is self:
                    active.append(i)
                    inputs.append(x.slot)
                    x = x.value
                else:
                    self._check_open(x)
            elif isinstance(x, np.ndarray):
                x = (
                    x.copy()
                )  # its owner may write to it; JAX has a subclass, with a weak type
            values.append(x)
        if self.move is not None:
            values = [self.move(x) for x in values]
        if not active:
            return run(self.parent, operation, values)
        active = tuple(active)
        if isinstance(operation, CompiledOperation) and operation.is_wide:
            operation = UncachedOperation(operation.call)
        if isinstance(operation, UncachedOperation):
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
        self.notes.append(
            TapeEntry(operation, linear, active, inputs, values, residuals, first)
        )
        for i in linear.of:
            results[i] = self._new(results[i])
        return results

    def process_primitive(self, primitive: Any, tracers: Any, params: Any, /) -> Any:
        if primitive is stop_gradient_p:
            return self._bind(primitive, tracers, params)
        if (
            primitive in HAVE_RULES
            and HAVE_RULES[primitive](params)
            and self._active(tracers)
        ):
            return self.apply(UncachedOperation(binding(primitive, params)), tracers)
        return super().process_primitive(primitive, tracers, params)

    def _bind(self, primitive: Any, operands: Sequence[Any], params: Any) -> Any:
        """Bind `primitive` below this tape, which differentiates nothing of it."""
        with set_current_trace(self.parent):
            return primitive.bind(*map(self._value, operands), **params)

    def call_custom(
        self,
        primitive: Any,
        functions: Sequence[Any],
        operands: Sequence[Any],
        params: dict[str, Any],
    ) -> list[Any]:
        if not self._active(operands):
            return self._bind(primitive, operands, {"subfuns": functions, **params})
        try:
            self._check_config()
            operation = operation_of_custom(
                primitive, functions, operands, params, self._context
            )
        except Uncacheable:
            # A tape that is differentiated again calls it once more, on any thread.
            for function in functions:
                _compat.let_refill(function)
            bound = {"subfuns": functions, **params}
            return self.apply(
                UncachedOperation(lambda *xs: primitive.bind(*xs, **bound)), operands
            )
        results = self.apply(operation, operands)
        for rule in functions[1:]:
            operation.stores.extend(_compat.taken(rule))
        return results
