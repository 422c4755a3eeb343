"""Runs a body on values that have a shape and dtype but no data, and notes what it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import jaxprs_in_params, set_current_trace

from jpyfunc import _compat
from jpyfunc._errors import line_of, place_of_frame, user_frame
from jpyfunc._traces.operations import (
    apply_shard_map,
    calls_host,
    is_host_call,
    with_weak_type,
)

# A loop on an abstract condition is one decision per turn, and may never end.
MAX_DECISIONS = 64
MAX_CONSTANT = 64  # elements of an array that is computed where it is known


class Undecided(BaseException):
    """Too many decisions in one run. No `except Exception` of a body may catch it."""


class NeedsValueError(TypeError):
    """The body used an abstract value for more than a truth test."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ref:
    """A result of an operation, or an operand of the body, by its number in a run."""

    number: int


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """An operation of a run.

    Attributes:
        call: from its operands to a list of results.
        operands: arrays, numbers, and `Ref`s.
        first: number of the first of its results.
        size: how many operations of JAX it is.
    """

    call: Callable[..., Sequence[Any]]
    operands: tuple[Any, ...]
    first: int
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """A truth test in a run: of what, where, how it was answered, and what came before."""

    test: Ref
    place: str
    line: str
    answer: bool
    steps: list[Step]


class AbstractTrace(_compat.OneKey):
    """Evaluates operations on avals alone, and answers truth tests from a script.

    Attributes:
        decisions: the truth tests so far.
        steps: the operations since the last one.
        refusal: why what was noted is not what the body does, or "".
    """

    def __init__(self, script: Sequence[bool], keeps_rules: bool = False) -> None:
        super().__init__()
        self._script = script
        self._keeps_rules = keeps_rules
        self._count = 0
        self.decisions: list[Decision] = []
        self.steps: list[Step] = []
        self.refusal = ""

    @property
    def branch(self) -> str:
        """Where this run left the one that its script was made from."""
        n = len(self._script)
        if n > len(self.decisions):
            return "a branch"
        return f"the branch{self.decisions[n - 1].place}"

    def new(self, aval: Any) -> AbstractTracer:
        self._count += 1
        return AbstractTracer(self, aval, self._count - 1)

    def ref(self, value: Any) -> Any:
        """`value` as it is noted."""
        if not isinstance(value, AbstractTracer):
            return value
        if value._trace is not self:
            self.refuse("it uses an array that it kept from an earlier run")
        return Ref(value.number)

    def refuse(self, why: str) -> None:
        """Say that what was noted is not what the body does; it may catch the exception."""
        self.refusal = self.refusal or f"{why}{place_of_frame(user_frame())}"

    def decide(self, test: AbstractTracer) -> bool:
        n = len(self.decisions)
        if n >= MAX_DECISIONS:
            raise Undecided
        answer = self._script[n] if n < len(self._script) else False
        frame = user_frame()
        place, line = place_of_frame(frame), line_of(frame)
        self.decisions.append(Decision(self.ref(test), place, line, answer, self.steps))
        self.steps = []
        return answer

    def stage_value(self, val: Any) -> Any:
        return val

    def process_primitive(self, primitive: Any, tracers: Any, params: Any, /) -> Any:
        avals = [jax.typeof(t) for t in tracers]
        outs, effects = primitive.abstract_eval(*avals, **params)
        if effects:
            self.refuse(f"an operation has an effect ({primitive.name})")
        elif is_host_call(primitive, params):
            self.refuse("it calls Python itself")  # maybe not for all elements of a batch
        outs = outs if primitive.multiple_results else [outs]
        jaxpr = params.get("jaxpr")
        if not effects and _is_constant(primitive, tracers, params, outs):
            with set_current_trace(_compat.eval_trace):
                return primitive.bind(*tracers, **params)
        if primitive is _compat.jit_p and any(map(is_abstract, jaxpr.consts)):
            results = self._note(
                _compat.opened(jaxpr), [*jaxpr.consts, *tracers], outs, _size(jaxpr)
            )
        else:

            def call(*operands: Any) -> Sequence[Any]:
                results = primitive.bind(*operands, **params)
                return results if primitive.multiple_results else [results]

            inner = sum(map(_size, jaxprs_in_params(params)))
            results = self._note(call, tracers, outs, inner or 1)
        return results if primitive.multiple_results else results[0]

    def _note(
        self, call: Any, operands: Sequence[Any], avals: Sequence[Any], size: int
    ) -> list[AbstractTracer]:
        refs = tuple(map(self.ref, operands))
        self.steps.append(Step(call, refs, self._count, size))
        return [self.new(aval) for aval in avals]

    def process_custom_jvp_call(
        self, primitive: Any, fun: Any, jvp: Any, tracers: Any, /, **params: Any
    ) -> Any:
        return self._call_custom(primitive, (fun, jvp), tracers, params)

    def process_custom_vjp_call(
        self, primitive: Any, fun: Any, fwd: Any, bwd: Any, tracers: Any, /, **params: Any
    ) -> Any:
        return self._call_custom(primitive, (fun, fwd, bwd), tracers, params)

    def process_shard_map(
        self, primitive: Any, fun: Any, tracers: Any, /, **params: Any
    ) -> Any:
        return apply_shard_map(
            primitive, fun, params, lambda call: self._note_whole(call, tracers)
        )

    def _call_custom(
        self, primitive: Any, functions: Any, operands: Sequence[Any], params: Any
    ) -> Any:
        if not self._keeps_rules:
            with set_current_trace(self):
                return functions[0].call_wrapped(*operands)
        return self._note_whole(
            lambda *xs: primitive.bind(*xs, subfuns=functions, **params), operands
        )

    def _note_whole(self, call: Any, operands: Sequence[Any]) -> list[AbstractTracer]:
        """Note all that a function does as one operation."""
        avals = [with_weak_type(jax.typeof(x)) for x in operands]
        with set_current_trace(_compat.eval_trace):
            closed = jax.make_jaxpr(call)(*avals)
        if calls_host(closed):
            self.refuse("it calls Python itself")
        operands = [*closed.consts, *operands]
        return self._note(_compat.opened(closed), operands, closed.out_avals, _size(closed))


