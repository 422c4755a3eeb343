"""The exception of a body on its way through XLA, which carries a text alone, and back.

A failure leaves the host call as a text: what the user reads, and behind it a marker that
it is found by. That text becomes a `JaxRuntimeError` once something waits for the program,
on whatever thread. Each one is read when it is made: its marker is taken off before anyone
sees it, and the failure has surfaced, once more. Where a program of a CPU calls the host on
the thread that dispatches it, JAX raises at once, and in the fast path that may be a
`ValueError`, which nothing reads. So the marker is left out there, and the failure is known
as the last one of that thread. A program of a GPU calls the host on that thread, too, but
its errors are raised where its results are waited for, as all others are.
"""

from __future__ import annotations

import dis
import functools
import itertools
import os
import re
import sys
import threading
import traceback
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import jax
import jaxlib

from jpyfunc._errors import PyFuncError
from jpyfunc._limits import (
    MAX_FAILURES,
    MAX_KEPT_EXCEPTIONS,
)
from jpyfunc._runtime.in_flight import Flight, taken
from jpyfunc._runtime.tokens import forget_tokens_of

_MARKER = re.compile(r"\n?<py_func failure (\w+)>")


class Failure:
    """A body's exception that went through XLA.

    Attributes:
        original: the exception, while some block may ask for it.
        interrupt: the exception, if that is what it is: one by Ctrl-C, as a rule.
        text: what JAX's error about it ends with.
        surfaced: how often JAX has raised it.
    """

    __slots__ = ("interrupt", "original", "surfaced", "text")

    def __init__(self, text: str) -> None:
        self.original: BaseException | None = None
        self.interrupt: KeyboardInterrupt | None = None
        self.text = text
        self.surfaced = 0

    def surface(self) -> KeyboardInterrupt | None:
        """Note that it is raised; the interrupt to raise instead, the first time."""
        self.surfaced += 1
        interrupt, self.interrupt = self.interrupt, None
        return interrupt


class FailureRegistry:
    """Failures by their markers, and the blocks that may ask for their exceptions.

    A context manager, in which the exceptions themselves are kept.

    Attributes:
        last_here: by thread, the failure that was raised there at once last.
        blocks: of `raise_original`, those that are open.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = os.urandom(4).hex()  # texts go from one process to others
        self._numbers = itertools.count()
        self._marked: OrderedDict[str, Failure] = OrderedDict()
        self._intact: deque[BaseException] = deque()
        self._keepers = 0
        self.last_here: dict[int, Failure] = {}
        self.blocks: list[_Block] = []

    def __enter__(self) -> None:
        with self._lock:
            self._keepers += 1

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self._keepers -= 1
            if not self._keepers:
                self._intact.clear()
                self.last_here.clear()
                for failure in self._marked.values():
                    failure.original = None

    def add(self, error: BaseException, text: str) -> tuple[Failure, str]:
        """The failure of a body, and its marker."""
        failure, older = Failure(text), None
        if isinstance(error, KeyboardInterrupt):
            failure.interrupt = error
        with self._lock:
            name = f"{self._process}_{next(self._numbers)}"
            self._note(name, failure)
            if self._keepers:
                failure.original = error
                self._intact.append(error)
                older = (
                    self._intact.popleft()
                    if len(self._intact) > MAX_KEPT_EXCEPTIONS
                    else None
                )
        while older is not None:
            traceback.clear_frames(older.__traceback__)
            older = older.__cause__ or older.__context__
        return failure, f"\n<py_func failure {name}>"

    def marked(self, text: str) -> Failure | None:
        """The failure whose text this is, of this process or of another one."""
        names = _MARKER.findall(text)
        if not names:
            return None
        with self._lock:
            known = self._marked.get(names[-1])
            return known or self._note(names[-1], Failure(text))

    def _note(self, name: str, failure: Failure) -> Failure:
        self._marked[name] = failure
        if len(self._marked) > MAX_FAILURES:  # those of programs that are long over
            self._marked.popitem(last=False)
        return failure

    def note_here(self, failure: Failure) -> None:
        """Note that JAX is about to raise `failure` on this thread."""
        with self._lock:
            if self._keepers:
                self.last_here[threading.get_ident()] = failure


failures = FailureRegistry()
_failure_of: weakref.WeakKeyDictionary[BaseException, Failure] = weakref.WeakKeyDictionary()


def _read(error: BaseException, text: str) -> str:
    """Note that JAX raises the failure that `text` is marked with; the text without it."""
    failure = failures.marked(text)
    if failure is not None:
        _failure_of[error] = failure
        interrupt = failure.surface()
        if interrupt is not None:
            raise interrupt  # in the place of JAX's error
    return _MARKER.sub("", text)


def failure_of(error: BaseException) -> Failure | None:
    """The failure that JAX has made `error` of."""
    if type(error) not in (jax.errors.JaxRuntimeError, ValueError):
        return None
    if isinstance(error, jax.errors.JaxRuntimeError) and error in _failure_of:
        return _failure_of[error]
    last = failures.last_here.get(threading.get_ident())
    if last is None or not str(error).endswith(last.text) or _is_raised_in_python(error):
        return None  # or the user's own, which may quote JAX's from end to end
    return last


def _is_raised_in_python(error: BaseException) -> bool:
    """Whether a `raise` statement has made it, and not a function of JAX's runtime."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return True
    return place.tb_frame.f_code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def has_surfaced_before(error: BaseException) -> bool:
    """Whether `error` is about a failure that JAX has raised before."""
    failure = failure_of(error)
    return failure is not None and failure.surfaced > 1


