"""Run a body on values that have a shape and dtype but no data, and record what it does."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray, Tracer
from jax.extend.core import Primitive, jaxprs_in_params, set_current_trace
from jax.extend.core.primitives import jit_p

from jpyfunc import _compat
from jpyfunc._errors import see
from jpyfunc._frames import line_of, place_of_frame, user_frame
from jpyfunc._interpreters.base_trace import BodyTrace
from jpyfunc._interpreters.jaxpr_queries import calls_host, is_host_call
from jpyfunc._interpreters.operation_cache import bind_function
from jpyfunc._limits import (
    MAX_BRANCH_POINTS,
    MAX_CONSTANT_DEPTH,
    MAX_CONSTANT_SIZE,
)
from jpyfunc._staging.abstract_tracer import AbstractTracer, is_abstract
from jpyfunc._staging.equations import (
    Atom,
    BranchPoint,
    Constant,
    Equation,
    ValueRef,
    operation_count,
)
from jpyfunc._staging.loop_search import LoopSearch
from jpyfunc._staging.number_tracer import refuse_narrower
from jpyfunc._staging.numpy_constants import NumpyCopies, numpy_arrays_in
from jpyfunc._staging.visits import has_value


class TooManyBranchPoints(BaseException):
    """A run has come to too many branch points.

    A `BaseException`, which no `except Exception` of the body catches.
    """


class LeftBehindError(TypeError):
    """An abstract value is used after the run of the body that made it."""


class AbstractTrace(BodyTrace):
    """Evaluate operations on avals alone, and answer truth tests from a script.

    Attributes:
        branch_points: the truth tests so far.
        equations: the operations since the last one.
        refusal: why the record differs from what the body does with data, or "".
        is_open: whether the body is still running.
        shapes_only: whether the results matter only for their shapes and dtypes.
    """

    def __init__(
        self,
        label: str,
        script: Sequence[bool],
        shapes_only: bool,
        loops: LoopSearch,
        copies: NumpyCopies,
    ) -> None:
        """Begin a run.

        Args:
            label: what errors call the function.
            script: the answers to the first truth tests; further ones are answered False.
            shapes_only: whether to look into functions with custom derivative rules, which
                are then lost, rather than to record each as one operation.
            loops: finds the loops of the run.
            copies: of the NumPy arrays that it uses, and earlier runs have used.
        """
        super().__init__()
        self._label = label
        self._script = script
        self.shapes_only = shapes_only
        self._count = 0
        self._constants: dict[int, tuple[weakref.ref[jax.Array], Constant]] = {}
        self._copies = copies
        self.loops = loops
        self.is_open = True
        self.branch_points: list[BranchPoint] = []
        self.equations: list[Equation] = []
        self.refusal = ""

    @property
    def branch(self) -> str:
        """The branch at which this run left the run that its script was made from."""
        n = len(self._script)
        if n > len(self.branch_points):
            return "a branch"
        return f"the branch{self.branch_points[n - 1].place}"

    @property
    def value_count(self) -> int:
        """The number of values that the run has made so far."""
        return self._count

    def new_tracer(self, aval: ShapedArray, is_constant: bool = False) -> AbstractTracer:
        """Make the next value of the run."""
        self._count += 1
        return AbstractTracer(self, aval, self._count - 1, is_constant)

    def variable(self, number: Any) -> Any:
        """Make a weakly typed array of a Python number, whose value no operation uses.

        Args:
            number: the number; an array is returned as it is.
        """
        if is_abstract(number):
            return number
        with set_current_trace(_compat.eval_trace):
            aval = jax.typeof(jnp.asarray(number))
        signature, call = (type(number), number), lambda: [jnp.asarray(number)]
        self.equations.append(Equation(signature, (aval,), call, (), self._count, 1))
        return self.new_tracer(aval)

    def atom(self, value: Any) -> Atom:
        """Return `value` as it is recorded, as an operand or as a result of the body."""
        if isinstance(value, AbstractTracer):
            if value.body_trace is not self:
                self.record_refusal("it uses an array of another run on abstract values")
            return ValueRef(value.number)
        found = self._constants.get(id(value))
        # Python reuses the id of an array that is gone, whose reference is dead then.
        if found is not None and found[0]() is value:
            return found[1]
        return self._copies.copied(value)

    def close(self) -> None:
        """End the run: from now on its values are refused wherever they are used."""
        self.is_open = False
        self.loops.close(self)
        self._constants.clear()
        self._copies.end_run()

    def left_behind(self) -> LeftBehindError:
        """Make the error of a value that is used after the run."""
        return LeftBehindError(
            f"{self._label} left an array behind in an attribute, a global variable or a "
            "cache. The array depends on the arguments and has no data, because the body "
            "was run on abstract values to find out what it does. Pass such an array as an "
            "argument and return it. Or declare every shape and dtype in Tout, and without "
            "staged=True the body is not run on abstract values."
            + see("An array kept from a run on abstract values")
        )

    def record_refusal(self, why: str) -> None:
        """Set `refusal`, unless there is one.

        An exception alone would not do, because the body may catch it and go on.
        """
        self.refusal = self.refusal or f"{why}{place_of_frame(user_frame())}"

    def answer(self, test: AbstractTracer) -> bool:
        """Answer a truth test, and record it as a branch point.

        Raises:
            TooManyBranchPoints: the run has come to too many.
            RunConcluded: the run need not go on.
        """
        n = len(self.branch_points)
        if n >= MAX_BRANCH_POINTS:
            raise TooManyBranchPoints
        answer = self._script[n] if n < len(self._script) else False
        answer = self.loops.answer(self, test, answer)
        frame = user_frame()
        place, line = place_of_frame(frame), line_of(frame)
        self.branch_points.append(
            BranchPoint(self.atom(test), place, line, answer, self.equations)
        )
        self.equations = []
        return answer

    def stage_value(self, val: Any) -> Any:
        is_array = isinstance(val, np.ndarray | jax.Array)
        return val if is_array else _compat.eval_trace.stage_value(val)

    def process_primitive(self, primitive: Any, tracers: Any, params: Any, /) -> Any:
        if any(map(numpy_arrays_in, params.values())):
            params = {name: self._copies.copied(value) for name, value in params.items()}
        avals = [jax.typeof(t) for t in tracers]
        outs, effects = primitive.abstract_eval(*avals, **params)
        calls = is_host_call(primitive, params)
        if effects:
            self.record_refusal(f"an operation has an effect ({primitive.name})")
        elif calls:
            # Under `vmap`, a call in a `cond` would be made for all elements, also for
            # those that take the other branch. A call of the whole body is not, because it
            # gets the predicate of its path: see `emission`.
            self.record_refusal("it calls Python itself")
        outs = outs if primitive.multiple_results else [outs]
        refuse_narrower(tracers, outs, jaxprs_in_params(params))
        is_pure = not effects and not calls
        jaxpr = params.get("jaxpr")
        signature = primitive, params
        if primitive is jit_p and any(map(is_abstract, jaxpr.consts)):
            # A jitted function has closed over values of the run. They are operands, too.
            call, operands = _compat.opened(jaxpr), [*jaxpr.consts, *tracers]
            size = operation_count(jaxpr)
            results = self._record(signature, call, operands, outs, size, is_pure)
        else:
            size = sum(map(operation_count, jaxprs_in_params(params))) or 1
            call = bind_function(primitive, params)
            results = self._record(signature, call, tracers, outs, size, is_pure)
        return results if primitive.multiple_results else results[0]

    def _record(
        self,
        signature: tuple[Any, ...],
        call: Callable[..., Sequence[Any]],
        operands: Sequence[Any],
        avals: Sequence[ShapedArray],
        size: int,
        is_pure: bool,
    ) -> list[Any]:
        """Record an operation, unless its results are known, and return its results.

        What depends on no operand of the body is computed at once, whatever its size: the
        body gets an array, which it may look at and keep for good, as it does with data.
        A loop that carries such an array needs the operations, too: see `LoopFindings`.
        """
        atoms = tuple(map(self.atom, operands))
        self.loops.note_operation()
        # Over manual axes there are no arrays outside of the program.
        is_local = not any(aval.manual_axis_type.varying for aval in avals)
        is_constant = is_pure and is_local and all(map(_is_constant, operands))
        if is_constant and not self.loops.is_unfolded:
            depths = [x.equation.depth for x in atoms if isinstance(x, Constant)]
            depth = 1 + max(depths, default=0)
            equation = Equation(signature, (*avals,), call, atoms, 0, size, depth)
            results = _computed(call, operands)
            self._remember_constants(equation, results)
            return results
        equation = Equation(signature, (*avals,), call, atoms, self._count, size)
        self.equations.append(equation)
        tracers = [self.new_tracer(aval, is_constant) for aval in avals]
        if is_constant and all(map(has_value, filter(is_abstract, operands))):
            values = [x.value if is_abstract(x) else x for x in operands]
            for tracer, value in zip(tracers, _computed(call, values), strict=True):
                tracer.value = value
        return tracers

    def _remember_constants(self, equation: Equation, results: Sequence[jax.Array]) -> None:
        """Remember how results were computed that are too large to embed in the program.

        A small array goes into the program as a literal. A large one, such as
        `jnp.zeros(10**6)`, would bloat it, and the program computes it again from what it
        was computed from, unless that is as large, or a chain of too many operations.

        The arrays are held weakly, by id. A body may compute and drop as many as it likes,
        and holding them to the end of the run would need the sum of their memory.
        """
        arrays = [x for x in equation.operands if not isinstance(x, Constant | ValueRef)]
        given = sum(map(np.size, arrays))
        if equation.depth > MAX_CONSTANT_DEPTH:
            return
        for i, x in enumerate(results):
            if x.size > max(MAX_CONSTANT_SIZE, given):
                constant = Constant(equation, i, x.aval)
                self._constants[id(x)] = weakref.ref(x), constant

    def call_custom(
        self,
        primitive: Primitive,
        functions: Sequence[Any],
        operands: Sequence[Any],
        params: dict[str, Any],
    ) -> Sequence[Any]:
        if self.shapes_only:
            return super().call_custom(primitive, functions, operands, params)
        return self.apply_function(
            lambda *xs: primitive.bind(*xs, subfuns=functions, **params), operands
        )

    def apply_function(
        self, call: Callable[..., list[Any]], operands: Sequence[Any]
    ) -> list[Any]:
        with set_current_trace(_compat.eval_trace):
            closed = self._copies.copied(jax.make_jaxpr(call)(*operands))
        is_pure = not calls_host(closed)
        if not is_pure:
            self.record_refusal("it calls Python itself")
        operands = [*closed.consts, *operands]
        size, outs = operation_count(closed), closed.out_avals
        refuse_narrower(operands, outs, [closed])
        return self._record(
            (closed,), _compat.opened(closed), operands, outs, size, is_pure
        )


def _is_constant(operand: Any) -> bool:
    """Tell whether an operand depends on no operand of the body."""
    return operand.is_constant if is_abstract(operand) else not isinstance(operand, Tracer)


def _computed(
    call: Callable[..., Sequence[Any]], operands: Sequence[Any]
) -> list[jax.Array]:
    with set_current_trace(_compat.eval_trace):
        return list(call(*operands))
