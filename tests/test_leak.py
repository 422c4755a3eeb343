"""What calls leave behind: nothing."""

import gc
import weakref

import jax
import jax.numpy as jnp
import pytest
from programs import run_program

from jpyfunc import py_func, raise_original
from jpyfunc._limits import MAX_KEPT_EXCEPTIONS


def test_resident_memory_of_10000_calls():
    out = run_program(
        """
        from programs import resident
        import gc, jax, jax.numpy as jnp, os
        from jpyfunc import py_func, set_tape_limit

        set_tape_limit(2**20)  # which fills up meanwhile

        f = py_func(lambda x: x * 2 if x > 0 else x, Tout=jnp.float32)
        calls = [jax.jit(f), jax.jit(jax.grad(f)), f]

        def run(n):
            for i in range(n):
                calls[0 if i % 10 else i // 10 % 3](float(i % 7)).block_until_ready()

        run(4000)
        before = resident()
        run(10_000)
        print(resident() - before)
        """,
        limit=240,
    )
    assert int(out) < 2.5e6


def test_dropped_functions_are_collected():
    out = run_program(
        """
        import gc, weakref, jax, jax.numpy as jnp
        from jpyfunc import py_func, raise_original

        alive = []
        def wrap(i):
            body = lambda x: x + i
            alive.append(weakref.ref(body))
            return py_func(body, Tout=jax.ShapeDtypeStruct((), jnp.float32))

        for i in range(1000):
            f = wrap(i)
            if i % 20 == 0:
                assert jax.jit(f)(1.0) == 1 + i
                assert jax.grad(f)(1.0) == 1
                assert jax.jit(jax.vmap(f))(jnp.ones(2))[0] == 1 + i
            else:
                assert f(1.0) == 1 + i

        def failing():
            def body(x):
                raise ValueError
            alive.append(weakref.ref(body))
            try:
                with raise_original():
                    jax.jit(py_func(body, Tout=jax.ShapeDtypeStruct((), jnp.float32)))(1.0)
            except ValueError:
                pass

        failing()
        del f
        gc.collect()
        print(sum(ref() is not None for ref in alive))
        """,
        limit=240,
    )
    assert int(out) == 0


def test_bodies_are_freed_with_the_programs_that_call_them():
    out = run_program(
        """
        import functools, gc, weakref, jax, jax.numpy as jnp, numpy as np
        import jpyfunc as jpf
        import jpyfunc.tf1 as tf

        S, x3 = jax.ShapeDtypeStruct((), jnp.float32), jnp.ones(3)

        class Held:
            def method(self, x):
                return x * 2 if x > 0 else x

        def of_closure():
            held = Held()
            return held, lambda x, held=held: held.method(x)

        def of_partial():
            held = Held()
            return held, functools.partial(lambda held, x: held.method(x), held)

        def of_method():
            held = Held()
            return held, held.method

        def by_session(f):
            with tf.Graph().as_default(), tf.Session() as session:
                x = tf.placeholder(jnp.float32, ())
                y = jpf.py_func(f, [x], S)
                session.run([y, tf.gradients(y, x)[0]], {x: 1.0})

        programs = {
            "jit": lambda f: jax.jit(lambda x: jpf.py_func(f, [x], S))(1.0),
            "numpy": lambda f: jax.jit(lambda x: jpf.numpy_func(f, [x], S))(1.0),
            "inferred": lambda f: jax.jit(jpf.py_func(f))(1.0),
            "staged": lambda f: jax.jit(jpf.py_func(f, staged=True))(1.0),
            "grad": lambda f: jax.grad(jpf.py_func(f, Tout=S))(1.0),
            "compiled grad": lambda f: jax.jit(jax.grad(jpf.py_func(f, Tout=S)))(1.0),
            "hessian": lambda f: jax.hessian(jpf.py_func(f, Tout=S))(1.0),
            "vmap": lambda f: jax.vmap(jpf.py_func(f, Tout=S))(x3),
            "compiled vmap": lambda f: jax.jit(jax.vmap(jpf.py_func(f, Tout=S)))(x3),
            "make_jaxpr": lambda f: jax.make_jaxpr(jpf.py_func(f, Tout=S))(1.0),
            "session": by_session,
        }
        for name, program in programs.items():
            for make in (of_closure, of_partial, of_method):
                alive = []
                for _ in range(3):
                    held, f = make()
                    alive.append(weakref.ref(held))
                    program(f)
                    del held, f
                gc.collect()
                count = sum(ref() is not None for ref in alive)
                if count:
                    print(name, make.__name__, count)
        """,
        limit=120,
    )
    assert out == ""


def test_calls_of_one_function_find_what_was_compiled():
    traced = []

    def tout(x):
        traced.append(1)
        return x

    body = lambda x: x + 1  # noqa: E731
    jitted = jax.jit(lambda x: py_func(body, [x], tout))
    assert [float(jitted(float(i))) for i in range(3)] == [1, 2, 3]
    assert len(traced) == 1


def test_originals_are_bounded():
    """All failures in a block can be retrieved; only the last ones have their variables."""

    class Large:
        pass

    alive = []

    def fail(x):
        frame_local = Large()
        alive.append(weakref.ref(frame_local))
        raise ValueError(float(x))

    f = jax.jit(py_func(fail, Tout=jax.ShapeDtypeStruct((), jnp.float32)))
    with raise_original():
        for i in range(100):
            with pytest.raises(ValueError, match=f"{i}.0"), raise_original():
                f(float(i)).block_until_ready()
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= MAX_KEPT_EXCEPTIONS + 1
