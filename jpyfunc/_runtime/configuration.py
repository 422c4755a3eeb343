"""The caller's JAX configuration, captured when a call is traced and in force in its body.

JAX keeps its configuration per thread, so the thread of XLA's on which a callback runs has
nothing of what the caller set with a context manager.
"""

from __future__ import annotations

import operator
from contextlib import AbstractContextManager
from typing import Any

import jax

from jpyfunc import _compat
from jpyfunc._runtime.nesting import executors_around
from jpyfunc._runtime.transfers import are_guarded

Config = tuple[Any, ...]

# Options that change what a body computes, or whether it raises. Some are not in every
# version of JAX.
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

# The other options that JAX's traces depend on, by the reason why no body needs the
# caller's. A test fails when a version of JAX has one that is in neither table.
NOT_CAPTURED = {
    "a body is in no mesh and under no axis of its caller": (
        "abstract_mesh_context_manager", "axis_env_state", "check_vma", "jax_auto_pcast",
        "jax_no_collectives", "jax_raise_on_ppermute_sort_diff",
        "jax_remove_size_one_mesh_axis_from_type", "jax_use_shardy_partitioner",
        "mesh_context_manager",
    ),
    "a body runs on a CPU device of its own": (
        "compute_on_context_manager", "jax_default_device", "jax_enable_pgle",
        "jax_pallas_enable_debug_checks", "jax_pallas_use_mosaic_gpu",
        "jax_pgle_profiling_runs", "jax_ragged_dot_use_gpu_pallas_triton_lowering",
        "jax_threefry_gpu_kernel_lowering", "jax_use_emit_pipeline_primitive",
        "layout_tracing_mode", "pallas_dynamic_shapes_export",
        "pallas_fuser_disable_nested_fuse", "pallas_grid_context",
        "pallas_tpu_interpret_mode_context_manager",
    ),
    "it configures the compiler, or which implementation of one function JAX takes": (
        "eager_constant_folding", "jax_custom_jvp3", "jax_custom_vjp3",
        "jax_embedded_constants_max_bytes", "jax_hlo_source_file_canonicalization_regex",
        "jax_remat3", "jax_remat_barrier_no_cotangents", "jax_scan3",
        "jax_use_direct_linearize", "jax_use_simplified_jaxpr_constants",
        "jax_xla_profile_version", "xla_metadata_context_manager",
    ),
    "where it is set, no program runs, so no body": ("jax_no_execution",),
    "only code that made one with `jax.make_user_context` sees it, and ours is captured": (
        "user_context",
    ),
}  # fmt: skip

# JAX's objects for them: reading one takes 40 ns less than reading `jax.config`.
OPTIONS = tuple(
    _compat.config_states[name] for name in CAPTURED if name in _compat.config_states
)
_ALL: tuple[Any, ...] = (*OPTIONS, executors_around)
_DEBUGGING = tuple(
    _compat.config_states[name] for name in ("jax_debug_nans", "jax_debug_infs")
)
_value_of = operator.attrgetter("value")


def current_config() -> Config:
    """Values of `OPTIONS` in force on this thread, then `executors_around`."""
    return (*map(_value_of, OPTIONS), executors_around.value)


def inside(config: Config, executor: int | str) -> Config:
    """The configuration of a task.

    Args:
        config: that of the call that waits for it.
        executor: the id of its executor, or `ANY`.
    """
    return (*config[:-1], (*config[-1], executor))


def is_debugging() -> bool:
    """Whether JAX raises where an operation gives NaN or infinity."""
    return any(option.value for option in _DEBUGGING)


class enter_config:  # noqa: N801 - a context manager, named like JAX's own
    """Put a caller's configuration in force on this thread, where a body is about to run.

    Transfers are not guarded there: a body runs on the host and so are its operands and
    results, though `jax.transfer_guard` would count each NumPy array among them. Nor is
    there a mesh: a callback may run on the thread that dispatched the program, and a mesh
    that is set there does not contain the body's device.

    Args:
        config: as of `current_config`.
        device: the default device from now on, where uncommitted arrays are put.
    """

    __slots__ = ("_config", "_default_device", "_device", "_entered")

    def __init__(self, config: Config, device: _compat.Device) -> None:
        self._config = config
        self._device = device

    def __enter__(self) -> None:
        self._entered = self._managers()
        for manager in self._entered:
            manager.__enter__()
        # As `jax.default_device` does, at half the cost.
        self._default_device = _compat.default_device.swap_local(self._device)

    def __exit__(self, *exc_info: object) -> None:
        _compat.default_device.set_local(self._default_device)
        for manager in reversed(self._entered):
            manager.__exit__(None, None, None)

    def _managers(self) -> list[AbstractContextManager[Any]]:
        """Context managers for what is not in force already; usually none."""
        managers = []
        current = current_config()
        if current != self._config:  # at half the cost of a loop
            for option, value, now in zip(_ALL, self._config, current, strict=True):
                if now != value:
                    managers.append(option(value))
        if are_guarded():
            managers.append(jax.transfer_guard("allow"))
        if _compat.has_mesh():
            managers.append(_compat.no_mesh())
        return managers
