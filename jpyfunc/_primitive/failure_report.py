"""Failures of bodies in programs over several devices, in one process or in several.

The host call runs on one of the devices. If it raised there, the program would end on that
device, and the others would wait for its results forever. So it does not raise: it returns
a report as one more result, the text of the exception as an array of bytes, all zeros if
there was none. The report is replicated to every device, and each device calls its host to
raise what the report says.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from jpyfunc._limits import REPORT_BYTES
from jpyfunc._primitive.custom_call import emit_host_call, raises_at_once
from jpyfunc._runtime.exceptions import leave_host_call

REPORT_AVAL = ShapedArray((REPORT_BYTES,), np.uint8)

raise_reported_p = Primitive("raise_reported")


def report_of(text: str) -> np.ndarray:
    """Make a report of a text, without its middle if it is too long."""
    data = text.encode()
    half = REPORT_BYTES // 2
    if len(data) > REPORT_BYTES:
        data = data[: half - 5] + b"\n...\n" + data[-half:]
    report = np.zeros(REPORT_AVAL.shape, REPORT_AVAL.dtype)
    report[: len(data)] = np.frombuffer(data, REPORT_AVAL.dtype)
    return report


def raise_on_every_device(
    results: Sequence[jax.Array], report: jax.Array, sharding: NamedSharding
) -> list[jax.Array]:
    """Make the results of a call depend on every device knowing that it did not fail.

    Args:
        results: replicated.
        report: of the call, replicated.
        sharding: that of both.
    """
    good = jax.shard_map(
        raise_reported_p.bind,
        mesh=sharding.mesh,
        in_specs=sharding.spec,
        out_specs=PartitionSpec(),
        check_vma=False,
    )(report)
    return [jnp.where(good, x, jnp.zeros_like(x)) for x in results]


def _raise_reported_abstract_eval(report: ShapedArray) -> ShapedArray:
    return report.update(shape=(), dtype=np.dtype(bool))


def _raise_reported_lowering(
    ctx: mlir.LoweringRuleContext, report: ir.Value
) -> list[ir.Value]:
    function = functools.partial(_raise_reported, raises_at_once(ctx))
    results, _ = emit_host_call(ctx, function, None, [report], has_side_effect=True)
    return results


def _raise_reported(raises_at_once: bool, report: np.ndarray) -> tuple[np.ndarray]:
    """Raise what a report says; if that is nothing, return True."""
    text = bytes(np.asarray(report)).rstrip(b"\0").decode("utf-8", "replace")
    if text:
        leave_host_call(text, raises_at_once)
    return (np.asarray(True),)
