"""The loop as a primitive: traced, computed by `lax.while_loop`, batched, pruned."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray, eval_jaxpr
from jax.extend.core import ClosedJaxpr, Effect, JaxprEqn, Primitive
from jax.interpreters import batching, mlir, xla

from jpyfunc import _compat
from jpyfunc._conversion import of_type
from jpyfunc._loops.step_jaxprs import (
    Arrays,
    Flags,
    call,
    either,
    fixpoint,
    needed,
    pick,
    trace,
    without_dead_code,
)
from jpyfunc._mesh import varying_over
from jpyfunc._types import Array

Function = Callable[[Arrays, Arrays], Any]


def free_running_loop(
    test: Function,
    body: Function,
    consts: Sequence[Array],
    carry: Sequence[Array],
    free: int,
) -> Arrays:
    """Run a `while_loop` whose first `free` carries need not stop with an element.

    In a batch, an element that is done stays as it is while others go on: each carry is
    selected from the one before and the next. That would touch all of a buffer in each
    iteration, and make a shared counter one for each element. What is free-running is not
    selected, and goes on to change after the test was false. So nothing that is used may be
    written there then, not even its own value: its cotangent would be lost, as those of the
    other carries of an element that is done are passed on as they are. `test` may return an
    array, with whose shape the shapes of all other carries begin.
    """
    given, first = [*map(jnp.asarray, consts)], [*map(jnp.asarray, carry)]
    tested, closed, first = _traced(test, body, given, first)
    # Both take all constants: those of the test, of the body, and the ones given.
    of_test, of_body = list(tested.consts), list(closed.consts)
    m, n = len(of_test), len(of_body)
    opened_test, opened_body = _compat.opened(tested), _compat.opened(closed)
    operands = [*of_test, *of_body, *given, *first]
    return loop_p.bind(
        *operands,
        test=trace(lambda *xs: opened_test(*xs[:m], *xs[m + n :]), *operands),
        body=trace(lambda *xs: opened_body(*xs[m:]), *operands),
        consts=m + n + len(given),
        free=free,
        linear=(False,) * len(operands),
    )


def _traced(
    test: Function, body: Function, consts: Arrays, carry: Arrays
) -> tuple[ClosedJaxpr, ClosedJaxpr, Arrays]:
    """Trace the test and the body; return them and the carry, of the type that it keeps.

    As in JAX's own loop, a weakly typed carry becomes what the body makes of it. Over the
    manual axes of a mesh, a carry varies as its next value does, and as the test: devices
    where the loop ends earlier have another value.
    """

    def next_carry(k: Arrays, c: Arrays) -> Arrays:
        results = [jnp.asarray(y) for y in body(k, c)]
        if len(results) != len(c):
            raise TypeError(
                f"while_loop: the body must return {len(c)} arrays, one for each carry, "
                f"and returned {len(results)}"
            )
        return [_retyped(y, x) for x, y in zip(c, results, strict=True)]

    while True:
        tested = trace(lambda k, c: [jnp.asarray(test(k, c))], consts, carry)
        closed = trace(next_carry, consts, carry)
        over = tested.out_avals[0].manual_axis_type.varying
        promoted = [
            _promoted(i, x, aval, over)
            for i, (x, aval) in enumerate(zip(carry, closed.out_avals, strict=True))
        ]
        if all(x is y for x, y in zip(carry, promoted, strict=True)):
            return tested, closed, carry
        carry = promoted


def _retyped(result: jax.Array, like: jax.Array) -> jax.Array:
    """Give a result of the dtype of its carry the weak type and varying axes of that."""
    result = varying_over(result, jax.typeof(like).manual_axis_type.varying)
    if result.dtype != like.dtype or not result.weak_type or like.weak_type:
        return result
    return of_type(result, like.dtype, weak_type=False)


def _promoted(index: int, carry: jax.Array, aval: Any, over: frozenset[Any]) -> jax.Array:
    """Return the carry, of the type of its next value."""
    own = jax.typeof(carry)
    differs = carry.dtype != aval.dtype
    if carry.shape != aval.shape or (differs and not own.weak_type):
        raise TypeError(
            f"while_loop: carry {index} must keep its type, {own.str_short()}, and the "
            f"body returned {aval.str_short()}"
        )
    if own.weak_type and (differs or not aval.weak_type):
        carry = jax.lax.convert_element_type(carry, aval.dtype)
    return varying_over(carry, aval.manual_axis_type.varying | over)


# --- The primitive.
#
# Parameters: `test` and `body`, jaxprs of all operands; `consts`, how many of these are
# constants of the loop, the others being its carries; `free`, how many of the carries, the
# first, are free-running. A test of a batch is an array. The loop goes on while any element
# of it is true, and of the carries that are not free-running, whose shapes begin with its
# shape, only the elements change whose test is true.

loop_p = Primitive("differentiable_while")
loop_p.multiple_results = True


def _loop_abstract_eval(
    *avals: ShapedArray,
    test: ClosedJaxpr,
    body: ClosedJaxpr,
    consts: int,
    free: int,
    linear: tuple[bool, ...],
) -> tuple[list[ShapedArray], set[Effect]]:
    return list(avals[consts:]), {*test.effects, *body.effects}


def _run(
    *operands: jax.Array,
    test: ClosedJaxpr,
    body: ClosedJaxpr,
    consts: int,
    free: int,
    linear: tuple[bool, ...],
) -> Arrays:
    """Compute the loop, by JAX's own."""
    constants, carry = operands[:consts], list(operands[consts:])
    if not test.out_avals[0].shape:
        return jax.lax.while_loop(
            lambda c: call(test, *constants, *c)[0],
            lambda c: call(body, *constants, *c),
            carry,
        )

    def step(c: Arrays) -> Arrays:
        (goes_on,) = call(test, *constants, *c)
        new = call(body, *constants, *c)
        kept = [select(goes_on, y, x) for x, y in zip(c[free:], new[free:], strict=True)]
        return [*new[:free], *kept]

    return jax.lax.while_loop(lambda c: call(test, *constants, *c)[0].any(), step, carry)


