"""Batching rule, one function per `vmap_method`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jpyfunc import _compat
from jpyfunc._bodies.derived import Batch, Body, batch_of, ticket_of, widen
from jpyfunc._bodies.primal import Primal
from jpyfunc._errors import UnsupportedError
from jpyfunc._primitive.primitive import Params, StatefulEffect, bind

BatchTracer = tuple[list[Any], Body]


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
        # The index of a choice by platform becomes one for all elements again.
        differ = dims[0] is not None and "branches_platforms" not in params
        for effect in _stateful(params["branches"]) if differ else ():
            raise _refusal(
                effect, "cond or switch", "executes every branch for every element"
            )
        return rule(axis_data, operands, dims, **params)

    return batch


def refusing_in_while(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The batching rule of `while_loop`, which runs until the last element is done.

    Raises:
        UnsupportedError: elements may end at different iterations, and it has a stateful
            call.
    """

    def batch(axis_data: Any, operands: Any, dims: Any, **params: Any) -> Any:
        # Only then ask what JAX's rule is about to find out itself.
        for effect in _stateful((params["cond_jaxpr"], params["body_jaxpr"])):
            if _is_test_batched(dims, **params):
                raise _refusal(
                    effect,
                    "while_loop",
                    "executes every iteration for every element, those that are done too",
                )
        return rule(axis_data, operands, dims, **params)

    return batch


def _is_test_batched(
    dims: Sequence[Any],
    *,
    cond_jaxpr: Any,
    cond_nconsts: int,
    body_jaxpr: Any,
    body_nconsts: int,
) -> bool:
    """Whether elements of a batched `while_loop` may differ in when they end."""
    batched = [d is not None for d in dims]
    n = cond_nconsts + body_nconsts
    of_test, of_body, carry = batched[:cond_nconsts], batched[cond_nconsts:n], batched[n:]
    before = None
    while carry != before:  # what is batched after one iteration is so from the next on
        before = carry
        after = _batched(body_jaxpr, of_body + carry)
        carry = [a or b for a, b in zip(carry, after, strict=True)]
    return _batched(cond_jaxpr, of_test + carry)[0]


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


def _stateful(jaxprs: Sequence[Any]) -> list[StatefulEffect]:
    """The effects of calls of ours that are to run as often as the program says."""
    effects = (effect for jaxpr in jaxprs for effect in jaxpr.effects)
    return [effect for effect in effects if isinstance(effect, StatefulEffect)]


def _refusal(effect: StatefulEffect, what: str, does: str) -> UnsupportedError:
    return UnsupportedError(
        f"{effect.name} is stateful and is called inside {what} under vmap, which {does}. "
        f"Loop over the elements with jax.lax.map, or {effect.remedy}."
    )


def _sequential(
    body: Body, operands: list[Any], size: int, batched: tuple[bool, ...]
) -> BatchTracer:
    """Run the body once per element."""
    return operands, batch_of(body, size, batched)


def _by_branch(
    body: Body, operands: list[Any], size: int, batched: tuple[bool, ...]
) -> BatchTracer:
    """Run the body once per branch that elements take."""
    return operands, batch_of(body, size, batched, by_branch=True)


def _expand_dims(
    body: Body, operands: list[Any], size: int, batched: tuple[bool, ...]
) -> BatchTracer:
    """Run the body once; an operand that all elements share gets an axis of length 1."""
    if not isinstance(body, Primal):
        return _broadcast_all(body, operands, size, batched)
    expanded = [
        x if b else jnp.expand_dims(x, 0) for x, b in zip(operands, batched, strict=True)
    ]
    return expanded, widen(body, size, batched)


def _broadcast_all(
    body: Body, operands: list[Any], size: int, batched: tuple[bool, ...]
) -> BatchTracer:
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
