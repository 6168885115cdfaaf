"""The certificates of erasure in the event log, and the notes by which hosts find erasures that they missed.

A certificate is a hash; its id begins with its partition, so that it lies with the user that it is about, whom it does
not name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from serving.redis.connection import Request, ScriptCall
from serving.redis.router import required
from serving.stores.event_log import EventLog
from serving.stores.scripts import CERTIFICATE_DATE, CERTIFICATE_ISSUE, HASH_SET


class CertificateStore:
    """Keeps certificates field by field; any thread may call anything."""

    def __init__(self, log: EventLog) -> None:
        """Takes the log that the certificates are about."""
        self._log = log

    def issue(self, certificate_id: str, fields: Sequence[str]) -> None:
        """Stores a certificate durably and lists it as open.

        Args:
            certificate_id: Its id; a certificate that has it already is replaced field by field.
            fields: Names and values in turn.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        unsettled = self._log.keys[_partition(certificate_id)].open_certificates
        self._log.router.run(
            ScriptCall(CERTIFICATE_ISSUE, (self._key(certificate_id), unsettled), (certificate_id, *fields))
        )

    def read(self, certificate_id: str) -> Mapping[bytes, bytes]:
        """Returns the fields of a certificate, none if it is not there.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        # An id from outside may name a partition of another log.
        if _partition(certificate_id) >= self._log.partitions:
            return {}
        fields: Mapping[bytes, bytes] = self._log.router.command("HGETALL", self._key(certificate_id))
        return fields

    def open_ids(self) -> list[str]:
        """Returns the ids of the certificates that lack a date.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        requests: list[Request] = [("SMEMBERS", keys.open_certificates) for keys in self._log.keys]
        return [name.decode() for names in required(self._log.router.run_all(requests)) for name in names]

    def close(self, certificate_id: str) -> None:
        """Takes a certificate off the list of open ones.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        self._log.router.command("SREM", self._log.keys[_partition(certificate_id)].open_certificates, certificate_id)

    def set_field(self, certificate_id: str, log_id: int, name: str, value: str) -> None:
        """Sets one field of a certificate, unless it was issued again meanwhile for another log id.

        A full Redis takes it too.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        self._log.router.run(ScriptCall(CERTIFICATE_DATE, (self._key(certificate_id),), (log_id, name, value)))

    def note(self, certificate_id: str, line: str) -> None:
        """Notes an erasure for the hosts that were not there when it was made; a full Redis takes it too.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        self._log.router.run(ScriptCall(HASH_SET, (self._notes(_partition(certificate_id)),), (certificate_id, line)))

    def notes(self) -> Iterator[tuple[str, bytes]]:
        """Yields certificate id and line of every erasure that was ever noted.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        for partition in range(self._log.partitions):
            for name, line in self._log.router.scan(self._notes(partition)):
                yield name.decode(), line

    def _key(self, certificate_id: str) -> bytes:
        return self._log.keys[_partition(certificate_id)].certificates + b":" + certificate_id.encode()

    def _notes(self, partition: int) -> bytes:
        return self._log.keys[partition].certificates + b":noted"


def _partition(certificate_id: str) -> int:
    return int(certificate_id[:4], 16)
