"""The tape cache: how often bodies run, tickets, the limit."""

import functools
import gc
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import log_huber
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from programs import run_program

import jpyfunc.tf1 as tf
from jpyfunc import (
    TapeLostError,
    profile,
    py_func,
    raise_original,
    set_tape_limit,
    tape_bytes,
)

f32 = jax.ShapeDtypeStruct((), jnp.float32)


@pytest.fixture
def no_tape_cached():
    before = set_tape_limit(0)
    yield
    set_tape_limit(before)


@pytest.fixture
def runs():
    return []


@pytest.fixture
def counted(runs):
    """log_huber of one argument, which counts its runs."""

    def body(x):
        runs.append(1)
        return log_huber(x, 2.0)

    return py_func(body, Tout=f32)


def plain(x):
    return log_huber(x, 2.0)


def looped(f):
    def program(x):
        return jax.lax.scan(lambda c, _: (f(c) * 0.5 + 1, f(c)), x, None, length=4)[1].sum()

    return program


def looped_plain(x):
    total = 0.0
    for _ in range(4):
        total, x = total + plain(x), plain(x) * 0.5 + 1
    return total


ROW = jnp.arange(1, 4.0)
ONCE = {
    "value_and_grad": (jax.value_and_grad, 1),
    "grad": (jax.grad, 1),
    "vjp": (lambda f: lambda x: jax.vjp(f, x)[1](1.0)[0], 1),
    "jvp": (lambda f: lambda x: jax.jvp(f, (x,), (1.0,)), 1),
    "linearize": (lambda f: lambda x: jax.linearize(f, x)[1](2.0), 1),
    "jacrev": (jax.jacrev, 1),
    "jacfwd": (jax.jacfwd, 1),
    "hessian": (jax.hessian, 1),
    "rev_rev": (lambda f: jax.grad(jax.grad(f)), 1),
    "fwd_fwd": (lambda f: jax.jacfwd(jax.jacfwd(f)), 1),
    "third": (lambda f: jax.grad(jax.grad(jax.grad(f))), 1),
    "vmap": (lambda f: lambda x: jax.vmap(jax.value_and_grad(f))(x * ROW), 2),
    "vmap_hessian": (lambda f: lambda x: jax.vmap(jax.hessian(f))(x * ROW), 2),
    "grad_of_vmap": (lambda f: jax.grad(lambda x: jax.vmap(f)(x * ROW).sum()), 2),
    "cond": (lambda f: jax.grad(lambda x: jax.lax.cond(x > 0, f, jnp.sin, x)), 1),
    "switch": (lambda f: jax.grad(lambda x: jax.lax.switch(1, [jnp.sin, f], x)), 1),
}  # fmt: skip


@pytest.mark.parametrize("x", [0.7, 1.6])
@pytest.mark.parametrize("take", ONCE)
def test_a_body_runs_once_per_execution(take, x, counted, runs, transform):
    derivative, times = ONCE[take]
    program = transform(derivative(counted))
    got = jax.block_until_ready(program(x))
    assert len(runs) == times
    before = set_tape_limit(0)
    again = jax.block_until_ready(program(x))
    set_tape_limit(before)
    assert len(runs) >= 3 * times  # and once more for each derivative
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, again)


@pytest.mark.parametrize("x", [0.7, 1.6])
def test_a_scan_of_t_steps_runs_t_times(x, counted, runs, transform):
    f = transform(jax.value_and_grad(looped(counted)))
    got = jax.block_until_ready(f(x))
    assert len(runs) == 8  # two calls in each of four steps
    want = jax.value_and_grad(looped_plain)(x)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_while_loop_forward_runs_once_per_iteration(counted, runs, transform):
    def program(f):
        return lambda x: jax.lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, f(c[1]) * 0.5), (0, x)
        )[1]

    got = transform(jax.jacfwd(program(counted)))(1.5)
    assert len(runs) == 3

    def by_hand(x):
        for _ in range(3):
            x = plain(x) * 0.5
        return x

    np.testing.assert_allclose(got, jax.grad(by_hand)(1.5), rtol=1e-5)


