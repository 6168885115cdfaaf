"""Both roles of Redis on a real cluster of three nodes: everything works, also while slots move."""

from __future__ import annotations

import contextlib
import threading
import time

import grpc
import numpy as np
import pyarrow.parquet as pq
import pytest
from redis.crc import key_slot

from features.profile import empty as none
from features.profile import fold
from features.records import make_records
from features.subjects import partition_of
from penchant.client import Client, event
from penchant.v1 import catalog_pb2, common_pb2
from serving.errors import ConfigError, ProfileStoreUnavailable
from serving.projection.rebuild import rebuild
from serving.redis.client import connect
from serving.redis.connection import Script, ScriptCall
from serving.redis.router import RedisRouter
from serving.redis.safety import require_safe
from serving.stores.event_log import EventLog
from serving.stores.keys import partition_prefix
from serving.stores.profile_eviction import Evictions
from serving.stores.profiles import ProfileStore
from tests.serving.clusters import SLOTS, ClusterNode, cluster, url_of
from tests.serving.faults import Proxy, frozen, wait_until
from tests.serving.inside import inside
from tests.serving.test_redis_production import _certificate, _tls, user_of_the_docs, work

PARTITIONS = 16
TIMEOUT_MS = 100
PEOPLE = [f"p{number}" for number in range(40)]
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
ADD = Script.of("return redis.call('INCRBY', KEYS[1], ARGV[1])")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("cluster"), "events") as started:
        yield started


@pytest.fixture
def empty(nodes):
    for node in nodes:
        node.say("FLUSHALL")
    return nodes


