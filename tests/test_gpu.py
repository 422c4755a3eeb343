"""Calls from programs on a GPU: operands copied to the private CPU client and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case, assert_close, log_huber, scalar

from jpyfunc import numpy_func, py_func, raise_original


def gpus():
    try:
        return jax.devices("gpu")
    except RuntimeError:  # JAX has no such backend in this process
        return []


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpus(), reason="JAX finds no CUDA or ROCm device here"),
]


def is_on_gpu(x):
    return all(device.platform == "gpu" for device in x.devices())


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_forward_and_derivatives(case: Case):
    got = jax.jit(case.wrapped)(*case.args)
    assert all(is_on_gpu(x) for x in jax.tree.leaves(got))
    assert_close(got, case.plain(*case.args), rtol=1e-3)
    arguments = tuple(range(len(case.args)))
    for take in (jax.grad, jax.hessian):
        got = jax.jit(take(scalar(case.wrapped), arguments))(*case.args)
        assert_close(
            got, take(scalar(case.plain), arguments)(*case.args), rtol=1e-2, atol=1e-3
        )


def test_the_body_runs_on_the_cpu():
    seen = []

    def body(x):
        seen.append({device.platform for device in (x * 2).devices()})
        return x

    jax.block_until_ready(jax.jit(py_func(body, Tout=lambda x: x))(jnp.ones(3)))
    assert seen == [{"cpu"}]


def test_vmap_and_scan():
    f, xs = py_func(log_huber, Tout=jnp.float32), jnp.linspace(0.5, 4.0, 7)
    got = jax.jit(jax.vmap(jax.grad(f), (0, None)))(xs, 2.0)
    assert_close(got, jnp.stack([jax.grad(log_huber)(x, 2.0) for x in xs]))
    loop = lambda x: jax.lax.scan(lambda c, _: (f(c, 1.0) * 0.5, c), x, length=4)  # noqa: E731
    got, c = jax.jit(jax.grad(lambda x: loop(x)[0]))(0.7), jnp.float32(0.7)

    def plain(c):
        for _ in range(4):
            c = log_huber(c, 1.0) * 0.5
        return c

    np.testing.assert_allclose(got, jax.grad(plain)(c), rtol=1e-4)


def test_exceptions():
    def body(x):
        if x < 0:
            raise ZeroDivisionError("on purpose")
        return x

    f = jax.jit(py_func(body, Tout=jnp.float32))
    for _ in range(2):
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="on purpose"):
            jax.block_until_ready(f(-1.0))
        with pytest.raises(ZeroDivisionError), raise_original():
            f(-1.0)
        assert f(1.0) == 1.0


def test_64_megabytes():
    x = jnp.arange(16 * 2**20, dtype=jnp.float32)
    f = jax.jit(py_func(lambda x: x[::-1], Tout=lambda x: x))
    assert bool((f(x) == x[::-1]).all())


def test_every_dtype_makes_the_round_trip():
    for dtype in (
        jnp.bool_,
        jnp.int8,
        jnp.uint32,
        jnp.bfloat16,
        jnp.float16,
        jnp.complex64,
    ):
        x = jnp.ones((3, 2), dtype)
        got = jax.jit(numpy_func(lambda x: x, Tout=lambda x: x))(x)
        assert got.dtype == dtype
        assert bool((got == x).all())


def test_many_calls_in_flight_and_arrays_of_the_gpu():
    n = 600
    weights = jnp.ones((n, n)) / n
    committed = jax.device_put(weights, gpus()[0])

    def body(x):
        y = jnp.dot(x, weights) + jnp.sort(jnp.dot(x, committed), axis=0)
        return y if y.sum() > 0 else -y

    f = jax.jit(lambda x: py_func(body, Tout=lambda x: x)(x * 2) + 1)
    x = jnp.ones((n, n))
    results = [f(x + i) for i in range(50)]
    for i, result in enumerate(results):
        np.testing.assert_allclose(result[0, 0], 4.0 * (1 + i) + 1, rtol=1e-3)
