"""Commands and scripts on the wire: several in one round trip, each bounded by a timeout, none ever sent twice."""

from __future__ import annotations

import hashlib
import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import hiredis
import redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from serving.redis.errors import reply_error
from serving.redis.safety import Guard

Argument: TypeAlias = bytes | str | int
_PIECE = 1 << 16
"""Bytes that are sent or received at a time."""


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script, sent by its hash.

    Attributes:
        source: The Lua text.
        sha: The name Redis gives it.
        durable: True if its reply is a promise that the data it wrote stays.
    """

    source: str
    sha: str
    durable: bool = False

    @classmethod
    def of(cls, source: str, *, durable: bool = False) -> Script:
        """Returns a script of some text."""
        digest = hashlib.sha1(source.strip().encode(), usedforsecurity=False).hexdigest()
        return cls(source.strip(), digest, durable)


@dataclass(frozen=True, slots=True)
class ScriptCall:
    """One run of a script: atomic on the server."""

    script: Script
    keys: tuple[bytes, ...]
    arguments: tuple[Argument, ...] = ()

    @property
    def words(self) -> tuple[Argument, ...]:
        """The words of the command."""
        return ("EVALSHA", self.script.sha, len(self.keys), *self.keys, *self.arguments)


Request: TypeAlias = ScriptCall | tuple[Argument, ...]
"""A script or a command with its words, of which the second is its key."""


@dataclass(slots=True)
class _OpenConnection:
    """A connection with no outstanding reply, its socket, its parser, and whether a guard has checked the server.

    A connection that is opened again may lead to another server, or to one that was started with other settings.
    """

    connection: Any
    socket: socket.socket
    reader: hiredis.Reader
    checked: bool = False


class PipelinedConnection:
    """Sends several commands to one server in one round trip, four times as fast as redis-py, and never waits too long.

    redis-py bounds each piece of a reply; here the timeout bounds the whole of each, however thinly it is sliced, and
    each piece of what is sent. A connection on which anything went wrong is closed and never used again, and nothing is
    sent a second time.
    """

    def __init__(self, client: redis.Redis) -> None:
        """Takes its connections, and so their security and their timeout, from a client of `connect`."""
        self._pool = client.connection_pool
        self._readers: dict[Argument, Callable[[Any], Any]] = dict(client.response_callbacks)
        self._timeout_s: float = self._pool.connection_kwargs["socket_timeout"]
        self._idle: list[_OpenConnection] = []

    def ask(self, *words: Argument) -> Any:
        """Sends one command and returns the reply, as redis-py reads it; any thread may.

        Raises:
            RedisError: The server is unreachable, too slow, or refuses.
        """
        [reply] = self.ask_all([words])
        if isinstance(reply, ResponseError):
            raise reply
        return reply

    def ask_all(self, commands: Sequence[tuple[Argument, ...]], guard: Guard | None = None) -> list[Any]:
        """`ask` for several commands, in their order and in one round trip; a refusal stands in the place of the reply.

        Args:
            commands: The commands.
            guard: Judges whether their writes count; on a new connection that takes one more round trip.

        Raises:
            RedisError: The server is unreachable or too slow; anything may have been done.
            Unavailable: The guard lets nothing count.
        """
        if guard:
            guard.pause()
        opened = self._take()
        try:
            if guard and (guard.trouble or not opened.checked):
                guard.admit(*self._exchange(opened, [guard.settings_command]))
                opened.checked = True
            replies = self._exchange(opened, [*commands, *guard.proofs] if guard else commands)
        except BaseException:  # even if the caller is interrupted: a reply may still come
            self._discard(opened)
            raise
        self._idle.append(opened)
        # If nothing was done, there is nothing to prove.
        if guard and not all(isinstance(reply, ResponseError) for reply in replies[: len(commands)]):
            guard.judge(replies[len(commands) :])
        return replies[: len(commands)]

    def run_all(self, requests: Sequence[Request], guard: Guard | None = None) -> list[Any]:
        """`ask_all` for scripts and commands; teaches the server the scripts that it lacks.

        Raises:
            RedisError: The server is unreachable or too slow; anything may have been done.
            Unavailable: The guard lets nothing count.
        """
        replies = self.ask_all([_words(request) for request in requests], guard) if requests else []
        # Scripts are sent by their hash; a server that was restarted, or is new, does not know them.
        missing = [place for place, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if missing:
            calls = [request for place in missing if isinstance(request := requests[place], ScriptCall)]
            for script in {call.script for call in calls}:
                self.ask("SCRIPT LOAD", script.source)
            for place, reply in zip(missing, self.ask_all([call.words for call in calls], guard), strict=True):
                replies[place] = reply
        return replies

    def run_asking(self, request: Request, guard: Guard | None = None) -> Any:
        """Sends a request about keys that are just moving to this server; a refusal is returned.

        Raises:
            RedisError: The server is unreachable or too slow; it may have been done.
            Unavailable: The guard lets nothing count.
        """
        reply = self.ask_all([("ASKING",), _words(request)], guard)[1]
        if isinstance(reply, NoScriptError) and isinstance(request, ScriptCall):
            self.ask("SCRIPT LOAD", request.script.source)
            reply = self.ask_all([("ASKING",), request.words], guard)[1]
        return reply

    def _exchange(self, opened: _OpenConnection, commands: Sequence[tuple[Argument, ...]]) -> list[Any]:
        packed = memoryview(b"".join([_packed(words) for words in commands]))
        end, replies = 0.0, list[Any]()
        try:
            opened.socket.settimeout(self._timeout_s)
            # The timeout bounds each piece: a server that works through many commands reads the rest of them late.
            for start in range(0, len(packed), _PIECE):
                end = time.monotonic() + self._timeout_s
                opened.socket.sendall(packed[start : start + _PIECE])
            while len(replies) < len(commands):
                if (reply := opened.reader.gets()) is not False:
                    replies.append(reply)
                    # Each reply has the whole timeout, and each piece of it only what is left of that.
                    end = time.monotonic() + self._timeout_s
                    continue
                if (left := end - time.monotonic()) <= 0:
                    raise TimeoutError
                opened.socket.settimeout(left)
                received = opened.socket.recv(_PIECE)
                if not received:
                    raise RedisConnectionError("Redis closed the connection")
                opened.reader.feed(received)
        except TimeoutError:
            raise RedisTimeoutError(f"no whole reply within {self._timeout_s} s") from None
        except (OSError, hiredis.ProtocolError) as error:
            raise RedisConnectionError(str(error)) from error
        return [self._understood(words[0], reply) for words, reply in zip(commands, replies, strict=True)]

    def _understood(self, name: Argument, reply: Any) -> Any:
        """Returns a reply as redis-py returns it to the callers of its commands."""
        if isinstance(reply, hiredis.ReplyError):
            error = reply_error(str(reply))
            # A server that loads its data, or refuses all callers, is as good as unreachable.
            if not isinstance(error, ResponseError):
                raise error
            return error
        reader = self._readers.get(name)
        return reader(reply) if reader else reply

    def _take(self) -> _OpenConnection:
        while self._idle:
            try:
                opened = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            # Readable before anything was sent: the server closed it, or sent what no caller asked for.
            if not opened.reader.has_data() and opened.socket.fileno() >= 0 and not _readable(opened.socket):
                return opened
            self._discard(opened)
        connection: Any = self._pool.get_connection()
        return _OpenConnection(connection, connection._sock, hiredis.Reader(notEnoughData=False))

    def _discard(self, opened: _OpenConnection) -> None:
        opened.connection.disconnect()
        self._pool.release(opened.connection)


def _readable(connected: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connected, select.POLLIN)
    return bool(poll.poll(0))


def _words(request: Request) -> tuple[Argument, ...]:
    return request.words if isinstance(request, ScriptCall) else request


def _packed(words: tuple[Argument, ...]) -> bytes:
    """Returns the bytes of a command; its name may be of two words."""
    if isinstance(words[0], str) and " " in words[0]:
        words = (*words[0].split(), *words[1:])
    packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type] # its stub knows one word only
    return packed
