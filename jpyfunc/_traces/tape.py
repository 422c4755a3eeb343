"""Runs a body on values and notes its operations, for its derivatives.

A `Tape` is a trace whose tracers carry values: each operation is run at once, compiled,
and noted, and Python reads values as it likes. What it leaves is a `Record`, through
which tangents are pushed and cotangents are pulled, operation by operation, and which
can be replayed on other values of the same structure without the body.

Tapes nest: the operations of a derivative that is itself differentiated go to the next
tape, which is how there are derivatives of every order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Trace, Tracer
from jax.extend.core import set_current_trace

from jpyfunc import _compat
from jpyfunc._errors import (
    GradientCutWarning,
    NotDifferentiableError,
    line_of,
    place_of_frame,
    user_frame,
    warn_at,
)
from jpyfunc._traces.on_device import OnDevice
from jpyfunc._traces.operations import (
    Linear,
    Operation,
    Uncacheable,
    aval_of,
    binding,
    operation_of,
    operation_of_custom,
    operation_of_jit,
)

Indices = tuple[int, ...]

# Primitives that run Python, each with what is called in their place, under the tape,
# with operands and parameters: what Python does goes on the same tape.
CALLS: dict[Any, Callable[[Sequence[Any], dict[str, Any]], Any]] = {}

REMEDIES = (
    "Write jax.lax.stop_gradient(x) to read the value without its gradient, "
    "jax.custom_jvp or jax.custom_vjp in or around the body to say what the gradient "
    "is, or numpy_func for a function that has none."
)

_contexts: dict[tuple[Any, ...], int] = {}  # settings are few


def runs_now() -> bool:
    """Whether operations run at once on this thread: nothing but tapes is tracing."""
    return isinstance(_compat.current_trace(), Tape | _compat.EvalTrace)


def is_tape(trace: Any) -> bool:
    """Whether `trace` is a tape."""
    return type(trace) is Tape


def is_taped(value: Any) -> bool:
    """Whether `value` is differentiated by a tape, and has a value."""
    return type(value) is Taped


class Tape(Trace):
    """Runs operations at once, and notes those that depend on what it watches.

    Args:
        label: what errors call the function that is run.
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
        self._notes: list[_Note] = []
        self._slots = 0
        settings = _compat.current_settings()
        self._context = _contexts.setdefault(settings, len(_contexts))

    def watch(self, values: Sequence[Any], wrt: Indices) -> list[Any]:
        """`values`, those at `wrt` such that what depends on them is noted."""
        watched = list(values)
        for i in wrt:
            watched[i] = self._new(watched[i])
        return watched

    def record(
        self,
        function: Callable[[list[Any]], Sequence[Any]],
        operands: Sequence[Any],
        wrt: Indices,
    ) -> Record:
        """Run `function` on `operands`, of which it is differentiated by those at `wrt`."""
        try:
            with set_current_trace(self):
                results = function(self.watch(operands, wrt))
        finally:
            notes, self._notes, self.is_open = self._notes, [], False
            if is_tape(self.parent):
                self.parent.reads.extend(self.reads)
        return Record(self, notes, self._slots, wrt, operands, results)

    def _new(self, value: Any) -> Taped:
        self._slots += 1
        return Taped(self, value, self._slots - 1)

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
        # One that a body kept from a run that is over is a constant.
        return operand if operand._trace.is_open else operand.array

    def apply(self, operation: Operation, operands: Sequence[Any]) -> list[Any]:
        """Run an operation, and note it if it is to be differentiated."""
        # One loop, because this is on the way of every operation.
        values, active, inputs = [], [], []
        for i, x in enumerate(operands):
            if type(x) is Taped:
                if x._trace is self:
                    active.append(i)
                    inputs.append(x.slot)
                    x = x.value
                elif not x._trace.is_open:
                    x = x.array  # one that a body kept from a run that is over
            values.append(x)
        if self._move is not None:
            values = [self._move(x) for x in values]
        if not active:
            return run(self.parent, operation, values)
        active = tuple(active)
        linear = operation.linear(active)
        if not linear.of:
            return run(self.parent, operation, values)
        results = run(self.parent, linear.forward, values)
        residuals = linear.residuals(values, results)
        results = results[: linear.size]
        first = self._slots
        self._notes.append(
            _Note(operation, linear, active, inputs, values, residuals, first)
        )
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
            operation = operation_of(primitive, tracers, params, self._context)
        except Uncacheable:
            operation = Operation(binding(primitive, params), [*map(aval_of, tracers)])
            active = self._active(tracers)
            if not active or not operation.linear(active).of:
                return self._bind(primitive, tracers, params)
        results = self.apply(operation, tracers)
        return results if primitive.multiple_results else results[0]

    def _bind(self, primitive: Any, operands: Sequence[Any], params: Any) -> Any:
        """Bind `primitive` below this tape, which differentiates nothing of it."""
        with set_current_trace(self.parent):
            return primitive.bind(*map(self._value, operands), **params)

    def _call_jitted(self, jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
        operation = operation_of_jit(jaxpr, self._context, _is_opaque)
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
        operation = operation_of_custom(
            primitive, functions, operands, params, self._context
        )
        results = self.apply(operation, operands)
        for rule in functions[1:]:
            operation.stores.extend(_compat.taken(rule))
        return results


class Taped(Tracer):
    """An array that a tape differentiates. It has a value, and looks like it."""

    __slots__ = ("slot", "value")

    def __init__(self, tape: Tape, value: Any, slot: int) -> None:
        self._trace = tape
        self.aval = aval_of(value)
        self.value = value
        self.slot = slot

    @property
    def array(self) -> Any:
        """The value, which is itself on a tape where tapes nest, without any."""
        value = self.value
        while type(value) is Taped:
            value = value.value
        return value

    # Truth tests, `int`, indices and sizes go through this.
    def to_concrete_value(self) -> Any:
        return self.array

    def __repr__(self) -> str:
        return repr(self.array)

    def __str__(self) -> str:
        return str(self.array)

    def __format__(self, spec: str) -> str:
        return format(self.array, spec)

    def __float__(self) -> float:
        return float(self._read("float()"))

    def __complex__(self) -> complex:
        return complex(self._read("complex()"))

    def item(self, *args: Any) -> Any:
        return self._read("item()").item(*args)

    def tolist(self) -> Any:
        return self._read("tolist()").tolist()

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return self._converted("NumPy").__array__(*args, **kwargs)

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self._converted("another library").__dlpack__(*args, **kwargs)

    def tobytes(self, order: str = "C") -> bytes:
        return self._converted("bytes").tobytes(order)

    def __reduce__(self) -> Any:
        return self._converted("a pickle").__reduce__()

    def __copy__(self) -> Taped:
        return self

    def __deepcopy__(self, memo: Any) -> Taped:
        return self

    def _read(self, how: str) -> Any:
        """The value, for a scalar that Python goes on with."""
        array, tape = self.array, self._trace
        if tape.is_open:
            frame = user_frame()
            tape.reads.append(place_of_frame(frame))
            warn_at(
                frame,
                f"{tape.label} is differentiated, and {how} reads a value that its "
                f"gradient flows through{tape.reads[-1]}: what is computed of the Python "
                "number has no gradient. If that is meant, write "
                "jax.lax.stop_gradient(x) there.",
                GradientCutWarning,
            )
        return array

    def _converted(self, to: str) -> Any:
        """The value, for a conversion that no gradient flows through."""
        tape = self._trace
        if tape.is_open:
            frame = user_frame()
            raise NotDifferentiableError(
                f"{tape.label} is differentiated, and an array that its gradient flows "
                f"through is converted to {to}{place_of_frame(frame)}\n"
                f"    {line_of(frame)}\nwhere the gradient would be cut. {REMEDIES}"
            )
        return self.array


def _forwarded(name: str) -> property:
    return property(lambda self: getattr(self.array, name))


# What is asked of a value and says nothing that a gradient could flow through.
for _name in (
    "addressable_data",
    "addressable_shards",
    "block_until_ready",
    "committed",
    "copy_to_host_async",
    "device",
    "devices",
    "global_shards",
    "is_deleted",
    "is_fully_addressable",
    "is_fully_replicated",
    "on_device_size_in_bytes",
    "sharding",
    "unsafe_buffer_pointer",
):
    setattr(Taped, _name, _forwarded(_name))


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


def run(trace: Any, operation: Operation, operands: Sequence[Any]) -> list[Any]:
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


class _Note:
    """One operation of a run, with what its derivatives need."""

    __slots__ = ("active", "first", "inputs", "linear", "operation", "residuals", "values")

    def __init__(
        self,
        operation: Operation,
        linear: Linear,
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


class Record:
    """What a tape noted of a run.

    Attributes:
        wrt: the operands of the run that it can be differentiated by.
        values: its results.
    """

    def __init__(
        self,
        tape: Tape,
        notes: list[_Note],
        slots: int,
        wrt: Indices,
        at: Sequence[Any],
        results: Sequence[Any],
    ) -> None:
        self._label = tape.label
        self._reads = tape.reads
        self._notes = notes
        self._slots = slots  # those of the operands `wrt` come first
        self.wrt = wrt
        self._of = [x.slot if tape.owns(x) else None for x in results]
        self.values = [x.value if tape.owns(x) else x for x in results]
        self._at = at
        self._tape = tape.parent if is_tape(tape.parent) else None

    def arrays(self) -> Iterator[Any]:
        """Every array that it keeps, some more than once."""
        for note in self._notes:
            yield from note.values
            yield from note.residuals
        yield from self.values
        yield from self._at

    def serves(self, wrt: Indices, operands: Sequence[Any], without_rules: bool) -> bool:
        """Whether derivatives by `wrt` can be taken of it as it is.

        Args:
            wrt: operands.
            operands: of the run. Where some are on a tape, it must be that under which
                the record was made.
            without_rules: whether no custom rule may be used.
        """
        return (
            set(wrt) <= set(self.wrt)
            and not (without_rules and any(n.operation.has_rules for n in self._notes))
            and (self._tape is _compat.current_trace() or not any(map(is_taped, operands)))
        )

    def covers(self, operands: Sequence[Any]) -> bool:
        """Whether it can be replayed on operands, some of which are on a tape."""
        return {i for i, x in enumerate(operands) if is_taped(x)} <= set(self.wrt)

    def push(self, wrt: Indices, tangents: Sequence[Any], of: Indices) -> list[Any]:
        """The tangents of results `of` by the tangents of operands `wrt`.

        Raises:
            NotDifferentiableError: a result depends on none of the operands that the run
                was differentiated by, although one was read.
        """
        self._check_not_cut(of)
        trace = _compat.current_trace()
        known: list[Any] = [None] * self._slots
        for i, tangent in zip(wrt, tangents, strict=True):
            known[self.wrt.index(i)] = tangent
        for note in self._notes:
            given = tuple([k for k, s in enumerate(note.inputs) if known[s] is not None])
            if given:
                pushed = [known[note.inputs[k]] for k in given]
                operation = note.linear.push(given)
                results = run(trace, operation, [*note.residuals, *pushed])
                known[note.first : note.first + len(results)] = results
        return [self._or_zero(known, self._of[i], self.values[i]) for i in of]

    def pull(self, of: Indices, cotangents: Sequence[Any], wrt: Indices) -> list[Any]:
        """The cotangents of operands `wrt` by the cotangents of results `of`.

        Raises:
            NotDifferentiableError: as `push`.
        """
        self._check_not_cut(of)
        trace = _compat.current_trace()
        known: list[Any] = [None] * self._slots

        for i, cotangent in zip(of, cotangents, strict=True):
            slot = self._of[i]
            if slot is not None:
                before = known[slot]  # one value may be several results
                known[slot] = cotangent if before is None else before + cotangent
        for note in reversed(self._notes):
            n = note.first
            given = tuple(
                [k for k in range(len(note.linear.of)) if known[n + k] is not None]
            )
            if not given:
                continue
            slots = list(dict.fromkeys(note.inputs))
            targets = tuple([slots.index(s) for s in note.inputs])
            sums = tuple([k for k, s in enumerate(slots) if known[s] is not None])
            operation = note.linear.pull(given, targets, sums)
            operands = [*note.residuals, *[known[n + k] for k in given]]
            operands += [known[slots[k]] for k in sums]
            for k in given:
                known[n + k] = None
            results = run(trace, operation, operands)
            for slot, cotangent in zip(slots, results, strict=True):
                known[slot] = cotangent
        return [self._or_zero(known, self.wrt.index(i), self._at[i]) for i in wrt]

    def replay(self, operands: Sequence[Any]) -> list[Any]:
        """The results of the same operations on other operands `wrt`."""
        trace = _compat.current_trace()
        if is_tape(trace):
            trace.reads.extend(self._reads)
        known: list[Any] = [operands[i] for i in self.wrt]
        known += [None] * (self._slots - len(known))
        for note in self._notes:
            values = list(note.values)
            for i, slot in zip(note.active, note.inputs, strict=True):
                values[i] = known[slot]
            results = run(trace, note.operation, values)
            for k, i in enumerate(note.linear.of):
                known[note.first + k] = results[i]
        return [
            value if slot is None else known[slot]
            for slot, value in zip(self._of, self.values, strict=True)
        ]

    def _check_not_cut(self, of: Indices) -> None:
        if self._reads and any(self._of[i] is None for i in of):
            raise NotDifferentiableError(
                f"{self._label}: a result depends on nothing that is differentiated, "
                f"although its value was read{self._reads[0]}, so its gradient would be "
                f"zero without a word. {REMEDIES}"
            )

    def _or_zero(self, known: list[Any], slot: int | None, like: Any) -> Any:
        if slot is not None and known[slot] is not None:
            return known[slot]
        return np.zeros(np.shape(like), like.dtype)
