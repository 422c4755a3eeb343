"""The arrays that a differentiated body sees, and which uses of them detach a gradient.

Uses are treated as in PyTorch, whose users know them: reading a scalar warns, as `float(x)`
of a tensor that requires a gradient does, and converting to NumPy raises.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from jpyfunc._errors import GradientCutWarning, NotDifferentiableError, see
from jpyfunc._frames import line_of, place_of_frame, user_frame, warn_at
from jpyfunc._interpreters.base_tracer import BodyTracer
from jpyfunc._interpreters.operations import aval_of
from jpyfunc._types import Array, Value

REMEDIES = (
    "Write jax.lax.stop_gradient(x) to read the value without its gradient, "
    "jax.custom_jvp or jax.custom_vjp in or around the body to define the gradient, or "
    "numpy_func for a function that has none."
)


def is_tape_tracer(value: object) -> TypeGuard[TapeTracer]:
    """Whether `value` is an array that a tape differentiates."""
    return type(value) is TapeTracer


def value_if_over(value: Value) -> Value:
    """The array that a tracer stands for if its run is over; anything else as it is."""
    return value.full_lower() if type(value) is TapeTracer else value


class TapeTracer(BodyTracer):
    """An array that a tape differentiates. It has a value, and looks like it.

    Attributes:
        value: what it stands for: an array, or a tracer of an outer tape.
        slot: its number on the tape.
    """

    __slots__ = ("slot", "value")

    def __init__(self, trace: Any, value: Array, slot: int) -> None:
        self.body_trace = trace
        self.aval = aval_of(value)
        self.value = value
        self.slot = slot

    @property
    def array(self) -> Any:
        """The value without any tapes around it."""
        value = self.value
        while type(value) is TapeTracer:
            value = value.value
        return value

    # The tracers of `jax.grad` and the like within a body ask their primal for its value,
    # for a truth test or a size.
    def to_concrete_value(self) -> Any:
        return self.array

    # JAX asks for this before it runs an operation that nothing traces. So an array that a
    # body kept is an ordinary one once the run is over.
    def full_lower(self) -> Any:
        return self if self.body_trace.is_open else self.array

    def __repr__(self) -> str:
        return repr(self.array)

    def __str__(self) -> str:
        return str(self.array)

    def concrete(self, use: str) -> Any:
        return self.array

    def placement(self, name: str) -> Any:
        return getattr(self.array, name)

    def detached(self, use: str) -> Any:
        trace = self.body_trace
        if trace.is_open:
            frame = user_frame()
            trace.reads.append(place_of_frame(frame))
            warn_at(
                frame,
                f"{trace.label} is differentiated, and {use} reads a value that its "
                f"gradient flows through{trace.reads[-1]}: what is computed from the "
                "Python number has no gradient. If that is intended, write "
                "jax.lax.stop_gradient(x) there." + see("GradientCutWarning"),
                GradientCutWarning,
            )
        return self.array

    def exported(self, to: str) -> Any:
        trace = self.body_trace
        if trace.is_open:
            frame = user_frame()
            raise NotDifferentiableError(
                f"{trace.label} is differentiated, and an array that its gradient flows "
                f"through is converted to {to}{place_of_frame(frame)}\n"
                f"    {line_of(frame)}\nwhich would lose the gradient. {REMEDIES}"
                + see("An array is converted to NumPy")
            )
        return self.array
