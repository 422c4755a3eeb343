"""What a body sees while it is differentiated, and which reads detach a gradient."""

import copy
import itertools
import linecache
import math
import pickle
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, eager_and_jit
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from jax.sharding import AxisType, PartitionSpec

from jpyfunc import (
    GradientCutWarning,
    NotDifferentiableError,
    TapeLostError,
    UnsupportedError,
    _compat,
    numpy_func,
    py_func,
    raise_original,
    set_tape_limit,
)
from jpyfunc._interpreters import rule_stores

f32 = jax.ShapeDtypeStruct((), jnp.float32)

# Each runs the body once, on a differentiated operand.
DERIVATIVES = {
    "grad": jax.grad,
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (1.0,))[1],
    "hessian": jax.hessian,
    "rev_rev": lambda f: jax.grad(jax.grad(f)),
    "vmap": lambda f: lambda x: jax.vmap(jax.grad(f))(x[None])[0],
    "scan": lambda f: jax.grad(
        lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=1)[0]
    ),
    "while_loop": lambda f: (
        lambda x: jax.jvp(
            lambda x: jax.lax.while_loop(
                lambda c: c[0] < 1, lambda c: (c[0] + 1, f(c[1])), (0, x)
            )[1],
            (x,),
            (1.0,),
        )[1]
    ),
    "cond": lambda f: jax.grad(lambda x: jax.lax.cond(x > 0, f, jnp.cos, x)),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
}


@pytest.fixture(params=DERIVATIVES)
def derivative(request, transform):
    return lambda f: transform(DERIVATIVES[request.param](f))


@pytest.fixture(params=["cached", "evicted"])
def tape_limit(request):
    """Test with tapes cached, and with none, where each derivative runs the body again."""
    before = set_tape_limit(2**26 if request.param == "cached" else 0)
    yield request.param
    set_tape_limit(before)


def call(function, *args):
    """Call a function, and raise the exception of a body as it is."""
    with raise_original():
        return jax.block_until_ready(function(*args))


def test_a_body_sees_values(derivative, tape_limit, capsys):
    seen = []

    def body(x):
        print(x)
        n = int(x)
        seen.append(
            (f"{x:.2f}", f"{x}", str(x), repr(x), bool(x > 1), n, list(range(n)), x == 2.5)
        )
        ys = jnp.stack([x, x**2, x**3])
        return ys[n] if x < 3 else x

    call(derivative(py_func(body, Tout=f32)), jnp.float32(2.5))
    plain = jnp.float32(2.5)
    want = ("2.50", "2.5", "2.5", repr(plain), True, 2, [0, 1], True)
    assert set(map(repr, seen)) == {repr(want).replace("True)", f"{plain == 2.5!r})")}
    assert set(capsys.readouterr().out.split("\n")) == {"2.5", ""}


def test_attributes_of_an_array():
    said = []

    def body(x):
        said[:] = [
            x.shape, x.dtype, x.ndim, x.size, len(x), x.nbytes, x.devices(), x.sharding,
            x.is_fully_addressable, x.device, x.block_until_ready() is not None,
            isinstance(x, jax.Array), [float(jax.lax.stop_gradient(y)) for y in x],
            copy.deepcopy(x).shape, x.weak_type, x.T.shape, x[0].item,
        ][:-1]  # fmt: skip
        return x.sum()

    wrapped = py_func(body, Tout=f32)
    x = jnp.array([1.0, 2.0])
    wrapped(x)
    plain = list(said)
    jax.grad(wrapped)(x)
    assert said == plain


def test_waiting_for_an_array_keeps_its_gradient(derivative):
    def body(x):
        return jnp.sin(x).block_until_ready() * x

    x = jnp.float32(0.5)
    got = call(derivative(py_func(body, Tout=f32)), x)
    assert_close(got, derivative(lambda x: jnp.sin(x) * x)(x))


@pytest.mark.parametrize(
    "read", [lambda x: x.addressable_data(0), lambda x: x.addressable_shards[0].data]
)
def test_data_taken_from_an_array_is_refused_under_a_gradient(read):
    wrapped = py_func(lambda x: x * read(jnp.sin(x)), Tout=f32)
    assert wrapped(jnp.float32(0.5)) == pytest.approx(0.5 * np.sin(0.5), rel=1e-6)
    with pytest.raises(NotDifferentiableError, match="converted to raw data"):
        jax.grad(wrapped)(jnp.float32(0.5))


