"""Placement of values on the mesh they are traced under: shardings and varying axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.sharding import ManualAxisType, NamedSharding, PartitionSpec

from jpyfunc import _compat
from jpyfunc._types import Array


def align(operands: Sequence[Array]) -> list[jax.Array]:
    """Make the operands of one call agree on how they lie on the mesh.

    Over explicit mesh axes each is gathered, because the host call takes it whole. Under
    `jax.shard_map(check_vma=True)` each is marked as varying over the manual axes that
    any varies over. Both are JAX operations, which know their own transposes.
    """
    whole: list[Any] = []
    for operand in operands:
        sharding = getattr(jax.typeof(operand), "sharding", None)
        if sharding is not None and any(axes is not None for axes in sharding.spec):
            operand = jax.sharding.reshard(operand, sharding.update(spec=PartitionSpec()))
        whole.append(operand)
    return vary_alike(whole, ())


def vary_alike(values: Sequence[jax.Array], like: Sequence[Array]) -> list[jax.Array]:
    """Mark `values` as varying over the manual axes that any of them or of `like` does."""
    axes = [jax.typeof(x).manual_axis_type.varying for x in (*values, *like)]
    union = frozenset().union(*axes)
    return [varying_over(x, union) for x in values]


def varying_over(x: jax.Array, axes: frozenset[Any]) -> jax.Array:
    """Mark an array as varying over manual axes of a mesh."""
    more = axes - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(more), to="varying") if more else x


def like_operands(aval: ShapedArray, operand_avals: Sequence[ShapedArray]) -> ShapedArray:
    """Put `aval` in the current mesh, varying over what the aligned operands vary over."""
    varying = _compat.standard_vma_rule("py_func", *operand_avals)
    return aval.update(
        sharding=NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec()),
        manual_axis_type=ManualAxisType(varying=varying),
    )
