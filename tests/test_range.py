"""`jpyfunc.range`: Python's on values, and a loop in a staged body."""

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close
from test_loops import is_loop

import jpyfunc
from jpyfunc import explain, py_func

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


# --- Loops. Each body takes a number and an integer.

CASES = ((3.0, 0), (2.0, 1), (5.0, 4), (40.0, 7))
LOOPS = []


def loop(body):
    LOOPS.append(pytest.param(body, id=body.__name__))
    return body


@loop
def plain(x, n):
    for i in jpyfunc.range(n):
        x = x * 0.5 + i
    return x


@loop
def known(x, n):
    for i in jpyfunc.range(2, 50, 3):
        x = x * 0.5 + i
    return x + i  # which is bound, because there is an iteration


@loop
def downwards(x, n):
    for i in jpyfunc.range(2 * n, 0, -2):
        x = x * 0.5 + i
    return x


@loop
def in_reverse(x, n):
    for i in reversed(jpyfunc.range(n)):
        x = x * 0.5 + i
    return x


@loop
def ends(x, n):
    last = -1
    for i in jpyfunc.range(n):
        if i % 3 == 1:
            continue
        if x > 100:
            return x * 10
        x, last = x * 2, i
        if x > 50:
            break
    else:
        x = -x
    return x + last


@loop
def nested(x, n):
    for i in jpyfunc.range(n):
        for j in jpyfunc.range(i, n):
            for k in jpyfunc.range(j, 0, -1):
                x = x + k * 0.5
    return x


@loop
def around_while(x, n):
    for i in jpyfunc.range(n):
        y = x
        while y > 1:
            y = y / 2
        x = x + y * i
    return x


@loop
def in_while(x, n):
    while x < 100:
        for i in jpyfunc.range(n):
            x = x + i
        x = x + 1
    return x


@loop
def in_a_helper(x, n):
    def total(y):
        for i in jpyfunc.range(n):
            y = y + i
        return y

    return total(x) + total(x * 2)


@loop
def twice(x, n):
    numbers = jpyfunc.range(n)
    for i in numbers:
        x = x + i
    for i in numbers:
        x = x * 0.5 + i
    return x


@loop
def index(x, n):
    table = jnp.arange(1.0, 9.0)
    for i in jpyfunc.range(n):
        x = x + table[i]
    return x


@loop
def with_a_counter(x, n):
    found = 0
    for i in jpyfunc.range(n):
        if x > i:
            found += 1
        x = x * 0.7
    return x + found


@pytest.mark.parametrize("body", LOOPS)
def test_loops(body):
    f = py_func(body, staged=True)
    assert is_loop(f, 3.0, 4)
    wants = [jnp.asarray(body(jnp.float32(x), n)) for x, n in CASES]
    compiled = jax.jit(f)
    for (x, n), want in zip(CASES, wants, strict=True):
        assert_close(compiled(x, n), want)
    xs, ns = map(jnp.array, zip(*CASES, strict=True))
    assert_close(jax.jit(jax.vmap(f))(xs, ns), jnp.stack(wants))
    for x, n in CASES[1:3]:
        assert_close(jax.jit(jax.grad(f))(x, n), jax.grad(body)(x, n))


def zipped(x, n):
    for i, j in zip(jpyfunc.range(n), (1.0, 2.0) * 4, strict=False):
        x = x * 0.5 + i * j
    return x


def in_a_generator(x, n):
    def squares():
        for i in jpyfunc.range(n):
            yield i * i

    for square in squares():
        x = x * 0.5 + square
    return x


def in_a_list(x, n):
    return x + sum([i * x for i in jpyfunc.range(n)])


def grows(x, n):
    found = []
    for i in jpyfunc.range(n):
        found.append(x * i)
    return sum(found, x)


def replaced_by_a_list(x, n):
    numbers = jpyfunc.range(n)
    for _ in range(3):
        for i in numbers:
            x = x / 2 if x > 3 else x + i
        numbers = [1, 2, 3]
    return x


def asked_for_more(x, n):
    numbers = iter(jpyfunc.range(20))
    for i in numbers:
        x = x + i
        if x > 20:
            break
        next(numbers)
    return x


@pytest.mark.parametrize(
    "body",
    [zipped, in_a_generator, in_a_list, grows, replaced_by_a_list, asked_for_more],
)
def test_what_is_no_loop(body):
    f = py_func(body, staged=10)
    assert not is_loop(f, 3.0, 4)
    compiled = jax.jit(f)
    for x, n in CASES:
        assert_close(compiled(x, n), jnp.asarray(body(jnp.float32(x), n)))


def test_a_number_that_is_needed_as_one():
    @py_func(Tout=lambda x, n: x, staged=True)
    def body(x, n):
        for i in jpyfunc.range(n):
            x = x + [1.0, 2.0, 3.0][i]
        return x

    assert jax.jit(body)(1.0, 3) == 7
    assert "use as an index or a size of int32[]" in str(explain(body, 1.0, 3))
