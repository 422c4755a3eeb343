"""Find the loops of a body: a run that comes back to a state that it was in."""

from __future__ import annotations

import dataclasses
from types import CodeType, FrameType
from typing import Any, NoReturn

import jax
from jax.core import ShapedArray

from jpyfunc._staging.abstract_tracer import AbstractTracer
from jpyfunc._staging.equations import Atom, BranchPoint, Equation
from jpyfunc._staging.iterations import IterationPair
from jpyfunc._staging.loop_findings import Answers, LoopFindings
from jpyfunc._staging.number_tracer import Variable
from jpyfunc._staging.visit_finder import VisitFinder
from jpyfunc._staging.visits import Visit

# A truth test of an abstract value is asked in a frame of the body. A *visit* is that
# frame, where it stands, and a picture of all that its variables, and those of the frames
# around it, lead to: see `python_state`. Let a run visit one frame twice at one place, and
# let the two pictures be the same but for the arrays. Python will then do from the second
# visit on what it did from the first one on, with other arrays: the path may end there,
# with an edge back to the first visit, the *head* of a loop. The arrays at the head are
# carried: those at the second visit are what they are in the next iteration. What keeps
# this from being wrong:
#
# - Arrays that are one object at the head are one at the second visit, and those that are
#   not, are not: the body may ask `x is y`.
# - The instruction at which the frame stands tests by itself, with nothing else on its
#   value stack. Code in C that makes several tests stands at one instruction all the time;
#   a comparison of lists does, too, so the instruction must have been left in between.
# - Another iteration is run, with the same answers. It must be the same to the bit: see
#   `iterations`. And an array must have changed, or the body would never end.
# - The value stack may have iterators of `jpyfunc.range` on it, which nothing else holds.
#   Their state is part of the picture.
# - No generator is on the way: it may be resumed from elsewhere.
# - An object of Python, or an array, that is replaced in an iteration was made since the
#   frame was first visited. An older one may be held where nothing can be seen: on the
#   value stack of a caller, or by code in C that calls the function again.
#
# If something does not hold, the pair of visits is no loop, and later ones are tried: the
# first iterations often differ from the others.


class RunConcluded(BaseException):
    """A run need not go on, because it has found out what it was to find out.

    A `BaseException`, which no `except Exception` of the body catches.
    """


@dataclasses.dataclass(frozen=True, slots=True)
class BackEdge:
    """The end of a path that comes back to one of its branch points.

    Attributes:
        head: the position of that branch point in the run.
        names: how to write the arrays that Python's state leads to, the test first.
        avals: theirs.
        first: what they are at the head.
        following: what they are in the next iteration.
        unready: the positions of those at the head that a loop cannot carry as they are;
            see `Visit.unready`.
        equations: the operations since the last branch point, without those that the body
            adds once it is told that the run has ended.
    """

    head: int
    names: list[str]
    avals: list[ShapedArray]
    first: list[Atom]
    following: list[Atom]
    unready: set[int]
    equations: list[Equation]


