"""Say what one object of Python is by value, and what other objects it leads to."""

from __future__ import annotations

import collections
import functools
import gc
import hashlib
import struct
import sys
import types
import typing
from collections.abc import Hashable
from types import CodeType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jpyfunc._limits import MAX_FINGERPRINT_BYTES, MAX_FINGERPRINT_OBJECTS
from jpyfunc._staging.abstract_tracer import AbstractTracer
from jpyfunc._staging.range_iterator import RangeBounds, RangeIterator

Children = list[tuple[str, Any]]  # what an object leads to, each with its path


class UnseenStateError(Exception):
    """There is state that cannot be seen. The text says of which variable."""


# Modules whose functions depend on their arguments alone. Others of the standard library,
# such as `random` and `time`, are looked into like a user's, and what is written in C in
# them is refused.
_PURE = {
    "abc", "bisect", "builtins", "cmath", "collections", "copy", "dataclasses", "enum",
    "functools", "heapq", "itertools", "jax", "jaxlib", "jpyfunc", "math", "ml_dtypes",
    "numbers", "numpy", "operator", "reprlib", "string", "types", "typing",
    "_bisect", "_collections", "_functools", "_heapq", "_operator", "_struct", "struct",
}  # fmt: skip
_JAX = ("jax", "jaxlib", "jpyfunc")
_ATOMS = {
    bool, int, str, bytes, type(None), type(...), type(NotImplemented), range,
}  # fmt: skip
# Descriptors and functions in C that hold nothing.
_CONSTANT_KINDS = {
    np.ufunc, CodeType, types.MemberDescriptorType, types.GetSetDescriptorType,
    types.MethodDescriptorType, types.WrapperDescriptorType,
    types.ClassMethodDescriptorType, type(vars(collections.namedtuple("_", "x"))["x"]),
}  # fmt: skip
_CLASS_NAMES = [vars(type)[name].__get__ for name in ("__name__", "__qualname__")]
_CLASS_ATTRIBUTES = {"__dict__", "__weakref__", "__abstractmethods__", "_abc_impl"}
_CACHE = type(functools.lru_cache(len))
_ELSEWHERE = (type, types.ModuleType, types.FunctionType, CodeType, str, int, float)
# Classes in C whose objects hold what they show, and how to get at it.
_LAYOUTS: dict[type, Any] = {
    object: lambda value: [],
    types.SimpleNamespace: lambda value: [],
    list: list.__iter__,
    tuple: tuple.__iter__,
    collections.deque: collections.deque.__iter__,
    set: set.__iter__,
    frozenset: frozenset.__iter__,
    dict: lambda value: [x for item in dict.items(value) for x in item],
    collections.OrderedDict: lambda value: [
        x for item in collections.OrderedDict.items(value) for x in item
    ],
    collections.defaultdict: lambda value: [
        value.default_factory,
        *(x for item in dict.items(value) for x in item),
    ],
    int: lambda value: [int.__int__(value)],
    float: lambda value: [float.__float__(value)],
    complex: lambda value: [complex.__complex__(value)],
    str: lambda value: [str.__str__(value)],
    bytes: lambda value: [bytes(memoryview(value))],
    functools.partial: lambda value: [value.func, value.args, value.keywords],
}


# Nothing here asks an object of the user's for an attribute, nor for its class, except by
# functions in C that find no code of the user's: looking must not change what is looked at.


def contents_of(value: Any, path: str) -> tuple[Hashable, Children]:
    """Return what `value` is apart from what it leads to, and that.

    Args:
        value: no function, module or class of a library.
        path: how to write it.

    Raises:
        UnseenStateError: it has state that cannot be seen.
    """
    kind = type(value)
    if kind in _CONSTANT_KINDS:
        return id(value), []
    if kind is types.CellType:
        return _cell(value, path)
    if kind is types.MethodType:
        return None, [(path, value.__func__), (path, value.__self__)]
    if kind in (types.BuiltinFunctionType, types.MethodWrapperType):
        return _builtin(value, path)
    if kind in (staticmethod, classmethod):
        return None, [(path, value.__func__), (path, vars(value))]
    if kind is property:
        return None, [(path, value.fget), (path, value.fset), (path, value.fdel)]
    if kind is slice:
        return None, [(path, value.start), (path, value.stop), (path, value.step)]
    if kind is types.MappingProxyType:
        return None, [(path, dict(value))]
    if kind in (typing.TypeVar, typing.ParamSpec):
        # As of Python 3.12 it has a dict that nothing else shows.
        return id(value), [(path, object.__getstate__(value))]
    if kind in (types.GenericAlias, types.UnionType):
        return None, [
            (path, getattr(value, "__origin__", None)),
            (path, value.__args__),
        ]
    if kind is np.ndarray:
        return _numpy_array(value, path)
    if issubclass(kind, RangeBounds | RangeIterator):
        return None, [(path, x) for x in value.state]
    if issubclass(kind, type):
        return _class(value, path)
    if _package(kind.__module__) in _JAX or (
        kind is _CACHE and _is_pure_function(value.__wrapped__)
    ):
        return _object_of_jax(value, path)
    return _instance(value, path)


