"""`vmap` by branch: the answers of one element at a time, in as few runs as can be."""

import asyncio
import contextlib
import dataclasses
import io
import math
import random
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
from jax.extend.core import Primitive

import jpyfunc
from jpyfunc import (
    GradientCutWarning,
    numpy_func,
    profile,
    py_func,
    set_tape_limit,
    tape_bytes,
)
from jpyfunc._interpreters import by_branch as by_branch_module
from jpyfunc._interpreters.batched_operation import batch_operation
from jpyfunc._interpreters.operations import CompiledOperation

wrapped = py_func(log_huber, Tout=SCALAR)


def by_branch(body, **options):
    return py_func(body, **{"Tout": SCALAR, "vmap_method": "by_branch", **options})


def runs_of(program, *args):
    """Return the result of a program, and how often the body ran in it."""
    with profile() as prof:
        result = jax.block_until_ready(program(*args))
    (kinds,) = prof.as_dict().values()
    return result, sum(row["runs"] for row in kinds.values())


def columns_of(case):
    """Make arguments of a case for three elements, which may take different branches."""
    scale = jnp.array([1.0, -0.5, 2.5])
    return jax.tree.map(
        lambda x: jnp.stack([s * jnp.asarray(x) for s in scale]), tuple(case.args)
    )


DERIVATIVES = {
    "forward": lambda f, n: f,
    "grad": lambda f, n: jax.grad(scalar(f), tuple(range(n))),
    "jacfwd": lambda f, n: jax.jacfwd(f, tuple(range(n))),
    "hessian": lambda f, n: jax.hessian(scalar(f)),
}


def one_by_one(case, derivative):
    take = jax.jit(DERIVATIVES[derivative](case.plain, len(case.args)))
    columns, structure = jax.tree.flatten(columns_of(case))
    return loop(lambda *row: take(*structure.unflatten(row)), *columns)


EVERY = [(case, derivative) for case in CASES for derivative in DERIVATIVES]
EVERY += [(CUSTOM_VJP, "forward"), (CUSTOM_VJP, "grad")]


@pytest.mark.parametrize(("case", "derivative"), EVERY, ids=str)
def test_every_case(case, derivative):
    """Matrices only under jit: eagerly the host does the same, and JAX is slow."""
    program = jax.vmap(DERIVATIVES[derivative](case.wrapped, len(case.args)))
    want = one_by_one(case, derivative)
    eager = derivative in ("forward", "grad")
    for got in eager_and_jit(program, *columns_of(case), eager=eager):
        assert_close(got, want)


xs, ms = jnp.linspace(0.5, 4.0, 7), jnp.linspace(1.0, 3.0, 5)


def test_orders_and_axes_in_every_mix():
    """Nest vmaps, with derivatives between and around them and shared operands."""
    table = lambda f: jax.vmap(jax.vmap(f, (None, 0)), (0, None))  # noqa: E731
    for take in (
        lambda f, over: over(jax.grad(f, (0, 1))),
        lambda f, over: jax.grad(lambda x, m: jnp.sin(over(f)(x, m)).sum(), (0, 1)),
        lambda f, over: jax.jacrev(lambda x, m: over(f)(x, m).sum(0), 1),
        lambda f, over: jax.jacfwd(lambda x, m: over(jax.grad(f))(x, m).sum(1)),
    ):
        want = jax.jit(take(plain_log_huber, table))(xs, ms)
        for got in eager_and_jit(take(wrapped, table), xs, ms):
            assert_close(got, want)


def test_scans_inside_and_outside(transform):
    def scan(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c) * 2, c), x, None, length=3)[0]

    def grown(x):
        return jax.lax.while_loop(lambda c: c < 10, lambda c: c * 1.5, x)

    def scanned(f):
        return lambda x: jax.lax.scan(
            lambda c, _: (f(c) * 0.3 + 1, f(c)), x, None, length=3
        )[1].sum()

    with_loops = by_branch(lambda x: scan(x) if x > 2 else grown(x))
    plain = lambda x: jax.lax.cond(x > 2, scan, grown, x)  # noqa: E731
    got = transform(jax.vmap(scanned(with_loops)))(xs)
    assert_close(got, jax.vmap(scanned(plain))(xs))
    smooth = by_branch(lambda x: jnp.sin(x) * x if x > 2 else x**3)
    plain = lambda x: jnp.where(x > 2, jnp.sin(x) * x, x**3)  # noqa: E731
    got = transform(jax.vmap(jax.grad(scanned(smooth))))(xs)
    assert_close(got, jax.vmap(jax.grad(scanned(plain)))(xs))


def test_checkpoint_around_a_batch(transform):
    program = lambda f: lambda x: jnp.sum(jnp.sin(f(x)))  # noqa: E731
    over = jax.checkpoint(jax.vmap(lambda x: wrapped(x, 2.0)))
    got = transform(jax.grad(program(over)))(xs)
    plain = lambda x: plain_log_huber(x, 2.0)  # noqa: E731
    assert_close(got, jax.grad(program(plain))(xs))


