"""Placeholders and constants: tensors without inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jpyfunc._conversion import is_key_dtype
from jpyfunc._errors import see
from jpyfunc._tout import is_dtype, parse
from jpyfunc.tf1._apply import Compute, Spec
from jpyfunc.tf1._graph import get_default_graph
from jpyfunc.tf1._nodes import Tensor
from jpyfunc.tf1._values import convert, fits, parse_shape


def placeholder(
    dtype: DTypeLike, shape: Sequence[int | None] | None = None, name: str | None = None
) -> Tensor:
    """Make a tensor whose value is fed to every run.

    Args:
        dtype: dtype of the values, such as `tf.float32`.
        shape: shape of the values; None allows any shape, and None in it any size.
        name: name of the operation; by default `Placeholder`.

    Returns:
        A tensor of the default graph.

    Raises:
        TypeError: `dtype` is not a dtype of JAX, or `shape` is not a list of sizes.
        ValueError: `dtype` has 64 bits and `jax_enable_x64` is off, or `name` is invalid.

    Example:
        >>> import jpyfunc.tf1 as tf
        >>> x = tf.placeholder(tf.float32, shape=[None, 2])
        >>> total = tf.reduce_sum(x, axis=0)
        >>> with tf.Session() as sess:
        ...     print(sess.run(total, {x: [[1, 2], [3, 4], [5, 6]]}))
        [ 9. 12.]

    Source: `tf.placeholder` of TensorFlow 1.
    """
    where = f"placeholder {name or 'Placeholder'!r}"
    spec = (_dtype(dtype, where), parse_shape(shape, where))
    return _add(name or "Placeholder", None, spec)


def constant(
    value: Any,
    dtype: DTypeLike | None = None,
    shape: Sequence[int] | None = None,
    name: str | None = None,
) -> Tensor:
    """Make a tensor with a constant value, which can be overridden by a feed.

    Args:
        value: an array, a Python scalar or a nested list of these.
        dtype: dtype of the tensor; by default that of `jnp.asarray(value)`.
        shape: shape of the tensor, to which an array is reshaped and a scalar is broadcast.
        name: name of the operation; by default `Const`.

    Returns:
        A tensor of the default graph.

    Raises:
        TypeError: `value` is not an array, or `dtype` is not a dtype of JAX.
        ValueError: `value` does not have as many elements as `shape`.

    Example:
        >>> import jpyfunc.tf1 as tf
        >>> with tf.Session() as sess:
        ...     print(sess.run(tf.constant(7, shape=[2, 2])))
        [[7 7]
         [7 7]]

    Source: `tf.constant`.
    """
    where = f"constant {name or 'Const'!r}"
    array = jnp.asarray(
        convert(value, None if dtype is None else _dtype(dtype, where), None, lambda: where)
    )
    if shape is not None:
        sizes = tuple(shape)
        if array.size not in (1, math.prod(sizes)):
            raise ValueError(
                f"{where}: expected a scalar or as many elements as shape {sizes} has, got "
                f"shape {array.shape}." + see("A value that does not fit a tensor")
            )
        filled = jnp.broadcast_to(array.reshape(()), sizes) if array.size == 1 else array
        array = filled.reshape(sizes)
    return _add(name or "Const", lambda _: [array], (array.dtype, array.shape))


def placeholder_with_default(
    value: Any, shape: Sequence[int | None] | None, name: str | None = None
) -> Tensor:
    """Make a tensor with a default value, which can be overridden by a feed.

    Args:
        value: the default: an array, a Python scalar, a nested list of these, or a tensor.
        shape: shape of the values that may be fed, as for `placeholder`.
        name: name of the operation; by default `PlaceholderWithDefault`.

    Returns:
        A tensor of the graph that `value` belongs to, or else of the default graph.

    Raises:
        TypeError: `value` is not an array, or `shape` is not a list of sizes.
        ValueError: `value` does not have that shape.

    Example:
        >>> import jpyfunc.tf1 as tf
        >>> rate = tf.placeholder_with_default(0.1, shape=[])
        >>> with tf.Session() as sess:
        ...     print(sess.run(rate), sess.run(rate, {rate: 0.5}))
        0.1 0.5

    Source: `tf.placeholder_with_default` of TensorFlow 1.
    """
    name = name or "PlaceholderWithDefault"
    if not isinstance(value, Tensor):
        value = constant(value, name=f"{name}/default")
    shape = parse_shape(shape, f"placeholder_with_default {name!r}")
    if not fits(value.shape, shape):
        raise ValueError(
            f"placeholder_with_default {name!r}: expected a default of shape "
            f"{shape}, got {value.shape}; write a shape that fits both, with None for "
            "sizes that may differ." + see("A value that does not fit a tensor")
        )
    spec = (value.dtype, shape)
    return value.graph.create_operation(name, [value], list, [spec]).outputs[0]


def _add(name: str, compute: Compute | None, spec: Spec) -> Tensor:
    return get_default_graph().create_operation(name, [], compute, [spec]).outputs[0]


def _dtype(dtype: DTypeLike, where: str) -> np.dtype:
    if not is_dtype(dtype):
        raise TypeError(
            f"{where}: expected a dtype such as tf.float32, got {dtype!r}."
            + see("An invalid argument")
        )
    (leaf,) = parse(dtype, where).leaves
    if is_key_dtype(leaf.dtype):
        return leaf.dtype
    available = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if available != leaf.dtype:
        raise ValueError(
            f"{where}: {leaf.dtype} needs 64-bit types, and jax_enable_x64 is off; write "
            f"tf.{available}, or build and run it under jax.enable_x64(True)."
            + see("64-bit results")
        )
    return leaf.dtype
