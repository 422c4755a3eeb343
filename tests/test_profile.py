"""`profile`: what it counts, in which block, and how it shows it."""

import contextlib
import html
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import run_program

import jpyfunc as jpf
import jpyfunc.tf1 as tf
from jpyfunc import numpy_func, profile, py_func

SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


@py_func(Tout=SCALAR)
def cube(x):
    return x**3


def counts(prof, column, name="cube"):
    """Return a column of the table for one function, by kind."""
    return {kind: row[column] for kind, row in prof.as_dict()[name].items()}


def test_counts_every_run_of_the_body(transform):
    runs = []

    @py_func(Tout=SCALAR)
    def body(x):
        runs.append(x)
        return x + 1

    f = transform(body)
    f(0.0)  # before the block
    runs.clear()
    with profile() as prof:
        for i in range(5):
            f(float(i))
    f(9.0)
    assert len(runs) == 6
    row = prof.as_dict()["body"]["forward"]
    assert row["calls"] == row["elements"] == 5
    assert row["exceptions"] == 0
    assert row["overhead_seconds"] >= 0


double = py_func(lambda x: 2 * x, Tout=SCALAR, name="cube")


@pytest.mark.parametrize(
    ("kinds", "derivative"),
    [
        (["forward", "vjp"], jax.grad(cube)),
        (["forward", "vjp"], jax.value_and_grad(cube)),
        (["forward", "jvp"], lambda x: jax.jvp(cube, (x,), (x,))),
        (["forward", "jvp"], jax.jacfwd(jax.jacfwd(cube))),
        (["forward", "jvp"], jax.jacfwd(jax.grad(cube))),
        (["forward", "vjp"], jax.grad(jax.jacfwd(cube))),
        (["forward", "vjp"], jax.grad(jax.grad(cube))),
        (["vjp"], lambda x: jax.linear_transpose(double, x)(x)),
    ],
)
def test_counts_by_the_outermost_derivative(kinds, derivative):
    program = jax.jit(derivative)  # which leaves no call whose results are unused
    with profile() as prof:
        program(2.0)
    assert counts(prof, "calls") == dict.fromkeys(kinds, 1)


@pytest.mark.parametrize(
    ("method", "elements"), [("sequential", 6), ("expand_dims", 1), ("broadcast_all", 1)]
)
def test_elements_of_a_batch(method, elements, transform):
    @py_func(Tout=jnp.float32, vmap_method=method)
    def negate(x):
        return -x

    nested = transform(jax.vmap(jax.vmap(negate)))
    with profile() as prof:
        nested(jnp.ones((2, 3)))
    row = prof.as_dict()["negate"]["forward"]
    assert (row["calls"], row["elements"]) == (1, elements)
    assert (row["bytes_in"], row["bytes_out"]) == (24, 24)


def test_batches_of_derivatives_and_of_nothing():
    slopes = jax.jit(jax.vmap(jax.grad(cube)))
    with profile() as prof:
        slopes(jnp.ones(4))
        jax.vmap(cube)(jnp.ones(0))  # eager, because XLA removes a call of no bytes
    assert counts(prof, "calls") == {"forward": 2, "vjp": 1}
    assert counts(prof, "elements") == {"forward": 4, "vjp": 4}
    assert counts(prof, "from_tape") == {"forward": 0, "vjp": 4}


def test_bytes_of_operands_and_results(transform):
    @py_func(Tout=[jax.ShapeDtypeStruct((2, 5), jnp.int8), SCALAR])
    def mixed(matrix, key, flag, mode):
        assert mode == "mode"
        return jnp.zeros((2, 5), jnp.int8), matrix.sum()

    f = transform(lambda *args: mixed(*args, "mode"))
    matrix, key, flag = jnp.ones((3, 4), jnp.float16), jax.random.key(0), jnp.array(True)
    with profile() as prof:
        f(matrix.astype(jnp.float32), key, flag)
    row = prof.as_dict()["mixed"]["forward"]
    assert row["bytes_in"] == 3 * 4 * 4 + 8 + 1
    assert row["bytes_out"] == 2 * 5 + 4


def test_exceptions_are_counted_and_propagate(transform):
    @py_func(Tout=SCALAR)
    def picky(x):
        if x < 0:
            raise ValueError("negative")
        return x

    f = transform(picky)
    f(1.0)
    with profile() as prof:
        for x in (-1.0, 1.0, -2.0):
            try:
                f(x).block_until_ready()
            except (ValueError, jax.errors.JaxRuntimeError) as error:
                assert "negative" in str(error)  # noqa: PT017 - it need not raise
    row = prof.as_dict()["picky"]["forward"]
    assert (row["calls"], row["elements"], row["exceptions"]) == (3, 3, 2)
    assert (row["bytes_in"], row["bytes_out"]) == (12, 4)


