"""Staged bodies: what can be foreseen of one is compiled, as a tree of `jax.lax.cond`.

A body is run on abstract values, both ways at each truth test. The operations between two
tests are the nodes of a tree, which `emit` puts into the program. Where the tree ends
before the body does, the call of the body stands.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpyfunc._errors import InferenceError, ResultError
from jpyfunc._frames import place_of
from jpyfunc._limits import (
    MAX_BRANCH_POINTS,
    MAX_STAGED_OPERATIONS,
)
from jpyfunc._mesh import vary_alike
from jpyfunc._staging.abstract import (
    AbstractTrace,
    BranchPoint,
    Constant,
    Equation,
    NeedsValueError,
    TooManyBranchPoints,
    ValueRef,
    is_alike,
)
from jpyfunc._staging.inference import AbstractRun, explore, join, no_result, template_of
from jpyfunc._tout import Leaf, Template


@dataclasses.dataclass(frozen=True, slots=True)
class Returns:
    """The end of a run: the results, as `ValueRef`s and arrays."""

    results: list[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Calls:
    """The end of what can be foreseen, and why."""

    reasons: tuple[str, ...]


@dataclasses.dataclass(slots=True)
class BranchNode:
    """What is done between two truth tests, and what follows.

    Attributes:
        steps: the operations, or None as long as no run came here.
        decision: the truth test after them, or None at the end.
        sides: what follows, by its answer.
        end: instead of these.
    """

    steps: list[Equation] | None = None
    decision: Any = None  # a Decision
    sides: dict[bool, BranchNode] = dataclasses.field(default_factory=dict)
    end: Any = None  # a Returns or Calls

    @property
    def size(self) -> int:
        """How many operations of JAX it has."""
        return sum(step.size for step in self.steps or ())

    def nodes(self) -> Iterator[BranchNode]:
        """It and all that follow."""
        yield self
        for side in self.sides.values():
            yield from side.nodes()

    @property
    def calls(self) -> bool:
        """Whether the body is called after it, on some side."""
        return any(isinstance(node.end, Calls) for node in self.nodes())


@dataclasses.dataclass(frozen=True, slots=True)
class BranchTree:
    """What is foreseen of a body.

    Attributes:
        root: where it begins.
        template: what it returns, complete, or None if that could not be told.
        failure: why not.
        runs: how many runs on abstract values it took.
    """

    root: BranchNode
    template: Any  # a Template
    failure: InferenceError | ResultError | None
    runs: int

    @property
    def size(self) -> int:
        """How many operations of JAX it has."""
        return sum(node.size for node in self.root.nodes())


def stage(
    func: Callable[[list[Any]], Any],
    avals: Sequence[Any],
    template: Template | None,
    name: str,
    limit: int,
) -> BranchTree:
    """Foresee what a body does.

    Args:
        func: the body, called with one array per aval.
        avals: what it will be called with.
        template: what is declared, or None if nothing is.
        name: the name of the function, for errors.
        limit: how many runs on abstract values there may be.
    """
    declared = template if template is not None and template.complete else None
    root, found, runs = BranchNode(), None, 0
    error: BaseException | None = None
    last = ""
    failure: InferenceError | ResultError | None = None

    def returned(trace: AbstractTrace) -> tuple[Template, list[Any]]:
        results = func([*map(trace.new, avals)])
        found, arrays = template_of(results, template, name)
        return found, [*map(trace.ref, arrays)]

    for run in explore(returned, name, limit, keeps_rules=True):
        runs += 1
        reason, seen = _reason(run), found
        if run.error is None:
            try:
                seen = run.result[0]
                seen = join(found, seen, run.trace.branch, name) if found else seen
            except InferenceError as disagreement:
                failure = failure or disagreement
        elif isinstance(run.error, ResultError | InferenceError) and declared is None:
            failure = failure or run.error
        error = error or run.error
        if isinstance(run.error, TooManyBranchPoints):
            last = run.trace.decisions[-1].place
        found = seen
        trace = run.trace
        if reason:
            _grow(root, trace.decisions, trace.steps, Calls((reason,)))
        else:
            _grow(root, trace.decisions, trace.steps, Returns(run.result[1]))
    _close(root, f"it takes more than {limit} runs on abstract values to come here")
    if found is None and declared is None and failure is None:
        raised = error if isinstance(error, Exception) else None
        failure = no_result(raised, template, name, last)
        failure.__cause__ = raised
    return BranchTree(root, declared or found, failure, runs)


def _reason(run: AbstractRun) -> str:
    """Why what was noted of a run cannot be compiled, or ""."""
    if isinstance(run.error, TooManyBranchPoints):
        return f"it makes more than {MAX_BRANCH_POINTS} decisions"
    if run.error is None or isinstance(run.error, NeedsValueError):
        return run.trace.refusal  # of what the body may have caught
    text = str(run.error).split("\n", 1)[0]
    return f"{type(run.error).__name__}: {text}{place_of(run.error)}"


def _grow(
    root: BranchNode,
    decisions: Sequence[BranchPoint],
    steps: list[Equation],
    end: Returns | Calls,
) -> None:
    """Add a run to a tree.

    What comes before the first truth test that it answers in another way was met by an
    earlier run, and has to be what this one did there: the numbers of its values are those
    of the other, and a body whose operations are others each time is none to compile.
    """
    node = root
    for decision in decisions:
        if node.steps is None:
            node.steps, node.decision = decision.steps, decision
        elif (
            node.decision is None
            or node.decision.test != decision.test
            or not is_alike(node.steps, decision.steps)
        ):
            node.decision, node.end = None, _OTHER
            node.sides.clear()
            return
        node = node.sides.setdefault(decision.answer, BranchNode())
    if node.steps is None:
        node.steps, node.end = steps, end
    else:
        node.decision, node.end = None, _OTHER
        node.sides.clear()


_OTHER = Calls(("it does something else when it is run again",))


def _close(node: BranchNode, budget: str) -> None:
    """Let calls stand where no run came, and one where both sides only call."""
    if node.steps is None:
        node.steps, node.end = [], Calls((budget,))
    if node.decision is None:
        if isinstance(node.end, Calls):
            node.steps = []
        return
    for answer in (False, True):
        _close(node.sides.setdefault(answer, BranchNode()), budget)
    ends = [node.sides[answer].end for answer in (True, False)]
    if all(isinstance(end, Calls) for end in ends):
        reasons = dict.fromkeys(reason for end in ends for reason in end.reasons)
        node.steps, node.decision, node.sides = [], None, {}
        node.end = Calls(tuple(reasons))


def warn_if_large(tree: BranchTree, name: str) -> None:
    """Warn of a tree that will take long to compile."""
    if tree.size > MAX_STAGED_OPERATIONS:
        warnings.warn(
            f"{name} is staged to {tree.size:,} operations, which may take long to "
            f"compile. Foresee less of it, with staged={max(1, tree.runs // 4)}, say; "
            "jpyfunc.explain shows where they are.",
            stacklevel=2,
        )


def emit(
    tree: BranchTree, operands: Sequence[Any], call: Callable[[Any], list[Any]]
) -> list[Any]:
    """Put a tree into the program that is being traced.

    Args:
        tree: whose `template` is known.
        operands: what the body is called with.
        call: the results of calling the body. It gets a boolean, which under `jax.vmap`
            says for which elements that is needed, or None if it is for all.

    Returns:
        The results, flat, as the template says.
    """
    known = dict(enumerate(operands))
    is_varying = any(jax.typeof(x).manual_axis_type.varying for x in operands)
    emission = _Emission(tree.template.leaves, operands, call, is_varying)
    return emission.node(tree.root, known, {}, None)


@dataclasses.dataclass(frozen=True, slots=True)
class _Emission:
    """What all nodes of a tree are put into a program with.

    Attributes:
        leaves: what is declared of the results.
        operands: what the body is called with.
        call: the results of calling the body.
        is_varying: whether the operands vary over manual axes. What a branch uses becomes
            an operand of `lax.cond`, which `vmap` makes vary over the axes that the test
            varies over, while the branch was traced with one that does not. So each
            branch then has constants of its own, those of functions, which stay in them.
    """

    leaves: Sequence[Leaf]
    operands: Sequence[Any]
    call: Callable[[Any], list[Any]]
    is_varying: bool

    def node(
        self,
        node: BranchNode,
        known: dict[int, Any],
        constants: dict[Equation, Any],
        needed: Any,
    ) -> list[Any]:
        """The results from a node on.

        Args:
            node: of the tree.
            known: operands and results so far, by number.
            constants: results of operations on constants so far.
            needed: whether the program comes here.
        """

        def value(x: Any) -> Any:
            if isinstance(x, Constant):
                if x.step not in constants:
                    constants[x.step] = x.step.call(*map(value, x.step.operands))
                return constants[x.step][x.index]
            if isinstance(x, ValueRef):
                return known[x.number]
            is_array = isinstance(x, np.ndarray | jax.Array)
            return jax.jit(lambda: x)() if is_array and self.is_varying else x

        for step in node.steps or ():
            results = step.call(*map(value, step.operands))
            known.update(enumerate(results, step.first))
        if isinstance(node.end, Calls):
            return vary_alike(self.call(needed), self.operands)
        if isinstance(node.end, Returns):
            results = map(_as_declared, map(value, node.end.results), self.leaves)
            return vary_alike([*results], self.operands)
        test = jnp.reshape(value(node.decision.test), ())
        test = test if test.dtype == jnp.bool_ else test != 0

        def side(answer: bool) -> Callable[[], list[Any]]:
            def follow() -> list[Any]:
                after = node.sides[answer]
                here = needed
                if after.calls:
                    here = test if answer else jnp.logical_not(test)
                    here = here if needed is None else jnp.logical_and(needed, here)
                shared = {} if self.is_varying else dict(constants)
                return self.node(after, dict(known), shared, here)

            return follow

        return jax.lax.cond(test, side(True), side(False))


def _as_declared(x: Any, leaf: Leaf) -> Any:
    x = jnp.asarray(x)
    if leaf.is_key or (x.dtype == leaf.dtype and x.weak_type == leaf.weak_type):
        return x
    return jax.lax.convert_element_type_p.bind(
        x, new_dtype=leaf.dtype, weak_type=leaf.weak_type, sharding=None
    )
