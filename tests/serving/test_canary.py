"""Nobody ever gets another person's profile, whenever calls are cancelled, time out, or replies come late or in slices.

Each of 200 people has touched one item that nobody else has: their canary. And what the calls that ended held is given
back: turns, places among the calls in hand, connections to Redis. `FULL=1` (`make prove-redis`) makes 10,000 calls that
end before their answer instead of a few hundred.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from features.errors import ProfileCorrupt
from features.records import make_records
from penchant.client import Client, event
from penchant.v1 import catalog_pb2, common_pb2, profile_pb2, profile_pb2_grpc, ranking_pb2, ranking_pb2_grpc
from serving.errors import ProfileStoreUnavailable
from serving.processes import worker
from serving.redis import connection as redis_connection
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.services.reception.calls import Phase
from serving.stores.profiles import ProfileStore
from tests.fixtures import Service
from tests.serving.faults import FULL, Proxy, wait_until
from tests.serving.inside import Inside, inside

PEOPLE = 200
ENDED = 10_000 if FULL else 300
CALLERS = 16
THREADS = 8
AT_ONCE = 32
READERS = 32
TIMEOUT_MS = 100
HELD_S = 1.0
SERVING = health_pb2.HealthCheckResponse.SERVING
SETTINGS = {"redis_timeout_ms": TIMEOUT_MS, "threads": THREADS, "max_concurrent": AT_ONCE, "admission": False}


@dataclass
class Stage:
    """A service whose profiles come through a proxy; all 200 canaries are in.

    Attributes:
        target: Where it listens.
        front: The proxy.
        server: Its Redis.
    """

    target: str
    front: Proxy
    server: RedisServer


@pytest.fixture
def servers(tmp_path) -> Iterator[tuple[RedisServer, RedisServer, Proxy]]:
    """The Redis of profiles and of events, and the proxy before the first."""
    with (
        RedisServer(tmp_path, "profiles") as profiles,
        RedisServer(tmp_path, "events") as events,
        Proxy(profiles) as front,
    ):
        yield profiles, events, front


def urls(servers: tuple[RedisServer, RedisServer, Proxy]) -> dict[str, str]:
    _, events, front = servers
    return {"redis": f"redis://127.0.0.1:{front.port}", "events_redis": events.url}


@pytest.fixture
def stage(world, servers, monkeypatch) -> Iterator[Stage]:
    """A worker in this process."""
    # The pause after a failure would hide what is looked for: with it hardly anything is read after a late reply.
    monkeypatch.setitem(ProfileStore.__init__.__kwdefaults__, "cooldown_s", 0.0)
    with inside(world, *urls(servers).values(), **SETTINGS) as service:
        let_canaries_in(service)
        yield Stage(service.target, servers[2], servers[0])


def let_canaries_in(service: Inside | Service) -> None:
    with service.client() as client:
        items = [catalog_pb2.Item(item_id=canary(n), title=f"bird {n}", categories=["western"]) for n in range(PEOPLE)]
        assert client.put_items(items).visible_everywhere
        statuses = client.ingest([event(f"p{number}", canary(number), "view_item") for number in range(PEOPLE)])
        assert {status.code for status in statuses} == {0}
        wait_until(lambda: all(client.get_profile(f"p{n}").event_count == 1 for n in range(PEOPLE)))


def report(record_property: Callable[[str, Any], None], name: str, counts: Counter[str], seconds: float) -> None:
    print(f"{name}: {dict(counts)}")
    record_property("canaries", {"name": name, **counts, "foreign": counts["foreign"], "seconds": seconds})


def canary(number: int) -> str:
    return f"canary{number}"


class Callers:
    """Calls about random people that are cancelled or time out at random moments; every answer is looked at."""

    def __init__(self, target: str, ended: int, seed: int = 7) -> None:
        self.counts: Counter[str] = Counter()
        self._target, self._ended, self._seed = target, ended, seed
        self._lock = threading.Lock()
        self._versions: dict[int, int] = {}

    def run(self) -> Counter[str]:
        """Calls until enough ended early, or somebody got what is another's."""
        with Client(self._target, timeout_s=20.0) as client:
            self._versions = {n: client.get_profile(f"p{n}").profile_version for n in range(PEOPLE)}
        with ThreadPoolExecutor(CALLERS) as pool:
            for one in [pool.submit(self._call_on, self._seed + number) for number in range(CALLERS)]:
                one.result()
        return self.counts

    def _call_on(self, seed: int) -> None:
        rng = random.Random(seed)
        with grpc.insecure_channel(self._target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            ranking = ranking_pb2_grpc.RankingServiceStub(channel)
            profiles = profile_pb2_grpc.ProfileServiceStub(channel)
            while not self._enough():
                person = rng.randrange(PEOPLE)
                subject = common_pb2.Subject(user_id=f"p{person}")
                if rng.random() < 0.8:
                    options = ranking_pb2.RankingOptions(subject=subject, page_size=5, explain=True)
                    method, request = ranking.Recommend, ranking_pb2.RecommendRequest(options=options)
                else:
                    method, request = profiles.GetProfile, profile_pb2.GetProfileRequest(subject=subject)
                self._one(rng, person, method, request)

    def _enough(self) -> bool:
        """Whether enough ended early, and answers were seen of both kinds, or one that ends it all."""
        answered = min(self.counts["personal"], self.counts["not personal"])
        return bool(self.counts["foreign"]) or (self.counts["ended early"] >= self._ended and answered >= 10)

    def _one(self, rng: random.Random, person: int, method, request) -> None:
        fate = rng.random()
        call = method.future(request, timeout=rng.uniform(0.001, 0.3) if fate < 0.4 else 20.0)
        if 0.4 <= fate < 0.8:
            time.sleep(rng.uniform(0.0, 0.2))
            call.cancel()
        try:
            answer = call.result()
        except (grpc.RpcError, grpc.FutureCancelledError):
            kind = "ended early" if fate < 0.8 else f"failed {call.code().name}"
        else:
            own = self._is_own(person, answer)
            kind = {None: "not personal", True: "personal", False: "foreign"}[own]
        with self._lock:
            self.counts[kind] += 1

    def _is_own(self, person: int, answer) -> bool | None:
        """Whether an answer is about the asker; None where it is about nobody."""
        if isinstance(answer, profile_pb2.GetProfileResponse):
            named = {one.item_id for one in answer.events}
            return (named, answer.profile_version) == ({canary(person)}, self._versions[person])
        slate = answer.slate
        if not slate.profile_version:
            assert slate.rung == common_pb2.RUNG_POPULAR
            return None
        reasons = [reason for item in slate.items for reason in item.reasons]
        liked = {reason.text for reason in reasons if reason.text.startswith("like ")}
        shown = {item.item_id for item in slate.items}
        # An answer that came to its deadline has no time for reasons, so it gives those of its asker or none.
        hurried = any(part.part == common_pb2.PART_DEADLINE for part in slate.degraded)
        return (
            slate.profile_version == self._versions[person]
            and (liked == {f"like bird {person}"} or (hurried and not liked))
            and canary(person) not in shown
        )


def trouble(front: Proxy, timeout_s: float = TIMEOUT_MS / 1000, most: float = 2.0, seed: int = 11) -> None:
    """Replies half of the time late by up to `most` timeouts, byte by byte."""
    rng = random.Random(seed)
    front.delay_s = lambda: max(0.0, rng.uniform(-most, most)) * timeout_s
    front.slice_s = 0.0


def over(front: Proxy) -> None:
    """All is well again."""
    front.delay_s, front.slice_s = lambda: 0.0, None


def held(ranking: ranking_pb2_grpc.RankingServiceStub, calls: int) -> Counter[str]:
    """Status of so many calls at once that all wait a while, each for a version that never comes."""
    subject = common_pb2.Subject(user_id="p1")
    options = ranking_pb2.RankingOptions(subject=subject, page_size=5, min_profile_version=1 << 62)
    request = ranking_pb2.RecommendRequest(options=options)
    waiting = [ranking.Recommend.future(request, timeout=2 * HELD_S) for _ in range(calls)]
    return Counter(one.code().name for one in waiting)


def well(target: str, connections: int = 1) -> None:
    """Every answer is personal, health is SERVING, and a worker takes as many calls at once as it may, and no more."""
    with Client(target, timeout_s=20.0) as client:
        wait_until(
            lambda: all(client.recommend(user_id=f"p{n}").rung == common_pb2.RUNG_SEQUENCE for n in range(PEOPLE)), 60
        )
    for number in range(connections):  # each may reach another worker
        own = [("grpc.use_local_subchannel_pool", 1), ("penchant.number", number)]
        with grpc.insecure_channel(target, options=own) as channel:
            asked = health_pb2.HealthCheckRequest(service="penchant.v1.RankingService")
            assert health_pb2_grpc.HealthStub(channel).Check(asked, timeout=20).status == SERVING
            ranking = ranking_pb2_grpc.RankingServiceStub(channel)
            assert held(ranking, AT_ONCE) == {"OK": AT_ONCE}
            assert held(ranking, AT_ONCE + 10)["RESOURCE_EXHAUSTED"] >= 1  # the control


def watch(monkeypatch, name: str) -> list[Any]:
    """What a worker makes of a class."""
    made: list[Any] = []
    kind = getattr(worker, name)

    def make(*arguments: Any, **options: Any) -> Any:
        made.append(kind(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(worker, name, make)
    return made


def reuse(monkeypatch) -> None:
    """Lets connections be used again after a read that was given up, without the check for unread replies."""

    def take(line):
        with contextlib.suppress(IndexError):
            return line._idle.pop()
        connection = line._pool.get_connection()
        return redis_connection._OpenConnection(
            connection, connection._sock, redis_connection.hiredis.Reader(notEnoughData=False)
        )

    monkeypatch.setattr(redis_connection.PipelinedConnection, "_take", take)
    monkeypatch.setattr(redis_connection.PipelinedConnection, "_discard", lambda line, used: line._idle.append(used))


@pytest.fixture
def made(monkeypatch) -> dict[str, list[Any]]:
    """What the worker of `stage` makes."""
    return {name: watch(monkeypatch, name) for name in ("ConcurrencyLimit", "Server", "ProfileStore")}


def test_nobody_gets_another_persons_profile(made, stage, record_property):
    begun = time.monotonic()
    trouble(stage.front)
    counts = Callers(stage.target, ENDED).run()
    over(stage.front)
    report(record_property, "one worker, looked into", counts, time.monotonic() - begun)
    assert counts["foreign"] == 0
    assert counts["ended early"] >= ENDED
    assert min(counts["personal"], counts["not personal"]) >= 10
    assert not [kind for kind in counts if kind.startswith("failed") and kind != "failed UNAVAILABLE"]
    well(stage.target)
    [limit], [server], stores = made["ConcurrencyLimit"], made["Server"], made["ProfileStore"]
    wait_until(lambda: (server._reception.calls.count(Phase.WORKING), limit._free) == (0, THREADS))
    for store in stores:
        for node in store.router._nodes.all():
            idle, pool = node.connection._idle, node.client.connection_pool
            # The pool has lent what is idle in the line, and nothing that ended with a call. The monitor may just read.
            wait_until(lambda: {used.connection for used in idle} == pool._in_use_connections)  # noqa: B023
            assert len(pool._in_use_connections) + len(pool._available_connections) <= AT_ONCE
            assert [node.connection.ask(b"PING") for _ in idle] == [b"PONG"] * len(idle)


def test_nobody_gets_another_persons_profile_from_several_workers(serve, servers, record_property):
    profiles, _, front = servers
    begun = time.monotonic()
    with serve(workers=2, **urls(servers), **SETTINGS) as service:
        let_canaries_in(service)
        trouble(front, most=1.05)  # mostly in time: a worker asks nothing for a while after a failure
        counts = Callers(service.target, ENDED).run()
        over(front)
        report(record_property, "two workers", counts, time.monotonic() - begun)
        assert counts["foreign"] == 0
        assert counts["ended early"] >= ENDED
        assert not [kind for kind in counts if kind.startswith("failed") and kind != "failed UNAVAILABLE"]
        well(service.target, connections=4 if FULL else 2)
        with connect(profiles.url, 5.0) as admin:  # two workers, each with as many that read as there are calls
            assert len(admin.client_list()) <= 2 * 2 * AT_ONCE + 10
        assert service.stop() == 0


def test_the_canaries_notice_a_connection_that_is_used_again_after_a_read_that_was_given_up(
    stage, monkeypatch, record_property
):
    """The control: without the check for unread replies, the next reader gets the late reply."""
    begun = time.monotonic()
    reuse(monkeypatch)
    trouble(stage.front)
    counts = Callers(stage.target, 10_000).run()
    report(record_property, "control: used again", counts, time.monotonic() - begun)
    assert counts["foreign"] > 0


@pytest.fixture
def front(tmp_path) -> Iterator[Proxy]:
    """A proxy before a Redis that holds 200 profiles, the canary of each the item after their number."""
    with RedisServer(tmp_path, "profiles") as server, Proxy(server) as front:
        with connect(server.url, 5.0) as client:
            entries = [[(1 + n, make_records(1 + n, 0, 0, 0, np.nan, 1).tobytes())] for n in range(PEOPLE)]
            ProfileStore(client).apply_many([(f"u:p{n}", entries[n]) for n in range(PEOPLE)])
        yield front


def read_on(front: Proxy, released: int, timeout_s: float = TIMEOUT_MS / 1000) -> Counter[str]:
    """Reads of random people by many threads, until so many were given up in the middle or one got another's."""
    counts: Counter[str] = Counter()
    trouble(front, timeout_s)

    def read(seed: int) -> None:
        rng = random.Random(seed)
        while not counts["foreign"] and (counts["given up"] < released or counts["own"] < released / 100):
            person = rng.randrange(PEOPLE)
            try:
                found = store.read(f"u:p{person}").records["item"].tolist()
                kind = "own" if found == [1 + person] else "foreign"
            except ProfileStoreUnavailable:
                kind = "given up"
            except ProfileCorrupt:  # half of one reply and half of another
                kind = "foreign"
            with lock:
                counts[kind] += 1

    lock = threading.Lock()
    with connect(f"redis://127.0.0.1:{front.port}", timeout_s) as client, ThreadPoolExecutor(READERS) as pool:
        store = ProfileStore(client, cooldown_s=0.0)
        for one in [pool.submit(read, seed) for seed in range(READERS)]:
            one.result()
    return counts


def test_a_read_that_was_given_up_leaves_nothing_to_the_next_one(front, record_property):
    begun = time.monotonic()
    counts = read_on(front, ENDED)
    report(record_property, "the store alone", counts, time.monotonic() - begun)
    assert counts["foreign"] == 0
    assert counts["given up"] >= ENDED
    assert counts["own"] >= ENDED / 100


def test_reads_notice_a_connection_that_is_used_again(front, monkeypatch):
    """The control of the same."""
    reuse(monkeypatch)
    assert read_on(front, 10_000)["foreign"] > 0
