"""Dead calls, stateful and ordered ones, and control flow around calls."""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import log_huber, plain_log_huber

import jpyfunc
from jpyfunc import UnsupportedError, py_func
from jpyfunc._primitive import loops

f32 = jax.ShapeDtypeStruct((), jnp.float32)


@pytest.fixture
def recorder():
    """Makes bodies that record the values they run on."""

    class Recorder(list):
        def body(self, name="f", function=jnp.sin, **options):
            def body(x):
                self.append((name, round(float(jax.lax.stop_gradient(x)), 4)))
                return function(x)

            return py_func(body, Tout=f32, **options)

        def values(self):
            jax.effects_barrier()
            return [value for _, value in self]

    return Recorder()


def test_dead_pure_calls_are_removed(recorder):
    f = recorder.body()
    assert jax.jit(lambda x: (f(x), x)[1])(1.0) == 1.0
    assert recorder.values() == []


@pytest.mark.parametrize("options", [{"stateful": True}, {"ordered": True}], ids=str)
def test_stateful_calls_run_once_used_or_not(options, recorder, transform):
    f = recorder.body(**options)
    transform(lambda x: (f(x), x)[1])(1.0)
    assert recorder.values() == [1.0]
    jitted = transform(f)
    for _ in range(3):
        np.testing.assert_allclose(jitted(2.0), np.sin(2.0), rtol=1e-6)
    assert recorder.values() == [1.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("tout", [[], (), None])
def test_a_body_that_returns_nothing_runs_once(tout, transform):
    seen = []
    assert transform(lambda x: py_func(lambda x: seen.append(x), [x], tout))(1.0) == tout
    jax.effects_barrier()
    assert len(seen) == 1


def test_inferred_to_return_nothing(transform):
    seen = []

    def body(x):
        if isinstance(x, jax.core.Tracer):  # while its shapes are inferred
            return
        seen.append(float(x))

    assert transform(py_func(body))(1.0) is None
    jax.effects_barrier()
    assert seen == [1.0]


def test_ordered_calls_run_in_program_order(recorder, transform):
    fs = [recorder.body(str(i), ordered=True) for i in range(4)]

    def program(x):
        # The data flows against the program order.
        results = [f(x + i) for i, f in enumerate(fs)]
        return results[3] + results[0]

    transform(program)(1.0)
    assert recorder.values() == [1.0, 2.0, 3.0, 4.0]


def test_an_eager_ordered_call_waits_for_those_before_it():
    """It waits although its body does not read their results."""
    order = []

    def slow(x):
        time.sleep(0.1)
        order.append("dispatched")
        return x

    dispatched = jax.jit(py_func(slow, Tout=f32, ordered=True))
    f = py_func(lambda x: order.append("eager") or jnp.sin(x), Tout=f32, ordered=True)
    big = jnp.ones((1500, 1500))
    big @ big  # is compiled
    for take in (lambda f: f, jax.grad):
        order.clear()
        dispatched((big @ big)[0, 0])  # its operand is not ready yet
        take(f)(2.0)
        assert order == ["dispatched", "eager"]


@pytest.mark.parametrize("options", [{"stateful": True}, {"ordered": True}], ids=str)
@pytest.mark.parametrize(
    ("take", "want"),
    [
        (jax.grad, np.cos(1.0)),
        (jax.jacfwd, np.cos(1.0)),
        (jax.hessian, -np.sin(1.0)),
        (lambda f: jax.grad(jax.grad(f)), -np.sin(1.0)),
    ],
    ids=["grad", "jacfwd", "hessian", "rev_rev"],
)
def test_derivatives_of_stateful_calls(take, want, options, transform):
    primals = []

    def body(x):
        primals.append(1)
        return jnp.sin(x)

    f = py_func(body, Tout=f32, **options)
    np.testing.assert_allclose(transform(take(f))(1.0), want, rtol=1e-5)
    jax.effects_barrier()
    assert len(primals) == 1


@pytest.mark.parametrize("options", [{}, {"stateful": True}, {"ordered": True}], ids=str)
class TestControlFlow:
    """Compare each with the same loop in Python, forward and differentiated."""

    def compare(self, program, plain, transform):
        np.testing.assert_allclose(transform(program)(0.7), plain(0.7), rtol=1e-5)
        np.testing.assert_allclose(
            transform(jax.grad(program))(0.7), jax.grad(plain)(0.7), rtol=1e-5
        )

    def test_scan(self, options, recorder, transform):
        f = recorder.body(**options)

        def program(x):
            return jax.lax.scan(lambda c, _: (f(c), f(c)), x, None, length=3)[1].sum()

        def plain(x):
            total = 0.0
            for _ in range(3):
                x = jnp.sin(x)
                total += x
            return total

        self.compare(program, plain, transform)

    def test_while_loop(self, options, recorder, transform):
        f = recorder.body(**options)
        loop = lambda x: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, f(c[1])), (0, x))[1]  # noqa: E501, E731  # fmt: skip
        want = np.sin(np.sin(np.sin(0.7)))
        np.testing.assert_allclose(transform(loop)(0.7), want, rtol=1e-6)
        np.testing.assert_allclose(
            recorder.values(), np.round([0.7, np.sin(0.7), np.sin(np.sin(0.7))], 4)
        )
        got = transform(lambda x: jax.jvp(loop, (x,), (1.0,))[1])(0.7)
        want = jax.grad(lambda x: jnp.sin(jnp.sin(jnp.sin(x))))(0.7)
        np.testing.assert_allclose(got, want, rtol=1e-5)

    def test_fori_loop(self, options, recorder, transform):
        f = recorder.body(**options)
        self.compare(
            lambda x: jax.lax.fori_loop(0, 2, lambda _, c: f(c), x),
            lambda x: jnp.sin(jnp.sin(x)),
            transform,
        )

    @pytest.mark.parametrize("taken", [0, 1])
    def test_cond_and_switch(self, taken, options, recorder, transform):
        f = recorder.body(**options)
        branches = [lambda x: f(x) * 2, lambda x: x * 3]
        plain = [lambda x: jnp.sin(x) * 2, lambda x: x * 3][taken]
        self.compare(lambda x: jax.lax.cond(taken == 0, *branches, x), plain, transform)
        self.compare(lambda x: jax.lax.switch(taken, branches, x), plain, transform)
        assert bool(recorder.values()) == (taken == 0)

    def test_custom_rules_around_it(self, options, recorder, transform):
        f = recorder.body(**options)
        reverse = jax.custom_vjp(lambda x: f(x))
        reverse.defvjp(lambda x: (f(x), x), lambda x, g: (g * 5 * jnp.cos(x),))
        np.testing.assert_allclose(
            transform(jax.grad(reverse))(0.7), 5 * np.cos(0.7), rtol=1e-6
        )
        forward = jax.custom_jvp(lambda x: f(x))
        forward.defjvp(lambda p, t: (f(*p), 7 * t[0]))
        np.testing.assert_allclose(transform(jax.grad(forward))(0.7), 7, rtol=1e-6)
        by_remat = jax.custom_vjp(lambda x: f(x))
        rules = lambda x: (f(x), x), lambda x, g: (g * 3 * jnp.cos(x),)
        by_remat.defvjp(*rules, optimize_remat=True)
        np.testing.assert_allclose(
            transform(jax.grad(by_remat))(0.7), 3 * np.cos(0.7), rtol=1e-6
        )
        with jax.enable_checks(True):  # JAX checks the effects of what it calls
            for function in (reverse, forward, by_remat):
                np.testing.assert_allclose(transform(function)(0.7), np.sin(0.7), rtol=1e-6)


