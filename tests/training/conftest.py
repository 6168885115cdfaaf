"""Small data sets whose right answers are known by construction."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from features.histories import Distinct
from features.tables.dataset import write_dataset
from features.tables.schema import EVENTS, ITEMS
from training.config import TrainConfig
from training.data.interactions import Interactions

TINY = {
    "dim": 16,
    "layers": 1,
    "heads": 2,
    "feed_forward": 32,
    "dropout": 0.0,
    "max_length": 12,
    "batch_tokens": 256,
    "learning_rate": 0.01,
    "warmup_steps": 10,
    "epochs": 6,
    "token_buckets": 64,
    "max_tokens": 8,
    "category_buckets": 16,
    "max_categories": 2,
    "creator_buckets": 16,
    "query_steps": 60,
    "ranker_steps": 40,
    "ranker_hidden": 8,
    "candidates": 20,
    "neighbors": 5,
    "threads": 1,
    "device": "cpu",
}


@pytest.fixture
def tiny() -> TrainConfig:
    return TrainConfig(**TINY)


def interactions(
    histories: Sequence[Sequence[int]],
    items: int,
    times: Sequence[Sequence[int]] | None = None,
    repeats: bool = False,
) -> Interactions:
    """One event type; without times, order only."""
    rows = np.array([row for history in histories for row in history], np.int32)
    fresh = [row not in history[:at] for history in histories for at, row in enumerate(history)]
    stamps = np.zeros(rows.size, np.int64) if times is None else np.array([t for some in times for t in some], np.int64)
    return Interactions(
        users=[f"u{number}" for number in range(len(histories))],
        offsets=np.concatenate([[0], np.cumsum([len(history) for history in histories])]).astype(np.int64),
        rows=rows,
        types=np.ones(rows.size, np.uint8),
        timestamps=stamps,
        values=np.full(rows.size, np.nan, np.float32),
        target=np.ones(rows.size, bool) if repeats else np.array(fresh),
        seen=np.ones(rows.size, bool),
        event_types=["view_item"],
        items=items,
        ordered_only=times is None,
        origins=np.zeros(rows.size, np.uint32),
        resolved=Distinct().table(),
    )


CIRCLES, CIRCLE = 4, 10


@pytest.fixture(scope="session")
def circles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four circles of ten items; a person walks round one of them, so the next item is always known.

    An item's title and category name its circle. Item 39 says what it is, and nobody ever touched it.
    """
    rng = np.random.default_rng(0)
    events = []
    for person in range(160):
        circle, start = person % CIRCLES, int(rng.integers(CIRCLE))
        length = 9 if circle == CIRCLES - 1 else CIRCLE
        for step in range(int(rng.integers(5, 8))):
            place = (start + step) % length
            events.append(
                (f"u{person}", f"i{circle * CIRCLE + place}", 1_600_000_000_000 + person * 1000 + step * 10**7)
            )
    table = pa.table(
        {
            "user_id": [event[0] for event in events],
            "item_id": [event[1] for event in events],
            "event_type": ["purchase"] * len(events),
            "timestamp": [event[2] for event in events],
        }
    )
    names = ("western", "space", "romance", "comedy")
    items = pa.table(
        {
            "item_id": [f"i{row}" for row in range(CIRCLES * CIRCLE)],
            "title": [f"{names[row // CIRCLE]} number{row % CIRCLE}" for row in range(CIRCLES * CIRCLE)],
            "categories": [[names[row // CIRCLE]] for row in range(CIRCLES * CIRCLE)],
            "price": pa.array([float(1 + row // CIRCLE) for row in range(CIRCLES * CIRCLE)], pa.float32()),
        }
    )
    out = tmp_path_factory.mktemp("circles") / "data"
    write_dataset(out, _complete(table, EVENTS), _complete(items, ITEMS), name="circles")
    return out


def _complete(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def published(name: str) -> Path:
    """A file of the development data; skips where it is absent."""
    file = Path(os.environ.get("PENCHANT_DATA", "../shared/data")) / name
    if not file.exists():
        pytest.skip(f"{file} is absent: set PENCHANT_DATA to the development data")
    return file
