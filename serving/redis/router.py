"""Routes a store's commands to its Redis, standalone or cluster.

A store names keys and never a server. Requests about keys of several nodes are sent to each node in one piece. An
unreachable node costs one timeout and then nothing for a while, and only what is on it is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

import redis
from redis.exceptions import AskError, MovedError, RedisError, ResponseError

from features.errors import PenchantError
from serving.errors import ProfileStoreUnavailable, ResourceExhausted, Unavailable
from serving.observability.outages import EVENTS_REDIS, PROFILES_REDIS, shared_outage
from serving.redis.client import Client
from serving.redis.cluster import Cluster
from serving.redis.connection import Argument, Request, ScriptCall
from serving.redis.errors import serving_error
from serving.redis.nodes import Node, NodeMap

T = TypeVar("T")
_HOPS = 3
"""Times that a request follows its key from node to node while slots move."""


class RedisRouter:
    """The servers that hold the keys of one store; any thread may call anything."""

    def __init__(
        self,
        client: Client,
        unavailable: type[Unavailable],
        cooldown_s: float = 0.5,
        refusal: Callable[[ResponseError], PenchantError] | None = None,
        *,
        guarded: Literal["", "events", "profiles"] = "",
        shared_with: RedisRouter | None = None,
    ) -> None:
        """Takes a client of `redis.client.connect`.

        Args:
            client: The server, or the cluster.
            unavailable: The class of error that means "this Redis does not answer".
            cooldown_s: Longest pause between tries of a server that failed.
            refusal: Makes the error for an error reply, by default `serving_error`.
            guarded: Role of a Redis on which nothing counts that it could lose ("events"), or that is not even read
                while it could evict ("profiles"); empty for one that may lose what it acknowledges.
            shared_with: Other connections to the same servers: a safety check through either holds for both.
        """
        self._client, self._unavailable = client, unavailable
        self._refusal = refusal or (lambda error: serving_error(error, unavailable))
        self._guarded = guarded
        guards = shared_with._nodes.guards if shared_with else {}
        self._nodes: NodeMap = NodeMap(client, unavailable, cooldown_s, guarded, guards)
        name = PROFILES_REDIS if issubclass(unavailable, ProfileStoreUnavailable) else EVENTS_REDIS
        # Shared by all stores of a Redis, so that the log of a process says once that it is unreachable.
        self._outage = shared_outage(name)
        self._refusals = shared_outage(f"{name} takes no writes")
        self._unsafe = shared_outage(f"{name} is not safe")

    @property
    def timeout_s(self) -> float:
        """Longest wait for a reply."""
        return self._nodes.timeout_s

    @property
    def unsafe(self) -> str:
        """The reason for which nothing that is written counts, as of the last check of each server; empty without."""
        return next((node.guard.trouble for node in self._nodes.all() if node.guard and node.guard.trouble), "")

    def check_safety(self, keys: Sequence[bytes]) -> None:
        """Asks every server that has one of some keys for its settings.

        Raises:
            Unavailable: A server is unreachable or unsafe; of the class given.
        """
        first_error: PenchantError | None = None
        checked: set[Node] = set()
        for key in keys if self._guarded else ():
            try:
                node = self._nodes.of(key)
                if node in checked:
                    continue
                checked.add(node)
                reply = self._exchange(node, node.check_safety)
                if isinstance(reply, ResponseError):
                    raise self._error_of(reply)
            except PenchantError as error:  # the others are checked all the same
                first_error = first_error or error
        if first_error:
            raise first_error

    def command(self, *words: Argument, at: bytes | None = None) -> Any:
        """Sends one command.

        Args:
            *words: The command.
            at: Its key, if that is not the second word.

        Raises:
            Unavailable: The server is unreachable; of the class given.
            PenchantError: It refuses.
        """
        return self._send_one(words, _key(words) if at is None else at)

    def run(self, call: ScriptCall) -> Any:
        """Runs one script.

        Raises:
            Unavailable: The server is unreachable; of the class given.
            PenchantError: It refuses.
        """
        return self._send_one(call, call.keys[0])

    def run_all(self, requests: Sequence[Request], keys: Sequence[bytes] | None = None) -> list[Any]:
        """Sends several requests, those to one node in their order and in one round trip.

        Args:
            requests: Scripts and commands.
            keys: The key of each that says which node is meant, if the requests themselves do not say it.

        Returns:
            The replies; in the place of a refused one the PenchantError that it means, and in the place of one whose
            server is unreachable an error of the class given.

        Raises:
            Unavailable: All that was asked for is unreachable; anything may have been done.
        """
        return self._send_all(requests, [_key(request) for request in requests] if keys is None else keys)

    def scan(self, key: bytes, count: int = 1000) -> list[tuple[bytes, bytes]]:
        """Returns fields and values of a hash, read in pieces; a field that changes meanwhile may come twice.

        Raises:
            Unavailable: The server is unreachable; of the class given.
            PenchantError: It refuses.
        """
        fields: list[tuple[bytes, bytes]] = []
        # Redis begins a scan with the cursor 0 and ends it with the same, so -1 stands for the beginning.
        cursor = -1
        while cursor:
            cursor, page = self.command("HSCAN", key, max(cursor, 0), "COUNT", count)
            fields += page.items()
        return fields

    def at_each(self, keys: Sequence[bytes], work: Callable[[redis.Redis], T]) -> list[T | Unavailable]:
        """Calls a function once with every server that has one of some keys.

        Returns:
            Per key the result, or an error of the class given if its server is unreachable.

        Raises:
            Unavailable: All servers are unreachable.
            PenchantError: A server refuses.
        """
        results: dict[Node, T | Unavailable] = {}
        by_key: list[T | Unavailable] = []
        for key in keys:
            try:
                node = self._nodes.of(key)
                if node not in results:
                    results[node] = self._work_at(node, work)
                by_key.append(results[node])
            except Unavailable as error:
                by_key.append(error)
        return _not_all_unavailable(by_key)

    def _work_at(self, node: Node, work: Callable[[redis.Redis], T]) -> T | Unavailable:
        try:
            reply: T | ResponseError = self._exchange(node, lambda: node.work(work))
        except Unavailable as error:
            return error
        if isinstance(reply, ResponseError):
            raise self._refusal(reply) from reply
        return reply

    def _send_one(self, request: Request, key: bytes) -> Any:
        """`_send_all` for one request; nearly always there is one server to ask, once."""
        node = self._nodes.of(key)
        reply = self._exchange(node, lambda: node.run_all([request])[0])
        if isinstance(reply, AskError):
            # A node that redirects has done nothing, so to send the request again is no second try of a write.
            return required(self._send_all([request], [key]))[0]
        if isinstance(reply, ResponseError):
            raise self._error_of(reply)
        if isinstance(request, ScriptCall):
            self._refusals.works()
        return reply

    def _send_all(self, requests: Sequence[Request], keys: Sequence[bytes]) -> list[Any]:
        replies: list[Any] = [None] * len(requests)
        places: Iterable[int] = range(len(requests))
        # A slot that moves is followed for some hops: each answer names the next node, and a slot may move again.
        for _ in range(_HOPS):
            for node, node_places in self._by_node(keys, places, replies):
                answers = self._exchange_all(node, [requests[place] for place in node_places])
                for place, reply in zip(node_places, answers, strict=True):
                    moved = isinstance(reply, AskError)
                    replies[place] = self._redirected(node, requests[place], reply) if moved else reply
            places = [place for place in places if isinstance(replies[place], AskError)]
            if not places:
                break
        # A script alone shows that a Redis takes writes: most commands read, which a full one still allows.
        written = (reply for request, reply in zip(requests, replies, strict=True) if isinstance(request, ScriptCall))
        if not all(isinstance(reply, Exception) for reply in written):
            self._refusals.works()
        return _not_all_unavailable(
            [self._error_of(reply) if isinstance(reply, RedisError) else reply for reply in replies]
        )

    def _by_node(
        self, keys: Sequence[bytes], places: Iterable[int], replies: list[Any]
    ) -> Iterable[tuple[Node, list[int]]]:
        """Groups the places of requests by the node of their key; without a node, the error becomes the reply."""
        groups: dict[Node, list[int]] = {}
        for place in places:
            try:
                groups.setdefault(self._nodes.of(keys[place]), []).append(place)
            except Unavailable as error:
                replies[place] = error
        return groups.items()

    def _exchange_all(self, node: Node, requests: Sequence[Request]) -> Sequence[Any]:
        try:
            replies: Sequence[Any] = self._exchange(node, lambda: node.run_all(requests))
        except Unavailable as error:
            return [error] * len(requests)
        # An error reply to SCRIPT LOAD, and so to all of them.
        return [replies] * len(requests) if isinstance(replies, ResponseError) else replies

    def _redirected(self, node: Node, request: Request, error: AskError) -> Any:
        """Returns the reply of the node that an answer names; of a slot that has moved for good, the answer itself."""
        if not isinstance(self._client, Cluster):  # a single server that is part of one
            return self._error_of(error)
        client = self._client.redirected(error, node.client)
        if isinstance(error, MovedError):
            return error  # the map knows the new node now: the next hop asks it
        target = self._nodes.node(client)
        try:
            return self._exchange(target, lambda: target.connection.run_asking(request, target.guard_of([request])))
        except Unavailable as unavailable:
            return unavailable

    def _exchange(self, node: Node, work: Callable[[], Any]) -> Any:
        """Talks with one server; a refusal is returned, as the ResponseError, because the server does answer."""
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
                self._outage.failed(serving_error(error, self._unavailable), node.address)
                raise
        self._outage.works(node.address)
        if node.guard and not node.guard.trouble:
            self._unsafe.works(node.address)
        return reply

    def _error_of(self, error: RedisError) -> PenchantError:
        """Returns the error that a refusal means, with the reply as its cause."""
        plain = serving_error(error, self._unavailable)
        meaning: PenchantError = plain
        if isinstance(error, ResponseError):
            meaning = self._refusal(error)
            if isinstance(plain, (Unavailable, ResourceExhausted)):
                self._refusals.failed(plain)
        # Set and not raised from it, because the error may stand in a list of replies.
        meaning.__cause__ = error
        return meaning


def required(replies: Sequence[Any]) -> Sequence[Any]:
    """Returns the replies, if none of them is an error.

    Raises:
        PenchantError: The first error among them.
    """
    for reply in replies:
        if isinstance(reply, PenchantError):
            raise reply
    return replies


def _not_all_unavailable(replies: list[T]) -> list[T]:
    # Without any reply the callers have nothing to go on with: an error spares each of them the same check.
    if replies and isinstance(replies[0], Unavailable) and all(isinstance(reply, Unavailable) for reply in replies):
        raise replies[0]
    return replies


def _key(request: Request) -> bytes:
    key = request.keys[0] if isinstance(request, ScriptCall) else request[1]
    assert isinstance(key, bytes), "a key is bytes"
    return key
