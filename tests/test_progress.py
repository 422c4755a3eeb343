"""`progress`: which batches show a bar, how far it gets, and when it goes."""

import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from programs import run_program

import jpyfunc as jpf
from jpyfunc._runtime import in_flight
from jpyfunc._runtime import progress as progress_module

SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


@jpf.numpy_func(Tout=SCALAR)
def simulate(theta):
    time.sleep(0.02)
    return np.sin(theta)


@pytest.fixture
def _soon(monkeypatch):
    """Bars that are shown after a fraction of the usual time."""
    monkeypatch.setattr(progress_module, "BAR_DELAY", 0.01)
    monkeypatch.setattr(progress_module, "BAR_INTERVAL", 0.005)


soon = pytest.mark.usefixtures("_soon")


@pytest.fixture
def bars(capsys):
    """Read the bars drawn since it was last called, as lists of counts by title."""

    def read():
        drawn: dict[str, list[str]] = {}
        for line in re.split(r"[\r\n]", capsys.readouterr().err):
            if found := re.match(r"(.+?): +\d+%\|.*\| (\d+/\d+) \[[\d:]+<[\d:?]+\]", line):
                drawn.setdefault(found[1], []).append(found[2])
        return drawn

    return read


def threads_that_draw():
    return [thread for thread in threading.enumerate() if thread.name == "jpyfunc.progress"]


def test_a_slow_batch_shows_a_bar_and_a_fast_one_none(transform, bars):
    f = transform(jax.vmap(simulate))
    xs = jnp.arange(35.0)
    with jpf.progress():
        f(xs[:15]).block_until_ready()
        assert bars() == {}
        np.testing.assert_allclose(f(xs), np.sin(xs), rtol=1e-6)
    counts = bars()["simulate"]
    assert counts[-1] == "35/35"
    steps = [int(count.split("/")[0]) for count in counts]
    assert steps == sorted(steps)
    assert 15 < steps[0] < 35
    assert 3 <= len(steps) < 20  # ten times a second, not for each element


@soon
def test_nothing_is_shown_or_done_outside_of_a_block(transform, bars, monkeypatch):
    f = transform(jax.vmap(simulate))
    xs = jnp.arange(3.0)
    with jpf.progress():
        f(xs).block_until_ready()
    assert bars()["simulate"][-1] == "3/3"
    while threads_that_draw():
        time.sleep(0.01)
    monkeypatch.setattr(progress_module, "RunningBatch", None)
    f(xs).block_until_ready()
    assert bars() == {}


@soon
@pytest.mark.parametrize("options", [{}, {"stateful": True}, {"vmap_method": "sequential"}])
def test_py_funcs_by_branch_and_one_by_one(options, transform, bars):
    @jpf.py_func(Tout=SCALAR, **options)
    def body(x):
        time.sleep(0.02)
        return 2 * x if x > 2 else x

    with jpf.progress():
        result = transform(jax.vmap(body))(jnp.arange(5.0))
    np.testing.assert_array_equal(result, [0, 1, 2, 6, 8])
    counts = bars()["body"]
    assert counts[-1] == "5/5"
    # One path has three elements, and one has two.
    by_branch = {"0/5", "2/5", "3/5", "5/5"}
    assert set(counts) <= by_branch if not options else set(counts) & {"1/5", "4/5"}


@soon
def test_nested_batches_are_one(transform, bars):
    @jpf.numpy_func(Tout=SCALAR, name="two")
    def two(x, y):
        time.sleep(0.02)
        return x + y

    nested = transform(jax.vmap(jax.vmap(two, (0, None)), (None, 0)))
    with jpf.progress():
        result = nested(jnp.arange(3.0), jnp.arange(2.0))
    np.testing.assert_array_equal(result, [[0, 1, 2], [1, 2, 3]])
    assert {count.split("/")[1] for count in bars()["two"]} == {"6"}


@soon
def test_derivatives_are_marked(transform, bars):
    @jpf.numpy_func(Tout=SCALAR)
    def square(x):
        time.sleep(0.01)
        return x**2

    def bwd(x, g):
        time.sleep(0.02)
        return (2 * x * g,)

    square.defvjp(lambda x: (x**2, x), bwd)
    with jpf.progress():
        slopes = transform(jax.vmap(jax.grad(square)))(jnp.arange(4.0))
    np.testing.assert_array_equal(slopes, [0, 2, 4, 6])
    assert bars()["square (vjp)"][-1] == "4/4"


