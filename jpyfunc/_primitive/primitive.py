"""`py_func_p`: its parameters, its bind, its impl and its abstract evaluation."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Effect

from jpyfunc import _compat
from jpyfunc._bodies.batch import Batch
from jpyfunc._bodies.body import Body
from jpyfunc._errors import refuse_partial
from jpyfunc._interpreters.host_primitive import HostPrimitive
from jpyfunc._mesh import align, like_operands
from jpyfunc._primitive.effects import ORDERED, StatefulEffect
from jpyfunc._runtime.clients import default_device
from jpyfunc._runtime.configuration import Config
from jpyfunc._runtime.context import current
from jpyfunc._runtime.profile import measured
from jpyfunc._runtime.transfers import put
from jpyfunc._types import Array, Value


class PyFuncPrimitive(HostPrimitive):
    """The primitive of all calls; in a body, a call is evaluated under the body's trace."""

    def evaluate(self, operands: Sequence[Value], params: dict[str, Any]) -> list[Array]:
        body, device = params["params"].body, default_device()
        # A jaxpr that is run equation by equation has literals, which are Python numbers.
        arrays = [
            x
            if isinstance(x, jax.Array | np.ndarray)
            else put(np.asarray(x, aval.dtype), aval, device)
            for x, aval in zip(operands, body.in_avals, strict=True)
        ]
        return _evaluate(body, arrays, device)

    def has_rules(self, params: dict[str, Any]) -> bool:
        return params["params"].body.function.rules is not None


py_func_p = PyFuncPrimitive("py_func")
py_func_p.multiple_results = True


@dataclasses.dataclass(frozen=True, slots=True, weakref_slot=True)
class Params:
    """The one parameter of a call, that is of a bind of `py_func_p`.

    JAX's caches hold it weakly, so that a body is freed with the last program that calls
    it. They find an entry by identity as long as its parameter lives, so `bind` takes the
    living one of equal parameters.

    Attributes:
        body: what runs on the host.
        stateful: whether it runs exactly once per execution, its results used or not.
        ordered: whether it runs in program order with other ordered calls.
        vmap_method: a key of `BATCHERS`.
        config: the JAX configuration of the caller.
    """

    body: Body
    stateful: bool
    ordered: bool
    vmap_method: str
    config: Config

    @property
    def key(self) -> tuple[Hashable, ...]:
        """The fields, as a key that does not keep these parameters alive."""
        return (self.body, self.stateful, self.ordered, self.vmap_method, self.config)

    @property
    def name(self) -> str:
        """The name of the user's function in errors."""
        return self.body.function.label

    def derived(self, body: Body) -> Params:
        """Make the parameters of a call that computes a derivative of this one's body.

        That call is pure even where this one is not. The transform decides how often a
        derivative runs, and a derivative that is not used should be dropped.
        """
        return dataclasses.replace(self, body=body, stateful=False, ordered=False)

    def __repr__(self) -> str:
        return self.body.description


_living: weakref.WeakValueDictionary[Hashable, Params] = weakref.WeakValueDictionary()


def bind(operands: Sequence[Array], params: Params) -> list[jax.Array]:
    """Bind `py_func_p`; every rule makes its calls here, so that their operands agree."""
    params = _living.setdefault(params.key, params)
    return py_func_p.bind(*align(operands), params=params)


def _py_func_abstract_eval(
    *avals: ShapedArray, params: Params
) -> tuple[list[ShapedArray], set[Effect]]:
    """Avals of the results, and effects of the call."""
    effects: set[Effect] = set()
    if params.stateful:
        effects.add(StatefulEffect(params.name, bool(params.body.function.out_avals)))
    if params.ordered:
        effects.add(ORDERED)
    out_avals = [like_operands(aval, avals) for aval in params.body.out_avals]
    return out_avals, effects


def _py_func_impl(*operands: Array, params: Params) -> list[jax.Array]:
    """Run the body here and now: a call outside of a program, under a transform or not."""
    params.body.check_differentiable()
    if params.ordered:
        jax.effects_barrier()  # ordered calls that were dispatched before have to end
    arrays = [jnp.asarray(x) for x in operands]
    if isinstance(params.body, Batch) or params.body.function.is_host_function:
        refuse_partial(arrays, params.name)
    devices = set().union(*(x.devices() for x in arrays))
    device = devices.pop() if len(devices) == 1 else default_device()
    with _compat.no_axis_names():
        results = _evaluate(params.body, arrays, device, graphs=())
    # A host function may write to an array after returning it.
    copy = params.body.function.is_host_function
    return [
        _as_declared(result, aval)
        if isinstance(result, jax.Array)
        else put(result, aval, device, copy)
        for result, aval in zip(results, params.body.out_avals, strict=True)
    ]


def _evaluate(
    body: Body, operands: Sequence[Array], device: _compat.Device, **changes: object
) -> list[Array]:
    context = dataclasses.replace(current(), device=device, **changes)
    return measured(body.profile_row, context, operands, body.evaluate)


def _as_declared(result: jax.Array, aval: ShapedArray) -> jax.Array:
    """Make a weakly typed result strong where it is declared so, as under jit."""
    return jnp.asarray(result, aval.dtype) if result.weak_type > aval.weak_type else result
