"""Shapes and dtypes inferred on abstract values, against what eager JAX returns."""

import collections
import contextlib
import functools
import io
import itertools
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close
from programs import run_program

from jpyfunc import InferenceError, ResultError, py_func, raise_original

V = jnp.arange(1.0, 4.0)


def log_huber(x, m):
    if jnp.abs(x) <= m:
        return x**2
    return m**2 * (1 - 2 * jnp.log(m) + jnp.log(x**2))


def nested(x):
    if x.sum() > 0:
        if x[0] > 1 and not x[1] < 0:
            return x * 2, 1
        elif x[2] == 5 or x[2] == 6:
            return x - 1, 2
        return x, 3
    return -x, 4


def early_loop(x):
    for i in range(3):
        if x[i] > 2:
            return x[i]
    return x.sum()


def halve(x):
    while jnp.linalg.norm(x) > 1:
        x = x / 2
    return x


def collatz(n):
    steps = 0
    while n > 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps += 1
    return steps


def grows_in_a_loop(x):
    rows = [row for row in x if row > 1]
    return jnp.stack([x[0], *rows]).max()


def biggest(x, y):
    return max(x, y)


def raises_in_one_branch(x):
    if x < 0:
        raise ValueError("negative")
    return x


def asserts(x):
    assert (x > 0).all()
    return x


def uses_jit(x):
    y = jax.jit(lambda x: x * 2)(x)
    return y if y.sum() > 0 else x


def uses_grad(x):
    slope = jax.grad(lambda x: x**3 if x > 0 else x)(x[0])
    return slope if slope > 1 else x[0]


def uses_vmap(x):
    return jax.vmap(lambda a, b: a * b)(x, x[::-1])


def uses_scan(x):
    return jax.lax.scan(lambda c, a: (c + a, c * a), x[0], x)


def uses_cond(x):
    return jax.lax.cond(x[0] > 0, lambda x: x, lambda x: -x, x)


def uses_while_loop(x):
    return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x / 2, x)


def uses_custom_jvp(x):
    return jax.nn.relu(x)[:2] if x[0] > 0 else jax.nn.softplus(x)[1:]


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))


def uses_custom_vjp(x):
    return jax.grad(lambda x: (3 * clipped(x)).sum())(x)


def uses_py_func(x):
    inner = py_func(log_huber)
    return inner(x[0], 2.0) + inner(x[1], 2.0)


def uses_py_func_under_grad(x):
    return jax.grad(py_func(log_huber))(x[0], 2.0)


def uses_linalg(x):
    return jnp.linalg.solve(jnp.diag(x), x), jnp.sort(x), jnp.linalg.svd(jnp.diag(x))[1]


def uses_random(x):
    return jax.random.normal(jax.random.key(0), x.shape) + x


def uses_indices(x):
    return x.at[0].set(5.0), x[jnp.argmax(x)], x[1:], x[None], len(x), x.shape[0]


def uses_weak_types(x):
    return x[0] * 2, 2, 2.0, True, jnp.asarray(2), 2j


def uses_numpy_constants(x):
    return x * np.arange(3), np.arange(3), np.float64(2), [1, 2]


def uses_types(x):
    return x.astype(jnp.bfloat16), x > 1, x.astype(int), jnp.fft.fft(x)


def uses_keys(key):
    return jax.random.split(key), jax.random.normal(key, (2,))


CASES = [
    (log_huber, (3.0, 2.0)), (log_huber, (1.0, 2.0)), (log_huber, (jnp.float32(3), 2)),
    (nested, (V,)), (nested, (-V,)), (nested, (jnp.array([0.5, 1, 5]),)),
    (early_loop, (V,)), (early_loop, (-V,)), (halve, (V,)), (collatz, (np.int32(7),)),
    (grows_in_a_loop, (V,)), (biggest, (V[0], V[1])), (biggest, (V[1], V[0])),
    (raises_in_one_branch, (1.0,)), (asserts, (V,)),
    (uses_jit, (V,)), (uses_grad, (V,)), (uses_vmap, (V,)), (uses_scan, (V,)),
    (uses_cond, (V,)), (uses_while_loop, (V,)), (uses_custom_jvp, (V,)),
    (uses_custom_vjp, (V,)), (uses_py_func, (V,)), (uses_py_func_under_grad, (V,)),
    (uses_linalg, (V,)), (uses_random, (V,)), (uses_indices, (V,)),
    (uses_weak_types, (V,)), (uses_numpy_constants, (V,)), (uses_types, (V,)),
    (uses_keys, (jax.random.key(3),)),
]  # fmt: skip


