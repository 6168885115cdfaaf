"""A limit of the calls that a worker works on at once, so that few finish early instead of many finishing late."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Self


class ConcurrencyLimit:
    """A few slots that calls take one after the other; a call that waits for something releases its slot meanwhile.

    Attributes:
        waiting: Number of calls that wait for a slot now.
    """

    def __init__(self, count: int) -> None:
        self._free = threading.BoundedSemaphore(count)
        self._lock = threading.Lock()
        self.waiting = 0
        # Whether this thread holds a slot: a stage that waits does not know if its caller took one.
        self._thread = threading.local()

    def __enter__(self) -> Self:
        """Waits for a slot and takes it."""
        if not self._free.acquire(blocking=False):
            with self._lock:
                self.waiting += 1
            try:
                self._free.acquire()
            finally:
                with self._lock:
                    self.waiting -= 1
        self._thread.holds = True
        return self

    def __exit__(self, *_: object) -> None:
        """Releases the slot."""
        self._thread.holds = False
        self._free.release()

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Lets other calls go first while the block waits; does nothing in a thread that holds no slot."""
        if not getattr(self._thread, "holds", False):
            yield
            return
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()
