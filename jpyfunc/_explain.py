"""`explain`: what of a body would be compiled, what would call Python, and why."""

from __future__ import annotations

import html
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

from jpyfunc._py_func import py_func
from jpyfunc._staging.branch_tree import BranchNode, BranchTree, Calls
from jpyfunc._wrapped import PyFunc


def explain(func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Show what of a function could be compiled, and what would call Python, and why.

    It is what `py_func(func, staged=True)` would do with such arguments: a tree of the
    function's branches, each with the line that it is on and how many operations of JAX
    come before it, and where the function would be called, with the reason. It is also the
    answer to why the shapes of results cannot be inferred. Nothing is compiled, nor run on
    data.

    Args:
        func: a function wrapped by `py_func`, staged or not, or one that would be.
        *args: its arguments; arrays may be `jax.ShapeDtypeStruct`s.
        **kwargs: its keyword arguments.

    Returns:
        The tree. Printed, it is indented text; in a notebook, a nested list; and
        `as_dict()` gives it as data.

    Raises:
        TypeError: `func` is no such function.

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
            "explain(func, *args)."
        )
    wrapped = func if isinstance(func, PyFunc) else py_func(func)
    return Explanation(wrapped.__name__, wrapped.branch_tree(args, kwargs))


class Explanation:
    """What `explain` found."""

    def __init__(self, name: str, tree: BranchTree) -> None:
        self._name = name
        self._tree = tree

    def as_dict(self) -> dict[str, Any]:
        """The tree as data.

        Returns:
            `name`; `complete`, whether nothing calls Python; `operations` of JAX in all;
            `runs` on abstract values that it took; `result`, the `Tout` that was
            inferred, or None; `error`, why it was not, or None; and `tree`. A node of
            that has `operations`, and either `place`, `line`, `true` and `false` of the
            truth test that ends it, or `returns` (True), or `calls`: the reasons.
        """
        tree = self._tree
        return {
            "name": self._name,
            "complete": tree.failure is None and not tree.root.calls,
            "operations": tree.size,
            "runs": tree.runs,
            "result": None if tree.template is None else str(tree.template),
            "error": None if tree.failure is None else str(tree.failure),
            "tree": _as_dict(tree.root),
        }

    def _head(self) -> str:
        tree = self._tree
        nodes = [*tree.root.nodes()]
        returns = sum(node.decision is None for node in nodes)
        calls = sum(isinstance(node.end, Calls) for node in nodes)
        text = f"{self._name}: {_count(tree.size, 'operation')}, {returns} ways to its end"
        text += f", {calls} of them by a call of Python" if calls else ", all compiled"
        return text + (f"\n{tree.failure}" if tree.failure else "")

    def __repr__(self) -> str:
        lines = [self._head()]
        lines += ["  " * depth + text for depth, text in _lines(self._tree.root, 1)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<div style="margin-left: {1.5 * depth}em">{html.escape(text)}</div>'
            for depth, text in _lines(self._tree.root, 1)
        )
        head = html.escape(self._head()).replace("\n", "<br>")
        return f'<div style="font-family: monospace">{head}{rows}</div>'


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _short(text: str) -> str:
    """`text` with the names of files alone for places."""
    return re.sub(r"( at )\S*[/\\]", r"\1", text)


def _as_dict(node: BranchNode) -> dict[str, Any]:
    entry: dict[str, Any] = {"operations": node.size}
    if isinstance(node.end, Calls):
        return entry | {"calls": list(node.end.reasons)}
    if node.decision is None:
        return entry | {"returns": True}
    return entry | {
        "place": node.decision.place.removeprefix(" at "),
        "line": node.decision.line,
        "true": _as_dict(node.sides[True]),
        "false": _as_dict(node.sides[False]),
    }


def _lines(node: BranchNode, depth: int) -> Iterator[tuple[int, str]]:
    """The tree as lines of text, each with how far it is indented."""
    if node.size:
        yield depth, _count(node.size, "operation")
    if isinstance(node.end, Calls):
        yield depth, f"calls Python: {_short('; '.join(node.end.reasons))}"
    elif node.decision is None:
        yield depth, "returns"
    else:
        place = _short(node.decision.place).removeprefix(" at ")
        yield depth, f"{node.decision.line}  [{place}]"
        for answer in (True, False):
            (first, text), *rest = _lines(node.sides[answer], depth + 1)
            yield first, f"{answer}: {text}"
            yield from rest
