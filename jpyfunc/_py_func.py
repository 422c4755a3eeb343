"""`py_func` and `numpy_func`: their signatures and call forms."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, ParamSpec, Protocol, TypeAlias, TypeVar, Unpack, overload

import jax
from jax.typing import ArrayLike

from jpyfunc._arguments import is_array
from jpyfunc._errors import see
from jpyfunc._graph_tensor import GraphTensor
from jpyfunc._options import INFERRED, Options, Wrapper
from jpyfunc._tout import is_dtype
from jpyfunc._typing import (
    NumpyFuncOptions,
    NumpyFuncWrapOptions,
    OneArray,
    OneArrayT,
    PyFuncOptions,
    PyFuncWrapOptions,
    VmapMethod,
)
from jpyfunc._wrapped import PyFunc, wrap

P = ParamSpec("P")
K = TypeVar("K")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Func: TypeAlias = Callable[..., object]
Inputs: TypeAlias = list[Any] | tuple[Any, ...] | ArrayLike


class Decorator(Protocol):
    """A decorator without `Tout`: the function's annotation tells the results."""

    def __call__(self, func: Callable[P, T], /) -> PyFunc[P, T]: ...


class DecoratorWithTout(Protocol[T_co]):
    """A decorator with a `Tout` of type `T_co`."""

    def __call__(self, func: Callable[P, object], /) -> PyFunc[P, T_co]: ...


