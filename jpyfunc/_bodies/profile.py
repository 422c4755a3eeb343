"""`profile`: what the bodies did while a block ran, and how long they took.

It is also where bodies get the name by which `jax.profiler` shows them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np

from jpyfunc._bodies import tape_cache
from jpyfunc._bodies.derived import (
    AtTape,
    Batch,
    Body,
    Jvp,
    Transpose,
    Vjp,
    WithTape,
)
from jpyfunc._bodies.primal import (
    Primal,
)
from jpyfunc._frames import code_of
from jpyfunc._hashable import unwrapped
from jpyfunc._runtime.context import Context, current, entered
from jpyfunc._runtime.counts import Counts
from jpyfunc._runtime.in_flight import Flight, taken

# Profiles whose block is open. A list that changes in place, so that the modules that
# run bodies import it once and pay one truth test per call where there is none.
open_profiles: list[profile] = []
_opening = threading.Lock()

KINDS = {
    Primal: "forward",
    WithTape: "forward",
    AtTape: "forward",
    Jvp: "jvp",
    Vjp: "vjp",
    Transpose: "vjp",
}

FunctionKey = tuple[str, str]  # name and source of a function


_COMPILING = ("jaxpr_to_mlir_module_duration", "backend_compile_duration")


def _note_compiling(event: str, duration_secs: float, **_: Any) -> None:
    """What JAX calls when it has compiled something, on the thread that it did so on."""
    if event.endswith(_COMPILING):
        current().count(compile_seconds=duration_secs)


def kind_of(body: Body) -> str:
    """`"forward"`, `"jvp"` or `"vjp"`: the derivative that was taken last."""
    while isinstance(body, Batch):
        body = body.base
    return KINDS[type(body)]


def title_of(body: Body) -> str:
    """The name of a run of `body` in the traces of `jax.profiler`."""
    name, kind = body.primal.title, kind_of(body)
    return name if kind == "forward" else f"{name} ({kind})"


class Row(NamedTuple):
    """A row of a profile.

    Attributes:
        name: of the user's function.
        func: the user's function.
        kind: what it is run for.
    """

    name: str
    func: Callable[..., Any]
    kind: str = "forward"


def row_of(body: Body) -> Row:
    """The row that calls of `body` are counted in."""
    primal = body.primal
    return Row(primal.title, unwrapped(primal.func), kind_of(body))


def measured(
    row: Row,
    context: Context,
    operands: Sequence[Any],
    execute: Callable[[Context, Sequence[Any]], Any],
) -> Any:
    """Do a call, and add it to the open profiles.

    Args:
        row: where it is counted.
        context: what it runs in; it is entered here.
        operands: what enters the call; its arrays count as bytes in.
        execute: does the call, in the context that it is given.

    Returns:
        The results.
    """
    if not open_profiles:
        with entered(context):
            return execute(context, operands)
    profiles = set(open_profiles)
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
        counts.crossing_seconds = time.perf_counter() - begin - counts.body_seconds
        for each in profiles:
            each._add((row.name, _source(row.func)), row.kind, counts, id(row.func))


def _nbytes(values: Iterable[Any]) -> int:
    return sum(x.nbytes for x in values if isinstance(x, jax.Array | np.ndarray))


def _source(func: Any) -> str:
    """File and line of a function, or of the class of a callable object."""
    code = code_of(func)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else "built-in"


class profile:  # noqa: N801 - a context manager, named like JAX's own
    """Count and time what the bodies of `py_func` and `numpy_func` do in a block.

    Printed, it is a table, also in a notebook: a row for each function and for what it
    was run for: `forward` to get its results, `jvp` to push tangents through it, `vjp`
    to pull cotangents back. A derivative of higher order counts as the one taken last:
    the reverse derivative of a forward derivative as `vjp`. So does a transpose.

    A function is known by its name and by the line that defines it, which is shown
    where several have one name. Closures made by one line are one function; give them
    names (`py_func(..., name=...)`) to tell them apart.

    The columns, by their names in `as_dict`:

    - `calls`: calls of the host by a compiled program, and eager calls.
    - `elements`: what these computed: a call under `jax.vmap` by branch or one by one
      one for each element of the batch, any other one.
    - `runs`: how often the body itself was run for that: by branch once for many elements,
      and not at all for a derivative that is taken of a run that was kept.
    - `body_seconds`: time in the body, calls to other functions included; of a
      derivative, time to push or pull through its run.
    - `crossing_seconds`: the rest of the call: to convert operands and results, cut and
      stack batches, enter the caller's JAX configuration. What XLA does before Python is
      reached, some 10 us, is not in it.
    - `bytes_in`, `bytes_out`: of the operands and of the results.
    - `exceptions`: calls that raised. They count in the other columns too.
    - `from_tape`: elements of derivatives that were taken of a run that was kept, so that
      the body was not run again.
    - `reran`: elements of derivatives for which the body was run again.
    - `compile_seconds`: time in which JAX compiled what the call needed, operations of the
      body above all: each is compiled at its first use, for arrays of one shape. It is part
      of the times above.
    - `one_by_one`: why batches that were to run by branch ran one by one, for the last that
      did; empty if none did. It is printed below the table.
    - `tape_bytes`: what the tapes of the function hold now, those of calls outside of the
      block included; in the row `forward` alone. See `set_tape_limit`.

    Eager calls count, though nothing crosses there: their crossing is the check and the
    conversion of the results, and JAX may still compute when their body has returned.

    A call counts in every block, of any thread, that was open when it began. On leaving
    a block without an exception, it waits for what its thread has dispatched in it, so
    that the calls of those programs are in it; not so in a body, which must not wait for
    its own program, nor for a body that itself waits for some seconds, as for a lock that
    is held here. A failure of theirs surfaces where JAX reports it, not here. A profile
    may be entered again, and goes on counting.

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

    The time of operations in a body is shown by `jax.profiler`, in whose traces bodies
    have their names, derivatives marked: `square`, `square (vjp)`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[FunctionKey, dict[str, Counts]] = {}
        self._functions: dict[FunctionKey, set[int]] = {}  # by their ids
        self._before: list[Flight] = []

    def __enter__(self) -> profile:
        self._before.append(Flight())
        with _opening:
            if not open_profiles:
                jax.monitoring.register_event_duration_secs_listener(_note_compiling)
            open_profiles.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        before = taken(self._before)
        try:
            if error is None:
                before.wait()
        finally:
            with _opening:
                open_profiles.remove(self)
                if not open_profiles:
                    # It raises where the user has cleared all listeners meanwhile.
                    with contextlib.suppress(AssertionError, ValueError):
                        jax.monitoring.unregister_event_duration_listener(_note_compiling)

    def _add(self, key: FunctionKey, kind: str, counts: Counts, function: int) -> None:
        with self._lock:
            self._functions.setdefault(key, set()).add(function)
            self._counts.setdefault(key, {}).setdefault(kind, Counts()).add(counts)

    def as_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The counts so far.

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
                    for kind in dict.fromkeys(KINDS.values())
                    if kind in kinds
                }
                for (name, source), kinds in self._counts.items()
            }

    def _tape_bytes(self, name: str, source: str, kind: str) -> int:
        return (
            tape_cache.bytes_of(self._functions[name, source]) if kind == "forward" else 0
        )

    def _rows(self) -> list[list[str]]:
        return [
            [
                function if i == 0 else "",
                kind,
                f"{counts['calls']:,}",
                f"{counts['elements']:,}",
                f"{counts['runs']:,}",
                _seconds(counts["body_seconds"]),
                _seconds(counts["crossing_seconds"]),
                _bytes(counts["bytes_in"]),
                _bytes(counts["bytes_out"]),
                f"{counts['exceptions']:,}",
                f"{counts['from_tape']:,}",
                f"{counts['reran']:,}",
                _seconds(counts["compile_seconds"]),
                _bytes(counts["tape_bytes"]),
            ]
            for function, kinds in self.as_dict().items()
            for i, (kind, counts) in enumerate(kinds.items())
        ]

    def _reasons(self) -> list[str]:
        return [
            f"{function}, {kind}, ran one by one: {counts['one_by_one']}"
            for function, kinds in self.as_dict().items()
            for kind, counts in kinds.items()
            if counts["one_by_one"]
        ]

    def __repr__(self) -> str:
        table = [list(_HEADER), *self._rows()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        return "\n".join([*lines, *self._reasons()])

    def _repr_html_(self) -> str:
        def row(cells: Iterable[str], tag: str) -> str:
            return "".join(
                f'<{tag} style="text-align: {"left" if i < 2 else "right"}">'
                f"{html.escape(cell)}</{tag}>"
                for i, cell in enumerate(cells)
            )

        body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in self._rows())
        return (
            f"<table><thead><tr>{row(_HEADER, 'th')}</tr></thead>"
            f"<tbody>{body}</tbody></table>"
            + "".join(f"<p>{html.escape(reason)}</p>" for reason in self._reasons())
        )


_HEADER = (
    "function", "kind", "calls", "elements", "runs", "body", "crossing", "in", "out",
    "exceptions", "from tape", "reran", "compiling", "tapes"
)  # fmt: skip


def _seconds(value: float) -> str:
    for scale, unit in ((1, "s"), (1e3, "ms")):
        if value * scale >= 1:
            return f"{value * scale:.2f} {unit}"
    return f"{value * 1e6:.1f} us"


def _bytes(value: int | float) -> str:
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value} B"