def test_checkpoint_runs_it_twice_and_caches_one_tape(counted, runs, transform):
    """Checkpoint asks for that; the first pass leaves no tape."""
    f = transform(jax.value_and_grad(jax.checkpoint(counted)))
    with profile() as prof:
        value, slope = jax.block_until_ready(f(1.5))
    np.testing.assert_allclose((value, slope), jax.value_and_grad(plain)(1.5), rtol=1e-6)
    assert len(runs) == 2
    if transform is jax.jit:
        assert prof.as_dict()["body"]["vjp"]["from_tape"] == 1
        one = prof.as_dict()["body"]["forward"]["tape_bytes"]
        jax.block_until_ready(transform(jax.grad(counted))(1.5))
        assert prof.as_dict()["body"]["forward"]["tape_bytes"] == 2 * one > 0


def test_a_run_that_no_derivative_needs_leaves_no_tape(counted):
    with profile() as prof:
        program = jax.jit(lambda x: jax.value_and_grad(counted)(x)[0])
        np.testing.assert_allclose(program(1.5), plain(1.5), rtol=1e-6)
    assert prof.as_dict()["body"]["forward"]["tape_bytes"] == 0


def test_sharded_jit_and_shard_map(counted, runs):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("d"))
    x = jax.device_put(jnp.arange(1.0, 5.0), sharding)
    f = py_func(
        lambda x: runs.append(1) or (jnp.sin(x) if x.sum() > 0 else x), Tout=lambda x: x
    )
    got = jax.jit(jax.grad(lambda x: f(x).sum()))(x)
    np.testing.assert_allclose(got, np.cos(x), rtol=1e-5)
    assert len(runs) == 1
    runs.clear()
    mapped = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec("d")
    )
    got = jax.jit(jax.grad(lambda x: mapped(f)(x).sum()))(x)
    np.testing.assert_allclose(got, np.cos(x), rtol=1e-5)
    assert len(runs) == 4


def test_a_graphs_gradients_run_it_once(runs):
    with tf.Graph().as_default(), tf.Session() as sess:
        x = tf.placeholder(jnp.float32, ())
        y = py_func(lambda x: runs.append(1) or x**3, [x], f32)
        (slope,) = tf.gradients(y, x)
        (curvature,) = tf.gradients(slope, x)
        assert sess.run([y, slope, curvature], {x: 2.0}) == [8, 12, 12]
    assert len(runs) == 1


def test_one_linearization_is_used_many_times(counted, runs, transform):
    pullback = transform(lambda x: jax.vjp(counted, x)[1])(1.5)
    for _ in range(3):
        np.testing.assert_allclose(pullback(1.0)[0], jax.grad(plain)(1.5), rtol=1e-6)
    assert len(runs) == 1


@pytest.mark.parametrize("stateful", [False, True])
def test_mixed_partial_derivatives_run_it_once(stateful, runs, transform):
    """One tape serves all operands that any of the derivatives is taken with respect to."""

    @py_func(Tout=f32, stateful=stateful)
    def f(x, y):
        runs.append(1)
        return jnp.sin(x) * y**3

    for by_x in (jax.grad, jax.jacfwd):
        for by_y in (jax.grad, jax.jacfwd):
            runs.clear()
            got = jax.block_until_ready(transform(by_y(by_x(f, 0), 1))(0.7, 1.3))
            np.testing.assert_allclose(got, np.cos(0.7) * 3 * 1.3**2, rtol=1e-5)
            assert len(runs) == 1


