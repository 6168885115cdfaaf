"""How Penchant talks to Redis: one way to connect, to send scripts, to name keys and to read errors.

A default redis-py client retries ten times: one XADD whose reply was lost leaves 11 copies, and a frozen server holds a
GET for a minute. Here nothing is ever retried behind the caller's back and nothing waits longer than its timeout.
"""

from __future__ import annotations

import hashlib
import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import unquote_to_bytes, urlsplit

import hiredis
import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from serving.errors import ConfigError, ResourceExhausted, ServingError, Unavailable
from serving.redis.cluster import Cluster
from serving.redis.safety import Guard

Argument: TypeAlias = bytes | str | int
Client: TypeAlias = redis.Redis | Cluster
_SCHEMES = ("redis://", "rediss://", "unix://")
_CLUSTERS = {"redis+cluster": "redis", "rediss+cluster": "rediss"}
_PORT = 6379
_PIECE = 1 << 16
_CONNECTIONS = 1 << 16  # no limit: who calls is limited elsewhere, and must not wait or fail here
# What a server says that is about to be replaced, or whose keys are moving; MASTERDOWN is a kind of CLUSTERDOWN.
_REPLACED: dict[str, type[ResponseError]] = {
    "MOVED": MovedError,
    "ASK": AskError,
    "TRYAGAIN": TryAgainError,
    "CLUSTERDOWN": ClusterDownError,
    "MASTERDOWN": MasterDownError,
    "READONLY": ReadOnlyError,
}
_REFUSALS: dict[str, type[RedisError]] = {
    "LOADING": BusyLoadingError,
    "NOAUTH": AuthenticationError,
    "NOPERM": NoPermissionError,
    "NOSCRIPT": NoScriptError,
    "OOM": OutOfMemoryError,
    "WRONGPASS": AuthenticationError,
}


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
    scheme, _, rest = url.partition("://")
    if scheme not in _CLUSTERS:
        return connect_one(url, timeout_s, connect_timeout_s)
    where, options, chosen = rest.partition("?")
    user, at, hosts = where.rpartition("@")

    def opened(host: str, port: int) -> redis.Redis:
        name = f"[{host}]" if ":" in host else host
        node = f"{_CLUSTERS[scheme]}://{user}{at}{name}:{port}/0{options}{chosen}"
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
    opened(*seeds[0]).close()  # says what is wrong with the options
    return Cluster(seeds, opened, timeout_s)


def _seed(host: str) -> tuple[str, int]:
    """Host and port of one node."""
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
    The tickets are taken in with the first reply; from then on whatever can be read is a reply that nobody waited for.
    """

    asked = False

    def send_packed_command(self, *args: Any, **options: Any) -> None:
        """Sends a command."""
        self.asked = True
        super().send_packed_command(*args, **options)  # type: ignore[no-untyped-call]

    def disconnect(self, *args: Any) -> None:
        """Closes the socket."""
        self.asked = False
        super().disconnect(*args)  # type: ignore[no-untyped-call]

    def can_read(self, timeout: float = 0) -> bool:
        """Whether a reply, or part of one, waits to be read."""
        return self.asked and super().can_read(timeout)


def printable(url: str) -> str:
    """The URL without user, password and options, for messages; one that is not understood loses all but its scheme."""
    clean = re.fullmatch(r"([\w+]+://)(?:[^@/?]*@)?([^@?]*)(?:\?[^@]*)?", url)
    return "".join(clean.groups()) if clean else "".join(re.findall(r"^[\w+]+://", url)) + "..."


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script, sent by its hash.

    Attributes:
        source: The Lua text.
        sha: The name Redis gives it.
        durable: Whether its reply is a promise that what it wrote stays.
    """

    source: str
    sha: str
    durable: bool = False

    @classmethod
    def of(cls, source: str, *, durable: bool = False) -> Script:
        """Names a script."""
        name = hashlib.sha1(source.strip().encode(), usedforsecurity=False).hexdigest()
        return cls(source.strip(), name, durable)


@dataclass(frozen=True, slots=True)
class Call:
    """One run of a script: atomic on the server."""

    script: Script
    keys: tuple[bytes, ...]
    arguments: tuple[Argument, ...] = ()

    @property
    def words(self) -> tuple[Argument, ...]:
        """The words of the command."""
        return ("EVALSHA", self.script.sha, len(self.keys), *self.keys, *self.arguments)


Request: TypeAlias = Call | tuple[Argument, ...]
"""A script or a command with its words, of which the second is its key."""