@soon
def test_a_batch_that_fails_closes_its_bar_where_it_was(transform, bars):
    @jpf.numpy_func(Tout=SCALAR)
    def picky(x):
        time.sleep(0.02)
        if x == 3:
            raise ValueError("three")
        return x

    f = transform(jax.vmap(picky))
    with jpf.progress():
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="three"):
            f(jnp.arange(5.0)).block_until_ready()
        assert bars()["picky"][-1] == "3/5"
        f(jnp.arange(4.0, 9.0)).block_until_ready()
        assert bars()["picky"][-1] == "5/5"


@soon
def test_a_batch_in_a_body_is_below_its_bar_and_goes(transform, capsys):
    @jpf.py_func(Tout=SCALAR, stateful=True)
    def outer(x):
        time.sleep(0.02)
        return x + jax.jit(jax.vmap(simulate))(jnp.zeros(3)).sum()

    with jpf.progress():
        result = transform(jax.vmap(outer))(jnp.arange(2.0))
    np.testing.assert_array_equal(result, [0, 1])
    drawn = capsys.readouterr().err
    up = "\x1b[A"
    assert re.search(rf"\n\rsimulate:.*/3 \[.*\]{re.escape(up)}", drawn)
    below = drawn.split(up)
    assert not below[-2].strip()  # cleared
    assert re.fullmatch(r"(\router: +\d+%\|.*\| \d/2 \[.*\])*\n", below[-1])
    assert "100%" in below[-1]


@soon
def test_a_batch_in_a_body_that_is_differentiated(bars):
    """There, elements are sliced and stacked by operations that the tape records."""

    @jpf.py_func(Tout=SCALAR, vmap_method="sequential")
    def inner(x):
        time.sleep(0.02)
        return x**2

    @jpf.py_func(Tout=SCALAR)
    def outer(x):
        return jax.vmap(inner)(x * jnp.arange(3.0)).sum()

    with jpf.progress():
        slope = jax.jit(jax.grad(outer))(1.0)
    np.testing.assert_allclose(slope, 2 * (0 + 1 + 4))
    assert any(counts[-1] == "3/3" for counts in bars().values())


@soon
def test_elements_on_an_executor_count_in_whatever_order(transform, bars):
    others = threading.Semaphore(0)

    def first_waits(x):
        if x:
            others.release()
        else:
            for _ in range(7):
                assert others.acquire(timeout=60)
            time.sleep(0.1)
        return x

    with ThreadPoolExecutor(2) as pool:
        body = jpf.numpy_func(first_waits, Tout=SCALAR, executor=pool)
        with jpf.progress():
            result = transform(jax.vmap(body))(jnp.arange(8.0))
        np.testing.assert_array_equal(result, np.arange(8.0))
    counts = bars()["first_waits"]
    assert "7/8" in counts
    assert counts[-1] == "8/8"


@soon
def test_an_element_that_fails_on_an_executor(transform, bars):
    def picky(x):
        time.sleep(0.02)
        if x == 3:
            raise ValueError("three")
        return x

    with ThreadPoolExecutor(1) as pool, jpf.progress():
        body = jpf.numpy_func(picky, Tout=SCALAR, executor=pool)
        f = transform(jax.vmap(body))
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="three"):
            f(jnp.arange(50.0)).block_until_ready()
        assert int(bars()["picky"][-1].split("/")[0]) in range(
            3, 8
        )  # not what is cancelled
        f(jnp.arange(4.0, 8.0)).block_until_ready()
        assert bars()["picky"][-1] == "4/4"


@soon
def test_rows_on_an_executor(transform, bars):
    """A function that takes a whole batch in one call gets slices of it."""

    def rows(x):
        time.sleep(0.02)
        return 2 * x

    with ThreadPoolExecutor(1) as pool:
        body = jpf.numpy_func(
            rows, Tout=SCALAR, vmap_method="expand_dims", executor=pool, chunksize=20
        )
        with jpf.progress():
            result = transform(jax.vmap(body))(jnp.arange(100.0))
        np.testing.assert_array_equal(result, 2 * np.arange(100.0))
        with jpf.progress():
            body(1.0)  # no batch
    assert {*bars()["rows"]} & {"20/100", "40/100", "60/100", "80/100"}


