"""What every test shares: four host devices, and each rule tested eager and under jit."""

import gc
import os
import tempfile

from programs import xla_flags

# Many tests compile the same small programs. Of each process, because JAX's cache may give
# one what another has half written; a thread that gets that warns and compiles. Programs
# that a test starts alone may have it, too. It goes when the process has ended, and with
# it what that compiles to wait for programs in flight.
_compiled = tempfile.TemporaryDirectory()
os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Before JAX makes its CPU client; the tests of sharding need several devices.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), xla_flags(devices=4)])

import jax
import pytest

import jpyfunc

# What tests leave behind would otherwise make each garbage collection a long one.
jpyfunc.set_tape_limit(2**26)


def pytest_collection_modifyitems(items):
    """Notebooks take the longest: they come first, so that all workers end together."""
    items.sort(key=lambda item: item.path.stem != "test_notebooks")


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """No garbage collection looks through what the modules before have left."""
    gc.freeze()


@pytest.fixture(params=["eager", "jit"])
def transform(request):
    """Identity or `jax.jit`."""
    return jax.jit if request.param == "jit" else lambda f: f
