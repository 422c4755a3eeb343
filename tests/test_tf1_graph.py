"""Graphs: nodes, names, shapes, operators; `lift`, `tf.numpy`, `py_func` on tensors."""

import operator
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpyfunc as jpf
import jpyfunc.tf1 as tf

F32 = jnp.float32


@pytest.fixture
def graph():
    with tf.Graph().as_default() as graph:
        yield graph


@pytest.fixture
def sess(graph):
    with tf.Session() as sess:
        yield sess


def same(got, want):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5), got, want)


class TestNames:
    def test_are_unique_and_found_again(self, graph):
        x, y = tf.placeholder(F32), tf.placeholder(F32)
        assert (x.name, y.name) == ("Placeholder:0", "Placeholder_1:0")
        tf.placeholder(F32, name="Placeholder_2")
        z = tf.placeholder(F32)
        assert z.op.name == "Placeholder_3"
        first = jpf.py_func(lambda x: x, [x], F32)
        second = jpf.py_func(lambda x: (x, x), [x], [F32, F32], name="pair")
        third = jpf.numpy_func(lambda x: x, [x], F32)
        assert [t.name for t in (first, *second, third)] == [
            "PyFunc:0", "pair:0", "pair:1", "PyFunc_1:0",
        ]  # fmt: skip
        assert graph.get_tensor_by_name("pair:1") is second[1]
        assert graph.get_operations()[-1] is third.op
        assert len(graph.get_operations()) == 7

    def test_scopes(self, graph):
        with tf.name_scope("a") as outer:
            assert outer == "a/"
            with tf.name_scope("b"):
                assert tf.constant(1).name == "a/b/Const:0"
            assert (tf.constant(1) + 1).name == "a/add:0"
        with tf.name_scope("a"):
            assert tf.constant(1).name == "a_1/Const:0"
        assert tf.constant(1).name == "Const:0"

    @pytest.mark.parametrize("name", ["a b", "/a", "_a", "a:0", "", 3])
    def test_that_cannot_be_one(self, graph, name):
        with pytest.raises(ValueError, match="expected a name of letters"):
            graph.unique_name(name)

    def test_lookups_that_fail(self, graph):
        tf.constant(1, name="x")
        with pytest.raises(ValueError, match="such as 'add:0', got 'x'; write 'x:0'"):
            graph.get_tensor_by_name("x")
        with pytest.raises(KeyError, match="has no operation of that name"):
            graph.get_tensor_by_name("y:0")
        with pytest.raises(KeyError, match="'x' has 1 results"):
            graph.get_tensor_by_name("x:1")

    def test_text_of_nodes(self, graph):
        x = tf.placeholder(F32, [None, 2], name="x")
        assert repr(x) == "<Tensor 'x:0' shape=(None, 2) dtype=float32>"
        assert repr(x.op) == "<Operation 'x'>"
        assert (x.op.inputs, x.op.outputs) == ((), (x,))


class TestDefaultGraph:
    def test_nests_and_is_the_threads_own(self, graph):
        with tf.Graph().as_default() as inner:
            assert tf.get_default_graph() is inner
            assert tf.constant(1).graph is inner
        assert tf.get_default_graph() is graph
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(tf.get_default_graph).result() is not graph

    def test_reset(self):
        def work():
            tf.reset_default_graph()
            old = tf.constant(1).graph
            tf.reset_default_graph()
            return (
                old is not tf.get_default_graph(),
                tf.get_default_graph().get_operations(),
            )

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(work).result() == (True, [])

    def test_reset_inside_another(self, graph):
        with pytest.raises(RuntimeError, match="reset_default_graph"):
            tf.reset_default_graph()

    def test_tensors_of_two_graphs(self, graph):
        x = tf.placeholder(F32, name="x")
        with tf.Graph().as_default() as other:
            y = tf.placeholder(F32, name="y")
        for mix in (
            lambda: x + y,
            lambda: tf.numpy.stack([x, y]),
            lambda: jpf.py_func(lambda x, y: x, [x, y], F32),
        ):
            with pytest.raises(ValueError, match=r"'x:0'.*'y:0'") as error:
                mix()
            assert repr(graph) in str(error.value)
            assert repr(other) in str(error.value)


