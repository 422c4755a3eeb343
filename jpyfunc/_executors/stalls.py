"""A pool of threads that waits for what waits for the pool.

Inside a task, a program is traced again, and knows what it is inside of (`nesting`). Some
programs do not: one that was compiled outside and is called in a task; one that the user
submits to the pool; one in a task of a pool whose programs need a second pool, which in
turn needs the first. If such programs occupy all threads of a pool, and wait for tasks of
it that have not begun, nothing goes on.

It shows: the next task that a host call waits for has not begun, so all threads are taken,
and none of them uses any CPU. Then that task is taken back, and runs here. Threads that all
sleep, while another host call waits for the same pool, look the same, so it takes a while
until that is believed; and threads that wait in Python's library, for a subprocess or a
server, do not wait for JAX. If it is believed wrongly, one more task runs at once than
there are threads.
"""

from __future__ import annotations

import sys
import time
import traceback
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from types import FrameType

from jpyfunc._executors.tasks import Outcome, Task
from jpyfunc._frames import is_in_library
from jpyfunc._limits import STALL_INTERVAL, STALL_SECONDS
from jpyfunc._runtime.running_bodies import cpu_seconds


class Stall:
    """Looks out for a stall of an executor, in one host call that waits for it."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._used: dict[int, float] = {}  # CPU time of each thread
        self._since = 0.0  # when that was last seen to change
        self._is_on = False

    def outcome_of(self, task: Task, future: Future[Outcome]) -> Outcome:
        """Wait for a task; run it here if the executor has stalled."""
        if not isinstance(self._executor, ThreadPoolExecutor):
            return future.result()
        while True:
            try:
                return future.result(0 if self._is_on else STALL_INTERVAL)
            except FutureTimeoutError:
                self._is_on = self._nothing_moves() and future.cancel()
                if self._is_on:
                    return task()

    def _nothing_moves(self) -> bool:
        """Whether no thread has used any CPU for long, nor waits in Python's library."""
        all_frames = sys._current_frames()
        frames = {
            thread: all_frames[thread]
            for thread in threads_of(self._executor)
            if thread in all_frames and not _waits_here(all_frames[thread])
        }
        used, now = {thread: cpu_seconds(thread) for thread in frames}, time.monotonic()
        if used != self._used:
            self._used, self._since = used, now
        is_long = now - self._since >= STALL_SECONDS
        return is_long and not any(map(is_in_library, frames.values()))


def threads_of(executor: object) -> list[int]:
    """The threads of a pool, if it is one of threads of this process."""
    if not isinstance(executor, ThreadPoolExecutor):
        return []
    return [thread.ident or 0 for thread in vars(executor)["_threads"].copy()]


def _waits_here(frame: FrameType) -> bool:
    """Whether a thread itself waits for an executor, and looks out for a stall."""
    code = Stall.outcome_of.__code__
    return any(frame.f_code is code for frame, _ in traceback.walk_stack(frame))
