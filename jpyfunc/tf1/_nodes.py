"""The nodes of a graph: operations, and the tensors that they compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jpyfunc.tf1._apply import Spec, apply_py_func
from jpyfunc.tf1._defaults import session_for
from jpyfunc.tf1._operators import Operators
from jpyfunc.tf1._values import TensorShape, fits, parse_shape


class Tensor(Operators):
    """A result of an operation of a graph: a value that a session will compute.

    It has Python's operators, `@`, `abs` and indexing, and is taken by `tf.lift`,
    `tf.numpy` and every function wrapped by `py_func` and `numpy_func`.

    Attributes:
        op: the operation that computes it.
        dtype: NumPy dtype, or None if it is not known before a run.
        shape: tuple of int, with None for a size that may be any; or None, for any
            shape or one that is not known before a run.
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
        """The graph it belongs to."""
        return self.op.graph

    def get_shape(self) -> TensorShape | None:
        """Return `shape`, a tuple with `as_list()` and `ndims`; None if it is unknown.

        Example:
            >>> import jpyfunc.tf1 as tf
            >>> x = tf.placeholder(tf.float32, [None, 3])
            >>> print(x.get_shape().as_list())
            [None, 3]
        """
        return self.shape

    def set_shape(self, shape: Any) -> None:
        """Merge what is known of the shape with what is known already.

        A program declares the shape of what `tf.py_func` returns this way. Nodes that
        exist already keep their shapes. A run checks the shape.

        Args:
            shape: a list of sizes, with None for unknown ones; None for no information.

        Raises:
            TypeError: `shape` is no list of sizes.
            ValueError: it contradicts what is known.

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
            )
        if sizes is not None:
            known = self.shape or (None,) * len(sizes)
            self.shape = TensorShape(
                a if b is None else b for a, b in zip(sizes, known, strict=True)
            )

    def add_py_func(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make a node of a wrapped function in the graph."""
        return apply_py_func(func, args, kwargs)

    def eval(self, feed_dict: Any = None, session: Any = None) -> Any:
        """Run it in `session`, by default the default one.

        Args:
            feed_dict: as for `Session.run`.
            session: the session to run it in.

        Returns:
            Its value, a NumPy array or scalar.

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
        graph: the graph it belongs to.
        name: unique in the graph.
        inputs: the tensors that it takes.
        outputs: the tensors that it computes.
        id: larger than that of every operation it depends on.
        compute: the function from the inputs' values to the outputs'; None for a
            placeholder.
        differentiable: whether `gradients` goes through it.
        pullbacks: hidden results, see `_pullback`.
        pull: for a node that applies a pullback, the indices of the inputs whose
            cotangents it takes and of the results whose cotangents it gives; else None.
    """

    __slots__ = (
        "__weakref__", "compute", "differentiable", "graph", "id", "inputs", "name",
        "outputs", "pull", "pullbacks",
    )  # fmt: skip

    def __init__(
        self,
        graph: Any,  # a Graph, which is made of these
        number: int,
        name: str,
        inputs: Sequence[Tensor],
        compute: Callable[[Sequence[Any]], list[Any]] | None,
        specs: Sequence[Spec],
        differentiable: bool,
        pull: tuple[tuple[int, ...], tuple[int, ...]] | None,
    ) -> None:
        self.graph = graph
        self.name = name
        self.inputs = tuple(inputs)
        self.outputs = tuple(Tensor(self, i, spec) for i, spec in enumerate(specs))
        self.id = number
        self.compute = compute
        self.differentiable = differentiable
        self.pullbacks: list[Tensor] = []
        self.pull = pull

    @property
    def results(self) -> list[Tensor]:
        """The outputs and the hidden pullbacks."""
        return [*self.outputs, *self.pullbacks]

    def pullback(self, level: int) -> Tensor:
        """Return the hidden result that is the pullback of all results of lower levels."""
        while len(self.pullbacks) < level:
            index = len(self.outputs) + len(self.pullbacks)
            spec = (None, None)
            self.pullbacks.append(Tensor(self, index, spec, len(self.pullbacks) + 1))
        return self.pullbacks[level - 1]

    def run(self, feed_dict: Any = None, session: Any = None) -> None:
        """Run it in `session`, by default the default one, for its effects.

        Args:
            feed_dict: as for `Session.run`.
            session: the session to run it in.

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