def check_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        b = jnp.asarray(b)
        assert isinstance(a, jax.Array)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(
            np.asarray(a, np.complex64), np.asarray(b, np.complex64), rtol=1e-5
        )


@pytest.mark.parametrize(("body", "args"), CASES)
def test_infers_what_the_body_returns(transform, body, args):
    check_same(transform(py_func(body))(*args), body(*args))


def test_weak_types_are_those_of_plain_jax(transform):
    got = transform(py_func(uses_weak_types))(V)
    expected = jax.jit(uses_weak_types)(V)
    assert [y.weak_type for y in got] == [jnp.asarray(y).weak_type for y in expected]
    for body in (lambda x: x * 2, lambda x: x + 0.5, lambda x: x + np.float32(1)):
        for x in (1.0, 2, jnp.float32(1)):
            y, plain = transform(py_func(body))(x), jax.jit(body)(x)
            assert (y.dtype, y.weak_type) == (plain.dtype, plain.weak_type)


def test_streams_installed_by_a_body_or_another_thread_stay(monkeypatch):
    """A stream that was put there while shapes are inferred stays."""
    streams = io.StringIO(), io.StringIO(), lambda: None

    def body(x):
        sys.stdout, sys.stderr, sys.breakpointhook = streams
        return x

    for name in ("stdout", "stderr", "breakpointhook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # restored at the end
    jax.jit(py_func(body)).lower(2.0)
    assert (sys.stdout, sys.stderr, sys.breakpointhook) == streams


def branching(true, false):
    def body(x):
        return true(x) if x > 0 else false(x)

    return body


@pytest.mark.parametrize(
    ("true", "false", "dtype"),
    [
        (lambda x: 0.0, lambda x: x, "bfloat16"),
        (lambda x: x, lambda x: 0, "bfloat16"),
        (lambda x: 1.5, lambda x: 0, "float32"),
        (lambda x: x.astype("int8"), lambda x: 0, "int8"),
        (lambda x: x.astype("uint8"), lambda x: 0, "uint8"),
        (lambda x: x > 1, lambda x: True, "bool"),
    ],
)
def test_a_python_scalar_in_one_branch_takes_the_dtype_of_the_other(
    true, false, dtype, transform
):
    f = transform(py_func(branching(true, false)))
    for value in (2, -2):
        x = jnp.asarray(value, jnp.bfloat16)
        assert f(x).dtype == jnp.dtype(dtype)
        assert f(x) == complex(branching(true, false)(x))


def test_with_64_bits():
    with jax.enable_x64(True):
        for body in (
            lambda x: x * 2,
            lambda x: (1, 1.5, 2j),
            branching(lambda x: x, lambda x: 0),
        ):
            check_same(jax.jit(py_func(body))(np.float64(0.1)), body(np.float64(0.1)))


def line(body, offset):
    return re.escape(f"{__file__}:{body.__code__.co_firstlineno + offset}")


def test_branches_that_disagree_on_a_shape():
    def body(x):
        if x[0] > 0:  # agrees
            x = x * 2
        if x.sum() > 0:
            return {"y": x[:2]}
        return {"y": x}

    text = (
        f"py_func 'body': the paths through the branch at {line(body, 3)} disagree on "
        + re.escape(
            "result['y']: if true, it is float32[2], else float32[3]. Return the same on "
            "every path."
        )
    )
    with pytest.raises(InferenceError, match=text):
        jax.jit(py_func(body))(V)


@pytest.mark.parametrize(
    ("true", "false", "text"),
    [
        (
            lambda x: x.astype("int32"),
            lambda x: x,
            "if true, it is int32[], else float32[]",
        ),
        (lambda x: (x, x), lambda x: x, "if true, it returns (jax.ShapeDtypeStruct((), "),
        (lambda x: [x], lambda x: (x,), "disagree: if true"),
        (lambda x: None, lambda x: x, "if true, it returns None, else jax.Shape"),
    ],
)
def test_branches_that_disagree_otherwise(true, false, text):
    with pytest.raises(InferenceError, match=re.escape(text)):
        jax.jit(py_func(branching(true, false)))(jnp.float32(1))


@pytest.mark.parametrize("other", ["float16", "int32"])
def test_what_to_write_when_branches_disagree_works(other):
    body = branching(lambda x: x, lambda x: x.astype(other))
    with pytest.raises(InferenceError) as caught:
        jax.jit(py_func(body))(jnp.float32(1))
    (tout,) = re.findall(r"Tout=(.*)\.\n", str(caught.value))
    assert tout == "jax.ShapeDtypeStruct((), jnp.float32)"
    f = jax.jit(py_func(body, Tout=jax.ShapeDtypeStruct((), jnp.float32)))
    assert (f(jnp.float32(1)), f(jnp.float32(-1))) == (1, -1)


# Each with what the error names, which is on the line after `def`.
NEEDS_A_VALUE = {
    "float() of float32[]": lambda x: float(x[0]),
    "int() of float32[]": lambda x: int(x[0]),
    "complex() of float32[]": lambda x: complex(x[0]).real,
    "item() of float32[]": lambda x: x[0].item(),
    "tolist() of float32[3]": lambda x: x.tolist(),
    "conversion to NumPy of float32[3]": lambda x: np.sin(x),
    "use as an index or a size of int32[]": lambda x: range(x.astype(int)[0]),
    "Array boolean indices must be concrete": lambda x: x[x > 0],
    "Abstract tracer value encountered": lambda x: jnp.arange(x[0]),
}  # fmt: skip


@pytest.mark.parametrize("what", NEEDS_A_VALUE)
def test_a_body_that_needs_a_value_says_where(what):
    needs = NEEDS_A_VALUE[what]

    def body(x):
        return jnp.asarray(needs(x), jnp.float32)

    f = py_func(body)
    f(V)  # eager calls need no inference
    with pytest.raises(InferenceError) as caught:
        jax.jit(f)(V)
    text = str(caught.value)
    of_shapes = what.startswith(("Array boolean", "Abstract tracer"))
    reason = (
        "makes an array whose shape depends on data"
        if of_shapes
        else "needs a concrete value"
    )
    assert text.startswith(
        "py_func 'body': the shapes of its results cannot be inferred, because the body "
        f"{reason} at {__file__}:{needs.__code__.co_firstlineno}: "
    )
    assert what in text
    assert ("jnp.where(mask, x, 0)" in text) == of_shapes
    assert (
        "to find out: Tout=jax.ShapeDtypeStruct((), jnp.float32), for a scalar; else"
        in text
    )


def test_what_to_write_has_the_declared_structure_and_dtypes():
    like = jax.ShapeDtypeStruct((2,), jnp.bool_)
    f = py_func(lambda x: (float(x), x), Tout={"a": jnp.int8, "b": [like]})
    with pytest.raises(InferenceError) as caught:
        jax.jit(f)(1.0)
    assert (
        "Tout={'a': jax.ShapeDtypeStruct((), jnp.int8), "
        "'b': [jax.ShapeDtypeStruct((2,), jnp.bool)]}, for a scalar; else its shape"
    ) in str(caught.value)


def test_what_to_write_for_a_dtype_is_what_works(transform):
    def body(x):
        return x * float(x)

    with pytest.raises(InferenceError) as caught:
        jax.jit(py_func(body, Tout=jnp.float32))(3.0)
    source = re.search(r"Tout=(.*), for a scalar", str(caught.value))[1]
    assert transform(py_func(body, Tout=eval(source)))(3.0) == 9


def test_a_loop_that_never_ends_on_abstract_values():
    def body(x):
        while not x > 1:
            pass
        return x

    # Runs with few true answers come first: the one where the loop ends at once is found.
    assert jax.jit(py_func(body))(2.0) == 2

    def never(x):
        while True:
            x = x + 1 if x > 0 else x

    with pytest.raises(
        InferenceError,
        match=r"passes more than 64 branch points before it returns, the last at "
        r".*test_inference.*A loop in jax.lax.while_loop has none",
    ):
        jax.jit(py_func(never))(2.0)


def test_a_body_that_always_raises():
    def body(x):
        raise KeyError("missing")

    with pytest.raises(
        InferenceError,
        match=rf"^py_func 'body': KeyError at {line(body, 1)}: 'missing'\n.*fix the func",
    ) as caught:
        jax.jit(py_func(body))(2.0)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_body_that_reads_and_returns_nothing_is_told_to_declare_that():
    def shows(x):
        print(float(x))

    def shows_and_returns(x):
        print(float(x))
        return x

    for body, nothing in ((shows, True), (shows_and_returns, False)):
        with pytest.raises(InferenceError) as caught:
            jax.jit(py_func(body))(2.0)
        assert ("Tout=[], which means nothing" in str(caught.value)) == nothing


def test_truth_of_many_elements_is_ambiguous():
    with pytest.raises(InferenceError, match="truth value of an array"):
        jax.jit(py_func(lambda x: x if x > 0 else -x))(V)


def test_a_declared_dtype_is_checked_in_every_branch():
    body = branching(lambda x: x, lambda x: x * 1j)
    with pytest.raises(ResultError, match="expected float32, got complex64"):
        jax.jit(py_func(body, Tout=jnp.float32))(1.0)


def test_a_body_that_returns_another_shape_at_run_time_is_caught():
    shapes = iter([(2,), (3,)])
    f = jax.jit(py_func(lambda x: jnp.zeros(next(shapes))))
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"expected shape \(2,\), got \(3,\)"
    ):
        f(1.0).block_until_ready()


