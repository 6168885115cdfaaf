"""The linear part of relevance: every kernel agrees with its plain twin, and the sums are those that they should be."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from features import linear
from features.linear import ItemWeights, LinearSpec, LinearTerm

ITEMS = 40


def table(seed: int) -> ItemWeights:
    random = np.random.default_rng(seed)
    rows = np.array([random.permutation(ITEMS)[:6] for _ in range(ITEMS)], np.int32)
    rows[random.random(ITEMS) < 0.2] = -1
    return ItemWeights.of(rows, random.standard_normal((ITEMS, 6)).astype(np.float32))


factors = st.sampled_from([0.0, 0.5, 1.0, 3.7])
specs = st.builds(
    LinearSpec,
    weight=factors,
    decay=st.floats(0, 1),
    count_weight=factors,
    recency_weight=factors,
    recency_decay=st.floats(0, 1),
)
# Rows past the table are of live items.
histories = st.lists(st.integers(0, ITEMS + 3), max_size=30).map(lambda rows: np.array(rows, np.int32))
some_rows = st.lists(st.integers(0, ITEMS + 3), max_size=12, unique=True).map(lambda rows: np.array(rows, np.int32))


@given(specs, histories, st.integers(0, 9))
def test_sums_agree_with_their_twin(spec: LinearSpec, chosen: np.ndarray, seed: int) -> None:
    weights = table(seed)
    rows, sums = linear.LinearScores(*linear.sum_weights(chosen, weights, spec)).listed()
    plain = linear.sum_weights_plain(chosen, weights, spec)
    assert dict(zip(rows.tolist(), sums.tolist(), strict=True)) == {row: float(total) for row, total in plain.items()}
    assert np.unique(rows).size == rows.size


@given(specs, histories, some_rows, st.integers(0, 9), st.integers(1, 9), st.binary(min_size=5, max_size=5))
def test_look_ups_and_the_best_agree_with_their_twins(
    spec: LinearSpec, chosen: np.ndarray, rows: np.ndarray, seed: int, count: int, bits: bytes
) -> None:
    sums = LinearTerm(spec, table(seed)).scores(chosen)
    allowed = np.frombuffer(bits, np.uint8)
    np.testing.assert_array_equal(sums.of(rows), linear.sums_of_plain(sums.rows, sums.sums, rows))
    best = sums.best(count, allowed, rows)
    np.testing.assert_array_equal(best, linear.best_sums_plain(*sums, count, allowed, rows))
    assert not set(best.tolist()) & set(rows.tolist())


def test_an_item_counts_where_it_was_chosen_last() -> None:
    weights = ItemWeights.of(np.array([[2], [3], [-1], [-1]], np.int32), np.array([[1], [1], [0], [0]], np.float32))
    term = LinearTerm(LinearSpec(weight=8.0, decay=0.5), weights)
    sums = term.scores(np.array([0, 1, 0], np.int32))
    # Item 0 is the newest, item 1 the next: what item 0 was before does not count again.
    assert sums.of(np.array([2, 3, 0], np.int32)).tolist() == [8.0, 4.0, 0.0]
    own = LinearTerm(LinearSpec(count_weight=1.0, recency_weight=4.0, recency_decay=0.5), weights)
    expected = [np.log1p(2) + 4, np.log1p(1) + 2, 0]
    np.testing.assert_allclose(
        own.scores(np.array([0, 1, 0], np.int32)).of(np.array([0, 1, 2], np.int32)), expected, 1e-6
    )


def test_a_model_without_a_linear_part_adds_nothing() -> None:
    assert not LinearTerm(LinearSpec(), table(0)).scores(np.array([1, 2], np.int32)).taken.size
    assert LinearSpec.of(None) == LinearSpec()
    assert LinearSpec.of(LinearSpec(weight=2.0).as_json()) == LinearSpec(weight=2.0)
