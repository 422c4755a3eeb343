"""`Session`: a compiled program of the graph for each set of fetches and feeds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from jpyfunc._errors import see
from jpyfunc.tf1._defaults import begin_block, begin_interactive, end_block, end_interactive
from jpyfunc.tf1._execute import Plan, execute, wait
from jpyfunc.tf1._graph import Graph, get_default_graph
from jpyfunc.tf1._lower import lower
from jpyfunc.tf1._nodes import Operation, Tensor
from jpyfunc.tf1._values import to_numpy

# What a compiled program is for: the items that it computes, and the tensors that are fed.
Nodes = tuple[tuple[Tensor | Operation, ...], tuple[Tensor, ...]]


class Session:
    """A session, which computes tensors of a graph from the values of others.

    The part of the graph that a run needs is lowered to one function, which is compiled
    by `jax.jit` and cached in the session: another run with the same fetches, feeds and
    shapes neither traces nor compiles.

    There are no variables, control dependencies or summaries: state is left to JAX, and a
    training loop feeds its parameters to every run. Side effects are those of a stateful
    `py_func`. A run that needs one calls it exactly once, for its value and all of its
    derivatives together; a run that does not need it does not call it.

    A session may run on several threads at once. Used as a context manager, it makes
    itself and its graph the default ones, and is closed at the end.

    Args:
        graph: the graph to run; by default the default graph.

    Example:
        >>> import jpyfunc.tf1 as tf
        >>> x = tf.placeholder(tf.float32, name="x")
        >>> y = tf.square(x)
        >>> with tf.Session() as sess:
        ...     print(sess.run([y, "x:0"], feed_dict={x: 3.0}))
        [np.float32(9.0), np.float32(3.0)]

    Source: `tf.Session` of TensorFlow 1.
    """

    def __init__(self, graph: Graph | None = None) -> None:
        if graph is not None and not isinstance(graph, Graph):
            raise TypeError(
                f"Session: expected graph to be a tf.Graph, got {graph!r}."
                + see("An invalid argument")
            )
        self._graph = get_default_graph() if graph is None else graph
        self._plans: dict[tuple[Hashable, ...], Plan] = {}
        self._programs: dict[Nodes, Callable[..., list[Any]]] = {}
        self._lock = threading.Lock()
        self._closed = False

    @property
    def graph(self) -> Graph:
        """The graph that this session runs."""
        return self._graph

    def run(self, fetches: Any, feed_dict: dict[Any, Any] | None = None) -> Any:
        """Compute `fetches`, and nothing that they do not need.

        Args:
            fetches: a tensor, an operation, the name of one, or any nesting of lists,
                tuples, dicts and namedtuples of these.
            feed_dict: a dict from tensors, or their names, to values. Besides placeholders,
                any tensor can be fed, which is then not computed. Values are arrays, Python
                scalars or lists of these; they are converted to the dtype of the tensor as
                far as NumPy's `same_kind` rule allows.

        Returns:
            The values in the structure of `fetches`: a NumPy array or scalar for a
            tensor, None for an operation.

        Raises:
            ValueError: a placeholder is needed but not fed; a value has another shape; a
                tensor belongs to another graph; a name is unknown.
            TypeError: the dtype of a value does not convert; a fetch is neither a tensor
                nor an operation; a feed is not a tensor.
            RuntimeError: the session is closed.
            BaseException: the original exception of the body of a `py_func`, with a note
                that names the operation.
        """
        feeds = {} if feed_dict is None else feed_dict
        if not isinstance(feeds, dict):
            raise TypeError(
                f"run: expected feed_dict to be a dict, {{tensor: value}}, got {feeds!r}."
                + see("An invalid argument")
            )
        leaves, tree = jax.tree.flatten(fetches)
        # Tensors and names hash by identity and value, so this finds the plan of an equal
        # run. None separates fetches from feeds.
        key = (tree, *leaves, None, *feeds)
        try:
            plan = self._plans.get(key)
        except TypeError:  # a fetch that is not hashable, which `_make_plan` refuses
            plan = None
        if plan is None or self._closed:
            plan = self._make_plan(key, fetches, list(feeds))
        return execute(plan, feeds.values())

    def make_callable(
        self, fetches: Any, feed_list: Sequence[Any] | None = None
    ) -> Callable[..., Any]:
        """Return a function that runs `fetches`, given the values of `feed_list`.

        Args:
            fetches: as for `run`.
            feed_list: tensors to feed, or their names.

        Returns:
            A function of one positional argument per entry of `feed_list`, which
            returns what `run` would.

        Raises:
            ValueError: as for `run`, where it does not depend on the values.
            TypeError: as for `run`, where it does not depend on the values.
            RuntimeError: the session is closed.

        Example:
            >>> import jpyfunc.tf1 as tf
            >>> x = tf.placeholder(tf.float32)
            >>> with tf.Session() as sess:
            ...     square = sess.make_callable(x * x, [x])
            ...     print(square(3.0))
            9.0
        """
        names = list(feed_list or ())
        leaves, tree = jax.tree.flatten(fetches)
        plan = self._make_plan((tree, *leaves, None, *names), fetches, names)

        def run(*values: Any) -> Any:
            if len(values) != len(names):
                raise TypeError(
                    f"expected {len(names)} values, one per entry of feed_list, got "
                    f"{len(values)}." + see("An invalid argument")
                )
            self._check_open()
            return execute(plan, values)

        return run

    def close(self) -> None:
        """Drop the compiled programs; running the session then raises RuntimeError."""
        with self._lock:
            self._closed = True
            self._plans.clear()
            self._programs.clear()

    def __enter__(self) -> Session:
        self._check_open()
        begin_block(self._graph, self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        end_block(self._graph, self)
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(
                "This session is closed, by close() or at the end of its `with`. Make a "
                "new one: tf.Session()." + see("A session that is closed or missing")
            )

    def _make_plan(self, key: tuple[Hashable, ...], fetches: Any, feeds: list[Any]) -> Plan:
        self._check_open()
        leaves, tree = jax.tree.flatten(fetches, is_leaf=lambda x: x is None)
        items = [self._element(leaf, "fetch", (Tensor, Operation)) for leaf in leaves]
        fed = tuple(self._element(feed, "feed_dict key", (Tensor,)) for feed in feeds)
        if len(set(fed)) < len(fed):
            raise ValueError(
                f"feeds {[t.name for t in fed]}: expected each tensor once; feed it either "
                "by itself or by its name." + see("An invalid argument")
            )
        # Sorted, so that a run with the same nodes in another order does not trace again.
        order = tuple(sorted(range(len(fed)), key=lambda i: _position(fed[i])))
        wanted = tuple(sorted(set(items), key=_position))
        nodes = (wanted, tuple(fed[i] for i in order))
        with self._lock:
            self._check_open()
            program = self._programs.get(nodes)
            if program is None:
                program = self._programs[nodes] = jax.jit(lower(*nodes))
            place = {item: i for i, item in enumerate(wanted)}
            outputs = tuple(
                (place[x], to_numpy if isinstance(x, Tensor) else wait) for x in items
            )
            plan = self._plans[key] = Plan(program, fed, order, outputs, tree)
        return plan

    def _element(self, item: Any, what: str, kinds: tuple[type, ...]) -> Any:
        """Return the tensor or operation of this graph that `item` is or names."""
        if isinstance(item, str):
            graph = self._graph
            find = graph.get_tensor_by_name if ":" in item else graph.get_operation_by_name
            try:
                item = find(item)
            except KeyError as error:
                raise ValueError(
                    f"{what} {error.args[0]}" + see("A name that is not in the graph")
                ) from None
        if not isinstance(item, kinds):
            expected = " or ".join(f"{kind.__name__.lower()}" for kind in kinds)
            is_array = isinstance(item, jax.Array | np.ndarray)
            hint = " Write tf.constant(array) to make a tensor." if is_array else ""
            raise TypeError(
                f"{what} {item!r}: expected a graph {expected}, or the name of one, got "
                f"{type(item).__name__}.{hint}" + see("An invalid argument")
            )
        if item.graph is not self._graph:
            raise ValueError(
                f"{what} {item.name!r} belongs to {item.graph!r}, but this session runs "
                f"{self._graph!r}; write tf.Session(graph=...) with the other graph."
                + see("Tensors of several graphs")
            )
        return item


class InteractiveSession(Session):
    """A session that is the default one from its creation until it is closed.

    This is for notebooks, where `tensor.eval(...)` in a later cell uses it.

    Args:
        graph: the graph to run; by default the default graph.

    Example:
        >>> import jpyfunc.tf1 as tf
        >>> sess = tf.InteractiveSession()
        >>> print((tf.constant(2) * 3).eval())
        6
        >>> sess.close()

    Source: `tf.InteractiveSession` of TensorFlow 1.
    """

    def __init__(self, graph: Graph | None = None) -> None:
        super().__init__(graph)
        begin_interactive(self._graph, self)

    def __enter__(self) -> InteractiveSession:
        self._check_open()
        return self

    def close(self) -> None:
        """Drop the compiled programs, and stop being the default session."""
        end_interactive(self)
        super().close()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _position(item: Tensor | Operation) -> tuple[int, int]:
    """Return where it stands among the tensors and operations of its graph."""
    return (item.op.id, item.index) if isinstance(item, Tensor) else (item.id, -1)
