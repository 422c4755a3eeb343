"""The custom call by which a compiled program calls a Python function on the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.mlir import ir
from jax.interpreters import mlir

from jpyfunc import _compat
from jpyfunc._xla_bugs import sample_of_returned

HostFunction = Callable[..., tuple[np.ndarray, ...]]


def emit_host_call(
    ctx: mlir.LoweringRuleContext,
    function: HostFunction,
    token: ir.Value | None,
    operands: Sequence[ir.Value],
    *,
    has_side_effect: bool,
) -> tuple[list[ir.Value], ir.Value | None]:
    """Emit the custom call that runs `function` on the host.

    Args:
        ctx: the context of the lowering rule.
        function: called with NumPy operands, returns a tuple of NumPy results.
        token: the token of an ordered effect, or None.
        operands: lowered operands.
        has_side_effect: whether the call stays when its results are unused.

    Returns:
        The lowered results and the new token (None without one).
    """
    platform = ctx.module_context.platforms[0]
    if has_side_effect and platform == "cpu":
        sample = sample_of_returned(ctx, operands)
        if sample is not None:
            operands = [*operands, sample[0]]
            ctx = ctx.replace(avals_in=[*ctx.avals_in, sample[1]])
            function = functools.partial(_without_last, function)
    axes = ctx.module_context.axis_context
    sharding = _compat.callback_op_sharding(axes, None, ctx.avals_out)
    targets = _compat.callback_targets
    if targets is None or platform not in targets:
        return _emit_checked_call(ctx, function, token, operands, sharding, has_side_effect)
    if token is None:
        return _emit_call(ctx, function, operands, sharding, has_side_effect), None
    token, *results = _emit_call(
        ctx.replace(
            avals_in=[_compat.abstract_token, *ctx.avals_in],
            avals_out=[_compat.abstract_token, *ctx.avals_out],
        ),
        functools.partial(_thread_token, function),
        [token, *operands],
        _with_token(sharding) if ctx.avals_out else sharding,
        has_side_effect,
    )
    return results, token


def raises_at_once(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether JAX raises the error of a host call where the program is dispatched.

    It does for programs of a CPU, if the call is made on the thread that dispatches them.
    """
    return ctx.module_context.platforms[0] == "cpu"


def _emit_call(
    ctx: mlir.LoweringRuleContext,
    function: HostFunction,
    operands: Sequence[ir.Value],
    sharding: Any,
    has_side_effect: bool,
) -> list[ir.Value]:
    """Emit a call of JAX's custom-call target for Python functions."""
    module = ctx.module_context
    target = _compat.callback_targets[module.platforms[0]]
    module.add_host_callback(function)
    index = np.uint64(len(module.host_callbacks) - 1)
    lower = jax.ffi.build_ffi_lowering_function(target, has_side_effect=has_side_effect)
    call: Any = lower(ctx, *operands, index=index)
    if sharding is not None:
        _compat.set_sharding(module, call, sharding)
    return list(call.results)


def _emit_checked_call(
    ctx: mlir.LoweringRuleContext,
    function: HostFunction,
    token: ir.Value | None,
    operands: Sequence[ir.Value],
    sharding: Any,
    has_side_effect: bool,
) -> tuple[list[ir.Value], ir.Value | None]:
    """Emit the call by JAX's public function, where its custom-call target is unknown.

    That checks and canonicalizes every result again, on the callback's thread and under
    the configuration of that thread. So 64-bit results need `jax_enable_x64` there: set for
    the process, not by a context manager.
    """
    avals_in: Any = ctx.avals_in
    avals_out: Any = ctx.avals_out
    results: Any
    results, token, _ = mlir.emit_python_callback(
        ctx, function, token, list(operands), avals_in, avals_out,
        has_side_effect=has_side_effect, returns_token=token is not None,
        sharding=sharding,
    )  # fmt: skip
    return list(results), token


def _with_token(sharding: Any) -> Any:
    """Annotate the token, too: Shardy wants one annotation for each result of the call."""
    if not isinstance(sharding, _compat.SdyArrayList):
        return sharding
    devices = sharding.shardings[0].logical_device_ids
    of_token = _compat.SdyArray(mesh_shape=(), dim_shardings=(), logical_device_ids=devices)
    return _compat.SdyArrayList((of_token, *sharding.shardings))


def _thread_token(
    function: HostFunction, token: np.ndarray, *operands: np.ndarray
) -> tuple[np.ndarray, ...]:
    return (token, *function(*operands))


def _without_last(function: HostFunction, *operands: np.ndarray) -> tuple[np.ndarray, ...]:
    return function(*operands[:-1])
