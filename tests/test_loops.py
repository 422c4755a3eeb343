"""Python loops of staged bodies: compiled as loops where they are some, else as ever."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import random
import re
import threading
import types
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SCALAR, assert_close
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from programs import run_program

from jpyfunc import explain, py_func
from jpyfunc._staging.bytecode import dead_variables, truth_tests


def staged(body, **options):
    return py_func(body, **{"staged": True, **options})


def primitives(function, *args):
    """Count the primitives of a program, by name."""
    found = collections.Counter()

    def count(jaxpr):
        for eqn in jaxpr.eqns:
            found[eqn.primitive.name] += 1
            for inner in jaxprs_in_params(eqn.params):
                count(inner)

    count(jax.make_jaxpr(function)(*args))
    return found


def is_loop(function, *args):
    found = primitives(function, *args)
    return any("while" in name for name in found) and not found["py_func"]


# --- Loops. Each body takes a number, and is run on those of `XS`.

XS = (0.5, 3.0, 33.0, 200.0)
SHAPES = []


def shape(body):
    SHAPES.append(pytest.param(body, id=body.__name__))
    return body


@shape
def newton(a):
    x = a
    while abs(x * x - a) > 1e-3 * a:
        x = 0.5 * (x + a / x)
    return x


@shape
def true_and_break(a):
    x = a
    while True:
        new = 0.5 * (x + a / x)
        if abs(new - x) < 1e-3:
            break
        x = new
    return new


@shape
def several_ends(x):
    total = x * 0
    while x > 1:
        x = x * 0.7
        if jnp.sin(x) > 0.99:
            return total * 3
        if x > 100:
            continue
        total = total + x
        if total > 300:
            break
    else:
        total = total + 1
    return total - x


@shape
def inside_each_other(x):
    total = x * 0
    while x > 1:
        y = x * 2
        while y > 1:
            y = y / 3
            total = total + y
        x = x / 2
    return total + x


@shape
def one_after_another(x):
    while x > 10:
        x = x / 3
    while x < 100:
        x = x * 1.5
    return x


@shape
def several_values_are_tested(x):
    y = x * 0
    while (x > 1 and y < 5) or x > 50:
        x, y = x / 2, y + 1
    return x + y


@shape
def walrus(x):
    total = x
    while (x := x / 2) > 1:
        total = total + x
    return total


@shape
def swaps(x):
    a, b = x, x * 2
    while a > 1:
        a, b = b / 4, a
    return a + 10 * b


@shape
def best_so_far(x):
    y, best, least = x, x, x
    while y > 0.1:
        x, y = x + jnp.sin(y), y * 0.7
        value = x * jnp.cos(3 * x)
        if value < least:
            best, least = x, value
    return best * 10 + least


@shape
def helper(x):
    def reduced(v):
        while v > 2:
            v = v / 3
        return v

    return reduced(x) + 10 * reduced(x * 5)


@shape
def fixed_for_inside(x):
    while x > 1:
        for k in range(3):
            x = x * (0.9 - 0.1 * k)
    return x


@shape
def list_and_dict(x):
    state = {"xs": [x, x * 2], "n": jnp.float32(0)}
    while state["xs"][0] > 1:
        state["xs"] = [state["xs"][1] / 4, state["xs"][0]]
        state["n"] += 1
    return state["xs"][0] + 10 * state["xs"][1] + 100 * state["n"]


@dataclasses.dataclass
class Pair:
    value: object
    count: object


@shape
def replaced_dataclass(x):
    pair = Pair(x, jnp.int32(0))
    while pair.value > 1:
        pair = dataclasses.replace(pair, value=pair.value / 2, count=pair.count + 1)
    return pair.value + pair.count


@shape
def method(x):
    class Solver:
        def __init__(self):
            self.x, self.steps = x, jnp.int32(0)

        def done(self):
            return self.x < 1

        def step(self):
            self.x = self.x / 2
            self.steps += 1

        def solve(self):
            while not self.done():
                self.step()
            return self.x + self.steps

    return Solver().solve()


@shape
def closure(x):
    total = x * 0

    def add(v):
        nonlocal total
        total = total + v

    while x > 1:
        x = x / 2
        add(x)
    return total


@shape
def first_iterations_differ(x):
    last, scale, n = None, 1.0, 0
    while x > 1:
        if last is not None:
            x = x - last * 0.001
        last = x
        x = x / 2
        scale = scale * jnp.float32(1.5)
        n = n + jnp.int32(1)
    return x + scale + n


@shape
def two_states_in_turn(x):
    mode = "a"
    while x > 1:
        x, mode = (x / 2, "b") if mode == "a" else (x / 3, "a")
    return x


@shape
def random_numbers(x):
    key = jax.random.key(0)
    while x > 1:
        key, drawn = jax.random.split(key)
        x = x * jax.random.uniform(drawn, minval=0.2, maxval=0.8)
    return x


@shape
def finally_and_with(x):
    n = x * 0
    while x > 1:
        try:
            with contextlib.nullcontext():
                x = x / 2
        finally:
            n = n + 1
    return x + n


@shape
def shared_arrays(x):
    a = b = x
    while a > 1:
        b = a
        a = a / 2
    return a + 10 * x + 100 * b + (1000 if a is b else 0)


@shape
def arrays_shared_later(x):
    a, b = x, x * 2
    while a > 1:
        a = a / 2
        b = a
    return a if a is b else -a


@shape
def rotates(x):
    a = b = c = x
    n = x * 0
    while n < 5:
        a, b, c, n = b, c, a + 1, n + 1
    return a + 2 * b + 4 * c


@shape
def branches_on_shared_arrays(x):
    a = b = x
    while a > 1:
        a, b = (a / 4, a) if b > 8 else (a / 2, b + 1)
    return a + 10 * b


@shape
def loop_of_shared_arrays_in_another(x):
    a = total = x
    while a > 1:
        b = a
        while b > 1:
            b, total = b / 3, total + b
        a = a / 2
    return total + a


@shape
def first_iteration_adds_more(x):
    a, total = x, x * 0
    while a > 1:
        total = total + (100 if a is x else 1)
        a = a / 2
    return total + a


@shape
def leaves_at_once_in_another_way(x):
    a = x
    while a > 1:
        a = a / 2
    return a * 3 if a is x else a + 2


@shape
def first_iteration_makes_what_is_used_after(x):
    a, made = x, None
    while a > 1:
        if made is None:
            made = jnp.sin(x)
        a = a / 2
    return a + (jnp.cos(x) if made is None else made)


@shape
def its_test_is_used_after(x):
    while (large := x > 1) or x > 50:
        x = x / 2
    return jnp.where(large, -x, x)


@shape
def what_is_tested_is_used_after(x):
    while (error := abs(x * x - 2)) > 0.5:
        x = 0.5 * (x + 2 / x)
    return x + error


@shape
def a_test_differs(x):
    goes_on = x > 1
    while goes_on:
        goes_on = x > 4 if x > 20 else x > 3
        x = x / 2
    return x


@pytest.mark.parametrize("body", [newton, rotates])
def test_a_loop_computes_its_test(body):
    found = explain(body, SCALAR).as_dict()["tree"]
    loops = [
        eqn
        for eqn in jax.make_jaxpr(staged(body))(1.0).eqns
        if eqn.primitive.name == "differentiable_while"
    ]
    assert [len(eqn.outvars) for eqn in loops] == [len(found["carries"])]


@pytest.mark.parametrize("body", [newton, rotates])
def test_no_iteration_comes_before_a_loop(body):
    found = primitives(staged(body), 1.0)
    assert (found["differentiable_while"], found["cond"]) == (1, 0)


@pytest.mark.parametrize("body", SHAPES)
def test_a_loop_is_compiled(body):
    f = staged(body)
    assert is_loop(f, 1.0)
    xs = jnp.array(XS)
    want = jnp.stack([jnp.asarray(body(x), jnp.float32) for x in xs])

    def program(xs):
        scanned = jax.lax.scan(lambda carry, x: (carry, f(x)), 0, xs)[1]
        return [f(x) for x in xs], jax.vmap(f)(xs), scanned

    one_by_one, batch, scanned = jax.jit(program)(xs)
    assert_close(jnp.stack(one_by_one), want, rtol=1e-4)
    assert_close(batch, want, rtol=1e-4)
    assert_close(scanned, want, rtol=1e-4)
    assert_close(f(xs[2]), want[2], rtol=1e-4)


@pytest.mark.parametrize("body", SHAPES)
def test_derivatives_of_a_loop(body):
    f, xs = staged(body), jnp.array(XS)
    gradient, curvature = jax.grad(body), jax.grad(jax.grad(body))
    want = [jnp.stack([g(x) for x in xs]) for g in (gradient, curvature)]

    def program(xs):
        forward = jax.vmap(lambda x: jax.jvp(f, (x,), (1.0,))[1])(xs)
        second = jax.vmap(jax.jacfwd(jax.grad(f)))(xs)
        return jax.vmap(jax.grad(f))(xs), forward, second

    reverse, forward, second = jax.jit(program)(xs)
    assert_close(reverse, want[0], rtol=1e-3)
    assert_close(forward, want[0], rtol=1e-3)
    assert_close(second, want[1], rtol=1e-2)
    assert is_loop(jax.grad(f), 1.0)


@pytest.mark.parametrize("body", [newton, several_ends, loop_of_shared_arrays_in_another])
def test_reverse_mode_twice(body):
    f, xs = staged(body), jnp.array(XS)
    want = jnp.stack([jax.grad(jax.grad(body))(x) for x in xs])
    assert_close(jax.jit(jax.vmap(jax.grad(jax.grad(f))))(xs), want, rtol=1e-2)


def names_of_an_inner_loop(x, w, k):
    best = None
    while k > 0:
        while x > 1:
            x = x * 0.5
        y = x if best is None else w
        best = w = y * 0.9 + 0.1
        x = w * 3
        k = k - 1
    return x


def used_before_an_inner_loop_and_after(x, w, k):
    first = True
    while k > 0:
        s = (x if first else w) * 2
        while x > 1:
            x = x * 0.5
        y = x if first else w
        w = y * 0.9 + 0.1 + s
        x = w * 3
        k, first = k - 1, False
    return x


def kept_over_an_inner_loop(x, w, k):
    first, kept = True, None
    while k > 0:
        if not first:
            kept = x
        while x > 1:
            x = x * 0.5
        y = x if first else kept
        x = y * 3 + w
        k, first, kept = k - 1, False, None
    return x


@pytest.mark.parametrize(
    "body",
    [
        names_of_an_inner_loop,
        used_before_an_inner_loop_and_after,
        kept_over_an_inner_loop,
    ],
)
def test_first_iterations_that_differ(body):
    """An inner loop gives what it carries the number of what that was before it."""
    f = staged(body)
    args = [(7.0, 100.0, 1.0), (7.0, 0.25, 5.0), (7.0, 1.0, 0.0), (0.5, 1.0, 2.0)]
    args = [tuple(map(jnp.float32, x)) for x in args]
    want = jnp.stack([body(*x) for x in args])
    columns = [jnp.stack(x) for x in zip(*args, strict=True)]
    assert_close(jnp.stack([jax.jit(f)(*x) for x in args]), want)
    assert_close(jax.jit(jax.vmap(f))(*columns), want)
    assert is_loop(f, *args[0])


def test_hangs():
    """A loop after an exit runs for those that left there; shared constants are few."""
    program = """
        import jax, jax.numpy as jnp
        from jpyfunc import py_func

        @py_func(staged=True)
        def two_loops(x, k):
            while x > 1:
                x = x / 2
                if x < k:
                    x = x * 2
                    while x < 50:
                        x = x * 1.5
                    return x
            return x

        print(jax.jit(jax.vmap(two_loops))(jnp.array([7.0, 7.0]), jnp.array([0.0, 2.0])))

        @py_func(staged=True)
        def doubled(x):
            y = x
            c = jnp.ones(100)
            for _ in range(60):
                c = c + c
            while y > 1:
                d = c
                for _ in range(30):
                    d = d / 2 + d / 2
                y = y / 2 + 0 * d[0]
            return y + 0 * c.sum()

        print(jax.jit(doubled)(9.0))
        """
    assert run_program(program, limit=60).split() == ["[", "0.875", "59.80078]", "0.5625"]


def test_integers():
    def collatz(n):
        steps = jnp.int32(0)
        while n != 1:
            n = n // 2 if n % 2 == 0 else 3 * n + 1
            steps = steps + 1
        return steps

    f = staged(collatz)
    assert primitives(f, 1) == primitives(f, 97)
    assert is_loop(f, 97)
    assert jax.jit(jax.vmap(f))(jnp.array([1, 97, 27])).tolist() == [0, 118, 111]


# --- Programs that look like loops and are none, or carry more than is seen.


def module():
    made = types.ModuleType("made")
    made.count = 0
    return made


class Counted:
    count = 0
    __slots__ = ("own",)

    def __getattr__(self, name):
        Counted.count += 1
        return Counted.count


STATES = {
    "a generator": lambda: iter_of(lambda n: (yield from range(n))),
    "an iterator": lambda: itertools.count().__next__,
    "random": lambda: random.Random(0).random,
    "numpy": lambda: np.random.RandomState(0).rand,
    "a list": lambda: step_with([0]),
    "a default": lambda: default_step(),
    "an attribute of a function": lambda: function_step(),
    "an attribute of a module": lambda: module_step(module()),
    "a partial": lambda: functools.partial(add_one, [0]),
    "a method of a list": lambda: list(range(100, 0, -1)).pop,
    "an attribute that is made up": lambda: functools.partial(getattr, Counted(), "x"),
    "a thread's own": lambda: local_step(threading.local()),
    "an array of NumPy": lambda: array_step(np.zeros(1)),
    "a view of an array": lambda: view_step(np.zeros(2)),
    "a cache": lambda: cached_step(functools.cache(lambda _: [0])),
    "an attribute of a type variable": lambda: module_step(counted(TypeVar("T"))),
    "an attribute that is hidden": lambda: module_step(counted(Hidden())),
}


class Hidden:
    __dict__ = property(lambda self: {})


def counted(holder):
    holder.count = 0
    return holder


def iter_of(make):
    return make(100).__next__


def add_one(held):
    held[0] += 1
    return held[0]


def step_with(held):
    return lambda: add_one(held)


def default_step():
    def step(held=[0]):  # noqa: B006
        return add_one(held)

    return step


def function_step():
    def step():
        step.count += 1
        return step.count

    step.count = 0
    return step


def module_step(made):
    def step():
        made.count += 1
        return made.count

    return step


def local_step(held):
    held.count = 0

    def step():
        held.count += 1
        return held.count

    return step


def array_step(held):
    def step():
        held[0] += 1
        return held[0]

    return step


def view_step(whole):
    part = whole[1:]

    def step():
        part[0] += 1
        return whole[1]

    return step


def cached_step(cache):
    return lambda: add_one(cache(0))


@pytest.mark.parametrize("state", STATES)
def test_state_that_counts_iterations_is_not_lost(state):
    def body(x):
        Counted.count = 0
        step = STATES[state]()
        while x > 1:
            x = x / (2.0 if step() < 3 else 10.0)
        return x

    f = jax.jit(staged(body, staged=8, Tout=SCALAR))
    for x in XS:
        assert_close(f(x), body(jnp.float32(x)), rtol=1e-5)
    assert not is_loop(staged(body, staged=8, Tout=SCALAR), 1.0)


NOT_LOOPS = []


def not_loop(*points):
    def add(body):
        NOT_LOOPS.append(pytest.param(body, points, id=body.__name__))
        return body

    return add


@not_loop((1.0, 2.0, 3.0), (3.0, 2.0, 1.0), (1.0, 3.0, 2.0))
def greatest(a, b, c):
    return max(a, b, c)


@not_loop((1.0, 2.0, 3.0), (1.0, 2.0, 1.0), (1.0, 1.0, 3.0))
def member(a, b, c):
    return a * 2 if a in [b, c] else a * 3


@not_loop((1.0, 2.0, 3.0), (1.0, 1.0, 1.0), (2.0, 2.0, 1.0))
def equal_tuples(a, b, c):
    return a * 2 if (a, b, a) == (b, a, c) else a * 3


@not_loop((1.0, -2.0, 3.0), (-1.0, -1.0, -1.0), (-1.0, -1.0, 2.0))
def any_of_them(a, b, c):
    return a if any([a > 0, b > 0, c > 0]) else b * 3


@not_loop((0.5, 5.0, 30.0), (0.5, 0.2, 0.1), (80.0, 2.0, 0.1))
def called_by_c(a, b, c):
    def reduced(v):
        while v > 1:
            v = v / 2
        return v

    return sum(map(reduced, [a, a, b])) + sorted([b, c], key=lambda v: 1)[0]


@not_loop((0.5, 5.0, 30.0), (9.0, 5.0, 3.0))
def generator(a, b, c):
    def halves(v):
        while v > 1:
            v = v / 2
            yield v

    return sum(halves(a)) + b * c


@not_loop((0.5, 5.0, 30.0), (9.0, 5.0, 3.0))
def inside_for(a, b, c):
    for _ in (1, 1):
        while a > 1:
            a = a / 2
        a = a * 3
    return a + b * c


@not_loop((0.5, 5.0, 30.0), (9.0, 5.0, 3.0))
def weak_references(a, b, c):
    held = [Pair(a, b)]
    while held[0].value > 1:
        held[0] = Pair(held[0].value / 2, held[0])
    return held[0].value + c


@not_loop((0.5, 5.0, 30.0), (9.0, 5.0, 3.0))
def negative_zero(a, b, c):
    zero = 0.0
    while a > 1:
        zero, a = -zero, a / 2
    return a + jnp.copysign(1.0, zero) * b + c


@pytest.mark.parametrize(("body", "points"), NOT_LOOPS)
def test_what_looks_like_a_loop(body, points):
    f = jax.jit(staged(body, staged=8, Tout=SCALAR))
    batch = jax.jit(jax.vmap(staged(body, staged=8, Tout=SCALAR)))
    want = [body(*map(jnp.float32, point)) for point in points]
    assert_close(jnp.stack([f(*point) for point in points]), jnp.stack(want), rtol=1e-5)
    assert_close(batch(*map(jnp.array, zip(*points, strict=True))), jnp.stack(want))


# --- What follows a loop, and what is around it.


def test_a_call_after_a_loop_is_made_for_those_that_need_it(transform):
    ran = []

    def body(x):
        while x > 1:
            x = x / 2
        if x > 0.7:
            ran.append(float(x))
        return x

    f = transform(jax.vmap(staged(body, Tout=SCALAR)))
    del ran[:]
    assert_close(
        f(jnp.array([0.5, 3.0, 100.0, 1.7])), jnp.array([0.5, 0.75, 0.78125, 0.85])
    )
    jax.effects_barrier()
    assert sorted(ran) == pytest.approx([0.75, 0.78125, 0.85])


def test_a_known_array_keeps_its_value_where_it_is_read():
    def body(x):
        n, size = jnp.int32(0), jnp.int32(2)
        while x > 1:
            x, n = x / 2, n + 1
        return jnp.arange(int(size + 1)) * x + n

    f = staged(body)
    assert is_loop(f, 1.0)
    assert_close(jax.jit(f)(33.0), body(jnp.float32(33)))


def test_a_counter_that_is_read_is_unrolled():
    def body(x):
        n = jnp.int32(0)
        while x > 1:
            x, n = x / 2, n + 1
            x = x + 0 * jnp.zeros(int(n)).sum()
        return x * (n + 1)

    f = jax.jit(staged(body, staged=4, Tout=SCALAR))
    assert_close(f(3.0), body(jnp.float32(3)))
    assert_close(f(33.0), body(jnp.float32(33)))


def test_results_are_inferred_from_loops():
    def body(x):
        while True:
            while x > 1:
                x = x / 2
            if jnp.sin(x) < 0.9:
                return x, jnp.int32(3)
            x = x * 7

    assert isinstance(jax.eval_shape(py_func(body), SCALAR)[1], jax.ShapeDtypeStruct)
    assert_close(jax.jit(py_func(body))(5.0)[0], body(jnp.float32(5))[0])


@pytest.mark.parametrize("check_vma", [True, False])
def test_loops_in_shard_map(check_vma):
    def body(x):
        n = jnp.int32(0)
        while True:
            x, n = x / 2, n + 1
            if x < 1:
                return x + n
            if n > 5:
                return -x

    f, xs = staged(body), jnp.array([0.5, 7.0, 30.0, 500.0])
    mesh = Mesh(np.array(jax.devices()[:4]), ("a",))
    over = {"mesh": mesh, "in_specs": P("a"), "out_specs": P("a"), "check_vma": check_vma}
    mapped = jax.jit(jax.shard_map(lambda x: f(x[0])[None], **over))
    batch = jax.jit(jax.shard_map(jax.vmap(f), **over))
    want = jnp.stack([body(x) for x in xs])
    assert_close(mapped(xs), want)
    assert_close(batch(xs), want)


def test_export_and_checkpoint():
    f = staged(newton)
    exported = jax.export.export(jax.jit(jax.grad(f)))(SCALAR)
    assert_close(exported.call(2.0), jax.grad(newton)(2.0), rtol=1e-4)
    got = jax.jit(jax.grad(jax.checkpoint(f)))(2.0)
    assert_close(got, jax.grad(newton)(2.0), rtol=1e-4)


def test_nested_staged_functions():
    inner = staged(newton)

    def body(x):
        while x > 1:
            x = inner(x) - 0.2
        return x

    f = staged(body)
    assert is_loop(f, 1.0)
    assert_close(jax.jit(f)(33.0), body(jnp.float32(33)), rtol=1e-4)


# --- explain, and the parts.


def test_explain_shows_what_a_loop_changes():
    found = explain(newton, SCALAR)
    data = found.as_dict()
    head = data["tree"]
    assert (data["complete"], data["unrolled"]) == (True, [])
    assert head["carries"] == {"x": "float32[]"}
    assert head["true"]["repeats"] == head["place"]
    text = repr(found)
    for part in ("1 loop", "a loop that carries x: float32[]", "next iteration"):
        assert part in text
    assert "next iteration" in found._repr_html_()


def grows(x):
    xs = []
    while x > 1:
        x = x / 2
        xs.append(x)
    return x


def counts(x):
    n = 0
    while x > 1:
        x, n = x / 2, [n[0] + 1] if n else [1]
    return x + n[0]


def draws(x):
    drawn = random.Random(0)
    while x > 1:
        x = x / (2 + drawn.random())
    return x


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (grows, "'xs' grows: write into an array"),
        (counts, r"'n\[0\]' is a Python number"),
        (draws, "'drawn' is a Random, whose state cannot be seen"),
        (
            lambda x: inside_for(x, x, x),
            "inside a for or with block: use jpyfunc.range, or move",
        ),
        (lambda x: generator(x, x, x), "it runs in a generator or a coroutine"),
    ],
)
def test_explain_says_why_a_loop_is_none(body, reason):
    found = explain(py_func(body, staged=4, Tout=SCALAR), SCALAR)
    (entry, *_) = found.as_dict()["unrolled"]
    assert entry["line"].startswith("while ")
    assert re.search(reason, entry["reason"])
    assert "not compiled as a loop: while " in repr(found)


def test_bytecode_of_a_loop():
    def body(a, b):
        while b - a > 1:
            middle = (a + b) / 2
            if middle > 0:
                a = middle
        return a

    code = body.__code__
    tests = truth_tests(code)
    assert {test.iterators for test in tests.values()} == {()}
    assert len({test.continuation for test in tests.values()}) == 2
    first = min(tests)
    assert tests[first].repeats
    assert dead_variables(code, first) == {"middle"}


def test_looking_at_the_state_changes_nothing():
    def body(x):
        made = Counted()
        while x > 1:
            x = x / 2
        return x + (made is None)

    Counted.count = 0
    assert explain(body, SCALAR).as_dict()["complete"]
    assert Counted.count == 0


def test_a_loop_runs_only_for_the_elements_that_need_it():
    """In a batch, a branch is computed for all elements, and its loop might never end."""

    def root(a):
        if a < 0:
            return a * 0
        x = a + 1.0
        while abs(x * x - a) > 1e-3 * a:
            x = 0.5 * (x + a / x)
        return x

    def inner(a):
        total = a * 0
        while a > 1:
            left = jnp.floor(a)
            while left != 1:
                left, total = left - 1, total + 1
            a = a - 1.5
        return total

    for body in (root, inner):
        xs = jnp.array([-4.0, 0.5, 4.0, 7.0])
        want = jnp.stack([body(x) for x in xs])
        assert_close(jax.jit(jax.vmap(staged(body)))(xs), want)