@pytest.mark.parametrize("count", [2, 40])
def test_an_array_is_unpacked_into_its_rows(count, transform):
    def body(key):
        total = jnp.float32(0)
        for row in jax.random.split(key, count):
            total = 2 * total + jax.random.uniform(row)
            if total > 3:
                total = total - 3
        return total

    def plain(key):
        add = lambda t, row: (jnp.where(2 * t + row > 3, 2 * t + row - 3, 2 * t + row), None)  # noqa: E501, E731  # fmt: skip
        rows = jax.vmap(jax.random.uniform)(jax.random.split(key, count))
        return jax.lax.scan(add, jnp.float32(0), rows)[0]

    keys = jax.random.split(jax.random.key(3), 5)
    assert_close(transform(jax.vmap(by_branch(body)))(keys), jax.vmap(plain)(keys))


def test_keys_integers_complex_and_half_precision(transform):
    def body(key, n, z, h):
        if n % 2:
            key, _ = jax.random.split(key)
        return key, n + 1, z * 1j if n > 1 else z, h / 3

    f = by_branch(body, Tout=lambda *args: args)
    args = (
        jax.random.split(jax.random.key(3), 4),
        jnp.arange(4),
        jnp.arange(4) * (1 + 2j),
        jnp.arange(4, dtype=jnp.bfloat16),
    )
    got, want = transform(jax.vmap(f))(*args), loop(body, *args)
    assert (jax.random.key_data(got[0]) == jax.random.key_data(want[0])).all()
    assert_close(got[1:], want[1:])


@pytest.mark.parametrize("size", [0, 1, 2, 5, 100_000])
def test_batches_of_any_size(size, transform):
    x = jnp.linspace(-3.0, 3.0, size)
    got = transform(
        jax.vmap(jax.value_and_grad(by_branch(lambda x: x**2 if x > 0 else -x)))
    )(x)
    assert_close(got, (jnp.where(x > 0, x**2, -x), jnp.where(x > 0, 2 * x, -1.0)))


def test_a_thousand_elements_take_one_run_for_each_branch():
    x = jnp.linspace(0.5, 4.0, 1000)
    program = jax.jit(jax.vmap(jax.value_and_grad(wrapped), (0, None)))
    got, runs = runs_of(program, x, 2.0)
    assert runs == 2
    outside = 4 * (1 - 2 * math.log(2) + jnp.log(x**2))
    assert_close(got, (jnp.where(x <= 2, x**2, outside), jnp.where(x <= 2, 2 * x, 8 / x)))


def test_one_operation_on_operands_of_elements_and_on_those_that_all_share():
    """Each order of them is compiled separately, and all run at once."""
    body = lambda x, w: (x * w + w * x + x * x) * (w * w) + (w * w) * x  # noqa: E731
    program = jax.jit(jax.vmap(jax.value_and_grad(by_branch(body), (0, 1)), (0, None)))
    w = jnp.float32(3)  # of the same type as x
    got, runs = runs_of(program, xs, w)
    assert_close(got, loop(jax.jit(jax.value_and_grad(body, (0, 1))), xs, [w] * len(xs)))
    assert runs == 1


def halvings(x):
    """Exact in floating point, so the number of iterations of each element is known."""
    while x > 1:
        x = x / 2
    return x


def lengths_run(monkeypatch):
    """Record the length of the arrays that each operation runs on."""
    lengths = []

    def counting(operation, axes):
        batched = batch_operation(operation, axes)

        def run(*operands):
            lengths.append(len(operands[axes.index(0)]))
            return batched.run(*operands)

        return dataclasses.replace(batched, run=run)

    monkeypatch.setattr(by_branch_module, "batch_operation", counting)
    return lengths


def halvings_by_array(x):
    """Like `halvings`, but every iteration of every run makes a new NumPy array."""
    while x > 1:
        x = (x / np.full(3, 2, np.float32))[0]
    return x


