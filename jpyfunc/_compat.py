"""Every private or version-dependent name of JAX, each with the reason it is needed.

No other module has a private name of JAX, neither as an import nor as an attribute. In
brackets stand the versions that have the names of an entry, among 0.10.2, 0.11.0, 0.11.1,
0.11.2, 0.12.0 and 0.12.0.1: [all], [until one] or [since one]. What may be None has a
fallback, which is tested.
"""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import sys
from typing import Any

import jax
from jax._src import callback as _callback
from jax._src import config as _config
from jax._src import core as _core
from jax._src import custom_batching as _custom_batching
from jax._src import debugging as _debugging
from jax._src import dispatch as _dispatch
from jax._src import effects as _effects
from jax._src import linear_util as _linear_util
from jax._src import mesh as _mesh
from jax._src import sharding_impls as _sharding_impls
from jax._src import util as _util
from jax._src.interpreters import ad as _ad
from jax._src.interpreters import batching as _batching
from jax._src.interpreters import mlir as _mlir
from jax._src.lax.control_flow import loops as _loops
from jax._src.lib import xla_client as _xla_client
from jax.extend.core import ClosedJaxpr, Effect, Jaxpr
from jax.interpreters import partial_eval

# What `jax.devices()` returns, and its client: no types to a type checker. [all]
Device = Any
Client = Any

# The trace that runs operations at once, and its type. [all]
eval_trace = _core.eval_trace
EvalTrace = _core.EvalTrace

# The slot of a tracer in which JAX keeps its trace, for an alias with a public name. [all]
TRACE_SLOT: Any = jax.core.Tracer._trace

# What JAX asks of a tracer that is used where its trace is not the current one, to say in
# an error that it has leaked. [all]
ASKED_OF_LEAKED = "_debug_info"

# A cache whose entries end with their first argument, for example a jaxpr. [all]
weakref_lru_cache = _util.weakref_lru_cache

# The stores of functions that JAX has wrapped, which `_interpreters/rule_stores.py`
# describes. [all] None where JAX has none like these; custom rules are not cached then.
Store: Any = getattr(_linear_util, "Store", None)
StoreException: Any = getattr(_linear_util, "StoreException", None)
if not {"f", "populate_stores", "stores", "transforms"} <= {*dir(_linear_util.WrappedFun)}:
    Store = None

# Primitives that call the host, those of `jax.debug` once per element of a batch. [all]
DEBUG_PRIMITIVES = {_debugging.debug_callback_p, _debugging.debug_print_p}
CALLBACKS = DEBUG_PRIMITIVES | {_callback.pure_callback_p, _callback.io_callback_p}
DEBUG_EFFECTS = (_debugging.DebugEffect, _debugging.OrderedDebugEffect)

# A call of what `jax.custom_batching.custom_vmap` made. [all]
custom_vmap_p = _custom_batching.custom_vmap_p

# JAX's objects for its options, by their public names. `jax.config` has their values, too,
# but takes 40 ns longer to read one, and has no context manager for some. [all]
config_states = _config.config_states
default_device: Any = _config.default_device

# The options that JAX's traces depend on; a test compares them with those of ours. [all]
trace_context_names = _config.trace_context_names

# Makes a second client of the CPU. [all] None: bodies share the client of the programs.
make_cpu_client: Any = getattr(_xla_client, "make_cpu_client", None)

# Makes a NumPy array an uncommitted one, weak or not; `jax.device_put` commits. [all]
batched_device_put = _xla_client.batched_device_put

# The custom-call targets that call a Python function, by platform. A call has the index of
# its function among the callbacks of the module. [all] None: `emit_python_callback`.
callback_targets: Any = {
    "cpu": "xla_ffi_python_cpu_callback",
    "cuda": "xla_ffi_python_gpu_callback",
    "rocm": "xla_ffi_python_gpu_callback",
}

# The annotation by which a custom call runs on one device of several, and its parts. [all]
callback_op_sharding = _callback._callback_op_sharding
set_sharding = _mlir.set_sharding
SdyArray = _sharding_impls.SdyArray
SdyArrayList = _sharding_impls.SdyArrayList

# The aval of tokens, which JAX compares by identity; the tokens of each thread. [all]
abstract_token = _core.abstract_token
RuntimeTokenSet = _dispatch.RuntimeTokenSet
runtime_tokens = _dispatch.runtime_tokens

# The manual axes of a mesh that results vary over; raises where operands differ. [all]
standard_vma_rule = _core.standard_vma_rule


def has_mesh() -> bool:  # [all]
    """Whether a mesh is set on this thread, for `no_mesh` to unset."""
    return not (_mesh.get_abstract_mesh().empty and _mesh.get_concrete_mesh().empty)


class no_mesh:  # [all] # noqa: N801
    """Unset this thread's mesh: `jax.set_mesh` sets one, but takes no empty one."""

    def __enter__(self) -> None:
        self._abstract = _mesh.use_abstract_mesh(_mesh.empty_abstract_mesh)
        self._abstract.__enter__()
        self._concrete = _mesh_state.device_context.swap_local(_mesh.empty_concrete_mesh)

    def __exit__(self, *exc_info: object) -> None:
        _mesh_state.device_context.set_local(self._concrete)
        self._abstract.__exit__(*exc_info)