def select(which: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Take from `x` where `which`, with whose shape theirs begin, and else from `y`."""
    missing = range(which.ndim, x.ndim)
    return jnp.where(jnp.expand_dims(which, tuple(missing)), x, y)


def _loop_batching(
    axis_data: Any,
    operands: Sequence[jax.Array],
    dims: Sequence[int | None],
    *,
    test: ClosedJaxpr,
    body: ClosedJaxpr,
    consts: int,
    free: int,
    linear: tuple[bool, ...],
) -> tuple[Arrays, list[int | None]]:
    """Batch the loop, until the last element is done.

    Carries that are not batched, and never become so, stay unbatched, unless the elements
    end at different iterations.
    """
    batched = [d is not None for d in dims]
    of_consts, of_carry = batched[:consts], batched[consts:]

    def after_iteration(now: Flags) -> Flags:
        (ends_apart,) = _compat.batch_jaxpr(test, axis_data, [*of_consts, *now], False)[1]
        after = _compat.batch_jaxpr(body, axis_data, [*of_consts, *now], now)[1]
        return [flag or (ends_apart and i >= free) for i, flag in enumerate(after)]

    of_carry = fixpoint(of_carry, after_iteration)
    (ends_apart,) = _compat.batch_jaxpr(test, axis_data, [*of_consts, *of_carry], False)[1]
    # The shape of the test, with its axes of batches around, begins that of each carry.
    rank = 0 if ends_apart else len(test.out_avals[0].shape)
    axes = [0] * (consts + free) + [rank] * (len(of_carry) - free)
    flags = [*of_consts, *of_carry]
    wanted = [axis if flag else None for axis, flag in zip(axes, flags, strict=True)]
    of_test = [0 if ends_apart else None]
    results = loop_p.bind(
        *moved(operands, dims, wanted, axis_data),
        test=_compat.batch_jaxpr_axes(test, axis_data, wanted, of_test)[0],
        body=_compat.batch_jaxpr_axes(body, axis_data, wanted, wanted[consts:])[0],
        consts=consts,
        free=free,
        linear=linear,
    )
    return results, wanted[consts:]


def moved(
    operands: Sequence[jax.Array],
    own: Sequence[int | None],
    wanted: Sequence[int | None],
    axis_data: Any,
) -> Arrays:
    """Move the batch axes of operands, or make some."""
    axes = zip(operands, own, wanted, strict=True)
    return [_moved(x, d, to, axis_data) for x, d, to in axes]


def _moved(x: jax.Array, own: int | None, to: int | None, axis_data: Any) -> jax.Array:
    if to is None:
        return x
    if own is None:
        return batching.broadcast(x, axis_data.size, to, axis_data.explicit_mesh_axis)
    return jnp.moveaxis(x, own, to)


def _loop_dce(used: Sequence[bool], eqn: JaxprEqn) -> tuple[list[bool], JaxprEqn | None]:
    """Drop the carries that neither a used result nor the test depends on."""
    params = eqn.params
    test, body, consts, free = (params[k] for k in ("test", "body", "consts", "free"))
    if not any(used) and not eqn.effects:
        return [False] * len(eqn.invars), None
    by_test = needed(test, [True])
    first = either(used, by_test[consts:])
    carry = fixpoint(first, lambda now: needed(body, now)[consts:])
    by_body = needed(body, carry)
    of_consts = either(by_test[:consts], by_body[:consts])
    flags = [*of_consts, *carry]
    if all(flags):
        return flags, eqn
    new = dict(
        test=restricted(test, flags, [True]),
        body=restricted(body, flags, carry),
        consts=sum(of_consts),
        free=sum(carry[:free]),
        linear=tuple(pick(params["linear"], flags)),
    )
    return flags, eqn.replace(
        params=new, invars=pick(eqn.invars, flags), outvars=pick(eqn.outvars, carry)
    )


def restricted(
    jaxpr: ClosedJaxpr, operands: Sequence[bool], results: Sequence[bool]
) -> ClosedJaxpr:
    """Restrict a jaxpr to some results, and to operands that include all they need."""
    inner, _ = without_dead_code(jaxpr, results, list(operands))
    return trace(lambda *xs: eval_jaxpr(inner, (), *xs), *pick(jaxpr.in_avals, operands))


loop_p.def_effectful_abstract_eval(_loop_abstract_eval)
loop_p.def_impl(functools.partial(xla.apply_primitive, loop_p))
mlir.register_lowering(loop_p, mlir.lower_fun(_run, multiple_results=True))
batching.fancy_primitive_batchers[loop_p] = _loop_batching
_compat.register_dce(loop_p, _loop_dce)
