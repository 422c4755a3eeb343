"""Put a staged body into the program that is being traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jpyfunc._mesh import vary_alike
from jpyfunc._staging.branch_tree import BranchNode, BranchTree, Fallback, Return
from jpyfunc._staging.equations import Atom, Constant, Equation, ValueRef
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
    return emission.emit_node(tree.root, _Scope(known, {}), None)


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


# What `needed` is for. `lax.cond` computes one branch, and a call in the other is not made.
# Under `vmap`, a `cond` whose test differs between elements becomes a `select`: both
# branches are computed for all elements, and a batched call in one of them would also be
# made for the elements that take the other one. For these the body may raise, never return
# or have side effects, and it would take time. So each call gets the predicate of its path
# as an operand: the conjunction of the tests on the way from the root, negated where the
# path takes the false branch. Without a batch it is True whenever the call is made. In a
# batch, the call runs the body for those elements that need it. The predicate is computed
# only on paths that lead to a call.


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
        self, node: BranchNode, scope: _Scope, needed: jax.Array | None
    ) -> list[jax.Array]:
        """Emit a node and all that follow, and return the results of the body.

        Args:
            node: of the tree.
            scope: values so far. Those of the node are added.
            needed: whether the program comes here, or None if it always does.
        """
        for equation in node.equations:
            operands = [self._value(x, scope) for x in equation.operands]
            scope.known.update(enumerate(equation.call(*operands), equation.first))
        if isinstance(node.end, Fallback):
            return vary_alike(self.call(needed), self.operands)
        if isinstance(node.end, Return):
            values = [self._value(x, scope) for x in node.end.results]
            results = map(_to_joined_dtype, values, self.leaves)
            return vary_alike([*results], self.operands)
        test = jnp.reshape(self._value(node.end.test, scope), ())
        test = test if test.dtype == jnp.bool_ else test != 0

        def branch(answer: bool) -> Callable[[], list[jax.Array]]:
            after = node.branches[answer]

            def emit_branch() -> list[jax.Array]:
                here = needed
                if after.falls_back:
                    here = test if answer else jnp.logical_not(test)
                    here = here if needed is None else jnp.logical_and(needed, here)
                return self.emit_node(after, scope.branch(not self.is_varying), here)

            return emit_branch

        return jax.lax.cond(test, branch(True), branch(False))

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
    return jax.lax.convert_element_type_p.bind(
        x, new_dtype=leaf.dtype, weak_type=leaf.weak_type, sharding=None
    )