def _cell(value: Any, path: str) -> tuple[Hashable, Children]:
    try:
        return None, [(path, value.cell_contents)]
    except ValueError:  # a name that is not bound yet
        return None, []


def _builtin(value: Any, path: str) -> tuple[Hashable, Children]:
    owner = value.__self__
    if owner is None or isinstance(owner, types.ModuleType):
        name = getattr(owner, "__name__", None) or value.__module__ or "builtins"
        if not is_pure_module(name):
            raise UnseenStateError(
                f"{path!r} is a function of {name}, which may have hidden state"
            )
        return id(value), []
    return value.__name__, [(path, owner)]


def _numpy_array(value: Any, path: str) -> tuple[Hashable, Children]:
    if value.dtype.hasobject:
        raise UnseenStateError(f"{path!r} is an array of Python objects")
    data = value.tobytes()
    if len(data) > MAX_FINGERPRINT_BYTES:
        data = hashlib.blake2b(data).digest()
    # Views of one array share its memory.
    base = value.base
    start = value.__array_interface__["data"][0]
    offset = (
        start - base.__array_interface__["data"][0] if type(base) is np.ndarray else None
    )
    fact = value.shape, value.dtype.str, value.strides, value.flags.writeable, offset
    return (*fact, data), [(path, base)]


def _class(value: type, path: str) -> tuple[Hashable, Children]:
    if not _is_heap(value):
        return id(value), []
    attributes = {k: x for k, x in vars(value).items() if k not in _CLASS_ATTRIBUTES}
    names = [get(value) for get in _CLASS_NAMES]
    found = [(path, parent) for parent in (*value.__mro__[1:], type(value))]
    found += [(f"{path}.{name}", x) for name, x in attributes.items()]
    return (id(value), *names, *attributes), found


def _object_of_jax(value: Any, path: str) -> tuple[Hashable, Children]:
    """An object that JAX made, of which only the functions are looked into."""
    if issubclass(type(value), functools.partial):  # jax.tree_util.Partial
        return _instance(value, path)
    if issubclass(type(value), Tracer):
        raise UnseenStateError(
            f"{path!r} is traced by a transformation of JAX inside the body"
        )
    held = getattr(value, "__wrapped__", None)
    if held is not None:
        return id(value), [] if _is_pure_function(held) else [(path, held)]
    if vars(jnp).get(getattr(value, "__name__", "")) is value:  # such as jnp.add
        return id(value), []
    if _holds_arrays(value):
        raise UnseenStateError(f"{path!r} is a {type(value).__name__} that holds arrays")
    return id(value), []


def _holds_arrays(value: Any) -> bool:
    """Tell whether an object of JAX holds arrays of the body, as a jaxpr may.

    It is not looked into for anything else, so that it need not be known how it holds them.
    """
    seen: dict[int, Any] = {}
    level = [value]
    while level and len(seen) < MAX_FINGERPRINT_OBJECTS:
        seen |= {id(x): x for x in level}
        level = [x for x in gc.get_referents(*level) if id(x) not in seen]
        if any(issubclass(type(x), AbstractTracer) for x in level):
            return True
        functions = [x for x in level if type(x) is types.FunctionType]
        level = [x for x in level if not issubclass(type(x), _ELSEWHERE)]
        level += [y for x in functions for y in (x.__closure__, x.__defaults__) if y]
    return bool(level)


