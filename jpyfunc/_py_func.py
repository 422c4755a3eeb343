"""`py_func` and `numpy_func`: signatures, call forms, and the function that they take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax

from jpyfunc._arguments import is_array
from jpyfunc._graph_tensor import GraphTensor
from jpyfunc._options import INFERRED, Kind, Options
from jpyfunc._tout import is_dtype
from jpyfunc._wrapped import PyFunc


def py_func(
    func: Callable[..., Any] | None = None,
    inp: Any = None,
    Tout: Any = INFERRED,  # noqa: N803 - TensorFlow's name
    name: str | None = None,
    *,
    stateful: bool = False,
    ordered: bool = False,
    vmap_method: str | None = None,
    staged: bool | int = False,
) -> Any:
    """Run a Python function eagerly, with real values, from inside compiled JAX.

    Under `jax.jit` the function runs on the host at every execution, on `jax.Array`s,
    with ordinary Python control flow, `float(x)`, NumPy, `print` and `breakpoint()`.
    Outside any transform it is simply called. It is differentiable to every order,
    forward and reverse. While it is differentiated it sees values too, and it runs once:
    its operations are noted, and the run is kept for the derivative (`set_tape_limit`).

    Three forms: `py_func(func, [x, y], Tout)` calls at once, as TensorFlow's does;
    `g = py_func(func, Tout=...)` returns the wrapped function; `@py_func(Tout=...)`
    and `@py_func` decorate.

    Args:
        func: what to run. The wrapped function takes what it takes: positional and
            keyword arguments, each a pytree of arrays and Python scalars, which become
            `jax.Array`s. Other leaves (strings, callables, enums) reach it unchanged.
            One that `py_func` has wrapped already is taken as what it wraps, with its
            options where none is given here.
        inp: a list or tuple of arguments, or one array, to call with at once.
        Tout: what it returns, a pytree. A leaf with `.shape` and `.dtype` is exact, such
            as `jax.ShapeDtypeStruct((3,), jnp.float32)`, or an array like the result. A
            leaf that is a dtype, such as `jnp.float32`, fixes the dtype alone, and the
            shape is inferred. A function, such as `lambda x: x`, receives the arguments as
            `jax.ShapeDtypeStruct`s and returns such a pytree; a callable pytree with
            arrays, such as an equinox module, is a pytree. `[]` means nothing. Left out,
            all is inferred. To infer, the body is run on abstract values while tracing,
            both ways at each Python branch, which one that reads a value (`float(x)`,
            NumPy) does not allow; a `Tout` with every shape and dtype never runs it.
            Static fields of results are those of `Tout`; a result with others is refused.
        name: its name in errors, profiles and graphs; by default its own.
        stateful: run exactly once per execution of the program, results used or not.
            So does a body that returns nothing. Otherwise calls are taken to be pure:
            unused ones are removed.
        ordered: run in program order with other ordered calls; implies `stateful`.
        vmap_method: under `jax.vmap`, in one host call. A body that draws random numbers
            other than with `jax.random`, or calls `next`, needs `stateful=True` there: by
            default one run of it serves many elements. (From `random` and `numpy.random`
            it is noticed, and warned of; from a generator that the body holds it is not.)
            `"by_branch"` runs the body once for all elements that take the same branches,
            on values of which each stands for many; `"sequential"` once per element;
            `"expand_dims"` once in all, with an axis of length 1 on operands that the
            elements share; `"broadcast_all"` once in all, with these repeated. The
            meanings of the last three are those of
            `jax.pure_callback`. By default, pure calls are batched `"by_branch"`, and
            those that are stateful or return nothing `"sequential"`.
        staged: compile what can be traced. The body is run on abstract values while
            tracing, both ways at each Python branch, and its branches go into the program
            as a tree of `jax.lax.cond`; up to 32 runs, or as many as this says. Where that
            ends (the runs are spent, a value is read, an operation has an effect), the
            body is called. Results are those of the call, unstaged. Without a call left
            in it, all that JAX can do with `lax.cond` works; under `jax.vmap` its sides
            are all computed, for all elements, but calls are made for those that need
            them. It costs a run of the body, some milliseconds, for each path, and to
            compile what is found: a loop is as many operations as it has in all its
            turns, those before a branch once. What Python does beside (`print`, a list that
            grows) it does while tracing alone, for which the body is run on abstract values
            whatever `Tout` says; arrays that it holds are those of then. Calls of Python in
            the body are left to a call of it. `jpyfunc.explain` shows the tree.

    Returns:
        The results in the structure of `Tout` (the first form), or the wrapped
        function, or a decorator. With graph tensors among the arguments, and in a
        `with` of a graph or session of `jpyfunc.tf1` without, too, the results are
        graph tensors; of a body that returns nothing, its `CompiledOperation`.

    Raises:
        TypeError: an argument of the wrong kind; a body that closes over a traced
            value; a `Tout` that is none.
        ValueError: an unknown `vmap_method`, or `"by_branch"` of a call that counts its
            runs; `staged` with what cannot be; 64-bit results while they are
            off.
        InferenceError: shapes that cannot be inferred.
        ResultError: the body returned what `Tout` does not declare.
        UnsupportedError: `vmap` of an ordered call, or `jax.export` of any.
        NotDifferentiableError: a body that is differentiated converts what its gradient
            flows through to NumPy, or returns what a read has cut from its operands.
        TapeLostError: the derivative of a stateful call whose tape has been evicted.

    Warns:
        GradientCutWarning: a body that is differentiated reads a number (`float(x)`,
            `x.item()`, `math.sin(x)`) that its gradient flows through.
        UserWarning: a body is staged to more than 1,000 operations; a run that was to serve
            many elements of a batch drew from `random` or `numpy.random`.

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
    options = Options(Tout, name, stateful, ordered, vmap_method, staged)
    return _dispatch("py_func", func, inp, options)


