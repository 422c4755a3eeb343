"""Failures of bodies in a program over several devices, in one process or in several.

The host call runs on one of the devices. If it raised, the program would end on that one,
and the others would wait for its results for ever. So it returns what the body raised, as
a text, and each device raises that.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from jpyfunc._primitive.custom_call import emit_host_call
from jpyfunc._primitive.host_call import raise_reported

raise_reported_p = Primitive("raise_reported")


@raise_reported_p.def_abstract_eval
def _abstract_eval(report: ShapedArray) -> ShapedArray:
    return report.update(shape=(), dtype=np.dtype(bool))


def _lowering(ctx: mlir.LoweringRuleContext, report: Any) -> list[Any]:
    is_cpu = ctx.module_context.platforms[0] == "cpu"
    call = functools.partial(raise_reported, is_cpu)
    results, _ = emit_host_call(ctx, call, None, [report], has_side_effect=True)
    return results


mlir.register_lowering(raise_reported_p, _lowering, cacheable=False)


def checked(
    results: Sequence[jax.Array], report: jax.Array, sharding: NamedSharding
) -> list[jax.Array]:
    """The results of a call, on every device once it knows that the body did not fail.

    Args:
        results: whole on every device.
        report: of the call, whole on every device.
        sharding: theirs.
    """
    good = jax.shard_map(
        raise_reported_p.bind,
        mesh=sharding.mesh,
        in_specs=sharding.spec,
        out_specs=PartitionSpec(),
        check_vma=False,
    )(report)
    return [jnp.where(good, x, jnp.zeros_like(x)) for x in results]
