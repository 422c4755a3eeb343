"""Picture all of Python's state that the variables of some frames lead to, by value."""

from __future__ import annotations

import collections
import functools
import hashlib
import inspect
import struct
import sys
import types
import typing
from collections.abc import Hashable, Iterator, Sequence
from types import CodeType, FrameType
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jpyfunc._limits import MAX_FINGERPRINT_BYTES
from jpyfunc._staging.abstract_tracer import AbstractTracer
from jpyfunc._staging.bytecode import (
    attribute_names,
    dead_variables,
    global_names,
    imported_names,
)

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
# Functions that see more than their arguments, or what differs in equal states.
_REFUSED_BUILTINS = {
    "__import__", "compile", "dir", "eval", "exec", "globals", "id", "input", "locals",
    "open", "vars",
}  # fmt: skip
_OF_FRAMES = {"_getframe", "currentframe", "f_locals", "settrace", "setprofile"}
_ATOMS = {
    bool, int, str, bytes, type(None), type(...), type(NotImplemented), range,
}  # fmt: skip
# Descriptors and functions in C that hold nothing.
_CONSTANT_KINDS = {
    np.ufunc, CodeType, types.MemberDescriptorType, types.GetSetDescriptorType,
    types.MethodDescriptorType, types.WrapperDescriptorType,
    types.ClassMethodDescriptorType, type(collections.namedtuple("_", "x").x),
}  # fmt: skip
_FUNCTION_ATTRIBUTES = (
    "__name__", "__qualname__", "__doc__", "__module__", "__annotations__",
)  # fmt: skip
_CLASS_NAMES = [vars(type)[name].__get__ for name in ("__name__", "__qualname__")]
_CLASS_ATTRIBUTES = {"__dict__", "__weakref__", "__abstractmethods__", "_abc_impl"}
_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by Python
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


