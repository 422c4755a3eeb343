"""Graph tensors and the blocks that build graphs, as wrapped functions see them.

`jpyfunc.tf1` is made of wrapped functions. These call back into it, through what stands
here: a call on a graph tensor, or in a block that builds a graph, becomes a node.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Protocol


class AddsNodes(Protocol):
    """A graph, or a tensor of one."""

    def add_py_func(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any: ...


class GraphTensor:
    """Base class of graph tensors: values that exist only while their graph runs."""

    __slots__ = ()

    def add_py_func(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add a node of `func(*args, **kwargs)` to the graph of this tensor.

        Args:
            func: a wrapped function.
            args: positional arguments, pytrees.
            kwargs: keyword arguments, pytrees.

        Returns:
            What the call returns: tensors, or the operation if there are none.
        """
        raise NotImplementedError


_numbers = itertools.count()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class GraphBlock:
    """A `with` block of a graph or a session.

    Attributes:
        graph: the graph that nodes go to.
        session: the session; None for a block of a graph alone.
        number: larger than that of every block that began earlier.
    """

    graph: Any  # a Graph, whose module imports this one
    session: Any = None
    number: int = dataclasses.field(default_factory=_numbers.__next__)
