"""`Session`: what is fed, run, returned, cached and refused."""

import collections
import contextvars
import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpyfunc as jpf
import jpyfunc.tf1 as tf

Pair = collections.namedtuple("Pair", "first second")
SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as graph:
        yield graph


@pytest.fixture
def sess(graph):
    with tf.Session() as sess:
        yield sess


def log_huber(x, m):
    if jnp.abs(x) <= m:
        return x**2
    return m**2 * (1 - 2 * jnp.log(m) + jnp.log(x**2))


def test_the_seed_program():
    x = tf.placeholder(jnp.float32)
    m = tf.placeholder(jnp.float32)
    y = jpf.py_func(func=log_huber, inp=[x, m], Tout=jnp.float32)
    dy_dx = tf.gradients(y, x)[0]
    with tf.Session() as sess:
        inside = sess.run([y, dy_dx], feed_dict={x: 1.0, m: 2.0})
        outside = sess.run([y, dy_dx], feed_dict={x: 3.0, m: 2.0})
    assert inside == [1.0, 2.0]
    np.testing.assert_allclose(outside, [4 * (1 - np.log(4) + np.log(9)), 8 / 3], rtol=1e-6)


class TestFetches:
    def test_any_nesting_keeps_its_structure(self, sess):
        a, b = tf.constant(1.0), tf.constant([2, 3])
        fetches = {"x": [a, (b, a.name)], "y": Pair(a.op, b), "z": []}
        result = sess.run(fetches)
        assert result["x"][0] == 1.0
        assert type(result["x"][1]) is tuple
        np.testing.assert_array_equal(result["x"][1][0], [2, 3])
        assert result["x"][1][1] == 1.0
        assert result["y"].first is None
        np.testing.assert_array_equal(result["y"].second, [2, 3])
        assert result["z"] == []

    def test_the_same_fetches_in_another_structure(self, sess):
        a, b = tf.constant(1.0), tf.constant(2.0)
        for fetches, want in (
            ([a, b], [1.0, 2.0]),
            ((a, b), (1.0, 2.0)),
            ([a, [b]], [1.0, [2.0]]),
            ({"x": a, "y": b}, {"x": 1.0, "y": 2.0}),
            ({"x": a, "z": b}, {"x": 1.0, "z": 2.0}),
            (Pair(a, b), Pair(1.0, 2.0)),
        ):
            for _ in range(2):
                result = sess.run(fetches)
                assert result == want
                assert type(result) is type(want)

    def test_results_are_numpy_and_may_be_written_to(self, sess):
        scalar, array, half = sess.run(
            [tf.constant(1.0), tf.constant([1, 2]), tf.constant([1], jnp.bfloat16)]
        )
        assert type(scalar) is np.float32
        assert type(array) is np.ndarray
        array += 1
        np.testing.assert_array_equal(array, [2, 3])
        assert half.dtype == jnp.bfloat16

    def test_a_prng_key_stays_one(self, sess):
        key = tf.lift(jax.random.key)(tf.constant(3))
        draw = tf.lift(jax.random.normal)(key)
        got, value = sess.run([key, draw])
        assert jnp.issubdtype(got.dtype, jax.dtypes.prng_key)
        assert value == jax.random.normal(jax.random.key(3))
        other = jax.random.key(4)
        assert sess.run(draw, {key: other}) == jax.random.normal(other)

    def test_an_operation_runs_and_gives_none(self, sess):
        seen = []
        pure = jpf.py_func(
            lambda x: (seen.append(float(x)), x)[1], [tf.constant(2.0)], SCALAR
        )
        assert sess.run(pure.op) is None
        assert seen == [2.0]
        silent = jpf.py_func(lambda x: seen.append(float(x)), [tf.constant(3.0)], [])
        assert isinstance(silent, tf.Operation)
        silent.run()
        assert sess.run([silent, silent.name]) == [None, None]
        assert seen == [2.0, 3.0, 3.0]

    @pytest.mark.parametrize("fetch", [None, 3, np.ones(2), [None]])
    def test_what_is_not_a_tensor_is_refused(self, sess, fetch):
        with pytest.raises(TypeError, match="expected a graph tensor or operation"):
            sess.run(fetch)

    def test_unknown_name(self, sess):
        with pytest.raises(ValueError, match=r"fetch 'nothing'.*no operation of that name"):
            sess.run("nothing:0")

    def test_another_graph(self, sess, graph):
        with tf.Graph().as_default() as other:
            t = tf.constant(1.0, name="stranger")
        with pytest.raises(ValueError, match="fetch 'stranger:0'") as error:
            sess.run(t)
        assert repr(graph) in str(error.value)
        assert repr(other) in str(error.value)
        with pytest.raises(ValueError, match="feed_dict key 'stranger:0'"):
            sess.run(tf.constant(1.0), {t: 1.0})


