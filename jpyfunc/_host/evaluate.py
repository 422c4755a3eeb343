"""Runs a body on concrete operands, eagerly and from compiled programs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray

from jpyfunc import _compat
from jpyfunc._body.derived import Batch, Body
from jpyfunc._host.derivatives import call
from jpyfunc._host.profile import Run, annotated, kind_of, measure_body, open_profiles
from jpyfunc._traces.taped import is_taped


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
    if isinstance(body, Batch):
        return _evaluate_batch(body, operands, device, run)
    name, kind = body.primal.name, kind_of(body)
    if kind != "forward":
        name = f"{name} ({kind})"
    return run(name, call, body, operands, device)


def _evaluate_batch(
    batch: Batch, operands: Sequence[Any], device: _compat.Device, run: Run
) -> list[np.ndarray]:
    if any(map(is_taped, operands)):
        return _evaluate_taped_batch(batch, operands, device, run)
    # Slices and stacks are made in NumPy, at a tenth of the cost of JAX operations.
    columns = [
        _elements(operand) if stacked else _shared(batch, i, operand, device)
        for i, (operand, stacked) in enumerate(zip(operands, batch.stacked_in, strict=True))
    ]
    out_avals = batch.out_avals
    results = [
        np.zeros(aval.shape, _accumulator(aval, stacked))
        for aval, stacked in zip(out_avals, batch.stacked_out, strict=True)
    ]
    for i in range(batch.size):
        element = evaluate_with(batch.base, [column(i) for column in columns], device, run)
        for result, value, stacked in zip(results, element, batch.stacked_out, strict=True):
            if stacked:
                result[i] = np.asarray(value)
            else:
                result += np.asarray(value).astype(result.dtype)
    return [
        result.astype(aval.dtype, copy=False)
        for result, aval in zip(results, out_avals, strict=True)
    ]


def _evaluate_taped_batch(
    batch: Batch, operands: Sequence[Any], device: _compat.Device, run: Run
) -> list[Any]:
    """A batch in a body that is differentiated: the tape follows slices and stacks."""
    if not batch.size:
        return [np.zeros(aval.shape, aval.dtype) for aval in batch.out_avals]
    elements = [
        evaluate_with(
            batch.base,
            [
                jnp.asarray(x)[i] if stacked else x
                for x, stacked in zip(operands, batch.stacked_in, strict=True)
            ],
            device,
            run,
        )
        for i in range(batch.size)
    ]
    return [
        jnp.asarray(
            jnp.stack(column) if stacked else sum(column[1:], column[0]), aval.dtype
        )
        for column, stacked, aval in zip(
            zip(*elements, strict=True), batch.stacked_out, batch.out_avals, strict=True
        )
    ]


def _elements(operand: Any) -> Callable[[int], np.ndarray]:
    array = np.asarray(operand)
    # A 0-d slice must stay an array: an index gives a NumPy scalar.
    return lambda i: array[i, ...]


def _shared(
    batch: Batch, index: int, operand: Any, device: _compat.Device
) -> Callable[[int], Any]:
    """An operand of every element, put on the device once unless it is sliced again."""
    if isinstance(operand, np.ndarray) and not (
        isinstance(batch.base, Batch) or batch.primal.numpy
    ):
        operand = _compat.put(operand, batch.base.in_avals[index], device)
    return lambda _: operand


def _accumulator(aval: ShapedArray, stacked: bool) -> Any:
    """The dtype to sum in: half precision loses terms of long sums, as XLA knows."""
    if not stacked and jnp.issubdtype(aval.dtype, jnp.floating) and aval.dtype.itemsize < 4:
        return np.float32
    return aval.dtype
