"""Operations of a body on many elements of a batch at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from jax.extend.core import set_current_trace

from jpyfunc import _compat
from jpyfunc._interpreters.jaxpr_queries import (
    calls_host,
    cost_in_bytes,
    differs_in_batches,
    draws_exactly,
    host_call,
)
from jpyfunc._interpreters.operations import CompiledOperation, Function
from jpyfunc._limits import MAX_LOOPED_BYTES
from jpyfunc._types import Array

Axes = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class BatchedOperation:
    """An operation on many elements at once.

    Attributes:
        run: the function, compiled, whose results all have a leading axis; None if there
            is none.
        nbytes: of its largest array for one element, or of one that takes as long.
        refusal: why there is none, or "".
    """

    run: Callable[..., list[jax.Array]] | None
    nbytes: int = 0
    refusal: str = ""


def batch_operation(operation: CompiledOperation, axes: Axes) -> BatchedOperation:
    """The operation on many elements at once.

    Args:
        operation: on one element.
        axes: for each operand, 0 if it has a leading axis, or None.
    """
    known = operation.batches.get(axes)
    if known is None:
        known = operation.batches[axes] = _batched(operation, axes)
    return known


def _batched(operation: CompiledOperation, axes: Axes) -> BatchedOperation:
    function = jax.vmap(lambda *operands: operation.call(*operands), axes)
    avals: list[jax.ShapeDtypeStruct] = [
        aval if axis is None else aval.update(shape=(2, *aval.shape))
        for aval, axis in zip(operation.avals, axes, strict=True)
    ]
    with set_current_trace(_compat.eval_trace):
        try:
            many = jax.make_jaxpr(function)(*avals)
        except Exception as error:  # noqa: BLE001 - it may have no batching rule
            return BatchedOperation(None, refusal=first_line(error))
        one = jax.make_jaxpr(operation.call)(*operation.avals)
    if calls_host(many):
        name = host_call(many) or "an effect"
        return BatchedOperation(None, refusal=f"{name} calls Python")
    if name := differs_in_batches(one):
        why = f"{name} does something else, or more, for many elements at once"
        return BatchedOperation(None, refusal=why)
    nbytes = cost_in_bytes(one)
    if draws_exactly(one):
        function = _looped_where_small(operation, function, axes, nbytes)
    return BatchedOperation(jax.jit(function), nbytes)


def _looped_where_small(
    operation: CompiledOperation, function: Function, axes: Axes, nbytes: int
) -> Function:
    """Replace `function` on a CPU by a loop over the rows, while these are few and small.

    XLA compiles the random bits of many keys much more slowly than a loop over keys.
    """
    one = jax.custom_batching.sequential_vmap(lambda *operands: operation.call(*operands))
    loop = jax.vmap(one, axes)

    def call(*operands: jax.Array) -> list[Array]:
        if len(operands[axes.index(0)]) * nbytes > MAX_LOOPED_BYTES:
            return function(*operands)
        return jax.lax.platform_dependent(*operands, cpu=loop, default=function)

    return call


def first_line(error: BaseException) -> str:
    """Return the first line of an exception, shortened for a table."""
    try:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
    except Exception:  # noqa: BLE001 - from a user's `__str__`
        text = type(error).__name__
    return text if len(text) < 120 else f"{text[:117]}..."
