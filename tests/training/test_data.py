from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from features.errors import TrainingError
from features.tables.dataset import open_dataset, write_dataset
from features.tables.schema import EVENTS, ITEMS
from training.config import TrainConfig
from training.data.batches import in_batches
from training.data.interactions import Interactions, item_vocabulary, read_interactions

EVENTS_OF_A = [
    ("x", "view_item"),
    ("x", "purchase"),
    ("y", "hide"),
    ("x", "purchase"),
    ("z", "purchase"),
    ("y", "purchase"),
]


def read(tmp_path: Path, config: TrainConfig) -> Interactions:
    columns = {
        "user_id": ["a"] * len(EVENTS_OF_A) + ["b"],
        "item_id": [item for item, _ in EVENTS_OF_A] + ["unlisted"],
        "event_type": [kind for _, kind in EVENTS_OF_A] + ["search"],
        "timestamp": [1_600_000_000_000 + step for step in range(len(EVENTS_OF_A) + 1)],
    }
    events = pa.table([pa.array(columns.get(f.name, [None] * 7), f.type) for f in EVENTS], schema=EVENTS)
    items = pa.Table.from_pylist([{"item_id": name} for name in ("x", "y", "z")], schema=ITEMS)
    write_dataset(tmp_path / "data", events, items, name="small")
    dataset = open_dataset(tmp_path / "data")
    _, vocabulary = item_vocabulary(dataset)
    return read_interactions(dataset, vocabulary, config)


def test_items_that_only_events_name_get_the_last_rows(tmp_path: Path) -> None:
    data = read(tmp_path, TrainConfig())
    assert data.items == 4
    assert data.rows.tolist() == [0, 0, 1, 0, 2, 1, 3]
    assert data.offsets.tolist() == [0, 6, 7]


def test_types_are_numbered_by_name(tmp_path: Path) -> None:
    data = read(tmp_path, TrainConfig())
    assert data.event_types == ["hide", "purchase", "search", "view_item"]
    assert data.types.tolist() == [4, 2, 1, 2, 2, 2, 3]


def test_what_is_passive_is_never_predicted_and_what_was_had_only_where_repeats_count(tmp_path: Path) -> None:
    # x was viewed before it was purchased, and y was hidden: neither is new.
    assert read(tmp_path, TrainConfig()).target.tolist() == [True, False, False, False, True, False, False]
    repeated = read(tmp_path, TrainConfig(repeats=True))
    assert repeated.target.tolist() == [True, True, False, True, True, True, False]


def test_chosen_types_decide_what_is_predicted_and_seen(tmp_path: Path) -> None:
    data = read(tmp_path, TrainConfig(target_types=("purchase",), seen_types=("purchase",)))
    assert data.target.tolist() == [False, True, False, False, True, True, False]
    assert data.seen.tolist() == [False, True, False, True, True, True, False]


def test_no_event_to_predict_is_an_error_that_names_the_types(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="set target_types"):
        read(tmp_path, TrainConfig(target_types=("listen",)))


def test_groups_hold_everybody_once_and_little_padding() -> None:
    lengths = np.array([3, 100, 7, 50, 99, 1])
    groups = list(in_batches(lengths, tokens=200, most=3))
    assert sorted(np.concatenate(groups).tolist()) == list(range(6))
    assert all(len(group) * lengths[group].max() <= 200 for group in groups)
