"""Python numbers that a loop changes, as arrays that it carries."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any, NamedTuple, NoReturn, TypeAlias

import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import jaxprs_in_params

from jpyfunc import _compat
from jpyfunc._frames import line_of, user_frame
from jpyfunc._limits import MAX_COUNT, MAX_COUNT_STEP
from jpyfunc._staging.abstract_tracer import AbstractTracer

# A loop that counts (`it += 1`) or halves (`step *= 0.5`) a Python number comes back to a
# state of Python that differs in that number alone. So the number is replaced by a weakly
# typed array, and the loop carries it. With arrays that does what the number does, because
# JAX promotes both alike. Among numbers it must do what Python does, and arrays do not:
#
# - Python's integers have no end. So bounds of each integer are computed, from those that
#   hold at the head of the loop. A test narrows them: below `if it < 100`, `it` is at most
#   99. What may not fit is refused. What comes back to the head must be within the bounds
#   there, so that they hold in each iteration, by induction. A counter that nothing bounds,
#   and that changes by a small constant, is assumed not to come to `MAX_COUNT`.
# - Python's floats have 64 bits. Used with arrays they are rounded anyhow. A comparison of
#   two numbers, where rounding might make all the difference, is refused.
# - Division by zero raises an exception, so it must be known that there is none.
# - Whatever needs the number itself (an index of a list, a size, a text) is refused.
#
# A refusal ends the run: the loop is then unrolled, with the numbers as they are.

Bounds: TypeAlias = tuple[Any, Any]  # the least and the greatest value
UNBOUNDED: Bounds = (-math.inf, math.inf)  # those of a float, of which nothing is known
Number: TypeAlias = "NumberTracer | bool | int | float"


class Variable(NamedTuple):
    """A variable of a function, at a truth test in it, which may be the head of a loop."""

    code: CodeType
    continuation: tuple[int, ...]
    name: str


class NumberTracer(AbstractTracer):
    """An array in the place of a Python number.

    Attributes:
        variable: what it comes from.
        kind: the type that it would have in Python.
        bounds: the least and the greatest value of an integer.
        root: an integer that this one is a constant more than; it may be this one.
        offset: that constant.
        comparison: of a truth value, the operator and its operands.
    """

    __slots__ = ("bounds", "comparison", "kind", "offset", "root", "variable")

    def __init__(
        self, array: AbstractTracer, variable: Variable, kind: type, bounds: Bounds
    ) -> None:
        super().__init__(array.body_trace, array.aval, array.number)
        self.variable = variable
        self.kind = kind
        self.bounds = bounds
        self.root = self
        self.offset = 0
        self.comparison: tuple[str, NumberTracer, Number] | None = None

    def continues(self, head: NumberTracer, bounds: Bounds) -> bool:
        """Tell whether a loop may go on with this in the place of `head`.

        Args:
            head: the number at the head of the loop.
            bounds: what it was assumed to be within there.
        """
        low, high = self.bounds
        change = self.offset - head.offset if self.root is head.root else 0
        rises_far = 0 < change <= MAX_COUNT_STEP and bounds[1] >= MAX_COUNT
        falls_far = -MAX_COUNT_STEP <= change < 0 and bounds[0] <= -MAX_COUNT
        return (low >= bounds[0] or falls_far) and (high <= bounds[1] or rises_far)

    def decide(self) -> bool:
        if self.kind is float:
            self.concrete("a comparison with zero")
        answer = super().decide()
        if self.comparison:
            name, first, second = self.comparison
            first.narrow(name if answer else _NEGATED[name], second)
        else:
            self.narrow("ne" if answer else "eq", 0)
        return answer

    def narrow(self, name: str, other: Number) -> None:
        """Take note that a comparison with an integer is true."""
        own = self.bounds
        self.bounds = _narrowed(name, bounds_of(other), own)
        if isinstance(other, NumberTracer):
            other.bounds = _narrowed(_MIRRORED[name], own, other.bounds)

    def concrete(self, use: str) -> NoReturn:
        """Refuse a use that needs the number.

        Raises:
            RunConcluded: always.
        """
        why = f"{use} needs {self.variable.name} as a Python number"
        self.body_trace.loops.keep_numbers(why, [self.variable])
        raise AssertionError

    def __hash__(self) -> int:
        self.concrete("a hash")

    def __repr__(self) -> str:
        if not line_of(user_frame()).startswith("print("):
            self.concrete("text")
        return super().__repr__()

    def __round__(self, ndigits: int | None = None) -> Any:
        self.concrete("round()")

    def __trunc__(self) -> Any:
        self.concrete("trunc()")

    def __floor__(self) -> Any:
        self.concrete("floor()")

    def __ceil__(self) -> Any:
        self.concrete("ceil()")

    def __invert__(self) -> Any:
        self.concrete("~")

    def __neg__(self) -> Any:
        return _computed("sub", 0, self)

    def __pos__(self) -> Any:
        return _computed("add", 0, self)

    def __abs__(self) -> Any:
        low, high = self.bounds
        if self.kind is bool or -low > widest()[1]:
            self.concrete("abs()")
        bounds = max(low, -high, 0), max(-low, high)
        return NumberTracer(abs(_array(self)), self.variable, self.kind, bounds)


def widest() -> Bounds:
    """The bounds of all integers that an array in the place of one can have."""
    return _range_of(jnp.result_type(int))


def _range_of(dtype: Any) -> Bounds:
    """The bounds of all integers of a dtype."""
    info = jnp.iinfo(dtype)
    return int(info.min), int(info.max)


def bounds_of(value: Number) -> Bounds:
    """The bounds of a number."""
    return value.bounds if isinstance(value, NumberTracer) else (value, value)


def intersect(a: Bounds, b: Bounds) -> Bounds:
    """The bounds of what is within both bounds."""
    return max(a[0], b[0]), min(a[1], b[1])


def refuse_narrower(
    operands: Iterable[Any], avals: Iterable[ShapedArray], jaxprs: Iterable[Any]
) -> None:
    """Refuse integers in the place of numbers that may not fit in an operation's dtypes.

    A number that does not fit raises an exception, and an array wraps around.

    Args:
        operands: of the operation.
        avals: of its results.
        jaxprs: of functions that it calls.
    """
    numbers = [x for x in operands if isinstance(x, NumberTracer) and x.kind is int]
    dtypes = {aval.dtype for aval in avals}.union(*map(_dtypes, jaxprs)) if numbers else ()
    for dtype in dtypes:
        if jnp.issubdtype(dtype, jnp.integer):
            allowed = _range_of(dtype)
            for x in numbers:
                if intersect(x.bounds, allowed) != x.bounds:
                    x.concrete(f"a conversion to {dtype}")


@_compat.weakref_lru_cache
def _dtypes(jaxpr: Any) -> frozenset[Any]:
    """The dtypes of all values that a jaxpr computes."""
    own = {x.aval.dtype for eqn in jaxpr.eqns for x in eqn.outvars}
    inner = (jaxprs_in_params(eqn.params) for eqn in jaxpr.eqns)
    return frozenset(own).union(*(_dtypes(x) for found in inner for x in found))


def _is_number(value: Any) -> bool:
    return isinstance(value, NumberTracer) or type(value) in (bool, int, float)


def _array(value: Number) -> Any:
    """Return what the operators of JAX take in the place of a number."""
    if isinstance(value, NumberTracer):
        return AbstractTracer(value.body_trace, value.aval, value.number)
    return int(value) if type(value) is bool else value


def _kind(value: Number) -> type:
    kind = value.kind if isinstance(value, NumberTracer) else type(value)
    return int if kind is bool else kind


def _computed(name: str, a: Number, b: Number) -> NumberTracer:
    """Compute with two numbers, one of which at least is an array."""
    tracer = next(x for x in (a, b) if isinstance(x, NumberTracer))
    for x in (a, b):
        if isinstance(x, NumberTracer) and x.kind is bool:
            x.concrete("arithmetic")
    divides = name in ("truediv", "floordiv", "mod")
    if divides and bounds_of(b)[0] <= 0 <= bounds_of(b)[1]:
        tracer.concrete("a division by what may be zero")
    is_float = name == "truediv" or float in (_kind(a), _kind(b))
    if is_float:
        if name in ("floordiv", "mod"):
            tracer.concrete("// or % of floats")
        operands = [x if isinstance(x, NumberTracer) else float(x) for x in (a, b)]
        array = getattr(operator, name)(*map(_array, operands))
        return NumberTracer(array, tracer.variable, float, UNBOUNDED)
    return _integer(name, a, b, tracer)


def _integer(name: str, a: Number, b: Number, tracer: NumberTracer) -> NumberTracer:
    """Compute an integer."""
    bounds = _ARITHMETIC[name](bounds_of(a), bounds_of(b))
    constants = [x for x in (a, b) if not isinstance(x, NumberTracer)]
    for x in (*bounds, *constants):
        if intersect((x, x), widest()) != (x, x):
            tracer.concrete("an integer that may not fit")
    array = getattr(operator, name)(_array(a), _array(b))
    found = NumberTracer(array, tracer.variable, int, bounds)
    offset = _offset(name, a, b)
    if offset is not None:
        found.root, found.offset = tracer.root, offset
    return found


def _offset(name: str, a: Number, b: Number) -> int | None:
    """Return the distance from the root of the one carried operand; None for two."""
    if isinstance(a, NumberTracer) and not isinstance(b, NumberTracer):
        if name in ("add", "sub"):
            return a.offset + (int(b) if name == "add" else -int(b))
    elif isinstance(b, NumberTracer) and not isinstance(a, NumberTracer) and name == "add":
        return b.offset + int(a)
    return None


def _product(a: Bounds, b: Bounds) -> Bounds:
    corners = [x * y for x in a for y in b]
    return min(corners), max(corners)


def _quotient(a: Bounds, b: Bounds) -> Bounds:
    corners = [x // y for x in a for y in b]
    return min(corners), max(corners)


def _remainder(a: Bounds, b: Bounds) -> Bounds:
    if b[0] < 0:
        return b[0] + 1, 0
    return a if a[0] >= 0 and a[1] < b[0] else (0, b[1] - 1)


_ARITHMETIC: dict[str, Callable[[Bounds, Bounds], Bounds]] = {
    "add": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "sub": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "mul": _product,
    "floordiv": _quotient,
    "mod": _remainder,
}
_NEGATED = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}
_MIRRORED = {"lt": "gt", "gt": "lt", "ge": "le", "le": "ge", "eq": "eq", "ne": "ne"}


def _narrowed(name: str, other: Bounds, own: Bounds) -> Bounds:
    """The bounds of a number of which a comparison with another one is true."""
    low, high = other
    if name == "ne":
        if low == high:
            return own[0] + (own[0] == low), own[1] - (own[1] == low)
        return own
    allowed = {
        "lt": (own[0], high - 1),
        "le": (own[0], high),
        "gt": (low + 1, own[1]),
        "ge": (low, own[1]),
        "eq": (low, high),
    }
    return intersect(own, allowed[name])


def _compared(name: str, a: NumberTracer, b: Number) -> Any:
    """Compare two numbers."""
    for x in (a, b):
        if isinstance(x, NumberTracer) and x.kind is not int:
            x.concrete("a comparison, for which an array has too few bits,")
    if isinstance(b, float):
        if not math.isfinite(b):
            return getattr(operator, name)(0, b)
        if name in ("eq", "ne") and not b.is_integer():
            return name == "ne"
        b = math.ceil(b) if name in ("lt", "ge") else math.floor(b)
    if not isinstance(b, NumberTracer) and intersect((b, b), widest()) != (b, b):
        a.concrete(f"a comparison with {b}")
    array = getattr(operator, name)(_array(a), _array(b))
    found = NumberTracer(array, a.variable, bool, widest())
    found.comparison = name, a, b
    return found


def _define(name: str, compute: Callable[..., Any], reflects: bool) -> None:
    """Define an operator: that of numbers, if both operands are, or else that of arrays."""
    forward, backward = f"__{name}__", f"__r{name}__"

    def of_self(self: NumberTracer, other: Any) -> Any:
        if _is_number(other):
            return compute(name, self, other)
        return getattr(_array(self), forward)(other)

    def of_other(self: NumberTracer, other: Any) -> Any:
        if _is_number(other):
            return compute(name, other, self)
        return getattr(_array(self), backward)(other)

    setattr(NumberTracer, forward, of_self)
    if reflects:
        setattr(NumberTracer, backward, of_other)


def _refused(name: str, a: Number, b: Number) -> NoReturn:
    next(x for x in (a, b) if isinstance(x, NumberTracer)).concrete(name)


for _name in _ARITHMETIC:
    _define(_name, _computed, True)
_define("truediv", _computed, True)
for _name in ("pow", "divmod", "lshift", "rshift", "and", "or", "xor"):
    _define(_name, _refused, True)
for _name in _NEGATED:
    _define(_name, _compared, False)
