"""What a differentiated body sees: arrays with values, and which reads cut a gradient.

Reads follow PyTorch, whose users know them: a scalar read warns, as `float(x)` of a tensor
that requires a gradient does, and a conversion to NumPy raises.
"""

from __future__ import annotations

from typing import Any

from jpyfunc._errors import GradientCutWarning, NotDifferentiableError
from jpyfunc._frames import line_of, place_of_frame, user_frame, warn_at
from jpyfunc._interpreters.base_tracer import BodyTracer
from jpyfunc._interpreters.operations import aval_of

REMEDIES = (
    "Write jax.lax.stop_gradient(x) to read the value without its gradient, "
    "jax.custom_jvp or jax.custom_vjp in or around the body to say what the gradient "
    "is, or numpy_func for a function that has none."
)


def is_tape_tracer(value: Any) -> bool:
    """Whether `value` is differentiated by a tape, and has a value."""
    return type(value) is TapeTracer


def value_if_over(value: Any) -> Any:
    """`value`, or the array that it is if it was kept from a run that is over."""
    return value.full_lower() if type(value) is TapeTracer else value


class TapeTracer(BodyTracer):
    """An array that a tape differentiates. It has a value, and looks like it."""

    __slots__ = ("slot", "value")

    def __init__(self, tape: Any, value: Any, slot: int) -> None:
        self._trace = tape
        self.aval = aval_of(value)
        self.value = value
        self.slot = slot

    @property
    def array(self) -> Any:
        """The value, which is itself on a tape where tapes nest, without any."""
        value = self.value
        while type(value) is TapeTracer:
            value = value.value
        return value

    # Truth tests, `int`, indices and sizes go through this.
    def to_concrete_value(self) -> Any:
        return self.array

    # What a body keeps is its value once the run is over: JAX asks for this before it runs
    # an operation that nothing traces.
    def full_lower(self) -> Any:
        return self if self._trace.is_open else self.array

    def __repr__(self) -> str:
        return repr(self.array)

    def __str__(self) -> str:
        return str(self.array)

    def concrete(self, use: str) -> Any:
        return self.array

    def placement(self, name: str) -> Any:
        return getattr(self.array, name)

    def detached(self, use: str) -> Any:
        """The value, for a scalar that Python goes on with."""
        array, tape = self.array, self._trace
        if tape.is_open:
            frame = user_frame()
            tape.reads.append(place_of_frame(frame))
            warn_at(
                frame,
                f"{tape.label} is differentiated, and {use} reads a value that its "
                f"gradient flows through{tape.reads[-1]}: what is computed of the Python "
                "number has no gradient. If that is meant, write "
                "jax.lax.stop_gradient(x) there.",
                GradientCutWarning,
            )
        return array

    def exported(self, to: str) -> Any:
        """The value, for a conversion that no gradient flows through."""
        tape = self._trace
        if tape.is_open:
            frame = user_frame()
            raise NotDifferentiableError(
                f"{tape.label} is differentiated, and an array that its gradient flows "
                f"through is converted to {to}{place_of_frame(frame)}\n"
                f"    {line_of(frame)}\nwhere the gradient would be cut. {REMEDIES}"
            )
        return self.array
