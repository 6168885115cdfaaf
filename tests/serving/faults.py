"""Faults for the tests of the stores, and the patience to see them pass."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self, TypeVar

from serving.errors import Unavailable
from serving.redis.client import connect
from serving.redis.embedded import RedisServer

T = TypeVar("T")
FULL = bool(os.environ.get("FULL"))
"""Whether tests that have a full size run at it."""

_CLOSING = threading.Lock()
_REST, _LOAD_US = 10_000, 5_000


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


class PatientServer(RedisServer):
    """An embedded server that lets its tests say how it reads its data."""

    def _arguments(self) -> list[str]:
        return [*super()._arguments(), "--enable-debug-command", "local"]


@contextlib.contextmanager
def loading(server: PatientServer) -> Iterator[None]:
    """It reads its data anew, slowly, and answers everything with LOADING meanwhile."""
    rest = [f"rest:{number}" for number in range(_REST)]
    with connect(server.url, 60.0) as client, connect(server.url, 60.0) as reader:
        client.mset(dict.fromkeys(rest, bytes(1024)))
        client.config_set("loading-process-events-interval-bytes", 1024)
        client.config_set("key-load-delay", _LOAD_US)
        thread = threading.Thread(target=reader.execute_command, args=("DEBUG", "RELOAD"))
        thread.start()
        try:
            wait_until(lambda: client.info("persistence")["loading"])
            yield
            assert client.info("persistence")["loading"], "it was over too soon"
        finally:
            client.config_set("key-load-delay", 0)
            thread.join()
            client.delete(*rest)


class Proxy:
    """A port before a server, on which its replies come late, in slices, or not at all.

    Attributes:
        port: Where it listens.
        delay_s: Says, for each piece of a reply, how long it is kept back.
        slice_s: Pause between two bytes of a reply; None where replies are not sliced.
        halved: Whether only half of a reply comes, and then the end of the connection.
    """

    def __init__(self, server: RedisServer, tls: ssl.SSLContext | None = None) -> None:
        """Takes a server, which need not run yet, and what makes clients speak TLS."""
        self.delay_s: Callable[[], float] = lambda: 0.0
        self.slice_s: float | None = None
        self.halved = False
        self._server, self._tls = server, tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._cut = False
        self._ends: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._reset()
        for thread in self._threads:
            thread.join(10)

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Resets every connection, and each new one."""
        self._cut = True
        self._reset()
        try:
            yield
        finally:
            self._cut = False

    def _reset(self) -> None:
        for end in list(self._ends):
            with contextlib.suppress(OSError):
                if end.family == socket.AF_INET:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            behind = socket.socket(socket.AF_UNIX)
            try:
                if self._cut:
                    raise OSError("cut")
                behind.connect(str(self._server._socket))
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._tls:
                    client = self._tls.wrap_socket(client, server_side=True)
            except OSError:  # the server is down, or the client does not trust us
                behind.close()
                client.close()
                continue
            self._ends |= {client, behind}
            alive = [2]  # directions; who ends the second one closes both
            for source, sink, pump in ((client, behind, self._requests), (behind, client, self._replies)):
                thread = threading.Thread(target=self._pump, args=(source, sink, pump, alive), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(
        self,
        source: socket.socket,
        sink: socket.socket,
        pump: Callable[[socket.socket, bytes], None],
        alive: list[int],
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                pump(sink, data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with _CLOSING:
            alive[0] -= 1
            if not alive[0]:
                self._ends -= {source, sink}
                source.close()
                sink.close()

    def _requests(self, sink: socket.socket, data: bytes) -> None:
        sink.sendall(data)

    def _replies(self, sink: socket.socket, data: bytes) -> None:
        if delay := self.delay_s():
            time.sleep(delay)
        if self.halved:
            sink.sendall(data[: len(data) // 2])
            raise OSError("cut")
        if self.slice_s is None:
            sink.sendall(data)
            return
        for byte in data:
            sink.sendall(bytes((byte,)))
            if self.slice_s:
                time.sleep(self.slice_s)
