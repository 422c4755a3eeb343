"""What every test shares: four host devices, and each rule tested eager and under jit."""

import os

# Before JAX makes its CPU client; the tests of sharding need several devices.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=4"]
).strip()

import jax
import pytest

import jpyfunc

# What tests leave behind would otherwise make each garbage collection a long one.
jpyfunc.set_tape_limit(2**26)


@pytest.fixture(params=["eager", "jit"])
def transform(request):
    """Identity or `jax.jit`."""
    return jax.jit if request.param == "jit" else lambda f: f
