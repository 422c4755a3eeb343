"""Stateful calls in `cond`, loops and `scan`: run as often as written, or refused.

A stateful call must run exactly as often as the program says, but some rules of these
primitives would run it more often, or less: under `vmap`, `cond` executes all branches;
`jax.linearize` runs a `while_loop` twice; reverse mode moves what does not change out of a
`scan`. JAX has no hook for effects in these rules. So they are replaced by rules that look
for `StatefulEffect` first, and that otherwise are JAX's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params
from jax.extend.core.primitives import jit_p
from jax.interpreters import batching, partial_eval

from jpyfunc import _compat
from jpyfunc._errors import UnsupportedError, see
from jpyfunc._loops.while_loop import loop_p
from jpyfunc._primitive.effects import StatefulEffect
from jpyfunc._types import Array

Rule = Callable[..., object]  # of JAX


def guard_stateful_calls() -> None:
    """Replace the rules of `cond`, loops and `scan` that could repeat a call."""
    batchers = batching.fancy_primitive_batchers
    cond_p, while_p = jax.lax.cond_p, jax.lax.while_p
    batchers[cond_p] = _refusing_in_cond(batchers[cond_p])
    batchers[while_p] = _refusing_in_while(batchers[while_p])
    partial_evals = partial_eval.custom_partial_eval_rules
    partial_evals[while_p] = _refusing_in_linearized_while(partial_evals[while_p])
    batchers[loop_p] = _refusing_in_loop(batchers[loop_p])
    partial_evals[loop_p] = _refusing_in_linearized_while(partial_evals[loop_p])
    _compat.wrap_hoisting_of_scan(_hoisting_unless_stateful)


def _refusing_in_cond(rule: Rule) -> Rule:
    """Batching rule of `cond`, which executes every branch if the predicate is batched.

    Raises:
        UnsupportedError: a branch has a stateful call, which would run for elements that
            do not take the branch.
    """

    def batch(
        axis_data: object,
        operands: Sequence[Array],
        dims: Sequence[int | None],
        **params: Any,
    ) -> Any:
        # `jax.lax.platform_dependent` chooses alike for all elements, whatever `dims` says.
        differ = dims[0] is not None and "branches_platforms" not in params
        for effect in _stateful(*params["branches"]) if differ else ():
            raise _refusal(
                effect, "cond or switch", "executes every branch for every element"
            )
        return rule(axis_data, operands, dims, **params)

    return batch


def _refusing_in_while(rule: Rule) -> Rule:
    """Batching rule of `while_loop`, which iterates until the last element is done.

    Raises:
        UnsupportedError: the loop has a stateful call, and elements may end at different
            iterations.
    """

    def batch(
        axis_data: object,
        operands: Sequence[Array],
        dims: Sequence[int | None],
        **params: Any,
    ) -> Any:
        # Loops without stateful calls do not pay for the search, which JAX repeats.
        test, body = params["cond_jaxpr"], params["body_jaxpr"]
        n = params["cond_nconsts"]
        for effect in _stateful(test, body):
            if _is_test_batched(test, body, dims[:n], dims[n:], params["body_nconsts"]):
                raise _refusal_in_while(effect)
        return rule(axis_data, operands, dims, **params)

    return batch


def _refusing_in_loop(rule: Rule) -> Rule:
    """Batching rule of our own loop, with the same refusal."""

    def batch(axis_data: Any, operands: Any, dims: Any, **params: Any) -> Any:
        test, body, n = params["test"], params["body"], params["consts"]
        for effect in _stateful(test, body):
            if _is_test_batched(test, body, dims[:n], dims, n):
                raise _refusal_in_while(effect)
        return rule(axis_data, operands, dims, **params)

    return batch


def _is_test_batched(
    test: ClosedJaxpr,
    body: ClosedJaxpr,
    of_test: Sequence[int | None],
    of_body: Sequence[int | None],
    n: int,
) -> bool:
    """Whether elements of a batched loop may end at different iterations.

    Args:
        test: of the loop, which takes its own constants and the carry.
        body: of the loop, which takes its own constants and the carry.
        of_test: the batch axes of the constants of the test.
        of_body: the batch axes of all that the body takes.
        n: how many of these are constants.
    """
    batched = [d is not None for d in of_body]
    consts, carry = batched[:n], batched[n:]
    before = None
    while carry != before:  # up to a fixed point: batched once, batched ever after
        before = carry
        after = _batched(body, consts + carry)
        carry = [a or b for a, b in zip(carry, after, strict=True)]
    return _batched(test, [*(d is not None for d in of_test), *carry])[0]


def _batched(jaxpr: ClosedJaxpr | Jaxpr, operands: Sequence[bool]) -> list[bool]:
    """Whether each result of a jaxpr depends on a batched operand."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    live = {id(v) for v, b in zip(inner.invars, operands, strict=True) if b}
    for eqn in inner.eqns:
        into = [id(v) in live for v in eqn.invars]
        out = (
            _batched(eqn.params["jaxpr"], into)
            if eqn.primitive is jit_p
            else [any(into)] * len(eqn.outvars)
        )
        live |= {id(v) for v, b in zip(eqn.outvars, out, strict=True) if b}
    return [id(v) in live for v in inner.outvars]