def test_a_pullback_differentiated_with_respect_to_other_operands(transform):
    """Its tape does not have that operand, so the body runs again."""
    f = py_func(lambda x, y: jnp.sin(x) * y**3, Tout=f32)
    x, y = jnp.float32(0.7), jnp.float32(1.3)
    leaves, tree = jax.tree.flatten(
        transform(lambda x: jax.vjp(lambda x: f(x, y), x)[1])(x)
    )
    (place,) = [i for i, leaf in enumerate(leaves) if leaf.shape == () and leaf == y]

    def pulled_back(y):
        return tree.unflatten([*leaves[:place], y, *leaves[place + 1 :]])(1.0)[0]

    for take in (jax.grad, jax.jacfwd):
        np.testing.assert_allclose(
            transform(take(pulled_back))(y), np.cos(0.7) * 3 * 1.3**2, rtol=1e-5
        )


# Stateful bodies


@pytest.mark.parametrize("options", [{"stateful": True}, {"ordered": True}], ids=str)
def test_a_stateful_body_is_differentiated_where_it_was_evaluated(options, transform):
    rng = np.random.default_rng(0)
    drawn = []

    def body(x):
        drawn.append(rng.normal())
        return x * drawn[-1] + x**2

    f = transform(jax.value_and_grad(py_func(body, Tout=f32, **options)))
    for x in (1.0, 2.0, 3.0):
        value, slope = jax.block_until_ready(f(x))
        np.testing.assert_allclose(value, x * drawn[-1] + x**2, rtol=1e-5)
        np.testing.assert_allclose(slope, drawn[-1] + 2 * x, rtol=1e-5)
    assert len(drawn) == 3


@pytest.mark.parametrize("take", [jax.grad, jax.jacfwd, jax.hessian])
def test_a_stateful_run_whose_tape_was_evicted_is_not_repeated(
    take, runs, transform, no_tape_cached
):
    f = py_func(lambda x: runs.append(1) or x**2, Tout=f32, stateful=True, name="step")
    program = transform(take(f))
    with (
        pytest.raises(TapeLostError, match=r"'step' is stateful.*set_tape_limit") as info,
        raise_original(),
    ):
        jax.block_until_ready(program(3.0))
    assert str(info.value).count("\n") == 1  # before the heading
    assert len(runs) == 1
    set_tape_limit(2**20)
    assert program(3.0) == (2.0 if take is jax.hessian else 6.0)


def test_a_branch_not_taken_under_vmap_of_cond_runs_nothing_for_its_derivative(runs):
    f = py_func(lambda x: runs.append(float(jax.lax.stop_gradient(x))) or x**2, Tout=f32)
    xs = jnp.array([1.0, -2.0, 3.0])
    take = jax.vmap(jax.grad(lambda x: jax.lax.cond(x > 0, f, jnp.sin, x)))
    np.testing.assert_allclose(jax.jit(take)(xs), [2, np.cos(-2), 6], rtol=1e-6)
    assert sorted(runs) == [-2.0, 1.0, 3.0]  # the forward runs both branches of a select


@pytest.mark.parametrize("vmap_method", ["expand_dims", "broadcast_all"])
def test_derivatives_of_a_stateful_run_of_a_whole_batch(vmap_method, runs, transform):
    def body(x):
        runs.append(1)
        return jnp.sin(x) * x

    f = py_func(body, Tout=lambda x: x, stateful=True, vmap_method=vmap_method)
    x = jnp.array([0.5, 0.3, 2.0])
    want = jnp.diag(jnp.cos(x) * x + jnp.sin(x))
    for take in (jax.jacrev(f), jax.jacfwd(f), jax.jacrev(jax.vmap(f))):
        runs.clear()
        np.testing.assert_allclose(transform(take)(x), want, rtol=1e-5)
        assert len(runs) == 1


# Tickets