class TestSources:
    def test_placeholder(self, graph):
        assert tf.placeholder(float).dtype == jnp.float32
        assert tf.placeholder(F32, []).shape == ()
        assert tf.placeholder(F32).shape is None
        with pytest.raises(TypeError, match="placeholder 'Placeholder': expected a dtype"):
            tf.placeholder("floating")
        with pytest.raises(
            TypeError, match=r"expected shape to be.*got 3; write shape=\[\]"
        ):
            tf.placeholder(F32, 3)
        with pytest.raises(ValueError, match=r"float64 needs 64-bit types.*tf\.float32"):
            tf.placeholder(jnp.float64)

    def test_constant(self, sess):
        filled = tf.constant(2, jnp.float32, shape=[2, 2], name="two")
        assert (filled.name, filled.shape, filled.dtype) == ("two:0", (2, 2), jnp.float32)
        shaped = tf.constant([1, 2, 3, 4], shape=(2, 2))
        same(sess.run([filled, shaped]), [np.full((2, 2), 2), [[1, 2], [3, 4]]])
        with pytest.raises(
            ValueError, match="constant 'Const': expected a scalar or as many"
        ):
            tf.constant([1, 2], shape=[3])
        with pytest.raises(TypeError, match="'Const': expected int32, got float64"):
            tf.constant(1.5, jnp.int32)
        with pytest.raises(TypeError, match="'Const': expected a value, got <Tensor"):
            tf.constant(filled)

    def test_placeholder_with_default(self, sess):
        base = tf.placeholder(F32)
        t = tf.placeholder_with_default([1.0, 2.0], [None], name="t")
        derived = tf.placeholder_with_default(base * 2, None)
        assert t.name == "t:0"
        same(sess.run([t, derived], {base: 3.0}), [[1, 2], 6])
        same(sess.run([t * 2, derived], {t: [1, 2, 3], derived: 0}), [[2, 4, 6], 0])
        with pytest.raises(ValueError, match=r"expected shape \(None,\), got \(1, 2\)"):
            sess.run(t, {t: [[1.0, 2.0]]})
        with pytest.raises(ValueError, match="expected a default of shape"):
            tf.placeholder_with_default(1.0, [2])
        same(sess.run(tf.gradients(derived * 5, base), {base: 1.0}), [10])


BINARY = [
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv,
    operator.mod, operator.pow, operator.lt, operator.le, operator.gt, operator.ge,
]  # fmt: skip
BITWISE = [operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift]


class TestOperators:
    @pytest.mark.parametrize("op", [*BINARY, *BITWISE, operator.matmul, divmod])
    def test_binary_with_tensors_scalars_and_arrays(self, sess, op):
        dtype = jnp.int32 if op in BITWISE else F32
        a, b = jnp.asarray([[5, 2], [3, 4]], dtype), jnp.asarray([[2, 2], [1, 3]], dtype)
        x, y = tf.placeholder(dtype), tf.placeholder(dtype)
        pairs = [(op(x, y), op(a, b)), (op(x, b), op(a, b)), (op(a, y), op(a, b))]
        pairs.append((op(np.asarray(a), y), op(a, b)))
        if op is not operator.matmul:
            pairs += [(op(x, 2), op(a, 2)), (op(7, y), op(7, b))]
        got, want = zip(*pairs, strict=True)
        same(sess.run(got, {x: a, y: b}), want)
        assert sess.run(got[0], {x: a, y: b}) is not None

    def test_unary_and_indexing(self, sess):
        a = jnp.arange(-3.0, 3.0).reshape(2, 3)
        x, i = tf.placeholder(F32), tf.placeholder(jnp.int32)
        made = [-x, +x, abs(x), x[1], x[:, ::2], x[..., None], x[i], x[0, i], ~i]
        want = [-a, +a, abs(a), a[1], a[:, ::2], a[..., None], a[1], a[0, 1], -2]
        same(sess.run(made, {x: a, i: 1}), want)

    def test_scalars_stay_weak(self, sess):
        x = tf.placeholder(jnp.bfloat16)
        assert sess.run(x * 2.5 + 1, {x: 2}).dtype == jnp.bfloat16

    def test_equality_is_identity(self, graph):
        x, y = tf.placeholder(F32), tf.placeholder(F32)
        assert x == x
        assert x != y
        assert len({x: 1, y: 2}) == 2
        assert y in [x, y]

    @pytest.mark.parametrize(
        ("use", "what"),
        [
            (bool, r"bool\(\)"),
            (float, r"float\(\)"),
            (int, r"int\(\)"),
            (complex, r"complex\(\)"),
            (len, r"len\(\)"),
            (iter, "iteration"),
            (range, "use as an index or a size"),
            (np.asarray, "conversion to NumPy"),
            (jnp.asarray, "conversion to NumPy"),
            (lambda t: 1 in t, "`in`"),
        ],
    )
    def test_what_needs_a_value(self, graph, use, what):
        x = tf.placeholder(F32, name="x")
        with pytest.raises(TypeError, match=f"{what} of graph tensor 'x:0'.*py_func.*run"):
            use(x)


