"""The expected profile and inputs of the models, in plain Python: slow, obvious, sharing no code.

Neither `features/profile.py` nor `features/assemble.py` is used here; keys are hashed again from the texts of events.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal, localcontext
from functools import cache
from hashlib import blake2b
from typing import Any
from zoneinfo import ZoneInfo

PASSIVE = ("view_item_list", "search")
REFUSING = ("dislike", "hide")
HALF_LIFE = 20
HALF_LIVES_MS = (3_600_000, 86_400_000, 30 * 86_400_000)
PAUSE_MS = 1_800_000


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
    """The stored part of an event."""
    value = math.nan if event.value is None else event.value
    body = struct.pack(
        "<QQQqfI", key(event.item), key(event.category), key(event.creator), event.timestamp, value, crc(event.kind)
    )
    return body + struct.pack("<I", zlib.crc32(body))


def crc(kind: str) -> int:
    """The key of an event type."""
    return zlib.crc32(kind.encode())


def state(events: Sequence[Told], ring: int, cap: int, rooms: Mapping[str, int]) -> dict[str, Any]:
    """Returns the profile after these events, one by one: `count`, `records`, `evicted` and `past`."""
    kept: list[Told] = []
    evicted: list[int] = []
    for event in events:
        if not event.item:
            continue
        kept.append(event)
        if len(kept) > ring:
            oldest = kept.pop(0)
            gone = key(oldest.item)
            if gone and oldest.kind not in PASSIVE and gone not in evicted:
                evicted = [*evicted, gone][-cap:]
    # A state has one checksum, not one per event.
    return {
        "count": len(events),
        "records": b"".join(record(event)[:-4] for event in kept),
        "evicted": evicted,
        "past": past_of(events, rooms),
    }


@dataclass
class Past:
    """Returns the sums of all events: `counts` by kind and key, as they were when the half-life of the newest began."""

    newest: int = 0
    began: int = 0
    visit: int = 0
    counts: dict[str, dict[int, list[float]]] = field(
        default_factory=lambda: {name: {} for name in ("category", "creator", "event_type")}
    )

    def at(self, name: str, now_ms: int) -> dict[int, list[float]]:
        """The counts of a kind, decayed to a time."""
        now = max(now_ms, self.newest)
        shares = [power(self.newest // n * 128 - now // (n // 128)) for n in HALF_LIVES_MS]
        return {
            one: [c * share for c, share in zip(cell, shares, strict=True)] for one, cell in self.counts[name].items()
        }


def past_of(events: Sequence[Told], rooms: Mapping[str, int]) -> Past:
    """Returns the sums of these events, with room for so many keys of each kind."""
    past = Past()
    for event in events:
        if not event.item:
            continue
        before = past.newest if past.visit else event.timestamp
        past.newest = max(before, event.timestamp)
        if not past.visit or event.timestamp - before > PAUSE_MS:
            past.began, past.visit = event.timestamp, 0
        past.visit += event.timestamp >= past.began
        for table in past.counts.values():
            for cell in table.values():
                for at, length in enumerate(HALF_LIVES_MS):
                    cell[at] = rounded(cell[at] / 2 ** (past.newest // length - before // length))
        keys = {"event_type": crc(event.kind)}
        if event.kind not in (*PASSIVE, *REFUSING):
            keys |= {"category": key(event.category), "creator": key(event.creator)}
        for name, one in keys.items():
            table = past.counts[name]
            if name != "event_type" and not one:
                continue
            if one not in table and len(table) == rooms[name]:
                _, least = min((cell[-1], other) for other, cell in table.items())
                table = {one if other == least else other: table[other] for other in table}
                table[one] = [0.0] * len(HALF_LIVES_MS)
                past.counts[name] = table
            cell = table.setdefault(one, [0.0] * len(HALF_LIVES_MS))
            for at, length in enumerate(HALF_LIVES_MS):
                cell[at] = rounded(cell[at] + power(event.timestamp // (length // 128) - past.newest // length * 128))
    return past


@cache
def power(ticks: int) -> float:
    """2 ** (ticks / 128), the root correctly rounded."""
    with localcontext(prec=50):
        root = float(Decimal(2) ** (Decimal(ticks % 128) / 128))
    return math.ldexp(root, ticks // 128)


def rounded(number: float) -> float:
    """The nearest number of single precision."""
    (found,) = struct.unpack("<f", struct.pack("<f", number))
    return float(found)


def remembered(events: Sequence[Told], ring: int) -> list[Told]:
    """The newest events that are about an item."""
    return [event for event in events if event.item][-ring:]


def encoder(past: Sequence[Told], rows: Mapping[str, int], types: Sequence[str], longest: int) -> list[tuple[int, int]]:
    """Row and type of each event that the user encoder reads."""
    known = [event for event in past if event.item in rows and reads(event, types)][-longest:]
    return [(rows[event.item], types.index(event.kind) + 1 if event.kind in types else 0) for event in known]


def reads(event: Told, types: Sequence[str]) -> bool:
    """True if a bundle of these event types takes an event for taste: no showing or refusal that it never learned."""
    return event.kind not in (*PASSIVE, *REFUSING) or event.kind in types


def ranker(
    past: Sequence[Told], lasts: Past, item: Mapping[str, str], now_ms: int, types: Sequence[str]
) -> dict[str, float]:
    """Returns the ranker's features of a history for an item, by name, from its id, category and creator."""
    weights = [0.5 ** (age / HALF_LIFE) for age in range(len(past))][::-1]
    weights = [weight * reads(event, types) for weight, event in zip(weights, past, strict=True)]
    total = math.nan if not past else sum_in_order(weights)
    found = {}
    for name in ("category", "creator"):
        same = [w for w, event in zip(weights, past, strict=True) if getattr(event, name) == item[name] != ""]
        found[f"{name}_affinity"] = sum_in_order(same) / total if total > 0 and same else 0.0
    found["history_length"] = math.log1p(len(past))
    found["shown_before"] = math.log1p(sum(event.item == item["item_id"] for event in past))
    since = [age for age, event in enumerate(reversed(past)) if event.item == item["item_id"]]
    found["item_pause"] = math.log1p(min(since, default=len(past)))
    here = [event.item for event in past if event.timestamp >= lasts.began] if lasts.visit and lasts.newest else []
    found["item_in_visit"] = float(item["item_id"] in here)
    found |= lasting(past, lasts, item, now_ms, types)
    found["recency"] = math.log1p(max(now_ms - past[-1].timestamp, 0) / 3_600_000) if past else 0.0
    return found


