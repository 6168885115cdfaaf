"""Turns: how many calls a worker works on at once, so that few finish early instead of many finishing late."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Self


class ConcurrencyLimit:
    """A few turns that calls take one after the other; who waits for something gives its turn up meanwhile.

    Attributes:
        waiting: Number of calls that wait for a turn now.
    """

    def __init__(self, count: int) -> None:
        self._free = threading.BoundedSemaphore(count)
        self._lock = threading.Lock()
        self.waiting = 0
        self._mine = threading.local()

    def __enter__(self) -> Self:
        """Waits for a turn."""
        if not self._free.acquire(blocking=False):
            with self._lock:
                self.waiting += 1
            try:
                self._free.acquire()
            finally:
                with self._lock:
                    self.waiting -= 1
        self._mine.held = True
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it."""
        self._mine.held = False
        self._free.release()

    @contextlib.contextmanager
    def given_up(self) -> Iterator[None]:
        """Lets others go first while the block waits; nothing happens in a thread that has no turn."""
        if not getattr(self._mine, "held", False):
            yield
            return
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()
