"""A task: what a worker of an executor runs.

In this process, on a thread, it runs as the host call would have run it: on the same
device, under the same configuration. In another process, it is unpickled, and there it has
the configuration alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jax.extend.core import set_current_trace

from jpyfunc import _compat
from jpyfunc._executors.references import NamedFunction, reference_to
from jpyfunc._interpreters.on_device import OnDeviceTrace
from jpyfunc._runtime.configuration import Config, current_config, enter_config, inside
from jpyfunc._runtime.context import Context, entered
from jpyfunc._runtime.nesting import ANY, executors_around
from jpyfunc._runtime.running_bodies import running_body

# A call of the user's function, or of one of its rules: positional arguments, then those by
# name. A class would take 0.3 us longer to make, for each element of a batch.
UserCall: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
Arguments: TypeAlias = Sequence[tuple[tuple[Any, ...], dict[str, Any]]]

_numbers = itertools.count()


class Raised(NamedTuple):
    """An exception of a call, in the place of its result."""

    error: BaseException


class RaisedElsewhere(NamedTuple):
    """An exception of a call in another process.

    Attributes:
        pickled: the exception; None if it cannot be pickled.
        text: its traceback.
    """

    pickled: bytes | None
    text: str


class NotLoaded(NamedTuple):
    """A function that a worker cannot import.

    Attributes:
        name: of the function.
        why: the worker's error.
    """

    name: str
    why: str


class NotPickled(NamedTuple):
    """A result that a worker cannot send.

    Attributes:
        why: the worker's error.
    """

    why: str


Failure: TypeAlias = Raised | RaisedElsewhere | NotLoaded | NotPickled


class Outcome(NamedTuple):
    """The outcome of a task.

    Attributes:
        results: of the calls, up to the first that raised.
        seconds: that the calls took.
        failure: what ended the task early, if anything did.
    """

    results: list[Any]
    seconds: float
    failure: Failure | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Surroundings:
    """The surroundings of a task, which are those of the host call that waits for it.

    Attributes:
        config: the configuration inside the task.
        context: of the run, which says nothing but the default device.
        is_on_device: whether all arrays are to be on it.
    """

    config: Config
    context: Context
    is_on_device: bool

    @staticmethod
    def of_task_for(executor: object) -> Surroundings:
        """Take the surroundings of this thread, for a task of an executor."""
        return Surroundings(
            inside(current_config(), id(executor)),
            Context(_compat.default_device.value),
            isinstance(_compat.current_trace(), OnDeviceTrace),
        )


class Task:
    """Calls of one function, one after the other, on a thread of this process.

    Attributes:
        function: what to call.
        calls: its arguments, positional and by name; none once it has run.
    """

    __slots__ = ("_surroundings", "calls", "function")

    def __init__(
        self, function: Callable[..., Any], calls: Arguments, surroundings: Surroundings
    ) -> None:
        self.function, self.calls = function, calls
        self._surroundings = surroundings

    def __call__(self) -> Outcome:
        context = self._surroundings.context
        device: Any = context.device
        config = enter_config(self._surroundings.config, device)
        # What waits for the task still has it, but not its operands.
        calls, self.calls = self.calls, ()
        with running_body(), entered(context), config:
            if not self._surroundings.is_on_device:
                return _run(self.function, calls)
            with set_current_trace(OnDeviceTrace(device)):
                return _run(self.function, calls)

    def __reduce__(self) -> tuple[Any, ...]:
        config = inside(self._surroundings.config, ANY)
        return RemoteTask, (reference_to(self.function), self.calls, config)

    def __dask_tokenize__(self) -> str:
        # Dask runs equal tasks once, and hashes all arrays to find that they are equal. A
        # stateful function is to run once for each element.
        return f"jpyfunc-{os.getpid()}-{time.time_ns()}-{next(_numbers)}"


@dataclasses.dataclass(frozen=True, slots=True)
class RemoteTask:
    """A `Task` in another process."""

    function: NamedFunction | Callable[..., Any]
    calls: Arguments
    config: Config

    def __call__(self) -> Outcome:
        function = self.function
        if isinstance(function, NamedFunction):
            try:
                function = function.load()
            except Exception as error:  # noqa: BLE001 - from a user's module
                why = f"{type(error).__name__}: {error}"
                return Outcome([], 0.0, NotLoaded(str(self.function), why))
        executors_around.prepare()
        with enter_config(self.config, _compat.default_device.value):
            outcome = _run(function, self.calls)
        if isinstance(outcome.failure, Raised):
            failure = _pickled(outcome.failure.error)
            return Outcome(outcome.results, outcome.seconds, failure)
        for number, result in enumerate(outcome.results):
            # Some executors would not say, and never give a result.
            if not _is_plain(result) and (why := why_not_pickled(result, _picklers())):
                good = outcome.results[:number]
                return Outcome(good, outcome.seconds, NotPickled(why))
        return outcome


def _run(function: Callable[..., Any], calls: Arguments) -> Outcome:
    results: list[Any] = []
    failure = None
    begin = time.perf_counter()
    try:
        for args, kwargs in calls:
            results.append(function(*args, **kwargs))
    except BaseException as error:  # noqa: BLE001 - it is raised where the call waits
        failure = Raised(error)
    return Outcome(results, time.perf_counter() - begin, failure)


def _pickled(error: BaseException) -> RaisedElsewhere:
    """An exception with its traceback, for the process that waits.

    One that cannot be loaded again would break a pool of processes, so it is tried here.
    """
    # The first frame is that of `_run`.
    place = error.__traceback__ and error.__traceback__.tb_next
    text = "".join(traceback.format_exception(type(error), error, place))
    for pickler in _picklers():
        with contextlib.suppress(Exception):  # from a user's class
            pickled = pickler.dumps(error)
            pickle.loads(pickled)
            return RaisedElsewhere(pickled, text)
    return RaisedElsewhere(None, text)


def why_not_pickled(value: Any, picklers: Sequence[Any]) -> str:
    """Why a value cannot be pickled by any of some modules; empty if it can."""
    why = ""
    for pickler in picklers:
        try:
            pickler.dumps(value)
        except Exception as error:  # noqa: BLE001 - from a user's class
            why = f"{type(error).__name__}: {error}"
        else:
            return ""
    return why


def _is_plain(value: Any) -> bool:
    """Whether a value is made of arrays and numbers alone, which can be pickled."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values())) and all(map(_is_plain, value))
    if type(value) is np.ndarray:
        return value.dtype != object
    return value is None or isinstance(
        value, bool | int | float | complex | str | np.number
    )


def _picklers() -> list[Any]:
    """`pickle`, and `cloudpickle` where the executor uses it: it takes more by value."""
    return [sys.modules[n] for n in ("pickle", "cloudpickle") if n in sys.modules]
