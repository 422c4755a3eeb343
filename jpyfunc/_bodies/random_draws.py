"""Notices that numbers were drawn from the global generators of Python and NumPy.

`random.getstate` takes 8 us and `numpy.random.get_state` 25, beside a run by branch of some
800, so that of NumPy's generator the memory that it is in is compared, at less than 1 us.
"""

from __future__ import annotations

import ctypes
import random
from typing import Any

import numpy as np

_bit_generator = getattr(np.random, "get_bit_generator")  # noqa: B009 - unknown to pyright
_WORDS = 4 * 625  # bytes of a Mersenne Twister

# The words when NumPy was asked last for the second of a pair of normal numbers, and that.
_asked: tuple[bytes, Any] = (b"", None)


def generators() -> tuple[Any, Any]:
    """The states of `random` and `numpy.random`, to compare with those of later."""
    return random.getstate(), _of_numpy()


def drawn_since(before: tuple[Any, Any]) -> str:
    """Which of the generators are no longer as they were."""
    pairs = zip(("random", "numpy.random"), before, generators(), strict=True)
    return " and ".join(name for name, then, now in pairs if then != now)


def _of_numpy() -> Any:
    global _asked
    bits = _bit_generator()
    if type(bits) is not np.random.MT19937:  # put there by the user
        return repr(np.random.get_state(legacy=False))
    words = ctypes.string_at(bits.ctypes.state_address, _WORDS)
    before, second = _asked
    # Normal numbers are drawn in pairs, of which the second stays until it is asked for,
    # which leaves the words alone. There is none unless words were drawn.
    if words != before or second is not None:
        state = np.random.get_state(legacy=False)
        second = state["gauss"] if state["has_gauss"] else None
        _asked = (words, second)
    return words, second