# The overloads: calls at once, then wrapping, then decorators.
@overload
def py_func(
    func: Func,
    inp: Inputs,
    Tout: OneArray,
    name: str | None = None,
    **options: Unpack[PyFuncOptions],
) -> jax.Array: ...
@overload
def py_func(
    func: Func,
    inp: Inputs,
    Tout: list[OneArrayT],
    name: str | None = None,
    **options: Unpack[PyFuncOptions],
) -> list[jax.Array]: ...
@overload
def py_func(
    func: Func,
    inp: Inputs,
    Tout: dict[K, OneArrayT],
    name: str | None = None,
    **options: Unpack[PyFuncOptions],
) -> dict[K, jax.Array]: ...
@overload
def py_func(
    func: Func,
    inp: Inputs,
    Tout: tuple[OneArray, OneArray],
    name: str | None = None,
    **options: Unpack[PyFuncOptions],
) -> tuple[jax.Array, jax.Array]: ...
@overload
def py_func(
    func: Func,
    inp: Inputs,
    Tout: tuple[OneArray, ...],
    name: str | None = None,
    **options: Unpack[PyFuncOptions],
) -> tuple[jax.Array, ...]: ...
@overload
def py_func(
    func: Func,
    inp: Inputs,
    Tout: object = ...,
    name: str | None = None,
    **options: Unpack[PyFuncOptions],
) -> Any: ...
@overload
def py_func(func: PyFunc[P, T], **options: Unpack[PyFuncWrapOptions]) -> PyFunc[P, T]: ...
@overload
def py_func(func: Callable[P, T], **options: Unpack[PyFuncWrapOptions]) -> PyFunc[P, T]: ...
@overload
def py_func(
    func: Callable[P, object], *, Tout: T, **options: Unpack[PyFuncWrapOptions]
) -> PyFunc[P, T]: ...
@overload
def py_func(func: None = None, **options: Unpack[PyFuncWrapOptions]) -> Decorator: ...
@overload
def py_func(
    func: None = None, *, Tout: T, **options: Unpack[PyFuncWrapOptions]
) -> DecoratorWithTout[T]: ...
def py_func(
    func: Callable[..., Any] | None = None,
    inp: Any = None,
    Tout: Any = INFERRED,
    name: str | None = None,
    *,
    stateful: bool = False,
    ordered: bool = False,
    vmap_method: VmapMethod | None = None,
    staged: bool | int = False,
    executor: None = None,
) -> Any:
    """Run a Python function eagerly, with real values, from inside compiled JAX.

    Under `jax.jit`, each execution of the program calls the function on the host, with
    `jax.Array`s. Python control flow, `float(x)`, NumPy, `print` and `breakpoint()` work
    as usual. Outside any transform it is simply called. Wrapped functions support
    forward- and reverse-mode differentiation to any order. A function that is being
    differentiated also sees values, and it runs once: its operations are recorded on a
    tape, which is cached for the derivative (see `set_tape_limit`).

    There are three forms: `py_func(func, [x, y], Tout)` calls at once, as TensorFlow's
    does; `g = py_func(func, Tout=...)` returns the wrapped function; `@py_func(Tout=...)`
    and `@py_func` decorate.

    Args:
        func: the function to run. The wrapped function takes the same positional and
            keyword arguments, each a pytree. Arrays and Python scalars reach it as
            `jax.Array`s, other leaves (strings, callables, enums) unchanged. If it is
            itself the result of `py_func`, the function inside is wrapped again, once;
            options that are left out here are those of the first wrap.
        inp: to call the function at once, a list or tuple of arguments, or a single array.
        Tout: the structure of the results, a pytree. A leaf with `.shape` and `.dtype`,
            such as `jax.ShapeDtypeStruct((3,), jnp.float32)` or an example array, declares
            both. A dtype, such as `jnp.float32`, declares the dtype; the shape is inferred.
            `[]` declares that nothing is returned. A function, such as `lambda x: x`, is
            called with the arguments, with a `jax.ShapeDtypeStruct` for each array, and
            returns such a pytree. (A callable pytree that holds arrays, such as an equinox
            module, counts as a pytree.) By default, everything is inferred: while JAX
            traces the call, the function is run on abstract values, through both branches
            of each `if`. That fails if it reads a value (`float(x)`, NumPy). If `Tout`
            declares every shape and dtype, no such run is made. Results have the static
            fields of `Tout`; if the function returns others, it is an error.
        name: the name in errors, profiles and graphs; by default the function's own.
        stateful: run exactly once per execution of the program, whether the results are
            used or not. This is implied for functions that return nothing. Other calls are
            assumed to be pure, and are removed if their results are not used.
        ordered: run in program order with other ordered calls. Implies `stateful`.
        vmap_method: how `jax.vmap` batches the call, always in one host round trip.
            `"by_branch"` runs the function once for all elements that take the same
            branches, on arrays that stand for all of them; `"sequential"` once per
            element; `"expand_dims"` once in total, with an axis of length 1 on operands
            that the elements share; `"broadcast_all"` once in total, with these operands
            repeated. The last three have the meanings of `jax.pure_callback`. The default
            is `"by_branch"` for pure calls, and `"sequential"` for those that are stateful
            or return nothing. By branch, one run serves many elements, so a function that
            calls `next`, or draws random numbers other than with `jax.random`, needs
            `stateful=True`. (Draws from `random` and `numpy.random` are detected and cause
            a warning; draws from a generator that the function holds are not.)
        staged: compile what can be traced. While JAX traces the call, the function is run
            on abstract values, through both branches of each `if`, and its operations
            become part of the program, as a tree of `jax.lax.cond`. A `while` loop of which
            only arrays (in variables, lists, objects) and local numbers change, or a `for`
            over `jpyfunc.range`, becomes one loop, which has forward- and reverse-mode
            derivatives of any order; the memory of the latter does not grow with the number
            of iterations. Other loops are unrolled: those that need a number that changes
            as an index or a size, grow a list, or stand in another `for` or in a `with`
            block.
            At most 32 abstract runs are made, or the given number. On a path that cannot be
            traced (a value is read, an operation has an effect, the runs are used up), the
            program calls the function. The results are the same as without staging. If no
            such call remains, the program supports everything that JAX supports for
            `lax.cond`. Under `jax.vmap`, all branches are computed for all elements, but
            calls are made only for the elements that need them. Staging costs one run of
            the function per path, some milliseconds each, and the compilation of the
            operations: those of a loop, or before a branch, count once. Side effects in
            Python (`print`, a list that grows) happen only while tracing, where the
            function is run on abstract values even if `Tout` is complete, and arrays that
            it holds are compiled in as constants. Functions wrapped by `py_func` that it
            calls are called from the program. `jpyfunc.explain` shows the tree and loops.
        executor: refused, because the function and its tape are of this process; an option
            of `numpy_func`.

    Returns:
        The results, in the structure of `Tout` (first form), the wrapped function, or a
        decorator. With graph tensors of `jpyfunc.tf1` among the arguments, and inside a
        `with` block of a graph or session, a call returns graph tensors; if the function
        returns nothing, it returns the graph's operation.

    Raises:
        TypeError: an argument or option of the wrong type, an invalid `Tout`, or a
            function that closes over a traced value.
        ValueError: an unknown `vmap_method`; `"by_branch"` or `staged` together with an
            option that excludes it; or 64-bit results while 64-bit types are off.
        InferenceError: the shapes of the results cannot be inferred.
        ResultError: the function returned something other than `Tout` declares.
        UnsupportedError: `vmap` of an ordered call, or `jax.export` of any call.
        NotDifferentiableError: a function that is being differentiated converts to NumPy
            a value that its gradient flows through, or returns a value that no longer
            depends on any differentiated input because of such a read.
        TapeLostError: the derivative of a stateful call whose tape has been evicted.

    Warns:
        GradientCutWarning: a function that is being differentiated reads a number
            (`float(x)`, `x.item()`, `math.sin(x)`) that its gradient flows through.
        UserWarning: a function is staged to more than 1,000 operations, or one run that
            serves many elements of a batch draws from `random` or `numpy.random`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jpyfunc import py_func
        >>> @py_func(Tout=jax.ShapeDtypeStruct((), jnp.float32))
        ... def log_huber(x, m):
        ...     if jnp.abs(x) <= m:
        ...         return x**2
        ...     return m**2 * (1 - 2 * jnp.log(m) + jnp.log(x**2))
        >>> print(jax.jit(log_huber)(1.0, 2.0))
        1.0
        >>> print(jax.jit(jax.grad(log_huber))(1.0, 2.0))
        2.0

    Source: `tf.contrib.eager.py_func` of TensorFlow 1, now `tf.py_function`.
    """
    options = Options(Tout, name, stateful, ordered, vmap_method, staged, executor)
    return _dispatch("py_func", func, inp, options)


