"""Finds the operation that a bind is, compiled when it was met first.

The cache holds nothing of the user's beyond its own life: an operation that is made of a
jaxpr goes when that jaxpr does.
"""

from __future__ import annotations

import contextlib
import enum
import inspect
import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun, set_current_trace

from jpyfunc import _compat
from jpyfunc._interpreters.operations import (
    CompiledOperation,
    aval_of,
    has_rules,
    with_weak_type,
)
from jpyfunc._limits import (
    MAX_EVICTED_KEYS,
    OPERATION_CACHE_SIZE,
)


class Uncacheable(Exception):  # noqa: N818 - it is no error
    """A parameter that is a function or holds one, and so may be new in every call."""


class LruCache:
    """An LRU cache that grows to what is asked for again and again.

    A body of more distinct operations than the cache has room for would evict, in each
    call, just those that the next call begins with, and compile all of them anew. So where
    a key comes back that was evicted, the cache doubles. One whose keys never come back,
    such as those of functions that are made anew in each call, stays as small as it was.

    Args:
        size: how many entries it begins with.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        # Dead jaxprs are dropped by the garbage collector, which may run anywhere.
        self._lock = threading.RLock()
        self._kept: OrderedDict[Any, tuple[Any, Any]] = OrderedDict()
        self._evicted: OrderedDict[int, None] = OrderedDict()  # hashes of keys

    def get(self, key: Any) -> Any:
        # Without the lock, because it is on the way of every operation.
        entry = self._kept.get(key)
        if entry is None:
            return None
        with contextlib.suppress(KeyError):  # gone meanwhile
            self._kept.move_to_end(key)
        return entry[0]

    def put(self, key: Any, value: Any, owners: Sequence[Any] = ()) -> None:
        """Keep `value` while all `owners` live, whose ids are in the key."""

        def drop(_: Any, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
            if is_finalizing():
                return
            entry = self._kept.pop(key, None)
            for operation in entry[0] if entry and isinstance(entry[0], tuple) else ():
                if isinstance(operation, CompiledOperation):
                    operation.orphan()

        references = [weakref.ref(x, drop) for x in owners]
        with self._lock:
            self._kept[key] = (value, references)
            if len(self._kept) <= self._size:
                return
            if hash(key) in self._evicted:
                self._size *= 2
                self._evicted.clear()
                return
            evicted, _ = self._kept.popitem(last=False)
            self._evicted[hash(evicted)] = None
            if len(self._evicted) > MAX_EVICTED_KEYS:
                self._evicted.popitem(last=False)


_operations = LruCache(OPERATION_CACHE_SIZE)
_ATOMS = {bool, int, float, complex, str, bytes, type(None), np.dtype, type}
_LIBRARIES = ("jax", "jaxlib", "numpy", "ml_dtypes")


def operation_of(
    primitive: Any, operands: Sequence[Any], params: dict[str, Any], context: Any
) -> CompiledOperation:
    """The operation that a bind of `primitive` is.

    Args:
        primitive: of JAX.
        operands: what it is bound to.
        params: of the bind.
        context: the JAX configuration in force, or what stands for them.

    Raises:
        Uncacheable: it is made anew in every call.
    """
    owners: list[Any] = []
    key = (
        context,
        primitive,
        tuple(params),
        tuple([_key(value, owners) for value in params.values()]),
        tuple([_signature(x) for x in operands]),
    )
    known = _operations.get(key)
    if known is None:
        # A copy of a jaxpr, so that the operation does not keep its owner alive.
        bound = {k: _copied(v) for k, v in params.items()} if owners else params
        operation = CompiledOperation(
            binding(primitive, bound),
            [aval_of(x) for x in operands],
            is_stateful=any(_compat.is_stateful(jaxpr) for jaxpr in owners),
        )
        _operations.put(key, (operation,), owners)
        return operation
    return known[0]


def binding(primitive: Any, params: dict[str, Any]) -> Callable[..., list[Any]]:
    """A bind of `primitive` as a function to a list of results."""

    def call(*operands: Any) -> list[Any]:
        results = primitive.bind(*operands, **params)
        return list(results) if primitive.multiple_results else [results]

    return call


def operation_of_jit(
    jaxpr: Any, context: Any, is_opaque: Callable[[Any], bool]
) -> CompiledOperation | None:
    """The operation that a call of a jitted function is; its constants come first.

    None if `is_opaque(jaxpr)`.
    """
    key = (context, id(jaxpr))
    known = _operations.get(key)
    if known is None:
        operation = None
        if not is_opaque(jaxpr):
            avals = [*map(jax.typeof, jaxpr.consts), *jaxpr.in_avals]
            operation = CompiledOperation(_compat.opened(jaxpr), avals, has_rules(jaxpr))
        known = (operation,)
        _operations.put(key, known, [jaxpr])
    return known[0]


def operation_of_custom(
    primitive: Any,
    functions: Sequence[Any],
    operands: Sequence[Any],
    params: dict[str, Any],
    context: Any,
) -> CompiledOperation:
    """The operation that a call of a function of JAX with a custom rule is.

    Args:
        primitive: that of `jax.custom_jvp` or `jax.custom_vjp`.
        functions: the function and its rules, as JAX wraps them.
        operands: what it is called with.
        params: of the bind.
        context: the JAX configuration in force, or what stands for them.

    Raises:
        Uncacheable: it is not JAX's, and its rules may look at values and at the world.
    """
    function, *rules = functions
    if not _is_global_of_jax(function.f) or not all(_is_of_jax(rule.f) for rule in rules):
        raise Uncacheable
    key = (
        context,
        primitive,
        function.f,
        function.transforms,
        *(rule.f for rule in rules),
        tuple([_signature(x) for x in operands]),
    )
    try:
        known = _operations.get(key)
    except TypeError:  # an argument of the function that JAX does not trace
        raise Uncacheable from None
    if known is not None:
        operation, stores = known
        # The structure of the results, which JAX asks of the function that it passed.
        function.populate_stores(stores)
        return operation

    def call(*xs: Any) -> list[Any]:
        return primitive.bind(*xs, subfuns=tuple(functions), **params)

    avals = [aval_of(x) for x in operands]
    with set_current_trace(_compat.eval_trace):
        closed = jax.make_jaxpr(call)(*map(with_weak_type, avals))
    operation = CompiledOperation(jaxpr_as_fun(closed), avals, has_rules=True)
    _operations.put(key, (operation, function.stores))
    return operation


def _is_of_jax(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").partition(".")[0] == "jax"


def _is_global_of_jax(function: Any) -> bool:
    """Whether it is JAX's and lives on anyway, so that the cache may hold it."""
    inner = inspect.unwrap(function)  # what `jax.jit` made
    return _is_of_jax(function) and not getattr(inner, "__closure__", None)


def _signature(x: Any) -> tuple[Any, ...]:
    aval = aval_of(x)
    return (aval.shape, aval.dtype, getattr(aval, "weak_type", False))


def _key(value: Any, owners: list[Any]) -> Any:
    """What tells a parameter from others; the jaxprs in it are added to `owners`."""
    kind = type(value)
    if kind is float:
        return value.hex()  # 0.0 equals -0.0
    if kind in _ATOMS:
        return (kind, value)  # 1 equals True
    if isinstance(value, tuple):
        return (kind, *[_key(item, owners) for item in value])
    if _compat.is_jaxpr(value):
        owners.append(value)
        return id(value)
    if isinstance(value, types.FunctionType):
        known = value.__module__.partition(".")[0] in _LIBRARIES and not value.__closure__
    else:
        module = getattr(kind, "__module__", "").partition(".")[0]
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


def _copied(value: Any) -> Any:
    """`value` with other jaxprs of the same content."""
    if type(value) is tuple:
        return tuple(map(_copied, value))
    return _compat.copied_jaxpr(value) if _compat.is_jaxpr(value) else value
