"""The JVP of a loop: the loop with its carries saved, and a linear loop in the tangents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr
from jax.interpreters import ad

from jpyfunc import _compat
from jpyfunc._limits import SLOTS
from jpyfunc._loops.linear_loop import Layout, is_perturbed, linear_p
from jpyfunc._loops.loop_primitive import restricted
from jpyfunc._loops.saved_carries import run_saving
from jpyfunc._loops.step_jaxprs import Arrays, Flags, fixpoint, merge, needed, pick


def loop_jvp(
    primals: Sequence[jax.Array],
    tangents: Sequence[Any],
    *,
    test: ClosedJaxpr,
    body: ClosedJaxpr,
    consts: int,
    free: int,
) -> tuple[Arrays, list[Any]]:
    """Make the loop, and the linear loop for its tangents."""
    perturbed = [is_perturbed(t) for t in tangents]
    of_consts = perturbed[:consts]

    def pushed(now: Flags) -> tuple[ClosedJaxpr, Flags]:
        return _compat.jvp_jaxpr(body, [*of_consts, *now], now)

    of_carry = fixpoint(perturbed[consts:], lambda now: pushed(now)[1])
    n = len(of_carry)
    both, _ = pushed(of_carry)
    linear = sum(of_consts) + sum(of_carry)
    # Which constants and carries the derivative of an iteration needs, and the carries
    # that these are computed from.
    only_tangents = [False] * n + [True] * sum(of_carry)
    by_step = needed(both, only_tangents)[: consts + n]
    kept = fixpoint(by_step[consts:], lambda now: needed(body, now)[consts:])
    by_body = needed(body, kept)
    used = [a or b for a, b in zip(by_step[:consts], by_body[:consts], strict=True)]
    constants, carry = list(primals[:consts]), list(primals[consts:])
    saved = run_saving(test, body, constants, carry, free, kept, SLOTS)
    results = linear_p.bind(
        saved.count,
        saved.stride,
        *pick(constants, used),
        *saved.slots,
        *map(ad.instantiate_zeros, pick(tangents, [*of_consts, *of_carry])),
        advance=restricted(body, [*used, *kept], kept),
        step=restricted(both, [*used, *kept, *[True] * linear], only_tangents),
        layout=Layout(
            consts=sum(used),
            slots=sum(kept),
            free_slots=sum(kept[:free]),
            of_consts=sum(of_consts),
            free=sum(of_carry[:free]),
            rank=0,
            backward=False,
        ),
    )
    zeros = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in saved.results]
    others = [t for t, flag in zip(zeros, of_carry, strict=True) if not flag]
    return saved.results, merge(of_carry, results, others)
