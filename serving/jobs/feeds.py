"""The feed of one user as a row: the request that every job makes which answers without a server."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from features.clock import now_ms
from features.item_fields import is_field, no_field, values_of
from features.subjects import Subject
from serving.engine.engine import Engine
from serving.errors import ConfigError, ProfileStoreUnavailable
from serving.experiments import Holdout
from serving.pipeline.request import Request
from serving.pipeline.results import Slate

_PATIENCE_S = 60.0
_LONGEST = 64
"""Bytes of a surface or a channel, as in the contract."""


@dataclass(frozen=True, slots=True)
class Feed:
    """The settings of a feed, the same for every user."""

    items: int
    channel: str
    surface: str
    fields: Sequence[str] = ()

    @classmethod
    def of(cls, items: int, channel: str, surface: str, fields: Sequence[str]) -> Feed:
        """Checks the settings of a feed.

        Raises:
            ConfigError: A name is too long, or no item has such a field.
        """
        for name, value in (("channel", channel), ("surface", surface)):
            if len(value.encode()) > _LONGEST:
                raise ConfigError(f"{name}: {value!r} has more than {_LONGEST} bytes; give a shorter name")
        for name in fields:
            if not is_field(name):
                raise ConfigError(f"fields: {no_field(name)}")
        return cls(items, channel, surface, fields)


def answer(engine: Engine, holdout: Holdout, subject: Subject, user: str, feed: Feed) -> tuple[Slate, dict[str, Any]]:
    """Answers one user; returns the slate, and its row: the columns of `batch.SCHEMA`, and `items` if fields are asked.

    Raises:
        ProfileStoreUnavailable: The profiles cannot be read, so the answer would not be the user's.
    """
    request = Request(
        request_id=uuid.uuid4().hex,
        subject=subject,
        now_ms=now_ms(),
        deadline=time.monotonic() + _PATIENCE_S,
        page_size=feed.items,
        surface=feed.surface,
        method="recommend",
        context={"channel": feed.channel} if feed.channel else {},
        assignment=holdout.assign(subject),
    )
    slate = engine.pipelines["recommend"].run(request)
    for part, reason in slate.degraded:
        # Online, a popular feed is better than none; an e-mail can be sent later.
        if part == "PROFILE_STORE":
            raise ProfileStoreUnavailable(f"{reason}; nothing was written, run it again")
    row = {
        "user_id": user,
        "item_ids": engine.catalog.ids(slate.rows),
        "scores": slate.scores,
        "rung": slate.rung,
        "arm": slate.user.assignment.arm,
        "request_id": request.request_id,
        "profile_version": slate.user.profile.version if slate.user.profile else 0,
        "bundle_id": engine.bundle_id,
        "degraded": [part for part, _ in slate.degraded],
    }
    if feed.fields:
        row["items"] = values_of(engine.catalog, slate.rows, feed.fields)
    return slate, row
