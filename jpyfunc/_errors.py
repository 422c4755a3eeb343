"""Exception classes, and places in the user's code."""

from __future__ import annotations

import functools
import inspect
import linecache
import re
import traceback
import warnings
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import Any

import jax


class PyFuncError(Exception):
    """Base class of the errors that this library raises about a call of its own."""


class NotDifferentiableError(PyFuncError, TypeError):
    """A derivative was asked of a body that JAX cannot differentiate."""


def not_differentiable(label: str) -> NotDifferentiableError:
    """The error of a derivative by what enters a `numpy_func`."""
    return NotDifferentiableError(
        f"{label} is not differentiable: JAX cannot see into NumPy, and a tangent flows "
        "into it. Give it rules with defvjp or defjvp, write jax.custom_jvp around its "
        "call, write the body with jax.numpy and use py_func, or wrap "
        "jax.lax.stop_gradient around its arguments if it has no derivative."
    )


def no_second_order(label: str) -> NotDifferentiableError:
    """The error of a derivative of a derivative by rule."""
    return NotDifferentiableError(
        f"{label} is differentiated twice, and its rules, which run on the host, give its "
        "first derivative only. For higher orders write jax.custom_jvp or jax.custom_vjp "
        "around its call, with rules in jax.numpy that may call it again."
    )


def no_rule(label: str, rule: str) -> NotDifferentiableError:
    """The error of a mode that a function has no rule for."""
    modes = {"defjvp": "forward", "defvjp": "reverse"}
    return NotDifferentiableError(
        f"{label} is differentiated in {modes[rule]} mode, for which it has no rule. Give "
        f"it one with {rule}, or differentiate it in the other mode."
    )


_TRANSPOSED = (
    "is transposed, for jax.linear_transpose, a linear solver such as gmres, or the "
    "gradient of a jax.custom_jvp function that calls it"
)


def no_transpose(label: str) -> NotDifferentiableError:
    """The error of a `numpy_func` that is transposed without a rule."""
    return NotDifferentiableError(
        f"{label} {_TRANSPOSED}, and has no rule for that. If it is linear, give it one "
        "with defvjp, whose bwd is its transpose; else write jax.custom_vjp around its "
        "call, in place of jax.custom_jvp."
    )


def not_linear(label: str, why: str, detail: str = "") -> NotDifferentiableError:
    """The error of a function that is transposed and is not linear, or not visibly so."""
    return NotDifferentiableError(
        f"{label} {_TRANSPOSED}, so it has to be linear, and {why}"
        f"{f' ({detail})' if detail else ''}. Write jax.custom_vjp around its call, in "
        "place of jax.custom_jvp, or jax.custom_derivatives.linear_call with the function "
        "and its transpose."
    )


# What JAX says of a value that is missing in a function which it traces.
_TRACING_FOR_JIT = re.compile(r"while tracing the function (\S+)(?: at .*)? for jit")


def without_values(error: BaseException) -> str:
    """The remedy, if JAX misses a value in a function that `jax.jit` traces, or nothing."""
    found = _TRACING_FOR_JIT.search(str(error))
    if not found or not isinstance(error, jax.errors.JAXTypeError):
        return ""
    return (
        f"This is inside {found[1]}, which jax.jit traces, so that it gets no values, "
        "whatever calls it. Leave jax.jit off it, or compile what is outside: @jax.jit "
        "goes above @py_func, not below."
    )


def note_without_values(error: BaseException, label: str) -> None:
    """Add the remedy to what a body raised."""
    remedy = without_values(error)
    if remedy:
        error.add_note(f"{label}: {remedy}")


class TapeLostError(PyFuncError, RuntimeError):
    """The tape of a stateful call was evicted, and its derivative cannot be taken."""


class GradientCutWarning(UserWarning):
    """A body that is differentiated reads a value that its gradient flows through.

    What it computes of the Python number has no gradient. It is given once per source
    line, as Python gives warnings; `jax.lax.stop_gradient` around the value says that
    it is meant.
    """


class InferenceError(PyFuncError, TypeError):
    """The shapes of the results cannot be told without running the body on data."""


class ResultError(PyFuncError, TypeError):
    """A body returned something that its `Tout` does not declare."""


class UnsupportedError(PyFuncError, NotImplementedError):
    """A transform that JAX forbids for this call, or a program that cannot be saved."""


def refuse_partial(arrays: Iterable[Any], label: str) -> None:
    """Raise if a call needs values of an array that other processes hold in part.

    Raises:
        UnsupportedError: it does.
    """
    for x in arrays:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            raise UnsupportedError(
                f"{label} is called eagerly on {jax.typeof(x).str_short()} over several "
                "processes, of which this one does not have all values. Call it under "
                "jax.jit."
            )


_LIBRARIES = ("jax", "jaxlib", "jpyfunc", "matplotlib", "numpy", "scipy")


def user_frame(frames: Iterable[FrameType] | None = None) -> FrameType | None:
    """The innermost frame of a stack that is the user's code; by default of the caller."""
    if frames is None:
        frames = (frame for frame, _ in traceback.walk_stack(None))
    for frame in frames:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES:
            return frame
    return None


def is_called_from(library: str) -> bool:
    """Whether a function of a library is running on this thread."""
    return any(
        frame.f_globals.get("__name__", "").partition(".")[0] == library
        for frame, _ in traceback.walk_stack(None)
    )


def place_of(error: BaseException) -> str:
    """Where the user's code was when it raised, as ` at FILE:LINE`, or nothing."""
    lines = {frame: line for frame, line in traceback.walk_tb(error.__traceback__)}
    frame = user_frame(reversed(lines))
    return f" at {frame.f_code.co_filename}:{lines[frame]}" if frame else ""


def place_of_frame(frame: FrameType | None) -> str:
    """Where a running frame is, as ` at FILE:LINE`, or nothing."""
    return f" at {frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""


def line_of(frame: FrameType | None) -> str:
    """The source line that a running frame is at."""
    if frame is None:
        return ""
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


def warn_at(frame: FrameType | None, text: str, category: type[Warning]) -> None:
    """Warn at the line that a running frame is at, once for each line by default."""
    if frame is None:
        warnings.warn(text, category, stacklevel=1)
        return
    namespace = frame.f_globals
    warnings.warn_explicit(
        text,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=namespace.get("__name__"),
        registry=namespace.setdefault("__warningregistry__", {}),
    )


def code_of(func: Any) -> CodeType | None:
    """The code of a function, or of the class of a callable object, if it is Python's."""
    while isinstance(func, functools.partial):
        func = func.func
    func = inspect.unwrap(func)
    code = getattr(func, "__code__", None)
    return code or getattr(type(func).__call__, "__code__", None)


def warn_at_function(func: Any, text: str, category: type[Warning]) -> None:
    """Warn at the line that defines a function, if it is Python's."""
    code = code_of(func)
    if code is None:
        warnings.warn(text, category, stacklevel=1)
    else:
        warnings.warn_explicit(text, category, code.co_filename, code.co_firstlineno)


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an exception, once: a body may raise one object several times."""
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def adding_note(func: Callable[..., Any], note: str) -> Callable[..., Any]:
    """Return `func`, with `note` added to the exceptions that it raises."""

    @functools.wraps(func, updated=())
    def with_note(*args: Any, **kwargs: Any) -> Any:
        try:
            return func(*args, **kwargs)
        except Exception as error:
            add_note(error, note)
            raise

    return with_note
