"""The stage after the answer: slates go to the impression log, and no caller waits for it.

A slate is encoded by the thread that answered, when the answer is on its way. Another thread writes what has come, a
few times a second: a round trip costs that thread, Redis and the disk about as much for one slate as for fifty.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from features.assemble import encoder_digest
from features.catalog import Catalog
from features.controls import Dial, Dials, attributes_among, attributes_text
from features.keys import item_keys
from serving.errors import ServingError, Unavailable
from serving.observability.outages import EVENTS_REDIS, Outage, shared_outage
from serving.observability.telemetry import Telemetry
from serving.pipeline.request import Request, UserState
from serving.pipeline.results import Slate
from serving.stores.event_log import EventLog
from serving.stores.log_codec import encode_features, encode_numbers, encode_slate, number_text, user_fields
from serving.stores.log_entries import LoggedImpression
from serving.stores.restore_requests import RestoreRequests

MOST_EXCLUDED = 100
"""Excluded items that a slate is logged with at most; their number is logged in any case."""

MOST_DIALS = 100
"""Dials that a slate is logged with at most."""

_UPSTREAM = "upstream"
"""Name of the source whose scores are the caller's own."""

_ABOUT = {Dial.CATEGORY_WEIGHT: "categories", Dial.CREATOR_WEIGHT: "creators"}
_BATCH = 64
"""Slates of a round trip: Redis does nothing else while it takes them."""

_GATHER_S = 0.25
"""Longest time that a slate waits for others, in seconds; a worker that is killed loses as much."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PendingSlate:
    """A slate that waits to be written."""

    request: Request
    slate: Slate
    catalog: Catalog
    bundle_id: str
    feature_fingerprint: str


class SlateSink(Protocol):
    """A receiver of the slates that are to be logged."""

    def put(self, pending: PendingSlate) -> None:
        """Takes a slate; returns at once and does not fail."""
        ...


class SlateCollector:
    """Keeps slates in memory until they are taken."""

    def __init__(self) -> None:
        self._slates: list[LoggedImpression] = []

    def put(self, pending: PendingSlate) -> None:
        """Keeps a slate."""
        self._slates.append(logged_impression(pending))

    def take(self) -> list[LoggedImpression]:
        """Returns the slates since the last time."""
        slates, self._slates = self._slates, []
        return slates


class _Entry:
    """A slate on its way to the log.

    Attributes:
        is_wanted: The user is of the share whose slates are logged.
        pending: The slate; None once it is encoded, as it holds arrays of all candidates.
        logged: Its encoded form, None before, or if it cannot be encoded or is not of the share that is logged.
        returned_at: Time of the request, ms, if the user's profile was evicted; else 0.
        subject: Key of the user.
    """

    __slots__ = ("is_wanted", "logged", "pending", "returned_at", "subject")

    def __init__(self, pending: PendingSlate, is_wanted: bool) -> None:
        profile = pending.slate.user.profile
        self.subject = pending.request.subject
        self.returned_at = pending.request.now_ms if profile and profile.emptied else 0
        self.is_wanted = is_wanted
        self.pending = pending if is_wanted else None
        self.logged: LoggedImpression | None = None


class _Unsettled(threading.local):
    """The slate that a thread has put last, until it is encoded."""

    entry: _Entry | None = None


class ImpressionWriter:
    """Writes slates to the log from a thread of its own; those beyond its limit are dropped and counted."""

    def __init__(self, log: EventLog, limit: int, telemetry: Telemetry, share: float = 1.0) -> None:
        """Takes the log, how many slates may wait, and the share of users whose slates are logged."""
        self._log, self._telemetry, self._share = log, telemetry, share
        self._outage = Outage(_log, "slates are not logged")
        self._damaged = Outage(_log, "some slates cannot be written")
        # Bounded: while Redis is unreachable, slates are lost before memory is.
        self._limit = limit
        self._waiting: deque[_Entry] = deque()
        self._unsettled = _Unsettled()
        telemetry.gauge("slates_waiting", lambda: len(self._waiting))
        self._some, self._closing = threading.Event(), threading.Event()
        # A daemon, so that a Redis that does not answer cannot keep a worker from ending.
        self._thread = threading.Thread(target=self._run, name="impressions", daemon=True)
        self._thread.start()

    def put(self, pending: PendingSlate) -> None:
        """Takes a slate, or drops it if too many wait."""
        entry = _Entry(pending, is_logged(pending.request.subject, self._share))
        if not entry.is_wanted:
            self._telemetry.count(("slates", "left_out"))
            if not entry.returned_at:
                return
        elif len(self._waiting) >= self._limit:
            self._telemetry.count(("slates", "dropped"))
            return
        self._waiting.append(entry)
        self._unsettled.entry = entry
        # Looked at before it is set, as setting it wakes the writer, and one slate of a batch is enough for that.
        if not self._some.is_set():
            self._some.set()

    def settle(self) -> None:
        """Encodes the slate that this thread has put; called when the answer is on its way, so that no caller waits.

        The writer encodes what is not settled when it comes to it: this only spares threads from competing.
        """
        entry, self._unsettled.entry = self._unsettled.entry, None
        if entry:
            self._encode(entry)

    def close(self, timeout_s: float = 5.0) -> None:
        """Writes the waiting slates, as far as the time goes."""
        self._closing.set()
        self._some.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            _log.warning("the impression log does not take the last slates: %d dropped", len(self._waiting))

    def _run(self) -> None:
        while True:
            self._some.wait()
            closing = self._closing.wait(_GATHER_S)
            # Before the slates are taken: one that comes later wakes this thread again.
            self._some.clear()
            while batch := self._take():
                slates = [entry.logged for entry in batch if entry.logged]
                self._write(slates)
                # Counted here, where each slate comes once.
                if damaged := sum(entry.is_wanted for entry in batch) - len(slates):
                    self._telemetry.count(("slates", "dropped"), damaged)
                if returned_at := {entry.subject: entry.returned_at for entry in batch if entry.returned_at}:
                    self._call_back(returned_at)
            if closing:
                return

    def _take(self) -> list[_Entry]:
        """Returns the slates that have waited longest, encoded as far as they can be; none if none wait."""
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), _BATCH))]
        for entry in batch:
            self._encode(entry)
        return batch

    def _encode(self, entry: _Entry) -> None:
        """Encodes a slate unless that was done; one that cannot be written is dropped, and the others are not."""
        # Two threads may come to it at once: both make the same, and none of them takes it from the other half done.
        pending = entry.pending
        if not pending:
            return
        try:
            entry.logged = logged_impression(pending, self._share)
        except Exception as error:  # noqa: BLE001 - a defect in one slate must not end the log
            self._damaged.failed(f"the one of the request {pending.request.request_id!r}: {error!r}", trace=error)
        entry.pending = None

    def _write(self, batch: list[LoggedImpression]) -> None:
        """Writes a batch once: a second try could write it twice, and lost slates do less harm than doubled ones."""
        if not batch:
            return
        try:
            written = self._log.append_impressions(batch)
        except ServingError as error:
            self._lose(error, "slates not logged", len(batch))
            self._telemetry.count(("slates", "dropped"), len(batch))
            return
        self._outage.works()
        self._telemetry.count(("slates", "written"), written)

    def _call_back(self, returned_at: Mapping[str, int]) -> None:
        """Asks for the evicted profiles of users who return before their first event; the next answer asks again."""
        try:
            RestoreRequests(self._log).add(returned_at)
        except ServingError as error:
            self._lose(error, "users who came back unknown for now", len(returned_at))

    def _lose(self, error: ServingError, loss: str, number: int) -> None:
        """Logs what an error costs; if Redis does not answer, with the next line about that."""
        if isinstance(error, Unavailable):
            shared_outage(EVENTS_REDIS).lost(loss, number)
            return
        self._outage.lost(loss, number)
        self._outage.failed(error)


class ImpressionSideEffect:
    """Hands every slate of a named user to the writer."""

    name = "impressions"

    def __init__(self, writer: SlateSink, catalog: Catalog, bundle_id: str, feature_fingerprint: str) -> None:
        self._writer, self._catalog, self._origin = writer, catalog, (bundle_id, feature_fingerprint)

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if a user is named: an impression of no user teaches nothing."""
        return bool(request.subject)

    def apply(self, request: Request, slate: Slate) -> None:
        """Takes note of the slate."""
        self._writer.put(PendingSlate(request, slate, self._catalog, *self._origin))