@dataclass(slots=True)
class _Open:
    """A connection on which nothing is outstanding, its socket, what parses replies, and whether a guard looked at it.

    A connection that is opened again may lead to another server, or to one that was started with other settings.
    """

    connection: Any
    socket: socket.socket
    reader: hiredis.Reader
    looked_at: bool = False


class PipelinedConnection:
    """Asks one server several things in one round trip, four times as fast as redis-py, and never waits too long.

    redis-py bounds each piece of a reply; here the timeout bounds the whole of each, however thinly it is sliced, and
    each piece of what is sent. A connection on which anything went wrong is closed and never used again, and nothing is
    sent a second time.
    """

    def __init__(self, client: redis.Redis) -> None:
        """Takes its connections, and so their security and their timeout, from a client of `connect`."""
        self._pool = client.connection_pool
        self._readers: dict[Argument, Callable[[Any], Any]] = dict(client.response_callbacks)
        self._timeout_s: float = self._pool.connection_kwargs["socket_timeout"]
        self._idle: list[_Open] = []

    def ask(self, *words: Argument) -> Any:
        """Sends one command and returns the reply, as redis-py reads it; any thread may.

        Raises:
            RedisError: The server is away, too slow, or refuses.
        """
        [reply] = self.ask_all([words])
        if isinstance(reply, ResponseError):
            raise reply
        return reply

    def ask_all(self, commands: Sequence[tuple[Argument, ...]], guard: Guard | None = None) -> list[Any]:
        """`ask` for several, in their order and in one round trip; a refusal stands in the place of the reply.

        Args:
            commands: The commands.
            guard: Says whether what they write counts; on a new connection that is one more round trip.

        Raises:
            RedisError: The server is away or too slow; anything may have been done.
            Unavailable: The guard lets nothing count.
        """
        if guard:
            guard.pause()
        line = self._take()
        try:
            if guard and (guard.trouble or not line.looked_at):
                guard.admit(*self._exchange(line, [guard.settings_command]))
                line.looked_at = True
            replies = self._exchange(line, [*commands, *guard.proofs] if guard else commands)
        except BaseException:  # also where the caller is interrupted: a reply may still come
            self._discard(line)
            raise
        self._idle.append(line)
        if guard and not all(isinstance(reply, ResponseError) for reply in replies[: len(commands)]):
            guard.judge(replies[len(commands) :])
        return replies[: len(commands)]

    def run_all(self, requests: Sequence[Request], guard: Guard | None = None) -> list[Any]:
        """`ask_all` for scripts and commands; teaches the server the scripts that it lacks.

        Raises:
            RedisError: The server is away or too slow; anything may have been done.
            Unavailable: The guard lets nothing count.
        """
        replies = self.ask_all([_words(request) for request in requests], guard) if requests else []
        missing = [place for place, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if missing:
            lacking = [request for place in missing if isinstance(request := requests[place], Call)]
            for script in {call.script for call in lacking}:
                self.ask("SCRIPT LOAD", script.source)
            for place, reply in zip(missing, self.ask_all([call.words for call in lacking], guard), strict=True):
                replies[place] = reply
        return replies

    def run_asking(self, request: Request, guard: Guard | None = None) -> Any:
        """Asks something about keys that are just moving to this server; a refusal is returned.

        Raises:
            RedisError: The server is away or too slow; it may have been done.
            Unavailable: The guard lets nothing count.
        """
        reply = self.ask_all([("ASKING",), _words(request)], guard)[1]
        if isinstance(reply, NoScriptError) and isinstance(request, Call):
            self.ask("SCRIPT LOAD", request.script.source)
            reply = self.ask_all([("ASKING",), request.words], guard)[1]
        return reply

    def _exchange(self, line: _Open, commands: Sequence[tuple[Argument, ...]]) -> list[Any]:
        packed = memoryview(b"".join([_packed(words) for words in commands]))
        end, replies = 0.0, list[Any]()
        try:
            line.socket.settimeout(self._timeout_s)
            for start in range(0, len(packed), _PIECE):  # a server that does much of what it is sent may take its time
                end = time.monotonic() + self._timeout_s
                line.socket.sendall(packed[start : start + _PIECE])
            while len(replies) < len(commands):
                if (reply := line.reader.gets()) is not False:
                    replies.append(reply)
                    end = time.monotonic() + self._timeout_s
                    continue
                if (left := end - time.monotonic()) <= 0:
                    raise TimeoutError
                line.socket.settimeout(left)
                received = line.socket.recv(_PIECE)
                if not received:
                    raise RedisConnectionError("Redis closed the connection")
                line.reader.feed(received)
        except TimeoutError:
            raise RedisTimeoutError(f"no whole reply within {self._timeout_s} s") from None
        except (OSError, hiredis.ProtocolError) as error:
            raise RedisConnectionError(str(error)) from error
        return [self._understood(words[0], reply) for words, reply in zip(commands, replies, strict=True)]

    def _understood(self, name: Argument, reply: Any) -> Any:
        """A reply as redis-py gives it to the callers of its commands."""
        if isinstance(reply, hiredis.ReplyError):
            error = reply_error(str(reply))
            if not isinstance(error, ResponseError):  # it loads its data, or lets nobody in: as good as away
                raise error
            return error
        reader = self._readers.get(name)
        return reader(reply) if reader else reply

    def _take(self) -> _Open:
        while self._idle:
            try:
                line = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            # Readable with nothing asked: the server closed it, or sent what belongs to nobody.
            if not line.reader.has_data() and line.socket.fileno() >= 0 and not _readable(line.socket):
                return line
            self._discard(line)
        connection: Any = self._pool.get_connection()
        return _Open(connection, connection._sock, hiredis.Reader(notEnoughData=False))

    def _discard(self, line: _Open) -> None:
        line.connection.disconnect()
        self._pool.release(line.connection)


def _readable(connected: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connected, select.POLLIN)
    return bool(poll.poll(0))


def _words(request: Request) -> tuple[Argument, ...]:
    return request.words if isinstance(request, Call) else request


def _packed(words: tuple[Argument, ...]) -> bytes:
    """A command as it is sent; its name may be of two words."""
    if isinstance(words[0], str) and " " in words[0]:
        words = (*words[0].split(), *words[1:])
    packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type] # its stub knows one word only
    return packed


