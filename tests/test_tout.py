"""`Tout`: its forms, the structure of the results, the check of what a body returns."""

import array
import collections
import dataclasses
import functools
import re
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import sparse

from jpyfunc import ResultError, numpy_func, py_func, raise_original

Struct = jax.ShapeDtypeStruct
F32 = Struct((), jnp.float32)
Pair = collections.namedtuple("Pair", "low high")
X = jnp.arange(3.0)

# The result of the body for X, the Tout, and the independent answer.
FORMS = {
    "exact": (lambda x: 2 * x, Struct((3,), jnp.float32), 2 * np.arange(3)),
    "like an array": (lambda x: 2 * x, jnp.zeros(3), 2 * np.arange(3)),
    "like a NumPy array": (lambda x: x, np.zeros(3, np.float32), np.arange(3)),
    "dtype": (lambda x: x.sum(), jnp.float32, 3),
    "np.dtype": (lambda x: x.sum(), np.dtype("float32"), 3),
    "name of a dtype": (lambda x: x.sum(), "bfloat16", 3),
    "Python type": (lambda x: x.sum(), float, 3),
    "callable": (lambda x: 2 * x, lambda x: Struct(x.shape, x.dtype), 2 * np.arange(3)),
    "callable, dtype": (lambda x: 2 * x, lambda x: x.dtype, 2 * np.arange(3)),
    "list": (lambda x: [x.min(), x], [jnp.float32, jnp.float32], [0, np.arange(3)]),
    "list of one": (lambda x: [x], [jnp.float32], [np.arange(3)]),
    "tuple of one": (lambda x: (x,), (jnp.float32,), (np.arange(3),)),
    "tuple for list": (lambda x: (x.min(), x.max()), [F32, F32], [0, 2]),
    "list for tuple": (lambda x: [x.min(), x.max()], (F32, F32), (0, 2)),
    "interchanged inside": (
        lambda x: {"a": (x.min(), [x.max()])},
        {"a": [F32, (F32,)]},
        {"a": [0, (2,)]},
    ),
    "dict": (lambda x: {"b": x[2], "a": 1}, {"a": jnp.int32, "b": F32}, {"a": 1, "b": 2}),
    "namedtuple": (lambda x: Pair(x.min(), x.max()), Pair(F32, F32), Pair(0, 2)),
    "None inside": (lambda x: (x.min(), None), (F32, None), (0, None)),
    "nothing": (lambda x: None, [], []),
    "nothing as a tuple": (lambda x: [], (), ()),
    "None": (lambda x: None, None, None),
    "nothing inside": (lambda x: (x.min(), None), [F32, []], [0, []]),
    "list as an array": (lambda x: [[1], [3]], Struct((2, 1), jnp.int32), [[1], [3]]),
    "arrays as an array": (lambda x: [x[0], 5.0], Struct((2,), jnp.float32), [0, 5]),
    "empty list as an array": (lambda x: [], Struct((0,), jnp.int32), np.zeros(0)),
}  # fmt: skip


def check_tree(got, expected, is_leaf=None):
    assert jax.tree.structure(got) == jax.tree.structure(expected, is_leaf=is_leaf)
    for a, b in zip(
        jax.tree.leaves(got), jax.tree.leaves(expected, is_leaf=is_leaf), strict=True
    ):
        assert isinstance(a, jax.Array)
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("form", FORMS)
def test_result_has_the_structure_of_tout(transform, form):
    body, tout, expected = FORMS[form]
    as_array = (lambda x: isinstance(x, list)) if "as an array" in form else None
    check_tree(transform(py_func(body, Tout=tout))(X), expected, as_array)
    check_tree(transform(lambda x: py_func(body, [x], tout))(X), expected, as_array)


def test_dtype_of_the_result_is_declared_and_strong(transform):
    for dtype in ("bfloat16", "float16", "float32", "complex64"):
        y = transform(py_func(lambda x: x, Tout=jnp.dtype(dtype)))(1.0)
        assert (y.dtype, y.weak_type) == (jnp.dtype(dtype), False)


