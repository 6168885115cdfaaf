"""Profiles on a real Redis: idempotent, in any order, nothing lost by compaction, and cheap to lose."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features import controls
from features import decayed_counts as memory
from features.errors import ProfileCorrupt
from features.profile import Profile, Purpose, empty, fold
from features.profile_codec import encode
from features.records import make_records
from features.subjects import partition_of
from serving.errors import ProfileStoreUnavailable, ResourceExhausted
from serving.observability.telemetry import Telemetry
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.stores.keys import address_of
from serving.stores.log_entries import Mark
from serving.stores.profile_access import TailFull
from serving.stores.profile_eviction import Evictions
from serving.stores.profiles import Applied, ProfileStore, StatesWritten
from tests.serving.faults import frozen, insist, kill

NOW = 1_700_000_000_000 << 20  # a log id of November 2023
OPAQUE = st.text(min_size=1, max_size=20) | st.sampled_from(
    ["\0", "*", "{}", "a{b}c", "\r\n$3\r\nfoo", "😀" * 30, "?", "[a]"]
)
on_redis = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)


@pytest.fixture
def store(profiles_redis):
    return ProfileStore(profiles_redis)


def record(number: int) -> bytes:
    return make_records(number, number % 7, number % 5, 1000 * number, np.nan, 1).tobytes()


def entries(numbers, start: int = NOW):
    return [(start + number, record(number)) for number in numbers]


def items(profile: Profile) -> list[int]:
    return profile.records["item"].tolist()


def expected(numbers, start: int = NOW) -> Profile:
    """The fold of the same events without any store."""
    numbers = sorted(set(numbers))
    records = np.concatenate([make_records(n, n % 7, n % 5, 1000 * n, np.nan, 1) for n in numbers])
    return fold(empty(), records, start + numbers[-1])


def same(left: Profile, right: Profile) -> bool:
    one, other = (
        (
            p.version,
            p.count,
            p.records.tobytes(),
            p.older_items.tolist(),
            memory.encode(p.decayed_counts),
            p.controls.tobytes(),
        )
        for p in (left, right)
    )
    return one == other


def test_nobody_has_the_empty_profile(store):
    assert same(store.read("u:nobody"), empty())


def test_an_applied_event_is_read_at_once_and_counts_once(store):
    assert store.apply("u:1", entries([1])) == Applied(1, 0, 1)
    assert store.apply("u:1", entries([1, 2, 2])) == Applied(1, 0, 2)
    assert same(store.read("u:1"), expected([1, 2]))


@on_redis
@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=8), min_size=1, max_size=12), st.randoms())
def test_any_order_any_repeats_and_any_batches_give_the_fold_in_log_order(profiles_redis, batches, rng):
    profiles_redis.flushall()
    store = ProfileStore(profiles_redis)
    rng.shuffle(batches)
    for batch in batches:
        store.apply("u:1", entries(batch))
    assert same(store.read("u:1"), expected([number for batch in batches for number in batch]))


@on_redis
@given(OPAQUE, OPAQUE)
def test_subjects_are_opaque_and_never_mix(profiles_redis, left, right):
    profiles_redis.flushall()
    store = ProfileStore(profiles_redis)
    store.apply(left, entries([1]))
    if left != right:
        assert same(store.read(right), empty())
        store.apply(right, entries([2]))
        assert items(store.read(right)) == [2]
    assert items(store.read(left)) == [1]
    keys = list(profiles_redis.scan_iter())
    assert all(key.startswith(b"penchant:{p") for key in keys)
    assert not any(name.encode() in key for key in keys for name in (left, right) if len(name) > 9)  # names no person


@on_redis
@given(st.integers(0, 2**63), st.integers(-3, 3))
def test_log_ids_of_64_bits_compare_exactly(profiles_redis, start, step):
    profiles_redis.flushall()
    store = ProfileStore(profiles_redis)
    later = max(1, start + 4 + step)
    start += 4
    store.apply("u:1", [(start, record(1))])
    store.compact("u:1", start)
    assert store.apply("u:1", [(later, record(2))]).inserted == (later > start)


def test_an_id_inside_other_entries_is_not_mistaken_for_one(store):
    inside = int.from_bytes(record(7)[:8], "big")  # the bytes of this id stand in the middle of the first entry
    store.apply("u:1", entries([7]))
    assert store.apply("u:1", [(inside, record(8))]).inserted == 1


def test_many_people_in_one_round_trip(store):
    store.apply("u:full", entries(range(10)))
    applied = store.apply_many([(f"u:{number}", entries([number, number + 1])) for number in range(500)])
    assert applied == [Applied(2, 0, 2)] * 500
    assert items(store.read("u:99")) == [99, 100]


def test_compaction_changes_nothing_that_can_be_read(store, profiles_redis):
    numbers = list(range(700))  # past the ring, so that some are remembered only as seen
    store.apply("u:1", entries(numbers))
    before = store.read("u:1")
    assert store.compact("u:1", NOW + 299) == 300
    assert same(store.read("u:1"), before)
    assert store.compact("u:1", NOW + 10**6) == 400
    assert store.compact("u:1", NOW + 10**6) == 0
    assert same(store.read("u:1"), before)
    assert same(before, expected(numbers))
    assert store.apply("u:1", entries(numbers)) == Applied(0, 0, 0)
    assert store.compact("u:nobody", NOW) == 0


def test_compaction_during_applies_loses_nothing(profiles_server, profiles_redis):
    total, late = 3000, 40
    applied = [-1]

    def apply() -> None:
        with connect(profiles_server.url, timeout_s=5) as client:
            store = ProfileStore(client)
            for start in range(0, total, 10):
                batch = list(range(start, start + 10))
                random.shuffle(batch)
                store.apply("u:1", entries(batch))
                applied[0] = start + 9

    thread = threading.Thread(target=apply)
    thread.start()
    store = ProfileStore(profiles_redis)
    folded = 0
    while thread.is_alive():
        folded += store.compact("u:1", NOW + applied[0] - late)
    thread.join()
    assert folded > 0
    assert same(store.read("u:1"), expected(range(total)))


def test_a_late_entry_stops_a_compaction_that_has_not_seen_it(store, profiles_redis, monkeypatch):
    store.apply("u:1", entries([1, 3]))
    read, looks = store.blob, []

    def read_then_insert(subject):
        blob = read(subject)
        looks.append(blob)
        if len(looks) == 1:
            ProfileStore(profiles_redis).apply("u:1", entries([2]))
        return blob

    monkeypatch.setattr(store, "blob", read_then_insert)
    assert store.compact("u:1", NOW + 3) == 3
    assert len(looks) == 2
    monkeypatch.undo()
    assert items(store.read("u:1")) == [1, 2, 3]


def test_a_tail_is_never_cut_and_its_owner_is_slowed_down(profiles_redis):
    store = ProfileStore(profiles_redis, tail_cap=50)
    store.apply("u:bot", entries(range(50)))
    with pytest.raises(TailFull) as failure:
        store.apply("u:bot", entries([50]))
    assert (failure.value.code, failure.value.field) == ("RESOURCE_EXHAUSTED", "subject")
    replies = store.apply_many([("u:bot", entries([50])), ("u:1", entries([1]))])
    assert isinstance(replies[0], TailFull)
    assert replies[1] == Applied(1, 0, 1)
    assert store.compact("u:bot", NOW + 49) == 50
    assert store.apply("u:bot", entries([50])).inserted == 1
    assert same(store.read("u:bot"), expected(range(51)))


@pytest.mark.parametrize("folded", [False, True])
def test_erased_stays_erased(store, folded):
    store.apply("u:1", entries([1, 2, 3]))
    if folded:
        store.compact("u:1", NOW + 3)
    store.apply("u:1", entries([9]))
    assert store.erase("u:1", NOW + 5) == 3
    assert store.apply("u:1", entries([1, 2, 3, 4, 5])) == Applied(0, 5, 1)
    assert items(store.read("u:1")) == [9]
    store.compact("u:1", NOW + 9)
    assert store.apply("u:1", entries([4, 5])) == Applied(0, 2, 0)
    assert store.put_states([("u:1", expected([1, 2], start=0))]) == StatesWritten(0, 1)
    assert store.erase("u:1", NOW + 4) == 0
    assert items(store.read("u:1")) == [9]
    assert store.erased_before(["u:1", "u:nobody"]) == [NOW + 5, 0]


def test_somebody_without_a_profile_can_be_erased(store):
    assert store.erase("u:new", NOW) == 0
    assert store.read("u:new").count == 0
    assert store.apply("u:new", entries([0, 1])) == Applied(1, 1, 1)


RULES = np.array([(7, 0, controls.ControlKind.ITEM), (8, 1000, controls.ControlKind.CREATOR)], controls.CONTROL)


def ruled(log_id: int, rules=RULES) -> Mark:
    return Mark(log_id, address_of("u:1"), controls=controls.encode(rules))


def test_rules_survive_all_that_happens_to_events_and_the_newest_word_counts(store):
    place = partition_of("u:1", 16)
    store.mark(place, ruled(NOW))  # before there is anything else
    assert store.read("u:1").controls.tobytes() == RULES.tobytes()
    store.apply("u:1", entries([1, 2]))
    store.compact("u:1", NOW + 1)
    assert same(store.read("u:1"), replace(expected([1, 2]), controls=RULES))
    store.mark(place, ruled(NOW + 3, RULES[:1]))
    store.mark(place, ruled(NOW + 2))  # late
    assert same(store.read("u:1"), replace(expected([1, 2]), controls=RULES[:1]))
    store.put_states([("u:1", expected([1, 2, 3]))])
    assert same(store.read("u:1"), replace(expected([1, 2, 3]), controls=RULES[:1]))
    store.mark(place, Mark(NOW + 3, address_of("u:1"), forget=True))  # a reset
    assert same(store.read("u:1"), replace(empty(), controls=RULES[:1]))
    store.apply("u:1", entries([5]))
    store.erase("u:1", NOW + 9)
    assert same(store.read("u:1"), empty())
    store.mark(place, ruled(NOW + 3))
    assert not store.read("u:1").controls.size


def test_a_compaction_sees_rules_that_changed_meanwhile(store, profiles_redis, monkeypatch):
    store.apply("u:1", entries([1, 2]))
    read, looks = store.blob, []

    def read_then_rule(subject):
        blob = read(subject)
        looks.append(blob)
        if len(looks) == 1:
            ProfileStore(profiles_redis).mark(partition_of("u:1", 16), ruled(NOW))
        return blob

    monkeypatch.setattr(store, "blob", read_then_rule)
    assert store.compact("u:1", NOW + 2) == 2
    assert len(looks) == 2
    monkeypatch.undo()
    assert same(store.read("u:1"), replace(expected([1, 2]), controls=RULES))


def test_who_stays_away_leaves_nothing_of_their_events(store):
    before = NOW >> 20
    for person in ("u:idle", "u:waiting", "u:1", "u:few"):
        store.apply(person, entries([2, 1]))
    for person in ("u:idle", "u:1"):
        store.compact(person, NOW + 2)
    store.apply("u:1", entries([3]))
    store.mark(partition_of("u:1", 16), ruled(NOW))
    store.mark(partition_of("u:only", 16), Mark(NOW, address_of("u:only"), Purpose.PERSONALISE))
    store.apply("u:only", entries([1, 2]))
    store.apply("u:waiting", [((before + 1) << 20, record(7))])
    imported = expected([1, 2], start=1)
    store.put_states([("u:old", imported), ("u:new", expected([3], start=1 << 62))])
    assert Evictions(store).evict(2000) == 0  # the imported events are from 1000 and 2000
    assert Evictions(store).evict(before) == 1
    # "u:waiting" has done something since, and no warehouse has "u:only".
    assert Evictions(store).evict(before + 1) == 3
    assert Evictions(store).evicted(
        ["u:idle", "u:1", "u:few", "u:old", "u:waiting", "u:only", "u:new", "u:nobody"]
    ) == {
        "u:idle": NOW + 2,
        "u:1": NOW + 3,
        "u:few": NOW + 2,
        "u:old": 3,
    }
    assert [store.read(person).count for person in ("u:idle", "u:few", "u:waiting", "u:only")] == [0, 0, 3, 2]
    assert store.read("u:1").controls.tobytes() == RULES.tobytes()
    assert Evictions(store).evict(before + 1) == 0
    # What was there once does not come again; what is new waits for the state that is made anew.
    assert store.apply("u:idle", entries([1, 2, 3])) == Applied(1, 0, 1, evicted=True)
    assert store.apply("u:1", entries([2, 3, 4])) == Applied(1, 0, 1, evicted=True)
    assert store.compact("u:idle", NOW + 3, evicted_too=False) == 0
    assert store.put_states([("u:idle", expected([1, 2])), ("u:old", imported)]) == StatesWritten(2, 0)
    assert same(store.read("u:idle"), expected([1, 2, 3]))
    assert store.apply("u:idle", entries([4])) == Applied(1, 0, 2)
    assert store.compact("u:idle", NOW + 4, evicted_too=False) == 2
    assert Evictions(store).evicted(["u:idle", "u:old"]) == {}


def test_what_came_since_may_go_the_way_of_a_state_that_was_dropped(store):
    store.apply("u:here", entries([1, 2]))
    store.apply("u:away", entries([1, 2]))
    assert not Evictions(store).evict_again("u:away")
    Evictions(store).evict((NOW >> 20) + 1)
    store.apply("u:here", entries([4]))
    store.put_states([("u:here", expected([1, 2]))])
    assert store.apply("u:away", entries([4, 3])) == Applied(2, 0, 2, evicted=True)
    assert [Evictions(store).evict_again(person) for person in ("u:away", "u:away", "u:here", "u:nobody")] == [
        True,
        False,
        False,
        False,
    ]
    assert Evictions(store).evicted(["u:away", "u:here"]) == {"u:away": NOW + 4}
    assert store.put_states([("u:away", expected([1, 2, 3, 4]))]) == StatesWritten(1, 0)
    assert same(store.read("u:away"), expected([1, 2, 3, 4]))
    assert same(store.read("u:here"), expected([1, 2, 4]))


@on_redis
@given(
    length=st.integers(44, 60) | st.integers(0, 600) | st.just(1 << 20),
    place=st.integers(0, 600),
    flip=st.integers(0, 255),
)
def test_damage_of_any_kind_keeps_no_mark_from_a_profile(store, profiles_redis, length, place, flip):
    """The projector meets every mark: one that could not be brought in would keep everybody's events waiting."""
    partition, key = partition_of("u:1", 16), store.key_of("u:1")
    profiles_redis.delete(key)
    store.put_states([("u:1", expected(range(1, 4)))])
    store.mark(partition, ruled(NOW))
    store.apply("u:1", entries([20, 21]))
    blob = bytearray(profiles_redis.get(key))[:length]
    if place < len(blob):
        blob[place] ^= flip
    damaged = bytes(blob)
    for done in (
        lambda: store.mark(partition, Mark(NOW + 30, address_of("u:1"), Purpose.TRAIN, forget=True)),
        lambda: store.mark(partition, Mark(NOW + 30, address_of("u:1"), controls=b"")),
        lambda: Evictions(store).evict(1 << 50),
        lambda: store.put_states([("u:1", expected(range(1, 41)))]),
    ):
        profiles_redis.set(key, damaged)
        done()
    profiles_redis.set(key, damaged)
    with contextlib.suppress(ProfileCorrupt):
        store.apply("u:1", entries([40]))


