"""Staged bodies: compiled where they can be traced, called elsewhere, always right."""

import functools
import inspect
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CASES,
    CUSTOM_VJP,
    SCALAR,
    assert_close,
    eager_and_jit,
    log_huber,
    loop,
    plain_log_huber,
    scalar,
)
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jpyfunc
from jpyfunc import explain, numpy_func, profile, py_func
from jpyfunc._limits import MAX_CALLS
from jpyfunc._staging.numpy_constants import NumpyCopies

xs = jnp.linspace(0.5, 4.0, 7)


def staged(body, **options):
    return py_func(body, **{"staged": True, **options})


def calls_of(function, *args):
    """Return how often `py_func` occurs in the jaxpr, and its primitives."""
    text = str(jax.make_jaxpr(function)(*args))
    return text.count("py_func[")


DERIVATIVES = {
    "forward": lambda f, n: f,
    "grad": lambda f, n: jax.grad(scalar(f), tuple(range(n))),
    "hessian": lambda f, n: jax.hessian(scalar(f)),
}
COMPLETE = {case.name for case in CASES} - {"py_func", "jitted_py_func", "while"}


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_case(case, derivative):
    options = {} if case.Tout is None else {"Tout": case.Tout}
    f = staged(case.body, **options)
    n = len(case.args)
    take = DERIVATIVES[derivative]
    want = jax.jit(take(case.plain, n))(*case.args)
    # Bodies that are called beyond a limit have the most branches to compile.
    eager = case.name != "while" or derivative == "forward"
    for got in eager_and_jit(take(f, n), *case.args, eager=eager):
        assert_close(got, want)
    if case.name in COMPLETE:
        assert not calls_of(take(f, n), *case.args)


def test_a_custom_vjp_is_preserved(transform):
    f = staged(CUSTOM_VJP.body)
    assert not calls_of(jax.grad(f), 0.7)
    assert_close(transform(jax.grad(f))(0.7), jax.grad(CUSTOM_VJP.body)(0.7))


def test_operations_before_a_branch_are_in_the_program_once():
    def body(x):
        y = jnp.sin(jnp.cos(x))
        if y > 0:
            return y + 1
        return y - 1 if y > -1 else y

    text = str(jax.make_jaxpr(staged(body))(1.0))
    assert (text.count(" sin "), text.count(" cos ")) == (1, 1)


def test_vmap_of_everything(transform):
    f = staged(log_huber)
    for take in (lambda f: f, lambda f: jax.grad(f, (0, 1)), jax.hessian):
        got = transform(jax.vmap(take(f), (0, None)))(xs, 2.0)
        plain = jax.jit(take(plain_log_huber))
        assert_close(got, loop(lambda x, plain=plain: plain(x, 2.0), xs))
    assert not calls_of(jax.vmap(jax.grad(f), (0, None)), xs, 2.0)


def test_export_and_compile_ahead():
    f = jax.jit(jax.grad(staged(log_huber)))
    exported = jax.export.export(f)(SCALAR, SCALAR)
    assert exported.call(3.0, 2.0) == f(3.0, 2.0)
    compiled = f.lower(3.0, 2.0).compile()
    assert "callback" not in compiled.as_text()
    assert compiled(3.0, 2.0) == f(3.0, 2.0)


def test_sharded_programs_gather_nothing():
    mesh = Mesh(np.array(jax.devices()[:4]), ("a",))

    def body(x):
        return jnp.sin(x) * x if x[0] > 0 else x + 1

    x = jax.device_put(jnp.arange(1.0, 9.0), NamedSharding(mesh, P("a")))
    batch = jax.jit(jax.vmap(staged(lambda x: jnp.sin(x) if x > 3 else x * 2)))
    assert "all-gather" not in batch.lower(x).compile().as_text()
    assert_close(batch(x), jnp.where(x > 3, jnp.sin(x), x * 2))
    mapped = jax.shard_map(staged(body), mesh=mesh, in_specs=P("a"), out_specs=P("a"))
    assert_close(jax.jit(mapped)(x), jnp.sin(x) * x)
    constant = staged(lambda x: x if x[0] > 4 else jnp.zeros(2))
    mapped = jax.shard_map(constant, mesh=mesh, in_specs=P("a"), out_specs=P("a"))
    assert jax.jit(mapped)(x).tolist() == [0, 0, 0, 0, 5, 6, 7, 8]


