"""Stage a body out: run it along each path, and make its tree."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from jax.core import ShapedArray

from jpyfunc._errors import see
from jpyfunc._frames import place_of
from jpyfunc._limits import MAX_BRANCH_POINTS, MAX_CALLS, MAX_STAGED_OPERATIONS
from jpyfunc._staging.abstract_trace import TooManyBranchPoints
from jpyfunc._staging.abstract_tracer import NeedsValueError
from jpyfunc._staging.branch_tree import BranchNode, BranchTree, Fallback, Return
from jpyfunc._staging.exploration import AbstractRun, LearnedMore, explore
from jpyfunc._staging.inference import JoinedPaths
from jpyfunc._staging.loop_findings import LoopFindings
from jpyfunc._staging.loop_tests import compute_tests
from jpyfunc._staging.rolling import roll_up
from jpyfunc._tout import Template


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
    findings = LoopFindings()
    while True:
        try:
            return _stage(func, avals, declared, label, limit, findings)
        except LearnedMore:
            continue


def _stage(
    func: Callable[[list[Any]], Any],
    avals: Sequence[ShapedArray],
    declared: Template | None,
    label: str,
    limit: int,
    findings: LoopFindings,
) -> BranchTree:
    root, paths, runs = BranchNode(), JoinedPaths(declared, label), 0
    explored = explore(
        func, avals, declared, label, limit, shapes_only=False, findings=findings
    )
    for run in explored:
        runs += 1
        paths.add(run)
        reason = _why_not_compiled(run)
        back = run.trace.loops.back
        root.add_path(
            run.trace, Fallback((reason,)) if reason else back or Return(run.results)
        )
    root.carry_changes(findings)
    root.fill_gaps(f"the {limit} runs on abstract values are used up before they come here")
    root.limit_calls(MAX_CALLS)
    root = roll_up(root, dict(enumerate(avals)))
    compute_tests(root)
    if declared is not None and declared.complete:
        # A path that returns something else falls back, and the call says so, with data.
        return BranchTree(root, declared, runs, findings.reasons)
    return BranchTree(root, paths.result(), runs, findings.reasons)


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
