"""Certificates of erasure, and the work that makes their last date come: bytes leave the disks by schedule.

An erasure holds at once: nothing of the person is answered, replayed or taken again. Its bytes stay in the append-only
file of a Redis until that is written anew; what was deleted since is not in the new one. Whoever else reads the log and
keeps what it says, the warehouse, confirms for itself.

A store that is put back from a backup knows nothing of the erasures since. They are noted in a file beside the stores,
the ledger, and hold again when it is replayed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import redis
from redis.exceptions import RedisError, ResponseError

from features.bundle import sync
from features.errors import ForeignFileError
from features.private_files import make_folders, open_private
from serving.errors import ConfigError, EventLogUnavailable, NotFound, ServingError, Unavailable
from serving.events import EventLog, partitions_for
from serving.profiles import Mark, ProfileStore
from serving.redis_client import Call, Client, command, connect, servers, serving_error
from serving.scripts import CERTIFICATE_ISSUE

PROFILES_GROUP = "profiles"
"""The group that brings events into profiles; every other group of the log keeps a copy of its own."""

_ID = re.compile(r"[0-9a-f]{4}-[0-9a-f]{32}")
_POLL_S = 0.1
_REWRITE_S = 3600.0
_TIMEOUT_S = 10.0
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


@dataclass(frozen=True, slots=True)
class Erasure:
    """What it takes to make an erasure hold again; it names nobody.

    Attributes:
        certificate_id: Its certificate.
        person: Keyed hash under which the log remembers it; 16 bytes.
        address: Where the person's profile is found, `redis_client.address_of`; 16 bytes.
        log_id: Where it stands in the log.
    """

    certificate_id: str
    person: bytes
    address: bytes
    log_id: int

    @property
    def partition(self) -> int:
        """The partition of the person."""
        return int(self.certificate_id[:4], 16)


class Ledger:
    """The erasures of this service in a file that is kept outside the stores; one line of JSON each."""

    def __init__(self, path: Path) -> None:
        """Names the file; it comes into being with the first erasure."""
        self._path = path

    def note(self, erasure: Erasure) -> None:
        """Adds an erasure; it is on disk when this returns.

        Raises:
            Unavailable: The file cannot be written; the erasure holds all the same, and a repeat notes it.
        """
        line = {"certificate_id": erasure.certificate_id, "log_id": erasure.log_id}
        line |= {"person": erasure.person.hex(), "address": erasure.address.hex()}
        try:
            new = not self._path.exists()
            make_folders(self._path.parent)
            with open_private(self._path, "ab", buffering=0) as sink:  # one write: those of several workers do not mix
                sink.write(json.dumps(line).encode() + b"\n")
                os.fsync(sink.fileno())
            if new:
                sync(self._path.parent)
        except (OSError, ForeignFileError) as error:
            raise Unavailable(f"the erasure holds, and {self._path} cannot be written ({error}); repeat it") from error

    def erasures(self) -> list[Erasure]:
        """All that it holds, oldest first.

        Raises:
            ConfigError: A line of it is damaged.
        """
        if not self._path.exists():
            return []
        found = []
        for number, line in enumerate(self._path.read_bytes().splitlines(), 1):
            try:
                said = json.loads(line)
                hashes = bytes.fromhex(said["person"]), bytes.fromhex(said["address"])
                found.append(Erasure(_require_id(said["certificate_id"]), *hashes, int(said["log_id"])))
            except (ValueError, KeyError, TypeError) as error:
                # A crash leaves half of the last line, of an erasure that was not answered yet.
                raise ConfigError(
                    f"{self._path}, line {number} is no erasure ({error!r}): take it from a copy, or remove it where "
                    "it is the last one and cut short"
                ) from error
        return found


class Certificates:
    """The certificates, beside the events that they are about."""

    def __init__(self, log: EventLog, due_ms: int = 24 * 3_600_000) -> None:
        """Takes the log, and the time after an erasure in which its bytes are to leave the disks."""
        self._log, self._due_ms = log, due_ms

    def issue(
        self, partition: int, log_id: int, counts: Mapping[str, int], certificate_id: str | None = None
    ) -> Certificate:
        """Certifies an erasure that holds in these stores; every other reader of the log has yet to confirm it.

        Args:
            partition: The partition of the person.
            log_id: Where the erasure stands in the log.
            counts: Store -> number of entries erased.
            certificate_id: The certificate that it takes the place of, where the erasure was to be made again.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        keys, now = self._log.keys[partition], time.time_ns() // 1_000_000
        certificate_id = certificate_id or f"{partition:04x}-{secrets.token_hex(16)}"
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
        if _ID.fullmatch(certificate_id) and int(certificate_id[:4], 16) < self._log.partitions:
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
    certificates, again = Certificates(log, due_ms), 0
    log.open()
    store.open()
    marks = [(one.partition, Mark(one.log_id, one.address, forget=True, rules=b"")) for one in erasures]
    forgotten = dict(zip(erasures, store.mark_many(marks), strict=True))
    for partition in sorted({one.partition for one in erasures}):
        own = [one for one in erasures if one.partition == partition]
        lacking = {one for one, lacks in zip(own, _lacking(log, own), strict=True) if lacks}
        names = log.names(partition, {one.address for one in lacking}) if lacking else {}
        for one in own:
            place, counts = one.log_id, {"profiles": forgotten[one], "events": 0, "impressions": 0}
            if one in lacking:
                name = names.get(one.address)
                erased = log.erase(name) if name else log.erase_again(partition, one.person, one.address)
                place, counts = erased.log_id, counts | {"events": erased.events, "impressions": erased.impressions}
                counts["profiles"] += store.mark(partition, Mark(place, one.address, forget=True, rules=b""))
            if one in lacking or forgotten[one]:
                certificates.issue(partition, place, counts, one.certificate_id)
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
        again = replay(erasures, EventLog(events, partitions), ProfileStore(profiles, partitions))
    return {"erasures": len(erasures), "again": again}


def _lacking(log: EventLog, own: Sequence[Erasure]) -> list[bool]:
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


def _require_id(certificate_id: str) -> str:
    """A certificate id as it is; raises ValueError for what is none."""
    if not _ID.fullmatch(certificate_id):
        raise ValueError(f"{certificate_id!r} is no certificate id")
    return certificate_id


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
