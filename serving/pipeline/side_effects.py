"""The stage after the answer: slates go to the impression log, and no caller waits for it."""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from features.assemble import encoder_digest
from features.catalog import Catalog
from features.controls import Dial, Dials
from features.keys import item_keys
from features.model_inputs import FEATURES
from serving.errors import ServingError, Unavailable
from serving.observability.outages import EVENTS_REDIS, Outage, shared_outage
from serving.observability.telemetry import Telemetry
from serving.pipeline.request import Request, UserState
from serving.pipeline.results import Slate
from serving.stores.event_log import EventLog
from serving.stores.log_codec import encode_features, encode_slate, user_fields
from serving.stores.log_entries import LoggedImpression
from serving.stores.restore_requests import RestoreRequests

MOST_EXCLUDED = 100
"""Excluded items that a slate is logged with at most; their number is logged in any case."""

MOST_DIALS = 100
"""Dials that a slate is logged with at most."""

_UPSTREAM = "upstream"
"""Name of the source whose scores are the caller's own."""

_ABOUT = {Dial.CATEGORY_WEIGHT: "categories", Dial.CREATOR_WEIGHT: "creators"}
_BATCH = 256
_T = TypeVar("_T")
_GATHER_S = 0.05
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PendingSlate:
    """A slate that waits to be written."""

    request: Request
    slate: Slate
    catalog: Catalog
    bundle_id: str


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


class ImpressionWriter:
    """Writes slates to the log from a thread of its own; those that do not fit its queue are dropped and counted."""

    def __init__(self, log: EventLog, limit: int, telemetry: Telemetry, share: float = 1.0) -> None:
        """Takes the log, how many slates may wait, and the share of users whose slates are logged."""
        self._log, self._telemetry, self._share = log, telemetry, share
        self._outage = Outage(_log, "slates are not logged")
        self._damaged = Outage(_log, "some slates cannot be written")
        # Bounded: while Redis is unreachable, slates are lost before memory is.
        self._waiting: queue.Queue[PendingSlate | None] = queue.Queue(limit)
        telemetry.gauge("slates_waiting", self._waiting.qsize)
        self._closing = threading.Event()
        # A daemon, so that a Redis that does not answer cannot keep a worker from ending.
        self._thread = threading.Thread(target=self._run, name="impressions", daemon=True)
        self._thread.start()

    def put(self, pending: PendingSlate) -> None:
        """Takes a slate, or drops it if too many wait."""
        try:
            self._waiting.put_nowait(pending)
        except queue.Full:
            self._telemetry.count(("slates", "dropped"))

    def close(self, timeout_s: float = 5.0) -> None:
        """Writes the waiting slates, as far as the time goes."""
        self._closing.set()
        try:
            self._waiting.put(None, timeout=timeout_s)
        except queue.Full:
            _log.warning("the impression log does not take the last slates: %d dropped", self._waiting.qsize())
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            batch = [self._waiting.get()]
            # A batch costs one round trip and one write to disk, so a little waiting lets it grow.
            self._closing.wait(_GATHER_S)
            while len(batch) < _BATCH and batch[-1] is not None and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            slates = [pending for pending in batch if pending is not None]
            self._write(list(self._payloads(slates)))
            emptied = [slate for slate in slates if (profile := slate.slate.user.profile) and profile.emptied]
            if emptied:
                self._call_back({pending.request.subject: pending.request.now_ms for pending in emptied})
            if batch[-1] is None:
                return

    def _payloads(self, slates: Sequence[PendingSlate]) -> Iterator[LoggedImpression]:
        """Yields the slates as they are logged; one that cannot be written is dropped, and the thread goes on."""
        for pending in slates:
            if not is_logged(pending.request.subject, self._share):
                self._telemetry.count(("slates", "left_out"))
                continue
            try:
                yield logged_impression(pending, self._share)
            except Exception as error:  # noqa: BLE001 - a defect in one slate must not end the log
                self._damaged.failed(f"the one of the request {pending.request.request_id!r}: {error!r}", trace=error)
                self._telemetry.count(("slates", "dropped"))

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

    def __init__(self, writer: SlateSink, catalog: Catalog, bundle_id: str) -> None:
        self._writer, self._catalog, self._bundle_id = writer, catalog, bundle_id

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if a user is named: an impression of no user teaches nothing."""
        return bool(request.subject)

    def apply(self, request: Request, slate: Slate) -> None:
        """Takes note of the slate."""
        self._writer.put(PendingSlate(request, slate, self._catalog, self._bundle_id))


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
        "scores": _page(slate, _numbers(slate.scores), None),
        "propensities": _page(slate, [p if p == p else None for p in slate.propensities.tolist()], 1.0),
        "arm": user.assignment.arm,
        "bucket": user.assignment.bucket,
        "rung": slate.rung,
        "bundle_id": pending.bundle_id,
        "profile_version": user.profile.version if user.profile else 0,
        "catalog_version": user.catalog_version,
        "degraded": [part for part, _ in slate.degraded],
        "feature_fingerprint": FEATURES.fingerprint(),
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
    if share < 1:  # the number of users whose slates this one stands for
        payload["weight"] = 1 / share
    return LoggedImpression(request.subject, request.now_ms, encode_slate(payload))


def _page(slate: Slate, values: list[_T], unknown: _T) -> list[_T]:
    """Returns the values of a page in the order shown: `values` for its rows, `unknown` for each item without one."""
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
