"""The tree of branches of a body that is staged out.

The operations between two branch points are the nodes of the tree, which `emission` puts
into the program as nested `jax.lax.cond`s. Where the tree ends before the body does, the
program calls the body.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from jax.core import ShapedArray

from jpyfunc._errors import InferenceError, ResultError
from jpyfunc._staging.abstract_trace import AbstractTrace
from jpyfunc._staging.equations import (
    Atom,
    BranchPoint,
    Equation,
    ValueRef,
    is_alike,
    is_one,
)
from jpyfunc._staging.exploration import LearnedMore
from jpyfunc._staging.loop_findings import LoopFindings
from jpyfunc._staging.loop_search import BackEdge
from jpyfunc._tout import Template


@dataclasses.dataclass(frozen=True, slots=True)
class Return:
    """The end of a path that is compiled: the results, as they are recorded."""

    results: list[Atom]


@dataclasses.dataclass(frozen=True, slots=True)
class Fallback:
    """The end of a path that is not compiled: a call of the body, and the reasons."""

    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Back:
    """The end of a path that comes back to the head of a loop.

    Attributes:
        head: a node further up, whose branch point the path comes back to.
        following: what the values of the head are in the next iteration.
    """

    head: BranchNode
    following: list[Atom]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LoopHead:
    """The loop that begins at a branch point.

    Attributes:
        names: how to write the arrays that Python's state leads to at the branch point,
            the test first.
        avals: theirs.
        values: how the loop names them, and what follows it, if it carries them; else what
            they are.
        initial: what they are when the program comes to the loop. These are the `values`,
            unless the loop begins earlier than it was found: see `rolling`.
        unready: the positions of those that it cannot carry as they are.
        answers: those of the branch points up to the loop.
        changed: positions of those that are not the same in each iteration.
        test: operations that compute what is tested from what is carried; none if that is
            carried, too.
    """

    names: list[str]
    avals: list[ShapedArray]
    values: list[Atom]
    initial: list[Atom]
    unready: set[int]
    answers: tuple[bool, ...]
    changed: set[int]
    test: list[Equation] = dataclasses.field(default_factory=list)

    def carried(self) -> dict[int, int]:
        """The positions of the values that the loop carries, by their numbers."""
        numbers: dict[int, int] = {}
        for i in sorted(self.changed):
            value = self.values[i]
            if isinstance(value, ValueRef):  # what changes has no other value
                numbers.setdefault(value.number, i)
        return numbers

    def carried_avals(self) -> dict[int, ShapedArray]:
        """The avals of the values that the loop carries, by their numbers."""
        return {number: self.avals[i] for number, i in self.carried().items()}

    def carry(self, numbers: Collection[int]) -> bool:
        """Carry the values of these numbers, too, and return whether that is new."""
        before = len(self.changed)
        self.changed.update(
            i
            for i, x in enumerate(self.values)
            if isinstance(x, ValueRef) and x.number in numbers
        )
        return len(self.changed) > before


_NOT_REACHED = Fallback(("no run has come here",))
_NOT_CARRIED = Fallback(("a loop changes an array whose value the body may use",))
_DIFFERENT_RUNS = Fallback(("it does something else when it runs again",))


@dataclasses.dataclass(slots=True, eq=False)
class BranchNode:
    """The operations between two branch points, and what follows them.

    Attributes:
        equations: the operations.
        end: the branch point after them, or the end of the path.
        branches: what follows a branch point, by its answer.
        head: what makes the branch point the head of a loop, or None.
    """

    equations: list[Equation] = dataclasses.field(default_factory=list)
    end: BranchPoint | Return | Fallback | Back = _NOT_REACHED
    branches: dict[bool, BranchNode] = dataclasses.field(default_factory=dict)
    head: LoopHead | None = None

    @property
    def size(self) -> int:
        """The number of JAX operations in it."""
        test = self.head.test if self.head else []
        return sum(equation.size for equation in (*self.equations, *test))

    def made(self) -> dict[int, ShapedArray]:
        """The avals of the values that it makes, by their numbers."""
        return {
            number: aval
            for equation in self.equations
            for number, aval in zip(equation.numbers, equation.avals, strict=True)
        }

    def nodes(self) -> Iterator[BranchNode]:
        """Yield this node and all that follow it."""
        yield self
        for branch in self.branches.values():
            yield from branch.nodes()

    @property
    def falls_back(self) -> bool:
        """Whether the body is called on some path from here."""
        return any(isinstance(node.end, Fallback) for node in self.nodes())

    @property
    def has_loop(self) -> bool:
        """Whether a loop begins on some path from here."""
        return any(node.head is not None for node in self.nodes())

    def add_path(self, trace: AbstractTrace, end: Return | Fallback | BackEdge) -> None:
        """Add a run to the tree that begins here.

        All up to the first branch point where the run took a branch of its own was met by
        earlier runs. It must be alike, or the body falls back there: see `is_alike`.
        """
        node: BranchNode = self
        passed: list[BranchNode] = [node]
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
            passed.append(node)
        if node.end is _NOT_REACHED:
            if isinstance(end, BackEdge):
                answers = tuple(point.answer for point in trace.branch_points[: end.head])
                node.equations = end.equations
                node.end = passed[end.head]._go_back(end, answers)
            else:
                node.equations, node.end = trace.equations, end
        else:  # no two scripts have the same path, so the body did not follow this one
            node._fall_back(_DIFFERENT_RUNS)

    def fill_gaps(self, reason: str) -> None:
        """Fall back where no run came, and before a branch point after which all paths do.

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
        if not self.goals():
            ends = [node.end for node in self.nodes()]
            found = [end for end in ends if isinstance(end, Fallback)]
            reasons = dict.fromkeys(reason for end in found for reason in end.reasons)
            self._fall_back(Fallback(tuple(reasons) or ("it never returns",)))
        elif self.head and not any(self in x.goals() for x in self.branches.values()):
            self.head = None

    def limit_calls(self, limit: int) -> None:
        """Call the body earlier, on those paths that call it, if there are too many calls.

        Args:
            limit: of places where the body is called. Those that come latest go first.
        """
        reason = f"it would call Python in more than {limit} places from here on"
        depth = self._depth()
        while sum(isinstance(node.end, Fallback) for node in self.nodes()) > limit:
            depth -= 1
            self._call_at(depth, Fallback((reason,)))
            self.fill_gaps(reason)

    def _depth(self) -> int:
        """The number of branch points on the longest path."""
        return max((1 + node._depth() for node in self.branches.values()), default=0)

    def _call_at(self, depth: int, end: Fallback) -> None:
        """Fall back after `depth` branch points, on paths that fall back later."""
        if depth == 0 and self.falls_back and not isinstance(self.end, Fallback):
            self._fall_back(end)
        for node in self.branches.values():
            node._call_at(depth - 1, end)

    def carry_changes(self, findings: LoopFindings) -> None:
        """Let loops carry what only loops inside them change.

        A path back to the head of a loop leaves each loop inside at its head, where what
        that carries is named as it was before it.

        Raises:
            LearnedMore: a loop carries what it cannot carry as it is.
        """
        heads = [(node, node.head) for node in self.nodes() if node.head is not None]
        inside = [
            (outer, inner)
            for node, outer in heads
            for after, inner in heads
            if node is not after and node in after.goals()
        ]
        grows = True
        while grows:
            grows = any([outer.carry(inner.carried()) for outer, inner in inside])
        for node, head in heads:
            unready = head.unready & head.changed
            if unready and findings.release(head.values, head.answers, unready):
                raise LearnedMore
            if unready:
                node._fall_back(_NOT_CARRIED)

    def goals(self) -> set[BranchNode | None]:
        """Find where compiled paths lead: to heads further up, and None for a result."""
        if isinstance(self.end, Back):
            return {self.end.head}
        if isinstance(self.end, Return):
            return {None}
        return set().union(*(node.goals() for node in self.branches.values())) - {self}

    def _go_back(self, edge: BackEdge, answers: tuple[bool, ...]) -> Fallback | Back:
        """Make this node the head of a loop, and return the end of a path back to it."""
        if self.head is None:
            self.head = LoopHead(
                edge.names,
                edge.avals,
                edge.first,
                edge.first,
                edge.unready,
                answers,
                set(),
            )
        if self.head.names != edge.names or not is_alike(self.head.values, edge.first):
            return _DIFFERENT_RUNS
        values = enumerate(zip(edge.first, edge.following, strict=True))
        self.head.changed.update(i for i, (a, b) in values if not is_one(a, b))
        return Back(self, edge.following)

    def _fall_back(self, end: Fallback) -> None:
        self.equations, self.end, self.branches, self.head = [], end, {}, None


@dataclasses.dataclass(frozen=True, slots=True)
class BranchTree:
    """A body as it is staged.

    Attributes:
        root: where it begins.
        result: what it returns, complete, or the error that says why that cannot be
            inferred.
        runs: how many runs on abstract values it took.
        no_heads: why a truth test that is repeated is not the head of a loop, by its
            place and line.
    """

    root: BranchNode
    result: Template | InferenceError | ResultError
    runs: int
    no_heads: dict[tuple[str, str], str]

    @property
    def size(self) -> int:
        """The number of JAX operations in it."""
        return sum(node.size for node in self.root.nodes())

    @property
    def unrolled(self) -> dict[tuple[str, str], str]:
        """Why loops are none that are not compiled to their end, by place and line."""
        if not self.root.falls_back and isinstance(self.result, Template):
            return {}
        heads = {
            (node.end.place, node.end.line)
            for node in self.root.nodes()
            if node.head is not None and isinstance(node.end, BranchPoint)
        }
        return {key: why for key, why in self.no_heads.items() if key not in heads}
