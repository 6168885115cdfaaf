"""Faults for the tests of the stores, and the patience to see them pass."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from serving.errors import Unavailable
from serving.redis_server import RedisServer

T = TypeVar("T")


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Waits for something to become true; a store that is away is not there yet."""
    deadline = time.monotonic() + seconds
    while not insist(condition, seconds):
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.01)


def insist(work: Callable[[], T], seconds: float = 20.0) -> T:
    """Repeats `work` until the store it needs is there."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return work()
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def kill(server: RedisServer) -> None:
    """SIGKILL, as soon as it runs."""
    wait_until(lambda: server.pid)
    if pid := server.pid:  # 0 would be this very process group
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def frozen(server: RedisServer) -> Iterator[None]:
    """SIGSTOP for a while: it neither answers nor closes a connection."""
    pid = server.pid
    assert pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
