"""Tickets: the ids of cached tapes, as arrays that programs carry along.

A ticket is a result of the call that ran on the tape, and an operand of the derivatives of
that call. So they find the tape of the very execution that they differentiate, in whatever
order the program runs them, and however often. 96 of the 128 bits are the name of the tape:
48 for the process, 48 for the run. The last 32 are the number of the element, because a run
by branch leaves one tape for many elements. They are four words because JAX has no integers
of 64 bits by default.
"""

from __future__ import annotations

import numpy as np
from jax.core import ShapedArray

from jpyfunc._types import Array

TICKET = ShapedArray((4,), np.uint32)


def ticket_aval(batch_shape: tuple[int, ...]) -> ShapedArray:
    """The aval of a run's tickets: one, or those of a batch that the function takes."""
    return TICKET.update(shape=(*batch_shape, *TICKET.shape)) if batch_shape else TICKET


def ticket_of(name: bytes) -> np.ndarray:
    """The ticket of the first element of a tape."""
    return np.frombuffer(name + bytes(4), TICKET.dtype)


def name_of(ticket: np.ndarray) -> bytes:
    """The name of the tape of a ticket."""
    return ticket[:3].tobytes()


def names_of(tickets: np.ndarray) -> set[bytes]:
    """The names of the tapes of many tickets."""
    return set(_names(tickets).tolist())


def rows_by_tape(tickets: np.ndarray) -> list[np.ndarray]:
    """For each tape, the rows in which `tickets` has a ticket of it."""
    _, labels = np.unique(_names(tickets), return_inverse=True)
    return [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]


def elements_of(tickets: np.ndarray) -> np.ndarray:
    """For each ticket, the number of its element in the run that the tape is of."""
    return tickets[:, 3].astype(np.intp)


def _names(tickets: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(tickets.reshape(-1, 4)[:, :3])
    return words.view("V12").ravel()


def tickets_of_run(ticket: np.ndarray, count: int) -> np.ndarray:
    """The tickets of a run of `count` elements, the first of which has `ticket`."""
    tickets = np.tile(ticket, (count, 1))
    tickets[:, 3] = np.arange(count)
    return tickets


def is_void(ticket: Array) -> bool:
    """Whether a ticket is of no tape.

    It is zeros then, which JAX puts in the place of the results of a branch not taken.
    Nothing uses what is computed from it.
    """
    return not np.asarray(ticket).any()
