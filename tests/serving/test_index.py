"""The index against the exact search: same rows, same scores, whatever is allowed and whatever is new."""

from __future__ import annotations

import faiss
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.catalog import Catalog
from features.errors import BundleError
from features.vocabulary import Vocabulary
from serving.bundle import vector_index
from serving.bundle.bitmap import (
    allowed_count,
    allowed_rows,
    allowed_rows_plain,
    clear_keys,
    clear_keys_plain,
    clear_rows,
    clear_rows_plain,
    first_allowed,
    first_allowed_plain,
)
from serving.bundle.vector_index import SPARE, Index, exact_search
from training.export import index as index_build
from training.export.index import build

DIM = 16
NOW = 1_700_000_000_000


def clustered(count: int, seed: int = 0, clusters: int = 40) -> np.ndarray:
    """Items in clusters, some of them longer than others, as trained vectors are."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(clusters, DIM))
    vectors = centers[rng.integers(0, clusters, count)] + 0.6 * rng.normal(size=(count, DIM))
    return (vectors * np.exp(rng.normal(0, 0.3, (count, 1)))).astype(np.float32)


def make(vectors: np.ndarray, **options: int) -> Index:
    ids = [f"i{row}" for row in range(len(vectors))]
    catalog = Catalog(pa.table({"item_id": ids}), Vocabulary.build(ids), vectors.copy())
    index = Index(build(vectors, clustered(200, seed=5), 0.98, **options).data, catalog)
    index.catalog = catalog  # type: ignore[attr-defined]
    return index


FLAT = {"exact_up_to": 10**9}
IVF = {"exact_up_to": 0}
SQ8 = {"exact_up_to": 0, "quantised_from": 0}


@pytest.fixture(scope="module", params=[FLAT, IVF, SQ8], ids=["flat", "ivf", "sq8"])
def index(request) -> Index:
    return make(clustered(6000), **request.param)


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))


@pytest.mark.parametrize("share", [1.0, 0.5, 0.05, 0.002])
@pytest.mark.parametrize("near", [False, True], ids=["random", "clustered"])
@pytest.mark.parametrize("narrow", [0, vector_index.NARROW], ids=["lists", "narrow"])
def test_agrees_with_the_exact_search(index, share, near, narrow, monkeypatch):
    monkeypatch.setattr(vector_index, "NARROW", narrow)
    vectors, queries = index.catalog.columns.vectors, clustered(64, seed=7)
    rng = np.random.default_rng(1)
    allowed = None
    if share < 1:
        # Clustered: what is allowed lies together and away from most queries.
        order = np.argsort(vectors[:, 0]) if near else rng.permutation(len(vectors))
        mask = np.zeros(len(vectors), bool)
        mask[order[: int(share * len(vectors))]] = True
        allowed = np.packbits(mask, bitorder="little")
    rows, scores = index.search(queries, 50, allowed)
    true_rows, true_scores = exact_search(vectors, queries, 50, allowed)
    assert rows.shape == true_rows.shape == (64, min(50, int(share * 6000)))
    assert rows.dtype == np.int32
    assert scores.dtype == np.float32
    assert (rows >= 0).all()
    assert recall(rows, true_rows) >= (0.98 if share == 1 else 0.95)
    if allowed is not None:
        assert mask[rows].all()
    if index._lists == 0 or (narrow and share < 1):
        np.testing.assert_array_equal(rows, true_rows)
        np.testing.assert_array_equal(scores, true_scores)
    np.testing.assert_allclose(scores, np.einsum("bkd,bd->bk", vectors[rows], queries), rtol=1e-4, atol=1e-4)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_recall_was_measured_on_what_is_proposed():
    assert index_build.SPARE == SPARE


def test_the_exact_search_is_right():
    vectors = np.array([[1, 0], [0, 1], [2, 2], [1, 0]], np.float32)
    rows, scores = exact_search(vectors, np.array([[1, 0]], np.float32), 3)
    assert rows.tolist() == [[2, 0, 3]]
    assert scores.tolist() == [[2, 1, 1]]


def test_more_wanted_than_there_is(index):
    allowed = np.packbits(np.arange(6000) % 3000 == 0, bitorder="little")
    rows, _ = index.search(clustered(2, seed=3), 10, allowed)
    assert sorted(rows[0].tolist()) == sorted(rows[1].tolist()) == [0, 3000]
    rows, scores = index.search(clustered(2, seed=3), 10, np.zeros(750, np.uint8))
    assert rows.shape == scores.shape == (2, 0)


@pytest.mark.parametrize("kind", [FLAT, IVF], ids=["flat", "ivf"])
def test_items_put_since_are_found_at_once(kind):
    index = make(clustered(6000), **kind)
    assert bool(index._lists) == (kind is IVF)
    query = clustered(1, seed=4)
    far = 10 * query / np.linalg.norm(query)
    row = int(index.catalog.put([{"item_id": "new"}], far, NOW)[0])
    assert row == 6000
    assert index.search(query, 5)[0][0, 0] == row
    allowed = index.catalog.eligible_bitmap(NOW)
    assert index.search(query, 5, allowed)[0][0, 0] == row
    index.catalog.set_available(row, False)
    assert row not in index.search(query, 5, index.catalog.eligible_bitmap(NOW))[0]
    # A bitmap cut before the item came does not allow it.
    assert row not in index.search(query, 5, np.full(750, 255, np.uint8))[0]


def test_a_score_depends_on_the_pair_alone(index):
    queries = clustered(3, seed=8)
    rows, scores = index.search(queries, 40)
    for query, mine, expected in zip(queries, rows, scores, strict=True):
        np.testing.assert_array_equal(index.score(query, mine), expected)
        np.testing.assert_array_equal(index.score(query, mine[3:4]), expected[3:4])


def test_it_uses_one_thread():
    index = make(clustered(6000), **IVF)
    assert index._lists
    faiss.omp_set_num_threads(2)
    index.search(clustered(2), 3)
    assert faiss.omp_get_max_threads() == 1


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.full((1, DIM), np.nan, np.float32), 5, "NaN or infinity"),
        (np.full((1, DIM), np.inf, np.float32), 5, "NaN or infinity"),
        (np.zeros((1, DIM + 1), np.float32), 5, r"expected \[B, 16\]"),
        (np.zeros(DIM, np.float32), 5, r"expected \[B, 16\]"),
        (np.zeros((1, DIM), np.float32), 0, "at least 1"),
    ],
)
def test_refuses_what_has_no_answer(index, queries, k, message):
    with pytest.raises(ValueError, match=message):
        index.search(queries, k)


def test_refuses_a_foreign_index():
    catalog = make(clustered(100), **FLAT).catalog
    other = build(clustered(99), clustered(5), 0.98).data
    with pytest.raises(BundleError, match="99 vectors of 16"):
        Index(other, catalog)
    with pytest.raises(BundleError, match=r"other vectors than vectors\.npy"):
        Index(build(clustered(100, seed=1), clustered(5), 0.98).data, catalog)
    with pytest.raises(BundleError, match="is cut short"):
        Index(other[:200], catalog)
    with pytest.raises(BundleError, match="of the kind b'no i'"):
        Index(b"no index", catalog)
    distance = faiss.IndexFlatL2(DIM)
    distance.add(clustered(100))
    with pytest.raises(BundleError, match="of the kind b'IxF2'"):
        Index(faiss.serialize_index(distance).tobytes(), catalog)


@given(st.lists(st.booleans(), max_size=70), st.integers(0, 80), st.integers(0, 80))
def test_bitmaps(bits, start, stop):
    allowed = np.packbits(np.array(bits, bool), bitorder="little")
    expected = [row for row in range(start, stop) if row < len(bits) and bits[row]]
    assert allowed_rows(allowed, start, stop).tolist() == expected
    assert allowed_rows_plain(allowed, start, stop).tolist() == expected
    assert allowed_count(allowed, stop) == sum(bits[:stop])


ROWS = st.lists(st.integers(0, 90), max_size=40).map(lambda rows: np.array(rows, np.int32))
BITS = st.lists(st.booleans(), max_size=70).map(lambda bits: np.packbits(np.array(bits, bool), bitorder="little"))


@given(BITS, ROWS)
def test_rows_are_taken_out_of_a_bitmap(bitmap, rows):
    quick, plain = bitmap.copy(), bitmap.copy()
    assert clear_rows(quick, rows) == clear_rows_plain(plain, rows)
    np.testing.assert_array_equal(quick, plain)
    assert clear_rows(quick, rows) == 0


@given(BITS, st.lists(st.integers(0, 5), min_size=72, max_size=90), st.lists(st.integers(0, 7), max_size=9))
def test_keys_are_taken_out_of_a_bitmap(bitmap, column, keys):
    # Keys whose lowest bits are equal must not be taken for one another.
    column, keys = (np.array(values, np.uint64) * np.uint64(4096) + np.uint64(1) for values in (column, keys))
    quick, plain = bitmap.copy(), bitmap.copy()
    assert clear_keys(quick, column, keys) == clear_keys_plain(plain, column, keys)
    np.testing.assert_array_equal(quick, plain)


@given(BITS, ROWS, st.integers(0, 50))
def test_the_first_allowed_are_found(bitmap, rows, count):
    np.testing.assert_array_equal(first_allowed(rows, bitmap, count), first_allowed_plain(rows, bitmap, count))
