"""Runs a body on values that have a shape and dtype but no data, and notes what it does."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal, Primitive, jaxprs_in_params, set_current_trace
from jax.extend.core.primitives import jit_p

from jpyfunc import _compat
from jpyfunc._frames import line_of, place_of_frame, user_frame
from jpyfunc._interpreters.base_trace import BodyTrace
from jpyfunc._interpreters.operations import calls_host, is_host_call
from jpyfunc._limits import (
    MAX_BRANCH_POINTS,
    MAX_CONSTANT_DEPTH,
    MAX_CONSTANT_SIZE,
)
from jpyfunc._staging.numpy_constants import copy_numpy, holds_numpy


class TooManyBranchPoints(BaseException):
    """Too many decisions in one run. No `except Exception` of a body may catch it."""


class NeedsValueError(TypeError):
    """The body used an abstract value for more than a truth test."""


class LeftBehindError(TypeError):
    """An abstract value is used after the run of the body that it is of."""


@dataclasses.dataclass(frozen=True, slots=True)
class ValueRef:
    """A result of an operation, or an operand of the body, by its number in a run."""

    number: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Equation:
    """An operation of a run.

    Attributes:
        what: the primitive or function, its parameters and the avals of the results, by
            which runs are compared.
        call: from its operands to a list of results.
        operands: arrays, numbers, `ValueRef`s and `Constant`s.
        first: number of the first of its results.
        size: how many operations of JAX it is.
        depth: of a constant, how many operations lead to it.
    """

    what: tuple[Any, ...]
    call: Callable[..., Sequence[Any]]
    operands: tuple[Any, ...]
    first: int
    size: int
    depth: int = 1


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """An array that depends on no operand of the body, by the operation that gives it."""

    step: Equation
    index: int  # among its results
    aval: Any


@dataclasses.dataclass(frozen=True, slots=True)
class BranchPoint:
    """A truth test in a run: of what, where, how it was answered, and what came before."""

    test: ValueRef
    place: str
    line: str
    answer: bool
    steps: list[Equation]


class AbstractTrace(BodyTrace):
    """Evaluates operations on avals alone, and answers truth tests from a script.

    Attributes:
        decisions: the truth tests so far.
        steps: the operations since the last one.
        refusal: why what was noted is not what the body does, or "".
        is_open: whether the body is still running.
    """

    def __init__(
        self, label: str, script: Sequence[bool], keeps_rules: bool = False
    ) -> None:
        super().__init__()
        self._label = label
        self._script = script
        self._keeps_rules = keeps_rules
        self._count = 0
        # Arrays that were computed, by id, each with how. Not kept alive: a body may make
        # and drop as many as it likes.
        self._constants: dict[int, tuple[weakref.ref[Any], Constant]] = {}
        # Arrays of NumPy by their memory, and jaxprs by id, each with a copy. That of a
        # jaxpr holds for good: a function that was compiled has the constants of then.
        self._owned: dict[Any, tuple[Any, Any]] = {}
        self.is_open = True
        self.decisions: list[BranchPoint] = []
        self.steps: list[Equation] = []
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
        if isinstance(value, AbstractTracer):
            if value._trace is not self:
                self.refuse("it uses an array of another run on abstract values")
            return ValueRef(value.number)
        array, constant = self._constants.get(id(value), (None, None))
        return constant if array and array() is value else self._frozen(value)

    def _frozen(self, value: Any) -> Any:
        """`value` without anything of the user's, who may write to it later.

        What is noted is computed when all runs are over, and the program is traced.
        """
        if isinstance(value, np.ndarray):
            memory = value.__array_interface__["data"][0], value.strides
            weak = getattr(value, "weak_type", None)
            key: Any = (memory, value.shape, value.dtype, weak)
            _, copy = self._owned.get(key, (None, None))
            if copy is not None and copy.tobytes() == value.tobytes():
                return copy
        elif _compat.is_jaxpr(value):
            key = id(value)
            if not holds_numpy(value):
                return value
            if key in self._owned:
                return self._owned[key][1]
        elif type(value) in (tuple, list):
            return copy_numpy(value, self._frozen)
        else:
            return value
        self._owned[key] = value, copy_numpy(value, self._frozen)
        return self._owned[key][1]

    def close(self) -> None:
        """End the run: values that outlive it are refused from now on."""
        self.is_open = False
        self._constants.clear()
        self._owned.clear()

    def left_behind(self) -> LeftBehindError:
        """The error of one that uses a value that outlived the run."""
        return LeftBehindError(
            f"{self._label} left an array behind, in an attribute, a global variable or a "
            "cache, that depends on its arguments and has no data, because the body was "
            "run on abstract values, to find out what it does. Pass such an array as an "
            "argument and return it. Without staged=True, the body is not run so if Tout "
            "says what it returns, every shape and dtype."
        )

    def refuse(self, why: str) -> None:
        """Say that what was noted is not what the body does; it may catch the exception."""
        self.refusal = self.refusal or f"{why}{place_of_frame(user_frame())}"

    def decide(self, test: AbstractTracer) -> bool:
        n = len(self.decisions)
        if n >= MAX_BRANCH_POINTS:
            raise TooManyBranchPoints
        answer = self._script[n] if n < len(self._script) else False
        frame = user_frame()
        place, line = place_of_frame(frame), line_of(frame)
        self.decisions.append(BranchPoint(self.ref(test), place, line, answer, self.steps))
        self.steps = []
        return answer

    def stage_value(self, val: Any) -> Any:
        is_array = isinstance(val, np.ndarray | jax.Array)
        return val if is_array else _compat.eval_trace.stage_value(val)

    def process_primitive(self, primitive: Any, tracers: Any, params: Any, /) -> Any:
        if any(map(holds_numpy, params.values())):
            params = {name: self._frozen(value) for name, value in params.items()}
        avals = [jax.typeof(t) for t in tracers]
        outs, effects = primitive.abstract_eval(*avals, **params)
        calls = is_host_call(primitive, params)
        if effects:
            self.refuse(f"an operation has an effect ({primitive.name})")
        elif calls:
            self.refuse("it calls Python itself")  # maybe not for all elements of a batch
        outs = outs if primitive.multiple_results else [outs]
        jaxpr = params.get("jaxpr")
        what = primitive, params
        if primitive is jit_p and any(map(is_abstract, jaxpr.consts)):
            call, operands = _compat.opened(jaxpr), [*jaxpr.consts, *tracers]
            results = self._note(what, call, operands, outs, _size(jaxpr))
        else:

            def call(*operands: Any) -> Sequence[Any]:
                results = primitive.bind(*operands, **params)
                return results if primitive.multiple_results else [results]

            inner = sum(map(_size, jaxprs_in_params(params)))
            is_pure = not effects and not calls
            results = self._note(what, call, tracers, outs, inner or 1, is_pure)
        return results if primitive.multiple_results else results[0]

    def _note(
        self,
        what: tuple[Any, ...],
        call: Callable[..., Sequence[Any]],
        operands: Sequence[Any],
        avals: Sequence[Any],
        size: int,
        is_pure: bool = True,
    ) -> list[Any]:
        """The results of an operation, which is noted; those that are known, computed.

        What depends on no operand of the body is computed at once, whatever its size: the
        body gets an array, which it may look at, and keep for good. The body would compute
        it, too, in each of its runs.
        """
        refs = tuple(map(self.ref, operands))
        what = (*what, *avals)
        # Over manual axes there are no arrays outside of the program.
        is_local = not any(aval.manual_axis_type.varying for aval in avals)
        if is_pure and is_local and not any(isinstance(x, Tracer) for x in operands):
            depth = 1 + max((x.step.depth for x in refs if _is_computed(x)), default=0)
            step = Equation(what, call, refs, 0, size, depth)
            with set_current_trace(_compat.eval_trace):
                return self._computed(step, list(call(*operands)))
        self.steps.append(Equation(what, call, refs, self._count, size))
        return [self.new(aval) for aval in avals]

    def _computed(self, step: Equation, results: list[Any]) -> list[Any]:
        """`results`, those that are not to stand in the program as values noted as such."""
        given = sum(np.size(x) for x in step.operands if not _is_computed(x))
        for i, x in enumerate(results):
            if x.size > max(MAX_CONSTANT_SIZE, given) and step.depth <= MAX_CONSTANT_DEPTH:
                self._constants[id(x)] = weakref.ref(x), Constant(step, i, x.aval)
        return results

    def call_custom(
        self,
        primitive: Any,
        functions: Sequence[Any],
        operands: Sequence[Any],
        params: dict[str, Any],
    ) -> Any:
        if not self._keeps_rules:
            return super().call_custom(primitive, functions, operands, params)
        return self.apply_function(
            lambda *xs: primitive.bind(*xs, subfuns=functions, **params), operands
        )

    def apply_function(
        self, call: Callable[..., list[Any]], operands: Sequence[Any]
    ) -> list[Any]:
        with set_current_trace(_compat.eval_trace):
            closed = self._frozen(jax.make_jaxpr(call)(*operands))
        is_pure = not calls_host(closed)
        if not is_pure:
            self.refuse("it calls Python itself")
        operands = [*closed.consts, *operands]
        what = (closed,)
        call, outs = _compat.opened(closed), closed.out_avals
        return self._note(what, call, operands, outs, _size(closed), is_pure)


def _is_computed(noted: Any) -> bool:
    return isinstance(noted, Constant)


def is_alike(a: Any, b: Any) -> bool:
    """Whether two runs noted the same: operations, parameters, avals and small arrays.

    Functions, and other objects that compare by identity, are new in each run, and taken
    for the same; so are large arrays of one shape.
    """
    if a is b:
        return True
    if isinstance(a, Constant | np.ndarray | jax.Array):
        # Of either kind: what a body caches is made in one run, and found in the next.
        return isinstance(b, Constant | np.ndarray | jax.Array) and _is_alike_array(a, b)
    if type(a) is not type(b) or isinstance(a, Primitive):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_alike, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_alike(a[k], b[k]) for k in a)
    if isinstance(a, Equation):
        return is_alike((a.what, a.operands), (b.what, b.operands))
    if _compat.is_jaxpr(a):
        return is_alike(_content(a), _content(b))
    is_function = callable(a) or hasattr(a, "call_wrapped")
    if is_function or type(a).__eq__ is object.__eq__:
        return True
    return bool(a == b) or (a != a and b != b)  # NaN


def _is_alike_array(a: Any, b: Any) -> bool:
    if (a.aval if _is_computed(a) else jax.typeof(a)) != (
        b.aval if _is_computed(b) else jax.typeof(b)
    ):
        return False
    if _is_computed(a) or _is_computed(b) or a.size > MAX_CONSTANT_SIZE:
        # Not what they are computed from, which may be shared, and met exponentially often.
        both = _is_computed(a) and _is_computed(b)
        return not both or is_alike((a.index, a.step.what), (b.index, b.step.what))
    with set_current_trace(_compat.eval_trace):
        is_key = jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
        data = [np.asarray(jax.random.key_data(x) if is_key else x) for x in (a, b)]
    return data[0].tobytes() == data[1].tobytes()


def _content(jaxpr: Any) -> Any:
    """A jaxpr with numbers for its variables, which are new in each run."""
    numbers: dict[int, int] = {}

    def atom(x: Any) -> Any:
        is_literal = isinstance(x, Literal)
        return x.val if is_literal else (numbers.setdefault(id(x), len(numbers)), x.aval)

    inner = getattr(jaxpr, "jaxpr", jaxpr)
    operands = [atom(x) for x in (*inner.constvars, *inner.invars)]
    eqns = [
        (eqn.primitive, eqn.params, [atom(x) for x in (*eqn.invars, *eqn.outvars)])
        for eqn in jaxpr.eqns
    ]
    results = [atom(x) for x in inner.outvars]
    return operands, eqns, results, [*getattr(jaxpr, "consts", [])]


@_compat.weakref_lru_cache
def _size(jaxpr: Any) -> int:
    """How many operations there are in a jaxpr, those in its functions counted each."""
    return sum(sum(map(_size, jaxprs_in_params(eqn.params))) or 1 for eqn in jaxpr.eqns)


class AbstractTracer(Tracer):
    """An array of which only the aval is known."""

    __slots__ = ("_aval", "number")

    def __init__(self, trace: AbstractTrace, aval: Any, number: int) -> None:
        self._trace = trace
        self._aval = aval
        self.number = number

    @property
    def aval(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        # Whatever is done with an array begins by asking for this.
        if not self._trace.is_open:
            raise self._trace.left_behind()
        return self._aval

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
        if not self._trace.is_open:
            return f"Abstract({self._aval.str_short()}, left behind)"
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
