"""Host functions that take whole batches, called on blocks of them on an executor.

A block is a slice of the batch, in each of its axes, of at most `chunksize` elements. The
derivative rules get the same blocks as the function, each with the residuals of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jpyfunc._bodies.steps import Steps, together
from jpyfunc._bodies.user_function import UserFunction
from jpyfunc._conversion import sum_dtype
from jpyfunc._types import Avals

Block = tuple[slice, ...]  # one slice for each batch axis
# Applies a function to a block: from the function of the block, the number of the block and
# its arrays to results.
BlockFunction = Callable[[UserFunction, int, Sequence[Any]], Steps[list[Any]]]


def by_block(
    function: UserFunction,
    apply: BlockFunction,
    arrays: Sequence[Any],
    out_avals: Callable[[], Avals],
) -> Steps[list[Any]]:
    """Apply a function to a batch, block by block.

    Args:
        function: of the whole batch.
        apply: what to do with each block.
        arrays: with the batch axes; those of length 1 are shared by all elements.
        out_avals: gives those of the results, at 2 us. Results that the elements share are
            summed over the batch.
    """
    if function.workers is None or not function.batch_shape:
        return apply(function, 0, arrays)
    blocks = _blocks(function.batch_shape, function.workers.chunksize)
    return _by_blocks(function, blocks, apply, arrays, out_avals())


def _blocks(batch_shape: tuple[int, ...], chunksize: int) -> list[Block]:
    """The blocks of a batch; one that has no elements is one block."""
    axes: list[list[slice]] = []
    room = chunksize
    for size in reversed(batch_shape):
        step = max(1, min(size, room))
        axes.append([slice(i, min(i + step, size)) for i in range(0, max(1, size), step)])
        room //= step
    return [*itertools.product(*reversed(axes))]


def _by_blocks(
    function: UserFunction,
    blocks: Sequence[Block],
    apply: BlockFunction,
    arrays: Sequence[Any],
    out_avals: Avals,
) -> Steps[list[Any]]:
    arrays = [np.asarray(x) for x in arrays]
    parts = yield from together(
        apply(
            function.narrowed(tuple(axis.stop - axis.start for axis in block)),
            number,
            [x[_index(x.shape, block)] for x in arrays],
        )
        for number, block in enumerate(blocks)
    )
    return [
        _joined(blocks, [np.asarray(x) for x in column], aval, function.batch_shape)
        for column, aval in zip(zip(*parts, strict=True), out_avals, strict=True)
    ]


def _index(shape: tuple[int, ...], block: Block) -> Block:
    """The index of a block in an array, which may have axes of length 1."""
    return tuple(
        slice(None) if size == 1 else axis
        for size, axis in zip(shape[: len(block)], block, strict=True)
    )


def _joined(
    blocks: Sequence[Block],
    parts: Sequence[np.ndarray],
    aval: Any,
    batch_shape: tuple[int, ...],
) -> np.ndarray:
    """The array of all blocks."""
    is_summed = aval.shape[: len(batch_shape)] != batch_shape
    result = np.zeros(aval.shape, sum_dtype(aval.dtype) if is_summed else aval.dtype)
    for block, part in zip(blocks, parts, strict=True):
        index = _index(aval.shape, block)
        if is_summed:
            result[index] += part
        else:
            result[index] = part
    return result.astype(aval.dtype, copy=False)