def test_pdb_and_plots_see_values():
    shown = []

    def body(x):
        shown.append(eval("x", {}, {"x": x}).__repr__())  # what `p x` of pdb prints
        shown.append(np.asarray(jax.lax.stop_gradient(x)) * 2)  # what a plot is given
        return x**2

    assert jax.jit(jax.grad(py_func(body, Tout=f32)))(jnp.float32(3.0)) == 6.0
    assert shown == [repr(jnp.float32(3.0)), 6.0]


def test_stop_gradient_is_a_plain_array(derivative):
    kinds = []

    def body(x):
        value = jax.lax.stop_gradient(x)
        kinds.append(isinstance(value, jax.core.Tracer))
        return x * float(value) * math.sin(value) + np.sin(value)

    call(derivative(py_func(body, Tout=f32)), jnp.float32(0.5))
    assert not any(kinds)


READS = {
    "float()": float,
    "item()": lambda x: x.item(),
    "tolist()": lambda x: x.tolist(),
    "complex()": lambda x: complex(x).real,
    "math": math.sin,
}


def check_that_a_read_warns_and_is_a_constant(read, derivative):
    def body(x):
        for _ in range(3):
            y = READS[read](x)
        return x * x * y

    wrapped = py_func(body, Tout=f32)
    with pytest.warns(GradientCutWarning) as caught:
        got = call(derivative(wrapped), jnp.float32(0.7))
    constant = READS[read](jnp.float32(0.7))
    want = derivative(lambda x: x * x * constant)(jnp.float32(0.7))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for text in {str(w.message) for w in caught}:
        for part in ("py_func 'body'", "test_tape.py:", "jax.lax.stop_gradient"):
            assert part in text


def test_a_scalar_read_warns_under_every_derivative_and_is_a_constant(
    derivative, tape_limit
):
    check_that_a_read_warns_and_is_a_constant("float()", derivative)


@pytest.mark.parametrize("read", READS)
def test_every_scalar_read_warns_and_is_a_constant(read, transform):
    check_that_a_read_warns_and_is_a_constant(read, lambda f: transform(jax.grad(f)))


def test_the_default_filter_shows_a_warning_once():
    def body(x):
        return x * float(x)

    grad = jax.grad(py_func(body, Tout=f32))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            assert grad(3.0) == 3.0
    (warning,) = caught
    assert warning.category is GradientCutWarning
    assert issubclass(GradientCutWarning, UserWarning)
    assert warning.filename == __file__
    assert linecache.getline(__file__, warning.lineno).strip() == "return x * float(x)"