class TestLift:
    def test_pytrees_in_and_out(self, sess):
        def func(pair, scale=1.0, *, flags):
            return {"sum": pair[0] + pair[1]["b"] * scale, "flags": (flags["on"], [scale])}

        x, y = tf.placeholder(F32, [2]), tf.placeholder(F32, [2])
        out = tf.lift(func)((x, {"b": y}), 3.0, flags={"on": True})
        assert out["sum"].shape == (2,)
        same(
            sess.run(out, {x: [1, 2], y: [3, 4]}),
            {"sum": [10, 14], "flags": (True, [3.0])},
        )

    def test_without_a_tensor_it_is_the_function(self, graph):
        assert isinstance(tf.lift(jnp.sin)(1.0), jax.Array)
        assert graph.get_operations() == []

    def test_shapes_known_and_guessed(self, graph):
        x, m = tf.placeholder(F32, [4, 3]), tf.placeholder(F32, [None, 3])
        any_shape = tf.placeholder(F32)
        assert tf.numpy.dot(x, np.ones(3, np.float32)).shape == (4,)
        product = tf.numpy.dot(m, np.ones((3, 2), np.float32))
        assert (product.shape, product.dtype) == (None, jnp.float32)
        assert len(tf.numpy.linalg.qr(any_shape)) == 2
        assert (any_shape > 1).dtype == jnp.bool_

    def test_errors_are_raised_while_building_where_shapes_are_known(self, graph):
        x = tf.placeholder(F32, [4, 3], name="x")
        with pytest.raises(TypeError) as error:
            x @ x
        assert "while adding 'matmul'" in error.value.__notes__[-1]

    def test_a_body_that_needs_values_is_for_py_func(self, graph):
        with pytest.raises(jax.errors.ConcretizationTypeError) as error:
            tf.lift(lambda x: x if x > 0 else -x)(tf.placeholder(F32))
        assert any("py_func" in note for note in error.value.__notes__)

    def test_a_structure_that_was_guessed_wrong(self, sess):
        x = tf.placeholder(F32)
        sizes = tf.numpy.shape(x)
        with pytest.raises(AttributeError):
            sess.run(sizes.no_such_attribute)
        pair = tf.lift(lambda x: tuple(x) if x.ndim else (x,))(x)
        with pytest.raises(TypeError, match="expected results in the structure"):
            sess.run(pair, {x: [1.0, 2.0]})


class TestNumpy:
    def test_a_sample_of_its_functions(self, sess):
        a = np.array([[2.0, 1.0], [1.0, 3.0]], np.float32)
        x = tf.placeholder(F32, [2, 2])

        def build(xp, x):
            return [
                xp.sin(x), xp.sum(x, axis=0, keepdims=True), xp.where(x > 1, x, 0.0),
                xp.stack([x, x * 2]), xp.einsum("ij,jk->ik", x, x), xp.linalg.inv(x),
                xp.abs(xp.fft.fft(x)), xp.split(x, 2), xp.concatenate([x, np.eye(2)]),
                xp.clip(x, min=1.5), xp.add(x, 1), xp.float32, xp.pi, xp.zeros(2),
            ]  # fmt: skip

        got, want = build(tf.numpy, x), build(jnp, a)
        assert got[-3:-1] == want[-3:-1]
        same(sess.run(got[:-3], {x: a}), want[:-3])

    def test_names(self, graph):
        assert set(dir(tf.numpy)) >= {"sin", "linalg", "float32"}
        assert "det" in dir(tf.numpy.linalg)
        assert tf.numpy.sin(tf.constant(1.0)).name == "sin:0"
        with pytest.raises(AttributeError, match="nothing_of_the_kind"):
            _ = tf.numpy.nothing_of_the_kind


