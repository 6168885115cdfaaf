"""Follows the catalogue log: this worker embeds, indexes and serves the items that are put, in the order of the log."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from features.errors import PenchantError
from features.transforms import WORDED, item_inputs, item_text, text_tokens
from serving.engine.engine import EngineRef
from serving.engine.warm_up import ITEM_BATCH
from serving.errors import ServingError, Unavailable
from serving.observability.outages import Outage
from serving.stores.catalog_log import CatalogLog, CatalogProgress, Change

_BLOCK_MS = 500
_RETRY_S = 0.5
_HEARTBEAT_S = 0.8
_CONTENT = frozenset((*WORDED, "creator_id", "price"))
"""Fields that its vector is made of."""

_log = logging.getLogger(__name__)


class CatalogSync:
    """Applies the log to the engine in use; one thread, the only writer of its catalogue.

    Attributes:
        trouble: Why the catalogue is behind the log, empty where it is not.
    """

    def __init__(self, engine_ref: EngineRef, log: CatalogLog, progress: CatalogProgress, workers: int = 1) -> None:
        """Takes the engine to update, the log to follow, the progress to report, and the number of workers."""
        self._engine_ref, self._log, self._progress, self._workers = engine_ref, log, progress, workers
        self._worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._deleted: set[int] = set()
        self._stop = threading.Event()
        self._reported_at = 0.0
        self.trouble = "it has not caught up with the log yet"
        self._thread = threading.Thread(target=self._run, name="catalog", daemon=True)

    def start(self) -> None:
        """Catches up with the log, if it answers, then follows it in the background."""
        try:
            self.catch_up()
            self._log.applied(self._worker, self._progress.version)
            self.trouble = ""
        except ServingError as error:
            self.trouble = str(error)
            if not isinstance(error, Unavailable):  # each call to Redis logs that itself
                _log.warning("starting without the latest changes of the catalogue: %s", error)
        self._thread.start()

    def catch_up(self) -> None:
        """Applies everything that changed since the bundle's tables were cut.

        Raises:
            CatalogLogUnavailable: The log does not answer.
        """
        self._progress.reach(self._engine_ref.engine.bundle.manifest.catalog_version)
        while True:
            version, changes = self._log.tail(self._progress.version)
            self.apply(changes)
            self._progress.reach(version)
            if not changes:
                return

    def stop(self) -> None:
        """Stops following; no call waits for this worker any more."""
        self._stop.set()
        self._thread.join(2 * _BLOCK_MS / 1000)
        try:
            self._log.leave(self._worker)
        except Unavailable as error:
            _log.warning("the catalogue log forgets this worker by itself: %s", error)

    def step(self, block_ms: int) -> None:
        """Applies new changes, waiting up to `block_ms` for them, and reports the version of this worker.

        Raises:
            Unavailable: The log does not answer.
        """
        version, changes = self._log.tail(self._progress.version, block_ms)
        if version < self._progress.version:
            _log.warning("the catalogue log began again at version %d", version)
        self.apply(changes)
        # After the changes are applied, so that a request that waits for the version sees them.
        self._progress.reach(version)
        now = time.monotonic()
        # Other workers wait for the versions of live ones, so a silent worker would count as dead.
        if changes or now - self._reported_at > _HEARTBEAT_S:
            self._log.applied(self._worker, version)
            self._reported_at = now

    def wait_everywhere(self, version: int, seconds: float) -> bool:
        """Waits until every live worker has applied a version; returns False if one has not in time."""
        end = time.monotonic() + seconds
        try:
            return self._progress.wait(version, seconds) and self._log.wait_all_applied(
                version, end - time.monotonic(), self._workers
            )
        except Unavailable as error:
            _log.warning("it is not known whether every worker has version %d: %s", version, error)
            return False

    @property
    def version(self) -> int:
        """The version of the catalogue that this worker has applied."""
        return self._progress.version

    def wait(self, version: int, seconds: float) -> bool:
        """Waits until this worker has applied a version; returns False if the time is over first."""
        return self._progress.wait(version, seconds)

    def knows(self, row: int) -> bool:
        """Returns True if a row is an item of the catalogue, and was not deleted."""
        return row >= 0 and row not in self._deleted

    def apply(self, changes: Sequence[Change]) -> None:
        """Applies changes in their order; one that cannot be applied is logged and skipped."""
        # Runs of one kind: batches save calls of the model, and the order between a put and a deletion stays.
        for kind, group in groupby(changes, lambda change: change.kind):
            batch = list(group)
            put = {"put": self._put, "patch": self._patch}.get(kind, self._set_available)
            for start in range(0, len(batch), ITEM_BATCH):
                self._put_or_skip(batch[start : start + ITEM_BATCH], put)

    def _run(self) -> None:
        outage = Outage(_log, "the catalogue is not followed")
        while not self._stop.is_set():
            try:
                self.step(_BLOCK_MS)
                self.trouble = ""
            except Unavailable as error:  # each call to Redis logs that itself
                self.trouble = str(error)
                self._stop.wait(_RETRY_S)
            except ServingError as error:
                self.trouble = str(error)
                outage.failed(error)
                self._stop.wait(_RETRY_S)
            except Exception as error:  # noqa: BLE001  a worker that stops following would show deleted items
                self.trouble = f"{type(error).__name__}: {error}"
                outage.failed(f"{error!r}; trying again", trace=error)
                self._stop.wait(_RETRY_S)
            else:
                outage.works()

    def _put_or_skip(self, changes: Sequence[Change], put: Callable[[Sequence[Change]], None]) -> None:
        """Applies a batch; if that fails, each change alone, so that a bad one does not hold up the others for ever."""
        try:
            put(changes)
        except (PenchantError, ValueError, KeyError, TypeError) as error:
            if len(changes) == 1:
                kind, item_id = changes[0].kind, changes[0].item_id
                _log.error("the %s of item %r cannot be applied and is skipped: %r", kind, item_id, error)
                return
            for change in changes:
                self._put_or_skip([change], put)

    def _put(self, changes: Sequence[Change]) -> None:
        engine = self._engine_ref.engine
        items: list[dict[str, Any]] = [json.loads(change.payload) for change in changes]
        # If a batch puts an item twice, the last one counts.
        items = list({item["item_id"]: item for item in items}.values())
        # One call of the model for the batch, since one item alone costs it almost as much.
        vectors = engine.model.encode_items(item_inputs(items, engine.shapes))
        # One by one into the catalogue: each has a time of its own, and readers see whole items only.
        rows = [
            int(engine.catalog.put([item], vectors[at : at + 1], item["put_at"])[0]) for at, item in enumerate(items)
        ]
        engine.lexical.put(rows, [text_tokens(item_text(item)) for item in items])
        self._deleted.difference_update(rows)

    def _patch(self, changes: Sequence[Change]) -> None:
        """Changes fields of existing items; computes words and vectors again only if these fields are part of them."""
        engine = self._engine_ref.engine
        patches: dict[str, dict[str, Any]] = {}
        for change in changes:
            patches.setdefault(change.item_id, {}).update(json.loads(change.payload))
        # Several patches of one item are one, so that its words and vector are computed once.
        rows = engine.catalog.rows(list(patches)).tolist()
        patched = {row: fields for row, fields in zip(rows, patches.values(), strict=True) if self.knows(row)}
        # One read of them all: Arrow takes as long for a single row as for many.
        records = dict(zip(patched, engine.catalog.records_now(list(patched)), strict=True))
        items = {row: records[row] | fields for row, fields in patched.items()}
        vectors = self._vectors({row: item for row, item in items.items() if not _CONTENT.isdisjoint(patched[row])})
        for row, item in items.items():
            engine.catalog.replace(row, item, vectors.get(row, engine.catalog.columns.vectors[row]))
        worded = [row for row, fields in patched.items() if not fields.keys().isdisjoint(WORDED)]
        if worded:
            engine.lexical.put(worded, [text_tokens(item_text(items[row])) for row in worded])

    def _vectors(self, items: Mapping[int, Mapping[str, Any]]) -> dict[int, npt.NDArray[np.float32]]:
        """Returns the vectors by content of the live items, by row; an item of the bundle keeps its trained vector."""
        engine = self._engine_ref.engine
        live = [row for row in items if row >= engine.catalog.base_size]
        if not live:
            return {}
        vectors = engine.model.encode_items(item_inputs([items[row] for row in live], engine.shapes))
        return dict(zip(live, vectors, strict=True))

    def _set_available(self, changes: Sequence[Change]) -> None:
        """Applies deletions, or changes of availability."""
        engine = self._engine_ref.engine
        deleted: list[int] = []
        rows = engine.catalog.rows([change.item_id for change in changes]).tolist()
        for change, row in zip(changes, rows, strict=True):
            # The log may bring a change again, or one of an item that a deletion has overtaken.
            if not self.knows(row):
                continue
            if change.kind == "delete":
                engine.catalog.set_available(row, False)
                self._deleted.add(row)
                deleted.append(row)
                continue
            window = json.loads(change.payload)
            engine.catalog.set_available(row, window["available"], window["available_from"], window["available_until"])
        if deleted:
            engine.lexical.remove(deleted)
