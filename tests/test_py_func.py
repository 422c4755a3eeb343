"""Call forms, arguments, what a wrapped function is, misuse, traced closures."""

import dataclasses
import enum
import functools
import inspect
import itertools
import os
import pydoc
import re
import runpy
import subprocess
import sys
import traceback
import typing
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_close
from flax import linen, nnx
from programs import ROOT

import jpyfunc
from jpyfunc import ResultError, numpy_func, py_func, raise_original
from jpyfunc._staging.closure import refuse_traced_closure

Struct = jax.ShapeDtypeStruct
F32 = Struct((), jnp.float32)


def scale(x, m=3.0):
    """Scale x."""
    return x * m


@py_func
def bare(x, m=3.0):
    return x * m


@py_func(Tout=jnp.float32)
def decorated(x, m=3.0):
    return x * m


class Model:
    def __init__(self, w):
        self.w = w

    def plain(self, x):
        return self.w * x

    @py_func(Tout=jnp.float32)
    def wrapped(self, x, m=1.0):
        """Multiply."""
        return self.w * x * m

    @staticmethod
    @py_func
    def static(x):
        return 3 * x


FORMS = {
    "in place": lambda x: py_func(scale, [x, 3.0], jnp.float32),
    "in place, tuple": lambda x: py_func(scale, (x, 3.0), jnp.float32),
    "in place, single array": lambda x: py_func(scale, jnp.asarray(x), jnp.float32),
    "in place, NumPy scalar": lambda x: py_func(lambda n: n * x0, np.float32(3)),
    "in place, inferred": lambda x: py_func(scale, [x, 3.0]),
    "in place, by keyword": lambda x: py_func(func=scale, inp=[x], Tout=jnp.float32),
    "wrapped": py_func(scale, Tout=jnp.float32),
    "decorator": decorated,
    "bare": bare,
    "method": lambda x: Model(3.0).wrapped(x),
    "static method": Model.static,
    "bound method": py_func(Model(3.0).plain, Tout=F32),
    "partial": py_func(functools.partial(scale, m=3.0), Tout=F32),
    "keyword": lambda x: bare(m=3.0, x=x),
    "jitted function": py_func(jax.jit(scale), Tout=F32),
    "JAX function": lambda x: py_func(jnp.multiply, [x, 3.0], F32),
    "twice": py_func(py_func(scale, Tout=F32), Tout=F32),
}
x0 = 2.0


@pytest.mark.parametrize("form", FORMS)
def test_call_forms(transform, form):
    y = transform(FORMS[form])(x0)
    assert isinstance(y, jax.Array)
    assert (y.shape, y.dtype) == ((), jnp.float32)
    assert y == 6


def test_no_arguments(transform):
    # `inp=[]` calls the function; leaving `inp` out does not.
    assert transform(lambda: py_func(lambda: 5.0, [], jnp.float32))() == 5
    assert transform(py_func(lambda: 5.0, Tout=jnp.float32))() == 5


def test_it_looks_like_the_function_that_it_wraps():
    for g in (py_func(scale), py_func(Tout=jnp.float32)(scale)):
        assert g.__name__ == "scale"
        assert g.__doc__.startswith("Scale x.\n")
        assert g.__wrapped__ is scale
        assert g.__module__ == scale.__module__
        assert inspect.signature(g) == inspect.signature(scale)
    assert py_func(scale, name="other").__name__ == "other"
    partial = py_func(functools.partial(scale, m=1.0))
    assert partial.__name__ == "scale"
    assert partial.__doc__.startswith("Scale x.\n")
    assert repr(py_func(scale)) == "<py_func 'scale'>"
    assert Model.wrapped.__doc__.startswith("Multiply.\n")
    assert list(inspect.signature(Model(1.0).wrapped).parameters) == ["x", "m"]


