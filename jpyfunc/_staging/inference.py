"""What a body returns, found on abstract values: both sides of every Python branch."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dataclasses
import dis
import heapq
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import set_current_trace, take_current_trace

from jpyfunc._errors import InferenceError, ResultError, inner_jit_remedy
from jpyfunc._frames import place_of, user_frame
from jpyfunc._limits import (
    MAX_ABSTRACT_RUNS,
    MAX_BRANCH_POINTS,
)
from jpyfunc._staging.abstract import (
    AbstractTrace,
    NeedsValueError,
    TooManyBranchPoints,
)
from jpyfunc._tout import Leaf, Template, is_same_kind, is_weak, kind_of


@dataclasses.dataclass(frozen=True, slots=True)
class Exploration:
    """The runs of a body that this thread is in, the innermost of several.

    Attributes:
        found: what was found of the calls in the outermost body, by what tells them apart.
            A body makes the same calls in each of its runs, and so do the bodies that it
            calls, so that to find it again would take exponentially many runs. It goes
            with the outermost exploration, because functions may change.
        for_shapes: whether only the avals of results matter.
    """

    found: dict[Any, Any]
    for_shapes: bool


_exploration: contextvars.ContextVar[Exploration | None]
_exploration = contextvars.ContextVar("exploration", default=None)
exploration = _exploration.get


def found_once(call: Callable[[], Any], find: Callable[[], Any]) -> Any:
    """What `find` gives, or gave for the same call in a body that is being explored.

    Args:
        call: gives what tells a call from others, or None if that cannot be told.
        find: without arguments.
    """
    explored = exploration()
    key = None if explored is None else call()
    if explored is None or key is None:
        return find()
    if key not in explored.found:
        explored.found[key] = find()
    return explored.found[key]


def infer(
    func: Callable[[list[Any]], Any],
    avals: list[ShapedArray],
    template: Template | None,
    name: str,
) -> Template:
    """Complete a template by running a body on abstract values.

    The body sees arrays that have a shape and a dtype and no data. Each truth test of
    one is a decision; runs follow every sequence of decisions, up to `MAX_ABSTRACT_RUNS`
    runs of `MAX_BRANCH_POINTS` decisions.

    Args:
        func: the body, called with one array per aval.
        avals: what the body will be called with.
        template: what is declared, or None if nothing is.
        name: the name of the function, for errors.

    Returns:
        A complete template.

    Raises:
        InferenceError: the body needs a value, or its branches disagree.
        ResultError: a branch returns what the template does not allow.
    """
    found: Template | None = None
    failure: Exception | None = None
    last = ""

    def returned(trace: AbstractTrace) -> Template:
        return template_of(func([*map(trace.new, avals)]), template, name)[0]

    for run in explore(returned, name, MAX_ABSTRACT_RUNS):
        error = run.error
        if error is None:
            seen = run.result
            found = seen if found is None else join(found, seen, run.trace.branch, name)
        elif isinstance(error, ResultError | InferenceError):
            raise error
        elif isinstance(error, _UNKNOWN):
            cause = None if isinstance(error, NeedsValueError) else error
            raise no_result(error, template, name) from cause
        elif isinstance(error, Exception):
            failure = error  # a branch that raises returns nothing to compare
        elif error:
            last = run.trace.decisions[-1].place
    if found is None:
        raise no_result(failure, template, name, last) from failure
    return found


# What a body raises that needs a value.
_UNKNOWN = (NeedsValueError, jax.errors.JAXTypeError, jax.errors.JAXIndexError)
# What JAX says where that is a shape.
_OF_SHAPES = re.compile("boolean indices|size.? argument|[Ss]hapes must be 1D|arange")


def no_result(
    error: Exception | None, template: Template | None, name: str, last: str = ""
) -> InferenceError:
    """The error of a body that returned on no abstract values.

    Args:
        error: what it raised, or None if it made too many decisions.
        template: what is declared, or None.
        name: the name of the function.
        last: where it made the last of its decisions.
    """
    start = f"{name}: the shapes of its results cannot be inferred, because the body"
    if error is None:
        return InferenceError(
            f"{start} makes more than {MAX_BRANCH_POINTS} decisions before it returns, the "
            f"last{last}. In a jax.lax.while_loop there are none. Or say what it returns, "
            f"and it will not be run to find out: {_declaration(template)}."
        )
    place, what = place_of(error), str(error).split("\n", 1)[0].rstrip(".")
    declare = (
        "Say what the body returns, and it will not be run to find out: "
        f"{_declaration(template, error)}."
    )
    if isinstance(error, TypeError | IndexError) and _OF_SHAPES.search(str(error)):
        return InferenceError(
            f"{start} makes an array whose shape depends on data{place}: {what}. What a "
            "compiled program gets back has a fixed shape. If the array is returned, pad "
            "it (jnp.nonzero(x, size=8)) or mask it (jnp.where(mask, x, 0)). If it is not: "
            f"{declare}"
        )
    if isinstance(error, _UNKNOWN):
        remedy = inner_jit_remedy(error) or declare
        return InferenceError(f"{start} needs a concrete value{place}: {what}. {remedy}")
    return InferenceError(
        f"{name}: {type(error).__name__}{place}: {error}\nThe body raised this on values "
        "without data, from which the shapes of its results are inferred. If it also fails "
        f"on real data, fix the function. If not: {declare}"
    )


def _declaration(template: Template | None, error: Exception | None = None) -> str:
    """What to write as `Tout`."""
    if template is None and error is not None and _returns_nothing(error):
        return "Tout=[], which means nothing"
    tout: Any = "jax.ShapeDtypeStruct((), jnp.float32)"
    if template is not None:
        tout = template.replace_shapes([leaf.shape or () for leaf in template.leaves])
    return f"Tout={tout}, for a scalar; else its shape comes in place of ()"


def _returns_nothing(error: Exception) -> bool:
    """Whether the function of the user's in which an exception began has no result."""
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


