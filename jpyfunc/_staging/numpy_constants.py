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


def numpy_arrays_in(value: Any) -> tuple[np.ndarray, ...]:
    """Return the arrays that a constant, or a parameter of a primitive, is or holds."""
    if isinstance(value, np.ndarray):
        return (value,)
    if type(value) in (tuple, list):
        return tuple(array for part in value for array in numpy_arrays_in(part))
    return _numpy_arrays_in_jaxpr(value) if _compat.is_jaxpr(value) else ()


@_compat.weakref_lru_cache  # a jaxpr never changes, though arrays may
def _numpy_arrays_in_jaxpr(jaxpr: Any) -> tuple[np.ndarray, ...]:
    inner = _without_constants(jaxpr)
    atoms = [*inner.outvars, *(x for eqn in inner.eqns for x in eqn.invars)]
    literals = [x.val for x in atoms if type(x) is Literal]
    params = [x for eqn in inner.eqns for x in eqn.params.values()]
    return numpy_arrays_in([*getattr(jaxpr, "consts", []), *literals, *params])


def copy_numpy(value: Any, copy_part: Callable[[Any], Any]) -> Any:
    """Return `value` with copies in the place of the NumPy arrays that it holds.

    Args:
        value: a tuple, list or jaxpr.
        copy_part: called for each part of `value` that may hold arrays itself.

    Returns:
        `value` itself where there is nothing to copy, because the caches of JAX know
        jaxprs by identity.
    """
    if type(value) in (tuple, list):
        parts = [copy_part(part) for part in value]
        return value if _are_same(parts, value) else type(value)(parts)
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
    """Copies of the NumPy arrays that the runs of a body use.

    What is recorded is computed once all runs are over and the program is traced, or
    compiled. By then the body may have used the same buffer for other numbers.
    """

    def __init__(self) -> None:
        # Originals and copies. The originals are kept, too, so that nothing else gets their
        # memory or their ids.
        self._arrays: dict[Hashable, tuple[Any, Any]] = {}
        self._jaxprs: dict[int, tuple[Any, Any]] = {}
        self._used: set[int] = set()  # ids of the jaxprs that this run has used

    def copied(self, value: Any) -> Any:
        """Return `value` with copies of the NumPy arrays in it, which the body may change.

        An array is copied again whenever its content has changed. One copy serves all equal
        views of the same memory. One copy of a jaxpr serves all runs that find the same
        numbers in it, because JAX knows jaxprs by identity: that of `x % 3` holds arrays,
        and what is known is computed at once, by a program that takes 40 ms to compile. In
        one run, a jaxpr is not looked at again: a function that was traced has the
        constants of that moment.
        """
        if isinstance(value, np.ndarray):
            memory = value.__array_interface__["data"][0], value.strides
            weak = getattr(value, "weak_type", None)
            key = memory, value.shape, value.dtype, weak
            _, copy = self._arrays.get(key, (None, None))
            if copy is None or copy.tobytes() != value.tobytes():
                copy = value.copy()  # of its class: JAX has one with a weak type
                self._arrays[key] = value, copy
            return copy
        if type(value) in (tuple, list):
            return copy_numpy(value, self.copied)
        if not _compat.is_jaxpr(value) or not numpy_arrays_in(value):
            return value
        known = self._jaxprs.get(id(value))
        if known is None or (id(value) not in self._used and not _are_equal(*known)):
            known = value, copy_numpy(value, self.copied)
            self._jaxprs[id(value)] = known
        self._used.add(id(value))
        return known[1]

    def end_run(self) -> None:
        """Let the arrays of a run go. Those in jaxprs are kept for the runs that follow."""
        self._arrays.clear()
        self._used.clear()


def _are_equal(original: Any, copy: Any) -> bool:
    """Tell whether the arrays in a jaxpr are still what they were when it was copied."""
    arrays = zip(numpy_arrays_in(original), numpy_arrays_in(copy), strict=True)
    return all(a.tobytes() == b.tobytes() for a, b in arrays)