def is_logged(subject: str, share: float) -> bool:
    """Returns True if a user is of the share whose slates are logged.

    A hash of the user alone decides: all slates of a user are logged or none is, on every worker, and a user of a
    share is of every larger one.
    """
    if share >= 1:
        return True
    # `person` gives the hash a domain of its own, so that the draw is independent of that of the holdout.
    drawn = hashlib.blake2b(subject.encode(), digest_size=8, person=b"impressions").digest()
    return int.from_bytes(drawn, "little") < share * 2**64


def logged_impression(pending: PendingSlate, share: float = 1.0) -> LoggedImpression:
    """Returns a slate as a row of the impressions table; `share` is that of the users whose slates are logged."""
    request, slate, user = pending.request, pending.slate, pending.slate.user
    payload: dict[str, Any] = {
        "request_id": request.request_id,
        **user_fields(request.subject),
        "timestamp": request.now_ms,
        "session_id": request.session_id,
        "surface": request.surface,
        "method": request.method,
        "query": request.text,
        "page_size": request.page_size,
        "item_ids": slate.item_ids(pending.catalog.ids(slate.rows)),
        "arm": user.assignment.arm,
        "bucket": user.assignment.bucket,
        "rung": slate.rung,
        "bundle_id": pending.bundle_id,
        "profile_version": user.profile.version if user.profile else 0,
        "catalog_version": user.catalog_version,
        "degraded": [part for part, _ in slate.degraded],
        "feature_fingerprint": pending.feature_fingerprint,
        **_sources(slate),
        **_inputs(request, slate, pending.catalog),
        **request.context,
    }
    if slate.features is not None and user.encoded is not None:
        rows, types = user.encoded
        unknown = np.full(slate.features.shape[1], np.nan, np.float32)
        features = np.array(_page(slate, list(slate.features), unknown), np.float32)
        payload["features"] = encode_features(features)
        payload["encoder_digest"] = encoder_digest(item_keys(pending.catalog.ids(rows)), types)
    # Told even if no feature reads them, for one that is declared later.
    if attributes_among(user.controls).size:
        payload["user_attributes"] = attributes_text(user.controls)
    if share < 1:  # the number of users whose slates this one stands for
        payload["weight"] = 1 / share
    numbers = {"scores": _score_text(slate), "propensities": _propensity_text(slate)}
    return LoggedImpression(request.subject, request.now_ms, encode_slate(payload, numbers))


