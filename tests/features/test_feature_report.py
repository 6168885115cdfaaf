"""The list of features says what a model reads, in its order, and coverage counts what is really there."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import TablesError
from features.feature_report import features, state_fingerprint
from features.model_inputs import FEATURES
from features.tables.dataset import write_dataset
from tests.untrained import untrained_bundle

NOW = 1_700_000_000_000


@pytest.fixture
def data(tmp_path):
    """Four items, one without a price and one that nobody touched; ann comes back to a category, bob does not."""
    items = [
        {"item_id": "i0", "categories": ["tea"], "creator_id": "m", "price": 1.0},
        {"item_id": "i1", "categories": ["tea"], "creator_id": "n", "price": 2.0},
        {"item_id": "i2", "categories": ["soap"], "creator_id": "m", "price": None},
        {"item_id": "i3", "categories": ["soap"], "creator_id": "m", "price": 4.0},
    ]
    visits = {"ann": ["i0", "i1"], "bob": ["i0", "i2"], "eve": ["i1"], "dan": ["ghost", "i0"]}
    events = [
        {"user_id": who, "item_id": item, "event_type": "view_item", "timestamp": NOW + at}
        for who, own in visits.items()
        for at, item in enumerate(own)
    ]
    named = {event["item_id"] for event in events} | {"i3"}
    kept = [item for item in items if item["item_id"] in named]
    write_dataset(tmp_path / "data", pa.Table.from_pylist(events), pa.Table.from_pylist(kept), name="four")
    return tmp_path / "data"


def coverage(said) -> dict[str, float | None]:
    return {one["name"]: one["coverage"] for one in said["features"]}


def test_every_feature_is_listed_in_the_order_of_the_models_input():
    said = features()
    assert [one["name"] for one in said["features"]] == list(FEATURES.names)
    assert all(one["type"] and one["window"] and one["meaning"] for one in said["features"])
    assert set(coverage(said).values()) == {None}
    assert said["fingerprints"]["features"] == FEATURES.fingerprint()
    assert said["fingerprints"]["state"] == state_fingerprint()
    assert len(set(said["fingerprints"].values())) == 4


def test_coverage_by_hand(data):
    found = coverage(features(data))
    assert found["price"] == found["price_known"] == 3 / 4
    assert found["trained"] == found["popularity"] == 3 / 4
    assert found["recent_popularity"] == 0
    # Just before the newest event: ann had been with tea, bob not with soap, eve nowhere, dan with what nobody knows.
    assert found["category_affinity"] == 1 / 4
    assert found["creator_affinity"] == 1 / 4
    assert found["history_length"] == 3 / 4
    assert found["item_vector"] == 2 / 3
    assert found["event_type"] == 2 / 3
    assert found["relevance"] is None


def test_a_bundle_says_it_of_its_items(data):
    said = features(bundle=untrained_bundle())
    assert said["fits"] is True
    found = coverage(said)
    assert found["price"] == pytest.approx(sum(1 for at in range(80) if at % 3) / 80)
    assert found["category_affinity"] is None
    assert coverage(features(data, untrained_bundle()))["item_vector"] == 0


def test_a_data_set_of_which_every_row_is_refused_says_so(tmp_path):
    rows = {"user_id": ["u"], "item_id": ["i"], "event_type": [""], "timestamp": [NOW]}
    pq.write_table(pa.table(rows), tmp_path / "events.parquet")
    with pytest.raises(TablesError, match=r"events: no row is left, all 1 were rejected, first .* row 0: event_type"):
        features(tmp_path)
