"""The bytes of an event in a profile: how it is packed, checked and read.

A record travels alone, in the payload of the log and in the tail of a profile, so each has a checksum of its own. A
folded state has one checksum for all its events, which therefore stand in it without theirs.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from features.kernels import crc32_rows

EVENT = np.dtype(
    [
        ("item", "<u8"),
        ("category", "<u8"),
        ("creator", "<u8"),
        ("timestamp", "<i8"),
        ("value", "<f4"),
        ("event_type", "<u4"),
    ]
)
"""One event as the fold reads it: 40 bytes, keys as resolved at ingest."""

RECORD = np.dtype([*((name, EVENT[name]) for name in EVENT.fields or ()), ("checksum", "<u4")])
"""An event on its way into a profile: 44 bytes, the last four a CRC-32 of the others."""

ENTRY = np.dtype([("log_id", ">u8"), ("record", RECORD)])
"""One entry of a tail: the log id and its record, 52 bytes."""

Records = npt.NDArray[np.void]
"""RECORD, ENTRY or EVENT [n]."""
Events = npt.NDArray[np.void]
"""EVENT [n]."""

# Counted from the end, where RECORD and ENTRY are alike: the bytes of the event, behind which its checksum stands.
_EVENT = slice(-RECORD.itemsize, EVENT.itemsize - RECORD.itemsize)
_PACKED = struct.Struct("<QQQqfI")


def make_records(
    item: npt.ArrayLike,
    category: npt.ArrayLike,
    creator: npt.ArrayLike,
    timestamp: npt.ArrayLike,
    value: npt.ArrayLike,
    event_type: npt.ArrayLike,
) -> Records:
    """Builds RECORD [n] from columns of length n (or scalars) and fills the checksums."""
    # Each to its own type first, because numpy makes a list of large and small integers floats.
    columns: dict[str, npt.NDArray[Any]] = {
        "item": np.asarray(item, np.uint64),
        "category": np.asarray(category, np.uint64),
        "creator": np.asarray(creator, np.uint64),
        "timestamp": np.asarray(timestamp, np.int64),
        "value": np.asarray(value, np.float32),
        "event_type": np.asarray(event_type, np.uint32),
    }
    records = np.zeros(np.broadcast_shapes((1,), *(column.shape for column in columns.values())), RECORD)
    for name, column in columns.items():
        records[name] = column
    records["checksum"] = crc32_rows(_bytes_of(records)[:, _EVENT])
    return records


def pack_record(item: int, category: int, creator: int, timestamp: int, value: float, event_type: int) -> bytes:
    """Returns the bytes of one RECORD, as `make_records` makes it: numpy takes ten times as long for a single one."""
    event = _PACKED.pack(item, category, creator, timestamp, value, event_type)
    return event + zlib.crc32(event).to_bytes(4, "little")


def verify(records: Records) -> npt.NDArray[np.bool_]:
    """Returns a mask of those of RECORD or ENTRY [n] that still match their checksum; bool [n]."""
    rows = _bytes_of(records)
    checksums = np.ascontiguousarray(rows[:, _EVENT.stop :]).view("<u4")[:, 0]
    intact: npt.NDArray[np.bool_] = np.equal(checksums, crc32_rows(rows[:, _EVENT]))
    return intact


def events_of(records: Records) -> Events:
    """Returns the events of RECORD or ENTRY [n], without log ids and checksums; EVENT [n]."""
    if records.dtype == EVENT:
        return records
    return np.ascontiguousarray(_bytes_of(records)[:, _EVENT]).view(EVENT).reshape(records.size)


def concatenated(older: Events, newer: Events) -> Events:
    """Returns the events of both, the older ones first; EVENT [n + m]."""
    # As opaque bytes, because numpy copies a structured type field by field, seven times slower.
    opaque = f"V{EVENT.itemsize}"
    return np.concatenate([np.ascontiguousarray(part).view(opaque) for part in (older, newer)]).view(EVENT)


def _bytes_of(records: Records) -> npt.NDArray[np.uint8]:
    """Returns the bytes of each of RECORD or ENTRY [n]; uint8 [n, size of one]."""
    return np.ascontiguousarray(records).view(np.uint8).reshape(records.size, records.dtype.itemsize)
