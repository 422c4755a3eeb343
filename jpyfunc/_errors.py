"""Exception classes, and the way back to the exception that a body raised."""

from __future__ import annotations

import _thread
import itertools
import linecache
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import jax
import jaxlib

from jpyfunc._flight import Flight


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
        f"{label} is differentiated twice, and its rules, which run on the host, say what "
        "its first derivative is alone. For higher orders write jax.custom_jvp or "
        "jax.custom_vjp around its call, with rules in jax.numpy that may call it again."
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
    """The run that a derivative is to be taken of is not kept, and must not be repeated."""


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


MAX_ORIGINALS = 1024
MAX_INTACT = 16  # with the variables of the frames that they went through, their arrays

_MARKER = re.compile(r"<py_func exception (\w+)>")


class _Originals:
    """Exceptions of bodies, kept while some `raise_original` block may ask for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = os.urandom(4).hex()  # texts go from one process to others
        self._numbers = itertools.count()
        self._kept: OrderedDict[str, BaseException] = OrderedDict()
        self._intact: deque[BaseException] = deque()
        self.blocks = 0

    def enter(self) -> None:
        with self._lock:
            self.blocks += 1

    def leave(self) -> None:
        with self._lock:
            self.blocks -= 1
            if not self.blocks:
                self._kept.clear()
                self._intact.clear()

    def keep(self, error: BaseException) -> str:
        with self._lock:
            name = f"{self._process}_{next(self._numbers)}"
            self._kept[name] = error
            self._intact.append(error)
            if len(self._kept) > MAX_ORIGINALS:  # those of programs that are long over
                self._kept.popitem(last=False)
            older = self._intact.popleft() if len(self._intact) > MAX_INTACT else None
        while older is not None:
            traceback.clear_frames(older.__traceback__)
            older = older.__cause__ or older.__context__
        return f"<py_func exception {name}>"

    def find(self, error: BaseException) -> BaseException | None:
        # JAX's fast path for a program that ran before raises ValueError of that text.
        if not isinstance(error, jax.errors.JaxRuntimeError | ValueError):
            return None
        # The last one is its own; the text may quote those of errors before it.
        markers = _MARKER.findall(str(error))
        return self._kept.get(markers[-1]) if markers else None


_originals = _Originals()


def crossing_text(error: BaseException, label: str) -> str:
    """What is known of an exception that leaves a host call.

    XLA keeps nothing of it but a text: that of the body, its lines and its message, and
    how to catch it. Where a `raise_original` block is open, that is a marker to find it by.

    Args:
        error: what was raised.
        label: what errors call the user's function.
    """
    text = f"{label}:\n{_traceback(error)}"
    if _originals.blocks:
        text += _originals.keep(_originals.find(error) or error)
    elif not isinstance(error, PyFuncError) and _HINT not in text:
        text += _HINT
    # XLA cuts a text at a zero byte, and crashes on a surrogate.
    return (
        text.rstrip("\n").replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
    )


_HINT = "To catch it as what it is, write `with jpyfunc.raise_original():` around the call."
_INTERNAL = tuple(
    str(Path(file).parent) + os.sep for file in (jax.__file__, jaxlib.__file__, __file__)
)


def _traceback(error: BaseException) -> str:
    """The traceback of an exception and of what it came from, by the user's frames."""
    shown = traceback.TracebackException.from_exception(error)
    links = [shown]
    for link in links:  # which grows
        link.stack[:] = [f for f in link.stack if not f.filename.startswith(_INTERNAL)]
        links.extend(each for each in (link.__cause__, link.__context__) if each)
    if isinstance(error, PyFuncError):
        del shown.stack[:-2]
        shown.__cause__ = shown.__context__ = None
    return "".join(shown.format())


def _nowhere() -> Iterator[None]:
    yield


_suspended: Any = _nowhere()
next(_suspended)


def leave(text: str) -> NoReturn:
    """Raise what XLA makes an error of.

    XLA prints the stack that the innermost frame of an exception is on, JAX's calls and
    all. That of a generator which is suspended is on none.
    """
    frame = _suspended.gi_frame
    place = TracebackType(None, frame, frame.f_lasti, frame.f_lineno)
    raise RuntimeError(text).with_traceback(place)


def pass_on_interrupt(error: BaseException) -> None:
    """See to it that an interrupt of a body interrupts the program that called it.

    XLA makes an ordinary error of it. So where the body was interrupted, the main thread is
    once more, after the call has come back: as it is by the user's Ctrl-C.
    """
    if not isinstance(error, KeyboardInterrupt) or _originals.blocks:
        return
    main = threading.main_thread()
    frame = sys._getframe(1)

    def interrupt() -> None:
        running = sys._current_frames().get(main.ident or 0)
        while running is not None:
            if running is frame:
                timer = threading.Timer(0.001, interrupt)
                timer.daemon = True
                timer.start()
                return
            running = running.f_back
        if callable(signal.getsignal(signal.SIGINT)) and hasattr(signal, "pthread_kill"):
            # Wakes it, too, should it sleep or wait for a line by now.
            signal.pthread_kill(main.ident or 0, signal.SIGINT)
        else:
            _thread.interrupt_main()

    threading.Thread(target=interrupt, daemon=True).start()


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


class raise_original:  # noqa: N801 - a context manager, named like JAX's own
    """Make an exception in a body surface as itself, not as JAX's error about it.

    JAX reports an exception in a compiled program's body as a `JaxRuntimeError` whose
    text has the body's traceback. Inside this context manager the body's own exception
    object is raised instead, with its type, attributes and traceback. On leaving, it
    waits for what was dispatched in it, so a failure cannot surface after the block; but
    not for a body that itself waits for some seconds, as for a lock that is held here.

    Raises:
        BaseException: whatever the body raised, `KeyboardInterrupt` included.

    Example:
        >>> import jax, jax.numpy as jnp, jpyfunc
        >>> @jpyfunc.py_func(Tout=jax.ShapeDtypeStruct((), jnp.float32))
        ... def check(x):
        ...     if x < 0:
        ...         raise ValueError(f"negative: {x}")
        ...     return x
        >>> try:
        ...     with jpyfunc.raise_original():
        ...         jax.jit(check)(-1.0)
        ... except ValueError as error:
        ...     print(error)
        negative: -1.0
    """

    def __enter__(self) -> None:
        self._before = Flight()
        _originals.enter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            original = _originals.find(error) if error else _failure_since(self._before)
        finally:
            _originals.leave()
        if original is not None:
            # `from` what it came from already: else the text of JAX's error, which
            # repeats this one, would be printed above it.
            raise original from (original.__cause__ or original.__context__)


def _failure_since(before: Flight) -> BaseException | None:
    """The exception of a body whose program was dispatched but not waited for yet."""
    # With blocks open on several threads there is no telling whose array it is; then
    # the failure surfaces as JAX's error where the array is waited for.
    if _originals.blocks > 1:
        return None
    return next(filter(None, map(_originals.find, before.wait())), None)
