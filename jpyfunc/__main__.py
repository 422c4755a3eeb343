"""`python -m jpyfunc`: run the example, check its numbers, report the environment."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

import jpyfunc
import jpyfunc.tf1 as tf
from jpyfunc import py_func, raise_original
from jpyfunc._limits import SECONDS_PER_COST, TOLERANCE


def log_huber(x: Any, m: Any) -> Any:
    """Body of the example: a square near zero, a logarithm beyond `m`."""
    if jnp.abs(x) <= m:
        return x**2
    return m**2 * (1 - 2 * jnp.log(m) + jnp.log(x**2))


def closed_form(x: float, m: float) -> tuple[float, float, float]:
    """Compute log-huber and its first two derivatives with respect to `x`, without JAX."""
    if abs(x) <= m:
        return x**2, 2 * x, 2.0
    value = m**2 * (1 - 2 * math.log(m) + math.log(x**2))
    return value, 2 * m**2 / x, -2 * m**2 / x**2


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One expression of the example, with the numbers that it gave and should give."""

    name: str
    got: list[float]
    expected: list[float]
    error: str = ""

    @property
    def reason(self) -> str:
        """Why the check failed; empty if it passed."""
        if self.error:
            return f"{self.name} raised {self.error}"
        if len(self.got) == len(self.expected) and np.allclose(
            self.got, self.expected, rtol=TOLERANCE, atol=TOLERANCE
        ):
            return ""
        return f"{self.name} gave {_numbers(self.got)}, expected {_numbers(self.expected)}"


def run_checks() -> list[Check]:
    """Run the example, as a JAX program and as a TensorFlow 1 program."""
    f = py_func(log_huber, Tout=jax.ShapeDtypeStruct((), jnp.float32))
    xs = np.linspace(0.5, 4.0, 7, dtype=np.float32)
    near, far = closed_form(1.0, 2.0), closed_form(3.0, 2.0)
    batch = [closed_form(float(x), 2.0)[0] for x in xs]
    over_x = jax.jit(jax.vmap(f, in_axes=(0, None)))
    return [
        _check("jit(f)(1, 2)", lambda: jax.jit(f)(1.0, 2.0), near[:1]),
        _check("jit(f)(3, 2)", lambda: jax.jit(f)(3.0, 2.0), far[:1]),
        _check("jit(grad(f))(1, 2)", lambda: jax.jit(jax.grad(f))(1.0, 2.0), near[1:2]),
        _check("jit(grad(f))(3, 2)", lambda: jax.jit(jax.grad(f))(3.0, 2.0), far[1:2]),
        _check("jit(hessian(f))(3, 2)", lambda: jax.jit(jax.hessian(f))(3.0, 2.0), far[2:]),
        _check("jit(vmap(f))([0.5 .. 4], 2)", lambda: over_x(xs, 2.0), batch),
        _check("Session.run([y, dy_dx])", _run_session, near[:2]),
    ]


def _run_session() -> list[Any]:
    with tf.Graph().as_default():
        x = tf.placeholder(tf.float32)
        m = tf.placeholder(tf.float32)
        y = tf.contrib.eager.py_func(func=log_huber, inp=[x, m], Tout=tf.float32)
        dy_dx = tf.gradients(y, x)[0]
        with tf.Session() as sess:
            return sess.run([y, dy_dx], feed_dict={x: 1.0, m: 2.0})


def _check(name: str, compute: Callable[[], Any], expected: Any) -> Check:
    try:
        with raise_original():
            got = [float(x) for x in np.ravel(compute())]
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is reported
        text = " ".join(str(error).split())
        return Check(name, [], list(expected), f"{type(error).__name__}: {text}")
    return Check(name, got, list(expected))


def measure_costs() -> dict[str, float]:
    """Measure the median microseconds of jitted calls: identity, forward and gradient."""
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    identity = py_func(lambda x: x, Tout=scalar)
    f = py_func(log_huber, Tout=scalar)
    x, m = jnp.float32(3), jnp.float32(2)
    return {
        "round_trip": _median(jax.jit(identity), x),
        "forward": _median(jax.jit(f), x, m),
        "gradient": _median(jax.jit(jax.grad(f)), x, m),
    }


def _median(func: Callable[..., Any], *args: Any) -> float:
    for _ in range(3):
        jax.block_until_ready(func(*args))
    times = []
    end = time.perf_counter() + SECONDS_PER_COST
    while not times or time.perf_counter() < end:
        begin = time.perf_counter()
        jax.block_until_ready(func(*args))
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)


def make_report() -> dict[str, Any]:
    """Make the report as plain values, with the costs only if every check passed."""
    checks = run_checks()
    failures = [check.reason for check in checks if check.reason]
    return {
        "ok": not failures,
        "failures": failures,
        "checks": [
            {
                "name": check.name,
                "ok": not check.reason,
                "got": [_json_number(x) for x in check.got],
                "expected": check.expected,
            }
            for check in checks
        ],
        "versions": {
            "jpyfunc": jpyfunc.__version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.version.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "devices": [f"{d.platform}:{d.id} ({d.device_kind})" for d in jax.devices()],
        "median_microseconds": {} if failures else measure_costs(),
    }


def _json_number(x: float) -> float | str:
    """Convert infinities and NaN, which JSON lacks, to strings."""
    return x if math.isfinite(x) else str(x)


def _numbers(values: list[Any]) -> str:
    return ", ".join(x if isinstance(x, str) else f"{x:.6g}" for x in values)


def to_text(report: dict[str, Any], marks: tuple[str, str]) -> str:
    """Format the report for people.

    Args:
        report: from `make_report`.
        marks: the signs for a check that passed and for one that failed.
    """
    width = max(map(len, marks))
    names = max(len(check["name"]) for check in report["checks"])
    lines = ["log-huber, f = py_func(log_huber), against its closed form"]
    lines += [
        f"  {marks[not check['ok']]:{width}}  {check['name']:{names}}  "
        f"{_numbers(check['got'])}".rstrip()
        for check in report["checks"]
    ]
    if report["ok"]:
        lines += ["", "median of a jitted call, in microseconds"]
        titles = {
            "round_trip": "one host round trip (identity of a scalar)",
            "forward": "f, forward",
            "gradient": "f, gradient",
        }
        lines += [
            f"  {title:41}  {report['median_microseconds'][key]:8.0f}"
            for key, title in titles.items()
        ]
    versions = "  ".join(f"{name} {v}" for name, v in report["versions"].items())
    lines += ["", f"versions  {versions}", f"devices   {', '.join(report['devices'])}", ""]
    passed = sum(check["ok"] for check in report["checks"])
    lines += [f"{passed} of {len(report['checks'])} checks passed."]
    return "\n".join(lines + [f"Wrong: {reason}" for reason in report["failures"]])


def main(argv: list[str] | None = None) -> int:
    """Print the report; return the exit status: 0, or 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m jpyfunc", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    report = make_report()
    if options.json:
        print(json.dumps(report, allow_nan=False))
    else:
        encoding = sys.stdout.encoding or "ascii"
        text = to_text(report, _marks(encoding))
        # A failure quotes an exception, whose text may hold any character.
        print(text.encode(encoding, "backslashreplace").decode(encoding))
    return 0 if report["ok"] else 1


def _marks(encoding: str) -> tuple[str, str]:
    try:
        "✓✗".encode(encoding)
    except UnicodeEncodeError:
        return "ok", "WRONG"
    return "✓", "✗"


if __name__ == "__main__":
    sys.exit(main())
