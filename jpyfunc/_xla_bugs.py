"""Workarounds for faults of XLA; `tests/test_xla_bugs.py` has a test of each bare fault.

When such a test passes, which it is expected not to, its workaround may go.
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
    """Put operands or results of a host call whole on every device of `sharding`.

    A host call with several results that runs on one device of several is run on all of
    them if its results are constrained to be whole on every device (as of jaxlib 0.12,
    where Shardy propagates the constraint into the call). Through a barrier the constraint
    does not get to the call.
    """
    xs = jax.lax.optimization_barrier(xs)
    return [jax.lax.with_sharding_constraint(x, sharding) for x in xs]


def printable(text: str) -> str:
    """Make `text` one that XLA carries whole, for the message of an exception.

    XLA holds the text of a Python exception as a C string, which ends at the first zero
    byte, and aborts the process where it cannot encode the text in UTF-8, as with the
    surrogates by which Python stands for undecodable bytes of file names.
    """
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def raise_without_stack(error: Exception) -> NoReturn:
    """Raise `error` out of a host call without the calls that lead there in its text.

    XLA makes the text from the exception's traceback, and begins with the whole stack that
    its innermost frame is on: those of JAX, and of the user's program where the host call
    runs on the thread that dispatches it. The frame of a suspended generator is on no
    stack.
    """
    nowhere = _suspended.gi_frame
    place = TracebackType(None, nowhere, nowhere.f_lasti, nowhere.f_lineno)
    raise error.with_traceback(place)


def _nowhere() -> Iterator[None]:
    yield


_suspended: Any = _nowhere()
next(_suspended)


def sample_of_returned(
    ctx: mlir.LoweringRuleContext, operands: Sequence[Any]
) -> tuple[Any, ShapedArray] | None:
    """One element of each value that XLA might lose, as the program returns it alone.

    A call on a reduction of the one array that its program returns fails to compile on
    the CPU (`RET_CHECK ... IsDead`) where its own results are not returned: XLA fuses
    the array into the reduction, its only user, and forgets that it is the root
    (`LibraryRewriter::AddFusionCandidates` of `xla/backends/cpu/transforms`). An element
    of what is reduced, as one more operand of the call, is a user that is never fused.

    Args:
        ctx: the context of the lowering rule.
        operands: lowered operands of a call that stays when its results are unused.

    Returns:
        The elements, a float32 vector, and its aval; None if there is no such value.
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
    values: list[tuple[Any, Any]] = [(value, None) for value in operands]
    elements = []
    while values:
        # The operand that fusions would begin from, with what it is computed from.
        value, first = values.pop()
        is_new = first is not None and _size(first.type) and hash(first) not in sampled
        if is_new and _may_be(value, roots, parts):
            sampled.add(hash(first))
            elements.append(_element(first))
        if hash(value) in seen:
            continue
        seen.add(hash(value))
        operation = value.owner
        if isinstance(operation, ir.Block):  # an argument of it
            continue
        fuses = operation.name in _FUSES_OPERANDS
        values.extend((x, x if fuses else first) for x in operation.operands)
        if operation.name == "func.call":
            values.extend((x, x) for x in operation.results)
    if not elements:
        return None
    aval = ShapedArray((len(elements),), np.float32)
    return stablehlo.concatenate(elements, 0), aval


# For each module, the values that have been searched, and those that have a sample, by
# their hashes: values would keep their module.
_searched: weakref.WeakKeyDictionary[Any, tuple[set[int], set[int]]]
_searched = weakref.WeakKeyDictionary()

# What XLA fuses operands into; a function may do any of it.
_FUSES_OPERANDS = {
    "func.call",
    "stablehlo.convolution",
    "stablehlo.dot_general",
    "stablehlo.reduce",
    "stablehlo.reduce_window",
}


def _only_result(operation: Any) -> list[Any]:
    """Type of the one array that a function, a loop or a branch returns; else nothing."""
    if isinstance(operation, func.FuncOp):
        types = list(operation.type.results)
    else:
        types = [result.type for result in operation.results]
    return types if len(types) == 1 and isinstance(types[0], ir.RankedTensorType) else []


def _may_be(value: Any, roots: Sequence[Any], parts: int) -> bool:
    """Whether a value may become a result, or a part of it, in another shape or dtype."""
    size = _size(value.type)
    return size > 0 and any(
        size <= whole <= size * parts and whole % size == 0 for whole in map(_size, roots)
    )


def _size(type_: Any) -> int:
    """Return the number of elements of values of a type; 0 if they are not arrays."""
    return math.prod(type_.shape) if isinstance(type_, ir.RankedTensorType) else 0


def _element(value: Any) -> Any:
    """The first element of a lowered value, as a float32 vector of one."""
    rank = value.type.rank
    first = stablehlo.slice(value, [0] * rank, [1] * rank, [1] * rank)
    vector = ir.RankedTensorType.get([1], value.type.element_type)
    single = ir.RankedTensorType.get([1], ir.F32Type.get())
    return stablehlo.convert(single, stablehlo.reshape(vector, first))
