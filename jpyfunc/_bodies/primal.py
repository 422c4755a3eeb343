"""The Python body of a call: a user's function on flat operands.

It is frozen and compares by value, because as a parameter of the primitive it is part
of the key of JAX's caches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray

from jpyfunc._conversion import is_key_dtype
from jpyfunc._errors import add_inner_jit_remedy
from jpyfunc._hashable import unwrapped
from jpyfunc._tout import Template

Avals = tuple[ShapedArray, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class StaticLeaf:
    """A leaf of the arguments that is no array and reaches the body unchanged."""

    value: Any  # hashable
    kind: type  # because members of two enums may be equal


@dataclasses.dataclass(frozen=True, slots=True)
class KeyLeaf:
    """A leaf of the arguments that is a PRNG key, and crosses as its data."""

    dtype: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Float0Leaf:
    """A leaf of the arguments that has a shape and nothing in it: an integer's tangent."""

    shape: tuple[int, ...]

    @property
    def value(self) -> np.ndarray:
        return np.zeros(self.shape, jax.dtypes.float0)


@dataclasses.dataclass(frozen=True, slots=True)
class CustomRules:
    """How a `numpy_func` is differentiated: functions, made `hashable`, or None."""

    fwd: Any = None
    bwd: Any = None
    jvp: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Primal:
    """A user's function on flat operands.

    Attributes:
        func: the function, made `hashable`.
        name: its name, for errors and profiles.
        tree: structure of its `(args, kwargs)`.
        leaves: one per leaf of `tree`: a `StaticLeaf`, a `Float0Leaf`, or what the next
            operand is: a `KeyLeaf`, or None for any other array.
        template: what it returns, complete.
        in_avals: the operands; the data of a PRNG key stands for the key.
        numpy: whether it takes and returns NumPy arrays.
        guarded: whether an operand comes before all others that says if it is to be run:
            it is the leaf of a staged function, which under `jax.vmap` only some elements
            come to.
        rules: for its derivatives, of a function that takes NumPy arrays.
    """

    func: Any
    name: str
    tree: Any
    leaves: tuple[StaticLeaf | Float0Leaf | KeyLeaf | None, ...]
    template: Template
    in_avals: Avals
    numpy: bool
    guarded: bool = False
    rules: Any = None  # Rules

    @property
    def title(self) -> str:
        """What profiles call the function."""
        return f"{self.name} (leaf)" if self.guarded else self.name

    @property
    def label(self) -> str:
        """What errors call the function."""
        return f"{'numpy_func' if self.numpy else 'py_func'} {self.name!r}"

    @property
    def held(self) -> list[Any]:
        """What reaches the body other than as an operand."""
        statics = [leaf.value for leaf in self.leaves if isinstance(leaf, StaticLeaf)]
        rules = self.rules
        functions = [self.func, *([rules.fwd, rules.bwd, rules.jvp] if rules else [])]
        return [unwrapped(value) for value in (*functions, *statics)]

    @property
    def out_avals(self) -> Avals:
        return tuple(
            physical_aval(leaf.shape, leaf.dtype, leaf.weak_type)
            for leaf in self.template.leaves
        )

    @property
    def primal(self) -> Primal:
        return self

    def __call__(self, operands: Iterable[Any]) -> list[Any]:
        args, kwargs = self.arguments(operands)
        try:
            result = unwrapped(self.func)(*args, **kwargs)
        except jax.errors.JAXTypeError as error:
            add_inner_jit_remedy(error, self.label)
            raise
        results = self.template.check(result, self.label)
        return [
            jax.random.key_data(result) if leaf.is_key else result
            for leaf, result in zip(self.template.leaves, results, strict=True)
        ]

    def arguments(self, operands: Iterable[Any], as_they_are: bool = False) -> Any:
        """`(args, kwargs)` as the function takes them.

        Args:
            operands: one per array.
            as_they_are: whether anything stands in their places, such as derivatives.
        """
        rest = iter(operands)
        if self.guarded:
            next(rest)
        return jax.tree.unflatten(
            self.tree,
            [
                next(rest)
                if as_they_are and not isinstance(leaf, StaticLeaf | Float0Leaf)
                else self._argument(leaf, rest)
                for leaf in self.leaves
            ],
        )

    def _argument(self, leaf: Any, operands: Any) -> Any:
        if isinstance(leaf, StaticLeaf | Float0Leaf):
            return unwrapped(leaf.value)
        operand = next(operands)
        if isinstance(leaf, KeyLeaf):
            return jax.random.wrap_key_data(operand, dtype=leaf.dtype)
        return read_only(operand) if self.numpy else operand

    def widen(self, size: int, batched: Sequence[bool]) -> Primal:
        """The same function on operands and results with one more leading axis.

        Args:
            size: length of the new axis of the results and of the `batched` operands.
            batched: one per operand; the others get an axis of length 1.
        """
        return dataclasses.replace(
            self,
            in_avals=tuple(
                aval.update(shape=(size if b else 1, *aval.shape))
                for aval, b in zip(self.in_avals, batched, strict=True)
            ),
            template=self.template.replace_shapes(
                [(size, *(leaf.shape or ())) for leaf in self.template.leaves]
            ),
        )


def physical_aval(shape: Any, dtype: Any, weak_type: bool = False) -> ShapedArray:
    """The aval that crosses to the host: a PRNG key crosses as its data."""
    if is_key_dtype(dtype):
        data = jax.eval_shape(
            jax.random.key_data, jax.ShapeDtypeStruct(tuple(shape), dtype)
        )
        return ShapedArray(data.shape, data.dtype)
    return ShapedArray(tuple(shape), dtype, weak_type=weak_type)


def read_only(array: Any) -> np.ndarray:
    """`array` as a NumPy array that a body cannot write to."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view
