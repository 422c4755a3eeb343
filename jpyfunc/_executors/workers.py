"""The workers that host functions run on, and the calls that are in flight there."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

from jpyfunc._errors import see
from jpyfunc._executors.explanations import explained, explained_failure
from jpyfunc._executors.stalls import Stall, threads_of
from jpyfunc._executors.tasks import Outcome, Raised, Surroundings, Task, UserCall
from jpyfunc._frames import user_frame, warn_at
from jpyfunc._hashable import ById
from jpyfunc._runtime.context import current
from jpyfunc._runtime.nesting import executors_around, is_inside
from jpyfunc._runtime.running_bodies import waiting_for_others


@dataclasses.dataclass(frozen=True, slots=True)
class Workers:
    """An executor that the calls of a host function run on.

    Attributes:
        owner: a `concurrent.futures.Executor`, or what has a `submit` like one.
        chunksize: how many elements of a batch make a task.
    """

    owner: ById
    chunksize: int

    @property
    def executor(self) -> Executor:
        return self.owner.value

    @property
    def are_around(self) -> bool:
        """Whether this thread is one of them, or works for one, and must not wait."""
        executor = self.executor
        return is_inside(executor) or threading.get_ident() in threads_of(executor)

    def call(self, call: UserCall, label: str) -> Any:
        """Run one call, and return its result, or raise what it raised."""
        with CallsInFlight(self.executor, [call], 1, label) as in_flight:
            result = next(in_flight.results())
        if isinstance(result, Raised):
            raise result.error
        return result


class CallsInFlight:
    """Calls that are submitted: a block, at whose end what has not begun is cancelled.

    Args:
        executor: what they are submitted to.
        calls: to run.
        chunksize: how many of them make a task.
        label: what errors call the function.
    """

    def __init__(
        self, executor: Executor, calls: Iterable[UserCall], chunksize: int, label: str
    ) -> None:
        self._executor, self._label = executor, label
        self._unsent = self._chunks(calls, chunksize)
        # Two queues: of tuples, Python's garbage collector would visit each.
        self._tasks: deque[Task] = deque()
        self._futures: deque[Future[Outcome]] = deque()
        self._taken = 0  # calls whose results have been waited for
        self._waiting = waiting_for_others()

    def __enter__(self) -> CallsInFlight:
        self._waiting.__enter__()
        try:
            self._submit_some()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        for future in self._futures:
            future.cancel()
        self._waiting.__exit__(None, None, None)

    def _chunks(self, calls: Iterable[UserCall], chunksize: int) -> Iterator[Task]:
        surroundings = Surroundings.of_task_for(self._executor)
        function: Any = None
        chunk: list[Any] = []
        for called, args, kwargs in calls:
            if chunk and (len(chunk) == chunksize or called is not function):
                yield Task(function, chunk, surroundings)
                chunk = []
            function = called
            chunk.append((args, kwargs))
        if chunk:
            yield Task(function, chunk, surroundings)

    def _submit_some(self) -> None:
        """Submit tasks up to the last, or until the first of all is done.

        The results of quick tasks are taken while others are submitted. So there are few
        objects at a time, and Python's garbage collector need not visit all of JAX's:
        10,000 tasks of nothing take half the time.
        """
        for task in self._unsent:
            try:
                self._futures.append(self._executor.submit(task))
            except Exception as error:
                raise explained(error, task, self._executor, self._label) from error
            self._tasks.append(task)
            if len(self._tasks) > 1 and self._futures[0].done():
                return

    def results(self) -> Iterator[Any]:
        """The results, in the order of the calls; after a `Raised` there are no more."""
        context, stall = current(), Stall(self._executor)
        while self._tasks:
            task, future = self._tasks[0], self._futures[0]
            begin = time.perf_counter()
            try:
                outcome = stall.outcome_of(task, future)
            except Exception as error:
                raise explained(error, task, self._executor, self._label) from error
            waited = time.perf_counter() - begin
            self._tasks.popleft()
            self._futures.popleft()
            self._submit_some()
            self._taken += len(outcome.results)
            # `measured` takes the time in the body for a part of the whole.
            context.count(
                body_seconds=outcome.seconds,
                wait_seconds=waited,
                overhead_seconds=outcome.seconds - waited,
            )
            yield from outcome.results
            if outcome.failure is not None:
                yield Raised(explained_failure(outcome.failure, self._label))
                return

    def count_done(self) -> int:
        """The number of calls that are done, in whatever order; any thread may ask."""
        return self._taken + sum(
            len(future.result().results)
            for future in [*self._futures]
            if future.done() and not future.cancelled() and not future.exception()
        )


def check_executor(
    kind: str, label: str, executor: Any, chunksize: object
) -> Workers | None:
    """Check the options of a function that say where it runs.

    Raises:
        TypeError: `executor` is none, or the function cannot have one.
        ValueError: `chunksize` is no number of elements.
    """
    if isinstance(chunksize, bool) or not isinstance(chunksize, int) or chunksize < 1:
        raise ValueError(
            f"{label}: expected chunksize to be the number of elements of a task, 1 or "
            f"more, got {chunksize!r}; write chunksize=10, for example."
            + see("Options of executors")
        )
    if executor is None:
        return None
    if kind == "py_func":
        raise TypeError(
            f"{label}: a py_func has no executor, because its operations are recorded in "
            "this process, for its derivatives. Write numpy_func(func, Tout=..., "
            "executor=...), with defvjp or defjvp if it needs a derivative."
            + see("Options of executors")
        )
    remedy = "concurrent.futures.ThreadPoolExecutor(8), for example"
    if hasattr(executor, "get_executor"):
        remedy = "client.get_executor()"  # the `submit` of a client of Dask's is another
    elif not isinstance(executor, type) and callable(getattr(executor, "submit", None)):
        executors_around.prepare()
        _warn_of_fork(label, executor)
        return Workers(ById(executor), chunksize)
    raise TypeError(
        f"{label}: expected executor to be one like those of concurrent.futures, got "
        f"{executor!r}; write executor={remedy}." + see("Options of executors")
    )


def _warn_of_fork(label: str, executor: object) -> None:
    """Warn of a pool whose processes are forks of this one."""
    context = getattr(executor, "__dict__", {}).get("_mp_context")
    if context is not None and context.get_start_method() == "fork":
        warn_at(
            user_frame(),
            f"{label}: the processes of its executor are forks of this one, which has "
            "threads of JAX's: a fork may hang on a lock that one of them held. Write "
            "ProcessPoolExecutor(n, mp_context=multiprocessing.get_context('spawn'))."
            + see("A process pool that forks"),
            UserWarning,
        )
