"""What TensorFlow 1 has under `tf.math`: elementwise functions, reductions, products.

Each has TensorFlow's parameters and its meaning, where that is not `jax.numpy`'s, too.
Without a tensor among the arguments it is a function of JAX, so it works in bodies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpyfunc.tf1._lift import over_tensors


def _unary(tf_name: str, func: Callable[[Any], Any]) -> Callable[..., Any]:
    def unary(x: Any, name: str | None = None) -> Any:
        return func(x)

    return _named(unary, tf_name, func)


def _binary(tf_name: str, func: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def binary(x: Any, y: Any, name: str | None = None) -> Any:
        return func(x, y)

    return _named(binary, tf_name, func)


def _named(function: Any, tf_name: str, func: Any) -> Callable[..., Any]:
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
def rsqrt(x: Any, name: str | None = None) -> Any:
    """Compute the reciprocal of the square root of each element."""
    return jax.lax.rsqrt(jnp.asarray(x))


@over_tensors
def squared_difference(x: Any, y: Any, name: str | None = None) -> Any:
    """Compute `(x - y)(x - y)` for each element."""
    return jnp.square(jnp.subtract(x, y))


@over_tensors
def div(x: Any, y: Any, name: str | None = None) -> Any:
    """Divide as Python 2 does: integers are rounded down."""
    x, y = jnp.asarray(x), jnp.asarray(y)
    is_whole = jnp.issubdtype(jnp.result_type(x, y), jnp.integer)
    return jnp.floor_divide(x, y) if is_whole else jnp.true_divide(x, y)


@over_tensors
def complex(real: Any, imag: Any, name: str | None = None) -> Any:
    """Combine real and imaginary parts."""
    return jax.lax.complex(jnp.asarray(real), jnp.asarray(imag))


@over_tensors
def add_n(inputs: Any, name: str | None = None) -> Any:
    """Add the arrays of a list, which all have one shape."""
    first, *others = inputs
    for x in others:
        if np.shape(x) != np.shape(first):
            raise ValueError(
                "add_n: expected arrays of one shape, got "
                f"{np.shape(first)} and {np.shape(x)}."
            )
        first = jnp.add(first, x)
    return jnp.asarray(first)


@over_tensors
def clip_by_value(
    t: Any, clip_value_min: Any, clip_value_max: Any, name: str | None = None
) -> Any:
    """Clip each element; where the limits cross, it is the lower one."""
    return jnp.maximum(jnp.minimum(t, clip_value_max), clip_value_min)


@over_tensors
def matmul(
    a: Any,
    b: Any,
    transpose_a: bool = False,
    transpose_b: bool = False,
    adjoint_a: bool = False,
    adjoint_b: bool = False,
    name: str | None = None,
) -> Any:
    """Multiply matrices, the last two axes of `a` and `b`."""
    return jnp.matmul(
        _turned(a, transpose_a, adjoint_a), _turned(b, transpose_b, adjoint_b)
    )


def _turned(x: Any, transpose: bool, adjoint: bool) -> Any:
    x = jnp.asarray(x)
    if transpose or adjoint:
        x = jnp.swapaxes(x, -1, -2)
    return jnp.conj(x) if adjoint else x


@over_tensors
def tensordot(a: Any, b: Any, axes: Any, name: str | None = None) -> Any:
    """Contract `axes` of `a` and `b`, as `numpy.tensordot` does."""
    return jnp.tensordot(a, b, axes)


@over_tensors
def einsum(equation: str, *inputs: Any, name: str | None = None) -> Any:
    """Contract as an equation in Einstein's notation says."""
    return jnp.einsum(equation, *inputs)


def _reduction(tf_name: str, func: Callable[..., Any], doc: str) -> Callable[..., Any]:
    def reduce(
        input_tensor: Any,
        axis: Any = None,
        keepdims: Any = None,
        name: str | None = None,
        reduction_indices: Any = None,
        keep_dims: Any = None,
    ) -> Any:
        # The last two are the names that the second and third had until TensorFlow 1.5.
        x = jnp.asarray(input_tensor)
        axes = as_axes(reduction_indices if axis is None else axis)
        return func(x, axis=axes, keepdims=bool(keepdims or keep_dims))

    reduce.__name__ = reduce.__qualname__ = tf_name
    reduce.__doc__ = f"{doc} over `axis`: an integer, a list of them, or None for all."
    return over_tensors(reduce)


