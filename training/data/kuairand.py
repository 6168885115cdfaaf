"""KuaiRand-Pure -> canonical tables: a video feed with real impressions and several actions.

The tidy Parquet files are read: `impressions`, `videos`, `users` and `user_history`. A user's history before the first
impression has an order and one time, the last; its views may have been clicked, which is not recorded, so they are
`view_item` while an impression is `view_item_list`. The data set has no positions: each impression is a slate of one
item. An action is dated at the end of watching, because no service could know of it before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import pc
from features.tables.convert import pack_map
from features.tables.schema import IMPRESSIONS

SHOWN, VIEWED = "view_item_list", "view_item"
ACTIONS = {
    "is_click": "select_item",
    "long_view": "long_view",
    "is_like": "like",
    "is_hate": "hide",
    "is_follow": "follow",
    "is_comment": "comment",
    "is_forward": "share",
    "is_profile_enter": "view_creator",
}
"""Column of the publisher -> event type. The value of a click and of a long view is the time watched, in seconds."""
IMPRESSION_COLUMNS = ("user_id", "video_id", "time_ms", "tab", "play_time_ms", "duration_ms", *ACTIONS)
HISTORY_COLUMNS = ("user_id", "last_time_ms", "exposed_seq_last50", "liked_seq", "long_watch_seq")
VIDEO_COLUMNS = ("video_id", "author_id", "video_type", "upload_type", "video_duration", "tag", "upload_dt")
_WATCHED = ("is_click", "long_view")


def event_table(impressions: pa.Table, history: pa.Table) -> pa.Table:
    """Returns the users' earlier events, the impressions as events, and the actions that followed them."""
    return pa.concat_tables([_past(history), *_followed(impressions)])


def impression_table(impressions: pa.Table) -> pa.Table:
    """Returns one slate per impression; the policy that chose it is unknown, so its propensity is NaN."""
    count = impressions.num_rows
    offsets: Any = pa.array(np.arange(count + 1, dtype=np.int32))
    columns: dict[str, Any] = {
        "request_id": _requests(count),
        "user_id": _text(impressions["user_id"]),
        "timestamp": impressions["time_ms"].combine_chunks(),
        "item_ids": pa.ListArray.from_arrays(offsets, _text(impressions["video_id"])),
        "propensities": pa.ListArray.from_arrays(offsets, pa.array(np.full(count, np.nan))),
        "surface": _surfaces(impressions),
    }
    return pa.table(
        [columns[field.name] if field.name in columns else pa.nulls(count, field.type) for field in IMPRESSIONS],
        schema=IMPRESSIONS,
    )


def item_table(videos: pa.Table, impressions: pa.Table) -> pa.Table:
    """Returns the videos; a missing duration is taken from an impression of the video."""
    ids = videos["video_id"].to_numpy()
    seconds = videos["video_duration"].to_numpy().astype(np.float64) / 1000
    shown = impressions["video_id"].to_numpy()
    by_video = dict(zip(shown.tolist(), (impressions["duration_ms"].to_numpy() / 1000).tolist(), strict=True))
    lacking = np.flatnonzero(~(seconds > 0))
    seconds[lacking] = [by_video.get(name, np.nan) for name in ids[lacking].tolist()]
    durations = pa.array(seconds, mask=~(seconds > 0))
    traits = {name: videos[name].combine_chunks() for name in ("video_type", "upload_type")}
    uploaded = pc.cast(pc.strptime(videos["upload_dt"], "%Y-%m-%d", "ms", error_is_null=True), pa.int64())
    return pa.table(
        {
            "item_id": _text(videos["video_id"]),
            "categories": videos["tag"],
            "creator_id": _text(videos["author_id"]),
            "available_from": pa.array(uploaded.to_numpy(), pa.int64()),
            "attributes": pack_map({"duration": pc.cast(durations, pa.string()), **traits}),
        }
    )


def user_table(users: pa.Table) -> pa.Table:
    """Returns the users, with all their traits as attributes."""
    traits = {name: pc.cast(users[name].combine_chunks(), pa.string()) for name in users.column_names}
    return pa.table({"user_id": traits.pop("user_id"), "attributes": pack_map(traits)})


