"""Run a function on many elements of a batch at once, and split them where it branches.

Each operation is executed on arrays with one row per element. A truth test, or a read of a
value, needs one answer for all elements that run. Where they differ, the run goes on with
the largest group of elements that agree, and the other groups wait. Each is run later, from
the start of the function, where the operations up to the split are replayed from a log. So
the function runs once for each path that elements take through it, not once per element.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import jax
import numpy as np
from jax.extend.core import Primitive, set_current_trace
from jax.extend.core.primitives import stop_gradient_p

from jpyfunc import _compat
from jpyfunc._interpreters.batch_tracer import BatchTracer, CannotBatch
from jpyfunc._interpreters.batched_operation import batch_operation, first_line
from jpyfunc._interpreters.eager_trace import EagerTrace, execute, ground
from jpyfunc._interpreters.operations import (
    CompiledOperation,
    Operation,
    UncachedOperation,
)
from jpyfunc._interpreters.replay_log import LogEntry, ReplayLog
from jpyfunc._interpreters.subset import Subset
from jpyfunc._limits import SHOWN_ELEMENTS
from jpyfunc._runtime.context import enter_batch
from jpyfunc._types import Array, Value

ElementFunction = Callable[..., Sequence[Array]]  # from operands to results


class Column(Protocol):
    """One operand of a function, for all elements of a batch."""

    def element(self, number: int) -> Array:
        """The operand of one element."""
        ...

    def batched(self, trace: ByBranchTrace, subset: Subset) -> Array | BatchTracer:
        """The operand of a subset: a batch tracer, or an array that its elements share."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class ElementNames:
    """The names of a function and of the elements of its batch in errors.

    Attributes:
        label: of the function.
        sizes: of the batch axes.
    """

    label: str
    sizes: tuple[int, ...]

    def index(self, element: int) -> int | tuple[int, ...]:
        """The index of an element: a number, or a tuple if the batch has several axes."""
        if len(self.sizes) == 1:
            return element
        return tuple(int(i) for i in np.unravel_index(element, self.sizes))

    def add_note(self, error: BaseException, elements: Sequence[int]) -> None:
        """Add to an error which elements ran."""
        shown = ", ".join(str(self.index(i)) for i in elements[:SHOWN_ELEMENTS])
        more = ", ..." if len(elements) > SHOWN_ELEMENTS else ""
        plural = "s" if len(elements) > 1 else ""
        error.add_note(
            f"{self.label} ran on element{plural} {shown}{more} of a batch of "
            f"{' x '.join(map(str, self.sizes))}."
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """Why elements are better run one by one.

    Attributes:
        why: the reason, as `profile` shows it.
        is_of_paths: whether the reason is that there are many paths for so few elements: a
            larger batch may have as many.
    """

    why: str
    is_of_paths: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Path:
    """Elements that wait to run, and the log of what they executed before."""

    subset: Subset
    entries: Sequence[LogEntry] = ()


def run_by_branch(
    function: ElementFunction,
    columns: Sequence[Column],
    subsets: Sequence[Subset],
    names: ElementNames,
    max_paths: int,
    collect: Callable[[np.ndarray, list[np.ndarray]], None],
) -> Refusal | None:
    """Run a function on elements of a batch, once for each path that they take.

    Args:
        function: from operands to results.
        columns: the operands.
        subsets: the elements; those of one subset begin together.
        names: what errors call them.
        max_paths: how often the function may run; it stops once it knows of more paths.
        collect: is given the results of each path: the numbers of its elements, and for
            each result an array with one row per element.

    Returns:
        None, or why the elements that were not collected are to be run one by one.
    """
    runs = 0
    for root in subsets:
        trace = ByBranchTrace(names, root)
        operands: list[Array | BatchTracer] | None = None
        waiting = [Path(root)]
        while waiting:
            path = waiting.pop()
            if _runs_alone(path.subset, root):
                results = run_alone(function, columns, int(path.subset.elements[0]), names)
                collect(
                    path.subset.elements, [np.asarray(result)[None] for result in results]
                )
            else:
                if operands is None:
                    operands = [column.batched(trace, root) for column in columns]
                outcome = _run_path(function, operands, trace, path)
                if isinstance(outcome, Refusal):
                    return outcome
                rows, split = outcome
                collect(trace.subset.elements, rows)
                waiting += split
            runs += 1
            paths = runs + len(waiting)
            if paths > max_paths:
                count = sum(len(subset.elements) for subset in subsets)
                why = f"{paths} paths or more for {count} elements"
                why = f"reads or branches tell elements apart: {why}"
                return Refusal(why, is_of_paths=True)
    return None


def _runs_alone(subset: Subset, root: Subset) -> bool:
    """Whether a subset is a single element that runs as if there were no batch.

    A root that was taken from the subset of a tape must run by branch, as the tape did. An
    element that was split off runs by branch to replay what it has executed already,
    unless its arrays are so large that they are not padded: alone it is no slower then.
    """
    if subset is root:
        return len(subset.elements) == 1 and subset.parent is None
    return subset.length == 1


def run_alone(
    function: ElementFunction, columns: Sequence[Column], element: int, names: ElementNames
) -> Sequence[Array]:
    """The results of a function for one element."""
    try:
        return function([column.element(element) for column in columns])
    except BaseException as error:
        names.add_note(error, [element])
        raise


def _run_path(
    function: ElementFunction, operands: Sequence[Value], trace: ByBranchTrace, path: Path
) -> tuple[list[np.ndarray], list[Path]] | Refusal:
    """Run the elements of `path`.

    Returns:
        The results of those that stay together, a row for each, and the paths of those
        that were split off.
    """
    try:
        results, split = trace.run(function, operands, path)
        # A result that the body stored in a run of other elements raises here.
        rows = [_rows_of(result, trace.subset) for result in results]
    except (CannotBatch, Exception) as error:  # noqa: BLE001 - raised again one by one
        return Refusal(trace.refusal or first_line(error))
    except BaseException as error:
        trace.names.add_note(error, trace.subset.elements.tolist())
        raise
    # The body may have caught `CannotBatch`; what it returned then is not its result.
    return Refusal(trace.refusal) if trace.refusal else (rows, split)


def _rows_of(result: Array, subset: Subset) -> np.ndarray:
    """A result as an array with a row for each element of `subset`."""
    count = len(subset.elements)
    if isinstance(result, BatchTracer):
        return np.asarray(result.padded_rows(subset))[:count]
    array = np.asarray(result)
    return np.broadcast_to(array, (count, *array.shape))


class ByBranchTrace(EagerTrace):
    """Execute operations on a subset of a batch, which gets smaller where elements differ.

    Attributes:
        names: what errors call the function and the elements.
        subset: the elements that run now.
        refusal: why the run cannot be of many elements; empty if it can.
    """

    def __init__(self, names: ElementNames, subset: Subset) -> None:
        super().__init__(ground())
        self.names = names
        self.subset = subset
        self.refusal = ""
        self._paths: list[Path] = []  # of the elements that were split off
        self._log = ReplayLog()
        self._primitive: Primitive  # that was bound last, for errors

    def run(
        self, function: ElementFunction, operands: Sequence[Value], path: Path
    ) -> tuple[Sequence[Array], list[Path]]:
        """Run a function on the elements of `path`.

        Args:
            function: from operands to results.
            operands: for all elements that began together.
            path: elements among them.

        Returns:
            The results of the elements that stay together, which are `subset` then, and the
            paths of those that were split off.
        """
        self.subset, self.refusal = path.subset, ""
        self._log = ReplayLog(path.entries)
        try:
            with enter_batch(self), set_current_trace(self):
                return function(operands), self._paths
        finally:
            # A tracer that the body stores keeps this trace alive, but not these arrays.
            self._log, self._paths = ReplayLog(), []

    def record_refusal(self, why: str) -> None:
        """Drop the results of this run, even if the body goes on."""
        self.refusal = why

    def refuse(self, why: str) -> NoReturn:
        """End a run that cannot be of many elements."""
        self.record_refusal(why)
        raise CannotBatch

    def agree(self, rows: np.ndarray) -> Any:
        """Go on with the largest group of elements that have the same value.

        Args:
            rows: a value for each element of the subset.

        Returns:
            The value of that group.
        """
        flat = rows.reshape(len(rows), -1)
        if len(rows) > 1 and flat.shape[1]:
            bits = np.ascontiguousarray(flat).view(np.uint8)
            if (bits != bits[:1]).any():
                whole = bits.view(np.dtype((np.void, bits.shape[1]))).ravel()
                return rows[self._split(whole)]
        return rows[0]

    def _split(self, values: np.ndarray) -> int:
        """Split the subset where its elements have several values.

        Returns:
            The place, in the subset before, of an element of the group that goes on.
        """
        _, labels, counts = np.unique(values, return_inverse=True, return_counts=True)
        places = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
        # The group that begins with the first element is last in the list and runs next.
        groups = sorted(places, key=lambda group: group[0], reverse=True)
        largest = max(groups, key=lambda group: (len(group), -group[0]))
        subset, entries = self.subset, self._log.so_far()
        self._paths += [
            Path(subset.take(group), entries) for group in groups if group is not largest
        ]
        self.subset = subset.take(largest)
        return int(largest[0])

    def batched(self, value: jax.Array) -> BatchTracer:
        """The tracer of a padded array with a row for each element of the subset."""
        return BatchTracer(self, self.subset, value)

    def apply(self, operation: Operation, operands: Sequence[Value]) -> list[Array]:
        """Execute an operation for all elements of the subset, or replay it."""
        if isinstance(operation, UncachedOperation):
            with set_current_trace(self):
                return operation.call(*operands)
        results = self._log.replay(operation, operands)
        if results is None:
            results = self._execute(operation, operands)
            self._log.record(operation, operands, results)
        return [*results]

    def _execute(
        self, operation: CompiledOperation, operands: Sequence[Value]
    ) -> list[Array]:
        axes = tuple([0 if type(x) is BatchTracer else None for x in operands])
        if 0 not in axes:
            return self._execute_once(operation, operands)
        if operation.needs_x64:
            self.refuse("64-bit arrays while jax_enable_x64 is off")
        many = batch_operation(operation, axes)
        if many.run is None:
            self.refuse(many.refusal)
        subset = self.subset = self.subset.with_arrays_of(many.nbytes)
        values = [x.padded_rows(subset) if type(x) is BatchTracer else x for x in operands]
        if self.move is not None:
            values = [self.move(x) for x in values]
        with set_current_trace(_compat.eval_trace):
            return [self.batched(y) for y in many.run(*values)]

    def _execute_once(
        self, operation: CompiledOperation, operands: Sequence[Value]
    ) -> list[Array]:
        """Execute an operation whose operands all elements share, once for all of them.

        An effect would have to happen for each element, so it is refused.
        """
        if operation.is_stateful:
            self.refuse("a stateful call inside jax.lax.scan, cond or while_loop")
        if any(isinstance(x, jax.Ref) for x in operands):
            self.refuse("a jax.Ref is read or written")
        with enter_batch(None):
            return execute(self.parent, operation, operands)

    def process_primitive(
        self, primitive: Primitive, tracers: Sequence[Value], params: dict[str, object], /
    ) -> Any:
        if primitive is stop_gradient_p:
            return tracers[0]
        # Without operands, it would be executed once for all elements.
        if primitive in _compat.DEBUG_PRIMITIVES:
            self.refuse(f"{primitive.name} runs for each element")
        self._primitive = primitive
        return super().process_primitive(primitive, tracers, params)

    def apply_uncacheable(
        self, operation: UncachedOperation, operands: Sequence[Value]
    ) -> list[Array]:
        self.refuse(f"{self._primitive.name} may be another operation in every run")

    def process_shard_map(self, *_: object, **__: Any) -> Any:
        self.refuse("shard_map")
