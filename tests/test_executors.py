"""Host functions on executors: threads, processes, loky and a dask cluster."""

import contextlib
import gc
import multiprocessing
import pickle
import threading
import time
import weakref
from concurrent.futures import (
    BrokenExecutor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)

import distributed
import jax
import jax.numpy as jnp
import loky
import numpy as np
import pytest
import simulators
from programs import ROOT, run_program
from simulators import SimulationError, same

import jpyfunc
from jpyfunc import ExecutorError, numpy_func, py_func
from jpyfunc._runtime import in_flight

F32 = jax.ShapeDtypeStruct((), jnp.float32)
I32 = jax.ShapeDtypeStruct((), jnp.int32)


def process_pool(method):
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method))


@contextlib.contextmanager
def dask_pool():
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client.get_executor()


POOLS = {
    "threads": lambda: ThreadPoolExecutor(2),
    "spawn": lambda: process_pool("spawn"),
    "forkserver": lambda: process_pool("forkserver"),
    "loky": lambda: loky.ProcessPoolExecutor(2),
    "dask": dask_pool,
}


@pytest.fixture(scope="module", params=POOLS)
def pool(request):
    """An executor of each kind, with two workers."""
    with POOLS[request.param]() as executor:
        yield executor


@pytest.fixture
def threads():
    with ThreadPoolExecutor(8) as executor:
        yield executor


@contextlib.contextmanager
def raises(kind, match):
    """`pytest.raises`, for the exception of a body itself."""
    with pytest.raises(kind, match=match) as raised, jpyfunc.raise_original():
        yield raised


def is_in_process(pool):
    return isinstance(pool, ThreadPoolExecutor)


# --- Every executor.


def test_batches_and_single_calls(pool, transform):
    f = numpy_func(simulators.sine, Tout=same, executor=pool, chunksize=2)
    x = jnp.arange(5.0)
    np.testing.assert_allclose(transform(jax.vmap(f))(x), jnp.sin(x), rtol=1e-6)
    np.testing.assert_allclose(transform(f)(x), jnp.sin(x), rtol=1e-6)
    pairs = jnp.arange(6.0).reshape(2, 3)
    nested = transform(jax.vmap(jax.vmap(f)))(pairs)
    np.testing.assert_allclose(nested, jnp.sin(pairs), rtol=1e-6)


def test_scan(pool):
    f = numpy_func(simulators.sine, Tout=same, executor=pool)
    last, _ = jax.jit(lambda x: jax.lax.scan(lambda c, _: (f(c), c), x, length=3))(2.0)
    np.testing.assert_allclose(last, np.sin(np.sin(np.sin(2.0))), rtol=1e-6)


def test_rules(pool, transform):
    f = numpy_func(simulators.sine, Tout=same, executor=pool, chunksize=3)
    f.defvjp(simulators.sine_fwd, simulators.sine_bwd)
    f.defjvp(simulators.sine_jvp)
    x = jnp.arange(4.0)
    slopes = transform(jax.vmap(jax.grad(f)))(x)
    np.testing.assert_allclose(slopes, jnp.cos(x), rtol=1e-6)
    pullback = transform(jax.grad(lambda x: jax.vmap(f)(x).sum()))(x)
    np.testing.assert_allclose(pullback, jnp.cos(x), rtol=1e-6)
    tangents = transform(lambda x: jax.jvp(jax.vmap(f), (x,), (x,))[1])(x)
    np.testing.assert_allclose(tangents, x * jnp.cos(x), rtol=1e-6)


def test_results_are_in_order(pool):
    f = numpy_func(simulators.slow_at_first, Tout=F32, executor=pool)
    np.testing.assert_array_equal(jax.jit(jax.vmap(f))(jnp.arange(8.0)), np.arange(8.0))


@pytest.mark.parametrize("chunksize", [1, 3])
def test_first_failure_in_order(pool, chunksize):
    f = numpy_func(
        simulators.fails_from_three, Tout=same, executor=pool, chunksize=chunksize
    )
    program = jax.jit(jax.vmap(jax.vmap(f)))
    with raises(SimulationError, r"^diverged at 3\.0") as raised:
        program(jnp.arange(8.0).reshape(4, 2)).block_until_ready()
    (note,) = raised.value.__notes__
    assert "on element (1, 1) of a batch of 4 x 2" in note
    if not is_in_process(pool):
        assert "in fails_from_three" in str(raised.value.__cause__)
    x = jnp.zeros((4, 2))
    np.testing.assert_array_equal(program(x), x)


