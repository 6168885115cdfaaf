"""Certificates of erasure, and the work that makes their last date come: bytes leave the disks by schedule.

An erasure holds at once: nothing of the person is answered, replayed or taken again. Its bytes stay in the append-only
file of a Redis until that is written anew; what was deleted since is not in the new one. Whoever else reads the log and
keeps what it says, the warehouse, confirms for itself.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import redis
from redis.exceptions import RedisError, ResponseError

from serving.errors import EventLogUnavailable, NotFound, ServingError
from serving.events import EventLog
from serving.redis_client import Call, Client, command, servers, serving_error
from serving.scripts import CERTIFICATE_ISSUE

PROFILES_GROUP = "profiles"
"""The group that brings events into profiles; every other group of the log keeps a copy of its own."""

_POLL_S = 0.1
_REWRITE_S = 3600.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one store erased.

    Attributes:
        store: Its name: "profiles", "events", "impressions", or the group of the log that keeps it.
        entries: Number of entries erased.
        erased_at: When nothing of it could be used any more, ms; 0 where the store has not confirmed it yet.
        purged_at: When its bytes were gone from the disk, ms; 0 where they are not yet.
    """

    store: str
    entries: int
    erased_at: int
    purged_at: int = 0


@dataclass(frozen=True, slots=True)
class Certificate:
    """An erasure, store by store; it names nobody.

    Attributes:
        certificate_id: Its name.
        log_id: Where the erasure stands in the log.
        due_at: When every store is to be purged, ms.
        receipts: One per store.
    """

    certificate_id: str
    log_id: int
    due_at: int
    receipts: tuple[Receipt, ...]


class Certificates:
    """The certificates, beside the events that they are about."""

    def __init__(self, log: EventLog, due_ms: int = 24 * 3_600_000) -> None:
        """Takes the log, and the time after an erasure in which its bytes are to leave the disks."""
        self._log, self._due_ms = log, due_ms

    def issue(self, partition: int, log_id: int, counts: Mapping[str, int]) -> Certificate:
        """Certifies an erasure that holds in these stores; every other reader of the log has yet to confirm it.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        keys, now = self._log.keys[partition], time.time_ns() // 1_000_000
        certificate_id = f"{partition:04x}-{secrets.token_hex(16)}"
        groups = [group["name"].decode() for group in self._log.groups(keys.events)]
        receipts = [Receipt(store, entries, now) for store, entries in counts.items()]
        receipts += [Receipt(group, 0, 0) for group in groups if group != PROFILES_GROUP]
        certificate = Certificate(certificate_id, log_id, now + self._due_ms, tuple(receipts))
        arguments = (certificate_id, *_fields(certificate))
        self._log.nodes.run(Call(CERTIFICATE_ISSUE, (self._key(certificate_id), keys.purging), arguments))
        return certificate

    def get(self, certificate_id: str) -> Certificate:
        """A certificate as it is now.

        Raises:
            NotFound: There is none of this name.
            EventLogUnavailable: Redis does not answer.
        """
        fields: dict[bytes, bytes] = {}
        named = re.fullmatch(r"([0-9a-f]{4})-[0-9a-f]{32}", certificate_id)
        if named and int(named[1], 16) < self._log.partitions:
            fields = self._log.nodes.command("HGETALL", self._key(certificate_id))
        if not fields:
            raise NotFound("there is no certificate of this id", field="certificate_id")
        return _certificate(certificate_id, fields)

    def pending(self) -> list[Certificate]:
        """The certificates that lack a date.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        found = []
        for keys in self._log.keys:
            names = self._log.nodes.command("SMEMBERS", keys.purging)
            found += [self.get(name.decode()) for name in names]
        return found

    def confirm(self, certificate: Certificate, *stores: str) -> None:
        """Dates the physical erasure of some stores: their bytes are gone from the disk now.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        now, key = time.time_ns() // 1_000_000, self._key(certificate.certificate_id)
        for one in certificate.receipts:
            if one.store in stores:
                said = f"{one.entries} {one.erased_at or now} {now}"
                self._log.nodes.command("HSET", key, f"store:{one.store}", said)
        if all(one.purged_at for one in self.get(certificate.certificate_id).receipts):
            keys = self._log.keys[int(certificate.certificate_id[:4], 16)]
            self._log.nodes.command("SREM", keys.purging, certificate.certificate_id)

    def _key(self, certificate_id: str) -> bytes:
        return self._log.keys[int(certificate_id[:4], 16)].certificates + b":" + certificate_id.encode()


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
            lacking = [one for one in pending if any(r.store in stores and not r.purged_at for r in one.receipts)]
            if not lacking:
                continue
            _rewrite_all(client, stop or threading.Event())
            for certificate in lacking:
                self._certificates.confirm(certificate, *stores)
            dated |= {one.certificate_id for one in lacking}
        return len(dated)


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


def _fields(certificate: Certificate) -> list[str]:
    """A certificate as the names and values of a hash."""
    fields = ["log_id", str(certificate.log_id), "due_at", str(certificate.due_at)]
    for one in certificate.receipts:
        fields += [f"store:{one.store}", f"{one.entries} {one.erased_at} {one.purged_at}"]
    return fields


def _certificate(certificate_id: str, fields: Mapping[bytes, bytes]) -> Certificate:
    receipts = [
        Receipt(name.decode().removeprefix("store:"), *map(int, value.split()))
        for name, value in fields.items()
        if name.startswith(b"store:")
    ]
    return Certificate(certificate_id, int(fields[b"log_id"]), int(fields[b"due_at"]), tuple(receipts))
