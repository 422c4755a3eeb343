"""Python numbers that a loop of a staged body changes: carried, or left what they are."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close
from test_loops import is_loop

from jpyfunc import explain, py_func

XS = (0.5, 3.0, 33.0, 200.0)
CARRIED, NUMBERS = [], []


def carried(body):
    """Declare a body that is one loop, and has Python numbers."""
    CARRIED.append(pytest.param(body, id=body.__name__))
    return body


def number(why):
    """Declare a body in which a number must remain one; `explain` says why."""

    def declare(body):
        NUMBERS.append(pytest.param(body, why, id=body.__name__))
        return body

    return declare


@carried
def count(x):
    n = 0
    while x > 1:
        x, n = x / 2, n + 1
    return x, n


@carried
def bounded(x):
    error, n = x, 0
    while error > 0.1 and n < 4:
        error, n = error * 0.5, n + 1
    return error, n


@carried
def bound_first(x):
    n = 10
    while n > 0 and x > 1:
        x, n = x / 2, n - 1
    return x, n


@carried
def until_zero(x):
    n = 5
    while n:
        if x < 1:
            break
        x, n = x / 2, n - 1
    return x, n


@carried
def bounded_by_a_float(x):
    n = 0
    while x > 1 and not n >= 3.5:
        x, n = x / 2, n + 1
    return x, n


@carried
def bounded_by_an_array(x):
    n = 0
    while n < x:
        n += 1
    return n


@carried
def in_arithmetic(x):
    n = -7
    while x > 1 and n < 9:
        x, n = x / (1.5 + (n // 2) % 3 + abs(n) * 0.1 + 1 / (n + 20)), n + 1
    return x, n // 3, n % 4


@carried
def in_branches(x):
    n = 0
    while x > 1:
        if n % 2 == 0:
            x = x / 2
        elif 2 <= n < 5:
            x = x / 3
        else:
            x = x / (4 if n != 5 else 5)
        n += 1
    return x


@carried
def powers_of_two(x):
    k = 1
    while x > 1 and k < 1000:
        x, k = x / 2, k * 2
    return x, k


@carried
def step_size(x):
    step = 1.0
    while (x - step * x) ** 2 > 0.01:
        step = step * 0.5 + 0.45
    return step


@carried
def line_search(x):
    def f(x):
        return (x - 3) ** 4 + x**2

    slope, n = jax.grad(f)(x), 0
    while abs(slope) > 0.1 and n < 50:
        step = 1.0
        while f(x - step * slope) > f(x) - 0.3 * step * slope**2:
            step *= 0.5
        x, n = x - step * slope, n + 1
        slope = jax.grad(f)(x)
    return x, n


@carried
def counts_one_branch(x):
    found = 0
    while x > 1:
        if jnp.sin(x) > 0.3:
            found += 1
        x = x * 0.8
    return found


@carried
def reset(x):
    stalled, best = 0, x
    while x > 1 and stalled < 3:
        x = x * 0.8
        if jnp.sin(x) > 0.5:
            best, stalled = x, 0
        else:
            stalled += 1
    return best, stalled


@carried
def two_loops(x):
    outer, inner = 0, 0
    while x > 1 and outer < 60:
        y = x
        while y > 5:
            y, inner = y / 2, inner + 1
        x, outer = x * 0.7, outer + 1
    return x, outer, inner


@carried
def in_a_helper(x):
    def halvings(y):
        n = 0
        while y > 1:
            y, n = y / 2, n + 1
        return n

    return halvings(x) + 10 * halvings(x * 3)


@carried
def index_of_an_array(x):
    table, i = jnp.arange(2.0, 40.0), 0
    while x > 1:
        x, i = x / table[i], i + 1
    return x


@carried
def of_a_narrow_dtype(x):
    y, n = jnp.int8(0), 0
    while x > 1 and n < 10:
        x, y, n = x / 2, y + n, n + 1
    return y


@carried
def of_a_key(x):
    key, n = jax.random.key(0), 0
    while x > 1:
        x, n = x * jax.random.uniform(jax.random.fold_in(key, n)), n + 1
    return x


@carried
def printed(x):
    n = 0
    while x > 1:
        x, n = x / 2, n + 1
        print(n, end="")
    return x


@pytest.mark.parametrize("body", CARRIED)
def test_carried(body, capsys):
    f = py_func(body, staged=True)
    assert is_loop(f, 3.0)
    wants = [body(jnp.float32(x)) for x in XS]
    compiled = jax.jit(f)
    for x, want in zip(XS, wants, strict=True):
        assert_close(compiled(x), jax.tree.map(jnp.asarray, want))
    columns = jax.tree.map(lambda *xs: jnp.stack([*map(jnp.asarray, xs)]), *wants)
    assert_close(jax.jit(jax.vmap(f))(jnp.array(XS)), columns)


def test_derivatives():
    def body(x):
        rate, n = 0.5, 0
        while n < 6 and x < 100:
            x, n, rate = x + rate * jnp.sin(x) / (n + 1), n + 1, rate * 0.9
        return x

    f = py_func(body, staged=True)
    assert is_loop(f, 3.0)
    for x in (0.5, 3.0):
        for inner in (f, jax.jit(f)):  # in a jitted function, it begins with a literal
            assert_close(jax.jit(jax.grad(inner))(x), jax.grad(body)(x))
        assert_close(jax.jit(jax.hessian(f))(x), jax.hessian(body)(x))


@number("an index or a size")
def index_of_a_list(x):
    table, i = [2.0, 3.0, 5.0] * 20, 0
    while x > 1:
        x, i = x / table[i], i + 1
    return x


@number("a hash")
def key_of_a_dict(x):
    table, i = {0: 10.0}, 0
    while x > 1:
        x, i = x / table.get(i, 2.0), i + 1
    return x


@number("an index or a size")
def size(x):
    n = 1
    while x > 1:
        x, n = x / 2, n + 1
    return x + jnp.ones(n).sum()


@number("text")
def text(x):
    n = 0
    while x > 1:
        x, n = x / len(f"{n}{n}"), n + 1
    return x


@number(r"int\(\)")
def converted(x):
    n = 0
    while x > 1:
        x, n = x / (2 + int(n)), n + 1
    return x


@number(r"float\(\)")
def in_math(x):
    n = 0
    while x > 1:
        x, n = x / (2 + math.sqrt(n)), n + 1
    return x


@number("may ask for its type")
def type_of_it(x):
    n = 0
    while x > 1:
        x, n = (x / 2 if isinstance(n, int) else x), n + 1
    return x


@number("may ask for its type")
def type_of_it_in_a_helper(x):
    def step(x, n):
        return x / 3 if hasattr(n, "shape") else x / 2

    n = 0
    while x > 1:
        x, n = step(x, n), n + 1
    return x


@number("may ask for its type")
def which_object_it_is(x):
    n, last, same = 0, None, x * 0
    while x > 1:
        same = same + (last is n)
        x, n, last = x / 2, n + 1, n
    return same


# What does not fit in the dtype of an array.


@number("an integer that may not fit")
def grows(x):
    k = 1
    while x > 1:
        x, k = x * 0.9, 3 * k + 1
    return x * (k % 7)


@number("an integer that may not fit")
def fibonacci(x):
    a, b = 0, 1
    while x > 1:
        x, a, b = x * 0.9, b, a + b
    return x + a % 5


@number("an integer that may not fit")
def large_product(x):
    n = 0
    while x > 1:
        x, n = x * 0.5 + (n * 10**9 % 7) * 0.001, n + 1
    return x


@number("a comparison with 10000000000")
def large_bound(x):
    n = 0
    while x > 1 and n < 10**10:
        x, n = x / 2, n + 1
    return n


@number("use an array")
def large_steps(x):
    n = 0
    while x > 1:
        x, n = x / 2, n + 2**29
    return x + n / 2**31


@number("use an array")
def large_at_first(x):
    n = 2**31 - 3
    while x > 1:
        x, n = x / 2, n + 1
    return x + (n - 2**31)


@number("a conversion to int8")
def too_large_for_a_narrow_dtype(x):
    y, n = jnp.int8(0), 0
    while x > 1:
        x, y, n = x / 2, y + n, n + 1
    return y


# What an array computes in another way.


@number("a comparison")
def sum_of_tenths(x):
    t = 0.0
    while x > 1 and t < 1:  # 11 iterations; with 32 bits 10
        x, t = x * 0.99, t + 0.1
    return x


@number("a division by what may be zero")
def zero_division(x):
    n = 3
    while x > 1:
        x = x / (1 + 6 / n)
        n -= 1
        if x < 50:
            break
    return x


@number(r"pow")
def power_of_numbers(x):
    n = 0
    while x > 1:
        x, n = x * 0.5**n * 0.9, n + 1
    return x


@number("arithmetic")
def truth_value_as_a_number(x):
    n = 0
    while x > 1:
        x, n = x * (0.7 - 0.2 * (n > 3)), n + 1
    return x


@pytest.mark.parametrize(("body", "why"), NUMBERS)
def test_numbers_that_remain(body, why):
    f = py_func(body, staged=8)
    for x in XS:
        try:
            want = jnp.asarray(body(jnp.float32(x)))
        except ZeroDivisionError:
            with pytest.raises(jax.errors.JaxRuntimeError, match="ZeroDivisionError"):
                jax.jit(f)(x).block_until_ready()
        else:
            assert_close(jax.jit(f)(x), want)
    assert not is_loop(f, 3.0)
    lines = str(explain(f, 3.0)).splitlines()
    place = next(i for i, line in enumerate(lines) if "not compiled as a loop" in line)
    assert re.search(f"is a Python number .*{why}", lines[place + 1])


def test_a_number_of_64_bits_is_compared_in_64_bits():
    """The loop runs as often as in Python."""
    f = jax.jit(py_func(sum_of_tenths, staged=True))
    assert_close(f(200.0), np.float32(200 * 0.99**11), rtol=1e-5)
