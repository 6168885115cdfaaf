"""Connecting to Redis: one way, for one server and for a cluster, that never retries by itself.

A default redis-py client retries ten times: one XADD whose reply was lost leaves 11 copies, and a frozen server holds a
GET for a minute. Here nothing is ever retried behind the caller's back and nothing waits longer than its timeout.
"""

from __future__ import annotations

import os
import re
from typing import Any, TypeAlias
from urllib.parse import unquote_to_bytes, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from serving.errors import ConfigError
from serving.redis.cluster import Cluster

Client: TypeAlias = redis.Redis | Cluster
_SCHEMES = ("redis://", "rediss://", "unix://")
_CLUSTERS = {"redis+cluster": "redis", "rediss+cluster": "rediss"}
_PORT = 6379
_CONNECTIONS = 1 << 16  # no limit: callers are limited elsewhere, and must not wait or fail here


def connect(url: str, timeout_s: float = 0.05, connect_timeout_s: float | None = None) -> Client:
    """Makes a client that never retries and never waits longer than its timeout; opens no connection yet.

    Args:
        url: `unix:///path/to.sock`, `redis://[user:password@]host:port/db` or `rediss://...` for TLS; a cluster by some
            of its nodes, `redis+cluster://[user:password@]host:port,host:port` or `rediss+cluster://...`.
        timeout_s: Longest wait for a reply.
        connect_timeout_s: Longest wait for a connection, as `timeout_s` when None.

    Raises:
        ConfigError: The URL is none of these.
    """
    scheme, _, location = url.partition("://")
    if scheme not in _CLUSTERS:
        return connect_one(url, timeout_s, connect_timeout_s)
    place, mark, options = location.partition("?")
    user, at, hosts = place.rpartition("@")

    def open_node(host: str, port: int) -> redis.Redis:
        name = f"[{host}]" if ":" in host else host
        node = f"{_CLUSTERS[scheme]}://{user}{at}{name}:{port}/0{mark}{options}"
        return connect_one(node, timeout_s, connect_timeout_s)

    try:
        hosts, _, database = hosts.partition("/")
        seeds = [_seed(host) for host in hosts.split(",")]
        if database not in ("", "0"):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"{printable(url)!r} is not a Redis URL of a cluster; write host:port,host:port and no database but 0"
        ) from None
    open_node(*seeds[0]).close()  # refuses wrong options now, and not with the first request
    return Cluster(seeds, open_node, timeout_s)


def _seed(host: str) -> tuple[str, int]:
    """Returns host and port of one node."""
    parts = urlsplit(f"//{host}")
    if not parts.hostname:
        raise ValueError
    return parts.hostname, parts.port or _PORT


def connect_one(url: str, timeout_s: float = 0.05, connect_timeout_s: float | None = None) -> redis.Redis:
    """`connect` for one server, or one node of a cluster."""
    if not url.startswith(_SCHEMES):
        schemes = [*_SCHEMES, *(f"{name}://" for name in _CLUSTERS)]
        raise ConfigError(f"{printable(url)!r} is not a Redis URL; it starts with one of {', '.join(schemes)}")
    try:
        # RESP 2: with RESP 3 redis-py skips its check for unread replies. No driver_info: it costs two round trips.
        client = redis.Redis.from_url(
            url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s if connect_timeout_s is None else connect_timeout_s,
            decode_responses=False,
            driver_info=None,
            max_connections=_CONNECTIONS,
        )
    except ValueError:  # its text may hold the password
        raise ConfigError(
            f"{printable(url)!r} is not a Redis URL; check port and options, percent-encode odd signs"
        ) from None
    if url.startswith("unix://"):  # a name of a file need not be UTF-8, as which redis-py reads it
        client.connection_pool.connection_kwargs["path"] = os.fsdecode(unquote_to_bytes(urlsplit(url).path))
    if url.startswith("rediss://"):
        client.connection_pool.connection_class = TLSConnection
    return client


class TLSConnection(redis.SSLConnection):
    """A TLS connection on which no unread reply can wait before the first command was sent.

    The pool refuses a connection whose socket has something to read. With hiredis, redis-py cannot tell a reply from
    the session tickets that a TLS 1.3 server sends on its own after the handshake, so it refuses new ones at random.
    The tickets are taken in with the first reply; from then on only a reply can be read that no caller waited for.
    """

    has_sent = False

    def send_packed_command(self, *args: Any, **options: Any) -> None:
        """Sends a command."""
        self.has_sent = True
        super().send_packed_command(*args, **options)  # type: ignore[no-untyped-call]

    def disconnect(self, *args: Any) -> None:
        """Closes the socket."""
        self.has_sent = False
        super().disconnect(*args)  # type: ignore[no-untyped-call]

    def can_read(self, timeout: float = 0) -> bool:
        """Returns True if a reply, or part of one, waits to be read."""
        return self.has_sent and super().can_read(timeout)


def printable(url: str) -> str:
    """Returns a URL without user, password and options, for messages; of a malformed one only the scheme."""
    clean = re.fullmatch(r"([\w+]+://)(?:[^@/?]*@)?([^@?]*)(?:\?[^@]*)?", url)
    return "".join(clean.groups()) if clean else "".join(re.findall(r"^[\w+]+://", url)) + "..."
