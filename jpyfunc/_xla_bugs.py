"""Workarounds for faults of XLA, which `tests/test_xla_bugs.py` reproduces without them.

Those tests are expected to fail. Once one passes, its workaround can go. "Upstream" says
whether the fault is known, and how to report it; the program to attach is the test.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NoReturn

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import func, stablehlo
from jax.interpreters import mlir
from jax.sharding import NamedSharding


def constrained(xs: Sequence[jax.Array], sharding: NamedSharding) -> list[jax.Array]:
    """Constrain operands or results of a host call to a replicated sharding.

    As of jaxlib 0.12, a host call with several results that is annotated to run on one
    device runs on every device if its results are constrained to be replicated. A barrier
    between the call and the constraint prevents that.

    Upstream: no issue known as of 2026-11. "`jax.pure_callback` with two results runs once
    on each device, with jaxlib 0.12, if both results have a sharding constraint to be
    replicated; with jaxlib 0.10, or with one result, it runs once."
    """
    xs = jax.lax.optimization_barrier(xs)
    return [jax.lax.with_sharding_constraint(x, sharding) for x in xs]


def printable(text: str) -> str:
    """Escape what XLA cannot carry in the message of an exception.

    XLA cuts the message at the first zero byte. It aborts the process if the message is not
    valid UTF-8, as with surrogates, by which Python represents undecodable bytes of file
    names.

    Upstream: no issue known as of 2026-11. "An exception of a callback whose message has a
    lone surrogate aborts the process, on the CPU; at a zero byte the message of
    `JaxRuntimeError` ends." Other bindings have had the former (pybind/pybind11#4288).
    """
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def raise_without_stack(error: Exception) -> NoReturn:
    """Raise `error` out of a host call, without the stack of the host call in its message.

    To the message of an exception, XLA adds the whole stack of its innermost frame: all
    frames of the host call and, on the thread that dispatches the program, those of JAX and
    of the user's program. So the traceback gets the frame of a suspended generator as its
    innermost one, which is on no stack.

    Upstream: no issue known as of 2026-11. "The message of `JaxRuntimeError` about a
    callback that raised lists all frames of the calling thread, not those of the traceback
    alone: kilobytes of frames of JAX, and of the program that called it." That it has no
    `__cause__` is another matter (jax-ml/jax#26102).
    """
    nowhere = _suspended.gi_frame
    place = TracebackType(None, nowhere, nowhere.f_lasti, nowhere.f_lineno)
    raise error.with_traceback(place)


def _nowhere() -> Iterator[None]:
    yield


_suspended: Any = _nowhere()
next(_suspended)


def sample_of_returned(
    ctx: mlir.LoweringRuleContext, operands: Sequence[ir.Value]
) -> tuple[ir.Value, ShapedArray] | None:
    """Sample each value that XLA might lose, because the program returns nothing else.

    A program with a call that takes a reduction of an array, and that returns this array
    alone, fails to compile on the CPU (`RET_CHECK ... IsDead`): XLA fuses the array into
    the reduction, its only user, and forgets that it is the root of the program
    (`LibraryRewriter::AddFusionCandidates` of `xla/backends/cpu/transforms`). One element
    of the array as another operand of the call makes the call a second user, which is
    never fused.

    Upstream: no issue known as of 2026-11. "`jit(f)` fails to compile on the CPU, with
    `y = x @ x; jax.debug.callback(print, y.sum(1)); return y` in `f` and 600 x 600
    floats: `LibraryRewriter` fuses the product, which is the root, into the reduction, and
    then removes it, which is not dead."

    Args:
        ctx: the context of the lowering rule.
        operands: lowered operands of a call that stays when its results are unused.

    Returns:
        The samples, one element each in a float32 vector, and its aval; None if no value
        may be lost.
    """
    module = ctx.module_context
    here: Any = ir.InsertionPoint.current
    block = here.block
    roots = _only_result(module.symbol_table["main"]) + _only_result(block.owner)
    if not roots:
        return None
    axes = module.axis_context
    parts = axes.mesh.size if isinstance(axes, mlir.SPMDAxisContext) else 1
    seen, sampled = _searched.setdefault(module.module, (set(), set()))
    elements = []
    for value, fused in _fused_values(operands, seen):
        is_new = _size(fused.type) and hash(fused) not in sampled
        if is_new and _may_be_returned(value, roots, parts):
            sampled.add(hash(fused))
            elements.append(_element(fused))
    if not elements:
        return None
    aval = ShapedArray((len(elements),), np.float32)
    return stablehlo.concatenate(elements, 0), aval


def _fused_values(
    operands: Sequence[ir.Value], seen: set[int]
) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Walk back from lowered values, to all that XLA may fuse into what they depend on.

    Args:
        operands: where to begin.
        seen: hashes of the values that were visited, whose operands are not visited again.

    Yields:
        A value, and the operand of a fusing operation that is computed from it.
    """
    values: list[tuple[ir.Value, ir.Value | None]] = [(value, None) for value in operands]
    while values:
        value, fused = values.pop()
        if fused is not None:
            yield value, fused
        if hash(value) in seen:
            continue
        seen.add(hash(value))
        operation = value.owner
        if isinstance(operation, ir.Block):  # the value is an argument of it
            continue
        fuses = operation.name in _FUSES_OPERANDS
        values.extend((x, x if fuses else fused) for x in operation.operands)
        if operation.name == "func.call":
            values.extend((x, x) for x in operation.results)


# By module, the hashes of the values that were visited, and of those that were sampled.
# The values themselves would keep the module alive.
_searched: weakref.WeakKeyDictionary[Any, tuple[set[int], set[int]]]
_searched = weakref.WeakKeyDictionary()

# Operations that XLA fuses operands into; a function may contain any of them.
_FUSES_OPERANDS = {
    "func.call",
    "stablehlo.convolution",
    "stablehlo.dot_general",
    "stablehlo.reduce",
    "stablehlo.reduce_window",
}


def _only_result(operation: Any) -> list[ir.RankedTensorType]:
    """The type of what a function, a loop or a branch returns, if that is one array."""
    types: list[Any]
    if isinstance(operation, func.FuncOp):
        types = list(operation.type.results)
    else:
        types = [result.type for result in operation.results]
    return types if len(types) == 1 and isinstance(types[0], ir.RankedTensorType) else []


def _may_be_returned(
    value: ir.Value, roots: Sequence[ir.RankedTensorType], parts: int
) -> bool:
    """Whether a value may be a result or a shard of it, in some shape and dtype."""
    size = _size(value.type)
    return size > 0 and any(
        size <= whole <= size * parts and whole % size == 0 for whole in map(_size, roots)
    )


def _size(type_: ir.Type) -> int:
    """Return the number of elements of values of a type; 0 if they are not arrays."""
    return math.prod(type_.shape) if isinstance(type_, ir.RankedTensorType) else 0


def _element(value: ir.Value) -> ir.Value:
    """The first element of a lowered value, as a float32 vector of one."""
    rank = value.type.rank
    first = stablehlo.slice(value, [0] * rank, [1] * rank, [1] * rank)
    vector = ir.RankedTensorType.get([1], value.type.element_type)
    single = ir.RankedTensorType.get([1], ir.F32Type.get())
    return stablehlo.convert(single, stablehlo.reshape(vector, first))
