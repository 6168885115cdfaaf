"""The sockets of a server: finds those that cause work without calls, and closes them.

HTTP/2 has frames that belong to no call (pings, settings, priorities, headers that never end); gRPC takes all of them
and shows none. So the kernel is asked for the bytes that have come in over each connection.
"""

from __future__ import annotations

import ctypes
import errno
import resource
import socket
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from serving.services.reception.calls import PeerConnection

FREE_BYTES = 256 << 10
"""Bytes a second that a connection may send without a call."""

BROKEN_CALLS = 500
"""Calls a second that a connection may abandon, fail to send or have refused, if it has ten times fewer answers."""

_FIRST_PATIENCE = BROKEN_CALLS / 10
"""The same for a new connection."""

_libc: Any = ctypes.PyDLL(None, use_errno=True)
_INTERNET = (socket.AF_INET, socket.AF_INET6)
_LARGEST_GAP = 128
"""Unused descriptor numbers in a row that end a whole search: the system gives out the lowest number."""

_NEXT_GAP = 8
"""The same between two whole searches, beyond the highest number so far."""

_WHOLE = 10
"""Looks of which one searches all descriptors, as one that was a file may be a connection by now."""

_ADDRESS_BYTES = 128
_TCP_INFO_BYTES = 136
_RECEIVED = struct.Struct("=128xQ")
"""struct tcp_info, of which tcpi_bytes_received is the field at byte 128, of 8 bytes."""


MOST_CONNECTIONS = 2048
"""Most connections of a worker; of more, those end that have no call, and have had none for longest."""


@dataclass(slots=True)
class _Traffic:
    """The traffic of a connection up to one look.

    Attributes:
        received: Bytes that have come.
        taken: Bytes of messages among them.
        calls: Calls begun.
        good: Calls whose answer was read.
        bad: Calls that were abandoned, or too slow.
        open: Calls that are open.
        active: Time of the last call, in seconds; without any, that of the first look at the connection.
        free: Bytes that it may still send without a call.
        patience: Calls that it may still abandon.
    """

    received: int
    taken: int
    calls: int
    good: int
    bad: int
    open: int
    active: float
    free: float = FREE_BYTES
    patience: float = _FIRST_PATIENCE


