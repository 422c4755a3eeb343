"""Registration of every primitive, rule and effect, by importing this module."""

from jax.interpreters import ad, batching, mlir

from jpyfunc import _compat
from jpyfunc._primitive.autodiff import (
    _py_func_dce,
    _py_func_jvp,
    _py_func_transpose,
)
from jpyfunc._primitive.batching import _py_func_batching
from jpyfunc._primitive.effects import OrderedEffect, StatefulEffect
from jpyfunc._primitive.failure_report import (
    _raise_reported_abstract_eval,
    _raise_reported_lowering,
    raise_reported_p,
)
from jpyfunc._primitive.loops import guard_stateful_calls
from jpyfunc._primitive.lowering import _py_func_lowering
from jpyfunc._primitive.primitive import (
    Params,
    _py_func_abstract_eval,
    _py_func_impl,
    py_func_p,
)

_compat.hold_weakly(Params)
_compat.register_effect(StatefulEffect, ordered=False)
_compat.register_effect(OrderedEffect, ordered=True)
guard_stateful_calls()

py_func_p.def_impl(_py_func_impl)
py_func_p.def_effectful_abstract_eval(_py_func_abstract_eval)
ad.primitive_jvps[py_func_p] = _py_func_jvp
ad.primitive_transposes[py_func_p] = _py_func_transpose
batching.primitive_batchers[py_func_p] = _py_func_batching
_compat.register_dce(py_func_p, _py_func_dce)
_compat.lower_with_devices(py_func_p)
# Each host call has its own index among the callbacks of its program. A lowering that JAX
# caches would be shared by several calls, which is wrong on TPUs.
mlir.register_lowering(py_func_p, _py_func_lowering, cacheable=False)

raise_reported_p.def_abstract_eval(_raise_reported_abstract_eval)
mlir.register_lowering(raise_reported_p, _raise_reported_lowering, cacheable=False)