def test_a_profile_that_is_cut_short_takes_nothing_and_can_be_erased(store, profiles_redis):
    store.put_states([("u:1", expected(range(1, 9)))])
    key = store.key_of("u:1")
    for length in (48, 49, 51, 60):
        profiles_redis.set(key, encode(expected(range(1, 9)))[:length])
        with pytest.raises(ProfileCorrupt):
            store.apply("u:1", entries([10]))
        assert profiles_redis.strlen(key) == length
        store.erase("u:1", NOW + 20)
        assert same(store.read("u:1"), empty())
        assert store.erased_before(["u:1"]) == [NOW + 20]


def test_bulk_states_are_replaced_and_live_ones_are_not_undone(store):
    imported = expected(range(1, 20), start=1)
    assert store.put_states((f"u:{number}", imported) for number in range(1000)) == StatesWritten(1000, 0)
    assert same(store.read("u:999"), imported)
    store.apply("u:1", entries([30]))
    smaller = expected(range(1, 5), start=1)
    assert store.put_states([("u:1", smaller), ("u:2", smaller)]) == StatesWritten(2, 0)
    assert items(store.read("u:1")) == [1, 2, 3, 4, 30]
    assert items(store.read("u:2")) == [1, 2, 3, 4]
    store.compact("u:1", NOW + 30)
    assert store.put_states([("u:1", imported)]) == StatesWritten(0, 1)
    assert items(store.read("u:1")) == [1, 2, 3, 4, 30]
    assert store.put_states([("u:1", expected([7], start=NOW + 30))]) == StatesWritten(1, 0)
    assert items(store.read("u:1")) == [7]


