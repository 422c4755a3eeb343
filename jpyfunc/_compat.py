"""Every private or version-dependent name of JAX, each with the reason it is needed.

No other module of the package imports from `jax._src`. The range of JAX versions
that these names were checked on is stated in `pyproject.toml`.
"""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax._src import ad_util as _ad_util
from jax._src import callback as _callback
from jax._src import config as _config
from jax._src import core as _core
from jax._src import dispatch as _dispatch
from jax._src import effects as _effects
from jax._src import ffi as _ffi
from jax._src import linear_util as _linear_util
from jax._src import mesh as _mesh
from jax._src import sharding_impls as _sharding_impls
from jax._src import util as _util
from jax._src.interpreters import batching as _batching
from jax._src.interpreters import mlir as _mlir
from jax._src.interpreters import partial_eval as _partial_eval
from jax._src.lax.control_flow import loops as _loops
from jax._src.lib import xla_client as _xla_client
from jax._src.pjit import jit_p as _jit_p
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Effect, Jaxpr
from jax.interpreters import mlir
from jax.sharding import PartitionSpec

from jpyfunc._limits import (
    LARGE_ARRAY_BYTES,
)
from jpyfunc._xla_bugs import sample_of_returned

# The trace that runs operations at once, and what a call of a jitted function binds.
EvalTrace = _core.EvalTrace
eval_trace = _core.eval_trace
eval_jaxpr = _core.eval_jaxpr
jit_p = _jit_p
stop_gradient_p = _ad_util.stop_gradient_p
weakref_lru_cache = _util.weakref_lru_cache

# What JAX asks of a tracer that is used where its trace is not the current one, to say in
# an error that it has leaked.
ASKED_OF_LEAKED = "_debug_info"

Device = Any  # `jax.Device` is a variable to a type checker

# The JAX configuration that changes what a body computes, or whether it raises. JAX keeps
# it per thread, so the thread that a callback runs on has nothing of what the caller set
# with a context manager. Some of it is not in every version.
CAPTURED = (
    "jax_accurate_erf_inv",
    "jax_allow_f16_reductions",
    "jax_check_static_indices",
    "jax_debug_infs",
    "jax_debug_key_reuse",
    "jax_debug_nans",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_disable_jit",
    "jax_enable_custom_prng",
    "jax_enable_x64",
    "jax_error_checking_behavior_divide",
    "jax_error_checking_behavior_nan",
    "jax_error_checking_behavior_oob",
    "jax_explicit_x64_dtypes",
    "jax_high_dynamic_range_gumbel",
    "jax_legacy_prng_key",
    "jax_log_compiles",
    "jax_mutable_array_checks",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_random_seed_offset",
    "jax_softmax_custom_jvp",
    "jax_threefry_partitionable",
    "jax_use_hlo_logistic_lowering",
)

# The rest of what JAX's traces depend on, with the reason that no body needs the caller's.
NOT_CAPTURED = {
    "a body is in no mesh and under no axis of its caller": (
        "abstract_mesh_context_manager", "axis_env_state", "check_vma", "jax_auto_pcast",
        "jax_no_collectives", "jax_raise_on_ppermute_sort_diff",
        "jax_remove_size_one_mesh_axis_from_type", "jax_use_shardy_partitioner",
        "mesh_context_manager",
    ),
    "a body has a device of its own, of the CPU": (
        "compute_on_context_manager", "jax_default_device", "jax_enable_pgle",
        "jax_pallas_enable_debug_checks", "jax_pallas_use_mosaic_gpu",
        "jax_pgle_profiling_runs", "jax_ragged_dot_use_gpu_pallas_triton_lowering",
        "jax_threefry_gpu_kernel_lowering", "jax_use_emit_pipeline_primitive",
        "layout_tracing_mode", "pallas_dynamic_shapes_export",
        "pallas_fuser_disable_nested_fuse", "pallas_grid_context",
        "pallas_tpu_interpret_mode_context_manager",
    ),
    "it is for the compiler, or says which implementation JAX takes of the same function": (
        "eager_constant_folding", "jax_custom_jvp3", "jax_custom_vjp3",
        "jax_embedded_constants_max_bytes", "jax_hlo_source_file_canonicalization_regex",
        "jax_remat3", "jax_remat_barrier_no_cotangents", "jax_scan3",
        "jax_use_direct_linearize", "jax_use_simplified_jaxpr_constants",
        "jax_xla_profile_version", "xla_metadata_context_manager",
    ),
    "where it is set, no program runs, so no body": ("jax_no_execution",),
    "only who made one with `jax.make_user_context` has it": ("user_context",),
}  # fmt: skip


