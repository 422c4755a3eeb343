"""Graphs: their operations and names, and the default graph."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jpyfunc._errors import see
from jpyfunc._wrapped import PyFunc
from jpyfunc.tf1._apply import Args, Compute, Indices, Kwargs, Spec, apply_py_func
from jpyfunc.tf1._defaults import begin_block, end_block, open_blocks
from jpyfunc.tf1._nodes import Operation, Tensor

_NAME = re.compile(r"[A-Za-z0-9.][A-Za-z0-9_./-]*")


class Graph:
    """A graph of operations, which is built in `with graph.as_default():`.

    Only one thread at a time may build it, but several may run it.

    Example:
        >>> import jpyfunc.tf1 as tf
        >>> graph = tf.Graph()
        >>> with graph.as_default():
        ...     y = tf.constant(2.0, name="x") + 1
        >>> print([op.name for op in graph.get_operations()])
        ['x', 'add']
        >>> print(tf.Session(graph).run(y))
        3.0

    Source: `tf.Graph`.
    """

    def __init__(self) -> None:
        self._operations: list[Operation] = []
        self._by_name: dict[str, Operation] = {}
        self._names_used: dict[str, int] = {}
        self._scope = ""

    @contextlib.contextmanager
    def as_default(self) -> Iterator[Graph]:
        """Make this the default graph, which new nodes are added to, in a `with` block."""
        begin_block(self)
        try:
            yield self
        finally:
            end_block(self)

    def add_py_func(self, func: PyFunc[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """Add a node of `func(*args, **kwargs)`, a call without tensors."""
        return apply_py_func(func, args, kwargs, self)

    def get_operations(self) -> list[Operation]:
        """List all operations, in the order of their creation."""
        return list(self._operations)

    def get_tensor_by_name(self, name: str) -> Tensor:
        """Find a tensor by its name, such as `"Placeholder:0"`.

        Raises:
            ValueError: `name` does not have that form.
            KeyError: there is no such tensor.
        """
        op_name, colon, index = name.rpartition(":")
        if not colon or not index.isdecimal():
            raise ValueError(
                f"expected a tensor's name such as 'add:0', got {name!r}; write "
                f"{name + ':0'!r} for the first result of an operation."
                + see("A name that is not in the graph")
            )
        outputs = self.get_operation_by_name(op_name).outputs
        if int(index) >= len(outputs):
            raise KeyError(
                f"{name!r}: operation {op_name!r} has {len(outputs)} results, numbered "
                "from 0."
            )
        return outputs[int(index)]

    def get_operation_by_name(self, name: str) -> Operation:
        """Find an operation by its name.

        Raises:
            KeyError: there is no such operation.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise KeyError(
                f"{name!r}: {self!r} has no operation of that name; get_operations() "
                "lists all operations."
            ) from None

    @contextlib.contextmanager
    def name_scope(self, name: str) -> Iterator[str]:
        """Prefix the names of new operations with `name` and a slash.

        Yields:
            The full name of the scope, made unique, with the slash.
        """
        outer = self._scope
        self._scope = f"{self.unique_name(name)}/"
        try:
            yield self._scope
        finally:
            self._scope = outer

    def unique_name(self, name: str) -> str:
        """Reserve `name` in the current scope, with a number if it is in use already.

        Raises:
            ValueError: `name` is not valid.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"expected a name of letters, digits and any of . _ - / that starts with "
                f"a letter, a digit or a dot, got {name!r}." + see("An invalid argument")
            )
        name = self._scope + name
        number = self._names_used.get(name, 0)
        unique = name
        while unique in self._names_used:
            number += 1
            unique = f"{name}_{number}"
        self._names_used[name] = number
        self._names_used.setdefault(unique, 0)
        return unique

    def create_operation(
        self,
        name: str,
        inputs: Sequence[Tensor],
        compute: Compute | None,
        specs: Sequence[Spec],
        *,
        unique: bool = False,
        differentiable: bool = True,
        applies: tuple[Indices, Indices] | None = None,
    ) -> Operation:
        """Add an operation.

        Args:
            name: its name.
            inputs: tensors of this graph.
            compute: what it computes; None for a placeholder.
            specs: dtype and shape of each result.
            unique: whether `name` was returned by `unique_name`.
            differentiable: whether `gradients` differentiates it.
            applies: how it applies a pullback, see `Operation`.
        """
        name = name if unique else self.unique_name(name)
        number = len(self._operations)
        op = Operation(self, number, name, inputs, compute, specs, differentiable, applies)
        self._operations.append(op)
        self._by_name[name] = op
        return op

    def __repr__(self) -> str:
        return f"<Graph at {id(self):#x}>"


_global_graph = Graph()


def get_default_graph() -> Graph:
    """Return the graph that new nodes are added to.

    Example:
        >>> import jpyfunc.tf1 as tf
        >>> with tf.Graph().as_default() as graph:
        ...     print(tf.get_default_graph() is graph)
        True

    Source: `tf.get_default_graph` of TensorFlow 1.
    """
    blocks = open_blocks()
    return blocks[-1].graph if blocks else _global_graph


def reset_default_graph() -> None:
    """Replace the default graph with an empty one, for example in a notebook.

    Raises:
        RuntimeError: called inside the `with` block of a graph or a session, or while an
            InteractiveSession is open.

    Example:
        >>> import jpyfunc.tf1 as tf
        >>> tf.reset_default_graph()
        >>> print(tf.get_default_graph().get_operations())
        []

    Source: `tf.reset_default_graph` of TensorFlow 1.
    """
    global _global_graph
    if open_blocks():
        raise RuntimeError(
            "reset_default_graph: the default graph was set by `with "
            "graph.as_default():`, a session's `with` or an InteractiveSession. "
            "Leave the block or close the session first."
            + see("A session that is closed or missing")
        )
    _global_graph = Graph()


def name_scope(name: str) -> contextlib.AbstractContextManager[str]:
    """Prefix the names of new operations of the default graph with `name` and a slash.

    Args:
        name: name of the scope, which is made unique in the graph.

    Returns:
        A context manager whose value is the full name of the scope.

    Raises:
        ValueError: `name` is not valid.

    Example:
        >>> import jpyfunc.tf1 as tf
        >>> with tf.Graph().as_default(), tf.name_scope("layer"):
        ...     print(tf.constant(1.0, name="bias").name)
        layer/bias:0

    Source: `tf.name_scope` of TensorFlow 1.
    """
    return get_default_graph().name_scope(name)
