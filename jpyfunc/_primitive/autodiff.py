"""JVP and transpose rules: each re-runs the body, under `jax.jvp` and `jax.vjp`.

For results `y = f(x)` of a call, with `x'` the tangents of the perturbed operands,

    y' = J(x) x'        one more call, linear in x': the body under `jax.jvp`
    x* = J(x)^T y*      its transpose, linear in y*: the body under `jax.vjp`

and the transpose of the latter is the former again. Calls for primals and tangents are
kept apart, because `jax.linearize`, `scan` and `jax.checkpoint` evaluate the first and
stage the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from jpyfunc._body.derived import jvp_of, transpose_of
from jpyfunc._errors import NotDifferentiableError
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
    results = bind(primals, params)
    # An operand that is not perturbed must not cross as an array of zeros: the body
    # would pay for it, and an integer has no tangent dtype there.
    wrt = tuple(i for i, t in enumerate(tangents) if _is_perturbed(t))
    of = tuple(
        i
        for i, aval in enumerate(params.body.out_avals)
        if jnp.issubdtype(aval.dtype, jnp.inexact)
    )
    tangents_out = [ad.Zero(jax.typeof(y).to_tangent_aval()) for y in results]
    if wrt and of:
        if params.body.primal.numpy:
            raise NotDifferentiableError(
                f"{params.name} is not differentiable: JAX cannot see into "
                "NumPy, and a tangent flows into it. Wrap jax.lax.stop_gradient around "
                "its arguments, or write the body with jax.numpy and use py_func."
            )
        operands = [*primals, *(ad.instantiate_zeros(tangents[i]) for i in wrt)]
        derived = params.derived(jvp_of(params.body, wrt, of))
        for i, tangent in zip(of, bind(operands, derived), strict=True):
            tangents_out[i] = tangent
    return results, tangents_out


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
    body, kept = transpose_of(params.body, wrt, of)
    pulled = bind(
        [*(operands[i] for i in kept), *(cotangents[i] for i in of)],
        params.derived(body),
    )
    results: list[Any] = [None] * len(operands)
    for i, cotangent in zip(wrt, pulled, strict=True):
        results[i] = cotangent
    return results
