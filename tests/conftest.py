"""What every test shares: four host devices, and each rule tested eager and under jit."""

import os
import tempfile
from importlib.metadata import version

# Many tests compile the same small programs. Of each process, because JAX's cache may give
# one what another has half written; a thread that gets that warns and compiles. Programs
# that a test starts alone may have it, too.
_compiled = tempfile.TemporaryDirectory()
os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Before JAX makes its CPU client; the tests of sharding need several devices. And most of
# the time of the tests is that of compiling: so by what takes the least.
flags = [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=4",
    "--xla_backend_optimization_level=0",
]
if version("jaxlib").startswith("0.10."):  # later ones have one way alone
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)

import jax
import pytest

import jpyfunc

# What tests leave behind would otherwise make each garbage collection a long one.
jpyfunc.set_tape_limit(2**26)


def pytest_unconfigure():
    _compiled.cleanup()


@pytest.fixture(params=["eager", "jit"])
def transform(request):
    """Identity or `jax.jit`."""
    return jax.jit if request.param == "jit" else lambda f: f