class TestFeeds:
    @pytest.mark.parametrize(
        ("dtype", "value"),
        [
            (jnp.float32, 1.5),
            (jnp.float32, 2),
            (jnp.float32, True),
            (jnp.float32, [1, 2.5]),
            (jnp.float32, np.linspace(0, 1, 3)),
            (jnp.float32, jnp.arange(3)),
            (jnp.float32, [np.float64(1), jnp.float32(2)]),
            (jnp.bfloat16, 0.5),
            (jnp.int32, 7),
            (jnp.int32, np.array([1, 2], np.int64)),
            (jnp.uint8, 200),
            (jnp.bool_, [True, False]),
            (jnp.complex64, 1.0),
        ],
    )
    def test_same_kind_converts(self, sess, dtype, value):
        x = tf.placeholder(dtype)
        got = sess.run(tf.lift(lambda x: x)(x), {x: value})
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, np.asarray(value).astype(dtype))

    @pytest.mark.parametrize(
        ("dtype", "value", "error"),
        [
            (jnp.int32, 1.5, TypeError),
            (jnp.int32, np.zeros(2), TypeError),
            (jnp.int32, jnp.zeros(2), TypeError),
            (jnp.float32, 1j, TypeError),
            (jnp.float32, "one", TypeError),
            (jnp.float32, [[1], [2, 3]], TypeError),
            (jnp.bool_, 1, TypeError),
            (jnp.uint8, np.int32(3), TypeError),
            (jnp.uint8, -1, ValueError),
            (jnp.int32, 2**40, ValueError),
            (jnp.float32, np.ma.array([1.0, 2.0], mask=[True, False]), TypeError),
        ],
    )
    def test_another_kind_is_refused(self, sess, dtype, value, error):
        x = tf.placeholder(dtype, name="x")
        with pytest.raises(error, match="feed of 'x:0': expected"):
            sess.run(x, {x: value})

    def test_a_tensor_is_no_value(self, sess):
        x = tf.placeholder(jnp.float32, name="x")
        with pytest.raises(TypeError, match="feed of 'x:0': expected a value, got <Tensor"):
            sess.run(x, {x: tf.constant(1.0)})

    @pytest.mark.parametrize("value", [np.zeros((2, 2)), 1.0, jnp.zeros((3, 1)), [1, 2, 3]])
    def test_another_shape_is_refused(self, sess, value):
        x = tf.placeholder(jnp.float32, [None, 3], name="x")
        with pytest.raises(ValueError, match=r"'x:0': expected shape \(None, 3\), got \("):
            sess.run(x, {x: value})
        assert sess.run(x, {x: np.zeros((5, 3))}).shape == (5, 3)

    def test_unfed_placeholder(self, sess):
        x = tf.placeholder(jnp.float32, name="x")
        text = "You must feed a value for placeholder 'x' with dtype float32"
        for fetch in (x, x + 1, x.op):
            with pytest.raises(ValueError, match=text):
                sess.run(fetch)
        assert sess.run(tf.constant(1.0) * 2) == 2.0  # x is not needed

    def test_intermediate_tensors_and_constants(self, sess):
        x = tf.placeholder(jnp.float32)
        c = tf.constant(10.0)
        h = x * 2
        y = h + c
        assert sess.run(y, {h: 5.0}) == 15.0
        assert sess.run([h, y], {x: 1.0, c: 0.0}) == [2.0, 2.0]
        assert sess.run(y, {y: -1.0}) == -1.0
        assert sess.run([x.op, h.op], {x: 1.0}) == [None, None]

    def test_by_name_in_any_order(self, sess):
        x, m = (
            tf.placeholder(jnp.float32, name="x"),
            tf.placeholder(jnp.float32, name="m"),
        )
        y = x - 2 * m
        assert sess.run(y, {"x:0": 5.0, "m:0": 1.0}) == 3.0
        assert sess.run(y, {"m:0": 1.0, x: 5.0}) == 3.0
        with pytest.raises(ValueError, match="expected each tensor once"):
            sess.run(y, {x: 1.0, "x:0": 2.0, m: 0.0})

    def test_what_is_not_a_key_is_refused(self, sess):
        x = tf.placeholder(jnp.float32)
        with pytest.raises(TypeError, match="feed_dict key 3: expected a graph tensor"):
            sess.run(x, {3: 1.0})
        with pytest.raises(TypeError, match="expected feed_dict to be a dict"):
            sess.run(x, [(x, 1.0)])


