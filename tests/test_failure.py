"""Exceptions in bodies: what surfaces, eager and under jit, and that all works after."""

import pickle
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable
from programs import run_program

import jpyfunc
from jpyfunc import UnsupportedError, numpy_func, py_func, raise_original

f32 = jax.ShapeDtypeStruct((), jnp.float32)


class CustomError(Exception):
    def __init__(self, message, payload):
        super().__init__(message)
        self.payload = payload


def _inner_frame(x):
    raise CustomError(f"bad value {x}", payload={"x": x})


def fails_when_negative(x):
    """Fails on what it runs on, values or the tracers of a derivative."""
    if x < 0:
        _inner_frame(float(jax.lax.stop_gradient(jnp.asarray(0.0))))
    return jnp.sin(x)


wrapped = py_func(fails_when_negative, Tout=f32)
nested = py_func(lambda x: wrapped(x) * 2, Tout=f32)
jit_nested = py_func(lambda x: jax.jit(wrapped)(x) * 2, Tout=f32)

WAYS = {
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


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


def test_jax_error_has_the_traceback_of_the_body(way):
    function, want = way
    jitted = jax.jit(function)
    for _ in range(3):
        # JAX's fast path, once the program has run well, raises the other class.
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError)) as info:
            jax.block_until_ready(jitted(-1.0))
        for part in ("CustomError: bad value 0.0", "_inner_frame", "fails_when_negative"):
            assert part in str(info.value)
        np.testing.assert_allclose(jitted(1.0), want, rtol=1e-5)


def test_raise_original(way):
    """First call and cached calls, and everything works afterwards."""
    function, want = way
    jitted = jax.jit(function)
    for _ in range(3):
        with pytest.raises(CustomError, match="bad value") as info, raise_original():
            jitted(-1.0)
        assert info.value.payload == {"x": 0.0}
        assert info.traceback[-1].name == "_inner_frame"
        with raise_original():
            np.testing.assert_allclose(jitted(1.0), want, rtol=1e-5)
    jax.effects_barrier()


def test_eager_calls_raise_as_python_does(way):
    function, want = way
    if function is jit_nested:
        return  # the call inside the body is compiled
    with pytest.raises((CustomError, jax.errors.JaxRuntimeError), match="bad value"):
        function(-1.0)
    np.testing.assert_allclose(function(1.0), want, rtol=1e-5)


def test_raise_original_of_a_call_still_in_flight():
    """The failing body runs on XLA's thread, after the block was left otherwise."""
    big = jnp.ones((500, 500))
    f = py_func(fails_when_negative, Tout=f32)
    jitted = jax.jit(lambda x: f(-jnp.dot(x, x).max()))
    kept = []
    for _ in range(3):
        with pytest.raises(CustomError), raise_original():
            kept.append(jitted(jnp.dot(big, big)))


def test_raise_original_keeps_the_object_and_its_chain():
    cause, error = KeyError("cause"), ValueError("boom")

    def body(x):
        raise error from cause

    with pytest.raises(ValueError, match="boom") as info, raise_original():
        jax.jit(py_func(body, Tout=f32))(1.0)
    assert info.value is error
    assert info.value.__cause__ is cause


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
    with pytest.raises(UnsupportedError, match=r"that part with jax.numpy\.$"):
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
    """The text of what is raised quotes the error of the call inside."""

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
    """XLA would end the process."""
    out = run_program(
        f"""
        import jax, jax.numpy as jnp
        from jpyfunc import py_func, raise_original

        class Textless(Exception):
            def __str__(self):
                {text}

        def fail(x):
            raise Textless

        f = jax.jit(py_func(fail, Tout=jax.ShapeDtypeStruct((), jnp.float32)))
        for _ in range(2):
            try:
                f(1.0).block_until_ready()
            except Exception as error:
                print(type(error).__name__, "Textless" in str(error))
            try:
                with raise_original():
                    f(1.0).block_until_ready()
            except Textless:
                print("original")
        """,
        limit=60,
    )
    lines = out.split("\n")[:-1]
    assert lines[1::2] == ["original"] * 2
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


def test_the_text_has_the_lines_of_the_user_and_the_way_to_the_exception():
    big = jnp.ones((500, 500))  # on XLA's thread, and on the caller's
    for x in (jnp.float32(-1), -jnp.dot(big, big).max()):
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError)) as info:
            jax.block_until_ready(jax.jit(lambda x: wrapped(x))(x))
        text = str(info.value)
        assert "py_func 'fails_when_negative'" in text
        assert "_inner_frame(float" in text  # the source of the line
        assert "site-packages" not in text
        assert text.rstrip().splitlines()[-1].startswith("To catch the original")


def test_errors_of_our_own_are_short():
    f = jax.jit(py_func(lambda x: "text", Tout=f32))
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError)) as info:
        jax.block_until_ready(f(1.0))
    lines = str(info.value).rstrip().splitlines()
    assert len(lines) <= 10
    assert "ResultError" in lines[-1]
    assert "Return" in lines[-1]


LOCKED = """
import threading, time, jax, jax.numpy as jnp, jpyfunc
from jpyfunc import _flight

_flight.PATIENCE = 1.0
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
    assert at_once < _flight.PATIENCE, at_once
    assert float(before[0, 0]) == float(during[0, 0]) == 1001
print("done")
"""


def test_leaving_a_block_does_not_wait_for_a_lock_that_is_held_outside():
    assert run_program(LOCKED, limit=90).strip() == "done"
