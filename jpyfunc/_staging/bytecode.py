"""Say of the bytecode of a function where it tests truth values, and what follows."""

from __future__ import annotations

import dataclasses
import dis
import functools
import inspect
import itertools
import sys
from collections.abc import Iterator
from types import CodeType
from typing import Any, TypeAlias

from jpyfunc._limits import BYTECODE_CACHE_SIZE

# The flags of functions that may be suspended, and resumed from elsewhere.
SUSPENDABLE = (
    inspect.CO_GENERATOR
    | inspect.CO_COROUTINE
    | inspect.CO_ITERABLE_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
)
# Names by which a function asks for the type of an object.
_TYPE_QUESTIONS = {
    "__class__", "callable", "getattr", "hasattr", "isinstance", "isscalar", "issubclass",
    "singledispatch", "type",
}  # fmt: skip
# Iterators of `for` loops by the offsets of `FOR_ITER`, and None for all other values.
_Stack: TypeAlias = tuple[int | None, ...]
_SKIPPED = ("NOP", "EXTENDED_ARG", "RESUME")
_JUMPS = ("JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT")
_ENDS = ("RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE", "INTERPRETER_EXIT")


@dataclasses.dataclass(frozen=True, slots=True)
class TruthTest:
    """An instruction that tests one value itself, and no C code on its behalf.

    Attributes:
        continuation: equal for two tests of one function only if the function goes on at
            the same instructions after them. The compiler duplicates the test of a
            `while` loop: it stands before the loop, and at its end.
        iterators: what is on the value stack apart from the tested value: iterators of
            `for` loops, by the offsets of the instructions that ask them for the next
            value. None if there is anything else.
        asks_iterator: whether it asks an iterator, the last of `iterators`, for the next
            value, which is a truth test if the iterator makes it one.
        repeats: whether the function may come here again.
    """

    continuation: tuple[int, ...]
    iterators: tuple[int, ...] | None
    asks_iterator: bool
    repeats: bool


@functools.lru_cache(BYTECODE_CACHE_SIZE)
def truth_tests(code: CodeType) -> dict[int, TruthTest]:
    """Find the truth tests of a function, by the offset of the instruction.

    Those in exception handlers are left out: there, the value stack has an exception.
    """
    return _instructions(code).truth_tests()


@functools.lru_cache(BYTECODE_CACHE_SIZE)
def dead_variables(code: CodeType, offset: int) -> frozenset[str]:
    """The local variables that a function does not read any more after an instruction.

    It may assign to them, and read what it has assigned.
    """
    live = _instructions(code).live_after(offset)
    plain = frozenset(code.co_varnames).difference(code.co_cellvars)
    return frozenset() if live is None else plain - live


@functools.lru_cache(BYTECODE_CACHE_SIZE)
def loop_of_iterator(code: CodeType, offset: int) -> int | None:
    """Return the offset of the instruction that asks an iterator for values.

    Args:
        code: of the function.
        offset: of the instruction that makes the iterator.

    Returns:
        None if the iterator is made for anything but a `for` loop.
    """
    return _instructions(code).loop_of_iterator(offset)


@functools.lru_cache(BYTECODE_CACHE_SIZE)
def _instructions(code: CodeType) -> _Instructions:
    return _Instructions(code)


