"""Derivatives by the user's rules, which run on the host, on NumPy arrays."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jpyfunc._bodies.derived import Transpose, others
from jpyfunc._bodies.primal import (
    Primal,
    read_only,
)
from jpyfunc._conversion import as_array, can_cast, cast
from jpyfunc._errors import ResultError, not_linear
from jpyfunc._hashable import unwrapped
from jpyfunc._limits import (
    LINEARITY_TOLERANCE,
)


class RuleResiduals:
    """What a forward rule left for the backward rule: a run, to `kept`.

    Attributes:
        value: any Python object.
        subset: as of `Tape`.
    """

    subset = None

    def __init__(self, value: Any) -> None:
        self.value = value

    def arrays(self) -> Iterator[Any]:
        """What it consists of, as far as JAX can take it apart."""
        try:
            yield from jax.tree.leaves(self.value)
        except Exception:  # noqa: BLE001 - from a method of the user's, or keys without order
            yield self.value


def forward(primal: Primal, operands: Sequence[Any]) -> tuple[list[Any], RuleResiduals]:
    """Results and residuals of the forward rule."""
    args, kwargs = primal.arguments(operands)
    result = unwrapped(primal.rules.fwd)(*args, **kwargs)
    if not isinstance(result, tuple) or len(result) != 2:
        raise ResultError(
            f"{primal.label}: expected its fwd to return a pair (result, residuals), got "
            f"{_what(result)}. Write return result, residuals."
        )
    values = primal.template.check(result[0], f"{primal.label}: fwd")
    return values, RuleResiduals(_owned(result[1]))


def _owned(residuals: Any) -> Any:
    """`residuals`, without arrays that the user may write to before they are used.

    A rule may fill one buffer in each iteration of a loop, whose pullbacks come later. What
    is no array, tuple, list or dict is the user's object, and stays that.
    """
    if isinstance(residuals, np.ndarray):
        return residuals.copy() if residuals.flags.writeable else residuals
    if type(residuals) in (tuple, list):
        return type(residuals)(map(_owned, residuals))
    if type(residuals) is dict:
        return {key: _owned(value) for key, value in residuals.items()}
    return residuals


def backward(
    primal: Primal,
    residuals: RuleResiduals,
    of: Sequence[int],
    cotangents: Sequence[Any],
    wrt: Sequence[int],
) -> list[Any]:
    """The cotangents of operands `wrt` by those of results `of`."""
    bars = _with_zeros(primal.out_avals, of, cotangents)
    x_bar = jax.tree.unflatten(primal.template.tree, bars)
    where = f"{primal.label}: bwd"
    result = unwrapped(primal.rules.bwd)(residuals.value, x_bar)
    trees = _arguments(primal, range(len(primal.in_avals)))
    if not isinstance(result, tuple | list) or len(result) != len(trees):
        raise ResultError(
            f"{where}: expected a tuple of {len(trees)} cotangents, one per argument, got "
            f"{_what(result)}. Return ({', '.join('g' * len(trees))},), with None for an "
            "argument that needs none."
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
            )
        found |= {
            place: leaf
            for place, leaf in zip(places, leaves, strict=True)
            if type(place) is int and leaf is not None
        }
    return [
        _checked(found.get(i), primal.in_avals[i], f"{where}: operand {i}") for i in wrt
    ]


def push(
    primal: Primal,
    operands: Sequence[Any],
    wrt: Sequence[int],
    tangents: Sequence[Any],
    of: Sequence[int],
) -> list[Any]:
    """The tangents of results `of` by those of operands `wrt`."""
    dots = _with_zeros(primal.in_avals, wrt, tangents)
    where = f"{primal.label}: jvp"
    arguments = [tuple(_arguments(primal, values)) for values in (operands, dots)]
    result = unwrapped(primal.rules.jvp)(*arguments)
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise ResultError(
            f"{where}: expected a pair (result, tangent), got {_what(result)}. Write "
            "return result, tangent."
        )
    leaves = primal.template.match(result[1], f"{where}: tangent")
    return [_checked(leaves[i], primal.out_avals[i], f"{where}: tangent {i}") for i in of]


def transpose(body: Transpose, operands: Sequence[Any]) -> list[Any]:
    """Cotangents of the operands `body.wrt` that a function is linear in, by its rules.

    A linear function f(v) = A v is its own derivative at any v, so that `bwd` pulls c back
    to A^T c, whatever v its residuals are of. Neither JAX nor the rules say that the
    function is linear, and for one that is not, the result would depend on that v, which
    nobody chose. So f(-2 v) = -2 f(v) is checked for one v, which rounds nothing where a
    function adds and multiplies. It holds for no affine or bilinear function, and for no
    `abs`, `sort` or `round`; what it cannot tell is a function such as the median.

    Args:
        body: the transpose, of the function or of its transpose.
        operands: of `body`.

    Raises:
        NotDifferentiableError: the function is not linear.
    """
    base = body.base
    if isinstance(base, Transpose):
        return _transpose_of_transpose(body, base, operands)
    primal, count = base.primal, len(operands) - len(body.of)
    known = dict(zip(others(base, body.wrt), operands[:count], strict=True))
    rng = np.random.default_rng(0)
    points = {}
    for i in body.wrt:
        aval = primal.in_avals[i]
        sizes = rng.uniform(1.25, 1.5, aval.shape)  # twice which rounds to 3
        points[i] = (sizes * rng.choice([-1, 1], aval.shape)).astype(aval.dtype)
    results, residuals = forward(primal, _values(primal, known | points))
    twice = primal(_values(primal, known | {i: -2 * x for i, x in points.items()}))
    for i in body.of:
        once, other = (np.asarray(x[i], np.complex128) for x in (results, twice))
        if not np.linalg.norm(other + 2 * once) <= LINEARITY_TOLERANCE * np.linalg.norm(
            other
        ):
            raise not_linear(primal.label, "it is not: f(-2 * v) differs from -2 * f(v)")
    return backward(primal, residuals, body.of, operands[count:], body.wrt)


def _transpose_of_transpose(
    body: Transpose, base: Transpose, operands: Sequence[Any]
) -> list[Any]:
    """The function itself, with zeros for the linear operands that are not given."""
    inner: Any = base.base
    fixed = others(inner, base.wrt)
    given = operands[len(operands) - len(body.of) :]
    known = dict(zip(fixed, operands[: len(fixed)], strict=True))
    known |= dict(zip((base.wrt[i] for i in body.of), given, strict=True))
    full = _values(inner, known)
    results = transpose(inner, full) if isinstance(inner, Transpose) else inner.primal(full)
    return [results[base.of[i - len(fixed)]] for i in body.wrt]


def _values(body: Any, known: dict[int, Any]) -> list[Any]:
    """The operands of `body`, with zeros for those that are not known."""
    return [
        known[i] if i in known else np.zeros(aval.shape, aval.dtype)
        for i, aval in enumerate(body.in_avals)
    ]


def _arguments(primal: Primal, operands: Sequence[Any]) -> list[Any]:
    """The arguments in the order of the parameters, keyword ones after the others."""
    args, kwargs = primal.arguments(operands, as_they_are=True)
    try:
        names = [*inspect.signature(unwrapped(primal.func)).parameters]
    except (TypeError, ValueError):  # built in
        names = []
    order = sorted(kwargs, key=lambda n: names.index(n) if n in names else len(names))
    return [*args, *(kwargs[name] for name in order)]


def _is_none(x: Any) -> bool:
    return x is None


def _with_zeros(
    avals: Sequence[Any], indices: Sequence[int], values: Sequence[Any]
) -> list[Any]:
    """Derivatives of all of `avals`: `values` at `indices`, and zeros elsewhere."""
    given = dict(zip(indices, values, strict=True))
    return [
        read_only(given[i]) if i in given else _zero(aval) for i, aval in enumerate(avals)
    ]


def _zero(aval: Any) -> np.ndarray:
    aval = aval.to_tangent_aval()
    return np.zeros(aval.shape, aval.dtype)


def _checked(value: Any, aval: Any, where: str) -> np.ndarray:
    """A derivative as an array like what it is the derivative of."""
    if value is None:
        return _zero(aval)
    array, weak = as_array(value, lambda: where)
    array = np.asarray(array)
    if array.shape != aval.shape or not can_cast(array, weak, aval.dtype):
        raise ResultError(
            f"{where}: expected {aval.dtype}{list(aval.shape)}, got "
            f"{array.dtype}{list(array.shape)}. Return one of the shape and kind of what "
            "it is the derivative of, or None."
        )
    return np.asarray(cast(array, aval.dtype))


def _what(value: Any) -> str:
    kind = type(value).__name__
    return f"{kind} of {len(value)}" if isinstance(value, tuple | list) else kind