class TestWhatRuns:
    def test_only_what_is_needed(self, sess):
        def fail(x):
            raise AssertionError

        x = tf.placeholder(jnp.float32)
        bad = jpf.py_func(fail, [x], SCALAR, stateful=True)
        assert sess.run(x + 1, {x: 1.0}) == 2.0
        assert sess.run(bad * 2, {x: 1.0, bad: 3.0}) == 6.0  # its result is fed

    @pytest.mark.parametrize("kind", ["node", "lifted"])
    @pytest.mark.parametrize("ordered", [False, True])
    def test_stateful_runs_once_whatever_is_differentiated(self, sess, kind, ordered):
        seen = []

        @jpf.py_func(Tout=SCALAR, stateful=True, ordered=ordered)
        def count(x):
            seen.append(float(jax.lax.stop_gradient(x)))
            return x**3

        func = count if kind == "node" else tf.lift(lambda x: count(x) * 1.0)
        x = tf.placeholder(jnp.float32)
        y = func(x)
        (first,) = tf.gradients(y * y, x)
        (second,) = tf.gradients(first, x)
        (third,) = tf.gradients(second, x)
        expected = [2.0**3, 6 * 2.0**5, 30 * 2.0**4, 120 * 2.0**3]
        np.testing.assert_allclose(sess.run([y, first, second, third], {x: 2.0}), expected)
        assert seen == [2.0]
        for fetch in (y, [y, y, y.op], first, [first, y], third):
            seen.clear()
            sess.run(fetch, {x: 3.0})
            assert seen == [3.0]
        seen.clear()
        sess.run(x * 2, {x: 3.0})
        assert seen == []

    @pytest.mark.parametrize("kind", ["node", "lifted"])
    @pytest.mark.parametrize("path", [(0, 0), (1, 1), (0, 1), (1, 1, 1), (0, 1, 0)])
    def test_stateful_of_two_tensors_runs_once_for_any_derivative(self, sess, kind, path):
        """The tensor that is not differentiated is among the residuals, too."""
        seen = []

        def plain(x, m):
            return jnp.sin(x) * m**3 + x**3 * m

        @jpf.py_func(Tout=SCALAR, stateful=True)
        def count(x, m):
            seen.append(1)
            return plain(x, m)

        def around(func):
            return lambda x, m: func(jnp.sin(x), jnp.cos(m)) * 2.0

        x, m = tf.placeholder(jnp.float32, []), tf.placeholder(jnp.float32, [])
        tensors = [(count if kind == "node" else tf.lift(around(count)))(x, m)]
        functions = [plain if kind == "node" else around(plain)]
        for i in path:
            tensors += tf.gradients(tensors[-1], [x, m][i])
            functions.append(jax.grad(functions[-1], i))
        want = [f(0.7, 1.3) for f in functions]
        feed = {x: 0.7, m: 1.3}
        np.testing.assert_allclose(sess.run(tensors, feed), want, rtol=1e-4)
        assert seen == [1]
        np.testing.assert_allclose(sess.run(tensors[-1], feed), want[-1], rtol=1e-4)
        assert seen == [1, 1]

    def test_the_gradient_is_of_the_value_that_is_returned(self, sess):
        rng = np.random.default_rng(0)

        def draw(x):
            return x * jnp.float32(rng.normal())

        x = tf.placeholder(jnp.float32)
        y = jpf.py_func(draw, [x], SCALAR, stateful=True)
        z, dz_dy = y * y, tf.gradients(y * y, y)[0]
        value, slope = sess.run([z, dz_dy], {x: 1.0})
        np.testing.assert_allclose(slope, 2 * np.sign(slope) * np.sqrt(value), rtol=1e-6)

    def test_same_shapes_do_not_trace_again(self, sess):
        traces = []

        def traced(x, m):
            traces.append(1)
            return jnp.sin(x) * m

        x = tf.placeholder(jnp.float32)
        m = tf.placeholder(jnp.float32)
        y = tf.lift(traced)(x, m)
        dy_dx = tf.gradients(y, x)[0]
        sess.run([y, dy_dx], {x: 1.0, m: 2.0})
        traces.clear()
        weak = jnp.asarray(8.0)
        for value in (
            2.0,
            3,
            np.float64(4),
            np.float32(5),
            jnp.float32(6),
            jnp.asarray(7),
            weak,
        ):
            sess.run([y, dy_dx], {x: value, m: 2.0})
            sess.run({"slope": dy_dx, "values": (y, y)}, {m: 2.0, x: value})
            sess.make_callable([dy_dx, y], [m, x])(2.0, value)
        assert traces == []
        sess.run([y, dy_dx], {x: [1.0, 2.0], m: 2.0})
        assert len(traces) == 1


