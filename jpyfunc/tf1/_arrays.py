"""TensorFlow 1's functions that create, join, slice and reshape arrays, such as `tf.zeros`.

As in `math`, parameters and semantics are TensorFlow's, and without a tensor among the
arguments each is a function of JAX. Shapes, axes and sizes are Python numbers, not tensors.
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jpyfunc._errors import see
from jpyfunc.tf1._lift import over_tensors
from jpyfunc.tf1.math import Axes, as_axes


@over_tensors
def identity(input: ArrayLike, name: str | None = None) -> jax.Array:
    """Return the same array, as a new node."""
    return jnp.asarray(input)


@over_tensors
def stop_gradient(input: ArrayLike, name: str | None = None) -> jax.Array:
    """Return the same array, with a gradient of zero."""
    return jax.lax.stop_gradient(jnp.asarray(input))


@over_tensors
def convert_to_tensor(
    value: ArrayLike, dtype: DTypeLike | None = None, name: str | None = None
) -> jax.Array:
    """Convert a value to an array; a tensor stays a tensor."""
    return jnp.asarray(value, dtype)


@over_tensors
def cast(x: ArrayLike, dtype: DTypeLike, name: str | None = None) -> jax.Array:
    """Convert to a dtype; a float converted to an integer is rounded towards zero."""
    return jnp.asarray(x).astype(dtype)


@over_tensors
def to_float(x: ArrayLike, name: str | None = None) -> jax.Array:
    """Convert to `tf.float32`."""
    return jnp.asarray(x).astype(jnp.float32)


@over_tensors
def to_int32(x: ArrayLike, name: str | None = None) -> jax.Array:
    """Convert to `tf.int32`."""
    return jnp.asarray(x).astype(jnp.int32)


@over_tensors
def zeros(
    shape: Sequence[int], dtype: DTypeLike = jnp.float32, name: str | None = None
) -> jax.Array:
    """Make an array of zeros."""
    return jnp.zeros(shape, dtype)


@over_tensors
def ones(
    shape: Sequence[int], dtype: DTypeLike = jnp.float32, name: str | None = None
) -> jax.Array:
    """Make an array of ones."""
    return jnp.ones(shape, dtype)


@over_tensors
def zeros_like(
    tensor: ArrayLike, dtype: DTypeLike | None = None, name: str | None = None
) -> jax.Array:
    """Make an array of zeros with the shape of another and, by default, its dtype."""
    return jnp.zeros_like(tensor, dtype)


@over_tensors
def ones_like(
    tensor: ArrayLike, dtype: DTypeLike | None = None, name: str | None = None
) -> jax.Array:
    """Make an array of ones with the shape of another and, by default, its dtype."""
    return jnp.ones_like(tensor, dtype)


@over_tensors
def fill(dims: Sequence[int], value: ArrayLike, name: str | None = None) -> jax.Array:
    """Make an array of shape `dims` whose elements are all `value`."""
    return jnp.full(dims, value)


@over_tensors
def eye(
    num_rows: int,
    num_columns: int | None = None,
    batch_shape: Sequence[int] | None = None,
    dtype: DTypeLike = jnp.float32,
    name: str | None = None,
) -> jax.Array:
    """Make an identity matrix, or a batch of them."""
    matrix = jnp.eye(num_rows, num_columns, dtype=dtype)
    return jnp.broadcast_to(matrix, (*(batch_shape or ()), *matrix.shape))


@over_tensors
def range(
    start: ArrayLike,
    limit: ArrayLike | None = None,
    delta: ArrayLike = 1,
    dtype: DTypeLike | None = None,
    name: str | None = None,
) -> jax.Array:
    """Count from `start`, by default 0, up to but not including `limit`."""
    start, limit = (0, start) if limit is None else (start, limit)
    return jnp.arange(start, limit, delta, dtype)


@over_tensors
def linspace(
    start: ArrayLike, stop: ArrayLike, num: int, name: str | None = None
) -> jax.Array:
    """Make `num` evenly spaced numbers, including both ends."""
    return jnp.linspace(start, stop, num)


@over_tensors
def shape(
    input: ArrayLike, name: str | None = None, out_type: DTypeLike = jnp.int32
) -> jax.Array:
    """Return the shape as an array of integers."""
    return jnp.asarray(np.shape(input), out_type)


@over_tensors
def size(
    input: ArrayLike, name: str | None = None, out_type: DTypeLike = jnp.int32
) -> jax.Array:
    """Return the number of elements."""
    return jnp.asarray(np.size(input), out_type)


@over_tensors
def rank(input: ArrayLike, name: str | None = None) -> jax.Array:
    """Return the number of axes."""
    return jnp.asarray(np.ndim(input), jnp.int32)


@over_tensors
def reshape(tensor: ArrayLike, shape: Sequence[int], name: str | None = None) -> jax.Array:
    """Change the shape of an array; one size may be -1, which means the rest."""
    return jnp.reshape(tensor, shape)


@over_tensors
def broadcast_to(
    input: ArrayLike, shape: Sequence[int], name: str | None = None
) -> jax.Array:
    """Broadcast an array to a shape."""
    return jnp.broadcast_to(input, tuple(shape))


@over_tensors
def expand_dims(
    input: ArrayLike,
    axis: int | None = None,
    name: str | None = None,
    dim: int | None = None,
) -> jax.Array:
    """Add an axis of length 1."""
    return jnp.expand_dims(input, typing.cast(int, dim if axis is None else axis))


@over_tensors
def squeeze(
    input: ArrayLike, axis: Axes = None, name: str | None = None, squeeze_dims: Axes = None
) -> jax.Array:
    """Remove axes of length 1: all of them, or those in `axis`, an integer or a list."""
    axes = as_axes(squeeze_dims if axis is None else axis)
    return jnp.squeeze(input, None if axes == () else axes)


@over_tensors
def transpose(
    a: ArrayLike,
    perm: Sequence[int] | None = None,
    name: str | None = None,
    conjugate: bool = False,
) -> jax.Array:
    """Permute the axes; by default, reverse their order."""
    result = jnp.transpose(a, None if perm is None else tuple(map(int, perm)))
    return jnp.conj(result) if conjugate else result


@over_tensors
def reverse(tensor: ArrayLike, axis: Sequence[int], name: str | None = None) -> jax.Array:
    """Reverse the elements along the given axes."""
    return jnp.flip(tensor, as_axes(axis))


@over_tensors
def tile(input: ArrayLike, multiples: Sequence[int], name: str | None = None) -> jax.Array:
    """Repeat an array, `multiples` times along each axis."""
    return jnp.tile(input, tuple(multiples))


@over_tensors
def pad(
    tensor: ArrayLike,
    paddings: Sequence[Sequence[int]],
    mode: str = "CONSTANT",
    name: str | None = None,
    constant_values: ArrayLike = 0,
) -> jax.Array:
    """Pad an array with a constant, or by reflection.

    Args:
        tensor: the array.
        paddings: for each axis, how many elements to add before and after.
        mode: `"CONSTANT"`, `"REFLECT"` or `"SYMMETRIC"`.
        name: name of the node.
        constant_values: the constant for `"CONSTANT"`.
    """
    where = {"constant_values": constant_values} if mode.upper() == "CONSTANT" else {}
    widths = [(int(before), int(after)) for before, after in paddings]
    return jnp.pad(tensor, widths, mode.lower(), **where)


@over_tensors
def concat(
    values: ArrayLike | Sequence[ArrayLike], axis: int, name: str | None = None
) -> jax.Array:
    """Concatenate arrays along an existing axis."""
    arrays = values if isinstance(values, list | tuple) else [values]
    return jnp.concatenate([*map(jnp.asarray, arrays)], axis)


@over_tensors
def stack(values: Sequence[ArrayLike], axis: int = 0, name: str | None = None) -> jax.Array:
    """Stack arrays of the same shape along a new axis."""
    return jnp.stack([*map(jnp.asarray, values)], axis)


@over_tensors
def unstack(
    value: ArrayLike, num: int | None = None, axis: int = 0, name: str | None = None
) -> list[jax.Array]:
    """Split an array along an axis into a list of slices without that axis."""
    array = jnp.moveaxis(jnp.asarray(value), axis, 0)
    if num is not None and num != len(array):
        raise ValueError(
            f"unstack: expected num to be {len(array)}, got {num}."
            + see("An invalid argument")
        )
    return [*array]


@over_tensors
def split(
    value: ArrayLike,
    num_or_size_splits: int | Sequence[int],
    axis: int = 0,
    num: int | None = None,
    name: str | None = None,
) -> list[jax.Array]:
    """Split an array along an axis into equal pieces, or into pieces of given sizes."""
    array = jnp.asarray(value)
    if isinstance(num_or_size_splits, int | np.integer):
        return jnp.split(array, num_or_size_splits, axis)
    sizes = [*map(int, num_or_size_splits)]
    if sum(sizes) != array.shape[axis] or min(sizes) < 0:
        raise ValueError(
            f"split: expected sizes that add up to {array.shape[axis]}, got {sizes}."
            + see("An invalid argument")
        )
    return jnp.split(array, [*itertools.accumulate(sizes)][:-1], axis)


@over_tensors
def slice(
    input_: ArrayLike, begin: Sequence[int], size: Sequence[int], name: str | None = None
) -> jax.Array:
    """Extract the block of shape `size` at `begin`; a size of -1 means the rest."""
    array = jnp.asarray(input_)
    ends = [
        whole if length == -1 else start + length
        for start, length, whole in zip(begin, size, array.shape, strict=True)
    ]
    # Eagerly, lax.slice would clip what it refuses under jit.
    if not all(
        0 <= start <= end <= whole
        for start, end, whole in zip(begin, ends, array.shape, strict=True)
    ):
        raise ValueError(
            f"slice: expected begin and size within shape {array.shape}, got {begin} and "
            f"{size}." + see("An invalid argument")
        )
    return jax.lax.slice(array, [*map(int, begin)], [*map(int, ends)])


@over_tensors
def gather(
    params: ArrayLike,
    indices: ArrayLike,
    validate_indices: bool | None = None,
    name: str | None = None,
    axis: int = 0,
) -> jax.Array:
    """Take slices along an axis; indices that are out of bounds give NaN."""
    return jnp.take(jnp.asarray(params), jnp.asarray(indices), axis, mode="fill")


@over_tensors
def gather_nd(params: ArrayLike, indices: ArrayLike, name: str | None = None) -> jax.Array:
    """Take slices at multi-dimensional indices, which are the last axis of `indices`."""
    at = jnp.moveaxis(jnp.asarray(indices), -1, 0)
    return jnp.asarray(params).at[tuple(at)].get(mode="fill")


@over_tensors
def where(
    condition: ArrayLike,
    x: ArrayLike | None = None,
    y: ArrayLike | None = None,
    name: str | None = None,
) -> jax.Array:
    """Take elements of `x` where the condition is true, and of `y` elsewhere.

    Args:
        condition: has the shape of `x` and `y`, or is a vector that selects their rows.
        x: array or scalar. Without `x` and `y`, the indices of true elements are returned,
            one per row; their number depends on data, so call it in a `py_func`.
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
    indices: ArrayLike,
    depth: int,
    on_value: ArrayLike | None = None,
    off_value: ArrayLike | None = None,
    axis: int | None = None,
    dtype: DTypeLike | None = None,
    name: str | None = None,
) -> jax.Array:
    """Make arrays of `off_value` (0) with `on_value` (1) at the given indices."""
    given = [jnp.asarray(x) for x in (on_value, off_value) if x is not None]
    if dtype is None:
        dtype = jnp.result_type(*given) if given else jnp.float32
    hot = jax.nn.one_hot(
        jnp.asarray(indices), depth, dtype=jnp.bool_, axis=-1 if axis is None else axis
    )
    on, off = 1 if on_value is None else on_value, 0 if off_value is None else off_value
    return jnp.where(hot, jnp.asarray(on, dtype), jnp.asarray(off, dtype))


@over_tensors
def meshgrid(
    *args: ArrayLike, indexing: str = "xy", name: str | None = None
) -> list[jax.Array]:
    """Broadcast vectors against each other, one axis per vector."""
    return jnp.meshgrid(*map(jnp.asarray, args), indexing=indexing)
