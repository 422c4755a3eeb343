"""The stores in which JAX keeps the result trees of functions with custom rules.

`jax.custom_jvp` and `jax.custom_vjp` call a primitive with the function and its rules, each
wrapped by JAX so that calling it also stores the tree of its results (and, within a
`jax.vmap`, their batch axes) in a store of that wrapper. When the primitive returns, JAX
looks into the stores of the function and of its forward rule, takes for granted that
exactly one of the two was called, and builds the results by the tree that it finds. A
transposed `custom_vjp` asks the store of its forward rule again, for the tree of the
residuals that its backward rule takes.

A tape breaks with that in three places:

1. A cached operation is found again without calling anything, so no store is filled. The
   ones of the function are filled with what they held when the operation was made
   (`refill`).
2. To linearize an operation, while the primitive is still being called, JAX calls the
   forward rule, although the function was called, too, when the operation was made: both
   would be filled. Those of the rules are emptied when the primitive returns (`take`), and
   filled again when the derivative is traced (`restore`).
3. A tape that is differentiated again calls the same wrappers once more. Most stores accept
   what equals that which they hold, but not those of batch axes (`let_refill`).

None of that is public. Where JAX has no such stores, `is_available()` is false, and a
function with custom rules is an uncached operation, which JAX calls once, as it means to.
Tapes with such an operation are not replayed: the body runs again for a second derivative.
"""

from __future__ import annotations

from typing import Any

from jpyfunc import _compat

Filled = list[tuple[Any, Any]]


def is_available() -> bool:
    """Whether JAX has the stores that are described here."""
    return _compat.Store is not None


def refill(function: Any, stores: Any) -> None:
    """Fill the stores of a wrapped function with what another call of it has stored."""
    function.populate_stores(stores)


def take(function: Any) -> Filled:
    """Empty the stores of a wrapped function; return the filled ones with their values."""
    filled = []
    for store in function.stores:
        if store is not None:
            try:
                filled.append((store, store.val))
            except _compat.StoreException:  # it is empty
                continue
            store.reset()
    return filled


def restore(filled: Filled) -> None:
    """Fill the stores that `take` has emptied."""
    for store, value in filled:
        store.reset()
        store.store(value)


def let_refill(function: Any) -> None:
    """Let a wrapped function be called again, although its stores are filled."""
    if is_available():
        for store in function.stores:
            if type(store) is _compat.Store:
                store.__class__ = _RefillableStore


_Store: Any = _compat.Store or object


class _RefillableStore(_Store):
    """A store that takes another value in the place of the one that it holds."""

    __slots__ = ()

    def store(self, val: object) -> None:
        self._val = val
