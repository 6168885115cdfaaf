"""The one road from a profile to model inputs."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from features import assemble, model_inputs, profile
from features.action_rates import ActionRates
from features.catalog import Catalog
from features.keys import event_type_key, item_key
from features.profile_codec import decode, encode
from features.records import make_records
from features.vocabulary import Vocabulary

TYPES = {event_type_key("view_item"): 1, event_type_key("purchase"): 2}


@pytest.fixture
def catalog() -> Catalog:
    items = pa.table(
        {
            "item_id": ["a", "b", "c"],
            "categories": [["x"], ["y"], ["x"]],
            "creator_id": ["m", "n", None],
            "price": pa.array([np.e - 1, None, 0.0], pa.float32()),
            "popularity": pa.array([3.0, 2.0, 1.0], pa.float32()),
            "trained": [True, True, False],
        }
    )
    return Catalog(items, Vocabulary.build(["a", "b", "c"]), np.eye(3, dtype=np.float32))


def events(*named: tuple[str, str]):
    return make_records(
        [item_key(item) for item, _ in named],
        [item_key({"a": "x", "b": "y", "c": "x"}.get(item)) for item, _ in named],
        [item_key({"a": "m", "b": "n"}.get(item)) for item, _ in named],
        [1000 * at for at in range(len(named))],
        np.nan,
        [event_type_key(kind) for _, kind in named],
    )


def remembered(catalog, *named: tuple[str, str]) -> assemble.History:
    known = profile.fold(profile.empty(), events(*named), len(named))
    return assemble.history(known, catalog, TYPES)


def test_history_resolves_against_catalogue_and_bundle(catalog):
    past = remembered(catalog, ("b", "view_item"), ("gone", "purchase"), ("a", "wink"))
    assert past.rows.tolist() == [1, -1, 0]
    assert past.types.tolist() == [1, 2, 0]


@pytest.mark.parametrize("count", [1, 2])
def test_kernels_get_arrays_of_one_kind_however_short_the_history(catalog, count):
    """The field of a single record is contiguous, so a view of it stays read-only: another type to a kernel."""
    stored = profile.fold(profile.empty(), events(*[("a", "view_item")] * count), count)
    past = assemble.history(decode(encode(stored)), catalog, TYPES)
    for name in ("categories", "creators", "timestamps", "values"):
        array = getattr(past, name)
        assert array.flags.writeable
        assert array.flags.c_contiguous


def test_encoder_inputs_keep_the_newest_known_events_and_their_repeats(catalog):
    past = remembered(catalog, ("a", "view_item"), ("b", "view_item"), ("gone", "purchase"), ("b", "purchase"))
    rows, types = assemble.encoder_inputs(past.rows, past.types, 2)
    assert (rows.tolist(), types.tolist()) == ([1, 1], [1, 2])
    assert assemble.encoder_inputs(past.rows[:0], past.types[:0], 2)[0].tolist() == []


def test_pack_pads_on_the_right():
    one, none = np.array([4, 5]), np.array([], np.int64)
    rows, types, lengths = assemble.pack([(one, one), (none, none)])
    assert rows.tolist() == [[4, 5], [0, 0]]
    assert types.shape == (2, 2)
    assert lengths.tolist() == [2, 0]
    assert assemble.pack([(none, none)])[0].shape == (1, 1)


OUTCOMES = ActionRates.of(
    {
        "event_types": ["view_item", "purchase"],
        "actions": [
            {"name": "buy", "event_type": "purchase", "min_value": None, "shown_types": ["view_item"]},
            {"name": "view", "event_type": "view_item", "min_value": None},
        ],
        "base_rates": [-1.0, 2.0],
        "surface_rates": {"home": [0.5, -0.5]},
    }
)
DAY_MS = 86_400_000
MOMENT = assemble.Moment(20_000 * DAY_MS, "home")


def test_ranker_features_by_hand(catalog):
    past = remembered(catalog, ("a", "view_item"), ("b", "purchase"))
    relevance = np.array([0.5, -1.0, 2.0], np.float32)
    table = assemble.ranker_features(past, np.array([0, 1, 2], np.int32), relevance, catalog.columns, OUTCOMES, MOMENT)
    named = dict(zip(model_inputs.ranker_names(["buy", "view"]), table.T, strict=True))
    old = 0.5 ** (1 / model_inputs.HALF_LIFE)
    np.testing.assert_array_equal(named["relevance"], relevance)
    np.testing.assert_allclose(named["category_affinity"], [old / (1 + old), 1 / (1 + old), old / (1 + old)], rtol=1e-6)
    np.testing.assert_allclose(named["creator_affinity"], [old / (1 + old), 1 / (1 + old), 0], rtol=1e-6)
    np.testing.assert_allclose(named["price"], [1, 0, 0], rtol=1e-6)
    assert named["price_known"].tolist() == [1, 0, 1]
    assert named["trained"].tolist() == [1, 1, 0]
    np.testing.assert_allclose(named["history_length"], np.log(3), rtol=1e-6)


def test_how_long_ago_the_item_was_by_hand(catalog):
    rows, nothing = np.array([0, 1, 2], np.int32), np.zeros(3, np.float32)
    place = model_inputs.RANKER_FEATURES.names.index("item_pause")

    def pauses(*named: tuple[str, str]) -> list[float]:
        past = remembered(catalog, *named)
        return assemble.ranker_features(past, rows, nothing, catalog.columns, OUTCOMES, MOMENT)[:, place].tolist()

    some = pauses(("a", "purchase"), ("b", "view_item"), ("gone", "purchase"), ("b", "purchase"), ("gone", "purchase"))
    assert some == pytest.approx([math.log1p(4), math.log1p(1), math.log1p(5)])
    assert pauses() == [0, 0, 0]
    assert pauses(("gone", "purchase")) == pytest.approx([math.log1p(1)] * 3)


def test_what_the_newest_visit_has_by_hand(catalog):
    rows, nothing = np.array([0, 1, 2], np.int32), np.zeros(3, np.float32)
    place = model_inputs.RANKER_FEATURES.names.index("item_in_visit")

    def in_visit(times: list[int], now: int) -> list[float]:
        records = events(("a", "purchase"), ("b", "purchase"), ("gone", "purchase"))
        records["timestamp"] = times
        past = assemble.history(profile.fold(profile.empty(), records, 3), catalog, TYPES)
        moment = assemble.Moment(now)
        return assemble.ranker_features(past, rows, nothing, catalog.columns, OUTCOMES, moment)[:, place].tolist()

    pause, began = 30 * 60_000, DAY_MS
    assert in_visit([began, began + 1000, began + 1000], 0) == [1, 1, 0]
    assert in_visit([began, began + pause + 1, began + pause + 1], 0) == [0, 1, 0]
    # It is the newest visit, also where that is long over; where there are no times, there is none.
    assert in_visit([began, began + pause + 1, began + pause + 1], 9 * began) == [0, 1, 0]
    assert in_visit([0, 0, 0], 0) == [0, 0, 0]


def test_what_lasts_by_hand(catalog):
    past = remembered(catalog, ("a", "view_item"), ("b", "purchase"), ("a", "hide"), ("", "search"))
    rows, nothing = np.array([0, 1, 2], np.int32), np.zeros(3, np.float32)

    def told(now: int) -> dict[str, np.ndarray]:
        table = assemble.ranker_features(past, rows, nothing, catalog.columns, OUTCOMES, assemble.Moment(now))
        return dict(zip(model_inputs.ranker_names(["buy", "view"]), table.T.astype(np.float64), strict=True))

    soon = told(2000 + 600_000)
    for horizon in ("day", "month"):
        np.testing.assert_allclose(soon[f"category_{horizon}"], np.log1p([1, 1, 1]), rtol=0.01)
        np.testing.assert_allclose(soon[f"creator_{horizon}"], np.log1p([1, 1, 0]), rtol=0.01)
        np.testing.assert_allclose(soon[f"activity_{horizon}"], np.log1p(3), rtol=0.01)
    tenth = 0.5 ** (1 / 6)
    np.testing.assert_allclose(soon["category_hour"], np.log1p([tenth, tenth, tenth]), rtol=0.01)
    np.testing.assert_allclose(soon["visit_length"], np.log1p(3), rtol=1e-6)
    np.testing.assert_allclose(soon["visit_minutes"], np.log1p(602 / 60), rtol=1e-6)
    np.testing.assert_allclose(soon["visit_category"], [1 / 2, 1 / 2, 1 / 2], rtol=1e-6)  # what was hidden is no choice
    expected = 1 / (1 + np.exp(1.0))
    bought = (1 + 4 * expected) / (1 + 4)  # one purchase, one item seen
    np.testing.assert_allclose(soon["buy/person_month_rate"], np.log(bought / (1 - bought)) + 1, rtol=0.02)
    later = told(2000 + DAY_MS)
    np.testing.assert_allclose(later["category_day"], np.log1p([0.5, 0.5, 0.5]), rtol=0.01)
    for name in ("visit_length", "visit_minutes", "visit_category"):
        assert not later[name].any()
    unknown = told(0)
    names = model_inputs.RANKER_FEATURES.names
    decayed = names[names.index("category_hour") : names.index("visit_category") + 1]
    assert all(not unknown[name].any() for name in decayed)
    assert not unknown["view/person_month_rate"].any()


def test_a_candidate_does_not_depend_on_the_others(catalog):
    past = remembered(catalog, ("a", "view_item"), ("b", "purchase"), ("a", "purchase"))
    rows, relevance = np.array([2, 0, 1], np.int32), np.array([1, 2, 3], np.float32)
    together = assemble.ranker_features(past, rows, relevance, catalog.columns, OUTCOMES, MOMENT)
    alone = [
        assemble.ranker_features(past, rows[i : i + 1], relevance[i : i + 1], catalog.columns, OUTCOMES, MOMENT)
        for i in range(3)
    ]
    assert together.tobytes() == np.concatenate(alone).tobytes()


def test_seen_is_what_was_touched_and_what_left_the_ring(catalog):
    older = np.array([item_key("c"), item_key("gone")], np.uint64)
    known = profile.Profile(9, events(("a", "view_item"), ("b", "purchase")), older, 4)
    viewed, purchased = np.array(list(TYPES), np.uint32)
    assert sorted(assemble.history_and_seen(known, catalog, {}, np.array([purchased]))[1].tolist()) == [1, 2]
    assert sorted(assemble.history_and_seen(known, catalog, {}, np.array([viewed, purchased]))[1].tolist()) == [0, 1, 2]


def test_a_search_is_no_part_of_a_history(catalog):
    past = remembered(catalog, ("a", "view_item"), ("", "search"), ("b", "purchase"))
    assert past.rows.tolist() == [0, 1]


def test_the_fingerprint_names_the_features():
    assert len(model_inputs.FEATURES.fingerprint()) == 64
    assert "relevance" in model_inputs.FEATURES.names