class Sockets:
    """Looks at the connections of a server; one thread may call it.

    Attributes:
        suspicious: A connection has sent much without a call, or many that were refused, at the last look.
    """

    def __init__(self, port: int, message_bytes: int, most: int = MOST_CONNECTIONS) -> None:
        """Begins without connections.

        Args:
            port: The port that the server listens on.
            message_bytes: Size of its largest message.
            most: Most connections.
        """
        self._port, self._message_bytes, self._most = port, message_bytes, most
        self._traffic: dict[str, _Traffic] = {}
        self._now = 0.0
        self._highest = 0
        self._others: set[int] = set()
        self._looks = 0
        self.suspicious = False

    def abusive(self, connections: Mapping[str, PeerConnection], seconds: float) -> list[str]:
        """Returns the peers that abuse the server, and those beyond the most connections.

        Args:
            connections: The connections with calls, by peer.
            seconds: Time since the last call of this method.
        """
        self._now += seconds
        traffic, before, peers = {}, self._traffic, []
        for _, peer, received in self._open():
            connection = connections.get(peer) or PeerConnection(peer)
            last = before.get(peer) or _Traffic(0, 0, 0, 0, 0, 0, self._now)
            traffic[peer], is_abusive = self._judge(connection, received, last, seconds)
            if is_abusive:
                peers.append(peer)
        self._traffic = traffic
        self.suspicious = any(state.free < FREE_BYTES / 2 or state.patience < 0 for state in traffic.values())
        # Of too many, those that never had a call go first: a client opens a connection to use it.
        if surplus := max(len(traffic) - len(peers) - self._most, 0):
            ending = set(peers)
            idle = [
                peer for peer in traffic if peer not in ending and not (peer in connections and connections[peer].calls)
            ]
            peers += sorted(idle, key=lambda peer: (traffic[peer].calls > 0, traffic[peer].active))[:surplus]
        return peers

    def _judge(
        self, connection: PeerConnection, received: int, last: _Traffic, seconds: float
    ) -> tuple[_Traffic, bool]:
        """Returns the traffic of a connection by now, and True if it has used up its allowance without a call."""
        now = _Traffic(
            received, connection.taken, connection.entered, connection.good, connection.bad, len(connection.calls),
            last.active,
            # Allowances refill with time up to one second's worth, as a token bucket does.
            min(FREE_BYTES, last.free + FREE_BYTES * seconds),
            min(BROKEN_CALLS, last.patience + BROKEN_CALLS * seconds),
        )  # fmt: skip
        calls = now.calls - last.calls + last.open
        if calls or now.open:
            now.active = self._now
        # Allowed: a message per call, as it may be incomplete, and twice the messages, for the frames around them.
        now.free -= max(received - last.received - calls * self._message_bytes - 2 * (now.taken - last.taken), 0)
        broken, answered = now.bad - last.bad, now.good - last.good
        # A client that cancels a few of many calls, as hedging does, is no abuser.
        if broken > 10 * answered:
            now.patience -= broken
        return now, now.free < 0 or now.patience < 0

    def known(self, peer: str) -> bool:
        """Returns True if a peer was connected at the last look."""
        return peer in self._traffic

    def hang_up(self, peers: Iterable[str]) -> None:
        """Closes connections; their calls end with them."""
        closing = set(peers)
        for descriptor, peer, _ in self._open() if closing else ():
            if peer not in closing:
                continue
            # gRPC may close its descriptor at any moment, and the number may be another socket's by now.
            duplicate = _libc.dup(descriptor)
            if duplicate >= 0 and _connected(duplicate) == peer:
                _libc.shutdown(duplicate, socket.SHUT_RDWR)
            if duplicate >= 0:
                _libc.close(duplicate)

    def _open(self) -> list[tuple[int, str, int]]:
        """Returns descriptor, peer and bytes received of each connection of the server.

        Python's own system calls release the interpreter's lock and queue for it afterwards: some milliseconds each on
        a busy server, and with some hundred calls a second. Those of `_libc` keep it, and each takes a microsecond.
        """
        # Numbers that were in use for something else are asked seldom: most of a worker's descriptors are such.
        if self._looks % _WHOLE == 0:
            self._others = set()
        most_gap = _NEXT_GAP if self._others else _LARGEST_GAP
        self._looks += 1
        connections, descriptor, gap, highest = [], -1, 0, 0
        info = ctypes.create_string_buffer(_TCP_INFO_BYTES)
        while gap < most_gap or descriptor < self._highest:
            descriptor, gap = descriptor + 1, gap + 1
            if descriptor in self._others:
                gap, highest = 0, descriptor
                continue
            address = _address(_libc.getsockname, descriptor)
            if not address:
                if ctypes.get_errno() == errno.ENOTSOCK:
                    self._others.add(descriptor)
                    gap = 0
                continue
            gap, highest = 0, descriptor
            if _family(address) not in _INTERNET or int.from_bytes(address[2:4]) != self._port:
                self._others.add(descriptor)
                continue
            peer = _connected(descriptor)
            if not peer:  # it listens, or has ended
                continue
            size = ctypes.c_uint(_TCP_INFO_BYTES)
            has_info = not _libc.getsockopt(descriptor, socket.IPPROTO_TCP, socket.TCP_INFO, info, ctypes.byref(size))
            received = _RECEIVED.unpack(info.raw)[0] if has_info and size.value >= _TCP_INFO_BYTES else 0
            connections.append((descriptor, peer, received))
        self._highest = highest
        return connections


def connection_limits() -> tuple[int, int]:
    """Returns the most connections that a worker keeps, and that it accepts: files and Redis need descriptors too."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    descriptors = MOST_CONNECTIONS * 4 if descriptors == resource.RLIM_INFINITY else descriptors
    kept = max(min(MOST_CONNECTIONS, descriptors // 2), 1)
    return kept, max(min(MOST_CONNECTIONS * 2, descriptors * 3 // 4), kept)


def _address(call: Any, descriptor: int) -> bytes:
    """Returns the struct sockaddr that a system call gives for a descriptor, b"" if it fails."""
    address, size = ctypes.create_string_buffer(_ADDRESS_BYTES), ctypes.c_uint(_ADDRESS_BYTES)
    return b"" if call(descriptor, address, ctypes.byref(size)) else address.raw


def _family(address: bytes) -> int:
    return int.from_bytes(address[:2], sys.byteorder)


def _connected(descriptor: int) -> str:
    """Returns the peer of a connection as gRPC writes it, "" if there is none."""
    address = _address(_libc.getpeername, descriptor)
    if not address:
        return ""
    family, port = _family(address), int.from_bytes(address[2:4])
    host = socket.inet_ntop(family, address[4:8] if family == socket.AF_INET else address[8:24])
    # A socket of both families shows IPv4 peers as ::ffff:1.2.3.4.
    if family == socket.AF_INET or host.startswith("::ffff:"):
        return f"ipv4:{host.removeprefix('::ffff:')}:{port}"
    return f"ipv6:%5B{host}%5D:{port}"