@functools.cache
def watch() -> None:
    """Read JAX's errors from now on, once in a process: that a program of ours needs it."""
    read_runtime_errors(_read)
    forget_tokens_of(has_surfaced_before)


def read_runtime_errors(read: Callable[[BaseException, str], str]) -> None:
    """Show each error of JAX's runtime to `read` when it is made, for its text.

    XLA hands over a text, and the errors that JAX makes of it, wherever something waits
    for a failed program, are the only sign that anybody has come to know of it.

    Args:
        read: given an error and its text, returns the text that it is to have; what it
            raises is raised in the place of the error.
    """
    error_type: Any = jax.errors.JaxRuntimeError
    init = error_type.__init__

    def reading_init(self: Any, *args: Any) -> None:
        if args and isinstance(args[0], str):
            args = (read(self, args[0]), *args[1:])
        init(self, *args)

    error_type.__init__ = reading_init


def original_of(error: BaseException) -> BaseException | None:
    """The exception of a body that JAX has made `error` of, if a block keeps it."""
    failure = failure_of(error)
    return failure.original if failure else None


def failing(error: BaseException, label: str, raises_at_once: bool) -> str:
    """The text by which an exception leaves a host call, for `leave`.

    It has that of the body, its lines and its message, and how to catch the exception.

    Args:
        error: what was raised.
        label: what errors call the user's function.
        raises_at_once: as of `leave`.
    """
    error_itself = original_of(error) or error
    text = f"{label}:\n{_traceback(error)}"
    if not isinstance(error, PyFuncError) and not failures.blocks and _HINT not in text:
        text += _HINT
    # XLA cuts a text at a zero byte, and crashes on a surrogate.
    text = text.rstrip().replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
    failure, marker = failures.add(error_itself, text)
    is_dispatching = caller() is not None  # on this thread, a program of any block of it
    if not (is_dispatching and raises_at_once):
        for block in failures.blocks.copy():
            is_here = block.thread == threading.get_ident()
            if is_here if is_dispatching else block.has_dispatched_all():
                block.failures.append(failure)
    return text + marker


_HINT = (
    "To catch the original exception, write `with jpyfunc.raise_original():` around the "
    "call."
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


def leave(text: str, raises_at_once: bool) -> NoReturn:
    """Raise what XLA makes an error of.

    XLA prints the stack that the innermost frame of an exception is on, JAX's calls and
    all. That of a generator which is suspended is on none.

    Args:
        text: as `failing` gave it.
        raises_at_once: whether JAX raises the error of such a program where it dispatches
            it, if that is on this thread.
    """
    frame = caller() if raises_at_once else None
    if frame is not None:
        failure = failures.marked(text)
        text = _MARKER.sub("", text)
        if failure is not None:
            failures.note_here(failure)
            interrupt = failure.surface()
            if interrupt is not None:
                _interrupt(frame, interrupt)
    nowhere = _suspended.gi_frame
    place = TracebackType(None, nowhere, nowhere.f_lasti, nowhere.f_lineno)
    raise RuntimeError(text).with_traceback(place)


_HOST_CALL = (
    __name__,
    "jpyfunc._primitive.custom_call",
    "jpyfunc._primitive.host_call",
)


def caller() -> FrameType | None:
    """The frame that has called the program on whose thread a host call runs, if any."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in _HOST_CALL:
        frame = frame.f_back
    return frame


def _interrupt(frame: FrameType, error: BaseException) -> None:
    """Have `error` raised in the place of JAX's error about a call that `frame` is in.

    JAX raises that in C++, and an interrupt that is pending by then is only raised when
    the exception has passed by each `except KeyboardInterrupt`. But a trace function is
    told of an exception before it is handled, and may raise another one. A thread that
    has a trace function already keeps it, a debugger's, say; JAX's error is raised there.
    """
    if sys.gettrace() is not None:
        return

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if event not in ("exception", "return"):
            return trace
        sys.settrace(None)
        frame.f_trace, frame.f_trace_lines = None, True
        if event == "exception":
            raise error
        return None

    frame.f_trace, frame.f_trace_lines = trace, False
    sys.settrace(lambda *_: None)


class _Block(Flight):
    """What is dispatched in a block, and its failures that JAX raises only later."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[Failure] = []


class raise_original:  # noqa: N801 - a context manager, named like JAX's own
    """Make an exception in a body surface as itself, not as JAX's error about it.

    JAX reports an exception in a compiled program's body as a `JaxRuntimeError` whose
    text has the body's traceback. Inside this context manager the body's own exception
    object is raised instead, with its type, attributes and traceback. On leaving, it
    waits for what its thread has dispatched in it, so a failure cannot surface after the
    block; but not for a body that itself waits for some seconds, as for a lock that is
    held here.

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

    def __init__(self) -> None:
        self._entered: list[_Block] = []

    def __enter__(self) -> None:
        block = _Block()
        self._entered.append(block)
        failures.__enter__()
        failures.blocks.append(block)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        block = taken(self._entered)
        try:
            original = original_of(error) if error else _unseen(block)
        finally:
            failures.blocks.remove(block)
            failures.__exit__()
        if original is not None:
            # `from` what it came from already: else the text of JAX's error, which
            # repeats this one, would be printed above it.
            raise original from (original.__cause__ or original.__context__)


def _unseen(block: _Block) -> BaseException | None:
    """The exception of a body in a block's programs that JAX has not raised yet."""
    block.wait()
    if len({each.thread for each in failures.blocks}) > 1:
        # There is no telling which of them dispatched it. The failure surfaces as JAX's
        # error, where the array is waited for.
        return None
    for failure in block.failures:
        if failure.original is not None and not failure.surfaced:
            failure.surface()
            return failure.original
    return None
