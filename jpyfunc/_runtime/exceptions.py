"""Carry a body's exception out of the host call, as a text, which is all that XLA takes."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jax
import jaxlib
from jax.interpreters import mlir

from jpyfunc._errors import PyFuncError, see
from jpyfunc._runtime.failures import failures, original_of, without_marker
from jpyfunc._xla_bugs import printable, raise_without_stack


def failure_text(error: BaseException, label: str, raises_at_once: bool) -> str:
    """Register a body's failure, and make the text by which it leaves the host call.

    The text has the traceback of the body, from its own lines to its message, then how to
    catch the exception itself, then the marker.

    Args:
        error: what was raised.
        label: what errors call the user's function.
        raises_at_once: as of `leave_host_call`.
    """
    original = original_of(error)
    text = f"{label}:\n{_traceback(error)}"
    if not isinstance(error, PyFuncError) and not failures.blocks and _HINT not in text:
        text += _HINT
    text = printable(text.rstrip())
    failure, marker = failures.add(error if original is None else original, text)
    # On the dispatching thread, the program is of a block of that thread.
    is_dispatching = caller() is not None
    if not (is_dispatching and raises_at_once):
        for block in failures.blocks.copy():
            is_here = block.thread == threading.get_ident()
            if is_here if is_dispatching else block.has_dispatched_all():
                block.failures.append(failure)
    return text + marker


_HINT = (
    "To catch the original exception, write `with jpyfunc.raise_original():` around the "
    "call." + see("The body raised an exception")
)
_INTERNAL = tuple(
    str(folder) + os.sep
    for folder in (
        Path(jax.__file__).parent,
        Path(jaxlib.__file__).parent,
        Path(__file__).parents[1],
    )
)


def _traceback(error: BaseException) -> str:
    """The traceback of an exception and of its causes, with the user's frames alone."""
    shown = traceback.TracebackException.from_exception(error)
    links = [shown]
    for link in links:  # grows by the causes of each
        link.stack[:] = [f for f in link.stack if not f.filename.startswith(_INTERNAL)]
        links.extend(each for each in (link.__cause__, link.__context__) if each)
    if isinstance(error, PyFuncError):
        del shown.stack[:-2]
        shown.__cause__ = shown.__context__ = None
    return "".join(shown.format())


def leave_host_call(text: str, raises_at_once: bool) -> NoReturn:
    """Leave the host call by an exception that XLA makes an error of.

    Args:
        text: as `failure_text` made it.
        raises_at_once: whether JAX raises the error of such a program where it dispatches
            it, if the host call runs on the dispatching thread.
    """
    frame = caller() if raises_at_once else None
    if frame is not None:
        failure = failures.marked(text)
        text = without_marker(text)
        if failure is not None:
            failures.raise_here(failure)
            interrupt = failure.surface()
            if interrupt is not None:
                _raise_instead(interrupt, frame)
    raise_without_stack(RuntimeError(text))


def caller() -> FrameType | None:
    """The frame that dispatched the program, if its host call runs on that thread.

    On a thread of XLA's there are no frames but those of the host call.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return frame


def _is_ours(module: str) -> bool:
    return module.startswith("jpyfunc._") or module == mlir.emit_python_callback.__module__


def _raise_instead(interrupt: BaseException, frame: FrameType) -> None:
    """Raise an interrupt in place of JAX's error about a call in `frame`.

    JAX raises its error in C++, and an interrupt that is pending by then would be raised
    only after that error has passed each `except KeyboardInterrupt`. But Python tells a
    trace function of an exception before it looks for a handler, and the trace function may
    raise another one. Where the thread has a trace function already, a debugger's for
    example, that one stays and JAX's error is raised.
    """
    if sys.gettrace() is not None:
        return

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if event not in ("exception", "return"):
            return trace
        sys.settrace(None)
        frame.f_trace, frame.f_trace_lines = None, True
        if event == "exception":
            raise interrupt
        return None

    frame.f_trace, frame.f_trace_lines = trace, False
    sys.settrace(lambda *_: None)
