"""Computations of host functions, in steps between the calls of the user's functions.

What a host function computes is a generator: it yields the calls of the user's function, or
of its rules, that come next, is sent their results, and returns its own. Whoever drives it
decides where the calls run: here, or on an executor, where the calls of all elements of a
batch run side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from typing import Any, TypeAlias, TypeVar

from jpyfunc._bodies.user_function import UserFunction
from jpyfunc._errors import add_inner_jit_remedy
from jpyfunc._executors.tasks import Raised, UserCall
from jpyfunc._executors.workers import CallsInFlight, Workers
from jpyfunc._runtime.progress import counted

Result = TypeVar("Result")
Steps: TypeAlias = Generator[list[UserCall], list[Any], Result]


def run_here(steps: Steps[list[Any]]) -> list[Any]:
    """Run a computation, with all calls on this thread."""
    try:
        calls = next(steps)
        while True:
            calls = steps.send([func(*args, **kwargs) for func, args, kwargs in calls])
    except StopIteration as stop:
        return stop.value


def together(all_steps: Iterable[Steps[Result]]) -> Steps[list[Result]]:
    """Run several computations as one, with their calls side by side."""
    results: dict[int, Result] = {}
    running: dict[int, tuple[Steps[Result], list[UserCall]]] = {}

    def advance(number: int, steps: Steps[Result], answers: Any) -> None:
        try:
            running[number] = steps, steps.send(answers)
        except StopIteration as stop:
            results[number] = stop.value
            running.pop(number, None)

    for number, steps in enumerate(all_steps):
        advance(number, steps, None)
    while running:
        answers = iter((yield [call for _, calls in running.values() for call in calls]))
        for number, (steps, calls) in [*running.items()]:
            advance(number, steps, [*islice(answers, len(calls))])
    return [results[number] for number in sorted(results)]


def run_on_workers(
    title: str, function: UserFunction, workers: Workers, steps: Steps[Result]
) -> Result:
    """Run a computation, with all calls of a function on an executor.

    Args:
        title: what `progress` calls it, if the function takes whole batches.
        function: whose calls it makes.
        workers: where these run.
        steps: the computation.
    """
    results: list[Result] = []
    run = WorkerRun(
        function, workers, lambda _, result: results.append(result), lambda *_: None
    )
    if function.batch_shape:
        count = math.prod(function.batch_shape)
        with counted(title, function.callable, count, lambda: count * run.count_done()):
            run.run([(0, steps)])
    else:
        run.run([(0, steps)])
    return results[0]


# An element of a batch, with its computation, and the calls that this waits for.
Waiting: TypeAlias = tuple[int, Steps[Any], list[UserCall]]


class WorkerRun:
    """Computations on an executor, one for each element of a batch, or a single one.

    The calls of all elements are submitted before the first is waited for. Where some need
    further calls, depending on the results, these are submitted once all have been waited
    for.

    Args:
        function: whose calls they make.
        workers: where these run.
        store: takes an element and its results, in the order of the elements.
        note: takes an exception, and the element that raised it in a list.
    """

    def __init__(
        self,
        function: UserFunction,
        workers: Workers,
        store: Callable[[int, Any], None],
        note: Callable[[BaseException, list[int]], None],
    ) -> None:
        self._function, self._workers = function, workers
        self._store, self._note = store, note
        self._failure: BaseException | None = None
        self._without_call = 0  # elements that wait for no call now
        self._calls_each = 1
        self._in_flight: CallsInFlight | None = None

    def run(self, elements: Iterable[tuple[int, Steps[Any]]]) -> None:
        """Run the computations of some elements.

        Raises:
            BaseException: what the first element, in their order, raised.
        """
        waiting = self._run_calls(self._begun(elements))
        while waiting:
            waiting = self._run_calls(waiting)
        if self._failure is not None:
            raise self._failure

    def _begun(self, elements: Iterable[tuple[int, Steps[Any]]]) -> Iterator[Waiting]:
        """The elements at their first calls, up to one that fails before."""
        for i, steps in elements:
            calls = self._advanced(i, steps, None)
            if self._failure is not None:
                return
            if calls is not None:
                yield i, steps, calls

    def _run_calls(self, waiting: Iterable[Waiting]) -> list[Waiting]:
        """Run the calls that elements wait for, and take the elements on.

        Returns:
            Those that wait for further calls. What is behind an element that has failed is
            left out: nobody will see what becomes of it. Those before it go on, because
            they may fail, too.
        """
        # Three lists: of tuples, Python's garbage collector would visit each.
        numbers: list[int] = []
        computations: list[Steps[Any]] = []
        counts: list[int] = []
        further: list[Waiting] = []

        def all_calls() -> Iterator[UserCall]:
            for i, steps, calls in waiting:
                numbers.append(i)
                computations.append(steps)
                counts.append(len(calls))
                self._calls_each = len(calls)
                yield from calls

        # A call on a block of a batch is a task by itself.
        chunksize = 1 if self._function.batch_shape else self._workers.chunksize
        label = self._function.label
        executor = self._workers.executor
        self._in_flight = CallsInFlight(executor, all_calls(), chunksize, label)
        with self._in_flight as in_flight:
            results, failure = in_flight.results(), self._failure
            for i, steps, count in zip(numbers, computations, counts, strict=True):
                answers = [*islice(results, count)]
                if answers and isinstance(answers[-1], Raised):
                    self._fail(i, answers[-1].error)
                    break
                more = self._advanced(i, steps, answers)
                if self._failure is not failure:
                    break
                if more is not None:
                    further.append((i, steps, more))
        if further:
            self._without_call += len(numbers) - len(further)
        return further

    def count_done(self) -> float:
        """The number of elements whose calls are done, in whatever order.

        Any thread may ask. Where elements turn out to need further calls, it falls.
        """
        in_flight = self._in_flight
        done = in_flight.count_done() / self._calls_each if in_flight else 0
        return self._without_call + done

    def _advanced(self, i: int, steps: Steps[Any], answers: Any) -> list[UserCall] | None:
        """Take an element to its next calls; None if it is done, or has failed."""
        try:
            return steps.send(answers)
        except StopIteration as stop:
            self._without_call += answers is None
            self._store(i, stop.value)
        except Exception as error:  # noqa: BLE001 - raised once those before are done
            self._fail(i, error)
        return None

    def _fail(self, i: int, error: BaseException) -> None:
        add_inner_jit_remedy(error, self._function.label)
        self._note(error, [i])
        self._failure = error
