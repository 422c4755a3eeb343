"""Stage a body out: record what it does on abstract values as a tree of branches.

The operations between two branch points are the nodes of the tree, which `emission` puts
into the program as nested `jax.lax.cond`s. Where the tree ends before the body does, the
program calls the body.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.core import ShapedArray

from jpyfunc._errors import InferenceError, ResultError, see
from jpyfunc._frames import place_of
from jpyfunc._limits import (
    MAX_BRANCH_POINTS,
    MAX_STAGED_OPERATIONS,
)
from jpyfunc._staging.abstract_trace import AbstractTrace, TooManyBranchPoints
from jpyfunc._staging.abstract_tracer import NeedsValueError
from jpyfunc._staging.equations import Atom, BranchPoint, Equation, is_alike
from jpyfunc._staging.exploration import AbstractRun, explore
from jpyfunc._staging.inference import JoinedPaths
from jpyfunc._tout import Template


@dataclasses.dataclass(frozen=True, slots=True)
class Return:
    """The end of a path that is compiled: the results, as they are recorded."""

    results: list[Atom]


@dataclasses.dataclass(frozen=True, slots=True)
class Fallback:
    """The end of a path that is not compiled: a call of the body, and the reasons."""

    reasons: tuple[str, ...]


_NOT_REACHED = Fallback(("no run has come here",))
_DIFFERENT_RUNS = Fallback(("it does something else when it runs again",))


@dataclasses.dataclass(slots=True)
class BranchNode:
    """The operations between two branch points, and what follows them.

    Attributes:
        equations: the operations.
        end: the branch point after them, or the end of the path.
        branches: what follows a branch point, by its answer.
    """

    equations: list[Equation] = dataclasses.field(default_factory=list)
    end: BranchPoint | Return | Fallback = _NOT_REACHED
    branches: dict[bool, BranchNode] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of JAX operations in it."""
        return sum(equation.size for equation in self.equations)

    def nodes(self) -> Iterator[BranchNode]:
        """Yield this node and all that follow it."""
        yield self
        for branch in self.branches.values():
            yield from branch.nodes()

    @property
    def falls_back(self) -> bool:
        """Whether the body is called on some path from here."""
        return any(isinstance(node.end, Fallback) for node in self.nodes())

    def add_path(self, trace: AbstractTrace, end: Return | Fallback) -> None:
        """Add a run to the tree that begins here.

        All up to the first branch point where the run took a branch of its own was met by
        earlier runs. It must be alike, or the body falls back there: see `is_alike`.
        """
        node = self
        for point in trace.branch_points:
            if node.end is _NOT_REACHED:
                node.equations, node.end = point.equations, point
            elif (
                not isinstance(node.end, BranchPoint)
                or node.end.test != point.test
                or not is_alike(node.equations, point.equations)
            ):
                node._fall_back(_DIFFERENT_RUNS)
                return
            node = node.branches.setdefault(point.answer, BranchNode())
        if node.end is _NOT_REACHED:
            node.equations, node.end = trace.equations, end
        else:  # no two scripts have the same path, so the body did not follow this one
            node._fall_back(_DIFFERENT_RUNS)

    def fill_gaps(self, reason: str) -> None:
        """Fall back where no run came, and before a branch point whose branches both do.

        A call does all that the body does, so the operations that lead to it are dropped.
        """
        if self.end is _NOT_REACHED:
            self.end = Fallback((reason,))
        if isinstance(self.end, Fallback):
            self.equations = []
        if not isinstance(self.end, BranchPoint):
            return
        for answer in (False, True):
            self.branches.setdefault(answer, BranchNode()).fill_gaps(reason)
        ends = [self.branches[answer].end for answer in (True, False)]
        fallbacks = [end for end in ends if isinstance(end, Fallback)]
        if len(fallbacks) == 2:
            reasons = dict.fromkeys(reason for end in fallbacks for reason in end.reasons)
            self._fall_back(Fallback(tuple(reasons)))

    def _fall_back(self, end: Fallback) -> None:
        self.equations, self.end, self.branches = [], end, {}


@dataclasses.dataclass(frozen=True, slots=True)
class BranchTree:
    """A body as it is staged.

    Attributes:
        root: where it begins.
        result: what it returns, complete, or the error that says why that cannot be
            inferred.
        runs: how many runs on abstract values it took.
    """

    root: BranchNode
    result: Template | InferenceError | ResultError
    runs: int

    @property
    def size(self) -> int:
        """The number of JAX operations in it."""
        return sum(node.size for node in self.root.nodes())


def stage(
    func: Callable[[list[Any]], Any],
    avals: Sequence[ShapedArray],
    declared: Template | None,
    label: str,
    limit: int,
) -> BranchTree:
    """Record what a body does, along each path.

    Args:
        func: the body, called with one array per aval.
        avals: what it will be called with.
        declared: what its `Tout` declares, or None if nothing is declared.
        label: what errors call the function.
        limit: the number of runs on abstract values at most.
    """
    root, paths, runs = BranchNode(), JoinedPaths(declared, label), 0
    for run in explore(func, avals, declared, label, limit, shapes_only=False):
        runs += 1
        paths.add(run)
        reason = _why_not_compiled(run)
        root.add_path(run.trace, Fallback((reason,)) if reason else Return(run.results))
    root.fill_gaps(f"the {limit} runs on abstract values are used up before they come here")
    if declared is not None and declared.complete:
        # A path that returns something else falls back, and the call says so, with data.
        return BranchTree(root, declared, runs)
    return BranchTree(root, paths.result(), runs)


def _why_not_compiled(run: AbstractRun) -> str:
    """Say why the record of a run cannot be compiled; "" if it can."""
    if isinstance(run.error, TooManyBranchPoints):
        return f"it passes more than {MAX_BRANCH_POINTS} branch points"
    if run.error is None or isinstance(run.error, NeedsValueError):
        return run.trace.refusal  # which the body may have caught
    text = str(run.error).split("\n", 1)[0]
    return f"{type(run.error).__name__}: {text}{place_of(run.error)}"


def warn_if_large(tree: BranchTree, label: str) -> None:
    """Warn of a tree that will take long to compile."""
    if tree.size > MAX_STAGED_OPERATIONS:
        warnings.warn(
            f"{label} is staged to {tree.size:,} operations, which may take long to "
            f"compile. Stage fewer of its paths, for example with "
            f"staged={max(1, tree.runs // 4)}; jpyfunc.explain shows where they are."
            + see("Many operations are staged"),
            stacklevel=2,
        )
