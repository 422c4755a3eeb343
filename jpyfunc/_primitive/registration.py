"""Registration of every rule of `py_func_p`. Importing this module is what registers."""

from jax.interpreters import ad, batching, mlir

from jpyfunc import _compat
from jpyfunc._primitive.autodiff import (
    _py_func_dce,
    _py_func_jvp,
    _py_func_transpose,
)
from jpyfunc._primitive.batching import _py_func_batching
from jpyfunc._primitive.loops import guard_stateful_calls
from jpyfunc._primitive.lowering import _py_func_lowering
from jpyfunc._primitive.primitive import (
    _py_func_abstract_eval,
    _py_func_impl,
    py_func_p,
)

py_func_p.def_impl(_py_func_impl)
py_func_p.def_effectful_abstract_eval(_py_func_abstract_eval)
ad.primitive_jvps[py_func_p] = _py_func_jvp
ad.primitive_transposes[py_func_p] = _py_func_transpose
batching.primitive_batchers[py_func_p] = _py_func_batching
guard_stateful_calls()
_compat.register_dce(py_func_p, _py_func_dce)
# Every call site has its own slot in the list of host callbacks of its program, so a
# lowering that is shared between call sites would be wrong on TPU.
mlir.register_lowering(py_func_p, _py_func_lowering, cacheable=False)
_compat.lower_with_devices(py_func_p)
