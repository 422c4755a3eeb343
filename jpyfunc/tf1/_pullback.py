r"""Pullbacks as hidden results of operations, so that no operation is computed twice.

An operation computes `y = f(x)`. Its first derivative needs a second result: the pullback
that `jax.vjp` returns beside `y`, whose residuals are arrays:

    f1: x -> y, P1          P1(y*) = x*

Differentiating a gradient again yields a cotangent of these residuals. It is pulled back by
a third result, the pullback of `f1`, and so on:

    f2: x -> y, P1, P2      P2(y*, P1*) = x*

Each of these evaluates `f` once. So a stateful call in `f` runs once for its values and all
derivatives, and the derivative of a random `y` is that of the `y` which is returned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from jpyfunc import _compat
from jpyfunc.tf1._apply import Compute, Indices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pullback:
    """A function from cotangents of results `of` to cotangents of inputs `wrt`.

    The cotangent of an array is an array. The cotangent of another pullback or of a list is
    a list with one array for each leaf that has a tangent.

    Attributes:
        vjp: the function that `jax.vjp` returned, on lists of leaves.
        wrt: indices of inputs.
        of: indices of results.
        inputs: for each of `wrt`, its aval if it is an array, else None.
        results: for each of `of`, the tangent avals of the leaves that have one.
        active: which of its own leaves depend on an input that a higher level is taken
            with respect to; None if there is no higher level.
    """

    vjp: Any
    wrt: Indices = dataclasses.field(metadata={"static": True})
    of: Indices = dataclasses.field(metadata={"static": True})
    inputs: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    results: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    active: tuple[bool, ...] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    def apply(self, of: Indices, cotangents: Sequence[Any], wrt: Indices) -> list[Any]:
        """Pull cotangents of results back to cotangents of inputs.

        Args:
            of: indices of the results whose cotangents are given; the others are zero.
            cotangents: one per entry of `of`.
            wrt: indices of the inputs whose cotangents are returned.
        """
        given = dict(zip(of, cotangents, strict=True))
        pulled = self.vjp(
            [
                jax.tree.leaves(given[i])[: len(avals)]
                if i in given
                # Not an array of zeros, which would reach the body: 0 * inf is not zero.
                else [ad.Zero(aval) for aval in avals]
                for i, avals in zip(self.of, self.results, strict=True)
            ]
        )
        found = dict(zip(self.wrt, zip(self.inputs, pulled, strict=True), strict=True))
        return [_restore(*found[i]) for i in wrt]


def _restore(aval: Any, cotangent: list[Any]) -> Any:
    """Return the cotangent of an input, given those of its leaves."""
    if aval is None:
        return cotangent
    # No leaf has a tangent if the input is an integer, which the graph may not have known.
    return cotangent[0] if cotangent else jnp.zeros(aval.shape, aval.dtype)


def with_pullback(compute: Compute, wrt: Indices, of: Indices) -> Compute:
    """Return `compute` with its `Pullback` as one more result."""

    def extended(inputs: Sequence[Any]) -> list[Any]:
        split = [_Leaves(inputs[i]) for i in wrt]

        def restricted(*leaves: list[Any]) -> tuple[list[list[Any]], list[Any]]:
            values = list(inputs)
            for i, own, new in zip(wrt, split, leaves, strict=True):
                values[i] = own.replace(new)
            results = [_activated(x, leaves) for x in compute(values)]
            return [_Leaves(results[i]).with_tangent for i in of], results

        primals = [own.with_tangent for own in split]
        leaves, vjp, results = jax.vjp(restricted, *primals, has_aux=True)
        pullback = Pullback(
            vjp,
            wrt,
            of,
            tuple(
                _aval(inputs[i]) if isinstance(inputs[i], jax.Array) else None for i in wrt
            ),
            tuple(
                tuple(jax.typeof(x).to_tangent_aval() for x in group) for group in leaves
            ),
        )
        return [*results, pullback]

    return extended


def _activated(result: Any, primals: Sequence[list[Any]]) -> Any:
    """Set `active` of a result that is a pullback of a lower level.

    The residuals of a stateful call include its inputs. A cotangent of an input that is not
    differentiated would require a derivative for which there is no tape.
    """
    if not isinstance(result, Pullback) or result.active is not None:
        return result
    # Higher levels are taken with respect to no other inputs than this one: see `lower`.
    tracers = [x for group in primals for x in group]
    return dataclasses.replace(
        result,
        active=tuple(
            bool(tracers) and _compat.is_of_trace_of(leaf, tracers[0])
            for leaf in jax.tree.leaves(result)
        ),
    )


class _Leaves:
    """The leaves of a value, of which those with a tangent can be replaced."""

    def __init__(self, value: Any) -> None:
        self._leaves, self._tree = jax.tree.flatten(value)
        active = getattr(value, "active", None) or [True] * len(self._leaves)
        self._positions = [
            i
            for i, x in enumerate(self._leaves)
            if active[i] and jnp.issubdtype(x.dtype, jnp.inexact)
        ]

    @property
    def with_tangent(self) -> list[Any]:
        return [self._leaves[i] for i in self._positions]

    def replace(self, with_tangent: list[Any]) -> Any:
        leaves = list(self._leaves)
        for i, leaf in zip(self._positions, with_tangent, strict=True):
            leaves[i] = leaf
        return jax.tree.unflatten(self._tree, leaves)


def _aval(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
