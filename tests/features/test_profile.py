"""A profile is a fold: in pieces or at once, stored or not, it is the same; and no changed byte goes unnoticed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features import profile
from features.errors import ProfileCorrupt


def records(count: int, seed: int = 0, items: int = 1000):
    random = np.random.default_rng(seed)
    return profile.make_records(
        random.integers(1, items, count),
        random.integers(0, 9, count),
        random.integers(0, 9, count),
        np.arange(count) * 1000,
        random.standard_normal(count),
        random.integers(0, 2**32, count),
    )


def same(left: profile.Profile, right: profile.Profile) -> bool:
    return (
        (left.version, left.count) == (right.version, right.count)
        and left.records.tobytes() == right.records.tobytes()
        and left.evicted.tolist() == right.evicted.tolist()
    )


def tail_of(log_ids, events) -> bytes:
    tail = np.zeros(len(log_ids), profile.ENTRY)
    tail["log_id"], tail["record"] = log_ids, events
    return tail.tobytes()


def test_a_record_has_44_bytes_and_an_entry_52():
    assert (profile.RECORD.itemsize, profile.ENTRY.itemsize, profile.HEADER_SIZE) == (44, 52, 32)


@given(st.lists(st.integers(0, 400), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_folding_in_pieces_is_folding_at_once(pieces, seed):
    events = records(sum(pieces), seed, items=300)
    step, start = profile.empty(), 0
    for piece in pieces:
        step = profile.fold(step, events[start : start + piece], start + piece)
        start += piece
    assert same(step, profile.fold(profile.empty(), events, start))


def test_the_ring_keeps_the_newest_and_remembers_the_others_as_seen():
    events = records(profile.RING + 10)
    folded = profile.fold(profile.empty(), events, 7)
    assert folded.count == profile.RING + 10
    assert folded.records.tobytes() == events[10:].tobytes()
    assert folded.evicted.tolist() == list(dict.fromkeys(events["item"][:10].tolist()))


@given(st.integers(0, 300), st.integers(0, 40), st.randoms())
def test_a_stored_profile_reads_as_state_and_tail_in_log_order(folded, waiting, shuffler):
    events = records(folded + waiting)
    state = profile.fold(profile.empty(), events[:folded], folded)
    ids = np.arange(folded + 1, folded + waiting + 1)
    order = list(range(waiting))
    shuffler.shuffle(order)
    blob = profile.encode(state) + tail_of(ids[order], events[folded:][order])
    assert same(profile.decode(blob), profile.fold(profile.empty(), events, folded + waiting))


def test_an_entry_that_was_folded_already_counts_once():
    events = records(5)
    state = profile.fold(profile.empty(), events[:4], 4)
    blob = profile.encode(state) + tail_of([3, 4, 5], events[2:5])
    assert same(profile.decode(blob), profile.fold(profile.empty(), events, 5))


def test_nobody_is_a_profile():
    assert same(profile.decode(profile.encode(profile.empty())), profile.empty())


@given(st.integers(0, 2**31), st.integers(1, 255))
def test_a_changed_byte_is_noticed(at, change):
    events = records(6)
    blob = bytearray(profile.encode(profile.fold(profile.empty(), events[:4], 4)) + tail_of([5, 6], events[4:]))
    # Versions and the erasure mark are compared, not checksummed; reserved bytes mean nothing.
    checked = [*range(6), *range(8, 12), *(i for i in range(32, len(blob)) if not _is_log_id(i, len(blob)))]
    blob[checked[at % len(checked)]] ^= change
    with pytest.raises(ProfileCorrupt):
        profile.decode(bytes(blob))


def _is_log_id(position: int, length: int) -> bool:
    tail = length - 2 * profile.ENTRY.itemsize
    return position >= tail and (position - tail) % profile.ENTRY.itemsize < 8


@pytest.mark.parametrize("blob", [b"", b"x" * 31, b"x" * 32, profile.encode(profile.empty())[:-1]])
def test_what_is_no_profile_is_refused(blob):
    with pytest.raises(ProfileCorrupt):
        profile.decode(blob)
