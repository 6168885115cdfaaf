"""The servers behind a client, one by one: their memory, whether they take writes, and the rewriting of their files."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

import redis
from redis.exceptions import RedisError, ResponseError

from serving.errors import EventLogUnavailable, ServingError
from serving.redis.client import Client, serving_error
from serving.redis.cluster import Cluster

_POLL_S = 0.1
_REWRITE_S = 3600.0
"""Longest wait for a server that writes its files."""


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


def rewrite_files(client: Client, stop: threading.Event) -> None:
    """Makes every server write its files again from the data it holds now; returns when the old files are gone.

    Deleted data stays in an append-only file until this is done.

    Raises:
        ServingError: A server does not answer, cannot write its files, or `stop` was set.
    """
    try:
        for server in servers(client, replicas=True):
            _rewrite(server, stop)
    except ResponseError as error:
        raise ServingError(
            f"Redis refuses to write its files again ({error}); allow BGREWRITEAOF, BGSAVE, CONFIG GET"
        ) from error
    except RedisError as error:
        raise serving_error(error, EventLogUnavailable) from error


def _rewrite(server: redis.Redis, stop: threading.Event) -> None:
    _wait_idle(server, stop)
    if int(server.info("persistence")["aof_enabled"]):
        server.execute_command("BGREWRITEAOF")  # type: ignore[no-untyped-call]
        _wait_idle(server, stop)
        _require_success(server, "aof_last_bgrewrite_status", "BGREWRITEAOF")
    if server.config_get("save").get("save"):
        server.execute_command("BGSAVE")  # type: ignore[no-untyped-call]
        _wait_idle(server, stop)
        _require_success(server, "rdb_last_bgsave_status", "BGSAVE")


def _wait_idle(server: redis.Redis, stop: threading.Event) -> None:
    """Waits until a server writes no file: one that was begun earlier still holds data that was erased since.

    Raises:
        ServingError: The server takes too long, or `stop` was set.
    """
    deadline = time.monotonic() + _REWRITE_S
    fields = ("aof_rewrite_in_progress", "aof_rewrite_scheduled", "rdb_bgsave_in_progress")
    while any(int(server.info("persistence")[name]) for name in fields):
        if stop.wait(_POLL_S) or time.monotonic() > deadline:
            raise ServingError("Redis is still writing its files again; see the log of that Redis if this goes on")


def _require_success(server: redis.Redis, field: str, command: str) -> None:
    if str(server.info("persistence")[field]) != "ok":
        raise ServingError(f"{command} failed; the log of that Redis says why")