def newton(a):
    """Newton's square root, in a loop that is none: a list grows."""
    xs = [a]
    while abs(xs[-1] * xs[-1] - a) > 1e-4 * a:
        xs.append(0.5 * (xs[-1] + a / xs[-1]))
    return xs[-1]


@pytest.mark.parametrize("take", [lambda f: f, jax.grad, lambda f: jax.grad(jax.grad(f))])
def test_paths_beyond_the_limit_call_the_body(take, transform):
    f = staged(newton, staged=4)
    assert calls_of(f, 1.0) == 1
    program = transform(take(f))
    with profile() as prof:
        for a in (1.0, 1.1, 1e4):
            assert_close(program(a), take(newton)(a), rtol=1e-3)
    counted = prof.as_dict()
    if transform is jax.jit:
        assert counted["newton (leaf)"]["forward"]["calls"] == 1


def test_a_leaf_in_a_batch_runs_for_the_elements_that_need_it(transform):
    ran = []

    def body(x):
        if x > 2:
            ran.append(np.asarray(jax.lax.stop_gradient(x)).tolist())
            return x * x
        return jnp.sin(x)

    f = staged(body, vmap_method="sequential")
    f(3.0)  # outside of transforms, it is simply called
    assert ran == [3.0]
    ran.clear()
    with profile() as prof:
        got = jax.block_until_ready(transform(jax.vmap(f))(xs))
    assert_close(got, jnp.where(xs > 2, xs**2, jnp.sin(xs)))
    assert ran == [x for x in xs.tolist() if x > 2]
    counted = prof.as_dict()["body (leaf)"]["forward"]
    assert (counted["elements"], counted["runs"]) == (4, 4)
    ran.clear()
    got = transform(jax.vmap(jax.grad(f)))(xs)
    assert_close(got, jnp.where(xs > 2, 2 * xs, jnp.cos(xs)))
    assert ran == [x for x in xs.tolist() if x > 2]
    with profile() as prof:
        jax.block_until_ready(transform(jax.vmap(staged(body)))(xs))
    assert prof.as_dict()["body (leaf)"]["forward"]["elements"] == 4  # by branch, too
    nested = transform(jax.vmap(jax.vmap(jax.grad(f))))(xs[:6].reshape(2, 3))
    assert_close(nested.ravel(), jnp.where(xs > 2, 2 * xs, jnp.cos(xs))[:6])


def test_leaves_in_both_branches_and_in_scans(transform):
    """They run for the elements that reach them through all branches before."""
    ran = []

    def body(x, y):
        if not isinstance(x, jax.core.Tracer):
            ran.append((float(x), float(y)))
        if x > 2:
            if y > 0:
                return x * float(y)
            return x
        if y > 0:
            return x + y
        return x - float(y)

    f = staged(body, Tout=SCALAR, vmap_method="sequential")
    x, y = jnp.array([3.0, 3.0, 1.0, 1.0]), jnp.array([1.5, -1.0, 1.0, -1.0])
    want = jnp.array([4.5, 3.0, 2.0, 2.0])
    scanned = lambda x, y: jax.lax.scan(lambda c, at: (c + 1, f(*at)), 0, (x, y))[1]  # noqa: E731
    in_parts = lambda x, y: jax.lax.map(lambda at: f(*at), (x, y), batch_size=2)  # noqa: E731
    for program in (jax.vmap(f), scanned, in_parts):
        ran.clear()
        assert_close(transform(program)(x, y), want)
        assert sorted(ran) == [(1.0, -1.0), (3.0, 1.5)]


def test_a_body_that_differs_when_run_again_is_called(transform):
    """Abstract runs of it would describe several different bodies."""
    runs = []

    def added(x):
        for _ in runs:
            x = x + 1
        return x

    def before_a_branch(x):
        runs.append(1)
        x = added(x)
        return x * 2 if x > 0 else x - 1

    def after_a_branch(x):
        runs.append(1)
        x = added(x * 2 if x > 0 else x - 1)
        return x if x > 1 else -x

    for body, want in ((before_a_branch, 4.0), (after_a_branch, 3.0)):
        f = staged(body, Tout=SCALAR)
        runs.clear()
        assert calls_of(f, 1.0) >= 1
        program = jax.jit(f).lower(1.0).compile() if transform is jax.jit else f
        runs.clear()
        assert_close(program(1.0), jnp.float32(want))  # that of a first run


