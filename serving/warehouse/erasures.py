"""The warehouse's part in erasures: it goes through those it has missed, and confirms those it has been through."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from serving.observability.outages import Outage
from serving.observability.telemetry import Telemetry
from serving.privacy.certificates import Certificates
from serving.privacy.ledger import Ledger
from serving.stores.event_log import EventLog
from serving.warehouse.files import WarehouseFiles
from serving.warehouse.place import GROUP
from serving.warehouse.revision import DamagedFiles, hold_erasures, note_held

_log = logging.getLogger(__name__)


class WarehouseErasures:
    """Keeps one directory in step with the erasures of its log."""

    def __init__(self, log: EventLog, files: WarehouseFiles, ledger: Ledger | None, telemetry: Telemetry) -> None:
        """Takes the log, the directory, and the erasures of this host; counts `warehouse_erased`."""
        self._certificates = Certificates(log)
        self._files, self._ledger, self._telemetry = files, ledger, telemetry
        self._outage = Outage(_log, "an erasure waits")
        self._damaged: frozenset[int] = frozenset()

    @property
    def waiting(self) -> bool:
        """True if some erasures do not hold yet, because files are damaged."""
        return bool(self._damaged)

    def hold(self) -> None:
        """Takes the directory through the erasures it has missed; if a file is damaged, call it again later.

        Raises:
            EventLogUnavailable: Redis does not answer.
            TakenOver: See `WarehouseFiles.require_own`.
        """
        erasures = self._certificates.erasures() + (self._ledger.erasures() if self._ledger else [])
        try:
            self._telemetry.count("warehouse_erased", hold_erasures(self._files, erasures))
            self._damaged = frozenset()
            self._outage.works()
        except DamagedFiles as error:
            self._outage.failed(error)
            self._damaged = error.partitions

    def confirm(self, written: Sequence[int]) -> None:
        """Dates the erasures that every file of their partition has been through.

        Args:
            written: Log id up to which each partition has been written.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        copy_id = self._files.identity.copy_id if self._files.identity else ""
        confirmed: list[tuple[str, int]] = []
        for certificate in self._certificates.pending():
            partition = int(certificate.certificate_id[:4], 16)
            waits = any(receipt.store == GROUP and not receipt.purged_at for receipt in certificate.stores)
            waits |= any(copy.copy_id == copy_id and copy.open for copy in certificate.copies)
            # The mark is written behind the user's last entry, so a partition that goes further has revised its files.
            if waits and certificate.log_id <= written[partition] and partition not in self._damaged:
                # A crash between the two dates leaves the certificate pending, and the next round dates the rest.
                self._certificates.confirm(certificate, GROUP)
                self._certificates.confirm_copy(certificate, copy_id)
                confirmed.append((certificate.certificate_id, certificate.log_id))
        if confirmed:
            note_held(self._files, confirmed)
