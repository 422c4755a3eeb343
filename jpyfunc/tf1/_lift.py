"""Lift functions of JAX to graph tensors: a call on tensors adds a node."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import jax

from jpyfunc._errors import see
from jpyfunc._graph_tensor import GraphTensor
from jpyfunc.tf1._apply import apply


def lift(func: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of JAX accept graph tensors, and then return graph tensors.

    Args:
        func: a function from pytrees to pytrees of arrays that `jax.jit` could compile.
            For a function that needs values, for example in an `if`, write
            `tf.contrib.eager.py_func`.

    Returns:
        The lifted function. Its arguments may mix tensors and concrete values, which become
        part of the graph. Without a tensor among the arguments, it calls `func`.

    Raises:
        TypeError: on the call, if `func` cannot be traced.
        ValueError: on the call, if the tensors belong to two graphs.

    Example:
        >>> import jax
        >>> import jpyfunc.tf1 as tf
        >>> x = tf.placeholder(tf.float32, [3])
        >>> y = tf.lift(jax.nn.softmax)(x)
        >>> with tf.Session() as sess:
        ...     print(sess.run(y, {x: [0, 0, 0]}).sum())
        1.0
    """
    own = getattr(func, "__name__", "")
    name = own if own.isidentifier() and own.isascii() else type(func).__name__
    name = name.lstrip("_") or "lift"

    @functools.wraps(func, updated=())
    def lifted(*args: Any, **kwargs: Any) -> Any:
        return _call(func, args, kwargs, name)

    return lifted


def over_tensors(func: Callable[..., Any]) -> Callable[..., Any]:
    """Lift a function with TensorFlow's parameter `name`, which names the node."""
    positional = [
        parameter.name
        for parameter in inspect.signature(func).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    place = positional.index("name") if "name" in positional else sys.maxsize

    @functools.wraps(func)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        name = kwargs.pop("name", None)
        if len(args) > place:
            name, args = args[place], (*args[:place], None, *args[place + 1 :])
        if not isinstance(name, str | None):
            raise TypeError(
                f"{func.__name__}: expected name to be a string, got {name!r}."
                + see("An invalid argument")
            )
        return _call(func, args, kwargs, name or func.__name__)

    return lifted


def _call(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> Any:
    if any(isinstance(x, GraphTensor) for x in jax.tree.leaves((args, kwargs))):
        return apply(func, args, kwargs, name)
    return func(*args, **kwargs)
