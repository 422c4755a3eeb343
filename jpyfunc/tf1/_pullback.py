r"""Pullbacks as hidden results of operations, so that no operation is computed twice.

An operation computes `y = f(x)`. What its first derivative needs is a second result,
the pullback that `jax.vjp` returns beside `y`, whose residuals are arrays:

    f1: x -> y, P1          P1(y*) = x*

Where a gradient is differentiated again, a cotangent of these residuals arises. It is
pulled back by a third result, the pullback of `f1`, and so on:

    f2: x -> y, P1, P2      P2(y*, P1*) = x*

In each, `f` is evaluated once: a stateful call in it runs once for all its values and
derivatives, and the derivative of a random `y` is that of the `y` which is returned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from jpyfunc import _compat

Compute = Callable[[Sequence[Any]], list[Any]]
Indices = tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pullback:
    """A function from cotangents of results `of` to cotangents of inputs `wrt`.

    The cotangent of an array is an array; that of another pullback, or of a list, is a
    list, with one array for each of its leaves that takes a cotangent.

    Attributes:
        vjp: what `jax.vjp` returned, on lists of leaves.
        wrt: indices of inputs.
        of: indices of results.
        inputs: the aval of each of `wrt` that is an array, None for the others.
        results: tangent avals of the leaves that have one, for each of `of`.
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

    def pull(self, of: Indices, cotangents: Sequence[Any], wrt: Indices) -> list[Any]:
        """Apply it.

        Args:
            of: the results whose cotangents are given; those of the others are zero.
            cotangents: one per entry of `of`.
            wrt: the inputs whose cotangents are wanted.
        """
        given = dict(zip(of, cotangents, strict=True))
        pulled = self.vjp(
            [
                jax.tree.leaves(given[i])[: len(avals)]
                if i in given
                # An array of zeros would reach the body, and 0 * inf is not zero.
                else [ad.Zero(aval) for aval in avals]
                for i, avals in zip(self.of, self.results, strict=True)
            ]
        )
        found = dict(zip(self.wrt, zip(self.inputs, pulled, strict=True), strict=True))
        return [_restore(*found[i]) for i in wrt]


def _restore(aval: Any, cotangent: list[Any]) -> Any:
    """Make the cotangent of an input from those of its leaves."""
    if aval is None:
        return cotangent
    # An integer whose dtype was not known when the graph was built has no tangent.
    return cotangent[0] if cotangent else jnp.zeros(aval.shape, aval.dtype)


def with_pullback(compute: Compute, wrt: Indices, of: Indices) -> Compute:
    """Return `compute` with one more result, its `Pullback`."""

    def extended(inputs: Sequence[Any]) -> list[Any]:
        parts = [_Leaves(inputs[i]) for i in wrt]

        def restricted(*leaves: list[Any]) -> tuple[list[list[Any]], list[Any]]:
            values = list(inputs)
            for i, part, new in zip(wrt, parts, leaves, strict=True):
                values[i] = part.replace(new)
            results = [_activated(x, leaves) for x in compute(values)]
            return [_Leaves(results[i]).tangible for i in of], results

        primals = [part.tangible for part in parts]
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
    """Set `active` of a result of a lower level, if it is a pullback.

    Residuals hold the inputs of a stateful call. A cotangent of one that nobody
    differentiates would ask for a derivative that its tape does not have.
    """
    if not isinstance(result, Pullback) or result.active is not None:
        return result
    # Levels above are taken with respect to no more than this one: see `lower`.
    tracers = [x for group in primals for x in group]
    return dataclasses.replace(
        result,
        active=tuple(
            bool(tracers) and _compat.is_of_trace_of(leaf, tracers[0])
            for leaf in jax.tree.leaves(result)
        ),
    )


class _Leaves:
    """The leaves of a value, among which those that have a tangent can be replaced."""

    def __init__(self, value: Any) -> None:
        self._leaves, self._tree = jax.tree.flatten(value)
        active = getattr(value, "active", None) or [True] * len(self._leaves)
        self._positions = [
            i
            for i, x in enumerate(self._leaves)
            if active[i] and jnp.issubdtype(x.dtype, jnp.inexact)
        ]

    @property
    def tangible(self) -> list[Any]:
        return [self._leaves[i] for i in self._positions]

    def replace(self, tangible: list[Any]) -> Any:
        leaves = list(self._leaves)
        for i, leaf in zip(self._positions, tangible, strict=True):
            leaves[i] = leaf
        return jax.tree.unflatten(self._tree, leaves)


def _aval(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
