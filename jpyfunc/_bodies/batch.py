"""A body for each element of a batch, in one host call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jpyfunc._bodies.batch_columns import BatchLayout
from jpyfunc._bodies.batch_elements import evaluate_batch
from jpyfunc._bodies.body import Body, DerivedBody
from jpyfunc._runtime.context import Context
from jpyfunc._runtime.profile import Kind
from jpyfunc._types import Array, Avals, Indices


@dataclasses.dataclass(frozen=True, slots=True)
class Batch(DerivedBody):
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

    @staticmethod
    def of(body: Body, size: int, batched: tuple[bool, ...], by_branch: bool) -> Batch:
        """`body` for each element, where operand `i` has a batch axis if `batched[i]`."""
        return Batch(body, size, batched, (True,) * len(body.out_avals), by_branch)

    @property
    def in_avals(self) -> Avals:
        return _stacked(self.base.in_avals, self.stacked_in, self.size)

    @property
    def out_avals(self) -> Avals:
        return _stacked(self.base.out_avals, self.stacked_out, self.size)

    @property
    def kind(self) -> Kind:
        return self.base.kind

    @property
    def description(self) -> str:
        return f"batch of {self.base.description}"

    @property
    def linear_from(self) -> int:
        return self.base.linear_from

    @property
    def is_primal(self) -> bool:
        return self.base.is_primal

    @property
    def has_tape(self) -> bool:
        return self.base.has_tape

    def check_differentiable(self) -> None:
        self.base.check_differentiable()

    def run(self, context: Context, operands: Sequence[Array]) -> list[Array]:
        levels: list[Batch] = []
        base: Body = self
        while isinstance(base, Batch):
            levels.append(base)
            base = base.base
        layout = BatchLayout(
            base,
            tuple(level.size for level in levels),
            [*zip(*(level.stacked_in for level in levels), strict=True)],
            [*zip(*(level.stacked_out for level in levels), strict=True)],
        )
        return evaluate_batch(layout, self.out_avals, self.by_branch, context, operands)

    def with_tape(self, wrt: Indices) -> Body:
        base = self.base.with_tape(wrt)
        tickets = len(base.out_avals) - len(self.base.out_avals)
        stacked_out = self.stacked_out + (True,) * tickets
        return dataclasses.replace(self, base=base, stacked_out=stacked_out)

    def without_tape(self) -> Body:
        base = self.base.without_tape()
        return dataclasses.replace(self, base=base, stacked_out=self.stacked_out[:-1])

    def sharing_tape(self) -> Body:
        return dataclasses.replace(self, base=self.base.sharing_tape())

    def jvp(self, wrt: Indices, of: Indices, repeatable: bool) -> Body:
        base = self.base.jvp(wrt, of, repeatable)
        tickets = len(base.in_avals) - len(self.base.in_avals) - len(wrt)
        stacked_in = self.stacked_in + (True,) * tickets
        stacked_in += tuple(self.stacked_in[i] for i in wrt)
        stacked_out = tuple(self.stacked_out[i] for i in of)
        return Batch(base, self.size, stacked_in, stacked_out, self.by_branch)

    def transpose(self, wrt: Indices, of: Indices) -> tuple[Body, Indices]:
        base, first = self.base.transpose(wrt, of)
        stacked_in = tuple(self.stacked_in[i] for i in first)
        stacked_in += tuple(self.stacked_out[i] for i in of)
        stacked_out = tuple(self.stacked_in[i] for i in wrt)
        return Batch(base, self.size, stacked_in, stacked_out, self.by_branch), first


def _stacked(avals: Avals, stacked: tuple[bool, ...], size: int) -> Avals:
    return tuple(
        aval.update(shape=(size, *aval.shape)) if is_stacked else aval
        for aval, is_stacked in zip(avals, stacked, strict=True)
    )
