"""The hash table of keys against a search among sorted keys."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from features.key_table import find_row, find_rows, find_rows_plain, key_slots

KEYS = st.lists(st.integers(1, 2**64 - 1) | st.integers(1, 40).map(lambda high: high << 32), unique=True, max_size=60)


@given(KEYS, st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_kernels_agree_with_their_plain_twins(keys, others):
    known = np.array(keys, np.uint64)
    slots = key_slots(known)
    wanted = np.array([*keys, *others, 0], np.uint64)
    rows, plain = np.empty((2, wanted.size), np.int32)
    find_rows(known, slots, wanted, rows)
    find_rows_plain(known, slots, wanted, plain)
    assert rows.tolist() == plain.tolist() == [find_row(known, slots, int(key)) for key in wanted.tolist()]
    assert rows[: len(keys)].tolist() == list(range(len(keys)))


@given(KEYS)
def test_half_of_the_slots_are_free(keys):
    slots = key_slots(np.array(keys, np.uint64))
    assert slots.size & (slots.size - 1) == 0
    assert sorted(slots[slots >= 0].tolist()) == list(range(len(keys)))
    assert 2 * len(keys) <= slots.size <= max(8, 4 * len(keys))