def test_tickets_are_of_elements_in_their_order(transform):
    """A whole batch is one run; a subset of it, or another order, is not that run."""
    f = py_func(
        lambda x: jnp.sin(x) * x, Tout=lambda x: x, vmap_method="broadcast_all"
    )  # fmt: skip
    xs = jnp.arange(1.0, 5.0)
    pullbacks = transform(jax.vmap(lambda x: jax.vjp(f, x)[1]))(xs)
    want = np.cos(xs) * xs + np.sin(xs)

    def apply(pullbacks, cotangents):
        return transform(jax.vmap(lambda p, ct: p(ct)[0]))(pullbacks, cotangents)

    ones = jnp.ones(4)
    np.testing.assert_allclose(apply(pullbacks, ones), want, rtol=1e-5)
    flipped = jax.tree.map(lambda r: r[::-1], pullbacks)
    np.testing.assert_allclose(apply(flipped, ones), want[::-1], rtol=1e-5)
    order = np.array([0, 2, 1, 2])  # the first one stays
    swapped = jax.tree.map(lambda r: r[order], pullbacks)
    np.testing.assert_allclose(apply(swapped, ones), want[order], rtol=1e-5)
    for half in (slice(1, 3), slice(2)):
        some = jax.tree.map(lambda r, half=half: r[half], pullbacks)
        np.testing.assert_allclose(apply(some, ones[:2]), want[half], rtol=1e-5)
    for i in (0, 2):
        one = jax.tree.map(lambda r, i=i: r[i], pullbacks)
        np.testing.assert_allclose(one(1.0)[0], want[i], rtol=1e-5)


def test_tickets_of_a_batch_may_be_permuted(counted, runs):
    xs = jnp.array([1.0, 3.0, 1.5])
    pullbacks = jax.jit(jax.vmap(lambda x: jax.vjp(counted, x)[1]))(xs)
    order = jnp.array([2, 0, 1])
    permuted = jax.tree.map(lambda r: r[order], pullbacks)
    got = jax.jit(jax.vmap(lambda p: p(1.0)[0]))(permuted)
    np.testing.assert_allclose(got, [jax.grad(plain)(x) for x in xs[order]], rtol=1e-5)
    assert len(runs) == 2  # one for each branch taken


RESIDUALS = """
    import pickle, sys
    import jax, jax.numpy as jnp, numpy as np
    from jpyfunc import py_func

    runs = []
    def body(x, a):
        runs.append(1)
        return a * x**2 if x > 0 else x

    f = py_func(body, Tout=jax.ShapeDtypeStruct((), jnp.float32))
    _, pullback = jax.vjp(f, jnp.float32(X), jnp.float32(A))
    leaves, tree = jax.tree.flatten(pullback)
"""


def test_a_ticket_of_another_process_finds_no_tape(tmp_path):
    """Residuals are saved here and loaded there, where runs have the same numbers."""
    path = tmp_path / "residuals"
    save = RESIDUALS.replace("X", "3.0").replace("A)", "5.0)")
    run_program(
        save
        + f"\n    pickle.dump([np.asarray(x) for x in leaves], open({str(path)!r}, 'wb'))",
        limit=60,
    )
    load = RESIDUALS.replace("X", "1.0").replace("A)", "1.0)")
    out = run_program(
        load
        + f"""
    with open({str(path)!r}, "rb") as file:
        loaded = pickle.load(file)
    assert len(loaded) == len(leaves)
    runs.clear()
    print(*jax.tree.unflatten(tree, loaded)(1.0), len(runs))
    """,
        limit=60,
    )
    assert out.split() == ["30.0", "9.0", "1"]


def test_a_forked_child_does_not_take_its_parents_tickets():
    out = run_program(
        """
        import os
        import numpy as np
        from jpyfunc._runtime.tape_cache import tapes
        first = tapes.store(None, print, ())
        pid = os.fork()
        if not pid:
            again = tapes.store(None, print, ())
            print((first[:2] != again[:2]).any(), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
        """,
        limit=60,
    )
    assert out.strip() == "True"


# The limit


@pytest.fixture
def limit():
    """Sets the limit for one test."""
    before = set_tape_limit(0)
    set_tape_limit(before)
    yield set_tape_limit
    set_tape_limit(before)


