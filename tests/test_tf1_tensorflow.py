"""What TensorFlow's own tests ask of the eager `py_func`, against closed forms."""

import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import run_program

import jpyfunc as jpf
import jpyfunc.tf1 as tf

close = np.testing.assert_allclose

DOCUMENTED = """
def log_huber(x, m):
  if tf.abs(x) <= m:
    return x**2
  return m**2 * (1 - 2 * tf.log(m) + tf.log(x**2))

x = tf.placeholder(tf.float32)
m = tf.placeholder(tf.float32)

y = tf.contrib.eager.py_func(func=log_huber, inp=[x, m], Tout=tf.float32)
dy_dx = tf.gradients(y, x)[0]

with tf.Session() as sess:
  # The session executes `log_huber` eagerly. Given the feed values below,
  # it will take the first branch, so `y` evaluates to 1.0 and
  # `dy_dx` evaluates to 2.0.
  y, dy_dx = sess.run([y, dy_dx], feed_dict={x: 1.0, m: 2.0})
"""


@pytest.fixture(autouse=True)
def sess():
    with tf.Graph().as_default(), tf.Session() as sess:
        yield sess


def test_the_example_of_its_documentation():
    out = run_program(
        f"import jpyfunc.tf1 as tf\n{DOCUMENTED}\nprint(y, dy_dx, type(y), type(dy_dx))",
        limit=60,
    )
    assert out == "1.0 2.0 <class 'numpy.float32'> <class 'numpy.float32'>\n"


@pytest.mark.parametrize("dtype", [tf.int32, tf.float32])
def test_matmul(sess, dtype):
    a = tf.constant([[1, 2], [3, 4]], dtype)
    x = tf.contrib.eager.py_func(jnp.matmul, [a, a], dtype)
    got = sess.run(x)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, [[7, 10], [15, 22]])


def test_list_result(sess):
    def doubled_and_tripled(x):
        return [x * 2, x * 3]

    two, three = tf.contrib.eager.py_func(
        doubled_and_tripled, [tf.constant([1.0, 2.0])], [tf.float32] * 2
    )
    got = sess.run([two, three])
    np.testing.assert_array_equal(got, [[2, 4], [3, 6]])


def test_no_result(sess):
    seen = []

    def no_return_value(x):
        seen.append(int(x))

    assert sess.run(tf.contrib.eager.py_func(no_return_value, [tf.constant(3)], [])) is None
    assert seen == [3]


def test_no_arguments_but_a_tensor_downstream(sess):
    five = tf.contrib.eager.py_func(lambda: jnp.float32(5), [], tf.float32)
    assert sess.run(tf.constant(2.0) * five) == 10.0


def test_inside_a_compiled_function(sess):
    f = jpf.py_func(lambda x: x * 2 if x > 0 else x * 3, Tout=tf.float32)
    compiled = jax.jit(lambda x: f(x) + f(-x))
    x = tf.placeholder(tf.float32)
    assert sess.run(tf.lift(compiled)(x), {x: 2.0}) == 4.0 - 6.0


def _inner_frame(kind):
    raise kind("text of the error")


@pytest.mark.parametrize("tout", [tf.float32, jax.ShapeDtypeStruct((), tf.float32)])
@pytest.mark.parametrize(
    "kind", [ValueError, TypeError, StopIteration, MemoryError, NotImplementedError]
)
def test_exceptions_keep_type_and_inner_frames(sess, kind, tout):
    def outer_frame(x):
        _inner_frame(kind)
        return x

    y = tf.contrib.eager.py_func(outer_frame, [tf.constant(1.0)], tout)
    with pytest.raises(kind, match="text of the error") as error:
        sess.run(y)
    text = "".join(traceback.format_exception(error.value))
    assert "in outer_frame" in text
    assert "in _inner_frame" in text
    assert "in graph operation 'PyFunc'" in text


