"""Threads that do the same work until their block ends, as the callers and writers of the proofs do."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Self


class WorkerThreads(ABC):
    """Threads that run `work` from the beginning of a block to its end.

    Attributes:
        lock: For the counters that the threads share.
        stopping: Set once the threads are to end.
    """

    def __init__(self, count: int) -> None:
        """Takes the number of threads."""
        self.lock, self.stopping = threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=self.work, args=(number,)) for number in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Lets the threads end, and waits for them."""
        self.stopping.set()
        for thread in self._threads:
            thread.join()

    @abstractmethod
    def work(self, number: int) -> None:
        """Works until `stopping` is set; `number` tells the threads apart."""