class PythonState:
    """All that the variables of some frames lead to, apart from the arrays.

    Attributes:
        facts: what was found, in order. The states of the same frames are the same if
            their facts are equal.
        paths: of each fact, how to write what it is of.
        arrays: the arrays that were found, in order, each time that they were.
        array_paths: how to write each of them.
        frames: whose variables these are, innermost first.
        objects: all other objects that can be told from their equals, each once. As they
            are held, no other object gets the id of one of them.
    """

    def __init__(self, frames: Sequence[FrameType]) -> None:
        """Begin.

        Args:
            frames: those whose variables may be used from here on, innermost first.
        """
        self.facts: list[Hashable] = []
        self.paths: list[str] = []
        self.arrays: list[Any] = []
        self.array_paths: list[str] = []
        self.objects: list[Any] = []
        self._limit = 0
        self._numbers: dict[int, int] = {}
        self._names: set[str] = set()
        self._namespaces: dict[int, tuple[str, Any]] = {}  # modules and classes
        self.frames = frames

    def look(self, limit: int) -> None:
        """Look at the variables of the frames.

        Args:
            limit: of objects to look at.

        Raises:
            UnseenStateError: some state cannot be seen, or there is too much of it.
        """
        self._limit = limit
        for frame in self.frames:
            names = self._globals(frame.f_code, frame.f_globals, frame.f_builtins)
            self._look_at(names)
        for frame in self.frames:
            dead = dead_variables(frame.f_code, frame.f_lasti)
            variables = _local_variables(frame).items()
            self._look_at([(name, x) for name, x in variables if name not in dead])
        self._look_at_namespaces()

    def differences(
        self, other: PythonState
    ) -> Iterator[tuple[str, Any, Any]]:
        """Yield where the facts of another state are different ones.

        Yields:
            How to write the variable, and the two facts.
        """
        pairs = zip(self.facts, other.facts, other.paths, strict=False)
        for a, b, path in pairs:
            if a != b and path:
                yield path, a, b
        if len(self.facts) != len(other.facts):
            yield "what its variables lead to", None, None

    def _note(self, fact: Hashable, path: str) -> None:
        self.facts.append(fact)
        self.paths.append(path)

    def _look_at(self, children: Children) -> None:
        """Note what `children` are and lead to."""
        # A stack in the place of recursion: lists may be linked to any length.
        waiting = children[::-1]
        self._note(("variables", *(path for path, _ in children)), "")
        while waiting:
            path, value = waiting.pop()
            if len(self.facts) >= self._limit:
                raise UnseenStateError("its variables lead to too many objects")
            if _is_array(type(value)):
                self._note("array", path)
                self.arrays.append(value)
                self.array_paths.append(path)
                continue
            fact = _atom(value)
            if fact is None:
                number = self._numbers.get(id(value))
                if number is not None:
                    fact = ("seen", number)
                else:
                    self._numbers[id(value)] = len(self._numbers)
                    self.objects.append(value)
                    fact, found = self._look_into(value, path)
                    fact = (type(value), fact, len(found))
                    waiting += found[::-1]
            self._note(fact, path)

    def _look_at_namespaces(self) -> None:
        """Look at the attributes of modules, and of libraries' classes, that may be used.

        These are the ones that some function names. Which these are is known once all
        functions are found, and more may be found in the attributes.
        """
        looked_at: set[tuple[int, str]] = set()
        found: Children | None = None
        while found is None or found:
            found = [
                (f"{path}.{name}", vars(owner)[name])
                for path, owner in list(self._namespaces.values())
                for name in sorted(self._names)
                if name in vars(owner) and (id(owner), name) not in looked_at
            ]
            looked_at |= {
                (id(owner), name)
                for _, owner in list(self._namespaces.values())
                for name in self._names
            }
            self._look_at(found)

    def _look_into(self, value: Any, path: str) -> tuple[Hashable, Children]:
        """What `value` is apart from what it leads to, and that."""
        kind = type(value)
        if kind in _CONSTANT_KINDS:
            return id(value), []
        if kind is types.FunctionType:
            return self._function(value, path)
        if kind is types.ModuleType:
            self._namespaces[id(value)] = path, value
            return id(value), []
        if kind is types.CellType:
            return self._cell(value, path)
        if kind is types.MethodType:
            return None, [(path, value.__func__), (path, value.__self__)]
        if kind in (types.BuiltinFunctionType, types.MethodWrapperType):
            return self._builtin(value, path)
        if kind in (staticmethod, classmethod):
            return None, [(path, value.__func__), (path, vars(value))]
        if kind is property:
            return None, [(path, value.fget), (path, value.fset), (path, value.fdel)]
        if kind is slice:
            return None, [(path, value.start), (path, value.stop), (path, value.step)]
        if kind is types.MappingProxyType:
            return None, [(path, dict(value))]
        if kind in (typing.TypeVar, typing.ParamSpec):
            return id(value), [(path, getattr(value, "__dict__", None))]
        if kind in (types.GenericAlias, types.UnionType):
            return None, [(path, getattr(value, "__origin__", None)), (path, value.__args__)]
        if kind is np.ndarray:
            return self._numpy_array(value, path)
        if issubclass(kind, type):
            return self._class(value, path)
        if _package(kind.__module__) in _JAX or _is_library_cache(value):
            return self._object_of_jax(value, path)
        return self._instance(value, path)

    def _function(self, value: Any, path: str) -> tuple[Hashable, Children]:
        code = value.__code__
        cells = zip(code.co_freevars, value.__closure__ or (), strict=True)
        found = [(name, cell) for name, cell in cells]
        found += [(path, x) for x in (value.__defaults__, value.__kwdefaults__)]
        found += [(path, getattr(value, name)) for name in _FUNCTION_ATTRIBUTES]
        found += [(f"{path}.{name}", x) for name, x in vars(value).items()]
        module = value.__globals__.get("__name__", "")
        if _package(module) not in _PURE:
            found += self._globals(code, value.__globals__, value.__builtins__)
        own = [id(cell) for cell in value.__closure__ or () if self._is_of_frame(code)]
        return (id(code), *vars(value), *own), found

    def _is_of_frame(self, code: CodeType) -> bool:
        """Whether a function was defined in one of the functions that run.

        Its cells may then be variables of that frame, and it matters that they are the
        same ones. Frames do not give their cells.
        """
        return any(code in frame.f_code.co_consts for frame in self.frames)

    def _globals(
        self, code: CodeType, variables: dict[str, Any], builtins: dict[str, Any]
    ) -> Children:
        """The global variables, and the modules, that a function may use."""
        self._names |= attribute_names(code)
        refused = _REFUSED_BUILTINS.intersection(global_names(code)) - variables.keys()
        refused |= _OF_FRAMES.intersection(code.co_names)
        if refused:
            raise UnseenStateError(f"{code.co_name} uses {min(refused)}")
        known = collections.ChainMap(variables, builtins)
        found = [(n, known[n]) for n in global_names(code) if n in known]
        for name in imported_names(code):
            if name in sys.modules:
                found.append((name, sys.modules[name]))
        return found

    def _cell(self, value: Any, path: str) -> tuple[Hashable, Children]:
        try:
            return None, [(path, value.cell_contents)]
        except ValueError:  # a name that is not bound yet
            return None, []

    def _builtin(self, value: Any, path: str) -> tuple[Hashable, Children]:
        owner = value.__self__
        if owner is None or isinstance(owner, types.ModuleType):
            name = getattr(owner, "__name__", None) or value.__module__ or "builtins"
            if _package(name) not in _PURE:
                raise UnseenStateError(f"{path}, of {name}, may have a state")
            return id(value), []
        return value.__name__, [(path, owner)]

    def _numpy_array(self, value: Any, path: str) -> tuple[Hashable, Children]:
        if value.dtype.hasobject:
            raise UnseenStateError(f"{path} is an array of Python objects")
        data = value.tobytes()
        if len(data) > MAX_FINGERPRINT_BYTES:
            data = hashlib.blake2b(data).digest()
        # Views of one array share its memory.
        base = value.base
        start = value.__array_interface__["data"][0]
        offset = start - base.__array_interface__["data"][0] if type(base) is np.ndarray else None
        fact = value.shape, value.dtype.str, value.strides, value.flags.writeable, offset
        return (*fact, data), [(path, base)]

    def _class(self, value: type, path: str) -> tuple[Hashable, Children]:
        if not value.__flags__ & _HEAP:
            return id(value), []
        if _package(value.__module__) in _PURE:
            self._namespaces[id(value)] = path, value  # for what a user adds
            return id(value), []
        attributes = {k: x for k, x in vars(value).items() if k not in _CLASS_ATTRIBUTES}
        names = [get(value) for get in _CLASS_NAMES]
        found = [(path, parent) for parent in (*value.__mro__[1:], type(value))]
        found += [(f"{path}.{name}", x) for name, x in attributes.items()]
        return (id(value), *names, *attributes), found

    def _object_of_jax(self, value: Any, path: str) -> tuple[Hashable, Children]:
        """An object that JAX made, of which only the functions are looked into."""
        if issubclass(type(value), functools.partial):  # jax.tree_util.Partial
            return self._instance(value, path)
        if issubclass(type(value), Tracer):
            raise UnseenStateError(f"{path} is traced by a transformation of JAX")
        held = getattr(value, "__wrapped__", None)
        function = getattr(held, "__globals__", {}).get("__name__", "")
        if held is None or _package(function) in _PURE:
            return id(value), []
        return id(value), [(path, held)]

    def _instance(self, value: Any, path: str) -> tuple[Hashable, Children]:
        kind = type(value)
        layout = next(
            (x for x in kind.__mro__ if x in _LAYOUTS or not x.__flags__ & _HEAP), object
        )
        slots = _slots(kind)
        pointers = len(slots) + _added_pointers(kind, layout)
        own = kind.__basicsize__ - layout.__basicsize__ - pointers * struct.calcsize("P")
        if layout not in _LAYOUTS or own > 0:
            raise UnseenStateError(
                f"{path} is a {kind.__name__}, whose state cannot be seen"
            )
        found = [] if kind in _LAYOUTS else [(path, kind)]
        items = [*_LAYOUTS[layout](value)]
        if layout in (set, frozenset):
            if not all(type(x) in _ATOMS for x in items):
                raise UnseenStateError(f"{path} is a set of objects, in any order")
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
        try:
            attributes = object.__getattribute__(value, "__dict__")
        except AttributeError:
            attributes = {}
        found += [(f"{path}.{name}", x) for name, x in attributes.items()]
        return (len(items), *bound, *attributes), found


