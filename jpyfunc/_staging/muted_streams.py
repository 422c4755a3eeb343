"""Mute one thread's output while a body runs on abstract values."""

from __future__ import annotations

import collections
import contextlib
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

# How many `mute_streams` blocks each thread is in. Threads that are in none are missing.
_blocks: collections.Counter[int] = collections.Counter()
_blocks_lock = threading.Lock()
_STREAMS = ("stdout", "stderr", "breakpointhook")


def _is_muted() -> bool:
    return threading.get_ident() in _blocks


class MutedStream:
    """Stand in for a stream, or `sys.breakpointhook`, and drop what muted threads write.

    It may outlive the blocks, where the body or another thread has kept it (a logging
    handler, `contextlib.redirect_stdout`). From then on it passes everything on.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return len(text) if _is_muted() else self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if _is_muted() else self._stream(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def mute_streams() -> Iterator[None]:
    """Silence `print` and `breakpoint` of this thread: what they would show has no data.

    `sys.stdout` belongs to the process, so a stream that takes its place serves all
    threads, and asks at each write which thread is writing. Blocks of several threads
    overlap and end in any order. If each put back what it found on entering, it might put
    back the stand-in of a block that has ended. So there is one stand-in for each stream,
    and the last block to end removes it.
    """
    thread = threading.get_ident()
    with _blocks_lock:
        _blocks[thread] += 1
        for name in _STREAMS:
            stream = getattr(sys, name)
            if not isinstance(stream, MutedStream):
                setattr(sys, name, MutedStream(stream))
    try:
        yield
    finally:
        with _blocks_lock:
            _blocks[thread] -= 1
            if not _blocks[thread]:
                del _blocks[thread]
            for name in _STREAMS:
                stream = getattr(sys, name)
                # Leave a stream that others have put there meanwhile.
                if not _blocks and isinstance(stream, MutedStream):
                    setattr(sys, name, stream._stream)
