"""Dtypes, layouts, sizes, configuration and lifetimes of what goes to the host."""

import contextlib
import functools
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpyfunc
import jpyfunc.tf1 as tf
from jpyfunc import _compat, numpy_func, py_func, raise_original
from jpyfunc._runtime import configuration

Struct = jax.ShapeDtypeStruct
F32 = Struct((), jnp.float32)


def dtypes_of_zeros():
    """Return every dtype that `jnp.zeros` makes, except two.

    XLA's host callbacks have no float6 (`jax.pure_callback` fails on them too).
    """
    found = set()
    for name in dir(jnp):
        scalar = getattr(jnp, name)
        if isinstance(scalar, type) and hasattr(scalar, "dtype"):
            try:
                dtype = jax.dtypes.canonicalize_dtype(scalar)
                found.add(jnp.zeros((2, 3), dtype).dtype)
            except (TypeError, RuntimeError):
                continue
    return sorted((d for d in found if "float6_" not in str(d)), key=str)


DTYPES = dtypes_of_zeros()


def ones(dtype):
    return jnp.ones((2, 3), dtype)


def bits(x):
    return np.asarray(x).tobytes()


def test_the_table_of_dtypes_has_the_exotic_ones():
    assert len(DTYPES) >= 20
    assert {"bool", "int4", "uint4", "bfloat16", "float8_e4m3fn", "complex64"} <= set(
        map(str, DTYPES)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrap", [py_func, numpy_func])
def test_every_dtype_makes_the_round_trip(transform, wrap, dtype):
    x = ones(dtype)
    seen = []

    def body(x):
        seen.append((x.dtype, bits(x)))
        return x

    y = transform(wrap(body, Tout=Struct((2, 3), dtype)))(x)
    assert seen == [(dtype, bits(x))]
    assert (y.shape, y.dtype, bits(y)) == ((2, 3), dtype, bits(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_in_a_batch(dtype):
    x = (1 + jnp.arange(6).reshape(2, 3) // 2).astype(dtype)
    y = jax.jit(jax.vmap(py_func(lambda x: x[::-1], Tout=Struct((3,), dtype))))(x)
    assert (y.dtype, bits(y)) == (dtype, bits(x[:, ::-1]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "complex64"])
def test_gradient_has_the_dtype_of_the_operand(transform, dtype):
    def loss(f, x):
        return jnp.real((f(x) * f(x)).sum()).astype("float32")

    x = jnp.asarray([0.5, 1.5], dtype)
    f = py_func(lambda x: x * x, Tout=Struct((2,), jnp.dtype(dtype)))
    got = transform(jax.grad(functools.partial(loss, f)))(x)
    expected = jax.grad(functools.partial(loss, lambda x: x * x))(x)
    assert got.dtype == expected.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(
        np.asarray(got, np.complex64), np.asarray(expected, np.complex64), rtol=1e-2
    )


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_typed_keys(transform, impl):
    key = jax.random.key(3, impl=impl)
    tout = (Struct((), key.dtype), Struct((2,), key.dtype), F32)

    def body(key, tree):
        return key, jax.random.split(tree["keys"][1]), jax.random.normal(key)

    for declared in (tout, (key, jax.random.split(key), jnp.float32), None):
        options = {} if declared is None else {"Tout": declared}
        args = (key, {"keys": jax.random.split(key)})
        got = transform(py_func(body, **options))(*args)
        for a, b in zip(got, body(*args), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            if a.dtype == key.dtype:
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            np.testing.assert_array_equal(a, b)


def test_batch_of_keys(transform):
    keys = jax.random.split(jax.random.key(0), 3)
    f = transform(jax.vmap(py_func(jax.random.normal, Tout=jnp.float32)))
    np.testing.assert_allclose(f(keys), jax.vmap(jax.random.normal)(keys), rtol=1e-6)


def test_a_key_of_another_implementation_is_refused(transform):
    f = py_func(lambda x: jax.random.key(0, impl="rbg"), Tout=jax.random.key(0))
    with (
        pytest.raises(TypeError, match="expected key<fry>, got key<rbg>"),
        raise_original(),
    ):
        transform(f)(1.0)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1), (7,), (2, 3, 4)])
@pytest.mark.parametrize("wrap", [py_func, numpy_func])
def test_shapes(transform, wrap, shape):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    y = transform(wrap(lambda x: x + x, Tout=lambda x: x))(x)
    assert y.shape == shape
    np.testing.assert_array_equal(y, 2 * x)


A = np.arange(24, dtype=np.float32).reshape(4, 6)
LAYOUTS = {
    "Fortran": np.asfortranarray(A),
    "transposed": A.T,
    "sliced": A[::2, 1::3],
    "reversed": A[::-1, ::-1],
    "broadcast": np.broadcast_to(A[0], (3, 6)),
    "unaligned": np.frombuffer(b"\0" + A.tobytes(), np.float32, offset=1),
    "big-endian": A.astype(">f4"),
    "read-only": np.frombuffer(A.tobytes(), np.float32),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrap", [py_func, numpy_func])
def test_layouts(transform, wrap, layout):
    value = LAYOUTS[layout]
    tout = Struct(value.shape, jnp.float32)
    np.testing.assert_array_equal(transform(wrap(lambda x: value, Tout=tout))(0.0), value)
    if layout != "big-endian":  # JAX has no such operands
        np.testing.assert_array_equal(transform(wrap(lambda x: x, Tout=tout))(value), value)


@pytest.mark.parametrize("wrap", [py_func, numpy_func])
def test_64_megabytes(transform, wrap):
    x = jnp.arange(2**24, dtype=jnp.float32)
    f = wrap(lambda x: x.reshape(2, -1)[::-1], Tout=Struct((2, 2**23), jnp.float32))
    y = transform(f)(x)
    assert (y[0, 0], y[1, -1]) == (2**23, 2**23 - 1)
    np.testing.assert_array_equal(y, np.asarray(x).reshape(2, -1)[::-1])


def test_arrays_that_the_body_holds_stay_valid(transform):
    held = []
    f = transform(py_func(lambda x: (held.append(x), x + 1)[1], Tout=lambda x: x))
    inputs = [jnp.full(1000, float(i)) for i in range(20)]
    for x in inputs:
        f(x).block_until_ready()
    del x, inputs
    junk = [f(jnp.full(1000, -1.0)) for _ in range(20)]  # would reuse their memory
    jax.block_until_ready(junk)
    for i, x in enumerate(held[:20]):
        np.testing.assert_array_equal(x, np.full(1000, i))
        np.testing.assert_array_equal(x * 2, np.full(1000, 2 * i))


def test_arrays_that_a_numpy_body_holds_stay_valid(transform):
    held = []
    f = transform(numpy_func(lambda x: (held.append(x), x)[1], Tout=lambda x: x))
    for i in range(20):
        f(jnp.full(1000, float(i))).block_until_ready()
    for i, x in enumerate(held):
        np.testing.assert_array_equal(x, np.full(1000, i))


@pytest.mark.parametrize("size", [1000, 2**16])
@pytest.mark.parametrize("wrap", [py_func, numpy_func])
def test_results_survive_what_the_body_does_to_them_later(wrap, size, transform):
    """Test small ones, which XLA copies, and large ones, which it could share."""
    raw = np.empty(4 * size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    held = raw[start : start + 4 * size].view(np.float32)
    held[:] = 1
    y = transform(wrap(lambda x: held, Tout=Struct((size,), jnp.float32)))(0.0)
    y.block_until_ready()
    held[:] = 5
    np.testing.assert_array_equal(y, np.ones(size))


def test_the_callers_numpy_operand_may_change_later(transform):
    held = []
    x = np.ones(1000, np.float32)
    f = transform(py_func(lambda x: (held.append(x), x)[1], Tout=lambda x: x))
    f(x).block_until_ready()
    x[:] = 5
    np.testing.assert_array_equal(held[0], np.ones(1000))


@pytest.mark.parametrize("commit", [False, True], ids=["uncommitted", "committed"])
def test_bodies_that_close_over_global_arrays(transform, commit):
    def place(x):
        return jax.device_put(x, jax.devices()[0]) if commit else x

    weights = place(jnp.arange(9.0).reshape(3, 3))
    key = place(jax.random.key(0))
    index = place(jnp.array([2, 0, 1]))

    def body(x, where=lambda condition, y, z: y if condition else z):
        y = jnp.tanh(weights @ x)[index] + weights[0]
        y = where(y.sum() > weights.sum(), y * 2, y)
        return y + jax.jit(lambda w, x: w @ x)(weights, x) + jax.random.normal(key, (3,))

    x = jnp.ones(3)
    f = py_func(body, Tout=Struct((3,), jnp.float32))
    for take, rtol, atol in (
        (lambda f: f, 1e-6, 0),
        (jax.jacrev, 1e-5, 1e-6),
        (jax.jacfwd, 1e-5, 0),
    ):
        want = jax.jit(take(lambda x: body(x, jnp.where)))(x)
        np.testing.assert_allclose(transform(take(f))(x), want, rtol, atol)
    np.testing.assert_array_equal(weights + 0, np.arange(9.0).reshape(3, 3))


def test_committed_operands_and_results(transform):
    device = jax.devices()[0]
    x = jax.device_put(jnp.ones(3), device)
    y = transform(py_func(lambda x: x * 2, Tout=lambda x: x))(x)
    assert y.devices() == {device}
    np.testing.assert_array_equal(y + x, np.full(3, 3))


# JAX configuration. Each body reports what is in force where it runs.
VALUES = {
    "jax_accurate_erf_inv": True,
    "jax_allow_f16_reductions": False,
    "jax_check_static_indices": True,
    "jax_debug_infs": True,
    "jax_debug_key_reuse": True,
    "jax_debug_nans": True,
    "jax_default_matmul_precision": "highest",
    "jax_default_prng_impl": "rbg",
    "jax_disable_jit": True,
    "jax_enable_custom_prng": True,
    "jax_enable_x64": True,
    "jax_error_checking_behavior_divide": "raise",
    "jax_error_checking_behavior_nan": "raise",
    "jax_error_checking_behavior_oob": "raise",
    "jax_explicit_x64_dtypes": "error",
    "jax_high_dynamic_range_gumbel": True,
    "jax_legacy_prng_key": "error",
    "jax_log_compiles": True,
    "jax_mutable_array_checks": False,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_random_seed_offset": 7,
    "jax_softmax_custom_jvp": True,
    "jax_threefry_partitionable": False,
    "jax_use_hlo_logistic_lowering": True,
}
OPTIONS = [(s.name, s, s(VALUES[s.name]).new_val) for s in configuration.OPTIONS]


def test_what_jax_traces_depend_on_is_captured_or_has_a_reason_not_to_be():
    reasons = [name for names in configuration.NOT_CAPTURED.values() for name in names]
    known = {*configuration.CAPTURED, *reasons}
    assert len(known) == len(configuration.CAPTURED) + len(reasons)
    assert set(_compat.trace_context_names()) <= known
    assert set(VALUES) == set(configuration.CAPTURED)


def unready():
    """Make a result of the shared client that is not ready yet: 1.0, after a while."""
    x = jnp.full((800, 800), 1.0)
    return (x @ x)[0, 0] / 800


@pytest.mark.parametrize(("name", "option", "value"), OPTIONS)
def test_the_callers_configuration_is_in_force_in_the_body(transform, name, option, value):
    seen = []

    def body(x):
        seen.append((getattr(jax.config, name), threading.get_ident()))
        return x

    def call(x):
        return transform(py_func(body, Tout=F32))(x).block_until_ready()

    default = getattr(jax.config, name)
    with option(value):
        call(jnp.float32(1))
    call(jnp.float32(1))
    assert default != value
    assert [s for s, _ in seen] == [value, default]


def test_configuration_is_in_force_on_the_thread_of_the_runtime():
    """All options at once: the program is compiled under them and runs without."""
    seen = []

    def in_force():
        return [getattr(jax.config, name) for name, *_ in OPTIONS]

    def body(x):
        seen.append((in_force(), threading.get_ident()))
        return x

    default, f = in_force(), jax.jit(py_func(body, Tout=F32))
    with contextlib.ExitStack() as stack:
        for _, option, value in OPTIONS:
            stack.enter_context(option(value))
        program = f.lower(F32).compile()
    program(jnp.float32(1)).block_until_ready()  # mostly on this one
    # A call whose operand is not ready runs on a thread of the runtime, mostly.
    for _ in range(20):
        program(unready()).block_until_ready()
        if seen[-1][1] != threading.get_ident():
            break
    else:
        pytest.skip("the runtime never ran the body on a thread of its own")
    assert all(options == [value for *_, value in OPTIONS] for options, _ in seen)
    assert in_force() == default


def test_configuration_is_the_callers_again_after_a_body_raised():
    threads = []

    def body(x):
        threads.append(threading.get_ident())
        raise ValueError("on purpose")

    with jax.enable_x64(True):
        program = jax.jit(py_func(body, Tout=F32)).lower(F32).compile()
    for _ in range(20):
        with pytest.raises(ValueError, match="on purpose"), raise_original():
            program(jnp.float32(1)).block_until_ready()
        assert jax.config.jax_enable_x64 is False
        assert jnp.zeros(()).devices() == {jax.devices()[0]}
        if threads[-1] == threading.get_ident():
            break
    else:
        pytest.skip("the runtime never ran the body on this thread")


def test_randomness_of_the_caller(transform):
    """Compare everything that JAX's random numbers depend on with JAX alone."""

    def body(x):
        return jax.random.gumbel(jax.random.key(3), (4,)) + x

    for option in (
        jax.threefry_partitionable(False),
        _option("jax_random_seed_offset")(7),
        _option("jax_high_dynamic_range_gumbel")(True),
        _option("jax_default_prng_impl")("rbg"),
    ):
        default = body(1.0)
        with option:
            want = body(1.0)
            np.testing.assert_array_equal(transform(py_func(body))(1.0), want)
        assert not np.array_equal(want, default)


def _option(name):
    (state,) = (each for each in configuration.OPTIONS if each.name == name)
    return state


def test_configuration_matters_in_the_body():
    def strict(x):
        return x + jnp.int8(1)

    def broadcasts(x):
        return (jnp.ones((2, 3)) + jnp.ones(3)).sum() + x

    def nan(x):
        return jnp.log(x - 2)

    for option, value, body, error in (
        (jax.numpy_dtype_promotion, "strict", strict, "implicit dtype promotion"),
        (jax.numpy_rank_promotion, "raise", broadcasts, "rank"),
        (jax.debug_nans, True, nan, "invalid value \\(nan\\)"),
    ):
        x = jnp.float32(1)
        f = jax.jit(py_func(body, Tout=F32))
        f(x).block_until_ready()
        with option(value):
            with pytest.raises((TypeError, ValueError, FloatingPointError), match=error):
                body(x)
            with (
                pytest.raises((TypeError, ValueError, FloatingPointError), match=error),
                raise_original(),
            ):
                jax.jit(py_func(body, Tout=F32))(x).block_until_ready()


def test_x64_by_context_manager(transform):
    seen = []

    def body(x):
        y = jnp.sin(x) + jnp.zeros(())
        seen.append(y.dtype)
        return y

    f = py_func(body, Tout=lambda x: x)
    with jax.enable_x64(True):
        x = np.float64(0.1)
        y = transform(f)(x)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, np.sin(0.1), rtol=1e-15)
        slope = transform(jax.grad(f))(x)
        assert slope.dtype == jnp.float64
        np.testing.assert_allclose(slope, np.cos(0.1), rtol=1e-15)
        np.testing.assert_allclose(
            transform(jax.vmap(f))(np.array([0.1, 0.2])), np.sin([0.1, 0.2]), rtol=1e-15
        )
    assert set(seen) == {jnp.dtype("float64")}
    assert transform(f)(np.float64(0.1)).dtype == jnp.float32
    assert seen[-1] == jnp.float32


def test_x64_off_by_context_manager_where_it_is_on():
    seen = []

    def body(x):
        seen.append(jnp.arange(3.0).dtype)
        return x

    def run(f):
        f(np.float64(1)).block_until_ready()
        return str(seen[-1])

    with jax.enable_x64(True):
        assert run(jax.jit(py_func(body, Tout=lambda x: x))) == "float64"
        with jax.enable_x64(False):
            assert run(jax.jit(py_func(body, Tout=lambda x: x))) == "float32"


def test_x64_globally():
    program = textwrap.dedent(
        """
        import jax, jax.numpy as jnp, numpy as np
        from jpyfunc import numpy_func, py_func

        def body(x):
            assert (x * 1).dtype == jnp.float64 == jnp.arange(2.0).dtype
            return jnp.sin(x)

        for transform in (lambda f: f, jax.jit):
            for f in (py_func(body), py_func(body, Tout=jnp.float64)):
                for g, exact in ((f, np.sin), (jax.grad(f), np.cos)):
                    y = transform(g)(0.1)
                    assert y.dtype == jnp.float64
                    assert abs(y - exact(0.1)) < 1e-15
            n = transform(numpy_func(lambda x: x * 2, Tout=jnp.int64))(2**40)
            assert n == 2**41 and n.dtype == jnp.int64
            z = transform(py_func(lambda x: x * 1j, Tout=jnp.complex128))(0.1)
            assert z == 0.1j
            # Off where it is traced, off in the body.
            with jax.enable_x64(False):
                off = lambda x: (jnp.arange(2.0)[1] + x).astype(float)
                y = transform(py_func(off))(np.float64(0.1))
                assert y.dtype == jnp.float32, y.dtype
        print("done")
        """
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={"JAX_ENABLE_X64": "1", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout == "done\n", result.stderr


def test_weak_operands_stay_weak_in_the_body(transform):
    def body(x, y):
        return (x * y).astype(jnp.float32)

    seen = []
    f = py_func(lambda x, y: (seen.append((x * y).dtype), body(x, y))[1], Tout=F32)
    for x in (2.0, 2, jnp.float32(2), np.float32(2)):
        y = jnp.asarray(1.5, jnp.bfloat16)
        transform(f)(x, y)
        plain = []
        transform(lambda x, y, plain=plain: (plain.append((x * y).dtype), x)[1])(x, y)
        assert seen[-1] == plain[-1]


def test_weak_types_in_a_body_are_those_of_plain_jax(transform):
    """A weak array takes the dtype of the other operand, which each result here shows."""
    half, number = jnp.bfloat16(1.5), jnp.asarray(2.0)
    dtypes = []

    def body(x, n):
        y = jnp.where(x > 0, 1.0, 2.0)
        z = 2 * y if x > 1 else 3 * y
        parts = {
            "global": number,
            "global of a jit": jax.jit(lambda: number)(),
            "operand": n,
            "operand made strong": n.astype(jnp.float32),
            "made before a branch": y,
            "made in it": z,
            "made strong after it": y.astype(jnp.float32),
        }
        dtypes.append({name: str((half * part).dtype) for name, part in parts.items()})
        return x

    body(jnp.float32(2), number)
    (want,) = dtypes
    assert set(want.values()) == {"bfloat16", "float32"}
    f = py_func(body, Tout=F32)
    one, many = jnp.float32(2), jnp.array([-1.0, 2.0, 3.0])
    for program, x in (
        (f, one),
        (jax.grad(f), one),
        (jax.hessian(f), one),
        (jax.vmap(f, (0, None)), many),
        (jax.vmap(jax.grad(f), (0, None)), many),
    ):
        dtypes.clear()
        jax.block_until_ready(transform(program)(x, number))
        assert dtypes
        assert all(seen == want for seen in dtypes)


class TestTransferGuard:
    """`jax.transfer_guard` detects the user's transfers, and none of ours."""

    threshold, two = jnp.float32(1.5), jnp.float32(2)

    def body(self, x):
        return jnp.sin(x) * x if x > self.threshold else x * self.two

    def test_compiled_calls(self):
        f = py_func(lambda x: self.body(x) * np.float32(3), Tout=F32)
        host = numpy_func(np.sin, Tout=lambda x: x)
        host.defvjp(lambda x: (np.sin(x), np.cos(x)), lambda r, g: (r * g,))
        programs = [
            f,
            jax.grad(f),
            jax.hessian(f),
            jax.vmap(f),
            jax.vmap(jax.hessian(f)),
            jax.vmap(py_func(self.body, Tout=F32, vmap_method="sequential")),
            lambda x: (py_func(lambda x: None, [x], []), x)[1],
            py_func(lambda x: f(x) + jax.jit(f)(x), Tout=F32, ordered=True),
            py_func(lambda x: 3.0, Tout=F32),
            jax.grad(lambda x: host(x).sum()),
        ]
        for i, program in enumerate(programs):
            compiled = jax.jit(program)
            x = self.two * jnp.ones(3 if i in (3, 4, 5, 9) else ())
            want = compiled(x)
            with jax.transfer_guard("disallow"):
                np.testing.assert_array_equal(compiled(x), want)

    def test_eager_calls_are_guarded_as_the_body_is(self):
        x = self.two * jnp.ones(3)
        host = numpy_func(np.sin, Tout=lambda x: x)
        for call, argument in (
            (py_func(self.body, Tout=F32), self.two),
            (jax.vmap(py_func(self.body, Tout=F32)), x),
            (jax.vmap(py_func(self.body, Tout=F32, vmap_method="sequential")), x),
            (py_func(lambda x: 3.0, Tout=F32), self.two),
            (py_func(lambda x: np.ones(3, np.float32), Tout=lambda x: x), x),
            (host, x),
        ):
            want = call(argument)
            with jax.transfer_guard("disallow"):
                got = call(argument)
            np.testing.assert_array_equal(got, want)
        transfers = py_func(lambda x: jnp.sin(np.ones(3, np.float32)) + x, Tout=lambda x: x)
        transfers(x)
        with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed"):
            transfers(x)

    def test_sessions(self):
        with tf.Graph().as_default():
            t = tf.placeholder(jnp.float32, ())
            y = jpyfunc.py_func(self.body, [t], jnp.float32)
            fetches = [y, tf.gradients(y, t)[0]]
            with tf.Session() as session, jax.transfer_guard("disallow"):
                for feed in (2.0, np.float32(2), self.two):
                    got = session.run(fetches, {t: feed})
                    want = [2 * np.sin(2), np.sin(2) + 2 * np.cos(2)]
                    np.testing.assert_allclose(got, want, rtol=1e-5)