class TestFailure:
    @pytest.mark.parametrize("ordered", [False, True])
    def test_surfaces_as_itself_and_names_the_node(self, sess, ordered):
        class BodyError(Exception):
            pass

        def check(x):
            if x < 0:
                raise BodyError("negative", float(jax.lax.stop_gradient(x)))
            return x

        x = tf.placeholder(jnp.float32)
        y = jpf.py_func(check, [x], SCALAR, name="checked", ordered=ordered)
        dy_dx = tf.gradients(y, x)
        for fetches in (y, y.op, [y, dy_dx], y):
            with pytest.raises(BodyError) as error:
                sess.run(fetches, {x: -1.0})
            assert error.value.args == ("negative", -1.0)
            assert error.value.__notes__ == ["in graph operation 'checked'"]
            assert sess.run([y, dy_dx], {x: 2.0}) == [2.0, [1.0]]
        assert sess.run(x * 2, {x: -1.0}) == -2.0

    @pytest.mark.parametrize("options", [{"stateful": True}, {"ordered": True}], ids=str)
    def test_of_a_program_with_effects_is_raised_once(self, sess, options):
        """The run raises it, not what waits for effects afterwards."""
        threads = []

        def check(x):
            threads.append(threading.get_ident())
            if x < 0:
                raise ValueError("negative")
            return x

        x = tf.placeholder(jnp.float32)
        y = jpf.py_func(check, [x], SCALAR, **options)
        sess.run(y, {x: 1.0})
        large = jnp.ones((1500, 1500))
        for _ in range(20):
            unready = -(large @ large)[0, 0]  # so that it runs on another thread, mostly
            with pytest.raises(ValueError, match="negative"):
                sess.run(y, {x: unready})
            jax.effects_barrier()
            if threads[-1] != threading.get_ident():
                break
        else:
            pytest.skip("the runtime never ran the body on a thread of its own")

    def test_a_body_that_always_raises_with_tout_incomplete(self, sess):
        def fail(x):
            raise KeyError("lost")

        x = tf.placeholder(jnp.float32)
        with pytest.raises(KeyError, match="lost"):
            sess.run(jpf.py_func(fail, [x], jnp.float32), {x: 1.0})

    def test_one_object_raised_twice_is_noted_once(self, sess):
        error = ValueError("the same")

        def fail(x):
            raise error

        y = jpf.py_func(fail, [tf.constant(1.0)], SCALAR)
        for _ in range(2):
            with pytest.raises(ValueError, match="the same"):
                sess.run(y)
        assert error.__notes__ == ["in graph operation 'PyFunc'"]

    def test_shapes_that_only_a_run_knows(self, sess):
        x, y = tf.placeholder(jnp.float32), tf.placeholder(jnp.float32)
        product = tf.numpy.matmul(x, y)
        with pytest.raises(TypeError) as error:
            sess.run(product, {x: np.ones((2, 3)), y: np.ones((2, 3))})
        assert "in graph operation 'matmul'" in error.value.__notes__

    def test_closed(self, graph):
        t = tf.constant(1.0)
        with tf.Session() as sess:
            call = sess.make_callable(t)
            assert call() == 1.0
        for use in (
            lambda: sess.run(t),
            call,
            sess.__enter__,
            lambda: sess.make_callable(t),
        ):
            with pytest.raises(RuntimeError, match="session is closed"):
                use()
        sess.close()

    def test_no_graph(self):
        with pytest.raises(TypeError, match=r"graph to be a tf\.Graph"):
            tf.Session("graph")