@pytest.mark.parametrize(("body", "operations"), [(halvings, 2), (halvings_by_array, 4)])
def test_a_loop_costs_as_many_operations_as_its_longest_element(
    body, operations, monkeypatch
):
    sizes = lengths_run(monkeypatch)
    x = jnp.float32(2.0) ** jnp.repeat(jnp.arange(1, 33), 4)
    got, runs = runs_of(jax.jit(jax.vmap(by_branch(body))), x)
    assert (got == 1).all()
    assert runs == 32  # 4 elements leave after each iteration
    assert len(sizes) <= operations * 33 + 1  # a test and a division per iteration
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("count", "width", "lengths"),
    [(3, 1, {128}), (64, 1, {128}), (600, 1, {1024}), (64, 2000, {64, 32, 16})],
)
def test_operations_on_small_arrays_are_compiled_for_few_lengths(
    count, width, lengths, monkeypatch
):
    def body(x):
        while x[0] > 1:
            x = x / 2
        return x[0]

    got = lengths_run(monkeypatch)
    x = 2.0 ** jnp.repeat(jnp.arange(1, 5), -(-count // 4))[:count]
    assert (jax.vmap(by_branch(body))(jnp.tile(x[:, None], width)) == 1).all()
    assert {*got} == lengths


def test_padding_is_short_once_arrays_are_large(monkeypatch, transform):
    """A body may make an array of any size from a small argument."""

    def body(x):
        y = jnp.sin(x)  # on 128 rows; from here on there are 8
        wide = y * jnp.arange(5000.0)
        return wide.sum() if x > 1 else wide[1] + y

    got = lengths_run(monkeypatch)
    x = jnp.array([0.3, 2.0, 1.4, 0.5, 1.6])
    value, slope = transform(jax.vmap(jax.value_and_grad(by_branch(body))))(x)
    factor = jnp.where(x > 1, 4999 * 2500, 2)
    assert_close((value, slope), (factor * jnp.sin(x), factor * jnp.cos(x)))
    assert {*got} == {128, 8, 4, 2}


LONG = {
    "loop": lambda x: jax.lax.while_loop(lambda y: y < 9, lambda y: y * 1.5, x),
    "scan": lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, 1000)[0],
    "factors": lambda x: jnp.linalg.cholesky(jnp.eye(4) * x)[0, 0],
    "inside": lambda x: jnp.outer(x * jnp.ones(50), jnp.ones(50)).sum(),
    "product": lambda x: jnp.full((2, 4000), x) @ jnp.ones(4000),
}


@pytest.mark.parametrize("name", LONG)
def test_operations_that_take_long_are_not_padded_far(name, monkeypatch):
    operation = jax.jit(LONG[name])
    got = lengths_run(monkeypatch)
    x = jnp.array([1.0, 2.0, 0.5, 1.5, 2.5])
    body = lambda x: (x * 2, operation(x).sum())  # noqa: E731
    f = by_branch(body, Tout=(SCALAR, SCALAR))
    assert_close(jax.vmap(f)(x), loop(jax.jit(body), x))
    assert got[:2] == [128, 8]


def test_a_read_that_splits_into_many_groups():
    """Each group continues from the read separately, whatever the others compute next."""

    def body(x):
        k = int(jax.lax.stop_gradient(jnp.floor(x)))
        for _ in range(k):
            x = x * 1.5
        return jnp.sin(x)

    x = jnp.array([0.1, 2.2, 0.2, 1.1, 0.3, 3.1, 1.2, 2.1, 3.2, 3.3])
    want = jnp.sin(x * 1.5 ** jnp.floor(x)), jnp.cos(x * 1.5 ** jnp.floor(x))
    f = by_branch(body)
    for got in eager_and_jit(jax.vmap(jax.value_and_grad(f)), x):
        assert_close(got, (want[0], want[1] * 1.5 ** jnp.floor(x)))
    assert runs_of(jax.jit(jax.vmap(f)), x)[1] == 4


def counts_in_numpy():
    scratch = np.zeros((), np.float32)

    def body(x):
        scratch[...] += 1
        y = x * scratch
        return y * 1 if x > 2 else y + 0

    return body


def counts_in_a_vector():
    scratch = np.zeros(3, np.float32)

    def body(x):
        scratch[:] += 1
        y = (x * scratch)[0]
        return y * 1 if x > 2 else y + 0

    return body


def changes_a_sign():
    zero = [-0.0]

    def body(x):
        zero[0] = -zero[0]
        y = jax.lax.atan2(zero[0] * x, -jnp.ones_like(x)) / np.float32(np.pi)
        return x * y * 1 if x > 2 else x * y + 0

    return body


@pytest.mark.parametrize(
    ("make", "of_second"),
    [(counts_in_numpy, 2), (counts_in_a_vector, 2), (changes_a_sign, -1)],
)
def test_a_run_uses_what_the_body_holds_then(make, of_second, transform):
    """It does not use the results of an earlier run if what the body holds has changed."""
    got = transform(jax.vmap(by_branch(make())))(xs)
    assert_close(got, jnp.where(xs > 2, xs, of_second * xs))


def test_references_are_written_by_each_element(transform):
    count = jax.new_ref(jnp.float32(0))

    def body(x):
        count[...] += 1
        return x * count[...] if x > 2 else x

    got = transform(jax.vmap(by_branch(body)))(xs)
    assert_close(got, jnp.where(xs > 2, xs * jnp.arange(1.0, 8.0), xs))
    assert count[...] == 7


def test_a_body_that_returns_an_array_of_other_elements(transform):
    held = []

    def body(x):
        if x > 2:
            held.append(x * 2)
            return x * 2
        return held.pop() if held else x

    got = transform(jax.vmap(by_branch(body)))(xs)
    assert_close(got, jnp.where(xs > 2, xs * 2, xs))


def test_compiled_programs_are_bounded_however_sizes_change():
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else 0
    )
    program = jax.jit(
        jax.vmap(jax.value_and_grad(by_branch(lambda x: x * x if x > 0 else -x)))
    )
    rng = np.random.default_rng(0)

    def call():
        x = jnp.asarray(rng.normal(size=100) + rng.normal(), jnp.float32)
        y, slope = program(x)
        assert_close(
            (y, slope), (jnp.where(x > 0, x * x, -x), jnp.where(x > 0, 2 * x, -1.0))
        )

    for _ in range(200):
        call()
    # One length of arrays, and a handful of operations and their derivatives.
    assert len(compiled) < 20
    several = len(compiled)
    for _ in range(50):
        call()
    assert len(compiled) == several


