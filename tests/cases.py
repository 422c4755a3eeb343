"""Bodies that the tests of every transform run, and the options they are wrapped with.

The independent answer is that of the same function without Python branches, in plain JAX,
which compiles it as one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jpyfunc import py_func, set_tape_limit


@dataclasses.dataclass(frozen=True)
class Case:
    """A body and its floating arguments: tests differentiate with respect to each.

    `branchless` is the same function without Python branches, if the body has any.
    """

    name: str
    body: Callable[..., Any]
    args: tuple[Any, ...]
    Tout: Any = None
    branchless: Callable[..., Any] | None = None

    @property
    def plain(self) -> Callable[..., Any]:
        """The function that `jax.jit` compiles, which gives the independent answer."""
        return self.branchless or self.body

    @property
    def wrapped(self) -> Callable[..., Any]:
        return (
            py_func(self.body) if self.Tout is None else py_func(self.body, Tout=self.Tout)
        )

    def __repr__(self) -> str:
        return self.name


def log_huber(x, m):
    if jnp.abs(x) <= m:
        return x**2
    return m**2 * (1 - 2 * jnp.log(m) + jnp.log(x**2))


def plain_log_huber(x, m):
    return jnp.where(jnp.abs(x) <= m, x**2, m**2 * (1 - 2 * jnp.log(m) + jnp.log(x**2)))


def halve_until_small(x):
    while jnp.linalg.norm(x) > 1.0:
        x = x / 2 + jnp.sin(x) / 8
    return x


def plain_halve_until_small(x):
    for _ in range(6):  # as often as any test needs
        x = jnp.where(jnp.linalg.norm(x) > 1.0, x / 2 + jnp.sin(x) / 8, x)
    return x


def two_results(x, y):
    return x * y, x / y


def tree(p):
    if p["w"].sum() > 0:
        return {"out": jnp.tanh(p["w"] @ p["x"]), "reg": [p["w"].sum() ** 2]}
    return {"out": p["w"] @ p["x"], "reg": [p["w"].sum()]}


def plain_tree(p):
    y, total = p["w"] @ p["x"], p["w"].sum()
    positive = total > 0
    return {
        "out": jnp.where(positive, jnp.tanh(y), y),
        "reg": [jnp.where(positive, total**2, total)],
    }


def ignores_one(x, y):
    return jnp.sin(x) + 0 * x, x**3


def constant_result(x):
    return x**2, jnp.ones(3)


@jax.custom_vjp
def doubled_gradient(x):
    return jnp.sin(x)


doubled_gradient.defvjp(
    lambda x: (jnp.sin(x), x), lambda x, g: (2 * g * jnp.cos(x),)
)  # fmt: skip


@jax.custom_jvp
def tripled_tangent(x):
    return jnp.sin(x)


@tripled_tangent.defjvp
def _tripled_tangent_jvp(primals, tangents):
    return tripled_tangent(*primals), 3 * jnp.cos(primals[0]) * tangents[0]


def uses_custom_jvp(x):
    return tripled_tangent(x) * x if x > 0 else x


def plain_custom_jvp(x):
    return jnp.where(x > 0, tripled_tangent(x) * x, x)


def uses_custom_vjp(x):
    return doubled_gradient(x) * x if x > 0 else x


def plain_custom_vjp(x):
    return jnp.where(x > 0, doubled_gradient(x) * x, x)


@jax.jit
def _jitted(x):
    return jnp.cos(x) * x


def uses_jit(x):
    return _jitted(x) if x.sum() > 0 else x


def plain_jit(x):
    return jnp.where(x.sum() > 0, _jitted(x), x)


def uses_grad(x):
    return jax.grad(lambda y: jnp.sum(y**3 * jnp.sin(y)))(x)


def uses_scan(x):
    return jax.lax.scan(lambda c, _: (c * jnp.cos(c), c), x, None, length=3)[0]


_inner = py_func(log_huber, Tout=jnp.float32)


def uses_py_func(x, m):
    return _inner(x, m) * x if x > 0 else -_inner(x, m)


def plain_py_func(x, m):
    y = plain_log_huber(x, m)
    return jnp.where(x > 0, y * x, -y)


def uses_jitted_py_func(x, m):
    return jax.jit(_inner)(x, m) * x if x > 0 else x * m


def plain_jitted_py_func(x, m):
    # Not `where`, for the branch that is not taken may be NaN.
    return jax.lax.cond(x > 0, lambda: plain_log_huber(x, m) * x, lambda: x * m)


x3 = jnp.array([0.3, -1.2, 2.0])
f32 = jnp.float32
SCALAR = jax.ShapeDtypeStruct((), f32)
CASES = (
    Case("log_huber_inside", log_huber, (1.0, 2.0), f32, plain_log_huber),
    Case("log_huber_outside", log_huber, (3.0, 2.0), f32, plain_log_huber),
    Case("while", halve_until_small, (x3 * 3,), None, plain_halve_until_small),
    Case("two_results", two_results, (1.5, jnp.array([0.5, -2.0])), (f32, f32)),
    Case("tree", tree, ({"w": jnp.eye(2, 3) + 0.1, "x": x3},), None, plain_tree),
    Case("ignores_one", ignores_one, (0.7, 2.0), (f32, f32)),
    Case("constant_result", constant_result, (0.7,)),
    Case("custom_jvp", uses_custom_jvp, (0.7,), SCALAR, plain_custom_jvp),
    Case("jit", uses_jit, (x3,), None, plain_jit),
    Case("grad", uses_grad, (x3,)),
    Case("scan", uses_scan, (x3,)),
    Case("py_func", uses_py_func, (1.5, 2.0), None, plain_py_func),
    Case("jitted_py_func", uses_jitted_py_func, (1.5, 2.0), None, plain_jitted_py_func),
)
# It is differentiable once, in reverse mode.
CUSTOM_VJP = Case("custom_vjp", uses_custom_vjp, (0.7,), f32, plain_custom_vjp)


def scalar(function: Callable[..., Any]) -> Callable[..., jax.Array]:
    """Make a smooth scalar function of all results of `function`, to differentiate."""

    def summed(*args: Any) -> jax.Array:
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(function(*args)))

    return summed


def loop(function: Callable[..., Any], *columns: Any) -> Any:
    """Compute a batch by a Python loop over its rows, in eager JAX."""
    rows = [function(*row) for row in zip(*columns, strict=True)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def eager_and_jit(
    function: Callable[..., Any], *args: Any, eager: bool = True
) -> Iterator[Any]:
    """Yield results of `function`, eager and under jit, to compare with one plain answer.

    Under jit twice: with tapes cached, and without, where derivatives run bodies
    again. Eagerly once, because that difference is only on the host, and differentiating
    eagerly is what takes tests the longest.
    """
    if eager:
        yield function(*args)
    program = jax.jit(function)
    yield program(*args)
    before = set_tape_limit(0)
    try:
        yield jax.block_until_ready(program(*args))
    finally:
        set_tape_limit(before)


def assert_close(got: Any, want: Any, rtol: float = 2e-4, atol: float = 2e-5) -> None:
    """Compare pytrees of arrays, structure and dtypes included."""
    import numpy as np

    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.result_type(g) == jnp.result_type(w)
        np.testing.assert_allclose(
            np.asarray(g).astype(complex) if jnp.iscomplexobj(g) else np.asarray(g, float),
            np.asarray(w).astype(complex) if jnp.iscomplexobj(w) else np.asarray(w, float),
            rtol=rtol,
            atol=atol,
        )