class TestThreads:
    def test_each_gets_its_own_answer_or_exception(self, sess):
        def check(x):
            if x < 0:
                raise ValueError(float(jax.lax.stop_gradient(x)))
            return jnp.sqrt(x)

        x = tf.placeholder(jnp.float32)
        y = jpf.py_func(check, [x], SCALAR)
        dy_dx = tf.gradients(y, x)[0]
        start = threading.Barrier(8)

        def work(thread):
            start.wait()
            for i in range(12):
                value = float(1 + thread + 8 * i)
                if (thread + i) % 3:
                    got = sess.run([y, dy_dx], {x: value})
                    np.testing.assert_allclose(got, [value**0.5, 0.5 / value**0.5], 1e-6)
                else:
                    with pytest.raises(ValueError) as error:  # noqa: PT011
                        sess.run([y, dy_dx], {x: -value})
                    assert error.value.args == (-value,)
            return True

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(8)))

    def test_the_first_runs_at_once_share_one_program(self, graph):
        """The program is traced once."""
        traces = []

        def traced(x):
            traces.append(1)
            return x + 1

        y = tf.lift(traced)(tf.constant(1.0))
        for _ in range(50):  # so that it takes a while to make a program
            y = y + 1
        start = threading.Barrier(8)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)

        def first_run(session):
            start.wait()
            return session.run(y)

        try:
            for _ in range(3):
                traces.clear()
                with tf.Session(graph) as session, ThreadPoolExecutor(8) as pool:
                    assert list(pool.map(first_run, [session] * 8)) == [52.0] * 8
                assert len(traces) == 1
        finally:
            sys.setswitchinterval(interval)

    def test_defaults_are_the_threads_own(self, sess, graph):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(tf.get_default_session).result() is None
            assert pool.submit(tf.get_default_graph).result() is not graph


class TestDefaultSession:
    def test_eval_and_run(self, graph):
        x = tf.placeholder(jnp.float32)
        y = x + 1
        with pytest.raises(ValueError, match="no default session"):
            y.eval({x: 1.0})
        with pytest.raises(ValueError, match="no default session"):
            y.op.run({x: 1.0})
        with tf.Session() as outer:
            assert y.eval({x: 1.0}) == 2.0
            with tf.Session() as inner:
                assert tf.get_default_session() is inner
            assert tf.get_default_session() is outer
            assert y.op.run({x: 1.0}) is None
        assert y.eval({x: 2.0}, session=tf.Session()) == 3.0

    def test_a_session_makes_its_graph_the_default(self):
        graph = tf.Graph()
        with tf.Session(graph) as sess:
            t = tf.constant(4.0)
            assert t.graph is graph is sess.graph
            assert t.eval() == 4.0

    def test_interactive(self, graph):
        first = tf.InteractiveSession()
        second = tf.InteractiveSession(tf.Graph())
        assert tf.get_default_session() is second
        first.close()
        assert tf.get_default_session() is second
        assert tf.get_default_graph() is second.graph
        assert tf.constant(2.0).eval() == 2.0
        second.close()
        second.close()
        assert tf.get_default_session() is None
        assert tf.get_default_graph() is graph
        with tf.InteractiveSession() as sess:
            assert tf.get_default_session() is sess
        assert tf.get_default_session() is None

    def test_an_interactive_session_outlasts_the_cell_that_opens_it(self, graph):
        """A cell of a notebook that awaits something runs in a context of its own."""
        sess = contextvars.copy_context().run(tf.InteractiveSession, tf.Graph())
        assert tf.get_default_session() is sess
        assert tf.constant(2.0).graph is sess.graph
        with tf.Graph().as_default() as inner:
            assert tf.get_default_graph() is inner
        sess.close()
        assert tf.get_default_graph() is graph


def test_make_callable(sess):
    x, m = tf.placeholder(jnp.float32), tf.placeholder(jnp.float32, name="m")
    call = sess.make_callable({"y": x - m}, [x, "m:0"])
    assert call(3.0, 1) == {"y": 2.0}
    for values in ((3.0,), (3.0, 1, 2)):
        with pytest.raises(
            TypeError, match="expected 2 values, one per entry of feed_list"
        ):
            call(*values)
    with pytest.raises(ValueError, match="You must feed a value for placeholder 'm'"):
        sess.make_callable(x - m, [x])


