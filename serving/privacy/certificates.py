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
from serving.stores.certificate_store import CertificateStore
from serving.stores.event_log import EventLog
from serving.stores.registry import ERASED_FROM, Copy, Registry

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Receipt:
    """The part of one store in an erasure.

    Attributes:
        store: Its name: "profiles", "events", "impressions", or the group of the log that keeps it.
        entries: Number of entries erased.
        erased_at: Time from which nothing of it could be used, ms; 0 if the store has not confirmed it yet.
        purged_at: Time at which its bytes were gone from the disk, ms; 0 if they are not yet.
    """

    store: str
    entries: int
    erased_at: int
    purged_at: int = 0


@dataclass(frozen=True, slots=True)
class CopyReceipt:
    """The part of one registered copy in an erasure.

    Attributes:
        copy_id: The copy.
        store: Its kind.
        host: The host that registered it.
        place: Its path or address there.
        erased_at: Time from which nothing of it could be used, ms; 0 if the copy has not confirmed it yet.
        purged_at: Time at which its bytes were gone from the disk, ms; 0 if they are not yet.
        retired_at: Time at which the copy was declared gone for good, ms; 0 for a copy in use.
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
        """True if the copy has not confirmed yet."""
        return not (self.purged_at or self.retired_at)


@dataclass(frozen=True, slots=True)
class Remainder:
    """A file made from users' data that no erasure reaches by itself.

    Attributes:
        kind: "batch" or "bundle".
        host: The host that registered it.
        place: Its path there.
        registered_at: Time of that, ms.
    """

    kind: str
    host: str
    place: str
    registered_at: int

    @property
    def advice(self) -> str:
        """Advice: the data of users in it, and how to deal with them."""
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
    """An erasure, store by store; it holds no user id.

    Attributes:
        certificate_id: Its id.
        log_id: Log id of the erasure.
        due_at: Time by which every store is to be purged, ms.
        stores: One receipt per store as it confirmed it, regardless of its other copies.
        copies: One receipt per copy that was registered at that time.
        remainders: Other files made from users' data before.
    """

    certificate_id: str
    log_id: int
    due_at: int
    stores: tuple[Receipt, ...]
    copies: tuple[CopyReceipt, ...] = ()
    remainders: tuple[Remainder, ...] = ()

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """One receipt per store, ordered by name, with a date only if each of its copies in use has it.

        The receipt of "events" has its second date only if every ledger has the erasure: a host whose ledger lacks it
        would bring the user back when it puts its log back from a backup.
        """
        stores = list(self.stores)
        names = {receipt.store for receipt in stores}
        kinds = {copy.store for copy in self.copies} - names - {"ledger"}
        stores += [Receipt(kind, 0, -1, -1) for kind in kinds]
        # Redis returns the fields of a hash in any order: sorted, the same certificate always reads the same.
        return tuple(self._with_copies(receipt) for receipt in sorted(stores, key=attrgetter("store")))

    @property
    def complete(self) -> bool:
        """True if every store and copy has confirmed."""
        return all(receipt.purged_at for receipt in self.stores) and not any(copy.open for copy in self.copies)

    def _with_copies(self, receipt: Receipt) -> Receipt:
        """Returns a store's receipt with the dates of its copies; -1 stands for no date of the store's own."""
        copies = [copy for copy in self.copies if copy.store == receipt.store]
        ledgers = [copy for copy in self.copies if copy.store == "ledger" and receipt.store == "events"]
        erased = [receipt.erased_at] + [copy.retired_at or copy.erased_at for copy in copies]
        purged = [receipt.purged_at] + [copy.retired_at or copy.purged_at for copy in (*copies, *ledgers)]
        return Receipt(receipt.store, receipt.entries, _latest(erased), _latest(purged))


def _latest(dates: Sequence[int]) -> int:
    """Returns the latest of some dates; 0 if one of them is still to come."""
    return max(dates) if all(dates) else 0


class Certificates:
    """The certificates of erasure; they are stored in the log whose erasures they certify."""

    def __init__(self, log: EventLog, due_ms: int = 24 * 3_600_000) -> None:
        """Takes the log, and the time in which the bytes of an erasure are to leave the disks, ms."""
        self._log, self._due_ms = log, due_ms
        self._stored = CertificateStore(log)
        self.registry = Registry(log)
        self.partitions = log.partitions

    def issue(self, erasure: Erasure, counts: Mapping[str, int], profiles: str = "") -> Certificate:
        """Issues the certificate of an erasure that holds in some stores; every other copy has yet to confirm it.

        Args:
            erasure: The erasure; an earlier certificate with its id is replaced.
            counts: Store -> number of entries erased.
            profiles: Copy id of the profile store that `counts` is about.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        now = now_ms()
        # Noted before the register is read: a copy that registers in between finds the erasure here.
        self.remember([erasure])
        groups = self._log.group_names(self._log.keys[erasure.partition].events)
        receipts = [Receipt(store, entries, now) for store, entries in counts.items()]
        # The group of the profiles keeps no copy of its own: the profile stores have receipts.
        receipts += [Receipt(group, 0, 0) for group in groups if group != PROFILES_GROUP]
        registered = self.registry.copies()
        copies = tuple(_copy_receipt(copy, now, profiles) for copy in registered if copy.kind in ERASED_FROM)
        remainders = tuple(
            Remainder(copy.kind, copy.host, copy.place, copy.registered_at)
            for copy in registered
            if copy.kind in ADVICE and not copy.retired_at
        )
        due_at = now + self._due_ms
        certificate = Certificate(erasure.certificate_id, erasure.log_id, due_at, tuple(receipts), copies, remainders)
        self._stored.issue(certificate.certificate_id, _fields(certificate))
        return certificate

    def remember(self, erasures: Iterable[Erasure]) -> None:
        """Notes erasures in the log, where hosts that did not run at the time find them.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        for erasure in erasures:
            self._stored.note(erasure.certificate_id, json.dumps(to_line(erasure)))

    def erasures(self) -> list[Erasure]:
        """Reads all erasures that were ever noted in the log, in log order.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        erasures = {certificate_id: of_line(line) for certificate_id, line in self._stored.notes()}
        return sorted(erasures.values(), key=lambda erasure: erasure.log_id)

    def get(self, certificate_id: str) -> Certificate:
        """Reads a certificate as it is now.

        Raises:
            NotFound: No certificate has this id.
            EventLogUnavailable: Redis does not answer.
        """
        fields = self._stored.read(certificate_id) if is_certificate_id(certificate_id) else {}
        if not fields:
            raise NotFound("no certificate has this id; give that of EraseSubject", field="certificate_id")
        return _certificate(certificate_id, fields)

    def pending(self) -> list[Certificate]:
        """Reads the certificates that lack a date. One that is gone, as after a backup, is not waited for any more.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        certificates = []
        for certificate_id in self._stored.open_ids():
            try:
                certificates.append(self.get(certificate_id))
            except NotFound:
                _log.warning("the certificate %s is gone: it is not waited for any more", certificate_id)
                self._stored.close(certificate_id)
        return certificates

    def confirm(self, certificate: Certificate, *stores: str) -> None:
        """Dates the physical erasure of some stores: their bytes are gone from the disk now.

        A certificate that was issued again meanwhile, for a later erasure, still waits for them.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        now = now_ms()
        for receipt in certificate.stores:
            if receipt.store in stores:
                # A store that erased at once keeps that date.
                dates = f"{receipt.entries} {receipt.erased_at or now} {now}"
                self._date(certificate, f"store:{receipt.store}", dates)
        self._settle(certificate)

    def confirm_copy(self, certificate: Certificate, copy_id: str, *, purged: bool = True) -> None:
        """Dates an erasure in one copy: nothing of it can be used there any more, and its bytes are gone if `purged`.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        now = now_ms()
        for receipt in certificate.copies:
            if receipt.copy_id == copy_id and receipt.open:
                dated = replace(receipt, erased_at=receipt.erased_at or now, purged_at=now if purged else 0)
                self._date_copy(certificate, dated)
        self._settle(certificate)

    def retire(self) -> int:
        """Notes retired copies in the certificates that wait for them; returns the number of receipts that closed.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        registered = {copy.copy_id: copy for copy in self.registry.copies()}
        closed = 0
        for certificate in self.pending():
            for receipt in certificate.copies:
                copy = registered.get(receipt.copy_id)
                if receipt.open and copy and copy.retired_at:
                    self._date_copy(certificate, replace(receipt, retired_at=copy.retired_at))
                    closed += 1
            self._settle(certificate)
        return closed

    def _date_copy(self, certificate: Certificate, receipt: CopyReceipt) -> None:
        """Stores a copy's receipt."""
        self._date(certificate, f"copy:{receipt.copy_id}", json.dumps(asdict(receipt)))

    def _date(self, certificate: Certificate, name: str, value: str) -> None:
        """Stores a receipt, unless the certificate has been issued again for a later erasure meanwhile."""
        self._stored.set_field(certificate.certificate_id, certificate.log_id, name, value)

    def _settle(self, certificate: Certificate) -> None:
        """Removes a certificate from those that are waited for, if it is complete now."""
        # Read again, because other hosts date their copies at the same time.
        if self.get(certificate.certificate_id).complete:
            self._stored.close(certificate.certificate_id)


