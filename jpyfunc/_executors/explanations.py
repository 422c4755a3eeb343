"""Why an executor did not run a function, and what to write instead."""

from __future__ import annotations

import pickle
import sys
from concurrent.futures import BrokenExecutor, CancelledError
from typing import Any

from jpyfunc._errors import ExecutorError, see
from jpyfunc._executors.references import reference_to
from jpyfunc._executors.tasks import (
    Failure,
    NotLoaded,
    NotPickled,
    Raised,
    Task,
    why_not_pickled,
)


class RemoteTraceback(Exception):  # noqa: N818 - a text, raised by nobody
    """The traceback of an exception in another process, as its cause."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return f'\n"""\n{self._text}"""'


def explained_failure(failure: Failure, label: str) -> BaseException:
    """The exception to raise for the failure of a task."""
    if isinstance(failure, Raised):
        return failure.error
    if isinstance(failure, NotPickled):
        return ExecutorError(
            f"{label}: what it returned cannot be pickled by a worker of the executor "
            f"({failure.why}). Return arrays, and as residuals what can be pickled; or use "
            "threads." + see("What it returned cannot be pickled")
        )
    if isinstance(failure, NotLoaded):
        return ExecutorError(
            f"{label}: a worker of the executor cannot import the function, "
            f"{failure.name} ({failure.why}). Define it in a module that the workers have, "
            "too; or use loky or dask, which take what is defined in a notebook, or in a "
            "module of cloudpickle.register_pickle_by_value(module), by value."
            + see("A worker that cannot import the function")
        )
    error: BaseException | None = None
    if failure.pickled is not None:
        try:
            error = pickle.loads(failure.pickled)
        except Exception:  # noqa: BLE001 - a class that only the worker has
            error = None
    if error is None:
        last = failure.text.rstrip().rpartition("\n")[2]
        error = ExecutorError(
            f"{label}: it raised an exception in a worker of the executor that cannot be "
            f"pickled, so here is its text alone: {last}. Raise one whose class is "
            "defined in a module, and takes the arguments that it passes to Exception."
            + see("What it returned cannot be pickled")
        )
    error.__cause__ = RemoteTraceback(failure.text)
    return error


def explained(error: Exception, task: Task, executor: object, label: str) -> ExecutorError:
    """The error to raise where an executor raised `error` about a task."""
    kind = type(executor).__name__
    got = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(": .")
    if isinstance(error, BrokenExecutor):
        return ExecutorError(
            f"{label}: a worker of the {kind} has died ({got}). It has crashed, or run out "
            "of memory; or the script that it imports as it starts has no if __name__ == "
            "'__main__': around what it runs. The executor is of no use any more: make "
            "another one, and wrap the function with it." + see("A worker that died")
        )
    if isinstance(error, CancelledError) or (
        isinstance(error, RuntimeError) and "shut" in str(error)
    ):
        return ExecutorError(
            f"{label}: the {kind} that it runs on has been shut down ({got}). Shut an "
            "executor down after the last program that needs it is done, or wrap the "
            "function with another one." + see("An executor that does not take tasks")
        )
    if why := _why_not_pickled(task.function, executor):
        return ExecutorError(
            f"{label}: the function cannot be pickled for the workers of the {kind} "
            f"({why}). Define it, and its derivative rules, in a module, by def; or use an "
            "executor that takes functions by value, such as "
            "loky.get_reusable_executor(), or threads."
            + see("A function that cannot be pickled")
        )
    if why := _why_not_pickled(task.calls, executor):
        return ExecutorError(
            f"{label}: an argument cannot be pickled for the workers of the {kind} "
            f"({why}). Pass arrays, and of a PRNG key jax.random.key_data(key); or use "
            "threads." + see("A function that cannot be pickled")
        )
    return ExecutorError(
        f"{label}: the {kind} did not run it ({got})."
        + see("An executor that does not take tasks")
    )


def _why_not_pickled(value: Any, executor: object) -> str:
    """Why a value cannot be pickled as an executor does it; empty if it can."""
    if isinstance(value, type(reference_to)):
        value = reference_to(value)
    is_of_python = type(executor).__module__.startswith("concurrent.")
    by_value = None if is_of_python else sys.modules.get("cloudpickle")
    return why_not_pickled(value, [by_value or pickle])
