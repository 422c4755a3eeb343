"""A tape: the operations of a run, recorded, and derivatives of it of any kind and order.

A tape is recorded by a trace whose tracers carry values: it executes each operation at
once, compiled, and adds an entry if the results depend on what it watches. Forward mode
goes through the entries in order, reverse mode backwards. What they execute for each entry
(see `linearization`) are operations too, which go to the current trace. If that is the
trace of another tape, it records them, and they can be differentiated in turn. So tapes
nest, and there are derivatives of every order.

A second derivative may also be asked for after the run, from outside. Its operands are on a
new tape then, while the values in the entries are plain arrays, on which no gradient
depends. So the run is replayed on the new tape, entry by entry: each operation is applied
to operands that depend on what the new tape watches, and for the rest to the recorded
arrays. Python does not run again: what it printed, drew or decided stays as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

import numpy as np
from jax.extend.core import Primitive, set_current_trace
from jax.extend.core.primitives import stop_gradient_p

from jpyfunc import _compat
from jpyfunc._errors import NotDifferentiableError, UnsupportedError, see
from jpyfunc._interpreters import rule_stores
from jpyfunc._interpreters.batch_tracer import is_batch_tracer
from jpyfunc._interpreters.eager_trace import EagerTrace, execute
from jpyfunc._interpreters.host_primitive import HostPrimitive
from jpyfunc._interpreters.linearization import linearize, linearize_at
from jpyfunc._interpreters.operation_cache import (
    Uncacheable,
    bind_function,
    operation_of_custom,
)
from jpyfunc._interpreters.operations import Operation, UncachedOperation
from jpyfunc._interpreters.reverse_sweep import compiled_sweep
from jpyfunc._interpreters.tape_entry import TapeEntry
from jpyfunc._interpreters.tape_tracer import REMEDIES, TapeTracer, is_tape_tracer
from jpyfunc._runtime.context import running_batch
from jpyfunc._types import Array, Indices, Value


def run_on_tape(
    function: Callable[[list[Array]], Sequence[Array]],
    operands: Sequence[Array],
    wrt: Indices,
    label: str,
) -> Tape:
    """Run a function on a tape.

    Args:
        function: from operands to results.
        operands: arrays.
        wrt: the operands with respect to which the tape can be differentiated.
        label: what errors call the function.
    """
    trace = TapeTrace(label)
    try:
        with set_current_trace(trace):
            results = function(trace.watch(operands, wrt))
        return Tape(trace, wrt, operands, results)
    finally:
        trace.close()


class TapeTrace(EagerTrace):
    """Execute operations at once, and record those that depend on what it watches.

    Attributes:
        label: what errors call the function that is run.
        is_open: whether the function is still running; afterwards, no operation takes
            what was watched.
        reads: where values were read that gradients flow through.
        entries: the operations.
        slots: how many values there are that depend on what is watched.
    """

    def __init__(self, label: str) -> None:
        super().__init__(_compat.current_trace())
        self.label = label
        self.is_open = True
        self.reads: list[str] = []
        self.entries: list[TapeEntry] = []
        self.slots = 0

    def watch(self, values: Sequence[Array], wrt: Indices) -> list[Array]:
        """Return `values`, those at `wrt` such that what depends on them is recorded."""
        watched = list(values)
        for i in wrt:
            watched[i] = self._new(watched[i])
        return watched

    def close(self) -> None:
        """End the run: values that outlive it no longer lead to its entries."""
        self.entries, self.is_open = [], False
        if isinstance(self.parent, TapeTrace):
            self.parent.reads.extend(self.reads)

    def _new(self, value: Array) -> TapeTracer:
        self.slots += 1
        return TapeTracer(self, value, self.slots - 1)

    def owns(self, value: object) -> TypeGuard[TapeTracer]:
        """Whether `value` depends on what this trace watches."""
        return type(value) is TapeTracer and value.body_trace is self

    def _value(self, operand: Value) -> Value:
        """An operand as this trace's parent takes it."""
        if type(operand) is not TapeTracer:
            return operand
        if operand.body_trace is self:
            return operand.value
        self._check_open(operand)
        return operand

    def _check_open(self, operand: TapeTracer) -> None:
        trace = operand.body_trace
        if not trace.is_open:
            raise NotDifferentiableError(
                f"{self.label} uses an array that {trace.label} kept from a run that is "
                "over, as an attribute, a global variable or one of a function that JAX "
                "traced then. Keep jax.lax.stop_gradient(x), or pass it as an argument."
                + see("An array kept from an earlier run")
            )

    def apply(self, operation: Operation, operands: Sequence[Value]) -> list[Array]:
        """Execute an operation, and record it if it is to be differentiated."""
        # One loop, because every operation comes here.
        values, active, inputs = [], [], []
        for i, x in enumerate(operands):
            if type(x) is TapeTracer:
                if x.body_trace is self:
                    active.append(i)
                    inputs.append(x.slot)
                    x = x.value
                else:
                    self._check_open(x)
            elif isinstance(x, np.ndarray):
                # Its owner may write to it. A copy of JAX's subclass keeps its weak type.
                x = x.copy()
            values.append(x)
        if self.move is not None:
            values = [self.move(x) for x in values]
        if not active:
            return execute(self.parent, operation, values)
        active = tuple(active)
        if operation.needs_x64:
            operation = UncachedOperation(operation.call)
        if isinstance(operation, UncachedOperation):
            with set_current_trace(self.parent):
                outputs, linear = linearize_at(operation, values, active)
        else:
            linear = linearize(operation, active)
            if not linear.of:
                return execute(self.parent, operation, values)
            outputs = execute(self.parent, linear.forward, values)
        residuals = linear.residuals(values, outputs)
        results = outputs[: linear.size]
        self.entries.append(TapeEntry(linear, inputs, self.slots, values, residuals))
        for i in linear.of:
            results[i] = self._new(results[i])
        return results

    def process_primitive(
        self, primitive: Primitive, tracers: Sequence[Value], params: dict[str, object], /
    ) -> Any:
        if primitive is stop_gradient_p:
            return self._bind(primitive, tracers, params)
        if (
            isinstance(primitive, HostPrimitive)
            and primitive.has_rules(params)
            and any(map(self.owns, tracers))
        ):
            operation = UncachedOperation(bind_function(primitive, params))
            return self.apply(operation, tracers)
        return super().process_primitive(primitive, tracers, params)

    def _bind(
        self, primitive: Primitive, operands: Sequence[Value], params: dict[str, object]
    ) -> Any:
        """Bind `primitive` under the parent, so that nothing of it is differentiated."""
        with set_current_trace(self.parent):
            return primitive.bind(*map(self._value, operands), **params)

    def call_custom(
        self,
        primitive: Primitive,
        functions: Sequence[Any],
        operands: Sequence[Value],
        params: dict[str, object],
    ) -> Sequence[Array]:
        if not any(map(self.owns, operands)):
            return self._bind(primitive, operands, {"subfuns": functions, **params})
        try:
            self._check_config()
            operation = operation_of_custom(
                primitive, functions, operands, params, self._config_number
            )
        except Uncacheable:
            # A replay calls the functions again, maybe on another thread.
            for function in functions:
                rule_stores.let_refill(function)
            bound = {"subfuns": functions, **params}
            return self.apply(
                UncachedOperation(
                    lambda *xs: primitive.bind(*xs, **bound),
                    is_repeatable=rule_stores.is_available(),
                ),
                operands,
            )
        results = self.apply(operation, operands)
        for rule in functions[1:]:
            operation.rule_stores.extend(rule_stores.take(rule))
        return results


