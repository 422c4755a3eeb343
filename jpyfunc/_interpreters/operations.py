"""The operations of a body as compiled functions that know their derivatives.

What a body does is the same from call to call: a few operations on arrays of a few
shapes. Each is compiled once, and so is what its derivatives need: the operation with
its residuals, which pushes tangents and pulls cotangents. These are operations again,
so that there are derivatives of every order.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import (
    Literal,
    jaxpr_as_fun,
    jaxprs_in_params,
    primitives,
    set_current_trace,
)
from jax.extend.core.primitives import jit_p

from jpyfunc import _compat
from jpyfunc._limits import (
    MAX_LOOPED_BYTES,
)

Indices = tuple[int, ...]
Axes = tuple[int | None, ...]


class CompiledOperation:
    """A function from flat operands to a list of results, compiled.

    Attributes:
        call: the function.
        run: the same, compiled.
        avals: of its operands.
        stores: what JAX asks for when it transposes one with a custom rule.
        is_stateful: whether to run it again would be another run of something.
        is_wide: whether operands are of 64 bits while these are off, as a body may leave
            them: no such function can be traced.
        is_orphan: whether no later call can be of it, so that only runs that are kept
            hold it, without what was compiled of it.
        nbytes: of the largest array in it, or of one that takes as long, once it was asked
            for `batched`.
        refusal: why it cannot be batched, once it was asked.
    """

    __slots__ = (
        "_batched",
        "_has_rules",
        "_linear",
        "avals",
        "call",
        "is_orphan",
        "is_stateful",
        "is_wide",
        "nbytes",
        "refusal",
        "run",
        "stores",
    )

    def __init__(
        self,
        call: Callable[..., list[Any]],
        avals: Sequence[Any],
        has_rules: bool | None = None,
        is_stateful: bool = False,
    ) -> None:
        self.call = call
        self.is_stateful = is_stateful
        self._has_rules = has_rules
        self.run = _compiled(call)
        self.is_orphan = False
        self.nbytes = 0
        self.refusal = ""
        self.avals = tuple(map(with_weak_type, avals))
        self.is_wide = any(map(_is_wide, self.avals))
        self.stores: list[tuple[Any, Any]] = []
        self._linear: dict[Indices, Linearization] = {}
        self._batched: dict[Axes, Callable[..., list[Any]] | None] = {}

    def orphan(self) -> None:
        """Say that no later call can be of it."""
        self.is_orphan = True
        self.forget()
        for linear in self._linear.values():
            linear.forget()

    def forget(self) -> None:
        """Drop what was compiled: some megabytes, beside which arrays may be nothing."""
        self.run = _compiled(self.call)
        self._batched.clear()

    def batched(self, axes: Axes) -> Callable[..., list[Any]] | None:
        """It for many operands at once, compiled, or None where that cannot be.

        Args:
            axes: for each operand, 0 if it has a leading axis, or None. All results do.
        """
        if axes not in self._batched:
            self._batched[axes] = self._make_batched(axes)
        return self._batched[axes]

    def _make_batched(self, axes: Axes) -> Callable[..., list[Any]] | None:
        function = jax.vmap(lambda *operands: self.call(*operands), axes)
        avals = [
            aval if axis is None else aval.update(shape=(2, *aval.shape))
            for aval, axis in zip(self.avals, axes, strict=True)
        ]
        with set_current_trace(_compat.eval_trace):
            try:
                closed = jax.make_jaxpr(function)(*avals)
            except Exception as error:  # noqa: BLE001 - it may have no rule
                self.refusal = first_line(error)
                return None
            inner = jax.make_jaxpr(self.call)(*self.avals)
        if calls_host(closed):
            self.refusal = f"{_first(closed, _calls_host) or 'an effect'} calls Python"
        elif odd := _first(inner, _is_odd):
            self.refusal = f"{odd} does something else, or more, for many elements at once"
        if self.refusal:
            return None
        self.nbytes = _cost(inner)
        return jax.jit(self._as_loop(function, axes) if _draws(inner) else function)

    def _as_loop(
        self, function: Callable[..., list[Any]], axes: Axes
    ) -> Callable[..., list[Any]]:
        """`function`, where it is small and on a CPU as a loop over the rows."""
        one = jax.custom_batching.sequential_vmap(lambda *operands: self.call(*operands))
        loop = jax.vmap(one, axes)

        def call(*operands: Any) -> list[Any]:
            if operands[axes.index(0)].shape[0] * self.nbytes > MAX_LOOPED_BYTES:
                return function(*operands)
            return jax.lax.platform_dependent(*operands, cpu=loop, default=function)

        return call

    @property
    def has_rules(self) -> bool:
        """Whether functions with custom rules are called in it."""
        if self._has_rules is None:
            with set_current_trace(_compat.eval_trace):
                self._has_rules = has_rules(jax.make_jaxpr(self.call)(*self.avals))
        return self._has_rules

    def linear(self, active: Indices) -> Linearization:
        """It with its derivatives by the operands `active`, which are floating."""
        linear = self._linear.get(active)
        if linear is None:
            linear = self._linear[active] = Linearization(self, active)
        return linear


def _compiled(call: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    # Of a function that nothing else holds: JAX keeps what it compiled as long as that.
    return jax.jit(lambda *operands: call(*operands))


class Linearization:
    """An operation and its derivatives by some of its operands.

    Attributes:
        forward: operands to results, then residuals that are neither. It is the operation
            itself if it has no such residuals, or computes them again at less cost than
            that of storing them.
        of: the results that depend on the operands `active`.
        size: how many results the operation has.
    """

    def __init__(self, operation: CompiledOperation, active: Indices) -> None:
        self._stores = operation.stores
        inexact: list[int] = []
        structure: list[Any] = []

        def linearized(operands: Sequence[Any]) -> tuple[list[Any], Any]:
            def restricted(*values: Any) -> tuple[list[Any], list[Any]]:
                full = list(operands)
                for i, value in zip(active, values, strict=True):
                    full[i] = value
                results = operation.call(*full)
                inexact[:] = [i for i, x in enumerate(results) if is_inexact(x)]
                return [results[i] for i in inexact], results

            at = [operands[i] for i in active]
            _, push, results = jax.linearize(restricted, *at, has_aux=True)
            return results, push

        def forward(*operands: Any) -> tuple[list[Any], list[Any]]:
            results, push = linearized(operands)
            residuals, tree = jax.tree.flatten(push)
            structure[:] = [tree]
            return results, residuals

        with set_current_trace(_compat.eval_trace):
            closed, shapes = jax.make_jaxpr(forward, return_shape=True)(*operation.avals)
        self.size = len(shapes[0])
        kept, self._sources, fixed = _residuals(closed, self.size)
        avals = [
            aval
            for aval, f in zip(closed.out_avals[self.size :], fixed, strict=True)
            if f is None
        ]

        def restored(residuals: Sequence[Any]) -> Any:
            rest = iter(residuals)
            leaves = [next(rest) if f is None else f.val for f in fixed]
            return jax.tree.unflatten(structure[0], leaves)

        self.forward, push_at = operation, restored
        # The derivative of what a custom rule computes is not that of the function.
        if len(kept) > self.size and not operation.has_rules and _is_cheap(closed):
            self._sources, avals = range(len(operation.avals)), operation.avals
            push_at = lambda operands: linearized(operands)[1]  # noqa: E731
        elif len(kept) > self.size or operation.has_rules:
            evaluate = jaxpr_as_fun(closed)

            def kept_only(*operands: Any) -> list[Any]:
                outputs = evaluate(*operands)
                return [outputs[i] for i in kept]

            self.forward = CompiledOperation(kept_only, operation.avals)

        def push(residuals: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
            _compat.fill(self._stores)
            return push_at(residuals)(*tangents)

        tangents = [_tangent(operation.avals[i]) for i in active]
        self._avals = ([with_weak_type(aval) for aval in avals], tangents)
        with set_current_trace(_compat.eval_trace):
            pushed = jax.make_jaxpr(push)(*self._avals)
        dependent = _dependent(pushed, len(avals))
        self.of = tuple(inexact[i] for i in dependent)
        self._pushed = [_tangent(pushed.out_avals[i]) for i in dependent]
        self._push = lambda *args: [y for i, y in enumerate(push(*args)) if i in dependent]
        self._pushes: dict[Indices, CompiledOperation] = {}
        self._pulls: dict[tuple[Indices, ...], CompiledOperation] = {}

    def forget(self) -> None:
        """As `CompiledOperation.forget`."""
        self.forward.forget()
        self._pushes.clear()
        self._pulls.clear()

    def residuals(self, operands: Sequence[Any], results: Sequence[Any]) -> list[Any]:
        """What the derivatives need of a run of `forward`."""
        pool = [*operands, *results]
        return [pool[i] for i in self._sources]

    def _push_flat(self, residuals: Sequence[Any], *tangents: Any) -> list[Any]:
        return self._push(residuals, tangents)

    def push(self, given: Indices) -> CompiledOperation:
        """From residuals and tangents to the tangents of the results `of`.

        Args:
            given: positions in `active` of the tangents that are given; the others
                are zero.
        """
        operation = self._pushes.get(given)
        if operation is None:
            free, tangents = self._avals

            def call(*operands: Any) -> list[Any]:
                full = [jnp.zeros(t.shape, t.dtype) for t in tangents]
                for i, tangent in zip(given, operands[len(free) :], strict=True):
                    full[i] = tangent
                return self._push(operands[: len(free)], full)

            avals = [*free, *(tangents[i] for i in given)]
            operation = self._pushes[given] = CompiledOperation(call, avals)
        return operation

    def pull(self, given: Indices, targets: Indices, sums: Indices) -> CompiledOperation:
        """From residuals and cotangents to the cotangents of the operands `active`.

        Args:
            given: positions in `of` of the cotangents that are given; the others are
                zero.
            targets: which result each of `active` is added to: the same for operands
                that are one value.
            sums: the results to which a cotangent is added that is given last, one for
                each: what other operations contribute.
        """
        key = (given, targets, sums)
        operation = self._pulls.get(key)
        if operation is None:
            free, tangents = self._avals
            n, m = len(free), len(free) + len(given)

            def call(*operands: Any) -> list[Any]:
                push = functools.partial(self._push_flat, operands[:n])
                pulled = _transposed(push, tangents, given, operands[n:m])
                return _summed(pulled, targets, dict(zip(sums, operands[m:], strict=True)))

            avals = [*free, *(self._pushed[i] for i in given)]
            avals += [tangents[targets.index(i)] for i in sums]
            operation = self._pulls[key] = CompiledOperation(call, avals)
        return operation


class UncachedOperation:
    """A function from flat operands to results that may be another in every call.

    It is not compiled, and linearized anew at the values of each call: a function whose
    custom rules are the user's Python, which may look at values and at the world.
    """

    __slots__ = ("call",)

    has_rules = True
    is_orphan = False
    is_stateful = False

    def __init__(self, call: Callable[..., list[Any]]) -> None:
        self.call = call

    @property
    def run(self) -> Callable[..., list[Any]]:
        return self.call

    def linearized(
        self, operands: Sequence[Any], active: Indices
    ) -> tuple[list[Any], UncachedLinearization]:
        """Its results, and its derivative there by the operands `active`."""
        inexact: list[int] = []

        def restricted(*values: Any) -> tuple[list[Any], list[Any]]:
            full = list(operands)
            for i, value in zip(active, values, strict=True):
                full[i] = value
            results = self.call(*full)
            inexact[:] = [i for i, x in enumerate(results) if is_inexact(aval_of(x))]
            return [results[i] for i in inexact], results

        at = [operands[i] for i in active]
        _, push, results = jax.linearize(restricted, *at, has_aux=True)
        tangents = [_tangent(aval_of(x)) for x in at]
        return results, UncachedLinearization(push, tangents, tuple(inexact), len(results))


class UncachedLinearization:
    """As `Linearization`, of one call of a `UncachedOperation`."""

    def __init__(
        self, push: Any, tangents: list[jax.ShapeDtypeStruct], of: Indices, size: int
    ) -> None:
        self._leaves, self._tree = jax.tree.flatten(push)
        self._tangents = tangents
        self.of = of
        self.size = size

    def residuals(self, operands: Sequence[Any], results: Sequence[Any]) -> list[Any]:
        """As `Linearization.residuals`."""
        return self._leaves

    def push(self, given: Indices) -> UncachedOperation:
        """As `Linearization.push`."""
        n = len(self._leaves)

        def call(*operands: Any) -> list[Any]:
            full: list[Any] = [np.zeros(t.shape, t.dtype) for t in self._tangents]
            for i, tangent in zip(given, operands[n:], strict=True):
                full[i] = tangent
            with _wide_enough(self._tangents):
                return list(jax.tree.unflatten(self._tree, operands[:n])(*full))

        return UncachedOperation(call)

    def pull(self, given: Indices, targets: Indices, sums: Indices) -> UncachedOperation:
        """As `Linearization.pull`."""
        n = len(self._leaves)

        def call(*operands: Any) -> list[Any]:
            push = jax.tree.unflatten(self._tree, operands[:n])
            m = n + len(given)
            with _wide_enough(self._tangents):
                pulled = _transposed(push, self._tangents, given, operands[n:m])
                return _summed(pulled, targets, dict(zip(sums, operands[m:], strict=True)))

        return UncachedOperation(call)


def _wide_enough(avals: Sequence[Any]) -> Any:
    """Enables 64-bit types where a body did so, and left that when this is called."""
    wide = any(map(_is_wide, avals))
    return jax.enable_x64(True) if wide else contextlib.nullcontext()


def _is_wide(aval: Any) -> bool:
    """Whether `aval` is of 64 bits, and these are off."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return False
    return jax.dtypes.canonicalize_dtype(aval.dtype) != aval.dtype


