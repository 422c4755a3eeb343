"""The Python body of a call, and the bodies derived from it: jvp, vjp, transpose, batch.

A body maps flat operands to flat results. The derived ones are closed under each other:
the derivative of a batch is the batch of the derivative, the transpose of a jvp is a
vjp and the reverse, so that whatever order transforms come in, a `Batch` is outermost
and the Python function is run by plain eager `jax.jvp` and `jax.vjp`.

All are frozen and compare by value, because as parameters of the primitive they are
part of the key of JAX's caches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray

from jpyfunc._errors import NotDifferentiableError
from jpyfunc._spec import Template, is_key_dtype

Indices = tuple[int, ...]
Avals = tuple[ShapedArray, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ById:
    """Makes any object hashable, equal to itself alone."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ById) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def hashable(value: Any) -> Any:
    """`value` if it can be hashed, else a `ById` of it."""
    try:
        hash(value)
    except TypeError:
        return ById(value)
    return value


def unwrapped(value: Any) -> Any:
    """Undo `hashable`."""
    return value.value if isinstance(value, ById) else value


@dataclasses.dataclass(frozen=True, slots=True)
class Static:
    """A leaf of the arguments that is no array and reaches the body unchanged."""

    value: Any  # hashable
    kind: type  # because members of two enums may be equal


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """A leaf of the arguments that is a PRNG key, and crosses as its data."""

    dtype: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Primal:
    """A user's function on flat operands.

    Attributes:
        func: the function, made `hashable`.
        name: its name, for errors and profiles.
        tree: structure of its `(args, kwargs)`.
        leaves: one per leaf of `tree`: a `Static`, or what the next operand is: a `Key`,
            or None for any other array.
        template: what it returns, complete.
        in_avals: the operands; the data of a PRNG key stands for the key.
        numpy: whether it takes and returns NumPy arrays.
    """

    func: Any
    name: str
    tree: Any
    leaves: tuple[Static | Key | None, ...]
    template: Template
    in_avals: Avals
    numpy: bool

    @property
    def label(self) -> str:
        """What errors call the function."""
        return f"{'numpy_func' if self.numpy else 'py_func'} {self.name!r}"

    @property
    def held(self) -> list[Any]:
        """What reaches the body other than as an operand."""
        statics = [leaf.value for leaf in self.leaves if isinstance(leaf, Static)]
        return [unwrapped(value) for value in (self.func, *statics)]

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
        results = self.template.check(unwrapped(self.func)(*args, **kwargs), self.label)
        return [
            jax.random.key_data(result) if leaf.is_key else result
            for leaf, result in zip(self.template.leaves, results, strict=True)
        ]

    def arguments(self, operands: Iterable[Any]) -> Any:
        """`(args, kwargs)` as the function takes them."""
        rest = iter(operands)
        return jax.tree.unflatten(
            self.tree, [self._argument(leaf, rest) for leaf in self.leaves]
        )

    def _argument(self, leaf: Any, operands: Any) -> Any:
        if isinstance(leaf, Static):
            return unwrapped(leaf.value)
        operand = next(operands)
        if isinstance(leaf, Key):
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


@dataclasses.dataclass(frozen=True, slots=True)
class _Derived:
    """A linear map derived from `base` at its operands.

    Attributes:
        base: what it is derived from, and re-runs.
        wrt: operands of `base` that the derivative is with respect to.
        of: results of `base` that it is of.
    """

    base: FlatBody
    wrt: Indices
    of: Indices

    @property
    def primal(self) -> Primal:
        return self.base.primal

    def _split(self, operands: Iterable[Any]) -> tuple[list[Any], list[Any]]:
        """Operands of `base`, and what follows them."""
        operands, n = list(operands), len(self.base.in_avals)
        return operands[:n], operands[n:]

    def _restricted(self, primals: list[Any]) -> Callable[..., list[Any]]:
        """`base` as a function of operands `wrt` to results `of`, the rest held fixed."""

        def restricted(*values: Any) -> list[Any]:
            operands = list(primals)
            for i, value in zip(self.wrt, values, strict=True):
                operands[i] = value
            results = self.base(operands)
            return [results[i] for i in self.of]

        return restricted


@dataclasses.dataclass(frozen=True, slots=True)
class Jvp(_Derived):
    """Tangents of results `of` by tangents of operands `wrt`, in which it is linear.

    Operands: those of `base`, then one tangent per entry of `wrt`.
    """

    @property
    def in_avals(self) -> Avals:
        return self.base.in_avals + _tangents(self.base.in_avals, self.wrt)

    @property
    def out_avals(self) -> Avals:
        return _tangents(self.base.out_avals, self.of)

    def __call__(self, operands: Iterable[Any]) -> list[Any]:
        primals, tangents = self._split(operands)
        at = [primals[i] for i in self.wrt]
        return jax.jvp(self._restricted(primals), at, tangents)[1]


@dataclasses.dataclass(frozen=True, slots=True)
class Vjp(_Derived):
    """Cotangents of operands `wrt` by cotangents of results `of`: re-runs `base`.

    Operands: those of `base`, then one cotangent per entry of `of`.
    """

    @property
    def in_avals(self) -> Avals:
        return self.base.in_avals + _tangents(self.base.out_avals, self.of)

    @property
    def out_avals(self) -> Avals:
        return _tangents(self.base.in_avals, self.wrt)

    def __call__(self, operands: Iterable[Any]) -> list[Any]:
        primals, cotangents = self._split(operands)
        _, pull_back = jax.vjp(self._restricted(primals), *[primals[i] for i in self.wrt])
        return list(pull_back(cotangents))


