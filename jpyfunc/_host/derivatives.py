"""How each kind of body is computed: the function, and the derivatives through its runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray

from jpyfunc import _compat
from jpyfunc._body.derived import FlatBody, Jvp, Recorded, Recording, Transpose, Vjp, others
from jpyfunc._body.primal import Primal
from jpyfunc._errors import TapeLostError, not_linear, place_of
from jpyfunc._host import kept, rules
from jpyfunc._host.profile import note
from jpyfunc._traces.batched import running_batch
from jpyfunc._traces.record import Record, record


def call(body: FlatBody, operands: Sequence[Any], device: _compat.Device) -> list[Any]:
    """The results of `body`.

    Args:
        body: what to compute.
        operands: NumPy or JAX arrays, one per `body.in_avals`.
        device: where NumPy operands are put, if they are needed.
    """
    if body.primal.guarded and not operands[0]:
        note(elements=-_elements())
        return [np.zeros(aval.shape, aval.dtype) for aval in body.out_avals]
    return RULES[type(body)](body, operands, device)


def _elements() -> int:
    """How many elements of a batch run now."""
    batch = running_batch()
    return len(batch.part.rows) if batch else 1


def _primal(body: Primal, operands: Sequence[Any], device: _compat.Device) -> list[Any]:
    note(runs=1)
    return body(operands if body.numpy else _put(operands, body.in_avals, device))


def _recording(
    body: Recording, operands: Sequence[Any], device: _compat.Device
) -> list[Any]:
    if body.base.rules:
        return _recording_by_rule(body, operands)
    operands = _put(operands, body.in_avals, device)
    if not kept.keeps():
        return [*_primal(body.base, operands, device), kept.keep(body, None)]
    function = functools.partial(_primal, body.base, device=device)
    run = record(function, operands, body.wrt, body.primal.label)
    return [*run.values, kept.keep(body, run)]


def _recording_by_rule(body: Recording, operands: Sequence[Any]) -> list[Any]:
    if not body.base.rules.fwd:
        note(runs=1)
        return [*body.base(operands), kept.keep(body, None)]
    results, residuals = rules.forward(body.base, operands)
    return [*results, kept.keep(body, residuals if kept.keeps() else None)]


def _residuals(body: Any, operands: Sequence[Any]) -> rules.Residuals:
    """What the forward rule left of a run, or leaves now."""
    *primals, ticket = operands
    run: Any = kept.find(body, ticket)
    if not run and not body.repeatable:
        raise _lost(body)
    _note_source(bool(run))
    return run or rules.forward(body.base, primals)[1]


def _recorded(body: Recorded, operands: Sequence[Any], device: _compat.Device) -> list[Any]:
    *primals, ticket = operands
    run = kept.find(body, ticket)
    if run and not run.covers(primals):
        run = None
    if run is None:
        if kept.is_void(ticket):  # and so is what is computed here
            return [np.zeros(aval.shape, aval.dtype) for aval in body.out_avals]
        if not body.repeatable:
            raise _lost(body)
        primals = _put(primals, body.base.in_avals, device)
    _note_source(run is not None)
    results = run.replay if run else functools.partial(_primal, body.base, device=device)
    if body.under:
        return record(results, primals, body.under, body.primal.label).values
    return results(primals)


def _lost(body: Recorded) -> TapeLostError:
    return TapeLostError(
        f"{body.primal.label} is stateful, and its tape has been evicted; running it again "
        "would differentiate a different execution. Raise the limit of what tapes hold: "
        "jpyfunc.set_tape_limit(nbytes)."
    )


def _jvp(body: Jvp, operands: Sequence[Any], device: _compat.Device) -> list[Any]:
    n = len(body.base.in_avals)
    if body.primal.rules:
        if kept.is_void(operands[n - 1]):
            return [np.zeros(aval.shape, aval.dtype) for aval in body.out_avals]
        return rules.push(body.primal, operands[: n - 1], body.wrt, operands[n:], body.of)
    run = _run(body, operands[:n], device)
    return run.push(body.wrt, _put_large(operands[n:], device), body.of)


def _vjp(body: Vjp, operands: Sequence[Any], device: _compat.Device) -> list[Any]:
    n = len(body.base.in_avals)
    if body.primal.rules:
        if kept.is_void(operands[n - 1]):
            return [np.zeros(aval.shape, aval.dtype) for aval in body.out_avals]
        run = _residuals(body.base, operands[:n])
        return rules.backward(body.primal, run, body.of, operands[n:], body.wrt)
    run = _run(body, operands[:n], device)
    return run.pull(body.of, _put_large(operands[n:], device), body.wrt)


def _run(body: Jvp | Vjp, operands: Sequence[Any], device: _compat.Device) -> Record:
    """A run of the base that the derivative can be taken of."""
    base = body.base
    if isinstance(base, Recorded):
        run = kept.find(base, operands[-1])
        if run and run.serves(body.wrt, operands, bool(base.under)):
            _note_source(True)
            return run
    primals = _put(operands, base.in_avals, device)
    label = body.primal.label
    return record(lambda values: call(base, values, device), primals, body.wrt, label)


def _note_source(is_kept: bool) -> None:
    """Count the elements that run now."""
    note(**{"from_tape" if is_kept else "reran": _elements()})


def _transpose(
    body: Transpose, operands: Sequence[Any], device: _compat.Device
) -> list[Any]:
    if body.primal.rules:
        note(runs=1)
        return rules.transpose(body, operands)
    rest = _put(operands, body.in_avals, device)
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
        results = call(body.base, full, device)
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


def _put(operands: Sequence[Any], avals: Any, device: _compat.Device) -> list[Any]:
    return [
        x if isinstance(x, jax.Array) else _compat.put(x, aval, device)
        for x, aval in zip(operands, avals, strict=True)
    ]


def _put_large(operands: Sequence[Any], device: _compat.Device) -> list[Any]:
    """What operations alone take, which put small NumPy arrays on the device themselves.

    They would do so with large ones on threads that the program holds.
    """
    return [
        x
        if isinstance(x, jax.Array) or x.nbytes < _compat.LARGE
        else _compat.put(x, ShapedArray(x.shape, x.dtype), device)
        for x in operands
    ]


RULES: dict[type, Callable[[Any, Sequence[Any], _compat.Device], list[Any]]] = {
    Primal: _primal,
    Recording: _recording,
    Recorded: _recorded,
    Jvp: _jvp,
    Vjp: _vjp,
    Transpose: _transpose,
}
