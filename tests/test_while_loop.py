"""Loops that are differentiable in both modes, against unrolled ones and `scan`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jpyfunc
from jpyfunc._loops.while_loop import while_loop


def root(a):
    """Newton's square root."""

    def test(consts, carry):
        return abs(carry[0] * carry[0] - consts[0]) > 1e-5 * consts[0]

    def body(consts, carry):
        return [0.5 * (carry[0] + consts[0] / carry[0])]

    return while_loop(test, body, [a], [a])[0]


def unrolled_root(a):
    x = a
    while abs(x * x - a) > 1e-5 * a:
        x = 0.5 * (x + a / x)
    return x


def repeat(n, step, x, *consts):
    """Apply `step` to `x` for `n` times, in a loop whose length JAX does not know."""

    def body(consts, carry):
        return [carry[0] + 1, step(carry[1], *consts)]

    return while_loop(lambda _, carry: carry[0] < n, body, consts, [jnp.int32(0), x])[1]


def scanned(n, step, x, *consts):
    return jax.lax.scan(lambda x, _: (step(x, *consts), None), x, length=n)[0]


def layer(x, w):
    return jnp.tanh(w @ x)


X = jnp.array([0.3, -0.2, 0.9])
W = 0.4 * jnp.array([[1.0, -0.5, 0.3], [0.2, 0.9, -1.1], [-0.7, 0.4, 0.6]])

DERIVATIVES = {
    "value": lambda f: f,
    "grad": jax.grad,
    "jvp": lambda f: lambda a: jax.jvp(f, (a,), (1.0,))[1],
    "linearize": lambda f: lambda a: jax.linearize(f, a)[1](2.0),
    "hessian": jax.hessian,
    "grad of grad": lambda f: jax.grad(jax.grad(f)),
    "jacrev of jacfwd": lambda f: jax.jacrev(jax.jacfwd(f)),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f)),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_of_root(name):
    """Every derivative is that of the unrolled loop, alone and in batches."""
    derivative = DERIVATIVES[name]
    xs = jnp.array([0.5, 9.0, 49.0])
    expected = [derivative(unrolled_root)(x) for x in xs]
    # Where rounding decides whether there is one more iteration, both are this close.
    np.testing.assert_allclose(jax.jit(derivative(root))(xs[1]), expected[1], rtol=1e-3)
    np.testing.assert_allclose(jax.jit(jax.vmap(derivative(root)))(xs), expected, rtol=1e-3)


def test_eager():
    np.testing.assert_allclose(root(49.0), 7.0, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(root)(49.0), 1 / 14, rtol=1e-4)


def test_derivatives_of_batch():
    """Elements of a batch end at different iterations."""
    xs = jnp.array([0.5, 9.0, 49.0])

    def total(xs):
        return jax.vmap(root)(xs).sum()

    gradient = jax.jit(jax.grad(total))(xs)
    np.testing.assert_allclose(gradient, 0.5 / np.sqrt(xs), rtol=1e-4)
    expected = [jax.hessian(unrolled_root)(x) for x in xs]
    np.testing.assert_allclose(
        jax.jit(jax.hessian(total))(xs), np.diag(expected), rtol=1e-4
    )


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_of_elements_that_end_apart(name):
    """Iterations that another element makes are none of this one's derivative."""

    def derivative(loop, x, n):
        def growing(x):
            k = 1 + 0.001 * x
            return loop(n, lambda x, k: k * (x + 0.01 * jnp.sin(2 * x)), x, k)

        return DERIVATIVES[name](growing)(x)

    xs, ns = jnp.array([0.5, 1.3, 2.2, 0.9]), [1, 140, 300, 0]
    expected = [derivative(scanned, x, n) for x, n in zip(xs, ns, strict=True)]
    found = jax.jit(jax.vmap(lambda x, n: derivative(repeat, x, n)))(xs, jnp.array(ns))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def branching(x, w):
    return jax.lax.cond(x[0] > 0.1, lambda x: layer(x, w), lambda x: 1.1 * x, x)


def remembered(loop):
    return jax.checkpoint(lambda x, w: jnp.sin(loop(5, layer, x, w)))


def in_scan(loop):
    def step(x, _, w):
        return loop(3, layer, x, w), x.sum()

    return lambda x, w: jax.lax.scan(lambda x, _: step(x, _, w), x, length=4)[0]


