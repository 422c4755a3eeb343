"""Picture all of Python's state that the variables of some frames lead to, by value."""

from __future__ import annotations

import collections
import sys
import types
from collections.abc import Hashable, Iterator, Sequence
from types import CodeType, FrameType
from typing import Any

from jpyfunc._frames import local_variables
from jpyfunc._staging.bytecode import (
    attribute_names,
    dead_variables,
    global_names,
    imported_names,
)
from jpyfunc._staging.number_tracer import NumberTracer
from jpyfunc._staging.object_contents import (
    Children,
    UnseenStateError,
    atom_of,
    contents_of,
    is_array_kind,
    is_library_class,
    is_pure_module,
)
from jpyfunc._staging.range_iterator import RangeIterator

# Functions that see more than their arguments, or what differs in equal states.
_REFUSED_BUILTINS = {
    "__import__", "compile", "dir", "eval", "exec", "globals", "id", "input", "locals",
    "open", "vars",
}  # fmt: skip
_OF_FRAMES = {"_getframe", "currentframe", "f_locals", "settrace", "setprofile"}
_FUNCTION_ATTRIBUTES = (
    "__name__", "__qualname__", "__doc__", "__module__", "__annotations__",
)  # fmt: skip


class PythonState:
    """Everything that the variables of some frames lead to, apart from the arrays.

    Attributes:
        facts: what was found, in order. The states of the same frames are the same if
            their facts are equal.
        paths: of each fact, how to write what it is of.
        arrays: the arrays that were found, in order, each time that they were.
        array_paths: how to write each of them.
        frames: whose variables these are, innermost first.
        numbers: the names of the variables of the innermost frame that are numbers, by
            the positions of their facts.
        codes: of the functions that may be called, and of the frames.
        objects: all other objects that can be told from their equals, each once. As they
            are held, no other object gets the id of one of them.
    """

    def __init__(
        self, frames: Sequence[FrameType], iterators: Sequence[RangeIterator]
    ) -> None:
        """Begin.

        Args:
            frames: those whose variables may be used from here on, innermost first.
            iterators: those on the value stack of the innermost one.
        """
        self.facts: list[Hashable] = []
        self.paths: list[str] = []
        self.arrays: list[Any] = []
        self.array_paths: list[str] = []
        self.numbers: dict[int, str] = {}
        self.codes: set[CodeType] = set()
        self.objects: list[Any] = []
        self._limit = 0
        self._numbers: dict[int, int] = {}
        self._names: set[str] = set()
        self._namespaces: dict[int, tuple[str, Any]] = {}  # modules and classes
        self.frames = frames
        self._iterators = iterators

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
            variables = local_variables(frame)
            live = {name: x for name, x in variables.items() if name not in dead}
            if frame is self.frames[0]:
                self._note_numbers(live)
            self._look_at(list(live.items()))
        self._look_at([("jpyfunc.range", x) for x in self._iterators])
        self._look_at_namespaces()

    def _note_numbers(self, variables: dict[str, Any]) -> None:
        """Note those variables that are numbers apart from all others, and remove them."""
        for name in [name for name, x in variables.items() if type(x) in (int, float)]:
            self.numbers[len(self.facts)] = name
            self._note(atom_of(variables.pop(name)), name)

    def differing_numbers(self, later: PythonState) -> dict[str, tuple[Any, Any]]:
        """Find the numbers that are others in a later state, if nothing else differs.

        Returns:
            Both values, by the names of variables of the innermost frame. Nothing if
            anything else differs.
        """
        pairs = enumerate(zip(self.facts, later.facts, strict=False))
        found: dict[int, Any] = {i: (a, b) for i, (a, b) in pairs if a != b}
        if (
            len(self.facts) != len(later.facts)
            or not found.keys() <= self.numbers.keys() & later.numbers.keys()
            or any(self.numbers[i] != later.numbers[i] for i in found)
            or any(a[0] is not b[0] for a, b in found.values())
        ):
            return {}
        return {self.numbers[i]: (_value(a), _value(b)) for i, (a, b) in found.items()}

    def differences(self, other: PythonState) -> Iterator[tuple[str, Any, Any]]:
        """Yield where the facts of another state are different ones.

        Yields:
            How to write the variable, and the two facts.
        """
        pairs = zip(self.facts, other.facts, other.paths, strict=False)
        for a, b, path in pairs:
            if a != b and path:
                yield path, a, b
        if len(self.facts) != len(other.facts):
            yield "what the variables lead to", None, None

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
                raise UnseenStateError("the variables lead to too many objects")
            if is_array_kind(type(value)):
                is_number = isinstance(value, NumberTracer)
                self._note(("number", value.kind) if is_number else "array", path)
                self.arrays.append(value)
                self.array_paths.append(path)
                continue
            fact = atom_of(value)
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
        """Return what `value` is apart from what it leads to, and that."""
        kind = type(value)
        if kind is types.FunctionType:
            return self._function(value, path)
        is_class = issubclass(kind, type)
        if kind is types.ModuleType or (is_class and is_library_class(value)):
            self._namespaces[id(value)] = path, value
            return id(value), []
        return contents_of(value, path)

    def _function(self, value: Any, path: str) -> tuple[Hashable, Children]:
        code = value.__code__
        cells = zip(code.co_freevars, value.__closure__ or (), strict=True)
        found = [(name, cell) for name, cell in cells]
        found += [(path, x) for x in (value.__defaults__, value.__kwdefaults__)]
        found += [(path, getattr(value, name)) for name in _FUNCTION_ATTRIBUTES]
        found += [(f"{path}.{name}", x) for name, x in vars(value).items()]
        module = value.__globals__.get("__name__", "")
        if not is_pure_module(module):
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
        self.codes.add(code)
        refused = _REFUSED_BUILTINS.intersection(global_names(code)) - variables.keys()
        refused |= _OF_FRAMES.intersection(code.co_names)
        if refused:
            what = "which sees more than its arguments"
            raise UnseenStateError(f"{code.co_name!r} uses {min(refused)}, {what}")
        known = collections.ChainMap(variables, builtins)
        found = [(n, known[n]) for n in global_names(code) if n in known]
        for name in imported_names(code):
            if name in sys.modules:
                found.append((name, sys.modules[name]))
        return found


def _value(fact: Any) -> Any:
    """The value of the fact of an `int` or a `float`."""
    return fact[0](fact[1])
