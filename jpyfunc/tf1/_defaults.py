"""The default graph and the default session.

Both are set by the `with` blocks of graphs and sessions and by interactive sessions; the
one that began last counts. Blocks are in the context, where wrapped functions look, too:
inside of a block, a call without tensors is a node. An interactive session is not a block.
It lasts until it is closed, in a notebook beyond the cell that opened it, and a cell that
awaits something has a context of its own. So these are per thread, as in TensorFlow 1.
"""

from __future__ import annotations

import threading
from typing import Any

from jpyfunc._errors import see
from jpyfunc._graph_tensor import GraphBlock
from jpyfunc._runtime.context import begin_building, current, end_building


class _Interactive(threading.local):
    def __init__(self) -> None:
        self.blocks: list[GraphBlock] = []


_interactive = _Interactive()


def open_blocks() -> list[GraphBlock]:
    """List the blocks and interactive sessions that are open here, the latest one last."""
    blocks = [*current().graphs, *_interactive.blocks]
    return sorted(blocks, key=lambda block: block.number)


def begin_block(graph: Any, session: Any = None) -> None:
    """Make `graph`, and `session` if there is one, the default in a block."""
    begin_building(GraphBlock(graph, session))


def end_block(graph: Any, session: Any = None) -> None:
    """End the innermost block of these; it need not be the innermost of all."""
    for block in reversed(current().graphs):
        if block.graph is graph and block.session is session:
            end_building(block)
            break


def begin_interactive(graph: Any, session: Any) -> None:
    """Make `graph` and `session` the default on this thread until `end_interactive`."""
    _interactive.blocks.append(GraphBlock(graph, session))


def end_interactive(session: Any) -> None:
    """Undo `begin_interactive`."""
    _interactive.blocks = [b for b in _interactive.blocks if b.session is not session]


def get_default_session() -> Any:
    """Return the session that `Tensor.eval` and `Operation.run` use here.

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
    sessions = [block.session for block in open_blocks() if block.session is not None]
    return sessions[-1] if sessions else None


def session_for(session: Any, caller: str) -> Any:
    """Return `session`, or the default one if it is None.

    Raises:
        ValueError: there is none.
    """
    session = get_default_session() if session is None else session
    if session is None:
        raise ValueError(
            f"{caller}: there is no default session. Write `with tf.Session() as sess:` "
            "around it, or pass session=." + see("A session that is closed or missing")
        )
    return session
