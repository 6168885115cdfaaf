"""What happens after the answer: slates go to the impression log, and nobody waits for it."""

from __future__ import annotations

import base64
import json
import logging
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from features.assemble import FEATURES, encoder_digest
from features.catalog import Catalog
from features.schema import item_keys
from serving.errors import ServingError
from serving.events import EventLog, LoggedImpression
from serving.query import Query, Slate
from serving.telemetry import Telemetry

_BATCH = 256
_GATHER_S = 0.05
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Shown:
    """A slate that waits to be written."""

    query: Query
    slate: Slate
    catalog: Catalog
    bundle_id: str


class ImpressionWriter:
    """Writes slates to the log from a thread of its own; what does not fit its queue is dropped and counted."""

    def __init__(self, log: EventLog, limit: int, telemetry: Telemetry) -> None:
        """Takes the log and how many slates may wait."""
        self._log, self._telemetry = log, telemetry
        self._waiting: queue.Queue[_Shown | None] = queue.Queue(limit)
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
            self._write([_logged(one) for one in shown])
            queries = [one.query for one in shown]
            back = {query.subject: query.now_ms for query in queries if query.profile and query.profile.vacant}
            if back:
                self._call_back(back)
            if batch[-1] is None:
                return

    def _write(self, batch: list[LoggedImpression]) -> None:
        """Writes a batch once: a second try could write it twice, and lost slates do less harm than doubled ones."""
        if not batch:
            return
        try:
            written = self._log.append_impressions(batch)
        except ServingError as error:
            _log.warning("%d slates were not logged: %s", len(batch), error)
            self._telemetry.count("impressions.dropped", len(batch))
            return
        self._telemetry.count("impressions.written", written)

    def _call_back(self, seen: Mapping[str, int]) -> None:
        """Asks for the states of those who are back and have done nothing yet; their next answer asks again."""
        try:
            self._log.call_back(seen)
        except ServingError as error:
            _log.warning("%d people who came back stay unknown for now: %s", len(seen), error)


class Impressions:
    """Hands every slate shown to somebody to the writer."""

    name = "impressions"

    def __init__(self, writer: ImpressionWriter, catalog: Catalog, bundle_id: str) -> None:
        self._writer, self._catalog, self._bundle_id = writer, catalog, bundle_id

    def enable(self, query: Query) -> bool:
        """Where a person is named: an impression nobody can be tied to teaches nothing."""
        return bool(query.subject)

    def apply(self, query: Query, slate: Slate) -> None:
        """Takes note of the slate."""
        self._writer.put(_Shown(query, slate, self._catalog, self._bundle_id))


def _logged(shown: _Shown) -> LoggedImpression:
    """A slate in the words of the impressions table."""
    query, slate = shown.query, shown.slate
    payload: dict[str, Any] = {
        "request_id": query.request_id,
        "user_id": query.subject[2:],
        "anonymous": query.subject.startswith("a:"),
        "timestamp": query.now_ms,
        "session_id": query.session_id,
        "surface": query.surface,
        "query": query.text,
        "item_ids": shown.catalog.ids(slate.rows),
        "scores": [score if score == score and abs(score) != float("inf") else None for score in slate.scores.tolist()],
        "propensities": [chance if chance == chance else None for chance in slate.propensities.tolist()],
        "arm": query.arm,
        "bucket": query.bucket,
        "rung": query.rung,
        "bundle_id": shown.bundle_id,
        "profile_version": query.profile.version if query.profile else 0,
        "catalog_version": query.catalog_version,
        "degraded": [part for part, _ in query.degraded],
        "feature_fingerprint": FEATURES.fingerprint(),
        **query.context,
    }
    if slate.features is not None and query.encoded is not None:
        rows, types = query.encoded
        # As text, for the entry is JSON; a number of the table takes four bytes.
        payload["features"] = base64.b64encode(slate.features.astype("<f4").tobytes()).decode()
        payload["encoder_digest"] = encoder_digest(item_keys(shown.catalog.ids(rows)), types)
    return LoggedImpression(query.subject, query.now_ms, json.dumps(payload, ensure_ascii=False).encode())
