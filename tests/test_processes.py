"""Several processes of one JAX, each with a part of the arrays: right, or refused."""

from textwrap import dedent

import pytest
from programs import run_processes, run_program, xla_flags

SETUP = """
import jax.numpy as jnp, numpy as np, jpyfunc, jpyfunc.tf1 as tf
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jpyfunc import UnsupportedError, numpy_func, profile, py_func, raise_original

mesh = Mesh(np.array(jax.devices()), ("i",))
parts = NamedSharding(mesh, P("i"))
data = np.linspace(-1, 2, 2 * len(jax.devices()), dtype=np.float32)
x = jax.make_array_from_callback(data.shape, parts, lambda i: data[i])
same = lambda x: x
runs = []

def body(x):
    runs.append(1)
    return jnp.sin(x) * x.sum() if x.sum() > 0 else x

@jax.jit
def plain(x):
    return jnp.where(x.sum() > 0, jnp.sin(x) * x.sum(), x)

def check(got, want, count=None):
    # Every process has its part, and the body ran in one.
    for shard in got.addressable_shards:
        np.testing.assert_allclose(
            np.asarray(shard.data), np.asarray(want)[shard.index], rtol=1e-4, atol=1e-5
        )
    jax.effects_barrier()
    if count is not None:
        assert len(runs) == (count if rank == 0 else 0), (rank, runs)
    runs.clear()

def refused(text, function, *args):
    try:
        function(*args)
    except UnsupportedError as error:
        assert text in str(error), error
    else:
        raise AssertionError("not refused")

f = py_func(body, Tout=same)
"""

CASES = """
loss = lambda f: lambda x: (f(x) ** 2).sum()
plain_gradient = jax.jit(jax.grad(loss(plain)))
check(jax.jit(lambda x: f(x) + x)(x), plain(data) + data, 1)
check(jax.jit(jax.grad(loss(f)))(x), plain_gradient(data), 1)
check(jax.jit(jax.hessian(loss(f)))(x), jax.jit(jax.hessian(loss(plain)))(data))
check(jax.jit(lambda x: f(f(x) / 9) + f(x))(x), plain(plain(data) / 9) + plain(data), 3)

step = lambda f: lambda c, _: (f(c) / 3, c.sum())
scanned = lambda f: lambda x: jax.lax.scan(step(f), x, length=3)[0]
check(jax.jit(scanned(f))(x), scanned(plain)(data), 3)
check(jax.jit(jax.grad(loss(scanned(f))))(x), jax.jit(jax.grad(loss(scanned(plain))))(data))
either = lambda f: lambda x: jax.lax.cond(x[0] < 0, f, jnp.cos, x)
check(jax.jit(either(f))(x), either(plain)(data), 1)
check(jax.jit(either(f))(x + 5), either(plain)(data + 5), 0)

one = lambda x: x**2 if x > 0 else -x
each = py_func(one, Tout=jnp.float32)
check(jax.jit(jax.vmap(each))(x), np.where(data > 0, data**2, -data))
check(jax.jit(jax.vmap(jax.grad(each)))(x), np.where(data > 0, 2 * data, -1))
check(jax.jit(jax.vmap(py_func(one, staged=True)))(x), np.where(data > 0, data**2, -data))

for options in ({"stateful": True}, {"ordered": True}):
    g = py_func(body, Tout=same, **options)
    check(jax.jit(lambda x: g(g(x)) + 1)(x), plain(plain(data)) + 1, 2)
    check(jax.jit(lambda x: (g(x), x + 1)[1])(x), data + 1, 1)
    check(jax.jit(jax.grad(loss(g)))(x), plain_gradient(data), 1)
nothing = py_func(lambda x: runs.append(1), Tout=[])
check(jax.jit(lambda x: (nothing(x), x + 1)[1])(x), data + 1, 1)

h = numpy_func(lambda x: np.sin(x), Tout=same)
h.defvjp(lambda x: (np.sin(x), x), lambda x, bar: (np.cos(x) * bar,))
check(jax.jit(jax.grad(loss(h)))(x), np.sin(2 * data))

with profile() as seen:
    y = jax.jit(lambda x: f(x) * 2)(x)
assert seen.as_dict().get("body", {}).get("forward", {}).get("runs", 0) == (rank == 0)
check(y, plain(data) * 2, 1)

# Once a shard, in the process that has it.
split = lambda f: jax.shard_map(f, mesh=mesh, in_specs=P("i"), out_specs=P("i"))
by_shard = jnp.concatenate([plain(part) for part in data.reshape(-1, 2)])
gradient = jnp.concatenate([plain_gradient(part) for part in data.reshape(-1, 2)])
for options in ({}, {"stateful": True}, {"ordered": True}):
    g = py_func(body, Tout=same, **options)
    y = jax.jit(split(g))(x)
    jax.block_until_ready(y)
    jax.effects_barrier()
    assert len(runs) == len(jax.local_devices()), runs
    check(y, by_shard)
    check(jax.jit(jax.grad(lambda x: (split(g)(x) ** 2).sum()))(x), gradient)
total = jax.shard_map(
    lambda x: jax.lax.psum(f(x).sum(), "i"), mesh=mesh, in_specs=P("i"), out_specs=P()
)
check(jax.jit(total)(x), by_shard.sum())

# A program of one process alone, and eager calls, which run where they are made.
own = jnp.arange(3.0) + rank
np.testing.assert_allclose(jax.jit(f)(own), plain(own), rtol=1e-5)
runs.clear()
check(f(x), plain(data))
check(jax.grad(loss(f))(x), plain_gradient(data))
refused("Call it under jax.jit", jax.vmap(each), x)
refused("Call it under jax.jit", h, x)
holds = py_func(lambda y: y * x, Tout=same)
refused("over several processes, as a global", jax.jit(holds), x)

t = tf.placeholder(jnp.float32, data.shape)
with tf.Session() as session:
    fetched = session.run(jpyfunc.py_func(plain, [t], jnp.float32), {t: data})
np.testing.assert_allclose(fetched, plain(data), rtol=1e-5)
"""

