"""A profile is a fold: in pieces or at once, stored or not, it is the same; and no changed byte goes unnoticed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from features import controls, profile, profile_codec
from features import decayed_counts as memory
from features.errors import ProfileCorrupt, ProfileNewer
from features.keys import event_type_key
from features.records import ENTRY, RECORD, events_of, make_records, pack_record, verify

TYPES = np.array([*map(event_type_key, ("view_item", "purchase", "hide")), *range(6)], np.uint32)


def records(count: int, seed: int = 0, items: int = 1000):
    random = np.random.default_rng(seed)
    return make_records(
        random.integers(1, items, count),
        random.integers(0, 9, count),
        random.integers(0, 9, count),
        np.arange(count) * 1000 + np.arange(count) // 7 * 4_000_000,
        random.standard_normal(count),
        random.choice(TYPES, count),
    )


def searching(events, share: float, seed: int = 0):
    """The same events, a share of which are about no item."""
    items = np.where(np.random.default_rng(seed).random(events.size) < share, np.uint64(0), events["item"])
    names = ("category", "creator", "timestamp", "value", "event_type")
    return make_records(items, *(events[name] for name in names))[: events.size]


KEYS = st.integers(0, 2**64 - 1)
TIMES = st.integers(-(2**63), 2**63 - 1)


@given(st.tuples(KEYS, KEYS, KEYS, TIMES, st.floats(width=32), st.integers(0, 2**32 - 1)))
def test_a_single_record_is_packed_as_many_are(fields):
    packed = pack_record(*fields)
    made = make_records(*fields)
    assert verify(np.frombuffer(packed, RECORD)).all()
    if fields[4] == fields[4]:  # which NaN it is does not matter
        assert packed == made.tobytes()


def same(left: profile.Profile, right: profile.Profile) -> bool:
    return (
        (left.version, left.count) == (right.version, right.count)
        and left.records.tobytes() == right.records.tobytes()
        and left.older_items.tolist() == right.older_items.tolist()
        and memory.encode(left.decayed_counts) == memory.encode(right.decayed_counts)
        and left.controls.tobytes() == right.controls.tobytes()
    )


def tail_of(log_ids, events) -> bytes:
    tail = np.zeros(len(log_ids), ENTRY)
    tail["log_id"], tail["record"] = log_ids, events
    return tail.tobytes()


def test_a_record_has_44_bytes_and_an_entry_52():
    assert (RECORD.itemsize, ENTRY.itemsize, profile_codec.HEADER_SIZE) == (44, 52, 48)


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
    assert folded.records.tobytes() == events_of(events[10:]).tobytes()
    assert folded.older_items.tolist() == list(dict.fromkeys(events["item"][:10].tolist()))


def test_a_search_is_counted_and_pushes_nothing_out_of_the_ring():
    events = searching(records(profile.RING + 200), 0.5)
    folded = profile.fold(profile.empty(), events, 7)
    without = profile.fold(profile.empty(), events[events["item"] != 0], 7)
    assert 0 < without.count < profile.RING < folded.count == profile.RING + 200
    assert same(folded, dataclasses.replace(without, count=folded.count))
    assert folded.older_items.size == 0


@given(st.integers(0, 300), st.integers(0, 40), st.randoms())
def test_a_stored_profile_reads_as_state_and_tail_in_log_order(folded, waiting, shuffler):
    events = records(folded + waiting)
    state = profile.fold(profile.empty(), events[:folded], folded)
    ids = np.arange(folded + 1, folded + waiting + 1)
    order = list(range(waiting))
    shuffler.shuffle(order)
    blob = profile_codec.encode(state) + tail_of(ids[order], events[folded:][order])
    assert same(profile_codec.decode(blob), profile.fold(profile.empty(), events, folded + waiting))


def test_an_entry_that_was_folded_already_counts_once():
    events = records(5)
    state = profile.fold(profile.empty(), events[:4], 4)
    blob = profile_codec.encode(state) + tail_of([3, 4, 5], events[2:5])
    assert same(profile_codec.decode(blob), profile.fold(profile.empty(), events, 5))


@pytest.mark.parametrize("consent", [None, *map(profile.Purpose, range(8))])
def test_what_a_person_allows_is_read_as_it_was_said_and_survives_a_fold(consent):
    blob = profile_codec.encode(profile.Profile(3, records(3), np.empty(0, np.uint64), 3, consent), 1, 2)
    stored = profile_codec.split(blob)
    assert (stored.erased_before, stored.consent_version) == (1, 2)
    assert profile.fold(profile_codec.decode(blob), records(2), 5).consent == consent
    for bit in range(16):
        changed = bytearray(blob)
        changed[6 + bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProfileCorrupt):
            profile_codec.decode(bytes(changed))


def test_purposes_have_names():
    assert profile.Purpose.of(["train", "personalise"]).names == ("personalise", "train")
    assert profile.Purpose.of([]) == 0
    with pytest.raises(ValueError, match="choose among personalise, train, measure"):
        profile.Purpose.of(["sell"])


@given(
    st.integers(0, 600),
    st.integers(0, 40),
    st.integers(0, 400),
    st.sets(st.integers(1, 640)),
    st.integers(0, 2**32 - 1),
    st.sampled_from([150, 5000]),
    st.sampled_from([0, 0.2, 0.7]),
)
@example(folded=318, waiting=0, left_the_log=0, undone={1}, seed=0, items=150, asking=0.2)
def test_a_profile_folded_anew_is_the_fold_of_what_remains(folded, waiting, left_the_log, undone, seed, items, asking):
    """Where the log holds as much as the ring, what is folded anew is exactly what the remaining events fold to."""
    total = folded + waiting
    events, ids = searching(records(total, seed, items=items), asking, seed), np.arange(1, total + 1)
    # Of the oldest events the log has lost some, but none that the ring would need.
    needed = np.flatnonzero(events["item"])[-profile.RING - len(undone) :]
    lost = min(left_the_log, int(needed[0]) if needed.size == profile.RING + len(undone) else 0)
    undone = {one for one in undone if lost < one <= total}
    state = profile.fold(profile.empty(), events[:folded], folded)
    stored = profile_codec.split(profile_codec.encode(state, 0) + tail_of(ids[folded:], events[folded:]))
    logged = np.zeros(total - lost, ENTRY)
    logged["log_id"], logged["record"] = ids[lost:], events[lost:]
    stay = [at for at in range(total) if at + 1 not in undone]
    wanted = profile.fold(profile.empty(), events[stay], total)
    found = profile.refold(stored, logged, undone)
    if lost == 0:
        assert same(found, wanted)
    assert found.records.tobytes() == wanted.records.tobytes()
    assert found.count == wanted.count
    assert set(found.older_items.tolist()) >= set(wanted.older_items.tolist())


def test_what_has_left_the_log_stays_when_a_profile_is_folded_anew():
    events = records(20)
    stored = profile_codec.split(profile_codec.encode(profile.fold(profile.empty(), events, 20)))
    logged = np.zeros(5, ENTRY)
    logged["log_id"], logged["record"] = np.arange(16, 21), events[15:]
    found = profile.refold(stored, logged, {17})
    assert found.records.tobytes() == events_of(np.delete(events, 16)).tobytes()
    assert (found.count, found.version) == (19, 20)
    # What was undone comes again, by whoever still had it in hand: it is known already.
    again = profile_codec.split(profile_codec.encode(found) + tail_of([17], events[16:17]))
    assert again.tail.size == 0


def test_what_is_past_its_retention_leaves_a_profile_folded_anew():
    events = records(20)
    stored = profile_codec.split(
        profile_codec.encode(profile.fold(profile.empty(), events[:18], 18)) + tail_of([19, 20], events[18:])
    )
    logged = np.zeros(5, ENTRY)
    logged["log_id"], logged["record"] = np.arange(16, 21), events[15:]
    odd = events["timestamp"] % 2000 == 1000
    found = profile.refold(stored, logged, expired=lambda some: some["timestamp"] % 2000 == 1000)
    assert found.records.tobytes() == events_of(events[~odd]).tobytes()
    assert found.count == 10


def test_a_profile_of_an_older_format_says_how_to_mend_it():
    blob = bytearray(profile_codec.encode(profile.fold(profile.empty(), records(3), 3)))
    blob[4] = 2
    with pytest.raises(ProfileCorrupt, match="penchant profiles rebuild"):
        profile_codec.decode(bytes(blob))


def test_nobody_is_a_profile():
    assert same(profile_codec.decode(profile_codec.encode(profile.empty())), profile.empty())


@given(st.integers(0, 2**31), st.integers(1, 255))
def test_a_changed_byte_is_noticed(at, change):
    events = records(6)
    known = dataclasses.replace(profile.empty(), controls=np.array([(7, 0, 1), (8, 9, 2)], controls.CONTROL))
    blob = bytearray(profile_codec.encode(profile.fold(known, events[:4], 4)) + tail_of([5, 6], events[4:]))
    # Versions and marks are compared, not checksummed.
    checked = [*range(16), *(i for i in range(48, len(blob)) if not _is_log_id(i, len(blob)))]
    blob[checked[at % len(checked)]] ^= change
    assume(blob[4] != profile_codec.OLDEST_FORMAT)  # which is a profile as well
    with pytest.raises((ProfileCorrupt, ProfileNewer)):
        profile_codec.decode(bytes(blob))


def _is_log_id(position: int, length: int) -> bool:
    tail = length - 2 * ENTRY.itemsize
    return position >= tail and (position - tail) % ENTRY.itemsize < 8


@pytest.mark.parametrize("blob", [b"", b"x" * 47, b"x" * 48, profile_codec.encode(profile.empty())[:-1]])
def test_what_is_no_profile_is_refused(blob):
    with pytest.raises(ProfileCorrupt):
        profile_codec.decode(blob)
