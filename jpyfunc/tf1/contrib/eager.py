"""TensorFlow 1's `tf.contrib.eager`: `py_func` on JAX arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jpyfunc._py_func
from jpyfunc.tf1._script_ops import add_call


def py_func(
    func: Callable[..., Any],
    inp: Any,
    Tout: Any,  # noqa: N803 - TensorFlow's name
    name: str | None = None,
) -> Any:
    """Add a node that runs a Python function eagerly, on JAX arrays.

    `gradients` differentiates it to any order. It is a stateful `jpyfunc.py_func`, whose
    documentation says what the function may do: a session runs the function once in each
    run that needs it. In the body of another wrapped function, it is called at once.

    Args:
        func: the function. It may call `tf.abs` and the like, which on arrays are functions
            of JAX.
        inp: a list of tensors or arrays.
        Tout: a dtype or a list of dtypes; `[]` if the function returns nothing. A dtype
            leaves the shape open: it is set by `tensor.set_shape` or else inferred by
            running the function on abstract values. `jax.ShapeDtypeStruct` declares it.
        name: name of the operation; by default `PyFunc`.

    Returns:
        A tensor; for a list, a list of tensors; for `[]`, the operation.

    Raises:
        TypeError: an argument has the wrong type.

    Example:
        >>> import jpyfunc.tf1 as tf
        >>> def log_huber(x, m):
        ...     if tf.abs(x) <= m:
        ...         return x**2
        ...     return m**2 * (1 - 2 * tf.log(m) + tf.log(x**2))
        >>> x, m = tf.placeholder(tf.float32), tf.placeholder(tf.float32)
        >>> y = tf.contrib.eager.py_func(log_huber, [x, m], tf.float32)
        >>> dy_dx = tf.gradients(y, x)[0]
        >>> with tf.Session() as sess:
        ...     print(*sess.run([y, dy_dx], feed_dict={x: 1.0, m: 2.0}))
        1.0 2.0

    Source: `tf.contrib.eager.py_func` of TensorFlow 1.
    """
    return add_call(jpyfunc._py_func.py_func, func, inp, Tout, name, stateful=True)
