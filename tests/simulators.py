"""Host functions that workers of other processes import, by their names."""

import itertools
import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

import jpyfunc


def same(x):
    return x


def sine(x):
    return np.sin(x)


def sine_fwd(x):
    return np.sin(x), {"cos": np.cos(x)}


def sine_bwd(residuals, g):
    return (residuals["cos"] * g,)


def sine_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return np.sin(x), np.cos(x) * t


@jpyfunc.numpy_func(Tout=same)
def shadowed(x):
    return np.sin(x)


@jax.jit
@jpyfunc.numpy_func(Tout=same)
def shadowed_twice(x):
    return np.sin(x)


class Model:
    @jpyfunc.numpy_func(Tout=lambda self, x: x)
    def scaled(self, x):
        return 2 * x


def slow_at_first(x):
    time.sleep(0.2 if x == 0 else 0.0)
    return np.float32(x)


def sleeps(x):
    time.sleep(0.5)
    return x


def process(x):
    return np.int32(os.getpid())


class SimulationError(Exception):
    pass


class UnpicklableError(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} {b}")


def fails_from_three(x):
    if x >= 3:
        raise SimulationError(f"diverged at {x}")
    return x


def fails_unpicklably(x):
    raise UnpicklableError("lost", "again")


def returns_lock(x):
    return threading.Lock()


def dies(x):
    os._exit(3)


def in_x64(x):
    return np.int32(jnp.ones(1, float).dtype.itemsize)


def calls_a_program(x):
    return np.asarray(jax.jit(jax.vmap(shadowed))(jnp.full(3, x)).sum())


def with_lock(x, lock):
    return x


_counts = itertools.count()


def counted(x):
    return np.int32(1000 * (os.getpid() % 10_000) + next(_counts))
