"""A profile in words, as GetProfile and `penchant profiles show` alike show it to its user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from features.assemble import are_choices
from features.bundle import open_bundle
from features.bundle_tables import read_items
from features.clock import now_ms
from features.errors import ProfileCorrupt
from features.event_types import EVENT_TYPES
from features.keys import event_type_key, item_key, item_keys
from features.model_inputs import HALF_LIFE
from features.profile import Profile
from features.profile_codec import PAST_LOST
from features.records import Records
from features.subjects import subject_of
from serving.redis.client import connect
from serving.stores.meta import profile_partitions
from serving.stores.profiles import ProfileStore

EVENTS_SHOWN = 50
"""Newest events that `show` shows."""

_TIMEOUT_S = 10.0

Items = Mapping[int, Mapping[str, Any]]
"""Items as rows of the canonical table, by key."""


@dataclass(frozen=True, slots=True)
class EventView:
    """An event of a profile.

    Attributes:
        item_key: Key of the item.
        item_id: Id of the item; "" if it is not in the catalogue.
        title: Title of the item; "" if it has none.
        type_key: Key of the event type.
        event_type: Name of the event type; "" if it is not known.
        timestamp: Time of the event, ms.
        value: Value of the event; None if it has none.
    """

    item_key: int
    item_id: str
    title: str
    type_key: int
    event_type: str
    timestamp: int
    value: float | None


@dataclass(frozen=True, slots=True)
class VisitView:
    """The visit that a user is on.

    Attributes:
        began: Time of its first event, ms.
        events: Number of its events.
        category: Key of the category of most of the items chosen in it; 0 for none.
    """

    began: int
    events: int
    category: int


@dataclass(frozen=True, slots=True)
class ProfileView:
    """A profile in words.

    Attributes:
        found: True if the user has a profile.
        damage: The damage of the stored profile and its repair; "" for a sound one.
        version: Log id up to which it contains everything.
        event_count: Number of events folded into it.
        seen_only: Number of items of which only is known that they were seen.
        events: The newest events, newest first.
        categories: Share of each category among what the user chose, strongest first.
        segment: Key of the category of the user's segment; 0 for none.
        visit: The visit that the user is on; None if they are on none.
    """

    found: bool
    damage: str
    version: int
    event_count: int
    seen_only: int
    events: tuple[EventView, ...]
    categories: tuple[tuple[str, float], ...]
    segment: int
    visit: VisitView | None


def view_profile(profile: Profile, items: Items, event_types: Mapping[int, str], limit: int) -> ProfileView:
    """Returns a profile in words.

    Args:
        profile: The profile.
        items: The items of its events, as far as they are known.
        event_types: Names of the bundle's event types, by key; the standard ones are known.
        limit: Most events that are shown.
    """
    types = {event_type_key(name): name for name in EVENT_TYPES} | dict(event_types)
    return ProfileView(
        found=profile.count > 0 or profile.lost,
        damage=PAST_LOST if profile.lost else "",
        version=profile.version,
        event_count=profile.count,
        seen_only=int(profile.older_items.size),
        events=tuple(_event_view(record, items, types) for record in profile.records[::-1][:limit]),
        categories=_category_shares(profile, items),
        segment=profile.decayed_counts.segment(),
        visit=_visit(profile),
    )


def show(user: str, redis_url: str, bundle: Path | None = None, *, partitions: int | None = None) -> dict[str, Any]:
    """Shows one profile, as a command.

    Args:
        user: The user, as the warehouse names them: `a:` and the id of an anonymous user.
        redis_url: The profiles Redis.
        bundle: Names items, categories and event types; without it items are shown by their key.
        partitions: Partitions of the event log; None: as the profiles say.

    Returns:
        `user`, `found`, `damage` (the damage of the stored profile and its repair; "" for a sound one),
        `profile_version`, `event_count`, `seen_only` (items of which only is known that they were seen), `categories`
        {name: share} and the newest `events`, newest first. Of a profile that cannot be read, the first three.

    Raises:
        BundleError: The bundle is damaged.
        ConfigError: The URL is wrong.
        ProfileStoreUnavailable: Redis does not answer.
    """
    with connect(redis_url, _TIMEOUT_S) as client:
        store = ProfileStore(client, profile_partitions(client, partitions))
        store.open()
        try:
            profile = store.read(subject_of(user))
        except ProfileCorrupt as error:
            return {"user": user, "found": True, "damage": str(error)}
    view = view_profile(profile, *_names(profile, bundle), EVENTS_SHOWN)
    return {
        "user": user,
        "found": view.found,
        "damage": view.damage,
        "profile_version": view.version,
        "event_count": view.event_count,
        "seen_only": view.seen_only,
        "categories": {name: round(share, 4) for name, share in view.categories},
        "events": [_event_words(event) for event in view.events],
    }


def chosen_events(records: Records) -> Records:
    """Returns the events by which a user chose an item: neither an impression nor a refusal tells of a liking."""
    return records[are_choices(records["event_type"])]


def _event_view(record: Any, items: Items, types: Mapping[int, str]) -> EventView:
    key, type_key, value = int(record["item"]), int(record["event_type"]), float(record["value"])
    item = items.get(key, {})
    return EventView(
        item_key=key,
        item_id=item.get("item_id", ""),
        title=item.get("title") or "",
        type_key=type_key,
        event_type=types.get(type_key, ""),
        timestamp=int(record["timestamp"]),
        value=None if np.isnan(value) else value,
    )


def _category_shares(profile: Profile, items: Items) -> tuple[tuple[str, float], ...]:
    """Returns the decayed share of each category whose name is known among the user's choices, strongest first."""
    names = {item_key(item["categories"][0]): item["categories"][0] for item in items.values() if item["categories"]}
    chosen = chosen_events(profile.records)
    # The decay counts events, not time: a visit after a long pause finds the taste as it was.
    weights = 0.5 ** (np.arange(chosen.size)[::-1] / HALF_LIFE)
    keys, places = np.unique(chosen["category"], return_inverse=True)
    # Shares of all choices: those whose category has no name here count in the sum.
    shares = np.bincount(places, weights, keys.size) / max(weights.sum(), 1e-12)
    named = [(names[key], share) for key, share in zip(keys.tolist(), shares.tolist(), strict=True) if key in names]
    return tuple(sorted(named, key=lambda pair: (-pair[1], pair[0])))


