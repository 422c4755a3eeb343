"""Types that many signatures name."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray

Array = jax.Array | np.ndarray  # tracers, too, are instances of `jax.Array`
Value = Array | np.generic | complex  # what an operation of a body takes
Aval = ShapedArray | jax.ShapeDtypeStruct
Avals = tuple[ShapedArray, ...]
Indices = tuple[int, ...]  # of operands or of results
PyTreeDef = Any  # JAX exports its class as a variable, which is no type to a type checker