@pytest.mark.parametrize(
    "stored",
    [
        b"garbage" * 10,
        b"short",
        encode(fold(empty(), make_records([1, 2], 0, 0, 0, 0, 0), 2))[:-1],
        b"PNCH" + bytes(1 << 20),
    ],
    ids=["garbage", "short", "cut", "giant"],
)
def test_a_damaged_profile_is_counted_and_mended_by_a_rebuild(profiles_redis, stored):
    telemetry = Telemetry()
    store = ProfileStore(profiles_redis, telemetry=telemetry)
    store.apply("u:1", entries([1]))
    [key] = profiles_redis.keys()
    profiles_redis.set(key, stored)
    with pytest.raises(ProfileCorrupt):
        store.read("u:1")
    assert telemetry.counters()["profiles_corrupt"] == 1
    assert store.put_states([("u:1", expected([1], start=1))]) == StatesWritten(1, 0)
    assert items(store.read("u:1")) == [1]


def test_a_key_of_another_type_is_a_damaged_profile(store, profiles_redis):
    store.apply("u:1", entries([1]))
    [key] = profiles_redis.keys()
    profiles_redis.delete(key)
    profiles_redis.rpush(key, "x")
    with pytest.raises(ProfileCorrupt):
        store.read("u:1")
    with pytest.raises(ProfileCorrupt):
        store.apply("u:1", entries([1]))
    replies = store.apply_many([("u:1", entries([1])), ("u:2", entries([1]))])
    assert isinstance(replies[0], ProfileCorrupt)
    assert replies[1] == Applied(1, 0, 1)
    assert store.put_states([("u:1", expected([1], start=1))]) == StatesWritten(1, 0)
    assert items(store.read("u:1")) == [1]


