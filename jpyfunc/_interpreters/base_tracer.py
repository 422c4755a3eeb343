"""Base of the tracers that a body sees: the conversions of an array, written once."""

from __future__ import annotations

import operator
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer

from jpyfunc import _compat


class BodyTracer(Tracer):
    """An array inside a body, where ordinary Python converts, prints, copies and saves it.

    JAX's tracers refuse nearly all of that. Here each use asks one of these methods for a
    value, an array, and goes on with that; a subclass gives it, records that it was asked
    for, or refuses:

    - `concrete`, for integers, indices, sizes and text, which no gradient flows through;
    - `detached`, for Python numbers and lists, where a gradient that flows through the
      array is lost;
    - `exported`, for memory that is handed to NumPy or another library, where it is
      lost, too;
    - `placement`, for attributes that say nothing of the elements.
    """

    __slots__ = ()

    aval: Any  # a ShapedArray, or of a PRNG key

    body_trace: Any = _compat.TRACE_SLOT

    def concrete(self, use: str) -> Any:
        """The value, for a use that no gradient flows through.

        Args:
            use: what errors call it, such as "int()".
        """
        raise NotImplementedError

    def detached(self, use: str) -> Any:
        """The value, for a use that continues with Python numbers; as `concrete`."""
        return self.concrete(use)

    def exported(self, to: str) -> Any:
        """The value, for memory that is handed out.

        Args:
            to: what errors say that the array is converted to, such as "NumPy".
        """
        return self.concrete(f"conversion to {to}")

    def placement(self, name: str) -> Any:
        """The attribute `name`, which is about where the array is; JAX refuses."""
        return getattr(super(), name)

    def __bool__(self) -> bool:
        if self.aval.size != 1:
            raise ValueError(
                "The truth value of an array with other than one element is ambiguous. "
                "Use a.any() or a.all()"
            )
        return self.decide()

    def decide(self) -> bool:
        """The answer to a truth test of this array, which has one element."""
        return bool(self.concrete("a truth test"))

    def __int__(self) -> int:
        return int(self.concrete("int()"))

    def __index__(self) -> int:
        if self.aval.shape or not jnp.issubdtype(self.aval.dtype, jnp.integer):
            raise TypeError(
                "Only integer scalar arrays can be converted to a scalar index."
            )
        return operator.index(self.concrete("use as an index or a size"))

    def __format__(self, spec: str) -> str:
        return format(self.concrete("text"), spec)

    def __float__(self) -> float:
        return float(self.detached("float()"))

    def __complex__(self) -> complex:
        return complex(self.detached("complex()"))

    def item(self, *args: object) -> Any:
        return self.detached("item()").item(*args)

    def tolist(self) -> Any:
        return self.detached("tolist()").tolist()

    def __array__(self, *args: object, **kwargs: object) -> Any:
        return self.exported("NumPy").__array__(*args, **kwargs)

    def __dlpack__(self, *args: object, **kwargs: object) -> Any:
        return self.exported("another library").__dlpack__(*args, **kwargs)

    def tobytes(self, order: str = "C") -> Any:
        return self.exported("bytes").tobytes(order)

    def __reduce__(self) -> Any:
        return self.exported("a pickle").__reduce__()

    # An array cannot be changed, so it is its own copy. A copy of the value would lose the
    # gradient.
    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: object) -> Any:
        return self

    def block_until_ready(self) -> Any:
        self.placement("block_until_ready")()
        return self

    def on_device_size_in_bytes(self) -> Any:
        return self.concrete("its size on a device").on_device_size_in_bytes()


def _placement(name: str) -> property:
    return property(lambda self: self.placement(name))


def _data(name: str) -> property:
    return property(lambda self: getattr(self.exported(f"raw data ({name})"), name))


for _name in (
    "committed",
    "copy_to_host_async",
    "device",
    "devices",
    "is_deleted",
    "is_fully_addressable",
    "is_fully_replicated",
    "sharding",
):
    setattr(BodyTracer, _name, _placement(_name))

for _name in (
    "addressable_data",
    "addressable_shards",
    "global_shards",
    "unsafe_buffer_pointer",
):
    setattr(BodyTracer, _name, _data(_name))


class UnreadValue:
    """A stand-in for the value of a tracer that is read only once it is used.

    JAX asks a tracer for its value where it may well go on without it, and so do the
    tracers of `jax.grad` and the like within a body for that of their primal.
    """

    def __init__(self, tracer: BodyTracer) -> None:
        self._tracer = tracer

    def __bool__(self) -> bool:
        return bool(self._tracer)

    def __int__(self) -> int:
        return int(self._tracer)

    def __index__(self) -> int:
        return self._tracer.__index__()

    def __float__(self) -> float:
        return float(self._tracer)

    def __array__(self, *args: object, **kwargs: object) -> Any:
        return self._tracer.__array__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tracer.concrete(f"concrete use ({name})"), name)
