"""Compiled operations: how many are compiled, and what their caches keep alive."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, assert_close, scalar
from jax.core import Tracer
from jax.experimental import io_callback
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from programs import run_program

from jpyfunc import _compat, py_func
from jpyfunc._interpreters import operation_cache as cache
from jpyfunc._interpreters.base_tracer import BodyTracer
from jpyfunc._interpreters.batch_tracer import BatchTracer
from jpyfunc._interpreters.jaxpr_queries import (
    calls_host,
    differs_in_batches,
    has_rules,
    is_host_call,
    is_stateful,
)
from jpyfunc._interpreters.tape_tracer import TapeTracer
from jpyfunc._staging.abstract_tracer import AbstractTracer

f32 = jax.ShapeDtypeStruct((), jnp.float32)


@pytest.fixture
def compiled():
    """Count the programs that XLA compiles, one event each."""
    events = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_loop_of_varying_length_compiles_nothing_after_a_while(compiled):
    """A loop whose operations are the same however many iterations it takes."""

    def body(x, n):
        y = x
        for _ in range(int(n)):
            y = jnp.sin(y) * x + 0.1
            if y > 2:
                y = y - 1
        return y

    grad = jax.jit(jax.grad(py_func(body, Tout=f32)))
    counts = np.random.default_rng(0).integers(1, 41, 200)
    for n in counts[:100]:
        grad(1.3, int(n))
    assert compiled
    compiled.clear()
    for n in counts[100:]:
        grad(1.3, int(n))
    assert not compiled
    np.testing.assert_allclose(grad(1.3, 7), jax.grad(body)(1.3, 7), rtol=1e-5)


def test_a_body_of_more_operations_than_the_cache_has_room_for(compiled, monkeypatch):
    """The cache grows from the second call on, and in the end nothing is compiled."""
    monkeypatch.setattr(cache, "_operations", cache.LruCache(size=8))
    bodies = [
        lambda x, k=k: sum((x[i : i + k] ** 2).sum() for i in range(12)) for k in (2, 3)
    ]
    slopes = [jax.jit(jax.grad(py_func(body, Tout=f32))) for body in bodies]
    x = jnp.arange(20.0)
    for call in range(8):
        for slope, body in zip(slopes, bodies, strict=True):
            np.testing.assert_allclose(slope(x), jax.grad(body)(x), rtol=1e-6)
        if call < 7:
            compiled.clear()
    assert not compiled


def test_operations_that_never_come_back_do_not_let_the_cache_grow(monkeypatch):
    monkeypatch.setattr(cache, "_operations", known := cache.LruCache(size=8))
    f = jax.jit(jax.vjp, static_argnums=0)
    for i in range(40):
        f(py_func(lambda x, i=i: (x[i : i + 2] ** 2).sum(), Tout=f32), jnp.arange(50.0))
    assert len(known._entries) == 8


def test_jaxs_functions_get_no_attributes():
    def attributes():
        functions = [f for f in vars(jax.nn).values() if callable(f)]
        functions += [f.fun for f in functions if hasattr(f, "fun")]
        return [sorted(getattr(f, "__dict__", {})) for f in functions]

    before = attributes()
    f = py_func(lambda x: jax.nn.relu(x) + jax.nn.silu(x) + jax.nn.softplus(x), Tout=f32)
    np.testing.assert_allclose(jax.grad(f)(-50.0), 0.0, atol=1e-6)
    assert attributes() == before


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_structure_that_is_met_again_and_again(case):
    """From the third time on, one program pulls its cotangents back."""
    grad = jax.jit(jax.value_and_grad(scalar(case.wrapped), tuple(range(len(case.args)))))
    want = jax.jit(jax.value_and_grad(scalar(case.plain), tuple(range(len(case.args)))))
    for scale in (1.0, 1.1, -0.5, 0.9, -0.55, 1.2, -0.6, -0.65):
        args = jax.tree.map(lambda x, scale=scale: jnp.asarray(x) * scale, case.args)
        if scale < 0 and "py_func" in case.name:
            continue  # log_huber of a negative threshold is NaN
        assert_close(grad(*args), want(*args))


def test_one_structure_with_other_operands_and_results_differentiated():
    """The same operations repeat, each time for another entry of the matrix."""
    f = py_func(lambda x, y: (jnp.sin(x) * y, x * y**2), Tout=(f32, f32))

    def entry(jvp, i, k):
        """One derivative: the pullback of result k with respect to operand i alone."""
        zero = np.float32(0)
        row = lambda t: jvp(*[t if i == j else zero for j in (0, 1)])[k]  # noqa: E731
        return jax.linear_transpose(row, 1.0)(1.0)[0]

    @jax.jit
    def matrix(x, y):
        jvp = jax.linearize(f, x, y)[1]
        return [entry(jvp, i, k) for k in (0, 1) for i in (0, 1)]

    for x, y in ((0.7, 1.3), (0.2, -0.4), (1.1, 2.0), (0.5, 0.6)):
        want = [np.cos(x) * y, np.sin(x), y**2, 2 * x * y]
        np.testing.assert_allclose(matrix(x, y), want, rtol=1e-5)


def scale_of(parameter):
    """A version of `scaled` for each of the parameters that are equal to Python."""
    scale = {bool: 2.0, int: 3.0, float: 5.0}[type(parameter)]
    scale *= math.copysign(1.0, parameter)
    return scale if jax.config.jax_threefry_partitionable else 10 * scale


scaled = Primitive("scaled")
scaled.def_impl(lambda x, *, by: x * scale_of(by))
scaled.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(
    scaled, mlir.lower_fun(lambda x, *, by: x * scale_of(by), multiple_results=False)
)
ad.defjvp(scaled, lambda t, x, *, by: t * scale_of(by))


def test_parameters_and_configurations_that_python_calls_equal(transform):
    """Each is a different operation, within one body and from call to call."""
    parameters = [True, 1, 1.0, 0.0, -0.0, 0, False]
    f = py_func(
        lambda x: sum(scaled.bind(x * (i + 1), by=by) for i, by in enumerate(parameters)),
        Tout=f32,
    )
    for flag in (True, False, True):
        with jax.threefry_partitionable(flag):
            want = sum((i + 1) * scale_of(by) for i, by in enumerate(parameters))
            assert transform(jax.grad(f))(jnp.float32(0.5)) == want


def test_jaxs_own_rules_with_other_static_arguments():
    """The axis is not a parameter of the bind: JAX's function closes over it."""
    x = jnp.arange(6.0).reshape(2, 3) / 5

    def body(x):
        rows, columns = jax.nn.softmax(x, axis=0), jax.nn.softmax(x, axis=1)
        return (rows[0] * 2 + columns[0] ** 2).sum() + jnp.where(x > 1, x, 0).sum()

    with jax.softmax_custom_jvp(True):
        f = py_func(body, Tout=f32)
        got, want = jax.jit(jax.grad(f))(x), jax.jit(jax.grad(body))(x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_same_operations_on_other_operands():
    """The operations are in the same order: nothing else distinguishes the structures."""

    def body(x, n):
        a = jnp.sin(x)
        b = jnp.sin(a if n > 0 else x)
        return a * b

    grad, plain = jax.jit(jax.grad(py_func(body, Tout=f32))), jax.grad(body)
    for n in [1, 0] * 4:
        np.testing.assert_allclose(grad(0.7, n), plain(0.7, n), rtol=1e-6)


def test_more_structures_than_are_compiled():
    """A body that branches on each of four elements has sixteen, each met six times."""

    def body(x):
        return sum(jnp.sin(v) * v if v > 0 else v**3 for v in x)

    grad = jax.jit(jax.grad(py_func(body, Tout=f32)))
    rng = np.random.default_rng(0)
    for _ in range(100):
        x = jnp.float32(rng.normal(size=4))
        want = jnp.where(x > 0, jnp.cos(x) * x + jnp.sin(x), 3 * x**2)
        np.testing.assert_allclose(grad(x), want, rtol=1e-5)


LIVES = """
    import gc, weakref
    import jax, jax.numpy as jnp
    import jpyfunc
    from jpyfunc import py_func

    f32 = jax.ShapeDtypeStruct((), jnp.float32)
    alive = []

    def noted(thing):
        alive.append(weakref.ref(thing))
        return thing

    def left():
        jax.clear_caches()  # JAX's, which has none of ours
        gc.collect()
        return sum(ref() is not None for ref in alive)
"""


def test_functions_made_again_in_each_run_are_released():
    out = run_program(
        LIVES
        + """
    jpyfunc.set_tape_limit(2**16)

    def body(x):
        weights = noted(jnp.arange(3.0))
        step = noted(lambda c, w: (c * jnp.cos(c) * w + weights.sum(), None))
        x = jax.lax.scan(step, x, jnp.ones(2))[0]
        x = jax.jit(noted(lambda y: y * x + weights[1]))(x)
        rule = jax.custom_jvp(noted(lambda y: jnp.sin(y)))
        rule.defjvp(noted(lambda p, t: (rule(*p), t[0] * jnp.cos(p[0]))))
        other = jax.custom_vjp(noted(lambda y: jnp.sin(y)))
        other.defvjp(
            noted(lambda y: (jnp.sin(y), y)), noted(lambda y, g: (g * jnp.cos(y),))
        )
        return rule(x) + other(x) if x > 0 else x

    grad = jax.jit(jax.grad(py_func(body, Tout=f32)))
    for i in range(8):
        grad(0.1 * i)
    jpyfunc.set_tape_limit(0)
    print(left(), len(alive))
    """,
        limit=120,
    )
    assert out.split() == ["0", "64"]


def test_what_a_body_caches_is_freed_with_it():
    """Even while there is room for its tapes."""
    out = run_program(
        LIVES
        + """
    def use(i):
        weights = noted(jnp.arange(3.0) + i)
        body = noted(lambda x: (weights * x).sum() if x > 0 else x)
        f = py_func(body, Tout=f32)
        jax.grad(f)(1.0)
        jax.jit(jax.hessian(f))(1.0)
        jax.vmap(jax.grad(f))(jnp.ones(2))

    for i in range(10):
        use(i)
    print(left())
    """,
        limit=120,
    )
    assert out.split() == ["0"]


def test_cached_tapes_hold_nothing_that_was_compiled_for_them_alone():
    """It would hold some megabytes for each call of a function that a body jits again."""
    out = run_program(
        """
        from programs import resident
        import gc, os
        import jax, jax.numpy as jnp, jpyfunc

        def body(x):
            return jax.jit(lambda y: y * x)(x) if x > 0 else x

        f = jpyfunc.py_func(body, Tout=jax.ShapeDtypeStruct((), jnp.float32))
        grad = jax.jit(jax.grad(f))
        for i in range(10):
            grad(1.0)
        before = resident()
        for i in range(30):
            grad(1.0)
        print(resident() - before)
        """,
        limit=120,
    )
    assert int(out) < 30 * 2**19


def test_many_threads_that_meet_the_same_operations_first(tmp_path):
    out = run_program(
        """
        import threading
        import jax, jax.numpy as jnp, numpy as np, jpyfunc

        jpyfunc.set_tape_limit(2**17)  # so that runs are dropped while others are used

        def body(x, n):
            y = x
            for _ in range(int(n)):
                y = jnp.tanh(y) * x if y.sum() > 0 else y + x
            return y.sum()

        f = jpyfunc.py_func(body, Tout=jax.ShapeDtypeStruct((), jnp.float32))
        grad = jax.jit(jax.value_and_grad(f))
        wrong = []

        def work(i):
            for k in range(30):
                n, x = (i + k) % 5 + 1, jnp.full(100, 0.1 * (i + 1))
                got = grad(x, n)
                if k % 10 == 0:
                    want = jax.value_and_grad(body)(x, n)
                    if not all(map(lambda a, b: np.allclose(a, b, rtol=1e-4), got, want)):
                        wrong.append((i, k))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(wrong)
        """,
        limit=180,
    )
    assert out.strip() == "[]"


def of_callback(callback, **options):
    return lambda x: callback(lambda x: np.asarray(x), f32, x, **options)


@pytest.mark.parametrize(
    ("function", "is_debug"),
    [
        (lambda x: jax.debug.print("{}", x), True),
        (lambda x: jax.debug.print("{}", x, ordered=True), True),
        (lambda x: jax.debug.callback(lambda x: None, x), True),
        (of_callback(jax.pure_callback), False),
        (of_callback(io_callback), False),
        (of_callback(io_callback, ordered=True), False),
        (lambda x: py_func(np.sin, [x], f32), False),
    ],
)
def test_primitives_that_call_the_host_are_known(function, is_debug):
    """JAX may give them other primitives, and some have no public names."""
    jaxpr = jax.make_jaxpr(function)(1.0)
    (eqn,) = jaxpr.eqns
    assert is_host_call(eqn.primitive, eqn.params)
    assert calls_host(jax.make_jaxpr(jax.jit(function))(1.0))
    assert (eqn.primitive in _compat.DEBUG_PRIMITIVES) == is_debug
    assert is_stateful(jaxpr) == (bool(jaxpr.effects) and not is_debug)


def test_primitives_with_rules_of_the_users_are_known():
    rule = jax.custom_jvp(lambda x: x)
    rule.defjvp(lambda p, t: (p[0], t[0]))
    assert has_rules(jax.make_jaxpr(jax.jit(rule))(1.0))
    assert not has_rules(jax.make_jaxpr(jnp.sin)(1.0))
    batched = jax.custom_batching.custom_vmap(jnp.sin)
    batched.def_vmap(lambda size, is_batched, x: (jnp.cos(x), True))
    assert differs_in_batches(jax.make_jaxpr(batched)(1.0))
    assert not differs_in_batches(jax.make_jaxpr(jnp.sin)(1.0))


@pytest.mark.parametrize("tracer", [TapeTracer, BatchTracer, AbstractTracer])
def test_a_tracer_hides_no_method_of_arrays(tracer):
    """A body would call our method in its place."""
    hooks = {name for name in vars(BodyTracer) if not hasattr(Tracer, name)}
    own = {name for name in vars(tracer) if not name.startswith("_")} - {"aval"}
    array = jnp.ones(())
    assert not [name for name in (hooks | own) - REDEFINED if hasattr(array, name)]


# Of an array, or what JAX refuses of its tracers.
REDEFINED = {
    "block_until_ready", "copy_to_host_async", "item", "full_lower", "to_concrete_value",
}  # fmt: skip
