"""Rebuilds profiles from a data set, of now or of any earlier version."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.clock import now_ms
from features.profile import Retention
from features.records import RECORD
from features.tables.dataset import Dataset, read_info
from features.tables.intake import REJECTED_SHARE, admit
from serving.privacy.marks import marks_of_log
from serving.projection.histories import read_history
from serving.projection.states import fold_states
from serving.redis.client import connect
from serving.stores.event_log import EventLog
from serving.stores.keys import address_of
from serving.stores.log_entries import Entry, Mark, sound
from serving.stores.meta import partitions_for, partitions_of
from serving.stores.profile_access import TailFull
from serving.stores.profile_repair import Repairs
from serving.stores.profiles import Applied, ProfileStore, StatesWritten

_TIMEOUT_S = 10.0


def rebuild(
    data: Path,
    redis_url: str,
    events_redis_url: str | None = None,
    *,
    partitions: int | None = None,
    retention: Retention | None = None,
    max_rejected_share: float = REJECTED_SHARE,
) -> dict[str, Any]:
    """Folds the events of a data set, such as the warehouse, into profiles and stores those.

    Events that came in live since stay, and what the log has got since the data set was written is applied as well.
    What was erased, undone or forgotten by a reset is not brought back from any data set, even if the profiles were
    lost, and a user who allows no personal answers gets no profile.

    Args:
        data: Directory of the data set.
        redis_url: The profiles Redis.
        events_redis_url: The Redis of the event log, if it is another; there must be a log, as `serve` creates it.
        partitions: Partitions of the event log; None: as the log says.
        retention: How long events stay in profiles.
        max_rejected_share: Share of a table's rows that may be malformed.

    Returns:
        `profiles` written, `kept` as they were, `events` folded, `applied` from the log, `seconds`, and what was left
        out of the data set, as `features.tables.intake.summary` says.

    Raises:
        TablesError: The data set cannot be read, or too many of its rows are malformed; nothing is stored.
        ConfigError: The URL is wrong, no event log is there, or it has another number of partitions.
        Unavailable: A Redis does not answer; a repeat is safe.
    """
    begun = time.monotonic()
    # Read first: what the warehouse gets meanwhile is in the log as well.
    until = int(read_info(data).get("until", 0))
    dataset, retention = read_history(data), retention or Retention({})
    left_out = admit(dataset.intake, max_rejected_share, "--max-rejected-share ", dataset.info.get("time_units"))
    with connect(redis_url, _TIMEOUT_S) as client, connect(events_redis_url or redis_url, _TIMEOUT_S) as events:
        # Without the log, users who were erased or withdrew their consent would have a profile again.
        partitions_of(events)
        partitions = partitions_for(events, partitions)
        store, log = ProfileStore(client, partitions), EventLog(events, partitions)
        store.open()
        log.open()
        loaded, applied = _fill(store, log, dataset, until, retention)
    return {
        "profiles": loaded.written,
        "kept": loaded.kept,
        "events": dataset.events.num_rows,
        "applied": applied,
        **left_out,
        "seconds": round(time.monotonic() - begun, 3),
    }


def _fill(
    store: ProfileStore, log: EventLog, dataset: Dataset, until: int, retention: Retention
) -> tuple[StatesWritten, int]:
    """Stores the states of a data set, then applies the events of the log behind `until`; returns their number too."""
    # The marks first: from then on the store itself refuses what may not be there.
    marks = list(marks_of_log(log))
    store.mark_many(marks)
    undone = frozenset(entry.undone for entries in _logged(log, until) for entry in entries)
    loaded = store.put_states(fold_states(dataset, store, log, retention, undone))
    # And again: a profile that took the place of a damaged one knows nothing of them yet.
    store.mark_many(marks)
    return loaded, sum(_apply(entries, store, retention, marks) for entries in _logged(log, until))


def _logged(log: EventLog, after: int) -> Iterator[list[Entry]]:
    """Yields the events of the log behind a log id, one partition after the other, each in log order and in pieces."""
    for partition in range(log.partitions):
        place = after
        while entries := log.read(partition, place):
            yield entries
            place = entries[-1].log_id


def _apply(
    entries: Sequence[Entry], store: ProfileStore, retention: Retention, marks: Sequence[tuple[int, Mark]]
) -> int:
    """Applies events of one partition to the profiles that lack them; returns the number of those.

    A profile that is still damaged, in its tail or because the data set does not have its user, is started over: the
    log has all of it. `marks` are what the log knows users to have set.
    """
    batch: dict[str, list[tuple[int, bytes]]] = {}
    events, _ = sound(entries)
    records = np.frombuffer(b"".join(entry.record for entry in events), RECORD)
    expired = retention.expired(records, now_ms())
    for entry, is_expired in zip(events, expired.tolist(), strict=True):
        if not is_expired:
            batch.setdefault(entry.subject, []).append((entry.log_id, entry.record))
    for subject in Repairs(store).damaged(list(batch)):
        Repairs(store).salvage(subject)
        store.mark_many([marked for marked in marks if marked[1].address == address_of(subject)])
    applied = 0
    for (subject, missing), reply in zip(batch.items(), store.apply_many(list(batch.items())), strict=True):
        if isinstance(reply, TailFull):
            # All before these events is in the profile, from the data set or from here: it may be folded.
            store.compact(subject, missing[0][0] - 1)
            reply = store.apply(subject, missing)
        if isinstance(reply, Applied):
            applied += reply.inserted
        else:
            raise reply
    return applied
