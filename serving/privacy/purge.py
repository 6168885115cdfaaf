"""The work of an erasure: it holds again after a backup, and its bytes leave the disks by schedule.

An erasure holds at once: nothing of the person is answered, replayed or taken again. Its bytes stay in the append-only
file of a Redis until that is written anew; what was deleted since is not in the new one. Every other copy of what the
log says, on whichever host, is registered (`serving.stores.registry`) and confirms for itself.

A store that is put back from a backup knows nothing of the erasures since. They are noted in the log, and in a file
outside the stores on each host, the ledger, and hold again when it is replayed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import redis
from redis.exceptions import RedisError, ResponseError

from serving.errors import ConfigError, EventLogUnavailable, ServingError
from serving.privacy.certificates import Certificate, Certificates
from serving.privacy.ledger import Erasure, Ledger
from serving.redis.client import Client, command, connect, servers, serving_error
from serving.stores.event_log import EventLog
from serving.stores.log_entries import Mark
from serving.stores.log_erasure import LogErasure
from serving.stores.meta import partitions_for
from serving.stores.profiles import ProfileStore

_POLL_S = 0.1
_REWRITE_S = 3600.0
_TIMEOUT_S = 10.0
_log = logging.getLogger(__name__)


def replay(erasures: Sequence[Erasure], log: EventLog, store: ProfileStore, due_ms: int = 24 * 3_600_000) -> int:
    """Makes erasures hold again in a log and in profiles that may have been put back from before them.

    What holds already is left alone. A log that does not know an erasure takes it as made now; the certificate is
    issued anew under its id, for the bytes are to leave the disks once more.

    Args:
        erasures: What the ledger holds.
        log: The event log.
        store: The profiles.
        due_ms: Time in which the bytes are to leave the disks.

    Returns:
        The number of erasures that did not hold.

    Raises:
        Unavailable: A Redis does not answer; a repeat is safe.
        ConfigError: The erasures are those of a log with more partitions.
    """
    if foreign := [one.certificate_id for one in erasures if one.partition >= log.partitions]:
        raise ConfigError(f"erasure {foreign[0]} is of a log with more than {log.partitions} partitions: say how many")
    certificates, log_erasure, again = Certificates(log, due_ms), LogErasure(log), 0
    log.open()
    store.open()
    own_store = store.store_id()
    marks = [(one.partition, Mark(one.log_id, one.address, forget=True, rules=b"")) for one in erasures]
    forgotten = dict(zip(erasures, store.mark_many(marks), strict=True))
    for partition in sorted({one.partition for one in erasures}):
        own = [one for one in erasures if one.partition == partition]
        lacking = {one for one, lacks in zip(own, _lacking(log_erasure, own), strict=True) if lacks}
        names = log_erasure.names(partition, {one.address for one in lacking}) if lacking else {}
        for one in own:
            place, counts = one.log_id, {"profiles": forgotten[one], "events": 0, "impressions": 0}
            if one in lacking:
                name = names.get(one.address)
                erased = (
                    log_erasure.erase(name) if name else log_erasure.erase_unnamed(partition, one.person, one.address)
                )
                place, counts = erased.log_id, counts | {"events": erased.events, "impressions": erased.impressions}
                counts["profiles"] += store.mark(partition, Mark(place, one.address, forget=True, rules=b""))
            if one in lacking or forgotten[one]:
                certificates.issue(replace(one, log_id=place), counts, own_store)
                again += 1
    return again


def replay_ledgers(
    ledgers: Sequence[Path], redis_url: str, events_redis_url: str, partitions: int | None = None
) -> dict[str, int]:
    """`replay` as a command; returns the number of `erasures`, and how many did not hold and do so `again`.

    Raises:
        ConfigError: A URL is wrong, a ledger is damaged, or it is one of another log.
        Unavailable: A Redis does not answer; a repeat is safe.
    """
    erasures = [one for path in ledgers for one in Ledger(path).erasures()]
    with connect(redis_url, _TIMEOUT_S) as profiles, connect(events_redis_url, _TIMEOUT_S) as events:
        partitions = partitions_for(events, partitions)
        # What this Redis might lose, the ledger still has.
        again = replay(erasures, EventLog(events, partitions, unsafe=True), ProfileStore(profiles, partitions))
    return {"erasures": len(erasures), "again": again}


def _lacking(log: LogErasure, own: Sequence[Erasure]) -> list[bool]:
    return log.lacks(own[0].partition, [(one.person, one.log_id) for one in own])


class Purger:
    """Writes the files of both Redis anew whenever something was erased from them."""

    def __init__(self, certificates: Certificates, events: Client, profiles: Client, period_s: float) -> None:
        """Says what to purge; `run` does it.

        Args:
            certificates: What was erased.
            events: The events Redis.
            profiles: The profiles Redis.
            period_s: Pause between two looks.
        """
        self._certificates, self._period_s = certificates, period_s
        self._store = ProfileStore(profiles, certificates.partitions)
        self._parts = ((events, ("events", "impressions")), (profiles, ("profiles",)))

    def run(self, stop: threading.Event) -> None:
        """Purges by schedule until `stop` is set; what fails is tried again the next time."""
        while not stop.wait(self._period_s):
            try:
                self.purge(stop)
            except ServingError as error:
                _log.warning("what was erased is still on disk, and is tried again: %s", error)

    def purge(self, stop: threading.Event | None = None) -> int:
        """Purges what was erased until now; returns the number of certificates that got a date.

        Raises:
            ServingError: A Redis does not answer, or will not write its files anew; the message says why.
        """
        pending = self._certificates.pending()
        dated: set[str] = set()
        for client, stores in self._parts:
            copy_id = self._store.store_id() if "profiles" in stores else ""
            lacking = [one for one in pending if _lacks(one, stores, copy_id)]
            if not lacking:
                continue
            if copy_id:
                forget_in(self._store, self._certificates, lacking)
            _rewrite_all(client, stop or threading.Event())
            for certificate in lacking:
                self._certificates.confirm(certificate, *stores)
                self._certificates.confirm_copy(certificate, copy_id)
            dated |= {one.certificate_id for one in lacking}
        return len(dated)


def _lacks(certificate: Certificate, stores: Sequence[str], copy_id: str) -> bool:
    """Returns True if a certificate lacks the physical date of some stores, or of one copy."""
    lacking = [one.store in stores and not one.purged_at for one in certificate.stores]
    return any(lacking) or any(copy.copy_id == copy_id and copy.open for copy in certificate.copies)


def forget_in(store: ProfileStore, certificates: Certificates, wanted: Sequence[Certificate]) -> None:
    """Makes erasures hold in one profile store, whether or not a projector brings it the marks of the log.

    Raises:
        Unavailable: A Redis does not answer; a repeat is safe.
    """
    names = {one.certificate_id for one in wanted}
    erasures = [one for one in certificates.erasures() if one.certificate_id in names]
    store.mark_many([(one.partition, Mark(one.log_id, one.address, forget=True, rules=b"")) for one in erasures])


def _rewrite_all(client: Client, stop: threading.Event) -> None:
    """Lets every server write its files anew, from what it holds now; returns when the old ones are gone.

    Raises:
        ServingError: One does not answer, or could not.
    """
    try:
        for node in servers(client, replicas=True):
            _rewrite(node, stop)
    except ResponseError as error:
        raise ServingError(
            f"Redis does not write its files anew ({error}); allow BGREWRITEAOF, BGSAVE, CONFIG GET"
        ) from (error)
    except RedisError as error:
        raise serving_error(error, EventLogUnavailable) from error


def _rewrite(client: redis.Redis, stop: threading.Event) -> None:
    _idle(client, stop)
    if int(client.info("persistence")["aof_enabled"]):
        command(client, "BGREWRITEAOF")
        _idle(client, stop)
        _require(client, "aof_last_bgrewrite_status", "BGREWRITEAOF")
    if client.config_get("save").get("save"):
        command(client, "BGSAVE")
        _idle(client, stop)
        _require(client, "rdb_last_bgsave_status", "BGSAVE")


def _idle(client: redis.Redis, stop: threading.Event) -> None:
    """Waits until Redis writes no file: one that was begun earlier still holds what was erased since.

    Raises:
        ServingError: It takes too long, or a stop was asked for.
    """
    deadline = time.monotonic() + _REWRITE_S
    busy = ("aof_rewrite_in_progress", "aof_rewrite_scheduled", "rdb_bgsave_in_progress")
    while any(int(client.info("persistence")[name]) for name in busy):
        if stop.wait(_POLL_S) or time.monotonic() > deadline:
            raise ServingError("Redis is still writing its files anew")


def _require(client: redis.Redis, status: str, what: str) -> None:
    if str(client.info("persistence")[status]) != "ok":
        raise ServingError(f"{what} failed; the log of that Redis says why")
