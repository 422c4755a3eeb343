"""TensorFlow 1's functions of arrays, against NumPy: called at once, and as nodes."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import jpyfunc.tf1 as tf

A = np.array([[0.5, -1.5, 2.5], [1.25, 0.25, -0.75]], np.float32)
B = np.array([[2.0, 0.5, -1.0], [0.75, 3.0, 0.25]], np.float32)
POSITIVE = np.abs(A) + 0.1
UNIT = A / 3
N = np.array([[7, -7, 5], [-5, 4, 0]], np.int32)
D = np.array([[2, 2, -3], [-3, 1, 6]], np.int32)
T = np.array([[True, False, True], [False, False, True]])
SPECIAL = np.array([1.0, np.nan, np.inf, -np.inf], np.float32)


def softmax(x, axis=-1):
    return np.exp(x) / np.exp(x).sum(axis, keepdims=True)


def case(name, *args, want, **options):
    return pytest.param(name, args, options, want, id=f"{name}{len(CASES)}")


CASES = []
for name, argument, want in [
    ("abs", A, np.abs(A)), ("acos", UNIT, np.arccos(UNIT)),
    ("acosh", POSITIVE + 1, np.arccosh(POSITIVE + 1)), ("asin", UNIT, np.arcsin(UNIT)),
    ("asinh", A, np.arcsinh(A)), ("atan", A, np.arctan(A)),
    ("atanh", UNIT, np.arctanh(UNIT)), ("ceil", A, np.ceil(A)), ("cos", A, np.cos(A)),
    ("angle", A + 1j * B, np.angle(A + 1j * B)), ("conj", A + 1j * B, A - 1j * B),
    ("cosh", A, np.cosh(A)), ("digamma", POSITIVE, scipy.special.digamma(POSITIVE)),
    ("erf", A, scipy.special.erf(A)), ("erfc", A, scipy.special.erfc(A)),
    ("exp", A, np.exp(A)), ("expm1", A, np.expm1(A)), ("floor", A, np.floor(A)),
    ("imag", A + 1j * B, B), ("is_finite", SPECIAL, np.isfinite(SPECIAL)),
    ("is_inf", SPECIAL, np.isinf(SPECIAL)), ("is_nan", SPECIAL, np.isnan(SPECIAL)),
    ("lgamma", POSITIVE, scipy.special.gammaln(POSITIVE)),
    ("log", POSITIVE, np.log(POSITIVE)), ("log1p", POSITIVE, np.log1p(POSITIVE)),
    ("log_sigmoid", A, -np.log1p(np.exp(-A))), ("logical_not", T, ~T),
    ("negative", A, -A), ("real", A + 1j * B, A), ("reciprocal", B, 1 / B),
    ("rint", A, [[0, -2, 2], [1, 0, -1]]), ("round", A, [[0, -2, 2], [1, 0, -1]]),
    ("rsqrt", POSITIVE, POSITIVE**-0.5), ("sigmoid", A, 1 / (1 + np.exp(-A))),
    ("sign", A, np.sign(A)), ("sin", A, np.sin(A)), ("sinh", A, np.sinh(A)),
    ("softplus", A, np.log1p(np.exp(A))), ("softsign", A, A / (1 + np.abs(A))),
    ("sqrt", POSITIVE, np.sqrt(POSITIVE)), ("square", A, A**2), ("tan", A, np.tan(A)),
    ("tanh", A, np.tanh(A)), ("identity", A, A), ("stop_gradient", A, A),
    ("to_float", N, N.astype(np.float32)), ("to_int32", A, np.trunc(A).astype(int)),
    ("zeros_like", A, 0 * A), ("ones_like", N, N**0), ("convert_to_tensor", A, A),
    ("shape", A, [2, 3]), ("size", A, 6), ("rank", A, 2), ("nn.relu", A, A * (A > 0)),
    ("nn.relu6", 4 * A, np.clip(4 * A, 0, 6)),
    ("nn.elu", A, np.where(A > 0, A, np.expm1(A))),
    ("nn.leaky_relu", A, np.where(A > 0, A, 0.2 * A)), ("nn.softmax", A, softmax(A)),
    ("nn.selu", A,
     1.0507009873554805 * np.where(A > 0, A, 1.6732632423543772 * np.expm1(A))),
    ("nn.log_softmax", A, np.log(softmax(A))), ("nn.l2_loss", A, (A**2).sum() / 2),
]:  # fmt: skip
    CASES.append(case(name, argument, want=want))
for name, x, y, want in [
    ("add", A, B, A + B), ("atan2", A, B, np.arctan2(A, B)), ("div", A, B, A / B),
    ("div", N, D, np.floor_divide(N, D)), ("divide", N, D, N / D), ("equal", N, D, N == D),
    ("floordiv", N, D, np.floor_divide(N, D)), ("floormod", N, D, np.mod(N, D)),
    ("greater", A, B, A > B), ("greater_equal", A, B, A >= B), ("less", A, B, A < B),
    ("less_equal", A, B, A <= B),
    ("logical_and", T, ~T, T & ~T),
    ("logical_or", T, ~T, T | ~T),
    ("logical_xor", T, T[:, ::-1], T ^ T[:, ::-1]), ("maximum", A, B, np.maximum(A, B)),
    ("minimum", A, B, np.minimum(A, B)), ("mod", N, D, np.mod(N, D)),
    ("multiply", A, B, A * B),
    ("not_equal", N, D, N != D),
    ("pow", POSITIVE, B, POSITIVE**B),
    ("squared_difference", A, B, (A - B) ** 2), ("subtract", A, B, A - B),
    ("truediv", N, D, N / D), ("complex", A, B, A + 1j * B),
    ("nn.bias_add", A, B[0], A + B[0]),
]:  # fmt: skip
    CASES.append(case(name, x, y, want=want))
SMALL = np.full(300, 200, np.uint8)
for name, args, options, want in [
    ("add_n", ([A, B, A],), {}, 2 * A + B),
    ("clip_by_value", (A, -1.0, 1.0), {}, np.clip(A, -1, 1)),
    ("clip_by_value", (A, 1.0, -1.0), {}, A**0),  # the lower limit wins
    ("matmul", (A, B), {"transpose_b": True}, A @ B.T),
    ("matmul", (A, B, True), {}, A.T @ B),
    ("matmul", (A + 1j * B, B), {"adjoint_a": True}, (A - 1j * B).T @ B),
    ("tensordot", (A, B), {"axes": [[0, 1], [0, 1]]}, (A * B).sum()),
    ("einsum", ("ij,kj->ik", A, B), {}, A @ B.T),
    ("reduce_sum", (A,), {}, A.sum()), ("reduce_sum", (A, 1), {}, A.sum(1)),
    ("reduce_sum", (A, [0, 1], True), {}, [[A.sum()]]),
    ("reduce_sum", (A,), {"reduction_indices": [1], "keep_dims": True}, A.sum(1)[:, None]),
    ("reduce_sum", (SMALL,), {}, np.uint8(300 * 200 % 256)),
    ("reduce_mean", (A, [0]), {}, A.mean(0)),
    ("reduce_mean", (np.array([1, 0, 1, 0], np.int32),), {}, 0),
    ("reduce_mean", (np.array([[-3, -4], [3, 4]], np.int32), 1), {}, [-3, 3]),
    ("reduce_mean", (SMALL,), {}, np.uint8(200)),
    ("reduce_max", (A, 0), {}, A.max(0)), ("reduce_min", (A, -1), {}, A.min(-1)),
    ("reduce_prod", (A, 0), {}, A.prod(0)), ("reduce_all", (T, 1), {}, T.all(1)),
    ("reduce_any", (T, 0), {}, T.any(0)),
    ("reduce_logsumexp", (A, 1), {"keepdims": True}, np.log(np.exp(A).sum(1))[:, None]),
    ("argmax", (A,), {}, A.argmax(0)), ("argmax", (A, 1), {}, A.argmax(1)),
    ("argmin", (A,), {"dimension": 1}, A.argmin(1)),
    ("cumsum", (A,), {}, A.cumsum(0)), ("cumprod", (A, 1), {}, A.cumprod(1)),
    ("cumsum", ([1, 2, 3],), {"exclusive": True}, [0, 1, 3]),
    ("cumsum", ([1, 2, 3],), {"reverse": True}, [6, 5, 3]),
    ("cumprod", ([[2, 3, 4]], 1), {"exclusive": True, "reverse": True}, [[12, 4, 1]]),
    ("norm", (A,), {}, np.sqrt((A**2).sum())), ("norm", (A, 2), {}, np.sqrt((A**2).sum())),
    ("norm", (A, 1), {"keepdims": True}, [[np.abs(A).sum()]]),
    ("norm", (A,), {"axis": 1}, np.sqrt((A**2).sum(1))),
    ("norm", (A, np.inf, [0, 1]), {}, np.abs(A).sum(1).max()),
    ("cast", (A, tf.int32), {}, np.trunc(A).astype(np.int32)),
    ("cast", (N, tf.bool), {}, N != 0),
    ("zeros", ([2, 3],), {}, 0 * A), ("ones", ([2], tf.int32), {}, np.ones(2, np.int32)),
    ("fill", ([2, 2], 1.5), {}, np.full((2, 2), 1.5)),
    ("eye", (2, 3), {}, np.eye(2, 3)), ("eye", (2,), {"batch_shape": [3]}, [np.eye(2)] * 3),
    ("range", (3,), {}, [0, 1, 2]), ("range", (3, 18, 6), {}, [3, 9, 15]),
    ("range", (5,), {"delta": 2}, [0, 2, 4]),
    ("linspace", (1.0, 2.0, 5), {}, np.linspace(1, 2, 5)),
    ("reshape", (A, [3, -1]), {}, A.reshape(3, 2)), ("reshape", (A, [-1]), {}, A.ravel()),
    ("broadcast_to", (A[0], [2, 3]), {}, [A[0]] * 2),
    ("expand_dims", (A, 1), {}, A[:, None]),
    ("expand_dims", (A,), {"dim": -1}, A[..., None]),
    ("squeeze", (A[None, :, None],), {}, A),
    ("squeeze", (A[None, :, None], [0]), {}, A[:, None]),
    ("squeeze", (A[None],), {"squeeze_dims": 0}, A),
    ("transpose", (A,), {}, A.T), ("transpose", (A[None], [1, 0, 2]), {}, A[:, None]),
    ("transpose", (A + 1j * B,), {"conjugate": True}, (A - 1j * B).T),
    ("reverse", (A, [1]), {}, A[:, ::-1]), ("tile", (A, [2, 1]), {}, np.tile(A, (2, 1))),
    ("pad", (A, [[1, 0], [0, 2]]), {}, np.pad(A, [(1, 0), (0, 2)])),
    ("pad", (A, [[1, 1], [2, 2]], "REFLECT"), {}, np.pad(A, [(1, 1), (2, 2)], "reflect")),
    ("pad", (A, [[1, 1], [0, 0]], "symmetric"), {},
     np.pad(A, [(1, 1), (0, 0)], "symmetric")),
    ("pad", (A, [[1, 0], [0, 0]]), {"constant_values": 7},
     np.pad(A, [(1, 0), (0, 0)], constant_values=7)),
    ("concat", ([A, B], 0), {}, np.concatenate([A, B])),
    ("concat", ([A, B], -1), {}, np.hstack([A, B])),
    ("stack", ([A, B], 1), {}, np.stack([A, B], 1)), ("unstack", (A, 3, 1), {}, [*A.T]),
    ("split", (A, 3, 1), {}, np.split(A, 3, 1)),
    ("split", (A, [1, 2], 1), {}, [A[:, :1], A[:, 1:]]),
    ("slice", (A, [0, 1], [1, -1]), {}, A[:1, 1:]),
    ("gather", (A, [1, 0, 1]), {}, A[[1, 0, 1]]),
    ("gather", (A, [2, 0]), {"axis": 1}, A[:, [2, 0]]),
    ("gather_nd", (A, [[0, 2], [1, 1]]), {}, A[[0, 1], [2, 1]]),
    ("gather_nd", (A, [[1]]), {}, A[1:]),
    ("where", (T, A, B), {}, np.where(T, A, B)),
    ("where", (np.array([True, False]), A, B), {}, [A[0], B[1]]),  # rows
    ("one_hot", ([0, 2, -1], 3), {}, np.float32([[1, 0, 0], [0, 0, 1], [0, 0, 0]])),
    ("one_hot", ([0, 1], 2, 5, -5), {"axis": 0}, np.int32([[5, -5], [-5, 5]])),
    ("meshgrid", ([1, 2], [3, 4, 5]), {}, [*np.meshgrid([1, 2], [3, 4, 5])]),
    ("nn.softmax", (A, 0), {}, softmax(A, 0)),
    ("nn.leaky_relu", (A, 0.5), {}, np.where(A > 0, A, A / 2)),
    ("nn.l2_normalize", (A, 1), {}, A / np.sqrt((A**2).sum(1, keepdims=True))),
    ("nn.moments", (A, [0]), {}, (A.mean(0), A.var(0))),
    ("nn.bias_add", (A[None], [1.0, 2.0]), {"data_format": "NCHW"},
     A[None] + [[1.0], [2.0]]),
    ("nn.sigmoid_cross_entropy_with_logits", (), {"labels": UNIT, "logits": A},
     np.log1p(np.exp(A)) - A * UNIT),
    ("nn.softmax_cross_entropy_with_logits", (), {"labels": softmax(B), "logits": A},
     -(softmax(B) * np.log(softmax(A))).sum(1)),
    ("nn.softmax_cross_entropy_with_logits_v2", (), {"labels": softmax(B), "logits": A},
     -(softmax(B) * np.log(softmax(A))).sum(1)),
    ("nn.sparse_softmax_cross_entropy_with_logits", (), {"labels": [2, 0], "logits": A},
     -np.log(softmax(A))[[0, 1], [2, 0]]),
]:  # fmt: skip
    CASES.append(case(name, *args, want=want, **options))


def find(name):
    return operator.attrgetter(name)(tf)


def close(got, want):
    if isinstance(got, list | tuple):
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            close(g, w)
        return
    assert np.shape(got) == np.shape(want)
    if isinstance(want, np.ndarray | np.generic):
        assert jnp.asarray(got).dtype.kind == want.dtype.kind
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "args", "options", "want"), CASES)
def test_called_at_once_and_as_a_node(name, args, options, want):
    function = find(name)
    close(function(*args, **options, name="node"), want)
    with tf.Graph().as_default() as graph, tf.Session() as sess:
        feeds = {}

        def tensor(x):
            if not isinstance(x, np.ndarray):
                return x
            t = tf.placeholder(x.dtype, x.shape)
            feeds[t] = x
            return t

        args, options = jax.tree.map(tensor, (args, options))
        made = function(*args, **options, name="node")
        if feeds:
            close(sess.run(made, feeds), want)
            assert graph.get_operation_by_name("node").outputs[0] in jax.tree.leaves(made)


def test_arguments_by_position_or_name_as_in_tensorflow():
    with tf.Graph().as_default():
        x = tf.placeholder(tf.float32, [2, 3])
        assert tf.identity(x, "by_place").name == "by_place:0"
        assert tf.identity(input=x).name == "identity:0"
        assert tf.add(x=x, y=1.0, name="sum").name == "sum:0"
        assert tf.squeeze(x[None], [0], "squeezed").name == "squeezed:0"
        assert tf.reduce_sum(x, 0, True, "total").name == "total:0"
        assert tf.reduce_sum(x, 0, True).shape == (1, 3)
        with pytest.raises(TypeError, match="add: expected name to be a string, got 3"):
            tf.add(x, 1, 3)
    with pytest.raises(TypeError, match="add: expected name to be a string, got 3"):
        tf.add(1, 2, 3)


def test_derivatives_that_stop():
    labels, logits = jnp.asarray(softmax(B)), jnp.asarray(A)

    def loss(function):
        return lambda labels: function(labels=labels, logits=logits).sum()

    grads = [
        jax.grad(loss(f))(labels)
        for f in (
            tf.nn.softmax_cross_entropy_with_logits,
            tf.nn.softmax_cross_entropy_with_logits_v2,
        )
    ]
    np.testing.assert_array_equal(grads[0], 0 * A)
    np.testing.assert_allclose(grads[1], -np.log(softmax(A)), rtol=1e-5)
    assert jax.grad(lambda x: tf.stop_gradient(x) * x)(3.0) == 3.0


def test_shapes_that_depend_on_data_need_a_body():
    assert tf.where([False, True, True]).tolist() == [[1], [2]]
    with tf.Graph().as_default(), tf.Session() as sess:
        x = tf.placeholder(tf.float32, [3])
        with pytest.raises(jax.errors.ConcretizationTypeError) as error:
            tf.where(x > 0)
        assert any("py_func" in note for note in error.value.__notes__)
        count = tf.contrib.eager.py_func(
            lambda x: tf.shape(tf.where(x > 0))[0], [x], jax.ShapeDtypeStruct((), tf.int32)
        )
        assert sess.run(count, {x: [1, -1, 2]}) == 2


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: tf.add_n([A, A[0]]),
            r"add_n: expected arrays of the same shape, got \(2, 3\)",
        ),
        (lambda: tf.unstack(A, 3), "unstack: expected num to be 2, got 3"),
        (
            lambda: tf.split(A, [1, 1], 1),
            r"split: expected sizes that add up to 3, got \[1",
        ),
        (lambda: tf.split(A, [4, -1], 1), "split: expected sizes that add up to 3"),
        (
            lambda: tf.slice(A, [0, 2], [1, 2]),
            r"slice: expected begin and size within shape \(2, 3\)",
        ),
    ],
)
def test_sizes_that_do_not_fit(call, text):
    with pytest.raises((ValueError, TypeError), match=text):
        call()


def test_a_missing_name_says_what_there_is():
    with pytest.raises(AttributeError, match=r"'train'.*tf\.numpy.*tf\.lift"):
        _ = tf.train
    assert not hasattr(tf, "Variable")


@pytest.mark.parametrize("name", ["float32", "int32", "bool", "bfloat16", "complex64"])
def test_dtypes(name):
    dtype = getattr(tf, name)
    with tf.Graph().as_default():
        x = tf.placeholder(dtype)
        assert x.dtype == dtype == jnp.dtype(name)
        assert tf.cast(x, dtype).dtype.name == name
    assert tf.zeros([2], dtype).dtype == dtype
