"""Every kernel agrees with its plain twin, to the bit."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from features import kernels

keys = st.integers(0, 12).map(np.uint64)
key_arrays = hnp.arrays(np.uint64, st.integers(0, 30), elements=st.integers(0, 12))


@given(hnp.arrays(np.uint8, st.tuples(st.integers(0, 8), st.integers(0, 44))))
def test_crc32_rows_is_the_one_of_zlib(rows):
    np.testing.assert_array_equal(kernels.crc32_rows(rows), kernels.crc32_rows_plain(rows))


@given(st.lists(st.integers(1, 12), unique=True, max_size=8), key_arrays, st.integers(0, 8))
def test_append_distinct_agrees_with_its_twin(evicted, pushed, cap):
    before = np.array(evicted, np.uint64)
    np.testing.assert_array_equal(
        kernels.append_distinct(before, pushed, cap), kernels.append_distinct_plain(before, pushed, cap)
    )


def test_append_distinct_keeps_the_newest_and_no_key_twice():
    kept = kernels.append_distinct(np.array([1, 2, 3], np.uint64), np.array([2, 0, 4, 4, 5], np.uint64), 4)
    assert kept.tolist() == [2, 3, 4, 5]


@given(hnp.arrays(np.uint32, st.integers(0, 40), elements=st.integers(0, 6)), st.lists(st.integers(0, 6), max_size=4))
def test_are_among_agrees_with_its_twin(keys, wanted):
    few = np.array(wanted, np.uint32)
    np.testing.assert_array_equal(kernels.are_among(keys, few), kernels.are_among_plain(keys, few))


scores = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, 1.0, np.inf, -np.inf, np.nan]))


@given(hnp.arrays(np.float32, st.integers(0, 40), elements=scores), st.randoms())
def test_best_first_sorts_as_its_twin(values, random):
    ties = np.array(random.sample(range(100), values.size), np.int32)
    keys, places = kernels.best_first(values, ties), kernels.best_first_plain(values, ties)
    np.testing.assert_array_equal(np.argsort(keys), np.argsort(places))
    assert np.unique(keys).size == keys.size


@given(st.integers(1, 70), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_dot_rows_agrees_with_its_twin_and_ignores_the_batch(dim, count, seed):
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((20, dim), dtype=np.float32)
    query = random.standard_normal(dim, dtype=np.float32)
    rows = random.integers(0, 20, count).astype(np.int32)
    dots = kernels.dot_rows(vectors, rows, query)
    np.testing.assert_array_equal(dots, kernels.dot_rows_plain(vectors, rows, query))
    np.testing.assert_allclose(dots, vectors[rows] @ query, rtol=1e-4, atol=1e-4)
    alone = [kernels.dot_rows(vectors, rows[i : i + 1], query)[0] for i in range(count)]
    np.testing.assert_array_equal(dots, np.array(alone, np.float32))
