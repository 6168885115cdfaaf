"""Finds the end of the data, which defines recent and tested events, and reports the events that lie behind it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from features.tables.clock import iso_time
from training.data.interactions import Interactions


def newest_of(data: Interactions, ends: npt.NDArray[np.int64] | None = None) -> int:
    """Returns the time of the newest event, ms, that is not from a wrong clock; 0 if there is none.

    Args:
        data: All events.
        ends: The leading events of each user that are looked at; int64 `[U]`; None for all.
    """
    newest = 0
    for block in data.blocks():
        times = data.timestamps[block.events]
        # All events of a user are looked at, not the last alone: a log's order comes before times.
        is_chosen = times <= data.trusted_until
        if ends is not None:
            is_chosen &= block.position < ends[block.owner]
        newest = max(newest, int(times[is_chosen].max(initial=0)))
    return newest


def report_future_events(data: Interactions) -> dict[str, Any]:
    """Reports on stderr the events from wrong clocks, which lie after the end of the data.

    Returns:
        `future_events`: their number.
    """
    count, latest = 0, 0
    for block in data.blocks():
        times = data.timestamps[block.events]
        times = times[times > data.trusted_until]
        count, latest = count + times.size, max(latest, int(times.max(initial=0)))
    if count:
        print(
            f"events: {count:,} of {data.rows.size:,} are from wrong clocks, after {iso_time(data.trusted_until)}, "
            f"where the data end, up to {iso_time(latest)}: they count in histories, and are neither recent, nor "
            "targets, nor tested; `penchant validate` names them",
            file=sys.stderr,
        )
    return {"future_events": count}
