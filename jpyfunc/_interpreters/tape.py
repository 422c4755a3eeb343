"""What a run of a body leaves: the way back through it, for derivatives of any kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.extend.core import set_current_trace

from jpyfunc import _compat
from jpyfunc._errors import NotDifferentiableError, UnsupportedError
from jpyfunc._interpreters.batch_tracer import is_batch_tracer
from jpyfunc._interpreters.eager import EagerTrace, run
from jpyfunc._interpreters.reverse_sweep import pull, whole_pull
from jpyfunc._interpreters.tape_trace import TapeTrace, is_tape_trace
from jpyfunc._interpreters.tape_tracer import REMEDIES, is_tape_tracer
from jpyfunc._runtime.context import running_batch

Indices = tuple[int, ...]


def run_on_tape(
    function: Callable[[list[Any]], Sequence[Any]],
    operands: Sequence[Any],
    wrt: Indices,
    label: str,
) -> Tape:
    """Run a function on a tape.

    Args:
        function: from operands to results.
        operands: arrays.
        wrt: the operands that it can be differentiated by afterwards.
        label: what errors call it.
    """
    tape = TapeTrace(label)
    try:
        with set_current_trace(tape):
            results = function(tape.watch(operands, wrt))
        return Tape(tape, wrt, operands, results)
    finally:
        tape.close()


class Tape:
    """A run of a function, as a tape noted it.

    Tangents are pushed through it and cotangents pulled back, operation by operation, and
    it can be replayed without the function.

    Attributes:
        wrt: the operands of the run that it can be differentiated by.
        values: its results.
        subset: the elements that the run was of, if it was one by branch.
    """

    def __init__(
        self, tape: TapeTrace, wrt: Indices, at: Sequence[Any], results: Sequence[Any]
    ) -> None:
        self._label = tape.label
        self._reads = tape.reads
        self._notes = tape.notes
        self._slots = tape.slots  # those of the operands `wrt` come first
        self.wrt = wrt
        self._of = [x.slot if tape.owns(x) else None for x in results]
        self.values = [x.value if tape.owns(x) else x for x in results]
        self._at = list(at)
        self._tape = tape.parent if is_tape_trace(tape.parent) else None
        batch = running_batch()
        self.subset = batch.subset if batch else None
        if batch:  # of the elements that left meanwhile, nothing is kept
            for values in self._values():
                values[:] = [
                    x.take(batch.subset) if is_batch_tracer(x) else x for x in values
                ]

    def arrays(self) -> Iterator[Any]:
        """Every array that it keeps, some more than once."""
        for values in self._values():
            for x in values:
                yield x.value if is_batch_tracer(x) else x

    def _values(self) -> Iterator[list[Any]]:
        for note in self._notes:
            yield note.values
            yield note.residuals
        yield self.values
        yield self._at

    def serves(self, wrt: Indices, operands: Sequence[Any], without_rules: bool) -> bool:
        """Whether derivatives by `wrt` can be taken of it as it is.

        Args:
            wrt: operands.
            operands: of the run. Where some are on a tape, it must be that under which
                the record was made.
            without_rules: whether no custom rule may be used.
        """
        return (
            set(wrt) <= set(self.wrt)
            and not (without_rules and any(n.operation.has_rules for n in self._notes))
            and (
                self._tape is _compat.current_trace()
                or not any(map(is_tape_tracer, operands))
            )
        )

    def covers(self, operands: Sequence[Any]) -> bool:
        """Whether it can be replayed on operands, some of which are on a tape."""
        return {i for i, x in enumerate(operands) if is_tape_tracer(x)} <= set(self.wrt)

    def push(self, wrt: Indices, tangents: Sequence[Any], of: Indices) -> list[Any]:
        """The tangents of results `of` by the tangents of operands `wrt`.

        Raises:
            NotDifferentiableError: a result depends on none of the operands that the run
                was differentiated by, although one was read.
        """
        self._check_not_cut(of)
        trace = _compat.current_trace()
        known: list[Any] = [None] * self._slots
        for i, tangent in zip(wrt, tangents, strict=True):
            known[self.wrt.index(i)] = tangent
        # A `custom_vjp` has no JVP, and needs none where it leads to none of the results.
        wanted = {self._of[i] for i in of}
        leading = []
        for note in reversed(self._notes):
            if not wanted.isdisjoint(range(note.first, note.first + len(note.linear.of))):
                wanted.update(note.inputs)
                leading.append(note)
        for note in reversed(leading):
            given = tuple([k for k, s in enumerate(note.inputs) if known[s] is not None])
            if given:
                pushed = [known[note.inputs[k]] for k in given]
                operation = note.linear.push(given)
                results = run(trace, operation, [*note.residuals, *pushed])
                known[note.first : note.first + len(results)] = results
        slots = [self._of[i] for i in of]
        return [
            self._or_zero(None if slot is None else known[slot], self.values[i])
            for slot, i in zip(slots, of, strict=True)
        ]

    def pull(self, of: Indices, cotangents: Sequence[Any], wrt: Indices) -> list[Any]:
        """The cotangents of operands `wrt` by the cotangents of results `of`.

        Raises:
            NotDifferentiableError: as `push`.
        """
        self._check_not_cut(of)
        trace = _compat.current_trace()
        given: dict[int, Any] = {}
        for i, cotangent in zip(of, cotangents, strict=True):
            slot = self._of[i]
            if slot is not None:  # one value may be several results
                given[slot] = given[slot] + cotangent if slot in given else cotangent
        residuals = [note.residuals for note in self._notes]
        slots = [self.wrt.index(i) for i in wrt]
        whole = (
            None
            if isinstance(trace, EagerTrace)
            else whole_pull(self._notes, [*given], slots)
        )
        if whole:
            with set_current_trace(_compat.eval_trace):
                pulled = whole(residuals, [*given.values()])
        else:
            known: list[Any] = [None] * self._slots
            for slot, cotangent in given.items():
                known[slot] = cotangent
            pull(self._notes, known, residuals, functools.partial(run, trace))
            pulled = [known[slot] for slot in slots]
        return [self._or_zero(x, self._at[i]) for x, i in zip(pulled, wrt, strict=True)]

    def replay(self, operands: Sequence[Any]) -> list[Any]:
        """The results of the same operations on other operands `wrt`."""
        trace = _compat.current_trace()
        if is_tape_trace(trace):
            trace.reads.extend(self._reads)
        known: list[Any] = [operands[i] for i in self.wrt]
        known += [None] * (self._slots - len(known))
        for note in self._notes:
            if note.operation.is_stateful:
                raise UnsupportedError(
                    f"{self._label}: its derivative is differentiated again, and a call in "
                    "it that is stateful, in jax.lax.scan, cond or while_loop, would have "
                    "to run once more. Call it outside of these, or make it pure."
                )
            values = list(note.values)
            for i, slot in zip(note.active, note.inputs, strict=True):
                values[i] = known[slot]
            results = run(trace, note.operation, values)
            for k, i in enumerate(note.linear.of):
                known[note.first + k] = results[i]
        return [
            value if slot is None else known[slot]
            for slot, value in zip(self._of, self.values, strict=True)
        ]

    def _check_not_cut(self, of: Indices) -> None:
        if self._reads and any(self._of[i] is None for i in of):
            raise NotDifferentiableError(
                f"{self._label}: a result depends on nothing that is differentiated, "
                f"although its value was read{self._reads[0]}, so its gradient would "
                f"silently be zero. {REMEDIES}"
            )

    @staticmethod
    def _or_zero(derivative: Any, like: Any) -> Any:
        return np.zeros(np.shape(like), like.dtype) if derivative is None else derivative