def _refusal_in_while(effect: StatefulEffect) -> UnsupportedError:
    return _refusal(
        effect,
        "while_loop",
        "executes every iteration for every element, those that are done too",
    )


def _refusal(effect: StatefulEffect, what: str, does: str) -> UnsupportedError:
    return UnsupportedError(
        f"{effect.name} is stateful and is called inside {what} under vmap, which {does}. "
        f"Loop over the elements with jax.lax.map, or {effect.remedy}."
        + see("A stateful call in cond or while_loop under vmap")
    )


def _refusing_in_linearized_while(rule: Rule) -> Rule:
    """Partial evaluation of `while_loop`, which repeats the loop for the tangents.

    `jax.linearize` computes the primals in one loop, and the tangents in another one that
    computes the primals again. A stateful call would run in both, and the tangents would
    be those of a different execution.

    Raises:
        UnsupportedError: the loop has a stateful call.
    """

    def partial_eval_while(trace: object, *tracers: Any, **params: Any) -> Any:
        if not all(t.pval.is_known() for t in tracers):
            for effect in _stateful(*jaxprs_in_params(params)):
                raise UnsupportedError(
                    f"{effect.name} is stateful and is called inside a while_loop that "
                    "is linearized, which would run the loop a second time for the "
                    "tangents. Use jax.jvp or jax.jacfwd, or a loop of a fixed number "
                    f"of iterations (jax.lax.scan), or {effect.remedy}."
                    + see("A stateful call in a while_loop that is linearized")
                )
        return rule(trace, *tracers, **params)

    return partial_eval_while


def _hoisting_unless_stateful(hoist: Rule) -> Rule:
    """Hoisting of loop-invariant residuals out of a `scan`, except from stateful calls.

    In reverse mode, `scan` computes residuals that depend on constants alone before its
    loop, and with them any call whose operands do not change from one iteration to the
    next, effects or not (jax-ml/jax#16637). The call would run once instead of once in
    each iteration.
    """

    def hoist_unless_stateful(
        jaxpr: ClosedJaxpr, consts: Sequence[Array], size: int, *rest: object
    ) -> Any:
        if _stateful(jaxpr):
            return jaxpr, consts, [False] * size, []
        return hoist(jaxpr, consts, size, *rest)

    return hoist_unless_stateful


def _stateful(*jaxprs: ClosedJaxpr | Jaxpr) -> list[StatefulEffect]:
    """Effects of the stateful calls in jaxprs."""
    effects = (effect for jaxpr in jaxprs for effect in jaxpr.effects)
    return [effect for effect in effects if isinstance(effect, StatefulEffect)]