def _instance(value: Any, path: str) -> tuple[Hashable, Children]:
    kind = type(value)
    layout = next((x for x in kind.__mro__ if x in _LAYOUTS or not _is_heap(x)), object)
    slots = _slots(kind)
    pointers = len(slots) + _added_pointers(kind, layout)
    own = kind.__basicsize__ - layout.__basicsize__ - pointers * struct.calcsize("P")
    if layout not in _LAYOUTS or own > 0:
        raise UnseenStateError(f"{path!r} is a {kind.__name__}, whose state cannot be seen")
    found = [] if kind in _LAYOUTS else [(path, kind)]
    items = [*_LAYOUTS[layout](value)]
    if layout in (set, frozenset):
        if not all(type(x) in _ATOMS for x in items):
            raise UnseenStateError(
                f"{path!r} is a set of objects, whose order is not fixed"
            )
        items.append(sys.getsizeof(value))  # which the order depends on
    if issubclass(layout, dict):
        skipped = len(items) % 2  # the factory of a defaultdict
        found += [(path, x) for x in items[:skipped]]
        keys, values = items[skipped::2], items[skipped + 1 :: 2]
        for k, x in zip(keys, values, strict=True):
            found += [(path, k), (f"{path}[{_short(k)}]", x)]
    else:
        found += [(f"{path}[{i}]", x) for i, x in enumerate(items)]
    bound = []
    for name, slot in slots:
        try:
            found.append((f"{path}.{name}", slot.__get__(value)))
        except AttributeError:  # not set
            continue
        bound.append(name)
    attributes = _attributes(value, path)
    found += [(f"{path}.{name}", x) for name, x in attributes.items()]
    return (len(items), *bound, *attributes), found


def _attributes(value: Any, path: str) -> dict[str, Any]:
    """The attributes that an object has in a dict, if it has one."""
    kind = type(value)
    dicts = (vars(x)["__dict__"] for x in kind.__mro__ if "__dict__" in vars(x))
    getter = next(dicts, None)
    if isinstance(getter, types.GetSetDescriptorType | types.MemberDescriptorType):
        return getter.__get__(value)
    if getter is None and not kind.__dictoffset__:
        return {}
    raise UnseenStateError(f"{path!r} is a {kind.__name__}, which hides attributes")


def is_pure_module(name: Any) -> bool:
    """Tell whether functions of a module depend on their arguments alone."""
    return _package(name) in _PURE


def _is_pure_function(value: Any) -> bool:
    if type(value) is not types.FunctionType:
        return False
    return is_pure_module(value.__globals__.get("__name__", ""))


@functools.cache
def is_array_kind(kind: type) -> bool:
    """Tell whether objects of a class are arrays of JAX, or stand for these in a body."""
    is_tracer = issubclass(kind, Tracer)
    return issubclass(kind, AbstractTracer if is_tracer else jax.Array)


def atom_of(value: Any) -> Hashable | None:
    """Return what tells a value that holds nothing from all others; else None."""
    kind = type(value)
    if kind in _ATOMS:
        return kind, value
    if kind is float:  # -0.0 equals 0.0, and no NaN equals itself
        return kind, repr(value), struct.pack("d", value)
    if kind is complex:
        return kind, repr(value), struct.pack("dd", value.real, value.imag)
    if issubclass(kind, np.dtype) and not _has_metadata(value):
        return kind, value
    if issubclass(kind, np.generic) and not value.dtype.hasobject:
        return kind, value.dtype, value.tobytes()
    return None


def _has_metadata(dtype: Any) -> bool:
    """Whether a dtype holds objects of any kind."""
    inner = [field[0] for field in (dtype.fields or {}).values()]
    inner += [dtype.subdtype[0]] if dtype.subdtype else []
    return dtype.metadata is not None or any(map(_has_metadata, inner))


def is_library_class(value: type) -> bool:
    """Tell whether a class is a library's, and written in Python."""
    return _is_heap(value) and is_pure_module(value.__module__)


def _is_heap(kind: type) -> bool:
    return bool(kind.__flags__ & 1 << 9)  # Py_TPFLAGS_HEAPTYPE: made at run time


def _package(module: Any) -> str:
    return str(module).partition(".")[0]


def _added_pointers(kind: type, layout: type) -> int:
    """Count the pointers that Python adds to an object, besides those of its slots."""
    added: Any = kind
    has_list = added.__weakrefoffset__ > 0 and not layout.__weakrefoffset__
    # Before Python 3.12, an object of varying size has its dict behind its items.
    has_dict = (
        added.__dictoffset__ < 0 and layout.__itemsize__ and sys.version_info < (3, 12)
    )
    return bool(has_list) + bool(has_dict)


def _slots(kind: type) -> list[tuple[str, Any]]:
    """Find the descriptors of the slots of a class and its bases, by their names."""
    return [
        (name, x)
        for parent in reversed(kind.__mro__)
        if _is_heap(parent) and parent not in _LAYOUTS
        for name, x in vars(parent).items()
        if type(x) is types.MemberDescriptorType
    ]


def _short(key: Any) -> str:
    return repr(key) if type(key) in (str, int) else type(key).__name__
