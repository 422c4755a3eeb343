"""Runs a body for every element of a batch: one by one, or once per branch taken."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray, Tracer

from jpyfunc import _compat
from jpyfunc._bodies import tape_cache
from jpyfunc._bodies.derivatives import call
from jpyfunc._bodies.derived import Batch, Transpose, WithTape, recorded_of, ticket_of
from jpyfunc._bodies.profile import title_of
from jpyfunc._bodies.random_draws import drawn_since, generators
from jpyfunc._errors import warn_at_function
from jpyfunc._hashable import unwrapped
from jpyfunc._interpreters.batch_tracer import BatchTracer, CannotBatch
from jpyfunc._interpreters.by_branch import ByBranchTrace, number_of
from jpyfunc._interpreters.operation_cache import LruCache
from jpyfunc._interpreters.operations import first_line
from jpyfunc._interpreters.subset import Subset
from jpyfunc._limits import (
    MAX_BATCH_BYTES,
    MAX_ELEMENT_BYTES,
    REFUSAL_CACHE_SIZE,
)
from jpyfunc._runtime.configuration import is_debugging
from jpyfunc._runtime.context import Context, current
from jpyfunc._runtime.transfers import put


def evaluate_batch(batch: Batch, operands: Sequence[Any], context: Context) -> list[Any]:
    """As `evaluate`, of a batch."""
    elements = BatchElements(batch, context)
    if not elements.count:
        return [np.zeros(aval.shape, aval.dtype) for aval in batch.out_avals]
    if any(isinstance(x, Tracer) for x in operands):
        return elements.traced(operands)
    elements.take(operands)
    if batch.by_branch and elements.count > 1 and not isinstance(elements.base, Transpose):
        _by_branch(elements)
    else:
        elements.run_each(np.arange(elements.count))
    return [
        result.array.reshape(aval.shape).astype(aval.dtype, copy=False)
        for result, aval in zip(elements.results, batch.out_avals, strict=True)
    ]


class BatchElements:
    """The elements of a batch, or of batches of batches as if they were one.

    Attributes:
        base: what runs on each.
        sizes: of the batch axes, outermost first.
        count: of the elements.
        columns: the operands.
        results: what the elements left so far.
        is_done: of each element, whether it did; nothing is added to a sum twice.
    """

    def __init__(self, batch: Batch, context: Context) -> None:
        levels: list[Any] = [batch]
        while isinstance(levels[-1].base, Batch):
            levels.append(levels[-1].base)
        self.base = levels[-1].base
        self.sizes = tuple(level.size for level in levels)
        self.count = math.prod(self.sizes)
        self._device = context.device
        self._stacked_in = [*zip(*(level.stacked_in for level in levels), strict=True)]
        self._stacked_out = [*zip(*(level.stacked_out for level in levels), strict=True)]

    def take(self, operands: Sequence[Any]) -> None:
        """Set `columns`, and `results` as `restart` does."""
        base = self.base
        device = None if base.primal.numpy else self._device
        self.columns = [
            OperandColumn(x, self._places(stacked), aval, device)
            for x, stacked, aval in zip(
                operands, self._stacked_in, base.in_avals, strict=True
            )
        ]
        self.restart()

    def restart(self) -> None:
        """Forget what the elements left."""
        self.is_done = np.zeros(self.count, bool)
        self.results = [
            ResultColumn(aval, self._places(stacked), all(stacked))
            for stacked, aval in zip(self._stacked_out, self.base.out_avals, strict=True)
        ]

    def _places(self, stacked: Sequence[bool]) -> np.ndarray:
        """Where each element is in an array that has some axes, these made one."""
        numbers = np.arange(self.count)
        if all(stacked):
            return numbers
        places = np.zeros_like(numbers)
        indices = np.unravel_index(numbers, self.sizes)
        for size, index, has in zip(self.sizes, indices, stacked, strict=True):
            places = places * size + index if has else places
        return places

    @property
    def nbytes(self) -> int:
        """What each element has for itself, results included."""
        avals = self.base.out_avals
        return sum(column.nbytes for column in self.columns) + sum(
            math.prod(aval.shape) * aval.dtype.itemsize for aval in avals
        )

    @property
    def widest(self) -> int:
        """What an element takes in the largest array that is of each."""
        avals = self.base.out_avals
        sizes = [math.prod(aval.shape) * aval.dtype.itemsize for aval in avals]
        return max([*sizes, *(column.nbytes for column in self.columns)], default=0)

    def part(self, batch: ByBranchTrace, part: Subset) -> list[Any]:
        """The operands of a part; of their tickets, which are of one run, one."""
        ticket = ticket_of(self.base)
        return [
            column.element(part.rows[0])
            if i == ticket
            else column.part(batch, part, self._device)
            for i, column in enumerate(self.columns)
        ]

    def run(self, operands: Sequence[Any]) -> list[Any]:
        """Run the base, on one element or on a part that runs by branch."""
        context = current()
        return context.timed(title_of(self.base), call, self.base, operands, context)

    def run_each(self, rows: np.ndarray) -> None:
        """Run elements one by one, those that are not done."""
        for row in rows[~self.is_done[rows]].tolist():
            try:
                values = self.run([column.element(row) for column in self.columns])
            except BaseException as error:
                error.add_note(
                    f"{self.base.primal.label} ran on element "
                    f"{number_of(row, self.sizes)} of a batch of "
                    f"{' by '.join(map(str, self.sizes))}."
                )
                raise
            arrays = [np.asarray(value) for value in values]
            for result, array in zip(self.results, arrays, strict=True):
                result.add(row, array)
            self.is_done[row] = True

    def rows_of(self, part: Subset, values: Sequence[Any]) -> list[np.ndarray]:
        """The results of a run by branch, one row for each element of its part.

        What a body kept of other elements raises here, before anything is put.
        """
        count = len(part.rows)
        results = []
        for i, value in enumerate(values):
            if isinstance(self.base, WithTape) and i == len(values) - 1:
                results.append(tape_cache.of_rows(np.asarray(value), count))
            elif isinstance(value, BatchTracer):
                results.append(np.asarray(value.padded_rows(part))[:count])
            else:
                array = np.asarray(value)
                results.append(np.broadcast_to(array, (count, *array.shape)))
        return results

    def put(self, part: Subset, results: Sequence[np.ndarray]) -> None:
        """Take the results of a run by branch, as `rows_of` gave them."""
        for result, rows in zip(self.results, results, strict=True):
            result.add_rows(part.rows, rows)
        self.is_done[part.rows] = True

    def traced(self, operands: Sequence[Any]) -> list[Any]:
        """The results in a body that is differentiated or runs by branch itself.

        The trace follows slices and stacks.
        """
        columns = [
            (jnp.reshape(x, (places[-1] + 1, *aval.shape)), places)
            for x, aval, places in zip(
                operands,
                self.base.in_avals,
                map(self._places, self._stacked_in),
                strict=True,
            )
        ]
        elements = [
            self.run([column[int(places[row])] for column, places in columns])
            for row in range(self.count)
        ]
        results = []
        for values, stacked, aval in zip(
            zip(*elements, strict=True), self._stacked_out, self.base.out_avals, strict=True
        ):
            array = jnp.stack(values).reshape(*self.sizes, *aval.shape)
            summed = [i for i, has in enumerate(stacked) if not has]
            results.append(jnp.asarray(array.sum(summed) if summed else array, aval.dtype))
        return results


class OperandColumn:
    """An operand of all elements."""

    def __init__(self, operand: Any, places: np.ndarray, aval: Any, device: Any) -> None:
        self._places = places
        self._aval = aval
        self._shared: Any = None
        self._rows: Any = None
        if places[-1]:
            # Slices are made in NumPy, at a tenth of the cost of JAX operations.
            self._rows = np.asarray(operand).reshape(places[-1] + 1, *aval.shape)
            return
        if np.shape(operand) != aval.shape:
            operand = np.asarray(operand).reshape(aval.shape)
        if isinstance(operand, np.ndarray) and device is not None:
            operand = put(operand, aval, device)  # once
        self._shared = operand

    @property
    def nbytes(self) -> int:
        """What each element has for itself."""
        return 0 if self._rows is None else self._rows[0].nbytes

    def element(self, row: int) -> Any:
        # A 0-d slice must stay an array: an index gives a NumPy scalar.
        return self._shared if self._rows is None else self._rows[self._places[row], ...]

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Those of some elements."""
        if self._rows is None:
            return np.broadcast_to(self._shared, (len(rows), *self._aval.shape))
        return self._rows[self._places[rows]]

    def part(self, batch: ByBranchTrace, part: Subset, device: _compat.Device) -> Any:
        """What a body takes that runs on a part by branch."""
        if self._rows is None:
            return self._shared
        rows = self.rows(part.pad(part.rows))
        aval = ShapedArray(rows.shape, rows.dtype, self._aval.weak_type)
        return BatchTracer(batch, part, put(rows, aval, device))


