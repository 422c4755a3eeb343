"""Find and copy the NumPy arrays in jaxprs and in parameters of primitives.

JAX embeds a NumPy array that a traced function uses by reference, as a constant or a
literal of a jaxpr, at any depth. The user may write to that array between an abstract run
of a body and the compilation of what was recorded in it, so the recorded jaxpr has to
have a copy of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jpyfunc import _compat


def holds_numpy(value: Any) -> bool:
    """Tell whether a constant, or a parameter of a primitive, is or holds a NumPy array."""
    if type(value) in (tuple, list):
        return any(map(holds_numpy, value))
    return isinstance(value, np.ndarray) or (
        _compat.is_jaxpr(value) and _jaxpr_holds_numpy(value)
    )


@_compat.weakref_lru_cache  # a jaxpr never changes
def _jaxpr_holds_numpy(jaxpr: Any) -> bool:
    inner = _without_constants(jaxpr)
    atoms = [*inner.outvars, *(x for eqn in inner.eqns for x in eqn.invars)]
    values = [*getattr(jaxpr, "consts", []), *(x.val for x in atoms if type(x) is Literal)]
    params = [x for eqn in inner.eqns for x in eqn.params.values()]
    return any(isinstance(x, np.ndarray) for x in values) or any(map(holds_numpy, params))


def copy_numpy(value: Any, copy_part: Callable[[Any], Any]) -> Any:
    """Return `value` with copies in the place of the NumPy arrays that it holds.

    Args:
        value: an array, a jaxpr, a parameter of a primitive, or anything else.
        copy_part: called for each part of `value` that may hold arrays itself.

    Returns:
        `value` itself where there is nothing to copy, because the caches of JAX know
        jaxprs by identity.
    """
    if isinstance(value, np.ndarray):
        return value.copy()  # keeps the class: JAX has a subclass with a weak type
    if type(value) in (tuple, list):
        parts = [copy_part(part) for part in value]
        return value if _are_same(parts, value) else type(value)(parts)
    if not _compat.is_jaxpr(value):
        return value
    given, inner = getattr(value, "consts", []), _without_constants(value)
    consts = copy_part(given)
    eqns = [_copy_in_equation(eqn, copy_part) for eqn in inner.eqns]
    outvars = [_copy_in_atom(x) for x in inner.outvars]
    if not (_are_same(eqns, inner.eqns) and _are_same(outvars, inner.outvars)):
        inner = inner.replace(eqns=eqns, outvars=outvars)
    elif consts is given:
        return value
    if hasattr(inner, "with_consts"):  # JAX 0.12
        return inner.with_consts(consts)
    return inner if type(value) is Jaxpr else ClosedJaxpr(inner, consts)


def _without_constants(jaxpr: Any) -> Any:
    """Return the jaxpr in a closed one; as of JAX 0.12 these are one type."""
    return jaxpr if type(jaxpr) is Jaxpr else jaxpr.jaxpr


def _copy_in_equation(eqn: Any, copy_part: Callable[[Any], Any]) -> Any:
    params = {name: copy_part(x) for name, x in eqn.params.items()}
    invars = [_copy_in_atom(x) for x in eqn.invars]
    if _are_same(params.values(), eqn.params.values()) and _are_same(invars, eqn.invars):
        return eqn
    return eqn.replace(params=params, invars=invars)


def _copy_in_atom(atom: Any) -> Any:
    is_array = isinstance(atom, Literal) and isinstance(atom.val, np.ndarray)
    return Literal(atom.val.copy(), atom.aval) if is_array else atom


def _are_same(copies: Any, originals: Any) -> bool:
    return all(a is b for a, b in zip(copies, originals, strict=True))


class NumpyCopies:
    """Copies of the NumPy arrays that one run of a body has used.

    What is recorded is computed once all runs are over and the program is traced, or
    compiled. By then the body may have used the same buffer for other numbers.
    """

    def __init__(self) -> None:
        self._copies: dict[Hashable, tuple[Any, Any]] = {}  # originals and copies

    def copied(self, value: Any) -> Any:
        """Return `value` with copies of the NumPy arrays in it, which the body may change.

        An array is copied again whenever its content has changed. One copy serves all equal
        views of the same memory, and one copy of a jaxpr all its uses, because JAX knows
        jaxprs by identity. A jaxpr is not looked at again: a function that was traced has
        the constants of that moment.
        """
        if isinstance(value, np.ndarray):
            memory = value.__array_interface__["data"][0], value.strides
            weak = getattr(value, "weak_type", None)
            key: Hashable = (memory, value.shape, value.dtype, weak)
            _, copy = self._copies.get(key, (None, None))
            if copy is not None and copy.tobytes() == value.tobytes():
                return copy
        elif _compat.is_jaxpr(value):
            key = id(value)
            if not holds_numpy(value):
                return value
            if key in self._copies:
                return self._copies[key][1]
        elif type(value) in (tuple, list):
            return copy_numpy(value, self.copied)
        else:
            return value
        # The original is kept, too, so that nothing else gets its memory or its id.
        self._copies[key] = value, copy_numpy(value, self.copied)
        return self._copies[key][1]

    def clear(self) -> None:
        """Let all go, once the run is over."""
        self._copies.clear()
