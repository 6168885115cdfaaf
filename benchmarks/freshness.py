"""From an event to the next slate: the time until the event counts, and whether it counts every time, on any worker.

Each pair writes an event through one worker of a running service and requests a slate from another one, naming the
`profile_version` that the write returned. The event has to be in the features of that slate. An event is visible to
every worker from the moment its write is answered with `applied`: the slates prove that.

The time is compared with bare round trips of the same process to the same two servers, taken in between, so that a slow
moment of the machine hits all of them, and by the same client that the service uses. There are two of them because they
promise different things: a GET, which touches no disk, and an XADD that is on disk before it is answered, as every
event is. A gRPC call that does nothing is timed as well, because neither of the two has a service around it.
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
from features.records import ENTRY, make_records
from features.subjects import known
from features.vocabulary import Vocabulary
from penchant.channels import channel_options
from penchant.client import Client, event
from penchant.v1 import common_pb2, event_pb2, ranking_pb2
from serving.redis.client import connect_one
from serving.redis.connection import PipelinedConnection
from serving.stores.event_log import EventLog
from serving.stores.log_entries import LoggedEvent
from serving.stores.profiles import ProfileStore

REGULARS = 16
"""Users who return again and again, so that their tails are folded meanwhile; every other pair has a new user."""

LIMIT = 5.0
"""Highest 99th percentile until an event is visible, in 99th percentiles of a bare round trip."""

FLOORS = ("get", "durable_xadd")
"""The bare round trips that the times are compared with."""

TIMED = ("stores", "service", "answer")
"""The times that are compared with them."""

CANDIDATES = 3
"""Items that a slate ranks: few, because the ranking is not measured here."""

_SAMPLES = 1000
_TIMEOUT_S = 60.0
_ATTEMPTS = 200
_WARM_UP = 50
_ESTABLISHED = "01"


def freshness(bundle: Path, *, pairs: int = 2000, callers: int = 1) -> dict[str, Any]:
    """Measures a service of two workers with embedded Redis.

    Args:
        bundle: Directory of the bundle.
        pairs: Number of events, each followed by a slate of the other worker.
        callers: Number of callers at once, each of which waits for its slate; with several, latencies hold queues too.

    Returns:
        `pairs`, `callers`, `pairs_per_second`, `faults` {kind: number} (empty if every event counted), `latency_ms`
        {time: {p50, p99}}, `ratio` {bare round trip: {time: {p50, p99}}}, `limit` of a ratio at p99, `within_limit`
        {bare round trip: {time: bool}}, and the circumstances. The times are
        `get` (a bare GET at the profiles Redis), `durable_xadd` (a bare XADD at the events Redis, synced to disk),
        `call` (a gRPC call that does nothing), `stores` (an event is appended, applied and read back by Penchant's own
        code without a service around it), `service` (a caller sends an event, until it hears that every worker sees
        it), `answer` (until another worker's slate that contains it has come as well).

    Raises:
        BundleError: The bundle is damaged.
        BenchmarkError: The workers cannot be told apart.
        ServiceError: The service does not start.
    """
    items = _item_ids(bundle)
    with contextlib.ExitStack() as stack:
        state = stack.enter_context(tempfile.TemporaryDirectory())
        ready = stack.enter_context(running(bundle, "--workers", "2", "--state-dir", state))
        clients = [stack.enter_context(client_of(ready, worker)) for worker in ready["workers"]]
        floors = [stack.enter_context(_floors(ready))]
        read_your_writes(clients, items, _WARM_UP, floors)
        begun = time.perf_counter()
        results = _at_once(functools.partial(read_your_writes, clients, items, floors=floors), pairs, callers)
        seconds = time.perf_counter() - begun
    return {
        "callers": callers,
        "pairs_per_second": round(pairs / seconds, 1),
        **_figures(results),
        "method": "closed loop, two workers, bare round trips between the pairs",
        **facts(),
    }


def _item_ids(bundle: Path) -> list[str]:
    vocabulary = Vocabulary.open(open_bundle(bundle).path / "vocabulary.arrow")
    return vocabulary.ids(np.arange(min(len(vocabulary), 1000)))


def _at_once(work: Callable[..., PairResults], pairs: int, callers: int) -> PairResults:
    """Shares the pairs among callers at once; the first one reports the progress of all."""
    shares = [len(range(caller, pairs, callers)) for caller in range(callers)]
    hooks = [_progress(share) if caller == 0 else None for caller, share in enumerate(shares)]
    with ThreadPoolExecutor(callers) as pool:
        parts = list(pool.map(lambda share, hook: work(share, on_sample=hook), shares, hooks))
    return functools.reduce(operator.iadd, parts)


@dataclass
class PairResults:
    """The results of pairs: their number, the number of faults by kind, and the times in seconds."""

    pairs: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __iadd__(self, other: Self) -> Self:
        """Adds the results of other pairs."""
        self.pairs += other.pairs
        self.faults += other.faults
        for name, times in other.times.items():
            self.times[name] += times
        return self


def _figures(results: PairResults) -> dict[str, Any]:
    latency = {name: _percentiles(times) for name, times in results.times.items()}
    ratio = {floor: {name: _ratio(latency[name], latency[floor]) for name in TIMED} for floor in FLOORS}
    return {
        "pairs": results.pairs,
        "faults": dict(results.faults),
        "latency_ms": latency,
        "ratio": ratio,
        "limit": LIMIT,
        "within_limit": {
            floor: {name: figures["p99"] <= LIMIT for name, figures in ratios.items()}
            for floor, ratios in ratio.items()
        },
    }


def read_your_writes(
    clients: Sequence[Client],
    items: Sequence[str],
    pairs: int,
    floors: Sequence[Mapping[str, Callable[[], object]]] = (),
    on_sample: Callable[[int], None] | None = None,
) -> PairResults:
    """Writes through one client and reads through the next, which reaches another worker.

    Args:
        clients: One per worker.
        items: Ids that the catalogue knows.
        pairs: Number of pairs of a write and a read.
        floors: Calls that are timed in between, by name.
        on_sample: Called now and then with the number of pairs so far.
    """
    results, run = PairResults(), uuid.uuid4().hex
    # Floors are timed at some pairs only: their own fsync would slow every event down.
    every = max(1, pairs // _SAMPLES)
    for pair in range(pairs):
        writer, reader = clients[pair % len(clients)], clients[(pair + 1) % len(clients)]
        # Two pairs of new users, then two of regulars, so that either worker writes for both kinds.
        regular = pair % 4 >= 2
        user = f"{run}-{pair // 4 % REGULARS}-{pair % 2}" if regular else f"{run}-new-{pair}"
        item = items[pair % len(items)]
        status = _write_and_read(writer, reader, user, item, items[:CANDIDATES], results)
        if pair % every:
            continue
        if on_sample:
            on_sample(pair)
        _time_floors(floors, results)
        # The slate proves that the history is not empty; the profile, that its newest event is this one.
        newest = reader.get_profile(user)
        if newest.profile_version != status.profile_version or newest.events[0].item_id != item:
            results.faults["profile"] += 1
    return results


def _write_and_read(
    writer: Client, reader: Client, user: str, item: str, candidates: Sequence[str], results: PairResults
) -> event_pb2.EventStatus:
    begun = time.perf_counter()
    [status] = writer.ingest([event(user, item, "view_item")])
    applied = time.perf_counter()
    slate = reader.rank(candidates, user_id=user, min_profile_version=status.profile_version)
    answered = time.perf_counter()
    results.times["service"].append(applied - begun)
    results.times["answer"].append(answered - begun)
    results.pairs += 1
    results.faults.update(faults(status, slate))
    return status


def _time_floors(floors: Sequence[Mapping[str, Callable[[], object]]], results: PairResults) -> None:
    for calls in floors:
        for name, call in calls.items():
            with _timed(results.times[name]):
                call()


def _progress(pairs: int) -> Callable[[int], None]:
    """Returns a hook that prints one caller's progress on stderr, at every tenth of its pairs."""
    printed = 0

    def hook(pair: int) -> None:
        nonlocal printed
        if 10 * pair // pairs > printed:
            printed = 10 * pair // pairs
            print(f"freshness: {10 * printed} %", file=sys.stderr, flush=True)

    return hook


def faults(status: event_pb2.EventStatus, slate: ranking_pb2.Slate) -> Iterator[str]:
    """Yields the faults of a slate that follows a write; none if the event is in its features.

    The version of a profile is that of its newest event, and only a history that is not empty reaches the highest rung.
    """
    if status.code or not status.applied:
        yield "not_applied"
    if slate.profile_version < status.profile_version or slate.rung != common_pb2.RUNG_SEQUENCE:
        yield "not_in_the_features"
    if slate.degraded:
        yield "degraded"


def client_of(ready: Mapping[str, Any], worker: int) -> Client:
    """Returns a client whose only connection reaches a worker.

    Args:
        ready: The ready line of the service.
        worker: Process id.

    Raises:
        BenchmarkError: None of many connections reached it, or the system does not say where they end.
    """
    port = int(ready["listen"].rpartition(":")[2])
    # The kernel chooses the worker of each new connection, so one is tried after another.
    for _ in range(_ATTEMPTS):
        before = _connections(os.getpid())
        client = Client(ready["listen"], channels=1, timeout_s=_TIMEOUT_S)
        client.wait_ready()
        client.get_profile(uuid.uuid4().hex)
        local_ports = {near for near, far in _connections(os.getpid()) - before if far == port}
        if local_ports & {far for near, far in _connections(worker) if near == port}:
            return client
        client.close()
    raise BenchmarkError(f"no connection reached worker {worker}: run this on Linux, on the machine of the service")


def _connections(pid: int) -> set[tuple[int, int]]:
    """Returns the local and the remote port of every TCP connection of a process."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            sockets.add(os.readlink(descriptor))
    connections = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text(encoding="utf-8").splitlines()[1:]:
            words = line.split()
            if words[3] == _ESTABLISHED and f"socket:[{words[9]}]" in sockets:
                near, far = (int(word.rpartition(":")[2], 16) for word in words[1:3])
                connections.add((near, far))
    return connections


@contextlib.contextmanager
def _floors(ready: Mapping[str, Any]) -> Iterator[dict[str, Callable[[], object]]]:
    """Yields the calls that are timed between the pairs: bare commands, an empty call, the stores without a service."""
    urls = ready["redis"], ready["events_redis"]
    with (
        connect_one(urls[0], _TIMEOUT_S) as profiles,
        connect_one(urls[1], _TIMEOUT_S) as events,
        grpc.insecure_channel(ready["listen"], options=channel_options(ready["listen"])) as channel,
    ):
        reading, writing = PipelinedConnection(profiles), PipelinedConnection(events)
        health = health_pb2_grpc.HealthStub(channel)
        reading.ask("SET", "bare", bytes(ENTRY.itemsize))
        now = now_ms()
        record = make_records(item_key("bare"), 0, 0, now, 0, event_type_key("view_item"))[0].tobytes()
        payload = json.dumps({"item_id": "bare", "event_type": "view_item", "timestamp": now}).encode()
        template = LoggedEvent("", "bare", record, payload)
        yield {
            "get": lambda: reading.ask("GET", "bare"),
            # Trimmed as it goes, so that the log of the benchmark's own stream stays small.
            "durable_xadd": lambda: writing.ask("XADD", "bare", "MAXLEN", 1000, "*", "r", record),
            "call": lambda: health.Check(health_pb2.HealthCheckRequest()),
            "stores": _stores(profiles, events, template),
        }


def _stores(profiles: redis.Redis, events: redis.Redis, template: LoggedEvent) -> Callable[[], object]:
    """Returns a call that appends an event of a new user, applies it and reads it back."""
    log, store = EventLog(events), ProfileStore(profiles)
    log.open()

    def call() -> None:
        # A new user each time: a profile with a long tail would cost more to read.
        subject = known(uuid.uuid4().hex)
        [appended] = log.append([dataclasses.replace(template, subject=subject)])
        store.apply(subject, [(appended.log_id, appended.record)])
        if store.read(subject).version != appended.log_id:
            raise BenchmarkError("an event that was applied is not in the profile")

    return call


@contextlib.contextmanager
def _timed(times: list[float]) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    times.append(time.perf_counter() - begun)


def _ratio(times: Mapping[str, float], floor: Mapping[str, float]) -> dict[str, float]:
    return {name: round(times[name] / floor[name], 2) for name in times}


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(np.array(seconds) * 1000, [50, 99])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}