class _Instructions:
    """The instructions of a function, and how they follow each other."""

    def __init__(self, code: CodeType) -> None:
        bytecode: Any = dis.Bytecode(code)
        self._all = list(bytecode)
        self._at = {x.offset: k for k, x in enumerate(self._all)}
        self._handlers = [
            (range(x.start, x.end), self._at[x.target]) for x in bytecode.exception_entries
        ]

    def live_after(self, offset: int) -> set[str] | None:
        """Find the names of the variables that may be read; None if that is not known."""
        if offset not in self._at or self._live_before is None:
            return None
        following = self._following(self._at[offset])
        return set().union(*(self._live_before[n] for n in following))

    @functools.cached_property
    def _live_before(self) -> list[set[str]] | None:
        """The variables that may be read, from each instruction on."""
        after = [self._following(k) for k in range(len(self._all))]
        accesses = [_accesses(x) for x in self._all]
        if None in accesses:
            return None
        known = [x for x in accesses if x is not None]
        live: list[set[str]] = [set(read) for read, _ in known]
        changes = True
        while changes:
            changes = False
            for k in reversed(range(len(known))):
                read, written = known[k]
                found = read | (set().union(*(live[n] for n in after[k])) - written)
                changes = changes or found != live[k]
                live[k] = found
        return live

    def _following(self, k: int) -> list[int]:
        """Find the instructions that may follow one, also if it raises."""
        offset = self._all[k].offset
        handlers = [target for covered, target in self._handlers if offset in covered]
        return [n for n, _ in self._after(k) if n < len(self._all)] + handlers

    def loop_of_iterator(self, offset: int) -> int | None:
        k = self._at.get(offset)
        if k is None or self._all[k].opname != "GET_ITER":
            return None
        following = self._all[self._skip(k + 1)]
        return following.offset if following.opname == "FOR_ITER" else None

    def truth_tests(self) -> dict[int, TruthTest]:
        stacks = self._stacks()
        found = {k: self._continuation(k) for k in stacks if self._tests(k)}
        return {
            self._all[k].offset: TruthTest(
                continuation,
                self._iterators(k, stacks[k]),
                self._all[k].opname == "FOR_ITER",
                self._comes_back(k, continuation, found),
            )
            for k, continuation in found.items()
        }

    def _tests(self, k: int) -> bool:
        instruction = self._all[k]
        name = instruction.opname
        if "JUMP" in name and "IF_" in name:
            return "NONE" not in name
        if name == "COMPARE_OP":  # as of Python 3.13, a flag says so
            flag = 16
            return sys.version_info >= (3, 13) and bool((instruction.arg or 0) & flag)
        return name in ("TO_BOOL", "UNARY_NOT", "FOR_ITER")

    def _iterators(self, k: int, stack: _Stack) -> tuple[int, ...] | None:
        """Find the iterators on the stack of a test, apart from what is tested."""
        if self._all[k].opname == "FOR_ITER":
            others, own = stack[:-1], [self._all[k].offset]
        else:
            # A jump tests what it finds. What leaves a truth value tests what it takes.
            is_jump = "JUMP" in self._all[k].opname
            depth = len(stack) + (0 if is_jump else self._effect(k, jumps=False))
            others, own = stack[: depth - 1], []
        known = [x for x in others if x is not None]
        return (*known, *own) if len(known) == len(others) else None

    def _stacks(self) -> dict[int, _Stack]:
        """Find what is on the value stack before each instruction."""
        stacks: dict[int, _Stack] = {}
        waiting: list[tuple[int, _Stack]] = [(0, ())]
        while waiting:
            k, stack = waiting.pop()
            if k not in stacks and k < len(self._all):
                stacks[k] = stack
                waiting += [
                    (n, self._moved(k, stack, jumps)) for n, jumps in self._after(k)
                ]
        return stacks

    def _moved(self, k: int, stack: _Stack, jumps: bool) -> _Stack:
        """Find what is on the value stack after an instruction.

        The compiler makes an iterator for a `for` loop, which alone takes it off the stack,
        or for a generator expression, which is called with it.
        """
        instruction = self._all[k]
        if instruction.opname == "FOR_ITER" and not jumps:
            return (*stack[:-1], instruction.offset, None)
        if instruction.opname == "SWAP":
            swapped, n = list(stack), instruction.argval
            swapped[-1], swapped[-n] = swapped[-n], swapped[-1]
            return tuple(swapped)
        depth = len(stack) + self._effect(k, jumps)
        return stack[:depth] + (None,) * (depth - len(stack))

    def _effect(self, k: int, jumps: bool) -> int:
        instruction = self._all[k]
        has_argument = instruction.opcode >= dis.HAVE_ARGUMENT
        argument = instruction.arg if has_argument else None
        return dis.stack_effect(instruction.opcode, argument, jump=jumps)

    def _after(self, k: int) -> Iterator[tuple[int, bool]]:
        """Yield the instructions that may follow one, each with whether it is jumped to."""
        instruction = self._all[k]
        if instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs:
            yield self._at[instruction.argval], True
        if instruction.opname not in (*_JUMPS, *_ENDS):
            yield k + 1, False

    def _continuation(self, k: int) -> tuple[int, ...]:
        """Find where a function goes on after a test: where true, and where false.

        If it goes on with the truth value, or the tested value, on its stack, that is at
        the test alone.
        """
        jump = k
        if self._all[k].opname in ("TO_BOOL", "COMPARE_OP"):
            jump = self._skip(k + 1)
        name = self._all[jump].opname
        if name == "FOR_ITER":
            return self._skip(k + 1), self._skip(self._at[self._all[k].argval])
        if not name.startswith("POP_JUMP") or "NONE" in name:
            return (k,)
        target = self._skip(self._at[self._all[jump].argval])
        following = self._skip(jump + 1)
        return (target, following) if "IF_TRUE" in name else (following, target)

    def _skip(self, k: int) -> int:
        """Find the first instruction from number `k` on that does something."""
        passed = set()
        while k not in passed:
            passed.add(k)
            if self._all[k].opname in _JUMPS:
                k = self._at[self._all[k].argval]
            elif self._all[k].opname in _SKIPPED:
                k += 1
        return k

    def _comes_back(
        self, k: int, continuation: tuple[int, ...], tests: dict[int, tuple[int, ...]]
    ) -> bool:
        same = {n for n, other in tests.items() if other == continuation}
        passed: set[int] = set()
        waiting = [n for n, _ in self._after(k)]
        while waiting:
            n = waiting.pop()
            if n in same:
                return True
            if n not in passed and n < len(self._all):
                passed.add(n)
                waiting += [following for following, _ in self._after(n)]
        return False


