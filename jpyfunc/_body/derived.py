"""The bodies derived from a Python body: jvp, vjp, transpose, batch.

A body maps flat operands to flat results. The derived ones are closed under each other:
the derivative of a batch is the batch of the derivative, the transpose of a jvp is a
vjp and the reverse, so that whatever order transforms come in, a `Batch` is outermost.
They say what is to be computed; `jpyfunc._host` says how.

All are frozen and compare by value, because as parameters of the primitive they are
part of the key of JAX's caches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jpyfunc._body.primal import Avals, Primal

Indices = tuple[int, ...]


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


@dataclasses.dataclass(frozen=True, slots=True)
class Transpose(_Derived):
    """Transpose of a `base` that is linear in operands `wrt`, though nothing says so.

    Operands: those of `base` but `wrt`, then one cotangent per entry of `of`.
    """

    @property
    def in_avals(self) -> Avals:
        kept = tuple(self.base.in_avals[i] for i in others(self.base, self.wrt))
        return kept + _tangents(self.base.out_avals, self.of)

    @property
    def out_avals(self) -> Avals:
        return _tangents(self.base.in_avals, self.wrt)


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
    return Transpose(body, wrt, of), others(body, wrt)


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


def _tangents(avals: Avals, indices: Indices) -> Avals:
    return tuple(avals[i].to_tangent_aval() for i in indices)


def _pick(indices: Indices, positions: Sequence[int]) -> Indices:
    return tuple(indices[i] for i in positions)


def _first(n: int) -> Indices:
    return tuple(range(n))


def others(body: Body, wrt: Indices) -> Indices:
    """The operands of `body` that are not in `wrt`."""
    return tuple(i for i in range(len(body.in_avals)) if i not in wrt)


def _stack_avals(avals: Avals, stacked: tuple[bool, ...], size: int) -> Avals:
    return tuple(
        aval.update(shape=(size, *aval.shape)) if is_stacked else aval
        for aval, is_stacked in zip(avals, stacked, strict=True)
    )
