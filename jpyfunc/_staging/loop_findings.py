"""Findings of the runs of a body about its loops, for the runs that follow."""

from __future__ import annotations

import dataclasses
from types import FrameType
from typing import Any

from jpyfunc._frames import line_of, place_of_frame
from jpyfunc._limits import MAX_PICTURED_IN_TOTAL, MAX_TESTS_IN_TOTAL
from jpyfunc._staging.abstract_tracer import AbstractTracer
from jpyfunc._staging.carried_numbers import CarriedNumbers
from jpyfunc._staging.equations import ValueRef

Answers = tuple[bool, ...]


@dataclasses.dataclass(slots=True)
class LoopFindings:
    """Findings of the runs of one exploration about loops.

    Attributes:
        no_loops: pairs of visits that are no loop, by the position of the first one and
            the answers up to the second one.
        is_unfolded: whether what is computed from known arrays alone is recorded, too.
        may_unfold: whether that may be tried.
        released: positions of the arrays that a loop carries, and that are known when it
            begins, by the answers up to its head.
        numbers: about Python numbers that a loop carries as arrays.
        reasons: why a place is not the head of a loop, by place and line.
        tests_left: after how many more truth tests no loops are looked for.
        objects_left: how many objects may still be looked at.
    """

    no_loops: set[tuple[int, Answers]] = dataclasses.field(default_factory=set)
    is_unfolded: bool = False
    may_unfold: bool = True
    released: dict[Answers, set[int]] = dataclasses.field(default_factory=dict)
    numbers: CarriedNumbers = dataclasses.field(default_factory=CarriedNumbers)
    reasons: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    tests_left: int = MAX_TESTS_IN_TOTAL
    objects_left: int = MAX_PICTURED_IN_TOTAL

    def release(self, arrays: list[Any], answers: Answers, positions: set[int]) -> bool:
        """Let a loop carry arrays that it cannot carry as they are.

        Args:
            arrays: those at the head, or the atoms that stand for them.
            answers: those up to the head.
            positions: of what is to be carried.

        Returns:
            Whether it will in runs to come: the exploration is to begin again.
        """
        if not self.may_unfold:
            return False
        if not self.is_unfolded:
            self.is_unfolded = True
            return True
        if not all(isinstance(arrays[i], AbstractTracer | ValueRef) for i in positions):
            return False
        self.released.setdefault(answers, set()).update(positions)
        return True

    def note_reason(self, frame: FrameType, why: str) -> None:
        """Note why the place where a frame stands is not the head of a loop."""
        self.reasons[place_of_frame(frame), line_of(frame)] = why
