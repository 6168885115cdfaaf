"""Profiles made from a data set equal those that the events would have made one by one."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features import decayed_counts as memory
from features.errors import PenchantError, TablesError
from features.keys import event_type_key, item_key
from features.profile import Profile, Purpose, empty, fold
from features.records import events_of, make_records
from features.tables.dataset import write_dataset
from serving.errors import ConfigError, ProfileStoreUnavailable
from serving.privacy.certificates import Certificates
from serving.privacy.rights import SubjectRights
from serving.projection.profile_view import show
from serving.projection.rebuild import rebuild
from serving.stores.event_log import EventLog
from serving.stores.profiles import ProfileStore
from tests import untrained
from tests.real_data import real_data

NOW = 1_700_000_000_000
ITEMS = [
    {"item_id": "i0", "title": "Tea", "categories": ["Drinks", "Hot"], "creator_id": "c"},
    {"item_id": "i1", "title": "Soap", "categories": []},
    {"item_id": "i2"},
]


@pytest.fixture
def store(profiles_redis):
    return ProfileStore(profiles_redis)


@pytest.fixture
def servers(profiles_server, events_server, events_redis):
    EventLog(events_redis).open()
    return profiles_server.url, events_server.url


def dataset(path, events, items=ITEMS):
    write_dataset(path, pa.Table.from_pylist(events), pa.Table.from_pylist(items), name="test")
    return path


def event(user: str, item: str, minute: int, kind: str = "view_item", **more):
    return {"user_id": user, "item_id": item, "event_type": kind, "timestamp": NOW + 60_000 * minute, **more}


def record(item: str, minute: int, kind: str = "view_item", category="", creator="", value=np.nan):
    keys = item_key(item), item_key(category), item_key(creator)
    return make_records(*keys, NOW + 60_000 * minute, value, event_type_key(kind))


def bytes_of(profile: Profile) -> tuple[int, bytes, list[int], bytes]:
    return profile.count, profile.records.tobytes(), profile.older_items.tolist(), memory.encode(profile.decayed_counts)


def test_each_person_gets_their_own_events_in_order(tmp_path, store, servers):
    events = [
        event("ann", "i1", 5, value=4.0),
        event("\0*{}\r\n😀", "i2", 1, "my own type"),
        event("ann", "i0", 2, "purchase"),
        event("ann", "unknown", 9),
    ]
    answer = rebuild(dataset(tmp_path / "data", events), *servers)
    assert (answer["profiles"], answer["kept"], answer["events"], answer["rejected"]) == (2, 0, 4, 0)
    expected = [record("i0", 2, "purchase", "Drinks", "c"), record("i1", 5, value=4.0), record("unknown", 9)]
    assert store.read("u:ann").records.tobytes() == events_of(np.concatenate(expected)).tobytes()
    assert store.read("u:\0*{}\r\n😀").records.tobytes() == events_of(record("i2", 1, "my own type")).tobytes()


def test_malformed_rows_are_told_and_too_many_store_nothing(tmp_path, store, servers, capsys):
    rows = [event("ann", "i0", minute) for minute in range(30)] + [event("bob", "i1", 1) | {"timestamp": None}]
    data = dataset(tmp_path / "data", rows[:30])
    pq.write_table(pa.Table.from_pylist(rows), data / "events.parquet")
    with pytest.raises(TablesError, match=r"1 of 31 rows were rejected, 3\.23 % .* with --max-rejected-share 0\.033"):
        rebuild(data, *servers)
    assert store.read("u:ann").count == 0
    answer = rebuild(data, *servers, max_rejected_share=0.033)
    assert (answer["profiles"], answer["events"], answer["rejected"], answer["unread"]) == (1, 30, 1, {})
    assert answer["rejections"][0]["row"] == 30
    line = f"events: 1 of 31 rows rejected (3.23 %), first {data / 'events.parquet'} row 30: timestamp is missing"
    assert capsys.readouterr().err.count(line) == 2


def test_the_result_is_the_fold_of_the_events_one_by_one(tmp_path, store, servers):
    random = np.random.default_rng(1)
    events = [event(f"{u}", f"i{i}", m) for m, (u, i) in enumerate(random.integers(0, [4, 900], (2000, 2)).tolist())]
    data = dataset(tmp_path / "data", events, [{"item_id": f"i{n}", "categories": [f"{n % 5}"]} for n in range(900)])
    rebuild(data, *servers)
    for user in range(4):
        profile, own = empty(), [(m, e) for m, e in enumerate(events) if e["user_id"] == str(user)]
        for minute, one in own:
            profile = fold(profile, record(one["item_id"], minute, category=str(int(one["item_id"][1:]) % 5)), 1)
        assert bytes_of(store.read(f"u:{user}")) == bytes_of(profile)
        assert profile.older_items.size


def test_live_events_stay_and_a_second_time_changes_nothing(tmp_path, store, servers):
    data = dataset(tmp_path / "data", [event("ann", "i0", 1), event("bob", "i1", 1)])
    live = NOW << 20
    store.apply("u:ann", [(live, record("i2", 7).tobytes())])
    for _ in range(2):
        assert rebuild(data, *servers)["profiles"] == 2
        assert store.read("u:ann").records["item"].tolist() == [item_key("i0"), item_key("i2")]
        assert store.read("u:ann").version == live
    store.compact("u:ann", live)
    answer = rebuild(data, *servers)
    assert (answer["profiles"], answer["kept"]) == (1, 1)
    assert store.read("u:ann").count == 2


def test_events_of_the_log_keep_their_log_ids_and_erased_ones_stay_away(tmp_path, store, servers):
    first = NOW << 20
    data = dataset(
        tmp_path / "data",
        [
            event("ann", "i0", 1, log_id=None),
            event("ann", "i1", 9, log_id=first),
            event("ann", "i2", 3, log_id=first + 5),  # log order counts, not event time
            event("bob", "i0", 1, log_id=first + 2),
        ],
    )
    store.erase("u:ann", first + 1)
    store.erase("u:bob", first + 2)
    store.apply("u:ann", [(first + 5, record("i2", 3).tobytes()), (first + 9, record("i1", 11).tobytes())])
    assert rebuild(data, *servers)["profiles"] == 1
    ann = store.read("u:ann")
    assert ann.records["item"].tolist() == [item_key("i2"), item_key("i1")]
    assert ann.version == first + 9
    assert store.read("u:bob").count == 0
    assert store.erased_before(["u:ann", "u:bob"]) == [first + 1, first + 2]


def test_a_data_set_with_order_only(tmp_path, store, servers):
    events = [{"user_id": "ann", "item_id": f"i{n}", "event_type": "view_item", "sequence": n} for n in (2, 0, 1)]
    rebuild(dataset(tmp_path / "data", events), *servers)
    records = store.read("u:ann").records
    assert records["item"].tolist() == [item_key("i0"), item_key("i1"), item_key("i2")]
    assert records["timestamp"].tolist() == [0, 0, 0]


def test_a_profile_is_shown_in_words(tmp_path, servers, profiles_redis):
    events = [event("ann", "i0", 0, "purchase", value=2.5), event("ann", "i1", 1)]
    rebuild(dataset(tmp_path / "data", events), *servers)
    shown = show("ann", servers[0])
    assert (shown["user"], shown["found"], shown["event_count"], shown["seen_only"]) == ("ann", True, 2, 0)
    assert shown["events"][1] == {
        "item": f"key {item_key('i0'):016x}",
        "title": None,
        "event_type": "purchase",
        "time": "2023-11-14T22:13:20+00:00",
        "value": 2.5,
    }
    nobody = show("nobody", servers[0])
    assert (nobody["found"], nobody["events"], nobody["categories"]) == (False, [], {})
    ProfileStore(profiles_redis).apply("a:ann", [(NOW << 20, record("i2", 7).tobytes())])
    assert (show("a:ann", servers[0])["event_count"], show("u:ann", servers[0])["event_count"]) == (1, 2)


def test_a_bundle_gives_the_names(tmp_path, servers, profiles_redis):
    world = untrained.dataset()
    write_dataset(tmp_path / "data", world.events, world.items, name="world")
    rebuild(tmp_path / "data", *servers)
    shown = show("user-3", servers[0], untrained.untrained_bundle())
    own = [row for row in world.events.to_pylist() if row["user_id"] == "user-3"]
    titles = {row["item_id"]: row["title"] for row in world.items.to_pylist()}
    assert [(one["item"], one["title"], one["event_type"]) for one in shown["events"]] == [
        (row["item_id"], titles[row["item_id"]], row["event_type"]) for row in own[::-1]
    ]
    assert set(shown["categories"]) <= set(untrained.THINGS)
    assert list(shown["categories"].values()) == sorted(shown["categories"].values(), reverse=True)
    assert 0 < sum(shown["categories"].values()) <= 1.001


def test_mistakes_are_named(tmp_path, servers, profiles_redis):
    with pytest.raises(PenchantError, match="not a data set"):
        rebuild(tmp_path, *servers)
    data = dataset(tmp_path / "data", [event("ann", "i0", 1)])
    rebuild(data, *servers)
    with pytest.raises(ConfigError, match="set partitions to 16"):
        rebuild(data, *servers, partitions=4)
    with pytest.raises(ProfileStoreUnavailable):
        rebuild(data, f"unix://{tmp_path}/nothing.sock", servers[1])


def test_lost_profiles_are_not_made_anew_without_the_log_that_knows_who_withdrew(
    tmp_path, store, servers, profiles_redis, events_redis
):
    data = dataset(tmp_path / "data", [event("ann", "i0", 1), event("bob", "i0", 1)])
    log = EventLog(events_redis)
    SubjectRights(log, store, Certificates(log)).set_consent("u:ann", Purpose.TRAIN)
    profiles_redis.flushall()
    with pytest.raises(ConfigError, match="holds no event log"):
        rebuild(data, servers[0])
    assert profiles_redis.dbsize() == 0
    assert rebuild(data, *servers)["profiles"] == 1
    assert [store.read(subject).count for subject in ("u:ann", "u:bob")] == [0, 1]


def test_movielens_takes_seconds(tmp_path, store, servers):
    ratings = pa.parquet.read_table(real_data("ml-1m", "ratings.parquet"))
    events = pa.table(
        {
            "user_id": ratings["user_id"].cast(pa.string()),
            "item_id": ratings["movie_id"].cast(pa.string()),
            "event_type": pa.array(["rating"] * len(ratings)),
            "timestamp": pa.array(ratings["timestamp"].to_numpy().astype(np.int64) * 1000),
            "value": ratings["rating"].cast(pa.float32()),
        }
    )
    write_dataset(tmp_path / "data", events, pa.table({"item_id": events["item_id"].unique()}), name="ml-1m")
    begun = time.monotonic()
    answer = rebuild(tmp_path / "data", *servers)
    assert answer["profiles"] == 6040
    assert sum(store.read(f"u:{user}").count for user in range(1, 6041)) == 1_000_209
    assert time.monotonic() - begun < 60  # about 3 s; a loop over events would take minutes
