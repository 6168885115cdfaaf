"""Certificates of erasure: a receipt per store and per registered copy, dated as each of them confirms."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter

from features.clock import now_ms
from serving.errors import NotFound
from serving.log_retention import PROFILES_GROUP
from serving.privacy.ledger import Erasure, is_certificate_id, of_line, to_line
from serving.redis.client import Call, Request
from serving.redis.router import required
from serving.stores.event_log import EventLog
from serving.stores.event_scripts import CERTIFICATE_DATE, CERTIFICATE_ISSUE, HASH_SET
from serving.stores.registry import ERASED_FROM, Copy, Registry

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
class CopyReceipt:
    """How far an erasure has come in one registered copy.

    Attributes:
        copy_id: The copy.
        store: Its kind.
        host: The host that registered it.
        place: Where it lies there.
        erased_at: When nothing of it could be used any more, ms; 0 if the copy has not confirmed it yet.
        purged_at: When its bytes were gone from the disk, ms; 0 if they are not yet.
        retired_at: When the copy was declared gone for good, ms; 0 for a copy in use.
    """

    copy_id: str
    store: str
    host: str
    place: str
    erased_at: int = 0
    purged_at: int = 0
    retired_at: int = 0

    @property
    def open(self) -> bool:
        """True if the copy has still to confirm."""
        return not (self.purged_at or self.retired_at)


@dataclass(frozen=True, slots=True)
class Remainder:
    """Something made from users' data that no erasure reaches by itself.

    Attributes:
        kind: "batch" or "bundle".
        host: The host that registered it.
        place: Where it lies there.
        registered_at: When that was, ms.
    """

    kind: str
    host: str
    place: str
    registered_at: int

    @property
    def advice(self) -> str:
        """Says what it holds, and what to do about it."""
        return ADVICE[self.kind]


ADVICE = {
    "batch": "An output of penchant recommend; it may hold the id of the user and the items that they were given, and "
    "so may everything it was sent on to. Delete it and its copies, or run the command again into the same file.",
    "bundle": "A trained bundle holds no user id, but its weights, vectors and popularity tables were learned from the "
    "events of all users then, this one possibly included. Train from the warehouse after this erasure, activate that "
    "bundle, and delete this one with the training run it came from.",
}


@dataclass(frozen=True, slots=True)
class Certificate:
    """An erasure, store by store; it names nobody.

    Attributes:
        certificate_id: Its name.
        log_id: Where the erasure stands in the log.
        due_at: When every store is to be purged, ms.
        stores: One receipt per store as it confirmed it, whatever its other copies did.
        copies: One per copy that was registered then.
        remainders: What else was made from users' data before.
    """

    certificate_id: str
    log_id: int
    due_at: int
    stores: tuple[Receipt, ...]
    copies: tuple[CopyReceipt, ...] = ()
    remainders: tuple[Remainder, ...] = ()

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """One per store, by name; it has a date when each of its copies has, those that were retired left out.

        That of "events" has its second date only when every ledger has the erasure: where one lacks it, a log that is
        put back from a backup would bring the user back.
        """
        stores = list(self.stores)
        names = {one.store for one in stores}
        kinds = {copy.store for copy in self.copies} - names - {"ledger"}
        stores += [Receipt(kind, 0, -1, -1) for kind in kinds]
        # Redis keeps the fields of a hash in no order of its own.
        return tuple(self._receipt(one) for one in sorted(stores, key=attrgetter("store")))

    @property
    def complete(self) -> bool:
        """True if nothing has to be confirmed any more."""
        return all(one.purged_at for one in self.stores) and not any(copy.open for copy in self.copies)

    def _receipt(self, own: Receipt) -> Receipt:
        """A store's receipt with those of its copies; a date of -1 is none of its own."""
        copies = [copy for copy in self.copies if copy.store == own.store]
        ledgers = [copy for copy in self.copies if copy.store == "ledger" and own.store == "events"]
        erased = [own.erased_at] + [copy.retired_at or copy.erased_at for copy in copies]
        purged = [own.purged_at] + [copy.retired_at or copy.purged_at for copy in (*copies, *ledgers)]
        return Receipt(own.store, own.entries, _latest(erased), _latest(purged))