def as_axes(axis: Any) -> Any:
    """An axis, or a list of axes, as `jax.numpy` takes it."""
    return axis if axis is None or np.ndim(axis) == 0 else tuple(map(int, axis))


def own_dtype(x: Any) -> Any:
    """The dtype of a sum or product of `x`: TensorFlow does not widen small integers."""
    return None if x.dtype == jnp.bool_ else x.dtype


def _sum(x: Any, **where: Any) -> Any:
    return jnp.sum(x, dtype=own_dtype(x), **where)


def _prod(x: Any, **where: Any) -> Any:
    return jnp.prod(x, dtype=own_dtype(x), **where)


def _mean(x: Any, **where: Any) -> Any:
    if not jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.mean(x, **where)
    # That of integers is an integer, rounded to zero: [1, 0, 1, 0] has the mean 0.
    total = jnp.sum(x, **where)  # not in the dtype of small integers, which overflows
    count = jnp.asarray(x.size // max(total.size, 1), total.dtype)
    return jax.lax.div(total, count).astype(x.dtype)


reduce_all = _reduction("reduce_all", jnp.all, "Tell whether all elements are true")
reduce_any = _reduction("reduce_any", jnp.any, "Tell whether any element is true")
reduce_logsumexp = _reduction(
    "reduce_logsumexp",
    jax.nn.logsumexp,
    "Compute the logarithm of the sum of exponentials",
)
reduce_max = _reduction("reduce_max", jnp.max, "Compute the maximum")
reduce_mean = _reduction("reduce_mean", _mean, "Compute the mean, of integers an integer,")
reduce_min = _reduction("reduce_min", jnp.min, "Compute the minimum")
reduce_prod = _reduction("reduce_prod", _prod, "Multiply elements")
reduce_sum = _reduction("reduce_sum", _sum, "Add elements")


@over_tensors
def argmax(
    input: Any,
    axis: Any = None,
    name: str | None = None,
    dimension: Any = None,
    output_type: Any = None,
) -> Any:
    """Find the index of the largest element along an axis, by default the first."""
    return _index(jnp.argmax, input, axis, dimension, output_type)


@over_tensors
def argmin(
    input: Any,
    axis: Any = None,
    name: str | None = None,
    dimension: Any = None,
    output_type: Any = None,
) -> Any:
    """Find the index of the smallest element along an axis, by default the first."""
    return _index(jnp.argmin, input, axis, dimension, output_type)


def _index(func: Any, x: Any, axis: Any, dimension: Any, output_type: Any) -> Any:
    axis = dimension if axis is None else axis
    index = func(jnp.asarray(x), axis=0 if axis is None else axis)
    return index if output_type is None else index.astype(output_type)


@over_tensors
def cumsum(
    x: Any,
    axis: int = 0,
    exclusive: bool = False,
    reverse: bool = False,
    name: str | None = None,
) -> Any:
    """Compute the sums of elements up to each one, or with `exclusive` before it."""
    return _scan(jnp.cumsum, 0, x, axis, exclusive, reverse)


@over_tensors
def cumprod(
    x: Any,
    axis: int = 0,
    exclusive: bool = False,
    reverse: bool = False,
    name: str | None = None,
) -> Any:
    """Compute the products of elements up to each one, or with `exclusive` before it."""
    return _scan(jnp.cumprod, 1, x, axis, exclusive, reverse)


def _scan(
    func: Any, identity: int, x: Any, axis: int, exclusive: bool, reverse: bool
) -> Any:
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
    tensor: Any,
    ord: Any = "euclidean",
    axis: Any = None,
    keepdims: Any = None,
    name: str | None = None,
    keep_dims: Any = None,
) -> Any:
    """Compute a norm: of all elements as one vector, along an axis, or of matrices.

    Args:
        tensor: what to compute it of.
        ord: `"euclidean"`, which for matrices is `"fro"`, or what `numpy.linalg.norm`
            takes.
        axis: None for all elements, one axis of vectors, two of matrices.
        keepdims: whether to keep the axes, with length 1.
        name: name of the node.
        keep_dims: the same as `keepdims`.
    """
    x, axes = jnp.asarray(tensor), as_axes(axis)
    keeps = bool(keepdims or keep_dims)
    order = None if ord in ("euclidean", "fro") else ord
    if axes is not None:
        return jnp.linalg.norm(x, order, axis=axes, keepdims=keeps)
    whole = jnp.linalg.norm(jnp.ravel(x), order)
    return jnp.reshape(whole, (1,) * x.ndim) if keeps else whole
