"""What an event was resolved to holds; the catalogue answers where it carries nothing: in serving and in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import features.tables.dataset
import features.tables.event_reader
from features.catalog_columns import columns_of
from features.histories import KEYS, Distinct, Logged, history_keys
from features.keys import item_key
from features.profile import Profile
from features.tables.dataset import open_dataset, write_dataset
from features.tables.schema import EVENTS, ITEMS
from serving.projection.histories import LoggedHistories
from training.config import TrainConfig
from training.data.histories import UserHistories
from training.data.interactions import item_vocabulary, read_interactions

NAMES = ("", "tea", "coffee")
CATALOG = [
    {"item_id": f"i{n}", "categories": [NAMES[n % 3]][: n % 3], "creator_id": NAMES[n % 2] or None} for n in range(4)
]
key = st.one_of(st.none(), st.sampled_from([0, 1, 7, 2**63, 2**64 - 1]))
lines = st.lists(st.tuples(key, key), max_size=12)


def logged(pairs: list[tuple[int | None, int | None]]) -> Logged:
    columns = zip(*pairs, strict=True) if pairs else ((), ())
    return Logged.of(pa.table([pa.array(column, pa.uint64()) for column in columns], names=KEYS))


@given(st.lists(lines, max_size=4))
def test_numbers_tell_all_that_events_carry(parts: list[Any]) -> None:
    distinct = Distinct()
    numbers = [distinct.numbers(logged(part)) for part in parts]
    table = distinct.table()
    for part, some in zip(parts, numbers, strict=True):
        back = table.take(some)
        assert back.keys.tolist() == [[one or 0 for one in pair] for pair in part]
        assert back.carried.tolist() == [[one is not None for one in pair] for pair in part]
    assert len(table.keys) == len({pair for part in parts for pair in part} | {(None, None)})
    assert not table.carried[0].any()


@given(st.lists(st.tuples(st.integers(-1, 3), key, key), max_size=12))
def test_what_an_event_carries_holds_and_the_catalogue_answers_else(events: list[Any]) -> None:
    columns = columns_of(pa.Table.from_pylist(CATALOG, ITEMS), np.empty((4, 0), np.float32))
    rows = np.array([row for row, *_ in events], np.int32)
    found = history_keys(rows, columns, logged([pair for _, *pair in events]))
    named = [CATALOG[row] if row >= 0 else {} for row, *_ in events]
    ours = [(item_key((item.get("categories") or [""])[0]), item_key(item.get("creator_id"))) for item in named]
    for place in range(2):
        expected = [
            e[place + 1] if e[place + 1] is not None else own[place] for e, own in zip(events, ours, strict=True)
        ]
        assert found[place].tolist() == expected


def events_of(count: int, draw: np.random.Generator, resolved: bool) -> pa.Table:
    """Events of three users about known and unknown items; keys are logged, or 0, or NULL where `resolved`."""
    keys = [None, 0, item_key("tea"), item_key("coffee")]
    rows = [
        {
            "user_id": f"u{draw.integers(3)}",
            "item_id": f"i{draw.integers(6)}",
            "event_type": str(draw.choice(["view_item", "purchase", "hide"])),
            "timestamp": 1_700_000_000_000 + int(draw.integers(10**10)),
            "value": float(draw.integers(5)),
            **({name: keys[draw.integers(4)] for name in KEYS} if resolved else {}),
        }
        for _ in range(count)
    ]
    return pa.Table.from_pylist(rows, EVENTS)


def written(folder: Path, events: pa.Table) -> Path:
    write_dataset(folder, events, pa.Table.from_pylist(CATALOG, ITEMS), name="small")
    return folder


def trained(folder: Path, config: TrainConfig | None = None) -> tuple[Any, UserHistories]:
    dataset = open_dataset(folder)
    items, vocabulary = item_vocabulary(dataset)
    data = read_interactions(dataset, vocabulary, config or TrainConfig())
    return data, UserHistories(data, columns_of(items, np.empty((items.num_rows, 0), np.float32)))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("resolved", [False, True])
def test_training_remembers_what_a_rebuild_folds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool, resolved: bool
) -> None:
    if streamed:
        monkeypatch.setattr(features.tables.dataset, "HELD_ROWS", 0)
        for module in (features.tables.dataset, features.tables.event_reader):
            monkeypatch.setattr(module, "BATCH_ROWS", 64)
    folder = written(tmp_path / "data", events_of(1100, np.random.default_rng(5), resolved))
    data, pasts = trained(folder)
    assert (data.origins.max() > 0) == resolved
    assert data.origins.flags.writeable == resolved  # what carries nothing needs no room on the disk
    histories = LoggedHistories(folder)
    for number, name in enumerate(data.users):
        own = histories.of(f"u:{name}")
        for position in (1, 40, 290, len(own.records)):
            profile: Profile = own.replayed(int(own.log_ids[position - 1]))
            past = pasts.before(number, position)
            assert past.categories.tolist() == profile.records["category"].tolist()
            assert past.creators.tolist() == profile.records["creator"].tolist()
            assert past.decayed_counts.keys.tolist() == profile.decayed_counts.keys.tolist()
            assert past.decayed_counts.counts.tobytes() == profile.decayed_counts.counts.tobytes()
        assert pasts.whole(number).segment() == profile.decayed_counts.segment()


def test_keys_stay_with_their_events_in_samples_and_where_items_are_hidden(tmp_path: Path) -> None:
    folder = written(tmp_path / "data", events_of(400, np.random.default_rng(6), True))
    data, _ = trained(folder)
    every = np.arange(data.rows.size)
    told = {
        (name, int(data.timestamps[at]), int(data.rows[at])): data.logged(slice(at, at + 1)).keys.tolist()
        for number, name in enumerate(data.users)
        for at in every[data.offsets[number] : data.offsets[number + 1]].tolist()
    }
    hidden, _ = trained(folder, TrainConfig(cold_item_share=0.5))
    assert 0 < hidden.rows.size < data.rows.size
    some = data.sample(np.diff(data.offsets), 300, seed=1)
    assert 0 < some.rows.size < data.rows.size
    sizes = {size: name for name, size in zip(data.users, np.diff(data.offsets).tolist(), strict=True)}
    for part in (hidden, some):
        for number, name in enumerate(part.users):
            begin, end = int(part.offsets[number]), int(part.offsets[number + 1])
            owner = name or sizes[end - begin]
            for at in range(begin, end):
                event = owner, int(part.timestamps[at]), int(part.rows[at])
                assert part.logged(slice(at, at + 1)).keys.tolist() == told[event]
