"""Infer what a body returns, from its paths on abstract values."""

from __future__ import annotations

import dataclasses
import dis
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray

from jpyfunc._conversion import is_same_kind, kind_of
from jpyfunc._errors import InferenceError, ResultError, inner_jit_remedy, see
from jpyfunc._frames import place_of, user_frame
from jpyfunc._limits import (
    MAX_ABSTRACT_RUNS,
    MAX_BRANCH_POINTS,
)
from jpyfunc._staging.abstract_trace import TooManyBranchPoints
from jpyfunc._staging.abstract_tracer import NeedsValueError
from jpyfunc._staging.carried_numbers import CarriedNumbers
from jpyfunc._staging.exploration import AbstractRun, explore
from jpyfunc._staging.loop_findings import LoopFindings
from jpyfunc._tout import Leaf, Template

# What a body raises where it needs a value.
NEEDS_VALUE = (NeedsValueError, jax.errors.JAXTypeError, jax.errors.JAXIndexError)
# What JAX says where that value is a shape.
_OF_SHAPES = re.compile("boolean indices|size.? argument|[Ss]hapes must be 1D|arange")


def infer(
    func: Callable[[list[Any]], Any],
    avals: Sequence[ShapedArray],
    declared: Template | None,
    label: str,
) -> Template:
    """Complete a template by running a body on abstract values.

    The body sees arrays that have a shape and a dtype and no data. Each truth test of one
    is a branch point. Runs follow the paths through these, up to `MAX_ABSTRACT_RUNS` paths
    of `MAX_BRANCH_POINTS` branch points.

    Args:
        func: the body, called with one array per aval.
        avals: what the body will be called with.
        declared: what its `Tout` declares, or None if nothing is declared.
        label: what errors call the function.

    Returns:
        A complete template.

    Raises:
        InferenceError: the body needs a value, or its branches disagree.
        ResultError: a branch returns what the template does not allow.
    """
    paths = JoinedPaths(declared, label)
    # A loop that carries known arrays or numbers is run as often as they say.
    numbers = CarriedNumbers(may_replace=False)
    findings = LoopFindings(may_unfold=False, numbers=numbers)
    runs = explore(
        func,
        avals,
        declared,
        label,
        MAX_ABSTRACT_RUNS,
        shapes_only=True,
        findings=findings,
    )
    for run in runs:
        paths.add(run)
        # This path may return something else than all others, which nothing would tell
        # before the program runs.
        if isinstance(run.error, NEEDS_VALUE):
            raise no_result(run.error, declared, label)
        if paths.failure:
            break
    result = paths.result()
    if not isinstance(result, Template):
        raise result
    return result


class JoinedPaths:
    """The template that holds on every path of a body, joined run by run.

    A path that raises returns nothing, and has no part in it.

    Attributes:
        failure: the first reason why no template holds on all paths, or None.
    """

    def __init__(self, declared: Template | None, label: str) -> None:
        self.failure: InferenceError | ResultError | None = None
        self._declared = declared
        self._label = label
        self._template: Template | None = None
        self._raised: Exception | None = None
        self._last_branch_point = ""

    def add(self, run: AbstractRun) -> None:
        """Take a run into account."""
        error, seen = run.error, run.template
        if isinstance(error, TooManyBranchPoints):
            self._last_branch_point = run.trace.branch_points[-1].place
        elif isinstance(error, InferenceError | ResultError):
            self.failure = self.failure or error
        elif isinstance(error, Exception):
            self._raised = self._raised or error
        elif self._template is None:
            self._template = seen
        elif seen is not None and self.failure is None:
            try:
                self._template = join(self._template, seen, run.trace.branch, self._label)
            except InferenceError as disagreement:
                self.failure = disagreement

    def result(self) -> Template | InferenceError | ResultError:
        """Return the template that holds on all paths, or the error that says why not."""
        return (
            self.failure
            or self._template
            or no_result(self._raised, self._declared, self._label, self._last_branch_point)
        )


def no_result(
    error: Exception | None, declared: Template | None, label: str, last: str = ""
) -> InferenceError:
    """Make the error of a body whose results cannot be inferred.

    Args:
        error: what it raised, or None if it came to too many branch points.
        declared: what its `Tout` declares, or None.
        label: what errors call the function.
        last: the place of the last of its branch points.
    """
    failure = InferenceError(_why_no_result(error, declared, label, last))
    # One of our own says nothing that the text does not.
    failure.__cause__ = None if isinstance(error, NeedsValueError) else error
    return failure


