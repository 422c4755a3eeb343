"""The derivative of a loop, forward and linearized.

Forward mode is JAX's own: one loop over carries and their tangents. It is linear in the
tangents, and says so in the parameter `linear`. Where the tangents are not known yet, which
is what `jax.linearize` and reverse mode are about, partial evaluation splits it: the loop
on the primals runs, and its carries are saved; the rest is a linear loop in the tangents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var
from jax.interpreters import ad

from jpyfunc import _compat
from jpyfunc._limits import MAX_SLOTS, MIN_SLOTS, SAVED_BYTES
from jpyfunc._loops.linear_loop import Layout, is_perturbed, linear_p, residuals
from jpyfunc._loops.loop_primitive import loop_p, restricted
from jpyfunc._loops.saved_carries import run_saving
from jpyfunc._loops.step_jaxprs import (
    Arrays,
    call,
    either,
    fixpoint,
    merge,
    needed,
    pick,
    trace,
)


def loop_jvp(
    primals: Sequence[jax.Array],
    tangents: Sequence[Any],
    *,
    test: ClosedJaxpr,
    body: ClosedJaxpr,
    consts: int,
    free: int,
    linear: tuple[bool, ...],
) -> tuple[Arrays, list[Any]]:
    """Make the loop over carries and their tangents."""
    perturbed = tuple(is_perturbed(t) for t in tangents)
    pushed = _pushed(body, test, consts, free, perturbed)
    flags = [*perturbed[:consts], *pushed.of_carry]
    dots = [jnp.asarray(ad.instantiate_zeros(t)) for t in pick(tangents, flags)]
    k = sum(flags[:consts])
    carry = [*primals[consts:], *dots[k:]]
    out = loop_p.bind(
        *primals[:consts], *dots[:k], *(carry[i] for i in pushed.order), **pushed.params
    )
    results = [out[pushed.order.index(i)] for i in range(len(carry))]
    n = len(primals) - consts
    zeros = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results[:n]]
    zeros = [t for t, flag in zip(zeros, pushed.of_carry, strict=True) if not flag]
    return results[:n], merge(pushed.of_carry, results[n:], zeros)


@dataclasses.dataclass(frozen=True, slots=True)
class _Pushed:
    """A loop over carries and their tangents.

    Attributes:
        of_carry: which carries have tangents.
        order: of the carries and their tangents, as free-running ones are first.
        params: of the loop.
    """

    of_carry: Sequence[bool]
    order: Sequence[int]
    params: dict[str, Any]


@_compat.weakref_lru_cache
def _pushed(
    body: ClosedJaxpr,
    test: ClosedJaxpr,
    consts: int,
    free: int,
    perturbed: tuple[bool, ...],
) -> _Pushed:
    of_consts = perturbed[:consts]
    of_carry = fixpoint(
        perturbed[consts:],
        lambda now: _compat.jvp_jaxpr(body, [*of_consts, *now], now)[1],
    )
    both, _ = _compat.jvp_jaxpr(body, [*of_consts, *of_carry], of_carry)
    n, of_free = len(of_carry), sum(of_carry[:free])
    total, fixed = n + sum(of_carry), consts + sum(of_consts)
    order = [
        *range(free),
        *range(n, n + of_free),
        *range(free, n),
        *range(n + of_free, total),
    ]

    def sort(operands: Sequence[jax.Array]) -> tuple[Arrays, Arrays, Arrays]:
        c = [operands[fixed + order.index(i)] for i in range(total)]
        return [*operands[:consts], *c[:n]], [*operands[consts:fixed]], c[n:]

    def pushed_body(*operands: jax.Array) -> Arrays:
        known, of_fixed, of_carries = sort(operands)
        results = call(both, *known, *of_fixed, *of_carries)
        return [results[i] for i in order]

    avals = both.in_avals
    m = consts + n
    carry_avals = [*avals[consts:m], *avals[m + sum(of_consts) :]]
    avals = [
        *avals[:consts],
        *avals[m : m + sum(of_consts)],
        *(carry_avals[i] for i in order),
    ]
    params = dict(
        test=trace(lambda *xs: call(test, *sort(xs)[0]), *avals),
        body=trace(pushed_body, *avals),
        consts=fixed,
        free=free + of_free,
        linear=tuple([i >= consts for i in range(fixed)] + [i >= n for i in order]),
    )
    return _Pushed(of_carry, order, params)


@dataclasses.dataclass(frozen=True, slots=True)
class _Split:
    """A loop that is linear in some operands, split into a loop on the others and the rest.

    Attributes:
        test: of the loop on the others.
        body: of that loop.
        free: how many of its carries are free-running.
        used: which of its constants the linear loop needs.
        kept: which of its carries.
        params: of the linear loop.
    """

    test: ClosedJaxpr
    body: ClosedJaxpr
    free: int
    used: Sequence[bool]
    kept: Sequence[bool]
    params: dict[str, Any]


@_compat.weakref_lru_cache
def _split(
    body: ClosedJaxpr, test: ClosedJaxpr, consts: int, free: int, linear: tuple[bool, ...]
) -> _Split:
    known = [not flag for flag in linear]
    of_consts, of_carry = known[:consts], known[consts:]
    tangents = linear[consts:]
    primal_body = restricted(body, known, of_carry)
    k = sum(of_consts)
    # What the derivative of an iteration needs, and what that is computed from.
    by_step = pick(needed(body, tangents), known)
    kept = fixpoint(by_step[k:], lambda now: needed(primal_body, now)[k:])
    by_body = needed(primal_body, kept)
    used = either(by_step[:k], by_body[:k])
    flags = merge(known, [*used, *kept], [True] * sum(linear))
    step = restricted(body, flags, tangents)
    # The residuals come first in the linear loop, here constants and their tangents do.
    is_linear = pick(linear, flags)
    avals = [
        *pick(step.in_avals, [not x for x in is_linear]),
        *pick(step.in_avals, is_linear),
    ]
    n = len(avals) - sum(is_linear)
    step_in_order = trace(lambda *xs: call(step, *merge(is_linear, xs[n:], xs[:n])), *avals)
    layout = Layout(
        consts=sum(used),
        slots=sum(kept),
        free_slots=sum(kept[: sum(of_carry[:free])]),
        of_consts=sum(linear[:consts]),
        free=sum(tangents[:free]),
        shares_total=any(of_carry[:free]),
        rank=0,
        backward=False,
    )
    return _Split(
        test=restricted(test, known, [True]),
        body=primal_body,
        free=sum(of_carry[:free]),
        used=used,
        kept=kept,
        params=dict(
            advance=restricted(primal_body, [*used, *kept], kept),
            step=step_in_order,
            layout=layout,
        ),
    )


def _key(params: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(params[name] for name in ("body", "test", "consts", "free", "linear"))


def _saving(split: _Split, constants: Arrays, carry: Arrays) -> tuple[Arrays, Arrays]:
    """Run the loop on the primals; return its results and what the linear loop needs."""
    carry = [*map(jnp.asarray, carry)]  # it may be literals of a jaxpr
    size = sum(x.size * x.dtype.itemsize for x in pick(carry, split.kept))
    slots = min(max(SAVED_BYTES // max(size, 1), MIN_SLOTS), MAX_SLOTS) // 2 * 2
    saved = run_saving(
        split.test, split.body, constants, carry, split.free, split.kept, slots
    )
    return saved.results, residuals(saved, pick(constants, split.used))


def loop_partial_eval(trace: Any, *tracers: Any, **params: Any) -> list[Any]:
    """Run a loop whose tangents are unknown on the primals, and stage out the rest."""
    linear, consts = params["linear"], params["consts"]
    known = [t.pval.get_known() for t in tracers]
    nonlinear = [not flag for flag in linear]
    primals = pick(known, nonlinear)
    if not any(linear) or any(x is None for x in primals):
        return trace.default_process_primitive(loop_p, tracers, params)
    if all(x is not None for x in known):
        return loop_p.bind(*known, **params)
    split = _split(*_key(params))
    k = sum(nonlinear[:consts])
    results, operands = _saving(split, primals[:k], primals[k:])
    operands = [*map(trace.new_const, operands), *pick(tracers, linear)]
    pushed = trace.default_process_primitive(linear_p, operands, split.params)
    return merge(linear[consts:], pushed, results)


def loop_partial_eval_custom(
    saveable: Any, unknown: Sequence[bool], instantiated: Sequence[bool], eqn: JaxprEqn
) -> tuple[Any, ...]:
    """Split a loop in the jaxpr of `jax.checkpoint`, which saves nothing of it.

    The loop on the primals is computed at once, and the whole loop again when the tangents
    are there.
    """
    del saveable
    linear, consts = eqn.params["linear"], eqn.params["consts"]
    more = [
        x
        for x, flag in zip(eqn.invars, instantiated, strict=True)
        if isinstance(x, Var) and not flag
    ]
    n = len(eqn.outvars)
    if not any(unknown):
        return eqn, eqn, [False] * n, [True] * n, more
    known = [not flag for flag in linear]
    if any(pick(unknown, known)):
        return None, eqn, [True] * n, [True] * n, more
    split = _split(*_key(eqn.params))
    of_known = dict(
        test=split.test,
        body=split.body,
        consts=sum(known[:consts]),
        free=split.free,
        linear=(False,) * sum(known),
    )
    of_carry = known[consts:]
    known_eqn = eqn.replace(
        params=of_known, invars=pick(eqn.invars, known), outvars=pick(eqn.outvars, of_carry)
    )
    return known_eqn, eqn, [not flag for flag in of_carry], [True] * n, more


def loop_transpose(cotangents: Sequence[Any], *operands: Any, **params: Any) -> list[Any]:
    """Transpose a loop with respect to its tangents."""
    linear, consts = params["linear"], params["consts"]
    known = [not flag for flag in linear]
    primals = pick(operands, known)
    k = sum(known[:consts])
    split = _split(*_key(params))
    _, known_operands = _saving(split, primals[:k], primals[k:])
    cts = ad.primitive_transposes[linear_p](
        pick(cotangents, linear[consts:]),
        *known_operands,
        *pick(operands, linear),
        **split.params,
    )
    return merge(linear, cts[len(known_operands) :], [None] * sum(known))