def test_a_full_redis_refuses_writes_answers_reads_and_erases(tmp_path):
    with RedisServer(tmp_path, "profiles") as server, connect(server.url, 2) as client:
        store = ProfileStore(client)
        store.apply("u:1", entries([1]))
        client.config_set("maxmemory", 1000)
        with pytest.raises(ResourceExhausted):
            store.apply("u:1", entries([2]))
        [refused] = store.apply_many([("u:1", entries([2]))])
        assert isinstance(refused, ResourceExhausted)
        with pytest.raises(ResourceExhausted):
            store.put_states([("u:1", expected([1]))])
        assert items(store.read("u:1")) == [1]
        assert store.erase("u:1", NOW + 5) == 1
        assert store.read("u:1").count == 0


def test_a_restarted_redis_still_has_what_was_applied(tmp_path):
    with RedisServer(tmp_path, "profiles") as server, connect(server.url, 0.2) as client:
        store = ProfileStore(client, cooldown_s=0.2)
        store.apply("u:1", entries(range(1, 5)))
        run_ids = store.run_ids()
        kill(server)
        with pytest.raises(ProfileStoreUnavailable):  # noqa: PT012 - the kill takes a moment to strike
            while True:
                store.read("u:2")
        assert items(insist(lambda: store.read("u:1"))) == [1, 2, 3, 4]
        assert set(run_ids) & set(store.run_ids()) == set()