def test_full_tout_never_runs_the_body_while_tracing():
    runs = []

    def body(x):
        runs.append(type(x))
        return float(x)

    def nothing(x):
        runs.append(type(x))

    full = jax.ShapeDtypeStruct((), jnp.float32)
    for func, tout in ((body, full), (body, lambda x: x), (nothing, []), (nothing, None)):
        f = py_func(func, Tout=tout, stateful=True)
        lowered = jax.jit(f).lower(2.0)
        assert not runs
        lowered.compile()(2.0)
        jax.effects_barrier()
        assert len(runs) == 1
        runs.clear()


def test_no_data_is_used_while_tracing():
    values = []

    def body(x):
        values.append(x)
        return x[0] if x.sum() > 0 else x[1]

    jax.jit(py_func(body)).lower(V)
    assert len(values) == 2  # both branches
    for value in values:
        assert isinstance(value, jax.core.Tracer)
        with pytest.raises(TypeError, match=r"'body' left an array behind.*has no data"):
            np.asarray(value)


def test_prints_and_breakpoints_are_silent_while_tracing(capsys, monkeypatch):
    stops = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: stops.append(1))

    def body(x):
        print(
            "out",
            x.shape,
            f"{x:.3}" if not isinstance(x, jax.core.Tracer) else "",
            flush=True,
        )
        print("err", file=sys.stderr)
        sys.stdout.writelines(["more\n"])
        assert sys.stdout.isatty() is False
        breakpoint()
        return x

    f = jax.jit(py_func(body))
    lowered = f.lower(2.0)
    assert capsys.readouterr() == ("", "")
    assert not stops
    lowered.compile()(2.0).block_until_ready()
    assert capsys.readouterr() == ("out () 2.0\nmore\n", "err\n")
    assert stops == [1]