@jpf.py_func(Tout=F32)
def fails(x):
    raise ValueError("x")


class TestPyFunc:
    def test_nodes_leave_the_function_as_it_is(self, sess):
        """Even a function that is pickled by its name."""
        x = tf.placeholder(F32, [])
        nodes = [fails(x) for _ in range(2)]
        for node in nodes:
            node.set_shape([])
        with pytest.raises(ValueError, match="x") as caught, jpf.raise_original():
            sess.run(nodes[1], {x: 1.0})
        notes = [note for note in caught.value.__notes__ if "PyFunc" in note]
        assert notes == ["in graph operation 'PyFunc_1'"]

    def test_tensors_anywhere_among_the_arguments(self, sess):
        @jpf.py_func(Tout={"total": F32, "mode": [jnp.int32]})
        def func(pair, scale, *, mode, extra=None):
            return {"total": sum(pair) * scale, "mode": [len(mode) + extra["n"]]}

        x, n = tf.placeholder(F32), tf.placeholder(jnp.int32)
        out = func((x, np.float32(2)), 3.0, mode="ab", extra={"n": n})
        assert out["total"].dtype == jnp.float32
        same(sess.run(out, {x: 1.0, n: 5}), {"total": 9, "mode": [7]})
        constant = func((1.0, 2.0), 3.0, mode="a", extra={"n": 1})["total"]
        assert sess.run(constant) == 9

    def test_a_single_tensor_as_inp(self, sess):
        x = tf.placeholder(F32)
        assert sess.run(jpf.py_func(lambda x: x + 1, x, F32), {x: 1.0}) == 2.0

    def test_methods(self, sess):
        class Model:
            bias = 3.0

            @jpf.py_func(Tout=F32)
            def apply(self, x):
                return x + self.bias

        x = tf.placeholder(F32)
        assert sess.run(Model().apply(x), {x: 1.0}) == 4.0

    def test_tout_left_out_or_callable(self, sess):
        x = tf.placeholder(F32, [3])
        free = tf.placeholder(F32)

        def halves(x):
            if x.sum() > 0:
                return x / 2, [x * 0]
            return x * 0, [x / 2]

        for t in (x, free):
            inferred = jpf.py_func(halves, [t])
            declared = jpf.py_func(halves, [t], lambda t: (t, [t]))
            got = sess.run([inferred, declared], {t: [1, 2, 3]})
            same(got, [([0.5, 1, 1.5], [np.zeros(3)])] * 2)
        assert jpf.py_func(halves, [x])[0].shape == (3,)
        assert jpf.py_func(halves, [free])[0].shape is None

    def test_a_number_of_results_that_cannot_be_told(self, graph):
        def rows(x):
            return [r for r in x[:, :7, :11].reshape(77, 5)]

        with pytest.raises(TypeError, match=r"'rows'.*how many results.*'x:0'.*Give Tout"):
            jpf.py_func(rows, [tf.placeholder(F32, name="x")])
        assert len(jpf.py_func(rows, [tf.placeholder(F32, [5, 7, 11])])) == 77

    def test_no_results(self, sess):
        seen = []
        x = tf.placeholder(F32)
        op = jpf.py_func(lambda x: seen.append(float(x)), [x], [], name="log")
        assert repr(op) == "<Operation 'log'>"
        op.run({x: 2.0})
        sess.run([op, x], {x: 3.0})
        assert seen == [2.0, 3.0]

    def test_ordered_ones_run_in_the_order_of_the_graph(self, sess):
        seen = []
        x = tf.placeholder(F32)
        ops = [
            jpf.py_func(lambda x, i=i: seen.append(i), [x], [], ordered=True)
            for i in range(5)
        ]
        sess.run(ops[::-1], {x: 0.0})
        assert seen == [0, 1, 2, 3, 4]

    def test_numpy_func(self, sess):
        def body(x):
            assert type(x) is np.ndarray
            return np.sort(x)

        x = tf.placeholder(F32)
        y = jpf.numpy_func(body, [x], jax.ShapeDtypeStruct((3,), F32))
        same(sess.run(y, {x: [3, 1, 2]}), [1, 2, 3])

    def test_the_body_gets_arrays_not_tensors(self, sess):
        kinds = []

        def body(x):
            kinds.append((type(x), threading.current_thread()))
            return x

        x = tf.placeholder(F32)
        sess.run(jpf.py_func(body, [x], jax.ShapeDtypeStruct((), F32)), {x: 1.0})
        assert all(issubclass(kind, jax.Array) for kind, _ in kinds)

    def test_a_body_that_closes_over_a_tensor(self, sess):
        x, other = tf.placeholder(F32), tf.placeholder(F32, name="other")
        y = jpf.py_func(lambda x: jnp.sum(np.asarray(other)) + x, [x], F32)
        with pytest.raises(TypeError, match="graph tensor 'other:0'"):
            sess.run(y, {x: 1.0, other: 2.0})


