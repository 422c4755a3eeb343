"""Loops that are differentiable in both modes, against unrolled ones, `scan` and formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

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
    with jax.disable_jit(False):
        np.testing.assert_allclose(derivative(root)(xs[1]), expected[1], rtol=1e-4)
    vmapped = jax.jit(jax.vmap(derivative(root)))(xs)
    np.testing.assert_allclose(vmapped, expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["grad", "hessian", "grad of grad"])
def test_derivatives_of_batch(name):
    """So is the derivative of a batch, whose elements end at different iterations."""
    xs = jnp.array([0.5, 9.0, 49.0])
    expected = [DERIVATIVES[name](unrolled_root)(x) for x in xs]

    def total(xs):
        return jax.vmap(root)(xs).sum()

    found = jax.jit(DERIVATIVES[name](total))(xs)
    found = found.diagonal() if found.ndim == 2 else found
    if name == "grad of grad":
        pytest.skip("of a vector there is none")
    np.testing.assert_allclose(found, expected, rtol=1e-4)
