"""The servers of a client as nodes: each with its connection, its breaker and the guard of its writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import redis

from serving.errors import Unavailable
from serving.redis.breaker import CircuitBreaker
from serving.redis.client import Client
from serving.redis.cluster import Cluster
from serving.redis.connection import PipelinedConnection, Request, ScriptCall
from serving.redis.safety import Guard

T = TypeVar("T")
Address = tuple[Any, ...]
"""Path, host and port of a server."""


class Node:
    """One server: its client, the breaker, the connection and the guard of its writes."""

    def __init__(self, client: redis.Redis, breaker: CircuitBreaker, guard: Guard | None) -> None:
        self.client, self.breaker, self.guard = client, breaker, guard
        self.connection = PipelinedConnection(client)
        self.address = _address_of(client)

    def guard_of(self, requests: Sequence[Request]) -> Guard | None:
        """Returns the guard if the replies are a promise, or if an unsafe server may not even be read."""
        if self.guard is None or self.guard.strict:
            return self.guard
        durable = any(isinstance(request, ScriptCall) and request.script.durable for request in requests)
        return self.guard if durable else None

    def check_safety(self) -> None:
        """Asks for the settings, and lets the guard judge them."""
        if self.guard:
            self.guard.admit(self.connection.ask_all([self.guard.settings_command])[0])

    def work(self, work: Callable[[redis.Redis], T]) -> T:
        """Calls a function with the client, unless the server is unsafe and may not even be read."""
        # A client of redis-py sends by itself: what the guard saw last has to do.
        if self.guard and self.guard.strict:
            self.guard.require()
        return work(self.client)

    def run_all(self, requests: Sequence[Request]) -> list[Any]:
        """`PipelinedConnection.run_all`, with the guard if there has to be one."""
        return self.connection.run_all(requests, self.guard_of(requests))


class NodeMap:
    """The nodes of a server or a cluster, and which of them has a key; any thread may call anything.

    Attributes:
        guards: The guard of each server, shared with other connections to the same servers; empty if none is guarded.
    """

    def __init__(
        self,
        client: Client,
        unavailable: type[Unavailable],
        cooldown_s: float,
        guarded: Literal["", "events", "profiles"],
        guards: dict[Address, Guard],
    ) -> None:
        """Takes what `RedisRouter` takes, and the guards of other connections to the same servers."""
        self._client, self._unavailable, self._cooldown_s = client, unavailable, cooldown_s
        self._guarded, self.guards = guarded, guards
        self._nodes: dict[redis.Redis, Node] = {}
        self._map_breaker = CircuitBreaker(unavailable, cooldown_s)

    @property
    def timeout_s(self) -> float:
        """Longest wait for a reply."""
        if isinstance(self._client, Cluster):
            return self._client.timeout_s
        return float(self._client.connection_pool.connection_kwargs["socket_timeout"])

    def of(self, key: bytes) -> Node:
        """Returns the node that has a key.

        Raises:
            Unavailable: No node has it now, or no node says which one; of the class given.
        """
        if not isinstance(self._client, Cluster):
            return self.node(self._client)
        # A breaker of its own: without a map of the slots, each request would wait for a look at all nodes.
        with self._map_breaker:
            client = self._client.node_of(key)
        if client is None:
            raise self._unavailable("no node of the cluster has this key now", retry_after_ms=1000)
        return self.node(client)

    def node(self, client: redis.Redis) -> Node:
        """Returns the node of a server's client."""
        node = self._nodes.get(client)
        if node is None:
            # Two threads may both make one; `setdefault` keeps the first, without a lock on the way of each request.
            node = self._nodes.setdefault(client, self._new_node(client))
        return node

    def all(self) -> list[Node]:
        """Returns the nodes that were asked so far."""
        return list(self._nodes.values())

    def _new_node(self, client: redis.Redis) -> Node:
        guard = None
        if self._guarded:
            guard = Guard(self._guarded, isinstance(self._client, Cluster), self._unavailable, self.timeout_s)
            guard = self.guards.setdefault(_address_of(client), guard)
        return Node(client, CircuitBreaker(self._unavailable, self._cooldown_s), guard)


def _address_of(client: redis.Redis) -> Address:
    """Returns what tells a server from others."""
    options = client.connection_pool.connection_kwargs
    return options.get("path"), options.get("host"), options.get("port")
