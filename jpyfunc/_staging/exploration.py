"""Explore a body: run it on abstract values along each path through its branches."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import heapq
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import jax
from jax.core import ShapedArray
from jax.extend.core import set_current_trace, take_current_trace

from jpyfunc._conversion import Array, is_weak
from jpyfunc._frames import code_of
from jpyfunc._staging.abstract_trace import AbstractTrace, TooManyBranchPoints
from jpyfunc._staging.abstract_tracer import NeedsValueError
from jpyfunc._staging.equations import Atom
from jpyfunc._staging.loop_findings import LoopFindings
from jpyfunc._staging.loop_search import LoopSearch, RunConcluded
from jpyfunc._staging.muted_streams import mute_streams
from jpyfunc._staging.numpy_constants import NumpyCopies
from jpyfunc._tout import Leaf, Template

Result = TypeVar("Result")


class LearnedMore(Exception):  # noqa: N818 - it is no error
    """An exploration has found out how runs are to be recorded, and has to begin again."""


@dataclasses.dataclass(frozen=True, slots=True)
class Exploration:
    """The exploration that this thread is in, the innermost of several.

    Attributes:
        shapes_only: whether the results matter only for their shapes and dtypes, so that
            nothing of the runs is put into a program.
        memo: results of `once_per_exploration`. Inner explorations share it. It lives
            as long as the outermost one, because functions may change afterwards.
    """

    shapes_only: bool
    memo: dict[Hashable, Any]


_current: contextvars.ContextVar[Exploration | None]
_current = contextvars.ContextVar("exploration", default=None)
current_exploration = _current.get


def once_per_exploration(
    key: Callable[[], Hashable | None], compute: Callable[[], Result]
) -> Result:
    """Return `compute()`, computed once for equal keys in a body that is being explored.

    A body makes the same calls in each of its runs, and so do the bodies that it calls.
    Exploring each of them again each time would take a number of runs that is exponential
    in the depth of the calls. Outside of an exploration nothing is remembered.

    Args:
        key: what tells the call from others, or None if that cannot be told.
        compute: the computation.
    """
    exploration = current_exploration()
    found = None if exploration is None else key()
    if exploration is None or found is None:
        return compute()
    if found not in exploration.memo:
        exploration.memo[found] = compute()
    return exploration.memo[found]


@dataclasses.dataclass(frozen=True, slots=True)
class AbstractRun:
    """One run of a body on abstract values.

    Attributes:
        trace: the record of what it did.
        template: what it returned, complete, or None if it did not return.
        results: the results as they are recorded, one per leaf of the template.
        error: how it ended, if it did neither return nor come back to the head of a
            loop: an `Exception`, or `TooManyBranchPoints`.
    """

    trace: AbstractTrace
    template: Template | None
    results: list[Atom]
    error: BaseException | None


# How the paths are enumerated. A script is a list of answers, the last of which is True. A
# run takes its answers to the truth tests from its script, in order, and answers the tests
# beyond it False. Each path is then run once: by the script that ends with the last True
# among its answers. A run discovers the paths beside its own: for each test that it came to
# beyond its script, the script that agrees up to that test and answers it True.
#
# Scripts wait in a heap, the shortest first, and of one length in the order of discovery.
# Loops need this breadth-first order. Where the test says whether to go on, the first run,
# all False, leaves the loop at once. Where it says whether to leave, the first run ends at
# the limit on branch points, and the second one, with the script [True], leaves at once.
# Either way, runs of few iterations come before those of many, and fit into the limit.


def explore(
    func: Callable[[list[Any]], Any],
    avals: Sequence[ShapedArray],
    declared: Template | None,
    label: str,
    limit: int,
    *,
    shapes_only: bool,
    findings: LoopFindings,
) -> Iterator[AbstractRun]:
    """Run a body on abstract values, taking both branches at each truth test.

    Args:
        func: the body, called with one array per aval.
        avals: what it will be called with.
        declared: what its `Tout` declares, or None if nothing is declared.
        label: what errors call the function.
        limit: the number of runs at most.
        shapes_only: whether the record may be wrong about values: a function with a custom
            derivative rule is then looked into, and may branch. Otherwise it is recorded
            as one operation, with its rule, and may not branch.
        findings: about loops. They hold for these arguments alone.

    Raises:
        LearnedMore: the exploration is to begin again, with the same `findings`.
    """
    waiting: list[tuple[int, int, list[bool]]] = [(0, 0, [])]  # length, discovery, script
    discovered = 0
    copies = NumpyCopies()
    outer = current_exploration()
    current = Exploration(shapes_only, {} if outer is None else outer.memo)
    for _ in range(limit):
        if not waiting:
            break
        _, _, script = heapq.heappop(waiting)
        run = None
        while run is None or run.trace.loops.is_to_repeat:
            loops = LoopSearch(findings, len(script), sys._getframe(), code_of(func))
            trace = AbstractTrace(label, script, shapes_only, loops, copies)
            # Set for the run alone: whoever takes the runs from here is outside of it.
            token = _current.set(current)
            try:
                run = _run(func, avals, declared, label, trace)
            finally:
                _current.reset(token)
            if loops.has_learned:
                raise LearnedMore
        yield run
        answers = [point.answer for point in run.trace.branch_points]
        for i in range(len(script), len(answers)):
            discovered += 1
            heapq.heappush(waiting, (i + 1, discovered, [*answers[:i], True]))


def _run(
    func: Callable[[list[Any]], Any],
    avals: Sequence[ShapedArray],
    declared: Template | None,
    label: str,
    trace: AbstractTrace,
) -> AbstractRun:
    template, results, error = None, [], None
    try:
        with mute_streams(), take_current_trace(), set_current_trace(trace):
            result = func([*map(trace.new_tracer, avals)])
            template, arrays = _template_of(result, declared, label)
            results = [*map(trace.atom, arrays)]
    except (RunConcluded, TooManyBranchPoints, Exception) as raised:  # noqa: BLE001 - the caller judges it
        error = raised
        # An array in the place of a number may be to blame.
        if isinstance(raised, TypeError | IndexError) and not isinstance(
            raised, NeedsValueError
        ):
            with contextlib.suppress(RunConcluded):
                trace.loops.keep_numbers(str(raised).split("\n", 1)[0])
    finally:
        trace.close()
    if trace.loops.back:  # however the body has taken the exception that says so
        return AbstractRun(trace, None, [], None)
    return AbstractRun(trace, template, results, error)


def _template_of(
    result: Any, declared: Template | None, label: str
) -> tuple[Template, list[Array]]:
    """Complete the template of a run by its result, and convert that to arrays."""
    template = declared or Template.undeclared(result, label)
    arrays = template.check(result, label)
    leaves = [
        Leaf(aval.shape, aval.dtype, is_weak(aval))
        if leaf.dtype is None
        else dataclasses.replace(leaf, shape=aval.shape)
        for aval, leaf in zip(map(jax.typeof, arrays), template.leaves, strict=True)
    ]
    return Template(template.tree, tuple(leaves)), arrays
