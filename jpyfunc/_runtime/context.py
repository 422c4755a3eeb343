"""The context of a run: what surrounds a body while it runs on a thread.

A context is frozen, and each thread has one at a time. Whoever runs a body enters the
context of that run and leaves it afterwards. A thread begins with the default context, so a
body that XLA calls on a thread of its own sees nothing of where the program was dispatched.
One that runs on the dispatching thread must see nothing of it either, or it would depend on
what else is in flight where it runs: `HostCall` enters a context that it made beforehand,
which says nothing but the device.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

from jax.profiler import TraceAnnotation

from jpyfunc import _compat
from jpyfunc._graph_tensor import AddsNodes, GraphBlock
from jpyfunc._runtime.counts import Counts

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """The surroundings of a body while it runs.

    Attributes:
        device: where NumPy operands are put; None where no body of a call runs.
        counts: of the call that is measured; None if no profile is open.
        batches: the batches that run by branch, innermost last. None stands for a run
            inside one of them that is not of many elements.
        thread: the one that entered the innermost batch. `asyncio.to_thread` takes the
            context along, and a read there would split the batch while this thread computes
            on all of it.
        graphs: the blocks that build graphs of TensorFlow 1, in which a call without
            tensors is a node; innermost last.
    """

    device: _compat.Device | None = None
    counts: Counts | None = None
    batches: tuple[Any, ...] = ()
    thread: int = 0
    graphs: tuple[GraphBlock, ...] = ()

    @property
    def elements(self) -> int:
        """The number of batch elements that a run in this context is of."""
        batch = self.batches[-1] if self.batches else None
        return 1 if batch is None else len(batch.subset.elements)

    def count(self, **amounts: float | str) -> None:
        """Add to the counts of the call that is measured, if one is."""
        if self.counts is not None:
            self.counts.count(**amounts)

    def timed(
        self, title: str, run: Callable[..., Result], /, *args: object, **kwargs: object
    ) -> Result:
        """Run a body, or its derivative, and time it if the call is measured.

        Args:
            title: what `jax.profiler` shows it as.
            run: what to call.
            *args: its arguments.
            **kwargs: its arguments by name.
        """
        counts = self.counts
        is_traced = TraceAnnotation.is_enabled()  # a quarter of what an unused one costs
        if counts is None and not is_traced:
            return run(*args, **kwargs)
        begin = time.perf_counter()
        try:
            with TraceAnnotation(title) if is_traced else nullcontext():
                return run(*args, **kwargs)
        finally:
            if counts is not None:
                counts.elements += 1
                counts.body_seconds += time.perf_counter() - begin

    def counted_elements(self) -> tuple[int, int, int]:
        """The elements counted so far, for `recount_elements`."""
        counts = self.counts or Counts()
        return counts.elements, counts.from_tape, counts.reran

    def recount_elements(self, counted: tuple[int, int, int]) -> None:
        """Forget the elements counted since then: their results are not used."""
        if self.counts is not None:
            self.counts.elements, self.counts.from_tape, self.counts.reran = counted


_current: ContextVar[Context] = ContextVar("jpyfunc", default=Context())  # noqa: B039 - frozen

current = _current.get  # the context of this thread
enter = _current.set  # make a context the current one, and return a token
leave = _current.reset  # make the context before that token the current one again


class entered:  # noqa: N801 - a context manager
    """Make a context the current one in a block; `enter` takes a quarter of the time."""

    __slots__ = ("_context", "_token")

    def __init__(self, context: Context) -> None:
        self._context = context

    def __enter__(self) -> Context:
        self._token = enter(self._context)
        return self._context

    def __exit__(self, *exc_info: object) -> None:
        leave(self._token)


def running_batch() -> Any:
    """The trace that runs by branch on this thread, or None."""
    batches = running_batches()
    return batches[-1] if batches else None


def running_batches() -> tuple[Any, ...]:
    """The traces that run by branch on this thread, innermost last."""
    context = current()
    is_here = context.batches and context.thread == threading.get_ident()
    return context.batches if is_here else ()


def enter_batch(trace: Any) -> entered:
    """Make a trace the one that `running_batch` gives in a block; None masks the others."""
    c, thread = current(), threading.get_ident()
    outer = c.batches if c.thread == thread else ()
    return entered(Context(c.device, c.counts, (*outer, trace), thread, c.graphs))


def building() -> AddsNodes | None:
    """Return the graph that is being built, in which a call without tensors is a node."""
    graphs = current().graphs
    return graphs[-1].graph if graphs else None


def begin_building(block: GraphBlock) -> None:
    """Make the graph of `block` the one that is being built, until `end_building`."""
    enter(dataclasses.replace(current(), graphs=(*current().graphs, block)))


def end_building(block: GraphBlock) -> None:
    """Go back to the graph before; blocks need not be nested."""
    graphs = tuple(other for other in current().graphs if other is not block)
    enter(dataclasses.replace(current(), graphs=graphs))


def not_building() -> entered:
    """Make calls without tensors calls, not nodes, while a graph runs."""
    return entered(dataclasses.replace(current(), graphs=()))
