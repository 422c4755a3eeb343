"""Bodies of one element, and those of them that are linear: JVP, VJP and transpose.

A derivative is computed by one of three means, which it looks for in this order:

- Custom rules of a host function.
- The tape of a run of its base, which is cached if the base is an `AtTape` and its ticket
  finds the tape. The JVP and the VJP are applied entry by entry.
- A new run of the base on a tape. A base that is a derivative itself is computed on that
  tape, which is how there are derivatives of every order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from jpyfunc._bodies.body import (
    Body,
    DerivedBody,
    others,
    put_large_operands,
    put_operands,
    zeros,
)
from jpyfunc._bodies.custom_rules import (
    apply_bwd,
    apply_function,
    apply_jvp,
    apply_transpose,
    with_zeros,
)
from jpyfunc._bodies.steps import Steps
from jpyfunc._bodies.transpose import transpose_of_operations
from jpyfunc._errors import no_rule, no_second_order, no_transpose
from jpyfunc._interpreters.tape import Tape, run_on_tape
from jpyfunc._runtime.context import Context
from jpyfunc._runtime.profile import Kind
from jpyfunc._runtime.tickets import is_void
from jpyfunc._types import Array, Avals, Indices


class ElementBody(Body):
    """A body of one element: any kind but a `Batch`."""

    __slots__ = ()

    def jvp(self, wrt: Indices, of: Indices, repeatable: bool) -> Body:
        # A second derivative is several calls at one tape, which run in any order. The
        # derivative of the first spends it, so that others may find it evicted. For a body
        # that cannot run again, none of them spends it.
        base = self if self.is_repeatable else self.sharing_tape()
        return Jvp(base, wrt, of)

    def transpose(self, wrt: Indices, of: Indices) -> tuple[Body, Indices]:
        return Transpose(self, wrt, of), others(self, wrt)


@dataclasses.dataclass(frozen=True, slots=True)
class LinearBody(DerivedBody, ElementBody):
    """A linear map derived from `base` at its operands.

    Attributes:
        base: what it is derived from.
        wrt: operands of `base` that the derivative is with respect to.
        of: results of `base` that it is of.
    """

    base: Body
    wrt: Indices
    of: Indices

    @property
    def description(self) -> str:
        return f"{type(self).__name__.lower()} of {self.base.description}"

    @property
    def linear_from(self) -> int:
        return len(self.base.in_avals)

    def sharing_tape(self) -> Body:
        return dataclasses.replace(self, base=self.base.sharing_tape())

    def widen(self, size: int, batched: tuple[bool, ...]) -> Body:
        every = (True,) * len(self.base.in_avals)
        return dataclasses.replace(self, base=self.base.widen(size, every))

    def compute(self, context: Context, operands: Sequence[Array]) -> list[Array]:
        n = len(self.base.in_avals)
        tape = self._tape(context, operands[:n])
        return self._apply(tape, put_large_operands(context, operands[n:]))

    def steps(self, context: Context, operands: Sequence[Array]) -> Steps[list[Array]]:
        n = len(self.base.in_avals)
        operands, linear = operands[:n], operands[n:]
        if is_void(operands[-1]):
            return zeros(self.out_avals)
        return (yield from self._apply_rule(context, operands, linear))

    def _tape(self, context: Context, operands: Sequence[Array]) -> Tape:
        """The cached tape of the base, or that of a new run."""
        tape = self.base.cached_tape(self.wrt, operands)
        if tape is not None:
            context.count(from_tape=context.elements)
            return tape
        operands = put_operands(context, operands, self.base.in_avals)
        run = functools.partial(self.base.compute, context)
        return run_on_tape(run, operands, self.wrt, self.function.label)

    def _apply(self, tape: Tape, linear: Sequence[Array]) -> list[Array]:
        """Apply the linear map at a tape of the base."""
        raise NotImplementedError

    def _apply_rule(
        self, context: Context, operands: Sequence[Array], linear: Sequence[Array]
    ) -> Steps[list[Array]]:
        """Apply the linear map by the rule of a host function."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, slots=True)
class Jvp(LinearBody):
    """Tangents of results `of` from tangents of operands `wrt`.

    Operands: those of `base`, then one tangent per entry of `wrt`.
    """

    @property
    def kind(self) -> Kind:
        return "jvp"

    @property
    def in_avals(self) -> Avals:
        return self.base.in_avals + _tangents(self.base.in_avals, self.wrt)

    @property
    def out_avals(self) -> Avals:
        return _tangents(self.base.out_avals, self.of)

    def check_differentiable(self) -> None:
        if self.function.rules and not self.function.rule("jvp"):
            raise no_rule(self.function.label, "defjvp")

    def transpose(self, wrt: Indices, of: Indices) -> tuple[Body, Indices]:
        n = self.linear_from
        if any(i < n for i in wrt):
            return ElementBody.transpose(self, wrt, of)
        tangents = [i - n for i in wrt]
        vjp = Vjp(self.base, _pick(self.wrt, tangents), _pick(self.of, of))
        return vjp, tuple(range(n))

    def _apply(self, tape: Tape, linear: Sequence[Array]) -> list[Array]:
        return tape.jvp(self.wrt, linear, self.of)

    def _apply_rule(
        self, context: Context, operands: Sequence[Array], linear: Sequence[Array]
    ) -> Steps[list[Array]]:
        return apply_jvp(self.function, operands[:-1], self.wrt, linear, self.of)


