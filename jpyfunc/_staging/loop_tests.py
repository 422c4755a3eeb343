"""Compute the test of a loop where it is tested, in the place of carrying it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from jpyfunc._staging.branch_tree import Back, BranchNode, LoopHead
from jpyfunc._staging.equations import Atom, BranchPoint, Equation, ValueRef, is_one
from jpyfunc._staging.iterations import is_same, is_same_operation
from jpyfunc._staging.loop_layout import LoopLayout, ends_with, initial_values, numbers_in

# A body computes a test before it asks for its truth. So a loop is found between the two:
# what is tested is computed before the loop, and again at the end of each iteration, and
# the loop carries it. XLA takes twice as long to compile that as a loop which computes the
# test itself. This is the same if the operations that lead to the test, and that nothing
# else uses, are the same before the loop and at the end of each iteration: what they take
# must be the same in all iterations, or what the loop carries.


def compute_tests(root: BranchNode) -> None:
    """Let the loops of a tree compute their tests where that is the same."""
    for node in root.nodes():
        point, head = node.end, node.head
        if head is None or not isinstance(point, BranchPoint) or 0 not in head.changed:
            continue
        if LoopLayout.of(node, head, point).tests_first is not None:
            _compute_test(node, head, point)


def _compute_test(node: BranchNode, head: LoopHead, point: BranchPoint) -> None:
    """Let the loop that begins at a node compute its test, if that is the same."""
    nodes = [x for x in node.nodes() if isinstance(x.end, Back) and x.end.head is node]
    following = [x.end.following for x in nodes if isinstance(x.end, Back)]
    uses = _uses(node)
    uses.subtract(numbers_in([point.test, head.initial[0]]))
    first = _leading_to(head.initial[0], node.equations, uses)
    later = [
        _leading_to(values[0], x.equations, _uses(x) - Counter(numbers_in(values[:1])))
        for x, values in zip(nodes, following, strict=True)
    ]
    if any(uses[n] for n in numbers_in([point.test])) or not first:
        return
    renamed = {n for x in node.nodes() if x.head for n in x.head.carried()}
    test = _of_carry(head, following, first, later, renamed)
    if test is None:
        return
    for x, equations in zip([node, *nodes], [first, *later], strict=True):
        x.equations = [y for y in x.equations if y not in equations]
    node.end = dataclasses.replace(point, test=head.initial[0])
    node.head = dataclasses.replace(head, test=test, changed=head.changed - {0})


def _uses(node: BranchNode) -> Counter[int]:
    """Count how often a node, and what follows, use each value."""
    found = Counter(numbers_in(ends_with(node)))
    test = []
    if node.head is not None:
        found.update(numbers_in(initial_values(node.head)))
        test = node.head.test
    for equation in (*node.equations, *test):
        found.update(numbers_in(equation.operands))
    for after in node.branches.values():
        found.update(_uses(after))
    return found


def _leading_to(
    result: Atom, equations: Sequence[Equation], uses: Counter[int]
) -> list[Equation]:
    """Find the operations that lead to a value, and that nothing else uses.

    Args:
        result: the value.
        equations: the operations.
        uses: how often each value is used, besides that.
    """
    wanted, found = set(numbers_in([result])), list[Equation]()
    for equation in reversed(equations):
        made = equation.numbers
        if wanted.intersection(made) and not any(uses[n] for n in made):
            found.append(equation)
            uses.subtract(numbers_in(equation.operands))
            wanted.update(numbers_in(equation.operands))
    return found[::-1]


def _of_carry(
    head: LoopHead,
    following: list[list[Atom]],
    first: list[Equation],
    later: list[list[Equation]],
    renamed: set[int],
) -> list[Equation] | None:
    """Return operations as they follow from what a loop carries.

    Args:
        head: of the loop.
        following: the values of the head in the next iteration, by the paths back to it.
        first: the operations before the loop.
        later: those at the end of an iteration, by the paths.
        renamed: the numbers of what the loop, or one inside it, carries.

    Returns:
        None if they are not the same.
    """
    places = [_places(equations) for equations in (first, *later)]
    if any(len(x) != len(first) for x in later):
        return None
    test = []
    for equations in zip(first, *later, strict=True):
        if not all(is_same_operation(equations[0], x) for x in equations):
            return None
        operands = [
            _operand(head, following, places, renamed, atoms)
            for atoms in zip(*(x.operands for x in equations), strict=True)
        ]
        if any(x is None for x in operands):
            return None
        test.append(dataclasses.replace(equations[0], operands=tuple(operands)))
    return test


def _operand(
    head: LoopHead,
    following: list[list[Atom]],
    places: list[dict[int, tuple[int, int]]],
    renamed: set[int],
    atoms: tuple[Atom, ...],
) -> Atom | None:
    """Return an operand of the test as the loop has it, or None if that is not the same.

    Args:
        head: of the loop.
        following: the values of the head in the next iteration, by the paths back to it.
        places: where the operations of the test make their values, before the loop and on
            each path.
        renamed: the numbers of what the loop, or one inside it, carries.
        atoms: the operand before the loop, and on each path.
    """
    first = atoms[0]
    if not isinstance(first, ValueRef):
        return first if all(is_same(first, x) for x in atoms) else None
    made = [
        own.get(x.number) if isinstance(x, ValueRef) else None
        for own, x in zip(places, atoms, strict=True)
    ]
    if made[0] is not None:
        return first if made.count(made[0]) == len(made) else None
    for number, i in head.carried().items():
        if all(map(is_one, [head.initial[i], *(x[i] for x in following)], atoms)):
            return ValueRef(number)
    is_old = first.number not in renamed and all(x == first for x in atoms)
    return first if is_old else None


def _places(equations: list[Equation]) -> dict[int, tuple[int, int]]:
    """The places in some operations where values are made, by number."""
    return {
        number: (k, i)
        for k, equation in enumerate(equations)
        for i, number in enumerate(equation.numbers)
    }
