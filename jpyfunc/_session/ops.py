"""What a graph starts from, placeholders and constants, and `lift`, what it grows by."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpyfunc._body.tout import is_dtype, is_key_dtype, parse
from jpyfunc._session.apply import apply
from jpyfunc._session.graph import get_default_graph
from jpyfunc._session.nodes import Tensor
from jpyfunc._session.values import Shape, convert, fits
from jpyfunc._symbol import Symbol


def placeholder(
    dtype: Any, shape: Sequence[int | None] | None = None, name: str | None = None
) -> Tensor:
    """A tensor whose value every run is fed.

    Args:
        dtype: of the values fed, such as `jnp.float32`.
        shape: of the values fed; None, or None for some of the sizes, allows any.
        name: of its operation; by default `Placeholder`.

    Returns:
        A tensor of the default graph.

    Raises:
        TypeError: `dtype` is none that JAX has, or `shape` no list of sizes.
        ValueError: a 64-bit dtype while these are off, or a name that cannot be one.

    Example:
        >>> import jax.numpy as jnp
        >>> import jpyfunc as jpf
        >>> x = jpf.placeholder(jnp.float32, shape=[None, 2])
        >>> total = jpf.numpy.sum(x, axis=0)
        >>> with jpf.Session() as sess:
        ...     print(sess.run(total, {x: [[1, 2], [3, 4], [5, 6]]}))
        [ 9. 12.]

    Source: `tf.placeholder` of TensorFlow 1.
    """
    where = f"placeholder {name or 'Placeholder'!r}"
    spec = (_dtype(dtype, where), _shape(shape, where))
    return _add(name or "Placeholder", [], None, spec)


def constant(
    value: Any,
    dtype: Any = None,
    shape: Sequence[int] | None = None,
    name: str | None = None,
) -> Tensor:
    """A tensor with one value, which a run may yet replace by feeding it.

    Args:
        value: array, Python scalar or nested list of these.
        dtype: what to convert it to; by default what `jnp.asarray` gives.
        shape: what to reshape it to, or if it is a scalar, to fill with it.
        name: of its operation; by default `Const`.

    Returns:
        A tensor of the default graph.

    Raises:
        TypeError: `value` is no array, or `dtype` none that JAX has.
        ValueError: its size is not that of `shape`.

    Example:
        >>> import jpyfunc as jpf
        >>> with jpf.Session() as sess:
        ...     print(sess.run(jpf.constant(7, shape=[2, 2])))
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
    """A tensor that has a value unless a run is fed another.

    Args:
        value: its default: array, Python scalar, nested list or tensor.
        shape: of the values that may be fed, as for `placeholder`.
        name: of its operation; by default `PlaceholderWithDefault`.

    Returns:
        A tensor of the graph of `value`, or else of the default graph.

    Raises:
        TypeError: `value` is no array, or `shape` no list of sizes.
        ValueError: `value` is not of that shape.

    Example:
        >>> import jpyfunc as jpf
        >>> rate = jpf.placeholder_with_default(0.1, shape=[])
        >>> with jpf.Session() as sess:
        ...     print(sess.run(rate), sess.run(rate, {rate: 0.5}))
        0.1 0.5

    Source: `tf.placeholder_with_default` of TensorFlow 1.
    """
    name = name or "PlaceholderWithDefault"
    if not isinstance(value, Tensor):
        value = constant(value, name=f"{name}/default")
    shape = _shape(shape, f"placeholder_with_default {name!r}")
    if not fits(value.shape, shape):
        raise ValueError(
            f"placeholder_with_default {name!r}: expected a default of shape "
            f"{shape}, got {value.shape}; write the shape that both have, with None for "
            "the sizes that may differ."
        )
    spec = (value.dtype, shape)
    return value.graph.create_operation(name, [value], list, [spec]).outputs[0]


def lift(func: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of JAX accept graph tensors, and then return graph tensors.

    Args:
        func: a function that `jax.jit` could compile, from pytrees to pytrees of
            arrays. One that needs values, in an `if` say, is for `py_func`.

    Returns:
        The function. Arguments may mix tensors with concrete values, which are then
        part of the graph. Without a tensor among them, it is simply called.

    Raises:
        TypeError: on the call, `func` cannot be traced.
        ValueError: on the call, tensors of two graphs.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jpyfunc as jpf
        >>> x = jpf.placeholder(jnp.float32, [3])
        >>> y = jpf.lift(jax.nn.softmax)(x)
        >>> with jpf.Session() as sess:
        ...     print(sess.run(y, {x: [0, 0, 0]}).sum())
        1.0
    """
    own = getattr(func, "__name__", "")
    name = own if own.isidentifier() and own.isascii() else type(func).__name__
    name = name.lstrip("_") or "lift"

    @functools.wraps(func, updated=())
    def lifted(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, Symbol) for x in jax.tree.leaves((args, kwargs))):
            return apply(func, args, kwargs, name)
        return func(*args, **kwargs)

    return lifted


def _add(name: str, inputs: list[Tensor], compute: Any, spec: Any) -> Tensor:
    return get_default_graph().create_operation(name, inputs, compute, [spec]).outputs[0]


def _dtype(dtype: Any, where: str) -> Any:
    if not is_dtype(dtype):
        raise TypeError(f"{where}: expected a dtype such as jnp.float32, got {dtype!r}.")
    (leaf,) = parse(dtype, where).leaves
    if is_key_dtype(leaf.dtype):
        return leaf.dtype
    available = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if available != leaf.dtype:
        raise ValueError(
            f"{where}: {leaf.dtype} needs 64-bit types, and jax_enable_x64 is off; write "
            f"jnp.{available}, or build and run it under jax.enable_x64(True)."
        )
    return leaf.dtype


def _shape(shape: Any, where: str) -> Shape | None:
    if shape is None:
        return None
    if not isinstance(shape, list | tuple) or not all(
        n is None or isinstance(n, int) for n in shape
    ):
        raise TypeError(
            f"{where}: expected shape to be None or a list of sizes, with None for one "
            f"that may be any, got {shape!r}; write shape=[] for a scalar."
        )
    return tuple(shape)
