"""Roll up the iterations before a loop that do what the loop does."""

from __future__ import annotations

import dataclasses

import jax
from jax.core import ShapedArray

from jpyfunc._staging.branch_tree import Back, BranchNode, Fallback, LoopHead, Return
from jpyfunc._staging.equations import Atom, BranchPoint, Constant, ValueRef, is_one
from jpyfunc._staging.iterations import Correspondence, is_same

# A loop is often found one iteration late. `x = a`, before `while x * x > a`, makes one
# array of two variables, and in the next iteration they are two. What the body may ask of
# them, `x is a`, keeps the two visits from being one state: see `loop_search`. But it is on
# record what it did. A branch point before the loop is its head just as well, with other
# initial values, if what the program does from there is what it does from the head once
# these values are put in the place of those that are carried:
#
# - on the way out of the loop, to the end of the body;
# - in an iteration, up to where it goes back. There the branch point must come to the loop,
#   which then begins with what the iteration makes of these values. Several branches of one
#   iteration each come to a loop of their own, which is the same loop.
#
# So the initial values are found: each carried value is bound to what is in its place where
# it is first met. Nothing else is put in its place. All this is a matter of operations on
# record, and none of Python's state.


def roll_up(node: BranchNode, known: dict[int, ShapedArray]) -> BranchNode:
    """Let the loops that follow a node begin as early as they can.

    Args:
        node: of the tree.
        known: the avals of the values so far, by number.

    Returns:
        The node; or in its place the head of a loop, where the loop can begin at the node.
    """
    known = known | node.made()
    inside = known | (node.head.carried_avals() if node.head else {})
    for answer, after in node.branches.items():
        node.branches[answer] = roll_up(after, inside)
    loop = None if node.head else _loop_at(node)
    if loop is None or loop.head is None:
        return node
    beginning = _Beginning(loop, loop.head, known)
    if not beginning.is_head(node):
        return node
    loop.equations = node.equations
    loop.head = dataclasses.replace(loop.head, initial=beginning.initial_values())
    return loop


def _loop_at(node: BranchNode) -> BranchNode | None:
    """Find the first loop after a branch point whose head is at its place in the body."""
    place = _place(node)
    found = (x for x in node.nodes() if x.head is not None and _place(x) == place)
    return next(found, None)


def _place(node: BranchNode) -> tuple[str, str] | None:
    if isinstance(node.end, BranchPoint):
        return node.end.place, node.end.line
    return None


_NO_VALUE = ValueRef(-1)


