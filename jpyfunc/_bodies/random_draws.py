"""Detect numbers drawn from the global generators of Python and NumPy.

A generator was drawn from if its state has changed. `random.getstate` takes 8 us, beside
some 800 of a run by branch, but `numpy.random.get_state` takes 25. So for NumPy, the memory
of the generator is compared instead, which takes less than 1 us.
"""

from __future__ import annotations

import ctypes
import random
from typing import Any

import numpy as np

_bit_generator = getattr(np.random, "get_bit_generator")  # noqa: B009 - unknown to pyright

# Normal numbers are drawn in pairs, and the second of a pair is stored for the next draw,
# which then leaves the words alone. So the stored number belongs to the state, too, and
# only the slow `get_state` returns it. That need not be asked while the words are the same
# and none was stored: storing one takes a draw, which changes the words. Hence the state
# that was seen last: the words, and the stored number or None.
_last_known: tuple[bytes, float | None] = (b"", None)


def generator_states() -> tuple[Any, Any]:
    """The states of `random` and `numpy.random`, for `drawn_since`."""
    return random.getstate(), _numpy_state()


def drawn_since(before: tuple[Any, Any]) -> str:
    """The names of the generators whose state has changed; empty if there is none."""
    pairs = zip(("random", "numpy.random"), before, generator_states(), strict=True)
    return " and ".join(name for name, then, now in pairs if then != now)


def _numpy_state() -> Any:
    global _last_known
    bits = _bit_generator()
    if type(bits) is not np.random.MT19937:  # the user has set another one
        return repr(np.random.get_state(legacy=False))
    # A Mersenne Twister is 624 words and the position in them.
    words = ctypes.string_at(bits.ctypes.state_address, 4 * 625)
    known_words, second = _last_known
    if words != known_words or second is not None:
        state = np.random.get_state(legacy=False)
        second = state["gauss"] if state["has_gauss"] else None
        _last_known = (words, second)
    return words, second
