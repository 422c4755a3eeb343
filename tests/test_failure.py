"""Exceptions in bodies: what surfaces, eager and under jit, and that all works after."""

import contextlib
import pickle
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable
from programs import run_program, start_program, xla_flags

import jpyfunc
from jpyfunc import UnsupportedError, numpy_func, py_func, raise_original
from jpyfunc._runtime import fences

f32 = jax.ShapeDtypeStruct((), jnp.float32)


class CustomError(Exception):
    def __init__(self, message, payload):
        super().__init__(message)
        self.payload = payload


def _inner_frame(x):
    raise CustomError(f"bad value {x}", payload={"x": x})


def fails_when_negative(x):
    """Fail with an error that shows the argument, a value or a tracer."""
    if x < 0:
        _inner_frame(float(jax.lax.stop_gradient(jnp.asarray(0.0))))
    return jnp.sin(x)


wrapped = py_func(fails_when_negative, Tout=f32)
nested = py_func(lambda x: wrapped(x) * 2, Tout=f32)
jit_nested = py_func(lambda x: jax.jit(wrapped)(x) * 2, Tout=f32)

CALLS = {
    "forward": (wrapped, np.sin(1.0)),
    "jvp": (lambda x: jax.jvp(wrapped, (x,), (1.0,))[1], np.cos(1.0)),
    "grad": (jax.grad(wrapped), np.cos(1.0)),
    "hessian": (jax.hessian(wrapped), -np.sin(1.0)),
    "vmap": (lambda x: jax.vmap(wrapped)(jnp.stack([abs(x), x]))[0], np.sin(1.0)),
    "vmap_grad": (lambda x: jax.vmap(jax.grad(wrapped))(jnp.stack([x, x]))[0], np.cos(1.0)),
    "scan": (
        lambda x: jax.lax.scan(lambda c, _: (wrapped(c), 0), x, length=1)[0],
        np.sin(1.0),
    ),
    "nested": (nested, 2 * np.sin(1.0)),
    "nested_in_jit": (jit_nested, 2 * np.sin(1.0)),
    "nested_grad": (jax.grad(jit_nested), 2 * np.cos(1.0)),
    "stateful": (py_func(fails_when_negative, Tout=f32, stateful=True), np.sin(1.0)),
    "ordered": (py_func(fails_when_negative, Tout=f32, ordered=True), np.sin(1.0)),
}


@pytest.fixture(params=CALLS)
def failing_call(request):
    return CALLS[request.param]


def test_jax_error_has_the_traceback_of_the_body(failing_call):
    function, want = failing_call
    jitted = jax.jit(function)
    for _ in range(3):
        # JAX's fast path, once the program has succeeded, raises the other class.
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError)) as info:
            jax.block_until_ready(jitted(-1.0))
        for part in ("CustomError: bad value 0.0", "_inner_frame", "fails_when_negative"):
            assert part in str(info.value)
        np.testing.assert_allclose(jitted(1.0), want, rtol=1e-5)


def test_raise_original(failing_call):
    """The first call and cached calls fail alike, and everything works afterwards."""
    function, want = failing_call
    jitted = jax.jit(function)
    for _ in range(3):
        with pytest.raises(CustomError, match="bad value") as info, raise_original():
            jitted(-1.0)
        assert info.value.payload == {"x": 0.0}
        assert info.traceback[-1].name == "_inner_frame"
        with raise_original():
            np.testing.assert_allclose(jitted(1.0), want, rtol=1e-5)
    jax.effects_barrier()


def test_eager_calls_raise_as_python_does(failing_call):
    function, want = failing_call
    if function is jit_nested:
        return  # the call inside the body is compiled
    with pytest.raises((CustomError, jax.errors.JaxRuntimeError), match="bad value"):
        function(-1.0)
    np.testing.assert_allclose(function(1.0), want, rtol=1e-5)


def test_raise_original_of_a_call_still_in_flight():
    """The failing body runs on XLA's thread, after another exception has left the block."""
    big = jnp.ones((500, 500))
    f = py_func(fails_when_negative, Tout=f32)
    jitted = jax.jit(lambda x: f(-jnp.dot(x, x).max()))
    held = []
    for _ in range(3):
        with pytest.raises(CustomError), raise_original():
            held.append(jitted(jnp.dot(big, big)))

    def fails_before_a_block():
        before = jitted(jnp.dot(big, big))
        with raise_original():
            pass  # raised outside of the block
        before.block_until_ready()

    # JAX raises at once if the operand is ready already, as on loaded machines.
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="CustomError"):
        fails_before_a_block()