CONVERSIONS = {
    "asarray": np.asarray,
    "ufunc": np.sin,
    "method": lambda x: np.linspace(0, x, 3)[1] + 0,
    "bytes": lambda x: np.frombuffer(x.tobytes(), np.float32),
    "dlpack": np.from_dlpack,
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_conversion_to_numpy_raises_in_a_few_lines(conversion, transform, tape_limit):
    def body(x):
        return x * float(np.sum(CONVERSIONS[conversion](x)))

    wrapped = py_func(body, Tout=f32)
    with pytest.raises(NotDifferentiableError) as info:
        call(transform(jax.grad(wrapped)), jnp.float32(0.7))
    text = str(info.value)
    assert "py_func 'body'" in text
    assert "test_tape.py:" in text
    for remedy in ("stop_gradient", "jax.custom_jvp", "jax.custom_vjp", "numpy_func"):
        assert remedy in text
    assert text.count("\n") <= 4
    assert call(transform(jax.grad(py_func(jnp.sin, Tout=f32))), 0.0) == 1.0


@pytest.mark.parametrize("take", [jax.grad, jax.jacfwd, jax.hessian])
def test_a_result_detached_by_a_read_raises(take, transform, tape_limit):
    """TensorFlow silently returns 0.0 here."""

    def body(x):
        return jnp.float32(math.sin(x))

    with (
        pytest.warns(GradientCutWarning),
        pytest.raises(NotDifferentiableError, match=r"'body'.*depends on nothing.*read at"),
    ):
        call(transform(take(py_func(body, Tout=f32))), jnp.float32(0.7))


def test_a_result_that_depends_on_nothing_without_a_read_has_a_zero_gradient(transform):
    f = py_func(lambda x: jnp.float32(int(x)) if x > 0 else jnp.float32(2), Tout=f32)
    assert transform(jax.grad(f))(1.5) == 0.0
    assert transform(jax.grad(f))(-1.5) == 0.0


@pytest.mark.parametrize("by_x", [jax.grad, jax.jacfwd])
@pytest.mark.parametrize("again", [jax.grad, jax.jacfwd])
def test_a_derivative_detached_by_a_read_raises_where_it_is_differentiated(by_x, again):
    """In a body, too: there it is a number, whose derivative is not 0.0."""
    read = py_func(lambda x: x * float(x), Tout=f32)
    inside = py_func(lambda x: by_x(read)(x), Tout=f32)
    for program in (again(by_x(read)), again(inside)):
        with (
            pytest.warns(GradientCutWarning),
            pytest.raises(NotDifferentiableError, match=r"depends on nothing.*read at"),
        ):
            call(jax.jit(program), jnp.float32(0.7))


def test_what_depends_on_an_operand_without_a_gradient_may_be_read(transform):
    """An integer part, alone or beside a result of the same operation with a gradient."""
    halves = jax.jit(lambda x: (x / 2, jnp.floor(x / 2) + 1))

    def body(x):
        half, above = halves(x)
        return x * float(jnp.round(x)) + half * np.asarray(above) * math.copysign(
            1, jnp.sign(x)
        )

    for take, want in (
        (jax.grad, 3.0 + 2 / 2),
        (jax.jacfwd, 3.0 + 2 / 2),
        (jax.hessian, 0.0),
    ):
        assert call(transform(take(py_func(body, Tout=f32))), jnp.float32(3.2)) == want


def test_a_read_beside_a_result_that_is_not_differentiated(transform):
    f = py_func(lambda x: (x**2, float(x)), Tout=(f32, f32))
    with pytest.warns(GradientCutWarning):
        got = transform(jax.grad(lambda x: f(x)[0]))(3.0)
    assert got == 6.0


def test_an_argument_used_in_a_later_run_is_a_clear_error(transform):
    held = []

    def keeps(x):
        held.append(x)
        return x * held[0]

    grad = transform(jax.grad(py_func(keeps, Tout=f32)))
    assert grad(2.0) == 4.0  # x * x
    with pytest.raises(TypeError, match=r"'keeps' kept.*stop_gradient|holds a traced"):
        call(grad, 3.0)
    assert float(held[0]) == 2.0
    assert np.asarray(held[0]) == 2.0


USES = {
    "operator": lambda h: h + 1,
    "index": lambda h: h[0],
    "jit": lambda h: jax.jit(lambda h: h * 2)(h),
    "closure of jit": lambda h: jax.jit(lambda y: y + h)(1.0),
    "closure of grad": lambda h: jax.grad(lambda y: (y * h).sum())(2.0),
    "vmap": lambda h: jax.vmap(lambda y: y * 2)(h),
    "scan": lambda h: jax.lax.scan(lambda c, y: (c + y, y), 0.0, h)[0],
    "stack": lambda h: jnp.stack([h, h]),
    "argument": lambda h: jax.jit(inner_func)(h[0]),
    "closure": lambda h: jax.jit(py_func(lambda y: y + h.sum(), Tout=f32))(1.0),
    "closure staged": lambda h: jax.jit(py_func(lambda y: y + h.sum(), staged=True))(1.0),
    "NumPy": np.asarray,
    "numpy_func": lambda h: numpy_func(lambda h: h, [h], lambda h: h),
    "copy": copy.deepcopy,
    "pickle": lambda h: pickle.loads(pickle.dumps(h)),
    "text": lambda h: [float(word) for word in str(h).strip("[]").split()],
}


@pytest.mark.parametrize("take", [jax.grad, jax.hessian], ids=["grad", "hessian"])
def test_an_array_that_outlives_its_run_is_its_value(take, transform):
    held = []

    def layer(x):
        h = jnp.tanh(x)
        held.append(h)
        return (h**2).sum()

    x = jnp.array([0.5, 1.0, 1.5])
    jax.block_until_ready(transform(take(py_func(layer, Tout=f32)))(x))
    for name, use in USES.items():
        np.testing.assert_allclose(
            use(held[0]), use(jnp.tanh(x)), rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_a_numpy_array_that_a_body_writes_to_is_recorded_as_it_was(transform):
    """Scalars, too: `t += 1` writes to them."""
    for shape in ((), (1,)):

        def body(x, shape=shape):
            t, y = np.zeros(shape, np.float32), 0.0
            for _ in range(3):
                t += 1
                y = y + (x * t).sum()
            return y

        f = py_func(body, Tout=f32)
        take = jax.value_and_grad(f)
        assert transform(take)(2.0) == (2.0 * (1 + 2 + 3), 1 + 2 + 3)
        assert transform(lambda x, f=f: jax.jvp(f, (x,), (1.0,))[1])(2.0) == 1 + 2 + 3
        got = transform(jax.vmap(take))(jnp.arange(2.0))
        np.testing.assert_array_equal(got, ([0.0, 6.0], [6.0, 6.0]))


def test_jax_tells_one_run_from_another(transform):
    """Libraries forbid changing an object in another trace than that which created it."""
    states = []

    def body(x):
        states.append(jax.extend.core.get_opaque_trace_state())
        assert states[-1] == jax.extend.core.get_opaque_trace_state()
        return jnp.sin(x)

    def nested(x):
        states.append(jax.extend.core.get_opaque_trace_state())
        return jax.grad(py_func(body, Tout=f32))(x)

    for f, count in ((body, 1), (nested, 2)):
        states.clear()
        slope = transform(jax.grad(py_func(f, Tout=f32)))
        for _ in range(2):
            jax.block_until_ready(slope(1.0))
        assert len(states) == 2 * count
        assert all(a != b for a, b in itertools.combinations(states, 2))
    states.clear()
    held = jnp.ones(())  # on a device of another client than that of bodies
    value = transform(py_func(lambda x: body(x) + held, Tout=f32))
    jax.block_until_ready(value(1.0))
    assert states == [jax.extend.core.get_opaque_trace_state()]  # with values, as here


custom = jax.custom_vjp(lambda x: jnp.sin(x))
custom.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * g * jnp.cos(x),))


