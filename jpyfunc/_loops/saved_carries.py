"""A loop run once more with its carries saved, every k-th, in a fixed number of slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from jpyfunc._loops.loop_primitive import free_running_loop, select
from jpyfunc._loops.step_jaxprs import Arrays, call, pick


@dataclasses.dataclass(frozen=True, slots=True)
class SavedRun:
    """The results of a loop, and its saved carries.

    Attributes:
        results: its carry after the last iteration.
        count: the number of iterations, of each element of a batch.
        total: the number of iterations until all elements were done; without carries that
            are free-running, this may be the count.
        stride: slot `j` has the carry before iteration `j * stride`.
        slots: the carries that are saved, with a leading axis.
    """

    results: Arrays
    count: jax.Array
    total: jax.Array
    stride: jax.Array
    slots: Arrays


def initial_state(
    test: ClosedJaxpr, carry: Arrays, free: int, kept: Sequence[bool], size: int
) -> Arrays:
    """Make the state of `run_saving` before the first iteration."""
    now = pick(carry, kept)
    is_batch = bool(test.out_avals[0].shape)
    return [
        *(jnp.int32(0), jnp.int32(1)),
        *(jnp.broadcast_to(x, (size + 1, *x.shape)) for x in now),
        *carry[:free],
        jnp.zeros(test.out_avals[0].shape, jnp.int32),
        *(now[sum(kept[:free]) :] if is_batch else []),
        *carry[free:],
    ]


def run_saving(
    test: ClosedJaxpr,
    body: ClosedJaxpr,
    consts: Arrays,
    carry: Arrays,
    free: int,
    kept: Sequence[bool],
    size: int,
) -> SavedRun:
    """Run a loop and save those of its carries that are `kept`, in `size` slots."""
    rank = len(test.out_avals[0].shape)
    n, m = sum(kept), sum(kept[:free])
    k = n - m if rank else 0
    # The state of the loop below: i, stride, slots, the carries that are free-running; then
    # the count, for a batch the kept carries of the iteration before, and other carries.
    ends = [1, 2, 2 + n, 2 + n + free, 3 + n + free, 3 + n + free + k]

    def split(state: Arrays) -> list[Arrays]:
        return [state[i:j] for i, j in zip([0, *ends], [*ends, len(state)], strict=True)]

    def goes_on(state: Arrays) -> jax.Array:
        _, _, _, free_running, _, _, others = split(state)
        return call(test, *consts, *free_running, *others)[0]

    def iteration(_: Arrays, state: Arrays) -> Arrays:
        (i,), (stride,), slots, free_running, (count,), before, others = split(state)
        c = [*free_running, *others]
        rows = now = pick(c, kept)
        if rank:
            alive, before_or_now = goes_on(state), zip(now[m:], before, strict=True)
            rows = [*now[:m], *(select(alive, x, y) for x, y in before_or_now)]
            before = now[m:]
        at = jnp.where(i % stride == 0, i // stride, size)
        slots = [put(b, x, at) for b, x in zip(slots, rows, strict=True)]
        c = call(body, *consts, *c)
        return [i + 1, stride, *slots, *c[:free], count + 1, *before, *c[free:]]

    def until_full(_: Arrays, state: Arrays) -> Arrays:
        (i,), (stride,), slots = split(state)[:3]
        thinned = jax.lax.cond(i == 0, lambda bs: bs, _thinned, slots)
        stride = jnp.where(i == 0, stride, 2 * stride)
        return free_running_loop(
            lambda _, s: goes_on(s) & (s[0] < size * stride),
            iteration,
            [],
            [i, stride, *thinned, *state[2 + n :]],
            ends[3],
        )

    state = initial_state(test, carry, free, kept, size)
    state = free_running_loop(lambda _, s: goes_on(s), until_full, [], state, ends[3])
    (i,), (stride,), slots, free_running, (count,), _, others = split(state)
    # In a batch that is made later, of this run, `i` is that of all elements.
    total = i if rank or free else count
    return SavedRun([*free_running, *others], count, total, stride, slots)


def _thinned(slots: Arrays) -> Arrays:
    """Move every second of the rows to the first half; the spare one stays the last."""
    return [jnp.concatenate([b[:-1:2], b[len(b) // 2 :]]) for b in slots]


def put(rows: jax.Array, row: jax.Array, at: jax.Array) -> jax.Array:
    """Write a row."""
    return jax.lax.dynamic_update_index_in_dim(rows, row, at, 0)


def take(rows: jax.Array, at: jax.Array) -> jax.Array:
    """Read a row."""
    return jax.lax.dynamic_index_in_dim(rows, at, 0, keepdims=False)