TESTS_OF_TRUTH = {
    "and_or_not": lambda x: x if (x > 1 and not x > 3) or x < 0.6 else -x,
    "chained": lambda x: x * 2 if 1 < x < 3 else x,
    "number": lambda x: x * 2 if x - 0.5 else x + 1,
    "any": lambda x: x if any([x > 3, x < 1]) else 2 * x,
    "all": lambda x: x if all([x > 1, x < 3]) else 2 * x,
    "max": lambda x: max(x, 2.5 - x, 1.5),
    "min": lambda x: min([x, 2.0, 3 - x]) * x,
    "sorted": lambda x: sorted([x, 2.0 - x, 0.5 * x])[1] * x,
    "conditional": lambda x: (jnp.sin if x > 2 else jnp.cos)(x),
}


@pytest.mark.parametrize("test", TESTS_OF_TRUTH)
def test_truth_tests_mean_the_same_as_in_python(test):
    body = TESTS_OF_TRUTH[test]
    f = staged(body)
    assert not calls_of(f, 1.0)
    eager = jax.value_and_grad(f)
    compiled = jax.jit(eager)
    for x in (0.5, 0.7, 1.2, 2.2, 3.7):
        want = jax.value_and_grad(body)(x)
        assert_close(eager(x), want)
        assert_close(compiled(x), want)


def test_loops_returns_breaks_and_exceptions(transform):
    def body(x):
        total = 0.0
        for i in range(5):
            if x < i:
                break
            if x > 3.5:
                return -x
            total = total + x / (i + 1)
        else:
            total = total * 100
        try:
            if total > 3:
                raise ValueError("caught")
        except ValueError:
            total = total - 1
        assert x > 0.55, "too small"
        return total

    f = staged(body)
    program = transform(jax.vmap(f))
    assert_close(program(xs[1:]), loop(body, xs[1:]))
    with pytest.raises(AssertionError, match="too small"), jpyfunc.raise_original():
        jax.block_until_ready(program(xs))
    tree = explain(f, 1.0).as_dict()["tree"]
    reasons = {reason for node in _nodes(tree) for reason in node.get("calls", ())}
    assert any(reason.startswith("AssertionError: too small at ") for reason in reasons)


def _nodes(node):
    yield node
    for branch in ("true", "false"):
        if branch in node:
            yield from _nodes(node[branch])


def test_a_failed_read_that_the_body_catches_is_not_a_branch(transform):
    def body(x):
        try:
            return x * float(x)
        except TypeError:
            return x * 1000

    f = staged(body, Tout=SCALAR)
    assert transform(f)(3.0) == 9.0
    assert calls_of(f, 1.0) == 1


@jax.custom_jvp
def scaled(x, b):
    return x * b


scaled.defjvp(lambda xb, ts: (xb[0] * xb[1], ts[0] * xb[1]))


@jax.custom_vjp
def scaled_back(x, b):
    return x * b


scaled_back.defvjp(lambda x, b: (x * b, b), lambda b, g: (g * b, jnp.zeros_like(b)))


def in_shard_map(x, b):
    mesh = Mesh(np.array(jax.devices()[:1]), ("a",))
    spec = (P(), P())
    return jax.shard_map(lambda x, b: x * b, mesh=mesh, in_specs=spec, out_specs=P())(x, b)


# Each computes x * b, where b is a NumPy array.
USES_OF_A_BUFFER = {
    "operand": lambda x, b: x * b,
    "put": lambda x, b: x * jnp.asarray(b),
    "jit": lambda x, b: jax.jit(lambda x: x * b)(x),
    "nested_jit": lambda x, b: jax.jit(lambda x: jax.jit(lambda x: x * b)(x) + 0 * b)(x),
    "result_of_jit": lambda x, b: x * jax.jit(lambda x: (x, b))(x)[1],
    "cond": lambda x, b: jax.lax.cond(x.sum() > 0, lambda x: x * b, lambda x: x, x),
    "scan": lambda x, b: jax.lax.scan(lambda c, _: (x * b, None), x, None, length=2)[0],
    "while": lambda x, b: jax.lax.fori_loop(0, 2, lambda i, c: x * b, x),
    "checkpoint": lambda x, b: jax.checkpoint(lambda x: x * b)(x),
    "vmap": lambda x, b: jax.vmap(lambda x: x * b)(x[None])[0],
    "custom_jvp": scaled,
    "custom_vjp": scaled_back,
    "shard_map": in_shard_map,
}