# `jax.config` reads them too, but not at the cost of 40 ns each.
SETTINGS = tuple(
    _config.config_states[name] for name in CAPTURED if name in _config.config_states
)

# A body runs on the host, and what it takes and gives is there: none of that is a transfer
# which `jax.transfer_guard` is to find, though JAX would count a NumPy array as one.
_GUARDS = (
    _config.transfer_guard_host_to_device,
    _config.transfer_guard_device_to_device,
    _config.transfer_guard_device_to_host,
)


def current_settings() -> tuple[Any, ...]:
    """Values of `SETTINGS` in force on this thread."""
    return tuple(map(_value_of, SETTINGS))


_value_of = operator.attrgetter("value")


def is_debugging() -> bool:
    """Whether JAX raises where an operation gives NaN or infinity."""
    return _config.debug_nans.value or _config.debug_infs.value


def enter_settings(values: tuple[Any, ...], device: Device) -> list[Any]:
    """Put `values` in force on this thread, with `device` as default and no mesh.

    Args:
        values: one per entry of `SETTINGS`.
        device: where operations on uncommitted arrays run from now on.

    Returns:
        The context managers that were entered, for `leave_settings`.
    """
    entered: list[Any] = [_config.default_device(device)]
    if current_settings() != values:  # in one go, which takes half the time
        for state, value in zip(SETTINGS, values, strict=True):
            if state.value != value:
                entered.append(state(value))
    if (transfers := allowed_transfers()) is not _UNGUARDED:
        entered.append(transfers)
    # A callback may run on the thread that dispatched the program, and a mesh that
    # is set there does not hold the private device.
    if not _mesh.get_abstract_mesh().empty or not _mesh.get_concrete_mesh().empty:
        entered.append(_no_mesh())
    for manager in entered:
        manager.__enter__()
    return entered


def allowed_transfers() -> contextlib.AbstractContextManager[Any]:
    """Exempt what this library itself puts or reads from `jax.transfer_guard`."""
    if {*map(_value_of, _GUARDS)} <= {None, "allow"}:
        return _UNGUARDED
    return jax.transfer_guard("allow")


_UNGUARDED = contextlib.nullcontext()


def leave_settings(entered: list[Any]) -> None:
    """Undo `enter_settings`."""
    for manager in reversed(entered):
        manager.__exit__(None, None, None)


class _no_mesh:  # noqa: N801 - a context manager, named like JAX's own
    def __enter__(self) -> None:
        self._abstract = _mesh.use_abstract_mesh(_mesh.empty_abstract_mesh)
        self._abstract.__enter__()
        self._concrete = _mesh_state.device_context.swap_local(_mesh.empty_concrete_mesh)

    def __exit__(self, *exc_info: object) -> None:
        _mesh_state.device_context.set_local(self._concrete)
        self._abstract.__exit__(*exc_info)


# JAX 0.12 moved the thread's concrete mesh out of the configuration module.
_mesh_state: Any = _mesh if hasattr(_mesh, "device_context") else _config


_private_clients: list[Any] = []
_private_clients_lock = threading.Lock()


def body_device(ctx: mlir.LoweringRuleContext) -> Device:
    """Where the bodies of the program that is being lowered run.

    It is the device of a CPU client of our own. A callback holds a thread of the client
    that its program runs on, and what a body waits for must not need one of those: on a
    shared client, callbacks wait for each other (jax-ml/jax#24255, #25861). So bodies
    have a client, the programs that they call have bodies on a second one, and so on:
    each client waits only for the next, and the last one for none.

    They are synchronous, which saves a change of thread for each operation. JAX has no
    public way to make a second client.
    """
    program_client = ctx.module_context.get_backend(optional=True)
    with _private_clients_lock:
        level = 0
        if program_client in _private_clients:
            level = _private_clients.index(program_client) + 1
        if level == len(_private_clients):
            _private_clients.append(_xla_client.make_cpu_client(asynchronous=False))
        return _private_clients[level].local_devices()[0]


