"""Convert what users give for arrays: results, derivatives, arguments, feeds."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core.primitives import convert_element_type_p

from jpyfunc._errors import ResultError, see
from jpyfunc._types import Array


@dataclasses.dataclass(frozen=True, slots=True)
class Role:
    """Words of the errors about a value that is not an array.

    Attributes:
        error: the class of the error.
        heading: the one of the documentation.
        verb: what the user does with the value.
        alternative: what else the user may do.
    """

    error: type[Exception]
    heading: str
    verb: str
    alternative: str = ""

    def refusal(self, text: str) -> Exception:
        """Return the error of such a value."""
        return self.error(text + see(self.heading))


RESULT = Role(
    ResultError,
    "A result that is not an array",
    "Return",
    ", or declare the structure of the result in Tout",
)
ARGUMENT = Role(TypeError, "Not an array", "Pass")


_COMMON = (np.ndarray, np.generic, bool, int, float, complex)


def as_declared(
    value: Any,
    shape: tuple[int, ...] | None,
    dtype: np.dtype,
    where: Callable[[], str],
) -> Array:
    """Convert a result to an array of a declared shape and dtype.

    Args:
        value: what a body returned.
        shape: what is declared, or None for any.
        dtype: what is declared, or None for any.
        where: names the result, for errors.

    Raises:
        ResultError: it is not an array, has another shape, or does not convert.
    """
    array, weak = as_array(value, where)
    if shape is not None and tuple(array.shape) != shape:
        parts = isinstance(value, list | tuple) and any(hasattr(x, "dtype") for x in value)
        made = f", of a {describe(value)} arrays" if parts else ""
        raise ResultError(
            f"{where()}: expected shape {shape}, got {tuple(array.shape)}{made}. "
            "Return an array of that shape, or declare in Tout what the body returns."
            + see("A result that Tout does not declare")
        )
    if dtype is None:
        return jnp.asarray(value if weak else array)
    if array.dtype == dtype:
        return array
    if not can_cast(array, weak, dtype):
        remedy = "" if is_key_dtype(dtype) else f" with .astype({dtype_source(dtype)})"
        got = f"{array.dtype}, which NumPy's same_kind casting does not allow"
        if type(value) in (int, float, complex, bool):
            remedy, got = "", f"a Python {type(value).__name__}"
        raise ResultError(
            f"{where()}: expected {dtype}, got {got}. Convert it in the body{remedy}, "
            f"or declare {_available_source(array.dtype)} in Tout."
            + see("A dtype that does not convert")
        )
    # Of JAX's arrays this would wait for the data; they wrap, as they do anywhere in JAX.
    for number in out_of_range(array, dtype) if isinstance(array, np.ndarray) else ():
        raise ResultError(
            f"{where()}: {number} does not fit in {dtype}. Declare a wider dtype in Tout."
            + see("A number that does not fit")
        )
    return cast(array, dtype)


def as_array(
    value: Any, where: Callable[[], str], role: Role = RESULT
) -> tuple[Array, bool]:
    """Convert a value to an array.

    Args:
        value: an array, a Python number, a list of these, or what can be read like one.
        where: names the value, for errors.
        role: what the value is for.

    Returns:
        A NumPy or JAX array of numbers, booleans or PRNG keys, and whether its dtype is
        weak: that of Python numbers, which give way to the dtype of an array.

    Raises:
        Exception: it is not such an array; of the class that the role says.
    """
    if hasattr(value, "__jax_array__") and not isinstance(value, jax.Array):
        value = value.__jax_array__()
    if isinstance(value, jax.Array):
        return value, is_weak(value)
    refuse_mask(value, where, role)
    array, weak = None, False
    # The common kinds first: the tests of the others take microseconds.
    if isinstance(value, _COMMON):
        weak = not hasattr(value, "__array__")  # np.float64 is a float too
        array = np.asarray(value)
    elif isinstance(value, list | tuple):
        array, weak = _stack(value, where, role)
    elif isinstance(value, jax.Ref):
        raise role.refusal(
            f"{where()}: expected an array, got a jax.Ref, valid only inside the body. "
            f"{role.verb} what it holds: ref[...]."
        )
    elif _is_buffer(value):
        array = np.asarray(memoryview(value))
    elif hasattr(value, "__array__"):
        array = np.asarray(value)
    if array is None or (kind_of(array.dtype) is None and not is_key_dtype(array.dtype)):
        raise role.refusal(f"{where()}: {_why_not_array(value, role)}")
    return native(array), weak


def refuse_mask(value: object, where: Callable[[], str], role: Role) -> None:
    """Refuse a masked array: as an array, it would lose its mask.

    Raises:
        Exception: it is one; of the class that the role says.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise role.refusal(
            f"{where()}: expected an array, got a masked array, which JAX does not "
            f"support. {role.verb} x.filled(value), or np.ma.getdata(x) and "
            "np.ma.getmaskarray(x)."
        )


def native(array: Array) -> Array:
    """Convert a NumPy array to the machine's byte order: JAX has no other."""
    if isinstance(array, np.ndarray | np.generic) and not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    return array


def can_cast(array: Array, weak: bool, dtype: np.dtype) -> bool:
    """Tell whether an array converts to `dtype` by NumPy's `same_kind` rule.

    The rule also holds for the dtypes of ml_dtypes, and gives way where Python has no
    types to tell: an int may be unsigned, and the items of an empty list are of no type.
    """
    source, target = kind_of(array.dtype), kind_of(dtype)
    if source is None or target is None:
        return False
    if weak and ((source, target) == ("i", "u") or not array.size):
        return True
    return is_same_kind(source, target)


