"""The purge: has the bytes of what was erased leave the disks, by schedule.

An erasure holds at once: nothing of the user is answered, replayed or accepted again. Its bytes stay in the append-only
file of a Redis until that file is rewritten, without what was deleted since. Every other copy of what the log says, on
whichever host, is registered (`serving.stores.registry`) and confirms for itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from features.clock import now_ms
from serving.errors import ServingError
from serving.privacy.certificates import Certificate, Certificates
from serving.privacy.replay import forget_in
from serving.redis.client import Client
from serving.redis.rewrite import rewrite_files
from serving.stores.keys import time_of
from serving.stores.profiles import ProfileStore

_LOOK_S = 600.0
"""Longest pause between two looks for erasures that wait for no round."""

_log = logging.getLogger(__name__)


class Purger:
    """Rewrites the files of both Redis whenever something was erased from them."""

    def __init__(self, certificates: Certificates, events: Client, profiles: Client, period_s: float) -> None:
        """Takes the servers; `run` does the work.

        Args:
            certificates: The certificates of the erasures.
            events: The events Redis.
            profiles: The profiles Redis.
            period_s: Pause between two rounds.
        """
        self._certificates, self._period_s = certificates, period_s
        self._store = ProfileStore(profiles, certificates.partitions)
        self._stores_of = ((events, ("events", "impressions")), (profiles, ("profiles",)))

    def run(self, stop: threading.Event) -> None:
        """Purges by schedule until `stop` is set; what fails is tried again in the next round.

        An erasure of whose time half is over waits for no round: a process that is started again more often than rounds
        come, or knows of a longer period than the service, would else never purge it, or too late.
        """
        begun = time.monotonic()
        while not stop.wait(min(self._period_s, _LOOK_S)):
            try:
                if time.monotonic() - begun >= self._period_s or self._is_late():
                    begun = time.monotonic()
                    self.purge(stop)
            except ServingError as error:
                _log.warning("erased data is still on disk, and the next round tries again: %s", error)

    def purge(self, stop: threading.Event | None = None) -> int:
        """Purges what was erased until now; returns the number of certificates that got a date.

        Raises:
            ServingError: A Redis does not answer or cannot rewrite its files; the message says why.
        """
        pending = self._certificates.pending()
        dated: set[str] = set()
        for client, stores in self._stores_of:
            copy_id = self._store.store_id() if "profiles" in stores else ""
            waiting = [certificate for certificate in pending if _waits(certificate, stores, copy_id)]
            if not waiting:
                continue
            if copy_id:
                # What is still in a profile would be written into the new file.
                forget_in(self._store, self._certificates, waiting)
            rewrite_files(client, stop or threading.Event())
            for certificate in waiting:
                self._certificates.confirm(certificate, *stores)
                self._certificates.confirm_copy(certificate, copy_id)
            dated |= {certificate.certificate_id for certificate in waiting}
        return len(dated)

    def _is_late(self) -> bool:
        """Returns True if these stores still hold bytes of an erasure of whose time half is over."""
        now = now_ms()
        late = [
            certificate
            for certificate in self._certificates.pending()
            if now - time_of(certificate.log_id) > certificate.due_at - now
        ]
        stores = [name for _, names in self._stores_of for name in names]
        return bool(late) and any(_waits(certificate, stores, self._store.store_id()) for certificate in late)


def _waits(certificate: Certificate, stores: Sequence[str], copy_id: str) -> bool:
    """Returns True if a certificate lacks the physical date of some stores, or of one copy."""
    lacking = [receipt.store in stores and not receipt.purged_at for receipt in certificate.stores]
    return any(lacking) or any(copy.copy_id == copy_id and copy.open for copy in certificate.copies)
