"""The nodes of a Redis cluster, and which of them has a key.

The map of slots is asked for when it is first needed, when a node redirects a request, and when one did not answer:
then another may have taken its place. A look asks nodes that were well lately first, and ends with the first answer or
when a client's timeout is over, so that it costs no more than a reply that does not come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, MovedError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from serving.errors import ConfigError

Address = tuple[str, int]

_PAUSE_S = 0.1
_LONG_PAUSE_S = 0.5  # after a look that no node answered


class Cluster:
    """Finds the node of a key; each node is a client of its own. Any thread may call anything."""

    def __init__(
        self, seeds: Sequence[Address], open_node: Callable[[str, int], redis.Redis], timeout_s: float = 0.05
    ) -> None:
        """Takes some nodes, from which the others are learnt; opens no connection yet.

        Args:
            seeds: Host and port of at least one node.
            open_node: Makes the client of a node, by host and port.
            timeout_s: Longest wait of these clients for a reply.
        """
        self.timeout_s = timeout_s
        self._seeds, self._open_node = list(seeds), open_node
        self._clients: dict[Address, redis.Redis] = {}
        self._addresses: dict[redis.Redis, Address] = {}
        self._slots: list[redis.Redis | None] = []
        self._masters: list[redis.Redis] = []
        self._replicas: list[redis.Redis] = []
        self._failed_at: dict[Address, float] = {}
        self._lock, self._looking = threading.Lock(), threading.Lock()
        self._stale, self._next_look = True, float("-inf")

    def node_of(self, key: bytes) -> redis.Redis | None:
        """Returns the client of the node that has a key; None if no node has it now.

        Raises:
            RedisError: No node that was asked says which node has which keys.
        """
        if self._stale:
            self._look()
        return self._slots[key_slot(key)]

    def nodes(self, *, replicas: bool = False) -> list[redis.Redis]:
        """Returns the clients of all nodes that have keys, with their replicas if `replicas`.

        Raises:
            RedisError: No node that was asked says which there are.
        """
        if self._stale:
            self._look()
        return [*self._masters, *self._replicas] if replicas else list(self._masters)

    def redirected(self, error: AskError, by: redis.Redis) -> redis.Redis:
        """Returns the client of the node that an answer names; remembers it if the slot has moved for good."""
        host, _ = self._addresses[by]
        node = self._client((error.host or host, error.port))
        if isinstance(error, MovedError):
            self._slots[error.slot_id] = node
            self._stale = True
        return node

    def failed(self, node: redis.Redis) -> None:
        """Notes that a node did not answer: another may have its keys by now."""
        self._failed_at[self._addresses[node]] = time.monotonic()
        self._stale = True

    def close(self) -> None:
        """Closes every connection."""
        for node in list(self._clients.values()):
            node.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _client(self, address: Address) -> redis.Redis:
        with self._lock:
            if address not in self._clients:
                self._clients[address] = node = self._open_node(*address)
                self._addresses[node] = address
            return self._clients[address]

    def _look(self) -> None:
        """Learns which node has which slots, unless another thread is at it or has just done it.

        Raises:
            RedisError: No node says so, and it was never known.
        """
        # With a map of the slots there is no need to wait for a better one.
        if not self._looking.acquire(timeout=0.0 if self._slots else 2 * self.timeout_s):
            if self._slots:
                return
            raise RedisConnectionError("no node of the cluster says yet which one has which keys; check that they run")
        try:
            if not self._slots or time.monotonic() > self._next_look:
                self._learn_from_any()
        finally:
            self._looking.release()

    def _learn_from_any(self) -> None:
        end, failure = time.monotonic() + self.timeout_s, RedisError("a cluster has at least one node")
        for address in self._in_turn():
            try:
                # Not in one word: redis-py would make something else of the answer.
                ranges: Any = self._client(address).execute_command("CLUSTER", "SLOTS")  # type: ignore[no-untyped-call]
                self._learn(ranges, address)
                self._failed_at.pop(address, None)
                self._next_look = time.monotonic() + _PAUSE_S
                return
            except RedisError as error:
                if isinstance(error, ResponseError) and "cluster support disabled" in str(error):
                    raise ConfigError("this Redis is no cluster; give its URL without `+cluster`") from None
                self._failed_at[address] = time.monotonic()
                failure = error
            if time.monotonic() > end:
                break
        self._next_look = time.monotonic() + _LONG_PAUSE_S
        if not self._slots:
            raise failure

    def _in_turn(self) -> list[Address]:
        """Returns the nodes in the order to ask them: those that have failed come last."""
        addresses = dict.fromkeys([self._addresses[node] for node in [*self._masters, *self._replicas]] + self._seeds)
        return sorted(addresses, key=lambda address: self._failed_at.get(address, 0.0))

    def _learn(self, ranges: Sequence[Sequence[Any]], source: Address) -> None:
        """Adopts an answer to CLUSTER SLOTS: first slot, last slot, the node that has them, its replicas."""
        slots: list[redis.Redis | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        masters: dict[redis.Redis, None] = {}
        standing_by: dict[redis.Redis, None] = {}
        for first, last, master, *replicas in ranges:
            node = self._client(_address(master, source))
            slots[first : last + 1] = [node] * (last - first + 1)
            masters[node] = None
            standing_by |= dict.fromkeys(self._client(_address(replica, source)) for replica in replicas)
        # Others read without the lock: each list is replaced whole, and never changed. `_stale` comes first, so that a
        # failure that another thread notes meanwhile makes this map stale again.
        self._stale = False
        self._masters, self._replicas, self._slots = list(masters), list(standing_by), slots


def _address(node: Sequence[Any], source: Address) -> Address:
    """Returns the address of a node; a node that does not know its own name has that of the one that answered."""
    host = (node[0] or b"").decode()
    return (host if host not in ("", "?") else source[0], int(node[1]))
