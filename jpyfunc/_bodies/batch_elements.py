"""Run a body for every element of a batch: by branch, or one by one.

By branch or one by one? A run by branch costs about as much as the runs of a few elements,
however many it is of, because Python executes once and each operation is dispatched once.
So a batch runs by branch, unless

- that is impossible: the body has an effect, calls Python through JAX, or has an operation
  that cannot be batched. The first run by branch finds out;
- that would be wrong: numbers drawn from the global generator of Python or NumPy would be
  the same for all elements. Nothing tells while the body runs, so the states of the
  generators are compared afterwards, and all results dropped if they differ;
- JAX is to check each result for NaN, where a padded or joint array may not have one to
  show, or a body is transposed, which runs it on abstract values;
- it is no faster: elements have so many bytes that their operations take longer than
  Python does, or so many paths that there are fewer than two elements to one.

But for the draws, results are the same either way. So a batch may change over in the
middle: the elements that are done stay done, and the others run one by one.

Derivatives at tapes have less choice. A tape that was made by branch is of a subset, and
serves only runs by branch of elements of that subset. So these derivatives run by branch,
whatever their sizes and however many paths there are, and begin with a subset for each
tape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jpyfunc._bodies.batch_columns import (
    BatchLayout,
    OperandColumn,
    ResultColumn,
    TicketColumn,
)
from jpyfunc._bodies.batch_refusals import Scope, remember_refusal, remembered_refusal
from jpyfunc._bodies.body import zeros
from jpyfunc._bodies.linear import Transpose
from jpyfunc._bodies.random_draws import drawn_since, generator_states
from jpyfunc._bodies.steps import Steps, WorkerRun
from jpyfunc._bodies.user_function import UserFunction
from jpyfunc._errors import see
from jpyfunc._frames import warn_at_function
from jpyfunc._interpreters.by_branch import (
    ElementNames,
    Refusal,
    run_alone,
    run_by_branch,
)
from jpyfunc._interpreters.subset import Subset
from jpyfunc._limits import MAX_BATCH_BYTES, MAX_ELEMENT_BYTES
from jpyfunc._runtime.configuration import is_debugging
from jpyfunc._runtime.context import Context, current
from jpyfunc._runtime.progress import counted
from jpyfunc._runtime.tape_cache import tapes
from jpyfunc._runtime.tickets import (
    elements_of,
    is_void,
    rows_by_tape,
    tickets_of_run,
)
from jpyfunc._types import Array, Avals


def evaluate_batch(
    layout: BatchLayout,
    out_avals: Avals,
    by_branch: bool,
    context: Context,
    operands: Sequence[Array],
) -> list[Array]:
    """Compute the results of a batch.

    Args:
        layout: of the batch.
        out_avals: of its results.
        by_branch: whether it may run by branch.
        context: the current one.
        operands: of all elements.
    """
    if not layout.count:
        return [*zeros(out_avals)]
    if any(isinstance(x, Tracer) for x in operands):
        return _evaluate_traced(layout, operands)
    elements = BatchElements(layout, operands, context)
    with _counted(layout, elements.count_done):
        if by_branch and layout.count > 1 and not isinstance(layout.base, Transpose):
            elements.run_by_branch()
        else:
            elements.run_each(np.arange(layout.count))
    return [
        result.array.reshape(aval.shape).astype(aval.dtype, copy=False)
        for result, aval in zip(elements.results, out_avals, strict=True)
    ]


def _counted(
    layout: BatchLayout, done: Callable[[], float]
) -> AbstractContextManager[object]:
    """A block in which a batch runs, and `progress` shows it."""
    base = layout.base
    return counted(base.title, base.function.callable, layout.count, done)


def _run_base(layout: BatchLayout, operands: Sequence[Array]) -> list[Array]:
    """Run the body of one element on one, or on the subset that runs by branch."""
    return layout.base.run(current(), operands)  # the context says which


def _evaluate_traced(layout: BatchLayout, operands: Sequence[Array]) -> list[Array]:
    """Compute a batch inside a body that is differentiated, or runs by branch itself.

    Elements are sliced and stacked with operations of JAX, which the trace of that body
    sees.
    """
    columns = [
        (jnp.reshape(x, (places[-1] + 1, *aval.shape)), places)
        for x, aval, places in zip(
            operands,
            layout.base.in_avals,
            map(layout.places, layout.stacked_in),
            strict=True,
        )
    ]
    elements: list[list[Array]] = []
    with _counted(layout, lambda: len(elements)):
        for i in range(layout.count):
            operands = [column[int(places[i])] for column, places in columns]
            elements.append(_run_base(layout, operands))
    results = []
    for values, stacked, aval in zip(
        zip(*elements, strict=True), layout.stacked_out, layout.base.out_avals, strict=True
    ):
        array = jnp.stack(values).reshape(*layout.sizes, *aval.shape)
        summed = [i for i, has in enumerate(stacked) if not has]
        results.append(jnp.asarray(array.sum(summed) if summed else array, aval.dtype))
    return results


class BatchElements:
    """The elements of a batch, with the results of those that have run.

    Attributes:
        layout: of the batch.
        columns: the operands.
        results: the results.
        is_done: for each element, whether it is in `results`; none may be added to a sum
            twice.
    """

    def __init__(
        self, layout: BatchLayout, operands: Sequence[Array], context: Context
    ) -> None:
        self.layout = layout
        self._context = context
        self._run: WorkerRun | None = None  # on an executor
        base = layout.base
        ticket = base.ticket_index
        device = None if base.function.is_host_function else context.device
        self.columns = [
            (TicketColumn if i == ticket else OperandColumn)(
                x, layout.places(stacked), aval, device
            )
            for i, (x, stacked, aval) in enumerate(
                zip(operands, layout.stacked_in, base.in_avals, strict=True)
            )
        ]
        self._function = functools.partial(_run_base, layout)
        self._names = ElementNames(base.function.label, layout.sizes)
        self._follows_tapes = ticket is not None
        self._drop_results()

    def _drop_results(self) -> None:
        """Drop all results."""
        layout = self.layout
        self.is_done = np.zeros(layout.count, bool)
        self.results = [
            ResultColumn(aval, layout.places(stacked), all(stacked))
            for stacked, aval in zip(layout.stacked_out, layout.base.out_avals, strict=True)
        ]

    def count_done(self) -> float:
        """The number of elements that are done, or would be but for those before them."""
        run = self._run
        return int(np.count_nonzero(self.is_done)) if run is None else run.count_done()

    def run_each(self, elements: np.ndarray) -> None:
        """Run those of some elements that are not done, one by one or on an executor."""
        waiting = elements[~self.is_done[elements]].tolist()
        function = self.layout.base.function
        workers = function.workers_apart
        if workers is not None:
            self._run = WorkerRun(function, workers, self._add, self._names.add_note)
            self._run.run((i, self._steps(i)) for i in waiting)
            return
        for i in waiting:
            self._add(i, run_alone(self._function, self.columns, i, self._names))

    def _steps(self, i: int) -> Steps[list[Array]]:
        """The computation of one element of a host function."""
        self._context.count(elements=1)
        operands = [column.element(i) for column in self.columns]
        return self.layout.base.steps(self._context, operands)

    def _add(self, i: int, values: Sequence[Array]) -> None:
        """Add the results of one element, which is done."""
        arrays = [np.asarray(value) for value in values]
        for result, array in zip(self.results, arrays, strict=True):
            result.add(i, array)
        self.is_done[i] = True

    def run_by_branch(self) -> None:
        """Run all elements, by branch unless there is a reason against it."""
        context = self._context
        if why := self._reason_against():
            context.count(one_by_one=why)
            self.run_each(np.arange(self.layout.count))
            return
        subsets = [*self._subsets()]
        if not subsets:
            return
        before, counted = generator_states(), context.counted_elements()
        refusal = self._attempt(subsets)
        drawn = drawn_since(before)
        if drawn:
            refusal = Refusal(f"numbers are drawn from {drawn}")
            self._drop_results()
            context.recount_elements(counted)
            before = generator_states()
        if refusal is None:
            return
        context.count(one_by_one=refusal.why)
        # An exception here is the user's own, which an attempt by branch has hidden, and no
        # reason to run one by one from now on.
        self.run_each(np.sort(np.concatenate([subset.elements for subset in subsets])))
        if not drawn:
            scope = Scope.SIZE if refusal.is_of_paths else Scope.SIGNATURE
            remember_refusal(self.layout, scope, refusal.why)
        elif drawn_since(before):  # or else another thread drew
            remember_refusal(self.layout, Scope.FUNCTION, refusal.why)
            _warn_of_draws(self.layout.base.function, drawn)

    def _attempt(self, subsets: Sequence[Subset]) -> Refusal | None:
        """Run subsets by branch.

        Returns:
            None, or why the elements that are not done are to run one by one.
        """
        count = self.layout.count
        max_paths = count if self._follows_tapes else count // 2
        context = self._context
        counted = context.counted_elements()

        def collect(elements: np.ndarray, results: list[np.ndarray]) -> None:
            nonlocal counted
            if self.layout.base.has_tape:
                # The ticket of the run, which all elements share, and their numbers in it.
                results[-1] = tickets_of_run(results[-1][0], len(elements))
            for column, values in zip(self.results, results, strict=True):
                column.add_rows(elements, values)
            self.is_done[elements] = True
            context.count(elements=len(elements) - 1)
            counted = context.counted_elements()

        refusal = run_by_branch(
            self._function, self.columns, subsets, self._names, max_paths, collect
        )
        if refusal:
            context.recount_elements(counted)
        return refusal

    def _reason_against(self) -> str:
        """A reason not to try by branch; empty if there is none."""
        nbytes = self._bytes_per_element
        if not self._follows_tapes and nbytes > MAX_ELEMENT_BYTES:
            return f"elements of {nbytes:,} bytes"
        if is_debugging():
            return "JAX looks for NaN or infinity in each result"
        return remembered_refusal(self.layout)

    @functools.cached_property
    def _array_bytes(self) -> list[int]:
        """Bytes of one element in each array that is not shared, results included."""
        return [
            *(column.nbytes for column in self.columns),
            *(
                math.prod(aval.shape) * aval.dtype.itemsize
                for aval in self.layout.base.out_avals
            ),
        ]

    @property
    def _bytes_per_element(self) -> int:
        return sum(self._array_bytes)

    def _subsets(self) -> Iterator[Subset]:
        """The subsets to begin with, whose operands and results take a bounded memory."""
        size = max(1, MAX_BATCH_BYTES // max(1, self._bytes_per_element))
        for root in self._roots():
            count = len(root.elements)
            if count <= size:
                yield root
            else:
                for i in range(0, count, size):
                    yield root.take(np.arange(i, min(i + size, count)))

    def _roots(self) -> Iterator[Subset]:
        """The elements that can begin together: at one tape, or at none."""
        nbytes = max(self._array_bytes, default=0)
        every = np.arange(self.layout.count)
        base = self.layout.base
        ticket, in_avals = base.ticket_index, base.function.in_avals
        if ticket is None:
            yield Subset(every, None, every, nbytes)
            return
        tickets = self.columns[ticket].rows(every)
        evicted = []
        for elements in rows_by_tape(tickets):
            first = tickets[elements[0]]
            if is_void(first):  # no branch ran: results stay zero
                continue
            is_cached, subset = tapes.subset_of(first, in_avals)
            if not is_cached:
                evicted.append(elements)
                continue
            index = elements_of(tickets[elements])
            yield Subset(
                elements, subset, index, max(nbytes, subset.nbytes if subset else 0)
            )
        if evicted:
            elements = np.concatenate(evicted)
            yield Subset(elements, None, elements, nbytes)


def _warn_of_draws(function: UserFunction, generator: str) -> None:
    warn_at_function(
        function.callable,
        f"{function.label} ran under vmap on many elements at once and drew numbers from "
        f"{generator}, so all elements would have had the same. It runs once for each "
        "element instead, now and from now on. If draws are to differ, say so with "
        "stateful=True, or draw with jax.random and a key for each element."
        + see("Random draws in a batch"),
        UserWarning,
    )
