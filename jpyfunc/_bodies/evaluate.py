"""Runs a body on concrete operands, eagerly and from compiled programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jpyfunc._bodies import tape_cache
from jpyfunc._bodies.batch_elements import evaluate_batch
from jpyfunc._bodies.derivatives import call
from jpyfunc._bodies.derived import Batch, Body, recorded_of
from jpyfunc._bodies.primal import Primal
from jpyfunc._bodies.profile import title_of
from jpyfunc._runtime.context import Context


def evaluate(body: Body, context: Context, operands: Sequence[Any]) -> list[Any]:
    """Run a body on concrete operands.

    Args:
        body: what to run.
        context: the current one.
        operands: NumPy or JAX arrays, one per `body.in_avals`.

    Returns:
        One NumPy or JAX array per `body.out_avals`.
    """
    if isinstance(body, Primal):  # the most common, and at no tape
        return context.timed(body.title, call, body, operands, context)
    if isinstance(body, Batch):
        results = evaluate_batch(body, operands, context)
    else:
        results = context.timed(title_of(body), call, body, operands, context)
    recorded = recorded_of(body)
    if recorded and not recorded.is_shared:
        tape_cache.spend(recorded, operands[len(recorded.base.in_avals)])
    return results
