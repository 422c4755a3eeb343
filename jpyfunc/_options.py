"""The options of a wrapped function: as given, and checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal

from jpyfunc._bodies.user_function import CustomRules
from jpyfunc._errors import see
from jpyfunc._executors.workers import Workers, check_executor
from jpyfunc._hashable import hashable, unwrapped
from jpyfunc._limits import MAX_ABSTRACT_RUNS
from jpyfunc._primitive.batching import BATCHERS
from jpyfunc._tout import Template, is_function, parse

Wrapper = Literal["py_func", "numpy_func"]


class _Inferred:
    """The default of `Tout`: nothing is declared, everything is inferred."""

    def __reduce__(self) -> str:
        return "INFERRED"

    def __repr__(self) -> str:
        return "<inferred>"


INFERRED = _Inferred()


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """The options of `py_func` and `numpy_func`, as given."""

    Tout: Any = INFERRED
    name: str | None = None
    stateful: bool = False
    ordered: bool = False
    vmap_method: str | None = None
    staged: bool | int = False
    executor: Any = None
    chunksize: int = 1

    def completed_with(self, inner: Options) -> Options:
        """Return these options, with those of `inner` where none is given here."""
        given = {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not field.default
        }
        return dataclasses.replace(inner, **given)


@dataclasses.dataclass(frozen=True, slots=True)
class Callee:
    """A function with its options, which are checked.

    It compares by value, because a wrapped function is a key of `jax.jit`'s cache.

    Attributes:
        wrapper: what wraps it.
        func: the function, made `hashable`.
        name: its name in errors and profiles.
        template: `Tout`, parsed; None if it is left out or is a function.
        tout: `Tout`, made `hashable`, if it is a function; else None.
        stateful: whether each execution of the program runs it exactly once.
        ordered: whether it runs in program order with other ordered calls.
        vmap_method: how it is batched; None for the default.
        max_runs: the limit of abstract runs to stage it; 0 if it is not staged.
        options: as given, to wrap the function again.
        rules: the derivatives of a `numpy_func`.
        workers: where the calls of a `numpy_func` run; None for here.
    """

    wrapper: Wrapper
    func: Hashable
    name: str
    template: Template | None
    tout: Hashable
    stateful: bool
    ordered: bool
    vmap_method: str | None
    max_runs: int
    options: Options = dataclasses.field(compare=False)
    rules: CustomRules | None = None
    workers: Workers | None = None

    @property
    def function(self) -> Callable[..., Any]:
        return unwrapped(self.func)

    @property
    def label(self) -> str:
        """The name of the function in errors."""
        return f"{self.wrapper} {self.name!r}"

    @property
    def is_host_function(self) -> bool:
        """Whether it takes and returns NumPy arrays."""
        return self.wrapper == "numpy_func"

    @property
    def description(self) -> str:
        """A sentence for `help`, below the documentation of the function."""
        tout = getattr(unwrapped(self.tout), "__name__", "inferred")
        options = [f"Tout: {self.template or tout}"]
        for name, value in (
            ("stateful", self.stateful and not self.ordered),
            ("ordered", self.ordered),
            ("vmap_method", self.vmap_method),
            ("staged", self.max_runs),
            ("executor", self.workers and type(self.workers.executor).__name__),
        ):
            if value:
                options.append(name if value is True else f"{name}: {value}")
        return (
            f"Wrapped by jpyfunc.{self.wrapper} ({', '.join(options)}): runs on the host, "
            f"also from inside compiled programs. See help(jpyfunc.{self.wrapper})."
        )


def check_options(wrapper: Wrapper, func: Callable[..., Any], options: Options) -> Callee:
    """Check the options of a function.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option has an unknown value, or excludes another.
    """
    _check_name(wrapper, options.name)
    name = options.name or name_of(func)
    label = f"{wrapper} {name!r}"
    method = options.vmap_method
    if method is not None and method not in BATCHERS:
        raise ValueError(
            f"{label}: expected vmap_method to be one of "
            f"{', '.join(map(repr, BATCHERS))}, got {method!r}." + see("An invalid option")
        )
    for option in ("stateful", "ordered"):
        value = getattr(options, option)
        if not isinstance(value, bool):
            raise TypeError(
                f"{label}: expected {option} to be True or False, got {value!r}; "
                f"write {option}=True." + see("An invalid option")
            )
    tout = options.Tout
    has_function = is_function(tout)
    template = None if tout is INFERRED or has_function else parse(tout, label)
    stateful = options.stateful or options.ordered
    if method == "by_branch" and (wrapper == "numpy_func" or stateful):
        what = "takes NumPy arrays" if wrapper == "numpy_func" else "is stateful"
        raise not_by_branch(label, what)
    if options.ordered and options.executor is not None:
        raise ValueError(
            f"{label}: an executor runs calls side by side, and ordered=True one after "
            "another. Leave out one of the two." + see("Options of executors")
        )
    max_runs = _max_runs(label, options.staged)
    if max_runs and stateful:
        raise not_staged(label, "is stateful")
    if max_runs and method not in (None, "by_branch", "sequential"):
        raise not_staged(label, f"has vmap_method={method!r}")
    return Callee(
        wrapper,
        hashable(func),
        name,
        template,
        hashable(tout) if has_function else None,
        stateful,
        options.ordered,
        method,
        max_runs,
        options,
        workers=check_executor(wrapper, label, options.executor, options.chunksize),
    )


def name_of(func: Callable[..., Any]) -> str:
    """Return the name of a function, or that of its class if it has none."""
    inner = without_partial(func)
    own = getattr(inner, "__name__", None)
    return own if own and isinstance(own, str) else type(inner).__name__


def without_partial(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function in a `functools.partial`, which has the name and docstring."""
    return func.func if isinstance(func, functools.partial) else func


def _check_name(wrapper: Wrapper, name: object) -> None:
    """Refuse a `name` that errors and compiled programs cannot show."""
    if name is None:
        return
    if not isinstance(name, str) or not name:
        raise TypeError(
            f"{wrapper}: expected name to be a non-empty string, got {name!r}; write "
            "name='solver', for example, or leave it out." + see("An invalid option")
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{wrapper}: expected name to be text, got {name!r}, which UTF-8 cannot encode "
            f"({error.reason}); write another." + see("An invalid option")
        ) from None


def _max_runs(label: str, staged: object) -> int:
    """Return how many abstract runs `staged` allows."""
    if not isinstance(staged, int) or staged < 0:
        raise ValueError(
            f"{label}: expected staged to be True, False or a number of "
            f"runs on abstract values, got {staged!r}; write staged=True."
            + see("An invalid option")
        )
    return MAX_ABSTRACT_RUNS if staged is True else int(staged)


def not_staged(label: str, what: str) -> ValueError:
    """Return the error of a function that cannot be staged."""
    return ValueError(
        f"{label}: staged compiles pure functions, one element at a time, and this one "
        f"{what}. Leave out one of the two." + see("Options that contradict each other")
    )


def not_by_branch(label: str, what: str) -> ValueError:
    """Return the error of a function that cannot be batched by branch."""
    return ValueError(
        f"{label}: vmap_method='by_branch' runs a pure function of JAX arrays on many "
        f"elements at once, and this one {what}. Leave vmap_method out, or write "
        "'sequential'." + see("Options that contradict each other")
    )