@jax.custom_jvp
def with_aux(x, y):
    return jnp.sin(x) * y, x


with_aux.defjvp(lambda p, t: (with_aux(*p), (3 * jnp.cos(p[0]) * t[0] * p[1] + t[1], t[0])))


@jax.custom_jvp
def of_its_own(x):
    return jnp.sin(x)


# The rule's value is not that of the function, so its derivative has no factor 3.
of_its_own.defjvp(lambda p, t: (jnp.sin(p[0]), 3 * jnp.cos(p[0]) * t[0]))
straight_through = jax.custom_jvp(lambda x: jnp.round(x))
straight_through.defjvp(lambda p, t: (jnp.round(p[0]), t[0]))


@jax.jit
def jitted_with_callback(x):
    y = jax.pure_callback(
        lambda v: np.asarray(v) * 2, f32, jax.lax.stop_gradient(x), vmap_method="sequential"
    )
    return x * y


inner_func = py_func(lambda x: x**2 if x > 0 else x, Tout=f32)
plain_func = lambda x: jnp.where(x > 0, x**2, x)  # noqa: E731
inner_numpy = numpy_func(lambda x: np.floor(x), Tout=f32)

BODIES = {
    "relu": lambda x: jax.nn.relu(x) + jax.nn.relu(-x) * 2,
    "softplus": lambda x: jax.nn.softplus(x) * x,
    "logaddexp": lambda x: jnp.logaddexp(x, 2 * x),
    "gelu": lambda x: jax.nn.gelu(x) * jax.nn.silu(x),
    "custom_jvp": lambda x: with_aux(x, x * 2)[0] * with_aux(x, 1.0)[1],
    "custom_vjp": lambda x: custom(x) * x,
    "vmap_of_custom": lambda x: jax.vmap(lambda y: custom(y) * with_aux(y, x)[0])(
        jnp.stack([x, 2 * x])
    ).sum(),
    "rule_of_its_own": lambda x: of_its_own(x) ** 2 * x,
    "rule_without_residuals": lambda x: jax.jit(straight_through)(x) ** 2 * x,
    "grad": lambda x: jax.grad(lambda y: jnp.sin(y) * y * x)(x),
    "jvp": lambda x: jax.jvp(lambda y: jnp.sin(y) * x, (x,), (x,))[1],
    "vmap": lambda x: jax.vmap(lambda y: y * jnp.sin(x * y))(jnp.arange(3.0)).sum(),
    "jit_with_closure": lambda x: jax.jit(lambda y: y * x)(x + 1),
    "scan": lambda x: jax.lax.scan(lambda c, _: (c * jnp.cos(c), c), x, None, length=3)[0],
    "cond": lambda x: jax.lax.cond(x > 0, jnp.sin, jnp.cos, x),
    "checkpoint": lambda x: jax.checkpoint(lambda y: jnp.sin(jnp.sin(y)))(x),
    "callback": lambda x: jitted_with_callback(x),
    "linalg": lambda x: (
        jnp.linalg.solve(jnp.eye(2) * x + 0.1, jnp.ones(2) * x).sum()
        + jnp.linalg.eigh(jnp.array([[2.0, 1.0], [1.0, 3.0]]) * x)[0].sum()
    ),
    "sort": lambda x: jnp.sort(jnp.stack([x, -x, 2 * x]))[1],
    "indexing": lambda x: (
        jnp.zeros(3).at[1].set(x)[1:].sum() * jnp.stack([x, x * 2])[jnp.array([0, 1])].sum()
    ),
    "random": lambda x: jax.random.normal(jax.random.key(3), (2,)).sum() * x**2,
    "power": lambda x: x**x + 2**x + x**2.5,
    "half": lambda x: (x.astype(jnp.bfloat16) ** 2).astype(jnp.float32) + x,
    "complex": lambda x: jnp.abs(jnp.exp(1j * x) * x + x),
    "py_func": lambda x, f=inner_func: f(x) * x + f(-x),
    "jitted_py_func": lambda x, f=inner_func: jax.jit(lambda y: f(y) * y)(x),
    "grad_of_py_func": lambda x, f=inner_func: jax.grad(lambda y: f(y) * y * x)(x),
    "vmap_of_py_func": lambda x, f=inner_func: jax.vmap(f)(jnp.stack([x, -x]) * x).sum(),
    "scan_of_py_func": lambda x, f=inner_func: jax.lax.scan(
        lambda c, _: (f(c) * x, None), x, None, length=2
    )[0],
    "numpy_func": lambda x, f=inner_numpy: x * f(jax.lax.stop_gradient(x + 1)),
    "shard_map": lambda x: jax.shard_map(
        lambda v: jnp.sin(v) * v,
        mesh=jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,)),
        in_specs=PartitionSpec("d"),
        out_specs=PartitionSpec("d"),
    )(jnp.arange(4.0) * x).sum(),
    "same_twice": lambda x: (x * x) * (x + x),
    "whole": lambda x: jnp.outer(jnp.ones(2) * x, jnp.arange(2.0) * x).sum(),
}
ORDERS = {
    "grad": jax.grad,
    "rev_rev": lambda f: jax.grad(jax.grad(f)),
    "fwd_rev": lambda f: jax.jacfwd(jax.grad(f)),
    "vmap_grad": lambda f: lambda x: jax.vmap(jax.grad(f))(jnp.stack([x, x / 2])).sum(),
}


