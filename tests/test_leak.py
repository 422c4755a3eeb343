"""What calls leave behind: nothing."""

from programs import run_program


def test_resident_memory_of_20000_calls():
    out = run_program(
        """
        import gc, jax, jax.numpy as jnp, os
        from jpyfunc import py_func, set_tape_limit

        set_tape_limit(2**20)  # which fills up meanwhile

        def resident():
            gc.collect()
            with open("/proc/self/statm") as f:
                return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        f = py_func(lambda x: x * 2 if x > 0 else x, Tout=jnp.float32)
        calls = [jax.jit(f), jax.jit(jax.grad(f)), f]

        def run(n):
            for i in range(n):
                calls[0 if i % 10 else i // 10 % 3](float(i % 7)).block_until_ready()

        run(4000)
        before = resident()
        run(20_000)
        print(resident() - before)
        """,
        limit=240,
    )
    assert int(out) < 5e6


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

        for i in range(2000):
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
        jax.clear_caches()
        gc.collect()
        print(sum(ref() is not None for ref in alive))
        """,
        limit=240,
    )
    assert int(out) == 0