# A jaxpr, differentiated with respect to some operands, or batched along some axes. Each
# also tells which results have tangents, or are batched; no public function does. [all]
jvp_jaxpr = _ad.jvp_jaxpr
batch_jaxpr = _batching.batch_jaxpr
batch_jaxpr_axes = _batching.batch_jaxpr_axes

# Where the thread's concrete mesh is: [until 0.11.1] `config`, [since 0.11.2] `mesh`.
_mesh_state: Any = _mesh if hasattr(_mesh, "device_context") else _config


def current_trace() -> Any:  # [all]
    """The trace that operations on this thread go to: a transform's, or `eval_trace`."""
    return _core.trace_ctx.trace or eval_trace


class KeyedTrace(_core.Trace):  # [all]
    """A trace that says what JAX's caches know it by, in the place of its `_weakref`.

    JAX's constructor of traces sets that attribute to a weak reference to the trace. It is
    part of the keys of `jax.jit`, and what `get_opaque_trace_state` compares.
    """

    own_key: Any  # what JAX has set
    shared_key: Any  # what the caches of `jax.jit` get

    @property
    def state_key(self) -> Any:
        """The key that `get_opaque_trace_state` returns."""
        return self.own_key

    @property
    def _weakref(self) -> Any:
        is_for_state = sys._getframe(1).f_code is _STATE_CODE
        return self.state_key if is_for_state else self.shared_key

    @_weakref.setter
    def _weakref(self, own: Any) -> None:
        self.own_key = own


# What `KeyedTrace` needs of JAX: a key, and the code that asks for `state_key`. [all]
EVAL_TRACE_KEY = eval_trace._weakref
_STATE_CODE = _core.get_opaque_trace_state.__code__


class no_axis_names:  # [all] # noqa: N801
    """Unset the axis names of a `vmap` that runs eagerly, which a body is not under."""

    def __enter__(self) -> None:
        self._before = _core.trace_ctx.axis_env
        _core.trace_ctx.set_axis_env(_core.top_axis_env)

    def __exit__(self, *exc_info: object) -> None:
        _core.trace_ctx.set_axis_env(self._before)


def is_eager() -> bool:  # [all]
    """Whether `eval_trace` is the current trace: inside a bind there may be none."""
    return _core.trace_ctx.trace is eval_trace


def is_of_trace_of(value: Any, tracer: Any) -> bool:  # [all]
    """Whether `value` is a tracer of the trace that `tracer` is of.

    Inside `jax.vjp(f, x)`, whether a value may depend on `x`: JAX leaves what does not to
    the trace around it. It has no public function that tells.
    """
    return getattr(value, "_trace", None) is tracer._trace


def is_jaxpr(value: Any) -> bool:  # [all]; one type [since 0.11.0]
    """Whether `value` is a jaxpr, closed or not."""
    return isinstance(value, (ClosedJaxpr, Jaxpr))


def copied_jaxpr(jaxpr: Any) -> Any:  # [all]
    """Make another object of the same content."""
    if hasattr(jaxpr, "with_consts"):  # [since 0.11.0]
        return jaxpr.with_consts(jaxpr.consts)
    if isinstance(jaxpr, ClosedJaxpr):
        return ClosedJaxpr(jaxpr.jaxpr, jaxpr.consts)
    return jaxpr.replace()


def opened(jaxpr: Any) -> Any:  # [all]
    """Make a closed jaxpr a function whose first operands are its constants.

    The function does not keep `jaxpr` alive, nor the constants.
    """
    count = len(jaxpr.consts)
    if hasattr(jaxpr, "with_consts"):  # [since 0.11.0], and 0.11.0 wants as many
        inner = jaxpr.with_consts([None] * count)
    else:
        inner = jaxpr.jaxpr
    return lambda *operands: jax.core.eval_jaxpr(inner, operands[:count], *operands[count:])


def register_effect(effect_type: type[Effect], *, ordered: bool) -> None:  # [all]
    """Let programs hold `effect_type`: when lowered, in control flow, in custom rules.

    Also keep what has it through partial evaluation, though no derivative needs it.
    """
    names = "lowerable partial_eval_kept control_flow_allowed custom_derivatives_allowed"
    for name in (names + " ordered shardable_ordered" * ordered).split():
        getattr(_effects, f"{name}_effects").add_type(effect_type)


# Keeps JAX's caches of abstract evaluation from holding parameters of a type alive. [all]
hold_weakly = _util.weakref_cache_key_types.add


def register_dce(primitive: Any, rule: Any) -> None:  # [all]
    """Register what is left of an equation when some of its results are unused."""
    # [since 0.12.0] rules also get which operands are alive.
    partial_eval.dce_rules[primitive] = lambda used, *rest: rule(used, rest[-1])


# Asks JAX to tell the lowering rule of a primitive which devices will run it. [all]
lower_with_devices = _dispatch.prim_requires_devices_during_lowering.add


def wrap_hoisting_of_scan(wrap: Any) -> None:  # [all]
    """Replace the function by which `scan` moves residuals out of its loop."""
    _loops._scan_known_hoisting = wrap(_loops._scan_known_hoisting)