def _is_constant(
    primitive: Any, operands: Sequence[Any], params: dict[str, Any], outs: Sequence[Any]
) -> bool:
    """Whether an operation is of known values, and small, as sizes and axes are."""
    return (
        not any(isinstance(x, Tracer) for x in operands)
        and all(aval.size <= MAX_CONSTANT for aval in outs)
        and not is_host_call(primitive, params)
    )


def _size(jaxpr: Any) -> int:
    """How many operations there are in a jaxpr, those in its functions counted each."""
    return sum(sum(map(_size, jaxprs_in_params(eqn.params))) or 1 for eqn in jaxpr.eqns)


class AbstractTracer(Tracer):
    """An array of which only the aval is known."""

    __slots__ = ("aval", "number")

    aval: Any

    def __init__(self, trace: AbstractTrace, aval: Any, number: int) -> None:
        self._trace = trace
        self.aval = aval
        self.number = number

    def to_concrete_value(self) -> Any:
        # Reached through the tracers of `jax.grad` and the like in a body, which ask
        # their primal for the truth that they are tested for.
        if self.aval.dtype == jnp.bool_ and self.aval.size == 1:
            return _UnknownBool(self)
        return None

    def __bool__(self) -> bool:
        if self.aval.size != 1:
            raise ValueError(
                "The truth value of an array with other than one element is ambiguous. "
                "Use a.any() or a.all()"
            )
        return self._trace.decide(self)

    def _refuse(self, what: str) -> Any:
        what = f"{what} of {self.aval.str_short()}"
        self._trace.refuse(what)
        raise NeedsValueError(what)

    def __float__(self) -> Any:
        self._refuse("float()")

    def __int__(self) -> Any:
        self._refuse("int()")

    def __complex__(self) -> Any:
        self._refuse("complex()")

    def __index__(self) -> Any:
        self._refuse("use as an index or a size")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse("conversion to NumPy")

    def tolist(self) -> Any:
        self._refuse("tolist()")

    def item(self, *args: Any) -> Any:
        self._refuse("item()")

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __repr__(self) -> str:
        # What is printed is of no consequence; another text may be.
        if not line_of(user_frame()).startswith("print("):
            self._trace.refuse(f"text of {self.aval.str_short()}")
        return f"Abstract({self.aval.str_short()})"


class _UnknownBool:
    """Stands for the value of an abstract bool: good for a truth test, nothing else."""

    def __init__(self, tracer: AbstractTracer) -> None:
        self._tracer = tracer

    def __bool__(self) -> bool:
        return bool(self._tracer)

    def __getattr__(self, name: str) -> Any:
        return self._tracer._refuse(f"concrete use ({name})")


def is_abstract(value: Any) -> bool:
    """Whether `value` is one of the values that `infer` calls a body with."""
    return isinstance(value, AbstractTracer)
