"""A primal on a tape, to be differentiated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from jpyfunc._bodies.at_tape import AtTape
from jpyfunc._bodies.body import Body, DerivedBody, put_operands
from jpyfunc._bodies.custom_rules import RuleResiduals, apply_fwd
from jpyfunc._bodies.linear import ElementBody, Jvp
from jpyfunc._bodies.steps import Steps
from jpyfunc._interpreters.tape import Tape, run_on_tape
from jpyfunc._runtime.context import Context
from jpyfunc._runtime.profile import Kind
from jpyfunc._runtime.tape_cache import tapes
from jpyfunc._runtime.tickets import ticket_aval
from jpyfunc._types import Array, Avals, Indices


@dataclasses.dataclass(frozen=True, slots=True)
class WithTape(DerivedBody, ElementBody):
    """A primal that runs on a tape with respect to operands `wrt`, and caches the tape.

    Results: those of the primal, then the ticket of the tape.

    Attributes:
        base: the primal.
        wrt: operands that it is going to be differentiated with respect to.
        batch_shape: of the elements, if the function takes whole batches at once. Each
            element has a ticket.
    """

    base: Body
    wrt: Indices
    batch_shape: tuple[int, ...] = ()

    @property
    def in_avals(self) -> Avals:
        return self.base.in_avals

    @property
    def out_avals(self) -> Avals:
        return (*self.base.out_avals, ticket_aval(self.batch_shape))

    @property
    def kind(self) -> Kind:
        return "forward"

    @property
    def description(self) -> str:
        return f"with tape of {self.base.description}"

    @property
    def has_tape(self) -> bool:
        return True

    def with_tape(self, wrt: Indices) -> Body:
        return dataclasses.replace(self, wrt=tuple(sorted({*self.wrt, *wrt})))

    def without_tape(self) -> Body:
        return self.base

    def jvp(self, wrt: Indices, of: Indices, repeatable: bool) -> Body:
        at_tape = AtTape(self.base, repeatable, self.wrt, self.batch_shape, is_shared=True)
        return Jvp(at_tape, wrt, of)

    def widen(self, size: int, batched: tuple[bool, ...]) -> Body:
        base = self.base.widen(size, batched)
        return dataclasses.replace(self, base=base, batch_shape=(size, *self.batch_shape))

    def compute(self, context: Context, operands: Sequence[Array]) -> list[Array]:
        function = self.function
        operands = put_operands(context, operands, self.in_avals)
        if not tapes.is_enabled:
            return [*self.base.compute(context, operands), self._store(None)]
        run = functools.partial(self.base.compute, context)
        tape = run_on_tape(run, operands, self.wrt, function.label)
        return [*tape.values, self._store(tape)]

    def steps(self, context: Context, operands: Sequence[Array]) -> Steps[list[Array]]:
        # By the forward rule, whose residuals are the tape.
        if not self.function.rule("fwd"):
            results = yield from self.base.steps(context, operands)
            return [*results, self._store(None)]
        results, residuals = yield from apply_fwd(self.function, operands)
        return [*results, self._store(residuals if tapes.is_enabled else None)]

    def _store(self, tape: Tape | RuleResiduals | None) -> np.ndarray:
        function = self.function.callable
        return tapes.store(tape, function, self.base.in_avals, self.batch_shape)
