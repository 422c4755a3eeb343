"""JVP and transpose rules: each re-executes the body, unless its run is kept.

For results `y = f(x)` of a call, with `x'` the tangents of the perturbed operands,

    y, r = f(x)         the call itself, with the ticket r of its run
    y' = J(x, r) x'     one more call, linear in x': tangents, pushed through the run
    x* = J(x, r)^T y*   its transpose, linear in y*: cotangents, pulled back through it

and the transpose of the latter is the former again. Where the host no longer keeps run
r, it runs the body at x again, each operation under `jax.vjp`. Calls for primals and
tangents are kept apart, because `jax.linearize`, `scan` and `jax.checkpoint` evaluate the
first and stage the second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from jpyfunc._errors import no_second_order, not_differentiable
from jpyfunc._primitive.primitive import Params, bind


def _py_func_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, params: Params
) -> tuple[list[Any], list[Any]]:
    """Push tangents through one call.

    Args:
        primals: operands, flat, as `params.body.in_avals`.
        tangents: one per primal; `ad.Zero` marks an operand that is not perturbed.
        params: of the call.

    Returns:
        `(primals_out, tangents_out)`, both as `params.body.out_avals`.

    Raises:
        NotDifferentiableError: a perturbed operand reaches a `numpy_func`.
    """
    # An operand that is not perturbed must not cross as an array of zeros: the body
    # would pay for it, and an integer has no tangent dtype there.
    wrt = tuple(i for i, t in enumerate(tangents) if _is_perturbed(t))
    of = tuple(
        i
        for i, aval in enumerate(params.body.out_avals)
        if jnp.issubdtype(aval.dtype, jnp.inexact)
    )
    if not (wrt and of):
        results = bind(primals, params)
        return results, [ad.Zero(jax.typeof(y).to_tangent_aval()) for y in results]
    function = params.body.function
    if function.is_host_function and not function.rules:
        raise not_differentiable(params.name)
    if function.rules and not params.body.is_primal:
        return _linear_jvp(primals, tangents, params)
    body = params.body.with_tape(wrt).sharing_tape()
    results = bind(primals, dataclasses.replace(params, body=body))
    ticket = results[-1:] if body.has_tape else []
    derived = params.derived(params.body.jvp(wrt, of, repeatable=not params.stateful))
    operands = [*primals, *ticket, *(ad.instantiate_zeros(tangents[i]) for i in wrt)]
    pushed = dict(zip(of, bind(operands, derived), strict=True))
    results = results[: len(params.body.out_avals)]
    return results, [
        pushed.get(i, ad.Zero(jax.typeof(y).to_tangent_aval()))
        for i, y in enumerate(results)
    ]


def _linear_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], params: Params
) -> tuple[list[Any], list[Any]]:
    """Push tangents through a derivative by rule, which is linear in its last operands."""
    count = params.body.linear_from
    if any(map(_is_perturbed, tangents[:count])):
        raise no_second_order(params.name)
    linear = map(ad.instantiate_zeros, tangents[count:])
    shared = dataclasses.replace(params, body=params.body.sharing_tape())
    return bind(primals, shared), bind([*primals[:count], *linear], params)


def _is_perturbed(tangent: Any) -> bool:
    if isinstance(tangent, ad.Zero):
        return False
    return getattr(tangent, "dtype", None) != jax.dtypes.float0


def _py_func_transpose(
    cotangents: Sequence[Any], *operands: Any, params: Params
) -> list[Any]:
    """Pull cotangents back through a call that is linear in some operands.

    Args:
        cotangents: one per result; `ad.Zero` marks one that nothing depends on.
        *operands: of the call; `ad.UndefinedPrimal` marks a linear one.
        params: of the call.

    Returns:
        The cotangents of the linear operands, and None for the others.
    """
    wrt = tuple(i for i, x in enumerate(operands) if ad.is_undefined_primal(x))
    of = tuple(i for i, ct in enumerate(cotangents) if not isinstance(ct, ad.Zero))
    body, first = params.body.transpose(wrt, of)
    body.check_differentiable()
    pulled = bind(
        [*(operands[i] for i in first), *(cotangents[i] for i in of)],
        params.derived(body),
    )
    results: list[Any] = [None] * len(operands)
    for i, cotangent in zip(wrt, pulled, strict=True):
        results[i] = cotangent
    return results


def _py_func_dce(used: Sequence[bool], eqn: Any) -> tuple[list[bool], Any]:
    """Drop a call that nothing uses, and the keeping of a run that nothing asks for.

    Args:
        used: one per result.
        eqn: the call, in a jaxpr.

    Returns:
        Which operands are used, and the equation that is left, or None.
    """
    params = eqn.params["params"]
    if not any(used) and not eqn.effects:
        return [False] * len(eqn.invars), None
    if params.body.has_tape and not used[-1]:
        params = dataclasses.replace(params, body=params.body.without_tape())
        eqn = eqn.replace(params={"params": params}, outvars=eqn.outvars[:-1])
    return [True] * len(eqn.invars), eqn
