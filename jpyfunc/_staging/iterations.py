"""Tell whether two iterations of a loop, or other records, are exactly the same."""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Trace, Tracer

from jpyfunc import _compat
from jpyfunc._staging.equations import (
    Atom,
    BranchPoint,
    Constant,
    Equation,
    ValueRef,
    content_of,
    has_same_bits,
    is_one,
)

# Two runs of a body are compared to find out that it is no function of its operands, and
# what is new in each run and yet no different is taken for equal: see `equations`. That
# would not do here. What an iteration does depends on the state that the one before left,
# as far as that is seen, and on what is not seen. Whatever differs between two iterations
# may do so because of that. So they are the same only if each operation has the same
# primitive, parameters and constants, to the bit, and each operand was computed at the
# same place of the iteration, or is carried at the same place, or is older than the loop.

_ATOMS = bool | int | str | bytes | type(None) | type | np.dtype


class Correspondence:
    """A comparison of two records of the same operations, value by value.

    Attributes:
        counterparts: the values of the second record, by the number of that of the first.
    """

    def __init__(self) -> None:
        """Begin."""
        self.counterparts: dict[int, Atom] = {}

    def are_same_equations(
        self, first: Sequence[Equation], second: Sequence[Equation]
    ) -> bool:
        """Tell whether operations are the same; then their results correspond, too."""
        return len(first) == len(second) and all(map(self._is_same_equation, first, second))

    def _is_same_equation(self, a: Equation, b: Equation) -> bool:
        if not is_same_operation(a, b) or not all(
            map(self.is_same_value, a.operands, b.operands)
        ):
            return False
        self.counterparts.update(zip(a.numbers, map(ValueRef, b.numbers), strict=True))
        return True

    def is_same_value(self, a: Atom, b: Atom) -> bool:
        """Tell whether two values of the two records correspond."""
        if not isinstance(a, ValueRef):
            return is_same(a, b)
        if a.number in self.counterparts:
            return is_one(self.counterparts[a.number], b)
        return self.is_same_older_value(a, b)

    def is_same_older_value(self, a: ValueRef, b: Atom) -> bool:
        """Tell whether a value from before the first record corresponds to another one."""
        raise NotImplementedError


class IterationPair(Correspondence):
    """A comparison of one iteration of a run with the next.

    What is older than both corresponds to itself.
    """

    def __init__(self, oldest: int) -> None:
        """Begin.

        Args:
            oldest: number of the first value that the first iteration may make.
        """
        super().__init__()
        self._oldest = oldest

    def pair(self, first: Sequence[Atom], second: Sequence[Atom]) -> bool:
        """Let values that are carried into the iterations correspond.

        Returns:
            Whether each of them has one counterpart.
        """
        for a, b in zip(first, second, strict=True):
            if not isinstance(a, ValueRef):
                if not self.is_same_value(a, b):
                    return False
            elif not is_one(self.counterparts.setdefault(a.number, b), b):
                return False
        return True

    def is_same_part(self, first: BranchPoint, second: BranchPoint) -> bool:
        """Tell whether the same was done before two branch points, and is tested there."""
        return self.are_same_equations(
            first.equations, second.equations
        ) and self.is_same_value(first.test, second.test)

    def is_same_older_value(self, a: ValueRef, b: Atom) -> bool:
        return a.number < self._oldest and a == b


def is_same_operation(a: Equation, b: Equation) -> bool:
    """Tell whether two operations differ at most in what they take."""
    return (
        a.avals == b.avals
        and len(a.operands) == len(b.operands)
        and is_same(a.signature, b.signature)
    )


def is_same(a: Any, b: Any) -> bool:
    """Tell whether two parameters, constants or parts of them do the same."""
    # They may lead to themselves, and share many parts: each pair is compared
    # once. The pairs are kept, so that nothing else gets their ids.
    met: dict[tuple[int, int], tuple[Any, Any]] = {}
    waiting = [(a, b)]
    while waiting:
        pair = waiting.pop()
        key = id(pair[0]), id(pair[1])
        if pair[0] is pair[1] or key in met:
            continue
        met[key] = pair
        parts = _parts(*pair)
        if parts is None:
            return False
        waiting += zip(*parts, strict=True)
    return True


_SAME = (), ()


def _parts(a: Any, b: Any) -> tuple[Sequence[Any], Sequence[Any]] | None:
    """Return the parts of two values, which are the same if these are; else None."""
    if type(a) is not type(b) or isinstance(a, Tracer):
        return None
    if isinstance(a, _ATOMS | types.CodeType | frozenset | set):
        return _SAME if a == b else None
    if isinstance(a, np.generic | np.ndarray | jax.Array):
        return _SAME if jax.typeof(a) == jax.typeof(b) and has_same_bits(a, b) else None
    if isinstance(a, float | complex):
        return _SAME if np.asarray(a).tobytes() == np.asarray(b).tobytes() else None
    if isinstance(a, dict):
        return (list(a.values()), list(b.values())) if list(a) == list(b) else None
    first, second = _content(a), _content(b)
    if first is not None and second is not None:
        return (first, second) if len(first) == len(second) else None
    if isinstance(a, Trace) or type(a) is object or _is_store(a):
        return _SAME  # where a function was traced, and leaves what it finds when called
    # What JAX and NumPy make compares by all that it is, or by its identity.
    is_library = type(a).__module__.partition(".")[0] in ("jax", "jaxlib", "numpy")
    is_same_object = is_library and type(a).__eq__ is not object.__eq__ and bool(a == b)
    return _SAME if is_same_object else None


def _content(value: Any) -> Sequence[Any] | None:
    """Return all that a container, an operation or a function is made of."""
    if isinstance(value, list | tuple):
        return value
    if _compat.is_jaxpr(value):
        return content_of(value)
    if isinstance(value, Constant):
        return value.index, value.equation
    if isinstance(value, Equation):
        return value.signature, value.avals, value.operands
    if isinstance(value, types.CellType):
        return _contents(value)
    if isinstance(value, types.FunctionType):
        return id(value.__globals__), *_function(value)
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if hasattr(value, "call_wrapped"):  # a function as JAX wraps it, with custom rules
        return _wrapped(value)
    return None


def _function(value: Any) -> tuple[Any, ...]:
    return value.__code__, value.__closure__, value.__defaults__, value.__kwdefaults__


def _wrapped(function: Any) -> tuple[Any, ...]:
    return function.f, function.transforms, function.params, function.in_type


def _is_store(value: Any) -> bool:
    return _compat.Store is not None and isinstance(value, _compat.Store)


def _contents(cell: Any) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()
