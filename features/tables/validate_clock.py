"""The check of `features.tables.validate` that finds events from wrong clocks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from features.arrays import numbers, to_mask
from features.tables.clock import AHEAD_MS, is_ahead, iso_time, newest_moment
from features.tables.evidence import SPARED, Evidence, Finding

SKEW_MS = 5 * 60_000
"""Median distance of the clocks of callers and log above which they are not the same clock."""

_HALF_HOUR_MS = 30 * 60_000  # time zones differ by whole ones
_OLDEST_MS = 631_152_000_000  # 1990: what is older was counted in another unit


def clock_skew(evidence: Evidence) -> Iterator[Finding]:
    """The callers' clocks are the clock of the log, and one event with a wrong one is found among a million."""
    events = evidence.events
    timed = to_mask(events["timestamp"].is_valid())
    times = numbers(events["timestamp"])
    of = int(np.count_nonzero(timed))
    remedy = "send milliseconds UTC since 1970, and set the caller's clock (NTP)"
    odd = timed & ((times > evidence.now_ms + SKEW_MS) | (times < _OLDEST_MS))
    wrong, example = int(np.count_nonzero(odd)), _example(evidence, odd)
    yield Finding(wrong, of, f"{wrong} of {of} events are from the future or from before 1990{example}", remedy)
    newest, ahead = newest_moment([events]) or 0, is_ahead(events)
    after = timed & (times > newest) & ~odd & ~ahead
    wrong, example = int(np.count_nonzero(after)), _example(evidence, after)
    message = f"{wrong} of {of} events lie far behind {iso_time(newest)}, where all the others end{example}"
    yield Finding(wrong, of, message, remedy)
    has_both = timed & to_mask(events["ingested_at"].is_valid())
    if not has_both.any():
        return
    lag = (numbers(events["ingested_at"]) - numbers(events["timestamp"]))[has_both]
    wrong, of = int(np.count_nonzero(ahead)), int(lag.size)
    message = (
        f"{wrong} of {of} events are over {AHEAD_MS // 1000} s ahead of the clock of the log{_example(evidence, ahead)}"
    )
    yield Finding(wrong, of, message, "set the clocks of the callers (NTP), and send UTC")
    middle = float(np.median(lag))
    if abs(middle) > SKEW_MS:
        hours = abs(middle) / 3_600_000
        side = "behind" if middle > 0 else "ahead of"
        message = f"the events' times are {hours:.1f} hours {side} the clock of the log, in the median"
        yield Finding(of, of, message, "send UTC, not local time, and send events as they happen", certain=True)
    # Events that are late for another reason are late by any time: one in fifteen of them is so close to half an hour.
    late = np.abs(lag) >= _HALF_HOUR_MS - AHEAD_MS
    zoned = late & (np.abs((lag + _HALF_HOUR_MS // 2) % _HALF_HOUR_MS - _HALF_HOUR_MS // 2) < AHEAD_MS)
    wrong = int(np.count_nonzero(zoned))
    if 2 * wrong > np.count_nonzero(late):
        message = f"{wrong} of {of} events are whole half hours away from the clock of the log: local times"
        # One that is late by chance may be so by whole half hours.
        yield Finding(wrong, of, message, "send UTC, not the local time of the caller", spared=SPARED)


def _example(evidence: Evidence, wrong: npt.NDArray[np.bool_]) -> str:
    """Names the first of some events, with its time; "" where there is none."""
    if not wrong.any():
        return ""
    row = int(np.argmax(wrong))
    event = evidence.events.slice(row, 1).to_pylist()[0]
    time = event["timestamp"]
    logged = f", logged {iso_time(event['ingested_at'])}" if event["ingested_at"] is not None else ""
    place = evidence.place(row)
    return f", first {place}: timestamp {time} ({iso_time(time)}{logged}) of user {event['user_id']!r}"
