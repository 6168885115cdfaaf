"""Checks if a warehouse holds all that its log gave out, or if another folder has a part of it.

There are two signs: a hole in the spans that the warehouse itself noted (`features.spans`), and, also in one that noted
nothing, a partition that is silent while so many users of the others are active that chance cannot be the reason.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from features.arrays import numbers
from features.spans import Hole, read_spans
from features.subjects import partition_of, subject_of
from features.tables.clock import iso_time
from features.tables.evidence import Evidence, Finding
from features.tables.order import codes, is_present

_CHANCE = 1e-9
"""Chance of a silence above which it is no sign."""

_SEQUENCE_BITS = 20
_MARGIN = 5_000 << _SEQUENCE_BITS
"""Part of a silence at both of its ends in which the events of others are no sign, as log ids: 5 seconds."""

_GAPS = 3
_MEND = (
    "look for another folder that a warehouse of this log has written (penchant hosts lists them), stop both, and copy "
    "its events, searches and impressions to here; files never overlap"
)


def split(evidence: Evidence) -> Iterator[Finding]:
    """No part of the log is missing."""
    assert evidence.warehouse is not None
    spans = read_spans(evidence.warehouse)
    holes = list(spans.holes())
    noted = sum(len(pieces) for partitions in spans.by_stream.values() for pieces in partitions.values())
    if noted:
        example = f", first {_named(holes[0])}" if holes else ""
        yield Finding(len(holes), noted, f"{len(holes)} parts of the log went elsewhere{example}", _MEND)
    yield from _silences(evidence, int(evidence.partitions))


def _named(hole: Hole) -> str:
    begin = iso_time(hole.after >> _SEQUENCE_BITS) if hole.after else "the beginning"
    end = iso_time(hole.until >> _SEQUENCE_BITS)
    return f"{hole.stream} of partition {hole.partition} from {begin} to {end}"


def _silences(evidence: Evidence, partitions: int) -> Iterator[Finding]:
    """Partitions that are silent for longer than chance explains."""
    if partitions < 2 or not evidence.events.num_rows or not is_present(evidence.events["log_id"]):
        return
    users, event_users = codes(evidence.events["user_id"])
    home = np.array([_partition(user, partitions) for user in users], np.int64)
    log_ids = numbers(evidence.events["log_id"])
    order = np.argsort(log_ids, kind="stable")
    event_users, log_ids = event_users[order], log_ids[order]
    counts = np.bincount(home, minlength=partitions)
    empty = np.flatnonzero(counts == 0)
    silent: list[str] = []
    if empty.size and (1 - 1 / partitions) ** len(users) * partitions < _CHANCE:
        silent.append(f"{empty.size} of {partitions} partitions hold no event, the first of them {empty[0]}")
    for partition in np.flatnonzero(counts).tolist():
        silent += _gaps(partition, home, event_users, log_ids, partitions)
    message = f"{len(silent)} silences of partitions that chance does not explain"
    example = f", first: {silent[0]}" if silent else ""
    yield Finding(len(silent), partitions, message + example, _MEND)


def _gaps(
    partition: int,
    home: npt.NDArray[np.int64],
    event_users: npt.NDArray[np.int64],
    log_ids: npt.NDArray[np.int64],
    partitions: int,
) -> Iterator[str]:
    """Yields the longest silences of a partition in which users elsewhere are more active than chance explains."""
    places = np.flatnonzero(home[event_users] == partition)
    edges = np.concatenate([[-1], places, [event_users.size]])
    users, elsewhere = int(np.count_nonzero(home == partition)), int(np.count_nonzero(home != partition))
    for at in np.argsort(np.diff(edges))[::-1][:_GAPS].tolist():
        start, end = int(edges[at]) + 1, int(edges[at + 1])
        # The silence may be the beginning or the end. A batch comes in partition after partition, so what happened next
        # to its ends is no sign.
        first, last = log_ids[max(start - 1, 0)], log_ids[min(end, event_users.size - 1)]
        middle = (log_ids[start:end] > first + _MARGIN) & (log_ids[start:end] + _MARGIN < last)
        active = np.unique(event_users[start:end][middle]).size
        # Users are spread over partitions by a hash: each is as likely as any other to be active in a while.
        chance = (1 - active / elsewhere) ** users * partitions * _GAPS if elsewhere else 1.0
        if chance < _CHANCE:
            times = [iso_time(int(log_ids[place]) >> _SEQUENCE_BITS) for place in (start, end - 1)]
            yield (
                f"partition {partition} is silent from {times[0]} to {times[1]}, while {active} of {elsewhere} users "
                "of other partitions are not"
            )


def _partition(user: str, partitions: int) -> int:
    """The partition of a user, as the service finds it."""
    return partition_of(subject_of(user), partitions)