def test_callable_tout_gets_structs_and_static_arguments(transform):
    seen = []

    def tout(x, tree, *, mode):
        seen.append((x, tree, mode))
        return Struct((*tree["n"].shape, 2), x.dtype)

    @py_func(Tout=tout)
    def body(x, tree, *, mode):
        return jnp.full((*tree["n"].shape, 2), x)

    y = transform(lambda x, n: body(x, {"n": n}, mode="fast"))(X[1], np.zeros((4, 1)))
    np.testing.assert_array_equal(y, np.ones((4, 1, 2)))
    (x, tree, mode), *_ = seen
    assert isinstance(x, Struct)
    assert (x.shape, x.dtype) == ((), jnp.float32)
    assert (tree["n"].shape, tree["n"].dtype) == ((4, 1), jnp.float32)
    assert mode == "fast"


def test_arguments_of_callable_tout_keep_weak_types(transform):
    weak = []
    body = py_func(lambda x: x, Tout=lambda x: weak.append(x.weak_type) or F32)
    transform(body)(1.0)
    transform(body)(jnp.float32(1))
    assert weak == [True, False]


# Casting: rows are dtypes of a result, columns are dtypes that Tout declares. This is the
# answer of np.can_cast(..., "same_kind"), with ml_dtypes treated like their NumPy kin.
KIN = {
    "bool": "bool", "uint4": "uint8", "uint8": "uint8", "uint32": "uint32",
    "int4": "int8", "int8": "int8", "int32": "int32",
    "float8_e4m3fn": "float16", "bfloat16": "float16", "float16": "float16",
    "float32": "float32", "complex64": "complex64",
}  # fmt: skip


@pytest.mark.parametrize("target", KIN)
@pytest.mark.parametrize("make", [np.ones, jnp.ones], ids=["numpy", "jax"])
def test_same_kind_casting(make, target):
    for source in KIN:
        allowed = np.can_cast(KIN[source], KIN[target], "same_kind")
        g = py_func(lambda x, s=source: make(2, dtype=jnp.dtype(s)), Tout=jnp.dtype(target))
        if allowed:
            y = g(1.0)
            assert y.dtype == jnp.dtype(target), source
            np.testing.assert_array_equal(np.asarray(y, np.complex64), [1, 1])
        else:
            with pytest.raises(ResultError, match=f"expected {target}, got {source}"):
                g(1.0)


@pytest.mark.parametrize("target", ["bool", "uint8", "int32", "float16", "complex64"])
def test_casting_is_the_same_under_jit(target):
    for source in ("bool", "uint32", "int8", "float32", "complex64"):
        g = py_func(lambda x, s=source: np.ones(2, s), Tout=Struct((2,), jnp.dtype(target)))
        if np.can_cast(source, target, "same_kind"):
            np.testing.assert_array_equal(jax.jit(g)(1.0), g(1.0))
            assert jax.jit(g)(1.0).dtype == target
        else:
            with pytest.raises(ResultError, match=target), raise_original():
                jax.jit(g)(1.0)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (True, "int32"), (3, "uint8"), (3, "int4"), (3, "float16"), (3, "complex64"),
        (-3, "int8"), (255, "uint8"), (2.5, "bfloat16"), (2.5, "complex64"),
        (1 + 2j, "complex64"), ([1, 2], "uint8"), ([1.5, 2], "float32"),
        ([[True], [False]], "bool"), (np.float64(2.5), "float32"), (np.int64(7), "int8"),
        (ml_dtypes.bfloat16(1.5), "float32"), (jnp.asarray(3), "uint8"), (2**31, "uint32"),
    ],
)  # fmt: skip
def test_what_python_and_numpy_make_is_converted(transform, value, dtype):
    tout = Struct(np.shape(value), jnp.dtype(dtype))
    y = transform(lambda x: py_func(lambda _: value, [x], tout))(1.0)
    assert y.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(
        np.asarray(y, np.complex128), np.asarray(value, np.complex128)
    )


class Sealed:
    pass


def refused(value, tout, text):
    return pytest.param(value, tout, text, id=text)