def is_private(device: Device) -> bool:
    """Whether a device is for bodies."""
    return device.client in _private_clients


def is_in_body() -> bool:
    """Whether a compiled program's body runs on this thread, where nothing may wait."""
    return is_private(default_device())


def default_device() -> Device:
    """Where JAX puts an uncommitted array on this thread."""
    device = _config.default_device.value
    if device is None or isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return device


def put(
    value: np.ndarray, aval: ShapedArray, device: Device, copy: bool = False
) -> jax.Array:
    """`value` as an uncommitted array on `device`, without a copy if it may and XLA allows.

    `jax.device_put` commits to the device and drops the weak type, and
    `jnp.asarray` under `jax.default_device` takes ten times as long.
    """
    value = (
        value.copy() if copy and value.nbytes < LARGE_ARRAY_BYTES else _aligned(value, copy)
    )
    arguments = (aval, _sharding_of(device), [value], [device], False)
    if _config.transfer_guard_host_to_device.value in (None, "allow"):
        return _xla_client.batched_device_put(*arguments)
    with jax.transfer_guard_host_to_device("allow"):
        return _xla_client.batched_device_put(*arguments)


def _aligned(value: np.ndarray, copy: bool) -> np.ndarray:
    """A large `value` where XLA takes it without a copy of its own.

    XLA copies what does not begin at a multiple of 64 bytes, and NumPy's allocations do
    not: from 100 kB on another thread. NumPy copies 64 MB four times as fast, because it
    asks for huge pages.
    """
    if value.nbytes < LARGE_ARRAY_BYTES or (value.ctypes.data % 64 == 0 and not copy):
        return value
    buffer = np.empty(value.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    aligned = buffer[start : start + value.nbytes].view(value.dtype).reshape(value.shape)
    np.copyto(aligned, value)
    return aligned


@functools.cache
def _sharding_of(device: Device) -> jax.sharding.SingleDeviceSharding:
    return jax.sharding.SingleDeviceSharding(device)


def taken(function: Any) -> list[tuple[Any, Any]]:
    """Empty the stores of a function that JAX wrapped.

    A call of `jax.custom_jvp` or `jax.custom_vjp` expects that either the function was
    run or its rule, and tells from which one filled its stores.

    Returns:
        Each store that was filled, with what it held.
    """
    filled = []
    for store in function.stores:
        try:
            filled.append((store, store.val))
        except (AttributeError, _linear_util.StoreException):
            continue
        store.reset()
    return filled


def fill(stores: list[tuple[Any, Any]]) -> None:
    """Undo `taken`."""
    for store, value in stores:
        store.reset()
        store.store(value)


class _RefillableStore(_linear_util.Store):
    """What JAX keeps of one call of a function, where later calls give the same again."""

    __slots__ = ()

    def store(self, val: Any) -> None:
        self._val = val


def let_refill(function: Any) -> None:
    """Let a function that JAX wrapped be called more than once.

    JAX takes a store that is filled already for an error. It fills those that `jax.vmap`
    makes for the batch axes of the results of a function with a custom rule.
    """
    for store in function.stores:
        if type(store) is _linear_util.Store:
            store.__class__ = _RefillableStore


def current_trace() -> Any:
    """What operations on this thread go to: a transform's trace, or `eval_trace`."""
    return _core.trace_ctx.trace or eval_trace


class no_axis_names:  # noqa: N801 - a context manager
    """Forgets the axes of a `vmap` that runs eagerly, which a body is not part of."""

    def __enter__(self) -> None:
        self._before = _core.trace_ctx.axis_env
        _core.trace_ctx.set_axis_env(_core.top_axis_env)

    def __exit__(self, *exc_info: object) -> None:
        _core.trace_ctx.set_axis_env(self._before)


def is_eager() -> bool:
    """Whether `eval_trace` is the current trace: inside a bind there may be none."""
    return _core.trace_ctx.trace is eval_trace


def is_of_trace_of(value: Any, tracer: Any) -> bool:
    """Whether `value` is a tracer of the trace that `tracer` is of.

    Inside `jax.vjp(f, x)`, whether a value may depend on `x`: JAX leaves what does not to
    the trace around it. It has no public question for that.
    """
    return getattr(value, "_trace", None) is tracer._trace


def is_jaxpr(value: Any) -> bool:
    """Whether `value` is a jaxpr, closed or not: one type as of JAX 0.12."""
    return isinstance(value, (ClosedJaxpr, Jaxpr))


def is_stateful(jaxpr: Any) -> bool:
    """Whether a jaxpr has effects other than those of `jax.debug`."""
    return any("Debug" not in type(effect).__name__ for effect in jaxpr.effects)


def copied_jaxpr(jaxpr: Any) -> Any:
    """Another object of the same content."""
    if hasattr(jaxpr, "with_consts"):  # JAX 0.12
        return jaxpr.with_consts(jaxpr.consts)
    if isinstance(jaxpr, ClosedJaxpr):
        return ClosedJaxpr(jaxpr.jaxpr, jaxpr.consts)
    return jaxpr.replace()


def opened(jaxpr: Any) -> Any:
    """A closed jaxpr as a function whose first operands are its constants.

    The function does not keep `jaxpr` alive, nor the constants.
    """
    count = len(jaxpr.consts)
    inner = jaxpr.with_consts(()) if hasattr(jaxpr, "with_consts") else jaxpr.jaxpr
    if inner.invars and len(inner.invars) > len(jaxpr.in_avals):  # JAX 0.12
        return lambda *operands: _core.eval_jaxpr(inner, (), *operands)
    return lambda *operands: _core.eval_jaxpr(inner, operands[:count], *operands[count:])


def align(operands: Sequence[Any]) -> list[Any]:
    """Make the operands of one call agree on how they lie on the mesh.

    Over explicit mesh axes each is gathered, because the host call takes it whole. Under
    `jax.shard_map(check_vma=True)` each is marked as varying over the manual axes that
    any varies over. Both are JAX operations, which know their own transposes.
    """
    whole = []
    for operand in operands:
        sharding = getattr(jax.typeof(operand), "sharding", None)
        if sharding is not None and any(axes is not None for axes in sharding.spec):
            operand = jax.sharding.reshard(operand, sharding.update(spec=PartitionSpec()))
        whole.append(operand)
    return vary_alike(whole, ())


def vary_alike(values: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """`values`, marked as varying over the manual axes that any of both varies over."""
    axes = [jax.typeof(x).manual_axis_type.varying for x in (*values, *like)]
    union = frozenset().union(*axes)
    return [
        x if own == union else _core.pvary(x, tuple(union - own))
        for x, own in zip(values, axes[: len(values)], strict=True)
    ]


def like_operands(aval: ShapedArray, operand_avals: Sequence[Any]) -> ShapedArray:
    """`aval` in the current mesh, varying over what the (aligned) operands vary over."""
    varying = _core.standard_vma_rule("py_func", *operand_avals)
    return aval.update(
        sharding=_core.get_cur_mesh_sharding(),
        manual_axis_type=_core.ManualAxisType(varying=varying),
    )


def read_runtime_errors(read: Callable[[BaseException, str], str]) -> None:
    """Show each error of JAX's runtime to `read` when it is made, for its text.

    XLA hands over a text, and the errors that JAX makes of it, wherever something waits
    for a failed program, are the only sign that anybody has come to know of it.

    Args:
        read: given an error and its text, returns the text that it is to have; what it
            raises is raised in the place of the error.
    """
    error_type: Any = jax.errors.JaxRuntimeError
    init = error_type.__init__

    def reading_init(self: Any, *args: Any) -> None:
        if args and isinstance(args[0], str):
            args = (read(self, args[0]), *args[1:])
        init(self, *args)

    error_type.__init__ = reading_init


def forget_tokens_of(is_known: Callable[[BaseException], bool]) -> None:
    """Let JAX forget a token once the error of the run that left it is known.

    Args:
        is_known: whether an error that waiting for a token raises has been raised before.
    """

    class Tokens(_dispatch.RuntimeTokenSet):
        """JAX's tokens of a thread, without those of failures that have surfaced.

        An ordered call waits for the token of the one before it. JAX 0.10 keeps a token
        that fails, so that one failure would be raised by every ordered call that comes
        after it, by `jax.effects_barrier` and when Python ends (jax-ml/jax#37587); later
        versions raise it once more.
        """

        def get_token_input(self, eff: Any, devices: Any) -> Any:
            token = self.current_tokens.get(eff)
            try:
                if isinstance(token, _core.Token):
                    token.block_until_ready()
            except jax.errors.JaxRuntimeError as error:
                self.current_tokens = {
                    e: t for e, t in self.current_tokens.items() if t is not token
                }
                if not is_known(error):
                    raise
            return super().get_token_input(eff, devices)

        def block_until_ready(self) -> None:
            waiting = [*self.current_tokens.values(), *self.output_runtime_tokens.values()]
            self.clear()
            first = None
            for token in waiting:
                try:
                    token.block_until_ready()
                except jax.errors.JaxRuntimeError as error:
                    first = first or (None if is_known(error) else error)
            if first is not None:
                raise first

    _dispatch.runtime_tokens.__class__ = Tokens


def fence(devices: tuple[Device, ...]) -> jax.Array:
    """An array that is ready when all that this thread has dispatched to `devices` is done.

    Programs of one thread run in the order in which it dispatches them: those over one
    device among each other, and those over several.

    Args:
        devices: of a program, those of this process.
    """
    with contextlib.ExitStack() as stack:
        for refusal in (_config.disable_jit, _config.no_tracing, _config.no_execution):
            if refusal.value:  # which is about what the user runs
                stack.enter_context(refusal(False))
        program, operand = _fence_over(devices)
        return program(operand)


@functools.cache
def _fence_over(devices: tuple[Device, ...]) -> tuple[Any, jax.Array]:
    # Compiled ahead, for no trace of the caller's has a part in its call.
    mesh = jax.sharding.Mesh(np.array(devices), ("devices",))
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("devices"))
    with (
        _core.set_current_trace(eval_trace),
        _no_mesh(),
        jax.transfer_guard("allow"),
    ):
        operand = jax.device_put(np.zeros(len(devices), np.float32), sharding)
        return jax.jit(lambda x: x + 1).lower(operand).compile(), operand


def live_arrays(device: Device) -> list[jax.Array]:
    """All arrays of the client that a device is of."""
    return device.client.live_arrays()


def register_effect(effect_type: type[Effect], *, ordered: bool) -> None:
    """Let programs hold `effect_type`: when lowered, in control flow, in custom rules.

    In reverse mode, too: what a loop does is kept, though no derivative needs it.
    """
    _effects.lowerable_effects.add_type(effect_type)
    _effects.partial_eval_kept_effects.add_type(effect_type)
    _effects.control_flow_allowed_effects.add_type(effect_type)
    _effects.custom_derivatives_allowed_effects.add_type(effect_type)
    if ordered:
        _effects.ordered_effects.add_type(effect_type)
        _effects.shardable_ordered_effects.add_type(effect_type)


def wrap_batching_rules(of_cond: Any, of_while: Any) -> None:
    """Put what is given in the place of the batching rules of `cond` and `while_loop`."""
    rules = _batching.fancy_primitive_batchers
    rules[jax.lax.cond_p] = of_cond(rules[jax.lax.cond_p])
    rules[jax.lax.while_p] = of_while(rules[jax.lax.while_p])


def keep_in_loops(effect_type: type[Effect]) -> None:
    """Leave what has this effect in the loop that reverse mode makes of a `scan`.

    `scan` moves residuals that depend on constants alone out of its loop, and with them
    the calls that compute them, effects or not (jax-ml/jax#16637): a call whose operands
    do not change from one iteration to the next would run once. There is no hook, so its
    function is replaced; where the effect is absent it does what it did.
    """
    hoist = _loops._scan_known_hoisting

    def hoist_unless_effectful(jaxpr: Any, consts: Any, size: int, *rest: Any) -> Any:
        if any(isinstance(effect, effect_type) for effect in jaxpr.effects):
            return jaxpr, consts, [False] * size, []
        return hoist(jaxpr, consts, size, *rest)

    _loops._scan_known_hoisting = hoist_unless_effectful


def wrap_partial_eval_of_while(wrap: Any) -> None:
    """Put what `wrap` makes of it in the place of `while_loop`'s partial evaluation."""
    rules = _partial_eval.custom_partial_eval_rules
    rules[jax.lax.while_p] = wrap(rules[jax.lax.while_p])


def hold_weakly(parameter: type) -> None:
    """Let JAX's caches of abstract evaluation not keep parameters of this type alive."""
    _util.weakref_cache_key_types.add(parameter)


def register_dce(primitive: Any, rule: Any) -> None:
    """Say what is left of an equation some of whose results are unused."""
    # JAX 0.12 passes which operands are alive, too.
    _partial_eval.dce_rules[primitive] = lambda used, *rest: rule(used, rest[-1])


def lower_with_devices(primitive: Any) -> None:
    """Ask JAX to tell the lowering rule of `primitive` which devices will run it."""
    _dispatch.prim_requires_devices_during_lowering.add(primitive)


def devices_of(ctx: mlir.LoweringRuleContext) -> list[Device]:
    """Those of this process that the program which is being lowered runs on."""
    axes = ctx.module_context.axis_context
    if isinstance(axes, mlir.SPMDAxisContext):
        devices: Any = axes.mesh.devices.flat
    else:
        devices = getattr(axes, "device_assignment", None) or ()
    return [d for d in devices if d in d.client.local_devices()]


def is_export(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether the program is being lowered by `jax.export`."""
    return ctx.module_context.lowering_parameters.for_export


def emit_host_call(
    ctx: mlir.LoweringRuleContext,
    host_call: Any,
    token: Any,
    operands: Sequence[Any],
    *,
    has_side_effect: bool,
) -> tuple[list[Any], Any]:
    """Emit the custom call that runs `host_call` on the host.

    `jax.interpreters.mlir.emit_python_callback` does the same and then checks and
    canonicalizes every result on the callback's thread, under that thread's own
    settings; `host_call` has done so under the caller's.

    Args:
        ctx: the context of the lowering rule.
        host_call: called with NumPy operands, returns a tuple of NumPy results.
        token: the token of an ordered effect, or None.
        operands: lowered operands.
        has_side_effect: whether the call stays when its results are unused.

    Returns:
        The lowered results and the new token (None without one).
    """
    module = ctx.module_context
    sharding = _callback._callback_op_sharding(module.axis_context, None, ctx.avals_out)
    if module.platforms[0] == "tpu":
        avals_in, avals_out = cast(Any, (ctx.avals_in, ctx.avals_out))
        results, token, _ = mlir.emit_python_callback(
            ctx, host_call, token, list(operands), avals_in, avals_out,
            has_side_effect=has_side_effect, returns_token=token is not None,
            sharding=sharding,
        )  # fmt: skip
        return list(results), token
    callback = host_call
    if token is not None:
        operands = [token, *operands]
        ctx = ctx.replace(
            avals_in=[_core.abstract_token, *ctx.avals_in],
            avals_out=[_core.abstract_token, *ctx.avals_out],
        )
        callback = functools.partial(_thread_token, host_call)
        if isinstance(sharding, _sharding_impls.SdyArrayList) and ctx.avals_out[1:]:
            # One annotation per result, and the token is now the first of them.
            devices = sharding.shardings[0].logical_device_ids
            of_token = _sharding_impls.SdyArray(
                mesh_shape=(), dim_shardings=(), logical_device_ids=devices
            )
            sharding = _sharding_impls.SdyArrayList((of_token, *sharding.shardings))
    kind = "cpu" if module.platforms[0] == "cpu" else "gpu"
    sample = (
        sample_of_returned(ctx, operands) if has_side_effect and kind == "cpu" else None
    )
    if sample is not None:
        operands = [*operands, sample[0]]
        ctx = ctx.replace(avals_in=[*ctx.avals_in, sample[1]])
        callback = functools.partial(_drop_last, callback)
    module.add_host_callback(callback)
    call = _ffi.build_ffi_lowering_function(
        f"xla_ffi_python_{kind}_callback", has_side_effect=has_side_effect
    )(ctx, *operands, index=np.uint64(len(module.host_callbacks) - 1))
    if sharding is not None:
        _mlir.set_sharding(module, call, sharding)
    results = list(call.results)
    if token is not None:
        token, *results = results
    return results, token


def _thread_token(host_call: Any, token: Any, *operands: Any) -> Any:
    return (token, *host_call(*operands))


def _drop_last(callback: Any, *operands: Any) -> Any:
    return callback(*operands[:-1])
