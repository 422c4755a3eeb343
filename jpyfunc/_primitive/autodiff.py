"""JVP and transpose rules, which make calls of derived bodies; dead-code elimination.

For a call y = f(x), with the tangents x' of the operands that are differentiated:

    y, r = f(x)         the call itself, with the ticket r of the tape that it caches
    y' = J(x, r) x'     a second call, linear in x', which applies the JVP of tape r
    x* = J(x, r)^T y*   the transpose of that one, linear in y*, which applies the VJP

and the transpose of the last is the second again. Where tape r has been evicted, the host
runs the body at x again, on another tape.

Primals and tangents are computed by calls of their own, because `jax.linearize`, `scan` and
`jax.checkpoint` evaluate the first and stage out the second. A call whose results nothing
uses is dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jax.interpreters import ad

from jpyfunc._errors import no_second_order, not_differentiable
from jpyfunc._primitive.primitive import Params, bind
from jpyfunc._types import Array

Tangent = Array | ad.Zero


def _py_func_jvp(
    primals: Sequence[Array], tangents: Sequence[Tangent], *, params: Params
) -> tuple[Sequence[Array], Sequence[Tangent]]:
    """Make the calls for the results and their tangents.

    Args:
        primals: the operands, one per `params.body.in_avals`.
        tangents: one per operand; `ad.Zero` marks one that is not differentiated.
        params: of the call.

    Returns:
        The results and their tangents, one of each per `params.body.out_avals`.

    Raises:
        NotDifferentiableError: an operand of a `numpy_func` without rules is
            differentiated, or a derivative by rule is differentiated again.
    """
    # Tangents that are zero are left out: the body would spend time on them, and integers
    # have none that NumPy could hold.
    wrt = tuple(i for i, t in enumerate(tangents) if _is_differentiated(t))
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
    tangents_out = dict(zip(of, bind(operands, derived), strict=True))
    results = results[: len(params.body.out_avals)]
    return results, [
        tangents_out.get(i, ad.Zero(jax.typeof(y).to_tangent_aval()))
        for i, y in enumerate(results)
    ]


def _linear_jvp(
    primals: Sequence[Array], tangents: Sequence[Tangent], params: Params
) -> tuple[Sequence[Array], Sequence[Tangent]]:
    """Make the calls for a derivative by rule, which is linear in its last operands.

    A linear function is its own JVP. With respect to its other operands it has none: that
    would take a derivative of the rule.
    """
    count = params.body.linear_from
    if any(map(_is_differentiated, tangents[:count])):
        raise no_second_order(params.name)
    linear = map(ad.instantiate_zeros, tangents[count:])
    shared = dataclasses.replace(params, body=params.body.sharing_tape())
    return bind(primals, shared), bind([*primals[:count], *linear], params)


def _is_differentiated(tangent: Tangent) -> bool:
    """Whether a tangent is that of an operand that is differentiated."""
    if isinstance(tangent, ad.Zero):
        return False
    return getattr(tangent, "dtype", None) != jax.dtypes.float0


def _py_func_transpose(
    cotangents: Sequence[Tangent],
    *operands: Array,
    params: Params,
) -> list[Array | None]:
    """Make the call for the cotangents of the operands that a call is linear in.

    Args:
        cotangents: one per result; `ad.Zero` marks one that nothing depends on.
        *operands: of the call; `ad.UndefinedPrimal` marks one that the call is linear in.
        params: of the call.

    Returns:
        The cotangents of these operands, and None for the others.

    Raises:
        NotDifferentiableError: a host function has no rule for it.
    """
    wrt = tuple(i for i, x in enumerate(operands) if ad.is_undefined_primal(x))
    nonzero = {i: ct for i, ct in enumerate(cotangents) if not isinstance(ct, ad.Zero)}
    body, first = params.body.transpose(wrt, tuple(nonzero))
    body.check_differentiable()
    cotangents_in = bind(
        [*(operands[i] for i in first), *nonzero.values()], params.derived(body)
    )
    results: list[Array | None] = [None] * len(operands)
    for i, cotangent in zip(wrt, cotangents_in, strict=True):
        results[i] = cotangent
    return results


def _py_func_dce(used: Sequence[bool], eqn: JaxprEqn) -> tuple[list[bool], JaxprEqn | None]:
    """Drop a call that nothing uses, or the tape of one that nothing differentiates.

    Args:
        used: whether each result is used.
        eqn: the call in a jaxpr.

    Returns:
        Whether each operand is used, and the equation that is left, or None.
    """
    params = eqn.params["params"]
    if not any(used) and not eqn.effects:
        return [False] * len(eqn.invars), None
    if params.body.has_tape and not used[-1]:
        params = dataclasses.replace(params, body=params.body.without_tape())
        eqn = eqn.replace(params={"params": params}, outvars=eqn.outvars[:-1])
    return [True] * len(eqn.invars), eqn
