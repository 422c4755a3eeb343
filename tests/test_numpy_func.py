"""`numpy_func`: NumPy in and out, no derivatives."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpyfunc import (
    InferenceError,
    NotDifferentiableError,
    ResultError,
    numpy_func,
    py_func,
    raise_original,
)

Struct = jax.ShapeDtypeStruct
F32 = Struct((), jnp.float32)
V = jnp.array([3.0, 1.0, 2.0])


@numpy_func(Tout=Struct((3,), jnp.float32))
def ranks(x):
    """Rank x."""
    return np.argsort(np.argsort(x)).astype(np.float32)


FORMS = {
    "decorator": ranks,
    "in place": lambda x: numpy_func(ranks.__wrapped__, [x], Struct((3,), jnp.float32)),
    "single array": lambda x: numpy_func(ranks.__wrapped__, x, Struct((3,), jnp.float32)),
    "callable Tout": numpy_func(ranks.__wrapped__, Tout=lambda x: x),
}


@pytest.mark.parametrize("form", FORMS)
def test_call_forms(transform, form):
    np.testing.assert_array_equal(transform(FORMS[form])(V), [2, 0, 1])


def test_it_looks_like_its_function():
    assert ranks.__name__ == "ranks"
    assert ranks.__doc__.startswith("Rank x.\n")
    assert ranks == numpy_func(ranks.__wrapped__, Tout=Struct((3,), jnp.float32))
    assert ranks != py_func(ranks.__wrapped__, Tout=Struct((3,), jnp.float32))


def test_the_body_gets_read_only_numpy_arrays(transform):
    seen = []

    def body(tree, mode, *, s):
        seen.extend(jax.tree.leaves(tree))
        seen.append(s)
        assert mode == "fast"
        return s

    args = ({"a": V, "b": 2.0}, "fast")
    f = transform(lambda s: numpy_func(body, Tout=Struct((), jnp.int32))(*args, s=s))
    assert f(np.int8(3)) == 3
    for got, want in zip(seen, [V, 2.0, np.int8(3)], strict=True):
        assert type(got) is np.ndarray
        assert got.dtype == jnp.asarray(want).dtype
        np.testing.assert_array_equal(got, want)
        with pytest.raises(ValueError, match="read-only"):
            got[...] = 0


@pytest.mark.parametrize(
    ("make", "tout", "expected"),
    [
        (lambda x: x * np.float64(2), Struct((3,), jnp.float32), [6, 2, 4]),
        (lambda x: x[::-1], Struct((3,), jnp.float32), [2, 1, 3]),
        (lambda x: x, Struct((3,), jnp.float32), [3, 1, 2]),
        (lambda x: x.tolist(), Struct((3,), jnp.bfloat16), [3, 1, 2]),
        (lambda x: x.max(), F32, 3),
        (lambda x: float(x.max()), F32, 3),
        (lambda x: int(x.max()), Struct((), jnp.uint8), 3),
        (lambda x: np.argmax(x), Struct((), jnp.int32), 0),
        (lambda x: jnp.max(x), F32, 3),
    ],
)
def test_results(transform, make, tout, expected):
    y = transform(numpy_func(make, Tout=tout))(V)
    assert isinstance(y, jax.Array)
    assert (y.shape, y.dtype) == (tout.shape, tout.dtype)
    np.testing.assert_array_equal(np.asarray(y, np.float32), expected)


def test_a_buffer_that_the_body_reuses_does_not_change_earlier_results(transform):
    raw = np.zeros(4096 + 16, np.float32)
    start = (-raw.ctypes.data) % 64 // 4  # the alignment with which XLA shares memory
    buffer = raw[start : start + 4096]

    def body(x):
        buffer[:] = x
        return buffer

    f = transform(numpy_func(body, Tout=Struct((4096,), jnp.float32)))
    first, second = f(1.0), f(2.0)
    buffer[:] = 3
    np.testing.assert_array_equal(first, np.ones(4096))
    np.testing.assert_array_equal(second, np.full(4096, 2))


def test_checks_are_those_of_py_func(transform):
    f = transform(numpy_func(lambda x: (x, np.array(["a"])), Tout=(F32, F32), name="n"))
    with pytest.raises(ResultError) as caught, raise_original():
        f(1.0)
    assert "numpy_func 'n': result[1]: expected an array of numbers" in str(caught.value)


def test_shapes_are_inferred_when_the_body_runs_and_refused_when_traced():
    f = numpy_func(lambda x: np.sort(x) * 2)
    np.testing.assert_array_equal(f(V), [2, 4, 6])
    text = "'<lambda>': .* needs a concrete value .*: conversion to NumPy of float32[3]. .*"
    with pytest.raises(InferenceError, match=text.replace("[3]", r"\[3\]")):
        jax.jit(f)(V)


def test_keys_stay_keys(transform):
    f = transform(
        numpy_func(
            lambda k: np.asarray(jax.random.key_data(k))[1], Tout=Struct((), "uint32")
        )
    )
    assert f(jax.random.key(7)) == 7


REFUSED_DERIVATIVES = {
    "grad": lambda f, x: jax.grad(lambda x: f(x).sum())(x),
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "vjp": lambda f, x: jax.vjp(f, x),
    "linearize": lambda f, x: jax.linearize(f, x),
    "grad in the middle": lambda f, x: jax.grad(lambda x: (f(x * 2) * x).sum())(x),
    "vmap of grad": lambda f, x: jax.vmap(jax.grad(lambda x: f(x).sum()))(x[None]),
    "hessian": lambda f, x: jax.hessian(lambda x: f(x).sum())(x),
    "scan": lambda f, x: jax.grad(
        lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=2)[0].sum()
    )(x),
}


@pytest.mark.parametrize("name", REFUSED_DERIVATIVES)
def test_a_derivative_is_refused(transform, name):
    text = re.escape("numpy_func 'ranks' is not differentiable")
    with pytest.raises(NotDifferentiableError, match=text):
        transform(lambda x: REFUSED_DERIVATIVES[name](ranks, x))(V)


def test_works_inside_grad_where_no_tangent_flows_in(transform):
    expected = 2 * np.array(V) * np.array([2, 0, 1])

    def stopped(x):
        return (ranks(jax.lax.stop_gradient(x)) * x**2).sum()

    def other_operand(x, y):
        return (ranks(y) * x**2).sum()

    def of_integers(x):
        n = numpy_func(np.sort, [jnp.argsort(x)], Struct((3,), jnp.int32))
        return (ranks(n) * x).sum()

    np.testing.assert_allclose(transform(jax.grad(stopped))(V), expected)
    np.testing.assert_allclose(transform(jax.grad(other_operand))(V, V), expected)
    np.testing.assert_allclose(transform(jax.grad(of_integers))(V), [0, 1, 2])


def test_an_integer_result_carries_no_tangent(transform):
    count = numpy_func(lambda x: np.sum(x > 1), Tout=Struct((), jnp.int32))
    f = transform(jax.grad(lambda x: (x**2).sum() * count(x)))
    np.testing.assert_allclose(f(V), 2 * 2 * np.array(V))


@pytest.mark.parametrize("method", ["sequential", "expand_dims", "broadcast_all"])
def test_vmap(transform, method):
    shapes = []

    def body(x, y):
        shapes.append((x.shape, y.shape))
        assert type(x) is type(y) is np.ndarray
        return np.cumsum(x, axis=-1) + y

    f = numpy_func(body, Tout=lambda x, y: x, vmap_method=method)
    x = jnp.arange(6.0).reshape(2, 3)
    y = transform(jax.vmap(f, in_axes=(0, None)))(x, V)
    np.testing.assert_array_equal(y, np.cumsum(x, axis=-1) + np.array(V))
    assert (
        shapes
        == {
            "sequential": [((3,), (3,))] * 2,
            "expand_dims": [((2, 3), (1, 3))],
            "broadcast_all": [((2, 3), (2, 3))],
        }[method]
    )
