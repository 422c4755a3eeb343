"""The faults of XLA that `_xla_bugs` works around, each met bare: with JAX's own callbacks.

Each test is expected to fail. Where one passes, the workaround that it names may go, at the
latest when the versions of jaxlib in which it fails are no longer supported.
"""

import subprocess
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from programs import start_program

JAXLIB = tuple(map(int, version("jaxlib").split(".")[:2]))


@pytest.mark.xfail(raises=jax.errors.JaxRuntimeError, reason="sample_of_returned")
def test_a_call_on_a_reduction_of_all_that_is_returned():
    def program(x):
        y = x @ x
        jax.debug.callback(print, y.sum(1))
        return y

    jax.jit(program).lower(jnp.ones((600, 600))).compile()


@pytest.mark.xfail(JAXLIB >= (0, 12), raises=AssertionError, reason="constrained")
def test_a_call_with_two_results_that_are_whole_on_every_device():
    mesh = Mesh(np.array(jax.devices()), ("d",))
    whole = NamedSharding(mesh, PartitionSpec())
    calls = []

    def body(x):
        calls.append(x)
        return np.asarray(x), np.asarray(x)

    def program(x):
        x = jax.lax.with_sharding_constraint(x, whole)
        ys = jax.pure_callback(body, (x, x), x)
        return [jax.lax.with_sharding_constraint(y, whole) for y in ys]

    split = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("d")))
    jax.block_until_ready(jax.jit(program)(split))
    assert len(calls) == 1


RAISING = """
import sys, jax

def body(x):
    raise ValueError({text})

try:
    jax.block_until_ready(jax.jit(lambda x: jax.pure_callback(body, x, x))(1.0))
except jax.errors.JaxRuntimeError as error:
    print(ascii(str(error)))
"""


def raised(text):
    """Raise JAX's error about a callback that raises, in a process that this may abort."""
    running = start_program(RAISING.format(text=text), JAX_PLATFORMS="cpu")
    try:
        return running.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        running.kill()
        raise


@pytest.mark.xfail(raises=AssertionError, reason="printable")
@pytest.mark.parametrize("text", [r"'before \0 after'", r"'before \udc80 after'"])
def test_a_text_that_is_not_utf8_or_has_a_null_byte(text):
    assert "after" in raised(text)


@pytest.mark.xfail(raises=AssertionError, reason="raise_without_stack")
def test_the_text_has_the_frames_of_the_body_alone():
    text = raised("'text'")
    text.index("ValueError: text")  # an error of another type, if it is not there
    assert "in <module>" not in text