def _why_no_result(
    error: Exception | None, declared: Template | None, label: str, last: str
) -> str:
    start = f"{label}: the shapes of its results cannot be inferred, because the body"
    if error is None:
        return (
            f"{start} passes more than {MAX_BRANCH_POINTS} branch points before it "
            f"returns, the last{last}. A loop in jax.lax.while_loop has none. Or say what "
            f"it returns, and it will not be run to find out: {_declaration(declared)}."
            + see("Too many branches")
        )
    place, what = place_of(error), str(error).split("\n", 1)[0].rstrip(".")
    declare = (
        "say what the body returns, and it will not be run to find out: "
        f"{_declaration(declared, error)}."
    )
    if isinstance(error, TypeError | IndexError) and _OF_SHAPES.search(str(error)):
        return (
            f"{start} makes an array whose shape depends on data{place}: {what}. What a "
            "compiled program gets back has a fixed shape. If the array is returned, pad "
            "it (jnp.nonzero(x, size=8)) or mask it (jnp.where(mask, x, 0)). If it is not, "
            f"{declare}" + see("A shape that depends on data")
        )
    if isinstance(error, NEEDS_VALUE):
        remedy = inner_jit_remedy(error) or (
            declare.replace("say", "Say", 1) + see("A concrete value is needed")
        )
        return f"{start} needs a concrete value{place}: {what}. {remedy}"
    return (
        f"{label}: {type(error).__name__}{place}: {error}\nThe body raised this on values "
        "without data, from which the shapes of its results are inferred. If it also fails "
        f"on real data, fix the function. If not, {declare}"
        + see("The body raises an exception on abstract values")
    )


def _declaration(declared: Template | None, error: Exception | None = None) -> str:
    """Say what to write as `Tout`."""
    if declared is None and error is not None and _returns_nothing(error):
        return "Tout=[], which means nothing"
    tout: Any = "jax.ShapeDtypeStruct((), jnp.float32)"
    if declared is not None:
        tout = declared.replace_shapes([leaf.shape or () for leaf in declared.leaves])
    return f"Tout={tout}, for a scalar; else its shape comes in place of ()"


def _returns_nothing(error: Exception) -> bool:
    """Tell whether the user's function that raised has no other result than None."""
    frame = user_frame(frame for frame, _ in traceback.walk_tb(error.__traceback__))
    if frame is None:
        return False
    previous: Any = None
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.opname == "RETURN_VALUE" and previous is not None:
            if previous.opname != "LOAD_CONST" or previous.argval is not None:
                return False
        elif instruction.opname == "RETURN_CONST" and instruction.argval is not None:
            return False
        previous = instruction
    return True


def join(first: Template, second: Template, branch: str, label: str) -> Template:
    """Join the templates of two branches, of which `second` is the true one.

    Raises:
        InferenceError: there is none.
    """
    if first.tree != second.tree:
        raise InferenceError(
            f"{label}: the paths through {branch} disagree: if true, it returns {second}, "
            f"else {first}. Return the same structure on every path."
            + see("Paths that disagree")
        )
    leaves = []
    for i, (a, b) in enumerate(zip(first.leaves, second.leaves, strict=True)):
        if a.shape != b.shape or not _may_join(a, b):
            remedy = "Return the same on every path"
            if a.shape == b.shape and not (a.is_key or b.is_key):
                both = Leaf(a.shape, jnp.promote_types(a.dtype, b.dtype))
                declared = [*first.leaves[:i], both, *first.leaves[i + 1 :]]
                meant = dataclasses.replace(first, leaves=tuple(declared))
                remedy += f", or declare what it becomes on all of them: Tout={meant}"
            raise InferenceError(
                f"{label}: the paths through {branch} disagree on {first.path(i)}: if "
                f"true, it is {b}, else {a}. {remedy}." + see("Paths that disagree")
            )
        dtype = a.dtype
        if a.dtype != b.dtype:
            dtype = jnp.result_type(_promotable(a), _promotable(b))
        leaves.append(Leaf(a.shape, dtype, a.weak_type and b.weak_type))
    return Template(first.tree, tuple(leaves))


def _may_join(a: Leaf, b: Leaf) -> bool:
    """Tell whether the dtypes are equal, or a Python number takes the dtype of an array."""
    if a.dtype == b.dtype or (a.weak_type and b.weak_type):
        return True
    if not (a.weak_type or b.weak_type):
        return False
    weak, strong = (a, b) if a.weak_type else (b, a)
    # A number of a wider kind, such as 1.5 and an int32, would change the dtype of the
    # array, and an eager call that takes its branch would return another dtype.
    kinds = kind_of(weak.dtype) or "", kind_of(strong.dtype) or ""
    return kinds == ("i", "u") or is_same_kind(*kinds)


def _promotable(leaf: Leaf) -> Any:
    """Return the dtype, or the Python type that stands for it where it is weak."""
    python_types = {"b": bool, "u": int, "i": int, "f": float, "c": complex}
    return python_types[kind_of(leaf.dtype) or ""] if leaf.weak_type else leaf.dtype
