"""`tf.py_func`: calls of Python functions on NumPy arrays, as nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jpyfunc._py_func import numpy_func
from jpyfunc.tf1._graph import get_default_graph


def py_func(
    func: Callable[..., Any],
    inp: Any,
    Tout: Any,  # noqa: N803 - TensorFlow's name
    stateful: bool = True,
    name: str | None = None,
) -> Any:
    """Add a node that runs a Python function on NumPy arrays.

    It is a `jpyfunc.numpy_func`, whose documentation says what the function may do. Where
    TensorFlow returns None for its gradient, running that gradient raises
    NotDifferentiableError. In the body of another wrapped function, it is called at once.

    Args:
        func: the function.
        inp: a list of tensors or arrays.
        Tout: a dtype or a list of dtypes; `[]` if the function returns nothing. A dtype
            leaves the shape open: set it with `tensor.set_shape`, or write a `Tout` with
            the shape, such as `jax.ShapeDtypeStruct((), tf.float32)`.
        stateful: whether every run that needs it calls it exactly once. False promises that
            its result depends on its arguments alone.
        name: name of the operation; by default `PyFunc`.

    Returns:
        A tensor; for a list, a list of tensors; for `[]`, the operation.

    Raises:
        TypeError: an argument has the wrong type.

    Example:
        >>> import numpy as np
        >>> import jpyfunc.tf1 as tf
        >>> x = tf.placeholder(tf.float32, [3])
        >>> y = tf.py_func(np.sort, [x], tf.float32)
        >>> y.set_shape(x.get_shape())
        >>> with tf.Session() as sess:
        ...     print(sess.run(y, {x: [3, 1, 2]}))
        [1. 2. 3.]

    Source: `tf.py_func` of TensorFlow 1.
    """
    return add_call(numpy_func, func, inp, Tout, name, stateful=stateful)


def add_call(
    wrap: Callable[..., Any],
    func: Callable[..., Any],
    inp: Any,
    tout: Any,
    name: str | None,
    *,
    stateful: bool,
) -> Any:
    """Add a node of `wrap(func, inp, tout)` to the graph of its tensors or the default one.

    In a body, or in a function that JAX traces, the function is called instead.
    """
    tout = list(tout) if type(tout) is tuple else tout  # TensorFlow returns a list
    # Without this block, a call without tensors outside of any `with` would run now, once,
    # instead of in every run of the graph.
    with get_default_graph().as_default():
        return wrap(func, inp, tout, name, stateful=stateful)
