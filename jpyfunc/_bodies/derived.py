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
from typing import Any

import numpy as np
from jax.core import ShapedArray

from jpyfunc._bodies.primal import Avals, Primal

Indices = tuple[int, ...]

# Names a run of a Python function, and which of the elements that it was of: 48 bits say
# which process, 48 which run, 32 which element.
TICKET = ShapedArray((4,), np.uint32)


@dataclasses.dataclass(frozen=True, slots=True)
class WithTape:
    """A primal that is to be differentiated by operands `wrt`: its run is kept.

    Results: those of the primal, then the ticket of the run. A primal that was widened
    to take whole batches in one run has a ticket for each element.
    """

    base: Primal
    wrt: Indices
    widths: tuple[int, ...] = ()  # the batch axes

    @property
    def in_avals(self) -> Avals:
        return self.base.in_avals

    @property
    def out_avals(self) -> Avals:
        return (*self.base.out_avals, _ticket(self.widths))

    @property
    def primal(self) -> Primal:
        return self.base


@dataclasses.dataclass(frozen=True, slots=True)
class AtTape:
    """A primal at a run that may be kept, whose ticket is the last operand.

    Attributes:
        base: the primal.
        repeatable: whether it may be run again where the run is not kept.
        under: operands that a derivative is taken by already. The derivative of a function
            with a custom rule is then that of what the rule computes.
        widths: as of `WithTape`.
        is_shared: whether other derivatives need the same tape, so that this one does not
            spend it.
    """

    base: Primal
    repeatable: bool
    under: Indices = ()
    widths: tuple[int, ...] = ()
    is_shared: bool = False

    @property
    def in_avals(self) -> Avals:
        return (*self.base.in_avals, _ticket(self.widths))

    @property
    def out_avals(self) -> Avals:
        return self.base.out_avals

    @property
    def primal(self) -> Primal:
        return self.base