@soon
def test_shards_share_a_bar(bars):
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("i")
    sharded = jax.shard_map(jax.vmap(simulate), mesh=mesh, in_specs=spec, out_specs=spec)
    xs = jnp.arange(24.0)
    f = jax.jit(sharded).lower(xs).compile()
    xs = jax.device_put(xs, f.input_shardings[0][0])
    with jpf.progress():
        np.testing.assert_allclose(f(xs), np.sin(xs), rtol=1e-6)
    assert bars()["simulate"][-1] == "24/24"


@soon
def test_batches_of_several_threads(bars):
    def work(name):
        together.wait()
        f = jpf.numpy_func(lambda x: time.sleep(0.02) or x, Tout=SCALAR, name=name)
        return jax.jit(jax.vmap(f))(jnp.arange(4.0)).block_until_ready()

    together = threading.Barrier(3)
    names = ["first", "second", "third"]
    with jpf.progress(), ThreadPoolExecutor(3) as pool:
        for result in pool.map(work, names):
            np.testing.assert_array_equal(result, np.arange(4.0))
    drawn = bars()
    assert sorted(drawn) == names
    assert all(counts[-1] == "4/4" for counts in drawn.values())


@soon
def test_blocks_at_once_show_each_batch_once(bars):
    f = jax.jit(jax.vmap(simulate))
    f(jnp.arange(3.0)).block_until_ready()
    block = jpf.progress()
    with jpf.progress(), block, block:
        f(jnp.arange(3.0))
    assert bars()["simulate"].count("1/3") <= 1
    with block, ThreadPoolExecutor(1) as pool:
        opened, closes = threading.Event(), threading.Event()

        def other():
            with block:
                opened.set()
                closes.wait(60)

        running = pool.submit(other)
        opened.wait(60)
        f(jnp.arange(3.0)).block_until_ready()
        closes.set()
        running.result()
        assert bars()["simulate"][-1] == "3/3"
        f(jnp.arange(3.0))
    assert bars()["simulate"][-1] == "3/3"


@soon
def test_the_end_of_a_block_waits_for_its_programs(bars):
    f = jax.jit(jax.vmap(simulate))
    xs = jnp.eye(600)
    f(xs[0, :4]).block_until_ready()
    for _ in range(10):
        xs = xs @ xs  # unfinished, so that the program begins after its dispatch
    with jpf.progress():
        f(xs[0, :4])
    assert bars()["simulate"][-1] == "4/4"


@soon
def test_a_batch_that_goes_on_after_its_block(bars, monkeypatch):
    monkeypatch.setattr(in_flight, "PATIENCE", 0.1)
    blocked = threading.Lock()

    @jpf.numpy_func(Tout=SCALAR)
    def wait(x):
        with blocked:
            return x

    f = jax.jit(jax.vmap(wait))
    xs = jnp.eye(600)
    f(xs[0, :2]).block_until_ready()
    # A program whose operands are ready may run on the thread that dispatches it, which
    # would wait here for itself. So they take a second.
    for _ in range(100):
        xs = xs @ xs
    with blocked:  # the end of a block that waited for ever would never release it
        with jpf.progress():
            result = f(xs[0, :2])
        assert bars()["wait"][-1] == "0/2"
    result.block_until_ready()
    while threads_that_draw():
        time.sleep(0.01)
    assert bars()["wait"][-1] == "2/2"


@soon
def test_an_exception_leaves_the_block_and_ends_it(bars):
    with pytest.raises(ZeroDivisionError), jpf.progress():
        1 / (1 - 1)
    while threads_that_draw():
        time.sleep(0.01)
    jax.jit(jax.vmap(simulate))(jnp.arange(3.0)).block_until_ready()
    assert bars() == {}


def test_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"pip install 'jpyfunc\[progress\]'"):
        jpf.progress()


def test_tqdm_is_imported_where_a_block_is_made():
    out = run_program(
        """
        import sys
        import jpyfunc
        print("tqdm" in sys.modules)
        jpyfunc.progress()
        print("tqdm" in sys.modules)
        """,
        limit=60,
    )
    assert out.split() == ["False", "True"]