def _score_text(slate: Slate) -> str:
    """Returns the scores of a page as JSON."""
    if not slate.unknown and np.isfinite(slate.scores).all():
        return number_text(slate.scores)
    return encode_numbers(_page(slate, _numbers(slate.scores), None))


def _propensity_text(slate: Slate) -> str:
    """Returns the propensities of a page as JSON."""
    if not slate.unknown and (slate.propensities == 1.0).all():
        return _certain(slate.propensities.size)
    return encode_numbers(_page(slate, [p if p == p else None for p in slate.propensities.tolist()], 1.0))


@cache
def _certain(count: int) -> str:
    """Returns the propensities of a page on which nothing is drawn at random; pages have few lengths."""
    return encode_numbers([1.0] * count)


def _page(slate: Slate, values: list[_T], unknown: _T) -> list[_T]:
    """Returns the values of a page in the order shown: `values` for its rows, `unknown` for each item without one."""
    if not slate.unknown:
        return values
    return [values[at] if at >= 0 else unknown for at in slate.order()]


def _sources(slate: Slate) -> dict[str, Any]:
    """Returns the sources of each item: their names once, and per item a number with a bit for each of them."""
    named = ~np.isnan(slate.candidates.scores)
    naming = np.flatnonzero(named.any(axis=1))
    bits = np.left_shift(1, np.arange(naming.size))
    return {
        "source_names": [slate.candidates.names[at] for at in naming.tolist()],
        "sources": _page(slate, (bits @ named[naming]).tolist() if naming.size else [0] * slate.rows.size, 0),
    }


def _inputs(request: Request, slate: Slate, catalog: Catalog) -> dict[str, Any]:
    """Returns what the caller or the user's controls gave for this slate, by column; only what was given."""
    inputs: dict[str, Any] = {}
    if request.seeds.size:
        inputs["seed_item_ids"] = catalog.ids(request.seeds)
    if request.upstream is not None:
        unknown = np.array([candidate.upstream for candidate in slate.unknown], np.float32)
        # Reversed at the end, as `order` has the n-th unknown candidate at -1 - n.
        scores = _numbers(np.concatenate([slate.candidates.of(_UPSTREAM), unknown[::-1]]))
        inputs["upstream_scores"] = [scores[at] for at in slate.order()]
        inputs["upstream_weight"] = request.upstream_weight
    if request.exclude.size:
        excluded = list(dict.fromkeys(request.exclude.tolist()))
        inputs["excluded"] = len(excluded)
        inputs["excluded_item_ids"] = catalog.ids(excluded[:MOST_EXCLUDED])
    turned = {dial: value for dial, value in slate.user.dials.items() if value}
    if turned:
        inputs["dials"] = _dials(turned, catalog)
    return inputs


def _dials(turned: Dials, catalog: Catalog) -> dict[str, float]:
    """Returns the dials as the contract names them (`categories.western`), if they are many those turned furthest."""
    # Those of the whole slate first: they are three at most, and each is about every item.
    furthest = sorted(turned.items(), key=lambda pair: (pair[0][0] in _ABOUT, -abs(pair[1])))[:MOST_DIALS]
    names = {dial: _names(catalog, dial, [key for (of, key), _ in furthest if of is dial]) for dial in _ABOUT}
    return {
        f"{_ABOUT[dial]}.{names[dial].get(key, f'key {key:016x}')}" if dial in _ABOUT else dial.name.lower(): value
        for (dial, key), value in furthest
    }


def _names(catalog: Catalog, dial: Dial, keys: list[int]) -> dict[int, str]:
    """Returns the names of the keys of categories or creators, as far as an item of the catalogue has them."""
    column = "category" if dial is Dial.CATEGORY_WEIGHT else "creator"
    items = {key: catalog.item(row) for key, row in catalog.rows_with(column, keys).items()}
    return {key: item["creator_id"] if column == "creator" else item["categories"][0] for key, item in items.items()}


def _numbers(values: npt.NDArray[np.float32]) -> list[float | None]:
    """Returns the numbers with no more digits than tell them apart; None for one that is not finite."""
    return [float(str(value)) if np.isfinite(value) else None for value in values]
