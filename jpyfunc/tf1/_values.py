"""Convert feeds and fetches, and check their shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpyfunc._conversion import (
    ARGUMENT,
    as_array,
    can_cast,
    cast,
    is_key_dtype,
    out_of_range,
)
from jpyfunc._errors import see
from jpyfunc._graph_tensor import GraphTensor

Shape = tuple[int | None, ...]


class TensorShape(Shape):
    """The shape of a tensor, with None for unknown sizes.

    Source: `tf.TensorShape` of TensorFlow 1.
    """

    __slots__ = ()

    @property
    def ndims(self) -> int:
        """The number of axes."""
        return len(self)

    def as_list(self) -> list[int | None]:
        """Return the sizes as a list."""
        return list(self)


def parse_shape(shape: Any, where: str) -> TensorShape | None:
    """Check and normalize a shape that a user wrote: None, or a list of sizes.

    Raises:
        TypeError: it is neither.
    """
    if shape is None:
        return None
    if not isinstance(shape, list | tuple) or not all(
        n is None or isinstance(n, int | np.integer) for n in shape
    ):
        raise TypeError(
            f"{where}: expected shape to be None or a list of sizes, with None for one "
            f"that may be any, got {shape!r}; write shape=[] for a scalar."
            + see("An invalid argument")
        )
    return TensorShape(n if n is None else int(n) for n in shape)


def fits(shape: Shape | None, expected: Shape | None) -> bool:
    """Test whether two shapes agree in every size that is known in both."""
    if shape is None or expected is None:
        return True
    return len(shape) == len(expected) and all(
        a is None or b is None or a == b for a, b in zip(shape, expected, strict=True)
    )


def convert(
    value: Any, dtype: np.dtype | None, shape: Shape | None, where: Callable[[], str]
) -> np.ndarray | jax.Array:
    """Convert a value to an array of a dtype, and check its shape.

    Args:
        value: an array, a Python scalar or a nested list of these.
        dtype: the dtype, to which NumPy's `same_kind` rule must allow a conversion; None
            for any.
        shape: the shape that it must have; None allows any shape, and None in it any size.
        where: says what the value is for, in errors.

    Returns:
        A NumPy or JAX array, or a NumPy scalar.

    Raises:
        TypeError: it is not an array, or its dtype does not convert.
        ValueError: it has another shape, or values that do not fit the dtype.
    """
    if isinstance(value, GraphTensor):
        raise TypeError(
            f"{where()}: expected a value, got {value!r}; compute its value with "
            "session.run first." + see("A tensor that is used as a value")
        )
    array, weak = as_array(value, where, ARGUMENT)
    if not fits(array.shape, shape):
        raise ValueError(
            f"{where()}: expected shape {shape}, got {array.shape}; reshape the value, or "
            "declare None for a size that may be any."
            + see("A value that does not fit a tensor")
        )
    if dtype is None:
        return jnp.asarray(value if weak else array)
    if array.dtype == dtype and not weak:
        return array
    # Unlike a signed dtype, a Python int does convert to an unsigned one.
    if not can_cast(array, not hasattr(value, "dtype"), dtype):
        raise TypeError(
            f"{where()}: expected {dtype}, got {array.dtype}, which is of a kind that does "
            f"not convert to it; convert the value with .astype({dtype}), or declare "
            f"{array.dtype}." + see("A value that does not fit a tensor")
        )
    if out_of_range(array, dtype):
        limits = jnp.iinfo(dtype)
        raise ValueError(
            f"{where()}: expected values of {dtype}, from {limits.min} to "
            f"{limits.max}, got {array.min()} to {array.max()}; declare a wider dtype."
            + see("A value that does not fit a tensor")
        )
    # A jax.Array of that dtype is converted, too, where it is weak.
    return jnp.asarray(array, dtype) if isinstance(array, jax.Array) else cast(array, dtype)


def to_numpy(array: jax.Array) -> Any:
    """Convert a JAX array to a writable NumPy array, or to a NumPy scalar."""
    if array.ndim == 0:
        return array if is_key_dtype(array.dtype) else np.asarray(array)[()]
    return array if is_key_dtype(array.dtype) else np.array(array)
