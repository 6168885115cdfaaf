"""A connection that carries gRPC calls as bytes: HTTP/2 without TLS, on a socket that never blocks.

gRPC's own Python client takes 150 to 250 microseconds of a core for a call, as much as some of the services that it is
to measure, from the same cores. This connection takes about a tenth: headers are written once per method, messages come
serialised, answers stay bytes.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.load import hpack
from benchmarks.report import BenchmarkError

STATUS = """
OK CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS PERMISSION_DENIED RESOURCE_EXHAUSTED
FAILED_PRECONDITION ABORTED OUT_OF_RANGE UNIMPLEMENTED INTERNAL UNAVAILABLE DATA_LOSS UNAUTHENTICATED
""".split()  # noqa: SIM905 - a list would take a line for each word
"""Names of the statuses of gRPC, by number."""

OK, UNKNOWN, DEADLINE_EXCEEDED, UNAVAILABLE = (
    STATUS.index(name) for name in ("OK", "UNKNOWN", "DEADLINE_EXCEEDED", "UNAVAILABLE")
)
# The meaning of a reset of a stream to the caller, by gRPC's table of HTTP/2 error codes; INTERNAL else.
_RESET = {7: UNAVAILABLE, 8: STATUS.index("CANCELLED"), 11: STATUS.index("RESOURCE_EXHAUSTED")}
_INTERNAL = STATUS.index("INTERNAL")

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _PRIORITY = 1, 1, 4, 8, 32
_MOST = (1 << 31) - 1
_TOP_UP = 1 << 30
_READ_BYTES = 1 << 18
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_TABLE_SIZE, _ENABLE_PUSH, _MAX_STREAMS, _INITIAL_WINDOW, _MAX_FRAME = 1, 2, 3, 4, 5

Finish = Callable[[int, int, bytes, bytes], None]
"""Takes the key of a call, its status, its answer without the prefix, and the block of its last headers."""


Call = tuple[bytes, bytes, int]
"""A header block, a message, and the key of the call."""


@dataclass(slots=True)
class _Stream:
    """An open call.

    Attributes:
        key: The caller's number of it.
        head: Its header block.
        message: Its message, to be sent again where the server has not looked at it.
        window: Bytes that the server takes of it now.
        unsent: The part of the message with its prefix that is not sent yet.
        parts: The answer as it came, with its prefix.
    """

    key: int
    head: bytes
    message: bytes
    window: int
    unsent: bytes = b""
    parts: list[bytes] = field(default_factory=list)


class ConnectionClosed(BenchmarkError):
    """The server has ended the connection, or does not speak HTTP/2."""


def call_head(path: str, authority: str, timeout_s: float, metadata: Sequence[tuple[str, str]] = ()) -> bytes:
    """Returns the header block of calls of one method."""
    return hpack.encode(
        [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("grpc-timeout", f"{max(int(timeout_s * 1000), 1)}m"),
            *metadata,
        ]
    )


def status_of(block: bytes) -> int:
    """Returns the status of a call by the block of its last headers."""
    headers = hpack.decode(block)
    code = headers.get("grpc-status", "")
    if code.isdigit() and int(code) < len(STATUS):
        return int(code)
    # A proxy that has no service behind it answers in plain HTTP.
    return UNAVAILABLE if headers.get(":status") in ("502", "503", "504") else UNKNOWN


class Connection:
    """One connection, and the calls on it.

    Attributes:
        socket: The socket, for `select`.
        closed: True once the socket is closed.
        draining: True once the server has asked for no more calls on it, or has closed it.
        orphans: Calls that the server has not looked at before it went; each (head, message, key) may be sent again.
        unwritten: Bytes that the kernel has not taken yet.
        headers: Initial headers of the last answer, if `keep_headers` is set.
    """

    def __init__(self, target: str, finish: Finish, timeout_s: float = 10.0) -> None:
        """Connects.

        Raises:
            ConnectionClosed: No service listens at the target.
        """
        self.socket = _connect(target, timeout_s)
        self.draining = self.closed = False
        self.orphans: list[Call] = []
        self.keep_headers, self.headers = False, b""
        self._finish = finish
        self._streams: dict[int, _Stream] = {}
        self._queue: deque[Call] = deque()
        self._blocked: list[int] = []
        self._next = 1
        self._in, self.unwritten = b"", bytearray()
        self._block: tuple[int, int, bytearray] | None = None
        self._window, self._peer_window, self._max_frame, self._max_streams = 65535, 65535, 16384, _MOST
        self._received = 0
        self._statuses: dict[bytes, int] = {}
        values = ((_TABLE_SIZE, 0), (_ENABLE_PUSH, 0), (_INITIAL_WINDOW, _MOST))
        settings = b"".join(name.to_bytes(2, "big") + value.to_bytes(4, "big") for name, value in values)
        window = (_MOST - 65535).to_bytes(4, "big")
        self._write(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW_UPDATE, 0, 0, window))

    @property
    def open_calls(self) -> int:
        """The number of calls that are not answered yet, or wait for a place."""
        return len(self._streams) + len(self._queue)

    def call(self, head: bytes, message: bytes, key: int) -> None:
        """Sends a call, or lets it wait until the server takes one more on this connection."""
        if self._queue or len(self._streams) >= self._max_streams:
            self._queue.append((head, message, key))
        else:
            self._open(head, message, key)

    def cancel(self, key: int) -> None:
        """Ends a call whose answer is not wanted any more; its `finish` is not called."""
        for number, stream in self._streams.items():
            if stream.key == key:
                self._write(_frame(_RST_STREAM, 0, number, (8).to_bytes(4, "big")))
                self._forget(number)
                return
        self._queue = deque(call for call in self._queue if call[2] != key)

    def receive(self) -> None:
        """Reads and handles all that has come."""
        try:
            data = self.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost(UNAVAILABLE)
            return
        if self._in:
            data = self._in + data
        at, size = 0, len(data)
        while size - at >= 9:
            end = at + 9 + int.from_bytes(data[at : at + 3], "big")
            if end > size:
                break
            number = int.from_bytes(data[at + 5 : at + 9], "big") & _MOST
            self._handle(data[at + 3], data[at + 4], number, data[at + 9 : end])
            at = end
        self._in = data[at:]

    def flush(self) -> None:
        """Writes what the kernel did not take before."""
        waiting, self.unwritten = bytes(self.unwritten), bytearray()
        self._write(waiting)

    def close(self) -> None:
        """Closes the connection; calls that are open have no answer."""
        self.draining = self.closed = True
        self.socket.close()

    def _open(self, head: bytes, message: bytes, key: int) -> None:
        number, self._next = self._next, self._next + 2
        stream = self._streams[number] = _Stream(key, head, message, self._peer_window)
        data = b"\0" + len(message).to_bytes(4, "big") + message
        opening = _frame(_HEADERS, _END_HEADERS, number, head)
        if len(data) <= min(self._window, stream.window, self._max_frame):
            self._window -= len(data)
            self._write(opening + _frame(_DATA, _END_STREAM, number, data))
            return
        self._write(opening)
        stream.unsent = data
        self._blocked.append(number)
        self._pump()

    def _pump(self) -> None:
        """Sends as much of the waiting messages as the server's windows allow."""
        still = []
        for number in self._blocked:
            stream = self._streams.get(number)
            while stream and stream.unsent and (room := min(self._window, stream.window, self._max_frame)) > 0:
                piece, stream.unsent = stream.unsent[:room], stream.unsent[room:]
                self._window -= len(piece)
                stream.window -= len(piece)
                self._write(_frame(_DATA, 0 if stream.unsent else _END_STREAM, number, piece))
            if stream and stream.unsent:
                still.append(number)
        self._blocked = still

    def _write(self, data: bytes) -> None:
        if self.unwritten:
            self.unwritten += data
            return
        try:
            count = self.socket.send(data)
        except BlockingIOError:
            count = 0
        except OSError:
            # The reader finds out what became of the connection, and ends its calls.
            count = len(data)
        if count < len(data):
            self.unwritten += data[count:]

    def _handle(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == _DATA:
            self._data(flags, number, payload)
        elif kind == _HEADERS:
            if flags & _PADDED:
                payload = payload[1 : len(payload) - payload[0]]
            if flags & _PRIORITY:
                payload = payload[5:]
            self._headers(flags, number, payload)
        elif kind == _CONTINUATION and self._block is not None:
            number, first, block = self._block
            block += payload
            self._headers(flags & _END_HEADERS | first & _END_STREAM, number, bytes(block))
        elif kind == _RST_STREAM:
            code = int.from_bytes(payload[:4], "big")
            self._end(number, _RESET.get(code, _INTERNAL), b"")
        elif kind == _WINDOW_UPDATE:
            self._more_room(number, int.from_bytes(payload[:4], "big") & _MOST)
        elif kind == _SETTINGS and not flags & _ACK:
            self._settings(payload)
        elif kind == _PING and not flags & _ACK:
            self._write(_frame(_PING, _ACK, 0, payload))
        elif kind == _GOAWAY:
            self._go_away(int.from_bytes(payload[:4], "big") & _MOST)

    def _data(self, flags: int, number: int, payload: bytes) -> None:
        self._received += len(payload)
        if self._received > _TOP_UP:
            self._write(_frame(_WINDOW_UPDATE, 0, 0, self._received.to_bytes(4, "big")))
            self._received = 0
        if flags & _PADDED:
            payload = payload[1 : len(payload) - payload[0]]
        stream = self._streams.get(number)
        if stream:
            stream.parts.append(payload)
            if flags & _END_STREAM:  # an answer of gRPC ends with headers
                self._end(number, UNKNOWN, b"")

    def _headers(self, flags: int, number: int, block: bytes) -> None:
        if not flags & _END_HEADERS:
            self._block = (number, flags, bytearray(block))
            return
        self._block = None
        if not flags & _END_STREAM:
            if self.keep_headers:
                self.headers = block
            return
        status = self._statuses.get(block)
        if status is None:
            status = status_of(block)
            # Most answers end with the same few blocks.
            if len(self._statuses) < 64:
                self._statuses[block] = status
        self._end(number, status, block)

    def _end(self, number: int, status: int, block: bytes) -> None:
        stream = self._forget(number)
        if stream:
            body = stream.parts[0] if len(stream.parts) == 1 else b"".join(stream.parts)
            self._finish(stream.key, status, body[5:], block)

    def _forget(self, number: int) -> _Stream | None:
        stream = self._streams.pop(number, None)
        while self._queue and not self.draining and len(self._streams) < self._max_streams:
            self._open(*self._queue.popleft())
        return stream

    def _more_room(self, number: int, more: int) -> None:
        if not number:
            self._window += more
        elif number in self._streams:
            self._streams[number].window += more
        if self._blocked:
            self._pump()

    def _settings(self, payload: bytes) -> None:
        for at in range(0, len(payload) - 5, 6):
            name, value = int.from_bytes(payload[at : at + 2], "big"), int.from_bytes(payload[at + 2 : at + 6], "big")
            if name == _MAX_STREAMS:
                self._max_streams = value
            elif name == _MAX_FRAME:
                self._max_frame = value
            elif name == _INITIAL_WINDOW:
                # The new size holds for the streams that are open, too.
                for stream in self._streams.values():
                    stream.window += value - self._peer_window
                self._peer_window = value
        self._write(_frame(_SETTINGS, _ACK, 0, b""))
        self._pump()

    def _go_away(self, last: int) -> None:
        self.draining = True
        unseen = [number for number in self._streams if number > last]
        for number in unseen:
            stream = self._streams.pop(number)
            self.orphans.append((stream.head, stream.message, stream.key))
        self.orphans += self._queue
        self._queue.clear()

    def _lost(self, status: int) -> None:
        streams, queue = list(self._streams.values()), list(self._queue)
        self._streams.clear()
        self._queue.clear()
        for stream in streams:
            self._finish(stream.key, status, b"", b"")
        self.orphans += queue
        self.close()


def _frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    return b"".join((len(payload).to_bytes(3, "big"), bytes((kind, flags)), number.to_bytes(4, "big"), payload))


def _connect(target: str, timeout_s: float) -> socket.socket:
    try:
        if target.startswith("unix:"):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(timeout_s)
            sock.connect(target.removeprefix("unix:").removeprefix("//"))
        else:
            host, _, port = target.rpartition(":")
            sock = socket.create_connection((host.strip("[]"), int(port)), timeout_s)
            # A small frame must not wait for the acknowledgment of the one before.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except (OSError, ValueError) as error:
        raise ConnectionClosed(
            f"no service answers at {target} ({error}): start `penchant serve` there first, or give HOST:PORT"
        ) from None
    sock.setblocking(False)
    return sock
