"""What the log holds, as tables: events, searches and impressions row by row, sessions and daily figures derived.

Everything here is a pure function of its input, so that a repeat writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import pc
from features.profile import EVERY_PURPOSE, Purpose
from features.records import RECORD, verify
from features.subjects import user_id_of
from features.tables.order import codes
from features.tables.schema import EVENTS, IMPRESSIONS
from serving.stores import log_codec
from serving.stores.keys import time_of
from serving.stores.log_entries import Entry

SESSION_GAP_MS = 30 * 60_000
"""Time without an event after which a visit that has no id of its own is over; that of Google Analytics."""


def _column(name: str, dtype: pa.DataType, nullable: bool = True, unit: str = "") -> pa.Field[Any]:
    return pa.field(name, dtype, nullable, {"unit": unit} if unit else None)


EVENT_ROWS = pa.schema([EVENTS.field(name) for name in EVENTS.names if name != "sequence"])
"""An event of the log that is about an item."""

SEARCH_ROWS = pa.schema([EVENTS.field(name) for name in EVENT_ROWS.names if name != "item_id"])
"""An event about no item; the profile has folded it, so the history has to have it."""

IMPRESSION_ROWS = pa.schema(
    [
        *(IMPRESSIONS.field(name) for name in IMPRESSIONS.names),
        _column("log_id", pa.uint64()),
        _column("session_id", pa.string()),
        _column("rung", pa.string()),
        _column("bucket", pa.int32()),
        # True where the slate was shown to an anonymous user who was merged into this one; `arm` is that of then.
        _column("merged", pa.bool_()),
        _column("catalog_version", pa.uint64()),
        _column("feature_fingerprint", pa.string()),
        _column("encoder_digest", pa.string()),
        # What the caller said of the request.
        _column("asked_at", pa.int64(), unit="ms"),
        _column("device", pa.string()),
        _column("channel", pa.string()),
        _column("locale", pa.string()),
        EVENTS.field("attributes"),
        # What the slate was made of: what was asked for, and which sources proposed each item.
        _column("page_size", pa.int32()),
        _column("seed_item_ids", pa.list_(pa.string())),
        _column("upstream_scores", pa.list_(pa.float32())),
        _column("upstream_weight", pa.float32()),
        _column("excluded", pa.int32()),
        _column("excluded_item_ids", pa.list_(pa.string())),
        _column("dials", pa.map_(pa.string(), pa.float32())),
        _column("sources", pa.list_(pa.list_(pa.string()))),
    ]
)
"""A slate of the log."""

SESSION_ROWS = pa.schema(
    [
        _column("user_id", pa.string(), False),
        _column("session_id", pa.string()),
        _column("started_at", pa.int64(), False, "ms"),
        _column("ended_at", pa.int64(), False, "ms"),
        _column("events", pa.int64(), False),
        _column("items", pa.int64(), False),
        _column("event_types", pa.map_(pa.string(), pa.int64()), False),
    ]
)
"""One visit of one day, where the person allows measuring.

By its `session_id`, or where events have none by pauses of `SESSION_GAP_MS`.
"""

DAILY_ROWS = pa.schema(
    [
        _column("item_id", pa.string(), False),
        _column("shown", pa.int64(), False),
        _column("events", pa.int64(), False),
        _column("people", pa.int64(), False),
        _column("event_types", pa.map_(pa.string(), pa.int64()), False),
    ]
)
"""One item of one day: how often it stood in a slate, its events by type, and how many people those are of.

