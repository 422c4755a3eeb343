"""`jax.numpy` for graph tensors: `tf.numpy.sin(tensor)` adds a node.

Each function is one of `jax.numpy`, lifted as by `tf.lift`: without a tensor among its
arguments it is simply called. `linalg` and `fft` are lifted, too; dtypes and constants are
those of `jax.numpy`.

Example:
    >>> import jpyfunc.tf1 as tf
    >>> x = tf.placeholder(tf.float32, [2, 2])
    >>> with tf.Session() as sess:
    ...     print(sess.run(tf.numpy.linalg.det(x), {x: [[2, 0], [0, 3]]}))
    6.0
"""

from __future__ import annotations

import types
from typing import Any

import jax.numpy

from jpyfunc.tf1._lift import lift


class _Lifted(types.ModuleType):
    """A module of `jax.numpy` with its functions lifted."""

    def __init__(self, module: types.ModuleType) -> None:
        super().__init__(module.__name__, module.__doc__)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return _lifted(getattr(self._module, name))

    def __dir__(self) -> list[str]:
        return dir(self._module)


def _lifted(value: Any) -> Any:
    if isinstance(value, types.ModuleType):
        return _Lifted(value)
    return lift(value) if callable(value) and not isinstance(value, type) else value


def __getattr__(name: str) -> Any:
    return _lifted(getattr(jax.numpy, name))


def __dir__() -> list[str]:
    return dir(jax.numpy)
