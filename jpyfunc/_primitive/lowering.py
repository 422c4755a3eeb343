"""Lowering rule: a host call in a compiled program, its effects, tokens and shardings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.mlir import ir
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpyfunc import _compat
from jpyfunc._errors import UnsupportedError, see
from jpyfunc._primitive.custom_call import emit_host_call, raises_at_once
from jpyfunc._primitive.effects import ORDERED
from jpyfunc._primitive.failure_report import (
    REPORT_AVAL,
    raise_on_every_device,
)
from jpyfunc._primitive.host_call import HostCall
from jpyfunc._primitive.primitive import Params
from jpyfunc._runtime.clients import body_device
from jpyfunc._runtime.failures import watch
from jpyfunc._runtime.fences import add_fences
from jpyfunc._xla_bugs import constrained


def _py_func_lowering(
    ctx: mlir.LoweringRuleContext, *operands: ir.Value, params: Params
) -> list[ir.Value]:
    """Emit the host call of one bind.

    Under `jit` over several devices, XLA partitions the program. The host call takes whole
    arrays and runs on one of the devices: its operands are gathered, its results
    replicated, and its failure is raised on every device.

    Raises:
        UnsupportedError: the program is exported, is lowered for several platforms at
            once or for one without host callbacks, or leaves some mesh axes automatic
            in a `shard_map`.
    """
    _check_supported(ctx, params)
    add_fences(_local_devices(ctx))
    watch()
    replicated = _replicated(ctx)
    avals_out = list(ctx.avals_out)
    if replicated is not None:
        operands = (
            *_lowered(ctx, constrained, operands, ctx.avals_in, ctx.avals_in, replicated),
        )
        avals_out.append(REPORT_AVAL)
    token = ctx.tokens_in.get(ORDERED) if params.ordered else None
    results, token = emit_host_call(
        ctx.replace(avals_out=avals_out),
        HostCall(
            params.body,
            params.config,
            body_device(ctx),
            reports=replicated is not None,
            raises_at_once=raises_at_once(ctx),
        ),
        token,
        operands,
        has_side_effect=params.stateful,
    )
    if replicated is not None:
        # Results that stayed on the one device would have a sharding that no later eager
        # operation accepts.
        results = _lowered(ctx, _checked, results, avals_out, ctx.avals_out, replicated)
    if token is not None:
        ctx.set_tokens_out(ctx.tokens_in.update_tokens(mlir.TokenSet({ORDERED: token})))
    return list(results)


def _check_supported(ctx: mlir.LoweringRuleContext, params: Params) -> None:
    params.body.check_differentiable()
    platforms = ctx.module_context.platforms
    if ctx.module_context.lowering_parameters.for_export:
        raise UnsupportedError(
            f"{params.name} cannot be exported: its body is a Python function of this "
            "process and not part of the program. Export what surrounds it, or "
            + (
                "write that part with jax.numpy."
                if params.body.function.is_host_function or params.stateful
                else "compile it: staged=True makes its branches part of the program, if "
                "jpyfunc.explain(f, *args) shows that no call of it is left."
            )
            + see("Export and pickling")
        )
    if len(platforms) > 1 or platforms[0] not in ("cpu", "cuda", "rocm", "tpu"):
        raise UnsupportedError(
            f"{params.name} cannot be lowered for {', '.join(platforms)}: "
            "expected one of cpu, cuda, rocm and tpu. Lower for that one alone."
            + see("Export and pickling")
        )
    axes = ctx.module_context.axis_context
    if isinstance(axes, mlir.SPMDAxisContext):
        automatic = frozenset(axes.mesh.axis_names) - axes.manual_axes
        if automatic:
            raise UnsupportedError(
                f"{params.name} is called in a shard_map that leaves mesh axes "
                f"{sorted(map(str, automatic))} automatic, where JAX has no host calls. "
                "Name every axis of the mesh in axis_names."
                + see("Under shard_map and over several processes")
            )


def _local_devices(ctx: mlir.LoweringRuleContext) -> list[_compat.Device]:
    """The devices of this process that the program will run on."""
    axes = ctx.module_context.axis_context
    if isinstance(axes, mlir.SPMDAxisContext):
        devices: Any = axes.mesh.devices.flat
    else:
        devices = getattr(axes, "device_assignment", None) or ()
    return [d for d in devices if d in d.client.local_devices()]


def _replicated(ctx: mlir.LoweringRuleContext) -> NamedSharding | None:
    """The replicated sharding, if XLA partitions the program over several devices."""
    axes = ctx.module_context.axis_context
    if not isinstance(axes, mlir.ShardingContext) or axes.num_devices == 1:
        return None
    devices: list[_compat.Device] = list(axes.device_assignment or ())
    return NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec())


def _checked(xs: Sequence[jax.Array], sharding: NamedSharding) -> list[jax.Array]:
    *results, report = constrained(xs, sharding)
    return raise_on_every_device(results, report, sharding)


def _lowered(
    ctx: mlir.LoweringRuleContext,
    function: Callable[[Sequence[jax.Array], NamedSharding], list[jax.Array]],
    values: Sequence[ir.Value],
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    sharding: NamedSharding,
) -> Sequence[ir.Value]:
    """Lower `function`, of arrays and `sharding`, and apply it to lowered `values`."""
    lower = mlir.lower_fun(lambda *xs: function(xs, sharding), multiple_results=True)
    # Without the explicit axes of a mesh, over which a sharding constraint would not
    # reshard but assert.
    plain = [
        [ShapedArray(aval.shape, aval.dtype) for aval in avals]
        for avals in (avals_in, avals_out)
    ]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return lower(ctx.replace(avals_in=plain[0], avals_out=plain[1]), *values)
