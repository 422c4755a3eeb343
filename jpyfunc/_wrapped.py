"""The wrapped function: what `py_func` and `numpy_func` return."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

import jax

from jpyfunc import _compat
from jpyfunc._arguments import Arguments
from jpyfunc._bodies.user_function import CustomRules
from jpyfunc._calling import call
from jpyfunc._errors import see
from jpyfunc._frames import is_called_from
from jpyfunc._graph_tensor import GraphTensor
from jpyfunc._hashable import hashable
from jpyfunc._options import Callee, Options, Wrapper, check_options, without_partial
from jpyfunc._runtime.context import building
from jpyfunc._runtime.running_bodies import is_in_body
from jpyfunc._typing import Declared, NamedTupleT, OneArray, OneArrayT

P = ParamSpec("P")
Q = ParamSpec("Q")
K = TypeVar("K")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
JvpRule = TypeVar("JvpRule", bound=Callable[[Any, Any], tuple[Any, Any]])


class PyFunc(Generic[P, T_co]):
    """A function wrapped by `py_func` or `numpy_func`.

    Wrapped functions compare by value: if a function is wrapped twice, with the same
    options, `jax.jit` of the second reuses what it compiled for the first.

    To type checkers, it has the parameters of the function, `P`, and the type of `Tout`, or
    of what the function returns if `Tout` is left out.
    """

    __name__: str
    __qualname__: str
    __wrapped__: Callable[P, Any]

    def __init__(self, wrapper: Wrapper, func: Callable[P, Any], options: Options) -> None:
        # First, because `func` may be a PyFunc, whose attributes this copies.
        functools.update_wrapper(self, func)
        self._callee = check_options(wrapper, func, options)
        self.__name__ = self._callee.name
        own = without_partial(func).__doc__ or ""
        self.__doc__ = f"{own}\n\n{self._callee.description}".strip()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PyFunc) and self._callee == other._callee

    def __hash__(self) -> int:
        return hash(self._callee)

    def __repr__(self) -> str:
        return f"<{self._callee.label}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        # By name, as functions are, if the name leads to this object. Another process does
        # not find what is defined in a notebook, so cloudpickle takes that by value.
        name = getattr(self, "__qualname__", self.__name__)
        found: Any = sys.modules.get(self.__module__)
        for part in name.split("."):
            found = getattr(found, part, None)
        by_value = self.__module__ == "__main__" and is_called_from("cloudpickle")
        if found is self and not by_value:
            return name
        callee = self._callee
        options = replace(callee.options, executor=None)  # one of this process
        return _unpickle, (callee.wrapper, self.__wrapped__, options, callee.rules)

    # A bound method is a `types.MethodType`, which has the attributes of its function. Type
    # checkers bind nothing for `@classmethod` above what is not a function.
    @overload
    def __get__(self, instance: None, owner: type | None = None) -> PyFunc[P, T_co]: ...
    @overload
    def __get__(
        self: PyFunc[Concatenate[Any, Q], T], instance: object, owner: type | None = None
    ) -> PyFunc[Q, T]: ...
    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is None or isinstance(self.__wrapped__, staticmethod):
            return self
        return types.MethodType(self, instance)

    @overload
    def __call__(
        self: PyFunc[P, OneArray], /, *args: P.args, **kwargs: P.kwargs
    ) -> jax.Array: ...
    @overload
    def __call__(self: PyFunc[P, None], /, *args: P.args, **kwargs: P.kwargs) -> None: ...
    @overload
    def __call__(
        self: PyFunc[P, NamedTupleT], /, *args: P.args, **kwargs: P.kwargs
    ) -> NamedTupleT: ...
    @overload
    def __call__(
        self: PyFunc[P, list[OneArrayT]], /, *args: P.args, **kwargs: P.kwargs
    ) -> list[jax.Array]: ...
    @overload
    def __call__(
        self: PyFunc[P, dict[K, OneArrayT]], /, *args: P.args, **kwargs: P.kwargs
    ) -> dict[K, jax.Array]: ...
    @overload
    def __call__(
        self: PyFunc[P, tuple[OneArray]], /, *args: P.args, **kwargs: P.kwargs
    ) -> tuple[jax.Array]: ...
    @overload
    def __call__(
        self: PyFunc[P, tuple[OneArray, OneArray]], /, *args: P.args, **kwargs: P.kwargs
    ) -> tuple[jax.Array, jax.Array]: ...
    @overload
    def __call__(
        self: PyFunc[P, tuple[OneArray, OneArray, OneArray]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> tuple[jax.Array, jax.Array, jax.Array]: ...
    @overload
    def __call__(
        self: PyFunc[P, tuple[OneArray, ...]], /, *args: P.args, **kwargs: P.kwargs
    ) -> tuple[jax.Array, ...]: ...
    @overload
    def __call__(
        self: PyFunc[P, Declared | Callable[..., Any]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Any: ...
    @overload
    def __call__(self: PyFunc[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        arguments = Arguments.flatten(args, kwargs, self._callee.label)
        for leaf in arguments.leaves:
            if isinstance(leaf, GraphTensor):
                return leaf.add_py_func(self, args, kwargs)
        graph = building()
        if graph and _compat.is_eager() and not is_in_body():
            return graph.add_py_func(self, args, kwargs)
        return call(self._callee, arguments)

    def defvjp(
        self,
        fwd: Callable[..., tuple[Any, Any]],
        bwd: Callable[[Any, Any], Sequence[Any]],
    ) -> None:
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

    def defjvp(self, jvp: JvpRule) -> JvpRule:
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
                + see("Derivative rules for a py_func")
            )
        for rule in rules:
            if not callable(rule):
                raise TypeError(
                    f"{label}: {method}: expected a function, got {rule!r}; write "
                    f"{method}({'fwd, bwd' if method == 'defvjp' else 'jvp'})."
                    + see("Not a plain function")
                )

    def _define(self, **rules: Any) -> None:
        known = self._callee.rules or CustomRules()
        self._callee = replace(self._callee, rules=replace(known, **rules))


# Functions, not methods: a user's completions show only what is for users, and a wrapped
# object's attributes, which `functools.update_wrapper` copies, cannot hide them.


def callee_of(wrapped: PyFunc[..., Any]) -> Callee:
    """Return the function of a wrapped one, with its options."""
    return wrapped._callee


def with_changes(wrapped: PyFunc[P, T], **changes: Any) -> PyFunc[P, T]:
    """Return a copy with changes of the `Callee`."""
    copied: PyFunc[P, T] = object.__new__(PyFunc)
    vars(copied).update(vars(wrapped), _callee=replace(wrapped._callee, **changes))
    return copied


def wrap(wrapper: Wrapper, func: Callable[P, Any], options: Options) -> PyFunc[P, Any]:
    """Wrap a function, once: what `py_func` returned is taken for what it wraps."""
    if isinstance(func, PyFunc) and wrapper == "py_func" == func._callee.wrapper:
        return PyFunc(
            wrapper, func.__wrapped__, options.completed_with(func._callee.options)
        )
    return PyFunc(wrapper, func, options)


def _unpickle(
    wrapper: Wrapper, func: Callable[P, Any], options: Options, rules: CustomRules | None
) -> PyFunc[P, Any]:
    return with_changes(PyFunc(wrapper, func, options), rules=rules)
