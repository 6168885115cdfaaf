"""The connections of a client: several, to several workers, of which one stands while another one is made.

A service ends its connections from time to time so that they spread, and all of them when it stops. The kernel picks
the worker of a new connection by chance. So each connection asks, when it stands, which worker it has reached, and
where two have reached one worker though there are more, another one is tried in its place. A call takes a connection
that stands, where there is one; it never waits for one that is being made while another is ready.
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

ATTEMPTS = 6
"""Connections that are tried for one that reaches another worker: of two workers, one of 64 clients ends with one."""

STUCK_S = 0.05
"""Time at least that a call gives a connection that does not stand yet before it tries another one."""

LONGEST_STUCK_S = 1.0
"""The most of it: after a second the kernel asks again for a connection that was not answered."""

_ASK_EVERY_S = 5.0
"""Pause between two questions which worker a connection that is in use has reached: it may have been made again."""

_PROBE_S = 10.0
_STANDS = 2
"""gRPC's number of the state READY."""


class Connection(Generic[T]):
    """A channel with its stubs, and what is known of it.

    Attributes:
        stubs: What is called.
    """

    def __init__(self, channel: grpc.Channel, stubs: T, place: int, attempts: int) -> None:
        """Takes the channel, its place among the client's, and how often another worker may still be looked for."""
        self.channel, self.stubs, self.place, self.attempts = channel, stubs, place, attempts
        self.worker = ""
        self.ask_at = 0.0
        self.asked = self.retired = False
        self.calls = 0

    def stands(self) -> bool:
        """Returns True if a call needs not wait for the connection.

        gRPC tells that in public only through a thread per channel, so this asks what that thread asks.
        """
        inner: Any = getattr(self.channel, "_channel", None)
        check = getattr(inner, "check_connectivity_state", None)
        if check is None:
            return True
        try:
            return bool(check(False) == _STANDS)
        except ValueError:  # closed
            return False

    def attempt_s(self, left_s: float) -> float:
        """Returns the time that a call may take on it, in seconds: little where it does not stand yet."""
        return left_s if self.stands() else min(left_s, max(STUCK_S, min(left_s / 4, LONGEST_STUCK_S)))


class Connections(Generic[T]):
    """A few places, each with a connection; any number of threads may call."""

    def __init__(
        self, open_channel: Callable[[int], grpc.Channel], stubs: Callable[[grpc.Channel], T], count: int
    ) -> None:
        """Makes the channels; they connect when they are used.

        Args:
            open_channel: Makes a channel of its own for each number: those with equal arguments share one connection.
            stubs: Makes what is called on it.
            count: Number of connections.
        """
        self._open, self._stubs = open_channel, stubs
        self._numbers, self._turns = itertools.count(), itertools.count()
        # gRPC calls back in its own threads, also while one of the caller's opens or closes a channel.
        self._lock = threading.RLock()
        self._settled = threading.Condition(self._lock)
        self._closed = False
        self._tried: dict[int, Connection[T]] = {}
        self._places = [self._made(place, ATTEMPTS) for place in range(count)]

    def take(self, avoid: Connection[T] | None = None) -> Connection[T]:
        """Takes the next connection for a call, one that stands before all others; give it back with `done`.

        Args:
            avoid: The one that failed a moment ago: another is taken where one stands.
        """
        now, turn = time.monotonic(), next(self._turns)
        with self._lock:
            count = len(self._places)
            ordered = [self._places[(turn + step) % count] for step in range(count)]
            standing = [connection for connection in ordered if self._look(connection, now)]
            usable = [connection for connection in standing or ordered if connection is not avoid]
            chosen = (usable or standing or ordered)[0]
            chosen.calls += 1
            return chosen

    def done(self, connection: Connection[T]) -> None:
        """Gives a connection back."""
        with self._lock:
            connection.calls -= 1
            over = connection.retired and not connection.calls
        if over:
            connection.channel.close()

    def stuck(self, connection: Connection[T]) -> None:
        """Tries another one in the place of a connection that does not come to stand; the first of them wins."""
        with self._lock:
            if self._closed or connection.retired or connection.stands():
                return
            if before := self._tried.get(connection.place):
                if before.stands():
                    return
                self._retire(before)
            self._try(connection.place, connection.attempts)

    def wait_ready(self, timeout_s: float) -> None:
        """Waits until every connection stands and no other worker is looked for.

        Raises:
            grpc.FutureTimeoutError: The time is over.
        """
        end = time.monotonic() + timeout_s
        with self._settled:
            while not self._stand():
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

    def _stand(self) -> bool:
        return not self._tried and all(connection.worker and connection.stands() for connection in self._places)

    def _made(self, place: int, attempts: int) -> Connection[T]:
        channel = self._open(next(self._numbers))
        return Connection(channel, self._stubs(channel), place, attempts)

    def _try(self, place: int, attempts: int) -> None:
        self._tried[place] = connection = self._made(place, attempts)
        self._ask(connection)

    def _look(self, connection: Connection[T], now: float) -> bool:
        """Returns True if a connection stands; has one that does not made, and one of which little is known asked."""
        stands = connection.stands()
        if not stands:
            connection.worker, connection.attempts = "", ATTEMPTS
        if not stands or now >= connection.ask_at:
            self._ask(connection)
        return stands

    def _ask(self, connection: Connection[T]) -> None:
        """Asks a connection, and so makes it, which worker it has reached."""
        if connection.asked or self._closed:
            return
        connection.asked = True
        connection.ask_at = time.monotonic() + _ASK_EVERY_S
        check = health_pb2_grpc.HealthStub(connection.channel).Check
        answer: Any = check.future(health_pb2.HealthCheckRequest(), timeout=_PROBE_S, wait_for_ready=True)
        answer.add_done_callback(partial(self._answered, connection))

    def _answered(self, connection: Connection[T], answer: Any) -> None:
        metadata = {} if answer.cancelled() else dict(answer.initial_metadata() or ())
        with self._lock:
            connection.asked = False
            if self._closed or connection.retired:
                return
            if not connection.stands():
                if self._tried.get(connection.place) is connection:
                    self._retire(self._tried.pop(connection.place))
                return
            worker = str(metadata.get("x-worker", "")) or "unknown"
            if worker != connection.worker and connection.worker:
                connection.attempts = ATTEMPTS
            connection.worker = worker
            count = str(metadata.get("x-workers", ""))
            self._settle(connection, int(count) if count.isdecimal() else 1)
            self._settled.notify_all()

    def _settle(self, connection: Connection[T], workers: int) -> None:
        """Decides which of two connections keeps a place, and whether another one is tried."""
        place, tried = connection.place, self._tried.get(connection.place)
        current = self._places[place]
        others = {other.worker for other in self._places if other.place != place and other.worker}
        better = connection.worker not in others
        if connection is tried:
            del self._tried[place]
            if better or not current.stands():
                self._places[place] = connection
                self._retire(current)
            else:
                self._retire(connection)
        elif tried is not None:  # it stands after all
            self._retire(self._tried.pop(place))
        if not better and len(others) < workers and connection.attempts > 0:
            self._places[place].attempts = connection.attempts - 1
            self._try(place, connection.attempts - 1)

    def _retire(self, connection: Connection[T]) -> None:
        """Closes a connection as soon as no call is on it."""
        connection.retired = True
        if not connection.calls:
            connection.channel.close()
