"""`raise_original`: a body's own exception in the place of JAX's error about it."""

from __future__ import annotations

from types import TracebackType

from jpyfunc._runtime.failures import CatchBlock, failures, original_of
from jpyfunc._runtime.in_flight import take_last


class raise_original:  # noqa: N801 - a context manager, named like JAX's own
    """Make an exception in a body surface as itself, not as JAX's error about it.

    JAX reports an exception in a compiled program's body as a `JaxRuntimeError` whose
    text has the body's traceback. Inside this context manager the body's own exception
    object is raised instead, with its type, attributes and traceback.

    On leaving, it waits for the programs that its thread has dispatched in it, so that no
    failure surfaces after the block. It does not wait for a body that itself has waited
    for some seconds, for example for a lock that is held outside.

    Raises:
        BaseException: whatever the body raised, `KeyboardInterrupt` included.

    Example:
        >>> import jax, jax.numpy as jnp, jpyfunc
        >>> @jpyfunc.py_func(Tout=jax.ShapeDtypeStruct((), jnp.float32))
        ... def check(x):
        ...     if x < 0:
        ...         raise ValueError(f"negative: {x}")
        ...     return x
        >>> try:
        ...     with jpyfunc.raise_original():
        ...         jax.jit(check)(-1.0)
        ... except ValueError as error:
        ...     print(error)
        negative: -1.0
    """

    def __init__(self) -> None:
        self._entered: list[CatchBlock] = []

    def __enter__(self) -> None:
        block = CatchBlock()
        self._entered.append(block)
        failures.__enter__()
        failures.blocks.append(block)

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        block = take_last(self._entered)
        try:
            original = _not_yet_raised(block) if error is None else original_of(error)
        finally:
            failures.blocks.remove(block)
            failures.__exit__()
        if original is not None:
            # `from` its own cause: otherwise JAX's error, whose text repeats this
            # exception, would be printed above it.
            raise original from (original.__cause__ or original.__context__)


def _not_yet_raised(block: CatchBlock) -> BaseException | None:
    """Wait for the programs of a block; the first exception that JAX has not raised yet."""
    block.wait()
    if len({each.thread for each in failures.blocks}) > 1:
        # There is no telling which thread's block dispatched it. The failure surfaces as
        # JAX's error, where the array is waited for.
        return None
    for failure in block.failures:
        if failure.original is not None and not failure.surfaced:
            failure.surface()
            return failure.original
    return None
