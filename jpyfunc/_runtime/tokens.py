"""JAX's tokens of ordered calls, without the tokens of failures that are known already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Token

from jpyfunc import _compat


def forget_tokens_of(is_known: Callable[[BaseException], bool]) -> None:
    """Have JAX forget the token of an ordered call whose failure is known.

    An ordered call takes the token that the one before it returned, and waits for it. The
    token of a call that failed fails, too. JAX 0.10 keeps such a token, so that one failure
    is raised by every ordered call after it, by `jax.effects_barrier` and when Python ends
    (jax-ml/jax#37587); later versions raise it once more. A failure that has been raised
    is known, and its token should be as good as one of a call that succeeded. JAX has no
    hook for this, so its set of tokens gets a subclass of its class.

    Args:
        is_known: tells whether the failure behind an error of a token was raised before.
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
