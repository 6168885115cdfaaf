"""What a profile and the models' inputs have to be, in plain Python: slow, obvious, and nothing of it shared.

Neither `features/profile.py` nor `features/assemble.py` is used here; keys are hashed anew from the texts of events.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

PASSIVE = ("view_item_list", "search")
HALF_LIFE = 20


@dataclass(frozen=True)
class Told:
    """An event as it was told, with its item's category and creator of that moment."""

    log_id: int
    item: str
    category: str
    creator: str
    timestamp: int
    value: float | None
    kind: str


def key(text: str) -> int:
    """The key of an id, a category or a creator."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") if text else 0


def record(event: Told) -> bytes:
    """What is stored of an event."""
    value = math.nan if event.value is None else event.value
    body = struct.pack(
        "<QQQqfI", key(event.item), key(event.category), key(event.creator), event.timestamp, value, crc(event.kind)
    )
    return body + struct.pack("<I", zlib.crc32(body))


def crc(kind: str) -> int:
    """The key of an event type."""
    return zlib.crc32(kind.encode())


def state(events: Sequence[Told], ring: int, cap: int) -> dict[str, Any]:
    """What is remembered after these events, one by one: `count`, `records` and `evicted`."""
    kept: list[Told] = []
    evicted: list[int] = []
    for event in events:
        kept.append(event)
        if len(kept) > ring:
            oldest = kept.pop(0)
            gone = key(oldest.item)
            if gone and oldest.kind not in PASSIVE and gone not in evicted:
                evicted = [*evicted, gone][-cap:]
    # A state has one checksum, not one per event.
    return {"count": len(events), "records": b"".join(record(event)[:-4] for event in kept), "evicted": evicted}


def remembered(events: Sequence[Told], ring: int) -> list[Told]:
    """The newest events that are about an item."""
    return [event for event in events[-ring:] if event.item]


def encoder(past: Sequence[Told], rows: Mapping[str, int], types: Sequence[str], longest: int) -> list[tuple[int, int]]:
    """Row and type of each event that the user encoder reads."""
    known = [event for event in past if event.item in rows][-longest:]
    return [(rows[event.item], types.index(event.kind) + 1 if event.kind in types else 0) for event in known]


def ranker(past: Sequence[Told], item: Mapping[str, str], now_ms: int) -> dict[str, float]:
    """Some of what the ranker reads of an item, by name; `item` has `item_id`, `category` and `creator`."""
    weights = [0.5 ** (age / HALF_LIFE) for age in range(len(past))][::-1]
    total = math.nan if not past else sum_in_order(weights)
    found = {}
    for name in ("category", "creator"):
        same = [w for w, event in zip(weights, past, strict=True) if getattr(event, name) == item[name] != ""]
        found[f"{name}_affinity"] = sum_in_order(same) / total if same else 0.0
    found["history_length"] = math.log1p(len(past))
    found["shown_before"] = math.log1p(sum(event.item == item["item_id"] for event in past))
    found["recency"] = math.log1p(max(now_ms - past[-1].timestamp, 0) / 3_600_000) if past else 0.0
    return found


def sum_in_order(numbers: Sequence[float]) -> float:
    """The sum from left to right; `sum` of newer Pythons is more exact than that."""
    total = 0.0
    for number in numbers:
        total += number
    return total