def test_text_of_a_failure(pool):
    f = numpy_func(simulators.fails_from_three, Tout=same, executor=pool)
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        jax.jit(f)(4.0).block_until_ready()
    text = str(raised.value)
    assert "diverged at 4.0" in text
    assert "in fails_from_three" in text
    assert "jpyfunc/_" not in text.partition("numpy_func 'fails_from_three'")[2]


def test_results_are_checked(pool):
    wrong = jax.ShapeDtypeStruct((), jnp.bool_)
    f = numpy_func(simulators.process, Tout=wrong, executor=pool)
    with raises(jpyfunc.ResultError, "expected bool") as raised:
        jax.jit(jax.vmap(f))(jnp.zeros(2)).block_until_ready()
    assert "on element 0" in raised.value.__notes__[0]


def test_functions_with_decorators(pool):
    """Their names lead to what the decorators return."""
    x = jnp.arange(3.0)
    for func in (
        simulators.shadowed.__wrapped__,
        simulators.shadowed_twice.__wrapped__.__wrapped__,
    ):
        f = numpy_func(func, Tout=same, executor=pool)
        np.testing.assert_allclose(jax.vmap(f)(x), jnp.sin(x), rtol=1e-6)
    f = numpy_func(
        simulators.Model.scaled.__wrapped__, Tout=lambda self, x: x, executor=pool
    )
    model = simulators.Model()
    np.testing.assert_array_equal(jax.vmap(lambda x: f(model, x))(x), 2 * x)


def test_the_callers_configuration_is_in_force(pool):
    f = numpy_func(simulators.in_x64, Tout=I32, executor=pool)
    assert jax.jit(f)(1.0) == 4
    with jax.enable_x64(True):
        assert jax.jit(f)(1.0) == 8


def test_a_function_calls_a_program(pool):
    f = numpy_func(simulators.calls_a_program, Tout=F32, executor=pool)
    x = jnp.arange(4.0)
    want = 3 * jnp.sin(x)
    np.testing.assert_allclose(jax.jit(jax.vmap(f))(x), want, rtol=1e-6)


def test_lambdas(pool):
    f = numpy_func(lambda x: x + 1, Tout=same, executor=pool)
    if type(pool) is not ProcessPoolExecutor:
        np.testing.assert_array_equal(jax.jit(jax.vmap(f))(jnp.arange(3.0)), [1, 2, 3])
        return
    with raises(ExecutorError, r"function cannot be pickled.*loky"):
        jax.jit(jax.vmap(f))(jnp.arange(3.0)).block_until_ready()


def test_what_cannot_be_pickled(pool):
    if is_in_process(pool):
        pytest.skip("nothing is pickled")
    f = numpy_func(simulators.returns_lock, Tout=same, executor=pool)
    with raises(ExecutorError, "what it returned cannot be pickled") as raised:
        jax.jit(jax.vmap(f))(jnp.arange(3.0)).block_until_ready()
    assert "on element 0" in raised.value.__notes__[0]
    f = numpy_func(simulators.fails_unpicklably, Tout=same, executor=pool)
    # Cloudpickle, which dask's workers import, sends it.
    kinds = (ExecutorError, simulators.UnpicklableError)
    with raises(kinds, "lost again") as raised:
        jax.jit(f)(1.0).block_until_ready()
    assert "in fails_unpicklably" in str(raised.value.__cause__)


def test_each_call_of_a_stateful_function_runs(pool):
    """Dask runs equal tasks once, unless they have different names."""
    f = numpy_func(simulators.counted, Tout=I32, executor=pool, stateful=True)
    program = jax.jit(jax.vmap(f))
    numbers = {(int(n)) for _ in range(2) for n in program(jnp.zeros(4))}
    assert len(numbers) == 8


# --- Threads.


