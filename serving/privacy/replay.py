"""Replays erasures into stores that may have been put back from a backup, which knows nothing of them.

Erasures are noted in the log and, on each host, in a file outside the stores, the ledger; both are replayed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from serving.errors import ConfigError
from serving.privacy.certificates import Certificate, Certificates
from serving.privacy.ledger import Erasure, Ledger
from serving.redis.client import connect
from serving.stores.event_log import EventLog
from serving.stores.log_entries import Erased, Mark
from serving.stores.log_erasure import LogErasure
from serving.stores.meta import partitions_for
from serving.stores.profiles import ProfileStore

_TIMEOUT_S = 10.0


def replay(erasures: Sequence[Erasure], log: EventLog, store: ProfileStore, due_ms: int = 24 * 3_600_000) -> int:
    """Makes erasures hold again in a log and in profiles.

    Where they hold already, nothing changes. A log that does not know an erasure takes it as made now, and its
    certificate is issued again under the same id, because the bytes have to leave the disks once more.

    Args:
        erasures: The erasures of the ledger.
        log: The event log.
        store: The profiles.
        due_ms: Time in which the bytes are to leave the disks.

    Returns:
        The number of erasures that did not hold.

    Raises:
        Unavailable: A Redis does not answer; a repeat is safe.
        ConfigError: The erasures are those of a log with more partitions.
    """
    if foreign := [erasure.certificate_id for erasure in erasures if erasure.partition >= log.partitions]:
        raise ConfigError(
            f"erasure {foreign[0]} is of a log with more than {log.partitions} partitions; give that number"
        )
    certificates, log_erasure = Certificates(log, due_ms), LogErasure(log)
    log.open()
    store.open()
    store_id = store.store_id()
    # All of them, also those that hold: a mark costs less than the question.
    forgotten = dict(zip(erasures, store.mark_many(erasure_marks(erasures)), strict=True))
    repeated = 0
    for partition in sorted({erasure.partition for erasure in erasures}):
        in_partition = [erasure for erasure in erasures if erasure.partition == partition]
        missing = _missing(log_erasure, partition, in_partition)
        # Only if one is missing: names are found by reading the whole partition.
        names = log_erasure.names(partition, {erasure.address for erasure in missing}) if missing else {}
        for erasure in in_partition:
            erased = _erase(log_erasure, erasure, names) if erasure in missing else Erased(erasure.log_id, 0, 0)
            erasure_now, profiles = replace(erasure, log_id=erased.log_id), forgotten[erasure]
            if erasure in missing:
                profiles += sum(store.mark_many(erasure_marks([erasure_now])))
            elif not profiles:
                continue
            counts = {"profiles": profiles, "events": erased.events, "impressions": erased.impressions}
            certificates.issue(erasure_now, counts, store_id)
            repeated += 1
    return repeated


def replay_ledgers(
    ledgers: Sequence[Path], redis_url: str, events_redis_url: str, partitions: int | None = None
) -> dict[str, int]:
    """Replays ledgers, as a command; returns the number of `erasures`, and how many were made `again`.

    Raises:
        ConfigError: A URL is wrong, a ledger is damaged, or it is one of another log.
        Unavailable: A Redis does not answer; a repeat is safe.
    """
    erasures = [erasure for path in ledgers for erasure in Ledger(path).erasures()]
    with connect(redis_url, _TIMEOUT_S) as profiles, connect(events_redis_url, _TIMEOUT_S) as events:
        partitions = partitions_for(events, partitions)
        # Also on an unsafe Redis: what it might lose, the ledger still has.
        again = replay(erasures, EventLog(events, partitions, unsafe=True), ProfileStore(profiles, partitions))
    return {"erasures": len(erasures), "again": again}


def forget_in(store: ProfileStore, certificates: Certificates, pending: Iterable[Certificate]) -> None:
    """Makes erasures hold in one profile store, even if no projector brings it the marks of the log.

    Raises:
        Unavailable: A Redis does not answer; a repeat is safe.
    """
    certificate_ids = {certificate.certificate_id for certificate in pending}
    erasures = [erasure for erasure in certificates.erasures() if erasure.certificate_id in certificate_ids]
    store.mark_many(erasure_marks(erasures))


def erasure_marks(erasures: Iterable[Erasure]) -> list[tuple[int, Mark]]:
    """Returns the marks by which profiles forget erased users, each with its partition."""
    return [
        (erasure.partition, Mark(erasure.log_id, erasure.address, forget=True, controls=b"")) for erasure in erasures
    ]


def _missing(log_erasure: LogErasure, partition: int, erasures: Sequence[Erasure]) -> set[Erasure]:
    """Returns the erasures of a partition that its log does not know."""
    lacks = log_erasure.lacks(partition, [(erasure.subject_hash, erasure.log_id) for erasure in erasures])
    return {erasure for erasure, missing in zip(erasures, lacks, strict=True) if missing}


def _erase(log_erasure: LogErasure, erasure: Erasure, names: dict[bytes, str]) -> Erased:
    """Erases a user from the log again: by name, if an entry of the restored log tells it."""
    name = names.get(erasure.address)
    if name:
        return log_erasure.erase(name)
    return log_erasure.erase_unnamed(erasure.partition, erasure.subject_hash, erasure.address)