@overload
def numpy_func(
    func: Func,
    inp: Inputs,
    Tout: OneArray,
    name: str | None = None,
    **options: Unpack[NumpyFuncOptions],
) -> jax.Array: ...
@overload
def numpy_func(
    func: Func,
    inp: Inputs,
    Tout: list[OneArrayT],
    name: str | None = None,
    **options: Unpack[NumpyFuncOptions],
) -> list[jax.Array]: ...
@overload
def numpy_func(
    func: Func,
    inp: Inputs,
    Tout: dict[K, OneArrayT],
    name: str | None = None,
    **options: Unpack[NumpyFuncOptions],
) -> dict[K, jax.Array]: ...
@overload
def numpy_func(
    func: Func,
    inp: Inputs,
    Tout: tuple[OneArray, OneArray],
    name: str | None = None,
    **options: Unpack[NumpyFuncOptions],
) -> tuple[jax.Array, jax.Array]: ...
@overload
def numpy_func(
    func: Func,
    inp: Inputs,
    Tout: tuple[OneArray, ...],
    name: str | None = None,
    **options: Unpack[NumpyFuncOptions],
) -> tuple[jax.Array, ...]: ...
@overload
def numpy_func(
    func: Func,
    inp: Inputs,
    Tout: object = ...,
    name: str | None = None,
    **options: Unpack[NumpyFuncOptions],
) -> Any: ...
@overload
def numpy_func(
    func: PyFunc[P, T], **options: Unpack[NumpyFuncWrapOptions]
) -> PyFunc[P, T]: ...
@overload
def numpy_func(
    func: Callable[P, T], **options: Unpack[NumpyFuncWrapOptions]
) -> PyFunc[P, T]: ...
@overload
def numpy_func(
    func: Callable[P, object], *, Tout: T, **options: Unpack[NumpyFuncWrapOptions]
) -> PyFunc[P, T]: ...
@overload
def numpy_func(func: None = None, **options: Unpack[NumpyFuncWrapOptions]) -> Decorator: ...
@overload
def numpy_func(
    func: None = None, *, Tout: T, **options: Unpack[NumpyFuncWrapOptions]
) -> DecoratorWithTout[T]: ...
def numpy_func(
    func: Callable[..., Any] | None = None,
    inp: Any = None,
    Tout: Any = INFERRED,
    name: str | None = None,
    *,
    stateful: bool = False,
    ordered: bool = False,
    vmap_method: VmapMethod | None = None,
    executor: Executor | None = None,
    chunksize: int = 1,
) -> Any:
    """Run a Python function on NumPy arrays from inside compiled JAX.

    Like `py_func`, but the function takes NumPy arrays, which are read-only, and returns
    NumPy arrays. JAX cannot differentiate it. Define its derivatives in the form of
    `jax.custom_vjp` and `jax.custom_jvp`, with `f.defvjp(fwd, bwd)` and `f.defjvp(jvp)`.
    Without such rules it can be used inside `jax.grad` as long as no tangent reaches it;
    otherwise it raises. JAX cannot trace it either: under `jax.jit`, `Tout` has to give the
    shapes if the function calls NumPy.

    Args:
        func: the function to run.
        inp: as for `py_func`.
        Tout: as for `py_func`.
        name: as for `py_func`.
        stateful: as for `py_func`.
        ordered: as for `py_func`.
        vmap_method: as for `py_func`, without `"by_branch"`. The default is `"sequential"`.
        executor: where the function and its rules run: a `concurrent.futures.Executor`, of
            threads, processes, loky, `dask.distributed` (`client.get_executor()`) or
            `mpi4py.futures`. The elements of a batch, nested batches included, run side by
            side; a call, too, that is no batch, runs there. It is yours to shut down. To
            other processes, operands and results go as NumPy arrays, and the function by
            `pickle`, that is by name, or by value with loky and dask. A function that calls
            a program which needs the same executor runs what that needs there and then.
        chunksize: how many elements of a batch make a task of the executor. With
            `vmap_method="expand_dims"` or `"broadcast_all"`, the function is called on
            slices of so many rows.

    Returns:
        As `py_func`. Results are `jax.Array`s.

    Raises:
        NotDifferentiableError: a tangent reaches a call that has no rule for the mode of
            differentiation, or the call is differentiated twice.
        ExecutorError: the executor did not run the function: it is shut down, one of its
            processes has died, or it cannot pickle the function or what that returns.
        TypeError: as `py_func`, which also documents the other exceptions.

    Warns:
        UserWarning: the processes of the executor are forks of this one.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> from jpyfunc import numpy_func
        >>> @numpy_func(Tout=jax.ShapeDtypeStruct((3,), jnp.float32))
        ... def ranks(x):
        ...     return np.argsort(np.argsort(x)).astype(np.float32)
        >>> print(jax.jit(ranks)(jnp.array([3.0, 1.0, 2.0])))
        [2. 0. 1.]

    Source: `tf.numpy_function`.
    """
    options = Options(
        Tout,
        name,
        stateful,
        ordered,
        vmap_method,
        executor=executor,
        chunksize=chunksize,
    )
    return _dispatch("numpy_func", func, inp, options)