@dataclasses.dataclass(frozen=True, slots=True)
class LinearBody:
    """A linear map derived from `base` at its operands.

    Attributes:
        base: what it is derived from.
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
class Jvp(LinearBody):
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
class Vjp(LinearBody):
    """Cotangents of operands `wrt` by cotangents of results `of`.

    Operands: those of `base`, then one cotangent per entry of `of`.
    """

    @property
    def in_avals(self) -> Avals:
        return self.base.in_avals + _tangents(self.base.out_avals, self.of)

    @property
    def out_avals(self) -> Avals:
        return _tangents(self.base.in_avals, self.wrt)


@dataclasses.dataclass(frozen=True, slots=True)
class Transpose(LinearBody):
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
    """`base` for each element of a batch, in one host call.

    Attributes:
        base: what runs on each element; never called as a function of whole batches.
        size: the number of elements.
        stacked_in: one per operand, whether it has a leading batch axis.
        stacked_out: one per result: stacked on a leading axis, or summed over the
            batch (the cotangent of an operand that all elements share).
        by_branch: whether it runs on many elements at once, as long as they take the same
            branches.
    """

    base: Body
    size: int
    stacked_in: tuple[bool, ...]
    stacked_out: tuple[bool, ...]
    by_branch: bool

    @property
    def in_avals(self) -> Avals:
        return _stack_avals(self.base.in_avals, self.stacked_in, self.size)

    @property
    def out_avals(self) -> Avals:
        return _stack_avals(self.base.out_avals, self.stacked_out, self.size)

    @property
    def primal(self) -> Primal:
        return self.base.primal


FlatBody = Primal | WithTape | AtTape | Jvp | Vjp | Transpose
Body = FlatBody | Batch


def recording_of(body: Body, wrt: Indices) -> Body:
    """`body` with the ticket of its run as last result, if it runs a Python function."""
    if isinstance(body, Batch):
        base = recording_of(body.base, wrt)
        stacked_out = body.stacked_out
        stacked_out += (True,) * (len(base.out_avals) - len(body.base.out_avals))
        return dataclasses.replace(body, base=base, stacked_out=stacked_out)
    if isinstance(body, Primal):
        return WithTape(body, wrt)
    if isinstance(body, WithTape):
        return dataclasses.replace(body, wrt=tuple(sorted({*body.wrt, *wrt})))
    return body


def is_recording(body: Body) -> bool:
    """Whether the last result of `body` is a ticket."""
    return (
        is_recording(body.base) if isinstance(body, Batch) else isinstance(body, WithTape)
    )


def flat(body: Body) -> FlatBody:
    """What runs on one element."""
    return flat(body.base) if isinstance(body, Batch) else body


def is_primal(body: Body) -> bool:
    """Whether `body` is no derivative."""
    return isinstance(flat(body), Primal)


def linear_from(body: Body) -> int:
    """The first of the operands in which `body` is linear, as all after it are.

    Only derivatives are linear as far as one can tell from the body.
    """
    base = flat(body)
    if not isinstance(base, LinearBody):
        return len(base.in_avals)
    return len(base.in_avals) - len(base.wrt if isinstance(base, Jvp) else base.of)


def recorded_of(body: Body) -> AtTape | None:
    """The run that `body` is a derivative at, if it is at one."""
    base: Any = flat(body)
    while isinstance(base, LinearBody):
        base = base.base
    return base if isinstance(base, AtTape) else None


def ticket_of(body: FlatBody) -> int | None:
    """Which operand of `body` is a ticket, if one is."""
    recorded = recorded_of(body)
    return len(recorded.base.in_avals) if recorded else None


def sharing(body: Any) -> Any:
    """`body`, where other derivatives need the same tape."""
    if isinstance(body, AtTape):
        return dataclasses.replace(body, is_shared=True)
    if isinstance(body, Batch | LinearBody):
        return dataclasses.replace(body, base=sharing(body.base))
    return body


def without_recording(body: Body) -> Body:
    """A recording `body` that keeps nothing and has no ticket."""
    if isinstance(body, Batch):
        base = without_recording(body.base)
        return dataclasses.replace(body, base=base, stacked_out=body.stacked_out[:-1])
    return body.primal


def jvp_of(body: Body, wrt: Indices, of: Indices, repeatable: bool) -> Body:
    """The body of the tangents of results `of` by tangents of operands `wrt`.

    Args:
        body: of the call that is differentiated.
        wrt: operands, all of which have a tangent.
        of: results, all of which have a tangent.
        repeatable: whether the Python function may be run again.

    Returns:
        A body whose operands are those of `body`, then the ticket of its run if `body` runs
        a Python function, then the tangents.
    """
    if isinstance(body, Batch):
        base = jvp_of(body.base, wrt, of, repeatable)
        tickets = len(base.in_avals) - len(body.base.in_avals) - len(wrt)
        stacked_in = body.stacked_in + (True,) * tickets
        stacked_in += tuple(body.stacked_in[i] for i in wrt)
        stacked_out = tuple(body.stacked_out[i] for i in of)
        return Batch(base, body.size, stacked_in, stacked_out, body.by_branch)
    if isinstance(body, Primal):
        return Jvp(AtTape(body, repeatable), wrt, of)
    if isinstance(body, WithTape):
        recorded = AtTape(body.base, repeatable, body.wrt, body.widths, is_shared=True)
        return Jvp(recorded, wrt, of)
    recorded = recorded_of(body)
    # A second derivative is several calls of one tape, in whatever order they run. The
    # derivative of the first one spends it, so that others may find it gone. A body that
    # cannot run again keeps it for them.
    may_spend = recorded is None or recorded.repeatable
    return Jvp(body if may_spend else sharing(body), wrt, of)


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
        return Batch(base, body.size, stacked_in, stacked_out, body.by_branch), kept
    if isinstance(body, Jvp | Vjp):
        n = len(body.base.in_avals)
        if all(i >= n for i in wrt):
            linear = [i - n for i in wrt]
            if isinstance(body, Jvp):
                by, to = _pick(body.wrt, linear), _pick(body.of, of)
                return Vjp(body.base, by, to), _first(n)
            by, to = _pick(body.wrt, of), _pick(body.of, linear)
            return Jvp(body.base, by, to), _first(n)
    return Transpose(body, wrt, of), others(body, wrt)


def batch_of(
    body: Body, size: int, batched: tuple[bool, ...], by_branch: bool = False
) -> Batch:
    """`body` for each element, where operand `i` has a batch axis if `batched[i]`."""
    return Batch(body, size, batched, (True,) * len(body.out_avals), by_branch)


def widen(body: FlatBody, size: int, batched: tuple[bool, ...]) -> FlatBody:
    """`body` with a function that takes the whole batch in one call.

    A derivative needs primal and tangent of one shape, so there, every operand must
    have the batch axis in full: `batched` has an effect on a `Primal` only.
    """
    if isinstance(body, Primal):
        return body.widen(size, batched)
    if isinstance(body, WithTape | AtTape):
        base = body.base.widen(size, batched[: len(body.base.in_avals)])
        return dataclasses.replace(body, base=base, widths=(size, *body.widths))
    base = widen(body.base, size, (True,) * len(body.base.in_avals))
    return dataclasses.replace(body, base=base)


def _ticket(widths: tuple[int, ...]) -> ShapedArray:
    return TICKET.update(shape=(*widths, *TICKET.shape)) if widths else TICKET


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
