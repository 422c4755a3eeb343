"""`vmap` of and under every derivative, with each `vmap_method`, against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, eager_and_jit, log_huber, loop, plain_log_huber, scalar

from jpyfunc import py_func

xs = jnp.linspace(0.5, 4.0, 7)
ms = jnp.linspace(1.0, 3.0, 7)
wrapped = py_func(log_huber, Tout=jnp.float32)


DERIVATIVES = {
    "forward": lambda f: f,
    "grad": lambda f: jax.grad(f, (0, 1)),
    "jvp": lambda f: lambda x, m: jax.jvp(f, (x, m), (1.0, 0.5)),
    "hessian": lambda f: jax.hessian(f, (0, 1)),
    "rev_rev": lambda f: jax.grad(jax.grad(f)),
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap_of_derivatives(in_axes, derivative):
    take = DERIVATIVES[derivative]
    args = tuple(
        2.0 if axis is None else a for axis, a in zip(in_axes, (xs, ms), strict=True)
    )
    columns = [a if axis == 0 else [2.0] * 7 for axis, a in zip(in_axes, args, strict=True)]
    want = loop(jax.jit(take(plain_log_huber)), *columns)
    eager = derivative != "hessian" or in_axes == (0, None)
    for got in eager_and_jit(jax.vmap(take(wrapped), in_axes), *args, eager=eager):
        assert_close(got, want)


@pytest.mark.parametrize("derivative", ["grad", "hessian", "jvp"])
def test_derivatives_of_vmap(derivative):
    """The operand that all elements share collects the sum of its cotangents."""
    take = DERIVATIVES[derivative]

    def batched(function):
        return lambda x, m: jnp.sum(jax.vmap(function, (0, None))(xs * x, m))

    want = jax.jit(take(batched(plain_log_huber)))(1.5, 2.0)
    for got in eager_and_jit(take(batched(wrapped)), 1.5, 2.0):
        assert_close(got, want)


def matvec(a, x):
    return jnp.tanh(a @ x) if x.sum() > 0 else a @ x


@pytest.mark.parametrize("out_axes", [0, 1, -1])
@pytest.mark.parametrize("in_axes", [(0, 0), (2, 1), (-1, None)], ids=str)
def test_in_axes_and_out_axes(in_axes, out_axes, transform):
    a = jax.random.normal(jax.random.key(0), (3, 3, 3))
    x = jax.random.normal(jax.random.key(1), (3, 3))[
        0 if in_axes[1] is None else slice(None)
    ]
    got = transform(jax.vmap(py_func(matvec, Tout=jnp.float32), in_axes, out_axes))(a, x)
    rows = [
        matvec(jnp.moveaxis(a, in_axes[0], 0)[i],
               x if in_axes[1] is None else jnp.moveaxis(x, in_axes[1], 0)[i])
        for i in range(3)
    ]  # fmt: skip
    assert_close(got, jnp.stack(rows, out_axes))


def test_nested_vmap_and_derivatives_between():
    def table(function):
        inner = jax.vmap(jax.grad(function), (None, 0))
        return lambda x, m: jax.vmap(jax.jacfwd(inner), (0, None))(x, m)

    hessian = jax.jit(jax.hessian(plain_log_huber))
    want = loop(lambda x: loop(lambda m: hessian(x, m), ms), xs)
    for got in eager_and_jit(table(wrapped), xs, ms):
        assert_close(got, want)


def elementwise(x, w):
    """A body without a branch, which is correct on whole batches, too."""
    return jnp.sin(x) * w, x.sum(-1) * 0 + 1


@pytest.mark.parametrize("derivative", ["forward", "grad", "hessian", "grad_of_vmap"])
def test_methods_agree(derivative):
    x, w = jnp.arange(6.0).reshape(2, 3), jnp.array([1.0, 2.0, 3.0])

    def take(function, over):
        if derivative == "grad_of_vmap":
            return lambda x, w: jax.grad(scalar(over(function)), (0, 1))(x, w)
        derivatives = {
            "forward": lambda f: f,
            "grad": lambda f: jax.grad(scalar(f), (0, 1)),
            "hessian": lambda f: jax.hessian(scalar(f), (0, 1)),
        }
        return over(derivatives[derivative](function))

    by_row = lambda g: lambda x, w: loop(lambda row: g(row, w), x)  # noqa: E731
    want = jax.jit(take(elementwise, by_row))(x, w)
    for vmap_method in ("sequential", "expand_dims", "broadcast_all"):
        f = py_func(elementwise, vmap_method=vmap_method)
        for got in eager_and_jit(take(f, lambda g: jax.vmap(g, (0, None))), x, w):
            assert_close(got, want)


@pytest.mark.parametrize("vmap_method", ["sequential", "expand_dims", "broadcast_all"])
def test_methods_agree_in_nested_batches(vmap_method):
    x, w = jnp.arange(6.0).reshape(2, 3) / 5, jnp.array([1.0, 2.0])
    f = py_func(lambda x, w: jnp.sin(x) * w, vmap_method=vmap_method)

    def take(f):
        table = jax.vmap(jax.vmap(jax.value_and_grad(f, (0, 1)), (0, None)))
        return lambda x, w: (table(x, w), jax.grad(lambda w: table(x, w)[0].sum())(w))

    want = (jnp.sin(x) * w[:, None], (jnp.cos(x) * w[:, None], jnp.sin(x)))
    for got in eager_and_jit(take(f), x, w):
        assert_close(got, (want, jnp.sin(x).sum(1)))


@pytest.mark.parametrize(
    ("vmap_method", "shapes"),
    [
        ("sequential", [((3,), ())] * 4),
        ("expand_dims", [((4, 3), (1,))]),
        ("broadcast_all", [((4, 3), (4,))]),
    ],
)
def test_what_the_body_sees(vmap_method, shapes, transform):
    seen = []

    def body(x, w):
        seen.append((x.shape, w.shape))
        return x * w.reshape(w.shape + (1,) * (x.ndim - w.ndim))

    f = py_func(body, Tout=lambda x, w: x, vmap_method=vmap_method)
    got = transform(jax.vmap(f, (0, None)))(jnp.ones((4, 3)), 2.0)
    assert got.tolist() == [[2.0] * 3] * 4
    assert seen == shapes


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("vmap_method", ["sequential", "expand_dims", "broadcast_all"])
def test_small_batches(vmap_method, size, transform):
    f = py_func(lambda x, w: (x.T * w).T, Tout=lambda x, w: x, vmap_method=vmap_method)
    x = jnp.ones((size, 2))
    assert transform(jax.vmap(f, (0, None)))(x, 3.0).shape == (size, 2)
    gradient = transform(jax.grad(lambda w: jax.vmap(f, (0, None))(x, w).sum()))(3.0)
    assert gradient == 2.0 * size


def test_batch_of_integers_bools_and_keys(transform):
    def body(key, n, flag):
        return jax.random.bits(key, (2,)) if flag else jnp.full((2,), n, jnp.uint32), n + 1

    f = py_func(body, Tout=(jax.ShapeDtypeStruct((2,), jnp.uint32), jnp.int32))
    keys, n = jax.random.split(jax.random.key(3), 4), jnp.arange(4)
    flags = jnp.array([True, False, True, False])
    got = transform(jax.vmap(f))(keys, n, flags)
    want = loop(body, keys, n, flags)
    assert_close(got, want)


def test_half_precision_cotangents_are_summed_in_full(transform):
    """4096 ones overflow the 8 bits of a bfloat16's significand if summed in it."""
    x = jnp.ones((4096,), jnp.bfloat16)
    f = py_func(lambda x, w: x * w, Tout=jnp.bfloat16)
    loss = lambda w: jax.vmap(f, (0, None))(x, w).astype(jnp.float32).sum()  # noqa: E731
    assert transform(jax.grad(loss))(jnp.bfloat16(1)) == 4096


def test_one_host_call_for_a_batch():
    f = py_func(lambda x: x * 2, Tout=jax.ShapeDtypeStruct((), jnp.float32))
    jitted = jax.jit(jax.vmap(f))
    text = jitted.lower(xs).as_text()
    assert text.count("xla_ffi_python_cpu_callback") == 1
    assert "stablehlo.while" not in text
    np.testing.assert_allclose(jitted(xs), xs * 2)
