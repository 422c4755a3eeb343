"""Find the compiled operation of a bind, by its primitive, parameters and avals.

The cache keeps nothing of the user's alive: an operation that is made of a jaxpr is dropped
when that jaxpr is.
"""

from __future__ import annotations

import enum
import inspect
import types
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun, set_current_trace

from jpyfunc import _compat
from jpyfunc._interpreters import rule_stores
from jpyfunc._interpreters.jaxpr_queries import has_rules, is_stateful, runs_python
from jpyfunc._interpreters.lru_cache import LruCache
from jpyfunc._interpreters.operations import (
    CompiledOperation,
    Function,
    aval_of,
    with_weak_type,
)
from jpyfunc._limits import OPERATION_CACHE_SIZE
from jpyfunc._types import Array, Value


class Uncacheable(Exception):  # noqa: N818 - it is no error
    """A bind that may do something else in every call, or that is not one operation."""


class _CustomOperation(NamedTuple):
    """A call of a function with custom rules: the operation, and the function's stores."""

    operation: CompiledOperation
    stores: Any


_operations = LruCache(OPERATION_CACHE_SIZE)
_ATOMS = {bool, int, float, complex, str, bytes, type(None), np.dtype, type}
_LIBRARIES = ("jax", "jaxlib", "numpy", "ml_dtypes")


def operation_of(
    primitive: Primitive, operands: Sequence[Value], params: dict[str, object], config: int
) -> CompiledOperation:
    """The compiled operation of a bind.

    Args:
        primitive: of JAX.
        operands: what it is bound to.
        params: of the bind.
        config: a number for the JAX configuration in force.

    Raises:
        Uncacheable: it may do something else in every call.
    """
    owners: list[Any] = []
    key = (
        config,
        primitive,
        tuple(params),
        tuple([_key(value, owners) for value in params.values()]),
        tuple([_signature(x) for x in operands]),
    )
    operation = _operations.get(key)
    if operation is None:
        # Copies of the jaxprs, so that the operation does not keep its owners alive.
        bound = {k: _copied(v) for k, v in params.items()} if owners else params
        operation = CompiledOperation(
            bind_function(primitive, bound),
            [aval_of(x) for x in operands],
            is_stateful=any(map(is_stateful, owners)),
        )
        _operations.put(key, operation, owners, operation.orphan)
    return operation


def bind_function(primitive: Primitive, params: dict[str, object]) -> Function:
    """A bind of `primitive`, as a function to a list of results."""

    def call(*operands: Value) -> list[Array]:
        results = primitive.bind(*operands, **params)
        return list(results) if primitive.multiple_results else [results]

    return call


def operation_of_jit(jaxpr: ClosedJaxpr, config: int) -> CompiledOperation:
    """The compiled operation of a call of a jitted function, whose constants come first.

    Args:
        jaxpr: of the function.
        config: as in `operation_of`.

    Raises:
        Uncacheable: it runs Python, or has an effect.
    """
    key = (config, id(jaxpr))
    operation = _operations.get(key)
    if operation is None:
        if runs_python(jaxpr):
            raise Uncacheable
        avals = [*map(jax.typeof, jaxpr.consts), *jaxpr.in_avals]
        operation = CompiledOperation(_compat.opened(jaxpr), avals, has_rules(jaxpr))
        _operations.put(key, operation, [jaxpr], operation.orphan)
    return operation


def operation_of_custom(
    primitive: Primitive,
    functions: Sequence[Any],
    operands: Sequence[Value],
    params: dict[str, object],
    config: int,
) -> CompiledOperation:
    """The compiled operation of a call of one of JAX's functions with custom rules.

    Args:
        primitive: that of `jax.custom_jvp` or `jax.custom_vjp`.
        functions: the function and its rules, as JAX wraps them.
        operands: what it is called with.
        params: of the bind.
        config: as in `operation_of`.

    Raises:
        Uncacheable: it is not JAX's, and its rules may look at values and at the world; or
            this JAX does not let us call it as one that is cached.
    """
    if not rule_stores.is_available():
        raise Uncacheable
    function, *rules = functions
    if not _is_global_of_jax(function.f) or not all(_is_of_jax(rule.f) for rule in rules):
        raise Uncacheable
    key = (
        config,
        primitive,
        function.f,
        function.transforms,
        *(rule.f for rule in rules),
        tuple([_signature(x) for x in operands]),
    )
    try:
        known: _CustomOperation | None = _operations.get(key)
    except TypeError:  # an argument of the function that JAX does not trace
        raise Uncacheable from None
    if known is not None:
        rule_stores.refill(function, known.stores)
        return known.operation

    def call(*xs: Value) -> list[Array]:
        return primitive.bind(*xs, subfuns=tuple(functions), **params)

    avals = [aval_of(x) for x in operands]
    with set_current_trace(_compat.eval_trace):
        closed = jax.make_jaxpr(call)(*map(with_weak_type, avals))
    operation = CompiledOperation(jaxpr_as_fun(closed), avals, has_rules=True)
    _operations.put(key, _CustomOperation(operation, function.stores))
    return operation


def _is_of_jax(function: object) -> bool:
    return (getattr(function, "__module__", None) or "").partition(".")[0] == "jax"


def _is_global_of_jax(function: Any) -> bool:
    """Whether a function is JAX's and lives as long as JAX, so that a cache may hold it."""
    inner = inspect.unwrap(function)  # what `jax.jit` made
    return _is_of_jax(function) and not getattr(inner, "__closure__", None)


def _signature(x: Value) -> tuple[Hashable, ...]:
    aval = aval_of(x)
    return (aval.shape, aval.dtype, getattr(aval, "weak_type", False))


def _key(value: Any, owners: list[Any]) -> Any:
    """The part of a key for a parameter of a bind.

    Two objects in a key that are equal must do the same. That holds of numbers, of dtypes,
    and of what JAX and NumPy make other than functions and arrays. A jaxpr is identified
    by its id, for as long as it lives.

    Args:
        value: the parameter.
        owners: the jaxprs in it are added.

    Raises:
        Uncacheable: it contains something else.
    """
    cls = type(value)
    if cls is float:
        return value.hex()  # 0.0 equals -0.0
    if cls in _ATOMS:
        return (cls, value)  # 1 equals True
    if isinstance(value, tuple):
        return (cls, *[_key(item, owners) for item in value])
    if _compat.is_jaxpr(value):
        owners.append(value)
        return id(value)
    if isinstance(value, types.FunctionType):
        known = value.__module__.partition(".")[0] in _LIBRARIES and not value.__closure__
    else:
        module = getattr(cls, "__module__", "").partition(".")[0]
        known = isinstance(value, enum.Enum | type) or (
            module in _LIBRARIES
            and not callable(value)
            and not isinstance(value, jax.Array)
        )
    if not known:
        raise Uncacheable
    try:
        hash(value)
    except TypeError:
        raise Uncacheable from None
    return value


def _copied(value: object) -> Any:
    """`value` with copies of the jaxprs in it."""
    if type(value) is tuple:
        return tuple(map(_copied, value))
    return _compat.copied_jaxpr(value) if _compat.is_jaxpr(value) else value