def in_cond(loop):
    return lambda x, w: jax.lax.cond(x[0] > 0, lambda: loop(3, layer, x, w), lambda: x)


def nested(loop):
    return lambda x, w: loop(3, lambda x, w: loop(2, layer, x, w) + 0.1 * x, x, w)


PROGRAMS = {
    "matrix": lambda loop: lambda x, w: loop(5, layer, x, w),
    "no iteration": lambda loop: lambda x, w: loop(0, layer, x, w),
    "linear": lambda loop: lambda x, w: loop(5, lambda x, w: w @ x, x, w),
    "cond inside": lambda loop: lambda x, w: loop(5, branching, x, w),
    "checkpoint inside": lambda loop: lambda x, w: loop(5, jax.checkpoint(layer), x, w),
    "checkpoint": remembered,
    "in scan": in_scan,
    "in cond": in_cond,
    "nested": nested,
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("derivative", [jax.jacrev, jax.jacfwd, jax.hessian])
def test_programs(name, derivative):
    """A loop in and around other control flow has the derivatives of `scan`."""
    found = jax.jit(derivative(PROGRAMS[name](repeat), (0, 1)))(X, W)
    expected = jax.jit(derivative(PROGRAMS[name](scanned), (0, 1)))(X, W)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.mark.parametrize("n", [127, 128, 129, 257, 16385])
def test_many_iterations(n):
    """The gradient is right around the numbers where slots are thinned out."""

    def step(x):
        return x + 1e-4 * jnp.sin(x)

    found = jax.jit(jax.grad(lambda x: repeat(n, step, x)))(0.7)
    expected = jax.jit(jax.grad(lambda x: scanned(n, step, x)))(0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_memory():
    """Memory for the gradient does not grow with the number of iterations."""

    def total(n, x):
        return repeat(n, jnp.sin, x).sum()

    gradient = jax.jit(jax.grad(total, 1)).lower(20_000, jnp.ones(1000)).compile()
    saved = gradient.memory_analysis().temp_size_in_bytes
    assert saved < 0.1 * 20_000 * 1000 * 4


def test_batch_of_gradients():
    """Each element has the gradient of its own iterations, by a shared constant."""
    xs, ns = jnp.stack([X, 2 * X]), jnp.array([2, 6])

    def total(x, n, w):
        return repeat(n, layer, x, w).sum()

    expected = [
        jax.grad(lambda x, w, n=n: scanned(n, layer, x, w).sum(), (0, 1))(x, W)
        for x, n in zip(xs, (2, 6), strict=True)
    ]
    of_x, of_w = jax.jit(jax.vmap(jax.grad(total, (0, 2)), (0, 0, None)))(xs, ns, W)
    for i, (x, w) in enumerate(expected):
        np.testing.assert_allclose(of_x[i], x, rtol=1e-4)
        np.testing.assert_allclose(of_w[i], w, rtol=1e-4)

    def of_batch(xs, w):
        return jax.vmap(total, (0, 0, None))(xs, ns, w).sum()

    of_w = jax.jit(jax.grad(of_batch, 1))(xs, W)
    np.testing.assert_allclose(of_w, expected[0][1] + expected[1][1], rtol=1e-4)


def grad_of_grad(f, argnum):
    return jax.grad(jax.grad(f, argnum), argnum)


@pytest.mark.parametrize("derivative", [jax.grad, jax.hessian, grad_of_grad])
def test_branches_of_batch(derivative):
    """In a batch, a `cond` chooses by element among what two loops have saved."""

    def chosen(loop):
        def run(p, x):
            def branch(n, step):
                return lambda: loop(n, lambda y, k: step(y) + 0.1 * k, x, x)

            return jax.lax.cond(p, branch(5, jnp.cos), branch(3000, jnp.sin))

        return run

    ps, xs = jnp.array([True, False, True]), jnp.array([0.3, 0.4, 0.5])
    found = jax.jit(jax.vmap(derivative(chosen(repeat), 1)))(ps, xs)
    one_by_one = jax.jit(derivative(chosen(scanned), 1))
    expected = [one_by_one(p, x) for p, x in zip(ps, xs, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_elements_that_are_done():
    """Where an element ends, the derivative of one more iteration may be infinite."""

    def roots(x, r):
        def body(consts, carry):
            x, y = carry
            return [x - consts[0], y + jnp.sqrt(x) * consts[0]]

        return while_loop(lambda _, carry: carry[0] > 0, body, [r], [x, 0.0 * x])[1]

    xs = jnp.array([1.0, 3.0, 5.0])
    expected = sum(jax.grad(roots, 1)(x, 1.0) for x in xs)
    found = jax.grad(lambda r: jax.vmap(roots, (0, None))(xs, r).sum())(1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_keys_and_flags():
    """Keys, integers and booleans are carried, and have no derivatives."""

    def body(_, carry):
        key, _, x = carry
        key, drawn = jax.random.split(key)
        return [key, x > 0.1, x * jax.random.uniform(drawn)]

    def product(x):
        return while_loop(lambda _, c: c[1], body, [], [jax.random.key(1), True, x])[2]

    def expected(x):
        carry = [jax.random.key(1), True, x]
        while carry[1]:
            carry = body([], carry)
        return carry[2]

    np.testing.assert_allclose(jax.jit(jax.grad(product))(2.0), jax.grad(expected)(2.0))
    assert jax.grad(lambda x: repeat(3, jnp.sin, x).sum())(jnp.zeros((0, 4))).shape == (
        0,
        4,
    )


def test_custom_rules():
    """The rules that a function has are used in the loop."""

    @jax.custom_vjp
    def tripled(x):
        return jnp.sin(x)

    tripled.defvjp(lambda x: (tripled(x), x), lambda x, ct: (3 * ct * x,))
    found = jax.grad(lambda x: repeat(3, tripled, x))(0.7)
    np.testing.assert_allclose(found, jax.grad(lambda x: scanned(3, tripled, x))(0.7))


def test_check_grads():
    with jax.enable_x64(True):
        x, w = np.array(X, float), np.array(W, float)
        check_grads(lambda x, w: repeat(5, layer, x, w).sum(), (x, w), 2, ["fwd", "rev"])


def test_stateful_calls():
    """A stateful call runs once in each iteration, or is refused."""
    runs = []

    @jpyfunc.py_func(stateful=True)
    def count(x):
        runs.append(x)
        return 2 * x

    def doubled(x):
        return while_loop(lambda _, c: c[0] < 9, lambda _, c: [count(c[0])], [], [x])[0]

    compiled = jax.jit(doubled).lower(1.5).compile()
    runs.clear()
    assert compiled(1.5) == 12
    assert len(runs) == 3
    with pytest.raises(jpyfunc.UnsupportedError, match="a second time"):
        jax.grad(doubled)(1.5)
    with pytest.raises(jpyfunc.UnsupportedError, match="every iteration"):
        jax.vmap(doubled)(jnp.ones(3))


def test_forward_alone():
    """Without a derivative, and forward, it is one loop of JAX's own, of what is used."""
    text = jax.jit(root).lower(2.0).as_text()
    assert text.count("stablehlo.while") == 1
    text = jax.jit(lambda x: jax.jvp(root, (x,), (x,))).lower(2.0).as_text()
    assert text.count("stablehlo.while") == 1


def test_shard_map():
    """On a mesh with one device; constants that do not vary have gradients."""
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))

    def step(x, w):
        return jnp.sin(x * w)

    xs = jnp.linspace(0.1, 2.0, 4)
    for derivative in (jax.grad, jax.hessian):

        def of_loop(loop, derivative=derivative):
            sharded = jax.shard_map(
                lambda x, w: loop(3, step, x, w),
                mesh=mesh,
                in_specs=(P("i"), P()),
                out_specs=P("i"),
            )
            return jax.jit(derivative(lambda w: sharded(xs, w).sum()))(1.2)

        np.testing.assert_allclose(of_loop(repeat), of_loop(scanned), rtol=1e-4)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda _, c: [c[0], c[0]], "must return 1 arrays"),
        (lambda _, c: [c[0][None]], "must keep its type"),
        (lambda _, c: [c[0] > 0], "must keep its type"),
    ],
)
def test_bodies_that_are_refused(body, message):
    with pytest.raises(TypeError, match=message):
        while_loop(lambda _, c: c[0] < 1, body, [], [jnp.float32(0)])


def test_tests_that_are_refused():
    with pytest.raises(TypeError, match="boolean scalar"):
        while_loop(lambda _, c: c[0] < 1, lambda _, c: c, [], [jnp.zeros(2)])
