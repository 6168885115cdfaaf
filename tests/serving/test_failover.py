"""A node of a cluster in trouble: its own people notice, and are served personally again as soon as Redis has them.

How long Redis itself needs (a restarted master takes no commands for 2 s, a replica waits for a vote) is not ours: time
runs from the moment in which a bare client, which asks that node and no other, finds a key again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import grpc
import numpy as np
import pytest
from redis.crc import key_slot

from features.records import make_records
from features.subjects import partition_of
from penchant.client import Client, event
from penchant.v1 import common_pb2
from serving.errors import EventLogUnavailable
from serving.redis.client import connect
from serving.stores.event_log import EventLog
from serving.stores.keys import partition_prefix
from serving.stores.log_entries import LoggedEvent
from serving.stores.profiles import ProfileStore
from tests.serving.clusters import SLOTS, ClusterNode, cluster, follows, in_step, url_of
from tests.serving.faults import FULL, Proxy, frozen, insist, wait_until
from tests.serving.inside import inside

PARTITIONS = 16
TIMEOUT_MS = 100
WRITE_TIMEOUT_S = 1.0  # of the log and of the profiles, each of which waits for a frozen node once
BACK_S = 2.0
COMPILE_S = 120.0  # the first answer compiles
ROUNDS = 5 if FULL else 1
AWAY_S = 5.0 if FULL else 0.5
ASKERS = 4
PEOPLE = [f"p{number}" for number in range(40)]
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]
FUTURE = 4_000_000_000_000


def is_of(node: int, subject: str) -> bool:
    """Whether a person's partition is on the node of that number."""
    return key_slot(partition_prefix(partition_of(subject, PARTITIONS))) * 3 // SLOTS == node


HERE = [person for person in PEOPLE if is_of(1, f"u:{person}")]
OTHERS = [person for person in PEOPLE if person not in HERE]


def personal(client: Client, person: str, timeout_s: float = 60.0) -> bool:
    """Whether an answer, which comes in time, is personal; marked where it is not."""
    slate = client.recommend(user_id=person, page_size=5, timeout_s=timeout_s)
    assert len(slate.items) == 5
    assert bool(slate.degraded) == (slate.rung == common_pb2.RUNG_POPULAR)
    return slate.rung == common_pb2.RUNG_SEQUENCE


@dataclass(frozen=True)
class Answer:
    """Who asked, when (s), when the answer came, and whether it was personal."""

    person: str
    asked: float
    answered: float
    personal: bool


class Askers:
    """Some people of the node in trouble who ask all the time, each by a thread."""

    def __init__(self, client: Client, deadline_s: float) -> None:
        self.answers: list[Answer] = []
        self._client, self.deadline_s = client, deadline_s
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(ASKERS)
        self._asking: list[Future[None]] = []

    def __enter__(self) -> Self:
        self._asking = [self._pool.submit(self._ask, person) for person in HERE[:ASKERS]]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        for asking in self._asking:
            asking.result()

    def _ask(self, person: str) -> None:
        while not self._stop.is_set():
            asked = time.monotonic()
            found = personal(self._client, person, self.deadline_s)
            self.answers.append(Answer(person, asked, time.monotonic(), found))

    def all_since(self, moment: float, wanted: bool) -> float:
        """Waits until each has had such an answer after a moment; seconds from there to the last of these."""

        def first(person: str) -> float | None:
            own = (one.answered for one in list(self.answers) if (one.person, one.personal) == (person, wanted))
            return next((answered for answered in own if answered > moment), None)

        wait_until(lambda: all(first(person) for person in HERE[:ASKERS]))
        return max(first(person) or 0.0 for person in HERE[:ASKERS]) - moment

    def late(self) -> int:
        """How many answers came after their deadline."""
        return sum(one.answered - one.asked > self.deadline_s for one in self.answers)

    def slowest(self) -> float:
        """Longest time that an answer took."""
        return max(one.answered - one.asked for one in self.answers)


@contextlib.contextmanager
def killed(node: ClusterNode, front: Proxy | None) -> Iterator[None]:
    """SIGKILL; comes back when it is over."""
    node.kill()
    try:
        yield
    finally:
        node.start()


@contextlib.contextmanager
def stopped(node: ClusterNode, front: Proxy | None) -> Iterator[None]:
    """SIGSTOP: it neither answers nor closes a connection."""
    with frozen(node):
        yield