def test_a_frozen_redis_costs_one_timeout_and_is_forgiven_soon(tmp_path):
    with RedisServer(tmp_path, "profiles") as server, connect(server.url, 0.1) as client:
        store = ProfileStore(client, cooldown_s=0.3)
        store.apply("u:1", entries([1]))
        with frozen(server):
            times = []
            for _ in range(50):
                start = time.monotonic()
                with pytest.raises(ProfileStoreUnavailable) as failure:
                    store.read("u:1")
                times.append(time.monotonic() - start)
            assert failure.value.retry_after_ms > 0
        assert max(times) < 1.0
        assert sorted(times)[25] < 0.05  # all but the first find the breaker open
        start = time.monotonic()
        assert items(insist(lambda: store.read("u:1"))) == [1]
        assert time.monotonic() - start < 2


def test_a_half_a_late_or_a_wrong_reply_never_reaches_another_person():
    """The reply to one person's read comes after its timeout, cut in two; the next person must not get it."""
    listener = socket.create_server(("127.0.0.1", 0))
    one, two = encode(expected([1], start=1)), encode(expected([2], start=1))

    def reply(blob: bytes) -> bytes:
        return b"$%d\r\n%s\r\n" % (len(blob), blob)

    def serve() -> None:
        first, _ = listener.accept()
        first.recv(4096)
        first.sendall(reply(one)[:20])
        second, _ = listener.accept()
        second.recv(4096)
        with contextlib.suppress(OSError):  # the client has closed it, as it should
            first.sendall(reply(one)[20:])
        second.sendall(reply(two) + reply(one))  # a reply too many, and before its time
        third, _ = listener.accept()
        third.recv(4096)
        third.sendall(reply(two))
        for connection in (first, second, third):
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    with listener, connect(f"redis://127.0.0.1:{listener.getsockname()[1]}", 0.5) as client:
        store = ProfileStore(client, cooldown_s=0.0)
        with pytest.raises(ProfileStoreUnavailable):
            store.read("u:1")
        assert items(store.read("u:2")) == [2]
        assert items(store.read("u:2")) == [2]
    thread.join()