def test_a_function_that_is_wrapped_twice_makes_one_host_call():
    """The options of both apply; the outer ones take precedence."""
    once = py_func(scale, Tout=F32, name="scale it", vmap_method="sequential")
    twice = py_func(once)
    assert twice == once
    assert twice.__wrapped__ is scale
    assert py_func(once, name="other").__name__ == "other"
    assert py_func(once, Tout=jnp.int32) != once
    assert py_func(once, vmap_method="by_branch") == py_func(scale, Tout=F32, name="scale it", vmap_method="by_branch")  # fmt: skip  # noqa: E501
    for options in ({"stateful": True}, {"ordered": True}):
        assert py_func(py_func(scale, **options)) == py_func(scale, **options)
        assert py_func(py_func(scale), **options) == py_func(scale, **options)
        with pytest.raises(ValueError, match=r"staged .* is stateful"):
            py_func(py_func(scale, **options), staged=True)
    staged = py_func(py_func(scale), staged=True)
    assert "py_func" not in str(jax.make_jaxpr(staged)(1.0, 2.0))
    with jpyfunc.profile() as profile:
        assert jax.jit(lambda x: py_func(once, [x, 2.0]))(1.0) == scale(1.0, 2.0)
    assert profile.as_dict()["scale it"]["forward"]["calls"] == 1
    # A body that takes NumPy arrays stays one, with its rules.
    doubled = numpy_func(lambda x: x * 2, Tout=F32)
    doubled.defvjp(lambda x: (x * 2, None), lambda _, g: (g * 2,))
    assert jax.grad(py_func(doubled, Tout=F32))(3.0) == 2.0


def test_arguments_that_the_function_does_not_take(transform):
    for call, text in (
        (lambda x: py_func(scale)(x, x, x), "scale.*positional argument"),
        (lambda x: py_func(scale, Tout=F32)(x, other=x), "scale.*'other'"),
        (lambda x: py_func(scale, staged=True)(m=x), "scale.*'x'"),
    ):
        with pytest.raises(TypeError, match=text):
            transform(call)(1.0)
    with pytest.raises(TypeError, match=r"'scale': missing .* 'x'; .* \(x, m=3\.0\)"):
        jpyfunc.explain(scale)

    @functools.wraps(scale)
    def scale_all(*factors):
        return scale(*factors[:2]) * factors[2]

    assert transform(py_func(scale_all))(1.0, 2.0, 3.0) == 6
    assert transform(py_func(jax.jit(scale)))(1.0, m=2.0) == 2
    assert transform(py_func(max, Tout=F32))(1.0, 2.0) == 2


def test_arguments_are_pytrees_of_arrays(transform):
    seen = {}

    def body(tree, *rest, scale=1, **more):
        seen.update(tree=tree, rest=rest, scale=scale, more=more)
        return tree["a"][0] * scale + rest[0] + more["z"]

    g = transform(py_func(body, Tout=F32))
    args = ({"a": [np.float32(2), True]}, 1.5)
    kwargs = {"scale": 3, "z": np.ones((), np.int8)}
    assert g(*args, **kwargs) == 2 * 3 + 1.5 + 1
    expected = {"tree": args[0], "rest": args[1:], "scale": 3, "more": {"z": kwargs["z"]}}
    assert jax.tree.structure(seen) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(seen), jax.tree.leaves(expected), strict=True):
        assert isinstance(got, jax.Array)
        assert got.dtype == jnp.asarray(want).dtype
        assert got == want


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Other(enum.IntEnum):
    ONE = 1


class Word(enum.StrEnum):
    A = "a"


class Unhashable:
    __hash__ = None  # type: ignore[assignment]


STATIC = [
    "text", b"bytes", Color.RED, Level.LOW, Word.A, np.str_("text"), len, jnp.sin, object(),
    Unhashable(), Model(2.0), jnp.float32, np.dtype("int8"), slice(1, 2), {1, 2}, range(3),
    ...,
]  # fmt: skip


@pytest.mark.parametrize("leaf", STATIC, ids=lambda leaf: type(leaf).__name__)
def test_static_leaves_reach_the_body_unchanged(transform, leaf):
    seen = []

    @py_func(Tout=F32)
    def body(x, tree, *, option):
        seen.extend([tree["leaf"], option, tree["none"]])
        return x

    tree = {"leaf": leaf, "none": None}
    assert transform(lambda x: body(x, tree, option=leaf))(2.0) == 2
    assert seen[0] is leaf
    assert seen[1] is leaf
    assert seen[2] is None