READS = {
    "int": lambda x: jnp.sin(x) * int(x),
    "index": lambda x: x * [1.0, 2.0, 4.0, 8.0][x.astype(int)],
    "range": lambda x: sum((x**i for i in range(int(x))), x),
    "format": lambda x: x * len(f"{x:.0f}{x:.0f}"),
    "item": lambda x: x + jax.lax.stop_gradient(x).astype(int).item(),
    "array": lambda x: x * np.asarray(jax.lax.stop_gradient(jnp.floor(x))).sum(),
    "tolist": lambda x: x * (1 + jnp.stack([x > 1, x > 2]).tolist().count(True)),
    "arange": lambda x: x * jnp.arange(x.astype(int) + 2).sum(),
    "fori_loop": lambda x: jax.lax.fori_loop(0, x.astype(int), lambda i, y: y * x, x),
    "mask": lambda x: jnp.stack([x, x * x])[jnp.stack([x > 1, x > 2])].sum(),
    "power": lambda x: x ** x.astype(int),
    "any": lambda x: x if any([x > 2, x < 1]) else 2 * x,
    "max": lambda x: max(x, 2.5 - x, 1.5),
    "sorted": lambda x: sorted([x, 2.0 - x, 0.5 * x])[1] * x,
    "in": lambda x: x if x.astype(int) in (1, 3) else -x,
}


@pytest.mark.parametrize("read", READS)
def test_reads_split_by_value(read):
    body = READS[read]
    x = jnp.array([0.3, 1.2, 3.7, 1.9, 2.2, 3.1, 0.8])
    plain = loop(body, x)
    # Between the jumps, all are smooth functions of x.
    slope = (loop(body, x + 1e-2) - loop(body, x - 1e-2)) / 2e-2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientCutWarning)
        for got in eager_and_jit(jax.vmap(jax.value_and_grad(by_branch(body))), x):
            assert_close(got[0], plain)
            np.testing.assert_allclose(got[1], slope, rtol=2e-2, atol=1e-2)


def test_a_read_warns_and_raises_as_for_one_element(transform):
    program = transform(jax.vmap(jax.grad(by_branch(lambda x: x * float(x)))))
    with pytest.warns(GradientCutWarning):
        assert_close(program(xs), xs)
    refused = transform(jax.vmap(jax.grad(by_branch(lambda x: jnp.asarray(np.sin(x))))))
    with pytest.raises(jpyfunc.NotDifferentiableError), jpyfunc.raise_original():
        jax.block_until_ready(refused(xs))


def test_a_body_that_reads_every_element_is_not_tried_by_branch_again():
    shown = []

    def body(x):
        shown.append(repr(x))
        return x * float(x)

    program = jax.jit(jax.vmap(by_branch(body)))
    x = jnp.linspace(1.0, 2.0, 50)
    for attempt in range(3):
        got, runs = runs_of(program, x)
        assert_close(got, x * x, rtol=1e-6)
        assert runs == 50
        assert sum(text.startswith("Batched") for text in shown) == 1, attempt


def test_print_shows_the_elements_of_the_subset(capfd):
    def body(x):
        if x > 2:
            print("above", x)
        return x

    x = jnp.array([1.0, 3.0, 1.5, 4.0, 0.5])
    _, runs = runs_of(jax.jit(jax.vmap(by_branch(body))), x)
    assert runs == 2
    assert capfd.readouterr().out == "above Batched(float32[], {1: 3.0, 3: 4.0})\n"
    _, runs = runs_of(jax.jit(jax.vmap(jax.grad(by_branch(body)))), x)
    assert capfd.readouterr().out == "above Batched(float32[], {1: 3.0, 3: 4.0})\n"
    jax.vmap(jax.vmap(by_branch(body)))(x[:4].reshape(2, 2))
    assert (
        capfd.readouterr().out == "above Batched(float32[], {(0, 1): 3.0, (1, 1): 4.0})\n"
    )


def test_padding_reaches_nothing(capfd, transform):
    """Five elements are padded to 128, and so are three of one branch."""

    def body(x, w):
        print(x)
        y = w / x
        return y * y if x > 1 else y

    x = jnp.array([1.0, 3.0, 1.5, 4.0, 0.5])
    loss = lambda f, over: lambda w: over(lambda x: f(x, w))(x).sum()  # noqa: E731
    with jax.debug_nans(True):
        got = transform(jax.grad(loss(by_branch(body), jax.vmap)))(2.0)
        np.testing.assert_allclose(
            got, sum(4 / a**2 if a > 1 else 1 / a for a in x), rtol=1e-5
        )
    assert "5:" not in capfd.readouterr().out


def test_an_exception_says_which_elements_ran(transform):
    def body(x):
        if x > 2:
            raise ValueError("too large")
        return x

    x = jnp.array([1.0, 3.0, 1.5, 4.0, 0.5])
    with pytest.raises(ValueError, match="too large") as caught, jpyfunc.raise_original():
        jax.block_until_ready(transform(jax.vmap(by_branch(body)))(x))
    assert "py_func 'body' ran on element 1 of a batch of 5." in caught.value.__notes__
    nested = jax.vmap(jax.vmap(by_branch(body)))
    with pytest.raises(ValueError, match="too large") as caught, jpyfunc.raise_original():
        jax.block_until_ready(transform(nested)(x[:4].reshape(2, 2)))
    note = "py_func 'body' ran on element (0, 1) of a batch of 2 x 2."
    assert note in caught.value.__notes__
    got = transform(jax.vmap(by_branch(body)))(x[2:3])  # it still works
    assert got.tolist() == [1.5]


unbatchable = Primitive("unbatchable")
unbatchable.def_impl(lambda x: jnp.sin(x))
unbatchable.def_abstract_eval(lambda x: x)