@dataclasses.dataclass(frozen=True, slots=True)
class AbstractRun:
    """A run of a body on abstract values: what it returned, or how it ended instead."""

    trace: AbstractTrace
    result: Any
    error: BaseException | None  # an `Exception` or `TooManyBranchPoints`


def explore(
    func: Callable[[AbstractTrace], Any],
    name: str,
    limit: int,
    keeps_rules: bool = False,
) -> Iterator[AbstractRun]:
    """Run a body on abstract values, both ways at each truth test.

    Those of fewer decisions come first, and of these the false side: so the short runs of
    a loop come first, whether its test is one to go on or to leave.

    Args:
        func: calls the body, with values of the trace that it gets.
        name: the name of the function, for errors.
        limit: how many runs there may be.
        keeps_rules: whether what is noted of functions with custom rules has these rules;
            they must not branch then.
    """
    # (number of decisions, order of discovery, the decisions)
    queue: list[tuple[int, int, list[bool]]] = [(0, 0, [])]
    discovered = 0
    outer = exploration()
    current = Exploration({} if outer is None else outer.found, not keeps_rules)
    for _ in range(limit):
        if not queue:
            break
        _, _, script = heapq.heappop(queue)
        trace = AbstractTrace(name, script, keeps_rules)
        result, error = None, None
        token = _exploration.set(current)
        try:
            with _quiet(), take_current_trace(), set_current_trace(trace):
                result = func(trace)
        except (TooManyBranchPoints, Exception) as raised:  # noqa: BLE001 - for the caller to judge
            error = raised
        finally:
            _exploration.reset(token)
            trace.close()
        yield AbstractRun(trace, result, error)
        answers = [decision.answer for decision in trace.decisions]
        for i in range(len(script), len(answers)):
            discovered += 1
            heapq.heappush(queue, (i + 1, discovered, [*answers[:i], True]))


def template_of(
    result: Any, declared: Template | None, name: str
) -> tuple[Template, list[Any]]:
    """The complete template of one run's result, and the arrays, as they are declared."""
    template = declared or Template.undeclared(result, name)
    arrays = template.check(result, name)
    avals = map(jax.typeof, arrays)
    leaves = [
        Leaf(aval.shape, aval.dtype, is_weak(aval))
        if leaf.dtype is None
        else dataclasses.replace(leaf, shape=aval.shape)
        for aval, leaf in zip(avals, template.leaves, strict=True)
    ]
    return Template(template.tree, tuple(leaves)), arrays


