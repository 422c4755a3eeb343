"""How the derivatives of a body are computed: it is run again under JAX's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

from jpyfunc._body.derived import FlatBody, Jvp, Transpose, Vjp, others
from jpyfunc._body.primal import Primal
from jpyfunc._errors import NotDifferentiableError


def call(body: FlatBody, operands: Iterable[Any]) -> list[Any]:
    """The results of `body` at `operands`."""
    return (
        Primal.__call__(body, operands)
        if isinstance(body, Primal)
        else RULES[type(body)](body, list(operands))
    )


def _restricted(
    body: Jvp | Vjp | Transpose, primals: list[Any]
) -> Callable[..., list[Any]]:
    """The base as a function of operands `wrt` to results `of`, the rest held fixed."""

    def restricted(*values: Any) -> list[Any]:
        operands = list(primals)
        for i, value in zip(body.wrt, values, strict=True):
            operands[i] = value
        results = call(body.base, operands)
        return [results[i] for i in body.of]

    return restricted


def _jvp(body: Jvp, operands: list[Any]) -> list[Any]:
    n = len(body.base.in_avals)
    primals, tangents = operands[:n], operands[n:]
    at = [primals[i] for i in body.wrt]
    return jax.jvp(_restricted(body, primals), at, tangents)[1]


def _vjp(body: Vjp, operands: list[Any]) -> list[Any]:
    n = len(body.base.in_avals)
    primals, cotangents = operands[:n], operands[n:]
    _, pull_back = jax.vjp(_restricted(body, primals), *[primals[i] for i in body.wrt])
    return list(pull_back(cotangents))


def _transpose(body: Transpose, operands: list[Any]) -> list[Any]:
    rest = list(operands)
    primals: list[Any] = [None] * len(body.base.in_avals)
    for i in others(body.base, body.wrt):
        primals[i] = rest.pop(0)
    linear = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        for aval in (body.base.in_avals[i] for i in body.wrt)
    ]
    try:
        return list(jax.linear_transpose(_restricted(body, primals), *linear)(rest))
    except (AssertionError, NotImplementedError, jax.errors.JAXTypeError) as error:
        raise NotDifferentiableError(
            f"{body.primal.label}: jax.linear_transpose needs a body that is linear in "
            f"its operands and branches on none, and this one is not ({error})."
        ) from error


RULES = {Jvp: _jvp, Vjp: _vjp, Transpose: _transpose}