def test_a_reply_in_thin_slices_costs_no_more_than_the_timeout():
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(4096)
            for byte in b"$2000\r\n" + bytes(2000):
                connection.sendall(bytes([byte]))
                if stop.wait(0.02):
                    return

    thread = threading.Thread(target=serve)
    thread.start()
    with listener, connect(f"redis://127.0.0.1:{listener.getsockname()[1]}", 0.2) as client:
        start = time.monotonic()
        with pytest.raises(ProfileStoreUnavailable):
            ProfileStore(client).read("u:1")
        assert time.monotonic() - start < 2  # all of it would take 40 s
    stop.set()
    thread.join()


def test_many_threads_read_each_their_own(store):
    people = [f"u:{number}" for number in range(50)]
    store.put_states((person, expected([1 + number], start=1)) for number, person in enumerate(people))
    wrong = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            number = rng.randrange(50)
            if items(store.read(people[number])) != [1 + number]:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nothing_listens():
    with connect("redis://127.0.0.1:1", 0.2) as client, pytest.raises(ProfileStoreUnavailable):
        ProfileStore(client).read("u:1")


def test_an_apply_does_not_double_the_memory_of_a_person(store, profiles_redis):
    people = [f"u:{number}" for number in range(500)]
    store.put_states((person, expected(range(200), start=1)) for person in people)
    before = profiles_redis.info("memory")["used_memory"]
    store.apply_many([(person, entries([1, 2])) for person in people])
    grown = (profiles_redis.info("memory")["used_memory"] - before) / len(people)
    assert grown < 1000  # of 9 KB each


def test_a_rebuild_mends_a_damaged_profile(store, profiles_redis):
    store.put_states([("u:1", expected([1, 2, 3]))])
    [key] = profiles_redis.keys(b"*:profile:*")
    blob = bytearray(profiles_redis.get(key))
    blob[60] ^= 1
    profiles_redis.set(key, bytes(blob))
    with pytest.raises(ProfileCorrupt):
        store.read("u:1")
    assert store.put_states([("u:1", expected([1, 2], start=0))]) == StatesWritten(1, 0)
    assert items(store.read("u:1")) == [1, 2]
