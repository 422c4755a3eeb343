"""Failures of bodies in compiled programs, and which errors of JAX are about them.

XLA carries a text from a callback that raised to whatever waits for the program, and JAX
makes a `JaxRuntimeError` of that text: later, on any thread, perhaps several times, perhaps
never. To find the way back from the error to the exception, the host call appends a marker
to the text, a line with a number that is unique among all processes of a program. Each
`JaxRuntimeError` is read as it is made. Its marker is removed before anybody sees it, and
the failure that the marker names has surfaced once more.

One case has no marker. When a program of a CPU runs its body on the thread that dispatches
it, JAX raises at once, and from its C++ fast path that may be a `ValueError`, which nothing
reads as it is made, so that users would see the marker. There the failure is known as the
last one of that thread instead. A program of a GPU may run its body on that thread, too,
but its errors are raised where its results are waited for, like all others.
"""

from __future__ import annotations

import dis
import functools
import itertools
import os
import re
import threading
import traceback
import weakref
from collections import OrderedDict, deque
from typing import Any

import jax

from jpyfunc._limits import MAX_FAILURES, MAX_KEPT_EXCEPTIONS
from jpyfunc._runtime.in_flight import Flight
from jpyfunc._runtime.tokens import forget_tokens_of

_MARKER = re.compile(r"\n?<py_func failure (\w+)>")


class Failure:
    """A body's exception that went through XLA.

    Attributes:
        original: the exception, while a block of `raise_original` may ask for it.
        interrupt: the exception if it is a `KeyboardInterrupt`, until that is raised.
        text: the end of the text of JAX's error.
        surfaced: how often JAX has raised it.
    """

    __slots__ = ("interrupt", "original", "surfaced", "text")

    def __init__(self, text: str) -> None:
        self.original: BaseException | None = None
        self.interrupt: KeyboardInterrupt | None = None
        self.text = text
        self.surfaced = 0

    def surface(self) -> KeyboardInterrupt | None:
        """Count that JAX raises it, and return the interrupt to raise instead, once."""
        self.surfaced += 1
        interrupt, self.interrupt = self.interrupt, None
        return interrupt


class CatchBlock(Flight):
    """The programs dispatched in a block of `raise_original`, and their failures.

    Attributes:
        failures: those that JAX raises only where something waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[Failure] = []


class FailureRegistry:
    """Failures by their markers, and the blocks that may ask for their exceptions.

    Exceptions themselves are kept only in a `with` statement on the registry: they hold the
    variables of the frames that they went through, and so their arrays.

    Attributes:
        last_here: by thread, the last failure that was raised there at once.
        blocks: those of `raise_original` that are open.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = os.urandom(4).hex()  # texts go from one process to others
        self._numbers = itertools.count()
        self._marked: OrderedDict[str, Failure] = OrderedDict()
        self._with_frames: deque[BaseException] = deque()  # not yet cleared, oldest first
        self._keepers = 0
        self.last_here: dict[int, Failure] = {}
        self.blocks: list[CatchBlock] = []

    def __enter__(self) -> None:
        with self._lock:
            self._keepers += 1

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self._keepers -= 1
            if not self._keepers:
                self._with_frames.clear()
                self.last_here.clear()
                for failure in self._marked.values():
                    failure.original = None

    def add(self, error: BaseException, text: str) -> tuple[Failure, str]:
        """Register the failure of a body; it comes with its marker."""
        failure, oldest = Failure(text), None
        if isinstance(error, KeyboardInterrupt):
            failure.interrupt = error
        with self._lock:
            name = f"{self._process}_{next(self._numbers)}"
            self._register(name, failure)
            if self._keepers:
                failure.original = error
                self._with_frames.append(error)
                if len(self._with_frames) > MAX_KEPT_EXCEPTIONS:
                    oldest = self._with_frames.popleft()
        while oldest is not None:
            traceback.clear_frames(oldest.__traceback__)
            oldest = oldest.__cause__ or oldest.__context__
        return failure, f"\n<py_func failure {name}>"

    def marked(self, text: str) -> Failure | None:
        """The failure that a text is marked with, which may be of another process."""
        names = _MARKER.findall(text)
        if not names:
            return None
        with self._lock:
            known = self._marked.get(names[-1])
            return known or self._register(names[-1], Failure(text))

    def _register(self, name: str, failure: Failure) -> Failure:
        self._marked[name] = failure
        if len(self._marked) > MAX_FAILURES:
            self._marked.popitem(last=False)
        return failure

    def raise_here(self, failure: Failure) -> None:
        """Remember that JAX is about to raise `failure` at once, on this thread."""
        with self._lock:
            if self._keepers:
                self.last_here[threading.get_ident()] = failure


failures = FailureRegistry()
_failure_of: weakref.WeakKeyDictionary[BaseException, Failure] = weakref.WeakKeyDictionary()


def without_marker(text: str) -> str:
    """The text as users see it."""
    return _MARKER.sub("", text)


def original_of(error: BaseException) -> BaseException | None:
    """The exception of a body that an error of JAX is about, if it is kept."""
    failure = _failure_behind(error)
    return failure.original if failure else None


def _failure_behind(error: BaseException) -> Failure | None:
    if type(error) not in (jax.errors.JaxRuntimeError, ValueError):
        return None
    if isinstance(error, jax.errors.JaxRuntimeError) and error in _failure_of:
        return _failure_of[error]
    last = failures.last_here.get(threading.get_ident())
    if last is None or not str(error).endswith(last.text) or _is_raised_in_python(error):
        return None  # or the user's own error, which may quote all of JAX's
    return last


def _is_raised_in_python(error: BaseException) -> bool:
    """Whether a `raise` statement raised it, rather than JAX's runtime in C++."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return True
    return place.tb_frame.f_code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]


@functools.cache
def watch() -> None:
    """Read JAX's runtime errors from now on; the first program with a body asks for it.

    Wherever something waits for a failed program, JAX makes an error of XLA's text. That is
    the only sign that anybody has come to know of the failure, and JAX has no hook there,
    so `JaxRuntimeError.__init__` is replaced.
    """
    error_type: Any = jax.errors.JaxRuntimeError
    init = error_type.__init__

    def reading_init(self: Any, *args: object) -> None:
        if args and isinstance(args[0], str):
            args = (_read(self, args[0]), *args[1:])
        init(self, *args)

    error_type.__init__ = reading_init
    forget_tokens_of(_has_surfaced_before)


def _read(error: BaseException, text: str) -> str:
    """Count that JAX raises the failure that `text` is marked with; remove the marker.

    Raises:
        KeyboardInterrupt: the failure is one, and takes the place of JAX's error.
    """
    failure = failures.marked(text)
    if failure is not None:
        _failure_of[error] = failure
        interrupt = failure.surface()
        if interrupt is not None:
            raise interrupt
    return without_marker(text)


def _has_surfaced_before(error: BaseException) -> bool:
    failure = _failure_behind(error)
    return failure is not None and failure.surfaced > 1
