"""Python numbers of a body that are replaced by arrays, because a loop carries them."""

from __future__ import annotations

import dataclasses
from types import FrameType
from typing import Any

from jpyfunc._frames import local_variables, set_local_variable
from jpyfunc._limits import MAX_COUNT, MAX_FIRST_COUNT
from jpyfunc._staging.bytecode import TruthTest, tells_numbers_from_arrays
from jpyfunc._staging.number_tracer import (
    UNBOUNDED,
    Bounds,
    NumberTracer,
    Variable,
)
from jpyfunc._staging.python_state import PythonState


@dataclasses.dataclass(slots=True)
class CarriedNumbers:
    """Findings of the runs of one exploration about numbers that loops change.

    Attributes:
        may_replace: whether numbers are replaced at all.
        replaced: the variables that are replaced, each with whether it falls, and whether
            it rises.
        refused: why others are not.
    """

    may_replace: bool = True
    replaced: dict[Variable, tuple[bool, bool]] = dataclasses.field(default_factory=dict)
    refused: dict[Variable, str] = dataclasses.field(default_factory=dict)

    def learn(
        self, frame: FrameType, test: TruthTest, state: PythonState, later: PythonState
    ) -> bool:
        """Decide whether numbers are to be replaced.

        Args:
            frame: whose variables they are.
            test: its instruction.
            state: that of a visit.
            later: that of another one, at the same place.

        Returns:
            Whether more of them are, from the next run on.
        """
        values = state.differing_numbers(later)
        found = {Variable(frame.f_code, test.continuation, x): values[x] for x in values}
        if not self.may_replace or not found or not found.keys().isdisjoint(self.refused):
            return False
        for code in state.codes:
            # What `dataclasses` writes compares classes, but not those of fields.
            if tells_numbers_from_arrays(code) and code.co_filename != "<string>":
                self.refused |= dict.fromkeys(found, f"{code.co_name} may ask for its type")
                return False
        changes = False
        for variable, (a, b) in found.items():
            before = self.replaced.get(variable, (False, False))
            now = before[0] or b < a, before[1] or b > a
            changes = changes or now != before
            self.replaced[variable] = now
        return changes

    def replace(self, trace: Any, frame: FrameType, test: TruthTest) -> None:
        """Replace numbers among the variables of a frame, at a truth test.

        A number is found here when a loop begins, and where an iteration has assigned
        another one, such as a counter that is reset. What is an array already may have
        been bounded by a test, which does not hold any more in the next iteration.
        """
        names = [
            x
            for x in self.replaced
            if x.code is frame.f_code and x.continuation == test.continuation
        ]
        variables = local_variables(frame) if names else {}
        for variable in names:
            value, changes = variables.get(variable.name), self.replaced[variable]
            if type(value) is NumberTracer and value.kind is int:
                value.bounds = _reaching_far(value.bounds, *changes)
            elif type(value) is float or (
                type(value) is int and abs(value) <= MAX_FIRST_COUNT
            ):
                is_float = type(value) is float
                bounds = UNBOUNDED if is_float else _reaching_far((value, value), *changes)
                number = NumberTracer(trace.variable(value), variable, type(value), bounds)
                set_local_variable(frame, variable.name, number)

    def why_not(self, frame: FrameType, test: TruthTest) -> str:
        """Say why variables are not replaced at a test; "" if nothing is known."""
        reasons = [
            why
            for x, why in self.refused.items()
            if x.code is frame.f_code and x.continuation == test.continuation
        ]
        return f" ({'; '.join(dict.fromkeys(reasons))})" if reasons else ""

    def refuse(self, why: str, variables: list[Variable]) -> bool:
        """Leave variables what they are, in further runs.

        Returns:
            Whether some of them are replaced by now.
        """
        known = [x for x in variables if x in self.replaced]
        for variable in known:
            del self.replaced[variable]
            self.refused[variable] = why
        return bool(known)


def _reaching_far(bounds: Bounds, falls: bool, rises: bool) -> Bounds:
    """Widen the bounds of an integer to where it may be after many iterations."""
    low, high = bounds
    return min(low, -MAX_COUNT) if falls else low, max(high, MAX_COUNT) if rises else high