def test_a_batch_fills_the_pool(threads):
    """All elements have to run at once, nested batches, too."""
    barrier = threading.Barrier(8, timeout=10)

    def body(x):
        barrier.wait()
        return x

    f = numpy_func(body, Tout=same, executor=threads)
    jax.jit(jax.vmap(jax.vmap(f)))(jnp.zeros((2, 4))).block_until_ready()
    f.defvjp(lambda x: (body(x), None), lambda _, g: (body(g),))
    slopes = jax.jit(jax.vmap(jax.grad(f)))(jnp.zeros(8))
    np.testing.assert_array_equal(slopes, np.ones(8))


@pytest.mark.parametrize("method", ["expand_dims", "broadcast_all"])
def test_slices_of_batches(threads, transform, method):
    shapes = set()

    def body(x, y):
        shapes.add((x.shape, y.shape))
        return x * np.sin(y)

    def fwd(x, y):
        return body(x, y), (x, y)

    def bwd(residuals, g):
        x, y = residuals
        y_bar = g * x * np.cos(y)
        if y.shape[0] == 1:
            y_bar = y_bar.sum(0, keepdims=True)
        return g * np.sin(y), y_bar

    f = numpy_func(
        body, Tout=lambda x, y: x, executor=threads, chunksize=3, vmap_method=method
    )
    f.defvjp(fwd, bwd)
    x, y = jnp.arange(8.0), jnp.float32(0.5)
    batch = jax.vmap(f, (0, None))
    np.testing.assert_allclose(transform(batch)(x, y), x * jnp.sin(y), rtol=1e-6)
    rows = {3, 2}
    shared = {1} if method == "expand_dims" else rows
    assert {s[0] for s, _ in shapes} == rows
    assert {s[0] for _, s in shapes} == shared
    slopes = transform(jax.grad(lambda *xs: batch(*xs).sum(), (0, 1)))(x, y)
    np.testing.assert_allclose(slopes[0], jnp.full(8, jnp.sin(y)), rtol=1e-6)
    np.testing.assert_allclose(slopes[1], x.sum() * jnp.cos(y), rtol=1e-6)
    each = transform(jax.vmap(jax.grad(f, 1), (0, None)))(x, y)
    np.testing.assert_allclose(each, x * jnp.cos(y), rtol=1e-6)
    assert not transform(batch)(jnp.zeros(0), y).size


def test_slices_of_nested_batches(threads):
    shapes = []

    def body(x):
        shapes.append(x.shape)
        return x + 1

    f = numpy_func(
        body, Tout=same, executor=threads, chunksize=6, vmap_method="expand_dims"
    )
    x = jnp.arange(60.0).reshape(5, 4, 3)
    got = jax.jit(jax.vmap(jax.vmap(jax.vmap(f))))(x)
    np.testing.assert_array_equal(got, x + 1)
    assert sorted(shapes) == [(1, 2, 3)] * 10


def test_jvps_of_slices(threads, transform):
    f = numpy_func(
        np.sin, Tout=same, executor=threads, chunksize=2, vmap_method="broadcast_all"
    )
    f.defjvp(simulators.sine_jvp)
    x = jnp.arange(5.0)
    got = transform(lambda x: jax.jvp(jax.vmap(f), (x,), (x,))[1])(x)
    np.testing.assert_allclose(got, x * jnp.cos(x), rtol=1e-6)


def test_transposes_on_an_executor(threads, transform):
    f = numpy_func(lambda x: 3 * x, Tout=same, executor=threads)
    f.defvjp(lambda x: (3 * x, None), lambda _, g: (3 * g,))
    x = jnp.arange(4.0)
    (got,) = transform(lambda g: jax.linear_transpose(jax.vmap(f), x)(g))(x)
    np.testing.assert_array_equal(got, 3 * x)


def test_an_earlier_element_that_fails_later_comes_first(threads):
    """Where residuals are not kept, a derivative calls `fwd` again, and then `bwd`."""
    is_again = []

    def fwd(x):
        if x == 2 and is_again:
            raise ValueError("fwd of 2")
        return x, x

    def bwd(x, g):
        if x >= 1:
            raise ValueError(f"bwd of {x:.0f}")
        return (g,)

    f = numpy_func(lambda x: x, Tout=same, executor=threads, chunksize=2)
    f.defvjp(fwd, bwd)
    before = jpyfunc.set_tape_limit(0)
    try:
        x = jnp.arange(4.0)
        _, pullback = jax.vjp(jax.vmap(f), x)
        is_again.append(True)
        with raises(ValueError, "bwd of 1"):
            jax.block_until_ready(jax.jit(pullback)(x))
    finally:
        jpyfunc.set_tape_limit(before)


