"""Finds the newest moment that the events of a data set vouch for, which no single wrong clock moves.

The end of the data is the "now" of a training: what is recent and what is tested lies before it. One telephone that
believes in 2099 must not be that end. An event that claims to be later than the moment at which it was logged is from a
wrong clock for certain; and a few events behind a gap far longer than any before are the end of nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import numbers, to_mask

DAY_MS = 86_400_000
AHEAD_MS = 60_000
"""The time by which an event may be ahead of the moment at which it was logged."""

FEWEST = 20
"""With fewer events nothing can be told from gaps."""

_SHARE = 0.005  # of the events may stand behind such a gap; more of them are a time of their own
_LEAST = 2  # of them in any case
_LONGER = 4  # times as long as any gap before
# The fewer events, the longer are honest gaps: 30 days at a thousand events, 600 at fifty, one from 30,000 on.
_EVENT_DAYS = 30_000

_I64 = npt.NDArray[np.int64]


def newest_moment(batches: Iterable[pa.Table]) -> int | None:
    """Returns the newest time, ms, that is not a wrong clock's; None if no event has a time.

    Without wrong clocks it is the newest time of all.

    Args:
        batches: The events in parts, with the columns `timestamp` and `ingested_at`.
    """
    every, credible = _Days(), _Days()
    for batch in batches:
        timed = to_mask(batch["timestamp"].is_valid())
        times = numbers(batch["timestamp"])[timed]
        every.add(times)
        credible.add(times[~is_ahead(batch)[timed]])
    # Where most events are ahead of the log, it is the log's clock that is wrong, or another zone's.
    days = credible if 2 * credible.count > every.count else every
    return days.newest()


def is_ahead(events: pa.Table) -> npt.NDArray[np.bool_]:
    """Returns a mask of events that claim to be later than they were logged, a sign of a wrong clock; bool [n]."""
    timed = to_mask(events["timestamp"].is_valid()) & to_mask(events["ingested_at"].is_valid())
    return timed & (numbers(events["timestamp"]) - numbers(events["ingested_at"]) > AHEAD_MS)


def iso_time(ms: int) -> str:
    """Returns a moment to the second, as ISO 8601 writes it in UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class _Days:
    """Times by day: all that gaps of a day and more can be seen in, however many events there are."""

    def __init__(self) -> None:
        self.count = 0
        # Day, number of times, first and last time; int64 [days, 4], in the order of days.
        self._days: _I64 = np.empty((0, 4), np.int64)

    def add(self, times: _I64) -> None:
        """Counts some times, ms; int64 [n], in any order."""
        if not times.size:
            return
        self.count += times.size
        times = np.sort(times)
        days = times // DAY_MS
        first = np.flatnonzero(np.concatenate([[True], days[1:] != days[:-1]]))
        last = np.append(first[1:], times.size) - 1
        rows = np.concatenate([self._days, np.stack([days[first], last - first + 1, times[first], times[last]], 1)])
        distinct, place = np.unique(rows[:, 0], return_inverse=True)
        counts = np.bincount(place, rows[:, 1], distinct.size).astype(np.int64)
        lows, highs = np.full(distinct.size, np.iinfo(np.int64).max), np.full(distinct.size, np.iinfo(np.int64).min)
        np.minimum.at(lows, place, rows[:, 2])
        np.maximum.at(highs, place, rows[:, 3])
        self._days = np.stack([distinct, counts, lows, highs], 1)

    def newest(self) -> int | None:
        """Returns the last time before a gap that is too long and has too few times behind it; None without times."""
        if not self.count:
            return None
        _, counts, lows, highs = self._days.T
        if self.count < FEWEST:
            return int(highs[-1])
        few = max(_LEAST, int(_SHARE * self.count))
        floor = DAY_MS * max(1.0, _EVENT_DAYS / self.count)
        before = np.cumsum(counts)[:-1]
        longest = 0
        for gap, count, last in zip((lows[1:] - highs[:-1]).tolist(), before.tolist(), highs.tolist(), strict=False):
            if count <= few:
                continue  # nor do clocks that are far behind make a gap look usual
            if self.count - count <= few and gap > max(floor, _LONGER * longest):
                return int(last)
            longest = max(longest, gap)
        return int(highs[-1])