def test_raise_original_keeps_the_object_and_its_chain():
    cause, error = KeyError("cause"), ValueError("boom")

    def body(x):
        raise error from cause

    with pytest.raises(ValueError, match="boom") as info, raise_original():
        jax.jit(py_func(body, Tout=f32))(1.0)
    assert info.value is error
    assert info.value.__cause__ is cause


class EmptyError(Exception):
    """A collection of problems, which is false in a truth test."""

    def __len__(self):
        return 0


def test_raise_original_of_an_exception_that_is_false():
    @py_func(Tout=f32)
    def fail(x):
        raise EmptyError

    in_a_body = jax.jit(py_func(lambda x: jax.jit(fail)(x), Tout=f32))
    with pytest.raises(EmptyError), raise_original():
        in_a_body(1.0)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_no_exception_is_swallowed(kind, transform):
    def body(x):
        raise kind("stop")

    f = transform(py_func(body, Tout=f32))
    # An interrupt of a compiled program interrupts again; see the last test.
    if (kind, transform) != (KeyboardInterrupt, jax.jit):
        with pytest.raises((kind, jax.errors.JaxRuntimeError)) as info:
            jax.block_until_ready(f(1.0))
        assert kind.__name__ in repr(info.value) + str(info.value)
    with pytest.raises(kind), raise_original():
        f(1.0)


def test_raise_original_leaves_other_errors_alone():
    with pytest.raises(ZeroDivisionError), raise_original():
        raise ZeroDivisionError
    failing = jax.jit(lambda x: jax.pure_callback(lambda x: 1 / 0, f32, x))
    with pytest.raises(jax.errors.JaxRuntimeError, match="ZeroDivisionError"):  # noqa: SIM117
        with raise_original():
            jax.block_until_ready(failing(1.0))


def test_raise_original_on_several_threads_at_once():
    outcomes = {}

    def work(i):
        def body(x):
            if i % 2:
                raise CustomError(str(i), payload=i)
            return x * i

        jitted = jax.jit(py_func(body, Tout=f32))
        try:
            for _ in range(20):
                with raise_original():
                    outcomes[i] = float(jitted(1.0))
        except CustomError as error:
            outcomes[i] = error.payload

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {i: i for i in range(8)}


def test_a_wrong_result_is_the_same_error_eager_and_under_jit():
    f = py_func(lambda x: jnp.ones(3), Tout=f32, name="wrong")
    texts = []
    for transform in (lambda f: f, jax.jit):
        with pytest.raises(jpyfunc.ResultError) as info, raise_original():
            transform(f)(1.0)
        texts.append(str(info.value))
    assert texts[0] == texts[1]
    assert "py_func 'wrong': result: expected shape (), got (3,)" in texts[0]


def test_export_and_serialization_say_why_not():
    f = py_func(lambda x: x * 2, Tout=f32, name="double")
    reason = r"'double'.*body is a Python function of this process"
    for platforms in (["cpu"], ["cpu", "cuda"]):
        with pytest.raises(UnsupportedError, match=reason):
            jax.export.export(jax.jit(f), platforms=platforms)(1.0)
    with pytest.raises(UnsupportedError, match=r"staged=True .*jpyfunc.explain"):
        jax.export.export(jax.jit(f))(1.0)
    with pytest.raises(UnsupportedError, match=r"that part with jax.numpy\.\n"):
        jax.export.export(jax.jit(numpy_func(lambda x: x, Tout=f32)))(1.0)
    for options in ({}, {"stateful": True}, {"ordered": True}):
        g = py_func(lambda x: x * 2, Tout=f32, name="double", **options)
        compiled = jax.jit(lambda x, g=g: g(x + 1)).lower(1.0).compile()
        with pytest.raises(UnsupportedError, match=reason):
            serialize_executable.serialize(compiled)
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(compiled)
    assert jax.jit(f)(1.0) == 2.0


def test_raise_original_of_a_body_that_handled_another_error():
    """The text of the exception quotes the error of the inner call."""

    @py_func(Tout=f32)
    def outer(x):
        try:
            return jax.jit(wrapped)(x)
        except Exception as error:
            raise KeyError("outer") from error

    for _ in range(2):
        with pytest.raises(KeyError, match="outer"), raise_original():
            jax.jit(outer)(-1.0)


