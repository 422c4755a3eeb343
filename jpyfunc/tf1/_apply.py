"""Calls on graph tensors: the node that a call makes, and what it computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpyfunc._errors import InferenceError, add_note
from jpyfunc._graph_tensor import GraphTensor

Spec = tuple[Any, tuple[int | None, ...] | None]  # dtype and shape, None if unknown

_NEEDS_VALUES = (
    "A function of graph tensors is traced. If it needs their values, call it with "
    "tf.contrib.eager.py_func."
)


def apply(func: Callable[..., Any], args: Any, kwargs: Any, name: str) -> Any:
    """Make a node of `func(*args, **kwargs)`, some leaves of which are tensors.

    Args:
        func: a function of JAX.
        args: positional arguments, pytrees.
        kwargs: keyword arguments, pytrees.
        name: of the node.

    Returns:
        Tensors in the structure of what `func` returns.
    """
    inputs = tensors_in(args, kwargs)
    call = close_over(func, args, kwargs)
    try:
        found = infer(call, inputs)
    except Exception as error:
        add_note(error, f"while adding {name!r} of {inputs} to the graph")
        raise
    # A call that works for none of the shapes tried is assumed to have one result, as
    # nearly all of jax.numpy has; the node checks that when it runs.
    tree, specs = found or (jax.tree.structure(0), [(None, None)])
    op = _add_call(common_graph(inputs), call, inputs, tree, specs, name)
    return _results(op, tree)


def apply_py_func(func: Any, args: Any, kwargs: Any, graph: Any = None) -> Any:
    """Make a node of a wrapped function, with tensors in the structure of its `Tout`.

    A shape that `Tout` leaves open is the one that the tensor has when the node is
    lowered, by `set_shape`; where it has none either, it is inferred.

    Args:
        func: the wrapped function.
        args: positional arguments, pytrees.
        kwargs: keyword arguments, pytrees.
        graph: where the node goes if no argument is a tensor.

    Returns:
        The tensors; the operation itself if there are none, as in TensorFlow.

    Raises:
        TypeError: `Tout` is left out or is a callable, and the number of results
            depends on shapes that are unknown.
    """
    inputs = tensors_in(args, kwargs)
    graph = common_graph(inputs) if inputs else graph
    name = graph.unique_name(func.node_name or "PyFunc")
    if not jax.tree.leaves((args, kwargs)):
        func = func.reusing_first()
    func = func.for_node(f"in graph operation {name!r}")
    template = func.template
    if template is not None:
        tree = template.tree
        specs = [(leaf.dtype, leaf.shape) for leaf in template.leaves]

        def declared_call(values: Sequence[Any]) -> Any:
            shapes = [t.shape if is_known(t.shape) else None for t in op.outputs]
            declared = func.with_template(template.replace_shapes(shapes))
            try:
                return close_over(declared, args, kwargs)(values)
            except InferenceError as error:
                unknown = [t.name for t in op.outputs if not is_known(t.shape)]
                if not unknown:  # a body that is staged fails with every shape known
                    raise
                raise _without_shape(error, unknown) from error.__cause__

        call = declared_call
    else:
        call = close_over(func, args, kwargs)
        found = infer(call, inputs)
        if found is None:
            unknown = next(t for t in inputs if not is_known(t.shape))
            raise TypeError(
                f"{func!r}, graph operation {name!r}: how many results it has cannot be "
                f"told while the shape of {unknown.name!r} is unknown. Give Tout, for "
                "example tf.float32 for one result, or give the placeholders shapes."
            )
        tree, specs = found
    op = _add_call(graph, call, inputs, tree, specs, name, unique=True)
    return _results(op, tree)


def _without_shape(error: InferenceError, names: Sequence[str]) -> InferenceError:
    """Make the error of tensors whose shapes neither `Tout` nor `set_shape` gives."""
    listed = ", ".join(map(repr, names))
    return InferenceError(
        f"The shape of {listed} is unknown. Write y.set_shape([]) for a scalar y, for "
        f"example, or an exact Tout. {error}"
    )


def _results(op: Any, tree: Any) -> Any:
    """Return the tensors of a node in the structure of `tree`; without any, the node."""
    return jax.tree.unflatten(tree, op.outputs) if op.outputs else op


def _add_call(
    graph: Any,
    call: Callable[[Sequence[Any]], Any],
    inputs: Sequence[Any],
    tree: Any,
    specs: Sequence[Spec],
    name: str,
    *,
    unique: bool = False,
) -> Any:
    """Add the node of a call to a graph.

    Args:
        graph: that of the inputs, if there are any.
        call: the function of the inputs' values.
        inputs: tensors of one graph.
        tree: structure of its results.
        specs: one per result.
        name: of the node.
        unique: whether `name` has been made unique already.
    """

    def compute(values: Sequence[Any]) -> list[Any]:
        results, got = jax.tree.flatten(call(values))
        if got != tree:
            raise TypeError(
                f"expected results in the structure {tree}, as inferred when the graph "
                f"was built, got {got}. Give the placeholders that it depends on their "
                "shapes or, for a py_func, give Tout."
            )
        return [jnp.asarray(result) for result in results]

    return graph.create_operation(name, inputs, compute, specs, unique=unique)


def tensors_in(args: Any, kwargs: Any) -> list[Any]:
    """Find the tensors among the arguments of a call."""
    return [x for x in jax.tree.leaves((args, kwargs)) if isinstance(x, GraphTensor)]


def close_over(
    func: Callable[..., Any], args: Any, kwargs: Any
) -> Callable[[Sequence[Any]], Any]:
    """Return a call as a function of the values of its tensors alone."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, GraphTensor)]

    def call(values: Sequence[Any]) -> Any:
        filled = list(leaves)
        for i, value in zip(positions, values, strict=True):
            filled[i] = value
        args, kwargs = jax.tree.unflatten(tree, filled)
        return func(*args, **kwargs)

    return call