def test_a_batch_ends_with_the_element_that_raises():
    @py_func(Tout=SCALAR, vmap_method="sequential")
    def picky(x):
        if x == 2:
            raise ValueError("two")
        return x

    with profile() as prof, pytest.raises(ValueError, match="two"), jpf.raise_original():
        jax.jit(jax.vmap(picky))(jnp.arange(8.0)).block_until_ready()
    row = prof.as_dict()["picky"]["forward"]
    assert (row["calls"], row["elements"], row["exceptions"]) == (1, 3, 1)


def test_an_exception_leaves_the_block_and_ends_it():
    prof = profile()
    with pytest.raises(ZeroDivisionError), prof:
        cube(1.0) / (1 // 0)
    cube(1.0)
    assert counts(prof, "calls") == {"forward": 1}


def test_time_in_the_body_is_not_overhead(transform):
    @py_func(Tout=SCALAR)
    def slow(x):
        time.sleep(0.02)
        return x

    f = transform(slow)
    f(1.0)
    with profile() as prof:
        f(1.0).block_until_ready()
    row = prof.as_dict()["slow"]["forward"]
    assert row["body_seconds"] >= 0.02
    assert row["overhead_seconds"] >= 0


def test_functions_of_one_name_have_rows_of_their_own():
    def make_a():
        return py_func(lambda x: x, Tout=SCALAR, name="step")

    def make_b():
        return py_func(lambda x: -x, Tout=SCALAR, name="step")

    with profile() as prof:
        for make in (make_a, make_b, make_a):
            jax.jit(jax.value_and_grad(make()))(1.0)
        cube(1.0)
    first, second, third = prof.as_dict()
    pattern = re.escape(f"step ({__file__}:") + r"\d+\)"
    assert re.fullmatch(pattern, first)
    assert re.fullmatch(pattern, second)
    assert first != second
    assert third == "cube"
    assert counts(prof, "calls", first) == {"forward": 2, "vjp": 2}
    assert counts(prof, "calls", second) == {"forward": 1, "vjp": 1}


def test_callables_of_every_kind():
    class Scale:
        def __call__(self, x):
            return 2 * x

        def method(self, x):
            return 3 * x

    with profile() as prof:
        for func in (Scale(), Scale().method, jnp.sin, jax.jit(jnp.cos), abs):
            py_func(func, [1.0], SCALAR)
        numpy_func(np.exp, [1.0], SCALAR)
    assert list(prof.as_dict()) == ["Scale", "method", "sin", "cos", "abs", "exp"]


def test_arguments_may_have_any_name():
    f = py_func(lambda name, func, args, kwargs: name, Tout=SCALAR, name="f")
    with profile() as prof:
        f(name=1.0, func=2.0, args=3.0, kwargs=4.0)
    assert counts(prof, "calls", "f") == {"forward": 1}


def test_blocks_see_what_began_in_them():
    with profile() as outer:
        cube(1.0)
        with profile() as inner:
            cube(1.0)
            with inner:  # open already: still one count per call
                cube(1.0)
        cube(1.0)
    with inner:
        cube(1.0)
    assert counts(outer, "calls") == {"forward": 4}
    assert counts(inner, "calls") == {"forward": 3}


def test_a_call_in_a_body_counts_for_both():
    @py_func(Tout=SCALAR)
    def outer(x):
        return cube(x) + cube(x + 1)

    with profile() as prof:
        assert jax.jit(outer)(1.0) == 9
    assert counts(prof, "calls", "outer") == {"forward": 1}
    assert counts(prof, "calls") == {"forward": 2}
    inner = counts(prof, "body_seconds")["forward"]
    assert counts(prof, "body_seconds", "outer")["forward"] >= inner


def test_calls_of_many_threads():
    program = jax.jit(cube)
    program(1.0)
    together = threading.Barrier(8)

    def work(i):
        with profile() as own:
            together.wait()
            for _ in range(25):
                program(float(i)).block_until_ready()
            together.wait()
        return own

    with profile() as prof, ThreadPoolExecutor(8) as pool:
        everyone = list(pool.map(work, range(8)))
    for each in [prof, *everyone]:
        assert counts(each, "calls") == {"forward": 200}


def unfinished():
    """Make an identity matrix that is still being computed, so that its users wait."""
    x = jnp.eye(600)
    for _ in range(30):
        x = x @ x
    return x


def test_waits_for_programs_in_flight():
    @py_func(Tout=jax.ShapeDtypeStruct((600, 600), jnp.float32))
    def slow(x):
        time.sleep(0.01)
        return x

    @py_func(Tout=[])
    def note(x):
        time.sleep(0.01)

    @jax.jit
    def program(x):
        note(x[0])
        return slow(x @ x)

    program(jnp.eye(600)).block_until_ready()
    x = unfinished()
    with profile() as prof:
        results = [program(x) for _ in range(10)]
    assert counts(prof, "calls", "slow") == {"forward": 10}
    assert counts(prof, "calls", "note") == {"forward": 10}
    assert all(result.is_ready() for result in results)


def test_a_failure_in_flight_is_not_the_profiles_to_raise():
    @py_func(Tout=jax.ShapeDtypeStruct((600, 600), jnp.float32))
    def fail(x):
        time.sleep(0.05)
        raise ValueError("in flight")

    program = jax.jit(fail).lower(jnp.eye(600)).compile()
    x = unfinished()
    with profile() as prof:
        result = program(x)
    with pytest.raises(jax.errors.JaxRuntimeError, match="in flight"):
        result.block_until_ready()
    assert counts(prof, "exceptions", "fail") == {"forward": 1}


def test_a_profile_in_a_body_does_not_hang():
    out = run_program(
        """
        import jax, jax.numpy as jnp
        from jpyfunc import profile, py_func

        inner = py_func(lambda x: x + 1, Tout=jnp.float32, name="inner")

        @py_func(Tout=jax.ShapeDtypeStruct((), jnp.float32))
        def body(x):
            with profile() as prof:
                y = jax.jit(inner)(x)
            print(prof.as_dict()["inner"]["forward"]["calls"])
            return y

        # Of an unfinished matrix, so that the results, which the bodies must not wait
        # for, are there before the bodies run.
        program = jax.jit(lambda x: body(x[0, 0]))
        program(jnp.eye(600)).block_until_ready()
        x = jnp.eye(600)
        for _ in range(30):
            x = x @ x
        results = [program(x) for _ in range(5)]
        print(results[-1].block_until_ready())
        """,
        limit=60,
    )
    assert out.split() == ["1"] * 6 + ["2.0"]


def test_sessions_and_effects_count():
    with tf.Graph().as_default():
        x = tf.placeholder(jnp.float32)
        y = py_func(lambda x: x**2, [x], jnp.float32, name="square")
        slope = tf.gradients(y, x)[0]
        with tf.Session() as sess, profile() as prof:
            assert sess.run([y, slope], {x: 3.0}) == [9, 6]
    assert counts(prof, "calls", "square") == {"forward": 1, "vjp": 1}


def test_as_dict_is_a_copy():
    with profile() as prof:
        cube(1.0)
        before = prof.as_dict()
        cube(1.0)
    assert before["cube"]["forward"]["calls"] == 1
    assert prof.as_dict()["cube"]["forward"]["calls"] == 2
    assert set(before["cube"]["forward"]) == {
        "calls",
        "elements",
        "runs",
        "body_seconds",
        "overhead_seconds",
        "wait_seconds",
        "bytes_in",
        "bytes_out",
        "exceptions",
        "from_tape",
        "reran",
        "compile_seconds",
        "one_by_one",
        "tape_bytes",
    }


def calls_stateful(x):
    py_func(lambda x: None, [x], [])
    return x


def prints(x):
    jax.debug.print("")
    return x


def counts_in_a_ref(x):
    counter[...] += 1
    return x


def calls_back(x):
    return jax.pure_callback(lambda x: x, SCALAR, x, vmap_method="sequential")


def draws_of_other_keys(x):
    data = jnp.zeros(4, jnp.uint32) + x.astype(jnp.uint32)
    return x + jax.random.uniform(jax.random.wrap_key_data(data, impl="rbg"))


def draws(x):
    return x + np.random.random()


counter = jax.new_ref(jnp.int32(0))
REASONS = {
    "stateful": (calls_stateful, "returns nothing"),
    "debug": (prints, "debug_"),
    "reads": (lambda x: x * float(x), "tell elements apart: 10 paths or more for 10"),
    "raises": (lambda x: np.sin(x, out=x), "TypeError: "),
    "ref": (counts_in_a_ref, "jax.Ref"),
    "callback": (calls_back, "pure_callback may be another"),
    "jitted callback": (lambda x: jax.jit(calls_back)(x), "pure_callback calls Python"),
    "other keys": (draws_of_other_keys, "for many elements at once"),
    "draws": (draws, "drawn from numpy.random"),
}


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.filterwarnings("ignore:py_func 'draws'")
def test_says_why_a_batch_ran_one_by_one(reason):
    body, why = REASONS[reason]
    f = jax.jit(jax.vmap(py_func(body, Tout=SCALAR, name="f")))
    for _ in range(2):  # when it is found, and from the cache
        failing = contextlib.suppress(jax.errors.JaxRuntimeError, ValueError)
        with profile() as prof, failing:
            jax.block_until_ready(f(jnp.arange(1.0, 11.0)))
        (said,) = counts(prof, "one_by_one", "f").values()
        assert why in said
        assert f"f, forward, ran one by one: {said}" in str(prof).splitlines()
        assert html.escape(said) in prof._repr_html_()


def test_says_that_elements_are_large_or_read():
    wide = jnp.ones((3, 2**15))
    f = py_func(lambda x: x + 1, Tout=lambda x: x, name="f")
    with profile() as prof:
        jax.vmap(f)(wide)
    assert counts(prof, "one_by_one", "f") == {"forward": "elements of 262,144 bytes"}
    with profile() as prof, jax.debug_nans(True):
        jax.vmap(f)(jnp.ones(3))
    assert "NaN" in counts(prof, "one_by_one", "f")["forward"]
    with profile() as prof:
        jax.vmap(f)(jnp.ones(3))
        jax.vmap(py_func(lambda x: x, Tout=lambda x: x, stateful=True))(jnp.ones(3))
    assert set(counts(prof, "one_by_one", "f").values()) == {""}


def test_time_spent_compiling():
    @py_func(Tout=lambda x: x)
    def f(x):
        return jnp.sin(x) if x.sum() > 0 else x

    batch = jax.jit(jax.vmap(f))
    spent = []
    for width in (13, 13, 14):
        with profile() as prof, profile() as other:
            jax.block_until_ready(batch(jnp.ones((3, width))))
        (row,) = (row["forward"] for row in prof.as_dict().values())
        assert other.as_dict() == prof.as_dict()
        assert row["compile_seconds"] <= row["body_seconds"] + row["overhead_seconds"]
        spent.append(row["compile_seconds"])
    assert spent[0] > 0
    assert spent[1] == 0
    assert spent[2] > 0


def test_prints_as_an_aligned_table():
    f = py_func(lambda x: x, Tout=jax.ShapeDtypeStruct((1024,), jnp.float32), name="<f>")
    with profile() as prof:
        for _ in range(1500):
            f(jnp.ones(1024))
        jax.jit(jax.value_and_grad(cube))(1.0)
    header, *rows = str(prof).splitlines()
    assert header.split() == [
        *("function", "kind", "calls", "elements", "runs", "body", "overhead"),
        *("in", "out", "exceptions", "from", "tape", "reran", "compiling", "tapes"),
    ]
    assert len({len(line) for line in (header, *rows)}) == 1
    assert [row[:8].strip() for row in rows] == ["<f>", "cube", ""]
    assert re.search(
        r"<f> +forward +1,500 +1,500 +1,500 .* 5.9 MiB +5.9 MiB +0 +0 +0 +0.0 us +0 B$",
        rows[0],
    )
    # The result includes a ticket of 16 bytes.
    assert re.search(
        r"forward +1 +1 +1 .* 4 B +20 B +0 +0 +0 +[\d.]+ [um]?s +[1-9].* KiB$", rows[1]
    )
    assert re.search(r"vjp +1 +1 +0 .* 24 B +4 B +0 +1 +0 +[\d.]+ [um]?s +0 B$", rows[2])
    assert str(profile()).splitlines()[0].split() == header.split()
    page = prof._repr_html_()
    assert page.startswith("<table>")
    assert "<f>" not in page
    assert "&lt;f&gt;" in page
    assert page.count("<tr>") == 4
    assert page.count("<td") == 3 * page.count("<th ")


def test_bodies_have_their_names_in_traces(tmp_path):
    # In its own process, because a trace covers the whole process.
    run_program(
        f"""
        import jax, jax.numpy as jnp
        from jpyfunc import py_func

        f = py_func(lambda x: x**2, Tout=jnp.float32, name="the_body")
        program, slopes = jax.jit(f), jax.jit(jax.vmap(jax.grad(f)))
        program(1.0), slopes(jnp.ones(3))
        with jax.profiler.trace({str(tmp_path)!r}):
            jax.block_until_ready((program(1.0), slopes(jnp.ones(3))))
        """,
        limit=120,
    )
    (trace,) = tmp_path.rglob("*.xplane.pb")
    events = trace.read_bytes()
    assert b"the_body" in events
    assert b"the_body (vjp)" in events