def plain(name):
    """Return the body without calls of wrapped functions, for JAX to compile."""
    body = BODIES[name]
    if name == "numpy_func":
        return lambda x: body(x, jnp.floor)
    return (lambda x: body(x, plain_func)) if "py_func" in name else body


@pytest.mark.parametrize("body", BODIES)
def test_gradients_of_jaxs_features_in_a_body(body):
    """Run each twice, so that operations are new and then cached."""
    orders = ["grad"] if body == "shard_map" else ORDERS  # the others take JAX long

    def all_of(f):
        return jax.jit(lambda x: [ORDERS[order](f)(x) for order in orders])

    got, want = all_of(py_func(BODIES[body], Tout=f32, name=body)), all_of(plain(body))
    for x in (0.7, 1.3):
        for order, a, b in zip(orders, got(x), want(x), strict=True):
            rtol = 1e-2 if body == "half" else 5e-4
            np.testing.assert_allclose(a, b, rtol, err_msg=order)


@pytest.mark.parametrize(
    "body",
    ["relu", "softplus", "custom_jvp", "custom_vjp", "vmap_of_custom", "rule_of_its_own"],
)
def test_custom_rules_where_jax_lacks_the_stores(body, monkeypatch):
    """Their tapes are not cached then, and a second derivative runs the body again."""

    def fail(*_):
        raise AssertionError("a store is used")

    monkeypatch.setattr(_compat, "Store", None)
    monkeypatch.setattr(rule_stores, "refill", fail)
    monkeypatch.setattr(rule_stores, "take", fail)
    f = py_func(BODIES[body], Tout=f32, name=body)

    def all_of(f):
        return lambda x: [take(f)(x) for take in (*ORDERS.values(), jax.hessian)]

    for got in eager_and_jit(all_of(f), 0.7):
        np.testing.assert_allclose(got, jax.jit(all_of(BODIES[body]))(0.7), rtol=5e-4)
    slope, pullback = jax.vjp(jax.grad(f), 0.7)  # of a tape that is cached
    np.testing.assert_allclose(slope, jax.grad(BODIES[body])(0.7), rtol=5e-4)
    curvature = jax.grad(jax.grad(BODIES[body]))(0.7)
    for _ in range(2):
        np.testing.assert_allclose(pullback(1.0)[0], curvature, rtol=5e-4)