def _transposed(
    push: Callable[..., Any],
    tangents: Sequence[Any],
    given: Indices,
    cotangents: Sequence[Any],
) -> Sequence[Any]:
    """Pull the cotangents of results `given` of a linear function back through it."""

    def linear(*tangents: Any) -> list[Any]:
        pushed = push(*tangents)
        return [pushed[i] for i in given]

    return jax.linear_transpose(linear, *tangents)(list(cotangents))


def _summed(
    cotangents: Sequence[Any], targets: Indices, results: dict[int, Any]
) -> list[Any]:
    """Add each cotangent to the result that is its target."""
    for i, cotangent in zip(targets, cotangents, strict=True):
        results[i] = results[i] + cotangent if i in results else cotangent
    return [results[i] for i in range(len(results))]


def aval_of(x: Any) -> Any:
    """`jax.typeof(x)`, at a tenth of its cost for an array."""
    return x.aval if isinstance(x, jax.Array) else jax.typeof(x)


def is_inexact(x: Any) -> bool:
    """Whether `x` may have a tangent: it is floating or complex."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def with_weak_type(aval: Any) -> jax.ShapeDtypeStruct:
    """`aval` as what a function can be traced with."""
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def _tangent(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _residuals(closed: Any, size: int) -> tuple[list[int], list[int], list[Any]]:
    """Where the residuals of a forward function come from.

    Args:
        closed: its jaxpr, whose results are `size` results and the residuals.
        size: how many results come first.

    Returns:
        The outputs to keep: results, and residuals that are neither operand, result
        nor constant; for each residual that is no constant, its place in the operands
        and kept outputs; for each residual its `Literal` if it is a constant.
    """
    variables = closed.jaxpr.invars
    places = {id(v): i for i, v in enumerate(variables)}
    kept, sources, fixed = list(range(size)), [], []
    outputs = closed.jaxpr.outvars
    for i, v in enumerate(outputs[:size]):
        places.setdefault(id(v), len(variables) + i)
    for i, v in enumerate(outputs[size:], size):
        if isinstance(v, Literal):
            fixed.append(v)
            continue
        fixed.append(None)
        if id(v) not in places:
            places[id(v)] = len(variables) + len(kept)
            kept.append(i)
        sources.append(places[id(v)])
    return kept, sources, fixed


def _dependent(closed: Any, first: int) -> list[int]:
    """The results of a jaxpr that depend on operands from number `first` on."""
    live = set(map(id, closed.jaxpr.invars[first:]))
    for eqn in closed.jaxpr.eqns:
        if any(id(v) in live for v in eqn.invars):
            live.update(map(id, eqn.outvars))
    return [i for i, v in enumerate(closed.jaxpr.outvars) if id(v) in live]


def has_rules(jaxpr: Any) -> bool:
    """Whether functions with custom rules are called in a jaxpr."""
    return any(
        eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call")
        or any(map(has_rules, jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def is_host_call(primitive: Any, params: Any) -> bool:
    """Whether a bind calls the host, itself or in a jaxpr among its parameters."""
    return (
        primitive.name == "py_func"
        or "callback" in primitive.name
        or any(map(calls_host, jaxprs_in_params(params)))
    )


@_compat.weakref_lru_cache
def calls_host(jaxpr: Any) -> bool:
    """Whether a jaxpr has an effect, or calls the host."""
    return bool(jaxpr.effects) or any(
        is_host_call(eqn.primitive, eqn.params) for eqn in jaxpr.eqns
    )


def _first(jaxpr: Any, is_it: Callable[[Any], bool]) -> str | None:
    """The first primitive in a jaxpr, or in one in it, of which `is_it` holds."""
    for eqn in jaxpr.eqns:
        if is_it(eqn):
            return eqn.primitive.name
        for inner in jaxprs_in_params(eqn.params):
            if name := _first(inner, is_it):
                return name
    return None


def _calls_host(eqn: Any) -> bool:
    return is_host_call(eqn.primitive, {})


def _is_odd(eqn: Any) -> bool:
    """Whether many at once are not what each is alone, or not at about the cost.

    A `cond` is not, all of whose branches are computed, nor generators of random numbers
    other than threefry, nor what has a rule of the user's.
    """
    odd = ("cond", "custom_vmap_call", "rng_bit_generator")
    return eqn.primitive.name in odd or any(map(_is_other_key, eqn.invars))


def _draws(jaxpr: Any) -> bool:
    """Whether random numbers are drawn in a jaxpr, and all else in it is exact.

    So a loop over the rows gives the same bits as all at once. Those of a logarithm, or
    of the error function in normal numbers, depend on how it is vectorized.
    """
    if _first(jaxpr, lambda eqn: eqn.primitive not in _EXACT):
        return False
    return _first(jaxpr, lambda eqn: eqn.primitive in _RANDOM) is not None


def _cost(jaxpr: Any) -> int:
    """The bytes of the largest array that a jaxpr makes, or of one that takes as long."""
    cost = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive in _LONG:
            return 2**62
        sizes = [
            math.prod(v.aval.shape) * v.aval.dtype.itemsize
            for v in eqn.outvars
            if isinstance(v.aval, ShapedArray)
        ]
        sizes += map(_cost, jaxprs_in_params(eqn.params))
        steps = eqn.params["length"] if eqn.primitive is jax.lax.scan_p else 1
        if eqn.primitive is jax.lax.dot_general_p:
            # As many as some 64 numbers are multiplied and added in the time of one sine.
            (summed, _), _ = eqn.params["dimension_numbers"]
            steps = 1 + math.prod(eqn.invars[0].aval.shape[i] for i in summed) // 64
        cost = max([cost, *(size * steps for size in sizes)])
    return cost


_RANDOM = {
    primitives.random_bits_p,
    primitives.random_fold_in_p,
    primitives.random_seed_p,
    primitives.random_split_p,
}
# What uniform numbers and booleans of `jax.random` are made with. Integers take a
# remainder, which is three times as slow in a loop.
_EXACT = _RANDOM | {
    primitives.add_p,
    primitives.bitcast_convert_type_p,
    primitives.broadcast_in_dim_p,
    primitives.convert_element_type_p,
    primitives.jit_p,
    primitives.lt_p,
    primitives.max_p,
    primitives.mul_p,
    primitives.or_p,
    primitives.reshape_p,
    primitives.shift_right_logical_p,
    primitives.sub_p,
}

# What takes microseconds for a matrix of any size, and loops of unknown length.
_LONG = {jax.lax.while_p, jax.lax.fft_p, jax.lax.conv_general_dilated_p}
_LONG |= {p for name, p in vars(jax.lax.linalg).items() if name.endswith("_p")}


def first_line(error: BaseException) -> str:
    """What an exception says, for a line of a table."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return text if len(text) < 120 else f"{text[:117]}..."


def _is_other_key(variable: Any) -> bool:
    dtype = getattr(variable.aval, "dtype", None)
    is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key) if dtype is not None else False
    return is_key and str(dtype) != "key<fry>"


def _is_cheap(jaxpr: Any) -> bool:
    """Whether to compute it again costs less than to store what it computes."""
    return all(
        eqn.primitive.name in _CHEAP
        or (eqn.primitive is jit_p and all(map(_is_cheap, jaxprs_in_params(eqn.params))))
        for eqn in jaxpr.eqns
    )


_CHEAP = frozenset(
    """
    abs add add_any and broadcast_in_dim ceil clamp convert_element_type copy copy_p cos
    cosh div eq exp exp2 expand_dims expm1 floor ge gt imag integer_pow is_finite le log
    log1p logistic lt max min mul ne neg not or pow real reduce_and reduce_max reduce_min
    reduce_or reduce_sum rem reshape rev round rsqrt select_n sign sin sinh slice sqrt
    square squeeze stop_gradient sub tan tanh transpose xor
    """.split()  # noqa: SIM905 - forty lines otherwise
)