class Tape:
    """The operations of a run, from which derivatives are computed without the function.

    Attributes:
        wrt: the operands of the run with respect to which it can be differentiated.
        values: its results.
        entries: the operations between them.
        subset: the elements that the run was of, if it was one by branch.
    """

    def __init__(
        self,
        trace: TapeTrace,
        wrt: Indices,
        operands: Sequence[Array],
        results: Sequence[Array],
    ) -> None:
        self._label = trace.label
        self._reads = trace.reads
        self._slots = trace.slots  # those of the operands `wrt` come first
        self.wrt = wrt
        self.entries = trace.entries
        self._of = [x.slot if trace.owns(x) else None for x in results]
        self.values: list[Array] = [x.value if trace.owns(x) else x for x in results]
        self._operands = list(operands)
        self._parent = trace.parent if isinstance(trace.parent, TapeTrace) else None
        batch = running_batch()
        self.subset = batch.subset if batch else None
        if batch:  # of the elements that left meanwhile, nothing is kept
            for values in self._value_lists():
                values[:] = [
                    x.of_subset(batch.subset) if is_batch_tracer(x) else x for x in values
                ]

    def arrays(self) -> Iterator[Value]:
        """Every array that the tape holds, some more than once."""
        for values in self._value_lists():
            for x in values:
                yield x.value if is_batch_tracer(x) else x

    def _value_lists(self) -> Iterator[list[Any]]:
        for entry in self.entries:
            yield entry.values
            yield entry.residuals
        yield self.values
        yield self._operands

    def serves(self, wrt: Indices, operands: Sequence[Value], without_rules: bool) -> bool:
        """Whether the derivative with respect to `wrt` can be taken of the tape as it is.

        Args:
            wrt: operands.
            operands: of the run. If some are on a tape, it must be that under which this
                one was recorded.
            without_rules: whether no custom rule may be used.
        """
        has_rules = any(entry.linear.operation.has_rules for entry in self.entries)
        return (
            set(wrt) <= set(self.wrt)
            and not (without_rules and has_rules)
            and (
                self._parent is _compat.current_trace()
                or not any(map(is_tape_tracer, operands))
            )
        )

    def can_replay(self, operands: Sequence[Value]) -> bool:
        """Whether it can be replayed on operands, some of which are on a tape."""
        on_tape = {i for i, x in enumerate(operands) if is_tape_tracer(x)}
        return on_tape <= set(self.wrt) and all(
            entry.linear.operation.is_repeatable for entry in self.entries
        )

    def jvp(self, wrt: Indices, tangents: Sequence[Value], of: Indices) -> list[Array]:
        """The tangents of results `of`, given those of operands `wrt`.

        Raises:
            NotDifferentiableError: a result depends on none of the operands with respect
                to which the run can be differentiated, although one was read.
        """
        self._check_not_detached(of)
        apply = functools.partial(execute, _compat.current_trace())
        known: list[Any] = [None] * self._slots
        for i, tangent in zip(wrt, tangents, strict=True):
            known[self.wrt.index(i)] = tangent
        for entry in self._leading_to({self._of[i] for i in of}):
            entry.jvp(known, apply)
        slots = [self._of[i] for i in of]
        return [
            self._or_zero(None if slot is None else known[slot], self.values[i])
            for slot, i in zip(slots, of, strict=True)
        ]

    def _leading_to(self, slots: set[int | None]) -> list[TapeEntry]:
        """The entries on which the values in some slots depend.

        A `custom_vjp` has no JVP, and needs none if it leads to none of the results.
        """
        leading = []
        for entry in reversed(self.entries):
            if not slots.isdisjoint(entry.outputs):
                slots.update(entry.inputs)
                leading.append(entry)
        return leading[::-1]

    def vjp(self, of: Indices, cotangents: Sequence[Value], wrt: Indices) -> list[Array]:
        """The cotangents of operands `wrt`, given those of results `of`.

        Raises:
            NotDifferentiableError: as in `jvp`.
        """
        self._check_not_detached(of)
        trace = _compat.current_trace()
        given: dict[int, Any] = {}
        for i, cotangent in zip(of, cotangents, strict=True):
            slot = self._of[i]
            if slot is not None:  # one value may be several results
                given[slot] = given[slot] + cotangent if slot in given else cotangent
        slots = [self.wrt.index(i) for i in wrt]
        sweep = None
        if not isinstance(trace, EagerTrace):  # which would run it, and record it, as one
            sweep = compiled_sweep(self.entries, [*given], slots)
        if sweep:
            residuals = [entry.residuals for entry in self.entries]
            with set_current_trace(_compat.eval_trace):
                pulled = sweep(residuals, [*given.values()])
        else:
            apply = functools.partial(execute, trace)
            known: list[Any] = [None] * self._slots
            for slot, cotangent in given.items():
                known[slot] = cotangent
            for entry in reversed(self.entries):
                entry.vjp(known, apply)
            pulled = [known[slot] for slot in slots]
        return [
            self._or_zero(x, self._operands[i]) for x, i in zip(pulled, wrt, strict=True)
        ]

    def replay(self, operands: Sequence[Value]) -> list[Array]:
        """The results for operands that are on another tape and have the same values.

        Raises:
            UnsupportedError: an operation is stateful.
        """
        trace = _compat.current_trace()
        if isinstance(trace, TapeTrace):
            trace.reads.extend(self._reads)
        known: list[Any] = [operands[i] for i in self.wrt]
        known += [None] * (self._slots - len(known))
        for entry in self.entries:
            linear = entry.linear
            if linear.operation.is_stateful:
                raise UnsupportedError(
                    f"{self._label}: its derivative is differentiated again, and a call in "
                    "it that is stateful, in jax.lax.scan, cond or while_loop, would have "
                    "to run once more. Call it outside of these, or make it pure."
                    + see("A stateful call in a loop of a body, differentiated twice")
                )
            values = list(entry.values)
            for i, slot in zip(linear.active, entry.inputs, strict=True):
                values[i] = known[slot]
            results = execute(trace, linear.operation, values)
            for slot, i in zip(entry.outputs, linear.of, strict=True):
                known[slot] = results[i]
        return [
            value if slot is None else known[slot]
            for slot, value in zip(self._of, self.values, strict=True)
        ]

    def _check_not_detached(self, of: Indices) -> None:
        if self._reads and any(self._of[i] is None for i in of):
            raise NotDifferentiableError(
                f"{self._label}: a result depends on nothing that is differentiated, "
                f"although its value was read{self._reads[0]}, so its gradient would "
                f"silently be zero. {REMEDIES}" + see("A result that is detached")
            )

    @staticmethod
    def _or_zero(derivative: Array | None, like: Array) -> Array:
        return np.zeros(np.shape(like), like.dtype) if derivative is None else derivative