def join(first: Template, second: Template, branch: str, name: str) -> Template:
    """What holds on both sides of a branch, of which `second` is the true one."""
    if first.tree != second.tree:
        raise InferenceError(
            f"{name}: the sides of {branch} disagree: if true, it returns {second}, else "
            f"{first}. Return the same structure on every side."
        )
    leaves = []
    for i, (a, b) in enumerate(zip(first.leaves, second.leaves, strict=True)):
        if a.shape != b.shape or not _may_join(a, b):
            remedy = "Return the same on every side"
            if a.shape == b.shape and not (a.is_key or b.is_key):
                both = Leaf(a.shape, jnp.promote_types(a.dtype, b.dtype))
                declared = [*first.leaves[:i], both, *first.leaves[i + 1 :]]
                meant = dataclasses.replace(first, leaves=tuple(declared))
                remedy += f", or declare what both sides become: Tout={meant}"
            raise InferenceError(
                f"{name}: the sides of {branch} disagree on {first.path(i)}: if true, it "
                f"is {b}, else {a}. {remedy}."
            )
        dtype = a.dtype
        if a.dtype != b.dtype:
            dtype = jnp.result_type(_promotable(a), _promotable(b))
        leaves.append(Leaf(a.shape, dtype, a.weak_type and b.weak_type))
    return Template(first.tree, tuple(leaves))


def _may_join(a: Leaf, b: Leaf) -> bool:
    """Whether the dtypes are one, or a Python number takes that of an array."""
    if a.dtype == b.dtype or (a.weak_type and b.weak_type):
        return True
    if not (a.weak_type or b.weak_type):
        return False
    weak, strong = (a, b) if a.weak_type else (b, a)
    # A number of a wider kind would change arrays, which alone would be what they are.
    kinds = kind_of(weak.dtype) or "", kind_of(strong.dtype) or ""
    return kinds == ("i", "u") or is_same_kind(*kinds)


def _promotable(leaf: Leaf) -> Any:
    """The dtype, or the Python type that stands for it where it is weak."""
    python_types = {"b": bool, "u": int, "i": int, "f": float, "c": complex}
    return python_types[kind_of(leaf.dtype) or ""] if leaf.weak_type else leaf.dtype


# How many `_quiet` blocks each thread is in, of the threads that are in one. The streams
# are the process's, so that what stands in their places is every thread's, too.
_blocks: collections.Counter[int] = collections.Counter()
_blocks_lock = threading.Lock()
_STREAMS = ("stdout", "stderr", "breakpointhook")


def _is_muted() -> bool:
    return threading.get_ident() in _blocks


class MutedStream:
    """A stream, or `sys.breakpointhook`, silent for threads in a `_quiet` block.

    It may outlive the block, where the body or another thread keeps it (a logging
    handler, `contextlib.redirect_stdout`); it lets all through then.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return len(text) if _is_muted() else self._stream.write(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if _is_muted() else self._stream(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep this thread's `print` and `breakpoint` still: the body is not being run.

    Blocks of several threads overlap and end in any order, so that none can put back
    what it found: it may be the wrapper of another, which has ended by then. One wrapper
    serves all threads, and the block that ends last takes it away.
    """
    thread = threading.get_ident()
    with _blocks_lock:
        _blocks[thread] += 1
        for name in _STREAMS:
            stream = getattr(sys, name)
            if not isinstance(stream, MutedStream):
                setattr(sys, name, MutedStream(stream))
    try:
        yield
    finally:
        with _blocks_lock:
            _blocks[thread] -= 1
            if not _blocks[thread]:
                del _blocks[thread]
            for name in _STREAMS:
                stream = getattr(sys, name)
                # What others have put there meanwhile stays.
                if not _blocks and isinstance(stream, MutedStream):
                    setattr(sys, name, stream._stream)