def owner(nodes: list[ClusterNode], partition: int) -> ClusterNode:
    """The node that has a partition, where no slot was moved."""
    return nodes[key_slot(partition_prefix(partition)) * len(nodes) // SLOTS]


def test_everything_the_service_does_works_on_a_cluster(empty):
    with connect(url_of(empty), 5) as client:
        work(client, client, PARTITIONS)
    assert all(node.say("DBSIZE") for node in empty)


def test_by_tls_and_with_a_password(tmp_path):
    certificate, key = _certificate(tmp_path)
    fronts: list[Proxy] = []

    @contextlib.contextmanager
    def front(node):
        with _tls(node, certificate, key) as proxy:
            fronts.append(proxy)
            yield proxy.port

    with cluster(tmp_path, "events", front) as nodes:
        for node in nodes:
            node.say("ACL", "SETUSER", "penchant", *user_of_the_docs("secret"))
        url = url_of(nodes[:1], "rediss+cluster", f"?ssl_ca_certs={certificate}").replace("://", "://penchant:secret@")
        with connect(url, 5) as client:
            work(client, client, PARTITIONS)
            assert len(client.nodes()) == 3
        with connect(url_of(nodes, "rediss+cluster"), 5) as stranger, pytest.raises(ProfileStoreUnavailable):
            ProfileStore(stranger).read("u:ann")


def test_a_script_is_taught_to_each_node_and_replies_keep_their_order(empty):
    with connect(url_of(empty), 5) as client:
        asked = RedisRouter(client, ProfileStoreUnavailable)
        keys = [partition_prefix(number % PARTITIONS) + b"sum" for number in range(100)]
        assert asked.run_all([ScriptCall(ADD, (key,), (1,)) for key in keys]) == [
            1 + n // PARTITIONS for n in range(100)
        ]
        found = asked.run_all([("GET", key) for key in keys])
        assert [int(value) for value in found] == [7 if n % PARTITIONS < 4 else 6 for n in range(100)]
        ids = asked.at_each(keys, lambda node: node.info("server")["run_id"])
        assert len(set(ids)) == 3


def test_every_node_must_be_safe(empty):
    with connect(url_of(empty), 5) as client:
        require_safe(client, "events")
        for setting, bad in (("appendfsync", "everysec"), ("cluster-require-full-coverage", "yes")):
            good = {"appendfsync": "always", "cluster-require-full-coverage": "no"}[setting]
            empty[2].say("CONFIG", "SET", setting, bad)
            try:
                with pytest.raises(ConfigError, match=f"{setting} '{bad}'"):
                    require_safe(client, "events")
            finally:
                empty[2].say("CONFIG", "SET", setting, good)


def test_a_cluster_and_a_single_server_are_not_taken_for_each_other(empty, profiles_server):
    with connect(empty[0].url, 5) as node, pytest.raises(ConfigError, match=r"redis\+cluster"):
        require_safe(node, "profiles")
    with (
        Proxy(profiles_server) as front,
        connect(f"redis+cluster://localhost:{front.port}", 5) as single,
        pytest.raises(ConfigError, match="is no cluster"),
    ):
        require_safe(single, "profiles")


def loved(client: Client, person: str) -> bool:
    """Whether the answer is personal."""
    slate = client.recommend(user_id=person, page_size=5)
    assert bool(slate.degraded) == (slate.rung == common_pb2.RUNG_POPULAR)
    return slate.rung == common_pb2.RUNG_SEQUENCE


def ingest_all(client: Client, item: str) -> None:
    assert {s.code for s in client.ingest([event(person, item, "view_item") for person in PEOPLE])} == {0}


def test_who_stays_away_leaves_wherever_they_are(empty):
    """One node is away: what it has waits for the next time."""
    past, start = [make_records(n, 0, 0, 1000 * n, np.nan, 1) for n in (1, 2)], 1_700_000_000_000 << 20
    state = fold(none(), np.concatenate(past), start + 2)
    new = fold(none(), past[0], start + (1 << 40))
    idle, busy = [f"u:idle{number}" for number in range(600)], [f"u:busy{number}" for number in range(20)]
    with connect(url_of(empty), 0.5) as client:
        store = ProfileStore(client, PARTITIONS, cooldown_s=0.1)
        assert (
            store.put_states([(person, state) for person in idle] + [(person, new) for person in busy]).written == 620
        )
        missed = sum(owner(empty, partition_of(person, PARTITIONS)) is empty[2] for person in idle)
        assert 0 < missed < 600
        before = (start >> 20) + 1
        with frozen(empty[2]):
            assert Evictions(store).evict(before) == 600 - missed
        wait_until(empty[2].well)
        later: list[int] = []
        wait_until(lambda: later.append(Evictions(store).evict(before)) or sum(later) == missed)
        assert len(Evictions(store).evicted(idle)) == 600
        assert Evictions(store).evicted(busy) == {}
        assert Evictions(store).evict(before) == 0


def test_the_service_the_warehouse_and_a_rebuild(world, empty, tmp_path):
    url = url_of(empty[1:2])  # one node is enough to find the others
    out = tmp_path / "warehouse"
    settings = {"warehouse_flush_s": 0.5, "purge_hours": 0.001, "redis_timeout_ms": 1000}
    with inside(world, url, url, out, **settings) as service, service.client() as client:
        ingest_all(client, "i0")
        slate = client.recommend(user_id="p1", page_size=5)
        client.ingest([event("p1", slate.items[0].item_id, "like", request_id=slate.request_id)])
        answer = client.put_items([catalog_pb2.Item(item_id="new", title="keepsake", categories=["western"])])
        assert answer.visible_everywhere
        assert [item.item_id for item in client.search("keepsake", page_size=1).items] == ["new"]

        def written() -> set[str]:
            files = out.glob("events/date=*/*.parquet")
            return {row["user_id"] for file in files for row in pq.ParquetFile(file).read().to_pylist()}

        wait_until(lambda: written() == set(PEOPLE))
        name = client.erase("p0").certificate_id
        assert not client.get_profile("p0").found
        wait_until(lambda: "p0" not in written())
        wait_until(lambda: all(one.purged_at_ms for one in client.get_erasure_certificate(name).receipts))
    for node in empty:
        for key in node.say("KEYS", "penchant:{p*}:profile:*"):
            node.say("DEL", key)
    done = rebuild(out, url)
    assert done["profiles"] == len(PEOPLE) - 1
    with connect(url, 5) as client:
        assert [ProfileStore(client).read(f"u:{person}").count for person in PEOPLE[:3]] == [0, 2, 1]


def _moved_at_once(source: ClusterNode, target: ClusterNode, slot: int) -> None:
    """As Valkey 9 does it: by itself, and with one switch at the end."""
    source.say("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", target.name())
    wait_until(lambda: owns(target, slot))


def _moved_by_hand(source: ClusterNode, target: ClusterNode, slot: int) -> None:
    """As every version can: key by key, with ASK for the keys that are gone and TRYAGAIN for those between."""
    target.say("CLUSTER", "SETSLOT", slot, "IMPORTING", source.name())
    source.say("CLUSTER", "SETSLOT", slot, "MIGRATING", target.name())
    while keys := source.say("CLUSTER", "GETKEYSINSLOT", slot, 3):
        source.say("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        time.sleep(0.01)
    for node in (target, source):
        node.say("CLUSTER", "SETSLOT", slot, "NODE", target.name())
    wait_until(lambda: owns(target, slot))


def owns(node: ClusterNode, slot: int) -> bool:
    found = node.say("CLUSTER", "SLOTS")
    return any(first <= slot <= last and master[1] == node.port for first, last, master, *_ in found)


@pytest.mark.parametrize("move", [_moved_at_once, _moved_by_hand])
def test_a_slot_that_moves_under_traffic_loses_and_doubles_nothing(world, empty, move):
    url, partition = url_of(empty), partition_of("u:p0", PARTITIONS)
    slot, source = key_slot(partition_prefix(partition)), owner(empty, partition)
    target = empty[(empty.index(source) + 1) % 3]
    people = [f"p{n}" for n in range(400) if partition_of(f"u:p{n}", PARTITIONS) == partition][:8]
    taken = dict.fromkeys(people, 0)
    stop, personal = threading.Event(), []
    with inside(world, url, url, redis_timeout_ms=1000) as service, service.client() as client:
        assert {s.code for s in client.ingest([event(person, "i0", "view_item") for person in people])} == {0}

        def write() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                new = [
                    event(person, f"i{number % 40}", "view_item", event_id=f"{person}-{number}") for person in people
                ]
                left = {one.event_id: one for one in new}
                while left:  # as any client does: again, with the same ids, until it is durable
                    statuses = client.ingest(left.values(), timeout_s=20.0)
                    for one, status in zip(list(left.values()), statuses, strict=True):
                        assert status.code in (0, UNAVAILABLE.value[0]), status.message
                        if status.code == 0:
                            taken[one.subject.user_id] += 1
                            del left[one.event_id]

        def read() -> None:
            while not stop.is_set():
                personal.extend(loved(client, person) for person in people)

        threads = [threading.Thread(target=work) for work in (write, read)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: min(taken.values()) > 3)
            move(source, target, slot)
            before = min(taken.values())
            wait_until(lambda: min(taken.values()) > before + 3)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert personal[-1]
        print(f"{move.__name__}: {sum(taken.values())} events, {personal.count(False)} of {len(personal)} not personal")
        expected = [taken[person] + 1 for person in people]
        wait_until(lambda: [client.get_profile(person).event_count for person in people] == expected)
        with connect(url, 5) as cluster_client:
            log = EventLog(cluster_client)
            log.open()
            pieces = [piece for person in people for piece in log.history(f"u:{person}")]
        logged = [(entry.subject, entry.event_id) for piece in pieces for entry in piece]
        assert len(logged) == len(set(logged)) == sum(expected)
    move(target, source, slot)