def effect(x):
    jax.debug.print("effect {}", x)
    return x * 2 if x > 2 else x


def print_without_operands(x):
    jax.debug.print("effect")
    return x * 2 if x > 2 else x


def callback_without_operands(x):
    jax.debug.callback(lambda: print("effect"))
    return x * 2 if x > 2 else x


def stateful(x):
    py_func(lambda x: print("effect", x), [x], [])
    return x * 2 if x > 2 else x


def stateful_scan(x):
    """The operands are shared by all elements."""
    shown = py_func(lambda y: print("effect", y), Tout=[])
    jax.lax.scan(lambda c, _: (c + 1, shown(c)), 0.0, length=1)
    return x * 2 if x > 2 else x


def host(x):
    return jax.pure_callback(lambda x: np.float32(2 * x), SCALAR, x) if x > 2 else x


def numpy_inside(x):
    return numpy_func(lambda x: 2 * x, [x], SCALAR) if x > 2 else x


def settings_inside(x):
    with jax.default_matmul_precision("float32"):
        return x * 2 if x > 2 else x


EFFECTS = [
    effect,
    print_without_operands,
    callback_without_operands,
    stateful,
    stateful_scan,
]


@pytest.mark.parametrize("body", [*EFFECTS, host, numpy_inside, settings_inside])
def test_what_cannot_be_batched_runs_one_by_one(body, capfd, transform):
    program = transform(jax.vmap(by_branch(body)))
    for _ in range(2):
        assert_close(program(xs), jnp.where(xs > 2, xs * 2, xs))
        jax.effects_barrier()
        lines = capfd.readouterr().out.splitlines()
        assert len(lines) == (7 if body in EFFECTS else 0)


def test_an_operation_without_a_batching_rule(transform):
    body = lambda x: unbatchable.bind(x) if x > 2 else x  # noqa: E731
    got = transform(jax.vmap(by_branch(body)))(xs)
    assert_close(got, jnp.where(xs > 2, jnp.sin(xs), xs))


@pytest.mark.parametrize("vmap_method", ["sequential", "by_branch"])
def test_collectives_are_refused(vmap_method, transform):
    f = by_branch(lambda x: jax.lax.psum(x, "i"), vmap_method=vmap_method)
    with pytest.raises(NameError, match="unbound axis name"), jpyfunc.raise_original():
        jax.block_until_ready(transform(jax.vmap(f, axis_name="i"))(xs))


def test_batches_and_derivatives_inside_a_body(transform):
    def body(x, inner):
        slopes = jax.vmap(jax.grad(inner), (0, None))(x * jnp.arange(1, 4.0), 2.0)
        return slopes.sum() if x > 1 else x

    @jax.jit
    def expected(x):
        slopes = jax.vmap(jax.grad(plain_log_huber), (0, None))(x * jnp.arange(1, 4.0), 2.0)
        return jnp.where(x > 1, slopes.sum(), x)

    f = by_branch(lambda x: body(x, wrapped))
    assert_close(transform(jax.vmap(f))(xs), loop(expected, xs))
    assert_close(
        transform(jax.vmap(jax.grad(f)))(xs), loop(jax.grad(expected), xs), rtol=1e-3
    )


def test_custom_rules_may_branch(transform):
    @jax.custom_jvp
    def doubled(x):
        return x if x > 2 else jnp.sin(x)

    @doubled.defjvp
    def _(primals, tangents):
        (x,), (t,) = primals, tangents
        return doubled(x), 2 * t if x > 2 else 2 * jnp.cos(x) * t

    @jax.custom_vjp
    def tripled(x):
        return x if x > 2 else jnp.sin(x)

    tripled.defvjp(
        lambda x: (tripled(x), x), lambda x, g: (3 * g if x > 2 else 3 * jnp.cos(x) * g,)
    )
    slope = jnp.where(xs > 2, 1.0, jnp.cos(xs))
    for rule, factor in ((doubled, 2), (tripled, 3)):
        got = transform(jax.vmap(jax.grad(by_branch(lambda x, rule=rule: rule(x) * 1.0))))(
            xs
        )
        assert_close(got, factor * slope)


def test_an_array_that_a_body_saves_for_its_next_run(transform):
    held = []

    def body(x):
        held.append(x)
        return held[0] * 0 + x * 2 if x > 2 else x

    got = transform(jax.vmap(by_branch(body)))(xs)
    assert_close(got, jnp.where(xs > 2, xs * 2, xs))


def second_of_a_pair():
    """NumPy draws normal numbers in pairs, so the second one is drawn with the first."""
    np.random.seed(0)
    np.random.standard_normal()
    return np.random.standard_normal


DRAWS = {
    "random": lambda: random.random,
    "getrandbits": lambda: lambda: random.getrandbits(20),
    "gauss": lambda: lambda: random.gauss(0, 1),
    "np.random": lambda: np.random.random,
    "second_of_a_pair": second_of_a_pair,
}


def warned_of_draws():
    return pytest.warns(UserWarning, match="'draws' ran under vmap.*random.*stateful=True")


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_are_made_for_each_element(draw, transform):
    random.seed(0)
    draw = DRAWS[draw]()

    def draws(x):
        return x * draw()

    program = transform(jax.vmap(jax.vmap(by_branch(draws))))
    x = jnp.ones((2, 3))
    with warned_of_draws() as caught:
        first = jax.block_until_ready(program(x))
    assert (caught[0].filename, caught[0].lineno) == (
        __file__,
        draws.__code__.co_firstlineno,
    )
    again = program(2 * x)  # it is not tried again
    assert len({*first.ravel().tolist(), *again.ravel().tolist()}) == 12


