"""Effects: what keeps stateful and ordered calls in a program, and says so in errors."""

from __future__ import annotations

import dataclasses

from jax.extend.core import Effect

from jpyfunc._errors import see


@dataclasses.dataclass(frozen=True, slots=True)
class StatefulEffect(Effect):
    """The effect of a stateful call, which keeps it in a program whose results are unused.

    Attributes:
        name: what errors call the user's function.
        returns: whether the function returns anything. One that does not is stateful
            without being declared so, and cannot be made pure: JAX would drop the call.
    """

    name: str
    returns: bool

    @property
    def remedy(self) -> str:
        """The advice of errors where a call could run more than once, or not at all."""
        if self.returns:
            return "make the call pure"
        return (
            "use jax.debug.callback, since it returns nothing, or let it return what it is "
            "given, so that it is pure: x = py_func(lambda x: (print(x), x)[1], [x], x)"
        )

    # `jax.checkpoint` refuses an effect by an error that has this text in it.
    def __repr__(self) -> str:
        return (
            f"{self.name} is stateful (stateful=True, ordered=True or no results) and must "
            "run once, but jax.checkpoint would run it again for the gradient; call it "
            f"outside jax.checkpoint, or {self.remedy}."
            + see("A stateful call under checkpoint")
        )

    __str__ = __repr__


class OrderedEffect(Effect):
    """The effect of all ordered calls, which pass one token on in program order."""

    def __repr__(self) -> str:
        return "the order of calls with ordered=True"

    __str__ = __repr__


ORDERED = OrderedEffect()