@pytest.mark.parametrize("text", ["zero \0 byte", "surrogate \udcff"])
def test_texts_that_xla_cannot_carry(text):
    def body(x):
        raise OSError(text)

    f = jax.jit(py_func(body, Tout=f32))
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="OSError"):
        jax.block_until_ready(f(1.0))
    with pytest.raises(OSError) as info, raise_original():  # noqa: PT011 - compared below
        f(1.0)
    assert info.value.args == (text,)


@pytest.mark.parametrize("text", ["raise RuntimeError('no text')", "return 3"])
def test_an_exception_without_a_text_is_an_error(text):
    """XLA would abort the process."""
    out = run_program(
        f"""
        import jax, jax.numpy as jnp
        from jpyfunc import py_func, raise_original

        class Textless(Exception):
            def __str__(self):
                {text}

        def fail(x):
            raise Textless

        f = py_func(fail, Tout=jax.ShapeDtypeStruct((), jnp.float32))
        f, batch = jax.jit(f), jax.jit(jax.vmap(f))
        for call in lambda: f(1.0), lambda: f(1.0), lambda: batch(jnp.ones(3)):
            try:
                call().block_until_ready()
            except Exception as error:
                print(type(error).__name__, "Textless" in str(error))
            try:
                with raise_original():
                    call().block_until_ready()
            except Textless:
                print("original")
        """,
        limit=60,
    )
    lines = out.split("\n")[:-1]
    assert lines[1::2] == ["original"] * 3
    assert all(line.endswith("Error True") for line in lines[::2])


def test_an_interrupt_of_a_body_interrupts_the_program():
    out = run_program(
        """
        import time, jax, jax.numpy as jnp
        from jpyfunc import py_func

        def interrupted(x):
            raise KeyboardInterrupt

        f = jax.jit(py_func(interrupted, Tout=jax.ShapeDtypeStruct((), jnp.float32)))
        for _ in range(2):
            try:
                try:
                    f(1.0).block_until_ready()
                except Exception:
                    pass
                time.sleep(10)
                print("swallowed")
            except KeyboardInterrupt:
                print("interrupted")
        """,
        limit=60,
    )
    assert out.split() == ["interrupted"] * 2


def test_the_text_has_the_users_lines_and_says_how_to_catch_the_exception():
    big = jnp.ones((500, 500))  # on XLA's thread, and on the caller's
    for x in (jnp.float32(-1), -jnp.dot(big, big).max()):
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError)) as info:
            jax.block_until_ready(jax.jit(lambda x: wrapped(x))(x))
        text = str(info.value)
        assert "py_func 'fails_when_negative'" in text
        assert "_inner_frame(float" in text  # the source of the line
        assert "site-packages" not in text
        hint, heading = text.rstrip().splitlines()[-2:]
        assert hint.startswith("To catch the original")
        assert heading == 'See "The body raised an exception" in docs/errors.md.'


def test_our_own_errors_are_short():
    f = jax.jit(py_func(lambda x: "text", Tout=f32))
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError)) as info:
        jax.block_until_ready(f(1.0))
    lines = str(info.value).rstrip().splitlines()
    assert len(lines) <= 10
    assert "ResultError" in lines[-2]
    assert "Return" in lines[-2]
    assert lines[-1] == 'See "A result that is not an array" in docs/errors.md.'


LOCKED = """
import threading, time, jax, jax.numpy as jnp, jpyfunc
from jpyfunc._runtime import in_flight

in_flight.PATIENCE = 1.0
lock = threading.Lock()

def body(x):
    with lock:
        return x + 1

compiled = jax.jit(jpyfunc.py_func(body, Tout=lambda x: x))
x = jnp.ones((1000, 1000))

def f():  # of what is not there yet, so that it runs on a thread of XLA's
    return compiled(jnp.dot(jnp.dot(x, x) / 1000, x))

jax.block_until_ready(f())
for block in (jpyfunc.profile, jpyfunc.raise_original):
    with lock:
        before = f()  # waits for the lock
        time.sleep(0.2)
        begin = time.monotonic()
        with block():
            pass
        at_once = time.monotonic() - begin
        with block():
            during = f()
    assert at_once < in_flight.PATIENCE, at_once
    assert float(before[0, 0]) == float(during[0, 0]) == 1001
print("done")
"""


def test_leaving_a_block_does_not_wait_for_a_lock_that_is_held_outside():
    assert run_program(LOCKED, limit=90).strip() == "done"


