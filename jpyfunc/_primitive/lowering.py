"""Lowering rule: a host call in a compiled program, its effects, tokens and shardings."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpyfunc import _compat
from jpyfunc._errors import UnsupportedError
from jpyfunc._host.call import HostCall
from jpyfunc._primitive.primitive import ORDERED, Params, check_rules


def _py_func_lowering(
    ctx: mlir.LoweringRuleContext, *operands: Any, params: Params
) -> list[Any]:
    """Emit the host call of one bind.

    Raises:
        UnsupportedError: the program is exported, is lowered for several platforms at
            once or for one without host callbacks, or leaves some mesh axes automatic
            in a `shard_map`.
    """
    _check_supported(ctx, params)
    devices = _automatic_devices(ctx)
    if devices is not None:
        operands = _replicated(ctx, operands, ctx.avals_in, devices)
    token = ctx.tokens_in.get(ORDERED) if params.ordered else None
    results, token = _compat.emit_host_call(
        ctx,
        HostCall(params.body, params.settings, _compat.body_device(ctx)),
        token,
        operands,
        has_side_effect=params.stateful,
    )
    if devices is not None:
        # The call runs on one device, and a result that stayed there alone would have
        # a sharding that no later eager operation accepts.
        results = _replicated(ctx, results, ctx.avals_out, devices)
    if token is not None:
        ctx.set_tokens_out(ctx.tokens_in.update_tokens(mlir.TokenSet({ORDERED: token})))
    return list(results)


def _check_supported(ctx: mlir.LoweringRuleContext, params: Params) -> None:
    check_rules(params.body)
    platforms = ctx.module_context.platforms
    if _compat.is_export(ctx):
        raise UnsupportedError(
            f"{params.name} cannot be exported: its body is a Python function "
            "of this process and not part of the program. Export what surrounds it, or "
            "write that part with jax.lax."
        )
    if len(platforms) > 1 or platforms[0] not in ("cpu", "cuda", "rocm", "tpu"):
        raise UnsupportedError(
            f"{params.name} cannot be lowered for {', '.join(platforms)}: "
            "expected one of cpu, cuda, rocm and tpu. Lower for that one alone."
        )
    axes = ctx.module_context.axis_context
    if isinstance(axes, mlir.SPMDAxisContext):
        automatic = frozenset(axes.mesh.axis_names) - axes.manual_axes
        if automatic:
            raise UnsupportedError(
                f"{params.name} is called in a shard_map that leaves mesh axes "
                f"{sorted(map(str, automatic))} automatic, where JAX has no host calls. "
                "Name every axis of the mesh in axis_names."
            )


def _automatic_devices(ctx: mlir.LoweringRuleContext) -> list[_compat.Device] | None:
    """The devices over which XLA partitions this program, if there are several."""
    axes = ctx.module_context.axis_context
    if not isinstance(axes, mlir.ShardingContext) or axes.num_devices == 1:
        return None
    return list(axes.device_assignment or ())


def _replicated(
    ctx: mlir.LoweringRuleContext, values: Any, avals: Any, devices: list[_compat.Device]
) -> Any:
    """Constrain lowered `values` to be whole on every device."""
    sharding = NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec())

    def constrain(*xs: jax.Array) -> list[jax.Array]:
        # Without the barrier, XLA (of jaxlib 0.12) takes the constraint on the results
        # as leave to run a call that has several of them on every device.
        return [
            jax.lax.with_sharding_constraint(x, sharding)
            for x in jax.lax.optimization_barrier(xs)
        ]

    # Avals without the explicit axes of a mesh, on which a constraint is an assertion.
    avals = [ShapedArray(aval.shape, aval.dtype) for aval in avals]
    lower = mlir.lower_fun(constrain, multiple_results=True)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return lower(ctx.replace(avals_in=avals, avals_out=avals), *values)
