"""Facts about a Redis that are fixed when it is first used: its ids, and its number of partitions."""

from __future__ import annotations

import logging
import threading

from features.subjects import PARTITIONS
from serving.errors import ConfigError, EventLogUnavailable, ProfileStoreUnavailable, ServingError
from serving.redis.client import Client
from serving.redis.router import RedisRouter
from serving.stores.keys import META

_RETRY_S = 0.5
_log = logging.getLogger(__name__)


def fixed_value(router: RedisRouter, name: str, value: str) -> bytes:
    """Returns a fact about a Redis; the first caller fixes it to `value`.

    Raises:
        Unavailable: Redis does not answer, or a durable one is not safe.
        PenchantError: Redis refuses.
    """
    # Read first and written only when missing, so that a full Redis can still be opened.
    stored = router.command("HGET", META, name)
    if stored is None:
        router.check_safety([META])  # nothing may begin on a server that forgets it
        router.command("HSETNX", META, name, value)
        stored = router.command("HGET", META, name)
    return bytes(stored)


def recorded_partitions(router: RedisRouter) -> int | None:
    """Returns the number of partitions that the data of a Redis is spread over, None if it holds none yet.

    Raises:
        Unavailable: Redis does not answer.
        PenchantError: Redis refuses.
    """
    stored = router.command("HGET", META, "partitions")
    return None if stored is None else int(stored)


def agreed_partitions(router: RedisRouter, wanted: int | None) -> int:
    """Returns the number of partitions on record, else the number wanted, else `PARTITIONS`; writes nothing.

    Raises:
        ConfigError: The data there has another number of partitions than is wanted.
        Unavailable: Redis does not answer.
        PenchantError: Redis refuses.
    """
    recorded = recorded_partitions(router)
    if recorded is None:
        return wanted or PARTITIONS
    if wanted is not None and wanted != recorded:
        raise _other_partitions(recorded, wanted)
    return recorded


def require_partitions(router: RedisRouter, partitions: int) -> None:
    """Writes the number of partitions into a new Redis and checks it in an old one.

    Raises:
        ConfigError: The data there has another number of partitions.
        Unavailable: Redis does not answer.
        PenchantError: Redis refuses.
    """
    recorded = int(fixed_value(router, "partitions", str(partitions)))
    if recorded != partitions:
        raise _other_partitions(recorded, partitions)


def partitions_of(client: Client) -> int:
    """Returns the number of partitions of the log that a Redis holds.

    Raises:
        ConfigError: It holds none: profiles alone, or nothing.
        EventLogUnavailable: Redis does not answer.
    """
    # Profiles alone have a number of partitions too; the salt is the log's.
    partitions, salt = RedisRouter(client, EventLogUnavailable).command("HMGET", META, "partitions", "salt")
    if partitions is None or salt is None:
        raise ConfigError("this Redis holds no event log: give the one that `penchant serve` calls events_redis")
    return int(partitions)


def partitions_for(client: Client, wanted: int | None = None) -> int:
    """Returns the number of partitions of the log in a Redis; of a new log the number wanted, or `PARTITIONS`.

    Raises:
        ConfigError: The log has another number than is wanted.
        EventLogUnavailable: Redis does not answer.
    """
    return agreed_partitions(RedisRouter(client, EventLogUnavailable), wanted)


def profile_partitions(client: Client, wanted: int | None = None) -> int:
    """`partitions_for` of a Redis with profiles.

    Raises:
        ConfigError: The profiles have another number than is wanted.
        ProfileStoreUnavailable: Redis does not answer.
    """
    return agreed_partitions(RedisRouter(client, ProfileStoreUnavailable), wanted)


def awaited_partitions(client: Client, wanted: int | None, stop: threading.Event) -> int:
    """`partitions_for`, as soon as Redis answers or `stop` is set; a number that is wanted is not waited for.

    Raises:
        ConfigError: The log has another number than is wanted.
    """
    while True:
        try:
            return partitions_for(client, wanted)
        except ConfigError:
            raise
        except ServingError as error:  # Redis does not answer, or refuses its users for now
            if wanted or stop.is_set():
                return wanted or PARTITIONS
            _log.debug("the number of partitions is not known yet: %s", error)
            stop.wait(_RETRY_S)


def _other_partitions(recorded: int, wanted: int) -> ConfigError:
    return ConfigError(
        f"this Redis holds data in {recorded} partitions and {wanted} were asked for; "
        f"the number is fixed at creation: set partitions to {recorded}, or start with an empty Redis"
    )
