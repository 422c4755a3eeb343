"""The custom call by which a compiled program calls a Python function on the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.interpreters import mlir

from jpyfunc import _compat
from jpyfunc._xla_bugs import sample_of_returned

HostFunction = Callable[..., tuple[np.ndarray, ...]]


def emit_host_call(
    ctx: mlir.LoweringRuleContext,
    function: HostFunction,
    token: Any,
    operands: Sequence[Any],
    *,
    has_side_effect: bool,
) -> tuple[list[Any], Any]:
    """Emit the custom call that runs `function` on the host.

    `jax.interpreters.mlir.emit_python_callback` does the same and then checks and
    canonicalizes every result on the callback's thread, under the configuration of that
    thread; `function` has done so under the caller's.

    Args:
        ctx: the context of the lowering rule.
        function: called with NumPy operands, returns a tuple of NumPy results.
        token: the token of an ordered effect, or None.
        operands: lowered operands.
        has_side_effect: whether the call stays when its results are unused.

    Returns:
        The lowered results and the new token (None without one).
    """
    module = ctx.module_context
    sharding = _compat.callback_op_sharding(module.axis_context, None, ctx.avals_out)
    if module.platforms[0] == "tpu":
        avals_in, avals_out = cast(Any, (ctx.avals_in, ctx.avals_out))
        results, token, _ = mlir.emit_python_callback(
            ctx, function, token, list(operands), avals_in, avals_out,
            has_side_effect=has_side_effect, returns_token=token is not None,
            sharding=sharding,
        )  # fmt: skip
        return list(results), token
    callback = function
    if token is not None:
        operands = [token, *operands]
        ctx = ctx.replace(
            avals_in=[_compat.abstract_token, *ctx.avals_in],
            avals_out=[_compat.abstract_token, *ctx.avals_out],
        )
        callback = functools.partial(_thread_token, function)
        if isinstance(sharding, _compat.SdyArrayList) and ctx.avals_out[1:]:
            # One annotation per result, and the token is now the first of them.
            devices = sharding.shardings[0].logical_device_ids
            of_token = _compat.SdyArray(
                mesh_shape=(), dim_shardings=(), logical_device_ids=devices
            )
            sharding = _compat.SdyArrayList((of_token, *sharding.shardings))
    kind = "cpu" if module.platforms[0] == "cpu" else "gpu"
    sample = (
        sample_of_returned(ctx, operands) if has_side_effect and kind == "cpu" else None
    )
    if sample is not None:
        operands = [*operands, sample[0]]
        ctx = ctx.replace(avals_in=[*ctx.avals_in, sample[1]])
        callback = functools.partial(_drop_last, callback)
    module.add_host_callback(callback)
    call = jax.ffi.build_ffi_lowering_function(
        f"xla_ffi_python_{kind}_callback", has_side_effect=has_side_effect
    )(ctx, *operands, index=np.uint64(len(module.host_callbacks) - 1))
    if sharding is not None:
        _compat.set_sharding(module, call, sharding)
    results = list(call.results)
    if token is not None:
        token, *results = results
    return results, token


def _thread_token(function: HostFunction, token: Any, *operands: Any) -> tuple[Any, ...]:
    return (token, *function(*operands))


def _drop_last(callback: HostFunction, *operands: Any) -> tuple[Any, ...]:
    return callback(*operands[:-1])
