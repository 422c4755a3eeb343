"""`lax.while_loop`, differentiable in both modes; importing it registers the rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, partial_eval

from jpyfunc._loops import derivative
from jpyfunc._loops.loop_primitive import Function, free_running_loop, loop_p
from jpyfunc._loops.step_jaxprs import Arrays
from jpyfunc._mesh import varying_over
from jpyfunc._types import Array

ad.primitive_jvps[loop_p] = derivative.loop_jvp
ad.primitive_transposes[loop_p] = derivative.loop_transpose
partial_eval.custom_partial_eval_rules[loop_p] = derivative.loop_partial_eval
partial_eval.partial_eval_jaxpr_custom_rules[loop_p] = derivative.loop_partial_eval_custom


def while_loop(
    test: Function, body: Function, consts: Sequence[Array], carry: Sequence[Array]
) -> Arrays:
    """Run `carry = body(consts, carry)` for as long as `test(consts, carry)`.

    What the functions close over becomes a constant of the loop, too; inside
    `jax.shard_map`, what is differentiated should be among `consts`.

    Args:
        test: returns a boolean scalar.
        body: returns the next carry: arrays of the same shapes and dtypes.
        consts: arrays that the loop does not change.
        carry: arrays before the first iteration.

    Returns:
        The carry after the last iteration.

    Raises:
        TypeError: the body returns other shapes or dtypes than it is given, or another
            number of arrays; or the test returns anything but a boolean scalar.
    """

    def scalar_test(k: Arrays, c: Arrays) -> jax.Array:
        result = jnp.asarray(test(k, c))
        if result.shape or result.dtype != jnp.bool_:
            raise TypeError(
                "while_loop: the test must return a boolean scalar, not "
                f"{jax.typeof(result).str_short()}"
            )
        return result

    return free_running_loop(scalar_test, body, _varying(consts, carry), carry, 0)


def _varying(consts: Sequence[Array], carry: Sequence[Array]) -> Arrays:
    """Make constants that may be differentiated vary over what any operand varies over.

    Inside `jax.shard_map`, the cotangent of one that does not vary is summed over devices,
    and that must not be in the loop, which devices may end at different iterations.
    """
    values = [*map(jnp.asarray, consts)]
    every = [jax.typeof(x).manual_axis_type.varying for x in [*values, *carry]]
    union = frozenset[Any]().union(*every)
    return [
        varying_over(x, union) if jnp.issubdtype(x.dtype, jnp.inexact) else x
        for x in values
    ]
