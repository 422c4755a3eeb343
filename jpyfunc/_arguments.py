"""The arguments of a call: their leaves, and what each becomes on its way to the host.

An array becomes an operand of the primitive, and a PRNG key an operand with its data. Any
other leaf, such as a string or a callable, is static: it is part of the body's identity and
reaches it unchanged.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray, Tracer

from jpyfunc._bodies.user_function import Float0Leaf, StaticLeaf
from jpyfunc._conversion import ARGUMENT, native, refuse_mask
from jpyfunc._errors import see
from jpyfunc._hashable import hashable
from jpyfunc._interpreters.batch_tracer import is_batch_tracer
from jpyfunc._interpreters.tape_tracer import is_tape_tracer, value_if_over
from jpyfunc._staging.closure import refuse_traced_leaf
from jpyfunc._tout import key_path, why_no_pytree

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of a call, flat.

    Attributes:
        leaves: the arrays and the static leaves.
        tree: the structure of `(args, kwargs)`.
    """

    leaves: Sequence[Any]
    tree: Any  # PyTreeDef, which JAX exports as a variable

    @classmethod
    def flatten(
        cls, args: tuple[Any, ...], kwargs: dict[str, Any], label: str
    ) -> Arguments:
        """Flatten the arguments of a call of the function `label`."""
        try:
            leaves, tree = jax.tree.flatten((args, kwargs))
        except ValueError as error:
            raise TypeError(
                f"{label}: JAX cannot flatten its arguments: {why_no_pytree(error)}."
                + see("A dict whose keys cannot be sorted")
            ) from error
        return cls([*map(value_if_over, leaves)], tree)

    def unflatten(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return `(args, kwargs)`."""
        return jax.tree.unflatten(self.tree, self.leaves)

    def with_leaves(self, leaves: Sequence[Any]) -> Arguments:
        """Return arguments of the same structure with other leaves."""
        return Arguments(leaves, self.tree)

    def name_of(self, index: int) -> str:
        """Return the name of a leaf in errors."""
        first, *rest = key_path(self.tree, index)
        kind = "keyword argument" if getattr(first, "idx", 0) else "argument"
        return f"{kind} {jax.tree_util.keystr(tuple(rest) or (first,))}"

    def converted(self, label: str) -> Arguments:
        """Return the arguments with JAX arrays for all arrays.

        Raises:
            TypeError: JAX has no arrays like one of them.
        """
        return self.with_leaves(
            [
                leaf
                if isinstance(leaf, jax.Array) or not is_array(leaf)
                else self._to_jax(leaf, i, label)
                for i, leaf in enumerate(self.leaves)
            ]
        )

    def operands(self, label: str) -> list[jax.Array]:
        """Return the arrays as JAX arrays, for a bind.

        Raises:
            TypeError: JAX has no arrays like one of them, or a static leaf holds a traced
                value, which would reach the body as a tracer.
        """
        arrays = []
        for i, leaf in enumerate(self.leaves):
            if is_array(leaf):
                arrays.append(self._to_jax(leaf, i, label))
            elif not is_float0(leaf):
                refuse_traced_leaf(leaf, f"{label}: {self.name_of(i)}")
        return arrays

    def _to_jax(self, leaf: Any, index: int, label: str) -> jax.Array:
        if isinstance(leaf, jax.Array):
            return leaf

        def where() -> str:
            return f"{label}: {self.name_of(index)}"

        refuse_mask(leaf, where, ARGUMENT)
        try:
            return jnp.asarray(native(leaf))
        except OverflowError as error:
            raise TypeError(
                f"{where()}: {leaf!r} does not fit in JAX's default integer; pass an "
                "array of a wider dtype, or enable 64-bit types."
                + see("An integer that does not fit")
            ) from error
        except TypeError as error:
            dtype = getattr(leaf, "dtype", None)
            raise TypeError(
                f"{where()}: expected an array of numbers or booleans, got "
                f"{type(leaf).__name__} of dtype {dtype}; convert it, or give it to the "
                "body with functools.partial." + see("Not an array")
            ) from error

    def structs(self) -> Arguments:
        """Return the arguments with a `jax.ShapeDtypeStruct` for each array."""
        return self.with_leaves([_struct(x) if is_array(x) else x for x in self.leaves])

    def copied(self) -> Arguments:
        """Return the arguments with copies of NumPy arrays, which the caller may change."""
        return self.with_leaves(
            [x.copy() if isinstance(x, np.ndarray) else x for x in self.leaves]
        )


def is_float0(leaf: object) -> bool:
    """Tell whether a leaf is the tangent of integers, which has a shape and no data."""
    return getattr(leaf, "dtype", None) == jax.dtypes.float0


def is_array(leaf: object) -> bool:
    """Tell whether a leaf goes to the host as an array."""
    if is_float0(leaf):
        return False
    if isinstance(leaf, jax.Array | np.ndarray):
        return True
    # np.str_ is a NumPy scalar too, and an IntEnum an int.
    if isinstance(leaf, str | bytes | enum.Enum):
        return False
    return isinstance(leaf, bool | int | float | complex | np.generic) or hasattr(
        type(leaf), "__jax_array__"
    )


def has_value(leaf: object) -> bool:
    """Tell whether a body can run on a leaf at once."""
    return not isinstance(leaf, Tracer) or is_tape_tracer(leaf) or is_batch_tracer(leaf)


def static_leaf(leaf: Any) -> StaticLeaf | Float0Leaf:
    """Return a leaf that is not an array as a body stores it."""
    if is_float0(leaf):
        return Float0Leaf(np.shape(leaf))
    return StaticLeaf(hashable(leaf), type(leaf))


def unsharded_aval(array: jax.Array) -> ShapedArray:
    """Return the aval of an array without its sharding."""
    aval = jax.typeof(array)
    return ShapedArray(aval.shape, aval.dtype, aval.weak_type)


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    aval = jax.typeof(jnp.asarray(leaf))
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def with_arrays_traced(arguments: Arguments, function: Callable[[Arguments], T]) -> T:
    """Call `function` on `arguments` with traced arrays, so that it computes nothing.

    Args:
        arguments: a `jax.ShapeDtypeStruct` among them stands for an array, too.
        function: of arguments.

    Returns:
        What it returns, which need not be arrays.
    """
    places = [
        i
        for i, leaf in enumerate(arguments.leaves)
        if is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
    ]
    results: list[T] = []

    def probe(arrays: list[jax.Array]) -> None:
        leaves = [*arguments.leaves]
        for i, array in zip(places, arrays, strict=True):
            leaves[i] = array
        results.append(function(arguments.with_leaves(leaves)))

    jax.eval_shape(probe, [arguments.leaves[i] for i in places])
    return results[0]


def signature_of(func: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature of a function; None for some that are written in C."""
    try:
        # Not that of `__wrapped__`: a decorator may change the arguments.
        return inspect.signature(func, follow_wrapped=False)
    except ValueError:
        return None


def misfit(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return why a function does not take the arguments, or "" if it does."""
    signature = signature_of(func)
    try:
        if signature:
            signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return ""
