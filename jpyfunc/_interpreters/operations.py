"""The operations of a body, as functions from flat operands to a list of results.

What a body does is the same from call to call: a few operations on arrays of a few shapes.
Each is compiled once, and so are its derivatives (`linearization`), which are operations
again, so that there are derivatives of every order, and its batches (`batched_operation`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import set_current_trace

from jpyfunc import _compat
from jpyfunc._interpreters.jaxpr_queries import has_rules
from jpyfunc._types import Array, Aval, Indices, Value

Function = Callable[..., list[Array]]


class _Compiled(Protocol):
    def forget(self) -> None: ...


class CompiledOperation:
    """A function that is compiled for operands of certain avals.

    Attributes:
        call: the function, which can be traced.
        run: the same, compiled.
        avals: of its operands.
        is_stateful: whether it contains a stateful call, which must not run again.
        needs_x64: whether operands have 64 bits while these are disabled, as a body may
            leave them: such a function cannot be traced.
        is_orphan: whether no later call can be this operation, so that only tapes hold it.
        rule_stores: what JAX asks for when it transposes a custom rule in it.
        linearizations: this operation with its derivatives, by the operands with respect
            to which they are.
        batches: this operation on many elements at once, by the axes of the operands.
        is_repeatable: as of an `UncachedOperation`; it always is.
    """

    __slots__ = (
        "_has_rules",
        "avals",
        "batches",
        "call",
        "is_orphan",
        "is_stateful",
        "linearizations",
        "needs_x64",
        "rule_stores",
        "run",
    )

    is_repeatable = True

    def __init__(
        self,
        call: Function,
        avals: Sequence[Aval],
        has_rules: bool | None = None,
        is_stateful: bool = False,
    ) -> None:
        self.call = call
        self.run = _compiled(call)
        self.avals = tuple(map(with_weak_type, avals))
        self.is_stateful = is_stateful
        self.needs_x64 = any(map(needs_x64, self.avals))
        self.is_orphan = False
        self._has_rules = has_rules
        self.rule_stores: list[tuple[Any, Any]] = []
        self.linearizations: dict[Indices, _Compiled] = {}
        self.batches: dict[tuple[int | None, ...], Any] = {}

    @property
    def has_rules(self) -> bool:
        """Whether it calls functions with custom derivative rules."""
        if self._has_rules is None:
            with set_current_trace(_compat.eval_trace):
                self._has_rules = has_rules(jax.make_jaxpr(self.call)(*self.avals))
        return self._has_rules

    def orphan(self) -> None:
        """Drop what was compiled, because no later call can be this operation.

        Tapes may still hold it, and a derivative of one compiles what it needs again.
        """
        self.is_orphan = True
        self.forget()
        for linearization in self.linearizations.values():
            linearization.forget()

    def forget(self) -> None:
        """Drop what was compiled: some megabytes, where arrays may have a few bytes."""
        self.run = _compiled(self.call)
        self.batches.clear()


def _compiled(call: Function) -> Function:
    # JAX keeps what it compiled as long as the function lives, so this must be one that
    # nothing else holds: `forget` could not drop it otherwise.
    return jax.jit(lambda *operands: call(*operands))


class UncachedOperation:
    """A function that may do something else in every call.

    It is not compiled, and linearized again at the values of each call: custom rules in it
    are the user's Python, which may look at values and at the world.

    Attributes:
        call: the function.
        is_repeatable: whether it may be called more than once.
    """

    __slots__ = ("call", "is_repeatable")

    has_rules = True
    is_stateful = False
    needs_x64 = False

    def __init__(self, call: Function, is_repeatable: bool = True) -> None:
        self.call = call
        self.is_repeatable = is_repeatable

    @property
    def run(self) -> Function:
        return self.call


Operation = CompiledOperation | UncachedOperation


def aval_of(x: Value) -> ShapedArray:
    """`jax.typeof(x)`, at a tenth of its cost for an array."""
    return x.aval if isinstance(x, jax.Array) else jax.typeof(x)


def is_inexact(x: Array | Aval) -> bool:
    """Whether `x` may have a tangent: it is floating or complex."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def needs_x64(aval: Aval) -> bool:
    """Whether `aval` has 64 bits while these are disabled."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return False
    return jax.dtypes.canonicalize_dtype(aval.dtype) != aval.dtype


def with_weak_type(aval: Aval) -> jax.ShapeDtypeStruct:
    """`aval` as what a function can be traced with."""
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)