REFUSED = [
    refused(1.5, Struct((), jnp.int32), "result: expected int32, got a Python float. "),
    refused(1j, F32, "result: expected float32, got a Python complex. Convert it"),
    refused(1, Struct((), jnp.bool_), "result: expected bool, got a Python int. "),
    refused(np.float64(1.5), Struct((), jnp.int32), "expected int32, got float64, which"),
    refused([0.5], Struct((1,), jnp.int32), "result: expected int32, got float64"),
    refused(np.int32(1), Struct((), jnp.uint32), "result: expected uint32, got int32"),
    refused([F32, 1.5], [F32, jnp.int32], "result[0]: expected an array"),
    refused({"a": 1.5}, {"a": Struct((), jnp.int32)}, "result['a']: expected int32"),
    refused((1.0, [2.0, 3j]), (F32, [F32, F32]), "result[1][1]: expected float32"),
    refused(Pair(1.0, 3j), Pair(F32, F32), "result.high: expected float32"),
    refused(np.ones((2, 3)), Struct((3, 2), jnp.float32), "shape (3, 2), got (2, 3)"),
    refused(1.0, Struct((1,), jnp.float32), "expected shape (1,), got ()"),
    refused({"a": 1.0}, F32, "got dict with keys ['a']"),
    refused("1.0", F32, "got str"),
    refused(None, F32, "got None"),
    refused([None, 1.0], Struct((2,), jnp.float32), "got list of 2"),
    refused(["a"], Struct((1,), jnp.float32), "got list of 1"),
    refused([[1.0], [1.0, 2.0]], Struct((2, 2), jnp.float32), "list that does not form"),
    refused(Sealed(), F32, "got Sealed"),
    refused(np.array([Sealed()]), Struct((1,), jnp.float32), "got array of dtype object"),
    refused(np.zeros(2, "f4,i4"), Struct((2,), jnp.float32), "got array of dtype [('f0'"),
    refused(np.zeros(1, "M8[s]"), Struct((1,), jnp.float32), "of dtype datetime64[s]"),
    refused((1.0, 2.0, 3.0), [F32, F32], "result: expected list of 2, got tuple of 3"),
    refused(1.0, [F32, F32], "expected list of 2, got float"),
    refused([], [F32], "expected list of 1, got list of 0"),
    refused(None, [F32], "expected list of 1, got None"),
    refused((1.0, (2.0,)), (F32, [F32, F32]), "result[1]: expected list of 2"),
    refused({"a": 1.0}, {"b": F32}, "keys ['b'], got dict with keys ['a']"),
    refused({"a": 1.0}, [F32], "expected list of 1, got dict"),
    refused([1.0], {"a": F32}, "expected dict with keys ['a'], got list of 1"),
    refused((1.0, 2.0), Pair(F32, F32), "expected Pair, got tuple of 2"),
    refused(np.ones(3), [], "expected nothing, got array"),
    refused(1.0, None, "expected nothing, got float. Return"),
    refused(1.0, [], "or leave Tout out to have it inferred"),
    refused((1.0, 2.0), (F32, None), "result[1]: expected nothing"),
    refused(300, Struct((), jnp.uint8), "300 does not fit in uint8"),
    refused(-1, Struct((), jnp.uint8), "-1 does not fit in uint8"),
    refused([7, 8], Struct((2,), jnp.int4), "8 does not fit in int4"),
    refused(np.int64(2**40), Struct((), jnp.int32), f"{2**40} does not fit in int32"),
    refused(np.array([-200, 1]), Struct((2,), jnp.int8), "-200 does not fit in int8"),
    refused(np.uint32([2**31]), Struct((1,), jnp.int32), f"{2**31} does not fit in int32"),
    refused((np.ones(3),) * 2, Struct((3,), jnp.float32), "(2, 3), of a tuple of 2 arrays"),
    refused([], Struct((3,), jnp.float32), "expected shape (3,), got (0,). Return"),
    refused(2**63, Struct((), jnp.int32), f"{2**63} does not fit in int32"),
    refused(2**70, Struct((), jnp.int32), f"at most 64 bits, got {2**70}. Return"),
]  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Scaled:
    """A callable pytree with a static field."""

    w: Any
    unit: str = dataclasses.field(default="m", metadata={"static": True})

    def __call__(self, x):
        return self.w * x


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Unit:
    """A pytree without leaves."""

    unit: str = dataclasses.field(default="m", metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class FlaxLike:
    """A pytree that JAX knows only by its methods, like those of flax."""

    w: Any
    unit: str = "m"


jax.tree_util.register_pytree_node(
    FlaxLike, lambda x: ((x.w,), (x.unit,)), lambda aux, leaves: FlaxLike(*leaves, *aux)
)
SECOND = {"Pair": collections.namedtuple("Pair", "low high")}["Pair"]  # run once more
SPARSE = sparse.BCOO.fromdense(jnp.ones(2))
UNSORTED = sparse.BCOO((SPARSE.data, SPARSE.indices), shape=(2,))
REFUSED += [
    refused((x for x in (1.0, 2.0)), F32, "got generator. Return list(...) of it."),
    refused(map(abs, [1.0]), F32, "got map. Return list(...) of it."),
    refused(
        {1: 1.0, "a": 2.0}, {"a": F32}, "keys of a dict are of types that cannot be sorted"
    ),
    refused(
        Scaled(1.0, "s"), Scaled(F32), "Scaled with unit='m', got Scaled with unit='s'"
    ),
    refused(FlaxLike(1.0, "s"), FlaxLike(F32), "with unit='m', got FlaxLike with unit='s'"),
    refused((1.0, Unit("s")), (F32, Unit()), "result[1]: expected Unit with unit='m', got"),
    refused((1.0, None), (F32, Unit()), "result[1]: expected Unit, got None"),
    refused((1.0, Unit()), (F32, None), "result[1]: expected nothing, got Unit"),
    refused(
        SECOND(1.0, 2.0), Pair(F32, F32), "expected Pair, got another class named Pair"
    ),
    refused(
        UNSORTED,
        SPARSE,
        "expected BCOO with indices_sorted=True, unique_indices=True, got BCOO with "
        "indices_sorted=False, unique_indices=False. Return what Tout declares, or",
    ),
    refused(SPARSE, Struct((2,), jnp.float32), "numbers or booleans, got BCOO. Return"),
    refused(equinox.nn.Identity(), equinox.nn.Lambda(F32), "expected Lambda, got Identity"),
]


@pytest.mark.parametrize(("value", "tout", "text"), REFUSED)
def test_refused_results(transform, value, tout, text):
    def body(x):
        return value

    with pytest.raises(ResultError) as caught, raise_original():
        transform(lambda x: py_func(body, [x], tout, name="worker"))(1.0)
    assert "py_func 'worker': " in str(caught.value)
    assert text in str(caught.value)


def test_a_coroutine_is_refused(transform):
    class Deferred:
        async def __call__(self, x):
            return x

    f = transform(py_func(Deferred(), Tout=F32))
    with pytest.raises(ResultError, match=r"got coroutine.*asyncio\.run"), raise_original():
        jax.block_until_ready(f(1.0))


def test_refused_dtype_says_what_to_write():
    message = (
        "py_func 'body': result[1]: expected int32, got float32, which NumPy's same_kind "
        "casting does not allow. Convert it in the body with .astype(jnp.int32), or "
        "declare jnp.float32 in Tout."
    )
    g = py_func(lambda x: (x, x), Tout=(F32, jnp.int32), name="body")
    with pytest.raises(ResultError, match=re.escape(message)):
        g(1.0)
    # With a shape to infer, the same check runs while tracing.
    with pytest.raises(ResultError, match=re.escape(message)):
        jax.jit(g)(1.0)


@pytest.mark.parametrize(
    "tout",
    [3, "nonsense", [jnp.float32, 3], object, str, Sealed, jax.Array, {"a": Sealed()},
     np.dtype("O"), np.dtype("f4,i4"), "M8[s]"],
)  # fmt: skip
def test_refused_tout(tout):
    with pytest.raises(TypeError, match=r"py_func 'f': Tout.*: expected a dtype"):
        py_func(lambda x: x, Tout=tout, name="f")


class Chosen(equinox.Module):
    """A function with a number that JAX treats as a leaf."""

    index: int

    def __call__(self, *args):
        return args[self.index]


class Shapely(equinox.Module):
    """A callable pytree whose methods and wrapped functions are pytrees to JAX, too."""

    w: Any

    def __call__(self, x):
        return self.w * x

    def like(self, x):
        return x


def test_a_callable_pytree_declares_results_like_itself(transform):
    def scale(m, x):
        return type(m)(m.w * x)

    for module in (Scaled(X), Shapely(X)):
        for tout in (module, jax.eval_shape(scale, module, 2.0), type(module)(jnp.float32)):
            got = transform(lambda m, x, tout=tout: py_func(scale, [m, x], tout))(
                module, 2.0
            )
            assert jax.tree.structure(got) == jax.tree.structure(module)
            np.testing.assert_array_equal(got.w, 2 * np.arange(3))


@pytest.mark.parametrize(
    "tout",
    [
        Shapely(X).like,
        equinox.filter_jit(Shapely(X).like),
        functools.partial(lambda array, x: x, X),
        jax.tree_util.Partial(lambda array, x: x, X),
        jax.tree_util.Partial(lambda dtype, x: Struct(x.shape, dtype), jnp.float32),
        Chosen(0),
    ],
)
def test_functions_that_are_pytrees_are_called(tout, transform):
    y = transform(py_func(lambda x: 2 * x, Tout=tout))(jnp.float32(1.5))
    assert (y, y.dtype) == (3, jnp.float32)


class Fussy(equinox.Module):
    """Its repr and its checks read attributes that only arrays have."""

    w: Any

    def __call__(self, x):
        return x

    def __repr__(self):
        return f"Fussy({self.w.mean()})"


def test_a_pytree_as_tout_may_refuse_leaves_other_than_arrays(transform):
    f = py_func(lambda x: Fussy(x), Tout=Fussy(F32))
    assert transform(f)(2.0).w == 2
    assert "Fussy" in f.__doc__


@pytest.mark.parametrize("shape", [(-1,), (2, None), (2.0,), ("n",)])
def test_refused_shapes(shape):
    class Declared:
        dtype = np.dtype("float32")

        def __init__(self):
            self.shape = shape

    text = r"py_func 'f': Tout\['y'\]: expected a shape of integers that are 0 or more, got"
    with pytest.raises(TypeError, match=text):
        py_func(lambda x: x, Tout={"y": Declared()}, name="f")


def test_a_tout_with_other_parameters_is_told_so(transform):
    def body(x, *, scale):
        return x * scale

    f = py_func(body, Tout=lambda x: x)
    text = (
        "py_func 'body': Tout is called with the arguments of the function, and got an "
        "unexpected keyword argument 'scale': expected the parameters (x, *, scale), got "
        "(x). Write"
    )
    with pytest.raises(TypeError, match=re.escape(text)):
        transform(lambda x: f(x, scale=2.0))(1.0)
    # Here the call is wrong.
    text = "'body': too many positional arguments; call it with the arguments of (x, *, sca"
    with pytest.raises(TypeError, match=re.escape(text)):
        transform(f)(1.0, 2.0)


def test_an_exception_of_tout_says_so(transform):
    f = py_func(lambda x: x, Tout=lambda x: x.sum(), name="f")
    with pytest.raises(AttributeError, match="sum") as caught:
        transform(f)(X)
    assert "py_func 'f': this was raised by Tout" in caught.value.__notes__[0]


def test_refused_result_of_callable_tout(transform):
    g = py_func(lambda x: x, Tout=lambda x: {"y": 3}, name="f")
    with pytest.raises(TypeError, match=r"py_func 'f': Tout\['y'\]: expected a dtype"):
        transform(g)(1.0)


@pytest.mark.parametrize(
    "tout", [jnp.float64, Struct((), np.int64), lambda x: np.dtype("complex128")]
)
def test_64_bits_are_refused_while_they_are_off(transform, tout):
    ran = []
    text = (
        r"'wide': result is declared \w+, .* declare jnp\.(float32|int32|complex64) in Tout"
    )
    with pytest.raises(ValueError, match=text):
        transform(py_func(lambda x: ran.append(x), Tout=tout, name="wide"))(1.0)
    assert not ran


def test_python_types_follow_x64(transform):
    for enabled, width in ((False, 32), (True, 64)):
        with jax.enable_x64(enabled):
            y = transform(lambda x: py_func(lambda x: (x, 1), [x], (float, int)))(1.0)
            assert [str(a.dtype) for a in y] == [f"float{width}", f"int{width}"]


def test_a_result_that_was_refused_leaves_the_function_usable(transform):
    good = []
    g = transform(py_func(lambda x: x if good else "x", Tout=F32))
    with pytest.raises(ResultError), raise_original():
        g(1.0)
    good.append(True)
    assert g(1.0) == 1


f32 = jnp.float32


@pytest.mark.parametrize(
    ("body", "tout", "want"),
    [
        (lambda x: Pair(x, x + 1), (f32, f32), (1.0, 2.0)),
        (lambda x: collections.OrderedDict(b=x, a=x + 1), {"a": f32, "b": f32},
         {"a": 2.0, "b": 1.0}),
        (lambda x: {"b": x, "a": x + 1}, collections.OrderedDict(a=f32, b=f32),
         collections.OrderedDict(a=2.0, b=1.0)),
        (lambda x: x + 1, [f32], [2.0]),
        (lambda x: 3, [f32], [3.0]),
        (lambda x: {"a": x + 1}, {"a": [f32]}, {"a": [2.0]}),
        (lambda x: memoryview(np.ones((), np.float32)), f32, 1.0),
        (lambda x: array.array("f", [1.0, 2.0]), Struct((2,), f32), np.arange(1.0, 3)),
        (lambda x: np.array(3.0, ">f4"), f32, 3.0),
    ],
)  # fmt: skip
def test_results_that_jax_and_tensorflow_accept(body, tout, want, transform):
    exact = jax.tree.map(
        lambda leaf: leaf if hasattr(leaf, "shape") else jax.ShapeDtypeStruct((), leaf),
        tout,
    )
    got = transform(py_func(body, Tout=exact))(1.0)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_arrays_of_another_byte_order_are_converted(transform):
    x = np.arange(3).astype(">f4")
    got = transform(
        lambda: py_func(lambda x: x * 2, [x], jax.ShapeDtypeStruct((3,), f32))
    )()
    assert got.tolist() == [0, 2, 4]
    inferred = transform(lambda x: py_func(lambda x: np.arange(3).astype(">f4"))(x))(1.0)
    assert (inferred.dtype, inferred.tolist()) == (f32, [0, 1, 2])


def test_a_ref_is_refused_by_name(transform):
    f = transform(py_func(lambda x: jax.new_ref(x), Tout=jax.ShapeDtypeStruct((), f32)))
    with pytest.raises(ResultError, match=r"got a jax.Ref.*ref\[...\]"), raise_original():
        jax.block_until_ready(f(1.0))


@pytest.mark.parametrize("wrap", [py_func, numpy_func])
def test_tangents_of_integers_pass(wrap, transform):
    """`float0` arrays have a shape and no data, and stay on the device."""
    shapes = []

    def body(x, z):
        shapes.append((z.shape, z.dtype))
        return x * 2

    zeros = np.zeros((3,), jax.dtypes.float0)

    def call(x, z):
        return wrap(body, [x, z], F32, vmap_method="sequential")

    assert transform(lambda x: call(x, zeros))(1.0) == 2.0
    assert (
        transform(jax.vmap(lambda x, z: call(x, z)))(jnp.ones(3), zeros).tolist()
        == [2.0] * 3
    )
    assert shapes == [((3,), jax.dtypes.float0)] + [((), jax.dtypes.float0)] * 3
