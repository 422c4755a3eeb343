"""How each kind of body is computed: the function, and the derivatives through its runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray

from jpyfunc._bodies import custom_rules, tape_cache
from jpyfunc._bodies.derived import AtTape, FlatBody, Jvp, Transpose, Vjp, WithTape, others
from jpyfunc._bodies.primal import Primal
from jpyfunc._errors import TapeLostError, not_linear
from jpyfunc._frames import place_of
from jpyfunc._interpreters.tape import Tape, run_on_tape
from jpyfunc._limits import (
    LARGE_ARRAY_BYTES,
)
from jpyfunc._runtime.context import Context
from jpyfunc._runtime.transfers import put


def call(body: FlatBody, operands: Sequence[Any], context: Context) -> list[Any]:
    """The results of `body`.

    Args:
        body: what to compute.
        operands: NumPy or JAX arrays, one per `body.in_avals`.
        context: the current one.
    """
    if body.primal.guarded and not operands[0]:
        context.count(elements=-context.elements)
        return [np.zeros(aval.shape, aval.dtype) for aval in body.out_avals]
    return RULES[type(body)](body, operands, context)


def _primal(body: Primal, operands: Sequence[Any], context: Context) -> list[Any]:
    context.count(runs=1)
    return body(operands if body.numpy else _put(operands, body.in_avals, context))


def _recording(body: WithTape, operands: Sequence[Any], context: Context) -> list[Any]:
    if body.base.rules:
        return _recording_by_rule(body, operands, context)
    operands = _put(operands, body.in_avals, context)
    if not tape_cache.keeps():
        return [*_primal(body.base, operands, context), tape_cache.keep(body, None)]
    function = functools.partial(_primal, body.base, context=context)
    run = run_on_tape(function, operands, body.wrt, body.primal.label)
    return [*run.values, tape_cache.keep(body, run)]


def _recording_by_rule(
    body: WithTape, operands: Sequence[Any], context: Context
) -> list[Any]:
    if not body.base.rules.fwd:
        context.count(runs=1)
        return [*body.base(operands), tape_cache.keep(body, None)]
    results, residuals = custom_rules.forward(body.base, operands)
    return [*results, tape_cache.keep(body, residuals if tape_cache.keeps() else None)]


def _residuals(
    body: Any, operands: Sequence[Any], context: Context
) -> custom_rules.RuleResiduals:
    """What the forward rule left of a run, or leaves now."""
    *primals, ticket = operands
    run: Any = tape_cache.find(body, ticket)
    if not run and not body.repeatable:
        raise _lost(body)
    _count_source(bool(run), context)
    return run or custom_rules.forward(body.base, primals)[1]


def _recorded(body: AtTape, operands: Sequence[Any], context: Context) -> list[Any]:
    *primals, ticket = operands
    run = tape_cache.find(body, ticket)
    if run and not run.can_replay(primals):
        run = None
    if run is None:
        if tape_cache.is_void(ticket):  # and so is what is computed here
            return [np.zeros(aval.shape, aval.dtype) for aval in body.out_avals]
        if not body.repeatable:
            raise _lost(body)
        primals = _put(primals, body.base.in_avals, context)
    _count_source(run is not None, context)
    results = run.replay if run else functools.partial(_primal, body.base, context=context)
    if body.under:
        return run_on_tape(results, primals, body.under, body.primal.label).values
    return results(primals)


def _lost(body: AtTape) -> TapeLostError:
    return TapeLostError(
        f"{body.primal.label} is stateful, and its tape has been evicted; running it again "
        "would differentiate a different execution. Raise the limit of what tapes hold: "
        "jpyfunc.set_tape_limit(nbytes)."
    )


def _jvp(body: Jvp, operands: Sequence[Any], context: Context) -> list[Any]:
    n = len(body.base.in_avals)
    if body.primal.rules:
        if tape_cache.is_void(operands[n - 1]):
            return [np.zeros(aval.shape, aval.dtype) for aval in body.out_avals]
        return custom_rules.push(
            body.primal, operands[: n - 1], body.wrt, operands[n:], body.of
        )
    run = _run(body, operands[:n], context)
    return run.jvp(body.wrt, _put_large(operands[n:], context), body.of)


def _vjp(body: Vjp, operands: Sequence[Any], context: Context) -> list[Any]:
    n = len(body.base.in_avals)
    if body.primal.rules:
        if tape_cache.is_void(operands[n - 1]):
            return [np.zeros(aval.shape, aval.dtype) for aval in body.out_avals]
        run = _residuals(body.base, operands[:n], context)
        return custom_rules.backward(body.primal, run, body.of, operands[n:], body.wrt)
    run = _run(body, operands[:n], context)
    return run.vjp(body.of, _put_large(operands[n:], context), body.wrt)


def _run(body: Jvp | Vjp, operands: Sequence[Any], context: Context) -> Tape:
    """A run of the base that the derivative can be taken of."""
    base = body.base
    if isinstance(base, AtTape):
        run = tape_cache.find(base, operands[-1])
        if run and run.serves(body.wrt, operands, bool(base.under)):
            _count_source(True, context)
            return run
    primals = _put(operands, base.in_avals, context)
    label = body.primal.label
    return run_on_tape(lambda values: call(base, values, context), primals, body.wrt, label)


def _count_source(is_kept: bool, context: Context) -> None:
    """Count the elements that run now."""
    context.count(**{"from_tape" if is_kept else "reran": context.elements})


def _transpose(body: Transpose, operands: Sequence[Any], context: Context) -> list[Any]:
    if body.primal.rules:
        context.count(runs=1)
        return custom_rules.transpose(body, operands)
    rest = _put(operands, body.in_avals, context)
    primals: list[Any] = [None] * len(body.base.in_avals)
    for i in others(body.base, body.wrt):
        primals[i] = rest.pop(0)
    linear = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        for aval in (body.base.in_avals[i] for i in body.wrt)
    ]

    def restricted(*values: Any) -> list[Any]:
        full = list(primals)
        for i, value in zip(body.wrt, values, strict=True):
            full[i] = value
        results = call(body.base, full, context)
        return [results[i] for i in body.of]

    try:
        return list(jax.linear_transpose(restricted, *linear)(rest))
    except (AssertionError, NotImplementedError) as error:
        if place_of(error):  # it is the body's own
            raise
        raise not_linear(body.primal.label, "its body is not", str(error)) from error
    except jax.errors.JAXTypeError as error:
        why = (
            f"its body{place_of(error)} {_use_of_value(error)} what it has to be linear in"
        )
        raise not_linear(body.primal.label, why) from error


def _use_of_value(error: jax.errors.JAXTypeError) -> str:
    """What a body does with an operand that has no value here."""
    if isinstance(error, jax.errors.TracerBoolConversionError):
        return "branches on"
    if isinstance(error, jax.errors.TracerArrayConversionError):
        return "converts to NumPy"
    return "reads the value of"


def _put(operands: Sequence[Any], avals: Any, context: Context) -> list[Any]:
    return [
        x if isinstance(x, jax.Array) else put(x, aval, context.device)
        for x, aval in zip(operands, avals, strict=True)
    ]


def _put_large(operands: Sequence[Any], context: Context) -> list[Any]:
    """What operations alone take, which put small NumPy arrays on the device themselves.

    They would do so with large ones on threads that the program holds.
    """
    return [
        x
        if isinstance(x, jax.Array) or x.nbytes < LARGE_ARRAY_BYTES
        else put(x, ShapedArray(x.shape, x.dtype), context.device)
        for x in operands
    ]


RULES: dict[type, Callable[[Any, Sequence[Any], Context], list[Any]]] = {
    Primal: _primal,
    WithTape: _recording,
    AtTape: _recorded,
    Jvp: _jvp,
    Vjp: _vjp,
    Transpose: _transpose,
}
