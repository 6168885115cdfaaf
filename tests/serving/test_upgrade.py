"""Profiles of an older format are read until they are rewritten; what a later version wrote is left alone."""

from __future__ import annotations

import numpy as np
import pytest

from features import controls
from features.decay_kernels import decay_factors
from features.decayed_counts import TICK_MS
from features.errors import ProfileCorrupt
from features.profile import Purpose
from features.profile_codec import FORMAT, HEADER_SIZE, LATER_FORMATS, OLDEST_FORMAT, decode, encode, encode_state
from features.subjects import partition_of
from serving.errors import ProfileStoreUnavailable
from serving.stores.keys import address_of
from serving.stores.log_entries import Mark
from serving.stores.profile_eviction import Evictions
from serving.stores.profile_repair import Repairs
from serving.stores.profiles import ProfileStore
from tests.serving.test_profiles import NOW, entries, expected, items


@pytest.fixture
def store(profiles_redis):
    return ProfileStore(profiles_redis)


def older(blob: bytes) -> bytes:
    """The same profile as format 3 stored it: with counts as they stand at the newest event."""
    profile = decode(blob)
    memory = profile.decayed_counts
    memory.counts[:] = memory.counts * decay_factors(memory.newest, memory.newest, TICK_MS)
    state = encode_state(profile)
    middle = HEADER_SIZE + int.from_bytes(blob[8:12], "little")
    assert middle == HEADER_SIZE + len(state)
    return blob[:4] + bytes((3,)) + blob[5:HEADER_SIZE] + state + blob[middle:]


def alike(left_, right_) -> bool:
    """Whether two profiles are the same but for the rounding of their counts."""
    np.testing.assert_allclose(left_.decayed_counts.counts, right_.decayed_counts.counts, rtol=1e-6)
    return (
        left_.records.tobytes() == right_.records.tobytes()
        and left_.decayed_counts.facts.tolist() == right_.decayed_counts.facts.tolist()
        and left_.decayed_counts.keys.tolist() == right_.decayed_counts.keys.tolist()
        and (left_.version, left_.count, left_.consent, left_.marks)
        == (right_.version, right_.count, right_.consent, right_.marks)
        and left_.controls.tobytes() == right_.controls.tobytes()
    )


def test_an_older_profile_is_read_applied_to_marked_and_rewritten_by_compaction(store, profiles_redis):
    assert OLDEST_FORMAT <= 3 < FORMAT
    store.put_states([("u:1", expected(range(40)))])
    rules = controls.encode(np.array([(7, 0, 1), (8, 9, 2)], controls.CONTROL))
    store.mark(partition_of("u:1", 16), Mark(NOW + 50, address_of("u:1"), consent=Purpose(3), controls=rules))
    key = store.key_of("u:1")
    before = store.read("u:1")
    profiles_redis.set(key, older(profiles_redis.get(key)))
    assert profiles_redis.get(key)[4] == 3
    assert alike(store.read("u:1"), before)

    assert store.apply("u:1", entries([60, 61])).inserted == 2
    assert store.apply("u:1", entries([61])).inserted == 0
    assert profiles_redis.get(key)[4] == 3, "an insert rewrites nothing"
    assert items(store.read("u:1"))[-2:] == [60, 61]
    store.mark(partition_of("u:1", 16), Mark(NOW + 70, address_of("u:1"), consent=Purpose(1)))

    read = store.read("u:1")
    assert store.compact("u:1", NOW + 61) == 2
    assert profiles_redis.get(key)[4] == FORMAT
    assert alike(store.read("u:1"), read)
    assert store.read("u:1").consent == Purpose(1)
    assert not Repairs(store).damaged(["u:1"])


def test_an_older_profile_forgets(store, profiles_redis):
    store.put_states([("u:1", expected(range(40)))])
    key = store.key_of("u:1")
    profiles_redis.set(key, older(profiles_redis.get(key)))
    assert store.erase("u:1", NOW + 50) == 40
    assert store.read("u:1").count == 0
    assert store.apply("u:1", entries([45])).refused == 1


def test_what_a_later_version_wrote_is_neither_read_nor_changed_by_any_step(store, profiles_redis):
    store.put_states([("u:1", expected(range(5)))])
    store.apply("u:1", entries([6]))
    key = store.key_of("u:1")
    blob = profiles_redis.get(key)
    profiles_redis.set(key, blob[:4] + LATER_FORMATS[:1] + blob[5:] + b"more")
    kept = profiles_redis.get(key)
    partition = partition_of("u:1", 16)
    steps = {
        "read": lambda: store.read("u:1"),
        "apply": lambda: store.apply("u:1", entries([7])),
        "compact": lambda: store.compact("u:1", NOW + 6),
        "mark": lambda: store.mark(partition, Mark(NOW + 9, address_of("u:1"), consent=Purpose(0))),
        "erase": lambda: store.erase("u:1", NOW + 9),
        "put": lambda: store.put_states([("u:1", expected(range(9)))]),
        "replace": lambda: store.replace("u:1", lambda stored: stored.state),
        "set_aside": lambda: Repairs(store).set_aside("u:1"),
        "salvage": lambda: Repairs(store).salvage("u:1"),
    }
    for name, step in steps.items():
        with pytest.raises(ProfileStoreUnavailable, match="later version"):
            step()
        assert profiles_redis.get(key) == kept, name
    assert Evictions(store).evict(1 << 52) == 0
    assert profiles_redis.get(key) == kept
    assert not Repairs(store).damaged(["u:1"])

    others = store.apply_many([("u:1", entries([7])), ("u:2", entries([7]))])
    assert isinstance(others[0], ProfileStoreUnavailable)
    assert others[1].inserted == 1, "others go on"

    profiles_redis.set(key, blob)  # this process is upgraded
    assert store.apply("u:1", entries([7])).inserted == 1


def test_a_profile_before_the_oldest_format_is_named_not_taken_for_a_new_user(store, profiles_redis):
    whole = encode(expected(range(3)))
    profiles_redis.set(store.key_of("u:1"), whole[:4] + bytes((OLDEST_FORMAT - 1,)) + whole[5:])
    assert Repairs(store).damaged(["u:1"]) == ["u:1"]
    with pytest.raises(ProfileCorrupt, match="profiles rebuild"):
        store.read("u:1")
