"""Find out which place of a body a truth test is at, and the state of Python there."""

from __future__ import annotations

from collections import Counter
from types import CodeType, FrameType
from typing import Any

from jpyfunc._frames import is_library_frame
from jpyfunc._limits import MAX_PICTURED_OBJECTS
from jpyfunc._staging.abstract_tracer import AbstractTracer
from jpyfunc._staging.bytecode import SUSPENDABLE, TruthTest, truth_tests
from jpyfunc._staging.loop_findings import LoopFindings
from jpyfunc._staging.number_tracer import Bounds, NumberTracer
from jpyfunc._staging.object_contents import UnseenStateError
from jpyfunc._staging.python_state import PythonState
from jpyfunc._staging.range_iterator import RangeIterator
from jpyfunc._staging.visits import RangesOnStacks, Visit, frames_up_to, testing_frame


class VisitFinder:
    """The visits of one run.

    Attributes:
        ranges: the iterators of `jpyfunc.range` in `for` loops.
    """

    def __init__(
        self, findings: LoopFindings, entry: FrameType, body_code: CodeType | None
    ) -> None:
        """Begin a run.

        Args:
            findings: of earlier runs; those of this run are added.
            entry: the frame that calls the body.
            body_code: the code of the body, if it is written in Python.
        """
        self.ranges = RangesOnStacks()
        self._findings = findings
        self._entry = entry
        self._body_code = body_code
        self._times: Counter[tuple[FrameType, tuple[int, ...]]] = Counter()

    def find(self, trace: Any, tested: AbstractTracer) -> Visit | None:
        """Return the visit that a truth test is, or None if no loop can begin there.

        Args:
            trace: that of the run.
            tested: what is tested.
        """
        value_count = trace.value_count
        found = self.prepare(trace)
        if found is None:
            return None
        frame, test, iterator = found
        key = frame, test.continuation
        try:
            frames, state = self._state(frame, test, iterator)
        except UnseenStateError as error:
            if self._times[key] > 1:
                self._findings.note_reason(frame, str(error))
            return None
        return Visit(
            len(trace.branch_points),
            frames,
            test,
            frame.f_lasti,
            state,
            [tested, *state.arrays],
            value_count,
            len(state.frames) == 1 and frame.f_code is self._body_code,
            [None, *map(_bounds_of, state.arrays)],
        )

    def prepare(
        self, trace: Any
    ) -> tuple[FrameType, TruthTest, RangeIterator | None] | None:
        """Find out what tests, and replace the numbers there that a loop carries.

        Returns:
            The frame, the instruction, and the iterator that the instruction asks. None
            if no loop can begin here.
        """
        frame, iterator = testing_frame()
        if frame is None:
            return None
        test = truth_tests(frame.f_code).get(frame.f_lasti)
        key = frame, test.continuation if test else (-1, frame.f_lasti)
        self._times[key] += 1
        is_in_c = test is None or test.asks_iterator != (iterator is not None)
        if is_in_c and self._times[key] > 1:
            self._findings.note_reason(
                frame, "a function in C tests it: use `and` and `or`"
            )
        if test is None or is_in_c or not test.repeats:
            return None
        if test.iterators is not None:
            self._findings.numbers.replace(trace, frame, test)
        return frame, test, iterator

    def _state(
        self, frame: FrameType, test: TruthTest, iterator: RangeIterator | None
    ) -> tuple[tuple[FrameType, ...], PythonState]:
        """Look at the state of Python in a frame and those around it.

        Raises:
            UnseenStateError: it cannot be seen.
        """
        frames = frames_up_to(frame, self._entry)
        if any(x.f_code.co_flags & SUSPENDABLE for x in frames):
            raise UnseenStateError(
                "it runs in a generator or a coroutine: move it into an ordinary function"
            )
        iterators = self.ranges.on_stack(frame, test, iterator)
        findings = self._findings
        if findings.tests_left < 0:
            raise UnseenStateError("there were too many truth tests before")
        limit = min(MAX_PICTURED_OBJECTS, findings.objects_left)
        users = [x for x in frames if not is_library_frame(x)]
        state = PythonState(users, iterators)
        try:
            state.look(limit)
        except UnseenStateError:
            raise
        except Exception as error:
            # An object of a kind that is not known.
            raise UnseenStateError(
                f"the state of Python cannot be seen: {error}"
            ) from error
        finally:
            findings.objects_left -= len(state.facts)
        return tuple(frames), state


def _bounds_of(array: Any) -> Bounds | None:
    return array.bounds if isinstance(array, NumberTracer) else None