class TestShapes:
    def test_set_shape_merges(self, graph):
        x = tf.placeholder(F32, name="x")
        assert x.get_shape() is None
        x.set_shape(None)
        assert x.shape is None
        x.set_shape([None, 3])
        assert x.get_shape().as_list() == [None, 3]
        assert x.get_shape().ndims == 2
        x.set_shape((2, None))
        assert x.shape == (2, 3)
        for conflict in ([3, 3], [2], [2, 3, None]):
            with pytest.raises(ValueError, match=r"set_shape of 'x:0': .*\(2, 3\), got"):
                x.set_shape(conflict)
        with pytest.raises(
            TypeError, match="set_shape of 'x:0': expected shape to be None"
        ):
            x.set_shape(3)
        assert x.shape == (2, 3)
        assert (x + 1).shape == (2, 3)

    def test_a_fed_value_must_have_it(self, sess):
        x = tf.placeholder(F32, name="x")
        y = x * 2
        assert sess.run(y, {x: [1, 2]}).shape == (2,)
        x.set_shape([3])
        with pytest.raises(ValueError, match=r"feed of 'x:0': expected shape \(3,\), got"):
            sess.run(y, {x: [1, 2]})

    def test_a_computed_value_must_have_it(self, sess):
        x = tf.placeholder(F32)
        y = tf.abs(x)
        y.set_shape([None, 2])
        same(sess.run(y, {x: [[1, -2]]}), [[1, 2]])
        with pytest.raises(ValueError, match=r"'abs:0': expected shape \(None, 2\).*got"):
            sess.run(y, {x: [[1, 2, 3]]})

    @pytest.mark.parametrize("tout", [tf.float32, [tf.float32, tf.int32]])
    def test_of_numpy_results(self, sess, tout):
        def body(x):
            x = np.array(x)
            ranks = np.argsort(x)
            return x[ranks] if tout is tf.float32 else [x[ranks], ranks]

        x = tf.placeholder(F32, [3])
        made = tf.py_func(body, [x], tout, name="sorted")
        results = made if isinstance(made, list) else [made]
        for fetch in (made, tf.reduce_sum(results[0])):
            with pytest.raises(jpf.InferenceError, match=r"'sorted:0'.*y\.set_shape\("):
                sess.run(fetch, {x: [3, 1, 2]})
        for t in results:
            t.set_shape([None])
        with pytest.raises(jpf.InferenceError, match=r"'sorted:0'.*a Tout with the shape"):
            sess.run(made, {x: [3, 1, 2]})
        for t in results:
            t.set_shape(x.get_shape())
        got = sess.run(results, {x: [3, 1, 2]})
        same(got, [[1, 2, 3], [1, 2, 0]][: len(got)])

    def test_of_numpy_results_is_checked(self, sess):
        x = tf.placeholder(F32)
        y = tf.py_func(np.sort, [x], F32)
        y.set_shape([3])
        with pytest.raises(jpf.ResultError, match=r"expected shape \(3,\), got \(2,\)"):
            sess.run(y, {x: [2, 1]})
        same(sess.run(y, {x: [3, 2, 1]}), [1, 2, 3])

    def test_a_body_that_fails_without_data_says_to_set_the_shape(self, sess):
        def body(x):
            if not isinstance(x, np.ndarray):
                raise AttributeError("no array")
            return x

        y = tf.py_func(body, [tf.constant([1.0, 2.0])], F32, name="strict")
        with pytest.raises(AttributeError, match="no array") as error:
            sess.run(y)
        assert any("'strict:0'" in n and "set_shape" in n for n in error.value.__notes__)
        y.set_shape([2])
        same(sess.run(y), [1, 2])
