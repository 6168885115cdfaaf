"""The inputs of the ranker: the kernel against its plain twin, to the bit, and a candidate without the others."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features import decayed_counts, ranker_kernels
from features.action_rates import ActionRates
from features.assemble import (
    History,
    Moment,
    are_choices,
    counts_and_kinds,
    ranker_features,
    type_index,
    types_of_keys,
)
from features.catalog_columns import CatalogColumns
from features.declared import Declared
from features.keys import event_type_key
from features.model_inputs import RANKER_FEATURES
from features.profile import RING
from features.ranker_plain import affinity, ranker_features_plain

NOW_MS = 1_760_000_000_000
ITEMS = 300
TYPES = ["view_item", "like", "purchase", "impression_viewed"]
ACTIONS = [
    {"name": "like", "event_type": "like", "min_value": None, "shown_types": ["impression_viewed"]},
    {"name": "buy", "event_type": "purchase", "min_value": 0.5, "shown_types": []},
]


DECLARED = [
    {"name": f"{form}_{same}", "form": form, "event_types": ["like", "purchase"], "same": same, **more}
    for same in ("any", "item", "category", "creator")
    for form, more in (
        ("count", {"window_hours": 24 * 7}),
        ("rate", {"shown_types": ["view_item", "impression_viewed"], "prior": 3.0}),
    )
]


def catalog_columns(rng: np.random.Generator, actions: int, with_statistics: bool, declared: int = 0) -> CatalogColumns:
    width = 2 + 3 * actions if with_statistics else 0
    return CatalogColumns(
        vectors=np.zeros((ITEMS, 4), np.float32),
        available=np.ones(ITEMS, bool),
        available_from=rng.choice([0, 1, NOW_MS - 10**10, NOW_MS + 10**9], ITEMS),
        available_until=np.full(ITEMS, 2**62),
        price=np.where(rng.random(ITEMS) < 0.2, np.nan, 100 * rng.random(ITEMS)).astype(np.float32),
        category=rng.integers(0, 40, ITEMS).astype(np.uint64),
        creator=rng.integers(0, 30, ITEMS).astype(np.uint64),
        popularity=rng.random(ITEMS).astype(np.float32),
        recent_popularity=rng.random(ITEMS).astype(np.float32),
        trained=rng.random(ITEMS) < 0.8,
        duration=np.where(rng.random(ITEMS) < 0.3, np.nan, 10 ** (5 * rng.random(ITEMS))).astype(np.float32),
        statistics=rng.normal(size=(ITEMS, width)).astype(np.float32),
        declared=rng.normal(size=(ITEMS, declared)).astype(np.float32),
        put_at=np.zeros(ITEMS, np.int64),
    )


def history_of(rng: np.random.Generator, columns: CatalogColumns, length: int) -> History:
    # Few items, so that some come again; some are unknown, and some events have a type that no model knows.
    rows = rng.integers(-1, 60, length).astype(np.int32)
    types = np.array([event_type_key(name) for name in (*TYPES, "other")], np.uint32)[rng.integers(0, 5, length)]
    times = np.sort(NOW_MS - (rng.random(length) ** 4 * 90 * 86_400_000).astype(np.int64))
    categories = np.where(rows >= 0, columns.category[rows], 7).astype(np.uint64)
    creators = np.where(rows >= 0, columns.creator[rows], 0).astype(np.uint64)
    counts = decayed_counts.fold(
        decayed_counts.empty(), (rows.astype(np.int64) + 2).astype(np.uint64), categories, creators, types, times
    )
    index = type_index(TYPES)
    values = np.where(rng.random(length) < 0.5, np.nan, rng.random(length)).astype(np.float32)
    return History(
        rows,
        types_of_keys(types, index),
        categories,
        creators,
        times,
        values,
        are_choices(types),
        *counts_and_kinds(counts, index),
    )


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    actions=st.integers(0, 2),
    length=st.integers(0, RING),
    count=st.integers(0, 40),
    now_ms=st.sampled_from([0, NOW_MS, NOW_MS + 20 * 60_000, NOW_MS + 10**9, NOW_MS - 10**9]),
    slate=st.booleans(),
)
def test_the_kernel_equals_its_plain_twin_to_the_bit(
    seed: int, actions: int, length: int, count: int, now_ms: int, slate: bool
) -> None:
    rng = np.random.default_rng(seed)
    declared = Declared.of(DECLARED if seed % 3 else (), TYPES)
    columns = catalog_columns(rng, actions, with_statistics=bool(seed % 2), declared=seed % 5)
    base_rates = [-2.0, -3.0][:actions]
    facts = {"event_types": TYPES, "actions": ACTIONS[:actions], "base_rates": base_rates}
    rates = ActionRates.of({**facts, "surface_rates": {"home": [0.25, -0.5][:actions]}})
    past = history_of(rng, columns, length)
    rows, relevance = rng.integers(0, ITEMS, count).astype(np.int32), rng.normal(size=count).astype(np.float32)
    positions = rng.integers(0, 50, count).astype(np.int32) if slate else None
    values = rng.normal(size=seed % 4).astype(np.float32)
    moment = Moment(now_ms, "home" if seed % 3 else "elsewhere", positions, values, declared.past)

    features = ranker_features(past, rows, relevance, columns, rates, moment)
    np.testing.assert_array_equal(features, ranker_features_plain(past, rows, relevance, columns, rates, moment))
    for at in range(0, count, 7):
        alone = dataclasses.replace(moment, positions=None if positions is None else positions[at : at + 1])
        one_row = ranker_features(past, rows[at : at + 1], relevance[at : at + 1], columns, rates, alone)
        np.testing.assert_array_equal(features[at], one_row[0])


@pytest.mark.parametrize("name", RANKER_FEATURES.names)
def test_a_column_has_the_number_of_its_feature(name: str) -> None:
    assert getattr(ranker_kernels, name.upper()) == RANKER_FEATURES.names.index(name)


def test_affinity_is_a_weighted_share() -> None:
    shares = affinity(np.array([7, 8, 0], np.uint64), np.array([7, 9, 7], np.uint64), np.array([1.0, 2.0, 5.0]))
    np.testing.assert_allclose(shares, [6 / 8, 0, 0])
