"""Closes the listening sockets of a process without losing a caller.

A listening socket that is closed resets every connection that the kernel has completed for it and the server has not
accepted yet. So the sockets of this process first take no new connection: the kernel drops the packet that asks for one
and the caller's kernel sends it again a second later, to a socket that still listens. When no connection waits any
more, the sockets stop listening. Connections that were accepted are untouched.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SETTLE_S = 0.03
"""Time without a waiting connection before a socket stops listening: handshakes that have begun end in it."""

_LONGEST_S = 1.0
_POLL_S = 0.002
_DESCRIPTORS = Path("/proc/self/fd")
_SO_ATTACH_FILTER = 26
_TCP_INFO_BYTES = 104
_WAITING_OFFSET = 24
"""Offset in the kernel's `tcp_info` of the connections that wait at a listening socket: `tcpi_unacked`."""

# Classic BPF over the TCP header: byte 13 holds the flags; packets with SYN are dropped, all others pass.
_NO_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
_log = logging.getLogger(__name__)


def stop_listening(port: int, settle_s: float = SETTLE_S) -> int:
    """Stops listening on a TCP port of this process; blocks until no connection waits, or for a second.

    On other systems than Linux it does nothing: there the server closes its sockets itself.

    Args:
        port: The port.
        settle_s: Time for which no connection may wait.

    Returns:
        Number of sockets that stopped.
    """
    if sys.platform != "linux":
        return 0
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(listening) for listening in _listening(port)]
        for listening in sockets:
            _drop_handshakes(listening)
        _wait_empty(sockets, settle_s)
        for listening in sockets:
            listening.shutdown(socket.SHUT_RDWR)
        return len(sockets)


def _listening(port: int) -> Iterator[socket.socket]:
    """Yields a duplicate of every socket of this process that listens on a TCP port; gRPC hands out none of its own."""
    inodes = set[int]()
    for name in os.listdir(_DESCRIPTORS):
        candidate = _duplicate(int(name))
        if candidate is None:
            continue
        # Several descriptors may be of one socket, which is to be stopped once.
        inode = os.fstat(candidate.fileno()).st_ino
        if inode in inodes or not _listens(candidate, port):
            candidate.close()
            continue
        inodes.add(inode)
        yield candidate


def _duplicate(descriptor: int) -> socket.socket | None:
    """Returns another descriptor of a socket; None if it is none, or was closed meanwhile."""
    try:
        copy = os.dup(descriptor)
    except OSError:
        return None
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return None


def _listens(candidate: socket.socket, port: int) -> bool:
    try:
        is_listening = bool(candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        is_tcp = candidate.family in (socket.AF_INET, socket.AF_INET6)
        return is_listening and is_tcp and candidate.getsockname()[1] == port
    except OSError:
        return False


def _drop_handshakes(listening: socket.socket) -> None:
    """Has the kernel drop the packets that ask for a new connection; the caller's kernel sends them again."""
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in _NO_SYN)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(_NO_SYN), ctypes.addressof(buffer))
    try:
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    except OSError as error:  # a sandbox may forbid it; without it a caller is lost only in a short window
        _log.warning("connections that are made while this worker stops may be reset: %s", error)


def _wait_empty(sockets: list[socket.socket], settle_s: float) -> None:
    begun = empty_since = time.monotonic()
    while (now := time.monotonic()) - empty_since < settle_s and now - begun < _LONGEST_S:
        if any(_waiting(listening) for listening in sockets):
            empty_since = now
        time.sleep(_POLL_S)


def _waiting(listening: socket.socket) -> int:
    """Returns the number of connections that are complete and not accepted."""
    info = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    return int(struct.unpack_from("I", info, _WAITING_OFFSET)[0])
