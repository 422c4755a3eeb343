"""Base class of bodies: what a call computes on the host.

A body maps flat operands to flat results. A `Primal` is the user's function; every other
kind is a `DerivedBody`. They are closed under transformations: the JVP, the transpose
and the batch of a body of any kind are bodies. In whatever order transformations come, the
bodies stay small, because

    transpose(Jvp(f)) = Vjp(f),    transpose(Vjp(f)) = Jvp(f),

and a derivative of a batch is the batch of the derivative, so that `Batch` is outermost.

Bodies are frozen and compare by value, because as part of a parameter of the primitive they
are part of the keys of JAX's caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.core import ShapedArray

from jpyfunc._bodies.custom_rules import RuleResiduals
from jpyfunc._bodies.steps import Steps, run_here, run_on_workers
from jpyfunc._bodies.user_function import UserFunction
from jpyfunc._errors import add_inner_jit_remedy
from jpyfunc._interpreters.tape import Tape
from jpyfunc._limits import LARGE_ARRAY_BYTES
from jpyfunc._runtime.context import Context
from jpyfunc._runtime.profile import Kind, ProfileRow
from jpyfunc._runtime.transfers import put
from jpyfunc._types import Array, Avals, Indices


class Body:
    """A computation that a call makes on the host."""

    __slots__ = ()

    @property
    def in_avals(self) -> Avals:
        """The operands."""
        raise NotImplementedError

    @property
    def out_avals(self) -> Avals:
        """The results."""
        raise NotImplementedError

    @property
    def function(self) -> UserFunction:
        """The user's function that it is derived from."""
        raise NotImplementedError

    @property
    def kind(self) -> Kind:
        """The kind of computation; of several derivatives, the one taken last."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """Its name in the traces of `jax.profiler`."""
        name, kind = self.function.title, self.kind
        return name if kind == "forward" else f"{name} ({kind})"

    @property
    def profile_row(self) -> ProfileRow:
        """The row of a profile in which calls of it are counted."""
        return self.function.title, self.function.callable, self.kind

    @property
    def description(self) -> str:
        """A description of the computation, for programs that are printed."""
        raise NotImplementedError

    # --- Computation. A host call goes inwards through three methods:
    #
    # - `evaluate` is the whole call. When it has succeeded, its tapes are spent.
    # - `run` is the run of one element, or of the subset of a batch that runs by branch: it
    #   is timed, and skipped if a predicate says that nothing needs it. `Batch` overrides
    #   it, to call the `run` of its base until all elements are done.
    # - `compute` is what a kind of body computes, and nothing else. A derived body calls
    #   that of its base directly, as part of its own run.

    def evaluate(self, context: Context, operands: Sequence[Array]) -> list[Array]:
        """Compute the results of a host call, and mark its tapes as spent.

        Args:
            context: the current one.
            operands: NumPy or JAX arrays, one per `in_avals`.

        Returns:
            NumPy or JAX arrays, one per `out_avals`.
        """
        results = self.run(context, operands)
        ticket = self.ticket_index
        if ticket is not None:
            self.spend_tape(operands[ticket])
        return results

    def run(self, context: Context, operands: Sequence[Array]) -> list[Array]:
        """Compute the results of one run if they are needed, and time it."""
        if self.function.is_host_function:
            return self._run_host_function(context, operands)
        return context.timed(self.title, self._compute_if_needed, context, operands)

    def _run_host_function(
        self, context: Context, operands: Sequence[Array]
    ) -> list[Array]:
        steps = self.steps(context, operands)
        workers = self.function.workers_apart
        if workers is not None:
            context.count(elements=1)
            return run_on_workers(self.title, self.function, workers, steps)
        try:
            return context.timed(self.title, run_here, steps)
        except jax.errors.JAXTypeError as error:
            add_inner_jit_remedy(error, self.function.label)
            raise

    def _compute_if_needed(
        self, context: Context, operands: Sequence[Array]
    ) -> list[Array]:
        if self.function.has_predicate and not operands[0]:
            context.count(elements=-context.elements)
            return zeros(self.out_avals)
        return self.compute(context, operands)

    def compute(self, context: Context, operands: Sequence[Array]) -> list[Array]:
        """Compute the results, as the kind of the body says."""
        raise NotImplementedError

    def steps(self, context: Context, operands: Sequence[Array]) -> Steps[list[Array]]:
        """Compute the results of a host function: `compute`, between the user's calls."""
        raise NotImplementedError

    # --- Transformations.

    @property
    def linear_from(self) -> int:
        """The first operand of those, at the end, in which it is known to be linear.

        Only derivatives are known to be linear: nothing shows that a function is.
        """
        return len(self.in_avals)

    def check_differentiable(self) -> None:
        """Refuse a derivative for which a host function has no rule.

        Raises:
            NotDifferentiableError: it has none.
        """

    def jvp(self, wrt: Indices, of: Indices, repeatable: bool) -> Body:
        """Return the JVP of this body.

        Args:
            wrt: the operands that have a tangent.
            of: the results whose tangents are wanted.
            repeatable: whether the user's function may run again.

        Returns:
            A body whose operands are those of this one, then the ticket of its run if this
            body is no derivative, then the tangents.
        """
        raise NotImplementedError

    def transpose(self, wrt: Indices, of: Indices) -> tuple[Body, Indices]:
        """Return the transpose of this body, which is linear in the operands `wrt`.

        Args:
            wrt: the operands whose cotangents are wanted.
            of: the results whose cotangents are given.

        Returns:
            The transposed body, and which operands of this body are its first operands; the
            cotangents of `of` follow them.
        """
        raise NotImplementedError

    def widen(self, size: int, batched: tuple[bool, ...]) -> Body:
        """Return this body for a function that takes a whole batch in one call.

        Args:
            size: of the batch.
            batched: which operands have the batch axis; the others have one of length 1.
                It matters to a primal only. A derivative needs primals and tangents of one
                shape, so all its operands must have the batch axis in full.
        """
        raise NotImplementedError

    # --- Tapes.

    @property
    def is_primal(self) -> bool:
        """Whether it is the user's function itself, and leaves no tape."""
        return False

    @property
    def has_tape(self) -> bool:
        """Whether it caches the tape of its run, whose ticket is its last result."""
        return False

    @property
    def ticket_index(self) -> int | None:
        """The index of the operand that is the ticket of its tape; None without one."""
        return None

    @property
    def is_repeatable(self) -> bool:
        """Whether the function may run again where the tape has been evicted."""
        return True

    def with_tape(self, wrt: Indices) -> Body:
        """Return this body on a tape, for derivatives with respect to operands `wrt`."""
        return self

    def without_tape(self) -> Body:
        """Return this body without its tape and its ticket, which nothing needs."""
        return self

    def sharing_tape(self) -> Body:
        """Return this body such that it leaves its tape, unspent, to other derivatives."""
        return self

    def cached_tape(self, wrt: Indices, operands: Sequence[Array]) -> Tape | None:
        """Look up the tape that derivatives with respect to `wrt` can be taken of.

        Args:
            wrt: operands of this body.
            operands: all of them.

        Returns:
            None if there is none or it has been evicted.
        """
        return None

    def residuals(
        self, context: Context, operands: Sequence[Array]
    ) -> Steps[RuleResiduals]:
        """Look up the residuals of the forward rule, or apply it again."""
        raise NotImplementedError

    def spend_tape(self, ticket: Array) -> None:
        """Record that a derivative has been taken of the tapes of one or more tickets."""


