"""Recorded traffic: the slates and events of a warehouse, sent again in their order, at a multiple of their speed.

An impression says who asked for what and when; it does not hold the candidates of Rank that were not shown, so a Rank
is repeated with the items of its slate. Events get new ids and the time of the replay, or the service would take them
for repeats.
"""

from __future__ import annotations

import itertools
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.load.generator import Generator
from benchmarks.load.traffic import PATHS
from benchmarks.load.window import CallPlan
from benchmarks.report import BenchmarkError
from features.subjects import id_of, is_anonymous, subject_of
from features.tables.dataset import read_table
from features.tables.files import table_path
from features.tables.schema import EVENTS, EVENTS_REQUIRED, IMPRESSIONS_REQUIRED
from penchant.v1 import common_pb2, event_pb2, ranking_pb2
from serving.warehouse.tables import IMPRESSION_ROWS

_SLATE_COLUMNS = ("user_id", "timestamp", "item_ids", "surface", "session_id", "method", "query", "page_size")
_SEEDS = "seed_item_ids"
_EVENT_COLUMNS = ("user_id", "item_id", "event_type", "timestamp", "value", "session_id", "surface", "query")
_DEFAULT_PAGE = 10


class RecordedTraffic:
    """The calls of a warehouse, again and again from its beginning.

    Attributes:
        rate: The calls a second on average as they were recorded.
    """

    def __init__(self, generator: Generator, warehouse: Path, timeout_s: float = 1.0) -> None:
        """Reads the warehouse.

        Raises:
            BenchmarkError: It holds fewer than two calls.
        """
        self._timeout_s = timeout_s
        self._heads = {name: generator.head(path, timeout_s) for name, path in PATHS.items()}
        self._names = list(PATHS)
        calls = [*_slates(warehouse), *_events(warehouse)]
        # Stable: of one millisecond the slate comes before the event that it led to.
        calls.sort(key=lambda call: call[0])
        if len(calls) < 2 or calls[-1][0] == calls[0][0]:
            raise BenchmarkError(f"{warehouse} holds {len(calls)} calls: give a warehouse that was filled for a while")
        self._calls = calls
        self._times = np.array([call[0] for call in calls], np.float64) / 1000
        self._length_s = float(self._times[-1] - self._times[0])
        self.rate = len(calls) / self._length_s
        self._at = 0

    def plan(self, rate: float, count: int) -> CallPlan:
        """Returns the next `count` calls, at the speed that makes their mean over the whole record `rate` a second."""
        places = np.arange(self._at, self._at + count)
        rounds, rows = np.divmod(places, len(self._calls))
        self._at += count
        # A gap of the mean length lies between the last call and the first one again.
        moments = self._times[rows] + rounds * (self._length_s + 1 / self.rate)
        chosen = [self._calls[row] for row in rows.tolist()]
        return CallPlan(
            (moments - moments[0]) * self.rate / rate,
            [self._heads[name] for _, name, _ in chosen],
            [_fresh(name, message) for _, name, message in chosen],
            np.array([self._names.index(name) for _, name, _ in chosen], np.int8),
            self._names,
            self._timeout_s,
        )

    def rewind(self) -> None:
        """Begins again with the first call."""
        self._at = 0

    def figures(self) -> dict[str, object]:
        """Returns the number of recorded calls by method, their seconds and their rate."""
        counts = Counter(name for _, name, _ in self._calls)
        return {
            "recorded": dict(counts),
            "recorded_seconds": round(self._length_s, 1),
            "recorded_rate": round(self.rate, 3),
        }


_Call = tuple[int, str, Any]
"""Time in milliseconds, method, and the message: serialised, or an event that gets an id when it is sent."""


def _fresh(name: str, message: Any) -> bytes:
    if name != "ingest":
        return bytes(message)
    event = event_pb2.Event()
    event.CopyFrom(message)
    event.event_id = uuid.uuid4().hex
    return event_pb2.IngestRequest(events=[event]).SerializeToString()


def _slates(warehouse: Path) -> Iterator[_Call]:
    path = table_path(warehouse, "impressions")
    if path is None:
        return
    table = read_table(path, IMPRESSION_ROWS, IMPRESSIONS_REQUIRED).table
    for row in _rows(table, (*_SLATE_COLUMNS, _SEEDS)):
        if row["item_ids"]:
            yield row["timestamp"], *_request(row)


def _request(row: dict[str, Any]) -> tuple[str, bytes]:
    options = ranking_pb2.RankingOptions(
        subject=_subject(row["user_id"]),
        surface=row["surface"] or "",
        session_id=row["session_id"] or "",
        page_size=row["page_size"] or len(row["item_ids"]) or _DEFAULT_PAGE,
    )
    method, query = row["method"] or "recommend", row["query"] or ""
    if method == "search" and query:
        return "search", ranking_pb2.SearchRequest(options=options, query=query).SerializeToString()
    if method == "rank":
        candidates = ranking_pb2.Candidates(item_ids=row["item_ids"])
        request = ranking_pb2.RankRequest(options=options, candidates=candidates, query=query)
        return "rank", request.SerializeToString()
    if method == "similar" and row[_SEEDS]:
        similar = ranking_pb2.SimilarItemsRequest(options=options, seed_item_ids=row[_SEEDS])
        return "similar", similar.SerializeToString()
    return "recommend", ranking_pb2.RecommendRequest(options=options).SerializeToString()


def _events(warehouse: Path) -> Iterator[_Call]:
    path = table_path(warehouse, "events")
    if path is None:
        return
    for row in _rows(read_table(path, EVENTS, EVENTS_REQUIRED).table, _EVENT_COLUMNS):
        event = event_pb2.Event(
            subject=_subject(row["user_id"]), item_id=row["item_id"], event_type=row["event_type"],
            session_id=row["session_id"] or "", surface=row["surface"] or "", query=row["query"] or "",
        )  # fmt: skip
        if row["value"] is not None:
            event.value = row["value"]
        yield row["timestamp"], "ingest", event


def _subject(user_id: str) -> common_pb2.Subject:
    subject = subject_of(user_id)
    if is_anonymous(subject):
        return common_pb2.Subject(anonymous_id=id_of(subject))
    return common_pb2.Subject(user_id=id_of(subject))


def _rows(table: pa.Table, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    batches = (batch.to_pylist() for batch in table.select(list(names)).to_batches())
    return itertools.chain.from_iterable(batches)