@pytest.mark.parametrize("ndim", [0, 1])
@pytest.mark.parametrize("use", USES_OF_A_BUFFER)
def test_a_numpy_array_written_to_later_keeps_its_values(use, ndim, transform):
    def body(x):
        weights = np.zeros((3,) * ndim, np.float32)
        total = 0.0
        for i in range(3):
            weights += i + 1  # 1, 3, 6
            total = total + USES_OF_A_BUFFER[use](x, weights) * 10**i
        return total if total[0] > 0 else -total

    f, x = staged(body), jnp.array([1.0, 2.0, 3.0])
    assert not calls_of(f, x)
    assert_close(transform(f)(x), 631 * x)
    assert_close(transform(jax.grad(lambda x: f(x).sum()))(x), jnp.full(3, 631.0))


def test_runs_share_the_copy_of_a_jaxpr_until_its_arrays_change():
    held = np.ones(3, np.float32)
    jaxpr = jax.make_jaxpr(lambda x: jax.jit(lambda x: x * held)(x))(1.0)
    copies = NumpyCopies()
    first = copies.copied(jaxpr)
    assert copies.copied(jaxpr) is first
    copies.end_run()
    assert copies.copied(jaxpr) is first
    held[:] = 2  # a function that was traced has the constants of that moment
    assert copies.copied(jaxpr) is first
    copies.end_run()
    second = copies.copied(jaxpr)
    held[:] = 3
    for copy, want in ((first, 1.0), (second, 2.0)):
        (got,) = jax.core.eval_jaxpr(copy.jaxpr, copy.consts, 1.0)
        assert_close(got, jnp.full(3, want))


def test_there_are_not_too_many_calls(transform):
    def body(x):
        total = x * 0
        for k in range(30):
            if jnp.sin(x * k) > 0:
                total = total + k * x
        return total

    f = staged(body)
    assert 0 < calls_of(f, 1.0) <= MAX_CALLS
    for x in (-0.2, 1.0, 0.01):
        assert_close(transform(f)(x), body(jnp.float32(x)), rtol=1e-4)


