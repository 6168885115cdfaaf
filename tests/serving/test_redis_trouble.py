"""Redis in trouble: one row per trouble, and what callers see before it, while it lasts, and after.

`FULL=1` (`make prove-redis`) repeats each row with callers that do not pause, and prints what it found.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

import grpc
import pytest
import redis

from penchant.client import Client, event
from penchant.v1 import catalog_pb2, common_pb2
from serving.redis.client import connect
from serving.stores.profiles import ProfileStore
from tests.serving import faults
from tests.serving.faults import FULL, PatientServer, Proxy, frozen, wait_until
from tests.serving.inside import inside

SEQUENCE, POPULAR = common_pb2.RUNG_SEQUENCE, common_pb2.RUNG_POPULAR
STORE, CORRUPT = common_pb2.PART_PROFILE_STORE, common_pb2.PART_PROFILE_CORRUPT
UNAVAILABLE, EXHAUSTED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED
INTERNAL = grpc.StatusCode.INTERNAL
TIMEOUT_MS = 100
BACK_S = 2.0
COMPILE_S = 120.0  # the first answer compiles
ROUNDS = 3 if FULL else 1
CALLS = 100 if FULL else 3


@dataclass
class Stage:
    """A service between two Redis of its own, each behind a proxy.

    Attributes:
        client: A client of the service.
        servers: The Redis by role.
        fronts: The proxies by role.
        deadline_s: What callers give an answer: 2 s, or 50 times what it takes when all is well.
        people: Names nobody had before.
        seconds: How long each answer took.
    """

    client: Client
    servers: dict[str, PatientServer]
    fronts: dict[str, Proxy]
    deadline_s: float = 60.0
    people: Iterator[str] = field(default_factory=lambda: (f"person{number}" for number in range(10**6)))
    seconds: list[float] = field(default_factory=list)

    def admin(self, role: str) -> redis.Redis:
        """A connection past the proxy."""
        return connect(self.servers[role].url, 5.0)


Trouble: TypeAlias = Callable[[Stage, str, str], contextlib.AbstractContextManager[None]]
"""Something that happens to the Redis of a role, where it is about one person to what it holds of them."""


@pytest.fixture(scope="module")
def stage(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trouble")
    with contextlib.ExitStack() as stack:
        servers = {role: stack.enter_context(PatientServer(folder, role)) for role in ("profiles", "events")}
        fronts = {role: stack.enter_context(Proxy(server)) for role, server in servers.items()}
        urls = {role: f"redis://127.0.0.1:{front.port}" for role, front in fronts.items()}
        with connect(servers["profiles"].url, 5.0) as admin:  # what is known before a stop is known after it
            admin.config_set("appendfsync", "always")
        service = stack.enter_context(inside(world, urls["profiles"], urls["events"], redis_timeout_ms=TIMEOUT_MS))
        found = Stage(stack.enter_context(service.client()), servers, fronts)
        found.client.ingest([event("first", "i0", "view_item")])
        wait_until(lambda: seen(found, "first") == WELL, COMPILE_S)
        found.client.search("space", user_id="first")
        found.client.rank(["i9"], user_id="first")
        begun = time.monotonic()
        for _ in range(20):
            seen(found, "first")
        found.deadline_s = max(2.0, 50 * (time.monotonic() - begun) / 20)
        yield found


@contextlib.contextmanager
def down(stage: Stage, role: str, person: str) -> Iterator[None]:
    stage.servers[role].stop()
    try:
        yield
    finally:
        stage.servers[role].start()


@contextlib.contextmanager
def stopped(stage: Stage, role: str, person: str) -> Iterator[None]:
    with frozen(stage.servers[role]):
        yield


@contextlib.contextmanager
def cut(stage: Stage, role: str, person: str) -> Iterator[None]:
    with stage.fronts[role].cut():
        yield


def delayed(delay_s: Callable[[], float]) -> Trouble:
    @contextlib.contextmanager
    def delaying(stage: Stage, role: str, person: str) -> Iterator[None]:
        stage.fronts[role].delay_s = delay_s
        try:
            yield
        finally:
            stage.fronts[role].delay_s = lambda: 0.0

    return delaying


@contextlib.contextmanager
def halved(stage: Stage, role: str, person: str) -> Iterator[None]:
    stage.fronts[role].halved = True
    try:
        yield
    finally:
        stage.fronts[role].halved = False


@contextlib.contextmanager
def loading(stage: Stage, role: str, person: str) -> Iterator[None]:
    with faults.loading(stage.servers[role]):
        yield


def sliced(pause_s: float) -> Trouble:
    @contextlib.contextmanager
    def slicing(stage: Stage, role: str, person: str) -> Iterator[None]:
        stage.fronts[role].slice_s = pause_s
        try:
            yield
        finally:
            stage.fronts[role].slice_s = None

    return slicing


def key_of(stage: Stage, role: str, person: str) -> bytes:
    """Where something of a person is kept."""
    with stage.admin("profiles") as client:
        profile = ProfileStore(client).key_of(f"u:{person}")
    return profile if role == "profiles" else profile.partition(b"profile:")[0] + b"events"


def instead(put: Callable[[redis.Redis, bytes, bytes], object]) -> Trouble:
    """Something else stands at a key; what stood there is aside meanwhile."""

    @contextlib.contextmanager
    def replacing(stage: Stage, role: str, person: str) -> Iterator[None]:
        key = key_of(stage, role, person)
        aside = key + b":aside"
        with stage.admin(role) as client:
            # In one step: a service that finds nothing here begins a new profile.
            with client.pipeline(transaction=True) as together:
                together.rename(key, aside)
                put(together, key, aside)
                together.execute()
            try:
                yield
            finally:
                client.rename(aside, key)

    return replacing


def giant(client: redis.Redis, key: bytes, aside: bytes) -> None:
    """A profile with more behind it than any has."""
    client.copy(aside, key)
    client.append(key, bytes(4 << 20))


def configured(name: str, value: object) -> Trouble:
    @contextlib.contextmanager
    def setting(stage: Stage, role: str, person: str) -> Iterator[None]:
        with stage.admin(role) as client:
            before = client.config_get(name)[name]
            client.config_set(name, value)
            try:
                yield
            finally:
                client.config_set(name, before)

    return setting


@contextlib.contextmanager
def read_only(stage: Stage, role: str, person: str) -> Iterator[None]:
    """As after a failover that nobody told us of: it follows another, which is away."""
    with stage.admin(role) as client:
        client.replicaof("127.0.0.1", 1)
        try:
            yield
        finally:
            client.replicaof("NO", "ONE")


@contextlib.contextmanager
def unsaved(stage: Stage, role: str, person: str) -> Iterator[None]:
    """The disk takes no snapshot, so that Redis takes no writes: MISCONF."""
    in_the_way = stage.servers[role].directory / "dump.rdb"
    in_the_way.unlink(missing_ok=True)
    in_the_way.mkdir()
    with stage.admin(role) as client:
        client.config_set("save", "3600 1")
        client.bgsave()
        wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        try:
            yield
        finally:
            client.config_set("save", "")
            in_the_way.rmdir()


@dataclass(frozen=True)
class Row:
    """A trouble, and what is seen while it lasts.

    Attributes:
        trouble: What happens, to which Redis, to whom where it is about one person.
        known: Rung and degraded parts of somebody whose profile was read before.
        others: The same of the other people.
        event: Status of an event, and whether it is applied at once; None where that depends on the moment.
    """

    trouble: Trouble
    known: tuple[int, ...]
    others: tuple[int, ...]
    event: tuple[grpc.StatusCode | None, bool | None]


WELL = (SEQUENCE,)
AWAY = (POPULAR, STORE)
BAD = (POPULAR, CORRUPT)
SLOW = delayed(lambda: 2 * TIMEOUT_MS / 1000)
LATE = delayed(lambda: random.choice((0.0, 2 * TIMEOUT_MS / 1000)))
FULL_OF_DATA = configured("maxmemory", 1000)
ALONE = configured("min-replicas-to-write", 1)
TABLE = {
    ("profiles", "down"): Row(down, AWAY, AWAY, (None, False)),
    ("profiles", "frozen"): Row(stopped, AWAY, AWAY, (None, False)),
    ("profiles", "cut"): Row(cut, AWAY, AWAY, (None, False)),
    ("profiles", "loading"): Row(loading, AWAY, AWAY, (None, False)),
    ("profiles", "slow"): Row(SLOW, AWAY, AWAY, (None, True)),  # who writes waits longer than who ranks
    ("profiles", "late"): Row(LATE, WELL, WELL, (None, True)),
    ("profiles", "half a reply"): Row(halved, AWAY, AWAY, (None, False)),
    ("profiles", "sliced"): Row(sliced(0.0), WELL, WELL, (None, True)),
    ("profiles", "dripping"): Row(sliced(0.005), AWAY, AWAY, (None, None)),
    ("profiles", "wrong type"): Row(instead(lambda c, key, _: c.rpush(key, "x")), BAD, WELL, (None, False)),
    ("profiles", "garbage"): Row(instead(lambda c, key, _: c.set(key, os.urandom(500))), BAD, WELL, (None, False)),
    ("profiles", "giant"): Row(instead(giant), BAD, WELL, (None, False)),
    ("profiles", "full"): Row(FULL_OF_DATA, WELL, WELL, (EXHAUSTED, False)),  # durable, and applied once there is room
    ("profiles", "disk full"): Row(unsaved, WELL, WELL, (EXHAUSTED, False)),
    ("profiles", "read only"): Row(read_only, WELL, WELL, (None, False)),
    ("profiles", "no replica"): Row(ALONE, WELL, WELL, (None, False)),
    ("events", "down"): Row(down, WELL, WELL, (UNAVAILABLE, None)),
    ("events", "frozen"): Row(stopped, WELL, WELL, (UNAVAILABLE, None)),
    ("events", "cut"): Row(cut, WELL, WELL, (UNAVAILABLE, None)),
    ("events", "loading"): Row(loading, WELL, WELL, (UNAVAILABLE, None)),
    ("events", "slow"): Row(SLOW, WELL, WELL, (None, True)),
    ("events", "half a reply"): Row(halved, WELL, WELL, (UNAVAILABLE, None)),
    ("events", "sliced"): Row(sliced(0.0), WELL, WELL, (None, True)),
    ("events", "wrong type"): Row(instead(lambda c, key, _: c.set(key, "x")), WELL, WELL, (INTERNAL, None)),
    ("events", "full"): Row(FULL_OF_DATA, WELL, WELL, (EXHAUSTED, None)),
    ("events", "disk full"): Row(unsaved, WELL, WELL, (EXHAUSTED, None)),
    ("events", "read only"): Row(read_only, WELL, WELL, (UNAVAILABLE, None)),
    ("events", "no replica"): Row(ALONE, WELL, WELL, (UNAVAILABLE, None)),
}


def seen(stage: Stage, person: str) -> tuple[int, ...]:
    """Rung and degraded parts of an answer, which comes within its deadline."""
    asked = time.monotonic()
    slate = stage.client.recommend(user_id=person, page_size=5, timeout_s=stage.deadline_s)
    stage.seconds.append(time.monotonic() - asked)
    assert len(slate.items) == 5
    assert (slate.profile_version > 0) == (slate.rung == SEQUENCE)
    return (slate.rung, *(entry.part for entry in slate.degraded))


def become(stage: Stage, wanted: tuple[int, ...], *people: str) -> None:
    """Waits until this is seen by all of them."""
    wait_until(lambda: [seen(stage, person) for person in people] == [wanted] * len(people))


def told(stage: Stage, one: object) -> tuple[grpc.StatusCode | None, bool]:
    """What becomes of an event."""
    try:
        [status] = stage.client.ingest([one], timeout_s=stage.deadline_s)
    except grpc.RpcError as error:
        return error.code(), False
    codes = {code.value[0]: code for code in grpc.StatusCode}
    return (codes[status.code] if status.code else None), status.applied


def many(stage: Stage, people: list[str]) -> Counter[tuple[int, ...]]:
    """What callers see who all ask at once."""
    with ThreadPoolExecutor(4) as pool:
        return Counter(pool.map(lambda number: seen(stage, people[number % len(people)]), range(CALLS)))


def named(seen: tuple[int, ...]) -> str:
    """Rung and degraded parts in words."""
    rung, *parts = seen
    return " ".join([common_pb2.Rung.Name(rung), *map(common_pb2.Part.Name, parts)])


@pytest.mark.parametrize("place", TABLE, ids=lambda place: "-".join(place).replace(" ", "-"))
def test_redis_in_trouble(stage, place, record_property):
    role, row, client = place[0], TABLE[place], stage.client
    backs: list[float] = []
    stage.seconds.clear()
    for _ in range(ROUNDS):
        person, other = next(stage.people), next(stage.people)
        begun = time.monotonic()
        assert {
            status.code for status in client.ingest([event(who, "i0", "view_item") for who in (person, other)])
        } == {0}
        become(stage, WELL, person, other)  # before
        usual = time.monotonic() - begun
        with row.trouble(stage, role, person):
            become(stage, row.known, person)
            become(stage, row.others, other)
            during = many(stage, [person])
            # Where answers are personal, this busy machine may be late now and then; where they cannot be, none is.
            assert set(during) <= {row.known, AWAY}
            for slate in (client.search("space number5", user_id=person), client.rank(["i9", "i1"], user_id=person)):
                assert slate.items
            code, applied = told(stage, event(person, "i4", "view_item", event_id=f"{place}-{person}"))
            assert code is row.event[0]
            assert row.event[1] in (None, applied)
            if code is UNAVAILABLE:
                with pytest.raises(grpc.RpcError) as failure:
                    client.put_items([catalog_pb2.Item(item_id="late")], timeout_s=stage.deadline_s)
                assert failure.value.code() is UNAVAILABLE
        begun = time.monotonic()
        become(stage, WELL, person, other)  # after
        backs.append(time.monotonic() - begun)
        assert backs[-1] < BACK_S + usual
        # The event is there in the end, once: sent again where it was refused, brought by the projector where late.
        again = event(person, "i4", "view_item", event_id=f"{place}-{person}")
        if row.event[0] or row.known == BAD:  # the projector leaves a damaged profile to a rebuild
            wait_until(lambda again=again: told(stage, again)[0] is None)
        wait_until(lambda person=person: client.get_profile(person).event_count == 2)
    print(f"{role} {place[1]}: {dict(during)}, personal again after {max(backs):.2f} s")
    record_property(
        "trouble",
        {
            "redis": role,
            "trouble": place[1],
            "rounds": ROUNDS,
            "answers": len(stage.seconds),
            "late": sum(seconds > stage.deadline_s for seconds in stage.seconds),
            "deadline_s": stage.deadline_s,
            "slowest_s": max(stage.seconds),
            "before": named(WELL),
            "during": named(row.known),
            "others": named(row.others),
            "after": named(WELL),
            "event": row.event[0].name if row.event[0] else "OK",
            "personal_again_s": max(backs),
        },
    )


def test_a_service_in_trouble_is_not_held_up(stage):
    """Frozen, and with more callers than threads: who finds the breaker open pays no timeout."""
    client, person = stage.client, next(stage.people)
    client.ingest([event(person, "i0", "view_item")])
    stop, answers = threading.Event(), Counter()

    def ask() -> None:
        while not stop.is_set():
            answers[seen(stage, person)] += 1

    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(ask)
        wait_until(lambda: answers[WELL] > 50)
        with frozen(stage.servers["profiles"]):
            wait_until(lambda: answers[AWAY] > 50)
        stop.set()
    assert set(answers) == {WELL, AWAY}


@pytest.fixture
def careless(world, tmp_path, monkeypatch) -> Iterator[Stage]:
    """A service that waits for a profile longer than its callers wait for an answer, and stays away for long after."""
    monkeypatch.setitem(ProfileStore.__init__.__kwdefaults__, "cooldown_s", 60.0)
    with (
        PatientServer(tmp_path, "profiles") as profiles,
        PatientServer(tmp_path, "events") as events,
        Proxy(profiles) as front,
        inside(world, f"redis://127.0.0.1:{front.port}", events.url, redis_timeout_ms=60_000) as service,
        service.client() as client,
    ):
        stage = Stage(client, {"profiles": profiles, "events": events}, {"profiles": front})
        client.ingest([event("first", "i0", "view_item")])
        wait_until(lambda: seen(stage, "first") == WELL, COMPILE_S)
        stage.deadline_s = BACK_S
        yield stage


def test_the_table_notices_answers_that_come_too_late(careless):
    """The control of the deadline."""
    with frozen(careless.servers["profiles"]), pytest.raises(grpc.RpcError) as failure:
        seen(careless, "first")
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_the_table_notices_who_is_not_personal_again(careless):
    """The control of the time until answers are personal again."""
    with careless.fronts["profiles"].cut():
        become(careless, AWAY, "first")
    with pytest.raises(AssertionError, match="never became true"):
        wait_until(lambda: seen(careless, "first") == WELL, BACK_S)