class LoopSearch:
    """The visits of one run, and the comparison of two of its iterations.

    Attributes:
        back: where the run came back to, or None.
        is_to_repeat: whether the run ended because of what it has added to the findings,
            and is to be run again.
        has_learned: whether all earlier runs are to be run again, too.
        is_unfolded: whether what is computed from known arrays alone is recorded, too.
        ranges: the iterators of `jpyfunc.range` in `for` loops.
    """

    def __init__(
        self,
        findings: LoopFindings,
        script_length: int,
        entry: FrameType,
        body_code: CodeType | None,
    ) -> None:
        """Begin a run.

        Args:
            findings: of earlier runs; those of this run are added.
            script_length: how many truth tests are answered as in an earlier run, which
                has looked at them.
            entry: the frame that calls the body.
            body_code: the code of the body, if it is written in Python.
        """
        self.back: BackEdge | None = None
        self.is_to_repeat = False
        self.has_learned = False
        self._findings = findings
        self._script_length = script_length
        self._visits: list[Visit] = []
        self._pair: tuple[Visit, Visit] | None = None  # that is being checked
        self._was_left = False  # whether the frame has left the second visit's instruction
        self._visit_finder = VisitFinder(findings, entry, body_code)
        self.ranges = self._visit_finder.ranges
        self.is_unfolded = findings.is_unfolded

    def answer(self, trace: Any, tested: AbstractTracer, answer: bool) -> bool:
        """Return the answer to a truth test, and look for a loop.

        Args:
            trace: that of the run.
            tested: what is tested.
            answer: what the script says.

        Raises:
            RunConcluded: the run need not go on.
        """
        if self.back or self.is_to_repeat:  # the body has caught the exception
            raise RunConcluded
        self._findings.tests_left -= 1
        points: list[BranchPoint] = trace.branch_points
        n = len(points)
        if self._pair:
            head, second = self._pair
            position = n - second.index + head.index
            if position == second.index:
                self._conclude(trace, tested, head, second)
            self._visit_finder.prepare(trace)
            return points[position].answer
        visit = None if trace.refusal else self._visit_finder.find(trace, tested)
        if visit is None:
            return answer
        answers = tuple(point.answer for point in points)
        visit.release(self._findings.released.get(answers, ()))
        if n >= self._script_length:
            head_visit = self._head_of(visit, answers)
            if head_visit is not None:
                self._pair = head_visit, visit
                answer = points[head_visit.index].answer
                # The next iteration begins with arrays without values, like the first.
                visit.release(head_visit.changed(visit))
                visit.begin_at(head_visit)
        self._visits.append(visit)
        return answer

    def note_operation(self) -> None:
        """Note that an operation is recorded."""
        if self._pair and not self._was_left:
            second = self._pair[1]
            self._was_left = second.frame.f_lasti != second.offset

    def keep_folded(self) -> None:
        """Begin again without loops that carry known arrays: the body needs the values.

        Raises:
            RunConcluded: always.
        """
        findings = self._findings
        findings.may_unfold = findings.is_unfolded = False
        self._begin_again()

    def keep_numbers(self, why: str, variables: list[Variable] | None = None) -> None:
        """Begin again with Python numbers in some variables that are arrays by now.

        Args:
            why: the number is needed.
            variables: which are blamed, by default all.

        Raises:
            RunConcluded: there are such variables.
        """
        numbers = self._findings.numbers
        if numbers.refuse(why, variables or list(numbers.replaced)):
            self._begin_again()

    def _begin_again(self) -> NoReturn:
        """End the exploration, which begins again with what has been found."""
        self._findings.no_loops.clear()
        self._findings.released.clear()
        self.is_to_repeat = self.has_learned = True
        raise RunConcluded

    def close(self, trace: Any) -> None:
        """End a run. If it has not come to the end of a second iteration, it failed."""
        if self._pair and not self.back and not self.is_to_repeat:
            self._fail(trace.branch_points, *self._pair)

    def _head_of(self, visit: Visit, answers: Answers) -> Visit | None:
        """Find an earlier visit that may be the head of a loop.

        Raises:
            RunConcluded: there is one, if runs are recorded in another way.
        """
        findings = self._findings
        before = [x for x in self._visits if x.is_at(visit)]
        if not before:
            return None
        first = self._first(visit)
        for head in reversed(before):
            if not head.is_like(visit, first):
                continue
            if (head.index, answers) in findings.no_loops:
                return None
            unready = {*head.unready()}.intersection(head.changed(visit))
            if not unready:
                return head
            if findings.release(head.arrays, answers[: head.index], unready):
                self.is_to_repeat = self.has_learned = True
                raise RunConcluded
        if any(
            findings.numbers.learn(visit.frame, visit.test, head.state, visit.state)
            for head in reversed(before)
        ):
            self._begin_again()
        why = before[-1].why_unlike(visit) + findings.numbers.why_not(
            visit.frame, visit.test
        )
        self._findings.note_reason(visit.frame, why)
        return None

    def _first(self, visit: Visit) -> Visit:
        return next(x for x in self._visits if x.frame is visit.frame)

    def _conclude(
        self, trace: Any, tested: AbstractTracer, head: Visit, second: Visit
    ) -> None:
        """End the second iteration, and with it the run.

        Raises:
            RunConcluded: always.
        """
        points: list[BranchPoint] = trace.branch_points
        third = self._visit_finder.find(trace, tested)
        if third is None or not self._is_same_iteration(trace, head, second, third):
            self._fail(points, head, second)
            raise RunConcluded
        first, following = ([*map(trace.atom, x.arrays)] for x in (head, second))
        avals = [*map(jax.typeof, head.arrays)]
        equations, unready = points[second.index].equations, {*head.unready()}
        self.back = BackEdge(
            head.index, head.names, avals, first, following, unready, equations
        )
        del points[second.index :]
        raise RunConcluded

    def _is_same_iteration(
        self, trace: Any, head: Visit, second: Visit, third: Visit
    ) -> bool:
        if (
            trace.refusal
            or not self._was_left
            or not second.is_at(third)
            or not second.is_like(third, self._first(second))
        ):
            return False
        i, j = head.index, second.index
        points: list[BranchPoint] = trace.branch_points
        at_first, at_second, at_third = (
            [*map(trace.atom, x.arrays)] for x in (head, second, third)
        )
        pair = IterationPair(head.value_count)
        return (
            pair.pair(at_first, at_second)
            and all(
                pair.is_same_part(points[k], points[k + j - i]) for k in range(i + 1, j)
            )
            and pair.are_same_equations(points[j].equations, trace.equations)
            and all(map(pair.is_same_value, at_second, at_third))
        )

    def _fail(self, points: list[BranchPoint], head: Visit, second: Visit) -> None:
        """Note that the two visits are no loop."""
        answers = tuple(point.answer for point in points[: second.index])
        self._findings.no_loops.add((head.index, answers))
        why = "two iterations in a row are not the same operations"
        self._findings.note_reason(second.frame, why)
        self.is_to_repeat = True
