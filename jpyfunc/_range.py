"""`range`: a loop over integers that a staged body compiles."""

from __future__ import annotations

import builtins
import operator
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpyfunc import _compat
from jpyfunc._conversion import as_python_number
from jpyfunc._errors import UnsupportedError, see
from jpyfunc._staging.abstract_trace import AbstractTrace
from jpyfunc._staging.abstract_tracer import AbstractTracer, is_abstract
from jpyfunc._staging.range_iterator import RangeBounds, RangeIterator


class range(RangeBounds):  # noqa: N801 - named like Python's
    """A loop over integers that may depend on arrays: `for i in jpyfunc.range(n)`.

    Like Python's `range`, with bounds that may be integer arrays. Where a body runs on
    values, and outside of wrapped functions, the loop runs in Python and yields an `int`
    each time. In a body that is staged (`staged=True`) it is compiled as one loop, also if
    the bounds are numbers, and `i` is a weakly typed integer scalar array. It cannot be
    used where Python needs an integer, for example as the index of a list; index an array,
    or use Python's `range`, whose iterations are compiled one after the other.

    Args:
        *bounds: `stop`, or `start, stop`, or `start, stop, step`: integers, or scalar
            arrays of an integer dtype.

    Raises:
        TypeError: a bound is not an integer.
        ValueError: the step is zero.
        UnsupportedError: a bound is traced, outside of a body, so that it has no value.

    Example:
        >>> import jax, jpyfunc
        >>> @jpyfunc.py_func(staged=True)
        ... def power(x, n):
        ...     result = x * 0 + 1
        ...     for i in jpyfunc.range(n):
        ...         result = result * x
        ...     return result
        >>> float(jax.jit(power)(2.0, 10))
        1024.0
    """

    __slots__ = ()

    def __init__(self, *bounds: Any) -> None:
        names = {1: ("stop",), 2: ("start", "stop"), 3: ("start", "stop", "step")}
        if len(bounds) not in names:
            raise TypeError(
                f"jpyfunc.range: expected 1 to 3 arguments, got {len(bounds)}; write "
                "range(stop), range(start, stop) or range(start, stop, step)."
                + see("Bounds of jpyfunc.range")
            )
        given = {n: _integer(x, n) for n, x in zip(names[len(bounds)], bounds, strict=True)}
        start, stop, step = given.get("start", 0), given["stop"], given.get("step", 1)
        if step == 0:
            raise ValueError(
                "jpyfunc.range: expected a step other than zero, got 0."
                + see("Bounds of jpyfunc.range")
            )
        super().__init__(start, step, _length(start, stop, step))

    def __iter__(self) -> Iterator[int]:
        trace = _compat.current_trace()
        if isinstance(trace, AbstractTrace) and not trace.shapes_only:
            found = RangeIterator(self, trace.variable)
            trace.loops.ranges.enter(sys._getframe(1), found)
            return found
        if any(map(is_abstract, self.state)):
            return RangeIterator(self, jnp.asarray)
        stop = self.start + self.length * self.step
        return iter(builtins.range(self.start, stop, self.step))

    def __reversed__(self) -> range:
        found, length = object.__new__(range), self.length
        number = as_python_number(length, int) if is_abstract(length) else length
        RangeBounds.__init__(
            found, self.start + (number - 1) * self.step, -self.step, length
        )
        return found

    def __len__(self) -> int:
        return operator.index(self.length)


def _integer(value: Any, name: str) -> Any:
    """Return a bound as an `int`, or as an abstract value of the dtype of one."""
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    got = jax.typeof(value).str_short() if is_array else type(value).__name__
    if isinstance(value, AbstractTracer):
        if value.shape == () and jnp.issubdtype(value.dtype, jnp.integer):
            if not np.can_cast(value.dtype, jnp.result_type(int)):
                value.concrete("jpyfunc.range")
            return as_python_number(value, int)
    else:
        try:
            return operator.index(value)
        except jax.errors.TracerIntegerConversionError:
            raise UnsupportedError(
                f"jpyfunc.range: {name} is traced ({got}), so it has no value. Write the "
                "loop in a function wrapped by jpyfunc.py_func, and not in one that JAX "
                "traces inside of that; or use jax.lax.fori_loop."
                + see("A traced bound of jpyfunc.range")
            ) from None
        except TypeError:
            pass
    raise TypeError(
        f"jpyfunc.range: {name}: expected an integer, or a scalar array of an integer "
        f"dtype, got {got}. Convert it with int(), or with .astype(int)."
        + see("Bounds of jpyfunc.range")
    )


def _length(start: Any, stop: Any, step: Any) -> Any:
    """Return the number of iterations: an `int`, or an abstract unsigned integer.

    The distance of two integers of n bits may need n + 1. So the subtraction wraps, and
    the result is exact as an unsigned integer, because it is not negative.
    """
    if not any(map(is_abstract, (start, stop, step))):
        return max(0, (stop - start + step - (1 if step > 0 else -1)) // step)
    unsigned = jnp.uint64 if jnp.result_type(int) == jnp.int64 else jnp.uint32
    goes_up = step > 0
    is_empty = jnp.where(goes_up, start >= stop, start <= stop)
    distance = jnp.where(goes_up, stop - start, start - stop).astype(unsigned)
    size = jnp.where(goes_up, step, -step).astype(unsigned)
    return jnp.where(is_empty, unsigned(0), (distance - 1) // size + 1)
