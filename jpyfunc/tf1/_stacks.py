"""The default graph and the default session: a stack of each per thread."""

from __future__ import annotations

import threading
from typing import Any


class _Stacks(threading.local):
    def __init__(self) -> None:
        self.graphs: list[Any] = []
        self.sessions: list[Any] = []


stacks = _Stacks()


def remove_last(stack: list[Any], item: Any) -> None:
    """Remove the last occurrence of `item` from a stack; it need not be at the top."""
    for i in reversed(range(len(stack))):
        if stack[i] is item:
            del stack[i]
            return


def get_default_session() -> Any:
    """Return the session that `Tensor.eval` and `Operation.run` use on this thread.

    Returns:
        The innermost `Session` entered with `with`, or the last `InteractiveSession`
        that is not closed; None without one.

    Example:
        >>> import jpyfunc.tf1 as tf
        >>> with tf.Session() as sess:
        ...     print(tf.get_default_session() is sess)
        True
        >>> print(tf.get_default_session())
        None

    Source: `tf.get_default_session` of TensorFlow 1.
    """
    return stacks.sessions[-1] if stacks.sessions else None


def session_for(session: Any, what: str) -> Any:
    """Return `session`, or else the default one.

    Raises:
        ValueError: there is none.
    """
    session = get_default_session() if session is None else session
    if session is None:
        raise ValueError(
            f"{what}: there is no default session. Write `with tf.Session() as sess:` "
            "around it, or pass session=."
        )
    return session