@pytest.mark.parametrize("options", [{"stateful": True}, {"ordered": True}], ids=str)
@pytest.mark.parametrize("take", [jax.grad, jax.jacfwd, jax.hessian, jax.value_and_grad])
def test_a_loop_under_a_derivative_makes_calls_that_no_derivative_needs(
    take, options, recorder, transform
):
    """Each runs once, like `jax.debug.callback`; JAX drops those of `io_callback`."""
    f = recorder.body(**options)

    def step(c, x):
        c = jnp.tanh(c + x)
        f(c)
        return c

    def scan(w):
        return jax.lax.scan(lambda c, x: (step(c, w * x), None), 0.0, jnp.arange(3.0))[0]

    def fori(w):
        return jax.lax.fori_loop(0, 3, lambda i, c: step(c, w * i), 0.0)

    def nested(w):
        def iteration(c, x):
            return jax.lax.cond(x > 0, jax.jit(step), lambda c, x: c, c, w * x), None

        return jax.lax.scan(iteration, 0.0, jnp.arange(3.0))[0]

    want = [0.0, np.tanh(0.5), np.tanh(np.tanh(0.5) + 1)]
    for loop, calls in ((scan, want), (fori, want), (nested, want[1:])):
        recorder.clear()
        transform(take(loop))(0.5)
        np.testing.assert_allclose(recorder.values(), calls, atol=1e-4)


