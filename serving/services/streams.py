"""Streams: limits their number, has them wait for a log that is full, and ends them with the worker."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import grpc

from serving.errors import EventLogUnavailable, ResourceExhausted, Unavailable

T = TypeVar("T")
STALL_S = 10.0
"""Longest time that a stream, and so its caller, waits for a log that is full or unreachable."""

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0


class Streams:
    """The streams of one worker; each holds a thread, so they are few."""

    def __init__(self, limit: int) -> None:
        """Begins without streams; `limit` is the most at once."""
        self._limit = limit
        self._open: set[grpc.ServicerContext] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()

    @contextlib.contextmanager
    def entered(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Holds a place for a stream while the block runs.

        Raises:
            ResourceExhausted: There are as many as the limit.
            Unavailable: The worker is about to end.
        """
        with self._lock:
            if self._closing.is_set():
                raise Unavailable("this worker is ending: open the stream again", retry_after_ms=100)
            if len(self._open) >= self._limit:
                raise ResourceExhausted(
                    f"this worker has {self._limit} streams: end one, or retry later", retry_after_ms=1000
                )
            self._open.add(context)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(context)

    def patiently(self, work: Callable[[], T], context: grpc.ServicerContext, stall_s: float = STALL_S) -> T:
        """Repeats work that a full or unreachable log refuses, while the caller waits; the work has to be idempotent.

        Raises:
            ResourceExhausted: The log stays full.
            EventLogUnavailable: The log stays unreachable.
        """
        end, pause = time.monotonic() + stall_s, _FIRST_PAUSE_S
        while True:
            try:
                return work()
            except (ResourceExhausted, EventLogUnavailable):
                if time.monotonic() + pause > end or not context.is_active() or self._closing.wait(pause):
                    raise
                # Short at first, as a log that was full for a moment has room again soon.
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def close(self) -> None:
        """Ends every stream; batches without a response are to be sent again by the caller."""
        self._closing.set()
        with self._lock:
            contexts = list(self._open)
        # Outside the lock, which each stream takes as it ends.
        for context in contexts:
            context.cancel()  # type: ignore[no-untyped-call]
