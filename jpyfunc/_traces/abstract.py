"""Runs a body on values that have a shape and a dtype and no data."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Trace, Tracer
from jax.extend.core import set_current_trace

from jpyfunc import _compat
from jpyfunc._errors import place_of_frame, user_frame

# A loop on an abstract condition is one decision per turn, and may never end.
MAX_DECISIONS = 64


class Undecided(BaseException):
    """Too many decisions in one run. No `except Exception` of a body may catch it."""


class NeedsValueError(TypeError):
    """The body used an abstract value for more than a truth test."""


class AbstractTrace(Trace):
    """Evaluates operations on avals alone, and answers truth tests from a script."""

    def __init__(self, script: list[bool]) -> None:
        super().__init__()
        _compat.share_state(self)
        self.script = script
        self.decisions: list[bool] = []
        self._places: list[str] = []

    @property
    def branch(self) -> str:
        """Where this run left the one that its script was made from."""
        n = len(self.script)
        return f"the branch{self._places[n - 1]}" if n <= len(self._places) else "a branch"

    def decide(self) -> bool:
        n = len(self.decisions)
        if n >= MAX_DECISIONS:
            raise Undecided
        self.decisions.append(self.script[n] if n < len(self.script) else False)
        self._places.append(place_of_frame(user_frame()))
        return self.decisions[n]

    def stage_value(self, val: Any) -> Any:
        return val

    def process_primitive(self, primitive: Any, tracers: Any, params: Any, /) -> Any:
        avals = [jax.typeof(t) for t in tracers]
        outs, _ = primitive.abstract_eval(*avals, **params)
        if primitive.multiple_results:
            return [AbstractTracer(self, aval) for aval in outs]
        return AbstractTracer(self, outs)

    def process_custom_jvp_call(
        self, primitive: Any, fun: Any, jvp: Any, tracers: Any, /, **_: Any
    ) -> Any:
        return self._call(fun, tracers)

    def process_custom_vjp_call(
        self, primitive: Any, fun: Any, fwd: Any, bwd: Any, tracers: Any, /, **_: Any
    ) -> Any:
        return self._call(fun, tracers)

    def _call(self, fun: Any, tracers: Any) -> Any:
        with set_current_trace(self):
            return fun.call_wrapped(*tracers)


class AbstractTracer(Tracer):
    """An array of which only the aval is known."""

    __slots__ = ("aval",)

    aval: Any

    def __init__(self, trace: AbstractTrace, aval: Any) -> None:
        self._trace = trace
        self.aval = aval

    def to_concrete_value(self) -> Any:
        # Reached through the tracers of `jax.grad` and the like in a body, which ask
        # their primal for the truth that they are tested for.
        if self.aval.dtype == jnp.bool_ and self.aval.size == 1:
            return _UnknownBool(self)
        return None

    def __bool__(self) -> bool:
        if self.aval.size != 1:
            raise ValueError(
                "The truth value of an array with other than one element is ambiguous. "
                "Use a.any() or a.all()"
            )
        return self._trace.decide()

    def _refuse(self, what: str) -> Any:
        raise NeedsValueError(f"{what} of {self.aval.str_short()}")

    def __float__(self) -> Any:
        self._refuse("float()")

    def __int__(self) -> Any:
        self._refuse("int()")

    def __complex__(self) -> Any:
        self._refuse("complex()")

    def __index__(self) -> Any:
        self._refuse("use as an index or a size")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse("conversion to NumPy")

    def tolist(self) -> Any:
        self._refuse("tolist()")

    def item(self, *args: Any) -> Any:
        self._refuse("item()")

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __repr__(self) -> str:
        return f"Abstract({self.aval.str_short()})"


class _UnknownBool:
    """Stands for the value of an abstract bool: good for a truth test, nothing else."""

    def __init__(self, tracer: AbstractTracer) -> None:
        self._tracer = tracer

    def __bool__(self) -> bool:
        return bool(self._tracer)

    def __getattr__(self, name: str) -> Any:
        return self._tracer._refuse(f"concrete use ({name})")


def is_abstract(value: Any) -> bool:
    """Whether `value` is one of the values that `infer` calls a body with."""
    return isinstance(value, AbstractTracer)
