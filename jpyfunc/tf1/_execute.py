"""Run a compiled program: convert feeds and fetches, raise the exceptions of bodies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jpyfunc._errors import see
from jpyfunc._runtime.failures import failures, original_of
from jpyfunc._runtime.transfers import allowed_transfers
from jpyfunc.tf1._nodes import Tensor
from jpyfunc.tf1._values import convert, fits


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """A plan for running a structure of fetches with a sequence of feeds.

    Attributes:
        program: the compiled program, shared by all plans for the same nodes.
        feeds: the tensors that are fed, in the order in which their values are given.
        order: for each argument of `program`, the index of its feed.
        outputs: for each fetch, the index of its result of `program`, and how to convert
            that.
        tree: structure of the fetches.
    """

    program: Callable[..., list[Any]]
    feeds: tuple[Tensor, ...]
    order: tuple[int, ...]
    outputs: tuple[tuple[int, Callable[[Any], Any]], ...]
    tree: Any


def execute(plan: Plan, values: Iterable[Any]) -> Any:
    """Run a compiled program; if a body fails, raise its original exception."""
    arguments = [_fed(t, value) for t, value in zip(plan.feeds, values, strict=True)]
    # Feeds and fetches are NumPy arrays, so the user has asked for their transfer.
    with failures, allowed_transfers():
        try:
            arrays = plan.program(*[arguments[i] for i in plan.order])
            return plan.tree.unflatten(
                [to_value(arrays[i]) for i, to_value in plan.outputs]
            )
        except jax.errors.TracerArrayConversionError:
            raise TypeError(
                "Session.run: expected feeds that are values, got one that JAX traces. A "
                "session runs outside of jax.jit, jax.grad and jax.vmap. Inside of these, "
                "call the functions that the graph is made of; tf.gradients "
                "differentiates a graph." + see("A value that does not fit a tensor")
            ) from None
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            failure = original_of(error)
            if failure is None:
                raise
    # `from` its own cause: otherwise JAX's error, whose text repeats this exception, would
    # be printed above it.
    raise failure from (failure.__cause__ or failure.__context__)


def _fed(tensor: Tensor, value: Any) -> Any:
    """Convert a fed value to an argument of the program."""
    dtype = tensor.dtype
    if type(value) is float and dtype is not None and dtype.kind == "f":
        if not tensor.shape:
            return dtype.type(value)
    elif (
        isinstance(value, jax.Array)
        and value.dtype == dtype
        and fits(value.shape, tensor.shape)
        and not getattr(value, "weak_type", False)  # a PRNG key has none
    ):
        return value
    return convert(value, dtype, tensor.shape, lambda: f"feed of {tensor.name!r}")


def wait(arrays: Any) -> None:
    """Wait until an operation has run; its value is None."""
    jax.block_until_ready(arrays)
