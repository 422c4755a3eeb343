"""Feeds and fetches: their conversion and their shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpyfunc._graph_tensor import GraphTensor
from jpyfunc._tout import is_key_dtype, is_same_kind, kind_of, misfits

Shape = tuple[int | None, ...]


class TensorShape(Shape):
    """The sizes of a tensor, with None for one that may be any.

    Source: `tf.TensorShape` of TensorFlow 1.
    """

    __slots__ = ()

    @property
    def ndims(self) -> int:
        """The number of sizes."""
        return len(self)

    def as_list(self) -> list[int | None]:
        """Return the sizes as a list."""
        return list(self)


def parse_shape(shape: Any, where: str) -> TensorShape | None:
    """Read a shape as users write it: None, or a list of sizes.

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
        )
    return TensorShape(n if n is None else int(n) for n in shape)


def fits(shape: Shape | None, expected: Shape | None) -> bool:
    """Tell whether two shapes agree in every size that both know."""
    if shape is None or expected is None:
        return True
    return len(shape) == len(expected) and all(
        a is None or b is None or a == b for a, b in zip(shape, expected, strict=True)
    )


def convert(value: Any, dtype: Any, shape: Shape | None, where: Callable[[], str]) -> Any:
    """Convert a value to an array of a dtype, and check its shape.

    Args:
        value: array, Python scalar or nested list of these.
        dtype: what to convert to, as NumPy's `same_kind` allows; None for any.
        shape: the shape that it must have; None, or None for some sizes, allows any.
        where: what it is for, for errors.

    Returns:
        A NumPy or JAX array, or a NumPy scalar.

    Raises:
        TypeError: it is not an array, or its dtype does not convert.
        ValueError: it has another shape, or values that the dtype does not hold.
    """
    if isinstance(value, GraphTensor):
        raise TypeError(
            f"{where()}: expected a value, got {value!r}; get its value with session.run "
            "first."
        )
    array = value if isinstance(value, jax.Array) else _read(value, where)
    if not fits(array.shape, shape):
        raise ValueError(
            f"{where()}: expected shape {shape}, got {array.shape}; reshape the value, or "
            "declare None for a size that may be any."
        )
    if dtype is None:
        return jnp.asarray(value)
    if array.dtype == dtype and not getattr(array, "weak_type", False):
        return array
    source, target = kind_of(array.dtype), kind_of(dtype)
    # A Python int has no sign to lose as a type.
    from_int = source == "i" and target == "u" and not hasattr(value, "dtype")
    if source is None or target is None or not (
        from_int or is_same_kind(source, target)
    ):  # fmt: skip
        raise TypeError(
            f"{where()}: expected {dtype}, got {array.dtype}, which does not convert to "
            f"it without loss of kind; convert the value with .astype({dtype}), or "
            f"declare {array.dtype}."
        )
    if misfits(array, dtype):
        limits = jnp.iinfo(dtype)
        raise ValueError(
            f"{where()}: expected values of {dtype}, from {limits.min} to "
            f"{limits.max}, got {array.min()} to {array.max()}; declare a wider dtype."
        )
    return (
        jnp.asarray(array, dtype) if isinstance(array, jax.Array) else array.astype(dtype)
    )


def _read(value: Any, where: Callable[[], str]) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{where()}: expected an array, got a {type(value).__name__} that NumPy does "
            f"not convert to one ({error})."
        ) from error
    if kind_of(array.dtype) is None:
        raise TypeError(
            f"{where()}: expected an array of numbers or booleans, got "
            f"{type(value).__name__} of dtype {array.dtype}."
        )
    return array


def to_numpy(array: Any) -> Any:
    """Convert a JAX array to a NumPy array that may be written to, or a scalar."""
    if array.ndim == 0:
        return array if is_key_dtype(array.dtype) else np.asarray(array)[()]
    return array if is_key_dtype(array.dtype) else np.array(array)