def test_what_has_not_begun_is_cancelled():
    begun = []

    def body(x):
        begun.append(float(x))
        time.sleep(0.01)
        if x == 1:
            raise ValueError("one")
        return x

    with ThreadPoolExecutor(1) as pool:
        f = numpy_func(body, Tout=same, executor=pool)
        with raises(ValueError, "one"):
            jax.jit(jax.vmap(f))(jnp.arange(100.0)).block_until_ready()
    assert len(begun) < 20  # those that began before it was seen


def test_profile(threads):
    f = numpy_func(simulators.sleeps, Tout=same, executor=threads)
    program = jax.jit(jax.vmap(f))
    with jpyfunc.profile() as prof:
        program(jnp.arange(4.0))
    counts = prof.as_dict()["sleeps"]["forward"]
    assert (counts["calls"], counts["elements"], counts["runs"]) == (1, 4, 4)
    assert 2.0 <= counts["body_seconds"] < 3.0
    assert 0.45 <= counts["wait_seconds"] < 1.9
    assert 0 <= counts["overhead_seconds"] < 1.0
    assert "waited" in repr(prof)


def test_a_block_waits_for_what_its_workers_do(monkeypatch):
    """A host call that waits for other processes uses no CPU, but is not idle."""
    monkeypatch.setattr(in_flight, "PATIENCE", 0.05)
    with process_pool("spawn") as pool:
        f = numpy_func(simulators.sleeps, Tout=same, executor=pool)
        program = jax.jit(jax.vmap(f))
        with jpyfunc.profile() as prof:
            program(jnp.arange(2.0))
        assert prof.as_dict()["sleeps"]["forward"]["calls"] == 1


# --- The wrapped function.


def test_equality_and_pickling(threads):
    f = numpy_func(simulators.sine, Tout=same, executor=threads, chunksize=2)
    again = numpy_func(simulators.sine, Tout=same, executor=threads, chunksize=2)
    assert f == again
    assert hash(f) == hash(again)
    assert f != numpy_func(simulators.sine, Tout=same, chunksize=2)
    assert f != numpy_func(simulators.sine, Tout=same, executor=threads)
    with ThreadPoolExecutor(1) as other:
        assert f != numpy_func(simulators.sine, Tout=same, executor=other, chunksize=2)
    assert pickle.loads(pickle.dumps(f)) == numpy_func(
        simulators.sine, Tout=same, chunksize=2
    )
    assert "executor: ThreadPoolExecutor" in f.__doc__


def test_an_executor_lives_no_longer_than_the_function():
    pool = ThreadPoolExecutor(1)
    alive = weakref.ref(pool)

    def run(pool):
        f = numpy_func(lambda x: x + 1, Tout=same, executor=pool)
        f.defvjp(lambda x: (x + 1, x), lambda _, g: (g,))
        jax.jit(jax.vmap(jax.value_and_grad(f)))(jnp.arange(3.0))
        jax.vmap(f)(jnp.arange(3.0))
        f(1.0)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            bad = numpy_func(lambda x: 1 / 0, Tout=same, executor=pool)
            jax.jit(bad)(1.0).block_until_ready()

    run(pool)
    pool.shutdown()
    del pool
    for _ in range(3):
        gc.collect()
    assert alive() is None


def test_refused_options(threads):
    for executor in (3, ThreadPoolExecutor, "threads"):
        with pytest.raises(TypeError, match="expected executor to be one like those"):
            numpy_func(same, Tout=same, executor=executor)
    client = type("Client", (), {"submit": len, "get_executor": len})()
    with pytest.raises(TypeError, match=r"write executor=client\.get_executor\(\)"):
        numpy_func(same, Tout=same, executor=client)
    for chunksize in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="chunksize"):
            numpy_func(same, Tout=same, executor=threads, chunksize=chunksize)
    with pytest.raises(ValueError, match="ordered=True one after another"):
        numpy_func(same, Tout=same, executor=threads, ordered=True)
    with pytest.raises(TypeError, match=r"Write numpy_func\(func"):
        py_func(same, Tout=same, executor=threads)