def test_without_jit(sess):
    x = tf.placeholder(jnp.float32)
    slope = tf.gradients(jpf.py_func(lambda x: x**3, [x], jnp.float32), x)[0]
    with jax.disable_jit():
        assert sess.run([slope, *tf.gradients(slope, x)], {x: 2.0}) == [12.0, 12.0]


def test_64_bit():
    with jax.enable_x64(True), tf.Session() as sess:
        x = tf.placeholder(jnp.float64)
        value = sess.run(x / 3, {x: 1})
    assert value.dtype == np.float64
    assert value == 1 / 3


def test_a_regression_is_learned(sess):
    rng = np.random.default_rng(0)
    points = rng.uniform(-1, 1, (64, 2))
    targets = points @ [2.0, -3.0] + 0.5

    def loss(w, b, x, y):
        residual = jnp.abs(x @ w + b - y)
        if residual.max() < 1:  # quadratic near the solution, linear far from it
            return jnp.mean(residual**2)
        return jnp.mean(residual)

    w, b = tf.placeholder(jnp.float32, [2]), tf.placeholder(jnp.float32, [])
    x, y = tf.placeholder(jnp.float32, [None, 2]), tf.placeholder(jnp.float32, [None])
    cost = jpf.py_func(loss, [w, b, x, y], jnp.float32)
    step = tf.gradients(cost, [w, b])
    weights, bias = np.zeros(2, np.float32), np.float32(0)
    for _ in range(200):
        value, (dw, db) = sess.run(
            [cost, step], {w: weights, b: bias, x: points, y: targets}
        )
        weights -= 0.5 * dw
        bias -= 0.5 * db
    assert value < 1e-6
    np.testing.assert_allclose(weights, [2, -3], atol=1e-3)
    np.testing.assert_allclose(bias, 0.5, atol=1e-3)


class TestLargeGraph:
    def test_nodes_outside_the_fetches_cost_a_run_nothing(self, sess, graph):
        """Measured in calls of Python functions, which do not depend on the machine."""
        x = tf.placeholder(jnp.float32, [])
        y = x + 1

        def calls(function):
            count = 0

            def note(frame, event, argument):
                nonlocal count
                count += event == "call"

            gc.disable()  # finalizers of other tests must not count
            sys.setprofile(note)
            try:
                function()
            finally:
                sys.setprofile(None)
                gc.enable()
            return count

        def run():
            sess.run(y, {x: 1.0})

        chain = y

        def extend():
            nonlocal chain
            for _ in range(1000):
                chain = chain * 1.001

        run()
        alone = calls(run)
        halves = [calls(extend) for _ in range(2)]
        assert len(graph.get_operations()) == 2002
        assert halves[1] < 1.1 * halves[0]
        run()  # the graph has changed
        assert calls(run) <= alone

    def test_a_long_chain_and_its_gradient_do_not_recurse(self, sess):
        x = tf.placeholder(jnp.float32, [])
        y = x
        for _ in range(2000):
            y = y * 1.001
        slope = tf.gradients(y, x)[0]
        np.testing.assert_allclose(sess.run([y, slope], {x: 1.0}), 1.001**2000, rtol=1e-3)

    def test_nothing_of_a_graph_outlives_it(self):
        with tf.Graph().as_default() as graph, tf.Session() as sess:
            x = tf.placeholder(jnp.float32)
            y = jpf.py_func(log_huber, [x, 2.0], jnp.float32)
            sess.run([y, tf.gradients(y, x)], {x: 1.0})
        alive = weakref.ref(graph)
        del graph, sess, x, y
        jax.clear_caches()
        gc.collect()
        assert alive() is None


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap])
def test_a_session_in_a_transform_says_where_it_runs(transform):
    x = tf.placeholder(jnp.float32)
    with tf.Session() as session:
        program = transform(lambda v: session.run(x * 2, {x: v}))
        with pytest.raises(TypeError, match=r"Session\.run: .* runs outside of jax\.jit"):
            program(jnp.ones(3) if transform is jax.vmap else 1.0)
        assert session.run(x * 2, {x: 1.0}) == 2