@pytest.mark.parametrize(("first", "second"), [(Level.LOW, Other.ONE), (Word.A, "a")])
def test_static_leaves_that_compare_equal_are_not_mixed_up(transform, first, second):
    body = py_func(lambda x, leaf: x if type(leaf) is type(first) else -x, Tout=F32)
    f = transform(lambda x: (body(x, first), body(x, second), body(x, first)))
    assert f(1.0) == (1, -1, 1)


def test_operands_are_what_plain_jax_takes(transform):
    # As for `jnp.multiply(x, x)`: 64 bits are off, and NumPy dtypes are canonicalized.
    for x in (2, 2.0, True, 1j, np.float64(2), np.arange(3), np.ones(2, np.float16)):
        y = transform(py_func(lambda x: x))(x)
        plain = jax.jit(lambda x: x)(x)
        assert (y.shape, y.dtype, y.weak_type) == (
            plain.shape,
            plain.dtype,
            plain.weak_type,
        )
        np.testing.assert_array_equal(y, plain)


class Operand:
    def __jax_array__(self):
        return jnp.arange(3.0)


def test_objects_with_a_jax_array(transform):
    assert transform(lambda: py_func(jnp.sum, [Operand()], F32))() == 3


MISUSE = {
    "py_func: inp is given without func": lambda: py_func(inp=[1.0]),
    "py_func: expected func to be a Python function, got 3": lambda: py_func(3),
    "expected func to be a Python function, got <class 'jax.numpy.float32'>": (
        lambda: py_func(jnp.float32)
    ),
    "numpy_func: expected func to be a Python function": lambda: numpy_func(1),
    "py_func 'scale': expected inp to be a list or tuple of arguments, or a single array, "
    "got dict; write inp=[...]": lambda: py_func(scale, {"x": 1.0}),
    "or a single array, got str": lambda: py_func(scale, "x"),
}


@pytest.mark.parametrize("text", MISUSE)
def test_misuse(text):
    with pytest.raises(TypeError, match=re.escape(text)):
        MISUSE[text]()


def test_unknown_vmap_method():
    text = "'scale': expected vmap_method to be one of 'by_branch', .*, got 'fast'"
    with pytest.raises(ValueError, match=text):
        py_func(scale, vmap_method="fast")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            np.array(["a"]),
            "expected an array of numbers or booleans, got ndarray of dtype <U1",
        ),
        (np.array([object()]), "got ndarray of dtype object"),
        (np.datetime64("2000-01-01"), "got datetime64 of dtype datetime64[D]"),
        (np.zeros(2, "f4,i4"), "got ndarray of dtype [('f0'"),
        (2**40, f"{2**40} does not fit in JAX's default integer"),
    ],
)
def test_refused_arguments(transform, value, text):
    g = py_func(lambda *args, **kwargs: 1.0, Tout=F32, name="g")
    for call, path in (
        (lambda x: g(x, [value]), "argument [1][0]"),
        (lambda x: g(x, k={"a": value}), "keyword argument ['k']['a']"),
    ):
        with pytest.raises(TypeError) as caught:
            transform(call)(1.0)
        assert f"py_func 'g': {path}: " in str(caught.value)
        assert text in str(caught.value)


def test_ordered_eager_calls_wait_for_what_was_dispatched():
    log = []
    g = py_func(lambda x, name: log.append(name), Tout=[], ordered=True)
    compiled = jax.jit(g, static_argnums=1)
    matrix = jnp.ones((1500, 1500))
    compiled(matrix[0, 0], "compile")
    for _ in range(3):
        compiled((matrix @ matrix)[0, 0], "dispatched")  # its operand is not ready yet
        g(1.0, "eager")
    assert log == ["compile"] + ["dispatched", "eager"] * 3