class DerivedBody(Body):
    """A body that is derived from another one, whose function and tape it has.

    Attributes:
        base: what it is derived from.
    """

    __slots__ = ()

    base: Body

    @property
    def function(self) -> UserFunction:
        return self.base.function

    @property
    def ticket_index(self) -> int | None:
        return self.base.ticket_index

    @property
    def is_repeatable(self) -> bool:
        return self.base.is_repeatable

    def spend_tape(self, ticket: Array) -> None:
        self.base.spend_tape(ticket)


def others(body: Body, wrt: Indices) -> Indices:
    """The operands of `body` that are not in `wrt`."""
    return tuple(i for i in range(len(body.in_avals)) if i not in wrt)


def zeros(avals: Avals) -> list[Array]:
    """Results that nothing uses."""
    return [np.zeros(aval.shape, aval.dtype) for aval in avals]


def put_operands(context: Context, operands: Sequence[Array], avals: Avals) -> list[Array]:
    """Put operands that are NumPy arrays on the device of the context."""
    return [
        x if isinstance(x, jax.Array) else put(x, aval, context.device)
        for x, aval in zip(operands, avals, strict=True)
    ]


def put_large_operands(context: Context, operands: Sequence[Array]) -> list[Array]:
    """Put large operands, which only operations take, on the device of the context.

    Operations put small NumPy arrays there themselves. For large ones they would use
    threads of the client, which the program that waits for this body may hold.
    """
    return [
        x
        if isinstance(x, jax.Array) or x.nbytes < LARGE_ARRAY_BYTES
        else put(x, ShapedArray(x.shape, x.dtype), context.device)
        for x in operands
    ]
