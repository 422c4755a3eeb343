"""The body that every other is derived from: the user's function itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jpyfunc._bodies.at_tape import AtTape
from jpyfunc._bodies.body import Body, put_operands
from jpyfunc._bodies.custom_rules import apply_function
from jpyfunc._bodies.linear import ElementBody, Jvp
from jpyfunc._bodies.steps import Steps
from jpyfunc._bodies.user_function import UserFunction
from jpyfunc._bodies.with_tape import WithTape
from jpyfunc._runtime.context import Context
from jpyfunc._runtime.profile import Kind
from jpyfunc._types import Array, Avals, Indices


@dataclasses.dataclass(frozen=True, slots=True)
class Primal(ElementBody):
    """The user's function on values, without a tape."""

    _function: UserFunction

    @property
    def function(self) -> UserFunction:
        return self._function

    @property
    def in_avals(self) -> Avals:
        return self.function.in_avals

    @property
    def out_avals(self) -> Avals:
        return self.function.out_avals

    @property
    def kind(self) -> Kind:
        return "forward"

    @property
    def description(self) -> str:
        return self.function.name

    @property
    def is_primal(self) -> bool:
        return True

    def with_tape(self, wrt: Indices) -> Body:
        return WithTape(self, wrt)

    def jvp(self, wrt: Indices, of: Indices, repeatable: bool) -> Body:
        return Jvp(AtTape(self, repeatable), wrt, of)

    def widen(self, size: int, batched: tuple[bool, ...]) -> Body:
        return Primal(self.function.widen(size, batched))

    def compute(self, context: Context, operands: Sequence[Array]) -> list[Array]:
        context.count(runs=1)
        return self.function(put_operands(context, operands, self.in_avals))

    def steps(self, context: Context, operands: Sequence[Array]) -> Steps[list[Array]]:
        context.count(runs=1)
        return apply_function(self.function, operands)