def test_a_tape_that_cannot_be_replayed_without_the_stores_says_so(monkeypatch):
    monkeypatch.setattr(_compat, "Store", None)
    f = py_func(lambda x: jax.nn.relu(x) ** 3, Tout=f32, stateful=True, name="step")
    message = "'step' is stateful.* cannot be replayed .* leave out stateful=True"
    for program in (jax.grad(jax.grad(f)), jax.jit(jax.grad(jax.grad(f)))):
        with pytest.raises(TapeLostError, match=message), raise_original():
            program(2.0)


def test_one_tape_is_differentiated_again_on_many_threads():
    """The rules of a function under `jax.vmap` fill JAX's stores for one call."""
    body = BODIES["vmap_of_custom"]
    pullback = jax.jit(lambda x: jax.vjp(jax.grad(py_func(body, Tout=f32)), x)[1])(0.7)
    apply = jax.jit(lambda pullback: pullback(1.0)[0])
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda _: apply(pullback), range(40)))
    want = jax.jit(jax.grad(jax.grad(body)))(0.7)
    np.testing.assert_allclose(got, [want] * 40, rtol=5e-4)


@pytest.mark.parametrize("rule", [of_its_own, straight_through])
def test_the_derivative_of_a_value_that_a_rule_computed(rule):
    """Inside another derivative, the derivative is that of what the rule computes."""
    bodies = [lambda x: rule(x) * x, lambda x: jax.jit(rule)(x) * x]
    orders = [ORDERS["rev_rev"], lambda f: jax.jacfwd(jax.jacfwd(f))]

    def all_of(fs):
        return lambda x: [
            take(lambda x, f=f: jnp.sin(f(x)))(x) for f in fs for take in orders
        ]

    want = jax.jit(all_of(bodies))(0.7)
    for got in eager_and_jit(
        all_of([py_func(body, Tout=f32) for body in bodies]), 0.7, eager=False
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("derivative", [jax.grad, jax.jacfwd, jax.hessian])
def test_numbers_as_arguments_of_a_call_in_a_jitted_function(derivative, transform):
    """They are literals of its jaxpr, and no arrays."""

    def inner(x, flag, count, factor, weights):
        return factor * x**count * weights.sum() if flag else x

    def of(inner):
        numbers = True, 3, 0.5, np.arange(3, dtype=np.float32)
        return lambda x: jax.jit(lambda x: inner(x, *numbers))(x)

    got = transform(derivative(py_func(of(py_func(inner, Tout=f32)), Tout=f32)))(2.0)
    want = derivative(lambda x: 1.5 * x**3)(2.0)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_an_empty_batch_of_a_py_func_in_a_body(transform):
    def body(x):
        return jax.vmap(inner_func)(jnp.zeros((0,)) * x).sum() + x

    assert transform(jax.grad(py_func(body, Tout=f32)))(2.0) == 1.0


def test_debug_print_prints_once(transform, capsys):
    def body(x):
        jax.debug.print("x = {}", x)
        jax.jit(lambda y: jax.debug.print("y = {}", y))(x)
        return x**3

    assert transform(jax.grad(jax.grad(py_func(body, Tout=f32))))(2.0) == 12.0
    jax.effects_barrier()
    assert sorted(capsys.readouterr().out.split("\n")) == ["", "x = 2.0", "y = 2.0"]


def test_a_host_callback_that_a_gradient_flows_into_is_jaxs_error(transform):
    def body(x):
        return jax.pure_callback(np.sin, f32, x)

    with pytest.raises(ValueError, match="Pure callbacks do not support JVP"):
        call(transform(jax.grad(py_func(body, Tout=f32))), 0.7)


def test_numpy_func_in_a_body_that_a_gradient_flows_into(transform):
    with pytest.raises(NotDifferentiableError, match="numpy_func"):
        call(transform(jax.grad(py_func(lambda x: inner_numpy(x), Tout=f32))), 0.7)


def test_while_loop_in_a_body_forward_and_its_own_error_in_reverse(transform):
    def body(x):
        return jax.lax.while_loop(lambda c: c < 10, lambda c: c * x, x)

    f = py_func(body, Tout=f32)
    np.testing.assert_allclose(transform(jax.jacfwd(f))(2.0), 4 * 2.0**3, rtol=1e-6)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        call(transform(jax.grad(f)), 2.0)


def test_the_traceback_of_a_differentiated_body_begins_at_the_users_line(transform):
    def body(x):
        y = x * 2
        raise KeyError(f"{y:.1f}")

    with pytest.raises(KeyError, match=r"4\.0") as info:
        call(transform(jax.grad(py_func(body, Tout=f32))), 2.0)
    assert info.traceback[-1].name == "body"


def test_debug_nans_names_it_in_a_differentiated_body():
    f = py_func(lambda x: jnp.log(x - 1) * 0, Tout=f32)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match=r"nan|NaN"):
        call(jax.grad(f), 0.5)