def test_wrong_call_of_the_body(transform):
    g = transform(py_func(lambda x: x, Tout=F32))
    with pytest.raises(TypeError, match="positional argument"), raise_original():
        g(1.0, 2.0)


def test_equality_of_wraps():
    def key(tout=F32, **options):
        return py_func(scale, Tout=tout, **options)

    assert key() == key()
    assert hash(key()) == hash(key())
    assert key(jnp.float32) == key(np.dtype("float32"))
    assert key({"a": [F32]}) == key({"a": [Struct((), np.float32)]})
    different = [
        key(), key(jnp.float32), key([F32]), key((F32,)), key(Struct((), jnp.int32)),
        key(name="other"), key(stateful=True), key(ordered=True),
        key(vmap_method="expand_dims"), py_func(scale), numpy_func(scale, Tout=F32),
        py_func(bare, Tout=F32), py_func(lambda x: x, Tout=F32),
        py_func(lambda x: x, Tout=F32), scale,
    ]  # fmt: skip
    assert len(set(different)) == len(different)


@pytest.fixture
def compiles():
    """Record the names of compilation events."""
    events = []

    def listen(name, _, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def test_wrapping_or_calling_again_does_not_compile_again(compiles):
    traced = []

    def tout(x):
        traced.append(x)
        return Struct(x.shape, x.dtype)

    def double(x):
        return x * np.float32(2)

    x = jnp.ones(5)
    wraps = [py_func(double, Tout=tout) for _ in range(3)]
    for g in wraps:
        for _ in range(2):
            assert jax.jit(g)(x)[0] == 2
            if g is wraps[0]:
                after_first = len(compiles)
    assert len(traced) == 1
    assert after_first > 0
    assert len(compiles) == after_first
    # To verify the counters: another function is another program.
    jax.jit(py_func(lambda x: x * np.float32(2), Tout=tout))(x)
    assert len(traced) == 2
    assert len(compiles) == after_first + 1


def test_calls_with_equal_static_leaves_do_not_compile_again(compiles):
    body = py_func(lambda x, mode: x * np.float32(2), Tout=lambda x, mode: x)
    f = jax.jit(lambda x, mode: body(x, mode), static_argnums=1)
    x = jnp.ones(6)
    f(x, "fast")
    after_first = len(compiles)
    f(x, "".join(["fa", "st"]))
    assert len(compiles) == after_first
    f(x, "slow")
    assert len(compiles) == after_first + 1


def test_equal_calls_are_equal_in_a_jaxpr():
    def params(body, x):
        (equation,) = jax.make_jaxpr(lambda x: py_func(body, [x, "s"], F32))(x).eqns
        return equation.params

    def body(x, s):
        return x

    assert params(body, 1.0) == params(body, 1.0)
    assert hash(params(body, 1.0)["params"]) == hash(params(body, 1.0)["params"])
    assert params(body, 1.0) != params(lambda x, s: x, 1.0)
    assert params(body, 1.0) != params(body, jnp.ones(2))


# Bodies that close over a traced w; each is refused where it is called.
def closure(w):
    return lambda x: w * x


def nested(w):
    def inner(x):
        return w * x

    return lambda x: inner(x)


def late(w):
    def body(x):
        return holder["w"] * x

    holder = {"w": w}
    return body


def default(w):
    return lambda x, w=w: w * x


def keyword_default(w):
    def body(x, *, w=w):
        return w * x

    return body


def container(w):
    unsortable = {1: [None, (w,)], "a": 2}
    return lambda x: unsortable[1][1][0] * x


def instance(w):
    model = Model(w)
    return lambda x: model.w * x


def inner_instance(w):
    model = Model(Model(w))
    return lambda x: model.w.w * x


def callable_instance(w):
    class Body:
        def __init__(self):
            self.w = w

        def __call__(self, x):
            return self.w * x

    return Body()


def among_data(w):
    data = [[i, [float(i)], {"i": i}] for i in range(20_000)]
    data[137][1].append(Model([w]))
    return lambda x: data[137][1][1].w[0] * x


HOLDERS = {
    "the variable 'data'": [among_data],
    "the variable 'w'": [closure, nested, lambda w: jax.jit(closure(w)),
                         lambda w: py_func(closure(w), Tout=F32),
                         lambda w: functools.partial(closure(w)),
                         lambda w: functools.wraps(scale)(closure(w))],
    "the variable 'holder'": [late],
    "the variable 'unsortable'": [container],
    "a default": [default, keyword_default],
    "an argument of functools.partial": [
        lambda w: functools.partial(jnp.multiply, w),
        lambda w: functools.partial(functools.partial(lambda x, w: w * x, w=w)),
    ],
    "the attribute 'w'": [instance, inner_instance, callable_instance,
                          lambda w: Model(w).plain, lambda w: Model(w).wrapped],
}  # fmt: skip


@pytest.mark.parametrize("path", HOLDERS)
@pytest.mark.parametrize(
    "trace", [jax.jit, jax.grad, jax.vmap], ids=["jit", "grad", "vmap"]
)
def test_traced_closures_are_refused(path, trace):
    for make in HOLDERS[path]:
        ran = []

        def f(w, make=make, ran=ran):
            held = make(w)
            return py_func(lambda x: ran.append(x) or held(x), [2.0], F32, name="g")

        w = jnp.ones(3) if trace is jax.vmap else 3.0
        with pytest.raises(TypeError) as caught:
            trace(f)(w)
        assert f"py_func 'g': the body holds a traced value, float32[], as {path}. " in str(
            caught.value
        )
        assert "Pass it as an argument." in str(caught.value)
        assert not ran


def test_a_function_that_is_a_pytree_passes_as_an_argument(transform):
    def multiply(w, x):
        return w * x

    remedy = "Pass it as an argument, with the function: wrap lambda f, *args: f(*args)."
    with pytest.raises(TypeError, match=re.escape(remedy)):
        jax.jit(lambda w: py_func(jax.tree_util.Partial(multiply, w), [2.0], F32))(3.0)
    f = py_func(lambda f, *args: f(*args), Tout=F32)
    gradient = jax.grad(lambda w: f(jax.tree_util.Partial(multiply, w), 2.0))
    assert transform(gradient)(3.0) == 2


@dataclasses.dataclass
class Weights:
    """A dataclass that JAX does not flatten."""

    w: Any


@pytest.mark.parametrize("trace", [jax.jit, jax.grad])
@pytest.mark.parametrize(
    ("hold", "words"),
    [
        (closure, r"argument \[0\]\['p'\]: a function holds .*tree_util.Partial\("),
        (
            Weights,
            r"argument \[0\]\['p'\]: a Weights holds .*'w'.* with .*register_dataclass,",
        ),
        (
            Model,
            r"argument \[0\]\['p'\]: a Model holds .* with .*register_pytree_node_class,",
        ),
    ],
)
def test_a_traced_value_in_a_leaf_that_is_not_an_array_is_refused(hold, words, trace):
    body = py_func(lambda tree: 1.0, Tout=F32, name="g")
    with pytest.raises(TypeError, match=f"'g': {words}"):
        trace(lambda w: body({"p": hold(w)}))(3.0)
    with pytest.raises(TypeError, match=r"'wrapped': argument \[0\]: a Model .*'w'"):
        trace(lambda w: Model(w).wrapped(2.0))(3.0)


@pytest.mark.parametrize("tout", [F32, jnp.float32])
def test_a_branch_under_a_jit_that_py_func_wraps_says_to_swap_them(tout, transform):
    @jax.jit
    def inner(x):
        return x if x > 0 else -x

    words = r"inside .*inner, which jax.jit traces.*@jax.jit goes above @py_func"
    for body in (inner, lambda x: 2 * inner(x)):
        with pytest.raises(TypeError) as caught, raise_original():
            jax.block_until_ready(transform(py_func(body, Tout=tout))(1.0))
        assert re.search(words, "".join(traceback.format_exception(caught.value)))
        with pytest.raises(jax.errors.JaxRuntimeError, match=words):
            jax.block_until_ready(jax.jit(py_func(body, Tout=F32))(1.0))
    assert transform(py_func(lambda x: x if x > 0 else -x, Tout=tout))(-1.0) == 1


def test_a_body_with_much_data_is_searched_in_bulk():
    """The search runs in C, not by Python functions called for each list."""
    data = [[i, float(i), np.ones(1), Model([i])] for i in range(20_000)]
    calls = []
    sys.setprofile(lambda _, event, arg: calls.append(arg) if event == "call" else None)
    try:
        refuse_traced_closure(lambda x: x * len(data), "g")
    finally:
        sys.setprofile(None)
    assert len(calls) < 1000


def test_closures_over_concrete_values_are_not_refused(transform):
    table = {1: np.arange(3.0), "two": [jnp.arange(3.0), None]}
    table["itself"] = table
    model = Model(jnp.float32(2))
    chain = None
    for _ in range(10_000):  # deeper than Python recurses
        chain = Model(chain)

    def body(x):
        if x < 0:
            unbound, chain  # noqa: B018 - one with an empty cell
        return (x * table[1] + table["two"][0]).sum() * model.w

    f = transform(lambda x: py_func(body, [x], F32))
    assert f(2.0) == (2 * 3 + 3) * 2
    unbound = 1


class Inventive:
    """Makes up every attribute, as lazy proxies do."""

    def __getattr__(self, name):
        return Inventive()

    def __call__(self, *args):
        return self


class Settings:
    """Raises the wrong exception for an attribute that it lacks."""

    def __init__(self):
        self.__dict__["values"] = {"k": 2.0}

    def __getattr__(self, name):
        return self.values[name]


def test_bodies_that_use_odd_objects(transform):
    log, settings = Inventive(), Settings()

    def body(x):
        log.info("running")
        return x * settings.k

    assert transform(py_func(body, Tout=jax.ShapeDtypeStruct((), jnp.float32)))(1.5) == 3.0


def test_results_of_an_eager_batch_stay_on_the_device_of_its_operands():
    device = jax.devices()[2]
    f = py_func(lambda x: x * 2, Tout=jnp.float32)
    assert jax.vmap(f)(jax.device_put(jnp.ones(3), device)).devices() == {device}


def test_pickles_by_name_and_by_value(tmp_path):
    """A function of a module is pickled by its name, one of a notebook by value."""
    (tmp_path / "ours.py").write_text(
        "import jax, jax.numpy as jnp\n"
        "from jpyfunc import py_func, numpy_func\n"
        "@py_func(Tout=jnp.float32)\n"
        "def double(x):\n"
        "    return x * 2 if x > 0 else x\n"
        "def plain(x):\n"
        "    return x + 1\n"
        "def forward(x):\n"
        "    return x + 1, None\n"
        "def backward(residuals, g):\n"
        "    return (5 * g,)\n"
        "wrapped = numpy_func(plain, Tout=jax.ShapeDtypeStruct((), jnp.float32))\n"
        "wrapped.defvjp(forward, backward)\n"
    )
    (tmp_path / "main.py").write_text(
        "import concurrent.futures, multiprocessing, pickle\n"
        "import cloudpickle, jax\n"
        "import ours\n"
        "from jpyfunc import py_func\n"
        "@py_func\n"
        "def local(x):\n"
        "    return x * 3 if x > 0 else x\n"
        "def run(data):\n"
        "    f = pickle.loads(data)\n"
        "    return float(jax.jit(jax.grad(f))(1.0))\n"
        "if __name__ == '__main__':\n"
        "    assert pickle.loads(pickle.dumps(ours.double)) is ours.double\n"
        "    value = ours.wrapped\n"
        "    del ours.wrapped\n"
        "    assert pickle.loads(pickle.dumps(value)).__name__ == 'plain'\n"
        "    closure = (lambda k: py_func(lambda x: x * k))(4.0)\n"
        "    data = [pickle.dumps(f) for f in (ours.double, local, value)]\n"
        "    data += [cloudpickle.dumps(f) for f in (ours.double, closure, local)]\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:\n"
        "        print([*pool.map(run, data)])\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "main.py")],
        capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
    )  # fmt: skip
    assert done.stdout.strip() == "[2.0, 3.0, 5.0, 2.0, 4.0, 3.0]", done.stderr


def test_a_dtype_in_place_of_the_arguments():
    for tout in (jnp.float32, jax.ShapeDtypeStruct((), jnp.float32)):
        with pytest.raises(TypeError, match=r"declares results; write py_func\(func, Tout"):
            py_func(lambda x: x, tout)


def test_the_error_about_a_dataclass_says_to_register_it(transform):
    @dataclasses.dataclass
    class Point:
        x: float

    with pytest.raises(ResultError, match="register_dataclass"), raise_original():
        jax.block_until_ready(transform(py_func(lambda x: Point(x), Tout=jnp.float32))(1.0))


def test_advice_names_no_disabled_type():
    with pytest.raises(ResultError, match=r"declare jnp\.float32 in Tout"):
        py_func(lambda x: 1.5, [1.0], jnp.int32)


class Static:
    @py_func
    @staticmethod
    def triple(x):
        return 3 * x


def test_above_a_staticmethod(transform):
    assert transform(lambda x: Static().triple(x))(2.0) == 6.0
    assert transform(Static.triple)(2.0) == 6.0


def test_masked_arrays_are_refused(transform):
    masked = np.ma.masked_array([1.0, 2.0], [False, True])
    with pytest.raises(TypeError, match=r"argument \[0\]: .* a mask.*filled"):
        transform(lambda: py_func(lambda x: x, [masked], Struct((2,), jnp.float32)))()
    f = transform(py_func(lambda x: masked, Tout=Struct((2,), jnp.float32)))
    with pytest.raises(ResultError, match=r"a mask.*filled"), raise_original():
        jax.block_until_ready(f(1.0))


def test_help_says_what_a_wrapped_function_is():
    def area(r):
        """The area of a disc."""
        return jnp.pi * r**2

    text = pydoc.render_doc(py_func(area, Tout=jnp.float32, ordered=True))
    assert "area(r)" in pydoc.plain(text)
    assert "The area of a disc." in text
    assert "Wrapped by jpyfunc.py_func (Tout: jnp.float32, ordered)" in text
    assert "Wrapped by jpyfunc.numpy_func (Tout: inferred)" in numpy_func(area).__doc__


@pytest.mark.parametrize(
    "iterate",
    [
        iter,
        lambda xs: zip(xs, strict=True),
        lambda xs: itertools.chain(xs),
        lambda xs: (x for x in xs),
    ],
    ids=["iter", "zip", "chain", "generator"],
)
def test_a_traced_value_in_an_iterator_is_refused(iterate):
    @jax.jit
    def program(x, w):
        items = iterate([w, w])
        return py_func(lambda x: (x, next(items))[0], [x], F32)

    with pytest.raises(TypeError, match=r"'items'.*Pass it as an argument"):
        program(1.0, 2.0)


def test_equinox_modules_and_optax_states_pass(transform):
    model = equinox.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    arrays, rest = equinox.partition(model, equinox.is_array)
    optimizer = optax.adam(0.1)
    x, y = jnp.ones((8, 2)), jnp.ones((8, 1))

    def loss(arrays):
        return jnp.mean((jax.vmap(equinox.combine(arrays, rest))(x) - y) ** 2)

    def step(arrays, state):
        gradient = jax.grad(loss)(arrays)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(arrays, updates), state

    before = (arrays, optimizer.init(arrays))
    stepped = transform(py_func(step, Tout=lambda *args: args))(*before)
    assert_close(stepped, jax.jit(step)(*before), rtol=1e-4)
    value = transform(jax.grad(py_func(loss, Tout=F32)))(arrays)
    assert_close(value, jax.jit(jax.grad(loss))(arrays), rtol=1e-4)


def test_flax_modules_and_their_parameters_pass(transform):
    x = jnp.linspace(0, 1, 6).reshape(2, 3)
    dense = linen.Dense(4)
    graph, state = nnx.split(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    for apply, params in (
        (dense.apply, dense.init(jax.random.key(0), x)),
        (lambda state, x: nnx.merge(graph, state)(x), state),
    ):

        def loss(params, x, apply=apply):
            return jnp.sum(jnp.tanh(apply(params, x)) ** 2)

        def smaller(params, x, loss=loss):
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, x))

        value = transform(jax.value_and_grad(py_func(loss, Tout=F32)))(params, x)
        assert_close(value, jax.jit(jax.value_and_grad(loss))(params, x), rtol=1e-4)
        stepped = transform(py_func(smaller, Tout=lambda params, x: params))(params, x)
        assert_close(stepped, jax.jit(smaller)(params, x), rtol=1e-4)