def numpy_func(
    func: Callable[..., Any] | None = None,
    inp: Any = None,
    Tout: Any = INFERRED,  # noqa: N803 - TensorFlow's name
    name: str | None = None,
    *,
    stateful: bool = False,
    ordered: bool = False,
    vmap_method: str | None = None,
) -> Any:
    """Run a Python function on NumPy arrays from inside compiled JAX.

    As `py_func`, but the function takes and returns NumPy arrays; those that it is
    given are read-only. JAX cannot differentiate it, but rules can say how, in the form of
    `jax.custom_vjp` and `jax.custom_jvp`: `f.defvjp(fwd, bwd)` and `f.defjvp(jvp)`. Without
    them it raises where a tangent flows into it, and works inside `jax.grad` where none
    does. JAX cannot see its shapes
    either: under `jax.jit`, `Tout` must give them where the body calls NumPy.

    Args:
        func: what to run.
        inp: as for `py_func`.
        Tout: as for `py_func`.
        name: as for `py_func`.
        stateful: as for `py_func`.
        ordered: as for `py_func`.
        vmap_method: as for `py_func`, without `"by_branch"`: `"sequential"` by default.

    Returns:
        As `py_func`; the results are `jax.Array`s.

    Raises:
        NotDifferentiableError: a tangent flows into a call without rules, or without one
            for that mode, or twice.
        TypeError: as `py_func`, and for what else it raises.

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
    options = Options(Tout, name, stateful, ordered, vmap_method)
    return _dispatch("numpy_func", func, inp, options)


def _dispatch(kind: Kind, func: Any, inp: Any, options: Options) -> Any:
    """Tell the call forms apart."""
    if func is None:
        if inp is not None:
            raise TypeError(
                f"{kind}: inp is given without func; write {kind}(func, inp, Tout)."
            )
        return lambda func: _dispatch(kind, func, None, options)
    _check_func(kind, func)
    wrapped: PyFunc[..., Any] = (
        func.with_options(options)
        if kind == "py_func" and isinstance(func, PyFunc)
        else PyFunc(kind, func, options)
    )
    if inp is None:
        return wrapped
    if isinstance(inp, list | tuple):
        return wrapped(*inp)
    if is_array(inp) or isinstance(inp, GraphTensor):
        return wrapped(inp)
    if is_dtype(inp) or isinstance(inp, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{kind} {wrapped.__name__!r}: expected inp to be arguments, got {inp!r}, "
            f"which says what is returned; write {kind}(func, Tout=...)."
        )
    raise TypeError(
        f"{kind} {wrapped.__name__!r}: expected inp to be a list or tuple of arguments, "
        f"or a single array, got {type(inp).__name__}; write inp=[...]."
    )


def _check_func(kind: Kind, func: object) -> None:
    """Refuse what is no function, and a function whose call does not run its body."""
    if isinstance(func, classmethod | property):
        raise TypeError(
            f"{kind}: expected func to be a function, got a {type(func).__name__}; write "
            f"@{type(func).__name__} above @{kind}, not below."
        )
    if not callable(func) or is_dtype(func):
        raise TypeError(
            f"{kind}: expected func to be a Python function, got {func!r}; write "
            f"{kind}(func, inp, Tout), or @{kind}(Tout=...) to decorate."
        )
    if inspect.iscoroutinefunction(func):
        what, remedy = "an async function", "lambda *args: asyncio.run(func(*args))"
    elif inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
        what, remedy = "a generator", "return with a list, in place of yield"
    else:
        return
    raise TypeError(
        f"{kind}: expected func to be a function that returns arrays, got {what}, "
        f"{func!r}; write {remedy}."
    )