def _visit(profile: Profile) -> VisitView | None:
    counts = profile.decayed_counts
    if not counts.visiting(now_ms()):
        return None
    categories = chosen_events(profile.records[profile.records["timestamp"] >= counts.visit_began])["category"]
    keys, numbers = np.unique(categories[categories != 0], return_counts=True)
    return VisitView(counts.visit_began, counts.visit_events, int(keys[numbers.argmax()]) if keys.size else 0)


def _names(profile: Profile, bundle: Path | None) -> tuple[Items, Mapping[int, str]]:
    """Returns the items of a profile's events and the event types of a bundle, by key."""
    if bundle is None:
        return {}, {}
    opened = open_bundle(bundle)
    table = read_items(opened)
    keys = item_keys(table["item_id"].to_pylist())
    rows = np.flatnonzero(np.isin(keys, profile.records["item"]))
    items = table.select(["item_id", "title", "categories"]).take(rows).to_pylist()
    types = {event_type_key(name): name for name in opened.model.event_types}
    return dict(zip(keys[rows].tolist(), items, strict=True)), types


def _event_words(event: EventView) -> dict[str, Any]:
    time = datetime.fromtimestamp(event.timestamp / 1000, UTC)
    return {
        "item": event.item_id or f"key {event.item_key:016x}",
        "title": event.title or None,
        "event_type": event.event_type or f"key {event.type_key:08x}",
        "time": time.isoformat(timespec="seconds"),
        "value": event.value,
    }
