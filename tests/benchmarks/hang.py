"""One of two programs that hang with `jax.pure_callback`: `hang.py LIBRARY PROGRAM`."""

import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp

from jpyfunc import py_func

N = 600
OUT = jax.ShapeDtypeStruct((N, N), jnp.float32)


def body(x):
    y = jnp.dot(x, x) / N
    return jnp.sort(y, axis=0) if y.sum() > 0 else y


CALLS = {
    "jpyfunc": py_func(body, Tout=OUT),
    "pure_callback": lambda x: jax.pure_callback(body, OUT, x),
}


def main(library: str, program: str) -> None:
    call, x = CALLS[library], jnp.ones((N, N))
    if program == "50 calls in flight":
        jitted = jax.jit(lambda x: call(x * 2) + 1)
        jax.block_until_ready([jitted(x + i) for i in range(50)])
        return

    jitted = jax.jit(lambda x: sum(call(x * i) for i in range(16)))

    def work(i: int) -> None:
        for _ in range(5):
            jitted(x + i).block_until_ready()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
