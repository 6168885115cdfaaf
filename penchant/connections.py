"""The connections of a client: several, to several workers, so that one is ready while another is made.

A service ends its connections from time to time so that they spread, and all of them when it stops. The kernel picks
the worker of a new connection by chance. So each connection asks, once it is ready, which worker it has reached. If two
have reached the same worker though there are more, a replacement is tried for one of them. A call takes a connection
that is ready, if there is one; it never waits for one that is being made while another is ready.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

T = TypeVar("T")

ATTEMPTS = 16
"""Connections tried to reach another worker: with two workers, 1 of some 10,000 clients ends with both on the same."""

STUCK_S = 0.05
"""Least time that a call gives a connection that is not ready before it tries another, in seconds."""

LONGEST_STUCK_S = 1.0
"""Most of that time: after a second the kernel repeats a request to connect that was not answered."""

_ASK_EVERY_S = 5.0
"""Seconds between two questions to a connection in use for its worker: gRPC may have connected it again."""

_PROBE_S = 10.0
_READY = 2
"""gRPC's number of the state READY."""


class WorkerConnection(Generic[T]):
    """A channel to one worker, with its stubs.

    Attributes:
        stubs: Stubs of the services on the channel.
    """

    def __init__(self, channel: grpc.Channel, stubs: T, place: int, attempts: int) -> None:
        """Takes the channel, its place among the client's, and the replacements that may still be tried for it."""
        self.channel, self.stubs, self.place, self.attempts = channel, stubs, place, attempts
        self.worker = ""
        self.ask_at = 0.0
        self.asking = self.retired = False
        self.calls = 0

    def is_ready(self) -> bool:
        """Returns True if a call need not wait for the connection."""
        # The public way costs a thread per channel, so this asks what that thread asks.
        inner: Any = getattr(self.channel, "_channel", None)
        check = getattr(inner, "check_connectivity_state", None)
        if check is None:
            return True
        try:
            return bool(check(False) == _READY)
        except ValueError:  # closed
            return False

    def attempt_s(self, left_s: float) -> float:
        """Returns the time that a call may take on it, in seconds: little if it is not ready yet."""
        return left_s if self.is_ready() else min(left_s, max(STUCK_S, min(left_s / 4, LONGEST_STUCK_S)))


