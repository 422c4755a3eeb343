"""What calls look like in lowered programs, on platforms that need not be here."""

import jax
import jax.numpy as jnp
import pytest
from cases import log_huber

from jpyfunc import UnsupportedError, py_func

f = py_func(log_huber, Tout=jax.ShapeDtypeStruct((), jnp.float32))
PROGRAMS = {
    "forward": (f, 1),
    "grad": (jax.value_and_grad(f), 2),
    "hessian": (lambda x, m: jax.hessian(f)(x, m), None),
    "vmap": (lambda x, m: jax.vmap(f, (0, None))(jnp.stack([x, m]), m), 1),
    "stateful": (py_func(f.__wrapped__, Tout=jnp.float32, stateful=True), 1),
    "ordered": (py_func(f.__wrapped__, Tout=jnp.float32, ordered=True), 1),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("platform", "target"),
    [
        ("cpu", "xla_ffi_python_cpu_callback"),
        ("cuda", "xla_ffi_python_gpu_callback"),
        ("rocm", "xla_ffi_python_gpu_callback"),
    ],
)
def test_lowers_to_a_host_call(platform, target, program):
    function, calls = PROGRAMS[program]
    traced = jax.jit(function).trace(1.0, 2.0)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    count = text.count(f"@{target}")
    assert count == calls if calls else count >= 1
    assert ("has_side_effect = true" in text) == (program in ("stateful", "ordered"))


@pytest.mark.parametrize("platforms", [("cpu", "cuda"), ("mosaic",)], ids=str)
def test_other_platforms_are_refused(platforms):
    traced = jax.jit(f).trace(1.0, 2.0)
    with pytest.raises((UnsupportedError, ValueError), match=r"py_func 'log_huber'|mosaic"):
        traced.lower(lowering_platforms=platforms)


def test_a_program_shows_which_function_it_calls():
    text = str(jax.make_jaxpr(jax.grad(f))(1.0, 2.0))
    assert "params=with tape of log_huber" in text
    assert "params=vjp of log_huber" in text