def reply_error(message: str) -> RedisError:
    """What an error reply is raised as."""
    code, _, rest = message.partition(" ")
    if code in _REPLACED:
        return _REPLACED[code](rest)
    if rest == "max number of clients reached":
        return RedisConnectionError(message)
    return _REFUSALS.get(code, ResponseError)(message)


def serving_error(error: RedisError, away: type[Unavailable]) -> ServingError:
    """What a caller of the service is told about an error of Redis.

    Args:
        error: What redis-py raised.
        away: The class that means "this Redis does not answer".
    """
    if isinstance(error, OutOfMemoryError) or str(error).startswith("MISCONF"):
        return ResourceExhausted(f"Redis takes no writes: {error}; give it memory or disk space", retry_after_ms=1000)
    if isinstance(error, (AuthenticationError, AuthorizationError, NoPermissionError)):
        # Safe to retry: passwords change while services run, and become right again.
        why = f"Redis refuses these credentials: {error}; check the user and password in its URL, and its rights"
        return away(why, retry_after_ms=1000)
    alone = str(error).startswith("NOREPLICAS")
    if isinstance(error, ResponseError) and not (alone or isinstance(error, tuple(_REPLACED.values()))):
        return ServingError(f"Redis answered: {error}")
    return away(f"Redis does not answer: {error}; check that it runs and can be reached", retry_after_ms=1000)


class CircuitBreaker:
    """A context in which Redis is called: it names errors, and keeps callers away from a server that just failed.

    After a failure one caller at a time looks whether the server is back and the others are refused at once. The pause
    between two looks doubles from an eighth of `cooldown_s` up to it: a single late reply keeps people from their
    profiles for a moment only, and a dead or frozen server soon costs no more than one timeout in `cooldown_s`.
    """

    def __init__(
        self, away: type[Unavailable], cooldown_s: float = 0.5, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Makes a closed breaker.

        Args:
            away: The class of error that means "this Redis does not answer".
            cooldown_s: Longest pause between looks at a failed server.
            clock: What tells the time, in seconds.
        """
        self._away = away
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._lock = threading.Lock()
        self._open_until, self._why = 0.0, ""
        self._pause_s = self._first_s = cooldown_s / 8

    def __enter__(self) -> None:
        if not self._open_until:
            return
        with self._lock:
            now = self._clock()
            if now < self._open_until:
                wait_ms = int(1000 * (self._open_until - now)) + 1
                why = f"Redis failed a moment ago and is not asked again yet: {self._why}"
                raise self._away(why, retry_after_ms=wait_ms)
            self._open_until = now + self._cooldown_s
            self._pause_s = min(2 * self._pause_s, self._cooldown_s)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or not isinstance(error, RedisError) or isinstance(error, ResponseError):
            self._open_until, self._pause_s = 0.0, self._first_s
        else:
            self._why = str(serving_error(error, self._away))
            self._open_until = self._clock() + self._pause_s
        if isinstance(error, RedisError):
            raise serving_error(error, self._away) from error
