"""The arrays that a body sees when it runs on many elements of a batch at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import set_current_trace

from jpyfunc import _compat
from jpyfunc._errors import see
from jpyfunc._interpreters.base_tracer import BodyTracer, UnreadValue
from jpyfunc._interpreters.subset import Subset
from jpyfunc._limits import MAX_UNSTACKED_ROWS, SHOWN_ELEMENTS
from jpyfunc._runtime.context import running_batch, running_batches
from jpyfunc._runtime.transfers import put
from jpyfunc._types import Array


class CannotBatch(BaseException):
    """End a run by branch: what the body does cannot be done for many elements at once.

    No `Exception`, so that a body which handles its own errors does not handle this one.
    """


def is_batch_tracer(value: object) -> TypeGuard[BatchTracer]:
    """Whether `value` is an array of many elements of a batch, and has their values."""
    return type(value) is BatchTracer


class BatchTracer(BodyTracer):
    """An array of each element of a subset; to the body, the array of one element.

    A truth test, or a read of its value, splits the subset where elements differ, and the
    run goes on with those that agree.

    Attributes:
        subset: the elements.
        value: an array with a row for each of them, padded.
    """

    __slots__ = ("_taken", "subset", "value")

    aval: ShapedArray

    def __init__(self, trace: Any, subset: Subset, value: jax.Array) -> None:
        aval = value.aval
        self.body_trace = trace
        self.aval = ShapedArray(aval.shape[1:], aval.dtype, aval.weak_type)
        self.subset = subset
        self.value = value
        # The rows that were taken last: after a split, the same ones are taken for every
        # operation on this array.
        self._taken = (subset, value)

    def padded_rows(self, subset: Subset) -> jax.Array:
        """The array of a subset that was taken from that of this tracer, padded."""
        if self._taken[0] is not subset:
            index = subset.places_in(self.subset)
            if index is None:
                raise TypeError(
                    f"{self.body_trace.names.label}: an array of other elements of the "
                    "batch is used, which the body stored in an earlier run. Pass it as an "
                    "argument, or run the body once per element: "
                    'vmap_method="sequential".' + see("An array kept from a batch")
                )
            self._taken = (subset, rows_of(self.value, subset.pad(index)))
        return self._taken[1]

    def of_subset(self, subset: Subset) -> BatchTracer:
        """A tracer of the elements of `subset` alone, which does not hold other rows."""
        if self.subset is subset:
            return self
        return BatchTracer(self.body_trace, subset, self.padded_rows(subset))

    def decide(self) -> bool:
        batch, rows = self._rows()
        return bool(batch.agree(rows.reshape(len(rows)).astype(bool)))

    def concrete(self, use: str) -> jax.Array:
        batch, rows = self._rows()
        batch.agree(rows)
        return rows_of(self.padded_rows(batch.subset), 0)

    def placement(self, name: str) -> Any:
        if running_batch() is None:
            self.refuse_elsewhere()
        return getattr(self.value, name)

    # JAX asks for this where it may do without the value, and a split would be in vain.
    def to_concrete_value(self) -> Any:
        return UnreadValue(self)

    def _rows(self) -> tuple[Any, np.ndarray]:
        """The trace that runs, and the array of its subset, without padding."""
        batch = running_batch()
        if batch is None:
            self.refuse_elsewhere()
        rows = data_of(self.padded_rows(batch.subset))
        return batch, rows[: len(batch.subset.elements)]

    @property
    def is_running(self) -> bool:
        """Whether the run that made it is still going on, on this thread."""
        return self.body_trace in running_batches()

    def refuse_elsewhere(self) -> NoReturn:
        """Refuse a use outside of a run: after its own, or on another thread."""
        # Its run may still be going on, waiting for the thread that fails here.
        self.body_trace.record_refusal("an array is used on another thread")
        raise TypeError(
            f"{self.body_trace.names.label}: an array that stands for many elements of a "
            "batch is used outside of the run of the body that made it, where it has no "
            "single value. Return it from the body, which gives an array of all elements, "
            'or run the body once per element: vmap_method="sequential".'
            + see("An array kept from a batch")
        )

    def __iter__(self) -> Iterator[BatchTracer]:
        # As JAX does with arrays, in one operation: `key, other = jax.random.split(key)`.
        if self.aval.shape and self.aval.shape[0] <= MAX_UNSTACKED_ROWS:
            return iter(_unstack(self))
        return super().__iter__()

    def __repr__(self) -> str:
        batch = running_batch()
        subset = self.subset
        if batch is not None and batch.subset.places_in(subset) is not None:
            subset = batch.subset
        rows = data_of(self.padded_rows(subset))
        shown = [
            f"{self.body_trace.names.index(element)}: {value!s}"
            for element, value in zip(
                subset.elements[:SHOWN_ELEMENTS].tolist(), rows, strict=False
            )
        ]
        more = len(subset.elements) - len(shown)
        shown += [f"{more} more"] if more > 0 else []
        return f"Batched({self.aval.str_short()}, {{{', '.join(shown)}}})"


@jax.jit
def _unstack(x: jax.Array) -> list[jax.Array]:
    return [x[i] for i in range(x.shape[0])]


# In place of JAX's error about leaked tracers, which knows nothing of batches and bodies.
setattr(BatchTracer, _compat.ASKED_OF_LEAKED, property(BatchTracer.refuse_elsewhere))


def data_of(array: Array) -> np.ndarray:
    """An array in NumPy; PRNG keys as their data."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        with set_current_trace(_compat.eval_trace):
            array = jax.random.key_data(array)
    return np.asarray(array)


def rows_of(array: Any, index: int | np.ndarray | slice) -> jax.Array:
    """`array[index]`, on the device of `array`.

    By way of NumPy: JAX would compile the indexing for each size of a subset.
    """
    data = np.asarray(data_of(array)[index], order="C")
    aval = ShapedArray(data.shape, data.dtype, array.aval.weak_type)
    rows = put(data, aval, next(iter(array.devices())))
    if data.dtype == array.dtype:
        return rows
    with set_current_trace(_compat.eval_trace):
        return jax.random.wrap_key_data(rows, dtype=array.dtype)