def _dispatch(wrapper: Wrapper, func: Any, inp: Any, options: Options) -> Any:
    """Tell the call forms apart."""
    if func is None:
        if inp is not None:
            raise TypeError(
                f"{wrapper}: inp is given without func; write {wrapper}(func, inp, Tout)."
                + see("Arguments that do not match")
            )
        return lambda func: _dispatch(wrapper, func, None, options)
    _check_func(wrapper, func)
    wrapped = wrap(wrapper, func, options)
    if inp is None:
        return wrapped
    if isinstance(inp, list | tuple):
        return wrapped(*inp)
    if is_array(inp) or isinstance(inp, GraphTensor):
        return wrapped(inp)
    if is_dtype(inp) or isinstance(inp, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{wrapper} {wrapped.__name__!r}: expected inp to be arguments, got {inp!r}, "
            f"which declares results; write {wrapper}(func, Tout=...)."
            + see("Arguments that do not match")
        )
    raise TypeError(
        f"{wrapper} {wrapped.__name__!r}: expected inp to be a list or tuple of arguments, "
        f"or a single array, got {type(inp).__name__}; write inp=[...]."
        + see("Arguments that do not match")
    )


def _check_func(wrapper: Wrapper, func: object) -> None:
    """Refuse what is not a function, and functions whose call does not run their body."""
    if isinstance(func, classmethod | property):
        raise TypeError(
            f"{wrapper}: expected func to be a function, got a {type(func).__name__}; "
            f"write @{type(func).__name__} above @{wrapper}, not below."
            + see("Not a plain function")
        )
    if not callable(func) or is_dtype(func):
        raise TypeError(
            f"{wrapper}: expected func to be a Python function, got {func!r}; write "
            f"{wrapper}(func, inp, Tout), or @{wrapper}(Tout=...) to decorate."
            + see("Not a plain function")
        )
    if inspect.iscoroutinefunction(func):
        what, remedy = "an async function", "lambda *args: asyncio.run(func(*args))"
    elif inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
        what, remedy = "a generator", "return with a list, instead of yield"
    else:
        return
    raise TypeError(
        f"{wrapper}: expected func to be a function that returns arrays, got {what}, "
        f"{func!r}; write {remedy}." + see("Not a plain function")
    )
