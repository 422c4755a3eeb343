"""Operations with their derivatives: what these need of a run, and what of it is stored.

Let y = f(x) be an operation. When it is traced, `jax.linearize` splits it into

    forward:  x -> (y, r)          r = r(x), the residuals
    JVP:      (r, dx) -> dy        dy = J(r) dx
    VJP:      (r, ct) -> ct J(r)   the transpose of the JVP, which is linear in dx

so that the derivatives need r of a run, and nothing else. Each entry of a tape stores r.
Most residuals are there anyway, however:

- r_i is an operand, as in y = a b, where dy = b da + a db;
- r_i is a result, as in y = exp(x), where dy = y dx;
- r_i is constant, the same for all x, as in y = 3 x;
- r_i is another residual once more.

These are pruned from the outputs of `forward`. An entry refers to the operand or result,
and constants become part of the derivative's program. If no residual is left, `forward` is
f itself, which is compiled only once then, whether it is differentiated or not.

A residual that is left, such as r = cos(x) of y = sin(x), would be an array of its own,
for as long as the tape lives. If f is cheap (elementwise operations and sums, see
`is_cheap`), it is rematerialized: the operands are the residuals, `forward` is f, and the
derivative's program computes r(x) again, fused with its use. An elementwise function takes
no longer to compute than its result takes to read from memory. Only the residuals of what
is not cheap, such as the factors of a decomposition, are outputs of `forward`.

If f has custom rules, the rule computes y, too, and an outer derivative is that of the
rule's code, as in JAX, not of f by its rule once more. Take `round` with the rule
(round(x), dx): then x round(x) has the derivative round(x) + x, and the second one is 1,
because the round of the rule's code is an ordinary one by then. By the rule again it would
be 2. So `forward` is always the rule's code, never f, and nothing is rematerialized.

All of these functions are operations. An outer tape records `forward`, the JVP and the VJP
like any others, and differentiates r(x) where it differentiates `forward`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun, set_current_trace

from jpyfunc import _compat
from jpyfunc._interpreters import rule_stores
from jpyfunc._interpreters.jaxpr_queries import dependent_outputs, is_cheap
from jpyfunc._interpreters.operations import (
    CompiledOperation,
    Function,
    UncachedOperation,
    aval_of,
    is_inexact,
    needs_x64,
    with_weak_type,
)
from jpyfunc._types import Array, Aval, Indices, PyTreeDef, Value

Jvp = Callable[..., Sequence[Array]]


def linearize(operation: CompiledOperation, active: Indices) -> Linearization:
    """The operation with its derivatives with respect to the floating operands `active`."""
    known: Any = operation.linearizations.get(active)
    if known is None:
        known = operation.linearizations[active] = Linearization(operation, active)
    return known


def linearize_at(
    operation: UncachedOperation, operands: Sequence[Value], active: Indices
) -> tuple[list[Array], UncachedLinearization]:
    """Results at these operands, and the derivatives there with respect to `active`."""
    results, jvp, inexact = _linearized(operation.call, operands, active)
    tangents = [_tangent(aval_of(operands[i])) for i in active]
    linear = UncachedLinearization(operation, active, jvp, tangents, inexact, len(results))
    return results, linear


def _linearized(
    call: Function, operands: Sequence[Value], active: Indices
) -> tuple[list[Array], Jvp, Indices]:
    """Linearize a function at operands, with respect to those at `active`.

    Returns:
        Its results, its JVP to the tangents of those that are floating, and which are.
    """
    inexact: list[int] = []

    def restricted(*values: Value) -> tuple[list[Array], list[Array]]:
        full = list(operands)
        for i, value in zip(active, values, strict=True):
            full[i] = value
        results = call(*full)
        inexact[:] = [i for i, x in enumerate(results) if is_inexact(aval_of(x))]
        return [results[i] for i in inexact], results

    at = [operands[i] for i in active]
    _, jvp, results = jax.linearize(restricted, *at, has_aux=True)
    return results, jvp, tuple(inexact)


class _Forward(NamedTuple):
    """The trace of a linearized operation.

    Attributes:
        jaxpr: from operands to results, then residuals.
        size: how many results there are.
        inexact: the results that are floating.
        tree: of the JVP, whose leaves are the residuals.
    """

    jaxpr: ClosedJaxpr
    size: int
    inexact: Indices
    tree: PyTreeDef


def _trace_forward(operation: CompiledOperation, active: Indices) -> _Forward:
    found: list[PyTreeDef] = []

    def forward(*operands: Value) -> tuple[list[Array], list[Array]]:
        results, jvp, inexact = _linearized(operation.call, operands, active)
        residuals, tree = jax.tree.flatten(jvp)
        found[:] = [inexact, tree]
        return results, residuals

    with set_current_trace(_compat.eval_trace):
        jaxpr, shapes = jax.make_jaxpr(forward, return_shape=True)(*operation.avals)
    return _Forward(jaxpr, len(shapes[0]), *found)


class _Pruned(NamedTuple):
    """The residuals of an operation, pruned.

    Attributes:
        outputs: which outputs of `forward` are needed: all results, and the residuals that
            are neither an operand, nor a result, nor constant, each once.
        sources: for each residual that is not constant, its position in the operands
            followed by these outputs.
        constants: for each residual, its `Literal` if it is constant, or None.
    """

    outputs: list[int]
    sources: list[int]
    constants: list[Literal | None]


def _prune(forward: _Forward) -> _Pruned:
    variables, size = forward.jaxpr.jaxpr.invars, forward.size
    outputs = forward.jaxpr.jaxpr.outvars
    positions = {id(v): i for i, v in enumerate(variables)}
    for i, v in enumerate(outputs[:size]):
        positions.setdefault(id(v), len(variables) + i)
    pruned = _Pruned(list(range(size)), [], [])
    for i, v in enumerate(outputs[size:], size):
        if isinstance(v, Literal):
            pruned.constants.append(v)
            continue
        pruned.constants.append(None)
        if id(v) not in positions:
            positions[id(v)] = len(variables) + len(pruned.outputs)
            pruned.outputs.append(i)
        pruned.sources.append(positions[id(v)])
    return pruned


class Linearization:
    """An operation and its derivatives with respect to some of its operands.

    Attributes:
        operation: the operation.
        active: the operands.
        forward: from operands to results, then residuals that are stored.
        size: how many results the operation has.
        of: the results that depend on the operands `active`.
    """

    def __init__(self, operation: CompiledOperation, active: Indices) -> None:
        self.operation = operation
        self.active = active
        self._jvps: dict[Indices, CompiledOperation] = {}
        self._vjps: dict[tuple[Indices, ...], CompiledOperation] = {}
        forward = _trace_forward(operation, active)
        self.size = forward.size
        pruned = _prune(forward)
        is_stored = len(pruned.outputs) > forward.size
        if is_stored and not operation.has_rules and is_cheap(forward.jaxpr):
            self._rematerialize()
        else:
            self._restore(forward, pruned)
            if is_stored or operation.has_rules:
                call = _selected(jaxpr_as_fun(forward.jaxpr), pruned.outputs)
                self.forward = CompiledOperation(call, operation.avals)
        self._find_dependent(forward.inexact)

    def _rematerialize(self) -> None:
        """Take the operands for residuals, and linearize again in the derivatives."""
        operation, active = self.operation, self.active
        self.forward = operation
        self._sources: Sequence[int] = range(len(operation.avals))
        self._residual_avals: Sequence[jax.ShapeDtypeStruct] = operation.avals
        self._jvp_at: Callable[[Sequence[Value]], Jvp] = lambda operands: _linearized(
            operation.call, operands, active
        )[1]

    def _restore(self, forward: _Forward, pruned: _Pruned) -> None:
        """Take the residuals from operands, results and what is stored."""
        tree, constants = forward.tree, pruned.constants  # not the jaxpr

        def jvp_at(residuals: Sequence[Value]) -> Jvp:
            rest = iter(residuals)
            leaves = [next(rest) if c is None else c.val for c in constants]
            return jax.tree.unflatten(tree, leaves)

        self.forward = self.operation
        self._sources = pruned.sources
        avals = forward.jaxpr.out_avals[forward.size :]
        self._residual_avals = [
            with_weak_type(aval)
            for aval, constant in zip(avals, constants, strict=True)
            if constant is None
        ]
        self._jvp_at = jvp_at

    def _find_dependent(self, inexact: Indices) -> None:
        """Trace the JVP, to see which results depend on the operands at all."""
        n = len(self._residual_avals)
        self._tangents = [_tangent(self.operation.avals[i]) for i in self.active]

        def jvp(*operands: Value) -> list[Array]:
            # The VJP transposes custom rules, and may do so in another trace.
            rule_stores.restore(self.operation.rule_stores)
            return list(self._jvp_at(operands[:n])(*operands[n:]))

        with set_current_trace(_compat.eval_trace):
            jaxpr = jax.make_jaxpr(jvp)(*self._residual_avals, *self._tangents)
        dependent = dependent_outputs(jaxpr, n)
        self.of = tuple(inexact[i] for i in dependent)
        self._cotangents = [_tangent(jaxpr.out_avals[i]) for i in dependent]
        self._jvp = _selected(jvp, dependent)

    def forget(self) -> None:
        """Drop what was compiled."""
        self.forward.forget()
        self._jvps.clear()
        self._vjps.clear()

    def residuals(self, operands: Sequence[Value], outputs: Sequence[Array]) -> list[Value]:
        """The residuals of a run of `forward`, from its operands to its outputs."""
        pool = [*operands, *outputs]
        return [pool[i] for i in self._sources]

    def jvp(self, given: Indices) -> CompiledOperation:
        """From residuals and tangents to the tangents of the results `of`.

        Args:
            given: positions in `active` of the tangents that are given; the others are
                zero.
        """
        operation = self._jvps.get(given)
        if operation is None:
            n, tangents = len(self._residual_avals), self._tangents

            def call(*operands: Value) -> list[Array]:
                full: list[Value] = [jnp.zeros(t.shape, t.dtype) for t in tangents]
                for i, tangent in zip(given, operands[n:], strict=True):
                    full[i] = tangent
                return self._jvp(*operands[:n], *full)

            avals = [*self._residual_avals, *(tangents[i] for i in given)]
            operation = self._jvps[given] = CompiledOperation(call, avals)
        return operation

    def vjp(self, given: Indices, targets: Indices, sums: Indices) -> CompiledOperation:
        """From residuals and cotangents to the cotangents of the operands `active`.

        Take y = f(u, v, u) with `active` (0, 1, 2). There are two results, the cotangents
        of u and of v. Operands 0 and 2 are one value, whose cotangents add up, so `targets`
        is (0, 1, 0). If v is an operand of later operations, too, it has a cotangent
        already, which is added to result 1: `sums` is (1,), and it is the last operand.

        Args:
            given: positions in `of` of the cotangents that are given; the others are zero.
            targets: for each of `active`, the result to which its cotangent is added.
            sums: the results to which a cotangent is added that the operation takes, last
                of its operands and one for each.
        """
        key = (given, targets, sums)
        operation = self._vjps.get(key)
        if operation is None:
            tangents = self._tangents
            n, m = len(self._residual_avals), len(self._residual_avals) + len(given)

            def call(*operands: Value) -> list[Array]:
                jvp = lambda *tangents: self._jvp(*operands[:n], *tangents)  # noqa: E731
                pulled = _transposed(jvp, tangents, given, operands[n:m])
                return _summed(pulled, targets, dict(zip(sums, operands[m:], strict=True)))

            avals = [*self._residual_avals, *(self._cotangents[i] for i in given)]
            avals += [tangents[targets.index(i)] for i in sums]
            operation = self._vjps[key] = CompiledOperation(call, avals)
        return operation


class UncachedLinearization:
    """A `Linearization` of one call of an `UncachedOperation`, at its operands."""

    def __init__(
        self,
        operation: UncachedOperation,
        active: Indices,
        jvp: Jvp,
        tangents: list[jax.ShapeDtypeStruct],
        of: Indices,
        size: int,
    ) -> None:
        self.operation = operation
        self.active = active
        self._leaves, self._tree = jax.tree.flatten(jvp)
        self._tangents = tangents
        self.of = of
        self.size = size

    def residuals(self, operands: Sequence[Value], outputs: Sequence[Array]) -> list[Value]:
        """See `Linearization.residuals`; here, all residuals are stored."""
        return self._leaves

    def jvp(self, given: Indices) -> UncachedOperation:
        """See `Linearization.jvp`."""
        n = len(self._leaves)

        def call(*operands: Value) -> list[Array]:
            full: list[Value] = [np.zeros(t.shape, t.dtype) for t in self._tangents]
            for i, tangent in zip(given, operands[n:], strict=True):
                full[i] = tangent
            with _enabled_x64(self._tangents):
                return list(jax.tree.unflatten(self._tree, operands[:n])(*full))

        return UncachedOperation(call)

    def vjp(self, given: Indices, targets: Indices, sums: Indices) -> UncachedOperation:
        """See `Linearization.vjp`."""
        n, m = len(self._leaves), len(self._leaves) + len(given)

        def call(*operands: Value) -> list[Array]:
            jvp = jax.tree.unflatten(self._tree, operands[:n])
            with _enabled_x64(self._tangents):
                pulled = _transposed(jvp, self._tangents, given, operands[n:m])
                return _summed(pulled, targets, dict(zip(sums, operands[m:], strict=True)))

        return UncachedOperation(call)


def _selected(function: Callable[..., Sequence[Array]], outputs: Sequence[int]) -> Function:
    def call(*operands: Value) -> list[Array]:
        results = function(*operands)
        return [results[i] for i in outputs]

    return call


def _enabled_x64(
    avals: Sequence[jax.ShapeDtypeStruct],
) -> contextlib.AbstractContextManager[None]:
    """Enable 64-bit types if a body did so, and had left that when this is called."""
    if any(map(needs_x64, avals)):
        return jax.enable_x64(True)
    return contextlib.nullcontext()


def _tangent(aval: Aval) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _transposed(
    jvp: Jvp,
    tangents: Sequence[jax.ShapeDtypeStruct],
    given: Indices,
    cotangents: Sequence[Value],
) -> Sequence[Array]:
    """Apply the transpose of a JVP to the cotangents of its results `given`."""

    def linear(*tangents: Value) -> list[Array]:
        results = jvp(*tangents)
        return [results[i] for i in given]

    return jax.linear_transpose(linear, *tangents)(list(cotangents))


def _summed(
    cotangents: Sequence[Value], targets: Indices, results: dict[int, Any]
) -> list[Array]:
    """Add each cotangent to the result that is its target."""
    for i, cotangent in zip(targets, cotangents, strict=True):
        results[i] = results[i] + cotangent if i in results else cotangent
    return [results[i] for i in range(len(results))]
