"""Runs a body on concrete operands, eagerly and from compiled programs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from jpyfunc import _compat
from jpyfunc._bodies import tape_cache
from jpyfunc._bodies.batch_elements import evaluate_batch
from jpyfunc._bodies.derivatives import call
from jpyfunc._bodies.derived import Batch, Body, recorded_of
from jpyfunc._bodies.primal import Primal
from jpyfunc._bodies.profile import Run, annotated, measure_body, open_profiles, title_of


def evaluate(body: Body, operands: Sequence[Any], device: _compat.Device) -> list[Any]:
    """Run a body on concrete operands.

    Args:
        body: what to run.
        operands: NumPy or JAX arrays, one per `body.in_avals`.
        device: where NumPy operands are put.

    Returns:
        One NumPy or JAX array per `body.out_avals`.
    """
    if open_profiles:
        execute = functools.partial(evaluate_with, body, operands, device)
        return measure_body(body, operands, execute)
    return evaluate_with(body, operands, device, annotated)


def evaluate_with(
    body: Body, operands: Sequence[Any], device: _compat.Device, run: Run
) -> list[Any]:
    """`evaluate` where `run` calls the body and may time it."""
    if isinstance(body, Primal):  # the most common, and at no tape
        return run(body.title, call, body, operands, device)
    if isinstance(body, Batch):
        results = evaluate_batch(body, operands, device, run)
    else:
        results = run(title_of(body), call, body, operands, device)
    recorded = recorded_of(body)
    if recorded and not recorded.is_shared:
        tape_cache.spend(recorded, operands[len(recorded.base.in_avals)])
    return results
