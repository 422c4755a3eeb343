"""Custom derivative rules, which run on the host, on NumPy arrays.

A user gives `fwd` and `bwd` with the signatures of `jax.custom_vjp`, or `jvp` with that of
`jax.custom_jvp`. The functions here go from flat operands, tangents and cotangents to the
arguments of the rules, and check what these return.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray

from jpyfunc._bodies.blocks import by_block
from jpyfunc._bodies.steps import Steps
from jpyfunc._bodies.user_function import UserFunction, read_only
from jpyfunc._conversion import as_array, can_cast, cast
from jpyfunc._errors import ResultError, not_linear, see
from jpyfunc._executors.tasks import UserCall
from jpyfunc._limits import LINEARITY_TOLERANCE
from jpyfunc._types import Array, Avals, Indices


class RuleResiduals:
    """The residuals that `fwd` returned, cached in the place of a tape.

    Attributes:
        values: any Python objects, one for each block of the batch that `fwd` took.
        subset: None, as for a tape of one element: rules never run by branch.
    """

    subset = None

    def __init__(self, values: dict[int, Any]) -> None:
        self.values = values

    def arrays(self) -> Iterator[Any]:
        """Everything that the residuals hold, as far as JAX can flatten them."""
        for value in self.values.values():
            try:
                yield from jax.tree.leaves(value)
            except Exception:  # noqa: BLE001 - from a user's pytree, or keys without order
                yield value


def apply_function(function: UserFunction, operands: Sequence[Array]) -> Steps[list[Any]]:
    """Call the function itself, and check what it returns."""
    return by_block(function, _apply_function, operands, function.out_avals)


def _apply_function(
    function: UserFunction, _: int, operands: Sequence[Any]
) -> Steps[list[Any]]:
    args, kwargs = function.arguments(operands)
    (result,) = yield [UserCall(function.callable, args, kwargs)]
    return function.checked(result, function.label)


def apply_fwd(
    function: UserFunction, operands: Sequence[Array]
) -> Steps[tuple[list[Any], RuleResiduals]]:
    """Apply the forward rule; return the results and the residuals."""
    residuals: dict[int, Any] = {}

    def apply(
        function: UserFunction, block: int, operands: Sequence[Any]
    ) -> Steps[list[Any]]:
        args, kwargs = function.arguments(operands)
        (result,) = yield [UserCall(function.rule("fwd"), args, kwargs)]
        if not isinstance(result, tuple) or len(result) != 2:
            raise ResultError(
                f"{function.label}: expected its fwd to return a pair (result, residuals), "
                f"got {_description(result)}. Write return result, residuals."
                + see("A rule that returns something else")
            )
        residuals[block] = _owned(result[1])
        return function.template.check(result[0], f"{function.label}: fwd")

    values = yield from by_block(function, apply, operands, function.out_avals)
    return values, RuleResiduals(residuals)


def _owned(residuals: Any) -> Any:
    """Copy the arrays that the user may write to before the backward rule reads them.

    A rule may fill one buffer in each iteration of a loop, whose pullbacks come later. Only
    arrays in tuples, lists and dicts are copied: any other object is the user's.
    """
    if isinstance(residuals, np.ndarray):
        return residuals.copy() if residuals.flags.writeable else residuals
    if type(residuals) in (tuple, list):
        return type(residuals)(map(_owned, residuals))
    if type(residuals) is dict:
        return {key: _owned(value) for key, value in residuals.items()}
    return residuals


def apply_bwd(
    function: UserFunction,
    residuals: RuleResiduals,
    of: Indices,
    cotangents: Sequence[Array],
    wrt: Indices,
) -> Steps[list[Array]]:
    """Apply the backward rule.

    Args:
        function: whose rule it is.
        residuals: those that the forward rule left.
        of: the results that have a cotangent; it is zero for the others.
        cotangents: one per entry of `of`.
        wrt: the operands whose cotangents are wanted.

    Returns:
        One cotangent per entry of `wrt`.
    """

    def apply(function: UserFunction, block: int, bars: Sequence[Any]) -> Steps[list[Any]]:
        bars = _with_zero_tangents(function.out_avals, of, bars)
        y_bar = jax.tree.unflatten(function.template.tree, bars)
        (result,) = yield [
            UserCall(function.rule("bwd"), (residuals.values[block], y_bar), {})
        ]
        return _checked_cotangents(function, result, wrt)

    out_avals = tuple(function.in_avals[i].to_tangent_aval() for i in wrt)
    return by_block(function, apply, cotangents, out_avals)


def _checked_cotangents(function: UserFunction, result: Any, wrt: Indices) -> list[Array]:
    """Check what the backward rule returned; give the cotangents of operands `wrt`."""
    where = f"{function.label}: bwd"
    trees = _positional(function, range(len(function.in_avals)))
    if not isinstance(result, tuple | list) or len(result) != len(trees):
        raise ResultError(
            f"{where}: expected a tuple of {len(trees)} cotangents, one per argument, got "
            f"{_description(result)}. Return ({', '.join('g' * len(trees))},), with None "
            "for an argument that needs none." + see("A rule that returns something else")
        )
    found: dict[int, Any] = {}
    for number, (numbers, cotangent) in enumerate(zip(trees, result, strict=True)):
        if cotangent is None:
            continue
        leaves, tree = jax.tree.flatten(cotangent, is_leaf=_is_none)
        places, expected = jax.tree.flatten(numbers, is_leaf=_is_none)
        if tree != expected:
            raise ResultError(
                f"{where}: expected result[{number}] to have the structure of the "
                f"argument, {expected}, got {tree}. Write None for a leaf that needs none."
                + see("A rule that returns something else")
            )
        found |= {
            place: leaf
            for place, leaf in zip(places, leaves, strict=True)
            if type(place) is int and leaf is not None
        }
    return [
        _checked(found.get(i), function.in_avals[i], f"{where}: operand {i}") for i in wrt
    ]


def apply_jvp(
    function: UserFunction,
    operands: Sequence[Array],
    wrt: Indices,
    tangents: Sequence[Array],
    of: Indices,
) -> Steps[list[Array]]:
    """Apply the JVP rule.

    Args:
        function: whose rule it is.
        operands: the primals.
        wrt: the operands that have a tangent; it is zero for the others.
        tangents: one per entry of `wrt`.
        of: the results whose tangents are wanted.

    Returns:
        One tangent per entry of `of`.
    """
    count = len(operands)

    def apply(function: UserFunction, _: int, arrays: Sequence[Any]) -> Steps[list[Any]]:
        dots = _with_zero_tangents(function.in_avals, wrt, arrays[count:])
        pair = [tuple(_positional(function, x)) for x in (arrays[:count], dots)]
        (result,) = yield [UserCall(function.rule("jvp"), tuple(pair), {})]
        return _checked_tangents(function, result, of)

    out_avals = tuple(function.out_avals[i].to_tangent_aval() for i in of)
    return by_block(function, apply, [*operands, *tangents], out_avals)


def _checked_tangents(function: UserFunction, result: Any, of: Indices) -> list[Array]:
    """Check what the JVP rule returned; give the tangents of results `of`."""
    where = f"{function.label}: jvp"
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise ResultError(
            f"{where}: expected a pair (result, tangent), got {_description(result)}. "
            "Write return result, tangent." + see("A rule that returns something else")
        )
    leaves = function.template.match(result[1], f"{where}: tangent")
    avals = function.out_avals
    return [_checked(leaves[i], avals[i], f"{where}: tangent {i}") for i in of]


def apply_transpose(
    function: UserFunction, wrt: Indices, of: Indices, operands: Sequence[Array]
) -> Steps[list[Array]]:
    """Transpose a linear function by its rules `fwd` and `bwd`.

    A linear function f(v) = A v is its own derivative at every v, so its VJP at any v is
    the transpose: bwd(residuals(v), c) = A^T c. We choose a v, at random so that it has no
    special structure.

    Nothing says that f is linear. If it is not, its VJP depends on v, and the result would
    silently depend on our choice. So we check at v that f(-2 v) = -2 f(v). The factor is a
    power of two: where f only adds and multiplies by constants, every rounding on the left
    is the same as on the right, and the check does not fail for a linear function. It fails
    for affine and bilinear functions, `abs`, `sort` and `round`. It passes for a function
    that is odd and homogeneous without being additive, such as the median.

    Args:
        function: what to transpose.
        wrt: the operands that the function is linear in.
        of: the results whose cotangents are given.
        operands: those of the function that are not in `wrt`, then the cotangents.

    Returns:
        One cotangent per entry of `wrt`.

    Raises:
        NotDifferentiableError: the function is not linear.
    """
    count = len(operands) - len(of)
    fixed = [i for i in range(len(function.in_avals)) if i not in wrt]
    known = dict(zip(fixed, operands[:count], strict=True))
    rng = np.random.default_rng(0)
    v = {}
    for i in wrt:
        aval = function.in_avals[i]
        sizes = rng.uniform(1.25, 1.5, aval.shape)  # `round` gives 1, and 3 for twice them
        v[i] = (sizes * rng.choice([-1, 1], aval.shape)).astype(aval.dtype)
    at_v = with_zeros(function.in_avals, known | v)
    results, residuals = yield from apply_fwd(function, at_v)
    scaled = known | {i: -2 * x for i, x in v.items()}
    at_scaled = with_zeros(function.in_avals, scaled)
    scaled_results = yield from apply_function(function, at_scaled)
    for i in of:
        once, other = (np.asarray(x[i], np.complex128) for x in (results, scaled_results))
        error = np.linalg.norm(other + 2 * once)
        if not error <= LINEARITY_TOLERANCE * np.linalg.norm(other):  # NaN fails, too
            raise not_linear(function.label, "it is not: f(-2 * v) differs from -2 * f(v)")
    return (yield from apply_bwd(function, residuals, of, operands[count:], wrt))


def with_zeros(avals: Avals, known: Mapping[int, Any]) -> list[Array]:
    """One value per aval, with zeros for those that are not known."""
    return [
        known[i] if i in known else np.zeros(aval.shape, aval.dtype)
        for i, aval in enumerate(avals)
    ]


def _positional(function: UserFunction, operands: Sequence[Any]) -> list[Array]:
    """The arguments in the order of the parameters, as the rules take and return them.

    Keyword arguments come after the positional ones.
    """
    args, kwargs = function.arguments(operands, as_is=True)
    try:
        names = [*inspect.signature(function.callable).parameters]
    except (TypeError, ValueError):  # a built-in function
        names = []
    order = sorted(kwargs, key=lambda n: names.index(n) if n in names else len(names))
    return [*args, *(kwargs[name] for name in order)]


def _is_none(x: Any) -> bool:
    return x is None


def _with_zero_tangents(
    avals: Avals, indices: Indices, values: Sequence[Any]
) -> list[Array]:
    """One tangent or cotangent per aval: `values` at `indices`, and zeros elsewhere."""
    given = dict(zip(indices, values, strict=True))
    return [
        read_only(given[i]) if i in given else _zero(aval) for i, aval in enumerate(avals)
    ]


def _zero(aval: ShapedArray) -> np.ndarray:
    aval = aval.to_tangent_aval()
    return np.zeros(aval.shape, aval.dtype)


def _checked(value: Any, aval: ShapedArray, where: str) -> np.ndarray:
    """A tangent or cotangent as an array with the shape and dtype of its primal."""
    if value is None:
        return _zero(aval)
    array, weak = as_array(value, lambda: where)
    array = np.asarray(array)
    if array.shape != aval.shape or not can_cast(array, weak, aval.dtype):
        raise ResultError(
            f"{where}: expected {aval.dtype}{list(aval.shape)}, got "
            f"{array.dtype}{list(array.shape)}. Return one of the shape and kind of what "
            "it is the derivative of, or None." + see("A rule that returns something else")
        )
    return np.asarray(cast(array, aval.dtype))


def _description(value: Any) -> str:
    kind = type(value).__name__
    return f"{kind} of {len(value)}" if isinstance(value, tuple | list) else kind
