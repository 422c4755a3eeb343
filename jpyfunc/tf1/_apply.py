"""Calls on graph tensors: add the node of a call, and infer what it returns."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import set_current_trace

from jpyfunc import _compat
from jpyfunc._errors import InferenceError, add_note, adding_note, see
from jpyfunc._graph_tensor import GraphTensor
from jpyfunc._hashable import hashable
from jpyfunc._staging.abstract_trace import AbstractTrace
from jpyfunc._wrapped import PyFunc, callee_of, with_changes

# The dtype and the shape of a result; None for what is unknown.
Spec = tuple[np.dtype | None, tuple[int | None, ...] | None]
# What a node computes: from the values of its inputs, which are arrays or pullbacks, to
# those of its results.
Compute = Callable[[Sequence[Any]], list[Any]]
Indices = tuple[int, ...]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

_NEEDS_VALUES = (
    "Functions of graph tensors are traced. If this one needs values, call it with "
    "tf.contrib.eager.py_func." + see("A tensor that is used as a value")
)


def apply(func: Callable[..., Any], args: Args, kwargs: Kwargs, name: str) -> Any:
    """Add a node of `func(*args, **kwargs)`, where some leaves are tensors.

    Args:
        func: a function of JAX.
        args: positional arguments, pytrees.
        kwargs: keyword arguments, pytrees.
        name: name of the node.

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
    # A call that fails for all guessed shapes is assumed to have one result, like nearly
    # all of jax.numpy; the node checks that when it runs.
    tree, specs = found or (jax.tree.structure(0), [(None, None)])
    op = _add_call(common_graph(inputs), call, inputs, tree, specs, name)
    return _results(op, tree)


def apply_py_func(
    func: PyFunc[..., Any], args: Args, kwargs: Kwargs, graph: Any = None
) -> Any:
    """Add a node of a wrapped function, with tensors in the structure of its `Tout`.

    For a shape that `Tout` leaves open, the shape that `set_shape` has given the tensor by
    the time the node is lowered is declared. Without one, the shape is inferred.

    Args:
        func: the wrapped function.
        args: positional arguments, pytrees.
        kwargs: keyword arguments, pytrees.
        graph: the graph that the node is added to if no argument is a tensor.

    Returns:
        The tensors; the operation itself if there are none, as in TensorFlow.

    Raises:
        TypeError: `Tout` is left out or is a callable, and the number of results
            depends on shapes that are unknown.
    """
    inputs = tensors_in(args, kwargs)
    graph = common_graph(inputs) if inputs else graph
    callee = callee_of(func)
    name = graph.unique_name(callee.options.name or "PyFunc")
    body = callee.function
    if not jax.tree.leaves((args, kwargs)):
        body = ReusesFirst(body)
    body = adding_note(body, f"in graph operation {name!r}")
    func = with_changes(func, func=hashable(body))
    template = callee.template
    if template is not None:
        tree = template.tree
        specs = [(leaf.dtype, leaf.shape) for leaf in template.leaves]

        def declared_call(values: Sequence[Any]) -> Any:
            shapes = [t.shape if is_known(t.shape) else None for t in op.outputs]
            declared = with_changes(func, template=template.replace_shapes(shapes))
            try:
                return close_over(declared, args, kwargs)(values)
            except InferenceError as error:
                unknown = [t.name for t in op.outputs if not is_known(t.shape)]
                if not unknown:  # a staged body may fail although every shape is known
                    raise
                raise _without_shape(error, unknown) from error.__cause__

        call = declared_call
    else:
        call = close_over(func, args, kwargs)
        found = infer(call, inputs)
        if found is None:
            unknown = next(t for t in inputs if not is_known(t.shape))
            raise TypeError(
                f"{func!r}, graph operation {name!r}: how many results it has is unknown "
                f"while the shape of {unknown.name!r} is unknown. Give Tout, "
                "or the shapes of placeholders." + see("A result of unknown shape")
            )
        tree, specs = found
    op = _add_call(graph, call, inputs, tree, specs, name, unique=True)
    return _results(op, tree)


