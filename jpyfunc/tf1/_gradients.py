"""`gradients`: add nodes that pull cotangents back through a graph."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpyfunc._errors import see
from jpyfunc.tf1._apply import Indices, common_graph
from jpyfunc.tf1._graph import Graph
from jpyfunc.tf1._nodes import Operation, Tensor
from jpyfunc.tf1._values import convert, fits


def gradients(
    ys: Any,
    xs: Any,
    grad_ys: Any = None,
    name: str | None = None,
    stop_gradients: Any = None,
    unconnected_gradients: str = "none",
) -> list[Tensor | None]:
    """Differentiate the sum of `ys` with respect to each of `xs`.

    Gradients are nodes like others and can be differentiated again. Gradients with respect
    to complex tensors follow the convention of `jax.grad`.

    Args:
        ys: tensor or list of tensors, the sum of whose elements is differentiated.
        xs: tensor or list of tensors; they may be results of any operations of the graph.
        grad_ys: cotangents, one per tensor in `ys`: a tensor or an array of its shape, or
            None for ones.
        name: name scope of the new nodes; by default `gradients`.
        stop_gradients: tensor or list of tensors to hold constant.
        unconnected_gradients: what to return for a tensor that no tensor in `ys`
            depends on: `"none"` for None, `"zero"` for zeros.

    Returns:
        A list with one tensor per tensor in `xs`, of its shape and dtype.

    Raises:
        TypeError: not a tensor; a complex tensor in `ys` without `grad_ys`.
        ValueError: tensors belong to two graphs; `grad_ys` or `unconnected_gradients`
            does not fit.

    Example:
        >>> import jpyfunc.tf1 as tf
        >>> x = tf.placeholder(tf.float32)
        >>> cube = x**3
        >>> (slope,) = tf.gradients(cube, x)
        >>> (bend,) = tf.gradients(slope, x)
        >>> with tf.Session() as sess:
        ...     print(*sess.run([slope, bend], {x: 2.0}))
        12.0 12.0

    Source: `tf.gradients` of TensorFlow 1.
    """
    if unconnected_gradients not in ("none", "zero"):
        raise ValueError(
            "gradients: expected unconnected_gradients to be 'none' or 'zero', got "
            f"{unconnected_gradients!r}." + see("An invalid argument")
        )
    ys, xs = _tensors(ys, "ys"), _tensors(xs, "xs")
    stops = [] if stop_gradients is None else _tensors(stop_gradients, "stop_gradients")
    seeds = _seeds(grad_ys, len(ys))
    if not (ys and xs):
        return [None] * len(xs)
    graph = common_graph([*ys, *xs, *stops, *(s for s in seeds if isinstance(s, Tensor))])
    with graph.name_scope(name or "gradients"):
        found = _sweep(graph, ys, seeds, xs, set(stops))
        if unconnected_gradients == "none":
            return found
        zeros = functools.partial(_like, graph, "zeros_like", func=jnp.zeros_like)
        return [zeros(x) if c is None else c for x, c in zip(xs, found, strict=True)]


def _sweep(
    graph: Graph,
    ys: Sequence[Tensor],
    seeds: Sequence[Any],
    xs: Sequence[Tensor],
    stops: set[Tensor],
) -> list[Tensor | None]:
    """Add the nodes that pull the cotangents `seeds` of `ys` back to `xs`."""
    sweep = _GraphSweep(graph, ys, xs, stops)
    for y, seed in zip(ys, seeds, strict=True):
        if y in sweep.reached:
            sweep.add(y, _seed(graph, y, seed))
    sweep.run()
    return [sweep.total(x) for x in xs]


class _GraphSweep:
    """A reverse sweep through a graph, from `ys` to `xs`.

    Forwards, it finds the path: the operations that lead from `xs` to `ys`, with their
    results. Backwards, it adds for each operation `y = f(x)` on the path a node that
    applies the pullback of `f` to the cotangents of its results,

        x* = P(y*),

    and adds the terms where a tensor is used several times. In a gradient of a gradient,
    the nodes that apply pullbacks are operations of the path themselves. They take the
    pullback `P1` of an `f` as an input, so cotangents of hidden results arise, too. The
    pullback of `f` that takes these is one level higher: see `_pullback`.
    """

    def __init__(
        self, graph: Graph, ys: Sequence[Tensor], xs: Sequence[Tensor], stops: set[Tensor]
    ) -> None:
        self._graph = graph
        self._stops = stops
        self._cotangents: dict[Tensor, list[Tensor]] = {}
        self.reached = {x for x in xs if _is_differentiable(x)}
        # Operations are created after those that they depend on, so ids order them.
        first = min(x.op.id for x in xs)
        # Results as of now: the sweep itself adds hidden results to these operations.
        self._path: list[tuple[Operation, list[Tensor]]] = []
        for op in sorted(_ancestors(ys, first), key=lambda op: op.id):
            if op.differentiable and not self.reached.isdisjoint(op.inputs):
                self._path.append((op, op.results))
                self.reached.update(
                    t for t in op.results if t not in stops and _is_differentiable(t)
                )

    def add(self, tensor: Tensor, cotangent: Tensor) -> None:
        """Add to the cotangent of `tensor`."""
        self._cotangents.setdefault(tensor, []).append(cotangent)

    def total(self, tensor: Tensor) -> Tensor | None:
        """Return the cotangent of `tensor`; None if it has none."""
        return self._sum(tensor) if tensor in self._cotangents else None

    def _sum(self, tensor: Tensor) -> Tensor:
        terms = self._cotangents[tensor]
        if len(terms) > 1:
            spec = (tensor.dtype, tensor.shape)
            op = self._graph.create_operation("add_n", terms, _add_n, [spec])
            self._cotangents[tensor] = terms = [op.outputs[0]]
        return terms[0]

    def run(self) -> None:
        """Pull all cotangents back to `xs`."""
        for op, results in reversed(self._path):
            of = [
                i
                for i, t in enumerate(results)
                if t in self._cotangents and t not in self._stops
            ]
            wrt = [i for i, t in enumerate(op.inputs) if t in self.reached]
            if of:
                self._apply_pullback(op, results, tuple(of), tuple(wrt))

    def _apply_pullback(
        self,
        op: Operation,
        results: list[Tensor],
        of: Indices,
        wrt: Indices,
    ) -> None:
        # It must cover all results that have a cotangent, hidden ones included.
        pullback = op.pullback(1 + max(results[i].level for i in of))
        wanted = [op.inputs[i] for i in wrt]
        node = self._graph.create_operation(
            f"{op.name}_grad",
            [pullback, *(self._sum(results[i]) for i in of)],
            lambda values: values[0].apply(of, values[1:], wrt),
            [(t.dtype, t.shape) for t in wanted],
            applies=(wrt, of),
        )
        for t, cotangent in zip(wanted, node.outputs, strict=True):
            self.add(t, cotangent)


def _ancestors(tensors: Sequence[Tensor], first: int) -> set[Operation]:
    """Find the operations with an id of at least `first` that `tensors` depend on."""
    stack = [t.op for t in tensors]
    found: set[Operation] = set()
    while stack:
        op = stack.pop()
        if op.id >= first and op not in found:
            found.add(op)
            stack.extend(t.op for t in op.inputs)
    return found


def _is_differentiable(tensor: Tensor) -> bool:
    return tensor.dtype is None or jnp.issubdtype(tensor.dtype, jnp.inexact)


def _seeds(grad_ys: Any, count: int) -> list[Any]:
    seeds = [None] * count if grad_ys is None else _list(grad_ys)
    if len(seeds) != count:
        raise ValueError(
            f"gradients: expected one of grad_ys for each of ys, {count} in total, got "
            f"{len(seeds)}; write None for ones." + see("An invalid argument")
        )
    return seeds


def _seed(graph: Graph, y: Tensor, seed: Any) -> Tensor:
    """Return the cotangent of `y`: the given one, or ones."""
    if seed is None:
        if y.dtype is not None and jnp.issubdtype(y.dtype, jnp.complexfloating):
            raise TypeError(
                f"gradients: {y!r} is complex, so the cotangent does not default to ones; "
                "give grad_ys." + see("An invalid argument")
            )
        return _like(graph, "ones_like", y, jnp.ones_like)
    where = f"gradients: grad_ys of {y.name!r}"
    if not isinstance(seed, Tensor):
        seed = convert(seed, y.dtype, y.shape, lambda: where)

    def check(shape: Any, expected: Any) -> None:
        if not fits(shape, expected):
            raise ValueError(
                f"{where}: expected shape {expected}, got {shape}."
                + see("A value that does not fit a tensor")
            )

    def compute(values: Sequence[Any]) -> list[Any]:
        value, given = values if len(values) > 1 else (values[0], jnp.asarray(seed))
        check(given.shape, value.shape)
        return [given.astype(value.dtype)]

    check(seed.shape, y.shape)
    inputs = [y, seed] if isinstance(seed, Tensor) else [y]
    op = graph.create_operation("grad_ys", inputs, compute, [(y.dtype, y.shape)])
    return op.outputs[0]


def _like(graph: Graph, name: str, tensor: Tensor, func: Any) -> Tensor:
    """Add a node with the shape and dtype of `tensor` and without a derivative."""
    spec = (tensor.dtype, tensor.shape)
    return graph.create_operation(
        name, [tensor], lambda values: [func(values[0])], [spec], differentiable=False
    ).outputs[0]


def _add_n(values: Sequence[Any]) -> list[Any]:
    """Add cotangents: arrays, or lists of arrays if they are cotangents of a pullback."""
    add = functools.partial(jax.tree.map, operator.add)
    return [functools.reduce(add, values)]


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _tensors(value: Any, argument: str) -> list[Tensor]:
    tensors = _list(value)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"gradients: expected {argument} to be a graph tensor or a list of them, "
                f"got {tensor!r}; for a function of arrays, write jax.grad."
                + see("An invalid argument")
            )
    return tensors
