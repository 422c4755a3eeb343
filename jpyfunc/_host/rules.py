"""Derivatives by the user's rules, which run on the host, on NumPy arrays."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jpyfunc._body.primal import Primal, read_only, unwrapped
from jpyfunc._body.tout import as_array, castable
from jpyfunc._errors import ResultError


class Residuals:
    """What a forward rule left for the backward rule: a run, to `kept`.

    Attributes:
        value: any Python object.
        part: as of `Record`.
    """

    part = None

    def __init__(self, value: Any) -> None:
        self.value = value

    def arrays(self) -> Iterator[Any]:
        """What it consists of, as far as JAX can take it apart."""
        try:
            yield from jax.tree.leaves(self.value)
        except Exception:  # noqa: BLE001 - from a method of the user's, or keys without order
            yield self.value


def forward(primal: Primal, operands: Sequence[Any]) -> tuple[list[Any], Residuals]:
    """Results and residuals of the forward rule."""
    args, kwargs = primal.arguments(operands)
    result = unwrapped(primal.rules.fwd)(*args, **kwargs)
    if not isinstance(result, tuple) or len(result) != 2:
        raise ResultError(
            f"{primal.label}: expected its fwd to return a pair (result, residuals), got "
            f"{_what(result)}. Write return result, residuals."
        )
    return primal.template.check(result[0], f"{primal.label}: fwd"), Residuals(result[1])


def backward(
    primal: Primal,
    residuals: Residuals,
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
    if array.shape != aval.shape or not castable(array, weak, aval.dtype):
        raise ResultError(
            f"{where}: expected {aval.dtype}{list(aval.shape)}, got "
            f"{array.dtype}{list(array.shape)}. Return one of the shape and kind of what "
            "it is the derivative of, or None."
        )
    return array.astype(aval.dtype, copy=False)


def _what(value: Any) -> str:
    kind = type(value).__name__
    return f"{kind} of {len(value)}" if isinstance(value, tuple | list) else kind