class ReusesFirst:
    """A function without arguments, whose result of inference is that of the first call.

    Inference runs a body on abstract values. Without arguments there are none, and the
    body computes its result, which the first real call then returns: so a body that draws
    a random number or counts its calls is not run once more than the graph runs.
    """

    def __init__(self, func: Callable[[], Any]) -> None:
        self._func = func
        self._results: list[Any] = []

    def __call__(self) -> Any:
        if not isinstance(_compat.current_trace(), AbstractTrace):
            with contextlib.suppress(IndexError):
                return self._results.pop()
            return self._func()
        if not self._results:
            with set_current_trace(_compat.eval_trace):
                self._results.append(self._func())
        return self._results[0]


def _without_shape(error: InferenceError, names: Sequence[str]) -> InferenceError:
    """Return the error for tensors whose shapes neither `Tout` nor `set_shape` gives."""
    listed = ", ".join(map(repr, names))
    return InferenceError(
        f"The shape of {listed} is unknown. Write y.set_shape([]), for example, if y is a "
        f"scalar, or a Tout with the shape. {error}"
    )


def _results(op: Any, tree: Any) -> Any:
    """Return the results of a node in the structure of `tree`; the node if it has none."""
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
        graph: the graph of the inputs, if there are any.
        call: the function of the inputs' values.
        inputs: tensors of the graph.
        tree: structure of the results.
        specs: one per result.
        name: name of the node.
        unique: whether `name` has been made unique already.
    """

    def compute(values: Sequence[Any]) -> list[Any]:
        results, got = jax.tree.flatten(call(values))
        if got != tree:
            raise TypeError(
                f"expected results in the structure {tree}, as inferred when the graph "
                f"was built, got {got}. Give the placeholders that it depends on their "
                "shapes or, for a py_func, give Tout." + see("A result of unknown shape")
            )
        return [jnp.asarray(result) for result in results]

    return graph.create_operation(name, inputs, compute, specs, unique=unique)


def tensors_in(args: Args, kwargs: Kwargs) -> list[Any]:
    """Find the tensors among the arguments of a call."""
    return [x for x in jax.tree.leaves((args, kwargs)) if isinstance(x, GraphTensor)]


def close_over(
    func: Callable[..., Any], args: Args, kwargs: Kwargs
) -> Callable[[Sequence[Any]], Any]:
    """Return `func(*args, **kwargs)` as a function of the values of its tensors."""
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
    """Return the graph that all of `tensors` belong to.

    Raises:
        ValueError: they belong to two graphs.
    """
    first, *others = tensors
    for other in others:
        if other.graph is not first.graph:
            raise ValueError(
                f"{first.name!r} is a tensor of {first.graph!r} and {other.name!r} one of "
                f"{other.graph!r}, but all inputs of a node must be of one graph. Build "
                "both under the same `with graph.as_default():`."
                + see("Tensors of several graphs")
            )
    return first.graph


def infer(
    call: Callable[[Sequence[Any]], Any], inputs: Sequence[Any]
) -> tuple[Any, list[Spec]] | None:
    """Infer the structure, dtypes and shapes of a call's results.

    Where a shape of an input is unknown, several shapes are tried. Only the structure and
    the dtypes are taken from these, which rarely depend on shapes.

    Returns:
        The structure and one spec per result; None if the call fails for all shapes tried.
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


def is_known(shape: tuple[int | None, ...] | None) -> TypeGuard[tuple[int, ...]]:
    """Test whether every size in a shape is known."""
    return shape is not None and None not in shape


def _guesses(inputs: Sequence[Any]) -> Iterator[list[jax.ShapeDtypeStruct]]:
    """Guess unknown sizes and ranks: all sizes alike, 1 or one that is known elsewhere."""
    sizes = {n for t in inputs for n in t.shape or () if n is not None}
    for size, rank in itertools.product([1, *sorted(sizes - {1})], range(5)):
        yield _structs(inputs, size, rank)


def _structs(inputs: Sequence[Any], size: int, rank: int) -> list[jax.ShapeDtypeStruct]:
    """Make abstract values of the inputs, with `size` and `rank` where they are unknown."""
    return [
        jax.ShapeDtypeStruct(
            (size,) * rank
            if t.shape is None
            else tuple(size if n is None else n for n in t.shape),
            np.float32 if t.dtype is None else t.dtype,
        )
        for t in inputs
    ]