@pytest.mark.parametrize("wrap", [py_func, numpy_func])
@pytest.mark.parametrize(
    ("name", "error"),
    [("", TypeError), (3, TypeError), (b"f", TypeError), ("a\ud800", ValueError)],
)
def test_refused_names(wrap, name, error):
    with pytest.raises(error, match=f"{wrap.__name__}: expected name to be"):
        wrap(lambda x: x, Tout=jnp.float32, name=name)


async def _async(x):
    return x


def _generator(x):
    yield x


async def _async_generator(x):
    yield x


@pytest.mark.parametrize("wrap", [py_func, numpy_func])
@pytest.mark.parametrize(
    ("func", "words"),
    [
        (_async, r"got an async function, .*asyncio\.run"),
        (functools.partial(_async, x=1.0), r"got an async function, .*asyncio\.run"),
        (_generator, "got a generator, .*instead of yield"),
        (_async_generator, "got a generator, .*instead of yield"),
        (classmethod(scale), "got a classmethod; write @classmethod above"),
        (property(scale), "got a property; write @property above"),
    ],
)
def test_refused_functions(wrap, func, words):
    with pytest.raises(TypeError, match=f"{wrap.__name__}: expected func to be .*{words}"):
        wrap(func, Tout=F32)


@pytest.mark.parametrize("wrap", [py_func, numpy_func])
@pytest.mark.parametrize("option", ["stateful", "ordered"])
def test_refused_options(wrap, option):
    with pytest.raises(TypeError, match=rf"'scale': expected {option} to be True or False"):
        wrap(scale, Tout=F32, **{option: "no"})


