"""Time py_func against the same thing by hand: `python tests/benchmarks/run.py`.

Each row names its peer. Ours and the peer alternate in rounds, and the ratio is the
median of the ratios of the rounds, so that a machine that slows down slows down both.

    --peers tensorflow=PYTHON   adds rows for `tf.py_function`, run by that interpreter
                                if it can import tensorflow
    --json FILE                 writes the rows as JSON, too, for `docs/benchmarks/plot.py`
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import scipy.linalg

import jpyfunc as jpf
import jpyfunc.tf1 as tf

HERE = Path(__file__).parent
SCALAR = jax.ShapeDtypeStruct((), jnp.float32)
ROUNDS = 21


def log_huber(x, m):
    if jnp.abs(x) <= m:
        return x**2
    return m**2 * (1 - 2 * jnp.log(m) + jnp.log(x**2))


def identity(x):
    return x


def by_hand(x, m):
    return jax.pure_callback(log_huber, SCALAR, x, m, vmap_method="sequential")


@jax.custom_vjp
def by_hand_with_vjp(x, m):
    return by_hand(x, m)


def _forward(x, m):
    return by_hand(x, m), (x, m)


def _reverse(residuals, cotangent):
    def host(x, m, cotangent):
        return jax.vjp(log_huber, x, m)[1](cotangent)

    return jax.pure_callback(
        host, (SCALAR, SCALAR), *residuals, cotangent, vmap_method="sequential"
    )


by_hand_with_vjp.defvjp(_forward, _reverse)


def with_cond(x, m):
    return jax.lax.cond(
        jnp.abs(x) <= m,
        lambda: x**2,
        lambda: m**2 * (1 - 2 * jnp.log(m) + jnp.log(x**2)),
    )


def newton(a):
    x = a
    while abs(x * x - a) > 1e-4 * a:
        x = 0.5 * (x + a / x)
    return x


def newton_in_lax(a):
    def test(x):
        return abs(x * x - a) > 1e-4 * a

    return jax.lax.while_loop(test, lambda x: 0.5 * (x + a / x), a)


def collatz(n):
    steps = jnp.int32(0)
    while n != 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps = steps + 1
    return steps


def collatz_in_lax(n):
    def step(state):
        n, steps = state
        return jax.lax.cond(n % 2 == 0, lambda: n // 2, lambda: 3 * n + 1), steps + 1

    return jax.lax.while_loop(lambda state: state[0] != 1, step, (n, jnp.int32(0)))[1]


def newton_by_hand(a):
    return jax.pure_callback(newton, SCALAR, a, vmap_method="sequential")


def reads(x):
    return x * float(x)


def ten_layers(x, w):
    for _ in range(10):
        x = jnp.tanh(x @ w)
        if x.sum() < 0:
            x = x + 1
    return (x**2).sum()


def iterate(x, n):
    y = x
    for _ in range(int(n)):
        y = jnp.sin(y) * x + 0.1
    return y


def products(a, branch=True):
    """Some 50 ms of matrix products on 2 cores."""
    y = a
    for _ in range(4):
        y = jnp.tanh(y @ a)
        if branch and y.sum() < -1e9:
            y = y + 1
    return y.sum()


def sleep_20_ms(x):
    time.sleep(0.02)
    return x


def compute_5_ms(x):
    total = 0
    for i in range(200_000):
        total += i
    return x + np.float32(0 * total)


@dataclasses.dataclass
class Row:
    """One line of the table; times in microseconds per call.

    Attributes:
        limit: what must hold, as text.
        holds: whether it does.
    """

    work: str
    peer: str
    ours_us: float | None
    ours_spread_us: float | None
    peer_us: float | None
    ratio: float | None
    limit: str
    holds: bool | None


def interleave(
    ours: Callable[[], Any], peer: Callable[[], Any], rounds: int = ROUNDS
) -> tuple[list, list]:
    """Time both alternately, each over as many calls as take some 20 ms."""
    for function in (ours, peer):
        for _ in range(3):
            jax.block_until_ready(function())
    start = time.perf_counter()
    jax.block_until_ready(ours())
    calls = max(1, int(0.02 / (time.perf_counter() - start)))
    times: tuple[list, list] = ([], [])
    for _ in range(rounds):
        for function, record in zip((ours, peer), times, strict=True):
            record.append(us_per_call(function, calls))
    return times


def us_per_call(function: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(function())
    return (time.perf_counter() - start) / calls * 1e6


def spread(times: list[float]) -> float:
    """Half the distance between the quartiles."""
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / 2


def compare(
    work: str, peer_name: str, ours: Any, peer: Any, most: float, rounds: int = ROUNDS
) -> Row:
    mine, theirs = interleave(ours, peer, rounds)
    ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
    return Row(
        work, peer_name, statistics.median(mine), spread(mine), statistics.median(theirs),
        ratio, f"ratio <= {most}", ratio <= most,
    )  # fmt: skip


def host_call_rows() -> Iterator[Row]:
    x, m = jnp.float32(3.0), jnp.float32(2.0)
    big = jnp.ones((16, 1024, 1024))
    big_out = jax.ShapeDtypeStruct(big.shape, big.dtype)
    wrapped = jpf.py_func(log_huber, Tout=SCALAR)

    def row(work, peer_name, ours, peer, args, most):
        ours, peer = jax.jit(ours), jax.jit(peer)
        return compare(work, peer_name, lambda: ours(*args), lambda: peer(*args), most)

    yield row("log_huber, forward", "pure_callback", wrapped, by_hand, (x, m), 0.75)
    yield row(
        "log_huber, value_and_grad", "pure_callback + custom_vjp",
        jax.value_and_grad(wrapped), jax.value_and_grad(by_hand_with_vjp), (x, m), 0.2,
    )  # fmt: skip
    yield row(
        "identity on 64 MB", "pure_callback",
        jpf.py_func(identity, Tout=big_out),
        lambda x: jax.pure_callback(identity, big_out, x), (big,), 1.0,
    )  # fmt: skip
    yield row(
        "identity on a scalar", "pure_callback",
        jpf.py_func(identity, Tout=SCALAR),
        lambda x: jax.pure_callback(identity, SCALAR, x), (x,), 0.5,
    )  # fmt: skip


def batch_rows() -> Iterator[Row]:
    """Batches of 1000 elements."""
    xs, m = jnp.linspace(0.5, 4.0, 1000), jnp.float32(2.0)
    random = np.random.default_rng(0).uniform(1, 100, 1000).astype(np.float32)

    def over(f, axes=(0, None)):
        return jax.jit(jax.vmap(f, axes))

    def sequential(f):
        return jpf.py_func(f, Tout=SCALAR, vmap_method="sequential")

    def by_branch(f):
        return jpf.py_func(f, Tout=SCALAR)

    ours, peer = over(by_branch(log_huber)), over(by_hand)
    yield compare(
        "log_huber, vmap of 1000", "pure_callback, sequential",
        lambda: ours(xs, m), lambda: peer(xs, m), 0.015, 7,
    )  # fmt: skip
    condition = over(with_cond)
    row = compare(
        "log_huber, vmap of 1000", "lax.cond",
        lambda: ours(xs, m), lambda: condition(xs, m), math.inf,
    )  # fmt: skip
    yield dataclasses.replace(row, limit="", holds=None)
    slopes = over(jax.value_and_grad(by_branch(log_huber)))
    slopes_by_hand = over(jax.value_and_grad(by_hand_with_vjp))
    yield compare(
        "log_huber, vmap of value_and_grad", "pure_callback + custom_vjp",
        lambda: slopes(xs, m), lambda: slopes_by_hand(xs, m), 0.005, 3,
    )  # fmt: skip
    roots, roots_by_hand = over(by_branch(newton), 0), over(newton_by_hand, 0)
    yield compare(
        "Newton's square root, vmap of 1000", "pure_callback, sequential",
        lambda: roots(random), lambda: roots_by_hand(random), 0.05, 5,
    )  # fmt: skip
    reading, one_by_one = over(by_branch(reads), 0), over(sequential(reads), 0)
    yield compare(
        "a body that reads, vmap of 1000", "our own, sequential",
        lambda: reading(random), lambda: one_by_one(random), 1.1,
    )  # fmt: skip


def staged_rows() -> Iterator[Row]:
    """Staged bodies beside the same branches written by hand."""
    point = jnp.float32(3.0), jnp.float32(2.0)
    xs = jnp.linspace(0.5, 4.0, 1000)
    staged = jpf.py_func(log_huber, staged=True)
    for name, take, args in (
        ("forward", lambda f: f, point),
        ("value_and_grad", jax.value_and_grad, point),
        ("hessian", jax.hessian, point),
        ("vmap of 1000", lambda f: jax.vmap(f, (0, None)), (xs, point[1])),
    ):
        ours, peer = jax.jit(take(staged)), jax.jit(take(with_cond))
        yield compare(
            f"log_huber staged, {name}", "lax.cond by hand",
            lambda ours=ours, args=args: ours(*args),
            lambda peer=peer, args=args: peer(*args), 1.2,
        )  # fmt: skip

    def first(f):
        # A new function each time, so that nothing is known of it.
        return lambda: jax.jit(jax.value_and_grad(lambda x, m: f(x, m)))(*point)

    yield compare(
        "log_huber staged, first value_and_grad", "lax.cond by hand",
        first(staged), first(with_cond), 3.0,
    )  # fmt: skip


def swing(x, n):
    i = jnp.int32(0)
    while i < n:
        x, i = x + 1e-3 * jnp.sin(x), i + 1
    return x


def swing_in_scan(length, x):
    step = jax.checkpoint(lambda x, _: (x + 1e-3 * jnp.sin(x), None))
    return jax.lax.scan(step, x, length=length)[0].sum()


def loop_rows() -> Iterator[Row]:
    """Python loops in staged bodies beside `lax.while_loop` by hand."""
    random = np.random.default_rng(0).uniform(1, 100, 1000).astype(np.float32)
    root, steps = (jpf.py_func(f, staged=True) for f in (newton, collatz))
    for name, ours, peer, arg in (
        ("Newton's square root staged, forward", root, newton_in_lax, jnp.float32(49)),
        ("Collatz steps of 97 staged", steps, collatz_in_lax, jnp.int32(97)),
        (
            "Newton's square root staged, vmap of 1000",
            jax.vmap(root), jax.vmap(newton_in_lax), random,
        ),
    ):  # fmt: skip
        ours, peer = jax.jit(ours), jax.jit(peer)
        yield compare(
            name, "lax.while_loop by hand",
            lambda ours=ours, arg=arg: ours(arg),
            lambda peer=peer, arg=arg: peer(arg), 1.1,
        )  # fmt: skip

    def first(f):
        # A new function each time, so that nothing is known of it.
        return lambda: jax.jit(lambda a: f(a))(jnp.float32(49))

    yield compare(
        "Newton's square root staged, first call", "lax.while_loop by hand",
        first(root), first(newton_in_lax), 3.0,
    )  # fmt: skip

    x = jnp.linspace(0, 1, 1000)
    for length in (1_000, 20_000):
        looped = jax.value_and_grad(
            lambda x, n: jpf.py_func(swing, staged=True)(x, n).sum()
        )
        scanned = jax.jit(jax.value_and_grad(functools.partial(swing_in_scan, length)))
        looped = jax.jit(looped)
        yield compare(
            f"loop of {length:,} iterations over 1,000 numbers, value_and_grad",
            "lax.scan with jax.checkpoint",
            lambda looped=looped, n=length: looped(x, n),
            lambda scanned=scanned: scanned(x), 1.5,
        )  # fmt: skip


def derivative_rows() -> Iterator[Row]:
    """Derivatives of bodies beside those that plain eager JAX takes, without a callback."""

    def wrap(body):
        return jpf.py_func(body, Tout=SCALAR)

    x, w = jnp.ones((32, 64)), jnp.ones((64, 64)) * 0.01
    plain = jax.value_and_grad(ten_layers)
    ours = jax.jit(jax.value_and_grad(wrap(ten_layers)))
    yield compare(
        "ten layers of 64x64, value_and_grad", "plain eager JAX",
        lambda: ours(x, w), lambda: plain(x, w), 0.4,
    )  # fmt: skip

    numbers = np.random.default_rng(0).integers(1, 61, 1000).tolist()
    mine, theirs = itertools.cycle(numbers), itertools.cycle(numbers)
    ours_loop, plain_loop = jax.jit(jax.grad(wrap(iterate))), jax.grad(iterate)
    for _ in range(100):
        ours_loop(1.3, next(mine)), plain_loop(1.3, next(theirs))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: (
            compiled.append(event) if "backend_compile" in event else None
        )
    )
    for _ in range(200):
        ours_loop(1.3, next(mine))
    count = len(compiled)
    row = compare(
        "loop of 1 to 60 iterations, grad", "plain eager JAX",
        lambda: ours_loop(1.3, next(mine)), lambda: plain_loop(1.3, next(theirs)), 0.7,
    )  # fmt: skip
    row.limit += f", 0 compiled later: {count}"
    row.holds = row.holds and not count
    yield row

    point = jnp.float32(3.0), jnp.float32(2.0)
    third = [wrap(log_huber), log_huber]
    for _ in range(3):
        third = [jax.grad(f) for f in third]
    compiled_third = jax.jit(third[0])
    yield compare(
        "log_huber, third derivative", "plain eager JAX",
        lambda: compiled_third(*point), lambda: third[1](*point), 0.3,
    )  # fmt: skip

    a = jnp.ones((1024, 1024)) / 1024
    ours_products = jax.jit(jax.value_and_grad(wrap(products)))
    fixed = jax.jit(jax.value_and_grad(lambda a: products(a, branch=False)))
    yield compare(
        "50 ms of matrix products, value_and_grad", "compiled, the branch fixed",
        lambda: ours_products(a), lambda: fixed(a), 1.5,
    )  # fmt: skip


def rules_row() -> Row:
    """A linear solve differentiated by rules on the host, which reuse its factors."""
    n = 300
    random = np.random.default_rng(0)
    a = jnp.asarray(random.normal(size=(n, n)) + n * np.eye(n), jnp.float32)
    b = jnp.asarray(random.normal(size=n), jnp.float32)
    like_b = jax.ShapeDtypeStruct(b.shape, b.dtype)
    like_a = jax.ShapeDtypeStruct(a.shape, a.dtype)

    def factorised_solve(a, b, trans=0):
        a, b = np.asarray(a), np.asarray(b)
        return scipy.linalg.lu_solve(scipy.linalg.lu_factor(a), b, trans)

    def forward(a, b):
        factors = scipy.linalg.lu_factor(a)
        x = scipy.linalg.lu_solve(factors, b)
        return x, (factors, x)

    def backward(residuals, x_bar):
        factors, x = residuals
        b_bar = scipy.linalg.lu_solve(factors, x_bar, trans=1)
        return -np.outer(b_bar, x), b_bar

    ours = jpf.numpy_func(factorised_solve, Tout=like_b)
    ours.defvjp(forward, backward)

    @jax.custom_vjp
    def by_hand(a, b):
        return jax.pure_callback(factorised_solve, like_b, a, b)

    def by_hand_backward(residuals, x_bar):
        def host(a, x, x_bar):
            b_bar = factorised_solve(a, x_bar, 1)
            return -np.outer(b_bar, x), b_bar

        return jax.pure_callback(host, (like_a, like_b), *residuals, x_bar)

    by_hand.defvjp(lambda a, b: ((x := by_hand(a, b)), (a, x)), by_hand_backward)

    def program(solve):
        return jax.jit(jax.value_and_grad(lambda a, b: jnp.sin(solve(a, b)).sum(), (0, 1)))

    mine, theirs = program(ours), program(by_hand)
    return compare(
        "solve of 300x300 with SciPy, value_and_grad", "pure_callback + custom_vjp",
        lambda: mine(a, b), lambda: theirs(a, b), 0.7,
    )  # fmt: skip


def executor_rows() -> Iterator[Row]:
    """Batches on the workers of an executor."""

    def batch(body, **options):
        function = jax.jit(jax.vmap(jpf.numpy_func(body, Tout=SCALAR, **options)))
        return lambda xs: function(xs)

    def row(work, peer_name, ours, peer, count, most, rounds):
        xs = np.arange(count, dtype=np.float32)
        return compare(work, peer_name, lambda: ours(xs), lambda: peer(xs), most, rounds)

    alone = "our own, without executor"
    with ThreadPoolExecutor(16) as pool:
        yield row(
            "64 elements of 20 ms of sleep, 16 threads", alone,
            batch(sleep_20_ms, executor=pool), batch(sleep_20_ms), 64, 0.1, 3,
        )  # fmt: skip
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        work = "200 elements of 5 ms of Python, 2 processes, chunksize 10"
        ours = batch(compute_5_ms, executor=pool, chunksize=10)

        def by_hand(xs):
            return np.stack([*pool.map(compute_5_ms, xs, chunksize=10)])

        yield row(work, "executor.map by hand", ours, by_hand, 200, 1.2, 7)
        yield row(work, alone, ours, batch(compute_5_ms), 200, 0.65, 7)
    with ThreadPoolExecutor(1) as pool:
        for chunksize, most in ((1, 5), (100, 1.3)):
            yield row(
                f"10,000 elements of nothing, one thread, chunksize {chunksize}", alone,
                batch(identity, executor=pool, chunksize=chunksize), batch(identity),
                10_000, most, 7,
            )  # fmt: skip


def session_row() -> Row:
    """Measure what `Session.run` adds to a call of the same function under `jax.jit`.

    A function of a few microseconds, beside which what is added can be seen.
    """

    def function(x, m):
        return jnp.sin(x) * m

    jitted = jax.jit(jax.value_and_grad(function))

    def direct():
        return [np.asarray(y) for y in jitted(1.0, 2.0)]

    with tf.Graph().as_default():
        x, m = tf.placeholder(jnp.float32, ()), tf.placeholder(jnp.float32, ())
        y = tf.lift(function)(x, m)
        fetches, feeds = [y, tf.gradients(y, x)[0]], {x: 1.0, m: 2.0}
        with tf.Session() as session:
            mine, theirs = interleave(lambda: session.run(fetches, feeds), direct)
    added = statistics.median(a - b for a, b in zip(mine, theirs, strict=True))
    return Row(
        "Session.run([y, dy_dx])", "the jitted function",
        statistics.median(mine), spread(mine), statistics.median(theirs),
        statistics.median(a / b for a, b in zip(mine, theirs, strict=True)),
        f"at most 40 us more: {added:+.0f}", added <= 40,
    )  # fmt: skip


def hang_rows(limit: float = 60) -> Iterator[Row]:
    """The two programs that must not hang, with `jax.pure_callback` and with py_func."""
    for program in ("50 calls in flight", "16 threads x 5 calls x 16 callbacks"):
        outcome = {}
        for library in ("jpyfunc", "pure_callback"):
            command = [sys.executable, str(HERE / "hang.py"), library, program]
            start = time.perf_counter()
            try:
                subprocess.run(command, timeout=limit, check=True, capture_output=True)
                outcome[library] = f"{time.perf_counter() - start:.0f} s"
            except subprocess.TimeoutExpired:
                outcome[library] = f"hangs (stopped after {limit:.0f} s)"
            except subprocess.CalledProcessError as error:
                outcome[library] = f"fails (with status {error.returncode})"
        text = f"{outcome['jpyfunc']}; pure_callback: {outcome['pure_callback']}"
        holds = outcome["jpyfunc"].endswith(" s")
        yield Row(
            f"{program}, 600x600", "pure_callback", None, None, None, None, text, holds
        )


def tensorflow_rows(python: str) -> Iterator[Row]:
    """`tf.py_function` on the same work, in a process that times one round when asked."""
    point = jnp.float32(3.0), jnp.float32(2.0)
    wrapped = jpf.py_func(log_huber, Tout=SCALAR)
    command = [python, str(HERE / "tensorflow_peer.py")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as peer:
        version = peer.stdout.readline().strip()
        if not version:
            print("\nno rows for tensorflow, which did not start", file=sys.stderr)
            return
        for work, function, most in (
            ("log_huber, forward", wrapped, 1.0),
            ("log_huber, value_and_grad", jax.value_and_grad(wrapped), 0.5),
        ):
            call = functools.partial(jax.jit(function), *point)
            us_per_call(call, 20)
            mine, theirs = [], []
            for _ in range(ROUNDS):
                mine.append(us_per_call(call, 100))
                print(work, file=peer.stdin, flush=True)
                theirs.append(float(peer.stdout.readline()))
            ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
            yield Row(
                work, f"tf.py_function, TensorFlow {version}", statistics.median(mine),
                spread(mine), statistics.median(theirs), ratio, f"ratio <= {most}",
                ratio <= most,
            )  # fmt: skip


def table(rows: list[Row]) -> str:
    cells = [("work", "peer", "ours us", "+-", "peer us", "ratio", "must be", "")]
    for r in rows:
        numbers = [r.ours_us, r.ours_spread_us, r.peer_us]
        cells.append((
            r.work, r.peer, *("" if n is None else f"{n:.1f}" for n in numbers),
            "" if r.ratio is None else f"{r.ratio:.2g}", r.limit,
            {True: "ok", False: "NO", None: ""}[r.holds],
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if 2 <= i <= 5 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", nargs="*", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    peers = dict(peer.partition("=")[::2] for peer in options.peers)
    if set(peers) - {"tensorflow"}:
        parser.error(f"--peers: expected tensorflow=PYTHON, got {' '.join(options.peers)}")

    rows: list[Row] = []

    def progress(source: Iterator[Row]) -> None:
        for row in source:
            rows.append(row)
            if sys.stderr.isatty():
                print(
                    f"\r\033[K{len(rows)} rows, last: {row.work}", end="", file=sys.stderr
                )

    progress(host_call_rows())
    progress(batch_rows())
    progress(staged_rows())
    progress(loop_rows())
    progress(derivative_rows())
    progress(executor_rows())
    progress(iter([rules_row(), session_row()]))
    if "tensorflow" in peers:
        progress(tensorflow_rows(peers["tensorflow"]))
    progress(hang_rows())
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    about = (
        f"jpyfunc {jpf.__version__}, jax {jax.__version__}, jaxlib {jaxlib.__version__}, "
        f"Python {platform.python_version()}, {jax.devices()[0].platform}; medians of "
        f"{ROUNDS} interleaved rounds"
    )
    print(f"{about}\n\n{table(rows)}")
    if options.json:
        results = {"about": about, "rows": [dataclasses.asdict(row) for row in rows]}
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(row.holds is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
