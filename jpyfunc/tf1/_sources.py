"""Placeholders and constants: tensors that depend on no others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpyfunc._tout import is_dtype, is_key_dtype, parse
from jpyfunc.tf1._graph import get_default_graph
from jpyfunc.tf1._nodes import Tensor
from jpyfunc.tf1._values import convert, fits, parse_shape


def placeholder(
    dtype: Any, shape: Sequence[int | None] | None = None, name: str | None = None
) -> Tensor:
    """Make a tensor whose value is fed to every run.

    Args:
        dtype: of the values fed, such as `tf.float32`.
        shape: of the values fed; None, or None for some of the sizes, allows any.
        name: of its operation; by default `Placeholder`.

    Returns:
        A tensor of the default graph.

    Raises:
        TypeError: `dtype` is not a dtype of JAX, or `shape` not a list of sizes.
        ValueError: a 64-bit dtype while they are off, or an invalid name.

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
    return _add(name or "Placeholder", [], None, spec)


def constant(
    value: Any,
    dtype: Any = None,
    shape: Sequence[int] | None = None,
    name: str | None = None,
) -> Tensor:
    """Make a tensor with a constant value, which a feed may replace.

    Args:
        value: array, Python scalar or nested list of these.
        dtype: what to convert it to; by default what `jnp.asarray` gives.
        shape: what to reshape it to, or to fill with it if it is a scalar.
        name: of its operation; by default `Const`.

    Returns:
        A tensor of the default graph.

    Raises:
        TypeError: `value` is not an array, or `dtype` not a dtype of JAX.
        ValueError: its size is not that of `shape`.

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
                f"shape {array.shape}."
            )
        filled = jnp.broadcast_to(array.reshape(()), sizes) if array.size == 1 else array
        array = filled.reshape(sizes)
    return _add(name or "Const", [], lambda _: [array], (array.dtype, array.shape))


def placeholder_with_default(
    value: Any, shape: Sequence[int | None] | None, name: str | None = None
) -> Tensor:
    """Make a tensor with a default value, which a feed may replace.

    Args:
        value: its default: array, Python scalar, nested list or tensor.
        shape: of the values that may be fed, as for `placeholder`.
        name: of its operation; by default `PlaceholderWithDefault`.

    Returns:
        A tensor of the graph of `value`, or else of the default graph.

    Raises:
        TypeError: `value` is not an array, or `shape` not a list of sizes.
        ValueError: `value` is not of that shape.

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
            f"{shape}, got {value.shape}; write the shape that both have, with None for "
            "the sizes that may differ."
        )
    spec = (value.dtype, shape)
    return value.graph.create_operation(name, [value], list, [spec]).outputs[0]


def _add(name: str, inputs: list[Tensor], compute: Any, spec: Any) -> Tensor:
    return get_default_graph().create_operation(name, inputs, compute, [spec]).outputs[0]


def _dtype(dtype: Any, where: str) -> Any:
    if not is_dtype(dtype):
        raise TypeError(f"{where}: expected a dtype such as tf.float32, got {dtype!r}.")
    (leaf,) = parse(dtype, where).leaves
    if is_key_dtype(leaf.dtype):
        return leaf.dtype
    available = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if available != leaf.dtype:
        raise ValueError(
            f"{where}: {leaf.dtype} needs 64-bit types, and jax_enable_x64 is off; write "
            f"tf.{available}, or build and run it under jax.enable_x64(True)."
        )
    return leaf.dtype
