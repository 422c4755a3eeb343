"""Types that many signatures name."""

from __future__ import annotations

import jax
import numpy as np
from jax.core import ShapedArray

Array = jax.Array | np.ndarray  # tracers, too, are instances of `jax.Array`
Value = Array | np.generic | complex  # what an operation of a body takes
Avals = tuple[ShapedArray, ...]
Indices = tuple[int, ...]  # of operands or of results