def test_streams_are_restored_when_inference_fails():
    before = sys.stdout, sys.stderr, sys.breakpointhook
    with pytest.raises(InferenceError):
        jax.jit(py_func(lambda x: float(x)))(1.0)
    assert (sys.stdout, sys.stderr, sys.breakpointhook) == before


STREAMS = ("stdout", "stderr", "breakpointhook")


@pytest.mark.parametrize("leaves_first", ["a", "b"])
@pytest.mark.parametrize("replaces", [False, True])
def test_streams_are_restored_whichever_thread_ends_first(leaves_first, replaces):
    """Two threads infer at the same time; one may put a stream of its own in place."""
    before = [getattr(sys, name) for name in STREAMS]
    entered = {"a": threading.Event(), "b": threading.Event()}
    first_is_out = threading.Event()
    own = io.StringIO()

    def run(name):
        def body(x):
            entered[name].set()
            assert entered["b"].wait(30)
            if replaces and name == "b":
                with contextlib.redirect_stdout(own):
                    print("to its own")
            assert name == leaves_first or first_is_out.wait(30)
            print("silent")
            return x

        assert name == "a" or entered["a"].wait(30)
        jax.eval_shape(py_func(body), 1.0)
        if name == leaves_first:
            first_is_out.set()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, "ab"))
    assert [getattr(sys, name) for name in STREAMS] == before
    assert own.getvalue() == ("to its own\n" if replaces else "")


