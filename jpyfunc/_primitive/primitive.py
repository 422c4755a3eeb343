"""`py_func_p`: its parameters, its effects, its bind, impl and abstract evaluation."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Effect

from jpyfunc import _compat
from jpyfunc._bodies.batch import Batch
from jpyfunc._bodies.body import Body
from jpyfunc._errors import refuse_partial
from jpyfunc._interpreters.host_primitive import HostPrimitive
from jpyfunc._mesh import align, like_operands
from jpyfunc._runtime.clients import default_device
from jpyfunc._runtime.configuration import Config
from jpyfunc._runtime.context import current
from jpyfunc._runtime.profile import measured
from jpyfunc._runtime.transfers import put


class PyFuncPrimitive(HostPrimitive):
    """The primitive of all calls, which other bodies run under their own trace."""

    def evaluate(self, operands: Sequence[Any], params: dict[str, Any]) -> list[Any]:
        return _evaluate(params["params"].body, operands, default_device())

    def has_rules(self, params: dict[str, Any]) -> bool:
        return params["params"].body.function.rules is not None


py_func_p = PyFuncPrimitive("py_func")
py_func_p.multiple_results = True


@dataclasses.dataclass(frozen=True, slots=True, weakref_slot=True)
class Params:
    """The one parameter of a bind of `py_func_p`.

    JAX holds it weakly in its caches, so that a body goes when the programs do that call
    it. They find it while it lives, so equal ones that live are one.

    Attributes:
        body: what runs on the host.
        stateful: whether it runs exactly once per execution, its results used or not.
        ordered: whether it runs in program order with other ordered calls.
        vmap_method: a key of `BATCHERS`.
        config: the caller's, as `current_config` gave it.
    """

    body: Body
    stateful: bool
    ordered: bool
    vmap_method: str
    config: Config

    @property
    def key(self) -> tuple[Any, ...]:
        """What equal ones have in common."""
        kinds = (self.stateful, self.ordered, self.vmap_method, self.config)
        return (self.body, *kinds)

    @property
    def name(self) -> str:
        """What errors call the user's function."""
        return self.body.function.label

    def derived(self, body: Body) -> Params:
        """Parameters of a call that re-runs this one's body for its derivative.

        It is pure whatever the call was: how often a derivative re-runs the body is
        the business of the transform, and an unused one should go.
        """
        return dataclasses.replace(self, body=body, stateful=False, ordered=False)

    def __repr__(self) -> str:
        return self.body.description


@dataclasses.dataclass(frozen=True, slots=True)
class StatefulEffect(Effect):
    """What keeps a stateful call in a program, however its results are used.

    Attributes:
        name: what errors call the user's function.
        returns: whether it returns anything. What does not is stateful without being said
            to be, and cannot be made pure: nothing would be left of it.
    """

    name: str
    returns: bool

    @property
    def remedy(self) -> str:
        """What to write where a call may run more often, or less, than the program says."""
        if self.returns:
            return "make the call pure"
        return (
            "use jax.debug.callback, since it returns nothing, or let it return what it is "
            "given, so that it is pure: x = py_func(lambda x: (print(x), x)[1], [x], x)"
        )

    # JAX prints an effect where it refuses one, so this is part of an error's text.
    def __repr__(self) -> str:
        return (
            f"{self.name} is stateful (stateful=True, ordered=True or no results) and must "
            "run once, but jax.checkpoint would run it again for the gradient; call it "
            f"outside jax.checkpoint, or {self.remedy}"
        )

    __str__ = __repr__


class OrderedEffect(Effect):
    """What keeps ordered calls in program order: one token that all of them pass on."""

    def __repr__(self) -> str:
        return "the order of calls with ordered=True"

    __str__ = __repr__


ORDERED = OrderedEffect()
_compat.hold_weakly(Params)
_compat.register_effect(StatefulEffect, ordered=False)
_compat.register_effect(OrderedEffect, ordered=True)


_living: weakref.WeakValueDictionary[Any, Params] = weakref.WeakValueDictionary()


def bind(operands: Sequence[Any], params: Params) -> list[Any]:
    """Bind `py_func_p`: every rule that makes another call makes it here."""
    params = _living.setdefault(params.key, params)
    return py_func_p.bind(*align(operands), params=params)


def _py_func_abstract_eval(
    *avals: ShapedArray, params: Params
) -> tuple[list[ShapedArray], set[Effect]]:
    """Avals and effects of the results."""
    effects: set[Effect] = set()
    if params.stateful:
        effects.add(StatefulEffect(params.name, bool(params.body.function.out_avals)))
    if params.ordered:
        effects.add(ORDERED)
    out_avals = [like_operands(aval, avals) for aval in params.body.out_avals]
    return out_avals, effects


def _py_func_impl(*operands: Any, params: Params) -> list[jax.Array]:
    """Run the body at once, here: eager calls under a transform come to this."""
    params.body.check_differentiable()
    if params.ordered:
        jax.effects_barrier()  # what was dispatched before it runs before it
    arrays = [jnp.asarray(x) for x in operands]
    if isinstance(params.body, Batch) or params.body.function.is_host_function:
        refuse_partial(arrays, params.name)
    devices = set().union(*(x.devices() for x in arrays))
    device = devices.pop() if len(devices) == 1 else default_device()
    with _compat.no_axis_names():
        results = _evaluate(params.body, arrays, device, graphs=())
    is_foreign = (
        params.body.function.is_host_function
    )  # the user may write to what it returned
    return [
        _as_declared(result, aval)
        if isinstance(result, jax.Array)
        else put(result, aval, device, copy=is_foreign)
        for result, aval in zip(results, params.body.out_avals, strict=True)
    ]


def _evaluate(
    body: Body, operands: Sequence[Any], device: _compat.Device, **changes: Any
) -> list[Any]:
    context = dataclasses.replace(current(), device=device, **changes)
    return measured(body.row, context, operands, body.evaluate)


def _as_declared(result: jax.Array, aval: ShapedArray) -> jax.Array:
    """A result that is strong where it is declared so, as it is under jit."""
    return jnp.asarray(result, aval.dtype) if result.weak_type > aval.weak_type else result
