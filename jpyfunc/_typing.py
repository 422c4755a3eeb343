"""Types of the public signatures: what `Tout` may be, and the results that it declares.

`PyFunc[P, T]` has the type `T` of `Tout`, or of what the function returns if `Tout` is left
out. The overloads of its call map `T` to the type of the results. They are not overloads of
`py_func`, because JAX before 0.12 types `jnp.float32` as `Any`, for which these would be
ambiguous, and type checkers would lose the parameters `P` as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, Literal, Protocol, TypeAlias, TypedDict, TypeVar

import jax
import numpy as np

VmapMethod = Literal["by_branch", "sequential", "expand_dims", "broadcast_all"]


class _ScalarType(Protocol):
    """A dtype of `jax.numpy`, such as `jnp.float32`."""

    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __call__(self, x: Any, /) -> jax.Array: ...


_Number: TypeAlias = bool | int | float | complex | np.ndarray | np.generic
_Dtype: TypeAlias = (
    str
    | np.dtype[Any]
    | _ScalarType
    | type[np.generic]
    | type[bool]
    | type[int]
    | type[float]
    | type[complex]
)

# What stands for one array: in `Tout`, or returned by a function.
OneArray: TypeAlias = jax.Array | jax.ShapeDtypeStruct | _Dtype | _Number

# A `Tout` of any depth without arrays, so that the results have other types.
Declared: TypeAlias = (
    jax.ShapeDtypeStruct
    | _Dtype
    | _Number
    | Sequence["Declared | None"]
    | Mapping[Any, "Declared | None"]
)


class _NamedTuple(Protocol):
    """Any `typing.NamedTuple`, whose fields say what the results are."""

    def _asdict(self) -> dict[str, Any]: ...


OneArrayT = TypeVar("OneArrayT", bound=OneArray)
NamedTupleT = TypeVar("NamedTupleT", bound=_NamedTuple)


class NumpyFuncOptions(TypedDict, total=False):
    """Keyword options of a call of `numpy_func` with `inp`."""

    stateful: bool
    ordered: bool
    vmap_method: VmapMethod | None
    executor: Executor | None
    chunksize: int


class NumpyFuncWrapOptions(NumpyFuncOptions, total=False):
    """Keyword options of `numpy_func` without `inp`."""

    name: str | None


class PyFuncOptions(TypedDict, total=False):
    """Keyword options of a call of `py_func` with `inp`."""

    stateful: bool
    ordered: bool
    vmap_method: VmapMethod | None
    staged: bool | int


class PyFuncWrapOptions(PyFuncOptions, total=False):
    """Keyword options of `py_func` without `inp`."""

    name: str | None
