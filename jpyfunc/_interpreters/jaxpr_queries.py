"""Questions about jaxprs, including those in the parameters of their equations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Primitive,
    Var,
    jaxprs_in_params,
    primitives,
)
from jax.lax import linalg

from jpyfunc import _compat
from jpyfunc._interpreters.host_primitive import HostPrimitive


def has_rules(jaxpr: AnyJaxpr) -> bool:
    """Whether a jaxpr calls functions with custom derivative rules."""
    return first_primitive(jaxpr, lambda eqn: eqn.primitive in _WITH_RULES) is not None


def is_stateful(jaxpr: AnyJaxpr) -> bool:
    """Whether a jaxpr has effects other than those of `jax.debug`."""
    return any(not isinstance(effect, _compat.DEBUG_EFFECTS) for effect in jaxpr.effects)


def is_host_call(primitive: Primitive, params: dict[str, object]) -> bool:
    """Whether a bind calls the host, itself or in a jaxpr among its parameters."""
    return _is_callback(primitive) or any(map(calls_host, jaxprs_in_params(params)))


@_compat.weakref_lru_cache
def calls_host(jaxpr: AnyJaxpr) -> bool:
    """Whether a jaxpr has an effect, or calls the host."""
    return bool(jaxpr.effects) or host_call(jaxpr) is not None


def host_call(jaxpr: AnyJaxpr) -> str | None:
    """The name of the first primitive in a jaxpr that calls the host."""
    return first_primitive(jaxpr, lambda eqn: _is_callback(eqn.primitive))


def _is_callback(primitive: Primitive) -> bool:
    return isinstance(primitive, HostPrimitive) or primitive in _compat.CALLBACKS


@_compat.weakref_lru_cache
def runs_python(jaxpr: AnyJaxpr) -> bool:
    """Whether a jitted function runs Python under the trace of a body, or has an effect."""
    return bool(jaxpr.effects) or any(
        isinstance(eqn.primitive, HostPrimitive)
        or (eqn.primitive is primitives.jit_p and runs_python(eqn.params["jaxpr"]))
        for eqn in jaxpr.eqns
    )


def first_primitive(jaxpr: AnyJaxpr, matches: Callable[[JaxprEqn], bool]) -> str | None:
    """The name of the first primitive in a jaxpr, at any depth, whose equation matches."""
    for eqn in jaxpr.eqns:
        if matches(eqn):
            return eqn.primitive.name
        for inner in jaxprs_in_params(eqn.params):
            if name := first_primitive(inner, matches):
                return name
    return None


def dependent_outputs(jaxpr: ClosedJaxpr, first: int) -> list[int]:
    """Positions of the outputs that depend on inputs from number `first` on."""
    live = set(map(id, jaxpr.jaxpr.invars[first:]))
    for eqn in jaxpr.eqns:
        if any(id(v) in live for v in eqn.invars):
            live.update(map(id, eqn.outvars))
    return [i for i, v in enumerate(jaxpr.jaxpr.outvars) if id(v) in live]


def is_cheap(jaxpr: AnyJaxpr) -> bool:
    """Whether to compute a jaxpr again costs less than to store what it computes."""
    return all(
        eqn.primitive in _CHEAP
        or (eqn.primitive is primitives.jit_p and is_cheap(eqn.params["jaxpr"]))
        for eqn in jaxpr.eqns
    )


def differs_in_batches(jaxpr: AnyJaxpr) -> str | None:
    """The first primitive whose batch differs from single runs in results, or much in cost.

    A batched `cond` computes all branches. Generators of random numbers other than threefry
    draw other numbers for a batch of keys. A custom batching rule is the user's, and may do
    anything.
    """
    return first_primitive(
        jaxpr,
        lambda eqn: (
            eqn.primitive in _DIFFERENT_IN_BATCHES or any(map(_is_other_key, eqn.invars))
        ),
    )


def draws_exactly(jaxpr: AnyJaxpr) -> bool:
    """Whether a jaxpr draws random numbers, and all else in it is exact.

    A loop over the rows then gives the same bits as one operation on all of them. A
    logarithm, or the error function in normal numbers, may be rounded differently when it
    is vectorized.
    """
    if first_primitive(jaxpr, lambda eqn: eqn.primitive not in _EXACT):
        return False
    return first_primitive(jaxpr, lambda eqn: eqn.primitive in _RANDOM) is not None


def cost_in_bytes(jaxpr: AnyJaxpr) -> int:
    """The bytes of the largest array that a jaxpr makes, or of one that takes as long."""
    cost = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive in _LONG:
            return 2**62
        sizes = [
            math.prod(v.aval.shape) * v.aval.dtype.itemsize
            for v in eqn.outvars
            if isinstance(v.aval, ShapedArray)
        ]
        sizes += map(cost_in_bytes, jaxprs_in_params(eqn.params))
        factor = 1
        if eqn.primitive is primitives.scan_p:
            factor = eqn.params["length"]
        elif eqn.primitive is primitives.dot_general_p:
            # Some 64 numbers are multiplied and added in the time of one sine.
            (summed, _), _ = eqn.params["dimension_numbers"]
            left: Any = eqn.invars[0].aval
            factor += math.prod(left.shape[i] for i in summed) // 64
        cost = max([cost, *(size * factor for size in sizes)])
    return cost


def _is_other_key(atom: Var | Literal) -> bool:
    dtype = getattr(atom.aval, "dtype", None)
    is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return is_key and dtype != _threefry_dtype()


@functools.cache
def _threefry_dtype() -> object:
    return jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")).dtype


AnyJaxpr = ClosedJaxpr | Jaxpr

_WITH_RULES = {primitives.custom_jvp_call_p, primitives.custom_vjp_call_p}

_DIFFERENT_IN_BATCHES = {
    primitives.cond_p,
    primitives.rng_bit_generator_p,
    _compat.custom_vmap_p,
}

_RANDOM = {
    primitives.random_bits_p,
    primitives.random_fold_in_p,
    primitives.random_seed_p,
    primitives.random_split_p,
}
# What uniform numbers and booleans of `jax.random` are made with. Integers take a
# remainder, which is three times as slow in a loop.
_EXACT = _RANDOM | {
    primitives.add_p,
    primitives.bitcast_convert_type_p,
    primitives.broadcast_in_dim_p,
    primitives.convert_element_type_p,
    primitives.jit_p,
    primitives.lt_p,
    primitives.max_p,
    primitives.mul_p,
    primitives.or_p,
    primitives.reshape_p,
    primitives.shift_right_logical_p,
    primitives.sub_p,
}

# Loops of unknown length, and what takes microseconds for a matrix of any size.
_LONG = {primitives.while_p, primitives.fft_p, primitives.conv_general_dilated_p} | {
    linalg.cholesky_p,
    linalg.cholesky_update_p,
    linalg.eig_p,
    linalg.eigh_p,
    linalg.hessenberg_p,
    linalg.householder_product_p,
    linalg.lu_p,
    linalg.lu_pivots_to_permutation_p,
    linalg.ormqr_p,
    linalg.qr_p,
    linalg.schur_p,
    linalg.svd_p,
    linalg.symmetric_product_p,
    linalg.triangular_solve_p,
    linalg.tridiagonal_p,
    linalg.tridiagonal_solve_p,
}

_CHEAP = {
    primitives.abs_p, primitives.add_jaxvals_p, primitives.add_p, primitives.and_p,
    primitives.broadcast_in_dim_p, primitives.ceil_p, primitives.clamp_p,
    primitives.convert_element_type_p, primitives.copy_p, primitives.cos_p,
    primitives.cosh_p, primitives.div_p, primitives.eq_p, primitives.exp2_p,
    primitives.exp_p, primitives.expm1_p, primitives.floor_p, primitives.ge_p,
    primitives.gt_p, primitives.imag_p, primitives.integer_pow_p, primitives.is_finite_p,
    primitives.le_p, primitives.log1p_p, primitives.log_p, primitives.logistic_p,
    primitives.lt_p, primitives.max_p, primitives.min_p, primitives.mul_p,
    primitives.ne_p, primitives.neg_p, primitives.not_p, primitives.or_p,
    primitives.pow_p, primitives.real_p, primitives.reduce_and_p,
    primitives.reduce_max_p, primitives.reduce_min_p, primitives.reduce_or_p,
    primitives.reduce_sum_p, primitives.rem_p, primitives.reshape_p, primitives.rev_p,
    primitives.round_p, primitives.rsqrt_p, primitives.select_n_p, primitives.sign_p,
    primitives.sin_p, primitives.sinh_p, primitives.slice_p, primitives.sqrt_p,
    primitives.square_p, primitives.squeeze_p, primitives.stop_gradient_p,
    primitives.sub_p, primitives.tan_p, primitives.tanh_p, primitives.transpose_p,
    primitives.xor_p,
}  # fmt: skip