LOOPS = {
    "fori_loop": lambda f, w: jax.lax.fori_loop(0, 4, lambda i, y: y + f(w), 0.0),
    "map": lambda f, w: jax.lax.map(lambda i: f(w), jnp.arange(4)).sum(),
    "scan of nothing": lambda f, w: jax.lax.scan(lambda c, _: (c, f(w)), None, length=4)[
        1
    ].sum(),
    "unrolled": lambda f, w: jax.lax.scan(
        lambda y, _: (y + f(w), None), 0.0, length=4, unroll=2
    )[0],
    "jit inside": lambda f, w: jax.lax.fori_loop(0, 4, lambda i, y: y + jax.jit(f)(w), 0.0),
    "nested": lambda f, w: jax.lax.fori_loop(
        0, 2, lambda i, y: jax.lax.fori_loop(0, 2, lambda j, y: y + f(w), y), 0.0
    ),
    "cond inside": lambda f, w: jax.lax.fori_loop(
        0, 4, lambda i, y: y + jax.lax.cond(w > 0, f, lambda w: w, w), 0.0
    ),
    "inside cond": lambda f, w: jax.lax.cond(
        w > 0, lambda w: jax.lax.fori_loop(0, 4, lambda i, y: y + f(w), 0.0), lambda w: w, w
    ),
    "a constant": lambda f, w: w * jax.lax.fori_loop(0, 4, lambda i, y: y + f(1.0), 0.0),
}


@pytest.mark.parametrize("kind", ["stateful", "ordered", "numpy_func", "no operand"])
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_call_whose_operands_do_not_change_runs_in_each_iteration(loop, kind, transform):
    draws = iter(range(1, 5))  # a fifth call would raise
    if kind == "numpy_func":
        f = jpyfunc.numpy_func(lambda w: w * next(draws), Tout=f32, stateful=True)
        f.defvjp(lambda w: (w * (n := np.float32(next(draws))), n), lambda n, g: (g * n,))
    elif kind == "no operand":
        draw = py_func(lambda: jnp.float32(next(draws)), Tout=f32, stateful=True)
        f = lambda w: w * draw()  # noqa: E731
    else:
        f = py_func(lambda w: w * next(draws), Tout=f32, **{kind: True})
    value, slope = transform(jax.value_and_grad(lambda w: loop(f, w)))(2.0)
    assert (value, slope) == (2 * (1 + 2 + 3 + 4), 1 + 2 + 3 + 4)


def test_a_while_loop_with_a_stateful_call_is_not_linearized(recorder, transform):
    f = recorder.body(stateful=True)
    g = recorder.body(stateful=True, function=lambda x: x)
    loops = [
        lambda x: jax.lax.while_loop(lambda y: y < 3.0, lambda y: y + f(x) + 1, x),
        lambda x: jax.lax.while_loop(lambda y: g(y) < 3.0, lambda y: y + 2 * x, x),
    ]
    for loop in loops:
        with pytest.raises(UnsupportedError, match="'body' is stateful"):
            transform(lambda x, loop=loop: jax.linearize(loop, x)[0])(1.0)
    assert recorder.values() == []
    _, slope = transform(lambda x: jax.jvp(loops[1], (x,), (1.0,)))(1.0)
    assert slope == 3.0
    assert recorder.values() == [1.0, 3.0]


def test_scan_over_a_batch_of_gradients(transform):
    """vmap of grad of scan, the training loop of a batch of models."""
    f = py_func(log_huber, Tout=jnp.float32)
    xs = jnp.linspace(0.5, 3.0, 5)

    def gradients(function):
        step = lambda c, _: (function(c, 1.0) * 0.5, None)  # noqa: E731
        return jax.vmap(jax.grad(lambda x: jax.lax.scan(step, x, None, length=3)[0]))

    np.testing.assert_allclose(
        transform(gradients(f))(xs), gradients(plain_log_huber)(xs), rtol=1e-5
    )


