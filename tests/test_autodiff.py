"""Every derivative of every case, eager and under jit, against plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CASES,
    CUSTOM_VJP,
    SCALAR,
    Case,
    assert_close,
    eager_and_jit,
    log_huber,
    scalar,
)
from jax.test_util import check_grads

from jpyfunc import NotDifferentiableError, py_func, raise_original


def tangents_like(args):
    return jax.tree.map(lambda x: jnp.cos(jnp.asarray(x)) + 0.5, args)


def jvp(f, args):
    return jax.jvp(f, args, tangents_like(args))


def vjp(f, args):
    out, pull_back = jax.vjp(f, *args)
    return out, pull_back(tangents_like(out))


def linearize(f, args):
    out, jvp = jax.linearize(f, *args)
    return out, jvp(*tangents_like(args))


def some_tangents(f, args):
    """Differentiate with respect to the first argument only."""
    return jax.jvp(lambda x: f(x, *args[1:]), args[:1], tangents_like(args[:1]))


def everything(f, args):
    return tuple(range(len(args)))


DERIVATIVES = {
    "forward": lambda f, args: f(*args),
    "jvp": jvp,
    "vjp": vjp,
    "linearize": linearize,
    "some_tangents": some_tangents,
    "value_and_grad": lambda f, args: jax.value_and_grad(scalar(f), everything(f, args))(
        *args
    ),
    "jacfwd": lambda f, args: jax.jacfwd(f, everything(f, args))(*args),
    "jacrev": lambda f, args: jax.jacrev(f, everything(f, args))(*args),
    "hessian": lambda f, args: jax.hessian(scalar(f), everything(f, args))(*args),
}
# Every mix of two; the Hessian above is forward over reverse.
MIXES = {
    "rev_rev": lambda f, args: jax.jacrev(jax.grad(scalar(f)))(*args),
    "fwd_fwd": lambda f, args: jax.jacfwd(jax.jacfwd(scalar(f)))(*args),
    "rev_fwd": lambda f, args: jax.jacrev(jax.jacfwd(scalar(f)))(*args),
}


# Every derivative of the cases that differ in operands, results or length. Of the others,
# which differ in what the body does, only the derivatives that all others consist of.
# Matrices eagerly only for the two that JAX takes the least time for.
SHAPES = CASES[1:5]
SHORT = ("log_huber_outside", "two_results")
EVERY = [(case, derivative) for case in SHAPES for derivative in DERIVATIVES] + [
    (case, derivative)
    for case in CASES
    for derivative in ("forward", "jvp", "vjp", "hessian")
    if case not in SHAPES
]


@pytest.mark.parametrize("case", [*CASES, CUSTOM_VJP], ids=repr)
def test_plain_functions_agree_with_their_bodies(case: Case):
    assert_close(case.body(*case.args), case.plain(*case.args))


def compare(case: Case, take, eager: bool):
    wrapped = case.wrapped
    want = jax.jit(lambda *args: take(case.plain, args))(*case.args)
    for got in eager_and_jit(lambda *args: take(wrapped, args), *case.args, eager=eager):
        assert_close(got, want)


@pytest.mark.parametrize(("case", "derivative"), EVERY, ids=str)
def test_derivative(case: Case, derivative: str):
    eager = case.name in SHORT or derivative not in ("jacfwd", "jacrev", "hessian")
    compare(case, DERIVATIVES[derivative], eager)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("case", SHAPES, ids=repr)
def test_second_order(case: Case, mix: str):
    compare(case, MIXES[mix], eager=case.name in SHORT)


THIRD_ORDER = {
    "rev_rev_rev": lambda f: jax.grad(jax.grad(jax.grad(f))),
    "fwd_fwd_fwd": lambda f: jax.jacfwd(jax.jacfwd(jax.jacfwd(f))),
    "fwd_rev_fwd": lambda f: jax.jacfwd(jax.jacrev(jax.jacfwd(f))),
    "rev_fwd_rev": lambda f: jax.jacrev(jax.jacfwd(jax.jacrev(f))),
}


@pytest.mark.parametrize("x", [1.0, 3.0])
@pytest.mark.parametrize("order", THIRD_ORDER)
def test_third_order(order, x):
    wrapped = py_func(log_huber, Tout=jnp.float32)
    for got in eager_and_jit(THIRD_ORDER[order](wrapped), x, 2.0):
        # d3/dx3 of x**2 is 0, of m**2 log(x**2) is 4 m**2 / x**3.
        np.testing.assert_allclose(got, 0.0 if x <= 2 else 16 / x**3, rtol=1e-5)


@pytest.mark.parametrize("modes", [["fwd"], ["rev"]], ids="+".join)
def test_finite_differences_to_third_order(modes, transform):
    with jax.enable_x64(True):
        wrapped = py_func(log_huber, Tout=jnp.float64)
        for x in (1.0, 3.0):
            check_grads(transform(wrapped), (x, 2.0), order=3, modes=modes)


def test_custom_vjp_in_the_body_gives_its_own_gradient(transform):
    wrapped = CUSTOM_VJP.wrapped
    got = transform(jax.value_and_grad(wrapped))(0.7)
    want = np.sin(0.7) * 0.7, 2 * np.cos(0.7) * 0.7 + np.sin(0.7)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_custom_vjp_in_the_body_differentiated_twice():
    """In reverse mode, the second derivative is that of the backward rule."""
    plain = jax.jit(jax.grad(jax.grad(CUSTOM_VJP.plain)))(0.7)
    for got in eager_and_jit(jax.grad(jax.grad(CUSTOM_VJP.wrapped)), 0.7):
        assert_close(got, plain)


def test_a_value_returned_several_times(transform):
    def body(x):
        y = jnp.sin(x)
        return y, x, y, y

    f = py_func(body, Tout=(SCALAR,) * 4)
    weighted = lambda x: sum(w * y for w, y in zip((1, 2, 4, 8), f(x), strict=True))  # noqa: E731
    np.testing.assert_allclose(
        transform(jax.grad(weighted))(0.7), 13 * np.cos(0.7) + 2, rtol=1e-6
    )


def test_integers_and_bools_mixed_with_floats(transform):
    def body(x, n, flag):
        return (x**n if flag else x), n + 1, x > 0

    wrapped = py_func(body)
    args = (jnp.array([1.5, 2.0]), 3, True)
    primals, tangents = transform(
        lambda x: jax.jvp(lambda x: wrapped(x, 3, True), (x,), (jnp.ones(2),))
    )(args[0])
    np.testing.assert_allclose(primals[0], args[0] ** 3, rtol=1e-6)
    assert primals[1] == 4
    assert primals[2].tolist() == [True, True]
    np.testing.assert_allclose(tangents[0], 3 * args[0] ** 2, rtol=1e-6)
    assert tangents[1].dtype == jax.dtypes.float0
    assert tangents[2].dtype == jax.dtypes.float0

    gradient = jax.grad(lambda x, n: wrapped(x, n, False)[0].sum(), (0, 1), allow_int=True)
    by_x, by_n = transform(gradient)(args[0], 3)
    assert by_x.tolist() == [1.0, 1.0]
    assert by_n.dtype == jax.dtypes.float0


def test_float0_tangents_given_by_hand(transform):
    wrapped = py_func(lambda x, n: x * n, Tout=jnp.float32)
    zero = np.zeros((), jax.dtypes.float0)
    got = transform(lambda x: jax.jvp(wrapped, (x, 3), (1.0, zero)))(2.0)
    assert [float(y) for y in got] == [6.0, 3.0]


def test_prng_key_operands_and_results(transform):
    def body(key, x):
        new_key, sub = jax.random.split(key)
        return new_key, jax.random.normal(sub, (2,)) * x

    wrapped, key = py_func(body), jax.random.key(7)
    new_key, y = transform(wrapped)(key, 3.0)
    want_key, want = body(key, 3.0)
    assert new_key.dtype == want_key.dtype
    assert (jax.random.key_data(new_key) == jax.random.key_data(want_key)).all()
    np.testing.assert_allclose(y, want, rtol=1e-6)
    got = transform(jax.jacrev(lambda x: wrapped(key, x)[1]))(3.0)
    np.testing.assert_allclose(got, want / 3.0, rtol=1e-6)


def test_complex_and_half_precision(transform):
    def body(z):
        return z * jnp.conj(z) * z if jnp.abs(z) > 1 else z

    wrapped, z = py_func(body), jnp.complex64(1 + 2j)
    got = transform(lambda z: jax.vjp(wrapped, z)[1](jnp.complex64(1j))[0])(z)
    np.testing.assert_allclose(got, jax.vjp(body, z)[1](jnp.complex64(1j))[0], rtol=1e-6)
    half = jnp.bfloat16(0.5)
    got = transform(jax.grad(py_func(jnp.sin, Tout=jnp.bfloat16)))(half)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(got), np.cos(0.5), rtol=1e-2)


def test_only_perturbed_operands_and_needed_cotangents_reach_the_host(transform):
    """Large constant operands must not get tangents or cotangents of zeros."""
    differentiated = []

    def body(x, table, y):
        differentiated.append([isinstance(a, jax.core.Tracer) for a in (x, table, y)])
        return x * 2, table, y * table.sum()

    exact = lambda x, table, y: (x, table, y)  # noqa: E731
    wrapped = py_func(body, Tout=exact)
    table = jnp.ones((5,))
    gradient = transform(jax.grad(lambda x: wrapped(x, table, 1.0)[0]))(1.0)
    assert gradient == 2.0
    assert differentiated == [[True, False, False]]


@pytest.mark.parametrize("size", [1, 3])
def test_linear_transpose_of_a_linear_body(size, transform):
    a = jnp.arange(6.0).reshape(2, 3)
    wrapped = py_func(lambda x: a @ x, Tout=jax.ShapeDtypeStruct((2, size), jnp.float32))
    cotangent = jnp.ones((2, size))
    x = jax.ShapeDtypeStruct((3, size), jnp.float32)
    (got,) = transform(lambda ct: jax.linear_transpose(wrapped, x)(ct))(cotangent)
    np.testing.assert_allclose(got, a.T @ cotangent)


def test_transposes_with_respect_to_some_operands_and_of_some_results():
    """The transpose of a JVP is the VJP with respect to the same operands, and back."""
    args, tangents = (0.7, 1.3, -0.4), (2.0, 3.0, 5.0)

    def body(x, y, z):
        return jnp.sin(x * y) + z, x * z * z

    def of_pullbacks(f):
        pullback = jax.vjp(f, *args)[1]
        only = lambda ct: pullback((0.0, ct))[2]  # noqa: E731
        return (
            jax.linear_transpose(only, 1.0)(tangents[2]),
            jax.linear_transpose(pullback, (1.0, 1.0))(tangents),
        )

    def of_push(f):
        jvp = jax.linearize(f, *args)[1]
        only = lambda t: jvp(0.0, t, 0.0)[0]  # noqa: E731
        return jax.linear_transpose(only, 1.0)(2.0), jax.linear_transpose(jvp, *args)(
            (2.0, 3.0)
        )

    f = py_func(body, Tout=(SCALAR, SCALAR))
    for take in (of_pullbacks, of_push):
        want = jax.jit(lambda take=take: take(body))()
        for got in eager_and_jit(lambda take=take: take(f)):
            assert_close(got, want)


def _branches(x):
    return x if x > 0 else 2 * x


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (jnp.sin, "its body is not .*'sin'"),
        (lambda x: x * x, "its body is not"),
        (_branches, r"its body at .*test_autodiff.py:\d+ branches on what it has to be"),
        (lambda x: x * float(x), r"its body at .*test_autodiff.py:\d+ reads the value of"),
        (lambda x: x * np.asarray(x), "converts to NumPy what it has to be linear in"),
    ],
)
def test_linear_transpose_of_a_body_that_is_not_linear(body, words, transform):
    wrapped = py_func(body, Tout=SCALAR, name="f")
    words = rf"'f' is transposed.*{words}((?!trace).)*jax.custom_vjp.*linear_call"
    with pytest.raises(NotDifferentiableError, match=words), raise_original():
        jax.block_until_ready(
            transform(lambda c: jax.linear_transpose(wrapped, 1.0)(c))(1.0)
        )


def test_what_a_body_raises_while_it_is_transposed_is_its_own(transform):
    def body(x):
        raise AssertionError("own")

    wrapped = py_func(body, Tout=SCALAR)
    with pytest.raises(AssertionError, match=r"^own"), raise_original():
        jax.block_until_ready(
            transform(lambda c: jax.linear_transpose(wrapped, 1.0)(c))(1.0)
        )


def test_pure_derivatives_that_nothing_uses_do_not_run():
    calls = []

    def body(x):
        calls.append(1)
        return x * 2

    wrapped = py_func(body, Tout=jax.ShapeDtypeStruct((), jnp.float32))
    value, _ = jax.jit(lambda x: (jax.value_and_grad(wrapped)(x)[0], x))(1.0)
    assert value == 2.0
    assert len(calls) == 1
