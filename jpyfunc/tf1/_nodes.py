"""Nodes of a graph: operations, and the tensors that they compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jpyfunc._errors import see
from jpyfunc._wrapped import PyFunc
from jpyfunc.tf1._apply import Args, Compute, Indices, Kwargs, Spec, apply_py_func
from jpyfunc.tf1._defaults import session_for
from jpyfunc.tf1._operators import Operators
from jpyfunc.tf1._values import TensorShape, fits, parse_shape


class Tensor(Operators):
    """A result of an operation of a graph, whose value a session computes.

    It has Python's operators, including `@`, `abs` and indexing, and can be passed to
    lifted functions, to those of `tf.numpy`, and to every function wrapped by `py_func`
    and `numpy_func`.

    Attributes:
        op: the operation that computes it.
        dtype: NumPy dtype; None if it is unknown before a run.
        shape: tuple of int, in which None stands for an unknown size; None if nothing is
            known of the shape before a run.
        level: 0, except for the hidden pullbacks of an operation, whose values a
            session cannot return.
    """

    __slots__ = ("__weakref__", "dtype", "index", "level", "op", "shape")

    def __init__(self, op: Operation, index: int, spec: Spec, level: int = 0) -> None:
        self.op = op
        self.index = index
        self.dtype, shape = spec
        self.shape = None if shape is None else TensorShape(shape)
        self.level = level

    @property
    def name(self) -> str:
        """The name of the operation, a colon, and the index of this result."""
        return f"{self.op.name}:{self.index}"

    @property
    def graph(self) -> Any:
        """The graph that it belongs to."""
        return self.op.graph

    def get_shape(self) -> TensorShape | None:
        """Return `shape`: a tuple with `as_list()` and `ndims`, or None if it is unknown.

        Example:
            >>> import jpyfunc.tf1 as tf
            >>> x = tf.placeholder(tf.float32, [None, 3])
            >>> print(x.get_shape().as_list())
            [None, 3]
        """
        return self.shape

    def set_shape(self, shape: Sequence[int | None] | None) -> None:
        """Declare the shape, or some of its sizes, in addition to what is known.

        This is how a program declares the shape of a result of `tf.py_func`. The shapes of
        nodes that exist already do not change. Every run checks the shape.

        Args:
            shape: a list of sizes, with None for unknown ones; None declares nothing.

        Raises:
            TypeError: `shape` is not a list of sizes.
            ValueError: `shape` contradicts what is known.

        Example:
            >>> import jpyfunc.tf1 as tf
            >>> y = tf.py_func(lambda x: x[::-1].copy(), [tf.constant([1, 2])], tf.int32)
            >>> y.set_shape([2])
            >>> with tf.Session() as sess:
            ...     print(sess.run(y))
            [2 1]
        """
        where = f"set_shape of {self.name!r}"
        sizes = parse_shape(shape, where)
        if not fits(sizes, self.shape):
            raise ValueError(
                f"{where}: expected a shape that agrees with {self.shape}, got {sizes}."
                + see("A value that does not fit a tensor")
            )
        if sizes is not None:
            known = self.shape or (None,) * len(sizes)
            self.shape = TensorShape(
                a if b is None else b for a, b in zip(sizes, known, strict=True)
            )

    def add_py_func(self, func: PyFunc[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """Add a node of `func(*args, **kwargs)` to the graph of this tensor."""
        return apply_py_func(func, args, kwargs)

    def eval(self, feed_dict: dict[Any, Any] | None = None, session: Any = None) -> Any:
        """Compute its value in a session.

        Args:
            feed_dict: as for `Session.run`.
            session: the session; by default the default one.

        Returns:
            The value, a NumPy array or scalar.

        Raises:
            ValueError: there is no session.

        Example:
            >>> import jpyfunc.tf1 as tf
            >>> with tf.Session():
            ...     print(tf.constant([1, 2]).eval())
            [1 2]
        """
        return session_for(session, f"{self.name!r}.eval").run(self, feed_dict)

    def __repr__(self) -> str:
        shape = "unknown" if self.shape is None else self.shape
        dtype = "unknown" if self.dtype is None else self.dtype
        return f"<Tensor {self.name!r} shape={shape} dtype={dtype}>"


class Operation:
    """A node of a graph.

    Attributes:
        graph: the graph that it belongs to.
        name: its name, unique in the graph.
        inputs: the tensors that it takes.
        outputs: the tensors that it computes.
        id: larger than the ids of all operations that it depends on.
        compute: the function from the values of the inputs to those of the outputs; None
            for a placeholder.
        differentiable: whether `gradients` differentiates it.
        pullbacks: hidden results, see `_pullback`.
        applies: for a node that applies a pullback, which cotangents it computes and from
            which: indices of inputs and of results of the operation that is differentiated.
            Otherwise None.
    """

    __slots__ = (
        "__weakref__", "applies", "compute", "differentiable", "graph", "id", "inputs",
        "name", "outputs", "pullbacks",
    )  # fmt: skip

    def __init__(
        self,
        graph: Any,  # a Graph, which is made of these
        number: int,
        name: str,
        inputs: Sequence[Tensor],
        compute: Compute | None,
        specs: Sequence[Spec],
        differentiable: bool,
        applies: tuple[Indices, Indices] | None,
    ) -> None:
        self.graph = graph
        self.name = name
        self.inputs = tuple(inputs)
        self.outputs = tuple(Tensor(self, i, spec) for i, spec in enumerate(specs))
        self.id = number
        self.compute = compute
        self.differentiable = differentiable
        self.pullbacks: list[Tensor] = []
        self.applies = applies

    @property
    def results(self) -> list[Tensor]:
        """The outputs, followed by the hidden pullbacks."""
        return [*self.outputs, *self.pullbacks]

    def pullback(self, level: int) -> Tensor:
        """Return the hidden result that pulls back cotangents of all lower levels."""
        while len(self.pullbacks) < level:
            index = len(self.outputs) + len(self.pullbacks)
            spec = (None, None)
            self.pullbacks.append(Tensor(self, index, spec, len(self.pullbacks) + 1))
        return self.pullbacks[level - 1]

    def run(self, feed_dict: dict[Any, Any] | None = None, session: Any = None) -> None:
        """Run it in a session, for its side effects.

        Args:
            feed_dict: as for `Session.run`.
            session: the session; by default the default one.

        Raises:
            ValueError: there is no session.

        Example:
            >>> import jpyfunc.tf1 as tf
            >>> show = tf.py_func(lambda x: print(x), [tf.constant(3)], Tout=[])
            >>> with tf.Session():
            ...     show.run()
            3
        """
        session_for(session, f"{self.name!r}.run").run(self, feed_dict)

    def __repr__(self) -> str:
        return f"<Operation {self.name!r}>"
