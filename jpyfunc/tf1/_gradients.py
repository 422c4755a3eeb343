"""`gradients`: nodes that pull cotangents back through a graph."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpyfunc.tf1._apply import common_graph
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

    The gradients are nodes like others, and can be differentiated again. Gradients with
    respect to complex tensors follow the convention of `jax.grad`.

    Args:
        ys: tensor or list of tensors, whose elements are summed over.
        xs: tensor or list of tensors, of any operations of the graph.
        grad_ys: cotangents, one per tensor of `ys`: tensors or arrays of its shape, or
            None for ones.
        name: scope of the new nodes; by default `gradients`.
        stop_gradients: tensor or list of tensors to hold constant.
        unconnected_gradients: what to return for a tensor that no tensor of `ys`
            depends on: `"none"` for None, `"zero"` for zeros.

    Returns:
        A list with one tensor per tensor of `xs`, of its shape and dtype.

    Raises:
        TypeError: not a tensor; a complex tensor of `ys` without `grad_ys`.
        ValueError: tensors of two graphs; `grad_ys` of another length or shape;
            another value of `unconnected_gradients`.

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
            f"{unconnected_gradients!r}."
        )
    ys, xs = _tensors(ys, "ys"), _tensors(xs, "xs")
    stops = set(
        _tensors([] if stop_gradients is None else stop_gradients, "stop_gradients")
    )
    seeds = [None] * len(ys) if grad_ys is None else _list(grad_ys)
    if len(seeds) != len(ys):
        raise ValueError(
            f"gradients: expected one of grad_ys for each of ys, {len(ys)} in total, got "
            f"{len(seeds)}; write None for ones."
        )
    if not (ys and xs):
        return [None] * len(xs)
    graph = common_graph(
        [*ys, *xs, *stops, *(seed for seed in seeds if isinstance(seed, Tensor))]
    )
    with graph.name_scope(name or "gradients"):
        sweep = _Sweep(graph, ys, xs, stops)
        for y, seed in zip(ys, seeds, strict=True):
            if y in sweep.reached:
                sweep.give(y, _seed(graph, y, seed))
        sweep.run()
        results = [sweep.total(x) for x in xs]
        if unconnected_gradients == "zero":
            for i, x in enumerate(xs):
                if results[i] is None:
                    results[i] = _like(graph, "zeros_like", x, jnp.zeros_like)
        return results


class _Sweep:
    """One reverse sweep from `ys` to `xs`."""

    def __init__(
        self, graph: Any, ys: Sequence[Tensor], xs: Sequence[Tensor], stops: set[Tensor]
    ) -> None:
        self._graph = graph
        self._stops = stops
        self._cotangents: dict[Tensor, list[Tensor]] = {}
        self.reached = {x for x in xs if _is_differentiable(x)}
        # An operation is made after those that it depends on, so ids sort them.
        first = min(x.op.id for x in xs)
        self._path: list[tuple[Operation, list[Tensor]]] = []
        for op in sorted(_ancestors(ys, first), key=lambda op: op.id):
            if op.differentiable and not self.reached.isdisjoint(op.inputs):
                self._path.append((op, op.results))
                self.reached.update(
                    t for t in op.results if t not in stops and _is_differentiable(t)
                )

    def give(self, tensor: Tensor, cotangent: Tensor) -> None:
        """Add to the cotangent of `tensor`."""
        self._cotangents.setdefault(tensor, []).append(cotangent)

    def total(self, tensor: Tensor) -> Tensor | None:
        """Return the cotangent of `tensor`, None if there is none."""
        parts = self._cotangents.get(tensor)
        if parts is None:
            return None
        if len(parts) > 1:
            spec = (tensor.dtype, tensor.shape)
            op = self._graph.create_operation("add_n", parts, _add_n, [spec])
            self._cotangents[tensor] = parts = [op.outputs[0]]
        return parts[0]

    def run(self) -> None:
        """Pull every cotangent back as far as `xs`."""
        for op, results in reversed(self._path):
            of = [
                i
                for i, t in enumerate(results)
                if t in self._cotangents and t not in self._stops
            ]
            wrt = [i for i, t in enumerate(op.inputs) if t in self.reached]
            if of:
                self._pull(op, results, tuple(of), tuple(wrt))

    def _pull(
        self,
        op: Operation,
        results: list[Tensor],
        of: tuple[int, ...],
        wrt: tuple[int, ...],
    ) -> None:
        pullback = op.pullback(1 + max(results[i].level for i in of))
        wanted = [op.inputs[i] for i in wrt]
        node = self._graph.create_operation(
            f"{op.name}_grad",
            [pullback, *(self.total(results[i]) for i in of)],
            lambda values: values[0].pull(of, values[1:], wrt),
            [(t.dtype, t.shape) for t in wanted],
            pull=(wrt, of),
        )
        for t, cotangent in zip(wanted, node.outputs, strict=True):
            self.give(t, cotangent)


def _ancestors(tensors: Sequence[Tensor], first: int) -> set[Operation]:
    """Find the operations, from number `first` on, that `tensors` depend on."""
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


def _seed(graph: Any, y: Tensor, seed: Any) -> Tensor:
    """Return the cotangent of `y`: as given, or else ones."""
    if seed is None:
        if y.dtype is not None and jnp.issubdtype(y.dtype, jnp.complexfloating):
            raise TypeError(
                f"gradients: {y!r} is complex, so ones are not an obvious cotangent; give "
                "grad_ys."
            )
        return _like(graph, "ones_like", y, jnp.ones_like)
    where = f"gradients: grad_ys of {y.name!r}"
    if not isinstance(seed, Tensor):
        seed = convert(seed, y.dtype, y.shape, lambda: where)

    def check(shape: Any, expected: Any) -> None:
        if not fits(shape, expected):
            raise ValueError(f"{where}: expected shape {expected}, got {shape}.")

    def compute(values: Sequence[Any]) -> list[Any]:
        value, given = values if len(values) > 1 else (values[0], jnp.asarray(seed))
        check(given.shape, value.shape)
        return [given.astype(value.dtype)]

    check(seed.shape, y.shape)
    inputs = [y, seed] if isinstance(seed, Tensor) else [y]
    op = graph.create_operation("grad_ys", inputs, compute, [(y.dtype, y.shape)])
    return op.outputs[0]


def _like(graph: Any, name: str, tensor: Tensor, func: Any) -> Tensor:
    """Make a constant of the shape and dtype of `tensor`."""
    spec = (tensor.dtype, tensor.shape)
    return graph.create_operation(
        name, [tensor], lambda values: [func(values[0])], [spec], differentiable=False
    ).outputs[0]


def _add_n(values: Sequence[Any]) -> list[Any]:
    """Add cotangents, which are arrays, or lists of arrays if they are of a pullback."""
    add = functools.partial(jax.tree.map, operator.add)
    return [functools.reduce(add, values)]


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _tensors(value: Any, what: str) -> list[Tensor]:
    tensors = _list(value)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"gradients: expected {what} to be a graph tensor or a list of them, got "
                f"{tensor!r}; for a function of arrays, write jax.grad."
            )
    return tensors