@pytest.mark.parametrize("at", [1.0, 3.0])
def test_gradient_with_two_outputs(sess, at):
    x, y = tf.placeholder(tf.float32), tf.placeholder(tf.float32)
    product, ratio = tf.contrib.eager.py_func(
        lambda x, y: (x * y, x / y), [x, y], (tf.float32,) * 2
    )
    feed = {x: at, y: 2.0}
    close(sess.run(tf.gradients(product, [x, y]), feed), [2, at])
    close(sess.run(tf.gradients(ratio, [x, y]), feed), [1 / 2, -at / 4])
    close(sess.run(tf.gradients([product, ratio], [x, y]), feed), [2.5, at - at / 4])


def test_gradient_with_several_arguments(sess):
    x, y = tf.placeholder(tf.float32), tf.placeholder(tf.float32)
    z = tf.contrib.eager.py_func(lambda x, y: x**2 * y, [x, y], tf.float32)
    close(sess.run(tf.gradients(z, [x, y]), {x: 3.0, y: 5.0}), [30, 9])


def test_gradient_of_a_matrix_product(sess):
    a = np.array([[1, 2], [3, 4]], np.float32)
    x = tf.placeholder(tf.float32, [2, 2])
    y = tf.contrib.eager.py_func(lambda x: x @ x, [x], tf.float32)
    ones = np.ones((2, 2))
    close(sess.run(tf.gradients(y, x)[0], {x: a}), ones @ a.T + a.T @ ones)


@pytest.mark.parametrize(("x", "m"), [(1.0, 2.0), (-1.5, 2.0), (3.0, 2.0), (-5.0, 1.5)])
def test_log_huber(sess, x, m):
    def log_huber(x, m):
        if tf.abs(x) <= m:
            return x**2
        return m**2 * (1 - 2 * tf.log(m) + tf.log(x**2))

    inside = abs(x) <= m
    value = x**2 if inside else m**2 * (1 - 2 * np.log(m) + np.log(x**2))
    slope = 2 * x if inside else 2 * m**2 / x
    bend = 2.0 if inside else -2 * m**2 / x**2
    tx, tm = tf.placeholder(tf.float32), tf.placeholder(tf.float32)
    y = tf.contrib.eager.py_func(log_huber, [tx, tm], tf.float32)
    (dy,) = tf.gradients(y, tx)
    (d2y,) = tf.gradients(dy, tx)
    close(sess.run([y, dy, d2y], {tx: x, tm: m}), [value, slope, bend], rtol=1e-5)


def test_no_placement_is_forced(sess):
    # This is left to JAX: operations run on the device of what is fed.
    device = jax.devices()[-1]
    fed = jax.device_put(jnp.float32(2), device)
    x = tf.placeholder(tf.float32)
    y = tf.contrib.eager.py_func(lambda x: x * 2, [x], tf.float32) + 1
    assert sess.run(y, {x: fed}) == 5.0


def test_no_arguments_is_a_node_that_runs_each_time(sess):
    """`py_func(lambda: next(batches), [], dtype)`: inference does not lose a batch."""
    batches = iter([np.full(3, i, np.float32) for i in range(9)])
    batch = tf.contrib.eager.py_func(lambda: next(batches), [], tf.float32)
    total = tf.numpy.sum(batch * 2)
    for i in (0, 1, 2):
        np.testing.assert_array_equal(sess.run(batch), [i, i, i])
    assert sess.run(total) == 18.0  # another program, which is inferred again
    got, double = sess.run([batch, total])
    np.testing.assert_array_equal(got, [4, 4, 4])
    assert double == 24.0


def test_constant_arguments_are_a_node(sess):
    runs = []
    y = tf.contrib.eager.py_func(
        lambda x: (runs.append(1), x + 1)[1], [2.0], jax.ShapeDtypeStruct((), "f")
    )
    assert isinstance(y, tf.Tensor)
    assert not runs
    assert [sess.run(y), sess.run(y)] == [3.0, 3.0]
    assert len(runs) == 2


