"""TensorFlow 1's functions that make, join, cut and reshape arrays, at the top of `tf`.

As those of `math`: with TensorFlow's parameters and meaning, and functions of JAX where
no argument is a tensor. Shapes, axes and sizes are Python numbers, not tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpyfunc.tf1._lift import over_tensors
from jpyfunc.tf1.math import as_axes


@over_tensors
def identity(input: Any, name: str | None = None) -> Any:
    """Return the array itself, as another node."""
    return jnp.asarray(input)


@over_tensors
def stop_gradient(input: Any, name: str | None = None) -> Any:
    """Return the array itself, of which gradients are zero."""
    return jax.lax.stop_gradient(jnp.asarray(input))


@over_tensors
def convert_to_tensor(value: Any, dtype: Any = None, name: str | None = None) -> Any:
    """Make an array of a value; a tensor stays one."""
    return jnp.asarray(value, dtype)


@over_tensors
def cast(x: Any, dtype: Any, name: str | None = None) -> Any:
    """Convert to a dtype; a float becomes an integer by rounding to zero."""
    return jnp.asarray(x).astype(dtype)


@over_tensors
def to_float(x: Any, name: str | None = None) -> Any:
    """Convert to `tf.float32`."""
    return jnp.asarray(x).astype(jnp.float32)


@over_tensors
def to_int32(x: Any, name: str | None = None) -> Any:
    """Convert to `tf.int32`."""
    return jnp.asarray(x).astype(jnp.int32)


@over_tensors
def zeros(shape: Any, dtype: Any = jnp.float32, name: str | None = None) -> Any:
    """Make an array of zeros."""
    return jnp.zeros(shape, dtype)


@over_tensors
def ones(shape: Any, dtype: Any = jnp.float32, name: str | None = None) -> Any:
    """Make an array of ones."""
    return jnp.ones(shape, dtype)


@over_tensors
def zeros_like(tensor: Any, dtype: Any = None, name: str | None = None) -> Any:
    """Make an array of zeros of the shape of another, and of its dtype or a given one."""
    return jnp.zeros_like(tensor, dtype)


@over_tensors
def ones_like(tensor: Any, dtype: Any = None, name: str | None = None) -> Any:
    """Make an array of ones of the shape of another, and of its dtype or a given one."""
    return jnp.ones_like(tensor, dtype)


@over_tensors
def fill(dims: Any, value: Any, name: str | None = None) -> Any:
    """Make an array of shape `dims` whose elements are all `value`."""
    return jnp.full(dims, value)


@over_tensors
def eye(
    num_rows: int,
    num_columns: int | None = None,
    batch_shape: Sequence[int] | None = None,
    dtype: Any = jnp.float32,
    name: str | None = None,
) -> Any:
    """Make an identity matrix, or a batch of them."""
    matrix = jnp.eye(num_rows, num_columns, dtype=dtype)
    return jnp.broadcast_to(matrix, (*(batch_shape or ()), *matrix.shape))


@over_tensors
def range(
    start: Any,
    limit: Any = None,
    delta: Any = 1,
    dtype: Any = None,
    name: str | None = None,
) -> Any:
    """Count from `start`, by default 0, to `limit` in steps of `delta`."""
    start, limit = (0, start) if limit is None else (start, limit)
    return jnp.arange(start, limit, delta, dtype)


@over_tensors
def linspace(start: Any, stop: Any, num: int, name: str | None = None) -> Any:
    """Make `num` evenly spaced numbers, with both ends."""
    return jnp.linspace(start, stop, num)


@over_tensors
def shape(input: Any, name: str | None = None, out_type: Any = jnp.int32) -> Any:
    """Return the shape as an array of integers."""
    return jnp.asarray(np.shape(input), out_type)


@over_tensors
def size(input: Any, name: str | None = None, out_type: Any = jnp.int32) -> Any:
    """Return the number of elements."""
    return jnp.asarray(np.size(input), out_type)


@over_tensors
def rank(input: Any, name: str | None = None) -> Any:
    """Return the number of axes."""
    return jnp.asarray(np.ndim(input), jnp.int32)


@over_tensors
def reshape(tensor: Any, shape: Any, name: str | None = None) -> Any:
    """Give an array another shape, in which one size may be -1."""
    return jnp.reshape(tensor, shape)


@over_tensors
def broadcast_to(input: Any, shape: Any, name: str | None = None) -> Any:
    """Repeat an array to a shape, as arithmetic does."""
    return jnp.broadcast_to(input, tuple(shape))


@over_tensors
def expand_dims(
    input: Any, axis: Any = None, name: str | None = None, dim: Any = None
) -> Any:
    """Add an axis of length 1."""
    return jnp.expand_dims(input, dim if axis is None else axis)


@over_tensors
def squeeze(
    input: Any, axis: Any = None, name: str | None = None, squeeze_dims: Any = None
) -> Any:
    """Remove axes of length 1: all, or those of `axis`, an integer or a list."""
    axes = as_axes(squeeze_dims if axis is None else axis)
    return jnp.squeeze(input, None if axes == () else axes)


@over_tensors
def transpose(
    a: Any, perm: Any = None, name: str | None = None, conjugate: bool = False
) -> Any:
    """Permute the axes, by default to the reverse order."""
    result = jnp.transpose(a, None if perm is None else tuple(map(int, perm)))
    return jnp.conj(result) if conjugate else result


@over_tensors
def reverse(tensor: Any, axis: Any, name: str | None = None) -> Any:
    """Reverse the order along the axes of a list."""
    return jnp.flip(tensor, as_axes(axis))


@over_tensors
def tile(input: Any, multiples: Any, name: str | None = None) -> Any:
    """Repeat an array, `multiples` times along each axis."""
    return jnp.tile(input, tuple(multiples))


@over_tensors
def pad(
    tensor: Any,
    paddings: Any,
    mode: str = "CONSTANT",
    name: str | None = None,
    constant_values: Any = 0,
) -> Any:
    """Pad an array with a constant, or by reflection.

    Args:
        tensor: what to pad.
        paddings: for each axis, how many elements to add before and after.
        mode: `"CONSTANT"`, `"REFLECT"` or `"SYMMETRIC"`.
        name: name of the node.
        constant_values: the constant.
    """
    where = {"constant_values": constant_values} if mode.upper() == "CONSTANT" else {}
    widths = [(int(before), int(after)) for before, after in paddings]
    return jnp.pad(tensor, widths, mode.lower(), **where)


@over_tensors
def concat(values: Any, axis: int, name: str | None = None) -> Any:
    """Join arrays along an axis that they have."""
    arrays = values if isinstance(values, list | tuple) else [values]
    return jnp.concatenate([*map(jnp.asarray, arrays)], axis)


@over_tensors
def stack(values: Any, axis: int = 0, name: str | None = None) -> Any:
    """Join arrays of one shape along a new axis."""
    return jnp.stack([*map(jnp.asarray, values)], axis)


@over_tensors
def unstack(
    value: Any, num: int | None = None, axis: int = 0, name: str | None = None
) -> Any:
    """Split an array along an axis, which its parts do not have, to a list."""
    array = jnp.moveaxis(jnp.asarray(value), axis, 0)
    if num is not None and num != len(array):
        raise ValueError(f"unstack: expected num to be {len(array)}, got {num}.")
    return [*array]


@over_tensors
def split(
    value: Any,
    num_or_size_splits: Any,
    axis: int = 0,
    num: int | None = None,
    name: str | None = None,
) -> Any:
    """Split an array along an axis to a list of equal parts, or of parts of given sizes."""
    array = jnp.asarray(value)
    if isinstance(num_or_size_splits, int | np.integer):
        return jnp.split(array, num_or_size_splits, axis)
    sizes = [*map(int, num_or_size_splits)]
    if sum(sizes) != array.shape[axis] or min(sizes) < 0:
        raise ValueError(
            f"split: expected sizes that add up to {array.shape[axis]}, got {sizes}."
        )
    return jnp.split(array, [*itertools.accumulate(sizes)][:-1], axis)


@over_tensors
def slice(input_: Any, begin: Any, size: Any, name: str | None = None) -> Any:
    """Cut out the block of shape `size` at `begin`; a size of -1 is all the rest."""
    array = jnp.asarray(input_)
    ends = [
        whole if length == -1 else start + length
        for start, length, whole in zip(begin, size, array.shape, strict=True)
    ]
    # lax.slice clips eagerly what it refuses under jit.
    if not all(
        0 <= start <= end <= whole
        for start, end, whole in zip(begin, ends, array.shape, strict=True)
    ):
        raise ValueError(
            f"slice: expected begin and size within shape {array.shape}, got {begin} and "
            f"{size}."
        )
    return jax.lax.slice(array, [*map(int, begin)], [*map(int, ends)])


@over_tensors
def gather(
    params: Any,
    indices: Any,
    validate_indices: Any = None,
    name: str | None = None,
    axis: int = 0,
) -> Any:
    """Take slices along an axis; NaN stands for those that are out of bounds."""
    return jnp.take(jnp.asarray(params), jnp.asarray(indices), axis, mode="fill")


@over_tensors
def gather_nd(params: Any, indices: Any, name: str | None = None) -> Any:
    """Take slices at multi-dimensional indices, the last axis of `indices`."""
    at = jnp.moveaxis(jnp.asarray(indices), -1, 0)
    return jnp.asarray(params).at[tuple(at)].get(mode="fill")


@over_tensors
def where(condition: Any, x: Any = None, y: Any = None, name: str | None = None) -> Any:
    """Take elements of `x` where the condition is true, and of `y` elsewhere.

    Args:
        condition: of the shape of `x` and `y`, or a vector that chooses among their rows.
        x: array or scalar; left out with `y`, the indices of true elements are returned,
            one per row, for which a `py_func` has to be around this call.
        y: array or scalar.
        name: name of the node.
    """
    condition = jnp.asarray(condition)
    if x is None and y is None:
        return jnp.argwhere(condition)
    x, y = jnp.asarray(x), jnp.asarray(y)
    axes = max(x.ndim, y.ndim)
    if condition.ndim == 1 and axes > 1:
        condition = condition.reshape(-1, *(1,) * (axes - 1))
    return jnp.where(condition, x, y)


@over_tensors
def one_hot(
    indices: Any,
    depth: int,
    on_value: Any = None,
    off_value: Any = None,
    axis: int | None = None,
    dtype: Any = None,
    name: str | None = None,
) -> Any:
    """Make arrays of `off_value`, which is 0, with `on_value`, which is 1, at indices."""
    given = [jnp.asarray(x) for x in (on_value, off_value) if x is not None]
    if dtype is None:
        dtype = jnp.result_type(*given) if given else jnp.float32
    hot = jax.nn.one_hot(
        jnp.asarray(indices), depth, dtype=jnp.bool_, axis=-1 if axis is None else axis
    )
    on, off = 1 if on_value is None else on_value, 0 if off_value is None else off_value
    return jnp.where(hot, jnp.asarray(on, dtype), jnp.asarray(off, dtype))


@over_tensors
def meshgrid(*args: Any, indexing: str = "xy", name: str | None = None) -> Any:
    """Repeat vectors to arrays of one shape, one axis per vector."""
    return jnp.meshgrid(*map(jnp.asarray, args), indexing=indexing)
