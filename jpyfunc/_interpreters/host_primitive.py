"""Primitives whose bind runs Python, which the interpreters of a body run themselves."""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import Primitive

from jpyfunc._types import Array, Value


class HostPrimitive(Primitive):
    """A primitive that runs Python when it is bound on values.

    A trace that runs a body does not compile such a bind: it calls `evaluate` under
    itself, so that what the Python function does goes to the same trace, and jaxprs that
    contain one are run equation by equation.
    """

    def evaluate(self, operands: Sequence[Value], params: dict[str, object]) -> list[Array]:
        """Run the Python function, under the current trace."""
        raise NotImplementedError

    def has_rules(self, params: dict[str, object]) -> bool:
        """Whether the function has derivative rules of its own, which are then used."""
        raise NotImplementedError