def test_inside_a_body_or_a_transform_it_is_a_call(sess):
    inner = jpf.py_func(lambda: jnp.float32(5), Tout=jnp.float32)
    outer = jpf.py_func(lambda x: x * inner(), Tout=jnp.float32)
    assert sess.run(outer(2.0)) == 10.0
    assert jax.jit(lambda x: x * inner())(2.0) == 10.0
    assert jax.grad(outer)(2.0) == 5.0
    with jax.disable_jit():
        assert sess.run(outer(tf.constant(3.0))) == 15.0
    each = jpf.py_func(lambda x: x * inner(), Tout=jnp.float32, vmap_method="sequential")
    np.testing.assert_array_equal(jax.vmap(each)(jnp.arange(3.0)), [0, 5, 10])


def test_outside_an_explicit_graph_it_is_a_call():
    out = run_program(
        """
        import jax.numpy as jnp, jpyfunc as jpf, jpyfunc.tf1 as tf
        session = tf.InteractiveSession()
        print(jpf.py_func(lambda: jnp.float32(5), [], jnp.float32) + 1)
        session.close()
        print(jpf.py_func(lambda: jnp.float32(6), [], jnp.float32) + 1)
        """,
        limit=60,
    )
    assert out.split() == ["6.0", "7.0"]


class TestNumpyPyFunc:
    def test_gets_numpy_and_runs_once_per_run(self, sess):
        seen = []

        def body(x):
            seen.append(type(x))
            return np.sinh(x)

        x = tf.placeholder(tf.float32)
        y = tf.py_func(body, [x], tf.float32)
        y.set_shape([2])
        for _ in range(2):
            seen.clear()
            close(sess.run([y, y * 2], {x: [1, 2]})[1], 2 * np.sinh([1, 2]), rtol=1e-6)
            assert seen == [np.ndarray]
        seen.clear()
        sess.run(x, {x: 1.0})
        assert not seen

    def test_the_operation_of_what_returns_nothing(self, sess):
        seen = []
        operation = tf.py_func(lambda x: seen.append(x.tolist()), [tf.constant([3])], [])
        assert isinstance(operation, tf.Operation)
        assert sess.run(operation) is None
        assert seen == [[3]]

    def test_a_list_of_dtypes_gives_a_list(self):
        made = tf.py_func(lambda x: (x, x), [tf.constant(1.0)], (tf.float32, tf.float32))
        assert isinstance(made, list)
        assert [t.dtype for t in made] == [tf.float32] * 2
        assert isinstance(tf.py_func(np.sin, [1.0], tf.float32, True, "named"), tf.Tensor)
        assert tf.get_default_graph().get_tensor_by_name("named:0").dtype == tf.float32

    def test_has_no_gradient_and_says_so(self, sess):
        x = tf.placeholder(tf.float32, [])
        y = tf.py_func(np.sin, [x], tf.float32)
        y.set_shape([])
        with pytest.raises(jpf.NotDifferentiableError):
            sess.run(tf.gradients(y, x), {x: 1.0})

    def test_in_a_body_it_is_a_call(self, sess):
        def body(x):
            return tf.py_func(np.sort, [x], jax.ShapeDtypeStruct((2,), tf.float32)) + x

        x = tf.placeholder(tf.float32, [2])
        y = tf.contrib.eager.py_func(body, [x], jax.ShapeDtypeStruct((2,), tf.float32))
        np.testing.assert_array_equal(sess.run(y, {x: [2, 1]}), [3, 3])


@pytest.mark.parametrize("name", ["py_func", "contrib.eager.py_func"])
def test_without_tensors_or_a_with_it_is_a_node_of_the_default_graph(name):
    """If it were called at once, each run would get the first batch."""
    out = run_program(
        f"""
        import numpy as np, jpyfunc.tf1 as tf
        batches = iter(range(9))
        batch = tf.{name}(lambda: np.float32(next(batches)), [], tf.float32)
        double = batch * 2
        session = tf.Session()
        print(*[session.run(double) for _ in range(3)], session.run([batch, double]))
        """,
        limit=60,
    )
    assert out.split() == ["0.0", "2.0", "4.0", "[np.float32(3.0),", "np.float32(6.0)]"]
