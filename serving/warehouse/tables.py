"""The log as tables: events, searches and impressions row by row, sessions and daily figures derived.

Everything here is a pure function of its input, so that a repeat writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
"""An event about no item; the profile has folded it, so a history needs it too."""

IMPRESSION_ROWS = pa.schema(
    [
        *(IMPRESSIONS.field(name) for name in IMPRESSIONS.names),
        _column("log_id", pa.uint64()),
        _column("session_id", pa.string()),
        _column("rung", pa.string()),
        _column("bucket", pa.int32()),
        # True if the slate was shown to an anonymous user who was merged into this one; `arm` is that of the former.
        _column("merged", pa.bool_()),
        _column("catalog_version", pa.uint64()),
        _column("feature_fingerprint", pa.string()),
        _column("encoder_digest", pa.string()),
        # Fields of the request.
        _column("asked_at", pa.int64(), unit="ms"),
        # Origin of the slate: more fields of the request, and the sources that proposed each item.
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
"""One visit of one day, of users who allow measuring.

A visit is told by its `session_id`, or if events have none by pauses of `SESSION_GAP_MS`.
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
"""One item of one day, of users who allow measuring.

The number of slates that it stood in, its events by type, and the number of their users.
"""

DAILY_PARTS = pa.schema(
    [
        _column("item_id", pa.string()),
        _column("event_type", pa.string()),
        _column("shown", pa.int64()),
        _column("events", pa.int64()),
        _column("users", pa.int64()),
    ]
)
"""Figures of an item in a part of a day, to be summed: its events by type, and without a type slates and users."""

_KEPT = ("event_id", "value", "session_id", "request_id", "surface", "query", "position")


PurposesOf = Callable[[Entry], Purpose]
"""Returns the purposes that the user of an entry allows."""


def _every_purpose(_: Entry) -> Purpose:
    return EVERY_PURPOSE


def event_tables(entries: Sequence[Entry], purposes_of: PurposesOf = _every_purpose) -> tuple[pa.Table, pa.Table, int]:
    """Returns `EVENT_ROWS` and `SEARCH_ROWS` of the entries, in their order, and how many of them are damaged.

    An entry is damaged if profiles refuse it as well: its record fails its checksum, or its payload is no JSON. Marks,
    and entries that were erased while they waited, are left out and not counted.
    """
    whole = [entry for entry in entries if entry.subject and len(entry.record) == RECORD.itemsize]
    records = np.frombuffer(b"".join(entry.record for entry in whole), RECORD)
    events: list[dict[str, Any]] = []
    searches: list[dict[str, Any]] = []
    for entry, record, intact in zip(whole, records, verify(records).tolist(), strict=True):
        fields = _fields(entry)
        if intact and fields is not None:
            row = _event(entry, record, fields) | _allowed(purposes_of(entry))
            (events if fields["item_id"] else searches).append(row)
    damaged = sum(bool(entry.subject) for entry in entries) - len(events) - len(searches)
    return pa.Table.from_pylist(events, EVENT_ROWS), pa.Table.from_pylist(searches, SEARCH_ROWS), damaged


def impression_table(entries: Sequence[Entry], purposes_of: PurposesOf = _every_purpose) -> tuple[pa.Table, int]:
    """Returns `IMPRESSION_ROWS` of the entries, in their order, and how many of them are damaged."""
    rows = [
        _impression(entry, fields) | _allowed(purposes_of(entry))
        for entry in entries
        if entry.subject and (fields := _fields(entry)) is not None
    ]
    return pa.Table.from_pylist(rows, IMPRESSION_ROWS), sum(bool(entry.subject) for entry in entries) - len(rows)


def _allowed(purposes: Purpose) -> dict[str, bool]:
    return {"allow_train": Purpose.TRAIN in purposes, "allow_measure": Purpose.MEASURE in purposes}