def test_checkpoint_of_pure_calls(recorder, transform):
    f = recorder.body()
    got = transform(jax.grad(jax.checkpoint(lambda x: f(f(x)))))(0.7)
    np.testing.assert_allclose(got, np.cos(np.sin(0.7)) * np.cos(0.7), rtol=1e-6)
    got = transform(jax.hessian(jax.checkpoint(lambda x: f(x) ** 2)))(0.7)
    np.testing.assert_allclose(got, 2 * np.cos(1.4), rtol=1e-5)


@pytest.mark.parametrize("options", [{"stateful": True}, {"ordered": True}], ids=str)
def test_what_jax_forbids_is_refused_by_name(options, recorder, transform):
    f = recorder.body(**options)
    f = py_func(f.__wrapped__, Tout=f32, name="log_step", **options)
    with pytest.raises(
        NotImplementedError, match=r"'log_step' is stateful.*jax.checkpoint"
    ):
        transform(jax.grad(jax.checkpoint(f)))(1.0)
    if "ordered" in options:
        with pytest.raises(
            jpyfunc.UnsupportedError, match=r"'log_step'.*ordered=True.*vmap"
        ):
            transform(jax.vmap(f))(jnp.ones(3))
    else:
        np.testing.assert_allclose(
            transform(jax.vmap(f))(jnp.ones(3)), np.sin(1.0), rtol=1e-6
        )
    np.testing.assert_allclose(transform(f)(1.0), np.sin(1.0), rtol=1e-6)


def test_a_stateful_call_in_batched_control_flow_is_refused(recorder, transform):
    """Under `vmap`, both branches would run."""
    f = recorder.body(stateful=True)
    xs = jnp.array([1.0, -1.0])
    words = r"is called inside .* under vmap.*jax\.lax\.map, or make the call pure"
    for program in (
        lambda x: jax.lax.cond(x > 0, f, lambda x: x, x),
        lambda x: jax.lax.switch((x > 0).astype(int), [f, lambda x: x], x),
        lambda x: jax.lax.while_loop(lambda x: x < 3, lambda x: f(x) * 0 + x + 1, x),
        lambda x: jax.lax.while_loop(
            lambda c: c[3] < 3,
            lambda c: (c[0] + 1, c[0], c[1], c[2] + 0 * f(c[3])),
            (x, 0.0, 0.0, 0.0),
        ),
    ):
        with pytest.raises(UnsupportedError, match=words):
            transform(jax.vmap(program))(xs)
        assert recorder.values() == []
    # Control flow that is the same for all elements is allowed.
    step = jax.jit(lambda i, x: (i + 1, x * 2))
    both = lambda x: jax.lax.while_loop(lambda c: c[0] < 2, lambda c: step(c[0], c[1] + 0 * f(c[1])), (0, x))[1]  # noqa: E501, E731  # fmt: skip
    assert transform(jax.vmap(both))(xs).tolist() == [4.0, -4.0]
    assert recorder.values() == [1.0, -1.0, 2.0, -2.0]
    recorder.clear()
    iterated = jax.vmap(lambda x: jax.lax.fori_loop(0, 2, lambda i, x: f(x) * 0 + x + 1, x))
    assert transform(iterated)(xs).tolist() == [3.0, 1.0]
    assert recorder.values() == [1.0, -1.0, 2.0, 0.0]
    taken = jax.vmap(lambda p, x: jax.lax.cond(p, f, lambda x: x, x), (None, 0))
    transform(taken)(True, xs)
    assert recorder.values()[4:] == [1.0, -1.0]
    transform(taken)(False, xs)
    assert len(recorder.values()) == 6


def looping(note):
    return jax.vmap(lambda x: jax.lax.while_loop(lambda x: x < 2, lambda x: 2 * note(x), x))


def branching(note):
    return jax.vmap(lambda x: jax.lax.cond(x > 1, note, lambda x: x, x) * 2.0)


def checkpointing(note):
    return jax.grad(jax.checkpoint(lambda x: jnp.sin(note(x)).sum()))


def linearizing(note):
    loop = lambda x: jax.lax.while_loop(  # noqa: E731
        lambda x: x.sum() < 3, lambda x: 2 * note(x), x
    )
    return lambda x: jax.linearize(loop, x)[0]


