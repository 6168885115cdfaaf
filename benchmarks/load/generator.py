"""The generator: one thread that sends calls at their moments and takes their answers, over several connections.

A window is open: calls start at the moments of its plan whether or not earlier ones have come back, and each latency
counts from the moment its call was meant to start. A closed loop would wait for a slow server and so hide its slowness
(Tene, "How NOT to measure latency", 2013). Everything that needs time (drawing, serialising, parsing) happens before or
after a window, because the generator and the service share the machine.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import select
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Self

from benchmarks.load.hpack import decode
from benchmarks.load.window import OPEN, CallPlan, Window, empty_window
from benchmarks.load.wire import (
    DEADLINE_EXCEEDED,
    OK,
    STATUS,
    UNAVAILABLE,
    Call,
    Connection,
    ConnectionClosed,
    call_head,
)
from benchmarks.report import BenchmarkError

CONNECTIONS = 16
_HEALTH = "/grpc.health.v1.Health/Check"
_TRIES = 16
"""Connections that are opened at most for each one that is kept, until the workers have equally many."""
_AT_ONCE = 16
"""Calls that are sent before answers are read again."""
_HOPELESS_S = 2.0
"""A window ends early when as many calls are open as arrive in this time."""
_RECONNECT_S = 0.5


class Generator:
    """Connections to a service, and the calls on them.

    Attributes:
        target: Address of the service.
        workers: Number of connections to each worker of the service, in no order; empty if it names no workers.
    """

    def __init__(self, target: str, connections: int = CONNECTIONS, token: str = "") -> None:
        """Opens the connections, equally many to each worker where the service tells them apart.

        Raises:
            ConnectionClosed: No service answers at the target.
        """
        self.target = target
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._finished: list[tuple[int, int, bytes, bytes]] = []
        self._keys = itertools.count(1 << 40)
        self._connections: list[Connection] = []
        self._orphaned: list[Call] = []
        self.workers: list[int] = []
        self._connect(connections)
        self._sockets = {connection.socket: connection for connection in self._connections}
        self._turn = itertools.cycle(range(connections))

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the connections."""
        for connection in self._sockets.values():
            connection.close()

    def head(self, path: str, timeout_s: float, metadata: Sequence[tuple[str, str]] = ()) -> bytes:
        """Returns the header block of the calls of a method."""
        return call_head(path, self.target, timeout_s, (*self._metadata, *metadata))

    def call(self, path: str, message: bytes, timeout_s: float = 10.0, *, connection: int | None = None) -> bytes:
        """Makes one call and waits for its answer; each on the next connection unless one is named.

        Raises:
            CallFailed: The service answers with an error, or not in time.
        """
        # Not in the generator's own loop: nothing else is in flight while a single call is made.
        at = next(self._turn) if connection is None else connection
        status, body, block = self._single(self._usable(at), self.head(path, timeout_s), message, timeout_s)
        if status != OK:
            details = decode(block).get("grpc-message", "") if block else ""
            raise CallFailed(path, STATUS[status], details)
        return body

    def open_loop(self, plan: CallPlan, *, endure: bool = False) -> Window:
        """Sends the calls of a plan at their moments; returns their outcome.

        Args:
            plan: The calls.
            endure: Goes on to the end even if the service falls hopelessly behind.
        """
        window = empty_window(plan)
        with _undisturbed():
            _Loop(self, window).run(endure)
        return window

    def closed_loop(self, plan: CallPlan, callers: int, seconds: float) -> Window:
        """Keeps `callers` calls open for some seconds, over and over those of a plan; moments are not looked at.

        Latencies count from the sending. The window has the calls that were made, at most those of the plan.
        """
        window = empty_window(plan)
        with _undisturbed():
            _Loop(self, window).keep_full(callers, seconds)
        return window

    def _single(
        self, connection: Connection, head: bytes, message: bytes, timeout_s: float
    ) -> tuple[int, bytes, bytes]:
        key, end = next(self._keys), time.perf_counter() + timeout_s
        connection.call(head, message, key)
        while (wait := end - time.perf_counter()) > 0:
            self._poll(wait, {connection.socket: connection})
            for finished, status, body, block in self._finished:
                if finished == key:
                    self._finished.clear()
                    return status, body, block
            self._finished.clear()
            if connection.draining:
                return UNAVAILABLE, b"", b""
        connection.cancel(key)
        return DEADLINE_EXCEEDED, b"", b""

    def _poll(self, wait: float, sockets: dict[socket.socket, Connection]) -> None:
        """Waits for at most `wait` seconds until a connection has something to read, and reads it."""
        writing = [sock for sock, connection in sockets.items() if connection.unwritten]
        # `select` counts its timeout in microseconds; epoll rounds up to a millisecond, which would be latency.
        readable, writable, _ = select.select(sockets, writing, [], max(wait, 0.0))
        for sock in writable:
            sockets[sock].flush()
        for sock in readable:
            connection = sockets[sock]
            connection.receive()
            if connection.orphans:
                self._orphaned += connection.orphans
                connection.orphans = []
            if connection.closed:
                sockets.pop(sock)

    def _finish(self, key: int, status: int, body: bytes, block: bytes) -> None:
        self._finished.append((key, status, body, block))

    def _usable(self, at: int) -> Connection:
        """Returns a connection by its place; one that the service has ended is replaced.

        Raises:
            ConnectionClosed: The service takes no new connection.
        """
        connection = self._connections[at]
        if connection.draining:
            # Its open calls are answered all the same: it leaves `_sockets` when the service closes it.
            self._connections[at] = connection = Connection(self.target, self._finish, _RECONNECT_S)
            self._sockets[connection.socket] = connection
        return connection

    def _connect(self, count: int) -> None:
        kept: dict[str, list[Connection]] = {}
        try:
            # The kernel gives a connection to any worker: 16 may all reach one of two.
            for _ in range(count * _TRIES):
                connection = Connection(self.target, self._finish)
                worker, workers = self._worker_of(connection)
                share = -(-count // workers)
                if len(kept.setdefault(worker, [])) < share:
                    kept[worker].append(connection)
                else:
                    connection.close()
                if sum(map(len, kept.values())) >= count:
                    break
        except BenchmarkError:
            for connection in itertools.chain(*kept.values()):
                connection.close()
            raise
        # In turn over the workers, so that calls in turn over the connections are so, too.
        in_turn = itertools.chain(*itertools.zip_longest(*kept.values()))
        self._connections = [connection for connection in in_turn if connection]
        while len(self._connections) < count:  # a worker that no connection reaches has none
            self._connections.append(Connection(self.target, self._finish))
        self.workers = [] if set(kept) == {""} else sorted(map(len, kept.values()))

    def _worker_of(self, connection: Connection) -> tuple[str, int]:
        """Returns the name of the worker that a connection reaches, and how many there are; "" and 1 if not told."""
        connection.keep_headers = True
        status, _, _ = self._single(connection, self.head(_HEALTH, 10.0), b"", 10.0)
        connection.keep_headers = False
        if status in (UNAVAILABLE, DEADLINE_EXCEEDED):
            raise BenchmarkError(f"the service at {self.target} does not answer a health check: see its log")
        headers = decode(connection.headers) if connection.headers else {}
        count = headers.get("x-workers", "1")
        return headers.get("x-worker", ""), max(1, int(count)) if count.isdigit() else 1


class CallFailed(BenchmarkError):
    """A call that the measurement depends on was answered with an error.

    Attributes:
        status: Name of the gRPC status.
    """

    def __init__(self, path: str, status: str, details: str) -> None:
        """Takes the method's path, the name of the status and the service's words."""
        super().__init__(f"{path.rpartition('/')[2]} was answered with {status}: {details or 'without a reason'}")
        self.status = status


class _Loop:
    """The loop of one window: what is sent, what is open, what is past its deadline."""

    def __init__(self, generator: Generator, window: Window) -> None:
        self._generator, self._window = generator, window
        self._finished = generator._finished
        # Calls in the order of their deadlines: all have the same timeout, from the sending.
        self._deadlines: deque[tuple[float, int, Connection]] = deque()
        self._open: dict[int, float] = {}
        self._sent = 0

    def run(self, endure: bool) -> None:
        """Sends every call at its moment, and waits for the answers."""
        window, begun = self._window, time.perf_counter() + 0.01
        moments = (window.plan.moments + begun).tolist()
        hopeless = max(_HOPELESS_S * window.plan.rate, 50.0)
        count, busy = len(moments), time.process_time()
        while self._sent < count or self._open:
            now = time.perf_counter()
            for _ in range(_AT_ONCE):
                if self._sent >= count or moments[self._sent] > now:
                    break
                self._send(moments[self._sent], now)
                now = time.perf_counter()
            if len(self._open) > hopeless and self._sent < count and not endure:
                window.gave_up, count = True, self._sent
            self._wait(moments[self._sent] if self._sent < count else now + 0.1)
        window.seconds = time.perf_counter() - begun
        window.busy_s = time.process_time() - busy

    def keep_full(self, callers: int, seconds: float) -> None:
        """Sends the next call whenever one is answered."""
        window, begun, busy = self._window, time.perf_counter(), time.process_time()
        end = begun + seconds
        count = len(window.plan.messages)
        while (now := time.perf_counter()) < end or self._open:
            while self._sent < count and len(self._open) < callers and now < end:
                self._send(now, now)
            if self._sent >= count and not self._open:
                break
            self._wait(now + 0.1)
        window.seconds = time.perf_counter() - begun
        window.busy_s = time.process_time() - busy

    def _send(self, intended: float, now: float) -> None:
        key, self._sent = self._sent, self._sent + 1
        plan = self._window.plan
        self._window.lag_s[key], self._window.status[key] = now - intended, OPEN
        self._open[key] = intended
        try:
            connection = self._generator._usable(next(self._generator._turn))
        except ConnectionClosed:  # a service that is not there has failed this call
            self._finished.append((key, UNAVAILABLE, b"", b""))
            return
        self._deadlines.append((now + plan.timeout_s, key, connection))
        connection.call(plan.heads[key], plan.messages[key], key)

    def _wait(self, until: float) -> None:
        """Reads until the next call is due, a deadline has passed, or something has come."""
        now = time.perf_counter()
        if self._deadlines:
            until = min(until, self._deadlines[0][0])
        self._generator._poll(until - now, self._generator._sockets)
        self._take(time.perf_counter())

    def _take(self, now: float) -> None:
        window = self._window
        for key, status, body, block in self._finished:
            intended = self._open.pop(key, None)
            if intended is None:  # it had passed its deadline
                continue
            window.latency_s[key], window.status[key] = now - intended, status
            if status == OK:
                window.answers[key] = body
            elif block:
                window.blocks[key] = block
        self._finished.clear()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, key, connection = self._deadlines.popleft()
            if (intended := self._open.pop(key, None)) is not None:
                window.latency_s[key], window.status[key] = now - intended, DEADLINE_EXCEEDED
                connection.cancel(key)
        if self._generator._orphaned:
            self._resend()

    def _resend(self) -> None:
        """Sends calls again that a connection which is ending has not looked at, as every client of gRPC does."""
        orphans = list(self._generator._orphaned)
        self._generator._orphaned.clear()
        for head, message, key in orphans:
            if key not in self._open:
                continue
            try:
                self._generator._usable(next(self._generator._turn)).call(head, message, key)
            except ConnectionClosed:
                self._finished.append((key, UNAVAILABLE, b"", b""))


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps the garbage collector out of the block: a pass over a large heap would be latency of the service."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
