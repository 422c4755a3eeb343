"""`py_func` and `numpy_func`: call forms, argument checks, from a call to a bind."""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray, Tracer
from jax.extend.core import set_current_trace

from jpyfunc import _compat
from jpyfunc._bodies.primal import (
    CustomRules,
    Float0Leaf,
    KeyLeaf,
    Primal,
    StaticLeaf,
    physical_aval,
    read_only,
)
from jpyfunc._bodies.profile import Run, annotated, measure, note, open_profiles
from jpyfunc._errors import (
    InferenceError,
    ResultError,
    is_called_from,
    not_differentiable,
    note_without_values,
    refuse_partial,
)
from jpyfunc._hashable import ById, hashable
from jpyfunc._interpreters.batch_tracer import is_batch_tracer, running_batch
from jpyfunc._interpreters.eager import runs_now
from jpyfunc._interpreters.tape_tracer import is_tape_tracer, value_if_over
from jpyfunc._limits import (
    MAX_ABSTRACT_RUNS,
)
from jpyfunc._mesh import align
from jpyfunc._primitive.batching import BATCHERS
from jpyfunc._primitive.primitive import Params, bind
from jpyfunc._runtime.clients import is_in_body
from jpyfunc._runtime.configuration import current_config
from jpyfunc._runtime.transfers import allowed_transfers
from jpyfunc._staging.abstract import AbstractTrace
from jpyfunc._staging.branch_tree import BranchTree, emit, stage, warn_if_large
from jpyfunc._staging.closure import fingerprint, refuse_traced_closure, refuse_traced_leaf
from jpyfunc._staging.inference import exploration, found_once, infer
from jpyfunc._symbol import Symbol, building, noting
from jpyfunc._tout import (
    Template,
    check_x64,
    is_dtype,
    is_function,
    is_key_dtype,
    is_weak,
    key_path,
    parse,
    why_no_pytree,
)


class _Inferred:
    """The default of `Tout`: nothing is declared, everything is inferred."""

    def __reduce__(self) -> str:
        return "INFERRED"

    def __repr__(self) -> str:
        return "<inferred>"


INFERRED = _Inferred()

# What is left out: Tout, name, stateful, ordered, vmap_method, staged.
_LEFT_OUT = (INFERRED, None, False, False, None, False)


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
    options = (Tout, name, stateful, ordered, vmap_method, staged)
    return _dispatch("py_func", func, inp, *options)


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
    options = (Tout, name, stateful, ordered, vmap_method, False)
    return _dispatch("numpy_func", func, inp, *options)


def _dispatch(kind: str, func: Any, inp: Any, *options: Any) -> Any:
    """Tell the call forms apart."""
    if func is None:
        if inp is not None:
            raise TypeError(
                f"{kind}: inp is given without func; write {kind}(func, inp, Tout)."
            )
        return lambda func: _dispatch(kind, func, None, *options)
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
    _refuse_deferred(kind, func)
    if kind == "py_func" and isinstance(func, PyFunc):
        func, options = func.unwrapped(*options)
    wrapped = PyFunc(kind, func, *options)
    if inp is None:
        return wrapped
    if isinstance(inp, list | tuple):
        return wrapped(*inp)
    if is_array(inp) or isinstance(inp, Symbol):
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


class _KeepsFirst:
    """A function without arguments of which no result gets lost by inference."""

    def __init__(self, func: Callable[[], Any]) -> None:
        self._func = func
        self._kept: list[Any] = []

    def __call__(self) -> Any:
        if not isinstance(_compat.current_trace(), AbstractTrace):
            with contextlib.suppress(IndexError):
                return self._kept.pop()
            return self._func()
        if not self._kept:
            with set_current_trace(_compat.eval_trace):
                self._kept.append(self._func())
        return self._kept[0]


def _refuse_deferred(kind: str, func: Any) -> None:
    """Refuse a function whose call does not run it, but returns what would."""
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


def _check_name(kind: str, name: Any) -> None:
    """Refuse a `name` that errors and programs cannot show."""
    if name is None:
        return
    if not isinstance(name, str) or not name:
        raise TypeError(
            f"{kind}: expected name to be a string that is not empty, got {name!r}; write "
            "name='solver', for example, or leave it out."
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{kind}: expected name to be text, got {name!r}, which UTF-8 cannot encode "
            f"({error.reason}); write another."
        ) from None


