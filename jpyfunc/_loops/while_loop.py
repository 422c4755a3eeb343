"""`lax.while_loop`, differentiable in both modes; importing it registers the rules."""

from __future__ import annotations

from collections.abc import Sequence

from jax.interpreters import ad, partial_eval

from jpyfunc._loops import derivative
from jpyfunc._loops.loop_primitive import Function, free_running_loop, loop_p
from jpyfunc._loops.step_jaxprs import Arrays
from jpyfunc._types import Array

ad.primitive_jvps[loop_p] = derivative.loop_jvp
ad.primitive_transposes[loop_p] = derivative.loop_transpose
partial_eval.custom_partial_eval_rules[loop_p] = derivative.loop_partial_eval
partial_eval.partial_eval_jaxpr_custom_rules[loop_p] = derivative.loop_partial_eval_custom


def while_loop(
    test: Function, body: Function, consts: Sequence[Array], carry: Sequence[Array]
) -> Arrays:
    """Run `carry = body(consts, carry)` for as long as `test(consts, carry)`.

    What the functions close over becomes a constant of the loop, too.

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
    return free_running_loop(test, body, consts, carry, 0)
