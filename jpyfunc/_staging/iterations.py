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

_ATOMS = (bool, int, str, bytes, type(None), type, np.dtype)


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
        if (
            len(a.operands) != len(b.operands)
            or a.avals != b.avals
            or not all(map(self.is_same_value, a.operands, b.operands))
            or not is_same(a.signature, b.signature)
        ):
            return False
        for i in range(len(a.avals)):
            self.counterparts[a.first + i] = ValueRef(b.first + i)
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


def is_same(a: Any, b: Any, assumed: frozenset[tuple[int, int]] = frozenset()) -> bool:
    """Tell whether two parameters, constants or parts of them do the same.

    Args:
        a: the one.
        b: the other.
        assumed: ids of functions and constants that are being compared.
    """
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, Tracer):
        return False
    if isinstance(a, _ATOMS):
        return bool(a == b)
    if isinstance(a, np.generic | np.ndarray | jax.Array):
        return jax.typeof(a) == jax.typeof(b) and has_same_bits(a, b)
    if isinstance(a, float | complex):
        return np.asarray(a).tobytes() == np.asarray(b).tobytes()
    inner = functools.partial(is_same, assumed=assumed | {(id(a), id(b))})
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(inner, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(inner(a[k], b[k]) for k in a)
    if _compat.is_jaxpr(a):
        return inner(content_of(a), content_of(b))
    if (id(a), id(b)) in assumed:
        return True
    if isinstance(a, Constant):
        return inner((a.index, a.equation), (b.index, b.equation))
    if isinstance(a, Equation):
        return inner((a.signature, a.avals, a.operands), (b.signature, b.avals, b.operands))
    if isinstance(a, types.CellType):
        return inner(_contents(a), _contents(b))
    if isinstance(a, types.FunctionType):
        return a.__globals__ is b.__globals__ and inner(_function(a), _function(b))
    if isinstance(a, types.CodeType | frozenset | set):
        return a == b
    if isinstance(a, types.MethodType):
        return inner((a.__func__, a.__self__), (b.__func__, b.__self__))
    if isinstance(a, functools.partial):
        return inner((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    if isinstance(a, Trace) or type(a) is object or _is_store(a):
        return True  # where a function was traced, and leaves what it finds when called
    if hasattr(a, "call_wrapped"):  # a function as JAX wraps it, with custom rules
        return inner(_wrapped(a), _wrapped(b))
    # What JAX and NumPy make compares by all that it is, or by its identity.
    is_library = type(a).__module__.partition(".")[0] in ("jax", "jaxlib", "numpy")
    return is_library and type(a).__eq__ is not object.__eq__ and bool(a == b)


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
