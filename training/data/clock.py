"""The end of the data, by which training says what is recent and what is tested, and the events behind it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from features.tables.clock import iso_time
from training.data.interactions import Interactions


def newest_of(data: Interactions, ends: npt.NDArray[np.int64] | None = None) -> int:
    """Returns the time of the newest event, ms, that is not from a wrong clock; 0 where there is none.

    Args:
        data: All events.
        ends: The leading events of each person that are looked at; int64 `[U]`; None for all.
    """
    newest = 0
    for block in data.blocks():
        times = data.timestamps[block.events]
        # Not each person's last event alone: a log's order comes before times.
        chosen = times <= data.trusted_until
        if ends is not None:
            chosen &= block.position < ends[block.owner]
        newest = max(newest, int(times[chosen].max(initial=0)))
    return newest


def report_future_events(data: Interactions) -> dict[str, Any]:
    """Tells on stderr of events from wrong clocks, which lie after the end of the data.

    Returns:
        `future_events`: their number.
    """
    count, latest = 0, 0
    for block in data.blocks():
        late = data.timestamps[block.events]
        late = late[late > data.trusted_until]
        count, latest = count + late.size, max(latest, int(late.max(initial=0)))
    if count:
        print(
            f"events: {count:,} of {data.rows.size:,} are from wrong clocks, after {iso_time(data.trusted_until)}, "
            f"where the data end, up to {iso_time(latest)}: they count in histories, and are neither recent, nor "
            "targets, nor tested; `penchant validate` names them",
            file=sys.stderr,
        )
    return {"future_events": count}