def declared(
    past: Sequence[Told], item: Mapping[str, Any], now_ms: int, request: Mapping[str, Any], told: Mapping[str, str]
) -> dict[str, float]:
    """Returns the declared features of the small world, by column, for a user with attributes that were told."""
    known = item["price"] is not None
    found = {"cost": math.log1p(float(item["price"])) if known else 0.0, "cost/known": float(known)}
    found |= {f"kind/{name}": float(item["category"] == name) for name in ("western", "space")}
    found |= {f"handset/{name}": float(request["device"] == name) for name in ("phone", "tv")}
    here = datetime.fromtimestamp(now_ms / 1000, ZoneInfo(request["time_zone"] or "UTC"))
    angle = 2 * math.pi * (here.hour + here.minute / 60) / 24
    found |= {"clock/sin": math.sin(angle), "clock/cos": math.cos(angle)}
    shelf = {"1.5": "..2", "3": "2..5", "5": "5.."}.get(dict(request["attributes"] or {}).get("shelf", ""))
    found |= {f"shelf/{name}": float(name == shelf) for name in ("..2", "2..5", "5..")}
    found |= {"plan/family": float(told.get("plan") == "family")}
    found |= {"years": float(told.get("age", 0)), "years/known": float("age" in told)}
    likes = [event for event in past if event.kind == "like" and event.category == item["category"] != ""]
    found["day_likes"] = math.log1p(sum(now_ms - event.timestamp <= 86_400_000 for event in likes))
    same = [event.kind for event in past if event.creator == item["creator"] != ""]
    liked, viewed = same.count("like"), same.count("view_item")
    rate = (min(liked, viewed) + 20 * 0.1) / (viewed + 20)
    found["fan"] = math.log(rate / (1 - rate)) - math.log(0.1 / 0.9) if viewed else 0.0
    return found


def lasting(
    ring: Sequence[Told], past: Past, item: Mapping[str, str], now_ms: int, types: Sequence[str]
) -> dict[str, float]:
    """Returns the features of an item from the decayed counts and the visit."""
    found = {}
    for name in ("category", "creator"):
        cell = past.at(name, now_ms).get(key(item[name]) or -1, [0.0] * 3)
        found |= {f"{name}_{span}": math.log1p(c) for span, c in zip(("hour", "day", "month"), cell, strict=True)}
    cells = list(past.at("event_type", now_ms).values())
    for at, span in ((1, "day"), (2, "month")):
        found[f"activity_{span}"] = math.log1p(sum_in_order([cell[at] for cell in cells]))
    goes_on = past.visit > 0 and now_ms - past.newest <= PAUSE_MS
    here = [event for event in ring if event.timestamp >= past.began and reads(event, types)] if goes_on else []
    same = [event for event in here if event.category == item["category"] != ""]
    found["visit_length"] = math.log1p(past.visit) if goes_on else 0.0
    found["visit_minutes"] = math.log1p(max(now_ms - past.began, 0) / 60_000) if goes_on else 0.0
    found["visit_category"] = len(same) / len(here) if same else 0.0
    return found


def sum_in_order(numbers: Sequence[float]) -> float:
    """The sum from left to right; `sum` of newer Pythons is more exact than that."""
    total = 0.0
    for number in numbers:
        total += number
    return total