@dataclasses.dataclass(frozen=True, slots=True)
class Vjp(LinearBody):
    """Cotangents of operands `wrt` from cotangents of results `of`.

    Operands: those of `base`, then one cotangent per entry of `of`.
    """

    @property
    def kind(self) -> Kind:
        return "vjp"

    @property
    def in_avals(self) -> Avals:
        return self.base.in_avals + _tangents(self.base.out_avals, self.of)

    @property
    def out_avals(self) -> Avals:
        return _tangents(self.base.in_avals, self.wrt)

    def check_differentiable(self) -> None:
        if self.function.rules and not self.function.rule("fwd"):
            raise no_rule(self.function.label, "defvjp")

    def transpose(self, wrt: Indices, of: Indices) -> tuple[Body, Indices]:
        n = self.linear_from
        if any(i < n for i in wrt):
            return ElementBody.transpose(self, wrt, of)
        cotangents = [i - n for i in wrt]
        jvp = Jvp(self.base, _pick(self.wrt, of), _pick(self.of, cotangents))
        return jvp, tuple(range(n))

    def _apply(self, tape: Tape, linear: Sequence[Array]) -> list[Array]:
        return tape.vjp(self.of, linear, self.wrt)

    def _apply_rule(
        self, context: Context, operands: Sequence[Array], linear: Sequence[Array]
    ) -> Steps[list[Array]]:
        residuals = yield from self.base.residuals(context, operands)
        of, wrt = self.of, self.wrt
        return (yield from apply_bwd(self.function, residuals, of, linear, wrt))


@dataclasses.dataclass(frozen=True, slots=True)
class Transpose(LinearBody):
    """Transpose of a `base` that is linear in operands `wrt`, though nothing shows it.

    Operands: those of `base` that are not in `wrt`, then one cotangent per entry of `of`.
    """

    @property
    def kind(self) -> Kind:
        return "vjp"

    @property
    def in_avals(self) -> Avals:
        fixed = tuple(self.base.in_avals[i] for i in others(self.base, self.wrt))
        return fixed + _tangents(self.base.out_avals, self.of)

    @property
    def out_avals(self) -> Avals:
        return _tangents(self.base.in_avals, self.wrt)

    @property
    def linear_from(self) -> int:
        return len(self.base.in_avals) - len(self.wrt)

    @property
    def ticket_index(self) -> int | None:
        fixed = others(self.base, self.wrt)
        ticket = self.base.ticket_index
        return fixed.index(ticket) if ticket in fixed else None

    def check_differentiable(self) -> None:
        function, base = self.function, self.base
        if not function.is_host_function:
            return
        if not function.rule("fwd"):
            raise no_transpose(function.label)
        # A function may be linear in any operand: `apply_transpose` checks whether it is.
        # The derivative by rule is linear in its tangents or cotangents alone.
        if isinstance(base, LinearBody) and min(self.wrt) < base.linear_from:
            raise no_second_order(function.label)

    def compute(self, context: Context, operands: Sequence[Array]) -> list[Array]:
        base = self.base
        fixed = others(base, self.wrt)
        operands = put_operands(context, operands, self.in_avals)
        known = dict(zip(fixed, operands[: len(fixed)], strict=True))

        def restricted(*linear: Any) -> list[Array]:
            values = known | dict(zip(self.wrt, linear, strict=True))
            results = base.compute(context, [values[i] for i in range(len(values))])
            return [results[i] for i in self.of]

        return transpose_of_operations(
            restricted,
            tuple(base.in_avals[i] for i in self.wrt),
            operands[len(fixed) :],
            self.function.label,
        )

    def steps(self, context: Context, operands: Sequence[Array]) -> Steps[list[Array]]:
        context.count(runs=1)
        return self._transpose_by_rules(operands)

    def _transpose_by_rules(self, operands: Sequence[Array]) -> Steps[list[Array]]:
        """Transpose a host function, or transpose back what is its transpose.

        (A^T)^T = A, so the latter is the function itself, with zeros for the linear
        operands that are not given.
        """
        base = self.base
        if not isinstance(base, Transpose):
            wrt, of = self.wrt, self.of
            return (yield from apply_transpose(self.function, wrt, of, operands))
        inner = base.base
        fixed = others(inner, base.wrt)
        given = operands[len(operands) - len(self.of) :]
        known = dict(zip(fixed, operands[: len(fixed)], strict=True))
        known |= dict(zip((base.wrt[i] for i in self.of), given, strict=True))
        values = with_zeros(inner.in_avals, known)
        if isinstance(inner, Transpose):
            results = yield from inner._transpose_by_rules(values)
        else:
            results = yield from apply_function(self.function, values)
        return [results[base.of[i - len(fixed)]] for i in self.wrt]


def _tangents(avals: Avals, indices: Indices) -> Avals:
    return tuple(avals[i].to_tangent_aval() for i in indices)


def _pick(indices: Indices, positions: Sequence[int]) -> Indices:
    return tuple(indices[i] for i in positions)