def aligned(value):
    """Make 1,000 numbers, aligned so that XLA takes them without a copy."""
    buffer = np.empty(4096 + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    array = buffer[start : start + 4000].view(np.float32)
    array[:] = value
    return array


@pytest.mark.parametrize("options", [{"staged": True}, {}], ids=str)
def test_a_numpy_array_returned_or_passed_on_keeps_its_values(options):
    buffers = []

    def body(x, given):
        for buffer in buffers:
            buffer += 100
        buffers.append(aligned(5.0))
        return x * given if x < 0 else buffers[-1]

    def program(x):
        given = aligned(1.0)
        tout = jax.ShapeDtypeStruct((1000,), jnp.float32)
        result = py_func(body, Tout=tout, **options)(x, given)
        given += 7
        return result

    assert_close(jax.jit(program)(1.0), jnp.full(1000, 5.0))
    buffers.clear()
    assert_close(jax.jit(program)(-2.0), jnp.full(1000, -2.0))


OTHER_EACH_TIME = {
    "operation": lambda x, n: (jnp.sin if n % 2 else jnp.cos)(x),
    "operand": lambda x, n: (x * 2, x * 3)[n % 2] + 1,
    "order": lambda x, n: (x * 2 - x * 3, x * 3 - x * 2)[n % 2],
    "number": lambda x, n: x * n,
    "array": lambda x, n: x * np.full(3, n, np.float32),
    "key": lambda x, n: x + jax.random.normal(jax.random.key(n), (3,)),
    "parameter": lambda x, n: x ** (2 + n),
    "constant": lambda x, n: jax.jit(lambda x: x * n)(x),
    "inner_operand": lambda x, n: jax.jit(lambda x, y: (x, y)[n % 2] * 2)(x, x * x),
    "test": lambda x, n: x if x[n % 2] > 7 else 2 * x,
}


@pytest.mark.parametrize("what", OTHER_EACH_TIME)
def test_a_body_that_differs_in_each_run_is_called(what):
    counter = itertools.count()

    def body(x):
        x = OTHER_EACH_TIME[what](x, next(counter))
        return x if x.sum() > 0 else -x

    reasons = explain(body, jnp.ones(3)).as_dict()["tree"]["calls"]
    assert reasons == ["it does something else when it runs again"]


def test_objects_made_again_in_each_run_are_staged(transform):
    def body(x):
        x = x * jax.nn.relu(x) + jax.jit(lambda y: jnp.where(y > 9, jnp.nan, y))(x)
        x = x + jax.random.normal(jax.random.key(3), (3,)) * np.arange(3)
        x = jax.lax.cond(x[0] > 0, lambda y: y + 1, lambda y: -y, x)
        return x if x.sum() > 0 else jnp.linspace(0, 1, 200)[:3] * x

    f = staged(body)
    assert not calls_of(f, jnp.ones(3))
    for x in (jnp.ones(3), -jnp.ones(3)):
        assert_close(transform(f)(x), body(x))


@pytest.mark.parametrize("options", [{}, {"staged": True}], ids=str)
def test_constants_that_a_body_caches_are_arrays(options):
    """Constants of any size are known, during abstract runs and afterwards."""

    @functools.cache
    def table(n):
        return jnp.cumsum(jnp.zeros(n) + jnp.arange(float(n)))

    def body(x):
        return (x * table(1000)).sum() if x > 0 else x * table(10)[3] * table(999)[2]

    def plain(x):
        sums = np.cumsum(np.arange(1000.0))
        return jnp.where(x > 0, x * sums.sum(), x * 6 * 3)

    f = py_func(body, **options)
    for x in (1.0, -1.0, 2.0):
        for take in (lambda f: f, jax.grad):
            assert_close(jax.jit(take(f))(x), jax.jit(take(plain))(x), rtol=1e-4)
    assert all(type(table(n)) is type(jnp.ones(1)) for n in (10, 999, 1000))


def test_constants_have_values_and_are_not_in_the_program():
    def body(x):
        mask = jnp.arange(1_000_000) % 3 == 0
        shared = mask * 2.0
        for _ in range(60):
            shared = shared + shared  # takes exponential time if it is traversed as a tree
        if mask[6] and not mask[7] and float(shared[3]) > 0:  # it is an array
            return x * jnp.where(mask, shared, 0).mean() * 2.0**-60 if x > 0 else x
        raise AssertionError

    f = staged(body)
    assert not calls_of(f, 1.0)
    assert len(jax.jit(f).lower(1.0).as_text()) < 100_000
    assert_close(jax.jit(f)(3.0), jnp.float32(2 * 333_334 * 3e-6))


@pytest.mark.parametrize("options", [{}, {"staged": True}], ids=str)
def test_an_abstract_array_left_behind_says_what_to_do(options):
    held = []

    def body(x):
        held.append(x * 2)
        return x + held[0]

    jax.eval_shape(py_func(body, **options), 1.0)
    for use in (lambda: held[0] + 1, lambda: held[0].shape, lambda: np.sin(held[0])):
        with pytest.raises(TypeError, match=r"'body' left an array behind.*Pass such"):
            use()
    with pytest.raises(jpyfunc.InferenceError, match="'body' left an array behind"):
        jax.jit(py_func(body, **options))(jnp.ones(2))
    assert "left behind" in repr(held[0])


def test_effects_call_the_body(transform, capfd):
    def body(x):
        if x > 2:
            jax.debug.print("large {}", x)
            return x * 2
        return x

    program = transform(staged(body))
    assert_close(program(3.0), jnp.float32(6.0))
    assert_close(program(1.0), jnp.float32(1.0))
    jax.effects_barrier()
    assert capfd.readouterr().out == "large 3.0\n"


def test_nested_py_funcs_are_staged_in_place():
    inner = staged(log_huber)
    outer = staged(lambda x: inner(x, 2.0) * x if x > 1 else -inner(x, 2.0))
    assert not calls_of(jax.grad(outer), 1.0)
    called = py_func(log_huber, Tout=SCALAR)
    mixed = staged(lambda x: called(x, 2.0) * x if x > 1 else x)
    assert calls_of(mixed, 1.0) == 1
    for f, plain in (
        (outer, lambda x: log_huber(x, 2.0) * x if x > 1 else -log_huber(x, 2.0)),
        (mixed, lambda x: log_huber(x, 2.0) * x if x > 1 else x),
    ):
        for x in (0.5, 1.5, 3.0):
            assert_close(jax.jit(jax.value_and_grad(f))(x), jax.value_and_grad(plain)(x))


weights = jnp.arange(3.0)


class Model:
    def __init__(self, scale):
        self.scale = scale

    @staged
    def method(self, x, *, flip=False, options=None):
        """A method."""
        y = (x["a"] * weights).sum() * self.scale
        return {"y": -y if y > 3 else y} if flip else {"y": y + options[0]}


def test_every_form_of_call(transform):
    model = Model(2.0)
    x = {"a": jnp.ones(3)}
    assert transform(lambda x: model.method(x, flip=True))(x)["y"] == -6.0
    assert transform(lambda x: model.method(x, options=[1.0]))(x)["y"] == 7.0
    assert not calls_of(lambda x: model.method(x, flip=True), x)
    assert "y > 3" in repr(explain(model.method, x, flip=True))
    in_place = transform(lambda x: py_func(log_huber, [x, 2.0], jnp.float32, staged=True))
    assert in_place(3.0) == log_huber(3.0, 2.0)
    keys = transform(staged(lambda k, x: jax.random.split(k)[0] if x > 0 else k))
    key = jax.random.key(0)
    assert keys(key, 1.0) == jax.random.split(key)[0]
    assert keys(key, -1.0) == key


def test_results_are_cast_as_those_of_a_call(transform):
    for body in (lambda x: 1 if x > 0 else x, lambda x: jnp.arange(2) if x > 0 else [x, x]):
        for x in (1.0, -1.0):
            want = np.asarray(body(x), np.float32)
            wide = jax.ShapeDtypeStruct(want.shape, jnp.float32)
            for f in (staged(body, Tout=wide), py_func(body, Tout=wide)):
                got = transform(f)(x)
                assert_close(got, want)
                assert not got.weak_type
    for x in (1.0, jnp.float32(1), jnp.bfloat16(1)):
        for true, false in ((lambda x: x * 2, lambda x: 1.0), (lambda x: 1.0, lambda x: x)):
            plain = jax.jit(lambda x, t=true, f=false: jnp.where(x > 0, t(x), f(x)))
            body = lambda x, t=true, f=false: t(x) if x > 0 else f(x)  # noqa: E731
            for f in (staged(body), py_func(body)):
                for at in (x, -x):
                    got, want = jax.jit(f)(at), plain(at)
                    assert_close(got, want)
                    assert got.weak_type == want.weak_type


def test_a_branch_that_returns_something_else_calls_where_it_is_declared(transform):
    def body(x):
        return jnp.ones(2) if x > 3 else x

    program = transform(staged(body, Tout=SCALAR))
    assert program(1.0) == 1.0
    shape = r"expected shape \(\)"
    with pytest.raises(jpyfunc.ResultError, match=shape), jpyfunc.raise_original():
        jax.block_until_ready(program(4.0))
    with pytest.raises(jpyfunc.InferenceError, match="disagree on result"):
        jax.jit(staged(body))(1.0)


@pytest.mark.parametrize("shared", [False, True])
def test_nan_of_the_other_branch_reaches_no_gradient(shared, transform):
    """`vmap` computes both branches and selects from their results.

    JAX also stops the gradients of their operands, so that no order of `vmap` and
    derivatives yields the NaN of a branch that is not taken.
    """

    def body(x, w):
        return jnp.sqrt(w if shared else x) * w if x > 0 else x * 0

    def plain(x, w):
        root = jnp.sqrt(jnp.where(x > 0, w if shared else x, 1.0))
        return jnp.where(x > 0, root * w, x * 0)

    for take in (
        lambda f: jax.grad(lambda *xw: jax.vmap(f, (0, None))(*xw).sum(), (0, 1)),
        lambda f: jax.vmap(jax.grad(f, (0, 1)), (0, None)),
        lambda f: jax.jacfwd(jax.vmap(f, (0, None)), (0, 1)),
        lambda f: jax.vmap(jax.hessian(f), (0, None)),
    ):
        program, called = transform(take(staged(body))), transform(take(py_func(body)))
        expected = jax.jit(take(plain))
        for x in (jnp.array([-1.0, 0.0, 4.0]), jnp.array([-1.0, -2.0, 0.0])):
            w = 0.0 if x.max() <= 0 else 2.0
            want = expected(x, w)
            assert_close(program(x, w), want)
            assert_close(called(x, w), want)
            assert all(jnp.isfinite(y).all() for y in jax.tree.leaves(want))


def test_a_large_tree_warns():
    def body(x):
        for i in range(400):
            x = jnp.sin(x) * i + 1
        return x if x > 0 else -x

    with pytest.warns(UserWarning, match=r"'body' is staged to 2,\d+ operations.*staged=1"):
        jax.eval_shape(staged(body), SCALAR)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"staged": -1}, "expected staged to be True, False or a number"),
        ({"staged": "yes"}, "expected staged to be True, False or a number"),
        ({"stateful": True}, "is stateful"),
        ({"ordered": True}, "is stateful"),
        ({"vmap_method": "expand_dims"}, "has vmap_method='expand_dims'"),
    ],
)
def test_what_cannot_be_staged_is_refused(options, what):
    with pytest.raises(ValueError, match=f"py_func 'log_huber': .*{what}"):
        staged(log_huber, **options)


