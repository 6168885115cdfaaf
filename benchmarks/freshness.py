"""From an event to the next answer: how long until it counts, and whether it counts every time, on any worker.

Each turn writes an event through one worker of a running service and asks another one, naming the `profile_version`
that the write returned. The event has to be in the features of that answer. An event is visible to everybody from the
moment its write is answered with `applied`: the answers prove that.

How long it takes is compared with bare round trips of the same process to the same two servers, in between, so that a
slow moment of the machine hits all of them, and by the same quick client that the service uses. There are two, for they
promise different things: a GET, which touches no disk, and an XADD that is on disk before it is answered, as every
event is. A bare gRPC call that does nothing stands beside them: neither of the two has a service around it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import operator
import os
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import redis
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.report import BenchmarkError, facts
from benchmarks.service import running
from features.bundle import open_bundle
from features.clock import now_ms
from features.keys import event_type_key, item_key
from features.profile import ENTRY, make_records
from features.vocabulary import Vocabulary
from penchant.channels import channel_options
from penchant.client import Client, event
from penchant.v1 import common_pb2, event_pb2, ranking_pb2
from serving.redis.client import PipelinedConnection, connect_one
from serving.stores.event_log import EventLog
from serving.stores.log_entries import LoggedEvent
from serving.stores.profiles import ProfileStore

REGULARS = 16
"""People who come again and again, so that their tails are folded meanwhile; in every other turn somebody new comes."""

LIMIT = 5.0
"""Most that the 99th percentile until an event is visible may be, in 99th percentiles of a bare round trip."""

FLOORS = ("get", "durable_xadd")
"""The bare round trips that others are compared with."""

TIMED = ("stores", "service", "answer")
"""What is compared with them."""

CANDIDATES = 3
"""Items that an answer ranks: what is measured is not the ranking."""

_SAMPLES = 1000
_TIMEOUT_S = 60.0
_ATTEMPTS = 200
_WARM_UP = 50
_ESTABLISHED = "01"


def freshness(bundle: Path, *, pairs: int = 2000, callers: int = 1) -> dict[str, Any]:
    """Measures a service of two workers with embedded Redis.

    Args:
        bundle: Directory of the bundle.
        pairs: Number of events, each followed by an answer of the other worker.
        callers: Number of callers at once, each of whom waits for its answer; with several, latencies hold queues too.

    Returns:
        `pairs`, `callers`, `pairs_per_second`, `faults` {what was wrong: number} (empty where every event counted),
        `latency_ms` {what: {p50, p99}}, `ratio` {bare round trip: {what: {p50, p99}}}, `limit` of a ratio at p99,
        `within_limit` {bare round trip: {what: bool}}, and the circumstances. What is timed:
        `get` (a bare GET at the profiles Redis), `durable_xadd` (a bare XADD at the events Redis, synced to disk),
        `call` (a gRPC call that does nothing), `stores` (an event is appended, applied and read back by Penchant's own
        code without a service around it), `service` (a caller sends an event, until it hears that every worker sees
        it), `answer` (until another worker's answer that contains it has come as well).

    Raises:
        BundleError: The bundle is damaged.
        BenchmarkError: The workers cannot be told apart.
        ServiceError: The service does not start.
    """
    vocabulary = Vocabulary.open(open_bundle(bundle).path / "vocabulary.arrow")
    items = vocabulary.ids(np.arange(min(len(vocabulary), 1000)))
    with contextlib.ExitStack() as stack:
        state = stack.enter_context(tempfile.TemporaryDirectory())
        ready = stack.enter_context(running(bundle, "--workers", "2", "--state-dir", state))
        clients = [stack.enter_context(client_of(ready, worker)) for worker in ready["workers"]]
        bare = [stack.enter_context(_bare(ready))]
        read_your_writes(clients, items, _WARM_UP, bare)
        begun = time.perf_counter()
        with ThreadPoolExecutor(callers) as pool:
            shares = [len(range(caller, pairs, callers)) for caller in range(callers)]
            told = [_progress(share) if caller == 0 else None for caller, share in enumerate(shares)]
            work = functools.partial(read_your_writes, clients, items, beside=bare)
            parts = list(pool.map(lambda share, tell: work(share, tell=tell), shares, told))
        seconds = time.perf_counter() - begun
    found = functools.reduce(operator.iadd, parts)
    latency = {name: _percentiles(times) for name, times in found.times.items()}
    ratio = {floor: {name: _ratio(latency[name], latency[floor]) for name in TIMED} for floor in FLOORS}
    return {
        "pairs": found.pairs,
        "callers": callers,
        "pairs_per_second": round(found.pairs / seconds, 1),
        "faults": dict(found.faults),
        "latency_ms": latency,
        "ratio": ratio,
        "limit": LIMIT,
        "within_limit": {
            floor: {name: one["p99"] <= LIMIT for name, one in ratios.items()} for floor, ratios in ratio.items()
        },
        "method": "closed loop, two workers, bare round trips between the turns",
        **facts(),
    }


@dataclass
class Found:
    """What came of some pairs: their number, what was wrong how often, and how long everything took, in seconds."""

    pairs: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __iadd__(self, other: Self) -> Self:
        """Takes what came of other pairs as well."""
        self.pairs += other.pairs
        self.faults += other.faults
        for name, times in other.times.items():
            self.times[name] += times
        return self


def read_your_writes(
    clients: Sequence[Client],
    items: Sequence[str],
    pairs: int,
    beside: Sequence[Mapping[str, Callable[[], object]]] = (),
    tell: Callable[[int], None] | None = None,
) -> Found:
    """Writes through one client and reads through the next, which reaches another worker.

    Args:
        clients: One per worker.
        items: Ids that the catalogue knows.
        pairs: Number of turns.
        beside: What else is timed in between, by name.
        tell: Hears in between how many turns are over.
    """
    found, run = Found(), uuid.uuid4().hex
    every = max(1, pairs // _SAMPLES)
    for turn in range(pairs):
        writer, reader = clients[turn % len(clients)], clients[(turn + 1) % len(clients)]
        regular = turn % 4 >= 2
        person = f"{run}-{turn // 4 % REGULARS}-{turn % 2}" if regular else f"{run}-new-{turn}"
        item = items[turn % len(items)]
        begun = time.perf_counter()
        [status] = writer.ingest([event(person, item, "view_item")])
        heard = time.perf_counter()
        slate = reader.rank(items[:CANDIDATES], user_id=person, min_profile_version=status.profile_version)
        answered = time.perf_counter()
        found.times["service"].append(heard - begun)
        found.times["answer"].append(answered - begun)
        found.pairs += 1
        found.faults.update(faults(status, slate))
        if turn % every:
            continue
        if tell:
            tell(turn)
        for name, call in (pair for calls in beside for pair in calls.items()):
            with _timed(found.times[name]):
                call()
        newest = reader.get_profile(person)
        if newest.profile_version != status.profile_version or newest.events[0].item_id != item:
            found.faults["profile"] += 1
    return found


def _progress(turns: int) -> Callable[[int], None]:
    """Says on stderr how far one caller is, at every tenth of their turns."""
    said = 0

    def tell(turn: int) -> None:
        nonlocal said
        if 10 * turn // turns > said:
            said = 10 * turn // turns
            print(f"freshness: {10 * said} %", file=sys.stderr, flush=True)

    return tell


def faults(status: event_pb2.EventStatus, slate: ranking_pb2.Slate) -> Iterator[str]:
    """What is wrong with an answer that comes after a write; nothing where the event is in its features.

    The version of a profile is that of its newest event, and only a history that is not empty reaches the highest rung.
    """
    if status.code or not status.applied:
        yield "not_applied"
    if slate.profile_version < status.profile_version or slate.rung != common_pb2.RUNG_SEQUENCE:
        yield "not_in_the_features"
    if slate.degraded:
        yield "degraded"


def client_of(ready: Mapping[str, Any], worker: int) -> Client:
    """A client whose one connection reaches this worker; connections are spread by the kernel, so it takes some.

    Args:
        ready: What the service said when it was.
        worker: Process id.

    Raises:
        BenchmarkError: None of many connections reached it, or the system does not say where they end.
    """
    port = int(ready["listen"].rpartition(":")[2])
    for _ in range(_ATTEMPTS):
        before = _connections(os.getpid())
        client = Client(ready["listen"], channels=1, timeout_s=_TIMEOUT_S)
        client.wait_ready()
        client.get_profile(uuid.uuid4().hex)
        mine = {near for near, far in _connections(os.getpid()) - before if far == port}
        if mine & {far for near, far in _connections(worker) if near == port}:
            return client
        client.close()
    raise BenchmarkError(f"no connection reached worker {worker}: run this on Linux, on the machine of the service")


def _connections(pid: int) -> set[tuple[int, int]]:
    """The local and the remote port of every TCP connection of a process."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            sockets.add(os.readlink(descriptor))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text(encoding="utf-8").splitlines()[1:]:
            words = line.split()
            if words[3] == _ESTABLISHED and f"socket:[{words[9]}]" in sockets:
                near, far = (int(word.rpartition(":")[2], 16) for word in words[1:3])
                found.add((near, far))
    return found


@contextlib.contextmanager
def _bare(ready: Mapping[str, Any]) -> Iterator[dict[str, Callable[[], object]]]:
    """What is timed beside the turns: bare commands, a bare call, and Penchant's stores without a service."""
    urls = ready["redis"], ready["events_redis"]
    with (
        connect_one(urls[0], _TIMEOUT_S) as profiles,
        connect_one(urls[1], _TIMEOUT_S) as events,
        grpc.insecure_channel(ready["listen"], options=channel_options(ready["listen"])) as channel,
    ):
        reading, writing, nothing = (
            PipelinedConnection(profiles),
            PipelinedConnection(events),
            health_pb2_grpc.HealthStub(channel),
        )
        reading.ask("SET", "bare", bytes(ENTRY.itemsize))
        now = now_ms()
        record = make_records(item_key("bare"), 0, 0, now, 0, event_type_key("view_item"))[0].tobytes()
        payload = json.dumps({"item_id": "bare", "event_type": "view_item", "timestamp": now}).encode()
        one = LoggedEvent("", "bare", record, payload)
        yield {
            "get": lambda: reading.ask("GET", "bare"),
            "durable_xadd": lambda: writing.ask("XADD", "bare", "MAXLEN", 1000, "*", "r", record),
            "call": lambda: nothing.Check(health_pb2.HealthCheckRequest()),
            "stores": _stores(profiles, events, one),
        }


def _stores(profiles: redis.Redis, events: redis.Redis, one: LoggedEvent) -> Callable[[], object]:
    """Appends an event of somebody new, applies it and reads it back."""
    log, store = EventLog(events), ProfileStore(profiles)
    log.open()

    def call() -> None:
        subject = f"u:{uuid.uuid4().hex}"
        [appended] = log.append([dataclasses.replace(one, subject=subject)])
        store.apply(subject, [(appended.log_id, appended.record)])
        if store.read(subject).version != appended.log_id:
            raise BenchmarkError("an event that was applied is not in the profile")

    return call


@contextlib.contextmanager
def _timed(times: list[float]) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    times.append(time.perf_counter() - begun)


def _ratio(mine: Mapping[str, float], bare: Mapping[str, float]) -> dict[str, float]:
    return {name: round(mine[name] / bare[name], 2) for name in mine}


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(np.array(seconds) * 1000, [50, 99])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}