def _copy_receipt(copy: Copy, now: int, profiles: str) -> CopyReceipt:
    """Returns the first receipt of a copy; that of the profile store that erased already has its first date."""
    erased_at = now if copy.copy_id == profiles else 0
    return CopyReceipt(copy.copy_id, copy.kind, copy.host, copy.place, erased_at=erased_at, retired_at=copy.retired_at)


def _fields(certificate: Certificate) -> list[str]:
    """Returns a certificate as the names and values of a hash."""
    fields = ["log_id", str(certificate.log_id), "due_at", str(certificate.due_at)]
    for receipt in certificate.stores:
        fields += [f"store:{receipt.store}", f"{receipt.entries} {receipt.erased_at} {receipt.purged_at}"]
    for copy in certificate.copies:
        fields += [f"copy:{copy.copy_id}", json.dumps(asdict(copy))]
    return [*fields, "remainders", json.dumps([asdict(remainder) for remainder in certificate.remainders])]


def _certificate(certificate_id: str, fields: Mapping[bytes, bytes]) -> Certificate:
    receipts = [
        Receipt(name.decode().removeprefix("store:"), *map(int, value.split()))
        for name, value in fields.items()
        if name.startswith(b"store:")
    ]
    copies = tuple(
        CopyReceipt(**json.loads(value)) for name, value in sorted(fields.items()) if name.startswith(b"copy:")
    )
    remainders = tuple(Remainder(**remainder) for remainder in json.loads(fields.get(b"remainders", b"[]")))
    log_id, due_at = int(fields[b"log_id"]), int(fields[b"due_at"])
    return Certificate(certificate_id, log_id, due_at, tuple(receipts), copies, remainders)