def test_a_body_without_results_cannot_be_staged():
    with pytest.raises(ValueError, match="returns nothing"):
        jax.jit(staged(lambda x: None))(1.0)
    with pytest.raises(TypeError, match="staged"):
        numpy_func(np.sin, staged=True)


def test_explain_tells_lines_and_reasons():
    def body(x):
        if x > 2:
            return x * float(x)
        if x > 1:
            raise ValueError("why not")
        return jnp.sin(x) + 1

    found = explain(body, SCALAR)
    data = found.as_dict()
    line = inspect.getsourcelines(body)[1]
    root, file = data["tree"], sys.modules[__name__].__file__
    assert (root["line"], root["place"]) == ("if x > 2:", f"{file}:{line + 1}")
    (read,) = root["true"]["calls"]
    assert read == f"float() of float32[] at {file}:{line + 2}"
    (raised,) = root["false"]["true"]["calls"]
    assert raised == f"ValueError: why not at {file}:{line + 4}"
    assert root["false"]["false"]["returns"]
    assert (data["complete"], data["runs"], data["error"]) == (False, 3, None)
    text = repr(found)
    for part in ("if x > 2:", "calls Python: float()", "False: ", "returns"):
        assert part in text
    assert "&gt; 2" in found._repr_html_()


def test_explain_says_why_inference_fails():
    failing = explain(lambda x: np.asarray(x) + 1, SCALAR).as_dict()
    assert failing["result"] is None
    assert "conversion to NumPy of float32[]" in failing["tree"]["calls"][0]
    assert "Tout=" in failing["error"]
    disagreeing = explain(lambda x: x if x > 0 else (x, x), SCALAR).as_dict()
    assert "disagree" in disagreeing["error"]
    with pytest.raises(TypeError, match="explain: expected a function"):
        explain(3)
    assert explain(log_huber, jax.ShapeDtypeStruct((), jnp.float32), 2).as_dict()[
        "complete"
    ]


def test_calls_in_a_staged_body_are_made_for_those_that_come_to_them(transform):
    @py_func(Tout=SCALAR)
    def inner(x):
        if float(jax.lax.stop_gradient(x)) < 0:
            raise ValueError("negative")
        return x * 2

    def body(x):
        if x > 0:
            return inner(x)
        return -x

    f = staged(body)
    assert_close(transform(jax.vmap(f))(jnp.array([-1.0, 2.0])), jnp.array([1.0, 4.0]))
    assert not explain(f, 1.0).as_dict()["complete"]
    assert calls_of(f, 1.0) == 1


def test_text_of_a_value_is_a_read_unless_it_is_printed(transform):
    def tagged(x):
        return x * 2 if f"{x:.1f}" == "2.0" else x * 3

    def shown(x):
        print(x)
        return x * 2

    assert transform(staged(tagged, Tout=SCALAR))(2.0) == 4.0
    assert calls_of(staged(tagged, Tout=SCALAR), 2.0) == 1
    assert calls_of(staged(shown, Tout=SCALAR), 2.0) == 0