def _fields(entry: Entry) -> dict[str, Any] | None:
    """Returns the payload of an entry, None if it is damaged."""
    try:
        fields = log_codec.decode(entry.payload) if entry.record else log_codec.decode_slate(entry.payload)
    except ValueError:
        return None
    needed = {"item_id", "event_type", "timestamp"} if entry.record else {"item_ids", "request_id", "timestamp"}
    return fields if needed <= fields.keys() else None


def _event(entry: Entry, record: Any, fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "user_id": user_id_of(entry.subject),
        "item_id": fields["item_id"],
        "event_type": fields["event_type"],
        "timestamp": fields["timestamp"],
        "log_id": entry.log_id,
        "ingested_at": time_of(entry.log_id),
        "attributes": _attributes(fields),
        "category_key": int(record["category"]),
        "creator_key": int(record["creator"]),
        "personal": entry.personal,
        **{name: fields.get(name) for name in _KEPT},
    }


def _attributes(fields: dict[str, Any]) -> list[tuple[str, str]] | None:
    return list(fields["attributes"].items()) if fields.get("attributes") else None


def _impression(entry: Entry, fields: dict[str, Any]) -> dict[str, Any]:
    row = {name: fields.get(name) for name in IMPRESSION_ROWS.names} | {"attributes": _attributes(fields)}
    row["dials"] = list(fields["dials"].items()) if fields.get("dials") else None
    for name in ("propensities", "scores"):
        # JSON has no NaN: the log holds null instead.
        row[name] = [float("nan") if value is None else value for value in fields.get(name) or ()]
    for name in ("surface", "session_id", "query", "arm", "method"):
        # Empty in the log means that the request did not set it.
        row[name] = row[name] or None
    return row | {"user_id": user_id_of(entry.subject), "log_id": entry.log_id}


def sessions(events: pa.Table, gap_ms: int = SESSION_GAP_MS) -> pa.Table:
    """Returns `SESSION_ROWS` of the events and searches of some users on one day, ordered by user and start.

    Args:
        events: `user_id`, `session_id`, `timestamp`, `item_id` (NULL for a search), `event_type`.
        gap_ms: Time without an event after which a visit without an id is over.
    """
    if not events.num_rows:
        return SESSION_ROWS.empty_table()
    users, user_codes = codes(events["user_id"])
    visits, visit_codes = codes(pc.fill_null(events["session_id"], ""))
    named = np.array([bool(name) for name in visits])[visit_codes]
    times = events["timestamp"].to_numpy()
    # Places of users in the order of their names: sorting these numbers sorts the names.
    rank = np.argsort(np.argsort(users))[user_codes]
    # Of one visit the events stand together, oldest first; the log id decides between equal times.
    order = np.lexsort([events["log_id"].to_numpy(), times, visit_codes, rank])
    new = np.ones(order.size, bool)
    continued = (rank[order][1:] == rank[order][:-1]) & (visit_codes[order][1:] == visit_codes[order][:-1])
    paused = (times[order][1:] - times[order][:-1] > gap_ms) & ~named[order][1:]
    new[1:] = ~continued | paused
    starts = np.flatnonzero(new)
    ends = np.append(starts[1:], order.size)
    number = np.cumsum(new) - 1
    first = order[starts]
    rows = pa.table(
        [
            pa.array([users[code] for code in user_codes[first]]),
            pa.array([visits[code] or None for code in visit_codes[first]], pa.string()),
            pa.array(times[first]),
            pa.array(times[order[ends - 1]]),
            pa.array(ends - starts),
            pa.array(_distinct(number, events["item_id"].take(order), starts.size)),
            _counts(number, events["event_type"].take(order), starts.size),
        ],
        schema=SESSION_ROWS,
    )
    return rows.sort_by([("user_id", "ascending"), ("started_at", "ascending"), ("session_id", "ascending")])


