"""A data set that is read a part at a time is, row by row, the one that fits into memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import features.tables.dataset
import features.tables.event_reader
from features.tables.dataset import Dataset, open_dataset, write_dataset
from features.tables.schema import EVENTS
from tests.untrained import dataset


@pytest.fixture
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features.tables.dataset, "HELD_ROWS", 0)
    monkeypatch.setattr(features.tables.dataset, "BATCH_ROWS", 7)
    monkeypatch.setattr(features.tables.event_reader, "BATCH_ROWS", 7)
    monkeypatch.setattr(features.tables.event_reader, "BUCKET_ROWS", 20)


def same(one: Dataset, other: Dataset) -> None:
    assert one.info == other.info
    assert one.rejected == other.rejected
    assert one.items.equals(other.items)
    assert one.events.equals(other.events)
    assert one.stream.distinct("item_id") == other.stream.distinct("item_id")


def test_what_penchant_wrote_streams_from_its_files(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    made = dataset()
    write_dataset(tmp_path / "data", made.events, made.items, name="d")
    whole = open_dataset(tmp_path / "data")
    request.getfixturevalue("few_at_a_time")
    streamed = open_dataset(tmp_path / "data")
    assert len(list(streamed.stream.batches(["user_id"]))) > 1
    assert max(batch.num_rows for batch in streamed.stream.batches(["user_id"])) <= 7
    same(streamed, whole)


def test_rows_in_any_order_and_malformed_ones_end_up_in_order(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    events = dataset().events.to_pylist()
    rng = np.random.default_rng(0)
    events = [events[at] for at in rng.permutation(len(events))]
    events[5]["item_id"] = ""
    for row in events[::3]:
        row["value"], row["attributes"] = 2.5, [("colour", "red")]
    (tmp_path / "data" / "events").mkdir(parents=True)
    half = len(events) // 2
    for number, part in enumerate((events[:half], events[half:])):
        pq.write_table(pa.Table.from_pylist(part, EVENTS), tmp_path / "data" / "events" / f"{number}.parquet")
    whole = open_dataset(tmp_path / "data")
    request.getfixturevalue("few_at_a_time")
    streamed = open_dataset(tmp_path / "data")
    assert len(streamed.rejected) == 1
    same(streamed, whole)


def test_seconds_are_told_from_milliseconds_by_the_whole_file(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    columns = {"USER_ID": ["a", "a", "b"] * 9, "item_id": ["x", "y", "z"] * 9, "event_type": ["like"] * 27}
    (tmp_path / "data").mkdir()
    times = [1_600_000_000 + at for at in range(27)]
    pq.write_table(pa.table({**columns, "timestamp": times}), tmp_path / "data" / "events.parquet")
    whole = open_dataset(tmp_path / "data")
    request.getfixturevalue("few_at_a_time")
    same(open_dataset(tmp_path / "data"), whole)
    assert whole.info["first_timestamp"] == 1_600_000_000_000
