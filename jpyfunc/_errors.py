"""Exception classes, and the errors that several modules raise."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax


class PyFuncError(Exception):
    """Base class of the errors that this library raises about a call."""


class NotDifferentiableError(PyFuncError, TypeError):
    """A derivative was taken of a body that JAX cannot differentiate."""


class TapeLostError(PyFuncError, RuntimeError):
    """The tape of a stateful call was evicted, so its derivative cannot be taken."""


class InferenceError(PyFuncError, TypeError):
    """The shapes of the results cannot be inferred without running the body on data."""


class ResultError(PyFuncError, TypeError):
    """A body returned something other than its `Tout` declares."""


class UnsupportedError(PyFuncError, NotImplementedError):
    """JAX does not support a transform of this call, or the program cannot be exported."""


class ExecutorError(PyFuncError, RuntimeError):
    """An executor did not run a function: it is broken, or cannot pickle it, say."""


class GradientCutWarning(UserWarning):
    """A body that is being differentiated reads a value that its gradient flows through.

    What it computes from the resulting Python number has no gradient. As with any Python
    warning, it is shown once per source line. Wrap the value in `jax.lax.stop_gradient` if
    that is intended.
    """


def see(heading: str) -> str:
    """Return the last line of an error: where its cause and its remedy are shown.

    Args:
        heading: one of `docs/errors.md`.
    """
    return f'\nSee "{heading}" in docs/errors.md.'


def not_differentiable(label: str) -> NotDifferentiableError:
    """Return the error of a `numpy_func` without rules that a tangent reaches."""
    return NotDifferentiableError(
        f"{label} is not differentiable: a tangent reaches it, and JAX cannot see what it "
        "does in NumPy. Define its derivative with defvjp or defjvp, write jax.custom_jvp "
        "around its call, or write the body with jax.numpy and use py_func. If it has no "
        "derivative, wrap its arguments in jax.lax.stop_gradient."
        + see("A numpy_func without rules")
    )


def no_second_order(label: str) -> NotDifferentiableError:
    """Return the error of a derivative of a derivative by rule."""
    return NotDifferentiableError(
        f"{label} is differentiated twice, and its rules, which run on the host, give its "
        "first derivative only. For higher orders write jax.custom_jvp or jax.custom_vjp "
        "around its call, with rules in jax.numpy that may call it again."
        + see("A rule that is differentiated")
    )


def no_rule(label: str, method: str) -> NotDifferentiableError:
    """Return the error of a mode of differentiation that a function has no rule for.

    Args:
        label: the function.
        method: what defines the rule.
    """
    modes = {"defjvp": "forward", "defvjp": "reverse"}
    return NotDifferentiableError(
        f"{label} is differentiated in {modes[method]} mode, for which it has no rule. "
        f"Define one with {method}, or differentiate it in the other mode."
        + see("No rule for this mode")
    )


_TRANSPOSED = (
    "is transposed, for jax.linear_transpose, a linear solver such as gmres, or the "
    "gradient of a jax.custom_jvp function that calls it"
)


def no_transpose(label: str) -> NotDifferentiableError:
    """Return the error of a `numpy_func` that is transposed and has no rule for it."""
    return NotDifferentiableError(
        f"{label} {_TRANSPOSED}, and has no rule for that. If it is linear, define one "
        "with defvjp, whose bwd is its transpose; else write jax.custom_vjp around its "
        "call, instead of jax.custom_jvp." + see("A call that is transposed")
    )


def not_linear(label: str, why: str, detail: str = "") -> NotDifferentiableError:
    """Return the error of a function that is transposed and is not known to be linear."""
    return NotDifferentiableError(
        f"{label} {_TRANSPOSED}, so it has to be linear, and {why}"
        f"{f' ({detail})' if detail else ''}. Write jax.custom_vjp around its call, "
        "instead of jax.custom_jvp, or jax.custom_derivatives.linear_call with the "
        "function and its transpose." + see("A transposed function that is not linear")
    )


def refuse_partial(arrays: Iterable[object], label: str) -> None:
    """Refuse an eager call on an array of which other processes hold a part.

    Raises:
        UnsupportedError: one of `arrays` is such an array.
    """
    for x in arrays:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            raise UnsupportedError(
                f"{label} is called eagerly on {jax.typeof(x).str_short()}, which is "
                "sharded over several processes, and this one does not have all of its "
                "values. Call it under jax.jit."
                + see("Under shard_map and over several processes")
            )


# The function that JAX was tracing when it missed a value, in the text of its error.
_TRACED_BY_JIT = re.compile(r"while tracing the function (\S+)(?: at .*)? for jit")


def inner_jit_remedy(error: BaseException) -> str:
    """Return what to do if a body fails because it calls a jitted function, or "".

    JAX's error says that a traced value was converted, which surprises a user whose body is
    run on values: the conversion is in a function that the body calls and `jax.jit` traces.
    """
    found = _TRACED_BY_JIT.search(str(error))
    if not found or not isinstance(error, jax.errors.JAXTypeError):
        return ""
    return (
        f"This is inside {found[1]}, which jax.jit traces, so it gets no values, whoever "
        "calls it. Leave jax.jit off it, or compile the program outside: @jax.jit goes "
        "above @py_func, not below." + see("No values inside jit")
    )


def add_inner_jit_remedy(error: BaseException, label: str) -> None:
    """Add `inner_jit_remedy` to what a body raised, as a note."""
    remedy = inner_jit_remedy(error)
    if remedy:
        add_note(error, f"{label}: {remedy}")


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