@dataclasses.dataclass(frozen=True, slots=True)
class Transpose(_Derived):
    """Transpose of a `base` that is linear in operands `wrt`, though nothing says so.

    Operands: those of `base` but `wrt`, then one cotangent per entry of `of`.
    """

    @property
    def in_avals(self) -> Avals:
        kept = tuple(self.base.in_avals[i] for i in _others(self.base, self.wrt))
        return kept + _tangents(self.base.out_avals, self.of)

    @property
    def out_avals(self) -> Avals:
        return _tangents(self.base.in_avals, self.wrt)

    def __call__(self, operands: Iterable[Any]) -> list[Any]:
        rest = list(operands)
        primals: list[Any] = [None] * len(self.base.in_avals)
        for i in _others(self.base, self.wrt):
            primals[i] = rest.pop(0)
        linear = [
            jax.ShapeDtypeStruct(aval.shape, aval.dtype)
            for aval in (self.base.in_avals[i] for i in self.wrt)
        ]
        try:
            return list(jax.linear_transpose(self._restricted(primals), *linear)(rest))
        except (AssertionError, NotImplementedError, jax.errors.JAXTypeError) as error:
            raise NotDifferentiableError(
                f"{self.primal.label}: jax.linear_transpose needs a body that is linear in "
                f"its operands and branches on none, and this one is not ({error})."
            ) from error


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """`base`, run once per element of a batch in one host call.

    Attributes:
        base: what runs on each element; never called as a function of whole batches.
        size: the number of elements.
        stacked_in: one per operand, whether it has a leading batch axis.
        stacked_out: one per result: stacked on a leading axis, or summed over the
            batch (the cotangent of an operand that all elements share).
    """

    base: Body
    size: int
    stacked_in: tuple[bool, ...]
    stacked_out: tuple[bool, ...]

    @property
    def in_avals(self) -> Avals:
        return _stack_avals(self.base.in_avals, self.stacked_in, self.size)

    @property
    def out_avals(self) -> Avals:
        return _stack_avals(self.base.out_avals, self.stacked_out, self.size)

    @property
    def primal(self) -> Primal:
        return self.base.primal


FlatBody = Primal | Jvp | Vjp | Transpose
Body = FlatBody | Batch


def jvp_of(body: Body, wrt: Indices, of: Indices) -> Body:
    """The body of the tangents of results `of` by tangents of operands `wrt`."""
    if isinstance(body, Batch):
        return Batch(
            jvp_of(body.base, wrt, of),
            body.size,
            body.stacked_in + tuple(body.stacked_in[i] for i in wrt),
            tuple(body.stacked_out[i] for i in of),
        )
    return Jvp(body, wrt, of)


def transpose_of(body: Body, wrt: Indices, of: Indices) -> tuple[Body, Indices]:
    """The transpose of a body that is linear in operands `wrt`.

    Args:
        body: what to transpose.
        wrt: operands whose cotangents are wanted.
        of: results whose cotangents are given.

    Returns:
        The transposed body, and which operands of `body` are its first operands; the
        cotangents of `of` follow them.
    """
    if isinstance(body, Batch):
        base, kept = transpose_of(body.base, wrt, of)
        stacked_in = tuple(body.stacked_in[i] for i in kept)
        stacked_in += tuple(body.stacked_out[i] for i in of)
        stacked_out = tuple(body.stacked_in[i] for i in wrt)
        return Batch(base, body.size, stacked_in, stacked_out), kept
    n = len(body.in_avals) if isinstance(body, Primal) else len(body.base.in_avals)
    if all(i >= n for i in wrt):
        linear = [i - n for i in wrt]
        if isinstance(body, Jvp):
            return Vjp(body.base, _pick(body.wrt, linear), _pick(body.of, of)), _first(n)
        if isinstance(body, Vjp):
            return Jvp(body.base, _pick(body.wrt, of), _pick(body.of, linear)), _first(n)
    return Transpose(body, wrt, of), _others(body, wrt)


def batch_of(body: Body, size: int, batched: tuple[bool, ...]) -> Batch:
    """`body` run once per element, where operand `i` has a batch axis if `batched[i]`."""
    return Batch(body, size, batched, (True,) * len(body.out_avals))


def widen(body: FlatBody, size: int, batched: tuple[bool, ...]) -> FlatBody:
    """`body` with a function that takes the whole batch in one call.

    A derivative needs primal and tangent of one shape, so there, every operand must
    have the batch axis in full: `batched` has an effect on a `Primal` only.
    """
    if isinstance(body, Primal):
        return body.widen(size, batched)
    base = widen(body.base, size, (True,) * len(body.base.in_avals))
    return dataclasses.replace(body, base=base)


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


def _tangents(avals: Avals, indices: Indices) -> Avals:
    return tuple(avals[i].to_tangent_aval() for i in indices)


def _pick(indices: Indices, positions: Sequence[int]) -> Indices:
    return tuple(indices[i] for i in positions)


def _first(n: int) -> Indices:
    return tuple(range(n))


def _others(body: Body, wrt: Indices) -> Indices:
    return tuple(i for i in range(len(body.in_avals)) if i not in wrt)


def _stack_avals(avals: Avals, stacked: tuple[bool, ...], size: int) -> Avals:
    return tuple(
        aval.update(shape=(size, *aval.shape)) if is_stacked else aval
        for aval, is_stacked in zip(avals, stacked, strict=True)
    )
