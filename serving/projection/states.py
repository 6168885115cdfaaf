"""The states of profiles, folded from a data set, less what users erased or undid and what is past its retention."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt

from features.clock import now_ms
from features.profile import Profile, Retention, empty, fold
from features.tables.dataset import Dataset
from serving.projection.histories import UserEvents
from serving.stores.event_log import EventLog
from serving.stores.keys import LIVE, SEQUENCE_BITS
from serving.stores.profiles import ProfileStore

_USERS_AT_ONCE = 1000


def fold_states(
    dataset: Dataset, store: ProfileStore, log: EventLog, retention: Retention, undone: Collection[int] = ()
) -> Iterator[tuple[str, Profile]]:
    """Yields the state of each user of a data set who has one.

    Args:
        dataset: The data set.
        store: The profiles; what a user made them forget is left out.
        log: The event log; what a user erased is left out.
        retention: How long events stay in profiles.
        undone: Log ids of events that have no effect.

    Raises:
        Unavailable: A Redis does not answer.
    """
    events = UserEvents(dataset)
    dropped = retention.expired(events.records, now_ms())
    dropped |= np.isin(events.log_ids, np.array(sorted(undone), np.uint64))
    for first in range(0, len(events.subjects), _USERS_AT_ONCE):
        subjects = events.subjects[first : first + _USERS_AT_ONCE]
        limits = zip(store.erased_before(subjects), log.erased(subjects), strict=True)
        for user, (subject, (forgotten, erased_ms)) in enumerate(zip(subjects, limits, strict=True), first):
            start, end = events.span(user)
            # As uint64: numpy would compare a Python integer as float64, which cannot tell neighbouring log ids apart.
            start += int(np.searchsorted(events.log_ids[start:end], np.uint64(forgotten), side="right"))
            log_ids, records = events.log_ids[start:end], events.records[start:end]
            kept = records[~dropped[start:end] & ~_before_erasure(log_ids, records["timestamp"], erased_ms)]
            if kept.size:
                yield subject, fold(empty(), kept, int(log_ids[-1]))


def _before_erasure(
    log_ids: npt.NDArray[np.uint64], timestamps: npt.NDArray[np.int64], erased_ms: int
) -> npt.NDArray[np.bool_]:
    """Returns True for each event from before an erasure at a time, ms; bool [n].

    A live event counts by the time at which it was logged, an imported one by its own.
    """
    if not erased_ms:
        return np.zeros(log_ids.size, np.bool_)
    logged_ms = (log_ids >> np.uint64(SEQUENCE_BITS)).astype(np.int64)
    return np.where(log_ids >= np.uint64(LIVE), logged_ms, timestamps) <= erased_ms
