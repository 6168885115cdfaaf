"""What a profile remembers beyond its ring: the same however it is folded, and what its definition says it is."""

from __future__ import annotations

from decimal import Decimal, localcontext
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features import decay_kernels as decay
from features import decayed_counts as memory
from features.keys import event_type_key

HOUR, DAY, MONTH = memory.HORIZONS.values()
NOW = 1_700_000_000_000
TYPES = [event_type_key(name) for name in ("view_item", "purchase", "hide", "view_item_list")]

moments = st.integers(-50, 50).map(lambda step: NOW + step * 17 * 60_000) | st.sampled_from(
    [NOW - 400 * DAY, NOW, NOW + 1, NOW + 9 * DAY, 0, -(2**63), 2**63 - 1]
)
events = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 30), st.sampled_from([*TYPES, *range(9)]), moments),
    max_size=60,
)


def columns(rows):
    table = list(zip(*rows, strict=True)) or [()] * 5
    kinds = (np.uint64, np.uint64, np.uint64, np.uint32, np.int64)
    return [np.array(column, kind) for column, kind in zip(table, kinds, strict=True)]


def fold(rows, before=None):
    return memory.fold(before or memory.empty(), *columns(rows))


@given(events, st.lists(st.integers(0, 60), max_size=4))
def test_in_pieces_and_at_once_and_by_the_plain_twin_it_is_the_same_to_the_bit(rows, cuts):
    whole, pieces, plain = fold(rows), memory.empty(), memory.empty()
    borders = sorted({0, *cuts, len(rows)})
    for start, end in pairwise(borders):
        part = rows[start:end]
        pieces = memory.decode(memory.encode(fold(part, pieces)))
        before = (plain.facts, plain.keys, plain.counts)
        constants = (memory._CAPACITIES, memory.TICK_MS, memory.VISIT_MS, memory._UNCHOSEN)
        plain = memory.DecayedCounts(*decay.fold_counts_plain(*before, *constants, *columns(part)))
    assert memory.encode(pieces) == memory.encode(whole)
    assert memory.encode(plain) == memory.encode(whole)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_what_is_left_is_the_same_by_the_plain_twin(now, then):
    found = decay.decay_factors(now, then, memory.TICK_MS)
    assert found.tobytes() == decay.decay_factors_plain(now, then, memory.TICK_MS).tobytes()
    assert ((found >= 0) & (found <= 1)).all()


@given(st.integers(0, 200 * DAY))
def test_what_was_one_halves_with_every_half_life(passed):
    ticks = memory.TICK_MS
    began = NOW // MONTH * MONTH  # all half-lives begin then
    assert decay.decay_factors(began, began, ticks).tolist() == [1, 1, 1]
    exact = 0.5 ** (passed / np.array([HOUR, DAY, MONTH]))
    np.testing.assert_allclose(
        decay.decay_factors(began + passed, began, ticks), exact, rtol=0.011, atol=1e-70
    )  # within a tick
    assert decay.decay_factors(began + MONTH, began, ticks)[2] == 0.5
    assert decay.decay_factors(began - passed, began, ticks).tolist() == [1, 1, 1]


def test_the_roots_are_correctly_rounded():
    with localcontext(prec=60):
        exact = [float(Decimal(2) ** (Decimal(i) / 128)) for i in range(128)]
    assert decay._ROOTS.tolist() == exact


@given(events)
def test_the_counts_are_those_of_the_definition_while_there_is_room(rows):
    rows = [(item, category % 24, creator % 16, kind, time) for item, category, creator, kind, time in rows]
    rows = [row for row in rows if row[3] in TYPES and abs(row[4]) < 2**50]
    found = fold(rows)
    real = [row for row in rows if row[0]]
    newest = max((row[4] for row in real), default=0)
    for name, place in (("category", 1), ("creator", 2), ("event_type", 3)):
        sums: dict[int, np.ndarray] = {}
        for row in real:
            chosen = name == "event_type" or (row[3] in TYPES[:2] and row[place])
            if chosen:
                weight = 0.5 ** ((newest // memory.TICK_MS - row[4] // memory.TICK_MS) / 128)
                sums[row[place]] = sums.get(row[place], np.zeros(3)) + weight
        part = found.of(name)
        assert set(found.keys[part].tolist()) == set(sums)
        for key, counts in zip(found.keys[part].tolist(), found.at(newest)[part], strict=True):
            np.testing.assert_allclose(counts, sums[key], rtol=1e-5, atol=1e-30)


def test_the_least_wanted_leaves_and_of_equals_the_smallest_key():
    room = memory.DIMENSIONS["category"]
    rows = [(1, key, 0, TYPES[0], NOW) for key in range(1, room + 1)]
    rows += [(1, 1, 0, TYPES[0], NOW)]
    kept = fold([*rows, (1, 99, 0, TYPES[0], NOW)])
    assert set(kept.keys[kept.of("category")].tolist()) == {1, *range(3, room + 1), 99}
    assert fold(rows).segment() == 1
    assert memory.empty().segment() == 0


def test_a_visit_begins_after_a_pause_and_late_events_are_no_part_of_it():
    minute = 60_000
    one = fold([(1, 1, 1, TYPES[0], NOW), (1, 1, 1, TYPES[0], NOW + 30 * minute), (0, 1, 1, TYPES[0], NOW + DAY)])
    assert (one.visit_began, one.visit_events, one.newest) == (NOW, 2, NOW + 30 * minute)
    two = fold([(1, 1, 1, TYPES[0], NOW + 61 * minute), (1, 1, 1, TYPES[0], NOW)], one)
    assert (two.visit_began, two.visit_events) == (NOW + 61 * minute, 1)
    assert two.visiting(NOW + 91 * minute)
    assert not two.visiting(NOW + 92 * minute)
    assert not two.visiting(0)
    assert not memory.empty().visiting(NOW)


def test_what_is_no_memory_is_refused():
    stored = memory.encode(fold([(1, 1, 1, TYPES[0], NOW)]))
    assert memory.size_of(stored) == len(stored) == memory.FACTS_SIZE + 3 * memory.CELL_SIZE
    with pytest.raises(ValueError, match="length"):
        memory.decode(stored[:-1])
    crowded = bytearray(stored) + bytes(30 * memory.CELL_SIZE)
    crowded[20] += 30
    with pytest.raises(ValueError, match="length"):
        memory.decode(bytes(crowded))