def test_in_float64_and_in_both_precisions_alternately():
    for x64 in (True, False, True):
        with jax.enable_x64(x64):
            dtype = jnp.float64 if x64 else jnp.float32
            f = py_func(lambda x: jnp.sin(x) * x if x > 0 else x, Tout=dtype)
            got = jax.jit(jax.grad(f))(dtype(0.7))
            assert got.dtype == dtype
            np.testing.assert_allclose(
                got, np.cos(0.7) * 0.7 + np.sin(0.7), rtol=1e-14 if x64 else 1e-6
            )


def test_error_texts_have_no_dangling_places():
    """A body that is all NumPy has no frame in the user's code."""
    with pytest.raises(NotDifferentiableError) as info:
        jax.grad(py_func(np.sin, Tout=f32))(0.5)
    assert re.search(r"'sin'.*converted to NumPy", str(info.value))


# Corner cases


def test_calls_in_control_flow_of_a_body_run_once(transform):
    """They are differentiated at the values that they ran on."""
    factors = []

    def scaled(x):
        factors.append(len(factors) + 1.0)
        return x * jnp.float32(factors[-1])

    inner = py_func(scaled, Tout=f32, stateful=True)

    def body(xs):
        return jax.lax.scan(lambda c, x: (c + inner(x), None), 0.0, xs)[0]

    xs = jnp.array([0.5, 0.25, 2.0])
    outer = py_func(body, Tout=f32)
    value, slope = transform(jax.value_and_grad(outer))(xs)
    assert factors == [1, 2, 3]
    np.testing.assert_allclose(value, xs @ jnp.array([1.0, 2, 3]), rtol=1e-6)
    np.testing.assert_allclose(slope, [1, 2, 3], rtol=1e-6)
    with pytest.raises(UnsupportedError, match=r"stateful, in jax.lax.scan.*once more"):
        call(transform(jax.hessian(outer)), xs)


def test_custom_rules_are_python_that_sees_values_and_the_world(transform):
    world = {"factor": 2.0}

    @jax.custom_vjp
    def by_vjp(x):
        return x * world["factor"] if x > 0 else -x

    by_vjp.defvjp(
        lambda x: (by_vjp(x), float(jax.lax.stop_gradient(x)) > 0),
        lambda is_positive, g: (g * world["factor"] if is_positive and g > 0 else -g,),
    )

    @jax.custom_jvp
    def by_jvp(x):
        return x * world["factor"] if x > 0 else -x

    @by_jvp.defjvp
    def _rule(primals, tangents):
        (x,) = primals
        return by_jvp(x), (world["factor"] if x > 0 else -1.0) * tangents[0]

    grads = [transform(jax.grad(py_func(f, Tout=f32))) for f in (by_vjp, by_jvp)]
    for factor in (2.0, 5.0):
        world["factor"] = factor
        for grad in grads:
            assert grad(3.0) == factor
            assert grad(-3.0) == -1.0


