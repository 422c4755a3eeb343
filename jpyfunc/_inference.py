"""What a body returns, found on abstract values: both sides of every Python branch."""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import set_current_trace, take_current_trace

from jpyfunc._body.tout import Leaf, Template, is_weak, kind_of
from jpyfunc._errors import InferenceError, ResultError, place_of
from jpyfunc._traces.abstract import (
    MAX_DECISIONS,
    AbstractTrace,
    AbstractTracer,
    NeedsValueError,
    Undecided,
)

MAX_RUNS = 32


def infer(
    func: Callable[[list[Any]], Any],
    avals: list[ShapedArray],
    template: Template | None,
    name: str,
) -> Template:
    """Complete a template by running a body on abstract values.

    The body sees arrays that have a shape and a dtype and no data. Each truth test of
    one is a decision; runs follow every sequence of decisions, those with few true
    ones first, up to `MAX_RUNS` runs of `MAX_DECISIONS` decisions.

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
    # (number of true decisions, order of discovery, the decisions)
    queue: list[tuple[int, int, list[bool]]] = [(0, 0, [])]
    discovered = 0
    for _ in range(MAX_RUNS):
        if not queue:
            break
        _, _, script = heapq.heappop(queue)
        trace = AbstractTrace(script)
        try:
            with _quiet(), take_current_trace(), set_current_trace(trace):
                result = func([AbstractTracer(trace, aval) for aval in avals])
                seen = _template_of(result, template, name)
        except Undecided:
            pass
        except NeedsValueError as error:
            raise _needs_value_error(error, str(error), template, name) from None
        except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
            what = str(error).split("\n", 1)[0]
            raise _needs_value_error(error, what, template, name) from error
        except (ResultError, InferenceError):
            raise
        except Exception as error:  # noqa: BLE001
            failure = error  # a branch that raises returns nothing to compare
        else:
            found = seen if found is None else _join(found, seen, trace.branch, name)
        for i in range(len(script), len(trace.decisions)):
            branch = [*trace.decisions[:i], True]
            discovered += 1
            heapq.heappush(queue, (sum(branch), discovered, branch))
    if found is None:
        reason = (
            f"it raised {type(failure).__name__}{place_of(failure)}: {failure}"
            if failure
            else f"it made more than {MAX_DECISIONS} decisions without returning"
        )
        raise InferenceError(
            f"{name}: the shapes of its results could not be inferred, because on "
            f"abstract values {reason}. {_remedy(template)}"
        ) from failure
    return found


def _template_of(result: Any, declared: Template | None, name: str) -> Template:
    """The complete template of one run's result, which must satisfy what is declared."""
    template = declared or Template.undeclared(result)
    avals = map(jax.typeof, template.check(result, name))
    leaves = [
        Leaf(aval.shape, aval.dtype, is_weak(aval))
        if leaf.dtype is None
        else dataclasses.replace(leaf, shape=aval.shape)
        for aval, leaf in zip(avals, template.leaves, strict=True)
    ]
    return Template(template.tree, tuple(leaves))


def _join(first: Template, second: Template, branch: str, name: str) -> Template:
    """What holds on both sides of a branch, of which `second` is the true one."""
    if first.tree != second.tree:
        raise InferenceError(
            f"{name}: the sides of {branch} disagree: if true, it returns {second}, else "
            f"{first}. Return the same structure on every side."
        )
    leaves = []
    for i, (a, b) in enumerate(zip(first.leaves, second.leaves, strict=True)):
        if a.shape != b.shape or (a.dtype != b.dtype and not (a.weak_type or b.weak_type)):
            raise InferenceError(
                f"{name}: the sides of {branch} disagree on {first.path(i)}: if true, it "
                f"is {b}, else {a}. Return the same on every side, or declare the one "
                f"meant: Tout={first}."
            )
        dtype = a.dtype
        if a.dtype != b.dtype:
            dtype = jnp.result_type(_promotable(a), _promotable(b))
        leaves.append(Leaf(a.shape, dtype, a.weak_type and b.weak_type))
    return Template(first.tree, tuple(leaves))


def _promotable(leaf: Leaf) -> Any:
    """The dtype, or the Python type that stands for it where it is weak."""
    python_types = {"b": bool, "u": int, "i": int, "f": float, "c": complex}
    return python_types[kind_of(leaf.dtype) or ""] if leaf.weak_type else leaf.dtype


def _needs_value_error(
    error: Exception, what: str, template: Template | None, name: str
) -> InferenceError:
    return InferenceError(
        f"{name}: the shapes of its results cannot be inferred, because the body needs a "
        f"concrete value{place_of(error)}: {what}. {_remedy(template)}"
    )


def _remedy(template: Template | None) -> str:
    tout = template or "jax.ShapeDtypeStruct(SHAPE, jnp.float32)"
    return (
        "Say what the body returns, and it will not be run to find out: "
        f"Tout={tout}, with () as the shape of a scalar."
    )


_muted = threading.local()  # `.blocks`: how many `_quiet` blocks this thread is in


def _is_muted() -> bool:
    return getattr(_muted, "blocks", 0) > 0


class _Muted:
    """A stream without what threads in a `_quiet` block write to it.

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

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep this thread's `print` and `breakpoint` still: the body is not being run."""
    stdout, stderr, hook = sys.stdout, sys.stderr, sys.breakpointhook

    def breakpointhook(*args: Any, **kwargs: Any) -> Any:
        return None if _is_muted() else hook(*args, **kwargs)

    muted: Any = (_Muted(stdout), _Muted(stderr), breakpointhook)
    sys.stdout, sys.stderr, sys.breakpointhook = muted
    _muted.blocks = getattr(_muted, "blocks", 0) + 1
    try:
        yield
    finally:
        _muted.blocks -= 1
        # Only what is still in place: another thread may have replaced it meanwhile.
        if sys.stdout is muted[0]:
            sys.stdout = stdout
        if sys.stderr is muted[1]:
            sys.stderr = stderr
        if sys.breakpointhook is breakpointhook:
            sys.breakpointhook = hook