def test_waiting_tapes_are_counted_in_bytes_and_shared_arrays_once():
    weight = jnp.ones((256, 256))  # 256 KiB
    f = py_func(lambda x: (weight @ x).sum(), Tout=f32, name="shares")
    x = jnp.ones(256)
    at_first = tape_bytes()
    with profile() as prof:
        pullbacks = [jax.vjp(f, x)[1]]
        one = tape_bytes() - at_first
        counts = prof.as_dict()["shares"]
        assert counts["forward"]["tape_bytes"] == one
        pullbacks.append(jax.vjp(f, x)[1])
    two = prof.as_dict()["shares"]["forward"]["tape_bytes"]
    assert one > 2**18
    assert one < two < one + 2**16
    assert tape_bytes() == at_first + two
    for pullback in pullbacks:
        np.testing.assert_allclose(pullback(1.0)[0], 256.0)
    del f, pullbacks, pullback
    assert tape_bytes() <= at_first


def test_the_tape_that_waits_longest_is_evicted_first(runs, limit):
    def body(x):
        runs.append(1)
        return (jnp.sin(x) * x).sum()

    f, x = py_func(body, Tout=f32), jnp.ones(2**14)  # 64 KiB an array
    limit(2**19)
    a, b, c = (jax.vjp(f, x * i)[1] for i in (1, 2, 3))
    assert len(runs) == 3
    b(1.0), c(1.0)
    assert len(runs) == 3
    np.testing.assert_allclose(a(1.0)[0], np.cos(1) + np.sin(1), rtol=1e-5)
    assert len(runs) == 4


def test_a_spent_tape_is_evicted_before_waiting_ones(runs, limit):
    def body(x):
        runs.append(1)
        return (jnp.sin(x) * x).sum()

    x = jnp.ones(2**16)  # 256 KiB an array
    limit(2**21)
    spent = jax.vjp(py_func(body, Tout=f32, stateful=True), jnp.tile(x, 2))[1]
    for _ in range(2):  # the last one of a stateful body stays
        np.testing.assert_allclose(spent(1.0)[0], np.cos(1) + np.sin(1), rtol=1e-5)
    pullbacks = [jax.vjp(py_func(body, Tout=f32), x * i)[1] for i in (1, 2)]
    for i, pullback in enumerate(pullbacks, 1):
        np.testing.assert_allclose(pullback(1.0)[0], i * np.cos(i) + np.sin(i), rtol=1e-5)
    assert len(runs) == 3


def test_a_waiting_tape_that_was_used_is_evicted_after_others(limit):
    f = py_func(lambda x: (jnp.sin(x) * x).sum(), Tout=f32, stateful=True)
    x = jnp.ones(2**14)  # 64 KiB an array
    limit(2**19)
    a, b = (jax.vjp(f, x * i)[1] for i in (1, 2))
    _, jvp = jax.linearize(a, 1.0)  # uses its tape once more
    c = jax.vjp(f, x * 3)[1]
    for i, pullback in ((1, jvp), (3, c)):
        np.testing.assert_allclose(pullback(1.0)[0], i * np.cos(i) + np.sin(i), rtol=1e-5)
    with pytest.raises(TapeLostError):
        b(1.0)


def test_a_tape_is_dropped_once_its_derivative_has_been_taken(limit, transform):
    limit(2**30)
    at_first = tape_bytes()
    f = py_func(lambda x: (jnp.sin(x) * x).sum(), Tout=f32)
    large = jnp.arange(2.0**20)
    slope = transform(jax.grad(f))(large)
    np.testing.assert_allclose(slope[:9], (jnp.cos(large) * large + jnp.sin(large))[:9])
    small = transform(jax.grad(f))
    for i in range(1000):
        small(jnp.full(100, i / 7))
    assert tape_bytes() <= at_first + 2**22
    _, _pull = jax.vjp(f, large)
    assert tape_bytes() >= at_first + 2**22


