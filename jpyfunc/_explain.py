"""`explain`: show which paths of a body would be compiled, which call Python, and why."""

from __future__ import annotations

import html
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

from jpyfunc._arguments import Arguments
from jpyfunc._calling import branch_tree
from jpyfunc._errors import see
from jpyfunc._py_func import py_func
from jpyfunc._staging.branch_tree import (
    Back,
    BranchNode,
    BranchTree,
    Fallback,
    LoopHead,
    Return,
)
from jpyfunc._staging.equations import BranchPoint
from jpyfunc._wrapped import PyFunc, callee_of


def explain(func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Show which paths of a function can be compiled, which call Python, and why.

    The result shows what `py_func(func, staged=True)` would do with such arguments: the
    tree of the function's branches, each with its source line and the number of JAX
    operations before it, and the places where the program would call the function itself,
    with the reason. It also shows each loop, with the arrays that it carries, and above the
    tree each loop that would be unrolled, with the reason. If the shapes of the results
    cannot be inferred, it says why. Nothing is compiled, and nothing runs on data.

    Args:
        func: a function, wrapped by `py_func` (staged or not) or not wrapped.
        *args: its arguments; arrays may be `jax.ShapeDtypeStruct`s.
        **kwargs: its keyword arguments.

    Returns:
        The tree. It prints as indented text, and in a notebook as a nested list;
        `as_dict()` gives it as data.

    Raises:
        TypeError: `func` is not a function.

    Example:
        >>> import jax.numpy as jnp, jpyfunc
        >>> def log_huber(x, m):
        ...     if jnp.abs(x) <= m:
        ...         return x**2
        ...     return m**2 * (1 - 2 * jnp.log(m) + jnp.log(x**2))
        >>> explanation = jpyfunc.explain(log_huber, 1.0, 2.0)
        >>> explanation.as_dict()["complete"], explanation.as_dict()["operations"]
        (True, 13)
    """
    if isinstance(func, types.MethodType) and isinstance(func.__func__, PyFunc):
        func, args = func.__func__, (func.__self__, *args)
    if not callable(func):
        raise TypeError(
            f"explain: expected a function, got {type(func).__name__}; write "
            "explain(func, *args)." + see("Not a plain function")
        )
    wrapped = func if isinstance(func, PyFunc) else py_func(func)
    callee = callee_of(wrapped)
    arguments = Arguments.flatten(args, kwargs, callee.label)
    return Explanation(callee.name, branch_tree(callee, arguments))


class Explanation:
    """The tree that `explain` returns."""

    def __init__(self, name: str, tree: BranchTree) -> None:
        self._name = name
        self._tree = tree

    def as_dict(self) -> dict[str, Any]:
        """Return the tree as data.

        Returns:
            `name`; `complete`, whether nothing calls Python; `operations` of JAX in
            total; `runs` on abstract values that it took; `result`, the `Tout` that was
            inferred, or None; `error`, why it was not, or None; `unrolled`, a list of
            the loops that are not compiled as loops, each with `place`, `line` and
            `reason`; and `tree`. Each node of the tree has `operations`, and either
            `place`, `line`, `true` and `false` of the branch that follows, or `returns`
            (True), or `repeats`, the place of the loop whose next iteration follows, or
            `calls`, the reasons for a call of Python. A branch that is the head of a loop
            has `carries`, too: the arrays that the loop carries, by variable.
        """
        tree, result = self._tree, self._tree.result
        is_failure = isinstance(result, Exception)
        return {
            "name": self._name,
            "complete": not is_failure and not tree.root.falls_back,
            "operations": tree.size,
            "runs": tree.runs,
            "result": None if is_failure else str(result),
            "error": str(result) if is_failure else None,
            "unrolled": [
                {"place": place.removeprefix(" at "), "line": line, "reason": reason}
                for (place, line), reason in tree.unrolled.items()
            ],
            "tree": _as_dict(tree.root),
        }

    def _head(self) -> str:
        tree = self._tree
        ends = [node.end for node in tree.root.nodes()]
        paths = sum(isinstance(end, Return | Fallback) for end in ends)
        loops = sum(node.head is not None for node in tree.root.nodes())
        calls = sum(isinstance(end, Fallback) for end in ends)
        text = f"{self._name}: {_count(tree.size, 'operation')}, {_count(paths, 'path')}"
        text += f", {_count(loops, 'loop')}" if loops else ""
        verb = "calls" if calls == 1 else "call"
        text += f", {calls} of which {verb} Python" if calls else ", all compiled"
        return text + (f"\n{tree.result}" if isinstance(tree.result, Exception) else "")

    def __repr__(self) -> str:
        lines = ["  " * depth + text for depth, text in self._lines()]
        return "\n".join([self._head(), *lines])

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Yield the loops that are none, and the tree, as lines of text with depths."""
        for (place, line), reason in self._tree.unrolled.items():
            yield 1, f"not compiled as a loop: {line}  [{_short_place(place)}]"
            yield 2, reason
        yield from _lines(self._tree.root, 1)

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<div style="margin-left: {1.5 * depth}em">{html.escape(text)}</div>'
            for depth, text in self._lines()
        )
        head = html.escape(self._head()).replace("\n", "<br>")
        return f'<div style="font-family: monospace">{head}{rows}</div>'


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _short(text: str) -> str:
    """Shorten the paths of files in `text` to their names."""
    return re.sub(r"( at )\S*[/\\]", r"\1", text)


def _short_place(place: str) -> str:
    """Shorten a place, `FILE:LINE` or that after "at", to the name of the file."""
    return place.removeprefix(" at ").replace("\\", "/").rpartition("/")[2]


def _as_dict(node: BranchNode) -> dict[str, Any]:
    entry: dict[str, Any] = {"operations": node.size}
    if isinstance(node.end, Fallback):
        return entry | {"calls": list(node.end.reasons)}
    if isinstance(node.end, Back):
        return entry | {"repeats": _place(node.end.head)}
    if not isinstance(node.end, BranchPoint):
        return entry | {"returns": True}
    if node.head is not None:
        entry["carries"] = _carries(node.head)
    return entry | {
        "place": _place(node),
        "line": node.end.line,
        "true": _as_dict(node.branches[True]),
        "false": _as_dict(node.branches[False]),
    }


def _place(node: BranchNode) -> str:
    return node.end.place.removeprefix(" at ") if isinstance(node.end, BranchPoint) else ""


def _carries(head: LoopHead) -> dict[str, str]:
    """The variables that a loop changes, with shape and dtype; the test is none."""
    positions = [i for i in head.carried().values() if i > 0]
    return {head.names[i]: head.avals[i].str_short() for i in positions}


def _lines(node: BranchNode, depth: int) -> Iterator[tuple[int, str]]:
    """Yield the tree as lines of text, each with its depth."""
    if node.size:
        yield depth, _count(node.size, "operation")
    if isinstance(node.end, Fallback):
        yield depth, f"calls Python: {_short('; '.join(node.end.reasons))}"
    elif isinstance(node.end, BranchPoint):
        yield depth, f"{node.end.line}  [{_short_place(node.end.place)}]"
        if node.head is not None:
            carried = [f"{name}: {aval}" for name, aval in _carries(node.head).items()]
            yield depth, f"a loop that carries {', '.join(carried)}"
        for answer in (True, False):
            (first, text), *rest = _lines(node.branches[answer], depth + 1)
            yield first, f"{answer}: {text}"
            yield from rest
    elif isinstance(node.end, Back):
        yield depth, f"next iteration  [{_short_place(_place(node.end.head))}]"
    else:
        yield depth, "returns"