@dataclass(slots=True)
class _Lines:
    """Earlier events while they are collected."""

    users: list[int]
    items: list[int]
    kinds: list[str]
    times: list[int]


def _past(history: pa.Table) -> pa.Table:
    lines = _Lines([], [], [], [])
    for user in history.to_pylist():
        exposed, liked, watched = (user[name] or [] for name in HISTORY_COLUMNS[2:])
        events: list[tuple[int, str]] = []
        long_at, older_long = _aligned(exposed, watched)
        like_at, older_like = _aligned(exposed, liked)
        events += [(item, "long_view") for item in older_long] + [(item, "like") for item in older_like]
        for at, item in enumerate(exposed):
            # The long view first: a view before it would give away the target that an encoder is to predict.
            events += [(item, "long_view")] * long_at[at] + [(item, VIEWED)] + [(item, "like")] * like_at[at]
        lines.users += [user["user_id"]] * len(events)
        lines.items += [item for item, _ in events]
        lines.kinds += [kind for _, kind in events]
        lines.times += [user["last_time_ms"]] * len(events)
    count = len(lines.users)
    return _events(
        user=pc.cast(pa.array(lines.users, pa.int64()), pa.string()),
        item=pc.cast(pa.array(lines.items, pa.int64()), pa.string()),
        kind=pa.array(lines.kinds, pa.string()),
        time=pa.array(lines.times, pa.int64()),
        sequence=np.arange(count) - count,
    )


def _aligned(exposed: Sequence[int], chosen: Sequence[int]) -> tuple[list[bool], Sequence[int]]:
    """Returns True for the newest views that were chosen, and the items chosen before them; lists are in time order."""
    # The two lists share their newest items and no times, so they are matched from their ends.
    flags, remaining = [False] * len(exposed), len(chosen)
    for at in range(len(exposed) - 1, -1, -1):
        if remaining and exposed[at] == chosen[remaining - 1]:
            flags[at] = True
            remaining -= 1
    return flags, chosen[:remaining]


def _followed(impressions: pa.Table) -> list[pa.Table]:
    """Returns the impressions as events, and a table per action."""
    times, played = impressions["time_ms"].to_numpy(), impressions["play_time_ms"].to_numpy()
    columns = {
        "user": _text(impressions["user_id"]),
        "item": _text(impressions["video_id"]),
        "request": _requests(impressions.num_rows),
        "surface": _surfaces(impressions),
    }
    tables = []
    for place, name in enumerate(("", *ACTIONS)):
        rows = np.flatnonzero(impressions[name].to_numpy()) if name else np.arange(impressions.num_rows)
        seconds = played[rows] / 1000 if name in _WATCHED else np.full(rows.size, np.nan)
        tables.append(
            _events(
                **{key: column.take(pa.array(rows)) for key, column in columns.items()},
                kind=pa.repeat(ACTIONS[name] if name else SHOWN, rows.size),
                time=pa.array(times[rows] + (played[rows] if name else 0)),
                sequence=rows * (1 + len(ACTIONS)) + place,
                value=pa.array(seconds, mask=np.isnan(seconds)),
            )
        )
    return tables


def _events(*, user: Any, item: Any, kind: Any, time: Any, sequence: npt.NDArray[np.int64], **more: Any) -> pa.Table:
    count = len(user)
    nulls = pa.nulls(count, pa.string())
    return pa.table(
        {
            "user_id": user,
            "item_id": item,
            "event_type": kind,
            "timestamp": time,
            "sequence": pa.array(sequence, pa.int64()),
            "value": pc.cast(more.get("value", pa.nulls(count, pa.float64())), pa.float32()),
            "request_id": more.get("request", nulls),
            "surface": more.get("surface", nulls),
        }
    )


def _text(column: Any) -> Any:
    return pc.cast(column.combine_chunks(), pa.string())


def _requests(count: int) -> Any:
    return pc.binary_join_element_wise("r", pc.cast(pa.array(np.arange(count)), pa.string()), "")


def _surfaces(impressions: pa.Table) -> Any:
    return pc.binary_join_element_wise("tab", _text(impressions["tab"]), "")
