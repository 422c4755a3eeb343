"""Jaxprs of one iteration of a loop, and flags of their operands and results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval

from jpyfunc._types import Array

Arrays = list[jax.Array]
Flags = list[bool]


def trace(function: Callable[..., Sequence[Array]], *operands: Any) -> ClosedJaxpr:
    """Trace a function of arrays, of which `operands` are examples or avals."""
    return jax.make_jaxpr(function)(*operands)


def call(jaxpr: ClosedJaxpr, *operands: Array) -> Arrays:
    """Evaluate a jaxpr."""
    return list(jaxpr_as_fun(jaxpr)(*operands))


def without_dead_code(
    jaxpr: ClosedJaxpr, used: Sequence[bool], kept: bool | list[bool]
) -> tuple[Any, Flags]:
    """Leave of a jaxpr what its used results need, and the operands that are to be kept.

    Returns:
        The jaxpr, not closed, and which operands it has.
    """
    inner: Any = getattr(jaxpr, "jaxpr", jaxpr)  # one type since JAX 0.11
    pruned, operands = partial_eval.dce_jaxpr(inner, list(used), kept)
    return pruned, list(operands)


def needed(jaxpr: ClosedJaxpr, used: Sequence[bool]) -> Flags:
    """Whether each operand of a jaxpr is needed for the results that are used."""
    return without_dead_code(jaxpr, used, False)[1]


def fixpoint(flags: Sequence[bool], after: Callable[[Flags], Flags]) -> Flags:
    """Flag carries until an iteration flags no more."""
    now = list(flags)
    while True:
        more = either(now, after(now))
        if more == now:
            return now
        now = more


def either(first: Sequence[bool], second: Sequence[bool]) -> Flags:
    """Combine flags: what either of two sequences flags."""
    return [a or b for a, b in zip(first, second, strict=True)]


def pick(values: Sequence[Any], flags: Sequence[bool]) -> list[Any]:
    """The flagged among the values."""
    return [x for x, flag in zip(values, flags, strict=True) if flag]


def merge(
    flags: Sequence[bool], flagged: Sequence[Any], others: Sequence[Any]
) -> list[Any]:
    """Put the values that `pick` took back among the others."""
    a, b = iter(flagged), iter(others)
    return [next(a) if flag else next(b) for flag in flags]