@pytest.mark.parametrize(
    ("make", "want"),
    [
        (looping, [2.0, 3.0]),
        (branching, [1.0, 3.0]),
        (checkpointing, np.cos([0.5, 1.5])),
        (linearizing, [1.0, 3.0]),
    ],
)
def test_a_call_without_results_that_is_refused_says_what_to_write(make, want, transform):
    x = jnp.array([0.5, 1.5])
    remedy = "jax.debug.callback, since it returns nothing, .* " + re.escape(
        "x = py_func(lambda x: (print(x), x)[1], [x], x)"
    )
    refused = transform(make(lambda x: (py_func(lambda x: None, [x], []), x)[1]))
    with pytest.raises(NotImplementedError, match=remedy):
        refused(x)
    for note in (
        lambda x: (jax.debug.callback(lambda x: None, x), x)[1],
        lambda x: py_func(lambda x: (print(x), x)[1], [x], x),
    ):
        got = transform(make(note))(x)
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_how_often_a_batched_loop_is_searched(monkeypatch):
    """Not at all if no call is stateful; otherwise until nothing new is batched."""
    looked = []
    batched = loops._batched

    def counting(*args):
        looked.append(args)
        return batched(*args)

    def loop(call):
        body = lambda c: (c[0] + 1, *[x + call(1.0) for x in c[1:]])  # noqa: E731
        return lambda *c: jax.lax.while_loop(lambda c: c[0] < 3, body, c)

    monkeypatch.setattr(loops, "_batched", counting)
    f = py_func(lambda x: x, Tout=f32, stateful=True)
    for call, looks in ((lambda x: x, 0), (f, 2)):
        program = jax.vmap(loop(call), (None, 0, *[None] * 9))
        got = program(0, jnp.ones(2), *[1.0] * 9)
        assert [x.tolist() for x in got] == [[3, 3], *[[4.0, 4.0]] * 10]
        assert len(looked) == looks
        looked.clear()


def returning(y, log):
    log(y.sum(0))
    return y


def summed_in_one_of_its_own(y, log):
    jax.jit(lambda y: log(y.sum(0)))(y)
    return y


def behind_others(y, log):
    z = jnp.sqrt(1 + abs(y @ y))
    log(jnp.tanh((z * y).sum(0)))
    return y


def summed_in_part(y, log):
    log(y.sum(0)[0])
    return y


def summed_where_it_is_made(y, log):
    y, sums = jax.jit(lambda y: (y * 2, (y * 2).sum(0)))(y)
    log(sums)
    return y


def summed_as_another_dtype(y, log):
    y = (100 * y).astype(jnp.int8)
    log(y.astype(jnp.float32).sum(0))
    return y


def summed_with_others(y, log):
    row = y[0] * 2
    log((y * row).sum(1))
    return row


def twice(y, log):
    log(y.sum(0))
    return returning(y * 3, log)


def in_a_loop(y, log):
    return jax.lax.while_loop(lambda y: y[-1, -1] < 5, lambda y: returning(y * 2, log), y)


@pytest.mark.parametrize("made", [lambda x: x @ x, lambda x: x * 2, jax.nn.relu])
@pytest.mark.parametrize(
    "logging",
    [
        returning, summed_in_one_of_its_own, summed_in_part, summed_where_it_is_made,
        summed_as_another_dtype, summed_with_others, behind_others, twice, in_a_loop,
    ],
)  # fmt: skip
def test_a_call_on_a_reduction_of_all_that_is_returned(made, logging):
    """XLA fails to compile these (`RET_CHECK ... IsDead`), but for `sample_of_returned`."""
    x = jnp.linspace(0, 1, 360_000).reshape(600, 600) / 10
    seen, expected = [], []

    @py_func(Tout=[], stateful=True)
    def log(value):
        seen.append(np.asarray(value))

    result = jax.jit(lambda x: logging(made(x), log))(x)
    jax.effects_barrier()
    with jax.disable_jit():
        answer = logging(made(x), expected.append)
    np.testing.assert_allclose(result, answer, rtol=1e-5)
    np.testing.assert_allclose(
        sorted(seen, key=np.sum), sorted(expected, key=np.sum), rtol=1e-4
    )


def test_the_workaround_costs_little():
    """An element of what is reduced and might be returned, once for each."""
    log = py_func(lambda value: None, Tout=[], stateful=True)

    def elements(program):
        return jax.jit(program).lower(jnp.ones((64, 64))).as_text().count("stablehlo.slice")

    def chain(x):
        for _ in range(50):
            x = jnp.sin(x)
        log(x)
        return x

    def steps(x):
        for _ in range(20):
            x = jnp.tanh(x @ x)
            log(x.mean())
        return x

    assert elements(chain) == 0
    assert elements(steps) <= 21
    assert elements(lambda x: (steps(x), x)) == 0
