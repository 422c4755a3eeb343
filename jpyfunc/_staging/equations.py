"""The record of an abstract run: its operations and branch points, and their comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Literal, Primitive, jaxprs_in_params, set_current_trace
from jax.typing import ArrayLike

from jpyfunc import _compat
from jpyfunc._limits import MAX_CONSTANT_SIZE


@dataclasses.dataclass(frozen=True, slots=True)
class ValueRef:
    """An operand of the body, or a result of one of its operations.

    Attributes:
        number: its position among the values of the run. The operands of the body come
            first, then the results of the operations as they are recorded.
    """

    number: int


Atom: TypeAlias = "ValueRef | Constant | ArrayLike"  # what an operation takes


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Equation:
    """One recorded operation.

    Attributes:
        signature: the primitive and its parameters, or the jaxpr. Runs are compared by it.
        avals: those of the results.
        call: computes the list of results from the operands.
        operands: `ValueRef`s, `Constant`s, arrays and Python numbers.
        first: number of the first result.
        size: how many operations of JAX it stands for.
        depth: of an equation without `ValueRef`s, the length of the longest chain of
            equations that leads to it.
    """

    signature: tuple[Any, ...]
    avals: tuple[ShapedArray, ...]
    call: Callable[..., Sequence[Any]]
    operands: tuple[Atom, ...]
    first: int
    size: int
    depth: int = 1

    @property
    def numbers(self) -> range:
        """The numbers of the results."""
        return range(self.first, self.first + len(self.avals))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """An array that does not depend on the operands, and the equation that computes it.

    The program computes it again, in the place of holding its data.

    Attributes:
        equation: computes it.
        index: its position among the results.
        aval: its shape and dtype.
    """

    equation: Equation
    index: int
    aval: ShapedArray


@dataclasses.dataclass(frozen=True, slots=True)
class BranchPoint:
    """A truth test of an abstract value, where a path divides.

    Attributes:
        test: the value that is tested.
        place: where the body tests it, as ` at FILE:LINE`, or "".
        line: the line of source there.
        answer: the branch that the run took.
        equations: the operations since the branch point before.
    """

    test: Atom
    place: str
    line: str
    answer: bool
    equations: list[Equation]


# The paths of a body share what comes before the branch point where they part: the tree
# holds the equations of the first run that came there. Later runs must have done the same
# up to that point, for beyond it they refer to values by number, and a number means the
# value that the first run gave it. A body that draws from Python's `random`, counts its
# calls, or fills a cache at the first call may do something else the second time. Its
# numbers would then mean other values, and the program would silently be wrong. So the
# records are compared, and where they differ, the body is called.
#
# The comparison takes for equal what is new in each run and yet no different:
# - Functions, and all other objects that compare by identity: a body that calls
#   `jax.jit(lambda ...)` makes a new function each time. What such a function does is
#   compared as far as it is a jaxpr.
# - Variables of jaxprs, which are numbered in the order in which they appear.
# - Arrays of more than `MAX_CONSTANT_SIZE` elements with one aval. Comparing their data
#   would take as long as computing it. An array that is computed is compared by the
#   operation that computes it.


def is_alike(a: Any, b: Any) -> bool:
    """Tell whether the records of two runs are the same, or parts of them."""
    if a is b:
        return True
    if isinstance(a, Constant | np.ndarray | jax.Array):
        # A `Constant` may meet an array: what a body caches is computed in one run, and
        # found in the next.
        return isinstance(b, Constant | np.ndarray | jax.Array) and _is_alike_array(a, b)
    if type(a) is not type(b) or isinstance(a, Primitive):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_alike, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_alike(a[k], b[k]) for k in a)
    if isinstance(a, Equation):
        own = (a.signature, a.avals, a.operands), (b.signature, b.avals, b.operands)
        return is_alike(*own)
    if _compat.is_jaxpr(a):
        return is_alike(content_of(a), content_of(b))
    # Two of one type that differ as objects: each run has made its own, as said above.
    is_function = callable(a) or hasattr(a, "call_wrapped")
    if is_function or type(a).__eq__ is object.__eq__:
        return True
    return bool(a == b) or (a != a and b != b)  # NaN


def is_one(a: Atom, b: Atom) -> bool:
    """Tell whether two atoms are one value of one run."""
    return a is b or (isinstance(a, ValueRef) and isinstance(b, ValueRef) and a == b)


def _is_alike_array(a: Any, b: Any) -> bool:
    a_aval, b_aval = (x.aval if isinstance(x, Constant) else jax.typeof(x) for x in (a, b))
    if a_aval != b_aval:
        return False
    if isinstance(a, Constant) and isinstance(b, Constant):
        # Not their operands: constants may share these, so that following them would visit
        # some exponentially often.
        x, y = a.equation, b.equation
        return is_alike((a.index, x.signature, x.avals), (b.index, y.signature, y.avals))
    if isinstance(a, Constant) or isinstance(b, Constant) or a.size > MAX_CONSTANT_SIZE:
        return True
    return has_same_bits(a, b)


def has_same_bits(a: Any, b: Any) -> bool:
    """Tell whether two arrays of one aval have the same data, to the bit."""
    with set_current_trace(_compat.eval_trace):
        is_key = jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
        data = [np.asarray(jax.random.key_data(x) if is_key else x) for x in (a, b)]
    return data[0].tobytes() == data[1].tobytes()


def content_of(jaxpr: Any) -> Any:
    """Return a jaxpr as nested lists, with numbers for its variables."""
    numbers: dict[int, int] = {}

    def atom(x: Any) -> Any:
        is_literal = isinstance(x, Literal)
        return x.val if is_literal else numbers.setdefault(id(x), len(numbers)), x.aval

    inner = getattr(jaxpr, "jaxpr", jaxpr)
    operands = [atom(x) for x in (*inner.constvars, *inner.invars)]
    eqns = [
        (eqn.primitive, eqn.params, [atom(x) for x in (*eqn.invars, *eqn.outvars)])
        for eqn in jaxpr.eqns
    ]
    results = [atom(x) for x in inner.outvars]
    return operands, eqns, results, [*getattr(jaxpr, "consts", [])]


@_compat.weakref_lru_cache
def operation_count(jaxpr: Any) -> int:
    """Count the operations in a jaxpr, each call of an inner jaxpr as what is in it."""
    return sum(
        sum(map(operation_count, jaxprs_in_params(eqn.params))) or 1 for eqn in jaxpr.eqns
    )
