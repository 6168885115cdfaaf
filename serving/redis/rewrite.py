"""Has Redis write its files again from what it holds now, so that nothing deleted stays on the disk."""

from __future__ import annotations

import threading
import time

import redis
from redis.exceptions import RedisError, ResponseError

from serving.errors import EventLogUnavailable, ServingError
from serving.redis.client import Client
from serving.redis.errors import serving_error
from serving.redis.servers import servers

_POLL_S = 0.1
_REWRITE_S = 3600.0


def rewrite_files(client: Client, stop: threading.Event) -> None:
    """Has every server, replicas included, write its files again; returns when the old ones are gone.

    Args:
        client: A Redis or cluster.
        stop: Ends the waiting.

    Raises:
        ServingError: A server does not answer, cannot rewrite its files, or `stop` was set.
    """
    try:
        # Replicas have files of their own.
        for node in servers(client, replicas=True):
            _rewrite_server(node, stop)
    except ResponseError as error:
        raise ServingError(
            f"Redis refuses to rewrite its files ({error}); allow BGREWRITEAOF, BGSAVE, CONFIG GET"
        ) from error
    except RedisError as error:
        raise serving_error(error, EventLogUnavailable) from error


def _rewrite_server(client: redis.Redis, stop: threading.Event) -> None:
    # A rewrite that began earlier still copies what was deleted since: only one that begins after it counts.
    _wait_until_idle(client, stop)
    if int(client.info("persistence")["aof_enabled"]):
        client.execute_command("BGREWRITEAOF")  # type: ignore[no-untyped-call]
        _wait_until_idle(client, stop)
        _require_ok(client, "aof_last_bgrewrite_status", "BGREWRITEAOF")
    if client.config_get("save").get("save"):
        client.execute_command("BGSAVE")  # type: ignore[no-untyped-call]
        _wait_until_idle(client, stop)
        _require_ok(client, "rdb_last_bgsave_status", "BGSAVE")


def _wait_until_idle(client: redis.Redis, stop: threading.Event) -> None:
    """Waits until a server writes no file.

    Raises:
        ServingError: It takes too long, or `stop` was set.
    """
    deadline = time.monotonic() + _REWRITE_S
    busy = ("aof_rewrite_in_progress", "aof_rewrite_scheduled", "rdb_bgsave_in_progress")
    while any(int(client.info("persistence")[name]) for name in busy):
        if stop.wait(_POLL_S) or time.monotonic() > deadline:
            raise ServingError("Redis is still rewriting its files; the next round tries again")


def _require_ok(client: redis.Redis, status: str, name: str) -> None:
    if str(client.info("persistence")[status]) != "ok":
        raise ServingError(f"{name} failed; the log of that Redis says why")