@functools.lru_cache(BYTECODE_CACHE_SIZE)
def global_names(code: CodeType) -> tuple[str, ...]:
    """Collect the global variables that a function, or one inside it, loads or stores."""
    return _arguments(code, "LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL",
                      "LOAD_FROM_DICT_OR_GLOBALS")  # fmt: skip


@functools.lru_cache(BYTECODE_CACHE_SIZE)
def imported_names(code: CodeType) -> tuple[str, ...]:
    """Collect the modules that a function, or one inside it, imports."""
    return _arguments(code, "IMPORT_NAME")


@functools.lru_cache(BYTECODE_CACHE_SIZE)
def attribute_names(code: CodeType) -> frozenset[str]:
    """Collect the names by which a function may ask for an attribute of a module."""
    strings = (x for x in code.co_consts if isinstance(x, str) and x.isidentifier())
    inner = (attribute_names(x) for x in code.co_consts if isinstance(x, CodeType))
    return frozenset(code.co_names).union(strings, *inner)


@functools.lru_cache(BYTECODE_CACHE_SIZE)
def tells_numbers_from_arrays(code: CodeType) -> bool:
    """Tell whether a function may act on an array unlike on an equal number.

    It asks for the type of an object, or which of two objects it is.
    """
    instructions = list(dis.get_instructions(code))
    return (
        not attribute_names(code).isdisjoint(_TYPE_QUESTIONS)
        or any(x.opname == "MATCH_CLASS" for x in instructions)
        or any(
            x.opname == "IS_OP" and (before.opname, before.argval) != ("LOAD_CONST", None)
            for before, x in itertools.pairwise(instructions)
        )
        or any(
            tells_numbers_from_arrays(x) for x in code.co_consts if isinstance(x, CodeType)
        )
    )


def _accesses(instruction: dis.Instruction) -> tuple[set[str], set[str]] | None:
    """Find the local variables that an instruction reads, and those that it assigns to.

    Returns:
        None for an instruction that is not known.
    """
    name, variables = instruction.opname, instruction.argval
    if "FAST" not in name:
        return set(), set()
    match name:
        case "LOAD_FAST" | "LOAD_FAST_CHECK" | "LOAD_FAST_AND_CLEAR" | "DELETE_FAST":
            return {variables}, set()
        case "STORE_FAST":
            return set(), {variables}
        case "LOAD_FAST_LOAD_FAST":  # this and the next two are of Python 3.13
            return set(variables), set()
        case "STORE_FAST_STORE_FAST":
            return set(), set(variables)
        case "STORE_FAST_LOAD_FAST":
            stored, loaded = variables
            return {loaded} - {stored}, {stored}
    return None


def _arguments(code: CodeType, *names: str) -> tuple[str, ...]:
    found = {x.argval for x in dis.get_instructions(code) if x.opname in names}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found.update(_arguments(inner, *names))
    return tuple(sorted(found))
