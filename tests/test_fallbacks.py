"""What JAX has only privately may go: core cases with the fallback for each such name."""

import pytest
from programs import run_program

PROGRAM = """
import warnings
import jax, jax.numpy as jnp
from cases import CASES, CUSTOM_VJP, assert_close, scalar
from jpyfunc import _compat, py_func, raise_original

{force}

def stacked(args):
    return jax.tree.map(lambda x: jnp.stack([jnp.asarray(x), 0.5 * jnp.asarray(x)]), args)

for case in (*CASES, CUSTOM_VJP):
    args = jax.tree.map(jnp.asarray, case.args)
    every = tuple(range(len(args)))
    got, want = (
        jax.jit(jax.value_and_grad(scalar(f), every)) for f in (case.wrapped, case.plain)
    )
    assert_close(got(*args), want(*args))
    assert_close(jax.jit(jax.vmap(got))(*stacked(args)), jax.vmap(want)(*stacked(args)))
    if case is not CUSTOM_VJP:
        got, want = (jax.jvp(f, args, args) for f in (jax.jit(case.wrapped), case.plain))
        assert_close(got, want)

seen = []

@py_func(Tout=lambda x: x, ordered=True)
def logged(x):
    if x < 0:
        raise LookupError("negative")
    seen.append(float(x))
    return x

jax.jit(lambda x: logged(logged(x) + 1))(1.0).block_until_ready()
assert seen == [1.0, 2.0], seen
try:
    with raise_original():
        jax.jit(logged)(-1.0)
except LookupError as error:
    assert str(error) == "negative"
else:
    raise AssertionError("nothing was raised")
assert fallbacks
print("done")
"""

FALLBACKS = {
    "callback_targets": """
import functools
from jax.interpreters import mlir

_compat.callback_targets = None
emit, fallbacks = mlir.emit_python_callback, []

@functools.wraps(emit)
def counted(*args, **kwargs):
    fallbacks.append(emit)
    return emit(*args, **kwargs)

mlir.emit_python_callback = counted
""",
    "make_cpu_client": """
_compat.make_cpu_client = None
with warnings.catch_warnings(record=True) as fallbacks:
    warnings.simplefilter("always")
    for n in range(2):
        jax.jit(py_func(lambda x: jnp.sin(x), Tout=jnp.float32))(1.0).block_until_ready()
assert ["deadlock" in str(w.message) for w in fallbacks] == [True], fallbacks
""",
    "Store": """
from jpyfunc._interpreters import operation_cache, rule_stores, tape

_compat.Store = rule_stores.refill = rule_stores.take = None
find, fallbacks = operation_cache.operation_of_custom, []

def counted(*args):
    try:
        return find(*args)
    except operation_cache.Uncacheable:
        fallbacks.append(args)
        raise

tape.operation_of_custom = counted
""",
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_core_cases_without(name):
    program = PROGRAM.format(force=FALLBACKS[name])
    assert run_program(program, limit=300).strip() == "done"
