"""What every test shares: four host devices, and each rule tested eager and under jit."""

import gc
import os
import tempfile

from programs import xla_flags

# Many tests compile the same small programs, so they share a compilation cache: one per
# process, because JAX may read an entry that another process has written in part (a thread
# that does so warns and compiles). Programs that a test starts may use it, too. It is
# removed when the process ends, with the programs that are compiled at exit.
_compiled = tempfile.TemporaryDirectory()
os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Set before JAX creates its CPU client; the tests of sharding need several devices.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), xla_flags(devices=4)])

import jax
import pytest

import jpyfunc

# Otherwise the tapes that tests leave make every garbage collection slow.
jpyfunc.set_tape_limit(2**26)


def pytest_collection_modifyitems(items):
    """Run notebooks first: they take the longest, and all workers should end together."""
    items.sort(key=lambda item: item.path.stem != "test_notebooks")


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """Exempt what earlier modules have left from garbage collection."""
    gc.freeze()


@pytest.fixture(params=["eager", "jit"])
def transform(request):
    """Identity or `jax.jit`."""
    return jax.jit if request.param == "jit" else lambda f: f
