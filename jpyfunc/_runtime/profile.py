"""`profile`: what bodies did while a block ran, and how long they took."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar, get_args

import jax
import numpy as np

from jpyfunc._frames import code_of
from jpyfunc._runtime.context import Context, current, enter, entered, leave
from jpyfunc._runtime.counts import Counts
from jpyfunc._runtime.in_flight import Flight, take_last
from jpyfunc._runtime.profile_table import html_of, text_of
from jpyfunc._runtime.tape_cache import tapes
from jpyfunc._types import Array, Value

Results = TypeVar("Results")
FunctionKey = tuple[str, str]  # name and source of a function
Kind = Literal["forward", "jvp", "vjp"]  # what of a function is computed
KINDS: tuple[Kind, ...] = get_args(Kind)

_open: list[profile] = []  # whose block is open
_opening = threading.Lock()


# The row of a table that calls are counted in: the name of a function, the function itself,
# and what of it is computed.
ProfileRow = tuple[str, Callable[..., object], Kind]


def measured(
    row: ProfileRow,
    context: Context,
    operands: Sequence[Array],
    execute: Callable[[Context, Sequence[Any]], Results],
) -> Results:
    """Execute a call in `context`, and add it to the profiles that are open.

    Args:
        row: where it is counted.
        context: what it runs in; it is entered here.
        operands: of the call. Those that are arrays count as bytes in.
        execute: does the call, given the context and the operands.
    """
    if not _open:
        token = enter(context)
        try:
            return execute(context, operands)
        finally:
            leave(token)
    profiles = set(_open)
    counts = Counts(calls=1, bytes_in=_nbytes(operands))
    begin = time.perf_counter()
    try:
        with entered(dataclasses.replace(context, counts=counts)) as context:
            results = execute(context, operands)
        counts.bytes_out = _nbytes(jax.tree.leaves(results))
        return results
    except BaseException:
        counts.exceptions = 1
        raise
    finally:
        counts.overhead_seconds += time.perf_counter() - begin - counts.body_seconds
        for each in profiles:
            each.add(row, counts)


def _nbytes(values: Iterable[Value]) -> int:
    return sum(x.nbytes for x in values if isinstance(x, jax.Array | np.ndarray))


def _source(func: Callable[..., object]) -> str:
    """File and line of a function, or of the class of a callable object."""
    code = code_of(func)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else "built-in"


_COMPILING = ("jaxpr_to_mlir_module_duration", "backend_compile_duration")


def _count_compiling(event: str, duration_secs: float, **_: object) -> None:
    """Count time to compile; JAX calls it on the thread that has compiled something."""
    if event.endswith(_COMPILING):
        current().count(compile_seconds=duration_secs)


class profile:  # noqa: N801 - a context manager, named like JAX's own
    """Count and time what the bodies of `py_func` and `numpy_func` do in a block.

    Printed, it is a table, also in a notebook. It has a row for each function and what was
    computed of it: `forward` its results, `jvp` a JVP, `vjp` a VJP. A derivative of higher
    order counts as the one taken last: the reverse derivative of a forward derivative
    counts as `vjp`. So does a transpose.

    A function is identified by its name and by the line that defines it, which is shown
    where several functions have one name. Closures made by one line are one function; give
    them names (`py_func(..., name=...)`) to tell them apart.

    The columns, by their names in `as_dict`:

    - `calls`: host calls of compiled programs, and eager calls.
    - `elements`: elements computed. A call under `jax.vmap` that runs by branch or one by
      one has one for each element of the batch; any other call has one.
    - `runs`: how often the body itself ran for that. By branch it runs once for many
      elements, and for a derivative that finds a cached tape it does not run.
    - `body_seconds`: time in the body, calls to other functions included; for a
      derivative, time to apply the JVP or the VJP.
    - `overhead_seconds`: the rest of the host round trip: converting operands and results,
      splitting and stacking batches, entering the caller's JAX configuration. What XLA
      does before it reaches Python, some 10 us, is not included.
    - `wait_seconds`: time in which calls waited for their executor, which is printed below
      the table. `body_seconds` is then the time in the function alone, added up over the
      workers, and no part of the time of the call.
    - `bytes_in`, `bytes_out`: sizes of the operands and of the results.
    - `exceptions`: calls that raised. They count in the other columns too.
    - `from_tape`: elements of derivatives that used a cached tape, so that the body did not
      run again.
    - `reran`: elements of derivatives for which the body ran again.
    - `compile_seconds`: time in which JAX compiled what the call needed. That is above all
      operations of the body: each is compiled when it first meets arrays of some shape. It
      is part of the times above.
    - `one_by_one`: why batches that could have run by branch ran one by one, for the last
      one that did; empty if none did. It is printed below the table.
    - `tape_bytes`: what the tapes of the function hold now, those of calls outside the
      block included; in the row `forward` only. See `set_tape_limit`.

    Eager calls count, although they make no round trip: their `overhead` is the check and
    the conversion of the results, and JAX may still be computing when the body returns.

    A call counts in every block, on any thread, that was open when the call began. Leaving
    a block without an exception waits for what the block's thread has dispatched in it, so
    that the calls of those programs are counted. It does not wait inside a body, which must
    not wait for its own program, nor for a body that itself waits for some seconds, such as
    for a lock that is held here. If a program fails, JAX reports it where it always does,
    not here. A profile may be entered again, and goes on counting.

    Example:
        >>> import jax, jax.numpy as jnp, jpyfunc
        >>> @jpyfunc.py_func(Tout=jax.ShapeDtypeStruct((), jnp.float32))
        ... def square(x):
        ...     return x**2
        >>> with jpyfunc.profile() as prof:
        ...     slopes = jax.jit(jax.vmap(jax.grad(square)))(jnp.ones(8))
        >>> counts = prof.as_dict()["square"]["vjp"]
        >>> print(counts["calls"], counts["elements"], counts["bytes_out"])
        1 8 32

    `jax.profiler` shows the time of single operations. In its traces, bodies have their
    names, and derivatives are marked: `square`, `square (vjp)`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[FunctionKey, dict[str, Counts]] = {}
        self._functions: dict[FunctionKey, set[int]] = {}  # by their ids
        self._before: list[Flight] = []

    def __enter__(self) -> profile:
        self._before.append(Flight())
        with _opening:
            if not _open:
                jax.monitoring.register_event_duration_secs_listener(_count_compiling)
            _open.append(self)
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        before = take_last(self._before)
        try:
            if error is None:
                before.wait()
        finally:
            with _opening:
                _open.remove(self)
                if not _open:
                    # It raises where the user has cleared all listeners meanwhile.
                    with contextlib.suppress(AssertionError, ValueError):
                        jax.monitoring.unregister_event_duration_listener(_count_compiling)

    def add(self, row: ProfileRow, counts: Counts) -> None:
        """Add the counts of a call to a row."""
        name, func, kind = row
        key = (name, _source(func))
        with self._lock:
            self._functions.setdefault(key, set()).add(id(func))
            self._counts.setdefault(key, {}).setdefault(kind, Counts()).add(counts)

    def as_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return the counts so far.

        Returns:
            By function, in order of the first call that ended, and by kind
            (`"forward"`, `"jvp"`, `"vjp"`, those that were run): the columns. Times are
            in seconds, sizes in bytes. A function is its name, with the line that
            defines it (`name (file:line)`) where several have that name.
        """
        with self._lock:
            names = [name for name, _ in self._counts]
            return {
                name if names.count(name) == 1 else f"{name} ({source})": {
                    kind: dataclasses.asdict(kinds[kind])
                    | {"tape_bytes": self._tape_bytes(name, source, kind)}
                    for kind in KINDS
                    if kind in kinds
                }
                for (name, source), kinds in self._counts.items()
            }

    def _tape_bytes(self, name: str, source: str, kind: str) -> int:
        return tapes.bytes_of(self._functions[name, source]) if kind == "forward" else 0

    def __repr__(self) -> str:
        return text_of(self.as_dict())

    def _repr_html_(self) -> str:
        return html_of(self.as_dict())
