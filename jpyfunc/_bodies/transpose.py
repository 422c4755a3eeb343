"""The transpose of a body that is linear in operands, though nothing shows it.

`jax.linear_transpose` and the gradient of a `jax.custom_jvp` whose rule calls a `py_func`
ask for the transpose of a call in operands that no derivative has marked as linear. To
transpose f(v) = A v in Python, run it on abstract v: JAX then records the operations that
depend on v, each of which must be linear, and transposes them one by one,

    A = A_n ... A_1,    so that    A^T c = A_1^T ... A_n^T c.

v has no value, so a body that reads one cannot be transposed. Nor is there a tape: nothing
of such a body ran on values before. A host function has no operations either, and needs
rules: see `custom_rules.apply_transpose`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jpyfunc._errors import not_linear
from jpyfunc._frames import place_of
from jpyfunc._types import Array, Avals


def transpose_of_operations(
    function: Callable[..., list[Any]],
    linear_avals: Avals,
    cotangents: Sequence[Array],
    label: str,
) -> list[Array]:
    """Transpose a function by its operations.

    Args:
        function: from linear operands to results.
        linear_avals: of these operands.
        cotangents: one per result.
        label: the name of the user's function in errors.

    Returns:
        One cotangent per operand.

    Raises:
        NotDifferentiableError: the function is not linear, or does not show that it is.
    """
    linear = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in linear_avals]
    try:
        return list(jax.linear_transpose(function, *linear)([*cotangents]))
    except (AssertionError, NotImplementedError) as error:
        if place_of(error):  # the body itself raised it
            raise
        raise not_linear(label, "its body is not", str(error)) from error
    except jax.errors.JAXTypeError as error:
        use = _use_of_value(error)
        why = f"its body{place_of(error)} {use} what it has to be linear in"
        raise not_linear(label, why) from error


def _use_of_value(error: jax.errors.JAXTypeError) -> str:
    """Say what a body does with an operand that has no value here."""
    if isinstance(error, jax.errors.TracerBoolConversionError):
        return "branches on"
    if isinstance(error, jax.errors.TracerArrayConversionError):
        return "converts to NumPy"
    return "reads the value of"
