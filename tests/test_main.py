"""`python -m jpyfunc`: the report, for people and for machines, and when it is wrong."""

import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys

import jax
import pytest
from programs import ROOT, xla_flags

from jpyfunc import __main__ as report


def run(*options):
    """Run the command with one device, as a newcomer would."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "jpyfunc", *options],
        capture_output=True,
        timeout=120,
        cwd=ROOT,
        env={
            **os.environ,
            "XLA_FLAGS": xla_flags(devices=1),
            "PYTHONIOENCODING": "utf-8",
        },
        check=False,
    )


def test_text():
    done = run()
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    check_text(done.stdout.decode("utf-8"), "✓")


def test_text_where_check_marks_cannot_be_encoded(monkeypatch, capsys):
    written = io.BytesIO()
    stdout = io.TextIOWrapper(written, "ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(report, "SECONDS_PER_COST", 0)
    assert report.main([]) == 0
    assert capsys.readouterr().err == ""
    check_text(written.getvalue().decode("ascii"), "ok")


def check_text(text, mark):
    """All checks passed and are marked, and the report has the versions and devices."""
    assert sum(line.startswith(f"  {mark} ") for line in text.splitlines()) == 7
    assert "7 of 7 checks passed." in text
    for word in (jax.__version__, platform.python_version(), "numpy", "jaxlib", "cpu:0"):
        assert word in text


def test_json():
    done = run("--json")
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    assert found["ok"] is True
    assert found["failures"] == []
    got = {check["name"]: check["got"] for check in found["checks"]}
    # Written out: 4 (1 - 2 log 2 + log 9), 8/3 and -8/9.
    assert got["jit(f)(1, 2)"] == [1]
    assert got["jit(f)(3, 2)"] == pytest.approx([7.2437209], rel=1e-5)
    assert got["jit(grad(f))(1, 2)"] == [2]
    assert got["jit(grad(f))(3, 2)"] == pytest.approx([2.6666667], rel=1e-5)
    assert got["jit(hessian(f))(3, 2)"] == pytest.approx([-0.8888889], rel=1e-5)
    assert len(got["jit(vmap(f))([0.5 .. 4], 2)"]) == 7
    assert got["Session.run([y, dy_dx])"] == [1, 2]
    assert all(check["ok"] for check in found["checks"])
    for name in ("jax", "jaxlib", "numpy"):
        assert found["versions"][name] == importlib.metadata.version(name)
    assert set(found["versions"]) == {"jpyfunc", "jax", "jaxlib", "numpy", "python"}
    assert len(found["devices"]) == 1
    costs = found["median_microseconds"]
    assert set(costs) == {"round_trip", "forward", "gradient"}
    assert all(cost > 0 for cost in costs.values())


def test_refuses_other_options():
    done = run("--fast")
    assert done.returncode == 2
    assert b"--fast" in done.stderr


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_wrong_number_exits_with_status_1_and_the_reason(options, monkeypatch, capsys):
    monkeypatch.setattr(report, "log_huber", lambda x, m: x**2)
    assert report.main(options) == 1
    out = capsys.readouterr().out
    assert "jit(f)(3, 2) gave 9, expected 7.24372" in out
    assert "jit(f)(1, 2) gave" not in out
    if options:
        found = json.loads(out)
        assert found["ok"] is False
        assert found["median_microseconds"] == {}
        assert [check["ok"] for check in found["checks"]][:2] == [True, False]
    else:
        assert "✗  jit(f)(3, 2)" in out
        assert "3 of 7 checks passed." in out


def test_an_exception_exits_with_status_1_and_the_reason(monkeypatch, capsys):
    def broken(x, m):
        if x > 2:
            raise ArithmeticError("out of range")
        return x**2

    monkeypatch.setattr(report, "log_huber", broken)
    monkeypatch.setattr(report, "py_func", with_shape(report.py_func))
    assert report.main([]) == 1
    out = capsys.readouterr().out
    assert "Wrong: jit(f)(3, 2) raised ArithmeticError: out of range" in out
    assert "Wrong: jit(f)(1, 2)" not in out


def with_shape(py_func):
    """Return `py_func` with a `Tout` that has a shape, so that bodies run only on data."""
    scalar = jax.ShapeDtypeStruct((), "float32")
    return lambda func, inp=None, Tout=None: py_func(func, inp, scalar)


def test_json_of_nan(monkeypatch, capsys):
    monkeypatch.setattr(report, "log_huber", lambda x, m: x * float("nan"))
    assert report.main(["--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["checks"][0]["got"] == ["nan"]