def _rewrapped(options: Any, rules: CustomRules | None) -> PyFunc:
    wrapped = PyFunc(*options)
    wrapped._rules = rules
    return wrapped


class PyFunc:
    """A function wrapped by `py_func` or `numpy_func`.

    It compares by value: two wraps of one function with the same options are equal, so
    that `jax.jit` of the second finds what it compiled for the first while that lives.
    """

    def __init__(
        self,
        kind: str,
        func: Callable[..., Any],
        tout: Any,
        name: str | None,
        stateful: bool,
        ordered: bool,
        vmap_method: str | None,
        staged: bool | int,
    ) -> None:
        options = (kind, func, tout, name, stateful, ordered, vmap_method, staged)
        self._options = options  # to be made again, in another process
        functools.update_wrapper(self, func)
        # The documentation of a partial is that of `functools.partial`.
        inner: Any = func.func if isinstance(func, functools.partial) else func
        _check_name(kind, name)
        own = getattr(inner, "__name__", None)
        self.__name__ = name or (
            own if own and isinstance(own, str) else type(inner).__name__
        )
        self.node_name = name
        self._where = f"{kind} {self.__name__!r}"
        if vmap_method is not None and vmap_method not in BATCHERS:
            raise ValueError(
                f"{self._where}: expected vmap_method to be one of "
                f"{', '.join(map(repr, BATCHERS))}, got {vmap_method!r}."
            )
        for option, value in (("stateful", stateful), ("ordered", ordered)):
            if not isinstance(value, bool):
                raise TypeError(
                    f"{self._where}: expected {option} to be True or False, got {value!r}; "
                    f"write {option}=True."
                )
        self._numpy = kind == "numpy_func"
        self._func = func
        self._callable_tout = tout if is_function(tout) else None
        self._template = (
            parse(tout, self._where)
            if tout is not INFERRED and self._callable_tout is None
            else None
        )
        self._stateful = stateful or ordered
        if vmap_method == "by_branch" and (self._numpy or self._stateful):
            what = "takes NumPy arrays" if self._numpy else "is stateful"
            raise self._no_batch_by_branch(what)
        self._ordered = ordered
        self._vmap_method = vmap_method
        self._staged = self._runs_to_stage(staged)
        self._rules: CustomRules | None = None
        self.__doc__ = f"{inner.__doc__ or ''}\n\n{self._description(kind)}".strip()

    def _description(self, kind: str) -> str:
        """What `help` says of it beside what the function says of itself."""
        tout = self._template or getattr(self._callable_tout, "__name__", "inferred")
        options = [f"Tout: {tout}"]
        for name, value in (
            ("stateful", self._stateful and not self._ordered),
            ("ordered", self._ordered),
            ("vmap_method", self._vmap_method),
            ("staged", self._staged),
        ):
            if value:
                options.append(name if value is True else f"{name}: {value}")
        return (
            f"Wrapped by jpyfunc.{kind} ({', '.join(options)}): it runs on the host, from "
            f"inside compiled programs, too. See help(jpyfunc.{kind})."
        )

    @property
    def _key(self) -> tuple[Any, ...]:
        return (
            self._where,
            hashable(self._func),
            hashable(self._callable_tout),
            self._template,
            (self._stateful, self._ordered, self._vmap_method, self._staged),
            self._rules,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PyFunc) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"<{self._where}>"

    def __reduce__(self) -> Any:
        # By its name, as a function is, where that is what it is found by. What is defined
        # in a notebook is not found in another process; cloudpickle takes it as it is.
        name = getattr(self, "__qualname__", self.__name__)
        found: Any = sys.modules.get(self.__module__)
        for part in name.split("."):
            found = getattr(found, part, None)
        by_value = self.__module__ == "__main__" and is_called_from("cloudpickle")
        if found is self and not by_value:
            return name
        return _rewrapped, (self._options, self._rules)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None or isinstance(self._func, staticmethod):
            return self
        return types.MethodType(self, instance)

    def defvjp(self, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> None:
        """Say how a function wrapped by `numpy_func` is differentiated in reverse.

        The rules are those of `jax.custom_vjp`, but they run on the host, on NumPy
        arrays, and residuals stay there: any Python object. `jax.value_and_grad` runs `fwd`
        once, and the function not at all. What `fwd` leaves is kept as runs are (see
        `set_tape_limit`); where it is gone, `fwd` is run again. They are first
        derivatives only: for more, write `jax.custom_jvp` or `jax.custom_vjp` around calls
        of the function. Another wrap of the function is without rules.

        By these rules a function that is linear in some of its arguments is transposed,
        too, as solvers (`jax.scipy.sparse.linalg.gmres`) and `jax.linear_transpose` ask:
        `bwd` then gets the residuals of `fwd` at arbitrary values of these arguments, for
        the transpose of a linear function does not depend on them. That the function is
        linear is checked, at the price of a call of it.

        Args:
            fwd: takes what the function takes, returns `(result, residuals)`.
            bwd: takes the residuals and the cotangent of the result, in its structure;
                returns a tuple of one cotangent per argument, in the structure of each, or
                None for none. Keyword arguments come last, in the order of the
                parameters. It is not told which are needed; others are dropped. Under
                `jax.vmap` both run once per element, or, as the function does with
                `vmap_method="expand_dims"` and `"broadcast_all"`, on whole batches; with
                the first, the cotangent of what the elements share is summed over them.

        Raises:
            TypeError: the function is wrapped by `py_func`, or a rule is no function.
            ResultError: where it is differentiated, a rule returns something else.
            NotDifferentiableError: where it is transposed, the function is not linear.

        Example:
            >>> import jax, jax.numpy as jnp, numpy as np
            >>> from jpyfunc import numpy_func
            >>> @numpy_func(Tout=lambda x: x)
            ... def cube(x):
            ...     return x**3
            >>> cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))
            >>> print(jax.jit(jax.grad(cube))(2.0))
            12.0

        Source: `jax.custom_vjp`.
        """
        self._check_rules("defvjp", fwd, bwd)
        rules = self._rules or CustomRules()
        self._rules = replace(rules, fwd=hashable(fwd), bwd=hashable(bwd))

    def defjvp(self, jvp: Callable[..., Any]) -> Callable[..., Any]:
        """Say how a function wrapped by `numpy_func` is differentiated forward.

        As `defvjp`, for forward mode; a function may have both.

        Args:
            jvp: takes the arguments and their tangents, two tuples, keyword arguments
                last; returns the result and its tangent. A tangent that is zero is an
                array of zeros, one of integers of `jax.dtypes.float0`.

        Returns:
            `jvp`, so that it decorates.

        Raises:
            TypeError: as `defvjp`.
            ResultError: as `defvjp`.

        Example:
            >>> import jax, jax.numpy as jnp, numpy as np
            >>> from jpyfunc import numpy_func
            >>> @numpy_func(Tout=lambda x: x)
            ... def cube(x):
            ...     return x**3
            >>> @cube.defjvp
            ... def cube_jvp(primals, tangents):
            ...     (x,), (t,) = primals, tangents
            ...     return x**3, 3 * x**2 * t
            >>> print(jax.jit(jax.jacfwd(cube))(2.0))
            12.0

        Source: `jax.custom_jvp`.
        """
        self._check_rules("defjvp", jvp)
        self._rules = replace(self._rules or CustomRules(), jvp=hashable(jvp))
        return jvp

    def _check_rules(self, method: str, *rules: Any) -> None:
        if not self._numpy:
            raise TypeError(
                f"{self._where}: {method} is for functions wrapped by numpy_func. JAX "
                "differentiates what a py_func does; to say otherwise, write "
                "jax.custom_jvp or jax.custom_vjp in its body or around it."
            )
        for rule in rules:
            if not callable(rule):
                raise TypeError(
                    f"{self._where}: {method}: expected a function, got {rule!r}; write "
                    f"{method}({'fwd, bwd' if method == 'defvjp' else 'jvp'})."
                )

    def _runs_to_stage(self, staged: Any) -> int:
        """How many runs on abstract values `staged` stands for."""
        if not isinstance(staged, int) or staged < 0:
            raise ValueError(
                f"{self._where}: expected staged to be True, False or a number of runs on "
                f"abstract values, got {staged!r}; write staged=True."
            )
        if staged and self._stateful:
            raise self._not_staged("is stateful, so that its runs count")
        if staged and self._vmap_method not in (None, "by_branch", "sequential"):
            raise self._not_staged(f"has vmap_method={self._vmap_method!r}")
        return MAX_ABSTRACT_RUNS if staged is True else int(staged)

    def _not_staged(self, what: str) -> ValueError:
        return ValueError(
            f"{self._where}: staged compiles what a pure body does for one element, and "
            f"this one {what}. Leave out one of the two."
        )

    def _no_batch_by_branch(self, what: str) -> ValueError:
        return ValueError(
            f"{self._where}: vmap_method='by_branch' runs a body on many elements at once, "
            f"and this one {what}. Leave vmap_method out, or write 'sequential'."
        )

    def unwrapped(self, *options: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What `py_func` is to wrap, once, where it is called with this and `options`."""
        kind, func, *own = self._options
        if kind != "py_func":
            return self, options
        given = zip(options, own, _LEFT_OUT, strict=True)
        return func, tuple(mine if x is default else x for x, mine, default in given)

    @property
    def template(self) -> Template | None:
        """`Tout`, if it is known without the arguments."""
        return self._template

    def for_node(self, note: str) -> PyFunc:
        """A copy for a node of a graph: an exception in its body gets `note`."""
        return self._with_func(noting(self._func, note))

    def with_template(self, template: Template) -> PyFunc:
        """A copy that declares its results as `template` does."""
        copied = self._with_func(self._func)
        copied._template = template
        return copied

    def keeping_first(self) -> PyFunc:
        """A copy of one without arguments, which infers from a result, and returns that."""
        return self._with_func(_KeepsFirst(self._func))

    def _with_func(self, func: Callable[..., Any]) -> PyFunc:
        copied = copy.copy(self)
        copied._func = func
        return copied

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        try:
            leaves, tree = jax.tree.flatten((args, kwargs))
        except ValueError as error:
            raise TypeError(
                f"{self._where}: JAX does not take its arguments apart: "
                f"{why_no_pytree(error)}."
            ) from error
        leaves = [*map(value_if_over, leaves)]
        for leaf in leaves:
            if isinstance(leaf, Symbol):
                return leaf.call_py_func(self, args, kwargs)
        if building.graphs and _compat.is_eager() and not is_in_body():
            return building.graphs[-1].call_py_func(self, args, kwargs)
        by_rule = self._rules and any(map(is_tape_tracer, leaves))
        if runs_now() and not by_rule and all(map(_has_value, leaves)):
            return self._call(leaves, tree)
        return self._bind(leaves, tree)

    def _call(self, leaves: list[Any], tree: Any) -> Any:
        """Call the function here and now, with the checks that a bind has."""
        if self._numpy and any(map(is_tape_tracer, leaves)):
            raise not_differentiable(self._where)
        batch = running_batch()
        if batch and self._stateful:
            batch.cannot(f"{self._where}, which is stateful")
        if self._ordered:
            jax.effects_barrier()  # what was dispatched before it runs before it
        arrays = [
            self._operand(leaf, tree, i) if is_array(leaf) else leaf
            for i, leaf in enumerate(leaves)
        ]
        if open_profiles:
            execute = functools.partial(self._run_now, arrays, tree)
            return measure(self.__name__, self._func, arrays, execute)
        return self._run_now(arrays, tree, annotated)

    def _run_now(self, arrays: list[Any], tree: Any, run: Run) -> Any:
        template = self._declared(arrays, tree)
        if self._numpy:  # which has no PRNG keys, so they stay what they are
            refuse_partial(arrays, self._where)
            arrays = [
                read_only(x) if is_array(x) and not is_key_dtype(x.dtype) else x
                for x in arrays
            ]
        args, kwargs = jax.tree.unflatten(tree, arrays)
        batch = running_batch()
        if batch and template is not None and not template.leaves:
            batch.cannot(f"{self._where}, which returns nothing")
        note(runs=1, elements=len(batch.subset.rows) - 1 if batch else 0)
        try:
            result = run(self.__name__, self._func, *args, **kwargs)
        except jax.errors.JAXTypeError as error:
            note_without_values(error, self._where)
            raise
        if template is None:
            template = Template.undeclared(result, self._where)
            if any(type(x) in _NUMBERS for x in jax.tree.leaves(result)):
                # On another branch it may be an array, whose dtype it then takes.
                template = self._inferred_now(arrays, tree, template, result)
        if not template.leaves and batch:
            batch.cannot(f"{self._where}, which returns nothing")
        with allowed_transfers():
            outputs = [
                # A declared dtype is a strong one, and what the body returned on the host
                # becomes an array of the caller's device.
                jnp.asarray(x, leaf.dtype if is_weak(x) and not leaf.weak_type else None)
                for x, leaf in zip(
                    template.check(result, self._where), template.leaves, strict=True
                )
            ]
        return jax.tree.unflatten(template.tree, outputs)

    def _inferred_now(
        self, leaves: list[Any], tree: Any, template: Template, result: Any
    ) -> Template:
        """`template` of a result with dtypes for Python numbers, as all branches join."""

        def inferred(traced: list[Any]) -> Template:
            values = self._on_abstract_values(traced, tree)
            avals = [_unsharded(jax.typeof(x)) for x in traced if is_array(x)]
            try:
                return infer(values, avals, None, self._where)
            except (InferenceError, ResultError):
                return template

        found = with_arrays_traced(leaves, inferred)
        if found.tree != template.tree:
            return template
        joined = [
            b if type(x) in _NUMBERS and b.dtype not in (None, jnp.result_type(x)) else a
            for a, b, x in zip(
                template.leaves, found.leaves, jax.tree.leaves(result), strict=True
            )
        ]
        return replace(template, leaves=tuple(joined))

    def _bind(self, leaves: list[Any], tree: Any) -> Any:
        """Make one bind of the primitive, or more of what a body does that is staged."""
        refuse_traced_closure(self._func, self._where)
        # The program is computed later, and the caller may write to them meanwhile.
        leaves = [x.copy() if isinstance(x, np.ndarray) else x for x in leaves]
        explored = exploration()
        if not self._staged or (explored and explored.for_shapes):
            arrays = self._arrays(leaves, tree)
            self._check_signature(*jax.tree.unflatten(tree, leaves))
            template = self._declared(leaves, tree)
            if template is None or not template.complete:
                template = found_once(
                    lambda: self._call_key(leaves, tree, template),
                    lambda: infer(
                        self._on_abstract_values(leaves, tree),
                        [_unsharded(jax.typeof(x)) for x in arrays],
                        template,
                        self._where,
                    ),
                )
                check_x64(template, self._where)
            results = self._bind_call(arrays, leaves, tree, template)
            return jax.tree.unflatten(template.tree, results)
        foreseen, arrays = self.foresee(leaves, tree)
        if foreseen.failure:
            raise foreseen.failure
        template = foreseen.template
        check_x64(template, self._where)
        if not template.leaves:
            raise self._not_staged("returns nothing, so that its runs count")
        warn_if_large(foreseen, self._where)

        def program(*arrays: Any) -> list[Any]:
            return emit(
                foreseen,
                arrays,
                lambda needed: self._bind_call([*arrays], leaves, tree, template, needed),
            )

        if explored:  # one operation of the body that calls this one, and traced once
            program = found_once(lambda: ById(foreseen), lambda: jax.jit(program))
        return jax.tree.unflatten(template.tree, program(*arrays))

    def _check_signature(self, args: Any, kwargs: Any) -> None:
        """Raise here, not on the host, where the function does not take the arguments."""
        misfit = _misfit(self._func, args, kwargs)
        if misfit:
            raise TypeError(
                f"{self._where}: {misfit}; call it with the arguments of "
                f"{_signature(self._func)}."
            )

    def foresee(self, leaves: list[Any], tree: Any) -> tuple[BranchTree, list[Any]]:
        """What can be compiled of a call with these arguments, and its operands.

        The operands are aligned before the body is traced, and not where it uses them: the
        transpose of `pvary` is a sum over shards, and each shard has to come to that. In a
        branch it would add up those that take the branch, or wait for the others.
        """
        self._check_signature(*jax.tree.unflatten(tree, leaves))
        arrays = align(self._arrays(leaves, tree))
        template = self._declared(leaves, tree)
        foreseen = found_once(
            lambda: self._call_key(leaves, tree, template),
            lambda: stage(
                self._on_abstract_values(leaves, tree),
                [jax.typeof(x) for x in arrays],
                template,
                self._where,
                self._staged or MAX_ABSTRACT_RUNS,
            ),
        )
        return foreseen, arrays

    def _call_key(self, leaves: list[Any], tree: Any, template: Any) -> Any:
        """What tells a call from others, whose function may be another object."""
        of_values = fingerprint([self._func, *leaves])
        config = current_config()
        key = of_values, tree, template, self._staged, self._where, config
        return None if of_values is None else key

    def _arrays(self, leaves: list[Any], tree: Any) -> list[Any]:
        """The arguments that cross to the host, as JAX arrays."""
        arrays = []
        for i, leaf in enumerate(leaves):
            if is_array(leaf):
                arrays.append(self._operand(leaf, tree, i))
            elif not is_float0(leaf):
                refuse_traced_leaf(leaf, f"{self._where}: {_argument_name(tree, i)}")
        return arrays

    def _bind_call(
        self,
        arrays: list[Any],
        leaves: list[Any],
        tree: Any,
        template: Template,
        needed: Any = None,
    ) -> list[Any]:
        """The results of a call of the body, for those elements that need it."""
        avals = [jax.typeof(x) for x in arrays]
        is_key = [is_key_dtype(aval.dtype) for aval in avals]
        operands = [
            jax.random.key_data(x) if key else x
            for x, key in zip(arrays, is_key, strict=True)
        ]
        of_arrays = iter(
            [
                KeyLeaf(a.dtype) if key else None
                for a, key in zip(avals, is_key, strict=True)
            ]
        )
        in_avals = [physical_aval(a.shape, a.dtype, a.weak_type) for a in avals]
        if needed is not None:
            operands.insert(0, needed)
            in_avals.insert(0, ShapedArray((), np.bool_))
        body = Primal(
            hashable(self._func),
            self.__name__,
            tree,
            tuple(next(of_arrays) if is_array(x) else _static(x) for x in leaves),
            template,
            tuple(in_avals),
            self._numpy,
            needed is not None,
            self._rules,
        )
        stateful = self._stateful or not template.leaves
        if stateful and self._vmap_method == "by_branch":
            raise self._no_batch_by_branch("returns nothing, so that its runs count")
        default = "sequential" if stateful or self._numpy else "by_branch"
        params = Params(
            body,
            stateful,
            self._ordered,
            self._vmap_method or default,
            current_config(),
        )
        return [
            jax.random.wrap_key_data(x, dtype=leaf.dtype) if leaf.is_key else x
            for x, leaf in zip(bind(operands, params), template.leaves, strict=True)
        ]

    def _operand(self, leaf: Any, tree: Any, index: int) -> Any:
        """An array leaf as a JAX array, or a clear refusal."""

        def where() -> str:
            return f"{self._where}: {_argument_name(tree, index)}"

        if isinstance(leaf, jax.Array):
            return leaf
        if isinstance(leaf, np.ma.MaskedArray):
            raise TypeError(
                f"{where()}: expected an array, got a masked array, which JAX does not "
                "support. Pass x.filled(value), or np.ma.getdata(x) and "
                "np.ma.getmaskarray(x)."
            )
        if isinstance(leaf, np.ndarray | np.generic) and not leaf.dtype.isnative:
            leaf = leaf.astype(leaf.dtype.newbyteorder("="))
        try:
            return jnp.asarray(leaf)
        except OverflowError as error:
            raise TypeError(
                f"{where()}: {leaf!r} does not fit in JAX's default integer; pass an "
                "array of a wider dtype, or enable 64-bit types."
            ) from error
        except TypeError as error:
            dtype = getattr(leaf, "dtype", None)
            raise TypeError(
                f"{where()}: expected an array of numbers or booleans, got "
                f"{type(leaf).__name__} of dtype {dtype}; convert it, or give it to the "
                "body with functools.partial."
            ) from error

    def _declared(self, leaves: list[Any], tree: Any) -> Template | None:
        """`Tout` for these arguments."""
        template = self._template
        if self._callable_tout is not None:
            structs = [_struct(x) if is_array(x) else x for x in leaves]
            template = parse(
                self._call_tout(*jax.tree.unflatten(tree, structs)), self._where
            )
        if template is not None:
            check_x64(template, self._where)
        return template

    def _call_tout(self, args: Any, kwargs: Any) -> Any:
        tout: Any = self._callable_tout
        try:
            return tout(*args, **kwargs)
        except Exception as error:
            misfit = _misfit(tout, args, kwargs)
            if misfit:
                self._check_signature(args, kwargs)
                own = _signature(self._func)
                expected = own or f"of {len(args) + len(kwargs)} arguments"
                raise TypeError(
                    f"{self._where}: Tout is called with the arguments of the function, "
                    f"and {misfit}: expected the parameters {expected}, got "
                    f"{_signature(tout)}. Write a Tout that takes them, such as "
                    "Tout=lambda *args: args[0]."
                ) from None
            error.add_note(
                f"{self._where}: this was raised by Tout, which is called with a "
                "jax.ShapeDtypeStruct for each array, not with data."
            )
            raise

    def _on_abstract_values(
        self, leaves: list[Any], tree: Any
    ) -> Callable[[list[Any]], Any]:
        """The function of one abstract value for each array; known arrays stay."""
        with set_current_trace(_compat.eval_trace):
            known = [
                jnp.asarray(x) if is_array(x) and not isinstance(x, Tracer) else x
                for x in (_static(x).value if is_float0(x) else x for x in leaves)
            ]

        def call(values: list[Any]) -> Any:
            rest = iter(values)
            of_arrays = [next(rest) if is_array(x) else None for x in leaves]
            args, kwargs = jax.tree.unflatten(
                tree,
                [
                    value if isinstance(x, Tracer) else x
                    for x, value in zip(known, of_arrays, strict=True)
                ],
            )
            return self._func(*args, **kwargs)

        return call


def _signature(func: Any) -> inspect.Signature | None:
    """The signature of a function, if it has one; some that are written in C have none."""
    try:
        # What a decorator wraps may take other arguments than what it makes.
        return inspect.signature(func, follow_wrapped=False)
    except ValueError:
        return None


def _misfit(func: Any, args: Any, kwargs: Any) -> str:
    """Why a function does not take the arguments, or ""."""
    signature = _signature(func)
    try:
        if signature:
            signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return ""


def _argument_name(tree: Any, index: int) -> str:
    """What errors call a leaf of the arguments."""
    first, *rest = key_path(tree, index)
    kind = "keyword argument" if getattr(first, "idx", 0) else "argument"
    return f"{kind} {jax.tree_util.keystr(tuple(rest) or (first,))}"


def _static(leaf: Any) -> StaticLeaf | Float0Leaf:
    if is_float0(leaf):
        return Float0Leaf(np.shape(leaf))
    return StaticLeaf(hashable(leaf), type(leaf))


def with_arrays_traced(leaves: list[Any], function: Callable[[list[Any]], Any]) -> Any:
    """What `function` gives for `leaves` with traced arrays; nothing is computed.

    Args:
        leaves: of the arguments; a `jax.ShapeDtypeStruct` stands for an array, too.
        function: of the leaves.
    """
    places = [
        i
        for i, leaf in enumerate(leaves)
        if is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
    ]
    found: list[Any] = []

    def probe(arrays: list[Any]) -> None:
        filled = dict(enumerate(leaves)) | dict(zip(places, arrays, strict=True))
        found.append(function([*filled.values()]))

    jax.eval_shape(probe, [leaves[i] for i in places])
    return found[0]


def _unsharded(aval: Any) -> ShapedArray:
    return ShapedArray(aval.shape, aval.dtype, aval.weak_type)


def _has_value(leaf: Any) -> bool:
    return not isinstance(leaf, Tracer) or is_tape_tracer(leaf) or is_batch_tracer(leaf)


_NUMBERS = (bool, int, float, complex)  # of Python, and not those derived of them


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    aval = jax.typeof(jnp.asarray(leaf))
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def is_float0(leaf: Any) -> bool:
    """Whether a leaf of the arguments is the tangent of integers, which has no data."""
    return getattr(leaf, "dtype", None) == jax.dtypes.float0


def is_array(leaf: Any) -> bool:
    """Whether a leaf of the arguments crosses to the host as an array."""
    if is_float0(leaf):
        return False
    if isinstance(leaf, jax.Array | np.ndarray):
        return True
    # np.str_ is a NumPy scalar too, and an IntEnum an int.
    if isinstance(leaf, str | bytes | enum.Enum):
        return False
    return isinstance(leaf, bool | int | float | complex | np.generic) or hasattr(
        type(leaf), "__jax_array__"
    )
