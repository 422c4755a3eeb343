"""A primal at a tape, which derivatives are taken of: the base of JVPs and VJPs.

Nothing calls it by itself. It says where a derivative finds its tape, and computes the
primal again where that tape cannot be used:

- It has been evicted.
- A derivative that differentiates this one, on a tape of its own, has to follow what the
  primals depend on. The cached tape is replayed for that, which does without the user's
  function and is all that can be done for a stateful one.

Custom rules need care there. Let f be a `jax.custom_jvp` with the rule

    (y, y') = r(x, x')

that a body calls. JAX differentiates it once by calling r, and a second time by
differentiating the code of r. f itself is not seen again: y, too, is now what r computes.
Here, the first derivative has two calls, for y and for y', and both must do the same. The
one for y' does so by itself: it is computed on an inner tape, where r takes the place of f,
and the outer tape records the operations of r.

When the call for y is differentiated, its base is this body, and only `under` tells that
its operands were perturbed before. Entries of f in the cached tape are of no use then,
because their JVP is r once more. So the primal, too, is computed on an inner tape, with
respect to `under`. The result is the derivative of r. Without `under`, it would be what r
gives.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from jpyfunc._bodies.body import Body, DerivedBody, put_operands, zeros
from jpyfunc._bodies.custom_rules import RuleResiduals, apply_fwd
from jpyfunc._bodies.linear import ElementBody
from jpyfunc._bodies.steps import Steps
from jpyfunc._errors import TapeLostError, see
from jpyfunc._interpreters.tape import Tape, run_on_tape
from jpyfunc._runtime.context import Context
from jpyfunc._runtime.profile import Kind
from jpyfunc._runtime.tape_cache import tapes
from jpyfunc._runtime.tickets import is_void, ticket_aval
from jpyfunc._types import Array, Avals, Indices


@dataclasses.dataclass(frozen=True, slots=True)
class AtTape(DerivedBody, ElementBody):
    """A primal at a tape that may be cached, whose ticket is the last operand.

    Attributes:
        base: the primal.
        repeatable: whether the function may run again where the tape has been evicted.
        under: the operands that a derivative has been taken with respect to before.
        batch_shape: of the elements, if the function takes whole batches at once.
        is_shared: whether other derivatives need the same tape, so that this one does not
            spend it.
    """

    base: Body
    repeatable: bool
    under: Indices = ()
    batch_shape: tuple[int, ...] = ()
    is_shared: bool = False

    @property
    def in_avals(self) -> Avals:
        return (*self.base.in_avals, ticket_aval(self.batch_shape))

    @property
    def out_avals(self) -> Avals:
        return self.base.out_avals

    @property
    def kind(self) -> Kind:
        return "forward"

    @property
    def description(self) -> str:
        return self.base.description

    @property
    def ticket_index(self) -> int:
        return len(self.base.in_avals)

    @property
    def is_repeatable(self) -> bool:
        return self.repeatable

    def sharing_tape(self) -> Body:
        return dataclasses.replace(self, is_shared=True)

    def spend_tape(self, ticket: Array) -> None:
        if not self.is_shared:
            tapes.spend(ticket, self.repeatable)

    def widen(self, size: int, batched: tuple[bool, ...]) -> Body:
        base = self.base.widen(size, batched[:-1])
        return dataclasses.replace(self, base=base, batch_shape=(size, *self.batch_shape))

    def cached_tape(self, wrt: Indices, operands: Sequence[Array]) -> Tape | None:
        tape: Any = tapes.lookup(operands[-1], self.base.in_avals)
        return tape if tape and tape.serves(wrt, operands, bool(self.under)) else None

    def compute(self, context: Context, operands: Sequence[Array]) -> list[Array]:
        *primals, ticket = operands
        found: Any = tapes.lookup(ticket, self.base.in_avals)
        tape = found if found and found.can_replay(primals) else None
        if tape is None:
            if is_void(ticket):
                return zeros(self.out_avals)
            self._check_repeatable(found)
            primals = put_operands(context, primals, self.base.in_avals)
        self._count(context, tape)
        run = tape.replay if tape else functools.partial(self.base.compute, context)
        if self.under:
            return run_on_tape(run, primals, self.under, self.function.label).values
        return run(primals)

    def residuals(
        self, context: Context, operands: Sequence[Array]
    ) -> Steps[RuleResiduals]:
        *primals, ticket = operands
        residuals: Any = tapes.lookup(ticket, self.base.in_avals)
        if residuals is None:
            self._check_repeatable(None)
        self._count(context, residuals)
        if residuals is None:
            _, residuals = yield from apply_fwd(self.function, primals)
        return residuals

    @staticmethod
    def _count(context: Context, tape: Tape | RuleResiduals | None) -> None:
        context.count(**{"from_tape" if tape else "reran": context.elements})

    def _check_repeatable(self, tape: Tape | None) -> None:
        """Refuse to run a stateful body again: there is no tape, or it is of no use."""
        if self.repeatable:
            return
        why = "cannot be replayed for a second derivative" if tape else "has been evicted"
        remedy = (
            "If it is pure, leave out stateful=True"
            if tape
            else "Raise the limit of what tapes hold: jpyfunc.set_tape_limit(nbytes)"
        )
        raise TapeLostError(
            f"{self.function.label} is stateful, and its tape {why}; re-running it would "
            f"differentiate a different execution. {remedy}." + see("Tape evicted")
        )
