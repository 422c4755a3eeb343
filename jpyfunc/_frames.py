"""Frames of the user's code: where errors and warnings say that something happened."""

from __future__ import annotations

import ctypes
import functools
import inspect
import linecache
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import Any

# Packages whose frames are skipped in the search for the user's.
_LIBRARIES = ("jax", "jaxlib", "jpyfunc", "matplotlib", "numpy", "scipy")


def user_frame(frames: Iterable[FrameType] | None = None) -> FrameType | None:
    """Return the first frame that runs the user's code, or None.

    Args:
        frames: innermost first; by default the stack of the caller.
    """
    if frames is None:
        frames = (frame for frame, _ in traceback.walk_stack(None))
    return next((frame for frame in frames if not is_library_frame(frame)), None)


def is_library_frame(frame: FrameType) -> bool:
    """Tell whether a frame runs code of a library, and not the user's."""
    return _package_of(frame) in _LIBRARIES


def local_variables(frame: FrameType) -> dict[str, Any]:
    """Copy the local variables of a frame.

    Before Python 3.13, the frame of a function keeps the dict that it gives, and with it
    objects that the function has let go. What has a weak reference to one would see it.
    """
    given = frame.f_locals
    variables = dict(given)
    _forget(frame, given)
    return variables


def set_local_variable(frame: FrameType, name: str, value: Any) -> None:
    """Assign to a local variable of a function that is running.

    Python 3.13 writes through the mapping that a frame gives (PEP 667). Before, it gives a
    dict, from which a debugger has Python copy the values back. All others are copied as
    they are: nothing has run since they were read.
    """
    given = frame.f_locals
    given[name] = value
    if sys.version_info < (3, 13):
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
        _forget(frame, given)


def _forget(frame: FrameType, given: Any) -> None:
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED and sys.version_info < (3, 13):
        given.clear()


def is_called_from(package: str) -> bool:
    """Tell whether a function of `package`, or of a copy, is on this thread's stack."""
    return any(
        package in frame.f_globals.get("__name__", "").split(".")
        for frame, _ in traceback.walk_stack(None)
    )


def _package_of(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]


def is_in_library(frame: FrameType) -> bool:
    """Tell whether a frame runs a function of Python's library, but not that of a pool."""
    package = _package_of(frame)
    return package in sys.stdlib_module_names and package != "concurrent"


def place_of(error: BaseException) -> str:
    """Return where the user's code raised `error`, as ` at FILE:LINE`, or ""."""
    lines = {frame: line for frame, line in traceback.walk_tb(error.__traceback__)}
    frame = user_frame(reversed(lines))
    return f" at {frame.f_code.co_filename}:{lines[frame]}" if frame else ""


def place_of_frame(frame: FrameType | None) -> str:
    """Return the line that a frame is executing, as ` at FILE:LINE`, or ""."""
    return f" at {frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""


def line_of(frame: FrameType | None) -> str:
    """Return the source text of the line that a frame is executing."""
    if frame is None:
        return ""
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


def warn_at(frame: FrameType | None, text: str, category: type[Warning]) -> None:
    """Warn at the line that a frame is executing.

    `warnings.warn` counts frames from here, and how many frames of libraries are in between
    varies. With the registry of the user's module, it is shown once per line by
    default.
    """
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


def warn_at_function(func: Callable[..., Any], text: str, category: type[Warning]) -> None:
    """Warn at the line that defines a function, if it is written in Python."""
    code = code_of(func)
    if code is None:
        warnings.warn(text, category, stacklevel=1)
    else:
        warnings.warn_explicit(text, category, code.co_filename, code.co_firstlineno)


def code_of(func: Callable[..., Any]) -> CodeType | None:
    """Return the code of a function, or of a callable object's class.

    Returns:
        None if it is written in C.
    """
    while isinstance(func, functools.partial):
        func = func.func
    func = inspect.unwrap(func)
    code = getattr(func, "__code__", None)
    return code or getattr(type(func).__call__, "__code__", None)
