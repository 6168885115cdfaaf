"""The servers behind a client, one by one: their sizes, and whether they take writes."""

from __future__ import annotations

from typing import NamedTuple

import redis

from serving.redis.client import Client
from serving.redis.cluster import Cluster


class ServerFigures(NamedTuple):
    """The sizes of a Redis, over all its servers, in bytes.

    Attributes:
        memory: Memory in use.
        data: The part of it that is data.
        aof: Size of the append-only files.
    """

    memory: int
    data: int
    aof: int


def servers(client: Client, *, replicas: bool = False) -> list[redis.Redis]:
    """Returns the server, or the nodes of a cluster, with their replicas if `replicas`.

    Raises:
        RedisError: No node of the cluster says which there are.
    """
    return client.nodes(replicas=replicas) if isinstance(client, Cluster) else [client]


def figures_of(client: Client) -> ServerFigures:
    """Returns the sizes of a Redis.

    Raises:
        RedisError: A server does not answer, or refuses.
    """
    # Of a cluster the masters alone: replicas hold the same once more.
    memory = data = aof = 0
    for server in servers(client):
        facts = server.info("memory")
        memory += int(facts["used_memory"])
        data += int(facts["used_memory_dataset"])
        aof += int(server.info("persistence").get("aof_current_size", 0))
    return ServerFigures(memory, data, aof)


def write_trouble(client: Client) -> str:
    """Returns why a Redis takes no writes now, empty if it takes them.

    Raises:
        RedisError: A server does not answer, or refuses.
    """
    for server in servers(client):
        persistence = server.info("persistence")
        if persistence.get("loading"):
            return "it is loading its data"
        if persistence.get("aof_enabled") and persistence.get("aof_last_write_status") != "ok":
            return "it cannot write to its disk; give that room"
        memory = server.info("memory")
        if 0 < int(memory.get("maxmemory", 0)) <= int(memory.get("used_memory", 0)):
            return "its memory is full; raise maxmemory"
    return ""
