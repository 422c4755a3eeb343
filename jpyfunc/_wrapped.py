"""The wrapped function: what `py_func` and `numpy_func` return."""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from jax.extend.core import set_current_trace

from jpyfunc import _compat
from jpyfunc._arguments import Arguments
from jpyfunc._bodies.user_function import CustomRules
from jpyfunc._calling import branch_tree, call
from jpyfunc._errors import adding_note
from jpyfunc._frames import is_called_from
from jpyfunc._graph_tensor import GraphTensor
from jpyfunc._hashable import hashable, unwrapped
from jpyfunc._options import Kind, Options, check_options, without_partial
from jpyfunc._runtime.context import building
from jpyfunc._runtime.running_bodies import is_in_body
from jpyfunc._staging.abstract_trace import AbstractTrace
from jpyfunc._staging.branch_tree import BranchTree
from jpyfunc._tout import Template

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R", covariant=True)
F = TypeVar("F", bound=Callable[..., Any])


class PyFunc(Generic[P, R]):
    """A function wrapped by `py_func` or `numpy_func`.

    Wrapped functions compare by value: two wraps of one function with the same options are
    equal, so `jax.jit` of the second reuses what it compiled for the first.
    """

    __name__: str
    __qualname__: str

    def __init__(self, kind: Kind, func: Callable[P, Any], options: Options) -> None:
        # First, because it copies the attributes of what may be a wrapped function itself.
        functools.update_wrapper(self, func)
        self._func = func
        self._options = options  # as given, to wrap it again in another process
        self._callee = check_options(kind, func, options)
        self.__name__ = self._callee.name
        own = without_partial(func).__doc__ or ""
        self.__doc__ = f"{own}\n\n{self._description()}".strip()

    def _description(self) -> str:
        """Return what `help` says below the function's own documentation."""
        callee = self._callee
        tout = getattr(unwrapped(callee.tout), "__name__", "inferred")
        options = [f"Tout: {callee.template or tout}"]
        for name, value in (
            ("stateful", callee.stateful and not callee.ordered),
            ("ordered", callee.ordered),
            ("vmap_method", callee.vmap_method),
            ("staged", callee.max_runs),
        ):
            if value:
                options.append(name if value is True else f"{name}: {value}")
        return (
            f"Wrapped by jpyfunc.{callee.kind} ({', '.join(options)}): runs on the host, "
            f"also from inside compiled programs. See help(jpyfunc.{callee.kind})."
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PyFunc) and self._callee == other._callee

    def __hash__(self) -> int:
        return hash(self._callee)

    def __repr__(self) -> str:
        return f"<{self._callee.label}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        # By name, as functions are pickled, where the name leads to this object. What is
        # defined in a notebook is not found in another process; cloudpickle takes it by
        # value.
        name = getattr(self, "__qualname__", self.__name__)
        found: Any = sys.modules.get(self.__module__)
        for part in name.split("."):
            found = getattr(found, part, None)
        by_value = self.__module__ == "__main__" and is_called_from("cloudpickle")
        if found is self and not by_value:
            return name
        callee = self._callee
        return _wrap_again, (callee.kind, self._func, self._options, callee.rules)

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> PyFunc[P, R]: ...
    @overload
    def __get__(
        self: PyFunc[Concatenate[Any, Q], R], instance: object, owner: type | None = None
    ) -> Callable[Q, R]: ...
    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """Bind a method, as functions do."""
        if instance is None or isinstance(self._func, staticmethod):
            return self
        return types.MethodType(self, instance)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        arguments = Arguments.flatten(args, kwargs, self._callee.label)
        for leaf in arguments.leaves:
            if isinstance(leaf, GraphTensor):
                return leaf.add_py_func(self, args, kwargs)
        graph = building()
        if graph and _compat.is_eager() and not is_in_body():
            return graph.add_py_func(self, args, kwargs)
        return call(self._callee, arguments)

    def defvjp(self, fwd: Callable[P, Any], bwd: Callable[..., Any]) -> None:
        """Define the reverse-mode derivative of a function wrapped by `numpy_func`.

        The rules have the form of those of `jax.custom_vjp`, but they run on the host, on
        NumPy arrays, and the residuals stay there: they may be any Python object.
        `jax.value_and_grad` runs `fwd` once, and does not run the function. Residuals are
        stored as tapes are (see `set_tape_limit`); if they have been evicted, `fwd` is run
        again. The rules give first derivatives only: for more, write `jax.custom_jvp` or
        `jax.custom_vjp` around calls of the function. They belong to this wrapped function;
        another `numpy_func` of the same function has none.

        With these rules, a function that is linear in some of its arguments can be
        transposed too, which `jax.linear_transpose` and solvers such as
        `jax.scipy.sparse.linalg.gmres` need. `bwd` then gets the residuals of `fwd` at
        arbitrary values of these arguments, because the transpose of a linear function does
        not depend on them. Linearity is checked, which costs one call of the function.

        Args:
            fwd: takes the function's arguments, returns `(result, residuals)`.
            bwd: takes the residuals and the cotangent of the result, in its structure.
                Returns a tuple with one cotangent per argument, each in the structure of
                the argument, or None for zero. Those of keyword arguments come last, in
                the order of the parameters. `bwd` is not told which cotangents are needed;
                the others are dropped. Under `jax.vmap` both rules run once per element, or
                on whole batches if the function does (`vmap_method="expand_dims"` or
                `"broadcast_all"`). With `"expand_dims"`, cotangents of arguments that the
                elements share are summed over the batch.

        Raises:
            TypeError: the function is wrapped by `py_func`, or a rule is not a function.
            ResultError: on differentiation, if a rule returns something else.
            NotDifferentiableError: on transposition, if the function is not linear.

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
        self._define(fwd=hashable(fwd), bwd=hashable(bwd))

    def defjvp(self, jvp: F) -> F:
        """Define the forward-mode derivative of a function wrapped by `numpy_func`.

        Like `defvjp`, for forward mode. A function may have both.

        Args:
            jvp: takes two tuples, the arguments and their tangents, with keyword arguments
                last. Returns the result and its tangent. A zero tangent is an array of
                zeros; that of an integer argument has dtype `jax.dtypes.float0`.

        Returns:
            `jvp`, so that `defjvp` can be used as a decorator.

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
        self._define(jvp=hashable(jvp))
        return jvp

    def _check_rules(self, method: str, *rules: object) -> None:
        label = self._callee.label
        if not self._callee.is_host_function:
            raise TypeError(
                f"{label}: {method} is for functions wrapped by numpy_func. JAX "
                "differentiates the operations of a py_func; to define another derivative, "
                "write jax.custom_jvp or jax.custom_vjp in its body or around it."
            )
        for rule in rules:
            if not callable(rule):
                raise TypeError(
                    f"{label}: {method}: expected a function, got {rule!r}; write "
                    f"{method}({'fwd, bwd' if method == 'defvjp' else 'jvp'})."
                )

    def _define(self, **rules: Any) -> None:
        known = self._callee.rules or CustomRules()
        self._callee = replace(self._callee, rules=replace(known, **rules))

    def with_options(self, options: Options) -> PyFunc[..., Any]:
        """Return a `py_func` of the same function, wrapped once, with `options` first."""
        if self._callee.is_host_function:  # whose body takes NumPy arrays
            return PyFunc("py_func", self, options)
        return PyFunc("py_func", self._func, options.over(self._options))

    def branch_tree(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BranchTree:
        """Return the branches of the body for arguments that need no data."""
        label = self._callee.label
        return branch_tree(self._callee, Arguments.flatten(args, kwargs, label))

    @property
    def node_name(self) -> str | None:
        """The name that was given for nodes of graphs, if any."""
        return self._options.name

    @property
    def template(self) -> Template | None:
        """`Tout`, if it is known without the arguments."""
        return self._callee.template

    def for_node(self, note: str) -> PyFunc[P, R]:
        """Return a copy for a node of a graph, which adds `note` to exceptions."""
        return self._replace(func=hashable(adding_note(self._callee.function, note)))

    def with_template(self, template: Template) -> PyFunc[P, R]:
        """Return a copy that declares its results as `template` does."""
        return self._replace(template=template)

    def reusing_first(self) -> PyFunc[P, R]:
        """Return a copy of a function without arguments that reuses the inferred result."""
        return self._replace(func=_ReusesFirst(self._callee.function))

    def _replace(self, **changes: Any) -> PyFunc[P, R]:
        copied: PyFunc[P, R] = object.__new__(PyFunc)
        vars(copied).update(vars(self), _callee=replace(self._callee, **changes))
        return copied


def _wrap_again(
    kind: Kind, func: Callable[P, Any], options: Options, rules: CustomRules | None
) -> PyFunc[P, Any]:
    wrapped = PyFunc(kind, func, options)
    wrapped._callee = replace(wrapped._callee, rules=rules)
    return wrapped


class _ReusesFirst:
    """A function without arguments, whose result of inference is that of the first call.

    Inference runs a body on abstract values. Without arguments there are none, and the
    body computes its result, which the first real call then returns: so a body that draws
    a random number or counts its calls is not run once more than the graph runs.
    """

    def __init__(self, func: Callable[[], Any]) -> None:
        self._func = func
        self._results: list[Any] = []

    def __call__(self) -> Any:
        if not isinstance(_compat.current_trace(), AbstractTrace):
            with contextlib.suppress(IndexError):
                return self._results.pop()
            return self._func()
        if not self._results:
            with set_current_trace(_compat.eval_trace):
                self._results.append(self._func())
        return self._results[0]