def _is_library_cache(value: Any) -> bool:
    """Whether `value` is a library's function with a cache, which changes nothing."""
    inner = value.__wrapped__ if type(value) is _CACHE else None
    module = getattr(inner, "__globals__", {}).get("__name__", "")
    return _package(module) in _PURE


# Nothing here asks an object of the user's for an attribute, nor for its class, except by
# functions in C that find no code of the user's: looking must not change what is looked at.


@functools.cache
def _is_array(kind: type) -> bool:
    """Whether objects of a class are arrays of JAX, or stand for these in a body."""
    is_tracer = issubclass(kind, Tracer)
    return issubclass(kind, AbstractTracer if is_tracer else jax.Array)


_CACHE = type(functools.lru_cache(len))


def _atom(value: Any) -> Hashable | None:
    """What tells a value that holds nothing from all others; None if it is none."""
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


def _package(module: Any) -> str:
    return str(module).partition(".")[0]


def _added_pointers(kind: type, layout: type) -> int:
    """How many pointers Python adds to objects of a class, besides those of its slots."""
    added: Any = kind
    has_list = added.__weakrefoffset__ > 0 and not layout.__weakrefoffset__
    # Before Python 3.12, an object of varying size has its dict behind its items.
    has_dict = added.__dictoffset__ < 0 and layout.__itemsize__ and sys.version_info < (3, 12)
    return bool(has_list) + bool(has_dict)


def _slots(kind: type) -> list[tuple[str, Any]]:
    """The descriptors of the slots of a class and its bases, by their names."""
    return [
        (name, x)
        for parent in reversed(kind.__mro__)
        if parent.__flags__ & _HEAP and parent not in _LAYOUTS
        for name, x in vars(parent).items()
        if type(x) is types.MemberDescriptorType
    ]


def _local_variables(frame: FrameType) -> dict[str, Any]:
    """Copy the local variables of a frame.

    Before Python 3.13, the frame of a function keeps the dict that it gives, and with it
    objects that the function has let go. What has a weak reference to one would see it.
    """
    given = frame.f_locals
    variables = dict(given)
    is_of_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED
    if is_of_function and sys.version_info < (3, 13):
        given.clear()
    return variables


def _short(key: Any) -> str:
    return repr(key) if type(key) in (str, int) else type(key).__name__