Of those who allow measuring.
"""

_KEPT = ("event_id", "value", "session_id", "request_id", "surface", "query", "position")


Allowing = Callable[[Entry], Purpose]
"""What the person of an entry allows."""


def _everything(_: Entry) -> Purpose:
    return EVERY_PURPOSE


def event_tables(entries: Sequence[Entry], allowing: Allowing = _everything) -> tuple[pa.Table, pa.Table, int]:
    """`EVENT_ROWS` and `SEARCH_ROWS` of the entries, in their order, and how many of them are damaged.

    Damaged is what the profiles refuse as well: a record that fails its checksum, or a payload that is no JSON. Marks
    of erasures, and what was erased while it waited, are left out and not counted.
    """
    whole = [entry for entry in entries if entry.subject and len(entry.record) == RECORD.itemsize]
    records = np.frombuffer(b"".join(entry.record for entry in whole), RECORD)
    events: list[dict[str, Any]] = []
    searches: list[dict[str, Any]] = []
    for entry, record, intact in zip(whole, records, verify(records).tolist(), strict=True):
        said = _said(entry)
        if intact and said is not None:
            row = _event(entry, record, said) | _allowed(allowing(entry))
            (events if said["item_id"] else searches).append(row)
    damaged = sum(bool(entry.subject) for entry in entries) - len(events) - len(searches)
    return pa.Table.from_pylist(events, EVENT_ROWS), pa.Table.from_pylist(searches, SEARCH_ROWS), damaged


def impression_table(entries: Sequence[Entry], allowing: Allowing = _everything) -> tuple[pa.Table, int]:
    """`IMPRESSION_ROWS` of the entries, in their order, and how many of them are damaged."""
    rows = [
        _impression(entry, said) | _allowed(allowing(entry))
        for entry in entries
        if entry.subject and (said := _said(entry)) is not None
    ]
    return pa.Table.from_pylist(rows, IMPRESSION_ROWS), sum(bool(entry.subject) for entry in entries) - len(rows)


def _allowed(purposes: Purpose) -> dict[str, bool]:
    return {"allow_train": Purpose.TRAIN in purposes, "allow_measure": Purpose.MEASURE in purposes}


def _said(entry: Entry) -> dict[str, Any] | None:
    """The payload of an entry, None where it is damaged."""
    try:
        fields = log_codec.decode(entry.payload) if entry.record else log_codec.decode_slate(entry.payload)
    except ValueError:
        return None
    needed = {"item_id", "event_type", "timestamp"} if entry.record else {"item_ids", "request_id", "timestamp"}
    return fields if needed <= fields.keys() else None


def _event(entry: Entry, record: Any, said: dict[str, Any]) -> dict[str, Any]:
    return {
        "user_id": user_id_of(entry.subject),
        "item_id": said["item_id"],
        "event_type": said["event_type"],
        "timestamp": said["timestamp"],
        "log_id": entry.log_id,
        "ingested_at": time_of(entry.log_id),
        "attributes": _attributes(said),
        "category_key": int(record["category"]),
        "creator_key": int(record["creator"]),
        "personal": entry.personal,
        **{name: said.get(name) for name in _KEPT},
    }


def _attributes(said: dict[str, Any]) -> list[tuple[str, str]] | None:
    return list(said["attributes"].items()) if said.get("attributes") else None


def _impression(entry: Entry, said: dict[str, Any]) -> dict[str, Any]:
    row = {name: said.get(name) for name in IMPRESSION_ROWS.names} | {"attributes": _attributes(said)}
    row["dials"] = list(said["dials"].items()) if said.get("dials") else None
    for name in ("propensities", "scores"):
        row[name] = [float("nan") if value is None else value for value in said.get(name) or ()]
    for name in ("surface", "session_id", "query", "arm", "method"):
        row[name] = row[name] or None
    return row | {"user_id": user_id_of(entry.subject), "log_id": entry.log_id}


def sessions(events: pa.Table, gap_ms: int = SESSION_GAP_MS) -> pa.Table:
    """`SESSION_ROWS` of one day's events and searches, ordered by person and start.

    Args:
        events: `user_id`, `session_id`, `timestamp`, `item_id` (NULL for a search), `event_type`.
        gap_ms: Time without an event after which a visit without an id is over.
    """
    if not events.num_rows:
        return SESSION_ROWS.empty_table()
    people, who = codes(events["user_id"])
    visits, visit = codes(pc.fill_null(events["session_id"], ""))
    named = np.array([bool(name) for name in visits])[visit]
    times = events["timestamp"].to_numpy()
    rank = np.argsort(np.argsort(people))[who]
    order = np.lexsort([events["log_id"].to_numpy(), times, visit, rank])
    new = np.ones(order.size, bool)
    same = (rank[order][1:] == rank[order][:-1]) & (visit[order][1:] == visit[order][:-1])
    paused = (times[order][1:] - times[order][:-1] > gap_ms) & ~named[order][1:]
    new[1:] = ~same | paused
    starts = np.flatnonzero(new)
    ends = np.append(starts[1:], order.size)
    number = np.cumsum(new) - 1
    first = order[starts]
    found = pa.table(
        [
            pa.array([people[at] for at in who[first]]),
            pa.array([visits[at] or None for at in visit[first]], pa.string()),
            pa.array(times[first]),
            pa.array(times[order[ends - 1]]),
            pa.array(ends - starts),
            pa.array(_distinct(number, events["item_id"].take(order), starts.size)),
            _counts(number, events["event_type"].take(order), starts.size),
        ],
        schema=SESSION_ROWS,
    )
    return found.sort_by([("user_id", "ascending"), ("started_at", "ascending"), ("session_id", "ascending")])


def daily(events: pa.Table, impressions: pa.Table) -> pa.Table:
    """`DAILY_ROWS` of one day, ordered by item.

    Args:
        events: `item_id`, `user_id`, `event_type`.
        impressions: `item_ids`.
    """
    shown: Any = pc.list_flatten(impressions["item_ids"])
    items, which = codes(pa.chunked_array([*events["item_id"].chunks, *shown.chunks], pa.string()))
    if not items:
        return DAILY_ROWS.empty_table()
    done = which[: events.num_rows]
    found = pa.table(
        [
            pa.array(items),
            pa.array(np.bincount(which[events.num_rows :], minlength=len(items))),
            pa.array(np.bincount(done, minlength=len(items))),
            pa.array(_distinct(done, events["user_id"], len(items))),
            _counts(done, events["event_type"], len(items)),
        ],
        schema=DAILY_ROWS,
    )
    return found.sort_by("item_id")


def _distinct(group: npt.NDArray[np.int64], names: pa.ChunkedArray[Any], groups: int) -> npt.NDArray[np.int64]:
    """Number of distinct names in each group; NULL is none."""
    some = names.is_valid().to_numpy()
    distinct, code = codes(pc.fill_null(names, ""))
    pairs = np.unique(group[some] * (len(distinct) + 1) + code[some])
    return np.bincount(pairs // (len(distinct) + 1), minlength=groups).astype(np.int64)


def _counts(group: npt.NDArray[np.int64], names: pa.ChunkedArray[Any], groups: int) -> Any:
    """A map per group from name to how often it stands there, names in their order."""
    distinct, code = codes(names)
    rank = np.argsort(np.argsort(distinct))[code] if distinct else code
    width = max(len(distinct), 1)
    pairs, counts = np.unique(group * width + rank, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(np.bincount(pairs // width, minlength=groups))])
    ordered = np.array(sorted(distinct), object)
    keys = pa.array(ordered[pairs % width].tolist() if distinct else [], pa.string())
    offsets: Any = pa.array(ends.astype(np.int32))
    return pa.MapArray.from_arrays(offsets, keys, pa.array(counts.astype(np.int64)))
