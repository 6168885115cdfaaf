"""What happens after the answer: slates go to the impression log, and nobody waits for it."""

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

from features.assemble import FEATURES, encoder_digest
from features.catalog import Catalog
from features.controls import Dial, Dials
from features.keys import item_keys
from serving.errors import ServingError, Unavailable
from serving.observability.outages import EVENTS_REDIS, Outage, shared_outage
from serving.observability.telemetry import Telemetry
from serving.pipeline.query import Query, Slate
from serving.stores.event_log import EventLog
from serving.stores.log_codec import encode_features, encode_slate, user_fields
from serving.stores.log_entries import LoggedImpression

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
class _Shown:
    """A slate that waits to be written."""

    query: Query
    slate: Slate
    catalog: Catalog
    bundle_id: str


class SlateSink(Protocol):
    """Takes the slates that are to be logged."""

    def put(self, shown: _Shown) -> None:
        """Takes a slate; returns at once and does not fail."""
        ...


class SlateCollector:
    """Keeps slates in memory until they are taken."""

    def __init__(self) -> None:
        self._slates: list[LoggedImpression] = []

    def put(self, shown: _Shown) -> None:
        """Keeps a slate."""
        self._slates.append(_logged(shown))

    def take(self) -> list[LoggedImpression]:
        """Hands over the slates since the last time."""
        taken, self._slates = self._slates, []
        return taken


class ImpressionWriter:
    """Writes slates to the log from a thread of its own; what does not fit its queue is dropped and counted."""

    def __init__(self, log: EventLog, limit: int, telemetry: Telemetry, share: float = 1.0) -> None:
        """Takes the log, how many slates may wait, and the share of users whose slates are logged."""
        self._log, self._telemetry, self._share = log, telemetry, share
        self._outage = Outage(_log, "slates are not logged")
        self._damaged = Outage(_log, "some slates cannot be written")
        self._waiting: queue.Queue[_Shown | None] = queue.Queue(limit)
        telemetry.gauge("slates_waiting", self._waiting.qsize)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="impressions", daemon=True)
        self._thread.start()

    def put(self, shown: _Shown) -> None:
        """Takes a slate, or drops it where too many wait."""
        try:
            self._waiting.put_nowait(shown)
        except queue.Full:
            self._telemetry.count("impressions.dropped")

    def close(self, timeout_s: float = 5.0) -> None:
        """Writes what still waits, as far as the time goes."""
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
            # A round trip, and a write to disk, per batch: let one come together.
            self._closing.wait(_GATHER_S)
            while len(batch) < _BATCH and batch[-1] is not None and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            shown = [one for one in batch if one is not None]
            self._write(list(self._payloads(shown)))
            queries = [one.query for one in shown]
            back = {query.subject: query.now_ms for query in queries if query.profile and query.profile.emptied}
            if back:
                self._call_back(back)
            if batch[-1] is None:
                return

    def _payloads(self, shown: Sequence[_Shown]) -> Iterator[LoggedImpression]:
        """Yields the slates as they are logged; one that cannot be written costs itself, not the thread."""
        for one in shown:
            if not is_logged(one.query.subject, self._share):
                self._telemetry.count("impressions.left_out")
                continue
            try:
                yield _logged(one, self._share)
            except Exception as error:  # noqa: BLE001 - a defect in one slate must not end the log
                self._damaged.failed(f"the one of the request {one.query.request_id!r}: {error!r}", trace=error)
                self._telemetry.count("impressions.dropped")

    def _write(self, batch: list[LoggedImpression]) -> None:
        """Writes a batch once: a second try could write it twice, and lost slates do less harm than doubled ones."""
        if not batch:
            return
        try:
            written = self._log.append_impressions(batch)
        except ServingError as error:
            self._lose(error, "slates not logged", len(batch))
            self._telemetry.count("impressions.dropped", len(batch))
            return
        self._outage.works()
        self._telemetry.count("impressions.written", written)

    def _call_back(self, seen: Mapping[str, int]) -> None:
        """Asks for the states of those who are back and have done nothing yet; their next answer asks again."""
        try:
            self._log.call_back(seen)
        except ServingError as error:
            self._lose(error, "users who came back unknown for now", len(seen))

    def _lose(self, error: ServingError, what: str, number: int) -> None:
        """Says what an error costs; of a Redis that does not answer, with the next line about that."""
        if isinstance(error, Unavailable):
            shared_outage(EVENTS_REDIS).lost(what, number)
            return
        self._outage.lost(what, number)
        self._outage.failed(error)


class Impressions:
    """Hands every slate shown to somebody to the writer."""

    name = "impressions"

    def __init__(self, writer: SlateSink, catalog: Catalog, bundle_id: str) -> None:
        self._writer, self._catalog, self._bundle_id = writer, catalog, bundle_id

    def enable(self, query: Query) -> bool:
        """Where a person is named: an impression nobody can be tied to teaches nothing."""
        return bool(query.subject)

    def apply(self, query: Query, slate: Slate) -> None:
        """Takes note of the slate."""
        self._writer.put(_Shown(query, slate, self._catalog, self._bundle_id))


