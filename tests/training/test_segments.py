"""What people of a segment like, in a world whose tastes are known by construction."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from features.catalog_columns import columns_of
from features.keys import item_key
from features.tables.dataset import open_dataset, write_dataset
from features.tables.schema import ITEMS
from tests.untrained import CONFIG
from training.data.interactions import item_vocabulary, read_interactions
from training.export.segments import FEWEST_USERS, POPULAR, popular_in_segments, segments_of

DAY = 86_400_000
NOW = 1_700_000_000_000


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Twelve like tea, ten coffee, nine cocoa, which is too few; all of them take mugs now and then."""
    items = [
        {"item_id": f"{kind}-{at}", "categories": [kind]} for kind in ("tea", "coffee", "cocoa") for at in range(3)
    ] + [{"item_id": "mug"}]
    events = []
    for kind, people in (("tea", FEWEST_USERS + 2), ("coffee", FEWEST_USERS), ("cocoa", FEWEST_USERS - 1)):
        for person in range(people):
            # Old favourites are bought by all, new ones by some; what was only seen counts as no choice.
            taken = (
                [(f"{kind}-0", 90), (f"{kind}-1", 1), ("mug", 2)] if person % 2 else [(f"{kind}-0", 90), ("mug", 80)]
            )
            events += [(f"{kind}-{person}", item, "purchase", NOW - age * DAY) for item, age in taken]
            events += [(f"{kind}-{person}", f"{kind}-2", "view_item_list", NOW)]
    columns = ["user_id", "item_id", "event_type", "timestamp"]
    table = pa.table(dict(zip(columns, map(list, zip(*events, strict=True)), strict=True)))
    folder = tmp_path_factory.mktemp("segments") / "data"
    write_dataset(folder, table, pa.Table.from_pylist(items, ITEMS), name="test")
    dataset = open_dataset(folder)
    canonical, vocabulary = item_vocabulary(dataset)
    data = read_interactions(dataset, vocabulary, CONFIG)
    return data, columns_of(canonical, np.zeros((len(vocabulary), 4), np.float32)), vocabulary


def test_everybody_s_segment_is_what_they_chose_most(read):
    data, columns, _ = read
    found = dict(zip(data.users, segments_of(data, columns).tolist(), strict=True))
    assert {found[f"tea-{person}"] for person in range(FEWEST_USERS)} == {item_key("tea")}
    assert found["cocoa-0"] == item_key("cocoa")


def test_what_they_like_now_comes_first_and_few_people_make_no_table(read):
    data, columns, vocabulary = read
    tables = popular_in_segments(data, columns, recent_days=7)
    assert set(tables) == {item_key("tea"), item_key("coffee")}
    rows, scores = tables[item_key("tea")]
    # In the last week half of them took the mug and the newer tea; the mug was taken more often before.
    assert vocabulary.ids(rows) == ["mug", "tea-1", "tea-0"]
    half = (FEWEST_USERS + 2) // 2
    expected = [np.log1p(half) + 1e-3 * np.log1p(2 * half), (1 + 1e-3) * np.log1p(half), 1e-3 * np.log1p(2 * half)]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert rows.size <= POPULAR


def test_without_a_now_all_counts(read):
    data, columns, vocabulary = read
    rows, _ = popular_in_segments(data, columns, recent_days=1000)[item_key("coffee")]
    assert sorted(vocabulary.ids(rows[:2])) == ["coffee-0", "mug"]
