"""The derivative of a loop: a map linear in the tangents, or the transpose of that map."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Primitive
from jax.interpreters import ad, batching, mlir, xla

from jpyfunc import _compat
from jpyfunc._limits import MAX_SLOTS
from jpyfunc._loops.loop_primitive import free_running_loop, moved, select
from jpyfunc._loops.saved_carries import SavedRun, put, take
from jpyfunc._loops.step_jaxprs import Arrays, call, fixpoint, trace

linear_p = Primitive("linear_while")
linear_p.multiple_results = True


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """The kinds of operands and results of a linear loop.

    The operands are the count, the stride, the total, constants, slots, and what the map is
    linear in. Forward, these are the tangents of constants, then of carries, and the
    results are the tangents of carries. Backward, results and linear operands are
    exchanged.

    Attributes:
        consts: how many constants there are.
        slots: how many carries are saved.
        free_slots: how many of these, the first, are free-running.
        of_consts: how many constants have tangents.
        free: how many of the carries that have tangents, the first, are free-running.
        shares_total: whether the total may be that of other elements, too: the loop has
            carries that are free-running, and changes them as often.
        rank: with how many axes of the count the tangents of constants begin.
        backward: whether the map is the transpose.
    """

    consts: int
    slots: int
    free_slots: int
    of_consts: int
    free: int
    shares_total: bool
    rank: int
    backward: bool

    @property
    def first_linear(self) -> int:
        """The number of the first operand that the map is linear in."""
        return 3 + self.consts + self.slots


def residuals(saved: SavedRun, consts: Arrays) -> Arrays:
    """Make the operands of a linear loop that it is not linear in.

    The count and the stride get axes, which make their types unusual. Of two branches of a
    `lax.cond`, JAX keeps residuals of one type in the same place. In a batch, either branch
    is computed with those of the other, for elements that did not take it, and a count that
    is really a stride, or the user's number, would make loops of any length of it.
    """
    axes = (saved.count.ndim, saved.count.ndim + 1)
    count = jnp.expand_dims(saved.count, axes)
    stride, total = saved.stride.reshape(1, 1, 1), saved.total.reshape(1, 1, 1, 1)
    return [count, stride, total, *consts, *saved.slots]


def _linear_abstract_eval(
    *avals: ShapedArray, advance: ClosedJaxpr, step: ClosedJaxpr, layout: Layout
) -> list[ShapedArray]:
    return list(step.out_avals)


@dataclasses.dataclass(frozen=True, slots=True)
class _Sweep:
    """One linear loop on its operands."""

    count: jax.Array
    stride: jax.Array
    total: jax.Array
    consts: Arrays
    slots: Arrays
    linear: Arrays
    advance: ClosedJaxpr
    step: ClosedJaxpr
    layout: Layout

    @classmethod
    def of(cls, *operands: jax.Array, layout: Layout, **jaxprs: ClosedJaxpr) -> _Sweep:
        """Sort the operands."""
        count, stride, total, *others = operands
        n, m = layout.consts, layout.consts + layout.slots
        return cls(
            count[..., 0, 0],
            stride[0, 0, 0],
            total[..., 0, 0, 0, 0],
            others[:n],
            others[n:m],
            others[m:],
            layout=layout,
            **jaxprs,
        )

    @property
    def size(self) -> int:
        """The number of rows of the slots, without the spare one."""
        return self.slots[0].shape[0] - 1 if self.slots else MAX_SLOTS

    def run(self) -> Arrays:
        """Compute the map."""
        return self.backward() if self.layout.backward else self.forward()

    def forward(self) -> Arrays:
        """Push tangents through all iterations, from the first carry on."""
        n = self.layout.slots
        fixed, tangents = _cut(self.linear, self.layout.of_consts)

        def iteration(state: Arrays) -> Arrays:
            (i,), c, t = state[:1], state[1 : 1 + n], state[1 + n :]
            new = call(self.step, *self.consts, *c, *fixed, *t)
            return [i + 1, *self.next_carry(i, c), *self.masked(i, new, t)]

        first = [take(b, jnp.int32(0)) for b in self.slots]
        state = [jnp.int32(0), *first, *tangents]
        total = self.total.max()
        return _repeat(lambda s: s[0] < total, iteration, state)[1 + n :]

    def backward(self) -> Arrays:
        """Pull cotangents back through all iterations, from the last one on."""
        sums = [jnp.zeros(a.shape, a.dtype) for a in self.step.out_avals]
        sums = sums[: self.layout.of_consts]
        state = [self.total.max(), *sums, *self.linear]
        return _repeat(lambda s: s[0] > 0, self.pull_interval, state)[1:]

    def pull_interval(self, state: Arrays) -> Arrays:
        """Pull cotangents back through the iterations from a slot on, up to `end`.

        The carries of some of them are computed again, at equal distances.
        """
        n, size, stride = self.layout.slots, self.size, self.stride
        end = state[0]
        # The first slot that a stretch can begin with, or the last one before `end`.
        slot = (jnp.maximum(end - size, 0) + stride - 1) // stride
        slot = jnp.minimum(slot, (end - 1) // stride)
        begin = slot * stride
        distance = jnp.maximum(size, (end - begin + size - 1) // size)
        last = begin + (end - begin - 1) // distance * distance

        def advance(state: Arrays) -> Arrays:
            between, i, c = state[:n], state[n], state[n + 1 :]
            is_kept = (i < last) & ((i - begin) % distance == 0)
            at = jnp.where(is_kept, (i - begin) // distance, size)
            between = [put(b, x, at) for b, x in zip(between, c, strict=True)]
            return [*between, i + 1, *self.next_carry(i, c)]

        # Rows that are not written are not read.
        advanced = [*self.slots, begin, *(take(b, slot) for b in self.slots)]
        advanced = _repeat(lambda s: s[n] < last, advance, advanced, n)
        between, c = advanced[:n], advanced[n + 1 :]
        at = (last - begin) // distance
        between = [put(b, x, at) for b, x in zip(between, c, strict=True)]

        def one_stretch(state: Arrays) -> Arrays:
            return self.pull_stretch(state, between, begin, distance)

        return _repeat(lambda s: s[0] > begin, one_stretch, state)

    def pull_stretch(
        self, state: Arrays, between: Arrays, begin: jax.Array, distance: jax.Array
    ) -> Arrays:
        """Pull cotangents back through as many iterations before `end` as there are rows.

        All their carries are computed again, unless the slots have them already.
        """
        n, k = self.layout.slots, self.layout.of_consts
        end, others = state[0], state[1:]
        at = (end - 1 - begin) // distance
        start = jnp.maximum(begin + at * distance, end - self.size)

        def advance(state: Arrays) -> Arrays:
            i, *c = state
            return [i + 1, *self.next_carry(i, c)]

        def advance_saving(state: Arrays) -> Arrays:
            rows, i, c = state[:n], state[n], state[n + 1 :]
            at = jnp.where(i < stop, i - start, self.size)
            rows = [put(b, x, at) for b, x in zip(rows, c, strict=True)]
            return [*rows, i + 1, *self.next_carry(i, c)]

        first = [take(b, at) for b in between]
        state = [begin + at * distance, *first]
        _, *c = _repeat(lambda s: s[0] < start, advance, state)
        stop = jnp.where(self.stride == 1, start, end)
        state = [*self.slots, start, *c]
        rows = _repeat(lambda s: s[n] < stop, advance_saving, state, n)[:n]

        def iteration(state: Arrays) -> Arrays:
            i, sums, cts = state[0] - 1, state[1 : 1 + k], state[1 + k :]
            c = [take(b, i - start) for b in rows]
            zeros = [jnp.zeros_like(x) for x in cts]
            new = call(self.step, *self.consts, *c, *self.masked(i, cts, zeros))
            more = self.masked_sums(i, new[:k])
            sums = [x + y for x, y in zip(sums, more, strict=True)]
            return [i, *sums, *self.masked(i, new[k:], cts)]

        others = _repeat(lambda s: s[0] > start, iteration, [end, *others])[1:]
        return [start, *others]

    def next_carry(self, i: jax.Array, c: Arrays) -> Arrays:
        """Compute the carries that are saved, after iteration `i`.

        An element that is done stays at the carry of its last iteration: derivatives there
        are multiplied by zero, so they must be finite.
        """
        new = call(self.advance, *self.consts, *c)
        free = self.layout.free_slots
        return [*new[:free], *self.chosen(i + 1 < self.count, new[free:], c[free:])]

    def masked(self, i: jax.Array, new: Arrays, old: Arrays) -> Arrays:
        """Choose the new tangents of the elements that iteration `i` is one of.

        What is free-running changed as long as any element went on, in the run that was
        saved: the total is one for all elements, unless they have different runs.
        """
        free = self.layout.free
        return [
            *self.chosen(i < self.total, new[:free], old[:free]),
            *self.chosen(i < self.count, new[free:], old[free:]),
        ]

    def chosen(self, goes_on: jax.Array, new: Arrays, old: Arrays) -> Arrays:
        """Choose the new values of the elements that go on; of one alone, all."""
        if not goes_on.ndim and not self.layout.shares_total:
            return new
        return [select(goes_on, x, y) for x, y in zip(new, old, strict=True)]

    def masked_sums(self, i: jax.Array, new: Arrays) -> Arrays:
        """Choose zeros where none of the elements that a sum is over has iteration `i`."""
        if not self.layout.rank:
            return new
        axes = tuple(range(self.layout.rank, self.count.ndim))
        goes_on = (i < self.count).any(axes)
        return [select(goes_on, x, jnp.zeros_like(x)) for x in new]


def _cut(values: Arrays, at: int) -> tuple[Arrays, Arrays]:
    return values[:at], values[at:]


def _repeat(
    test: Callable[[Arrays], jax.Array],
    body: Callable[[Arrays], Arrays],
    state: Arrays,
    free: int = 0,
) -> Arrays:
    return free_running_loop(lambda _, s: test(s), lambda _, s: body(s), [], state, free)


def _run(*operands: jax.Array, **params: Any) -> Arrays:
    return _Sweep.of(*operands, **params).run()


def _linear_jvp(
    primals: Sequence[jax.Array], tangents: Sequence[Any], **params: Any
) -> tuple[Arrays, Sequence[Any]]:
    """Push tangents: the map is its own derivative, and it depends on its residuals.

    It is written with loops, which know their derivatives.
    """
    first = params["layout"].first_linear
    results = linear_p.bind(*primals, **params)
    sums: list[Any] = [ad.Zero(jax.typeof(y).to_tangent_aval()) for y in results]
    if any(map(is_perturbed, tangents[first:])):
        linear = map(ad.instantiate_zeros, tangents[first:])
        sums = linear_p.bind(*primals[:first], *linear, **params)
    wrt = [i for i, t in enumerate(tangents[:first]) if is_perturbed(t)]
    if not wrt:
        return results, sums

    def of_residuals(*values: jax.Array) -> Arrays:
        operands = list(primals)
        for i, x in zip(wrt, values, strict=True):
            operands[i] = x
        return _run(*operands, **params)

    _, more = jax.jvp(of_residuals, [primals[i] for i in wrt], [tangents[i] for i in wrt])
    return results, [ad.add_tangents(x, y) for x, y in zip(sums, more, strict=True)]


def is_perturbed(tangent: Any) -> bool:
    """Whether a tangent is that of an operand that is differentiated."""
    return (
        not isinstance(tangent, ad.Zero) and jax.typeof(tangent).dtype != jax.dtypes.float0
    )


def _linear_transpose(
    cotangents: Sequence[Any],
    *operands: Any,
    advance: ClosedJaxpr,
    step: ClosedJaxpr,
    layout: Layout,
) -> list[Any]:
    first = layout.first_linear
    if all(isinstance(ct, ad.Zero) for ct in cotangents):
        return [ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in operands]
    results = linear_p.bind(
        *operands[:first],
        *map(ad.instantiate_zeros, cotangents),
        advance=advance,
        step=_transposed(step, layout.consts + layout.slots),
        layout=dataclasses.replace(layout, backward=not layout.backward),
    )
    wanted = [ad.is_undefined_primal(x) for x in operands[first:]]
    return [None] * first + [
        x if want else None for x, want in zip(results, wanted, strict=True)
    ]


@_compat.weakref_lru_cache
def _transposed(step: ClosedJaxpr, residuals: int) -> ClosedJaxpr:
    """Transpose a step that is linear in all operands but the first, its residuals."""
    linear = step.in_avals[residuals:]

    def transposed(*operands: jax.Array) -> Arrays:
        known, cotangents = operands[:residuals], operands[residuals:]
        transpose = jax.linear_transpose(lambda *xs: call(step, *known, *xs), *linear)
        return list(transpose(list(cotangents)))

    return trace(transposed, *step.in_avals[:residuals], *step.out_avals)


def _linear_batching(
    axis_data: Any,
    operands: Sequence[jax.Array],
    dims: Sequence[int | None],
    *,
    advance: ClosedJaxpr,
    step: ClosedJaxpr,
    layout: Layout,
) -> tuple[Arrays, Sequence[int | None]]:
    """Batch the map, in all that it is linear in.

    The stride is that of all elements: it depends on how often any of them went on. It has
    a batch axis all the same where the residuals were chosen by element, as those of a loop
    in a branch of a batched `lax.cond` are, or where they come from several runs.
    """
    if dims[1] is not None:
        operands, dims = _with_one_stride(operands, dims, layout)
    if all(d is None for d in dims):
        params = dict(advance=advance, step=step, layout=layout)
        return linear_p.bind(*operands, **params), [None] * len(step.out_avals)
    n, first = 3 + layout.consts, layout.first_linear
    ends_apart = dims[0] is not None
    rank = 0 if ends_apart else operands[0].ndim - 2
    # Which of the saved carries are batched, as in the loop that saved them.
    of_consts = [d is not None for d in dims[3:n]]
    of_slots = [d is not None for d in dims[n:first]]
    of_slots = fixpoint(
        [
            flag or (ends_apart and i >= layout.free_slots)
            for i, flag in enumerate(of_slots)
        ],
        lambda now: _compat.batch_jaxpr(advance, axis_data, [*of_consts, *now], now)[1],
    )
    of_carries = [0] * layout.free_slots + [rank] * (layout.slots - layout.free_slots)
    carries = [to if flag else None for to, flag in zip(of_carries, of_slots, strict=True)]
    # All that the map is linear in is batched, and so are its results.
    outputs = len(step.out_avals) - layout.of_consts * layout.backward
    of_free = 0 if dims[2] is not None else operands[2].ndim - 4
    tangents = [of_free] * layout.free + [rank] * (outputs - layout.free)
    of_sums = 0 if ends_apart else layout.rank
    both = [of_sums] * layout.of_consts + tangents
    into, out = (tangents, both) if layout.backward else (both, tangents)
    consts = [0 if flag else None for flag in of_consts]
    wanted = [
        *(None if d is None else 0 for d in dims[:3]),
        *consts,
        *(None if to is None else 1 + to for to in carries),
        *into,
    ]
    results = linear_p.bind(
        *moved(operands, dims, wanted, axis_data),
        advance=_compat.batch_jaxpr_axes(advance, axis_data, consts + carries, carries)[0],
        step=_compat.batch_jaxpr_axes(step, axis_data, consts + carries + into, out)[0],
        layout=dataclasses.replace(layout, rank=layout.rank + ends_apart),
    )
    return results, out


def _with_one_stride(
    operands: Sequence[jax.Array], dims: Sequence[int | None], layout: Layout
) -> tuple[list[jax.Array], list[int | None]]:
    """Thin the slots of each element to the largest stride of all.

    Strides are powers of two, so that every slot of the largest one is in all elements:
    slot `j` is slot `j * ratio` of an element whose stride is smaller by `ratio`. Rows past
    its end are never used, because its count ends before. Of a branch that an element did
    not take, its stride and count are zero.
    """
    n, first = 3 + layout.consts, layout.first_linear
    strides = jnp.moveaxis(operands[1], dims[1] or 0, 0)[:, 0, 0, 0]
    stride = strides.max()

    def thin(rows: jax.Array, own: jax.Array) -> jax.Array:
        at = jnp.arange(len(rows)) * (stride // jnp.maximum(own, 1))
        return rows[jnp.minimum(at, len(rows) - 1)]

    slots = [
        jax.vmap(thin, (d, 0))(x, strides)
        for x, d in zip(operands[n:first], dims[n:first], strict=True)
    ]
    of_slots: list[int | None] = [0] * len(slots)
    return (
        [operands[0], stride.reshape(1, 1, 1), *operands[2:n], *slots, *operands[first:]],
        [dims[0], None, *dims[2:n], *of_slots, *dims[first:]],
    )


linear_p.def_abstract_eval(_linear_abstract_eval)
linear_p.def_impl(functools.partial(xla.apply_primitive, linear_p))
mlir.register_lowering(linear_p, mlir.lower_fun(_run, multiple_results=True))
ad.primitive_jvps[linear_p] = _linear_jvp
ad.primitive_transposes[linear_p] = _linear_transpose
batching.fancy_primitive_batchers[linear_p] = _linear_batching