@pytest.mark.parametrize("size", [1, 2**20])  # elements: a small tape, and a large one
def test_a_pullback_is_called_again_after_others(size, limit, transform):
    """If its spent tape has been evicted, a pure body runs again with the same result."""
    limit(2**30)
    rng = np.random.default_rng(0)
    drawn = []

    def draws(x):
        drawn.append(np.float32(rng.normal()))
        return (x**2 * drawn[-1]).sum()

    pure = py_func(lambda x: (x**3).sum(), Tout=f32)
    stateful = py_func(draws, Tout=f32, stateful=True)
    x = jnp.full(size, 2.0)
    pullbacks = {f: transform(lambda x, f=f: jax.vjp(f, x)[1])(x) for f in (pure, stateful)}
    for _ in range(3):
        np.testing.assert_allclose(pullbacks[pure](1.0)[0][0], 12.0, rtol=1e-6)
        np.testing.assert_allclose(pullbacks[stateful](1.0)[0][0], 4 * drawn[0], rtol=1e-6)
        for _ in range(20):
            jax.block_until_ready(transform(jax.grad(pure))(x))
    assert len(drawn) == 1


@pytest.mark.parametrize(
    "take",
    [
        lambda f, x: jax.jacrev(jax.grad(f))(x),
        lambda f, x: jax.jvp(jax.grad(f), (x,), (jnp.ones_like(x),))[1],
        lambda f, x: jax.grad(lambda x: jax.grad(f)(x).sum())(x),
    ],
    ids=["jacrev", "jvp_of_grad", "grad_of_grad"],
)
def test_a_second_derivative_finds_the_tape_that_the_first_has_used(take, limit, transform):
    """The bodies are stateful and cannot run again; in a scan, several tapes wait."""
    f = py_func(lambda c: jnp.sin(c) * c, Tout=lambda c: c, stateful=True)
    limit(2**16)  # no room for spent tapes

    def program(f, x):
        return jax.lax.scan(lambda c, _: (f(c), None), x, None, length=3)[0].sum()

    x = jnp.array([0.5, 0.7])
    got = transform(lambda x: take(lambda x: program(f, x), x))(x)
    want = take(lambda x: program(lambda c: jnp.sin(c) * c, x), x)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_lowering_the_limit_frees_at_once(limit):
    f = py_func(lambda x: jnp.sin(x).sum(), Tout=f32, name="freed")
    x = jnp.ones(2**20)
    before = tape_bytes()
    pullback = jax.vjp(f, x)[1]
    assert tape_bytes() > before + 2**22
    limit(0)
    assert tape_bytes() == 0
    with profile() as prof:
        np.testing.assert_allclose(pullback(1.0)[0][0], np.cos(1.0), rtol=1e-6)
    assert prof.as_dict()["freed"]["vjp"]["reran"] == 1


@pytest.mark.parametrize("wrong", [-1, 1.5, "1 GiB", True, None])
def test_a_wrong_limit_says_what_to_write(wrong):
    with pytest.raises(ValueError, match=r"set_tape_limit: expected nbytes.*2\*\*30"):
        set_tape_limit(wrong)
    before = set_tape_limit(2**20)
    assert set_tape_limit(before) == 2**20


def test_a_tape_larger_than_the_limit_is_not_cached(runs):
    before = set_tape_limit(2**16)
    f = py_func(lambda x: runs.append(1) or (x**2).sum(), Tout=f32)
    got = jax.jit(jax.grad(f))(jnp.ones(2**16))
    set_tape_limit(before)
    assert got[0] == 2.0
    assert len(runs) == 2


def test_an_exception_halfway_leaves_no_tape_and_nothing_broken(transform):
    def body(x):
        y = jnp.sin(x)
        if x > 1:
            raise ValueError("half-way")
        return y

    f = transform(jax.grad(py_func(body, Tout=f32)))
    for _ in range(3):
        with pytest.raises(ValueError, match="half-way"), raise_original():
            jax.block_until_ready(f(2.0))
        np.testing.assert_allclose(f(0.5), np.cos(0.5), rtol=1e-6)