@contextlib.contextmanager
def cut(node: ClusterNode, front: Proxy | None) -> Iterator[None]:
    """The others see it, its clients do not."""
    assert front
    with front.cut():
        yield


@dataclass
class Stage:
    """A service on a cluster, each node behind a proxy; everybody has done something.

    Attributes:
        client: A client of the service.
        nodes: The nodes; the second is the one in trouble.
        fronts: The proxies, in that order.
        deadline_s: What callers give an answer: 2 s, or 50 times what it takes when all is well.
    """

    client: Client
    nodes: list[ClusterNode]
    fronts: list[Proxy]
    deadline_s: float = 60.0

    def key(self, person: str) -> bytes:
        """Of a profile."""
        with connect(self.nodes[0].url, 5) as client:
            return ProfileStore(client, PARTITIONS).key_of(f"u:{person}")

    def missed(self, name: str) -> list[str]:
        """Sends an event of everybody, the same for a name; whose is UNAVAILABLE, while the others' are in."""
        sent = [event(person, "i4", "view_item", event_id=f"{name}-{person}") for person in PEOPLE]
        found = dict(zip(PEOPLE, (one.code for one in self.client.ingest(sent)), strict=True))
        assert set(found.values()) <= {0, UNAVAILABLE}
        return [person for person, code in found.items() if code]

    def counts(self) -> list[int]:
        """How many events everybody's profile has."""
        return [self.client.get_profile(person).event_count for person in PEOPLE]


@contextlib.contextmanager
def staged(world, folder, *, replica: bool = False) -> Iterator[Stage]:
    fronts: list[Proxy] = []

    @contextlib.contextmanager
    def front(node: ClusterNode) -> Iterator[int]:
        with Proxy(node) as proxy:
            fronts.append(proxy)
            yield proxy.port

    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(cluster(folder, "events", front, replica=replica))
        url = url_of(nodes[:3])
        service = stack.enter_context(inside(world, url, url, redis_timeout_ms=TIMEOUT_MS))
        stage = Stage(stack.enter_context(service.client()), nodes, fronts)
        assert stage.missed("first") == []
        wait_until(lambda: all(personal(stage.client, person) for person in PEOPLE), COMPILE_S)
        begun = time.monotonic()
        assert all(personal(stage.client, person) for person in OTHERS)
        stage.deadline_s = max(2.0, 50 * ASKERS * (time.monotonic() - begun) / len(OTHERS))
        yield stage


@pytest.fixture(scope="module")
def stage(world, tmp_path_factory):
    with staged(world, tmp_path_factory.mktemp("cluster")) as found:
        yield found


@pytest.mark.parametrize("trouble", [killed, stopped, cut], ids=lambda trouble: trouble.__name__)
def test_a_node_that_is_away_is_missed_by_its_own_people_only(stage, trouble, record_property):
    node, key, backs, written, asked = stage.nodes[1], stage.key(HERE[0]), [], [], []
    counts = stage.counts()
    for number in range(ROUNDS):
        name = f"{trouble.__name__}{number}"
        with Askers(stage.client, stage.deadline_s) as askers:
            askers.all_since(time.monotonic(), True)
            usual = askers.slowest()
            with trouble(node, stage.fronts[1]):
                askers.all_since(time.monotonic(), False)
                noticed = time.monotonic()
                wait_until(lambda: [person for person in PEOPLE if personal(stage.client, person)] == OTHERS)
                wait_until(lambda name=name: stage.missed(name) == HERE)
                time.sleep(AWAY_S)
                over = time.monotonic()
            assert not [one for one in askers.answers if one.personal and one.asked > noticed and one.answered < over]
            wait_until(lambda: node.has(key))
            there = time.monotonic()
            backs.append(askers.all_since(there, True))
            wait_until(lambda name=name: not stage.missed(name))
            written.append(time.monotonic() - there)
            assert backs[-1] < BACK_S + usual
            assert written[-1] < BACK_S + 2 * WRITE_TIMEOUT_S + 4 * usual
        asked.append(askers)
    report(record_property, trouble.__name__, asked, {"personal_again_s": backs, "writes_s": written})
    # Everybody's event of each round is there once, however often it was sent.
    wait_until(lambda: stage.counts() == [count + ROUNDS for count in counts])


