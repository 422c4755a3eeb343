"""TensorFlow 1's `tf.math`: elementwise functions, reductions, products.

Parameters and semantics are TensorFlow's, also where they differ from those of `jax.numpy`.
Without a tensor among the arguments, each is a function of JAX, and so works in bodies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jpyfunc._errors import see
from jpyfunc.tf1._lift import over_tensors

Axes = int | Sequence[int] | None


def _unary(tf_name: str, func: Callable[[ArrayLike], jax.Array]) -> Callable[..., Any]:
    def unary(x: ArrayLike, name: str | None = None) -> jax.Array:
        return func(x)

    return _named(unary, tf_name, func)


def _binary(
    tf_name: str, func: Callable[[ArrayLike, ArrayLike], jax.Array]
) -> Callable[..., Any]:
    def binary(x: ArrayLike, y: ArrayLike, name: str | None = None) -> jax.Array:
        return func(x, y)

    return _named(binary, tf_name, func)


def _named(
    function: Callable[..., jax.Array], tf_name: str, func: Callable[..., jax.Array]
) -> Callable[..., Any]:
    function.__name__ = function.__qualname__ = tf_name
    function.__doc__ = f"Apply `{func.__module__}.{func.__name__}` to each element."
    return over_tensors(function)


abs = _unary("abs", jnp.abs)
acos = _unary("acos", jnp.acos)
acosh = _unary("acosh", jnp.acosh)
angle = _unary("angle", jnp.angle)
asin = _unary("asin", jnp.asin)
asinh = _unary("asinh", jnp.asinh)
atan = _unary("atan", jnp.atan)
atanh = _unary("atanh", jnp.atanh)
ceil = _unary("ceil", jnp.ceil)
conj = _unary("conj", jnp.conj)
cos = _unary("cos", jnp.cos)
cosh = _unary("cosh", jnp.cosh)
digamma = _unary("digamma", jax.scipy.special.digamma)
erf = _unary("erf", jax.scipy.special.erf)
erfc = _unary("erfc", jax.scipy.special.erfc)
exp = _unary("exp", jnp.exp)
expm1 = _unary("expm1", jnp.expm1)
floor = _unary("floor", jnp.floor)
imag = _unary("imag", jnp.imag)
is_finite = _unary("is_finite", jnp.isfinite)
is_inf = _unary("is_inf", jnp.isinf)
is_nan = _unary("is_nan", jnp.isnan)
lgamma = _unary("lgamma", jax.scipy.special.gammaln)
log = _unary("log", jnp.log)
log1p = _unary("log1p", jnp.log1p)
log_sigmoid = _unary("log_sigmoid", jax.nn.log_sigmoid)
logical_not = _unary("logical_not", jnp.logical_not)
negative = _unary("negative", jnp.negative)
real = _unary("real", jnp.real)
reciprocal = _unary("reciprocal", jnp.reciprocal)
rint = _unary("rint", jnp.rint)
round = _unary("round", jnp.round)
sigmoid = _unary("sigmoid", jax.nn.sigmoid)
sign = _unary("sign", jnp.sign)
sin = _unary("sin", jnp.sin)
sinh = _unary("sinh", jnp.sinh)
softplus = _unary("softplus", jax.nn.softplus)
softsign = _unary("softsign", jax.nn.soft_sign)
sqrt = _unary("sqrt", jnp.sqrt)
square = _unary("square", jnp.square)
tan = _unary("tan", jnp.tan)
tanh = _unary("tanh", jnp.tanh)

add = _binary("add", jnp.add)
atan2 = _binary("atan2", jnp.arctan2)
divide = _binary("divide", jnp.true_divide)
equal = _binary("equal", jnp.equal)
floordiv = _binary("floordiv", jnp.floor_divide)
floormod = _binary("floormod", jnp.mod)
greater = _binary("greater", jnp.greater)
greater_equal = _binary("greater_equal", jnp.greater_equal)
less = _binary("less", jnp.less)
less_equal = _binary("less_equal", jnp.less_equal)
logical_and = _binary("logical_and", jnp.logical_and)
logical_or = _binary("logical_or", jnp.logical_or)
logical_xor = _binary("logical_xor", jnp.logical_xor)
maximum = _binary("maximum", jnp.maximum)
minimum = _binary("minimum", jnp.minimum)
mod = _binary("mod", jnp.mod)
multiply = _binary("multiply", jnp.multiply)
not_equal = _binary("not_equal", jnp.not_equal)
pow = _binary("pow", jnp.power)
subtract = _binary("subtract", jnp.subtract)
truediv = _binary("truediv", jnp.true_divide)


@over_tensors
def rsqrt(x: ArrayLike, name: str | None = None) -> jax.Array:
    """Compute the reciprocal of the square root of each element."""
    return jax.lax.rsqrt(jnp.asarray(x))


@over_tensors
def squared_difference(x: ArrayLike, y: ArrayLike, name: str | None = None) -> jax.Array:
    """Compute `(x - y)(x - y)` for each element."""
    return jnp.square(jnp.subtract(x, y))


@over_tensors
def div(x: ArrayLike, y: ArrayLike, name: str | None = None) -> jax.Array:
    """Divide as Python 2 does: the quotient of integers is rounded down."""
    x, y = jnp.asarray(x), jnp.asarray(y)
    is_whole = jnp.issubdtype(jnp.result_type(x, y), jnp.integer)
    return jnp.floor_divide(x, y) if is_whole else jnp.true_divide(x, y)


@over_tensors
def complex(real: ArrayLike, imag: ArrayLike, name: str | None = None) -> jax.Array:
    """Combine real and imaginary parts."""
    return jax.lax.complex(jnp.asarray(real), jnp.asarray(imag))


@over_tensors
def add_n(inputs: Sequence[ArrayLike], name: str | None = None) -> jax.Array:
    """Add arrays of the same shape."""
    first, *others = inputs
    for x in others:
        if np.shape(x) != np.shape(first):
            raise ValueError(
                "add_n: expected arrays of the same shape, got "
                f"{np.shape(first)} and {np.shape(x)}." + see("An invalid argument")
            )
        first = jnp.add(first, x)
    return jnp.asarray(first)


@over_tensors
def clip_by_value(
    t: ArrayLike,
    clip_value_min: ArrayLike,
    clip_value_max: ArrayLike,
    name: str | None = None,
) -> jax.Array:
    """Clip each element; the lower limit wins if it is above the upper one."""
    return jnp.maximum(jnp.minimum(t, clip_value_max), clip_value_min)


@over_tensors
def matmul(
    a: ArrayLike,
    b: ArrayLike,
    transpose_a: bool = False,
    transpose_b: bool = False,
    adjoint_a: bool = False,
    adjoint_b: bool = False,
    name: str | None = None,
) -> jax.Array:
    """Multiply matrices, which are the last two axes of `a` and `b`."""
    return jnp.matmul(
        _transposed(a, transpose_a, adjoint_a), _transposed(b, transpose_b, adjoint_b)
    )


def _transposed(x: ArrayLike, transpose: bool, adjoint: bool) -> jax.Array:
    x = jnp.asarray(x)
    if transpose or adjoint:
        x = jnp.swapaxes(x, -1, -2)
    return jnp.conj(x) if adjoint else x


@over_tensors
def tensordot(
    a: ArrayLike, b: ArrayLike, axes: int | Sequence[Any], name: str | None = None
) -> jax.Array:
    """Contract `axes` of `a` and `b`, as `numpy.tensordot` does."""
    return jnp.tensordot(a, b, axes)


@over_tensors
def einsum(equation: str, *inputs: ArrayLike, name: str | None = None) -> jax.Array:
    """Contract arrays as an equation in Einstein notation says."""
    return jnp.einsum(equation, *inputs)


def _reduction(tf_name: str, func: Callable[..., Any], doc: str) -> Callable[..., Any]:
    def reduce(
        input_tensor: ArrayLike,
        axis: Axes = None,
        keepdims: bool | None = None,
        name: str | None = None,
        reduction_indices: Axes = None,
        keep_dims: bool | None = None,
    ) -> jax.Array:
        # The last two parameters are what `axis` and `keepdims` were called before
        # TensorFlow 1.5.
        x = jnp.asarray(input_tensor)
        axes = as_axes(reduction_indices if axis is None else axis)
        return func(x, axis=axes, keepdims=bool(keepdims or keep_dims))

    reduce.__name__ = reduce.__qualname__ = tf_name
    reduce.__doc__ = f"{doc} over `axis`: an integer, a list, or None for all axes."
    return over_tensors(reduce)


def as_axes(axis: Axes) -> int | tuple[int, ...] | None:
    """Convert an axis or a list of axes to what `jax.numpy` takes."""
    if axis is None or np.ndim(axis) == 0:
        return cast(int | None, axis)
    return tuple(map(int, cast(Sequence[int], axis)))


def own_dtype(x: jax.Array) -> np.dtype | None:
    """Return the dtype of a sum or product of `x`: TensorFlow does not widen integers."""
    return None if x.dtype == jnp.bool_ else x.dtype


def _sum(x: jax.Array, **where: Any) -> jax.Array:
    return jnp.sum(x, dtype=own_dtype(x), **where)


def _prod(x: jax.Array, **where: Any) -> jax.Array:
    return jnp.prod(x, dtype=own_dtype(x), **where)


def _mean(x: jax.Array, **where: Any) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.mean(x, **where)
    # The mean of integers is an integer, rounded towards zero: [1, 0, 1, 0] has mean 0.
    total = jnp.sum(x, **where)  # in a wide dtype: the sum of small integers may overflow
    count = jnp.asarray(x.size // max(total.size, 1), total.dtype)
    return jax.lax.div(total, count).astype(x.dtype)


reduce_all = _reduction("reduce_all", jnp.all, "Test whether all elements are true")
reduce_any = _reduction("reduce_any", jnp.any, "Test whether any element is true")
reduce_logsumexp = _reduction(
    "reduce_logsumexp",
    jax.nn.logsumexp,
    "Compute the logarithm of the sum of exponentials",
)
reduce_max = _reduction("reduce_max", jnp.max, "Compute the maximum")
reduce_mean = _reduction("reduce_mean", _mean, "Compute the mean, rounded for integers,")
reduce_min = _reduction("reduce_min", jnp.min, "Compute the minimum")
reduce_prod = _reduction("reduce_prod", _prod, "Multiply elements")
reduce_sum = _reduction("reduce_sum", _sum, "Add elements")


@over_tensors
def argmax(
    input: ArrayLike,
    axis: int | None = None,
    name: str | None = None,
    dimension: int | None = None,
    output_type: DTypeLike | None = None,
) -> jax.Array:
    """Find the index of the largest element along an axis, by default the first."""
    return _index(jnp.argmax, input, axis, dimension, output_type)


@over_tensors
def argmin(
    input: ArrayLike,
    axis: int | None = None,
    name: str | None = None,
    dimension: int | None = None,
    output_type: DTypeLike | None = None,
) -> jax.Array:
    """Find the index of the smallest element along an axis, by default the first."""
    return _index(jnp.argmin, input, axis, dimension, output_type)


def _index(
    func: Callable[..., jax.Array],
    x: ArrayLike,
    axis: int | None,
    dimension: int | None,
    output_type: DTypeLike | None,
) -> jax.Array:
    axis = dimension if axis is None else axis
    index = func(jnp.asarray(x), axis=0 if axis is None else axis)
    return index if output_type is None else index.astype(output_type)


@over_tensors
def cumsum(
    x: ArrayLike,
    axis: int = 0,
    exclusive: bool = False,
    reverse: bool = False,
    name: str | None = None,
) -> jax.Array:
    """Compute the sums of elements up to each one, or with `exclusive` before it."""
    return _scan(jnp.cumsum, 0, x, axis, exclusive, reverse)


@over_tensors
def cumprod(
    x: ArrayLike,
    axis: int = 0,
    exclusive: bool = False,
    reverse: bool = False,
    name: str | None = None,
) -> jax.Array:
    """Compute the products of elements up to each one, or with `exclusive` before it."""
    return _scan(jnp.cumprod, 1, x, axis, exclusive, reverse)


def _scan(
    func: Callable[..., jax.Array],
    identity: int,
    x: ArrayLike,
    axis: int,
    exclusive: bool,
    reverse: bool,
) -> jax.Array:
    x = jnp.asarray(x)
    if reverse:
        x = jnp.flip(x, axis)
    if exclusive:
        x = jnp.moveaxis(x, axis, 0)
        x = jnp.concatenate([jnp.full_like(x[:1], identity), x[:-1]])
        x = jnp.moveaxis(x, 0, axis)
    result = func(x, axis=axis, dtype=own_dtype(x))
    return jnp.flip(result, axis) if reverse else result


@over_tensors
def norm(
    tensor: ArrayLike,
    ord: str | float = "euclidean",
    axis: Axes = None,
    keepdims: bool | None = None,
    name: str | None = None,
    keep_dims: bool | None = None,
) -> jax.Array:
    """Compute the norm of vectors, of matrices, or of all elements as one vector.

    Args:
        tensor: the array.
        ord: `"euclidean"`, which for matrices is `"fro"`, or an order of
            `numpy.linalg.norm`.
        axis: None for all elements, one axis for vectors, two for matrices.
        keepdims: whether to keep the axes, with length 1.
        name: name of the node.
        keep_dims: an older name of `keepdims`.
    """
    x, axes = jnp.asarray(tensor), as_axes(axis)
    keeps = bool(keepdims or keep_dims)
    order = None if ord in ("euclidean", "fro") else ord
    if axes is not None:
        return jnp.linalg.norm(x, order, axis=axes, keepdims=keeps)
    whole = jnp.linalg.norm(jnp.ravel(x), order)
    return jnp.reshape(whole, (1,) * x.ndim) if keeps else whole
