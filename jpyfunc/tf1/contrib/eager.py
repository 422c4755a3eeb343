"""What TensorFlow 1 has under `tf.contrib.eager`: `py_func`."""

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
    """Add a node that runs a Python function eagerly, on JAX arrays, in every run.

    `gradients` differentiates it to any order. It is a stateful `jpyfunc.py_func`, whose
    documentation says what the function may do: a session runs it once in a run that
    needs it. Called in the body of another, it is a call at once.

    Args:
        func: what to run; it may call `tf.abs` and the like, which are then JAX's.
        inp: a list of tensors or arrays.
        Tout: a dtype, or a list of them; `[]` if the function returns nothing. A dtype
            leaves the shape to `tensor.set_shape`, or else to inference, which runs the
            function on values without data; `jax.ShapeDtypeStruct` says it at once.
        name: name of the operation; by default `PyFunc`.

    Returns:
        A tensor; a list of them for a list; for `[]`, the operation.

    Raises:
        TypeError: an argument of the wrong kind.

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
