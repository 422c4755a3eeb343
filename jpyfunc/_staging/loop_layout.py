"""Lay out a loop of a branch tree: what it carries, and where the program leaves it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from jax.core import ShapedArray

from jpyfunc._staging.branch_tree import Back, BranchNode, LoopHead, Return
from jpyfunc._staging.equations import Atom, BranchPoint, Equation, ValueRef


@dataclasses.dataclass(frozen=True, slots=True)
class Exit:
    """A place where the program leaves a loop.

    Attributes:
        node: what follows, none of which comes back to the head.
        kept: the avals of the values of the last iteration that it uses, by number.
    """

    node: BranchNode
    kept: dict[int, ShapedArray]


@dataclasses.dataclass(frozen=True, slots=True)
class LoopLayout:
    """The shape of a loop.

    Attributes:
        head: where it begins.
        point: the branch point there.
        carried: the positions of the head's values that it carries, by their numbers.
        initial: what these are when the program comes to the loop.
        test: operations that compute what is tested from what is carried.
        exits: where the program leaves it.
    """

    head: BranchNode
    point: BranchPoint
    carried: dict[int, int]
    initial: list[Atom]
    test: list[Equation]
    exits: list[Exit]

    @classmethod
    def of(cls, node: BranchNode, head: LoopHead, point: BranchPoint) -> LoopLayout:
        """Lay out the loop that begins at a node."""
        exits = []
        for after, made in _exits(node, set(), {}):
            used = _used_from(after)
            exits.append(Exit(after, {n: x for n, x in made.items() if n in used}))
        return cls(node, point, head.carried(), initial_values(head), head.test, exits)

    @property
    def tests_first(self) -> bool | None:
        """The answer that goes on if the other one alone leaves the loop; else None."""
        for answer, node in self.head.branches.items():
            if [x.node for x in self.exits] == [node]:
                return not answer
        return None


def _exits(
    node: BranchNode, heads: set[BranchNode], made: dict[int, ShapedArray]
) -> Iterator[tuple[BranchNode, dict[int, ShapedArray]]]:
    """Find the exits below a node of a loop, each with what was made on the way there.

    Args:
        node: the head of the loop, or a node below it.
        heads: the head, and those of inner loops on the way from it.
        made: the values that were made on the way.
    """
    if heads:
        if heads.isdisjoint(node.goals()):
            yield node, made
            return
        made = made | node.made()
        if node.head is not None:  # its loop changes what it carries
            made = node.head.carried_avals() | made
    if node.head is not None:
        heads = heads | {node}
    for after in node.branches.values():
        yield from _exits(after, heads, made)


def initial_values(head: LoopHead) -> list[Atom]:
    """The values that a loop carries, as they are when the program comes to it."""
    return [head.initial[i] for i in head.carried().values()]


def _used_from(node: BranchNode) -> set[int]:
    """The numbers of the values that a node and what follows use and do not make."""
    used = {n for after in node.branches.values() for n in _used_from(after)}
    used.update(numbers_in(ends_with(node)))
    if node.head is not None:
        _go_before(node.head.test, used)
        used.difference_update(node.head.carried())
        used.update(numbers_in(initial_values(node.head)))
    _go_before(node.equations, used)
    return used


def _go_before(equations: list[Equation], used: set[int]) -> None:
    """Replace the values used after some operations by those used before them."""
    for equation in reversed(equations):
        used.difference_update(equation.numbers)
        used.update(numbers_in(equation.operands))


def ends_with(node: BranchNode) -> list[Atom]:
    """The values that the end of a node uses."""
    atoms: list[Atom] = []
    if isinstance(node.end, BranchPoint):
        atoms.append(node.end.test)
    elif isinstance(node.end, Return):
        atoms += node.end.results
    elif isinstance(node.end, Back) and node.end.head.head is not None:
        carried = node.end.head.head.carried()
        atoms += [node.end.following[i] for i in carried.values()]
    return atoms


def numbers_in(atoms: Sequence[Atom]) -> list[int]:
    """The numbers of the values among atoms; a constant depends on none."""
    return [atom.number for atom in atoms if isinstance(atom, ValueRef)]