def out_of_range(array: Array, dtype: np.dtype) -> list[int]:
    """Find the least and the greatest integer of an array, if `dtype` does not hold them.

    NumPy would silently wrap them.
    """
    if kind_of(dtype) not in ("u", "i") or array.dtype == np.bool_ or not array.size:
        return []
    limits = jnp.iinfo(dtype)
    ends = int(array.min()), int(array.max())
    return [n for n in ends if not int(limits.min) <= n <= int(limits.max)]


def cast(array: Array, dtype: np.dtype) -> Array:
    """Convert an array to `dtype`, on the host if NumPy can."""
    if isinstance(array, np.ndarray) and not np.can_cast(array.dtype, dtype, "unsafe"):
        array = jnp.asarray(array)  # NumPy lacks some casts between ml_dtypes
    return array.astype(dtype)


def describe(value: Any) -> str:
    """Say what `value` is, for errors."""
    if value is None:
        return "None"
    text = type(value).__name__
    if isinstance(value, dict):
        return f"{text} with keys {list(value)}"
    if isinstance(value, list | tuple):
        return f"{text} of {len(value)}"
    is_leaf = jax.tree_util.all_leaves([value])  # and no sparse array
    return f"array of dtype {value.dtype}" if is_leaf and hasattr(value, "dtype") else text


def is_key_dtype(dtype: object) -> bool:
    """Tell whether `dtype` is that of typed PRNG keys."""
    # `jnp.issubdtype` would raise for what is not a dtype, and every call comes here.
    return getattr(dtype, "type", None) is jax.dtypes.prng_key


def sum_dtype(dtype: np.dtype) -> np.dtype:
    """Return the dtype to sum many arrays of `dtype` in.

    A long sum in half precision loses its last terms; XLA sums in single, too.
    """
    is_half = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return np.dtype(np.float32) if is_half else dtype


def is_weak(array: object) -> bool:
    """Tell whether an array, or an aval, is weakly typed; PRNG keys never are."""
    return bool(getattr(array, "weak_type", False))


def as_python_number(array: jax.Array, kind: type) -> jax.Array:
    """Convert an array to the weak dtype of a Python number of the type `kind`."""
    return of_type(array, jnp.result_type(kind), weak_type=True)


def of_type(array: jax.Array, dtype: Any, weak_type: bool) -> jax.Array:
    """Convert an array to a dtype, weak or not; `jax.lax` has no function for that."""
    return convert_element_type_p.bind(
        array, new_dtype=dtype, weak_type=weak_type, sharding=None
    )


def dtype_source(dtype: np.dtype) -> str:
    """Return the source text of a dtype, for errors."""
    return "jax.random.key(0).dtype" if is_key_dtype(dtype) else f"jnp.{dtype}"


def _available_source(dtype: np.dtype) -> str:
    """Return the source text of `dtype`, or of its substitute without 64-bit types."""
    known = kind_of(dtype) is not None
    return dtype_source(jax.dtypes.canonicalize_dtype(dtype) if known else dtype)


_KINDS = (
    (np.bool_, "b"),
    (np.unsignedinteger, "u"),
    (np.signedinteger, "i"),
    (np.floating, "f"),
    (np.complexfloating, "c"),
)


def kind_of(dtype: np.dtype) -> str | None:
    """Return `'b'`, `'u'`, `'i'`, `'f'` or `'c'`; None if JAX has no such arrays.

    `np.dtype.kind` is `'V'` for bfloat16, the float8s and int4.
    """
    for parent, kind in _KINDS:
        if jnp.issubdtype(dtype, parent):
            return kind
    return None


def is_same_kind(source: str, target: str) -> bool:
    """Tell whether NumPy's `same_kind` rule converts one result of `kind_of` to another."""
    order = "buifc"
    return order.index(source) <= order.index(target)


def _stack(
    value: list[object] | tuple[object, ...], where: Callable[[], str], role: Role
) -> tuple[Array, bool]:
    items = jax.tree.leaves(value)
    weak = all(type(x) in (bool, int, float, complex) for x in items)
    stack = jnp.asarray if any(isinstance(x, jax.Array) for x in items) else np.asarray
    try:
        return stack(value), weak
    except (TypeError, ValueError) as error:
        raise role.refusal(
            f"{where()}: expected an array, got a {type(value).__name__} that does not "
            f"form one ({error}). {role.verb} arrays of one shape{role.alternative}."
        ) from error


def _is_buffer(value: Any) -> bool:
    """Tell whether `value` is not an array, but NumPy can read its memory."""
    if isinstance(value, bytes | np.ndarray | np.generic) or hasattr(value, "__array__"):
        return False
    try:
        memoryview(value)
    except TypeError:
        return False
    return True


def _why_not_array(value: object, role: Role) -> str:
    """Say why a value is not an array, and what to do."""
    if isinstance(value, int):
        return (
            f"expected an integer of at most 64 bits, got {value}. {role.verb} a float, or "
            "several integers."
        )
    if dataclasses.is_dataclass(value):
        return (
            f"expected an array, got the dataclass {describe(value)}, which is no pytree. "
            "Decorate it with jax.tree_util.register_dataclass."
        )
    got = f"expected an array of numbers or booleans, got {describe(value)}. "
    if inspect.iscoroutine(value):
        value.close()  # or Python warns that nobody awaited it
        return f"{got}Run it in the body with asyncio.run, and return what it gives."
    if isinstance(value, Iterator):
        return f"{got}{role.verb} list(...) of it."
    return f"{got}{role.verb} arrays, Python scalars or lists of them{role.alternative}."
