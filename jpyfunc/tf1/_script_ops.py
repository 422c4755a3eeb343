"""`tf.py_func`: a call of Python on NumPy arrays as a node."""

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
    """Add a node that runs a Python function on NumPy arrays, in every run.

    It is a `jpyfunc.numpy_func`, whose documentation says what the function may do.
    Where TensorFlow has no gradient (None), a run of `gradients` through it raises
    NotDifferentiableError. Called in the body of another, it is a call at once.

    Args:
        func: what to run.
        inp: a list of tensors or arrays.
        Tout: a dtype, or a list of them; `[]` if the function returns nothing. A dtype
            leaves the shape open: `tensor.set_shape` says it, or an exact `Tout` such as
            `jax.ShapeDtypeStruct((), tf.float32)`.
        stateful: whether a run calls it exactly once if it needs it; False says that it
            is a function of its arguments.
        name: name of the operation; by default `PyFunc`.

    Returns:
        A tensor; a list of them for a list; for `[]`, the operation.

    Raises:
        TypeError: an argument of the wrong kind.

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
    """Add a node of `wrap(func, inp, tout)` to the graph of the tensors or the default one.

    In a body or a function that JAX traces, it is a call.
    """
    tout = list(tout) if type(tout) is tuple else tout  # TensorFlow returns a list
    # Without it, a call without tensors outside of any `with` would be made now, and
    # its value would be that of every run.
    with get_default_graph().as_default():
        return wrap(func, inp, tout, name, stateful=stateful)
