"""The batching rule of the primitive, one function per `vmap_method`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from jpyfunc._bodies.batch import Batch
from jpyfunc._bodies.body import Body
from jpyfunc._errors import UnsupportedError, see
from jpyfunc._primitive.primitive import Params, bind
from jpyfunc._types import Array

# The operands of the call of a batch, batch axes first, and its body.
BatchedCall = tuple[list[Array], Body]


def _py_func_batching(
    operands: Sequence[Array], dims: Sequence[int | None], *, params: Params
) -> tuple[Sequence[Array], list[int]]:
    """Bind one call for a whole batch.

    Args:
        operands: some with a batch axis.
        dims: the positions of these axes; None for an operand that all elements share.
        params: of the call for one element.

    Returns:
        The results, and the positions of their batch axes, which are all 0.

    Raises:
        UnsupportedError: the call is ordered, and a batch has no order.
    """
    if params.ordered:
        raise UnsupportedError(
            f"{params.name} has ordered=True and cannot be used under vmap, "
            "which defines no order of its elements. Drop ordered=True, or loop over the "
            "elements with jax.lax.map or jax.lax.scan." + see("An ordered call under vmap")
        )
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    batched = tuple(d is not None for d in dims)
    leading = [
        x if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(operands, dims, strict=True)
    ]
    new_operands, body = BATCHERS[params.vmap_method](params.body, leading, size, batched)
    results = bind(new_operands, dataclasses.replace(params, body=body))
    return results, [0] * len(results)


def _sequential(
    body: Body, operands: list[Array], size: int, batched: tuple[bool, ...]
) -> BatchedCall:
    """Run the body once per element."""
    return operands, Batch.of(body, size, batched, by_branch=False)


def _by_branch(
    body: Body, operands: list[Array], size: int, batched: tuple[bool, ...]
) -> BatchedCall:
    """Run the body once per path that elements take through it."""
    return operands, Batch.of(body, size, batched, by_branch=True)


def _expand_dims(
    body: Body, operands: list[Array], size: int, batched: tuple[bool, ...]
) -> BatchedCall:
    """Run the body once on the whole batch; shared operands get an axis of length 1."""
    if isinstance(body, Batch) or not body.is_primal:
        return _broadcast_all(body, operands, size, batched)
    expanded = [
        x if b else jnp.expand_dims(x, 0) for x, b in zip(operands, batched, strict=True)
    ]
    return expanded, body.widen(size, batched)


def _broadcast_all(
    body: Body, operands: list[Array], size: int, batched: tuple[bool, ...]
) -> BatchedCall:
    """Run the body once on the whole batch; shared operands are repeated along its axis."""
    ticket = None if isinstance(body, Batch) else body.ticket_index
    if isinstance(body, Batch) or (ticket is not None and not batched[ticket]):
        # The tape is that of one element: `jax.vmap` is over its tangents or cotangents
        # alone, as in `jax.jacrev`.
        return _sequential(body, operands, size, batched)
    repeated = [
        x if b else jnp.broadcast_to(x, (size, *jnp.shape(x)))
        for x, b in zip(operands, batched, strict=True)
    ]
    return repeated, body.widen(size, (True,) * len(batched))


BATCHERS = {
    "by_branch": _by_branch,
    "sequential": _sequential,
    "expand_dims": _expand_dims,
    "broadcast_all": _broadcast_all,
}
