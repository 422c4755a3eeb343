"""`progress`: a bar for each batch that takes long, while a block is open.

A batch tells nothing while it runs. A thread of the block looks, ten times a second, at how
many elements each batch has done, so that an element pays nothing for it. That thread is
started where the block is: in a notebook, its bars are below that cell, and not wherever a
thread of XLA's would put them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, TypeAlias

from jpyfunc._errors import see
from jpyfunc._limits import BAR_DELAY, BAR_INTERVAL
from jpyfunc._runtime.in_flight import Flight, take_last

TqdmType: TypeAlias = Any  # tqdm's class for terminals, or that for notebooks

_open: list[Display] = []  # of the blocks that are open
_NOTHING = nullcontext()


def counted(
    title: str, function: Callable[..., object], total: int, done: Callable[[], float]
) -> AbstractContextManager[object]:
    """A block in which a batch runs; the innermost `progress` shows it.

    Args:
        title: what the bar is called.
        function: what is computed; batches of it that begin together share a bar.
        total: the number of elements.
        done: tells how many of them are done; any thread may call it.
    """
    displays = _open[-1:]
    return RunningBatch(displays[0], title, function, total, done) if displays else _NOTHING


class RunningBatch:
    """A batch that runs: a context manager around the run.

    Attributes:
        key: tells the function and what of it is computed.
        title: as of `counted`.
        total: as of `counted`.
        done: as of `counted`.
        begin: when it began, by `time.monotonic`.
    """

    def __init__(
        self,
        display: Display,
        title: str,
        function: Callable[..., object],
        total: int,
        done: Callable[[], float],
    ) -> None:
        self.key = (title, id(function))
        self.title, self.total, self.done = title, total, done
        self.begin = time.monotonic()
        self._display = display

    def __enter__(self) -> None:
        self._display.begin(self)

    def __exit__(self, *exc_info: object) -> None:
        # Of a batch that is complete, elements may have had nothing to compute.
        count = self.total if exc_info[0] is None else self.done()
        self.done = lambda: count  # and drop the arrays that told
        self._display.end(self)


class Bar:
    """The elements of batches of one function that began together.

    On several devices, or on the threads of one loop, they are one thing to the user.

    Attributes:
        batches: all of them.
        running: those that have not ended.
        shown: the bar of tqdm; None before a batch has run for `BAR_DELAY`. No batch is
            added afterwards.
    """

    def __init__(self) -> None:
        self.batches: list[RunningBatch] = []
        self.running: list[RunningBatch] = []
        self.shown: Any = None

    @property
    def is_due(self) -> bool:
        """Whether a batch has run for so long that the bar is to be shown."""
        now = time.monotonic()
        return any(now - batch.begin >= BAR_DELAY for batch in self.running)

    def show(self, tqdm: TqdmType, leave: bool) -> None:
        """Show the bar; `leave` says whether it stays when it is closed."""
        first = self.batches[0]
        self.shown = tqdm(
            total=sum(batch.total for batch in self.batches),
            desc=first.title,
            leave=leave,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
            delay=1e-9,  # any, so that it is not drawn before it has the right start
        )
        self.shown.start_t = time.time() - (time.monotonic() - first.begin)
        self.shown.n = self._count()
        self.shown.refresh()

    def update(self) -> None:
        """Draw a bar that is shown again, if more is done than it shows."""
        count = self._count()
        if count != self.shown.n:
            self.shown.n = count
            self.shown.refresh()

    def _count(self) -> int:
        return round(sum(batch.done() for batch in self.batches))


class Display(Flight):
    """The bars of a block of `progress`, with the thread that draws them.

    A program may go on after its block, where nothing waits for it. The bars of batches
    that began in the block are drawn until these end, and so long does the thread live.
    """

    def __init__(self, tqdm: TqdmType) -> None:
        super().__init__()
        self._tqdm = tqdm
        self._lock = threading.Lock()
        self._bars: list[Bar] = []
        self._is_closed = False
        self._is_over = threading.Event()
        threading.Thread(
            target=self._draw_until_over, name="jpyfunc.progress", daemon=True
        ).start()

    def _draw_until_over(self) -> None:
        while not self._is_over.wait(BAR_INTERVAL):
            with self._lock:
                for bar in self._bars:
                    self._draw(bar)

    def _draw(self, bar: Bar) -> None:
        if bar.shown is not None:
            bar.update()
        elif bar.is_due:
            # The bars of batches in a body, perhaps hundreds, should not fill the screen.
            is_below_another = any(other.shown is not None for other in self._bars)
            bar.show(self._tqdm, leave=not is_below_another)

    def begin(self, batch: RunningBatch) -> None:
        """Count a batch that begins."""
        with self._lock:
            for bar in self._bars:
                if bar.shown is None and bar.batches[0].key == batch.key:
                    break
            else:
                bar = Bar()
                self._bars.append(bar)
            bar.batches.append(batch)
            bar.running.append(batch)

    def end(self, batch: RunningBatch) -> None:
        """Count a batch that ends, and close its bar if it is the last one there."""
        with self._lock:
            bar = next(bar for bar in self._bars if batch in bar.running)
            self._draw(bar)
            bar.running.remove(batch)
            if bar.running:
                return
            self._bars.remove(bar)
            if bar.shown is not None:
                bar.shown.close()
            self._end_if_over()

    def close(self) -> None:
        """Show nothing that begins from now on."""
        with self._lock:
            self._is_closed = True
            self._end_if_over()

    def _end_if_over(self) -> None:
        if self._is_closed and not self._bars:
            self._is_over.set()


class progress:  # noqa: N801 - a context manager, named like `profile`
    """Show bars of progress for batches in a block.

    A call under `jax.vmap` whose function runs element by element, or by branch, and which
    takes more than half a second, shows how many elements are done, and in what time:

        simulate: 100%|██████████| 256/256 [00:12<00:00]

    Nested batches are one batch. Elements that run by branch are done when their subset is,
    and those on an executor when their task is, in whatever order. A function that takes
    the whole batch in one call (`vmap_method="expand_dims"` or `"broadcast_all"`) has
    elements to count only with an executor. A derivative is marked: `simulate (vjp)`.

    Batches of one function that begin at once, on several devices or threads, share a bar.
    A bar that appears below another one, of a batch inside a body for example, goes away
    when its batch ends; any other stays. If a batch fails, its bar stays where it was.

    The bars are those of `tqdm.auto`, in terminals and notebooks. In terminals, and in
    notebooks without `ipywidgets`, they are written to `sys.stderr`.

    Any thread's batches that begin in the block are shown; if several blocks are open, in
    the last one opened. Leaving the block without an exception waits for what its thread
    has dispatched in it, unless a body does nothing for some seconds, as it may be waiting
    for the block to end. The bar of a batch that then goes on does so, too.

    Raises:
        ImportError: tqdm is not installed.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, time, jpyfunc
        >>> @jpyfunc.numpy_func(Tout=jax.ShapeDtypeStruct((), jnp.float32))
        ... def simulate(theta):
        ...     time.sleep(0.1)
        ...     return np.sin(theta)
        >>> with jpyfunc.progress():
        ...     results = jax.jit(jax.vmap(simulate))(jnp.arange(8.0))
    """

    def __init__(self) -> None:
        try:
            from tqdm.auto import tqdm
        except ImportError as error:
            raise ImportError(
                "jpyfunc.progress draws its bars with tqdm, which is not installed. "
                "Install it with pip install 'jpyfunc[progress]', or pip install tqdm."
                + see("A progress bar without tqdm")
            ) from error
        self._tqdm = tqdm
        self._entered: list[Display] = []

    def __enter__(self) -> None:
        display = Display(self._tqdm)
        self._entered.append(display)
        _open.append(display)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        display = take_last(self._entered)
        try:
            if error is None:
                display.wait()
        finally:
            _open.remove(display)
            display.close()