# The following tests are about whole processes: how they end, and what they print.
DEVICES = """
import os, signal, sys, threading, time
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import jpyfunc
from jpyfunc import profile, py_func, raise_original

SCALAR = jax.ShapeDtypeStruct((), jnp.float32)
ERRORS = (jax.errors.JaxRuntimeError, ValueError)
same = lambda x: x

def split(x):  # over all devices
    mesh = Mesh(np.array(jax.devices()), ("d",))
    return jax.device_put(x, NamedSharding(mesh, P("d")))

def unready():  # ones, after a while
    x = jnp.ones((1000, 1000))
    for _ in range(3):
        x = x @ x / 1000
    return x

jax.block_until_ready(unready())
"""


def run_on(devices, program, limit=60):
    """Run a program with `DEVICES`, and check that nothing is said when it ends."""
    running = start_program(
        DEVICES + textwrap.dedent(program), XLA_FLAGS=xla_flags(devices)
    )
    try:
        out, err = running.communicate(timeout=limit)
    finally:
        running.kill()
    assert running.returncode == 0, out + err
    assert "<py_func" not in out + err
    assert "Exception ignored" not in err, err
    return out


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    "end",
    [
        "",
        "sys.exit()",
        "nested(x)",
        "t = threading.Thread(target=run); t.start(); t.join()",
    ],
)
def test_python_ends_while_pure_calls_are_in_flight(devices, end):
    program = f"""
    @py_func(Tout=same)
    def body(x):
        print("begin")
        time.sleep(0.02)
        return jnp.sin(x)

    step = jax.jit(body)
    nested = jax.jit(py_func(lambda x: step(x) + 1, Tout=same))
    for f in (step, nested):
        jax.block_until_ready(f(split(unready())))
    x = split(unready())

    def run():
        y = x
        for _ in range(5):
            y = step(y)

    run()
    step(x)
    {end}
    """
    assert run_on(devices, program).count("begin") >= 8


def test_python_does_not_wait_for_a_body_that_waits_forever():
    program = """
    from jpyfunc._runtime import in_flight
    in_flight.PATIENCE = 0.5
    lock = threading.Lock()
    lock.acquire()

    @jax.jit
    @py_func(Tout=same)
    def stuck(x):
        if x[0, 0] > 0:
            lock.acquire()
        return x

    stuck(-unready()).block_until_ready()
    x = unready()
    results = [stuck(x) for _ in range(3)]
    time.sleep(0.2)
    """
    run_on(1, program, limit=40)


def test_python_does_not_wait_for_a_daemon_thread_that_goes_on():
    """It ends, or is aborted within XLA, as with `jax.pure_callback`."""
    program = """
    from jpyfunc._runtime import in_flight
    in_flight.PATIENCE = 0.5

    @jax.jit
    @py_func(Tout=same)
    def body(x):
        time.sleep(0.01)
        return x

    x = jnp.ones(())
    body(x).block_until_ready()

    def forever():
        while True:
            body(x)

    for _ in range(3):
        threading.Thread(target=forever, daemon=True).start()
    time.sleep(0.2)
    print("end", flush=True)
    """
    running = start_program(DEVICES + textwrap.dedent(program))
    try:
        out, _ = running.communicate(timeout=40)
    finally:
        running.kill()
    assert out == "end\n"


def test_a_failure_of_an_ordered_call_is_raised_once():
    program = """
    @py_func(Tout=same, ordered=True)
    def check(x):
        if np.asarray(x).min() < 0:
            raise ArithmeticError("negative")
        return x + 1

    def fails(call):
        try:
            call()
        except ArithmeticError:
            return "original"
        except ERRORS as error:
            assert "ArithmeticError: negative" in str(error), error
            return "failed"
        return "passed"

    def original(call):
        with raise_original():
            call()

    f = jax.jit(check)
    g = jax.jit(py_func(lambda x: x * 2, Tout=same, ordered=True))
    for good in (split(jnp.ones(4)), unready(), jnp.ones(3)):
        # Seen where its result is read; then all is as before.
        assert fails(lambda: jax.block_until_ready(f(-good))) == "failed"
        assert fails(jax.effects_barrier) == "passed"
        assert fails(lambda: jax.block_until_ready(f(-good))) == "failed"
        assert (f(good) == 2).all() and (g(good) == 2).all()
        jax.effects_barrier()
        assert fails(lambda: original(lambda: f(-good))) == "original"
        assert (f(good) == 2).all()
        # Read on another thread.
        y = []
        assert fails(lambda: y.append(f(-good))) in ("passed", "failed")
        if y:
            threads = [threading.Thread(target=fails, args=(y[0].block_until_ready,))]
            threads[0].start(); threads[0].join()
        assert (f(good) == 2).all()
    # Not seen by anyone: raised by what waits for it first, and only by that.
    for waits in (lambda: f(good), jax.effects_barrier):
        f(-split(jnp.ones(4)))
        assert fails(waits) == "failed"
        assert fails(waits) == "passed"
    # And so is what JAX itself has called.
    from jax.experimental import io_callback
    h = jax.jit(lambda x: io_callback(check.__wrapped__, x, x, ordered=True))
    assert fails(lambda: (h(-unready()), jax.effects_barrier())) == "failed"
    assert fails(jax.effects_barrier) == "passed"
    """
    run_on(2, program)