class _Beginning(Correspondence):
    """A comparison of a loop with what the program does from an earlier branch point on."""

    def __init__(
        self, loop: BranchNode, head: LoopHead, known: dict[int, ShapedArray]
    ) -> None:
        """Begin.

        Args:
            loop: the node where the loop begins.
            head: of the loop.
            known: the avals of the values up to the earlier branch point, by number.
        """
        super().__init__()
        self._loop = loop
        self._head = head
        self._known = known
        self._carried = head.carried_avals()
        self._initial: dict[int, Atom] = {}  # what carried values are bound to, by number
        self._renamed: frozenset[int] = frozenset()  # numbers that inner loops carry

    def is_head(self, node: BranchNode) -> bool:
        """Tell whether the loop can begin at the earlier branch point.

        It can if the program does the same from there, and each initial value is known.
        """
        is_same = self._are_same_branches(self._loop, node, {})
        return is_same and self._initial.keys() == self._carried.keys()

    def initial_values(self) -> list[Atom]:
        """The values that the loop begins with at the earlier branch point."""
        values = [*self._head.values]
        for number, i in self._head.carried().items():
            values[i] = self._initial[number]
        return values

    def is_same_older_value(self, a: ValueRef, b: Atom) -> bool:
        if isinstance(b, ValueRef) and b.number in self._renamed:
            return False
        if a.number not in self._carried:
            return a.number in self._known and a == b
        if a.number not in self._initial:
            if self._aval_of(b) != self._carried[a.number]:
                return False
            self._initial[a.number] = b
        found = self._initial[a.number]
        return is_one(found, b) or is_same(found, b)

    def _aval_of(self, atom: Atom) -> ShapedArray | None:
        """The aval of a value, if it is known at the earlier branch point."""
        if isinstance(atom, ValueRef):
            return self._known.get(atom.number)
        return atom.aval if isinstance(atom, Constant) else jax.typeof(atom)

    def _are_same_branches(
        self, a: BranchNode, b: BranchNode, heads: dict[BranchNode, BranchNode]
    ) -> bool:
        """Tell whether the same is tested after two nodes, and the same is done then.

        Args:
            a: the node where the loop begins, or one that follows it.
            b: the counterpart.
            heads: counterparts of nodes where loops begin.
        """
        if not (
            isinstance(a.end, BranchPoint)
            and isinstance(b.end, BranchPoint)
            and self.is_same_value(a.end.test, b.end.test)
        ):
            return False
        counterparts, renamed = self.counterparts, self._renamed
        for answer in (False, True):
            self.counterparts, self._renamed = dict(counterparts), renamed
            if not self._is_same_path(a.branches[answer], b.branches[answer], heads):
                return False
        return True

    def _is_same_path(
        self, a: BranchNode, b: BranchNode, heads: dict[BranchNode, BranchNode]
    ) -> bool:
        """Tell whether two nodes do the same, and what follows them, too."""
        if not self.are_same_equations(a.equations, b.equations):
            return False
        if isinstance(a.end, Return):
            return isinstance(b.end, Return) and all(
                self.is_same_value(x, y)
                for x, y in zip(a.end.results, b.end.results, strict=True)
            )
        if isinstance(a.end, Fallback):
            return isinstance(b.end, Fallback)
        if isinstance(a.end, Back):
            if a.end.head is self._loop and self._loop not in heads:
                return self._comes_to_loop(b, a.end.following)
            if not isinstance(b.end, Back) or a.end.head.head is None:
                return False
            return b.end.head is heads.get(
                a.end.head, a.end.head
            ) and self._are_same_values(a.end.head.head, a.end.following, b.end.following)
        if a.head is None or b.head is None:
            return a.head is b.head and self._are_same_branches(a, b, heads)
        if not self._begins_with(a.head, a.head.initial, b.head):
            return False
        self._enter(a.head, b.head)
        return self._are_same_branches(a, b, heads | {a: b})

    def _comes_to_loop(self, b: BranchNode, following: list[Atom]) -> bool:
        """Tell whether the loop begins after a node, with what an iteration has made."""
        return (
            b.head is not None
            and self._begins_with(self._head, following, b.head)
            and (b is self._loop or self._is_same_loop(b, b.head))
        )

    def _is_same_loop(self, b: BranchNode, head: LoopHead) -> bool:
        """Tell whether a loop at another node is the same, whatever it begins with."""
        pair = _Beginning(self._loop, self._head, self._known)
        pair._enter(self._head, head)
        return pair._are_same_branches(self._loop, b, {self._loop: b})

    def _enter(self, a: LoopHead, b: LoopHead) -> None:
        """Pair what two loops carry, at the same positions.

        From here on, what is carried has the number of what it was at first. What had that
        number before has none: it cannot be used any more, or it would be carried, too.
        """
        carried = b.carried()
        self._renamed |= carried.keys()
        for number, x in self.counterparts.items():
            if isinstance(x, ValueRef) and x.number in carried:
                self.counterparts[number] = _NO_VALUE
        self.counterparts.update(zip(a.carried(), map(ValueRef, carried), strict=True))

    def _begins_with(self, a: LoopHead, values: list[Atom], b: LoopHead) -> bool:
        """Tell whether a loop carries what another one does, and begins with `values`."""
        is_alike = [*a.carried().values()] == [*b.carried().values()]
        return is_alike and self._are_same_values(a, values, b.initial)

    def _are_same_values(
        self, head: LoopHead, first: list[Atom], second: list[Atom]
    ) -> bool:
        """Tell whether the values of a head that its loop carries are the same."""
        positions = head.carried().values()
        return all(self.is_same_value(first[i], second[i]) for i in positions)
