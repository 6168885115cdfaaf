"""Profiles and certificates: converts them to the contract."""

from __future__ import annotations

from typing import Any

import numpy as np

from features.decayed_counts import DIMENSIONS, HORIZONS
from features.event_types import EVENT_TYPES
from features.keys import event_type_key
from features.profile import Profile
from features.profile_codec import PAST_LOST
from penchant.v1 import profile_pb2
from serving.engine.engine import Engine
from serving.privacy.certificates import Certificate
from serving.projection.profile_view import VisitView, view_profile


def profile_message(profile: Profile, engine: Engine, limit: int) -> profile_pb2.GetProfileResponse:
    """Returns a profile with names instead of keys, and at most `limit` events."""
    # Each item once: a user's events repeat items, and reading one of the catalogue is slow.
    keys = np.unique(profile.records["item"])
    rows = engine.catalog.rows_of_keys(keys).tolist()
    items = {key: engine.catalog.item(row) for key, row in zip(keys.tolist(), rows, strict=True) if row >= 0}
    view = view_profile(profile, items, engine.event_types, limit)
    return profile_pb2.GetProfileResponse(
        found=view.found,
        damage=view.damage,
        profile_version=view.version,
        event_count=view.event_count,
        events=[
            profile_pb2.ProfileEvent(
                item_id=event.item_id,
                title=event.title,
                event_type=event.event_type,
                timestamp_ms=event.timestamp,
                value=event.value,
            )
            for event in view.events
        ],
        categories=[profile_pb2.Affinity(name=name, share=share) for name, share in view.categories],
        seen_only=view.seen_only,
        segment=_category(view.segment, engine),
        visit=_visit(view.visit, engine),
    )


def _visit(visit: VisitView | None, engine: Engine) -> profile_pb2.Visit | None:
    if visit is None:
        return None
    return profile_pb2.Visit(began_ms=visit.began, events=visit.events, category=_category(visit.category, engine))


def counts_document(profile: Profile, engine: Engine) -> dict[str, Any]:
    """Returns the decayed counts of a profile, by name if the catalogue or the bundle has it, else by key."""
    decayed = profile.decayed_counts
    document: dict[str, Any] = {"as_of_ms": decayed.newest, "horizons": list(HORIZONS)}
    if profile.lost:
        document["damage"] = PAST_LOST
    # The bundle knows the types of its training, which may have names of their own.
    types = {event_type_key(name): name for name in EVENT_TYPES} | dict(engine.event_types)
    for dimension in DIMENSIONS:
        part, counts = decayed.of(dimension), document.setdefault(dimension, {})
        for key, cell in zip(decayed.keys[part].tolist(), decayed.at(decayed.newest)[part].tolist(), strict=True):
            name = _category(key, engine) if dimension == "category" else types.get(key, "")
            counts[name or f"key {key:016x}"] = cell
    return document


def _category(key: int, engine: Engine) -> str:
    """Returns the name of a category, "" if it is the first category of no item in the catalogue."""
    # A search through all items: no index is kept for a name that few requests need.
    rows = np.flatnonzero(engine.catalog.columns.category[: engine.catalog.size] == np.uint64(key))
    return str(engine.catalog.item(int(rows[0]))["categories"][0]) if key and rows.size else ""


def receipt_messages(certificate: Certificate) -> list[profile_pb2.ErasureReceipt]:
    """Returns the receipts of a certificate."""
    return [
        profile_pb2.ErasureReceipt(
            store=receipt.store, entries=receipt.entries, erased_at_ms=receipt.erased_at, purged_at_ms=receipt.purged_at
        )
        for receipt in certificate.receipts
    ]


def copy_messages(certificate: Certificate) -> list[profile_pb2.ErasureCopy]:
    """Returns the copies of the log that a certificate waits for, or has waited for."""
    return [
        profile_pb2.ErasureCopy(
            copy_id=copy.copy_id,
            store=copy.store,
            host=copy.host,
            place=copy.place,
            erased_at_ms=copy.erased_at,
            purged_at_ms=copy.purged_at,
            retired_at_ms=copy.retired_at,
        )
        for copy in certificate.copies
    ]


def remainder_messages(certificate: Certificate) -> list[profile_pb2.ErasureRemainder]:
    """Returns the files and bundles that an erasure does not reach."""
    return [
        profile_pb2.ErasureRemainder(
            kind=remainder.kind,
            host=remainder.host,
            place=remainder.place,
            registered_at_ms=remainder.registered_at,
            advice=remainder.advice,
        )
        for remainder in certificate.remainders
    ]
