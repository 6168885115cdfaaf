"""The bitmap of eligible rows against the columns, after any changes and at any moment."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from features import eligibility
from features.catalog import Catalog
from features.vocabulary import Vocabulary

TIMES = st.sampled_from([0, 1_000_000, 2_000_000, 3_000_000, 4_000_000])
WINDOWS = st.tuples(st.booleans(), TIMES, TIMES)
STEPS = st.lists(
    st.tuples(st.just("set"), st.integers(0, 19), WINDOWS)
    | st.tuples(st.just("put"), st.integers(0, 30), WINDOWS)
    | st.tuples(st.just("wait"), st.integers(0, 3_000_000), WINDOWS),
    max_size=25,
)


def make(windows: list[tuple[bool, int, int]]) -> Catalog:
    ids = [f"i{at}" for at in range(len(windows))]
    available, begin, end = zip(*windows, strict=True)
    table = pa.table(
        {
            "item_id": ids,
            "available": pa.array(available, pa.bool_()),
            "available_from": pa.array([time or None for time in begin], pa.int64()),
            "available_until": pa.array([time or None for time in end], pa.int64()),
        }
    )
    return Catalog(table, Vocabulary.build(ids), np.zeros((len(ids), 2), np.float32))


def agree(catalog: Catalog, now: int) -> None:
    bits, count = catalog.eligible_rows(now)
    expected = catalog.eligible(np.arange(catalog.size), now)
    assert np.unpackbits(bits, bitorder="little")[: catalog.size].tolist() == expected.tolist()
    assert bits.size == -(-catalog.size // 8)
    assert count == expected.sum()
    assert not bits.flags.writeable


@given(st.lists(WINDOWS, min_size=20, max_size=20), STEPS, st.integers(0, 4_500_000), st.booleans())
def test_bits_are_those_of_the_columns(windows, steps, now, one_by_one):
    most, eligibility._MOST_MOMENTS = eligibility._MOST_MOMENTS, 10_000 if one_by_one else 0
    try:
        catalog = make(windows)
        for kind, number, (available, begin, end) in steps:
            if kind == "set":
                catalog.set_available(number, available, begin, end)
            elif kind == "put":
                fields = {"available": available, "available_from": begin, "available_until": end}
                catalog.put([{"item_id": f"i{number}", **fields}], np.zeros((1, 2), np.float32), now)
            else:
                now += number
            agree(catalog, now)
    finally:
        eligibility._MOST_MOMENTS = most


def test_an_earlier_moment_is_answered_too():
    catalog = make([(True, 0, 2_000_000), (True, 3_000_000, 0)])
    agree(catalog, 4_000_000)
    agree(catalog, 1_000_000)
    agree(catalog, 2_500_000)
    agree(catalog, 4_000_000)


def test_a_change_writes_one_bit_and_makes_no_bitmap():
    catalog = make([(True, 0, 0)] * 64)
    bits, _ = catalog.eligible_rows(1_000_000)
    catalog.set_available(9, False)
    again, count = catalog.eligible_rows(1_000_000)
    assert np.shares_memory(bits, again)
    assert (bits[1], count) == (0b11111101, 63)