def _latest(dates: Sequence[int]) -> int:
    """The latest of some dates; 0 if one of them is still to come."""
    return max(dates) if all(dates) else 0


class Certificates:
    """The certificates, in the log that they are about."""

    def __init__(self, log: EventLog, due_ms: int = 24 * 3_600_000) -> None:
        """Takes the log, and the time after an erasure in which its bytes are to leave the disks."""
        self._log, self._due_ms = log, due_ms
        self.registry = Registry(log)
        self.partitions = log.partitions

    def issue(self, erasure: Erasure, counts: Mapping[str, int], profiles: str = "") -> Certificate:
        """Certifies an erasure that holds in these stores; every other copy of the log has yet to confirm it.

        Args:
            erasure: The erasure; one without a certificate id gets a new one, else the certificate takes the place of
                the one that has it.
            counts: Store -> number of entries erased.
            profiles: Id of the profile store that `counts` is about.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        partition, now = erasure.partition, now_ms()
        keys = self._log.keys[partition]
        # Noted before anything is asked of the register: a copy that registers now finds it here.
        self.remember([erasure])
        groups = [group["name"].decode() for group in self._log.groups(keys.events)]
        receipts = [Receipt(store, entries, now) for store, entries in counts.items()]
        receipts += [Receipt(group, 0, 0) for group in groups if group != PROFILES_GROUP]
        registered = self.registry.copies()
        copies = tuple(_copy_receipt(copy, now, profiles) for copy in registered if copy.kind in ERASED_FROM)
        others = tuple(
            Remainder(copy.kind, copy.host, copy.place, copy.registered_at)
            for copy in registered
            if copy.kind in ADVICE and not copy.retired_at
        )
        due_at = now + self._due_ms
        certificate = Certificate(erasure.certificate_id, erasure.log_id, due_at, tuple(receipts), copies, others)
        arguments = (certificate.certificate_id, *_fields(certificate))
        key = self._key(certificate.certificate_id)
        self._log.nodes.run(Call(CERTIFICATE_ISSUE, (key, keys.purging), arguments))
        return certificate

    def remember(self, erasures: Iterable[Erasure]) -> None:
        """Notes erasures in the log, where the hosts find them that were not there when they were made.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        for erasure in erasures:
            words = (erasure.certificate_id, json.dumps(to_line(erasure)))
            self._log.nodes.run(Call(HASH_SET, (self._noted(erasure.partition),), words))

    def erasures(self) -> list[Erasure]:
        """All erasures that were ever noted in the log.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        found: dict[str, Erasure] = {}
        for partition in range(self._log.partitions):
            lines = self._log.nodes.scan(self._noted(partition))
            found |= {name.decode(): of_line(line) for name, line in lines}
        return sorted(found.values(), key=lambda one: one.log_id)

    def get(self, certificate_id: str) -> Certificate:
        """A certificate as it is now.

        Raises:
            NotFound: There is none of this name.
            EventLogUnavailable: Redis does not answer.
        """
        fields: dict[bytes, bytes] = {}
        if is_certificate_id(certificate_id) and int(certificate_id[:4], 16) < self._log.partitions:
            fields = self._log.nodes.command("HGETALL", self._key(certificate_id))
        if not fields:
            raise NotFound("there is no certificate of this id", field="certificate_id")
        return _certificate(certificate_id, fields)

    def pending(self) -> list[Certificate]:
        """The certificates that lack a date; of one that is gone, as after a backup, nothing waits any more.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        wanted: list[Request] = [("SMEMBERS", keys.purging) for keys in self._log.keys]
        found = []
        for keys, names in zip(self._log.keys, required(self._log.nodes.run_all(wanted)), strict=True):
            for name in names:
                try:
                    found.append(self.get(name.decode()))
                except NotFound:
                    _log.warning("the certificate %s is gone: it is not waited for any more", name.decode())
                    self._log.nodes.command("SREM", keys.purging, name)
        return found

    def confirm(self, certificate: Certificate, *stores: str) -> None:
        """Dates the physical erasure of some stores: their bytes are gone from the disk now.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        now, key = now_ms(), self._key(certificate.certificate_id)
        for one in certificate.stores:
            if one.store in stores:
                said = f"{one.entries} {one.erased_at or now} {now}"
                self._log.nodes.command("HSET", key, f"store:{one.store}", said)
        self._settle(certificate)

    def confirm_copy(self, certificate: Certificate, copy_id: str, *, purged: bool = True) -> None:
        """Dates an erasure in one copy: it cannot be used there any more, and its bytes are gone if `purged`.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        now = now_ms()
        for one in certificate.copies:
            if one.copy_id == copy_id and one.open:
                self._date(certificate, replace(one, erased_at=one.erased_at or now, purged_at=now if purged else 0))
        self._settle(certificate)

    def retire(self) -> int:
        """Notes in the certificates which of the copies they wait for were retired; returns the number of these.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        known = {copy.copy_id: copy for copy in self.registry.copies()}
        noted = 0
        for certificate in self.pending():
            for one in certificate.copies:
                copy = known.get(one.copy_id)
                if one.open and copy and copy.retired_at:
                    self._date(certificate, replace(one, retired_at=copy.retired_at))
                    noted += 1
            self._settle(certificate)
        return noted

    def _date(self, certificate: Certificate, receipt: CopyReceipt) -> None:
        words = (certificate.log_id, f"copy:{receipt.copy_id}", json.dumps(asdict(receipt)))
        self._log.nodes.run(Call(CERTIFICATE_DATE, (self._key(certificate.certificate_id),), words))

    def _settle(self, certificate: Certificate) -> None:
        """Takes a certificate that is complete now from those that are waited for."""
        if self.get(certificate.certificate_id).complete:
            keys = self._log.keys[int(certificate.certificate_id[:4], 16)]
            self._log.nodes.command("SREM", keys.purging, certificate.certificate_id)

    def _key(self, certificate_id: str) -> bytes:
        return self._log.keys[int(certificate_id[:4], 16)].certificates + b":" + certificate_id.encode()

    def _noted(self, partition: int) -> bytes:
        return self._log.keys[partition].certificates + b":noted"


def _copy_receipt(copy: Copy, now: int, profiles: str) -> CopyReceipt:
    """The first receipt of a copy; of the profile store that erased, it has its first date."""
    erased_at = now if copy.copy_id == profiles else 0
    return CopyReceipt(copy.copy_id, copy.kind, copy.host, copy.place, erased_at=erased_at, retired_at=copy.retired_at)


def _fields(certificate: Certificate) -> list[str]:
    """A certificate as the names and values of a hash."""
    fields = ["log_id", str(certificate.log_id), "due_at", str(certificate.due_at)]
    for one in certificate.stores:
        fields += [f"store:{one.store}", f"{one.entries} {one.erased_at} {one.purged_at}"]
    for copy in certificate.copies:
        fields += [f"copy:{copy.copy_id}", json.dumps(asdict(copy))]
    return [*fields, "remainders", json.dumps([asdict(one) for one in certificate.remainders])]


def _certificate(certificate_id: str, fields: Mapping[bytes, bytes]) -> Certificate:
    receipts = [
        Receipt(name.decode().removeprefix("store:"), *map(int, value.split()))
        for name, value in fields.items()
        if name.startswith(b"store:")
    ]
    copies = tuple(
        CopyReceipt(**json.loads(value)) for name, value in sorted(fields.items()) if name.startswith(b"copy:")
    )
    remainders = tuple(Remainder(**one) for one in json.loads(fields.get(b"remainders", b"[]")))
    log_id, due_at = int(fields[b"log_id"]), int(fields[b"due_at"])
    return Certificate(certificate_id, log_id, due_at, tuple(receipts), copies, remainders)
