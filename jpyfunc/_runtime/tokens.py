"""JAX's tokens of ordered calls, without those of failures that are known already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Token

from jpyfunc import _compat


def forget_tokens_of(is_known: Callable[[BaseException], bool]) -> None:
    """Let JAX forget a token once the error of the run that left it is known.

    An ordered call waits for the token of the one before it. JAX 0.10 keeps a token that
    fails, so that one failure would be raised by every ordered call that comes after it,
    by `jax.effects_barrier` and when Python ends (jax-ml/jax#37587); later versions raise
    it once more. JAX has no hook there, so its object of tokens gets a class of ours.

    Args:
        is_known: whether an error that waiting for a token raises has been raised before.
    """

    class Tokens(_compat.RuntimeTokenSet):
        def get_token_input(self, eff: Any, devices: Any) -> Any:
            token = self.current_tokens.get(eff)
            try:
                if isinstance(token, Token):
                    token.block_until_ready()
            except jax.errors.JaxRuntimeError as error:
                self.current_tokens = {
                    e: t for e, t in self.current_tokens.items() if t is not token
                }
                if not is_known(error):
                    raise
            return super().get_token_input(eff, devices)

        def block_until_ready(self) -> None:
            waiting = [*self.current_tokens.values(), *self.output_runtime_tokens.values()]
            self.clear()
            first = None
            for token in waiting:
                try:
                    token.block_until_ready()
                except jax.errors.JaxRuntimeError as error:
                    first = first or (None if is_known(error) else error)
            if first is not None:
                raise first

    _compat.runtime_tokens.__class__ = Tokens