def is_logged(subject: str, share: float) -> bool:
    """Returns True where a user is of the share whose slates are logged.

    By a hash of the user alone: all slates of a user are logged or none is, on every worker, and who is of a share is
    of every larger one.
    """
    if share >= 1:
        return True
    drawn = hashlib.blake2b(subject.encode(), digest_size=8, person=b"impressions").digest()
    return int.from_bytes(drawn, "little") < share * 2**64


def _logged(shown: _Shown, share: float = 1.0) -> LoggedImpression:
    """A slate in the words of the impressions table; `share` is that of the users whose slates are logged."""
    query, slate = shown.query, shown.slate
    payload: dict[str, Any] = {
        "request_id": query.request_id,
        **user_fields(query.subject),
        "timestamp": query.now_ms,
        "session_id": query.session_id,
        "surface": query.surface,
        "method": query.method,
        "query": query.text,
        "page_size": query.page_size,
        "item_ids": slate.item_ids(shown.catalog.ids(slate.rows)),
        "scores": _page(slate, _numbers(slate.scores), None),
        "propensities": _page(slate, [p if p == p else None for p in slate.propensities.tolist()], 1.0),
        "arm": query.arm,
        "bucket": query.bucket,
        "rung": query.rung,
        "bundle_id": shown.bundle_id,
        "profile_version": query.profile.version if query.profile else 0,
        "catalog_version": query.catalog_version,
        "degraded": [part for part, _ in query.degraded],
        "feature_fingerprint": FEATURES.fingerprint(),
        **_sources(slate),
        **_asked(query, slate, shown.catalog),
        **query.context,
    }
    if slate.features is not None and query.encoded is not None:
        rows, types = query.encoded
        unknown = np.full(slate.features.shape[1], np.nan, np.float32)
        features = np.array(_page(slate, list(slate.features), unknown), np.float32)
        payload["features"] = encode_features(features)
        payload["encoder_digest"] = encoder_digest(item_keys(shown.catalog.ids(rows)), types)
    if share < 1:  # the slates of so many users are this one's to stand for
        payload["weight"] = 1 / share
    return LoggedImpression(query.subject, query.now_ms, encode_slate(payload))


def _page(slate: Slate, known: list[_T], unknown: _T) -> list[_T]:
    """What is said of the items of a page in the order shown: of those of `rows`, and of those without a row."""
    return [known[at] if at >= 0 else unknown for at in slate.order()]


def _sources(slate: Slate) -> dict[str, Any]:
    """The sources of each item: their names once, and per item a number with a bit for each of them."""
    named = ~np.isnan(slate.candidates.scores)
    some = np.flatnonzero(named.any(axis=1))
    bits = np.left_shift(1, np.arange(some.size))
    return {
        "source_names": [slate.candidates.names[at] for at in some.tolist()],
        "sources": _page(slate, (bits @ named[some]).tolist() if some.size else [0] * slate.rows.size, 0),
    }


def _asked(query: Query, slate: Slate, catalog: Catalog) -> dict[str, Any]:
    """What the caller or the user's controls asked of this slate; nothing for what nobody did."""
    asked: dict[str, Any] = {}
    if query.seeds.size:
        asked["seed_item_ids"] = catalog.ids(query.seeds)
    if query.upstream is not None:
        known, unknown = slate.candidates.of(_UPSTREAM), [one.upstream for one in slate.unknown]
        scores = _numbers(np.concatenate([known, np.array(unknown[::-1], np.float32)]))
        # The n-th without a row is at -1 - n.
        asked["upstream_scores"] = [scores[at] for at in slate.order()]
        asked["upstream_weight"] = query.upstream_weight
    if query.exclude.size:
        excluded = list(dict.fromkeys(query.exclude.tolist()))
        asked["excluded"] = len(excluded)
        asked["excluded_item_ids"] = catalog.ids(excluded[:MOST_EXCLUDED])
    turned = {about: value for about, value in query.dials.items() if value}
    if turned:
        asked["dials"] = _dials(turned, catalog)
    return asked


def _dials(turned: Dials, catalog: Catalog) -> dict[str, float]:
    """The dials as the contract names them, those turned furthest where they are many: `categories.western`."""
    furthest = sorted(turned.items(), key=lambda pair: (pair[0][0] in _ABOUT, -abs(pair[1])))[:MOST_DIALS]
    names = {dial: _names(catalog, dial, [key for (of, key), _ in furthest if of is dial]) for dial in _ABOUT}
    return {
        f"{_ABOUT[dial]}.{names[dial].get(key, f'key {key:016x}')}" if dial in _ABOUT else dial.name.lower(): value
        for (dial, key), value in furthest
    }


def _names(catalog: Catalog, dial: Dial, keys: list[int]) -> dict[int, str]:
    """What the keys of categories or creators stand for, where an item of the catalogue tells."""
    column = "category" if dial is Dial.CATEGORY_WEIGHT else "creator"
    items = {key: catalog.item(row) for key, row in catalog.rows_with(column, keys).items()}
    return {key: item["creator_id"] if column == "creator" else item["categories"][0] for key, item in items.items()}


def _numbers(values: npt.NDArray[np.float32]) -> list[float | None]:
    """The numbers with no more digits than tell them apart; None for what is not finite."""
    return [float(str(value)) if np.isfinite(value) else None for value in values]