def report(
    record_property: Callable[[str, Any], None], name: str, asked: list[Askers], seconds: dict[str, list[float]]
) -> None:
    found = {name: max(values) for name, values in seconds.items()}
    answers, late = sum(len(one.answers) for one in asked), sum(one.late() for one in asked)
    slowest = max(one.slowest() for one in asked)
    print(f"{name}: {answers} answers, {late} late, the slowest in {slowest:.2f} s, {found}")
    about = {"trouble": name, "rounds": len(asked), "answers": answers, "late": late, "slowest_s": slowest}
    record_property("cluster", {**about, "deadline_s": asked[0].deadline_s, **found})


@pytest.mark.parametrize("trouble", [killed, stopped], ids=lambda trouble: trouble.__name__)
def test_a_replica_takes_over(world, tmp_path, trouble, record_property):
    with staged(world, tmp_path, replica=True) as stage, Askers(stage.client, stage.deadline_s) as askers:
        client, master, replica, key = stage.client, stage.nodes[1], stage.nodes[3], stage.key(HERE[0])
        askers.all_since(time.monotonic(), True)
        usual = askers.slowest()
        wait_until(lambda: in_step(master, replica))
        begun = time.monotonic()
        with trouble(master, stage.fronts[1]):
            wait_until(lambda: replica.has(key))
            there = time.monotonic()
            back = askers.all_since(there, True)
            wait_until(lambda: not stage.missed("without the master"))
            written = time.monotonic() - there
            assert back < BACK_S + usual
            assert written < BACK_S + 2 * WRITE_TIMEOUT_S + 4 * usual
            assert all(personal(client, person) for person in PEOPLE)
        wait_until(lambda: follows(master))
        after = time.monotonic()
        wait_until(lambda: all(personal(client, person) for person in PEOPLE))
        wait_until(lambda: not stage.missed("as a replica"))
        # The replica was in step: what was acknowledged before, and what was taken since, is there once.
        wait_until(lambda: stage.counts() == [3] * len(PEOPLE))
        askers.all_since(after, True)
    seconds = {"promoted_s": [there - begun], "personal_again_s": [back], "writes_s": [written]}
    report(record_property, f"{trouble.__name__}, a replica takes over", [askers], seconds)


@pytest.mark.parametrize("wanted", [0, 1], ids=["no-replica-wanted", "one-replica-wanted"])
def test_what_a_failover_may_lose(tmp_path, wanted):
    """The replica hears nothing any more, then the master dies: what was acknowledged in between is gone.

    `min-replicas-to-write 1` with a short `min-replicas-max-lag` has it refused instead, but for that lag.
    """
    with cluster(tmp_path, "events", replica=True) as nodes, connect(url_of(nodes[:3]), 5.0) as client:
        master, replica = nodes[1], nodes[3]
        subject = next(f"u:p{number}" for number in range(100) if is_of(1, f"u:p{number}"))
        for node in (master, replica):
            node.say("CONFIG", "SET", "min-replicas-to-write", wanted, "min-replicas-max-lag", 1)
        log = EventLog(client, PARTITIONS, cooldown_s=0.0)
        log.open()

        def taken(number: int) -> bool:
            record = make_records(1, 0, 0, FUTURE, np.nan, 1).tobytes()
            [one] = log.append([LoggedEvent(subject, f"e{number}", record, b"{}")])
            assert one.error is None or isinstance(one.error, EventLogUnavailable)
            return one.error is None

        def logged() -> set[str]:
            return {entry.event_id for piece in log.history(subject) for entry in piece}

        wait_until(lambda: taken(0))
        wait_until(lambda: in_step(master, replica))
        with frozen(replica):
            master.say("CLIENT", "KILL", "TYPE", "replica")  # or it finds in its socket what it did not read yet
            acknowledged = {f"e{number}" for number in range(10, 20) if _taken(taken, number)}
            master.kill()
        wait_until(lambda: replica.say("ROLE")[0] == b"master")
        found = insist(logged)
        assert "e0" in found
        assert len(acknowledged) == (0 if wanted else 10)
        assert not acknowledged & found
        master.start()
        wait_until(lambda: follows(master))
        for number in range(10, 20):  # who was refused asks again, and is taken
            wait_until(lambda number=number: taken(number))
        assert {f"e{number}" for number in range(10, 20)} <= logged()


def _taken(taken: Callable[[int], bool], number: int) -> bool:
    try:
        return taken(number)
    except EventLogUnavailable:
        return False