def test_arguments_that_jax_does_not_flatten(transform):
    f = py_func(lambda d: d["a"], Tout=F32, name="f")
    with pytest.raises(TypeError, match="'f': JAX cannot flatten its arguments: the keys"):
        transform(lambda x: f({1: x, "a": x}))(1.0)
    with pytest.raises(ResultError, match="'g': JAX cannot flatten its result: the keys"):
        transform(py_func(lambda x: {1: x, "a": x}, name="g"))(1.0)


def test_a_parameter_may_be_called_self(transform):
    assert transform(lambda x: py_func(lambda self: self, Tout=F32)(self=x))(2.0) == 2


def is_of(value, kind):
    """Whether a value is what a type says; lists, tuples and dicts item by item."""
    if kind is Any:
        return True
    items = typing.get_args(kind)
    if kind is None or not items or issubclass(typing.get_origin(kind), np.ndarray):
        return value is None if kind is None else isinstance(value, kind)
    if not isinstance(value, typing.get_origin(kind)):
        return False
    if isinstance(value, tuple):
        return len(value) == len(items) and all(map(is_of, value, items))
    values = value.values() if isinstance(value, dict) else value
    return all(is_of(x, items[-1]) for x in values)


def test_results_are_what_type_checkers_are_told(monkeypatch):
    checked = []

    def assert_type(value, kind):
        assert is_of(value, kind), f"expected {kind}, got {value!r}"
        checked.append(kind)

    monkeypatch.setattr(typing, "assert_type", assert_type)
    runpy.run_path(str(ROOT / "tests" / "typing_sample.py"))
    assert jax.Array in checked
    for value, kind in ((1.0, jax.Array), ([1.0], list[jax.Array]), ((), tuple[Any, Any])):
        assert not is_of(value, kind)