def test_a_training_loop_does_not_grow():
    """The steps leave scalars, arrays and objects for the derivative."""
    out = run_program(
        """
        from programs import resident
        import jax, jax.numpy as jnp, numpy as np, jpyfunc

        scalar = jax.ShapeDtypeStruct((), jnp.float32)

        class Factors:
            def __init__(self):
                self.data = np.ones(2**12)

        def body(x):
            return (jnp.sin(x) * x).sum() if x[0] > 0 else x.sum()

        pure = jpyfunc.py_func(body, Tout=scalar)
        stateful = jpyfunc.py_func(body, Tout=scalar, stateful=True)
        rules = jpyfunc.numpy_func(lambda x: x.sum(), Tout=scalar)
        rules.defvjp(lambda x: (x.sum(), Factors()), lambda r, g: (g * np.ones(999),))
        x = jnp.ones(999)
        for f in (pure, stateful, rules):
            step = jax.jit(jax.value_and_grad(f))

            def run(n):
                for _ in range(n):
                    jax.block_until_ready(step(x))

            run(1500)  # to what spent tapes may hold
            before = resident()
            run(1500)
            print(resident() - before)
        """,
        limit=240,
    )
    assert max(map(int, out.split())) < 3 * 2**20


def test_memory_stays_under_the_limit():
    """The backward passes never run, as in tensorflow/tensorflow#35010."""
    out = run_program(
        """
        from programs import resident
        import gc, os
        import jax, jax.numpy as jnp, jpyfunc

        jpyfunc.set_tape_limit(2**24)
        f = jpyfunc.py_func(lambda x: jnp.sin(x) * x if x > 0 else x, Tout=jnp.float32)
        big = jpyfunc.py_func(lambda x: jnp.sin(x).sum(), Tout=jnp.float32)
        forward = jax.jit(lambda x: jax.vjp(f, x)[1])
        wide = jax.jit(lambda x: jax.vjp(big, x)[1])
        ones = jnp.ones(10_000)

        def run(n):
            for i in range(n):
                forward(float(i % 7))
                if i % 10 == 0:
                    jax.block_until_ready(wide(ones))

        run(3000)
        before = resident()
        run(5000)
        print(resident() - before)
        """,
        limit=240,
    )
    assert int(out) < 5000 * 2**10


def test_an_evicted_tape_leaves_nothing_behind():
    """Not even its name: the function lives on, and may run for days."""
    f = py_func(lambda x: jnp.sin(x), Tout=f32)
    forward = jax.jit(lambda x: jax.vjp(f, x)[1])

    def allocated(n):
        for _ in range(n):
            jax.block_until_ready(forward(1.0))  # or some are in flight at the end
        # It holds thousands of the strings that C++ made to read attributes, by their
        # addresses: the busier the machine, the more.
        sys._clear_type_cache()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    before = set_tape_limit(2**16)
    tracemalloc.start()
    try:
        start = allocated(400)
        assert allocated(1000) - start < 1000 * 30
    finally:
        tracemalloc.stop()
        set_tape_limit(before)


def test_a_small_tape_counts_at_least_what_it_takes():
    """Otherwise many small arrays could exceed a limit of n bytes."""
    out = run_program(
        """
        from programs import resident
        import gc, os
        import jax, jax.numpy as jnp, jpyfunc

        f = jpyfunc.py_func(lambda x: jnp.sin(x) * x if x > 0 else x, Tout=jnp.float32)
        forward = jax.jit(lambda x: jax.vjp(f, x)[1])
        def run(n):
            for i in range(n):
                jax.block_until_ready(forward(float(i % 7 + 1)))

        run(1000)
        before, held = resident(), jpyfunc.tape_bytes()
        run(3000)
        print((resident() - before) / (jpyfunc.tape_bytes() - held))
        """,
        limit=120,
    )
    assert 0.05 < float(out) < 1.0