def test_draws_on_another_thread(transform):
    """Such a batch runs one by one, without a warning, and the next one by branch again."""
    waiting = [threading.Thread(target=random.random)]

    def body(x):
        while waiting:
            thread = waiting.pop()
            thread.start()
            thread.join()
        return x * 2 if x > 2 else x

    program = transform(jax.vmap(by_branch(body)))
    for runs in (9, 2):
        got, ran = runs_of(program, xs)
        assert_close(got, jnp.where(xs > 2, xs * 2, xs))
        assert ran == runs


def test_draws_from_a_generator_that_the_user_installed():
    def draws(x):
        return x * np.random.random()

    generators: Any = np.random  # these are unknown to type checkers
    before = generators.get_bit_generator()
    generators.set_bit_generator(np.random.PCG64(0))
    try:
        with warned_of_draws():
            got = jax.vmap(by_branch(draws))(jnp.ones(3))
    finally:
        generators.set_bit_generator(before)
    assert len({*got.tolist()}) == 3


def test_draws_in_a_differentiated_body(transform):
    def draws(x, w):
        return x * w * random.random()

    x = jnp.arange(1.0, 6.0)
    f = by_branch(draws)
    over = transform(jax.vmap(jax.value_and_grad(f, 1), (0, None)))
    with warned_of_draws(), profile() as prof:
        y, slope = jax.block_until_ready(over(x, 1.0))
    assert_close(y, slope)  # one draw per element
    assert len({*(slope / x).tolist()}) == 5
    rows = prof.as_dict()["draws"]
    assert (rows["forward"]["elements"], rows["forward"]["runs"]) == (5, 6)
    assert (rows["vjp"]["elements"], rows["vjp"]["from_tape"]) == (5, 5)


def test_draws_where_a_derivative_runs_the_body_again():
    """Cotangents that have been summed are not added twice."""
    state = []

    def draws(x, w):
        return x * w + (random.random() if state else 0)

    x = jnp.arange(1.0, 6.0)
    before = jpyfunc.set_tape_limit(0)
    try:
        over = jax.vmap(by_branch(draws), (0, None))
        _, pullback = jax.vjp(lambda w: over(x, w), 2.0)
        state.append("drawing")
        with warned_of_draws():
            (got,) = pullback(jnp.ones(5))
    finally:
        jpyfunc.set_tape_limit(before)
    assert got == 15


def test_draws_in_a_leaf_of_a_staged_body():
    def draws(x):
        return x * 2 if x < 0 else float(x) * random.random()

    f = py_func(draws, Tout=SCALAR, staged=True)
    with warned_of_draws():
        got = jax.block_until_ready(jax.jit(jax.vmap(f))(jnp.ones(4)))
    assert len({*got.tolist()}) == 4


def test_draws_where_one_run_is_asked_for():
    f = py_func(lambda x: x * random.random(), Tout=SCALAR, vmap_method="expand_dims")
    assert len({*jax.vmap(f)(jnp.ones(4)).tolist()}) == 1


