"""The user's Python function on flat operands, between JAX and its own arguments.

Everything here is frozen and compares by value, because as part of a parameter of the
primitive it is part of the keys of JAX's caches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.core import ShapedArray

from jpyfunc._conversion import is_key_dtype
from jpyfunc._errors import add_inner_jit_remedy
from jpyfunc._executors.workers import Workers
from jpyfunc._hashable import unwrapped
from jpyfunc._tout import Template
from jpyfunc._types import Avals


@dataclasses.dataclass(frozen=True, slots=True)
class StaticLeaf:
    """A leaf of the arguments that is not an array, which the function gets unchanged."""

    value: Hashable
    kind: type  # because members of two enums may be equal


@dataclasses.dataclass(frozen=True, slots=True)
class KeyLeaf:
    """A leaf of the arguments that is a PRNG key, whose operand is its data."""

    dtype: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Float0Leaf:
    """A leaf of the arguments with a shape and no data: the tangent of an integer."""

    shape: tuple[int, ...]

    @property
    def value(self) -> np.ndarray:
        return np.zeros(self.shape, jax.dtypes.float0)


@dataclasses.dataclass(frozen=True, slots=True)
class CustomRules:
    """Custom derivative rules of a `numpy_func`: functions, made `hashable`, or None."""

    fwd: Hashable = None
    bwd: Hashable = None
    jvp: Hashable = None


@dataclasses.dataclass(frozen=True, slots=True)
class UserFunction:
    """The user's function on flat operands, with flat results.

    Attributes:
        func: the function, made `hashable`.
        name: its name in errors and profiles.
        tree: structure of its `(args, kwargs)`.
        leaves: one per leaf of `tree`: a `StaticLeaf` or a `Float0Leaf`, which is no
            operand; a `KeyLeaf`, whose operand is the data of a key; or None for any other
            array.
        template: what it returns, complete.
        in_avals: of the operands.
        is_host_function: whether it takes and returns NumPy arrays.
        has_predicate: whether a boolean comes before all other operands that says if the
            function is needed. It is so for the calls that are left of a staged function:
            under `jax.vmap`, only some elements take the branch that has the call.
        rules: custom derivative rules of a host function.
        workers: where the calls of a host function run; None for here.
        batch_shape: of the elements, if the function takes whole batches at once.
    """

    func: Hashable
    name: str
    tree: Any  # PyTreeDef, which JAX exports as a variable
    leaves: tuple[StaticLeaf | Float0Leaf | KeyLeaf | None, ...]
    template: Template
    in_avals: Avals
    is_host_function: bool
    has_predicate: bool = False
    rules: CustomRules | None = None
    workers: Workers | None = None
    batch_shape: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """Its name in profiles."""
        return f"{self.name} (leaf)" if self.has_predicate else self.name

    @property
    def label(self) -> str:
        """Its name in errors."""
        return f"{'numpy_func' if self.is_host_function else 'py_func'} {self.name!r}"

    @property
    def callable(self) -> Callable[..., Any]:
        """The function itself."""
        return unwrapped(self.func)

    @property
    def workers_apart(self) -> Workers | None:
        """The workers that its calls are for; None if they run on this thread."""
        return None if self.workers is None or self.workers.are_around else self.workers

    def rule(self, name: Literal["fwd", "bwd", "jvp"]) -> Any:
        """A custom derivative rule, or None."""
        return unwrapped(getattr(self.rules, name, None))

    @property
    def held(self) -> list[Any]:
        """Everything that the function may find values in other than its operands."""
        statics = [leaf.value for leaf in self.leaves if isinstance(leaf, StaticLeaf)]
        rules = [self.rule("fwd"), self.rule("bwd"), self.rule("jvp")] if self.rules else []
        return [self.callable, *rules, *map(unwrapped, statics)]

    @property
    def out_avals(self) -> Avals:
        return tuple(
            physical_aval(leaf.shape, leaf.dtype, leaf.weak_type)
            for leaf in self.template.leaves
        )

    def __call__(self, operands: Iterable[Any]) -> list[Any]:
        """Call the function, and check what it returns."""
        args, kwargs = self.arguments(operands)
        try:
            result = unwrapped(self.func)(*args, **kwargs)
        except jax.errors.JAXTypeError as error:
            add_inner_jit_remedy(error, self.label)
            raise
        return self.checked(result, self.label)

    def checked(self, result: Any, where: str) -> list[Any]:
        """The results of a call, flat, if they are as declared."""
        results = self.template.check(result, where)
        return [
            jax.random.key_data(result) if leaf.is_key else result
            for leaf, result in zip(self.template.leaves, results, strict=True)
        ]

    def arguments(self, operands: Iterable[Any], as_is: bool = False) -> Any:
        """Return `(args, kwargs)`, as the function takes them.

        Args:
            operands: one per array.
            as_is: whether the operands are not converted, because they are not those of
                the function, but their derivatives, for example.
        """
        rest = iter(operands)
        if self.has_predicate:
            next(rest)
        return jax.tree.unflatten(
            self.tree,
            [
                next(rest)
                if as_is and not isinstance(leaf, StaticLeaf | Float0Leaf)
                else self._argument(leaf, rest)
                for leaf in self.leaves
            ],
        )

    def _argument(
        self, leaf: StaticLeaf | Float0Leaf | KeyLeaf | None, operands: Iterator[Any]
    ) -> Any:
        if isinstance(leaf, StaticLeaf | Float0Leaf):
            return unwrapped(leaf.value)
        operand = next(operands)
        if isinstance(leaf, KeyLeaf):
            return jax.random.wrap_key_data(operand, dtype=leaf.dtype)
        return read_only(operand) if self.is_host_function else operand

    def widen(self, size: int, batched: Sequence[bool]) -> UserFunction:
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
            batch_shape=(size, *self.batch_shape),
        )

    def narrowed(self, shape: tuple[int, ...]) -> UserFunction:
        """The same function on a block of the batch that it takes at once.

        Args:
            shape: of the elements in it.
        """
        n = len(shape)
        return dataclasses.replace(
            self,
            in_avals=tuple(
                aval.update(
                    shape=tuple(
                        min(pair) for pair in zip(aval.shape[:n], shape, strict=True)
                    )
                    + aval.shape[n:]
                )
                for aval in self.in_avals
            ),
            template=self.template.replace_shapes(
                [(*shape, *(leaf.shape or ())[n:]) for leaf in self.template.leaves]
            ),
            batch_shape=(),
        )


def physical_aval(shape: Any, dtype: Any, weak_type: bool = False) -> ShapedArray:
    """The aval of an operand or a result on the host: a PRNG key is its data there."""
    if is_key_dtype(dtype):
        data = jax.eval_shape(
            jax.random.key_data, jax.ShapeDtypeStruct(tuple(shape), dtype)
        )
        return ShapedArray(data.shape, data.dtype)
    return ShapedArray(tuple(shape), dtype, weak_type=weak_type)


def read_only(array: jax.typing.ArrayLike) -> np.ndarray:
    """View `array` as a NumPy array that a body cannot write to."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view