def test_blocks_wait_for_calls_over_several_devices():
    program = """
    @py_func(Tout=same)
    def body(x):
        time.sleep(0.05)
        if x[0] < 0:
            raise KeyError("mine")
        return x + 1

    f, x = jax.jit(body), split(jnp.ones(8))
    for _ in range(3):  # in JAX's fast path, too
        with profile() as prof:
            f(x), f(x)
        assert prof.as_dict()["body"]["forward"]["calls"] == 2
        try:
            with raise_original():
                f(-x)
        except KeyError as error:
            assert error.args == ("mine",)
        else:
            raise AssertionError("not raised")
    with raise_original():  # caught in the block: it is over with that
        try:
            f(-x).block_until_ready()
        except jax.errors.JaxRuntimeError as error:
            assert str(error).endswith("KeyError: 'mine'"), str(error)

    class EmptyError(Exception):  # false in a truth test
        def __len__(self):
            return 0

    try:
        with raise_original():
            held = f(-x)
            raise EmptyError
    except EmptyError:
        pass
    """
    run_on(2, program)


@pytest.mark.parametrize(
    "context",
    [
        contextlib.nullcontext,
        jax.disable_jit,
        lambda: jax.enable_x64(True),
        lambda: jax.transfer_guard("disallow_explicit"),
        lambda: jax.set_mesh(jax.make_mesh((2,), ("d",))),
        lambda: jax.debug_nans(True),
        lambda: jax.no_tracing(True),
        lambda: jax.no_execution(True),
    ],
)
def test_blocks_under_any_configuration_and_transform(context):
    """Their fences are programs of our own, which no trace records."""
    f = py_func(lambda x: x + 1, Tout=lambda x: x)
    jax.jit(f)(jnp.ones(3)).block_until_ready()
    fences._compiled_fence.cache_clear()
    with context(), raise_original(), jpyfunc.profile():
        pass

    def traced(x):
        fences._compiled_fence.cache_clear()
        with raise_original(), jpyfunc.profile():
            return f(x)

    assert len(jax.make_jaxpr(traced)(jnp.ones(3)).eqns) == 1
    assert (jax.jit(jax.vmap(traced))(jnp.ones((2, 3))) == 2).all()
    assert (jax.grad(lambda x: traced(x).sum())(jnp.ones(3)) == 1).all()
    assert (jax.jit(py_func(traced, Tout=lambda x: x))(jnp.ones(3)) == 2).all()


def test_blocks_do_not_look_at_each_array():
    f = jax.jit(py_func(lambda x: x, Tout=f32))
    f(1.0)

    def seconds():
        begin = time.thread_time()
        for _ in range(20):
            with raise_original(), jpyfunc.profile():
                f(1.0).block_until_ready()
        return time.thread_time() - begin

    seconds()
    few = min(seconds() for _ in range(5))
    held = [jnp.float32(i) for i in range(20_000)]
    many = min(seconds() for _ in range(5))
    assert many < 3 * few, (few, many)
    assert len(held) == 20_000


