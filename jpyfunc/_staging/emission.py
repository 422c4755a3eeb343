"""Put a staged body into the program that is being traced."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.typing import ArrayLike

from jpyfunc._conversion import of_type
from jpyfunc._loops.while_loop import while_loop
from jpyfunc._mesh import vary_alike
from jpyfunc._staging.branch_tree import Back, BranchNode, BranchTree, Fallback, Return
from jpyfunc._staging.equations import Atom, BranchPoint, Constant, Equation, ValueRef
from jpyfunc._staging.loop_layout import Exit, LoopLayout
from jpyfunc._tout import Leaf, Template


def emit(
    tree: BranchTree,
    template: Template,
    operands: Sequence[jax.Array],
    call: Callable[[jax.Array | None], list[jax.Array]],
) -> list[jax.Array]:
    """Trace a tree into the current program.

    Args:
        tree: the body.
        template: what it returns, complete.
        operands: what the body is called with.
        call: calls the body and returns the results. It gets a boolean that says whether
            the call is needed, or None if it is needed in any case.

    Returns:
        The results, flat, as the template says.
    """
    known = dict(enumerate(operands))
    is_varying = any(jax.typeof(x).manual_axis_type.varying for x in operands)
    emission = _Emission(template.leaves, operands, call, is_varying)
    return emission.emit_node(tree.root, _Scope(known, {}), None, None)


@dataclasses.dataclass(frozen=True, slots=True)
class _Scope:
    """Values of the program at one place in the tree.

    Attributes:
        known: operands and results so far, by number.
        constants: results of the equations of constants so far.
    """

    known: dict[int, jax.Array]
    constants: dict[Equation, Sequence[jax.Array]]

    def branch(self, shares_constants: bool) -> _Scope:
        """Make the scope of a branch, which does not see values of the other one."""
        return _Scope(dict(self.known), dict(self.constants) if shares_constants else {})


# How a loop is emitted. It carries the values of its head that change. If one branch at the
# head leaves the loop, and nothing else does, it is a plain `while_loop` with the test of
# the head, and what follows comes after it. Else its state has a number, too: 0 while it
# goes on, and that of the exit by which it was left; and the values of the last iteration
# that the code after an exit uses. Nothing that leaves the loop is computed in it: what
# follows an exit may be long, and under `vmap` it would be computed in each iteration. In
# particular, a call of the body comes after the loop, for those elements that have left it
# by this exit.


@dataclasses.dataclass(frozen=True, slots=True)
class _OpenLoop:
    """The loop that is being emitted, the innermost of several.

    Attributes:
        layout: of the loop.
        state: at the beginning of the iteration: the number of the exit, or 0, unless the
            loop tests first; what it carries; and what its exits keep.
    """

    layout: LoopLayout
    state: list[jax.Array]

    def exit_at(self, node: BranchNode) -> int | None:
        """The number of the exit at a node; None if there is none."""
        exits = enumerate(self.layout.exits, 1)
        return next((k for k, x in exits if x.node is node), None)

    def leave(self, k: int, scope: _Scope) -> list[jax.Array]:
        """The state after the iteration that leaves the loop by exit `k`."""
        after = [jnp.int32(k), *self.state[1:]]
        start = 1 + len(self.layout.carried)
        start += sum(len(x.kept) for x in self.layout.exits[: k - 1])
        for i, number in enumerate(self.layout.exits[k - 1].kept, start):
            after[i] = scope.known[number]
        return after

    def repeat(self, following: list[jax.Array]) -> list[jax.Array]:
        """The state after an iteration that another one follows.

        Args:
            following: what the next iteration begins with.
        """
        if self.layout.tests_first is not None:
            return following
        return [jnp.int32(0), *following, *self.state[1 + len(following) :]]


# What `needed` is for. `lax.cond` computes one branch, and a call in the other is not made.
# Under `vmap`, a `cond` whose test differs between elements becomes a `select`: both
# branches are computed for all elements, and a batched call in one of them would also be
# made for the elements that take the other one. For these the body may raise, never return
# or have side effects, and it would take time. So each call gets the predicate of its path
# as an operand: the conjunction of the tests on the way from the root, negated where the
# path takes the false branch. Without a batch it is True whenever the call is made. In a
# batch, the call runs the body for those elements that need it.
#
# So it is with loops, which might never end for the other elements: a loop goes on only
# where it is needed. A loop in a loop is needed by the elements that have not left the
# outer one. The predicate is computed only on paths that lead to a call or a loop.


@dataclasses.dataclass(frozen=True, slots=True)
class _Emission:
    """Emit the nodes of one tree.

    Attributes:
        leaves: what is declared of the results.
        operands: what the body is called with.
        call: calls the body.
        is_varying: whether the operands vary over manual axes, inside `jax.shard_map`.
            What a branch uses becomes an operand of `lax.cond`. `vmap` makes it vary over
            the axes that the test varies over, while the branch was traced with one that
            does not vary. So each branch then has constants of its own, as results of
            jitted functions, which stay inside it.
    """

    leaves: Sequence[Leaf]
    operands: Sequence[jax.Array]
    call: Callable[[jax.Array | None], list[jax.Array]]
    is_varying: bool

    def emit_node(
        self,
        node: BranchNode,
        scope: _Scope,
        needed: jax.Array | None,
        loop: _OpenLoop | None,
    ) -> list[jax.Array]:
        """Emit a node and all that follow.

        Args:
            node: of the tree.
            scope: values so far. Those of the node are added.
            needed: whether the program comes here, or None if it always does.
            loop: the innermost loop that the node is in, or None.

        Returns:
            The results of the body; in a loop, its state after the iteration.
        """
        number = loop.exit_at(node) if loop else None
        if loop and number is not None:
            return vary_alike(loop.leave(number, scope), self.operands)
        self._compute(node.equations, scope)
        if isinstance(node.end, Fallback):
            return vary_alike(self.call(needed), self.operands)
        if isinstance(node.end, Return):
            values = [self._value(x, scope) for x in node.end.results]
            results = map(_to_joined_dtype, values, self.leaves)
            return vary_alike([*results], self.operands)
        if isinstance(node.end, Back):
            head: Any = loop  # a path back to a head is in the loop of that
            positions = head.layout.carried.values()
            following = [self._value(node.end.following[i], scope) for i in positions]
            after = head.repeat([*map(jnp.asarray, following)])
            return vary_alike(after, self.operands)
        if node.head is not None:
            layout = LoopLayout.of(node, node.head, node.end)
            return self._emit_loop(layout, scope, needed, loop)
        return self._emit_branches(node, node.end, scope, needed, loop)

    def _emit_branches(
        self,
        node: BranchNode,
        point: BranchPoint,
        scope: _Scope,
        needed: jax.Array | None,
        loop: _OpenLoop | None,
    ) -> list[jax.Array]:
        """Emit what follows a branch point."""
        test = _truth(self._value(point.test, scope))

        def branch(answer: bool) -> Callable[[], list[jax.Array]]:
            after = node.branches[answer]

            def emit_branch() -> list[jax.Array]:
                here = needed
                if after.falls_back or after.has_loop:
                    here = test if answer else ~test
                    here = here if needed is None else needed & here
                inner = scope.branch(not self.is_varying)
                return self.emit_node(after, inner, here, loop)

            return emit_branch

        return jax.lax.cond(test, branch(True), branch(False))

    def _emit_loop(
        self,
        layout: LoopLayout,
        scope: _Scope,
        needed: jax.Array | None,
        outer: _OpenLoop | None,
    ) -> list[jax.Array]:
        """Emit a loop and all that follows it."""
        head, point = layout.head, layout.point
        first = [jnp.asarray(self._value(x, scope)) for x in layout.initial]
        first = vary_alike(first, self.operands)
        answer = layout.tests_first
        inner_scope = scope.branch(not self.is_varying)

        def scope_of(carry: list[jax.Array]) -> _Scope:
            here = inner_scope.branch(True)
            here.known.update(zip(layout.carried, carry, strict=False))
            return here

        consts = [] if needed is None else vary_alike([needed], self.operands)
        has_inner_loop = any(node.has_loop for node in head.branches.values())

        def goes_on(consts: list[jax.Array], state: list[jax.Array]) -> jax.Array:
            if answer is None:
                test = state[0] == 0
            else:
                here = scope_of(state)
                self._compute(layout.test, here)
                test = _truth(self._value(point.test, here))
                test = test if answer else ~test
            return test & consts[0] if consts else test

        def step(consts: list[jax.Array], state: list[jax.Array]) -> list[jax.Array]:
            loop = _OpenLoop(layout, state)
            here = goes_on(consts, state) if has_inner_loop else None
            if answer is None:
                return self._emit_branches(head, point, scope_of(state[1:]), here, loop)
            return self.emit_node(head.branches[answer], scope_of(state), here, loop)

        if answer is not None:
            final = while_loop(goes_on, step, consts, first)
            scope.known.update(zip(layout.carried, final, strict=True))
            return self.emit_node(head.branches[not answer], scope, needed, outer)

        kept = [_blank(aval) for place in layout.exits for aval in place.kept.values()]
        state = vary_alike([jnp.int32(0), *first, *kept], self.operands)
        tag, *final = while_loop(goes_on, step, consts, state)
        scope.known.update(zip(layout.carried, final, strict=False))
        return self._emit_exits(
            layout.exits, tag, final[len(first) :], scope, needed, outer
        )

    def _emit_exits(
        self,
        exits: list[Exit],
        tag: jax.Array,
        kept: list[jax.Array],
        scope: _Scope,
        needed: jax.Array | None,
        outer: _OpenLoop | None,
    ) -> list[jax.Array]:
        """Emit what follows a loop, for each of its exits."""
        rest = iter(kept)
        own = [{number: next(rest) for number in place.kept} for place in exits]

        def follow(k: int) -> list[jax.Array]:
            here = scope.branch(not self.is_varying)
            here.known.update(own[k])
            is_here = needed
            node = exits[k].node
            if len(exits) > 1 and (node.falls_back or node.has_loop):
                is_here = tag == k + 1
                is_here = is_here if needed is None else needed & is_here
            return self.emit_node(node, here, is_here, outer)

        if len(exits) == 1:
            return follow(0)
        branches = [functools.partial(follow, k) for k in range(len(exits))]
        return jax.lax.switch(tag - 1, branches)

    def _compute(self, equations: list[Equation], scope: _Scope) -> None:
        """Add the results of operations to a scope."""
        for equation in equations:
            operands = [self._value(x, scope) for x in equation.operands]
            scope.known.update(enumerate(equation.call(*operands), equation.first))

    def _value(self, atom: Atom, scope: _Scope) -> Any:
        """Return the value of an atom in the program."""
        if isinstance(atom, ValueRef):
            return scope.known[atom.number]
        if isinstance(atom, Constant):
            equation, computed = atom.equation, scope.constants
            if equation not in computed:
                operands = [self._value(x, scope) for x in equation.operands]
                computed[equation] = equation.call(*operands)
            return computed[equation][atom.index]
        is_array = isinstance(atom, np.ndarray | jax.Array)
        return jax.jit(lambda: atom)() if is_array and self.is_varying else atom


def _to_joined_dtype(x: ArrayLike, leaf: Leaf) -> jax.Array:
    """Convert a result to the dtype that holds on all paths."""
    x = jnp.asarray(x)
    if leaf.is_key or (x.dtype == leaf.dtype and x.weak_type == leaf.weak_type):
        return x
    return of_type(x, leaf.dtype, leaf.weak_type)


def _truth(x: ArrayLike) -> jax.Array:
    """The truth value of an array of one element."""
    x = jnp.asarray(x)
    x = jnp.reshape(x, ()) if x.shape else x
    return x if x.dtype == jnp.bool_ else x != 0


def _blank(aval: ShapedArray) -> jax.Array:
    """Make an array for what a loop may keep."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, aval)
        return jax.random.wrap_key_data(jnp.zeros(data.shape, data.dtype), dtype=aval.dtype)
    return jnp.zeros(aval.shape, aval.dtype)
