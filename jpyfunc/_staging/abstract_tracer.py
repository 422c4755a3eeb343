"""Arrays that have a shape and a dtype and no data."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.sharding import ManualAxisType

from jpyfunc._frames import line_of, user_frame
from jpyfunc._interpreters.base_tracer import BodyTracer, UnreadValue


class NeedsValueError(TypeError):
    """The body used an abstract value for more than a truth test."""


class AbstractTracer(BodyTracer):
    """An array of which only the aval is known.

    A truth test is answered by its trace. Whatever else needs the value is refused, and
    recorded, because the body may catch the exception.

    Attributes:
        number: its position among the values of the run.
        is_constant: whether it depends on no operand of the body.
        value: of a constant, its data, which the body may look at; None once a loop has
            carried it, or what it was computed from.
    """

    __slots__ = ("_aval", "is_constant", "number", "value")

    def __init__(
        self, trace: Any, aval: ShapedArray, number: int, is_constant: bool = False
    ) -> None:
        self.body_trace = trace
        self._aval = aval
        self.number = number
        self.is_constant = is_constant
        self.value: jax.Array | None = None

    @property
    def aval(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        # Whatever is done with an array begins by asking for this, so that one that is
        # used after its run is found here.
        if not self.body_trace.is_open:
            raise self.body_trace.left_behind()
        return self._aval

    def release(self, axes: frozenset[str]) -> None:
        """Have no value from now on, and vary over these manual axes: a loop changes it."""
        self.value = None
        if self._aval.manual_axis_type.varying != axes:
            varying = ManualAxisType(varying=axes)
            self._aval = self._aval.update(manual_axis_type=varying)

    def to_concrete_value(self) -> Any:
        if self.value is not None:
            return self.value
        # A test in a function that the body differentiates or maps is asked of a tracer of
        # `jax.grad` or `jax.vmap`, which asks for its primal's value here.
        if self.aval.dtype == jnp.bool_ and self.aval.size == 1:
            return UnreadValue(self)
        return None

    def decide(self) -> bool:
        return self.body_trace.answer(self) if self.value is None else bool(self.value)

    def placement(self, name: str) -> Any:
        return super().placement(name) if self.value is None else getattr(self.value, name)

    def concrete(self, use: str) -> jax.Array:
        """Return the value of a constant, and refuse a use that needs another.

        Raises:
            NeedsValueError: it has none.
        """
        if self.value is not None:
            return self.value
        if self.is_constant:
            self.body_trace.loops.keep_folded()
        use = f"{use} of {self.aval.str_short()}"
        self.body_trace.record_refusal(use)
        raise NeedsValueError(use)

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __repr__(self) -> str:
        if not self.body_trace.is_open:
            return f"Abstract({self._aval.str_short()}, left behind)"
        # The text has no data. If it is printed that does no harm, but what else the body
        # does with it, such as a key of a dict, would differ from what it does with data.
        if not line_of(user_frame()).startswith("print("):
            self.body_trace.record_refusal(f"text of {self.aval.str_short()}")
        return f"Abstract({self.aval.str_short()})"


def is_abstract(value: Any) -> bool:
    """Tell whether `value` is an array that has no data."""
    return isinstance(value, AbstractTracer)
