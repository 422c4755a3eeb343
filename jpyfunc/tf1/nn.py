"""TensorFlow 1's `tf.nn`: activations and losses.

As in `math`, parameters and semantics are TensorFlow's, and without a tensor among the
arguments each is a function of JAX. For the rest of `jax.nn`: `tf.lift(jax.nn.gelu)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jpyfunc.tf1._lift import over_tensors
from jpyfunc.tf1.math import Axes, as_axes
from jpyfunc.tf1.math import log_sigmoid as log_sigmoid
from jpyfunc.tf1.math import sigmoid as sigmoid
from jpyfunc.tf1.math import softplus as softplus
from jpyfunc.tf1.math import softsign as softsign
from jpyfunc.tf1.math import tanh as tanh


@over_tensors
def relu(features: ArrayLike, name: str | None = None) -> jax.Array:
    """Compute `max(features, 0)`."""
    return jax.nn.relu(jnp.asarray(features))


@over_tensors
def relu6(features: ArrayLike, name: str | None = None) -> jax.Array:
    """Compute `min(max(features, 0), 6)`."""
    return jax.nn.relu6(jnp.asarray(features))


@over_tensors
def leaky_relu(
    features: ArrayLike, alpha: ArrayLike = 0.2, name: str | None = None
) -> jax.Array:
    """Compute `features` where positive, and `alpha * features` elsewhere."""
    return jax.nn.leaky_relu(jnp.asarray(features), alpha)


@over_tensors
def elu(features: ArrayLike, name: str | None = None) -> jax.Array:
    """Compute `features` where positive, and `exp(features) - 1` elsewhere."""
    return jax.nn.elu(jnp.asarray(features))


@over_tensors
def selu(features: ArrayLike, name: str | None = None) -> jax.Array:
    """Compute the scaled exponential linear unit."""
    return jax.nn.selu(jnp.asarray(features))


@over_tensors
def softmax(
    logits: ArrayLike,
    axis: int | None = None,
    name: str | None = None,
    dim: int | None = None,
) -> jax.Array:
    """Normalize exponentials of `logits` along an axis, by default the last."""
    return jax.nn.softmax(jnp.asarray(logits), _axis(axis, dim))


@over_tensors
def log_softmax(
    logits: ArrayLike,
    axis: int | None = None,
    name: str | None = None,
    dim: int | None = None,
) -> jax.Array:
    """Compute the logarithm of `softmax`."""
    return jax.nn.log_softmax(jnp.asarray(logits), _axis(axis, dim))


def _axis(axis: int | None, dim: int | None) -> int:
    given = dim if axis is None else axis
    return -1 if given is None else given


@over_tensors
def l2_loss(t: ArrayLike, name: str | None = None) -> jax.Array:
    """Compute half the sum of squares."""
    return jnp.sum(jnp.square(t)) / 2


@over_tensors
def l2_normalize(
    x: ArrayLike,
    axis: Axes = None,
    epsilon: ArrayLike = 1e-12,
    name: str | None = None,
    dim: Axes = None,
) -> jax.Array:
    """Divide by the norm along `axis`; its square counts as at least `epsilon`."""
    axes = as_axes(dim if axis is None else axis)
    square = jnp.sum(jnp.square(x), axis=axes, keepdims=True)
    return jnp.asarray(x) * jax.lax.rsqrt(jnp.maximum(square, epsilon))


@over_tensors
def moments(
    x: ArrayLike,
    axes: int | Sequence[int],
    shift: ArrayLike | None = None,
    name: str | None = None,
    keep_dims: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Compute the mean and the variance over `axes`."""
    where = {"axis": as_axes(axes), "keepdims": keep_dims}
    return jnp.mean(x, **where), jnp.var(x, **where)


@over_tensors
def bias_add(
    value: ArrayLike,
    bias: ArrayLike,
    data_format: str | None = None,
    name: str | None = None,
) -> jax.Array:
    """Add a vector along the last axis; with `"NCHW"`, along the second."""
    value, bias = jnp.asarray(value), jnp.asarray(bias)
    if data_format == "NCHW":
        bias = bias.reshape(-1, *(1,) * (value.ndim - 2))
    return value + bias


@over_tensors
def sigmoid_cross_entropy_with_logits(
    *, labels: ArrayLike, logits: ArrayLike, name: str | None = None
) -> jax.Array:
    """Compute the cross entropy of independent classes, for each element."""
    return jax.nn.softplus(jnp.asarray(logits)) - jnp.multiply(logits, labels)


@over_tensors
def softmax_cross_entropy_with_logits(
    *, labels: ArrayLike, logits: ArrayLike, dim: int = -1, name: str | None = None
) -> jax.Array:
    """Compute the cross entropy of exclusive classes; no gradient flows to `labels`."""
    return _cross_entropy(jax.lax.stop_gradient(jnp.asarray(labels)), logits, dim)


@over_tensors
def softmax_cross_entropy_with_logits_v2(
    *, labels: ArrayLike, logits: ArrayLike, dim: int = -1, name: str | None = None
) -> jax.Array:
    """Compute the cross entropy of exclusive classes."""
    return _cross_entropy(labels, logits, dim)


def _cross_entropy(labels: ArrayLike, logits: ArrayLike, axis: int) -> jax.Array:
    logits = jnp.asarray(logits)
    return -jnp.sum(jnp.multiply(labels, jax.nn.log_softmax(logits, axis)), axis)


@over_tensors
def sparse_softmax_cross_entropy_with_logits(
    *, labels: ArrayLike, logits: ArrayLike, name: str | None = None
) -> jax.Array:
    """Compute the cross entropy of exclusive classes; `labels` are their indices."""
    logs = jax.nn.log_softmax(jnp.asarray(logits))
    index = jnp.asarray(labels)[..., None]
    return -jnp.take_along_axis(logs, index, -1, mode="fill")[..., 0]
