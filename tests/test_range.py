"""`jpyfunc.range`: Python's on values, and a loop in a staged body."""

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpyfunc
from jpyfunc import py_func

LOW, HIGH = -(2**31), 2**31 - 1
BOUNDS = [
    (5,),
    (0,),
    (-3,),
    (2, 9),
    (3, 3),
    (9, 2, -3),
    (0, 10, 3),
    (1, 5, -1),
    # The distance of the bounds, and the number after the last one, exceed 32 bits.
    (LOW, HIGH, 2**30),
    (HIGH, LOW, LOW),
    (HIGH - 1, HIGH, 2**30),
]


@pytest.mark.parametrize("bounds", BOUNDS)
def test_on_values_it_is_pythons(bounds):
    want = builtins.range(*bounds)
    for convert in (int, np.int32, jnp.int32):
        numbers = jpyfunc.range(*map(convert, bounds))
        assert [*numbers] == [*want] == [*numbers]  # it can be iterated again
        assert [*reversed(numbers)] == [*reversed(want)]
        assert [*reversed(reversed(numbers))] == [*want]
        assert len(numbers) == len(want)
        assert all(type(i) is int for i in numbers)


def digest(*bounds):
    """A number that depends on each one that is yielded, and on the order."""
    found = jnp.int32(0)
    for i in jpyfunc.range(*bounds):
        found = found * 3 + i
    return found


def backwards(*bounds):
    found = jnp.int32(0)
    for i in reversed(jpyfunc.range(*bounds)):
        found = found * 3 + i
    return found


@pytest.mark.parametrize("staged", [False, 4])
@pytest.mark.parametrize("body", [digest, backwards])
def test_traced_bounds(body, staged):
    f = jax.jit(py_func(body, Tout=jnp.int32(0), staged=staged))
    for bounds in BOUNDS:
        numbers = builtins.range(*bounds)
        found = 0
        for i in numbers if body is digest else reversed(numbers):
            found = (found * 3 + i - LOW) % 2**32 + LOW  # as an array of int32 wraps
        assert f(*map(jnp.int32, bounds)) == found, bounds


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint16, jnp.int32])
def test_bounds_of_any_dtype_that_fits(dtype):
    f = jax.jit(py_func(digest, staged=True))
    assert f(dtype(5)) == digest(5)


def test_what_may_not_fit_is_called():
    f = jax.jit(py_func(digest, Tout=jnp.int32(0), staged=True))
    assert f(jnp.uint32(5)) == digest(5)


def test_its_numbers_are_weakly_typed():
    @py_func(staged=True)
    def scaled(x, n):
        for i in jpyfunc.range(n):
            x = x * i
        return x

    assert jax.jit(scaled)(jnp.float16(2), 1).dtype == jnp.float16
    assert jax.jit(scaled)(jnp.int8(2), 1).dtype == jnp.int8


def test_bounds_that_are_numbers_are_numbers_where_shapes_are_inferred():
    table = [1.0, 2.0, 3.0]

    @py_func
    def total(x):
        for i in jpyfunc.range(3):
            x = x + table[i]
        return x

    assert jax.jit(total)(1.0) == 7


@pytest.mark.parametrize(
    ("bounds", "error", "text"),
    [
        ((), TypeError, "expected 1 to 3 arguments, got 0"),
        ((1, 2, 3, 4), TypeError, "expected 1 to 3 arguments, got 4"),
        ((1.0,), TypeError, "stop: expected an integer, .* got float"),
        ((1, None), TypeError, "stop: expected an integer, .* got NoneType"),
        ((jnp.float32(1), 2), TypeError, r"start: expected an integer, .* got float32\[\]"),
        ((np.arange(3),), TypeError, r"stop: expected an integer, .* got int32\[3\]"),
        ((1, 2, 0), ValueError, "expected a step other than zero, got 0"),
        ((1, 2, jnp.int32(0)), ValueError, "expected a step other than zero, got 0"),
    ],
)
def test_errors(bounds, error, text):
    with pytest.raises(error, match=rf"jpyfunc\.range: {text}"):
        jpyfunc.range(*bounds)


def test_a_traced_step_of_zero():
    f = py_func(digest, Tout=jnp.int32(0), staged=True)
    with (
        pytest.raises(ValueError, match="expected a step other than zero"),
        jpyfunc.raise_original(),
    ):
        jax.jit(f)(1, 5, 0)
    assert jax.jit(f)(1, 5, 2) == digest(1, 5, 2)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_a_bound_that_is_traced_outside_of_a_body(transform):
    with pytest.raises(jpyfunc.UnsupportedError, match=r"stop is traced \(int32\[\]\)"):
        transform(digest)(jnp.arange(3) if transform is jax.vmap else 3)


def test_in_a_function_that_is_traced_within_a_body():
    @py_func(staged=True)
    def body(x):
        return jax.vmap(lambda y: digest(3) + y)(x)

    assert jax.jit(body)(jnp.arange(2)).tolist() == [digest(3), digest(3) + 1]