def test_a_pool_that_forks_warns():
    with (
        process_pool("fork") as pool,
        pytest.warns(UserWarning, match="forks of this one.*'spawn'") as warned,
    ):
        numpy_func(simulators.sine, Tout=same, executor=pool)
    assert warned[0].filename == __file__


# --- Executors that do not run it.


def test_an_executor_that_is_shut_down():
    pool = ThreadPoolExecutor(1)
    f = numpy_func(simulators.sine, Tout=same, executor=pool)
    pool.shutdown()
    for call in (jax.jit(f), jax.jit(jax.vmap(f)), f):
        with raises(ExecutorError, r"has been shut down.*another one"):
            call(jnp.ones(2)).block_until_ready()


def test_an_executor_that_is_shut_down_meanwhile():
    pool = ThreadPoolExecutor(1)

    def body(x):
        pool.shutdown(wait=False, cancel_futures=True)
        return x

    f = numpy_func(body, Tout=same, executor=pool)
    with raises(ExecutorError, "has been shut down"):
        jax.jit(jax.vmap(f))(jnp.ones(3)).block_until_ready()


def test_a_worker_that_dies():
    with process_pool("spawn") as pool:
        f = numpy_func(simulators.dies, Tout=same, executor=pool)
        for _ in range(2):  # the second time, nothing can be submitted
            with raises(ExecutorError, r"has died.*__main__") as raised:
                jax.jit(jax.vmap(f))(jnp.ones(3)).block_until_ready()
            assert isinstance(raised.value.__cause__, BrokenExecutor)


def test_an_executor_that_does_not_work():
    class Broken:
        def submit(self, task):
            future = Future()
            future.set_exception(OSError("no network"))
            return future

    f = numpy_func(simulators.sine, Tout=same, executor=Broken())
    with raises(ExecutorError, r"did not run it .*no network"):
        jax.jit(f)(1.0).block_until_ready()


def test_arguments_that_cannot_be_pickled():
    with process_pool("spawn") as pool:
        f = numpy_func(simulators.with_lock, Tout=lambda x, lock: x, executor=pool)
        lock = threading.Lock()
        with raises(ExecutorError, "an argument cannot be pickled"):
            jax.jit(lambda x: f(x, lock))(1.0).block_until_ready()


# --- Programs of their own.

SETUP = f"""
    import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
    import jax, jax.numpy as jnp, numpy as np, threading, time
    from concurrent.futures import ThreadPoolExecutor
    from jpyfunc import numpy_func, py_func
    same = lambda x: x

    def program_of(leaf):
        "Three sines, by a program whose host call waits for a product of matrices."
        return jax.jit(lambda b: jax.vmap(leaf)((b @ b / 300 / b)[:3, 0]).sum())

    def sums(leaf):
        program = program_of(leaf)
        return lambda x: np.asarray(program(np.full((300, 300), x)))
"""

