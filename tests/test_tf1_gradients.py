"""`gradients`: against plain `jax.grad`, closed forms and TensorFlow's documented rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpyfunc as jpf
import jpyfunc.tf1 as tf

SCALAR = jax.ShapeDtypeStruct((), jnp.float32)
close = np.testing.assert_allclose


@pytest.fixture(autouse=True)
def sess():
    with tf.Graph().as_default(), tf.Session() as sess:
        yield sess


def branching(x, m):
    if x < m:
        return jnp.sin(x) * m**2
    return x * m


def smooth(x, m):
    return jnp.exp(-(x**2)) * jnp.cos(m * x)


FUNCTIONS = {
    "py_func": (jpf.py_func(branching, Tout=jnp.float32), lambda x, m: jnp.sin(x) * m**2),
    "lift": (tf.lift(smooth), smooth),
    "operators": (
        lambda x, m: (x * m - x / m) ** 3 + abs(-x),
        lambda x, m: (x * m - x / m) ** 3 + x,
    ),
    "chain": (
        lambda x, m: tf.numpy.sin(jpf.py_func(branching, [x, m], SCALAR) * x) * m,
        lambda x, m: jnp.sin(jnp.sin(x) * m**2 * x) * m,
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_derivative_to_third_order(sess, name):
    build, plain = FUNCTIONS[name]
    x, m = tf.placeholder(jnp.float32), tf.placeholder(jnp.float32)
    y = build(x, m)
    first = tf.gradients(y, [x, m])
    second = [tf.gradients(t, [x, m]) for t in first]
    third = [tf.gradients(t, [x, m]) for row in second for t in row]

    def rows(f):
        return jax.jacobian(f, argnums=(0, 1))

    results = sess.run([y, first, second, third], {x: 0.7, m: 1.3})

    @jax.jit
    def every(*at):
        third = [d for row in rows(rows(rows(plain)))(*at) for d in row]
        return [plain(*at), rows(plain)(*at), rows(rows(plain))(*at), third]

    expected = every(jnp.float32(0.7), jnp.float32(1.3))
    for got, want in zip(results, expected, strict=True):
        close(got, np.asarray(want), rtol=2e-4, atol=2e-5)
    # Each lowers to another program if it is fetched alone.
    close(sess.run(third[2], {x: 0.7, m: 1.3}), np.asarray(expected[3])[2], rtol=2e-4)


def test_sums_over_the_elements_of_all_ys(sess):
    x = tf.placeholder(jnp.float32)
    value = np.array([1.0, 2.0, 3.0], np.float32)
    (slope,) = tf.gradients([x**2, 5 * x, tf.numpy.sum(x) * x], x)
    close(sess.run(slope, {x: value}), 2 * value + 5 + 2 * value.sum(), rtol=1e-6)


def test_grad_ys(sess):
    x = tf.placeholder(jnp.float32, [3])
    weight = tf.placeholder(jnp.float32, [3])
    feed = {x: [1, 2, 3], weight: [4, 5, 6]}
    by_tensor, by_array, mixed = (
        tf.gradients([x**2], x, grad_ys=[weight])[0],
        tf.gradients(x**2, x, grad_ys=np.array([4, 5, 6]))[0],
        tf.gradients([x**2, x], x, grad_ys=[weight, None])[0],
    )
    got = sess.run([by_tensor, by_array, mixed], feed)
    close(got, [[8, 20, 36], [8, 20, 36], [9, 21, 37]])
    # It is linear in grad_ys; its derivative with respect to these is a JVP.
    (forward,) = tf.gradients(by_tensor, weight, grad_ys=np.array([1.0, 0.0, 2.0]))
    close(sess.run(forward, feed), [2, 0, 12])


def test_grad_ys_that_do_not_fit(sess):
    x, free = tf.placeholder(jnp.float32, [3], name="x"), tf.placeholder(jnp.float32)
    with pytest.raises(
        ValueError, match="expected one of grad_ys for each of ys, 1 in total"
    ):
        tf.gradients(x, x, grad_ys=[None, None])
    with pytest.raises(
        ValueError, match=r"grad_ys of 'x:0': expected shape \(3,\), got \(2,\)"
    ):
        tf.gradients(x, x, grad_ys=np.ones(2))
    with pytest.raises(TypeError, match="grad_ys of 'x:0': expected float32, got complex"):
        tf.gradients(x, x, grad_ys=np.ones(3) * 1j)
    with pytest.raises(ValueError, match="grad_ys of 'x:0'"):
        tf.gradients(x, x, grad_ys=tf.constant([1.0, 2.0]))
    (late,) = tf.gradients(x, x, grad_ys=free)
    with pytest.raises(ValueError, match=r"expected shape \(3,\)"):
        sess.run(late, {x: np.ones(3), free: np.ones(2)})


def test_intermediate_xs_and_fed_ones(sess):
    x = tf.placeholder(jnp.float32)
    h = tf.numpy.exp(x)
    y = jpf.py_func(lambda h: h**3, [h], SCALAR)
    dy_dh, dy_dx = tf.gradients(y, [h, x])
    close(sess.run([dy_dh, dy_dx], {x: 0.5}), [3 * np.exp(1.0), 3 * np.exp(1.5)], rtol=1e-6)
    close(sess.run([y, dy_dh], {h: 2.0}), [8, 12])  # the inputs of h are not needed
    # As in TensorFlow: y uses the fed value, and h is differentiated where it is defined.
    close(sess.run(dy_dx, {h: 2.0, x: 0.5}), 12 * np.exp(0.5), rtol=1e-6)
    (second,) = tf.gradients(dy_dx, x)
    close(sess.run(second, {dy_dx: 0.0, x: 0.5}), 9 * np.exp(1.5), rtol=1e-5)


def test_y_among_xs(sess):
    x = tf.placeholder(jnp.float32)
    y = x * 3
    close(sess.run(tf.gradients([y, y * y], [y, x, y]), {x: 2.0}), [13, 39, 13])


def test_xs_in_any_order(sess):
    """The path to an earlier one may lie before a later one."""
    x = tf.placeholder(jnp.float32)
    sine = tf.numpy.sin(x)
    h = tf.placeholder(jnp.float32)
    y = sine * h + h**2
    feed, by_x, by_h = {x: 0.7, h: 2.0}, 2 * np.cos(0.7), np.sin(0.7) + 4
    close(sess.run(tf.gradients(y, [h, x]), feed), [by_h, by_x], rtol=1e-6)
    close(sess.run(tf.gradients(y, [x, h]), feed), [by_x, by_h], rtol=1e-6)
    close(sess.run(tf.gradients(y, [h, sine, x]), feed), [by_h, 2, by_x], rtol=1e-6)


def test_stop_gradients(sess):
    # The example in TensorFlow's documentation: partial instead of total derivatives.
    a = tf.constant(0.0)
    b = 2 * a
    close(sess.run(tf.gradients(a + b, [a, b], stop_gradients=[a, b])), [1.0, 1.0])
    close(sess.run(tf.gradients(a + b, [a, b])), [3.0, 1.0])
    assert tf.gradients(b * 2, a, stop_gradients=b) == [None]
    x = tf.placeholder(jnp.float32)
    square = x**2
    (slope,) = tf.gradients(square * x, x, stop_gradients=[square])
    close(sess.run(slope, {x: 3.0}), 9)
    # No derivative is taken between a constant and y.
    (slope,) = tf.gradients(tf.numpy.cos(square) * x, x, stop_gradients=[square])
    assert not any("cos_grad" in op.name for op in sess.graph.get_operations())
    close(sess.run(slope, {x: 3.0}), np.cos(9.0), rtol=1e-6)


def test_unconnected(sess):
    x, z = tf.placeholder(jnp.float32), tf.placeholder(jnp.float32)
    i = tf.placeholder(jnp.int32)
    y = x * tf.lift(lambda i: i.astype(jnp.float32))(i)
    assert tf.gradients(y, [z, i]) == [None, None]
    assert tf.gradients(i * 2, [i, x]) == [None, None]
    assert tf.gradients([], [x]) == [None]
    zeros = tf.gradients(y, [z, i], unconnected_gradients="zero")
    got = sess.run(zeros, {z: np.ones((2, 2)), i: 3})
    np.testing.assert_array_equal(got[0], np.zeros((2, 2)))
    assert got[1] == 0
    with pytest.raises(ValueError, match="'none' or 'zero', got None"):
        tf.gradients(y, x, unconnected_gradients=None)


def test_no_gradient_passes_an_integer_in_between(sess):
    x = tf.placeholder(jnp.float32)
    whole = tf.lift(lambda x: x.astype(jnp.int32))(x)
    assert tf.gradients(whole * 2.5, x) == [None]
    # Inside the pytree of one operation, JAX's rule holds: no derivative.
    parts = tf.lift(lambda x: {"whole": x.astype(jnp.int32), "rest": x * 3})(x)
    (slope,) = tf.gradients(parts["whole"] + parts["rest"], x)
    close(sess.run(slope, {x: 1.5}), 3)


def test_a_dtype_that_only_the_run_knows(sess):
    x = tf.placeholder(jnp.float32)
    # No guess at the shape of x lets this one be inferred.
    mean = tf.lift(lambda x: x.reshape(7, 11, 13).mean(0))(x)
    counted = tf.lift(lambda t: (t > 0).astype(jnp.int32))(mean)
    assert mean.dtype is None
    value = np.ones(1001, np.float32)
    (slope,) = tf.gradients(mean, x)
    close(sess.run(slope, {x: value}), value / 7, rtol=1e-6)
    (zeros,) = tf.gradients(counted, x)
    close(sess.run(zeros, {x: value}), 0 * value)
    (whole,) = tf.gradients(counted * 2.5, counted)
    assert sess.run(whole, {x: value}).dtype == jnp.int32


def test_several_results_and_a_tensor_used_twice(sess):
    def parts(x, y):
        return {"product": x * y, "ratio": x / y, "sign": x > y}

    x, y = tf.placeholder(jnp.float32), tf.placeholder(jnp.float32)
    out = jpf.py_func(parts, [x, y])
    grads = tf.gradients([out["product"], out["ratio"]], [x, y])
    close(sess.run(grads, {x: 3.0, y: 2.0}), [2 + 1 / 2, 3 - 3 / 4])
    # The result without a cotangent must not spoil the other one with 0 * inf.
    product, ratio = (tf.gradients(out[k], [x, y]) for k in ("product", "ratio"))
    close(sess.run(product, {x: 3.0, y: 0.0}), [0, 3])
    close(sess.run([product, ratio], {x: 3.0, y: 0.0}), [[0, 3], [np.inf, -np.inf]])
    close(sess.run([product, ratio], {x: 3.0, y: 2.0}), [[2, 3], [0.5, -0.75]])
    both = jpf.py_func(lambda a, b: a**2 * b, [x, x], SCALAR)
    close(sess.run(tf.gradients(both, x), {x: 2.0}), [12])


def test_complex(sess):
    z = tf.placeholder(jnp.complex64)
    w = z**2
    with pytest.raises(TypeError, match=r"complex.*give grad_ys"):
        tf.gradients(w, z)
    (slope,) = tf.gradients(w, z, grad_ys=1.0)
    close(sess.run(slope, {z: 1 + 2j}), jax.vjp(jnp.square, 1 + 2j)[1](1 + 0j)[0])
    (real,) = tf.gradients(tf.numpy.abs(z) ** 2, z)
    close(sess.run(real, {z: 1 + 2j}), jax.grad(lambda z: abs(z) ** 2)(1 + 2j), rtol=1e-6)


def test_numpy_func_has_none(sess):
    x = tf.placeholder(jnp.float32)
    y = jpf.numpy_func(np.sin, [x], SCALAR)
    with pytest.raises(jpf.NotDifferentiableError):
        sess.run(tf.gradients(y, x), {x: 1.0})
    close(sess.run(tf.gradients(y * y, y), {x: 1.0}), [2 * np.sin(1.0)], rtol=1e-6)


def test_through_control_flow_and_custom_rules(sess):
    @jax.custom_jvp
    def double(x):
        return 2 * x

    double.defjvps(lambda t, ans, x: 20 * t)

    def loop(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c) * x, c), x, length=5)[0]

    x = tf.placeholder(jnp.float32)
    y = tf.lift(loop)(x) + tf.lift(double)(x) + tf.lift(jax.nn.relu)(x)
    (slope,) = tf.gradients(y, x)
    (bend,) = tf.gradients(slope, x)
    at = jnp.float32(0.8)
    want = [jax.grad(loop)(at) + 21, jax.grad(jax.grad(loop))(at)]
    close(sess.run([slope, bend], {x: 0.8}), want, rtol=1e-4)


def test_names_and_what_is_refused(sess):
    x = tf.placeholder(jnp.float32, name="x")
    y = tf.numpy.sin(x)
    assert tf.gradients(y, x)[0].name == "gradients/sin_grad:0"
    assert tf.gradients(y, x)[0].name == "gradients_1/sin_grad:0"
    assert tf.gradients(y, x, name="slope")[0].name == "slope/sin_grad:0"
    with pytest.raises(TypeError, match=r"expected xs to be a graph tensor.*jax\.grad"):
        tf.gradients(y, [1.0])
    with tf.Graph().as_default():
        other = tf.placeholder(jnp.float32, name="other")
    with pytest.raises(ValueError, match="'other:0'"):
        tf.gradients(y, [x, other])