def test_a_stream_installed_while_tracing_stays(monkeypatch):
    own = io.StringIO()

    def body(x):
        sys.stdout = own
        return py_func(lambda y: y + 1)(x)  # a block in a block

    monkeypatch.setattr(sys, "stdout", sys.stdout)
    jax.eval_shape(py_func(body), 1.0)
    assert sys.stdout is own


def test_tracing_works_after_inference_failed():
    def f(x):
        with pytest.raises(InferenceError):
            py_func(lambda x: float(x), [x])
        return py_func(lambda x: x * 2, [x]) + x

    assert jax.jit(f)(2.0) == 6
    assert jax.grad(f)(2.0) == 3


def test_a_stream_that_a_body_holds_prints_again_afterwards(capsys):
    held = []

    def body(x):
        held.append(sys.stdout)
        return x

    assert jax.jit(py_func(body))(1.0) == 1.0
    held[0].write("heard")
    assert capsys.readouterr().out == "heard"


def test_a_body_may_wait_for_a_thread_that_infers():
    inner = py_func(lambda x: x + 1)

    def body(x):
        with ThreadPoolExecutor(1) as pool:
            y = pool.submit(lambda: jax.jit(inner)(jnp.float32(3))).result(timeout=30)
        return x * y

    assert jax.jit(py_func(body))(2.0) == 8.0


@pytest.mark.parametrize(
    "body",
    [
        lambda x, n: x.sum(n),
        lambda x, n: jnp.stack([x for _ in range(n)]),
        lambda x, n: sum((x * i for i in range(n + 1)), x),
        lambda x, n: x[n],
        lambda x, n: jnp.zeros((n, 2)) + x[0, 0],
        lambda x, n: x if n > 0 else "nothing",
    ],
)
def test_a_python_number_that_is_not_traced_has_its_value(body):
    """Sizes, axes and indices are known while shapes are inferred."""
    x = jnp.arange(6.0).reshape(2, 3)
    check_same(jax.jit(lambda x: py_func(body, [x, 1]))(x), body(x, 1))
    check_same(jax.jit(lambda x: py_func(body)(x, n=1))(x), body(x, 1))


@pytest.mark.parametrize(
    ("true", "false"),
    [
        (lambda x: x.astype("int32"), lambda x: 0.5),
        (lambda x: 1j, lambda x: x.astype("float32")),
        (lambda x: x > 0, lambda x: 0),
    ],
)
def test_a_python_scalar_of_a_wider_kind_disagrees(true, false):
    """Eagerly one branch gives an int32, which under jit the other makes a float32."""
    with pytest.raises(InferenceError, match="disagree on result"):
        jax.jit(py_func(branching(true, false)))(jnp.float32(1.0))


