"""The sockets of a server: finds those that cause work without calls, and closes them.

HTTP/2 has frames that belong to no call (pings, settings, priorities, headers that never end); gRPC takes all of them
and shows none. So the kernel is asked for the bytes that have come in over each connection.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from serving.services.reception.calls import ClientConnection

FREE_BYTES = 256 << 10
"""Bytes a second that a connection may send without a call."""

BROKEN_CALLS = 500
"""Calls a second that a connection may abandon, or not finish sending, if it reads hardly any answers."""

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
    patience: float = BROKEN_CALLS


class Sockets:
    """Watches the connections of a server; one thread may call it."""

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

    def abusive(self, connections: Mapping[str, ClientConnection], seconds: float) -> list[str]:
        """Returns the peers that abuse the server, and those beyond the most connections.

        Args:
            connections: The connections with calls, by peer.
            seconds: Time since the last call of this method.
        """
        self._now += seconds
        traffic, before, peers = {}, self._traffic, []
        for _, peer, received in self._open():
            connection = connections.get(peer) or ClientConnection(peer)
            last = before.get(peer) or _Traffic(0, 0, 0, 0, 0, 0, self._now)
            traffic[peer], is_abusive = self._judge(connection, received, last, seconds)
            if is_abusive:
                peers.append(peer)
        self._traffic = traffic
        if surplus := max(len(traffic) - len(peers) - self._most, 0):
            ending = set(peers)
            idle = [
                peer for peer in traffic if peer not in ending and not (peer in connections and connections[peer].calls)
            ]
            peers += sorted(idle, key=lambda peer: (traffic[peer].calls > 0, traffic[peer].active))[:surplus]
        return peers

    def _judge(
        self, connection: ClientConnection, received: int, last: _Traffic, seconds: float
    ) -> tuple[_Traffic, bool]:
        """Returns the traffic of a connection by now, and True if it has used up its allowance without a call."""
        now = _Traffic(
            received, connection.taken, connection.entered, connection.good, connection.bad, len(connection.calls),
            last.active,
            min(FREE_BYTES, last.free + FREE_BYTES * seconds),
            min(BROKEN_CALLS, last.patience + BROKEN_CALLS * seconds),
        )  # fmt: skip
        calls = now.calls - last.calls + last.open
        if calls or now.open:
            now.active = self._now
        # Allowed: a message per call, as it may be incomplete, and twice the messages, for the frames around them.
        now.free -= max(received - last.received - calls * self._message_bytes - 2 * (now.taken - last.taken), 0)
        broken, answered = now.bad - last.bad, now.good - last.good
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
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                # The descriptor may be that of another socket by now.
                if _name(connection) == peer:
                    connection.shutdown(socket.SHUT_RDWR)

    def _open(self) -> list[tuple[int, str, int]]:
        """Returns descriptor, peer and bytes received of each connection of the server."""
        connections = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                    continue
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6):
                        address = connection.getsockname()
                        if address[1] == self._port:
                            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
                            received = _RECEIVED.unpack(info)[0] if len(info) >= _TCP_INFO_BYTES else 0
                            connections.append((int(name), _name(connection), received))
        return connections


def connection_limits() -> tuple[int, int]:
    """Returns the most connections that a worker keeps, and that it accepts: files and Redis need descriptors too."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    descriptors = MOST_CONNECTIONS * 4 if descriptors == resource.RLIM_INFINITY else descriptors
    kept = max(min(MOST_CONNECTIONS, descriptors // 2), 1)
    return kept, max(min(MOST_CONNECTIONS * 2, descriptors * 3 // 4), kept)


def _name(connection: socket.socket) -> str:
    """Returns the peer as gRPC writes it.

    Raises:
        OSError: It is not connected.
    """
    host, port = connection.getpeername()[:2]
    # A socket of both families shows IPv4 peers as ::ffff:1.2.3.4.
    if connection.family == socket.AF_INET or host.startswith("::ffff:"):
        return f"ipv4:{host.removeprefix('::ffff:')}:{port}"
    return f"ipv6:%5B{host}%5D:{port}"