@pytest.mark.parametrize("take", [jax.grad, jax.jacfwd])
def test_a_numpy_array_that_a_body_writes_to_again(take, transform):
    """Plain `jax.grad` gets [9, 9, 9]: it reads the array too late."""

    def body(x):
        weights, total = np.ones(3, np.float32), 0.0
        for i in range(3):
            weights[:] = i + 1
            total = total + jnp.sum(x * weights)
        return total

    got = transform(take(py_func(body, Tout=f32)))(jnp.ones(3))
    np.testing.assert_allclose(got, [6, 6, 6])


@pytest.mark.parametrize("take", [jax.grad, jax.jacfwd, jax.hessian])
def test_configuration_that_a_body_changes_for_a_while(take, transform):
    def body(x):
        with jax.enable_x64(True):
            y = (x.astype(jnp.float64) * (1 / 3)) ** 2
        return y.astype(jnp.float32) + x

    got = transform(take(py_func(body, Tout=f32)))(3.0)
    np.testing.assert_allclose(got, 2 / 9 if take is jax.hessian else 5 / 3, rtol=1e-6)


def test_parameters_of_one_primitive_in_another_order(transform):
    primitive = Primitive("scaled_square")

    def impl(x, *, a, b):
        return x * a + x * x * b

    primitive.def_impl(impl)
    primitive.def_abstract_eval(lambda x, **_: x)
    mlir.register_lowering(primitive, mlir.lower_fun(impl, multiple_results=False))
    ad.defjvp(primitive, lambda t, x, *, a, b: t * (a + 2 * x * b))

    def body(x):
        return primitive.bind(x, a=1.0, b=2.0) + 10 * primitive.bind(x, b=1.0, a=2.0)

    got = transform(jax.grad(py_func(body, Tout=f32)))(jnp.float32(0.5))
    np.testing.assert_allclose(got, 1 + 2 * 0.5 * 2 + 10 * (2 + 2 * 0.5), rtol=1e-6)


def test_a_traced_function_that_holds_an_array_of_an_earlier_run(transform):
    """Plain JAX raises UnexpectedTracerError in the second call."""
    held = {}

    def step(c, x):
        return c * held["a"] + x, c

    def body(x, a):
        held["a"] = a
        return jax.lax.scan(step, x, jnp.arange(3.0))[0]

    grad = transform(jax.grad(py_func(body, Tout=f32), (0, 1)))
    np.testing.assert_allclose(grad(3.0, 2.0), (8, 3 * 3 * 4 + 1), rtol=1e-6)
    with pytest.raises(TypeError, match=r"'body' kept from a run|holds a traced value"):
        call(grad, 3.0, 5.0)


@jax.custom_vjp
def squared(x):
    return x * x


squared.defvjp(lambda x: (x * x, x), lambda x, g: (2.0 * x * g,))

LEAD_NOWHERE = {
    "stopped": lambda x: jnp.sin(x) + jax.lax.stop_gradient(squared(x)),
    "stopped_later": lambda x: jnp.sin(x) + jnp.floor(jnp.cos(squared(x))),
    "compared": lambda x: jnp.where(squared(x) > 0.1, jnp.sin(x), x),
    "jitted": lambda x: jnp.sin(x) * jnp.sign(jax.jit(squared)(x)),
    "dropped": lambda x: (squared(x), jnp.sin(x))[1],
}


@pytest.mark.parametrize("body", LEAD_NOWHERE)
def test_forward_mode_asks_a_custom_vjp_only_for_what_leads_to_results(body, transform):
    """`jax.linearize` omits the others, and raises if there is one."""

    def along(f):
        return transform(lambda x, t: jax.linearize(f, x)[1](t))(0.5, jnp.float32(0.9))

    assert_close(along(py_func(LEAD_NOWHERE[body])), along(LEAD_NOWHERE[body]))