@pytest.mark.parametrize("devices", [1, 2])
def test_an_interrupt_is_one_keyboard_interrupt(devices):
    program = """
    def raises(x):
        if x.sum() < 0:
            raise KeyboardInterrupt("by the body")
        return x

    def spins(x):
        if x.sum() < 0:
            begin = time.monotonic()
            while time.monotonic() < begin + 20:
                pass
        return x

    def sleeps(x):
        if x.sum() < 0:
            time.sleep(20)
        return x

    def outcome(call):
        first = None
        try:
            try:
                jax.block_until_ready(call())
            except BaseException as error:
                first = type(error)
            for _ in range(20):
                time.sleep(0.005)
        except KeyboardInterrupt:
            return first, "and another one"
        return first

    def interrupted(f, x):  # by the body, or by Ctrl-C while it runs
        if body is not raises:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        return f(x)

    def in_block(f, x):
        with raise_original():
            return interrupted(f, x)

    on_main = [raises, spins, sleeps] if len(jax.devices()) == 1 else [raises]
    x = split(jnp.ones(4))
    for body in on_main:
        f = jax.jit(py_func(body, Tout=same))
        nested = jax.jit(py_func(lambda x: jax.jit(py_func(body, Tout=same))(x), Tout=same))
        for program in (f, nested):
            program(x)
            for call in (interrupted, in_block, interrupted):
                assert outcome(lambda: call(program, -x)) is KeyboardInterrupt
                assert sys.gettrace() is None
                jax.block_until_ready(program(x))
    f = jax.jit(py_func(raises, Tout=same))
    f(unready())
    assert outcome(lambda: f(-unready())) is KeyboardInterrupt
    assert outcome(lambda: f(-unready())) is KeyboardInterrupt
    seen = []
    thread = threading.Thread(target=lambda: seen.append(outcome(lambda: f(-jnp.ones(())))))
    thread.start(); thread.join()
    assert seen == [KeyboardInterrupt], seen
    """
    run_on(devices, program)


def test_the_users_own_exceptions_are_not_replaced():
    @py_func(Tout=f32)
    def inner(x):
        raise KeyError("inner")

    jitted = jax.jit(inner)

    @py_func(Tout=f32)
    def outer(x):
        try:
            return jitted(x)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            raise ValueError(f"outer: {error}") from None

    big = jnp.ones((500, 500))
    for x in (jnp.float32(1), jnp.dot(big, big)[0, 0]):
        for _ in range(2):
            with pytest.raises(ValueError, match="outer: "), raise_original():
                jax.block_until_ready(jax.jit(outer)(x))
            for quote in ("step 3: {}", "{}"):
                texts = []
                with pytest.raises(ValueError, match="inner") as info, raise_original():
                    quoting(quote, lambda x=x: jax.block_until_ready(jitted(x)), texts)
                assert info.value.args == (texts[0],)
                assert "<py_func" not in texts[0]


def quoting(quote, call, texts):
    try:
        call()
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        texts.append(quote.format(error))
    raise ValueError(texts[0])


def test_debuggers_and_profilers_follow_bodies_to_xlas_threads():
    program = """
    lines, calls = set(), set()

    def trace(frame, event, arg):
        lines.add((frame.f_code.co_name, threading.get_ident()))
        return trace

    def note(frame, event, arg):
        calls.add((frame.f_code.co_name, threading.get_ident()))

    def on_xlas_thread(x):
        assert hooks() == (trace, note)
        return x + 1

    def at_once(x):
        assert hooks() == (None, None)  # as the main thread has none
        return x + 1

    hooks = lambda: (sys.gettrace(), sys.getprofile())
    f = jax.jit(py_func(on_xlas_thread, Tout=same))
    g = jax.jit(py_func(at_once, Tout=same))
    threading.settrace(trace)
    threading.setprofile(note)
    jax.block_until_ready(f(split(jnp.ones(2))))
    jax.block_until_ready(g(jnp.ones(2)))
    for seen in (lines, calls):
        names = {name for name, thread in seen if thread != threading.get_ident()}
        assert "on_xlas_thread" in names and "at_once" not in names
    threading.settrace(None)
    threading.setprofile(None)
    lines.clear(), calls.clear()
    h = jax.jit(py_func(lambda x: x if hooks() == (None, None) else 1 / 0, Tout=same))
    jax.block_until_ready(h(split(jnp.ones(2))))
    assert not lines and not calls
    """
    run_on(2, program)


def test_importing_changes_no_error_of_programs_without_our_calls():
    """Those that JAX makes are read from the first program on that calls a body."""
    run_program(
        """
        import jax, jax.numpy as jnp
        error = jax.errors.JaxRuntimeError
        before = error.__init__, dict(vars(error))
        import jpyfunc
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        f = jpyfunc.py_func(lambda x: 1 / 0, Tout=scalar)
        jax.make_jaxpr(jax.grad(f))(1.0)
        assert (error.__init__, dict(vars(error))) == before
        try:
            jax.jit(f)(1.0).block_until_ready()
        except error as raised:
            assert "ZeroDivisionError" in str(raised) and "<py_func" not in str(raised)
        else:
            raise AssertionError("nothing was raised")
        """,
        limit=60,
    )
