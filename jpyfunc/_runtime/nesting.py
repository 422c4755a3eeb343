"""In which executors' tasks the code of this thread runs.

A function on a worker thread of a pool may call a program that needs the same pool. If that
program waited for the pool, the pool might wait for the program: a deadlock, certain if
there is one worker. So its functions run there and then, not in the pool.

But the host call of that program runs on a thread of XLA's, which knows nothing of who
dispatched it. The program itself has to know. So what is said here is part of the
configuration that JAX's caches depend on: inside a task, JAX traces and compiles a program
of its own, and its calls capture where they were traced, as they do the rest of the
configuration. That goes on to any depth.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import jax

# Said of a process that only works for an executor: any pool that it makes as it imports
# the user's module is a copy of that executor, and must not start workers of its own.
ANY = "any"

ExecutorIds = tuple[int | str, ...]  # ids of executors, or `ANY`


class ExecutorsAround:
    """The executors in whose tasks this thread's code runs, as an option of JAX."""

    def __init__(self) -> None:
        self._option: Any = None

    def prepare(self) -> None:
        """Let JAX's caches depend on it from now on.

        Programs that were compiled before are compiled again then. So it is done for the
        first function with an executor, and a process without any keeps its programs.
        """
        if self._option is None:
            self._option = jax.make_user_context(default_value=())

    @property
    def value(self) -> ExecutorIds:
        """Their ids."""
        return () if self._option is None else self._option.value

    def __call__(self, executors: ExecutorIds) -> AbstractContextManager[Any]:
        """Set them in a block."""
        return self._option(executors)


executors_around = ExecutorsAround()


def is_inside(executor: object) -> bool:
    """Whether this thread's code runs in a task of an executor."""
    around = executors_around.value
    return bool(around) and (id(executor) in around or ANY in around)