FAILURE = """
class Failed(Exception):
    pass

def fails(x):
    if x.sum() > 100:
        raise Failed("too large")
    return x * 2

kinds = [{}, {"stateful": True}, {"ordered": True}]
for kind in kinds:
    g = py_func(fails, Tout=same, **kind)
    programs = [
        lambda x: g(x) + x.sum(),
        jax.grad(lambda x: (g(x) ** 2).sum()),
        lambda x: jax.lax.scan(lambda c, _: (g(c) + 60, c.sum()), x, length=3)[0],
    ]
    for program in map(jax.jit, programs):
        for catch in (False, True):
            try:
                if catch:
                    with raise_original():
                        jax.block_until_ready(program(x + 100))
                else:
                    jax.block_until_ready(program(x + 100))
            except Failed as error:
                assert catch and PROCESS_OF_THE_BODY, error
            except (jax.errors.JaxRuntimeError, ValueError) as error:
                assert "Failed: too large" in str(error), error
                assert not catch or not PROCESS_OF_THE_BODY, error
            else:
                raise AssertionError("did not fail")
            jax.effects_barrier()  # which has no more to tell
        # And all goes on.
        check(jax.jit(lambda x: g(x))(x), data * 2)
print("went on", flush=True)
"""


@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_every_case_is_right_or_refused(count, devices):
    run_processes(SETUP + CASES, count, limit=120, devices=devices)


def test_a_failure_is_known_to_all_processes():
    program = SETUP + FAILURE.replace("PROCESS_OF_THE_BODY", "rank == 0")
    for text in run_processes(program, 2, limit=60):
        assert text.endswith("went on\n")  # and nothing at exit


def test_a_failure_is_known_to_all_devices_of_one_process():
    program = SETUP + FAILURE.replace("PROCESS_OF_THE_BODY", "True")
    start = "import jax\nrank = 0\n"
    printed = run_program(start + program, limit=60, XLA_FLAGS=xla_flags(devices=4))
    assert "went on" in printed


def test_a_failure_of_one_shard_ends_the_other_processes():
    program = """
    def fails(x):
        if x.max() > 1.9:
            raise ValueError("one shard")
        return x

    split = jax.shard_map(
        lambda x: jax.lax.psum(py_func(fails, Tout=same)(x), "i"),
        mesh=mesh, in_specs=P("i"), out_specs=P(),
    )
    print(jax.block_until_ready(jax.jit(split)(x)))
    """
    printed = run_processes(SETUP + dedent(program), 2, limit=60, fails=True)
    assert "ValueError: one shard" in printed[-1]
