"""The number of partitions of the event log in a Redis, which is fixed when the log is created."""

from __future__ import annotations

import logging
import threading

from serving.errors import ConfigError, EventLogUnavailable, ServingError
from serving.redis.client import META, Client
from serving.redis.router import PARTITIONS, RedisRouter, agreed_partitions

_RETRY_S = 0.5
_log = logging.getLogger(__name__)


def partitions_of(client: Client) -> int:
    """The number of partitions of the log that a Redis holds.

    Raises:
        ConfigError: It holds none: profiles alone, or nothing.
        EventLogUnavailable: Redis does not answer.
    """
    partitions, salt = RedisRouter(client, EventLogUnavailable).command("HMGET", META, "partitions", "salt")
    if partitions is None or salt is None:
        raise ConfigError("this Redis holds no event log: give the one that `penchant serve` calls events_redis")
    return int(partitions)


def partitions_for(client: Client, asked: int | None = None) -> int:
    """The number of partitions of the log in a Redis; of a new one, that which is asked for, or the usual.

    Raises:
        ConfigError: The log has another number than is asked for.
        EventLogUnavailable: Redis does not answer.
    """
    return agreed_partitions(RedisRouter(client, EventLogUnavailable), asked)


def awaited_partitions(client: Client, asked: int | None, stop: threading.Event) -> int:
    """`partitions_for`, as soon as Redis answers or `stop` is set; a number that is asked for is not waited for.

    Raises:
        ConfigError: The log has another number than is asked for.
    """
    while True:
        try:
            return partitions_for(client, asked)
        except ConfigError:
            raise
        except ServingError as error:  # it does not answer, or refuses its users for now
            if asked or stop.is_set():
                return asked or PARTITIONS
            _log.debug("the number of partitions is not known yet: %s", error)
            stop.wait(_RETRY_S)