USES = {
    "numpy": np.asarray,
    "save": lambda h: np.save(io.BytesIO(), h),
    "float": float,
    "format": lambda h: f"{h:.2f}",
    "add": lambda h: h + 1,
    "jit": lambda h: jax.jit(jnp.sin)(h),
    "closed over": lambda h: jax.jit(lambda y: y * h)(1.0),
    "vmap": lambda h: jax.vmap(lambda y: y * h)(jnp.ones(2)),
    "grad": jax.grad(lambda h: h * h),
    "device_get": jax.device_get,
    "held by a body": lambda h: jax.jit(by_branch(lambda y: y * h))(1.0),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("take", [lambda f: f, jax.grad], ids=["forward", "grad"])
def test_arrays_of_a_batch_cannot_be_used_when_its_run_is_over(use, take, transform):
    held = []

    def keeping(x):
        held.append(jnp.tanh(x))
        return held[-1] ** 2

    x = jnp.array([0.0, 1.0])
    jax.block_until_ready(transform(jax.vmap(take(by_branch(keeping))))(x))
    (h,) = held
    with (
        pytest.raises(TypeError, match=r"'keeping'.*Return it .*\"sequential\""),
        jpyfunc.raise_original(),
    ):
        jax.block_until_ready(USES[use](h))
    assert re.fullmatch(r"Batched\(float32\[\], {0: 0.0, 1: 0.76159\d+}\)", str(h))


@pytest.mark.parametrize("take", [lambda f: f, jax.grad], ids=["forward", "grad"])
def test_a_body_that_replaces_an_array_it_holds(take, transform):
    class Layer:
        def __call__(self, x):
            self.last = x * x
            return self.last * 2 if x > 2 else self.last

    layer, ys = py_func(Layer(), Tout=SCALAR), 2 * xs
    program = transform(jax.vmap(take(layer)))
    plain = take(lambda x: jnp.where(x > 2, 2 * x * x, x * x))
    for x in (xs, ys):
        assert_close(program(x), jax.vmap(plain)(x))
    assert_close(transform(take(layer))(xs[0]), plain(xs[0]))


def computes_elsewhere(x):
    with contextlib.suppress(TypeError), ThreadPoolExecutor(1) as threads:
        return threads.submit(lambda: x * 2).result() if x > 2 else x
    return -x


def catches_all(x):
    try:
        return jax.pure_callback(lambda x: np.asarray(2 * x), SCALAR, x) if x > 2 else x
    except BaseException:  # noqa: BLE001 - as a careless body may
        return -x


def reads_elsewhere(x):
    found = []
    large = x > 2
    thread = threading.Thread(target=lambda: found.append(_truth(large)))
    thread.start()
    thread.join()
    return x * 2 if found[0] else x


def _truth(value):
    try:
        return bool(value)
    except TypeError:
        return False


def of_rule(x):
    @jax.custom_batching.custom_vmap
    def double(x):
        return x * 2

    @double.def_vmap
    def _(size, batched, x):
        raise AssertionError("seen")

    return jax.jit(double)(x) if x > 2 else x


@pytest.mark.parametrize(
    "body", [catches_all, reads_elsewhere, computes_elsewhere, of_rule]
)
def test_a_body_that_hides_what_cannot_be_batched(body, transform):
    got = transform(jax.vmap(by_branch(body)))(xs)
    assert_close(got, jnp.where(xs > 2, xs * 2, xs))


def test_another_thread_with_the_same_context_cannot_split_a_batch():
    def body(x):
        is_large = asyncio.run(asyncio.to_thread(_truth, x > 2))
        return x * 2 if is_large else x

    with profile() as prof:
        got = jax.vmap(by_branch(body))(xs)
    assert_close(got, jnp.where(xs > 2, xs * 2, xs))
    assert "another thread" in prof.as_dict()["body"]["forward"]["one_by_one"]


def test_a_branch_that_is_not_taken_is_not_computed(transform):
    def body(x):
        grown = lambda x: jax.lax.while_loop(lambda c: c < 100, lambda c: c * 2, x)  # noqa: E731
        return jax.lax.cond(x > 0, grown, lambda x: x, x)

    x = jnp.array([-1.0, 2.0, 3.0])
    assert transform(jax.vmap(by_branch(body)))(x).tolist() == [-1, 128, 192]
    jitted = by_branch(lambda x: jax.jit(body)(x))
    assert transform(jax.vmap(jitted))(x).tolist() == [-1, 128, 192]
    slope = by_branch(lambda x: jax.lax.cond(x > 0, jnp.sqrt, lambda x: x * 2, x))
    got = transform(jax.vmap(jax.grad(slope)))(x)
    assert_close(got, jnp.where(x > 0, 0.5 / jnp.sqrt(jnp.abs(x)), 2.0))


@pytest.mark.parametrize(("check", "odd"), [(jax.debug_nans, -1), (jax.debug_infs, 0)])
def test_an_exception_for_nan_is_that_of_the_element(check, odd, transform):
    def body(x):
        try:
            return jnp.log(x) * 0 + 2 * x
        except FloatingPointError:
            return x

    x = jnp.array([odd, 1.0, 2.0])
    with check(True):
        assert transform(jax.vmap(by_branch(body)))(x).tolist() == [odd, 2, 4]


def swapped(key):
    key, a, b = jax.random.split(key, 3)
    return (b, jax.random.fold_in(a, 5)) if jax.random.uniform(key) < 0.4 else (a, b)


def swapped_in_all(key):
    key, a, b = jax.random.split(key, 3)
    folded, swaps = jax.random.fold_in(a, 5), jax.random.uniform(key) < 0.4
    return jnp.where(swaps, b, a), jnp.where(swaps, folded, b)


def draws(keys):
    """Draws of all kinds whose results are exact."""
    a, b = keys
    numbers = [jax.random.uniform(a, (n,), minval=-3.0, maxval=3.1) for n in (1, 6, 40)]
    whole = [jax.random.randint(b, (), 0, 1000), jax.random.bernoulli(b, 0.3)]
    bits = [jax.random.key_data(a), jax.random.bits(b, (3,))]
    return jnp.concatenate(numbers), jnp.stack(whole), jnp.concatenate(bits)


@pytest.mark.parametrize("shape", [(20,), (4, 5), (1000,)])
def test_random_numbers_have_the_same_bits_however_many_there_are(shape, transform):
    """Few are drawn in a loop over the keys, many in one operation."""
    keys = jax.random.split(jax.random.key(1), shape)
    body, of_all = lambda key: draws(swapped(key)), lambda key: draws(swapped_in_all(key))
    types = jax.eval_shape(of_all, jax.random.key(0))

    def batched(function):
        for _ in shape:
            function = jax.vmap(function)
        return function

    got, runs = runs_of(transform(batched(by_branch(body, Tout=types))), keys)
    assert runs == 2
    one_by_one = batched(py_func(body, Tout=types, vmap_method="sequential"))(keys)
    for x, y, z in zip(got, batched(of_all)(keys), one_by_one, strict=True):
        assert np.array_equal(x, y)
        assert np.array_equal(x, z)


def test_derivatives_of_bodies_that_draw_few_random_numbers(transform):
    def body(x, key):
        a, b = jax.random.split(key)
        return x * x * jax.random.uniform(a) if jax.random.uniform(b) < 0.5 else x

    def plain(x, key):
        a, b = jax.random.split(key)
        many = jax.random.uniform(b) < 0.5
        return jnp.where(many, x * x * jax.random.uniform(a), x)

    args = jnp.linspace(1.0, 2.0, 20), jax.random.split(jax.random.key(2), 20)
    for derivative in (jax.value_and_grad, lambda f: jax.grad(jax.grad(f))):
        got = transform(jax.vmap(derivative(by_branch(body))))(*args)
        assert_close(got, jax.vmap(derivative(plain))(*args))


@pytest.mark.parametrize(
    ("draw", "count", "loops"),
    [
        (jax.random.split, 128, True),
        (lambda key: jax.random.fold_in(key, 5), 128, True),
        (lambda key: jax.random.uniform(key, minval=-3.0), 128, True),
        (jax.random.uniform, 1024, False),
        (lambda key: jax.random.uniform(key, (64,)), 128, False),
        (jax.random.normal, 128, False),  # the last bits would differ
    ],
)
def test_few_random_numbers_are_drawn_in_a_loop_which_compiles_faster(draw, count, loops):
    operation = CompiledOperation(lambda key: [draw(key)], [jax.typeof(jax.random.key(0))])
    keys = jax.random.split(jax.random.key(0), count)
    jaxpr = jax.make_jaxpr(batch_operation(operation, (0,)).run)(keys)
    assert (f"length={count}" in str(jaxpr)) == loops


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_numbers_are_those_of_each_key(impl, transform):
    keys = jax.random.split(jax.random.key(0, impl=impl), 5)
    body = lambda key: jax.random.uniform(key) * 2  # noqa: E731
    assert_close(transform(jax.vmap(by_branch(body)))(keys), loop(body, keys))


def test_the_exception_is_that_of_the_first_element(transform):
    def body(x):
        if x < 0:
            raise ValueError("negative")
        if x > 100:
            raise KeyError("large")
        return x

    program = transform(jax.vmap(by_branch(body)))
    with pytest.raises(KeyError) as caught, jpyfunc.raise_original():
        jax.block_until_ready(program(jnp.array([200.0, -1, -2, -3])))
    if transform is not jax.jit:  # under jit, JAX's error comes first
        assert caught.value.__context__ is None


def test_a_tape_holds_rows_of_the_elements_that_stayed():
    """Arrays from before the split are of all elements; a tape holds only its own rows."""

    def body(x):
        y = jnp.exp(jnp.sin(x)) * x
        return y.sum() if x[0] > 0 else (y * y).sum()

    wrapped = by_branch(body)
    x = jnp.concatenate([jnp.ones((62, 1000)), -jnp.ones((2, 1000))])
    set_tape_limit(set_tape_limit(0))  # so that no earlier tape is evicted meanwhile
    pullbacks = jax.jit(jax.vmap(lambda x: jax.vjp(wrapped, x)[1]))(x)
    pullback = jax.jit(jax.vmap(lambda pullback, ct: pullback(ct)[0]))
    large = jax.tree.map(lambda residual: residual[:62], pullbacks)
    three = 3 * 62 * 1000 * 4  # bytes of an operand and the results of two operations
    assert tape_bytes() > three
    pullback(large, jnp.ones(62)).block_until_ready()  # its tape is spent, and evicted
    assert 0 < tape_bytes() < three / 2


def test_what_runs_by_branch_by_default():
    def runs(f, n=4):
        calls = []

        def body(x):
            calls.append(1)
            return None if f is None else f(x)

        return body, calls

    for options, expected in (
        ({}, 1),
        ({"stateful": True}, 4),
        ({"vmap_method": "sequential"}, 4),
        ({"vmap_method": "by_branch"}, 1),
    ):
        body, calls = runs(lambda x: x + 1)
        jax.vmap(py_func(body, Tout=SCALAR, **options))(jnp.arange(4.0))
        assert len(calls) == expected, options
    body, calls = runs(lambda x: x + 1)
    jax.vmap(numpy_func(body, Tout=SCALAR))(jnp.arange(4.0))
    assert len(calls) == 4
    body, calls = runs(None)
    jax.vmap(py_func(body, Tout=[]))(jnp.arange(4.0))
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("wrap", "what"),
    [
        (lambda: numpy_func(np.sin, Tout=SCALAR, vmap_method="by_branch"), "NumPy"),
        (lambda: by_branch(jnp.sin, stateful=True), "is stateful"),
        (lambda: by_branch(jnp.sin, ordered=True), "is stateful"),
        (lambda: jax.vmap(by_branch(lambda x: None, Tout=[]))(xs), "returns nothing"),
    ],
)
def test_by_branch_where_runs_count_is_refused(wrap, what):
    with pytest.raises(ValueError, match=f"by_branch.*{what}.*'sequential'"):
        wrap()


def test_profile_counts_elements_and_runs():
    with profile() as prof:
        jax.block_until_ready(jax.jit(jax.vmap(jax.grad(wrapped), (0, None)))(xs, 2.0))
    rows = prof.as_dict()["log_huber"]
    assert {
        kind: (row["calls"], row["elements"], row["runs"]) for kind, row in rows.items()
    } == {
        "forward": (1, 7, 2),
        "vjp": (1, 7, 0),
    }
    assert (rows["vjp"]["from_tape"], rows["vjp"]["reran"]) == (7, 0)