class Connections(Generic[T]):
    """A few places, each with a connection; any number of threads may call."""

    def __init__(
        self, open_channel: Callable[[int], grpc.Channel], stubs: Callable[[grpc.Channel], T], count: int
    ) -> None:
        """Makes the channels; they connect when they are used.

        Args:
            open_channel: Makes a channel of its own for each number: those with equal arguments share one connection.
            stubs: Makes the stubs of a channel.
            count: Number of connections.
        """
        self._open, self._stubs = open_channel, stubs
        self._numbers, self._calls = itertools.count(), itertools.count()
        # Reentrant: gRPC may run a callback in the very thread that opens or closes a channel.
        self._lock = threading.RLock()
        self._settled = threading.Condition(self._lock)
        self._closed = False
        self._tried: dict[int, WorkerConnection[T]] = {}
        self._places = [self._made(place, ATTEMPTS) for place in range(count)]

    def take(self, avoid: WorkerConnection[T] | None = None) -> WorkerConnection[T]:
        """Takes the next connection for a call, a ready one if there is any; give it back with `done`.

        Args:
            avoid: The one that failed a moment ago: another is taken if one is ready.
        """
        now, start = time.monotonic(), next(self._calls)
        with self._lock:
            count = len(self._places)
            ordered = [self._places[(start + step) % count] for step in range(count)]
            ready = [connection for connection in ordered if self._look(connection, now)]
            # A look may bring the answer to an earlier question, which puts another connection in a place.
            standing = [connection for connection in ready or ordered if not connection.retired] or self._places
            usable = [connection for connection in standing if connection is not avoid]
            chosen = (usable or standing)[0]
            chosen.calls += 1
            return chosen

    def done(self, connection: WorkerConnection[T]) -> None:
        """Gives a connection back."""
        with self._lock:
            connection.calls -= 1
            over = connection.retired and not connection.calls
        if over:
            connection.channel.close()

    def stuck(self, connection: WorkerConnection[T]) -> None:
        """Tries a replacement for a connection that does not become ready; the first of the two wins."""
        with self._lock:
            if self._closed or connection.retired or connection.is_ready():
                return
            if replacement := self._tried.get(connection.place):
                if replacement.is_ready():
                    return
                self._retire(replacement)
            self._try(connection.place, connection.attempts)

    def wait_ready(self, timeout_s: float) -> None:
        """Waits until every connection is ready and no replacement is being tried.

        Raises:
            grpc.FutureTimeoutError: The time is over.
        """
        end = time.monotonic() + timeout_s
        with self._settled:
            while not self._all_ready():
                left = end - time.monotonic()
                if left <= 0:
                    raise grpc.FutureTimeoutError
                for connection in self._places:
                    self._ask(connection)
                self._settled.wait(min(left, 1.0))

    def close(self) -> None:
        """Closes the connections."""
        with self._lock:
            self._closed = True
            connections = [*self._places, *self._tried.values()]
            self._tried.clear()
        for connection in connections:
            connection.channel.close()

    def _all_ready(self) -> bool:
        return not self._tried and all(connection.worker and connection.is_ready() for connection in self._places)

    def _made(self, place: int, attempts: int) -> WorkerConnection[T]:
        channel = self._open(next(self._numbers))
        return WorkerConnection(channel, self._stubs(channel), place, attempts)

    def _try(self, place: int, attempts: int) -> None:
        self._tried[place] = connection = self._made(place, attempts)
        self._ask(connection)

    def _look(self, connection: WorkerConnection[T], now: float) -> bool:
        """Returns True if a connection is ready; connects one that is not, and asks for its worker at times."""
        ready = connection.is_ready()
        if not ready:
            connection.worker, connection.attempts = "", ATTEMPTS
        if not ready or now >= connection.ask_at:
            self._ask(connection)
        return ready

    def _ask(self, connection: WorkerConnection[T]) -> None:
        """Asks a connection which worker it has reached; a channel connects when it is first used."""
        if connection.asking or connection.retired or self._closed:
            return
        connection.asking = True
        connection.ask_at = time.monotonic() + _ASK_EVERY_S
        check = health_pb2_grpc.HealthStub(connection.channel).Check
        answer: Any = check.future(health_pb2.HealthCheckRequest(), timeout=_PROBE_S, wait_for_ready=True)
        answer.add_done_callback(partial(self._answered, connection))

    def _answered(self, connection: WorkerConnection[T], answer: Any) -> None:
        metadata = {} if answer.cancelled() else dict(answer.initial_metadata() or ())
        with self._lock:
            connection.asking = False
            if self._closed or connection.retired:
                return
            if not connection.is_ready():
                if self._tried.get(connection.place) is connection:
                    self._retire(self._tried.pop(connection.place))
                return
            worker = str(metadata.get("x-worker", "")) or "unknown"
            # Connected again, so the kernel has picked a worker again.
            if worker != connection.worker and connection.worker:
                connection.attempts = ATTEMPTS
            connection.worker = worker
            count = str(metadata.get("x-workers", ""))
            self._settle(connection, int(count) if count.isdecimal() else 1)
            self._settled.notify_all()

    def _settle(self, connection: WorkerConnection[T], workers: int) -> None:
        """Decides which of two connections keeps a place, and whether a replacement is tried."""
        place, tried = connection.place, self._tried.get(connection.place)
        current = self._places[place]
        workers_elsewhere = {peer.worker for peer in self._places if peer.place != place and peer.worker}
        better = connection.worker not in workers_elsewhere
        if connection is tried:
            del self._tried[place]
            if better or not current.is_ready():
                self._places[place] = connection
                self._retire(current)
            else:
                self._retire(connection)
        elif tried is not None:  # the connection has become ready after all
            self._retire(self._tried.pop(place))
        if not better and len(workers_elsewhere) < workers and connection.attempts > 0:
            self._places[place].attempts = connection.attempts - 1
            self._try(place, connection.attempts - 1)

    def _retire(self, connection: WorkerConnection[T]) -> None:
        """Closes a connection as soon as no call is on it."""
        connection.retired = True
        if not connection.calls:
            connection.channel.close()