class ResultColumn:
    """A result of all elements: one row for each, or sums."""

    def __init__(self, aval: Any, places: np.ndarray, stacked: bool) -> None:
        dtype = aval.dtype
        # Half precision loses terms of long sums, as XLA knows.
        half = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
        accumulator = np.float32 if half and not stacked else dtype
        self.array = np.zeros((places[-1] + 1, *aval.shape), accumulator)
        self._places, self._stacked = places, stacked

    def add(self, row: int, value: np.ndarray) -> None:
        if self._stacked:
            self.array[row] = value
        else:
            self.array[self._places[row]] += value.astype(self.array.dtype)

    def add_rows(self, rows: np.ndarray, values: np.ndarray) -> None:
        if self._stacked:
            self.array[rows] = values
        elif len(self.array) == 1:
            self.array[0] += values.sum(0, dtype=self.array.dtype)
        else:
            np.add.at(self.array, self._places[rows], values.astype(self.array.dtype))


def _by_branch(elements: BatchElements) -> None:
    context = current()
    if why := _why_not(elements):
        context.count(one_by_one=why)
        elements.run_each(np.arange(elements.count))
        return
    most = max(1, MAX_BATCH_BYTES // max(1, elements.nbytes))
    parts = [part for root in _roots(elements) for part in _chunks(root, most)]
    if not parts:
        return
    before, counted = generators(), context.counted_elements()
    which, why = _run_parts(elements, parts)
    drawn = drawn_since(before)
    if drawn:
        which, why = ANY, f"numbers are drawn from {drawn}"
        elements.restart()
        context.recount_elements(counted)
        before = generators()
    if why:
        context.count(one_by_one=why)
        # As it would have been from the start, the first exception included, of which
        # nothing is to be remembered.
        elements.run_each(np.sort(np.concatenate([part.rows for part in parts])))
        if drawn and not drawn_since(before):
            return  # it was another thread
        _remember(elements, which, why)
    if drawn:
        _warn_of_draws(elements, drawn)


def _run_parts(elements: BatchElements, parts: Sequence[Subset]) -> tuple[int, str]:
    """Run parts by branch.

    Returns:
        Of which calls it was found that they are better run one by one, what is left of
        this one included, and why: a text that is empty if it was not.
    """
    most = elements.count // 2 if ticket_of(elements.base) is None else elements.count
    runs = 0
    for part in parts:
        for waiting in _run_part(elements, part):
            if isinstance(waiting, str):
                return OF_KIND, waiting
            runs += 1
            if runs + waiting > most:
                paths = f"{runs + waiting} paths or more for {elements.count} elements"
                return OF_SIZE, f"reads or branches tell elements apart: {paths}"
    return OF_SIZE, ""


def _chunks(root: Subset, most: int) -> list[Subset]:
    """A part, cut so that each has at most so many elements."""
    count = len(root.rows)
    if count <= most:
        return [root]
    return [root.take(np.arange(i, min(i + most, count))) for i in range(0, count, most)]


def _roots(elements: BatchElements) -> Iterator[Subset]:
    """What can run at once: elements whose runs are kept as one, or not kept."""
    every = np.arange(elements.count)
    recorded = recorded_of(elements.base)
    if recorded is None:
        yield Subset(every, None, every, elements.widest)
        return
    tickets = elements.columns[len(recorded.base.in_avals)].rows(every)
    names = np.ascontiguousarray(tickets[:, :3]).view("V12").ravel()
    _, first, labels = np.unique(names, return_index=True, return_inverse=True)
    lost = []
    for label, place in enumerate(first):
        rows = np.flatnonzero(labels == label)
        if tape_cache.is_void(tickets[place]):  # and so is what is computed here
            continue
        known, part = tape_cache.subset_of(recorded, tickets[place])
        if not known:
            lost.append(rows)
        else:
            index = tickets[rows, 3].astype(np.intp)
            nbytes = max(elements.widest, part.nbytes if part else 0)
            yield Subset(rows, part, index, nbytes)
    if lost:
        rows = np.concatenate(lost)
        yield Subset(rows, None, rows, elements.widest)


def _run_part(elements: BatchElements, root: Subset) -> Iterator[int | str]:
    """Run a part by branch.

    Yields:
        After each run, how many are to follow, or why it cannot be done.
    """
    if len(root.rows) == 1 and root.parent is None:
        elements.run_each(root.rows)
        yield 0
        return
    batch = ByBranchTrace(elements.base.primal.label, elements.sizes)
    operands = elements.part(batch, root)
    waiting: list[Any] = [(root, ())]
    context = current()
    while waiting:
        part, log = waiting.pop()
        if part.length == 1 and part is not root:  # arrays of one are no longer than others
            elements.run_each(part.rows)
            yield len(waiting)
            continue
        counted = context.counted_elements()
        results = _attempt(elements, batch, part, log, operands)
        if isinstance(results, str):
            context.recount_elements(counted)
            yield results
            return
        elements.put(batch.subset, results)
        context.count(elements=len(batch.subset.rows) - 1)
        waiting += batch.waiting
        batch.waiting = []
        yield len(waiting)


def _attempt(
    elements: BatchElements,
    batch: ByBranchTrace,
    part: Subset,
    log: Any,
    operands: Sequence[Any],
) -> list[np.ndarray] | str:
    """The results of a run on a part, or why they are not those of its elements."""
    batch.refused = ""
    try:
        with batch.running(part, log):
            values = elements.run(operands)
        results = elements.rows_of(batch.subset, values)
    except (CannotBatch, Exception) as error:  # noqa: BLE001 - raised again, if it is theirs
        return batch.refused or first_line(error)
    except BaseException as error:
        numbers = [batch.number(row) for row in batch.subset.rows[:6].tolist()]
        more = ", ..." if len(batch.subset.rows) > 6 else ""
        error.add_note(
            f"{elements.base.primal.label} ran on elements "
            f"{', '.join(map(str, numbers))}{more} of a batch."
        )
        raise
    return batch.refused or results


# Why bodies are not run by branch: any call of them, those of one kind, or those of one
# kind for batches of up to a power of two.
_unlike: LruCache = LruCache(REFUSAL_CACHE_SIZE)
ANY, OF_KIND, OF_SIZE = range(3)  # keys of a call


def _keys(elements: BatchElements) -> tuple[list[Any], Any]:
    """What calls are known by, for `_unlike`, and what must live for them to be."""
    function = unwrapped(elements.base.primal.func)
    owner = getattr(function, "__func__", function)  # a bound method is made anew
    kind = (id(owner), title_of(elements.base), elements.base.in_avals)
    size = (elements.count - 1).bit_length()
    return [id(owner), kind, (*kind, size)], owner


def _why_not(elements: BatchElements) -> str:
    """Why a batch is not run by branch; empty if it is.

    Derivatives of runs that are kept follow these, which are of parts or of elements.
    """
    if ticket_of(elements.base) is None and elements.nbytes > MAX_ELEMENT_BYTES:
        return f"elements of {elements.nbytes:,} bytes"
    if is_debugging():
        return "JAX looks for NaN or infinity in each result"
    return next(filter(None, map(_unlike.get, _keys(elements)[0])), "")


def _remember(elements: BatchElements, which: int, why: str) -> None:
    """Run such calls one by one from now on: those of the key number `which`."""
    keys, owner = _keys(elements)
    with contextlib.suppress(TypeError):  # built in, say
        _unlike.put(keys[which], why, [owner])


def _warn_of_draws(elements: BatchElements, generator: str) -> None:
    primal = elements.base.primal
    warn_at_function(
        unwrapped(primal.func),
        f"{primal.label} ran under vmap on many elements at once, and numbers were drawn "
        f"from {generator} meanwhile, of which all elements would have had the same. It "
        "runs once for each element instead, now and from now on. If draws are to differ, "
        "say so with stateful=True, or draw with jax.random and a key for each element.",
        UserWarning,
    )
