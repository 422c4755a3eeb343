"""Batching rule, one function per `vmap_method`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jpyfunc import _compat
from jpyfunc._body.derived import Batch, Body, batch_of, ticket_of, widen
from jpyfunc._body.primal import Primal
from jpyfunc._errors import UnsupportedError
from jpyfunc._primitive.primitive import Params, StatefulEffect, bind

Batched = tuple[list[Any], Body]


def _py_func_batching(
    operands: Sequence[Any], dims: Sequence[Any], *, params: Params
) -> tuple[list[Any], list[int]]:
    """Make one host call of a whole batch.

    Args:
        operands: some with a batch axis.
        dims: where that is, None for an operand that all elements share.
        params: of the call for one element.

    Returns:
        The results, and 0 for each: their leading axis is the batch.

    Raises:
        UnsupportedError: the call is ordered, and a batch has no order.
    """
    if params.ordered:
        raise UnsupportedError(
            f"{params.name} has ordered=True and cannot be used under vmap, "
            "which defines no order of its elements. Drop ordered=True, or loop with "
            "jax.lax.map or jax.lax.scan."
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


def refusing_in_cond(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The batching rule of `cond`, which computes all branches where elements differ.

    Raises:
        UnsupportedError: a branch has a stateful call, which would run where not taken.
    """

    def batch(axis_data: Any, operands: Any, dims: Any, **params: Any) -> Any:
        if dims[0] is not None:
            _refuse_stateful(
                "cond or switch", "branches that it does not take", params["branches"]
            )
        return rule(axis_data, operands, dims, **params)

    return batch


def refusing_in_while(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The batching rule of `while_loop`, which turns until the last element is done.

    Raises:
        UnsupportedError: elements may end at different turns, and it has a stateful call.
    """

    def batch(axis_data: Any, operands: Any, dims: Any, **params: Any) -> Any:
        test, body = params["cond_jaxpr"], params["body_jaxpr"]
        batched = [d is not None for d in dims]
        n, m = params["cond_nconsts"], params["body_nconsts"]
        of_test, of_body, carry = batched[:n], batched[n : n + m], batched[n + m :]
        for _ in carry:
            carry = [
                a or b for a, b in zip(carry, _batched(body, of_body + carry), strict=True)
            ]
        if _batched(test, of_test + carry)[0]:
            _refuse_stateful("while_loop", "turns of elements that are done", (test, body))
        return rule(axis_data, operands, dims, **params)

    return batch


def _batched(jaxpr: Any, operands: Sequence[bool]) -> list[bool]:
    """Which results of a jaxpr depend on operands that are batched."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    live = {id(v) for v, b in zip(inner.invars, operands, strict=True) if b}
    for eqn in inner.eqns:
        into = [id(v) in live for v in eqn.invars]
        of_jit = eqn.primitive is _compat.jit_p
        out = (
            _batched(eqn.params["jaxpr"], into)
            if of_jit
            else [any(into)] * len(eqn.outvars)
        )
        live |= {id(v) for v, b in zip(eqn.outvars, out, strict=True) if b}
    return [id(v) in live for v in inner.outvars]


def _refuse_stateful(what: str, where: str, jaxprs: Sequence[Any]) -> None:
    for effect in (e for jaxpr in jaxprs for e in jaxpr.effects):
        if isinstance(effect, StatefulEffect):
            raise UnsupportedError(
                f"{effect.name} is stateful and is called inside {what} under vmap, which "
                f"would run it for {where}. Loop over the elements with jax.lax.map, or "
                "make the call pure."
            )


def _sequential(
    body: Body, operands: list[Any], size: int, batched: tuple[bool, ...]
) -> Batched:
    """Run the body once per element."""
    return operands, batch_of(body, size, batched)


def _by_branch(
    body: Body, operands: list[Any], size: int, batched: tuple[bool, ...]
) -> Batched:
    """Run the body once per branch that elements take."""
    return operands, batch_of(body, size, batched, by_branch=True)


def _expand_dims(
    body: Body, operands: list[Any], size: int, batched: tuple[bool, ...]
) -> Batched:
    """Run the body once; an operand that all elements share gets an axis of length 1."""
    if not isinstance(body, Primal):
        return _broadcast_all(body, operands, size, batched)
    expanded = [
        x if b else jnp.expand_dims(x, 0) for x, b in zip(operands, batched, strict=True)
    ]
    return expanded, widen(body, size, batched)


def _broadcast_all(
    body: Body, operands: list[Any], size: int, batched: tuple[bool, ...]
) -> Batched:
    """Run the body once; an operand that all elements share is repeated for each."""
    ticket = None if isinstance(body, Batch) else ticket_of(body)
    if isinstance(body, Batch) or (ticket is not None and not batched[ticket]):
        # Derivatives of one run, whose ticket is not that of a batch of runs.
        return _sequential(body, operands, size, batched)
    repeated = [
        x if b else jnp.broadcast_to(x, (size, *jnp.shape(x)))
        for x, b in zip(operands, batched, strict=True)
    ]
    return repeated, widen(body, size, (True,) * len(batched))


BATCHERS = {
    "by_branch": _by_branch,
    "sequential": _sequential,
    "expand_dims": _expand_dims,
    "broadcast_all": _broadcast_all,
}
