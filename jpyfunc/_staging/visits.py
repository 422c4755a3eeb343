"""Visits: the places that a run of a body comes to, with all of Python's state there."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import traceback
import types
import weakref
from collections.abc import Iterable
from types import FrameType
from typing import Any

import jax
from jax.core import Tracer

from jpyfunc._frames import is_library_frame
from jpyfunc._interpreters.base_tracer import BodyTracer
from jpyfunc._staging.abstract_tracer import AbstractTracer, is_abstract
from jpyfunc._staging.bytecode import TruthTest, loop_of_iterator
from jpyfunc._staging.number_tracer import Bounds, NumberTracer
from jpyfunc._staging.object_contents import UnseenStateError
from jpyfunc._staging.python_state import PythonState
from jpyfunc._staging.range_iterator import RangeIterator

# What is known of these is in what they lead to: which object it is does not matter.
_IMMUTABLE = (tuple, types.MethodType, types.BuiltinFunctionType, slice)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Visit:
    """A truth test in a frame, and the state of Python at that time.

    Attributes:
        index: the position of the branch point in the run.
        frames: the one that tests, and those around it up to the body's.
        test: the instruction that tests.
        offset: where in the bytecode it is.
        state: what the variables of the frames lead to.
        arrays: what is tested, and the arrays of `state`.
        value_count: how many values the run had made.
        is_of_body: whether the frame is that of the body itself, whose arguments nothing
            else holds.
        bounds: of those of `arrays` that are in the place of Python numbers; else None.
    """

    index: int
    frames: tuple[FrameType, ...]
    test: TruthTest
    offset: int
    state: PythonState
    arrays: list[Any]
    value_count: int
    is_of_body: bool
    bounds: list[Bounds | None]

    @property
    def frame(self) -> FrameType:
        """The frame that tests."""
        return self.frames[0]

    @property
    def names(self) -> list[str]:
        """The variables of `arrays`, as they are written."""
        return ["the test", *self.state.array_paths]

    def is_at(self, other: Visit) -> bool:
        """Whether two visits are of the same frames at the same place."""
        return (
            self.test.continuation == other.test.continuation
            and len(self.frames) == len(other.frames)
            and all(x is y for x, y in zip(self.frames, other.frames, strict=True))
        )

    def is_like(self, later: Visit, first: Visit) -> bool:
        """Whether a later visit at the same place has the same state, but for the arrays.

        Args:
            later: the later visit.
            first: the first visit of the same frame.
        """
        return (
            self.state.facts == later.state.facts
            and not self._changed_avals(later)
            and self._shares_arrays_like(later)
            and not self._replaces_objects_of(first, later)
            and not self._replaces_arrays_of(first, later)
            and self._keeps_bounds(later)
            and any(x is not y for x, y in self._pairs(later)[1:])
        )

    def changed(self, later: Visit) -> list[int]:
        """The positions of the arrays that are others at a later visit."""
        return [i for i, (x, y) in enumerate(self._pairs(later)) if x is not y]

    def unready(self) -> list[int]:
        """The positions of arrays that a loop cannot carry as they are.

        They have values, on which the body may act; or they do not vary over the manual
        axes of a mesh, as what changes in a loop does, because its length varies.
        """
        axes = self._axes()
        return [
            i
            for i, x in enumerate(self.arrays)
            if has_value(x) or jax.typeof(x).manual_axis_type.varying != axes
        ]

    def release(self, positions: Iterable[int]) -> None:
        """Make arrays what a loop carries; see `unready`."""
        axes = self._axes()
        for i in positions:
            if isinstance(self.arrays[i], AbstractTracer):
                self.arrays[i].release(axes)

    def begin_at(self, head: Visit) -> None:
        """Begin an iteration with numbers of which the same is known as at a head."""
        self.bounds[:] = head.bounds
        for number, bounds in zip(self.arrays, self.bounds, strict=True):
            if isinstance(number, NumberTracer) and bounds is not None:
                number.bounds = bounds

    def _keeps_bounds(self, later: Visit) -> bool:
        """Whether numbers are within the bounds, at a later visit, that they have here."""
        return all(
            y.continues(x, bounds)
            for (x, y), bounds in zip(self._pairs(later), self.bounds, strict=True)
            if bounds is not None
        )

    def _axes(self) -> frozenset[str]:
        """The manual axes that any of the arrays varies over."""
        found = (jax.typeof(x).manual_axis_type.varying for x in self.arrays)
        return frozenset().union(*found)

    def why_unlike(self, later: Visit) -> str:
        """Say what differs at a later visit at the same place, and what helps."""
        for path, a, b in self.state.differences(later.state):
            return _why_unlike(path, a, b)
        for path, a, b in self._changed_avals(later):
            change = f"{path!r} is {a.str_short()}, then {b.str_short()}"
            return f"{change}: keep the shape and dtype of what changes"
        if not self._shares_arrays_like(later):
            return "two variables hold one array in one iteration, and two in another"
        if all(x is y for x, y in self._pairs(later)[1:]):
            return "no array changes from one iteration to the next"
        return "two iterations in a row are not the same operations"

    def _pairs(self, later: Visit) -> list[tuple[Any, Any]]:
        return list(zip(self.arrays, later.arrays, strict=True))

    def _changed_avals(self, later: Visit) -> list[tuple[str, Any, Any]]:
        avals = [(jax.typeof(x), jax.typeof(y)) for x, y in self._pairs(later)]
        named = zip(self.names, avals, strict=True)
        return [(path, a, b) for path, (a, b) in named if a != b]

    def _shares_arrays_like(self, later: Visit) -> bool:
        """Whether arrays are one object in both visits, or in neither."""
        pairs = [(id(x), id(y)) for x, y in self._pairs(later)]
        distinct = set(pairs)
        return len(dict(pairs)) == len(distinct) == len({y for _, y in distinct})

    def _replaces_objects_of(self, first: Visit, later: Visit) -> bool:
        """Whether objects that existed at the first visit are replaced by others."""
        old = set(map(id, first.state.objects))
        pairs = zip(self.state.objects, later.state.objects, strict=True)
        return any(
            x is not y and id(x) in old and type(x) not in _IMMUTABLE for x, y in pairs
        )

    def _replaces_arrays_of(self, first: Visit, later: Visit) -> bool:
        """Whether arrays that others may hold, too, are replaced by others."""
        return not first.is_of_body and any(
            x is not y and is_abstract(x) and x.number < first.value_count
            for x, y in self._pairs(later)
        )


def _why_unlike(path: str, a: Any, b: Any) -> str:
    """Say how two facts about a variable differ; None is that there is no such fact."""
    if not (isinstance(a, tuple) and isinstance(b, tuple)) or a[0] is not b[0]:
        return f"{path!r} differs from one iteration to the next"
    kind = a[0]
    if kind in (int, float):
        return (
            f"{path!r} is a Python number ({a[1]}, then {b[1]}): use an array, or "
            "jpyfunc.range"
        )
    if kind in (list, dict) and b[-1] > a[-1]:
        return f"{path!r} grows: write into an array instead, x.at[i].set(...)"
    return f"{path!r} differs from one iteration to the next"


def has_value(array: Any) -> bool:
    """Whether an array has data, or had it when it was made."""
    if isinstance(array, AbstractTracer):
        return array.value is not None
    return isinstance(array, jax.Array) and not isinstance(array, Tracer)


class RangesOnStacks:
    """The iterators of `jpyfunc.range` that are on the value stacks of frames.

    Nothing else holds these, so that one is gone once its loop is over.
    """

    def __init__(self) -> None:
        # By the frame, and the instruction that asks the iterator for the next value.
        self._iterators: dict[tuple[int, int], weakref.ref[RangeIterator]] = {}

    def enter(self, frame: FrameType, iterator: RangeIterator) -> None:
        """Note that a frame begins a `for` loop, if it does, with a new iterator."""
        offset = loop_of_iterator(frame.f_code, frame.f_lasti)
        if offset is not None:
            self._iterators[id(frame), offset] = weakref.ref(iterator)

    def on_stack(
        self, frame: FrameType, test: TruthTest, asked: RangeIterator | None
    ) -> list[RangeIterator]:
        """Return the iterators on the value stack of a frame at a truth test.

        Args:
            frame: that tests.
            test: the instruction.
            asked: the iterator whose next value it asks for, if it does.

        Raises:
            UnseenStateError: there is something else on the stack, or may be.
        """
        places = [(id(frame), offset) for offset in test.iterators or ()]
        references = [self._iterators.get(place) for place in places]
        found = [x for x in (ref and ref() for ref in references) if x is not None]
        if asked is not None and asked not in found[-1:]:
            raise UnseenStateError("jpyfunc.range is not what the for loop itself iterates")
        if test.iterators is None or len(found) < len(places):
            raise UnseenStateError(
                "it is inside a for or with block: use jpyfunc.range, or move it into a "
                "function of its own"
            )
        return found


def testing_frame() -> tuple[FrameType | None, RangeIterator | None]:
    """Return the frame that asks for the truth value of an array, if it is the user's.

    Returns:
        The frame, or None; and the iterator that it asks for the next value, if that is
        what tests.
    """
    iterator = None
    for frame, _ in traceback.walk_stack(sys._getframe()):
        if frame.f_code is BodyTracer.__bool__.__code__:
            asking = frame.f_back
            if asking and asking.f_code is RangeIterator.__next__.__code__:
                iterator, asking = asking.f_locals["self"], asking.f_back
            return None if asking is None or is_library_frame(asking) else asking, iterator
    return None, None


def frames_up_to(frame: FrameType, entry: FrameType) -> list[FrameType]:
    """Return `frame` and those around it, inside of `entry`."""
    stack = (around for around, _ in traceback.walk_stack(frame))
    return list(itertools.takewhile(lambda around: around is not entry, stack))
