"""Programs that hang where bodies wait for threads that callbacks hold.

Each runs in a subprocess with a time limit. Arrays are 300x300 because small ones are
computed inline and never wait, so that a test with them would prove nothing. Where bodies
are given the client of the program that calls them, all hang on jaxlib 0.10.
"""

import pytest
from programs import run_program

SETUP = """
    import jax, jax.numpy as jnp, numpy as np, threading
    from jpyfunc import py_func

    n = 300
    inner = jax.jit(lambda a: jnp.dot(a, a) / n + jnp.sin(a))

    def body(x):
        y = jnp.dot(x, x) / n
        if float(jax.lax.stop_gradient(y).max()) > 0:
            y = y + jnp.cos(x)
        else:
            y = y - 1
        return inner(y) / n

    def plain(x):
        y = jnp.dot(x, x) / n
        y = jnp.where(y.max() > 0, y + jnp.cos(x), y - 1)
        return inner(y) / n

    same = lambda x: x
    f = py_func(body, Tout=same)
    x = jnp.ones((n, n))

    def burst(function, reference, count):
        results = [function(x + i) for i in range(count)]
        for i, result in enumerate(results):
            if i % 16 == 0:
                assert jnp.allclose(result, reference(x + i), rtol=1e-3, atol=1e-5), i
            result.block_until_ready()

    def on_threads(function, threads, count):
        def work(i):
            for k in range(count):
                function(x + i + k).block_until_ready()
        pool = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
        for thread in pool: thread.start()
        for thread in pool: thread.join()
"""

PROGRAMS = {
    "burst": "burst(jax.jit(lambda x: f(x * 2) + 1), lambda x: plain(x * 2) + 1, 50)",
    "threads": "on_threads(jax.jit(lambda x: sum(f(x * i) for i in range(4))), 16, 8)",
    "burst_grad": """
    loss = lambda f: lambda x: f(x).sum()
    burst(jax.jit(jax.grad(loss(f))), jax.jit(jax.grad(loss(plain))), 24)
    """,
    "threads_grad": """
    loss = lambda x: sum(f(x * i) for i in range(4)).sum()
    on_threads(jax.jit(jax.grad(loss)), 16, 4)
    """,
    "nested": """
    outer = py_func(lambda x: f(x) + f(x / 2), Tout=same)
    burst(jax.jit(outer), lambda x: plain(x) + plain(x / 2), 20)
    on_threads(jax.jit(outer), 8, 1)
    """,
    "nested_in_jit": """
    jitted = jax.jit(lambda x: f(x) * 2)
    outer = py_func(lambda x: jitted(x) + jitted(jnp.dot(x, x) / n), Tout=same)
    reference = lambda x: plain(x) * 2 + plain(jnp.dot(x, x) / n) * 2
    burst(jax.jit(outer), reference, 20)
    burst(jax.jit(jax.grad(lambda x: outer(x).sum())),
          jax.jit(jax.grad(lambda x: reference(x).sum())), 5)
    on_threads(jax.jit(outer), 8, 1)
    """,
    "nested_in_jit_on_threads": """
    jitted = jax.jit(f)
    # An array that a body makes of NumPy's is copied by its client, on other threads.
    outer = py_func(lambda x: jitted(jnp.asarray(np.array(x) / 2)) + jitted(x), Tout=same)
    on_threads(jax.jit(outer), 16, 4)
    """,
    "global_arrays": """
    weights = jnp.ones((n, n)) / n
    committed = jax.device_put(weights, jax.devices()[0])
    g = py_func(lambda x: x @ weights + jnp.sin(x @ committed), Tout=same)
    plain = lambda x: x @ weights + jnp.sin(x @ weights)
    burst(jax.jit(lambda x: g(x * 2)), lambda x: plain(x * 2), 24)
    on_threads(jax.jit(lambda x: sum(g(x * i) for i in range(16))), 16, 1)
    loss = lambda f: lambda x: f(x).sum()
    burst(jax.jit(jax.grad(loss(g))), jax.jit(jax.grad(loss(plain))), 20)
    on_threads(jax.jit(jax.grad(lambda x: sum(g(x * i) for i in range(4)).sum())), 16, 1)
    """,
    "vmap": """
    g = jax.vmap(f)
    both = jax.jit(lambda x: g(jnp.stack([x, x / 2])).sum(0))
    burst(both, lambda x: plain(x) + plain(x / 2), 20)
    """,
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_does_not_hang(program):
    source = SETUP + "\n    " + PROGRAMS[program].strip()
    run_program(source, limit=60, XLA_FLAGS="")  # with the threads that users have
