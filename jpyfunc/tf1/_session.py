"""`Session`: compiled programs of a graph, one for each set of fetches and feeds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jpyfunc.tf1._defaults import begin_block, begin_interactive, end_block, end_interactive
from jpyfunc.tf1._execute import Plan, execute, wait
from jpyfunc.tf1._graph import Graph, get_default_graph
from jpyfunc.tf1._lower import lower
from jpyfunc.tf1._nodes import Operation, Tensor
from jpyfunc.tf1._values import to_numpy


class Session:
    """A session of a graph: it computes tensors, given the values of others.

    The part of the graph that a run needs is lowered to one function, which is compiled
    by `jax.jit` and cached in the session: a run with the same fetches, feeds and shapes
    of feeds neither traces nor compiles.

    There are no variables, control dependencies or summaries: state is JAX's business,
    and a training loop feeds its parameters to every run. Effects are those of a
    stateful `py_func`, which runs exactly once in a run that needs it, for its value and
    all derivatives together, and not at all in one that does not.

    A session may be run from several threads at once. Used as a context manager, it
    and its graph are the default ones, and leaving closes it.

    Args:
        graph: what to run; by default the default graph.

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
            raise TypeError(f"Session: expected graph to be a tf.Graph, got {graph!r}.")
        self._graph = get_default_graph() if graph is None else graph
        self._plans: dict[Any, Plan] = {}
        self._programs: dict[Any, Callable[..., list[Any]]] = {}
        self._lock = threading.Lock()
        self._closed = False

    @property
    def graph(self) -> Graph:
        """The graph that it runs."""
        return self._graph

    def run(self, fetches: Any, feed_dict: Any = None) -> Any:
        """Compute `fetches`, and nothing that they do not need.

        Args:
            fetches: a tensor, an operation, the name of one, or any nesting of lists,
                tuples, dicts and namedtuples of these.
            feed_dict: a dict from tensors, or their names, to values: of placeholders,
                or of any other tensor, in place of computing it. Values are arrays,
                Python scalars or lists of these; they convert to the tensor's dtype as
                NumPy's `same_kind` rule allows.

        Returns:
            The values in the structure of `fetches`: a NumPy array or scalar for a
            tensor, None for an operation.

        Raises:
            ValueError: a placeholder that is needed and not fed; a value of another
                shape; a tensor of another graph; an unknown name.
            TypeError: a value whose dtype does not convert; a fetch that is neither
                tensor nor operation; a feed that is not a tensor.
            RuntimeError: the session is closed.
            BaseException: what the body of a `py_func` raised, as it raised it, with a
                note that names the operation.
        """
        feeds = {} if feed_dict is None else feed_dict
        if not isinstance(feeds, dict):
            raise TypeError(
                f"run: expected feed_dict to be a dict, {{tensor: value}}, got {feeds!r}."
            )
        leaves, tree = jax.tree.flatten(fetches)
        key = (tree, *leaves, None, *feeds)
        try:
            plan = self._plans.get(key)
        except TypeError:  # a fetch that cannot be hashed: `_make_plan` refuses it
            plan = None
        if plan is None or self._closed:
            plan = self._make_plan(key, fetches, list(feeds))
        return execute(plan, feeds.values())

    def make_callable(
        self, fetches: Any, feed_list: Sequence[Any] | None = None
    ) -> Callable[..., Any]:
        """Return a function of the values of `feed_list` that runs `fetches`.

        Args:
            fetches: as for `run`.
            feed_list: tensors to feed, or their names.

        Returns:
            A function of one positional argument per entry of `feed_list`, which
            returns what `run` would.

        Raises:
            ValueError: as `run`, for what does not depend on the values.
            TypeError: as `run`, for what does not depend on the values.
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
                    f"{len(values)}."
                )
            self._check_open()
            return execute(plan, values)

        return run

    def close(self) -> None:
        """Forget the compiled programs; a run then raises RuntimeError."""
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
                "This session is closed, by close() or on leaving its `with`. Make a new "
                "one: tf.Session()."
            )

    def _make_plan(self, key: Any, fetches: Any, feeds: list[Any]) -> Plan:
        self._check_open()
        leaves, tree = jax.tree.flatten(fetches, is_leaf=lambda x: x is None)
        items = [self._element(leaf, "fetch", (Tensor, Operation)) for leaf in leaves]
        fed = tuple(self._element(feed, "feed_dict key", (Tensor,)) for feed in feeds)
        if len(set(fed)) < len(fed):
            raise ValueError(
                f"feeds {[t.name for t in fed]}: expected each tensor once; feed it either "
                "by itself or by its name."
            )
        # A run with the same nodes in another order must not trace again.
        order = tuple(sorted(range(len(fed)), key=lambda i: _rank(fed[i])))
        wanted = tuple(sorted(set(items), key=_rank))
        nodes = (wanted, tuple(fed[i] for i in order))
        with self._lock:
            self._check_open()
            program = self._programs.get(nodes)
            if program is None:
                program = self._programs[nodes] = jax.jit(lower(*nodes))
            place = {item: i for i, item in enumerate(wanted)}
            reads = tuple(
                (place[x], to_numpy if isinstance(x, Tensor) else wait) for x in items
            )
            plan = self._plans[key] = Plan(program, fed, order, reads, tree)
        return plan

    def _element(self, item: Any, what: str, kinds: tuple[type, ...]) -> Any:
        """Find the tensor or operation of this graph that `item` is or names."""
        if isinstance(item, str):
            graph = self._graph
            find = graph.get_tensor_by_name if ":" in item else graph.get_operation_by_name
            try:
                item = find(item)
            except KeyError as error:
                raise ValueError(f"{what} {error.args[0]}") from None
        if not isinstance(item, kinds):
            expected = " or ".join(f"{kind.__name__.lower()}" for kind in kinds)
            is_array = isinstance(item, jax.Array | np.ndarray)
            hint = " Write tf.constant(array) for a tensor of it." if is_array else ""
            raise TypeError(
                f"{what} {item!r}: expected a graph {expected}, or the name of one, got "
                f"{type(item).__name__}.{hint}"
            )
        if item.graph is not self._graph:
            raise ValueError(
                f"{what} {item.name!r} is of {item.graph!r}, and this session runs "
                f"{self._graph!r}; write tf.Session(graph=...) with the other."
            )
        return item


class InteractiveSession(Session):
    """A session that is the default one from its creation until it is closed.

    In a notebook, `tensor.eval(...)` in a later cell then finds it.

    Args:
        graph: what to run; by default the default graph.

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
        """Forget the compiled programs, and stop being the default session."""
        end_interactive(self)
        super().close()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _rank(item: Tensor | Operation) -> tuple[int, int]:
    return (item.op.id, item.index) if isinstance(item, Tensor) else (item.id, -1)