DEADLOCKS = {
    "nested twice, called by several threads": """
    for count in (1, 2):
        pool = ThreadPoolExecutor(count)
        leaf = numpy_func(np.sin, Tout=same, executor=pool)
        mid = numpy_func(sums(leaf), Tout=same, executor=pool)
        top = numpy_func(sums(mid), Tout=same, executor=pool)
        program = jax.jit(jax.vmap(top))
        def work(i):
            x = jnp.arange(1.0, 3.0) + i
            np.testing.assert_allclose(program(x) / 9, np.sin(x), rtol=1e-4)
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        inner = sums(leaf)
        between = py_func(lambda x: jnp.asarray(inner(x)), Tout=same)
        outer = numpy_func(lambda x: np.asarray(between(x)), Tout=same, executor=pool)
        np.testing.assert_allclose(jax.jit(outer)(1.0) / 3, np.sin(1), rtol=1e-5)
    """,
    "compiled outside": """
    pool = ThreadPoolExecutor(1)
    leaf = numpy_func(np.sin, Tout=same, executor=pool)
    program = program_of(leaf).lower(jnp.ones((300, 300))).compile()
    def body(x):
        return np.asarray(program(np.full((300, 300), x)))
    outer = jax.jit(jax.vmap(numpy_func(body, Tout=same, executor=pool)))
    np.testing.assert_allclose(outer(jnp.ones(2)) / 3, np.full(2, np.sin(1)), rtol=1e-5)
    """,
    "submitted by the user": """
    pool = ThreadPoolExecutor(1)
    leaf = numpy_func(np.sin, Tout=same, executor=pool)
    for wait in (np.asarray, lambda x: x.block_until_ready()):
        program = program_of(leaf)
        def run(): return wait(program(jnp.ones((300, 300))))
        np.testing.assert_allclose(pool.submit(run).result() / 3, np.sin(1), rtol=1e-5)
    """,
    "two pools that wait for each other": """
    one, two = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    barrier = threading.Barrier(2, timeout=10)
    def crossing(own, other):
        leaf = numpy_func(np.sin, Tout=same, executor=other)
        inner = sums(leaf)
        def body(x):
            barrier.wait()
            return inner(x)
        return jax.jit(numpy_func(body, Tout=same, executor=own))
    programs = [crossing(one, two), crossing(two, one)]
    results = []
    def work(program): results.append(float(program(1.0)))
    threads = [threading.Thread(target=work, args=(p,)) for p in programs]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    np.testing.assert_allclose(results, [3 * np.sin(1)] * 2, rtol=1e-5)
    """,
}


@pytest.mark.parametrize("program", DEADLOCKS)
def test_no_deadlock(program):
    run_program(SETUP + DEADLOCKS[program] + "\n    print('done')", limit=90)


def test_an_interrupt_ends_the_wait():
    out = run_program(
        SETUP
        + """
    import os, signal
    pool, begun = ThreadPoolExecutor(1), []
    def interrupt(): os.kill(os.getpid(), signal.SIGINT)
    def body(x):
        begun.append(x)
        if x == 1 and len(begun) < 10:
            threading.Timer(0.1, interrupt).start()
        time.sleep(0.3)
        return x
    program = jax.jit(jax.vmap(numpy_func(body, Tout=same, executor=pool)))
    for _ in range(2):
        begin = time.monotonic()
        try:
            program(jnp.arange(100.0)).block_until_ready()
        except KeyboardInterrupt:
            assert time.monotonic() - begin < 5
            print("interrupted")
    time.sleep(0.5)
    assert len(begun) < 10
    begun += range(10)
    np.testing.assert_array_equal(program(jnp.arange(2.0)), np.arange(2.0))
    """,
        limit=60,
    )
    assert out.split() == ["interrupted"] * 2


SCRIPT = """
import concurrent.futures, multiprocessing
import jax, jax.numpy as jnp, numpy as np, jpyfunc

pool = concurrent.futures.ProcessPoolExecutor(
    2, mp_context=multiprocessing.get_context("spawn")
)

@jpyfunc.numpy_func(Tout=lambda theta: theta, executor=pool)
def simulate(theta):
    return np.sin(theta)

if __name__ == "__main__":
    thetas = jnp.arange(8.0)
    got = jax.jit(jax.vmap(simulate))(thetas)
    np.testing.assert_allclose(got, np.sin(thetas), rtol=1e-6)
    print("done")
"""


def test_a_script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    source = f"subprocess.run([sys.executable, {str(path)!r}], check=True)"
    out = run_program(f"import subprocess, sys; {source}", limit=90)
    assert out.split() == ["done"]


def test_a_worker_that_cannot_import(tmp_path):
    """Functions of a program without a file, as in a notebook."""
    out = run_program(
        """
    import concurrent.futures, multiprocessing, jax, jpyfunc
    context = multiprocessing.get_context("spawn")
    def plus_one(x): return x + 1
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        f = jpyfunc.numpy_func(plus_one, Tout=lambda x: x, executor=pool)
        try:
            with jpyfunc.raise_original(): jax.jit(f)(1.0).block_until_ready()
        except jpyfunc.ExecutorError as error:
            print(error)
    """,
        limit=90,
    )
    assert "cannot import the function, __main__.plus_one" in out
    assert "loky" in out
