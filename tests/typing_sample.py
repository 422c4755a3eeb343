"""A user's program, for type checkers: pyright and mypy check it, and a test runs it.

Each `assert_type` fails if a type degrades to `Any`, and so does each `type: ignore`,
because ignoring what is no error is an error to both checkers.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, assert_type

import jax
import jax.numpy as jnp
import numpy as np

import jpyfunc
from jpyfunc import numpy_func, py_func

scalar = jax.ShapeDtypeStruct((), np.float32)
x = jnp.ones(())


class State(NamedTuple):
    position: jax.Array
    steps: jax.Array


def scale(x: jax.Array, m: float = 3.0) -> jax.Array:
    return x * m


def pair(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, x


def step(state: State) -> State:
    return State(state.position, state.steps + 1)


def norm(x: np.ndarray) -> float:
    return float(np.sum(x))


# --- Wrapped: the parameters stay, and `Tout` says what is returned.

wrapped = py_func(scale)
assert_type(wrapped(x), jax.Array)
assert_type(wrapped(x, m=2.0), jax.Array)
assert_type(py_func(scale, Tout=jnp.float32)(x), jax.Array)
assert_type(py_func(scale, Tout=np.float32, name="scale it")(x, 2.0), jax.Array)
assert_type(py_func(scale, Tout=np.dtype(np.float32))(x), jax.Array)
assert_type(py_func(scale, Tout=float)(x), jax.Array)
assert_type(py_func(scale, Tout=scalar, vmap_method="sequential")(x), jax.Array)
assert_type(py_func(scale, Tout=x, staged=True)(x), jax.Array)
assert_type(py_func(lambda x: [x], Tout=[scalar])(x), list[jax.Array])
assert_type(py_func(lambda x: [x], Tout=[jnp.float32])(x), list[jax.Array])
assert_type(py_func(pair, Tout=(scalar, scalar))(x), tuple[jax.Array, jax.Array])
assert_type(py_func(lambda x: (x,), Tout=(np.float32,))(x), tuple[jax.Array])
assert_type(py_func(lambda x: {"a": x}, Tout={"a": scalar})(x), dict[str, jax.Array])
assert_type(py_func(lambda x: None, Tout=None)(x), None)
assert_type(py_func(lambda x: {"a": [x]}, Tout={"a": [scalar]})(x), Any)
assert_type(py_func(lambda x: x, Tout=lambda x: x)(x), Any)

# Without `Tout`, the function's annotation does; numbers become arrays.
assert_type(py_func(pair)(x), tuple[jax.Array, jax.Array])
assert_type(py_func(step)(State(x, x)), State)
assert_type(numpy_func(norm, Tout=scalar)(np.ones(3)), jax.Array)
assert_type(py_func(norm)(np.ones(3)), jax.Array)
pool = ThreadPoolExecutor(1)
on_pool = numpy_func(norm, Tout=scalar, executor=pool, chunksize=2)
assert_type(on_pool(np.ones(3)), jax.Array)
assert_type(numpy_func(norm, [np.ones(3)], scalar, executor=pool), jax.Array)

# A function that is wrapped again keeps its type, and so does one that JAX transforms.
assert_type(py_func(wrapped, name="again")(x, m=2.0), jax.Array)
assert_type(jax.vmap(wrapped)(jnp.ones(3)), jax.Array)
as_callable: Callable[[jax.Array], jax.Array] = wrapped


# --- Decorated.


@py_func
def plain(x: jax.Array, m: float = 3.0) -> jax.Array:
    return x * m


@py_func(Tout=jnp.float32, stateful=True)
def with_tout(x: jax.Array, *, m: float = 3.0) -> jax.Array:
    return x * m


@py_func(name="two", vmap_method="by_branch")
def with_options(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, x


@py_func(Tout=[])
def nothing(x: jax.Array) -> None:
    pass


@numpy_func(Tout=scalar)
def cube(x: np.ndarray) -> np.ndarray:
    return x**3


assert_type(plain(x, m=2.0), jax.Array)
assert_type(with_tout(x, m=2.0), jax.Array)
assert_type(with_options(x), tuple[jax.Array, jax.Array])
assert_type(nothing(x), list[jax.Array])
assert_type(cube(np.ones((), np.float32)), jax.Array)
assert_type(plain.__name__, str)


def cube_fwd(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x**3, x


def cube_bwd(x: np.ndarray, g: np.ndarray) -> tuple[np.ndarray]:
    return (3 * x**2 * g,)


assert_type(cube.defvjp(cube_fwd, cube_bwd), None)


@cube.defjvp
def cube_jvp(
    primals: tuple[np.ndarray], tangents: tuple[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    (x,), (t,) = primals, tangents
    return x**3, 3 * x**2 * t


assert_type(cube_jvp((np.ones(1),), (np.ones(1),)), tuple[np.ndarray, np.ndarray])


# --- Methods are bound: their first parameter goes.


class Model:
    def __init__(self, w: float) -> None:
        self.w = w

    @py_func
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.w * x

    @py_func(Tout=(np.float32, np.float32))
    def both(self, x: jax.Array, m: float = 1.0) -> tuple[jax.Array, jax.Array]:
        return self.w * x, x * m

    @staticmethod
    @py_func
    def static(x: jax.Array) -> jax.Array:
        return 3 * x


assert_type(Model(2.0)(x), jax.Array)
assert_type(Model(2.0).both(x, m=2.0), tuple[jax.Array, jax.Array])
assert_type(Model.both(Model(2.0), x), tuple[jax.Array, jax.Array])
assert_type(Model.static(x), jax.Array)


# --- Called at once.

assert_type(py_func(scale, [x, 2.0], scalar), jax.Array)
assert_type(py_func(scale, x, np.float32, "scale it"), jax.Array)
assert_type(py_func(lambda x: [x], [x], [scalar]), list[jax.Array])
assert_type(py_func(pair, [x], (scalar, scalar)), tuple[jax.Array, jax.Array])
assert_type(py_func(lambda x: {"a": x}, [x], {"a": scalar}), dict[str, jax.Array])
assert_type(numpy_func(norm, [x], scalar, stateful=True), jax.Array)


# --- The rest.

assert_type(jpyfunc.explain(scale, x).as_dict(), dict[str, Any])
assert_type(jpyfunc.set_tape_limit(2**20), int)
assert_type(jpyfunc.set_tape_limit(2**30), int)
assert_type(jpyfunc.tape_bytes(), int)
with jpyfunc.profile() as profile:
    wrapped(x)
assert_type(profile, jpyfunc.profile)
with jpyfunc.raise_original() as block:
    assert_type(block, None)


def refused() -> None:
    """Calls that a type checker refuses; each ignored error has to be one."""
    py_func(norm, Tout=scalar, executor=pool)  # type: ignore[call-overload]
    wrapped("x")  # type: ignore[call-overload]
    wrapped(x, 2.0, 3.0)  # type: ignore[call-overload]
    wrapped(x, other=2.0)  # type: ignore[call-overload]
    py_func(scale, Tout=jnp.float32)()  # type: ignore[call-overload]
    plain(x, m="3")  # type: ignore[call-overload]
    with_tout(x, 2.0)  # type: ignore[call-overload]
    Model(2.0).both()  # type: ignore[call-overload]
    Model(2.0).both(x, x, x)  # type: ignore[call-overload]
    py_func(scale, vmap_method="fast")  # type: ignore[call-overload]
    numpy_func(norm, staged=True)  # type: ignore[call-overload]
    cube.defvjp(cube_fwd)  # type: ignore[call-arg]