def common_graph(tensors: Iterable[Any]) -> Any:
    """Return the graph of tensors that are combined.

    Raises:
        ValueError: they are of two graphs.
    """
    first, *others = tensors
    for other in others:
        if other.graph is not first.graph:
            raise ValueError(
                f"{first.name!r} is a tensor of {first.graph!r} and {other.name!r} of "
                f"{other.graph!r}, and a node takes tensors of one graph. Build both "
                "under the same `with graph.as_default():`."
            )
    return first.graph


def infer(
    call: Callable[[Sequence[Any]], Any], inputs: Sequence[Any]
) -> tuple[Any, list[Spec]] | None:
    """Infer the structure, dtypes and shapes of a call's results.

    Where a shape is unknown, it tries shapes, for the structure and the dtypes alone, which
    rarely depend on them.

    Returns:
        None if the call works for none of the shapes tried.
    """
    known = all(is_known(t.shape) for t in inputs)
    typed = all(t.dtype is not None for t in inputs)
    for structs in [_structs(inputs, 1, 0)] if known else _guesses(inputs):
        try:
            results = jax.eval_shape(call, structs)
        except Exception as error:
            if isinstance(error, jax.errors.ConcretizationTypeError):
                add_note(error, _NEEDS_VALUES)
                raise
            if known:
                raise
        else:
            leaves, tree = jax.tree.flatten(results)
            return tree, [
                (x.dtype if typed else None, x.shape if known else None) for x in leaves
            ]
    return None


def is_known(shape: tuple[int | None, ...] | None) -> bool:
    """Tell whether every size in a shape is known."""
    return shape is not None and None not in shape


def _guesses(inputs: Sequence[Any]) -> Iterator[list[Any]]:
    sizes = {n for t in inputs for n in t.shape or () if n is not None}
    for size, rank in itertools.product([1, *sorted(sizes - {1})], range(5)):
        yield _structs(inputs, size, rank)


def _structs(inputs: Sequence[Any], size: int, rank: int) -> list[Any]:
    """Make abstract values, with `size` and `rank` for what is unknown."""
    return [
        jax.ShapeDtypeStruct(
            (size,) * rank
            if t.shape is None
            else tuple(size if n is None else n for n in t.shape),
            np.float32 if t.dtype is None else t.dtype,
        )
        for t in inputs
    ]
