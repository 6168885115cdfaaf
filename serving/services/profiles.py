"""ProfileService: shows people what is known of them, and forgets them."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import time
from typing import Any

import grpc
import numpy as np

from features.assemble import HALF_LIFE
from features.errors import ProfileCorrupt
from features.profile import Profile
from features.schema import EVENT_TYPES, event_type_key, item_key
from penchant.v1 import profile_pb2, profile_pb2_grpc
from serving.engine import Engine, Host
from serving.events import EventLog
from serving.profiles import ProfileStore
from serving.services import checks

SHOWN = 100
"""Events that an answer shows at most."""


class ProfileService(profile_pb2_grpc.ProfileServiceServicer):
    """Shows and erases profiles."""

    def __init__(self, host: Host, log: EventLog, store: ProfileStore) -> None:
        self._host, self._log, self._store = host, log, store

    def GetProfile(
        self, request: profile_pb2.GetProfileRequest, context: grpc.ServicerContext
    ) -> profile_pb2.GetProfileResponse:
        """Shows a profile as a person would read it."""
        subject = checks.subject(request.subject, "subject")
        try:
            profile = self._store.read(subject)
        except ProfileCorrupt:
            return profile_pb2.GetProfileResponse()
        return _shown(profile, self._host.engine)

    def EraseSubject(
        self, request: profile_pb2.EraseSubjectRequest, context: grpc.ServicerContext
    ) -> profile_pb2.EraseSubjectResponse:
        """Erases a person from every store: the log first, so that nothing can be replayed into the profile."""
        subject = checks.subject(request.subject, "subject")
        erased = self._log.erase(subject)
        forgotten = self._store.erase(subject, erased.log_id)
        now = int(time.time() * 1000)
        counts = {"profiles": forgotten, "events": erased.events, "impressions": erased.impressions}
        return profile_pb2.EraseSubjectResponse(
            receipts=[
                profile_pb2.ErasureReceipt(store=store, entries=entries, erased_at_ms=now)
                for store, entries in counts.items()
            ]
        )


def _shown(profile: Profile, engine: Engine) -> profile_pb2.GetProfileResponse:
    """A profile in words."""
    newest = profile.records[::-1]
    rows = engine.catalog.rows_of_keys(np.ascontiguousarray(newest["item"]))
    items = {row: engine.catalog.item(row) for row in set(rows.tolist()) if row >= 0}
    types = {event_type_key(name): name for name in EVENT_TYPES} | dict(engine.event_types)
    events = []
    for record, row in zip(newest[:SHOWN], rows[:SHOWN].tolist(), strict=True):
        item, value = items.get(row, {}), float(record["value"])
        events.append(
            profile_pb2.ProfileEvent(
                item_id=item.get("item_id", ""),
                title=item.get("title") or "",
                event_type=types.get(int(record["event_type"]), ""),
                timestamp_ms=int(record["timestamp"]),
                value=value if value == value else None,
            )
        )
    return profile_pb2.GetProfileResponse(
        found=bool(profile.count),
        profile_version=profile.version,
        event_count=profile.count,
        events=events,
        categories=_affinities(profile, items),
        seen_only=profile.evicted.size,
    )


def _affinities(profile: Profile, items: dict[int, dict[str, Any]]) -> list[profile_pb2.Affinity]:
    """The decayed share of each category whose name is known, strongest first."""
    names = {item_key(item["categories"][0]): item["categories"][0] for item in items.values() if item["categories"]}
    weights = 0.5 ** (np.arange(profile.records.size)[::-1] / HALF_LIFE)
    keys, place = np.unique(profile.records["category"], return_inverse=True)
    shares = np.bincount(place, weights, keys.size) / max(weights.sum(), 1e-12)
    found = [(names[key], share) for key, share in zip(keys.tolist(), shares.tolist(), strict=True) if key in names]
    found.sort(key=lambda pair: (-pair[1], pair[0]))
    return [profile_pb2.Affinity(name=name, share=share) for name, share in found]
