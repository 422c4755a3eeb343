"""Lower the nodes that a run needs to one function of its feeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpyfunc._errors import InferenceError, add_note, see
from jpyfunc._runtime.context import not_building
from jpyfunc.tf1._apply import Compute
from jpyfunc.tf1._nodes import Operation, Tensor
from jpyfunc.tf1._pullback import with_pullback
from jpyfunc.tf1._values import fits


@dataclasses.dataclass(slots=True)
class _Level:
    """The inputs and results that nodes need of one pullback, which is computed once."""

    wrt: set[int] = dataclasses.field(default_factory=set)
    of: set[int] = dataclasses.field(default_factory=set)


def lower(
    fetches: Sequence[Tensor | Operation], feeds: Sequence[Tensor]
) -> Callable[..., list[Any]]:
    """Lower a graph to a function of the feeds that computes only the fetches.

    Args:
        fetches: what to compute.
        feeds: the tensors whose values are given.

    Returns:
        A function of one array per feed, in their order, that `jax.jit` can compile.
        It returns one array per tensor in `fetches`. For an operation, it returns the list
        of its results or, if there are none, an array that is ready when it has run.

    Raises:
        ValueError: a placeholder is needed but not fed.
    """
    fed = frozenset(feeds)
    needed = _needed(fetches, fed)
    levels = _levels(needed)
    steps = [
        (op, _with_pullbacks(needed[op], levels[op]))
        for op in sorted(needed, key=lambda op: op.id)
    ]

    def session_run(*values: Any) -> list[Any]:
        known = dict(zip(feeds, map(jnp.asarray, values), strict=True))
        ran: dict[Operation, list[Any]] = {}
        for op, compute in steps:
            ran[op] = _run(op, compute, [known[t] for t in op.inputs])
            for t, value in zip(op.results, ran[op], strict=False):
                known.setdefault(t, value)  # a fed value stays
        return [
            known[item]
            if isinstance(item, Tensor)
            else ran.get(item, [])[: len(item.outputs)] or jnp.zeros(())
            for item in fetches
        ]

    return session_run


def _run(op: Operation, compute: Compute, inputs: list[Any]) -> list[Any]:
    """Compute the results of an operation, the hidden pullbacks included."""
    try:
        with not_building():
            results = compute(inputs)
    except InferenceError as error:
        original = _original(error, op)
        raise original from original.__cause__
    except Exception as error:
        add_note(error, f"in graph operation {op.name!r}")
        raise
    for t, value in zip(op.outputs, results, strict=False):
        if t.shape is not None and not fits(value.shape, t.shape):
            raise ValueError(
                f"tensor {t.name!r}: expected shape {t.shape}, as declared by set_shape, "
                f"got {value.shape}." + see("A value that does not fit a tensor")
            )
    return results


def _original(error: InferenceError, op: Operation) -> Exception:
    """Return the exception that a body raised on abstract values, or else `error`."""
    cause = error.__cause__
    add_note(error, f"in graph operation {op.name!r}")
    # These two mean that the body needs a value, so the advice in `error` applies.
    needs_value = (jax.errors.JAXTypeError, jax.errors.JAXIndexError)
    if not isinstance(cause, Exception) or isinstance(cause, needs_value):
        return error
    add_note(cause, str(error))
    return cause


def _needed(
    fetches: Sequence[Tensor | Operation], fed: frozenset[Tensor]
) -> dict[Operation, Compute]:
    """Find the operations that the fetches depend on, up to the tensors that are fed."""
    stack = [
        item if isinstance(item, Operation) else item.op
        for item in fetches
        if item not in fed
    ]
    found: dict[Operation, Compute] = {}
    while stack:
        op = stack.pop()
        if op in found:
            continue
        if op.compute is None:
            if op.outputs[0] in fed:
                continue
            raise _unfed(op.outputs[0])
        found[op] = op.compute
        stack.extend(t.op for t in op.inputs if t not in fed)
    return found


def _levels(needed: Iterable[Operation]) -> dict[Operation, dict[int, _Level]]:
    """Find the pullbacks that are applied to each operation, by their level."""
    levels: dict[Operation, dict[int, _Level]] = {op: {} for op in needed}
    for op in needed:
        if op.applies is not None:
            pullback = op.inputs[0]
            level = levels[pullback.op].setdefault(pullback.level, _Level())
            level.wrt.update(op.applies[0])
            level.of.update(op.applies[1])
    for own in levels.values():
        # A pullback is told by the level above which of its leaves are differentiated, so
        # a level must be taken with respect to all inputs that the levels above are.
        wrt: set[int] = set()
        for number in sorted(own, reverse=True):
            own[number].wrt |= wrt
            wrt = own[number].wrt
    return levels


def _unfed(tensor: Tensor) -> ValueError:
    shape = "" if tensor.shape is None else f" and shape {tensor.shape}"
    return ValueError(
        f"You must feed a value for placeholder {tensor.op.name!r} with dtype "
        f"{tensor.dtype}{shape}: session.run(fetches, {{tensor: value}})."
        + see("A placeholder that is not fed")
    )


def _with_pullbacks(compute: Compute, levels: dict[int, _Level]) -> Compute:
    # A node that uses a level uses all levels below it: see `_GraphSweep`.
    for number in sorted(levels):
        level = levels[number]
        compute = with_pullback(compute, tuple(sorted(level.wrt)), tuple(sorted(level.of)))
    return compute