def test_shard_map_in_an_inferred_body(transform):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    part = jax.sharding.PartitionSpec("d")
    doubled = jax.shard_map(lambda x: x * 2, mesh=mesh, in_specs=part, out_specs=part)

    def body(x):
        y = doubled(x)
        return y if y.sum() > 0 else -y

    with raise_original():
        np.testing.assert_array_equal(
            transform(py_func(body))(jnp.arange(4.0)), [0, 2, 4, 6]
        )


NESTINGS = {
    "inferred": lambda depth: {},
    "staged": lambda depth: {"staged": True},
    "mixed": lambda depth: {"staged": depth % 2 == 0},
}


@pytest.mark.parametrize("is_local", [False, True], ids=["global", "local"])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_nested_calls_are_explored_once(nesting, is_local):
    """They are not explored once for each path through their callers."""
    runs = itertools.count()

    def halved(x):
        next(runs)
        return x * 0.5 if x > 1 else x

    def nested(depth):
        inner = nested(depth - 1) if depth and not is_local else None

        def body(x):
            if depth == 0:
                return halved(x)
            f = inner or nested(depth - 1)
            return f(x) * 2 if x > 0 else f(-x)

        return py_func(body, **NESTINGS[nesting](depth))

    def of_depth(depth, x):
        if depth < 0:
            return x * 0.5 if x > 1 else x
        return of_depth(depth - 1, x) * 2 if x > 0 else of_depth(depth - 1, -x)

    program = jax.jit(nested(5)).lower(0.25)
    assert next(runs) < 20
    for x in (0.25, -3.0):
        assert_close(program.compile()(x), np.float32(of_depth(4, x)))


STATES = {
    "dict": ("state['n'] = n", "state['n']"),
    "global": ("globals()['SIZE'] = n", "SIZE"),
    "nonlocal": ("size = n", "size"),
    "attribute": ("self.n = n", "self.n"),
    "array": ("array[0] = n", "int(array[0])"),
    "deque": ("queue.append(n)", "queue[-1]"),
    "wrapped": ("state['n'] = n", "sized(jnp.ones(1)).shape[1]"),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("staged", [False, True])
def test_a_nested_body_of_which_something_changed_is_explored_again(state, staged):
    write, read = STATES[state]
    source = f"""
def make(py_func, state, self, array):
    size, queue = 0, collections.deque([0], 1)
    sized = jax.vmap(lambda x: x * jnp.ones(state["n"]))

    @py_func
    def inner(x):
        return jnp.ones({read}) * x

    def outer(x):
        nonlocal size
        results = []
        for n in (2, 3):
            {write}
            results.append(inner(x) if x > n else inner(-x))
        return results

    return py_func(outer)
"""
    scope = {"collections": collections, "jax": jax, "jnp": jnp, "SIZE": 0}
    exec(source, scope)
    wrap = functools.partial(py_func, staged=staged)
    f = scope["make"](wrap, {"n": 0}, SimpleNamespace(n=0), np.zeros(1))
    assert [y.shape for y in jax.eval_shape(f, 1.0)] == [(2,), (3,)]
    assert_close(jax.jit(f)(2.5), [jnp.full(2, 2.5), jnp.full(3, -2.5)])


def test_three_nested_loops_are_inferred_in_seconds():
    run_program(
        """
        import jax, jax.numpy as jnp
        from jpyfunc import py_func

        def looped(f):
            @py_func
            def body(x):
                while x > 1:
                    x = f(x) * 0.5
                return x
            return body

        f = looped(looped(looped(jnp.sin)))
        assert jax.eval_shape(f, 0.5).shape == ()
        """,
        limit=60,
    )


def test_a_ref_is_indexed_by_numbers():
    def body(x):
        ref = jax.new_ref(jnp.zeros(3))
        ref[0] = 5.0
        return ref[...] * x

    assert_close(jax.jit(py_func(body))(2.0), jnp.array([10.0, 0, 0]))