def daily_part(events: pa.Table, shown: Mapping[str, int]) -> pa.Table:
    """Returns figures of a part of a day that has all rows of its users; `DAILY_PARTS`, to be summed by `daily`.

    Args:
        events: `item_id`, `user_id`, `event_type`.
        shown: Number of slates that each item stood in.
    """
    by_type = events.group_by(["item_id", "event_type"], use_threads=False).aggregate([([], "count_all")])
    users = events.group_by("item_id", use_threads=False).aggregate([("user_id", "count_distinct")])
    zeros, none = pa.array(np.zeros(by_type.num_rows, np.int64)), pa.nulls(users.num_rows, pa.string())
    no_shown, no_events = (pa.array(np.zeros(users.num_rows, np.int64)) for _ in range(2))
    slates = pa.array(list(shown.values()), pa.int64())
    nothing = pa.array(np.zeros(len(shown), np.int64))
    parts = [
        [by_type["item_id"], by_type["event_type"], zeros, by_type["count_all"], zeros],
        [users["item_id"], none, no_shown, no_events, users["user_id_count_distinct"]],
        [pa.array(list(shown), pa.string()), pa.nulls(len(shown), pa.string()), slates, nothing, nothing],
    ]
    return pa.concat_tables([pa.table(columns, schema=DAILY_PARTS) for columns in parts])


def daily(parts: Iterable[pa.Table]) -> pa.Table:
    """Returns `DAILY_ROWS` of one day, ordered by item, from its parts."""
    total = DAILY_PARTS.empty_table()
    for part in parts:
        # Summed after each part: what is held is as long as the catalogue, and not as the day.
        total = _summed(pa.concat_tables([total, part]), ["item_id", "event_type"])
    rows = _summed(total, ["item_id"]).sort_by("item_id")
    named = total.filter(pc.is_valid(total["event_type"])).sort_by(
        [("item_id", "ascending"), ("event_type", "ascending")]
    )
    sizes = named.group_by("item_id", use_threads=False).aggregate([([], "count_all")])
    sizes_by_item = dict(zip(sizes["item_id"].to_pylist(), sizes["count_all"].to_pylist(), strict=True))
    lengths = np.array([sizes_by_item.get(name, 0) for name in rows["item_id"].to_pylist()], np.int64)
    offsets: Any = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    types: Any = (named["event_type"].combine_chunks(), named["events"].combine_chunks())
    columns = [rows["item_id"], rows["shown"], rows["events"], rows["users"], pa.MapArray.from_arrays(offsets, *types)]
    return pa.table(columns, schema=DAILY_ROWS)


def _summed(rows: pa.Table, keys: list[str]) -> pa.Table:
    """Returns the sums of the figures by some keys, as the columns that they were before."""
    figures = ["shown", "events", "users"]
    sums = rows.group_by(keys, use_threads=False).aggregate([(name, "sum") for name in figures])
    return sums.select([*keys, *(f"{name}_sum" for name in figures)]).rename_columns([*keys, *figures])


def _distinct(group: npt.NDArray[np.int64], names: pa.ChunkedArray[Any], groups: int) -> npt.NDArray[np.int64]:
    """Returns the number of distinct names in each group; NULL is none."""
    valid = names.is_valid().to_numpy()
    distinct, code = codes(pc.fill_null(names, ""))
    # One number per group and name, so that equal pairs are counted once.
    pairs = np.unique(group[valid] * (len(distinct) + 1) + code[valid])
    return np.bincount(pairs // (len(distinct) + 1), minlength=groups).astype(np.int64)


def _counts(group: npt.NDArray[np.int64], names: pa.ChunkedArray[Any], groups: int) -> Any:
    """Returns a map per group from name to how often it stands there, names in their order."""
    distinct, code = codes(names)
    rank = np.argsort(np.argsort(distinct))[code] if distinct else code
    width = max(len(distinct), 1)
    pairs, counts = np.unique(group * width + rank, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(np.bincount(pairs // width, minlength=groups))])
    ordered = np.array(sorted(distinct), object)
    keys = pa.array(ordered[pairs % width].tolist() if distinct else [], pa.string())
    offsets: Any = pa.array(ends.astype(np.int32))
    return pa.MapArray.from_arrays(offsets, keys, pa.array(counts.astype(np.int64)))
