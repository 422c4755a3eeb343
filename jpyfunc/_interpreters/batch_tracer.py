"""What a body sees that runs on many elements of a batch at once, and what a read does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray, Tracer
from jax.extend.core import set_current_trace

from jpyfunc import _compat
from jpyfunc._interpreters.subset import Subset
from jpyfunc._limits import MAX_UNSTACKED_ROWS, SHOWN_ROWS
from jpyfunc._runtime.context import running_batch, running_batches
from jpyfunc._runtime.transfers import put


class CannotBatch(BaseException):
    """Something that a body does cannot be done for many elements at once."""


def is_batch_tracer(value: Any) -> bool:
    """Whether `value` is an array of many elements of a batch, and has their values."""
    return type(value) is BatchTracer


class BatchTracer(Tracer):
    """One array for each element of a subset of a batch. To a body, it is one array.

    A truth test and a read of its value split the subset, where the elements differ: the
    run goes on with those that agree, and the others are run later.
    """

    __slots__ = ("_cut", "subset", "value")

    aval: Any

    def __init__(self, trace: Any, subset: Subset, value: Any) -> None:
        aval = value.aval
        self._trace = trace
        self.aval = ShapedArray(aval.shape[1:], aval.dtype, aval.weak_type)
        self.subset = subset
        self.value = value
        self._cut = (subset, value)  # the last subset that it was cut to

    def padded_rows(self, subset: Subset) -> Any:
        """The array of a subset that is cut from that of this one, padded."""
        if self._cut[0] is not subset:
            index = subset.places_in(self.subset)
            if index is None:
                raise TypeError(
                    f"{self._trace.label}: an array of other elements of the batch is "
                    "used, which the body kept from an earlier run. Pass it as argument, "
                    'or run the body once per element: vmap_method="sequential".'
                )
            self._cut = (subset, rows_of(self.value, subset.pad(index)))
        return self._cut[1]

    def take(self, subset: Subset) -> BatchTracer:
        """It for the elements of `subset` alone."""
        return (
            self
            if self.subset is subset
            else BatchTracer(self._trace, subset, self.padded_rows(subset))
        )

    def _rows(self) -> tuple[Any, np.ndarray]:
        """The trace that runs, and the array of its subset, without padding."""
        self.check_runs()
        batch = running_batch()
        return batch, data_of(self.padded_rows(batch.subset))[: len(batch.subset.rows)]

    @property
    def is_running(self) -> bool:
        """Whether the run that it is of goes on, on this thread."""
        return self._trace in running_batches()

    def check_runs(self) -> None:
        """Refuse a use outside of a run."""
        if running_batch() is None:
            self.refuse_elsewhere()

    def refuse_elsewhere(self) -> NoReturn:
        """Refuse a use outside of a run: after its own, or on another thread."""
        self._trace.refused = "an array is used on another thread"  # if it runs still
        raise TypeError(
            f"{self._trace.label}: an array that stands for many elements of a batch is "
            "used outside of the run of the body that made it, where it has no one value. "
            "Return it from the body, which gives an array of all elements, or run it "
            'once per element: vmap_method="sequential".'
        )

    def __bool__(self) -> bool:
        if self.aval.size != 1:
            raise ValueError(
                "The truth value of an array with other than one element is ambiguous. "
                "Use a.any() or a.all()"
            )
        batch, rows = self._rows()
        return bool(batch.agree(rows.reshape(len(rows)).astype(bool)))

    @property
    def array(self) -> Any:
        """The value that all elements have once those with another are split off."""
        batch, rows = self._rows()
        batch.agree(rows)
        return rows_of(self.padded_rows(batch.subset), 0)

    # Where JAX asks this, it may go on without the value.
    def to_concrete_value(self) -> Any:
        return UnreadValue(self)

    def __iter__(self) -> Iterator[Any]:
        # As JAX does with arrays, in one operation: `key, other = jax.random.split(key)`.
        if self.aval.shape and self.aval.shape[0] <= MAX_UNSTACKED_ROWS:
            return iter(_unstack(self))
        return super().__iter__()

    def __int__(self) -> int:
        return int(self.array)

    def __float__(self) -> float:
        return float(self.array)

    def __complex__(self) -> complex:
        return complex(self.array)

    def __index__(self) -> int:
        if self.aval.shape or not jnp.issubdtype(self.aval.dtype, jnp.integer):
            raise TypeError(
                "Only integer scalar arrays can be converted to a scalar index."
            )
        return self.array.__index__()

    def __format__(self, spec: str) -> str:
        return format(self.array, spec)

    def item(self, *args: Any) -> Any:
        return self.array.item(*args)

    def tolist(self) -> Any:
        return self.array.tolist()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.array.__array__(*args, **kwargs)

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.array.__dlpack__(*args, **kwargs)

    def tobytes(self, order: str = "C") -> Any:
        return self.array.tobytes(order)

    def __reduce__(self) -> Any:
        return self.array.__reduce__()

    def __copy__(self) -> BatchTracer:
        return self

    def __deepcopy__(self, memo: Any) -> BatchTracer:
        return self

    def block_until_ready(self) -> BatchTracer:
        return self

    def __repr__(self) -> str:
        batch = running_batch()
        subset = self.subset
        if batch is not None and batch.subset.places_in(subset) is not None:
            subset = batch.subset
        rows = data_of(self.padded_rows(subset))
        shown = [
            f"{batch.number(row) if batch else row}: {value!s}"
            for row, value in zip(subset.rows[:SHOWN_ROWS].tolist(), rows, strict=False)
        ]
        more = len(subset.rows) - len(shown)
        shown += [f"{more} more"] if more > 0 else []
        return f"Batched({self.aval.str_short()}, {{{', '.join(shown)}}})"


@jax.jit
def _unstack(x: Any) -> list[Any]:
    return [x[i] for i in range(x.shape[0])]


class UnreadValue:
    """Stands for a value that is read, and splits the subset, once it is used."""

    def __init__(self, batched: BatchTracer) -> None:
        self._batched = batched

    def __bool__(self) -> bool:
        return bool(self._batched)

    def __int__(self) -> int:
        return int(self._batched)

    def __index__(self) -> int:
        return self._batched.__index__()

    def __float__(self) -> float:
        return float(self._batched)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._batched.__array__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batched.array, name)


def _about(batched: BatchTracer, name: str) -> Any:
    batched.check_runs()
    return getattr(batched.value, name)


# In the place of JAX's error, which knows nothing of batches and bodies.
setattr(BatchTracer, _compat.ASKED_OF_LEAKED, property(BatchTracer.refuse_elsewhere))

# What is asked of an array and says nothing of its elements.
for _name in (
    "committed",
    "copy_to_host_async",
    "device",
    "devices",
    "is_deleted",
    "is_fully_addressable",
    "is_fully_replicated",
    "sharding",
):
    setattr(BatchTracer, _name, property(lambda self, name=_name: _about(self, name)))

# What gives the value away.
for _name in (
    "addressable_data",
    "addressable_shards",
    "global_shards",
    "on_device_size_in_bytes",
    "unsafe_buffer_pointer",
):
    setattr(
        BatchTracer, _name, property(lambda self, name=_name: getattr(self.array, name))
    )


def data_of(array: Any) -> np.ndarray:
    """An array in NumPy, or the data of PRNG keys."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        with set_current_trace(_compat.eval_trace):
            array = jax.random.key_data(array)
    return np.asarray(array)


def rows_of(array: Any, index: Any) -> Any:
    """`array[index]`, on its device, in NumPy: nothing is compiled for sizes of parts."""
    data = np.asarray(data_of(array)[index], order="C")
    aval = ShapedArray(data.shape, data.dtype, array.aval.weak_type)
    rows = put(data, aval, next(iter(array.devices())))
    if data.dtype == array.dtype:
        return rows
    with set_current_trace(_compat.eval_trace):
        return jax.random.wrap_key_data(rows, dtype=array.dtype)
