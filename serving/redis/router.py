"""The one road from a store to its Redis, be that one server or a cluster of them.

A store names keys and never a server. What concerns keys of several nodes is sent to each node in one piece; a node
that is away costs one timeout and then nothing for a while, and only what is on it is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

import redis
from redis.exceptions import AskError, MovedError, RedisError, ResponseError

from features.errors import PenchantError
from serving.errors import ProfileStoreUnavailable, ResourceExhausted, Unavailable
from serving.observability.outages import EVENTS_REDIS, PROFILES_REDIS, shared_outage
from serving.redis.breaker import CircuitBreaker
from serving.redis.client import Client
from serving.redis.cluster import Cluster
from serving.redis.connection import Argument, PipelinedConnection, Request, ScriptCall
from serving.redis.errors import serving_error
from serving.redis.safety import Guard

T = TypeVar("T")
_HOPS = 3


class _Node:
    """One server: its client, its breaker, its line, what guards its writes, and where it is."""

    def __init__(self, client: redis.Redis, breaker: CircuitBreaker, guard: Guard | None) -> None:
        self.client, self.breaker, self.guard, self.line = client, breaker, guard, PipelinedConnection(client)
        options = client.connection_pool.connection_kwargs
        self.address = (options.get("path"), options.get("host"), options.get("port"))

    def guard_of(self, requests: Sequence[Request]) -> Guard | None:
        """The guard, where the replies to some requests are a promise, or nothing may be asked of an unsafe server."""
        if self.guard is None or self.guard.strict:
            return self.guard
        durable = any(isinstance(request, ScriptCall) and request.script.durable for request in requests)
        return self.guard if durable else None

    def check_safety(self) -> None:
        """Asks for the settings, and lets the guard judge them."""
        if self.guard:
            self.guard.admit(self.line.ask_all([self.guard.settings_command])[0])

    def work(self, work: Callable[[redis.Redis], T]) -> T:
        """Does something with the client, unless the server is unsafe and nothing may be asked of it then."""
        if self.guard and self.guard.strict:
            self.guard.require()
        return work(self.client)

    def run_all(self, requests: Sequence[Request]) -> list[Any]:
        """`PipelinedConnection.run_all`, guarded where it must be."""
        return self.line.run_all(requests, self.guard_of(requests))


class RedisRouter:
    """The servers that hold the keys of one store; any thread may call anything."""

    def __init__(
        self,
        client: Client,
        away: type[Unavailable],
        cooldown_s: float = 0.5,
        refusal: Callable[[ResponseError], PenchantError] | None = None,
        *,
        guarded: Literal["", "events", "profiles"] = "",
        beside: RedisRouter | None = None,
    ) -> None:
        """Takes a client of `redis_client.connect`.

        Args:
            client: The server, or the cluster.
            away: The class of error that means "this Redis does not answer".
            cooldown_s: Longest pause between looks at a server that failed.
            refusal: What an error reply means, by default `redis_client.serving_error`.
            guarded: The role of a Redis on which nothing may count that it could lose ("events"), or that nothing is
                asked of while it could evict ("profiles"); empty for one that may lose what it acknowledges.
            beside: Other connections to the same servers: what a look through one of them finds holds for both.
        """
        self._client, self._away, self._cooldown_s = client, away, cooldown_s
        self._refusal = refusal or (lambda error: serving_error(error, away))
        self._guarded = guarded
        self._guards: dict[tuple[Any, ...], Guard] = beside._guards if beside else {}
        what = PROFILES_REDIS if issubclass(away, ProfileStoreUnavailable) else EVENTS_REDIS
        self._outage = shared_outage(what)
        self._refusals = shared_outage(f"{what} takes no writes")
        self._unsafe = shared_outage(f"{what} is not safe")
        self._nodes: dict[redis.Redis, _Node] = {}
        self._map = CircuitBreaker(away, cooldown_s)

    @property
    def timeout_s(self) -> float:
        """Longest wait for a reply."""
        if isinstance(self._client, Cluster):
            return self._client.timeout_s
        return float(self._client.connection_pool.connection_kwargs["socket_timeout"])

    @property
    def unsafe(self) -> str:
        """Why nothing that is written counts, as of the last look at each server; empty where all is well."""
        return next((node.guard.trouble for node in self._nodes.values() if node.guard and node.guard.trouble), "")

    def check_safety(self, keys: Sequence[bytes]) -> None:
        """Asks every server that has one of some keys for its settings.

        Raises:
            Unavailable: A server is away, or unsafe; of the class given.
        """
        first: PenchantError | None = None
        looked: set[_Node] = set()
        for key in keys if self._guarded else ():
            try:
                node = self._node_of(key)
                if node in looked:
                    continue
                looked.add(node)
                reply = self._exchange(node, node.check_safety)
                if isinstance(reply, ResponseError):
                    raise self._told(reply)
            except PenchantError as error:  # the others are looked at all the same
                first = first or error
        if first:
            raise first

    def command(self, *words: Argument, at: bytes | None = None) -> Any:
        """Sends one command.

        Args:
            *words: The command.
            at: Its key, where that is not the second word.

        Raises:
            Unavailable: The server is away; of the class given.
            PenchantError: It refuses.
        """
        return self._one(words, _key(words) if at is None else at)

    def run(self, call: ScriptCall) -> Any:
        """Runs one script.

        Raises:
            Unavailable: The server is away; of the class given.
            PenchantError: It refuses.
        """
        return self._one(call, call.keys[0])

    def run_all(self, requests: Sequence[Request], keys: Sequence[bytes] | None = None) -> list[Any]:
        """Asks several things, those of one node in their order and in one round trip.

        Args:
            requests: Scripts and commands.
            keys: The key of each that says which node is meant, where that is not to be seen from the request itself.

        Returns:
            The replies. In the place of a refused one stands the PenchantError that it means, and that of one whose
            server is away the error of the class given.

        Raises:
            Unavailable: All that was asked for is away; anything may have been done.
        """
        return self._all(requests, [_key(request) for request in requests] if keys is None else keys)

    def scan(self, key: bytes, count: int = 1000) -> list[tuple[bytes, bytes]]:
        """The fields of a hash with their values, read in pieces; one that changes meanwhile may come twice.

        Raises:
            Unavailable: The server is away; of the class given.
            PenchantError: It refuses.
        """
        found: list[tuple[bytes, bytes]] = []
        cursor = -1
        while cursor:
            cursor, page = self.command("HSCAN", key, max(cursor, 0), "COUNT", count)
            found += page.items()
        return found

    def at_each(self, keys: Sequence[bytes], work: Callable[[redis.Redis], T]) -> list[T | Unavailable]:
        """Does something once with every server that has one of some keys.

        Returns:
            Per key the result, or the error of the class given where its server is away.

        Raises:
            Unavailable: All servers are away.
            PenchantError: One refuses.
        """
        results: dict[_Node, T | Unavailable] = {}
        found: list[T | Unavailable] = []
        for key in keys:
            try:
                node = self._node_of(key)
                if node not in results:
                    results[node] = self._done(node, work)
                found.append(results[node])
            except Unavailable as error:
                found.append(error)
        return _not_all_away(found)

    def _done(self, node: _Node, work: Callable[[redis.Redis], T]) -> T | Unavailable:
        try:
            reply: T | ResponseError = self._exchange(node, lambda: node.work(work))
        except Unavailable as error:
            return error
        if isinstance(reply, ResponseError):
            raise self._refusal(reply) from reply
        return reply

    def _one(self, request: Request, key: bytes) -> Any:
        """`_all` for one request; nearly always there is one server to ask, once."""
        node = self._node_of(key)
        reply = self._exchange(node, lambda: node.run_all([request])[0])
        if isinstance(reply, AskError):
            return required(self._all([request], [key]))[0]
        if isinstance(reply, ResponseError):
            raise self._told(reply)
        if isinstance(request, ScriptCall):
            self._refusals.works()
        return reply

    def _all(self, requests: Sequence[Request], keys: Sequence[bytes]) -> list[Any]:
        replies: list[Any] = [None] * len(requests)
        places: Iterable[int] = range(len(requests))
        for _ in range(_HOPS):
            for node, own in self._by_node(keys, places, replies):
                found = self._exchanged(node, [requests[place] for place in own])
                for place, reply in zip(own, found, strict=True):
                    asked = isinstance(reply, AskError)
                    replies[place] = self._redirected(node, requests[place], reply) if asked else reply
            places = [place for place in places if isinstance(replies[place], AskError)]
            if not places:
                break
        written = (reply for request, reply in zip(requests, replies, strict=True) if isinstance(request, ScriptCall))
        if not all(isinstance(reply, Exception) for reply in written):
            self._refusals.works()
        return _not_all_away([self._told(reply) if isinstance(reply, RedisError) else reply for reply in replies])

    def _by_node(
        self, keys: Sequence[bytes], places: Iterable[int], replies: list[Any]
    ) -> Iterable[tuple[_Node, list[int]]]:
        """Which of the requests in these places go to which node; where there is none, the error is the reply."""
        groups: dict[_Node, list[int]] = {}
        for place in places:
            try:
                groups.setdefault(self._node_of(keys[place]), []).append(place)
            except Unavailable as error:
                replies[place] = error
        return groups.items()

    def _exchanged(self, node: _Node, requests: Sequence[Request]) -> Sequence[Any]:
        try:
            replies: Sequence[Any] = self._exchange(node, lambda: node.run_all(requests))
        except Unavailable as error:
            return [error] * len(requests)
        # An error reply to SCRIPT LOAD, and so to all of them.
        return [replies] * len(requests) if isinstance(replies, ResponseError) else replies

    def _redirected(self, node: _Node, request: Request, error: AskError) -> Any:
        """What the node says that an answer names; of a slot that has moved, the answer again, as we know it now."""
        if not isinstance(self._client, Cluster):  # a single server that is part of one
            return self._told(error)
        other = self._client.redirected(error, node.client)
        if isinstance(error, MovedError):
            return error
        there = self._node(other)
        try:
            return self._exchange(there, lambda: there.line.run_asking(request, there.guard_of([request])))
        except Unavailable as away:
            return away

    def _exchange(self, node: _Node, work: Callable[[], Any]) -> Any:
        """Talks with one server; what it refuses is returned, as the ResponseError."""
        with node.breaker:
            try:
                reply = work()
            except ResponseError as error:
                reply = error
            except Unavailable as error:  # of the guard
                self._unsafe.failed(error, node.address)
                raise
            except RedisError as error:
                if isinstance(self._client, Cluster):
                    self._client.failed(node.client)
                self._outage.failed(serving_error(error, self._away), node.address)
                raise
        self._outage.works(node.address)
        if node.guard and not node.guard.trouble:
            self._unsafe.works(node.address)
        return reply

    def _node_of(self, key: bytes) -> _Node:
        if not isinstance(self._client, Cluster):
            return self._node(self._client)
        with self._map:
            client = self._client.node_of(key)
        if client is None:
            raise self._away("no node of the cluster has this key now", retry_after_ms=1000)
        return self._node(client)

    def _node(self, client: redis.Redis) -> _Node:
        node = self._nodes.get(client)
        if node is None:
            node = self._nodes.setdefault(client, self._made(client))
        return node

    def _made(self, client: redis.Redis) -> _Node:
        clustered = isinstance(self._client, Cluster)
        node = _Node(client, CircuitBreaker(self._away, self._cooldown_s), None)
        if self._guarded:
            guard = Guard(self._guarded, clustered, self._away, self.timeout_s)
            node.guard = self._guards.setdefault(node.address, guard)
        return node

    def _told(self, error: RedisError) -> PenchantError:
        """What a refusal means, with the reply as its cause."""
        plain = serving_error(error, self._away)
        told: PenchantError = plain
        if isinstance(error, ResponseError):
            told = self._refusal(error)
            if isinstance(plain, (Unavailable, ResourceExhausted)):
                self._refusals.failed(plain)
        told.__cause__ = error
        return told


def required(replies: Sequence[Any]) -> Sequence[Any]:
    """The replies, where none of them is an error.

    Raises:
        PenchantError: The first of those that are.
    """
    for reply in replies:
        if isinstance(reply, PenchantError):
            raise reply
    return replies


def _not_all_away(replies: list[T]) -> list[T]:
    if replies and isinstance(replies[0], Unavailable) and all(isinstance(reply, Unavailable) for reply in replies):
        raise replies[0]
    return replies


def _key(request: Request) -> bytes:
    key = request.keys[0] if isinstance(request, ScriptCall) else request[1]
    assert isinstance(key, bytes), "a key is bytes"
    return key
