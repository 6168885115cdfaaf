"""The cost of a profile: its bytes, reading and folding it, applying events to it, and its growth with more users.

Everything is measured on embedded servers of its own and compared with a bare command that alternates with it: a read
with a GET of a string as long, an ingested event with the server's own commands.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import redis

from benchmarks.report import BenchmarkError, facts
from features.clock import now_ms
from features.keys import event_type_key
from features.profile import Profile, empty, fold
from features.records import RECORD, Records, make_records
from features.subjects import known
from serving.redis.client import connect_one
from serving.redis.connection import PipelinedConnection
from serving.redis.embedded import RedisServer
from serving.stores.event_log import EventLog
from serving.stores.keys import LIVE
from serving.stores.log_entries import LoggedEvent
from serving.stores.profiles import ProfileStore

FEW = 10_000
"""Users in the smaller population."""
TAIL = 256
"""Events that are folded at a read."""
BYTES_PER_USER = 300
SHARE_OF_RAW = 1.3
BATCH = 500
BATCHES = 40
_CHUNK = 1000
_ITEMS, _CREATORS, _CATEGORIES = 1_000_000, 20_000, 40
_KINDS = np.array([event_type_key(name) for name in ("view_item_list", "view_item", "like", "purchase", "hide")])
_OFTEN = (0.5, 0.4, 0.05, 0.04, 0.01)
_NOW = 1_700_000_000_000


def profiles(*, users: int = 1_000_000, events: int = 100, reads: int = 2000) -> dict[str, Any]:
    """Stores made-up users through the scripts that serve, and measures on them.

    Args:
        users: Number of users.
        events: Events of each, folded.
        reads: Reads of each measurement of reading.

    Returns:
        `bytes_per_user` of Redis memory, the `limit_bytes_per_user` and their `ratio_to_limit`; `few` and `many`
        {`users`, `read_us`, `get_us`, `ratio`} for the smaller and the whole population; `tail` the same with 256
        events to fold, and `fold_us` of those alone; `ingest` {`events_per_core_second`, `bare_per_core_second`,
        `ratio`} for the log and for the profiles; and the circumstances.

    Raises:
        BenchmarkError: The server has not enough memory for so many.
    """
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # Half as much again as the limit allows, so that a profile too large is measured and not refused.
        room = int((users + FEW) * (SHARE_OF_RAW * events * RECORD.itemsize + BYTES_PER_USER) * 1.5) + (1 << 28)
        with (
            RedisServer(Path(folder), "profiles", max_memory=room) as server,
            RedisServer(Path(folder), "events") as log_server,
            connect_one(server.url, timeout_s=60.0) as client,
            connect_one(log_server.url, timeout_s=60.0) as log_client,
        ):
            # The files are not what is measured: writing gigabytes would only make the load slower.
            client.config_set("appendonly", "no")
            measured = _measure(client, log_client, users, events, reads)
    return {
        "users": users,
        "events": events,
        **measured,
        "seconds": round(time.monotonic() - begun, 1),
        "method": "embedded servers on unix sockets, one client; medians, alternating with the bare command; "
        "append-only file of the profiles off; a core's time is the client's plus the server's",
        **facts(),
    }


def _measure(client: redis.Redis, log_client: redis.Redis, users: int, events: int, reads: int) -> dict[str, Any]:
    store, draw = ProfileStore(client), np.random.default_rng(0)
    store.open()
    few = min(FEW, users)
    # The memory of the server itself is no cost of a profile.
    empty_server = _memory(client)
    store.put_states(_states(draw, range(few), events))
    # Before the others are stored: a read must not cost more in a larger population.
    few_read = _reading(client, store, few, reads)
    store.put_states(_states(draw, range(few, users), events))
    bytes_per_user = (_memory(client) - empty_server) / users
    limit = SHARE_OF_RAW * events * RECORD.itemsize + BYTES_PER_USER
    return {
        "bytes_per_user": round(bytes_per_user, 1),
        "raw_bytes_per_user": events * RECORD.itemsize,
        "limit_bytes_per_user": limit,
        "ratio_to_limit": round(bytes_per_user / limit, 4),
        "few": few_read,
        "many": _reading(client, store, users, reads),
        "tail": _tail(client, store, draw, reads),
        "ingest": {"profiles": _applying(client, store, draw, users), "log": _logging(log_client, draw, users)},
    }


def _subject(user: int) -> str:
    return known(f"bench-{user}")


def _history(draw: np.random.Generator, count: int) -> Records:
    """Returns events of users with tastes: a few categories and creators often, many seldom; pauses between visits."""
    category, creator = (1 + draw.zipf(1.3, count) % size for size in (_CATEGORIES, _CREATORS))
    pauses = draw.choice([20_000, 4_000_000, 90_000_000], count, p=[0.85, 0.1, 0.05])
    kinds = draw.choice(_KINDS, count, p=_OFTEN)
    return make_records(draw.integers(1, _ITEMS, count), category, creator, _NOW + np.cumsum(pauses), np.nan, kinds)


def _states(draw: np.random.Generator, users: range, events: int) -> Iterator[tuple[str, Profile]]:
    # Events are drawn for many users at once: a draw per user would take longer than the storing.
    for start in range(users.start, users.stop, _CHUNK):
        chunk = range(start, min(start + _CHUNK, users.stop))
        records = _history(draw, events * len(chunk))
        for place, user in enumerate(chunk):
            yield _subject(user), fold(empty(), records[place * events : (place + 1) * events], events)


def _memory(client: redis.Redis) -> int:
    return int(client.info("memory")["used_memory"])


def _reading(client: redis.Redis, store: ProfileStore, users: int, reads: int) -> dict[str, Any]:
    """Measures reads of random users, alternating with a GET of the same string."""
    subjects = [_subject(int(user)) for user in np.random.default_rng(1).integers(0, users, reads)]
    if not store.read(subjects[0]).count:
        raise BenchmarkError("a profile that was stored is missing: give the server more memory, or store fewer users")
    return {"users": users, **_compared_with_get(client, store, subjects)}


def _compared_with_get(client: redis.Redis, store: ProfileStore, subjects: list[str]) -> dict[str, Any]:
    connection = PipelinedConnection(client)
    keys = [store.key_of(subject) for subject in subjects]
    times = []
    for subject, key in zip(subjects, keys, strict=True):
        # The bare read comes second and finds the string in the cache: the ratio is the higher for it.
        times.append((_us(partial(store.read, subject)), _us(partial(connection.ask, b"GET", key))))
    read, bare = np.median(np.array(times), axis=0).tolist()
    return {"read_us": round(read, 1), "get_us": round(bare, 1), "ratio": round(read / bare, 2)}


def _tail(client: redis.Redis, store: ProfileStore, draw: np.random.Generator, reads: int) -> dict[str, Any]:
    """Measures reads of users with events that are not folded yet, and the folding alone."""
    subjects = [known(f"bench-tail-{number}") for number in range(20)]
    for subject in subjects:
        store.apply(subject, _entries(_history(draw, TAIL), LIVE))
    profile, records = store.read(subjects[0]), _history(draw, TAIL)
    # The same fold that a read does, without Redis.
    folds = [_us(lambda: fold(profile, records, 1)) for _ in range(reads)]
    reading = _compared_with_get(client, store, [subjects[at % len(subjects)] for at in range(reads)])
    return {"events": TAIL, **reading, "fold_us": round(float(np.median(folds)), 1)}


def _entries(records: Records, first: int) -> list[tuple[int, bytes]]:
    return [(first + at, record.tobytes()) for at, record in enumerate(records)]


def _applying(client: redis.Redis, store: ProfileStore, draw: np.random.Generator, users: int) -> dict[str, Any]:
    """Applies events to profiles, in batches of many users, against APPENDs of as many bytes to strings as long."""
    batches = []
    for number in range(BATCHES):
        records = _history(draw, BATCH)
        chosen = draw.choice(users, min(BATCH, users), replace=False)
        pairs = zip(chosen.tolist(), records[: chosen.size], strict=True)
        batches.append([(_subject(user), [(LIVE + number, record.tobytes())]) for user, record in pairs])
    keys = [[b"bare:" + store.key_of(subject) for subject, _ in batch] for batch in batches]
    connection, blob = PipelinedConnection(client), bytes(int(client.strlen(store.key_of(_subject(0)))))
    connection.ask_all([("SET", key, blob) for key in {key for batch in keys for key in batch}])

    def bare(at: int) -> None:
        pairs = zip(keys[at], batches[at], strict=True)
        connection.ask_all([("APPEND", key, entry[0].to_bytes(8, "big") + entry[1]) for key, (_, [entry]) in pairs])

    return _rates(client, lambda at: store.apply_many(batches[at]), bare, len(batches[0]))


def _logging(client: redis.Redis, draw: np.random.Generator, users: int) -> dict[str, Any]:
    """Appends events to the log, durable, against XADDs of the same fields to a stream that is synced alike."""
    log = EventLog(client)
    log.open()
    now = now_ms()
    batches = []
    for number in range(BATCHES):
        records = _history(draw, BATCH)
        records["timestamp"] = now
        subjects = map(_subject, draw.integers(0, users, BATCH).tolist())
        payload = b'{"event_type": "view_item", "item_id": "item-%d", "timestamp": 1700000000000, "user_id": "bench"}'
        pairs = enumerate(zip(subjects, records, strict=True))
        batches.append(
            [LoggedEvent(subject, f"{number}-{at}", r.tobytes(), payload % at) for at, (subject, r) in pairs]
        )

    connection = PipelinedConnection(client)

    # The same fields to one stream: what the log does on top is to recognise retries, and its partitions.
    def bare(at: int) -> None:
        connection.ask_all(
            [
                ("XADD", "bare", "*", "s", event.subject, "e", event.event_id, "r", event.record, "p", event.payload)
                for event in batches[at]
            ]
        )

    return _rates(client, lambda at: log.append(batches[at]), bare, BATCH)


def _rates(
    client: redis.Redis, measured: Callable[[int], object], bare: Callable[[int], object], size: int
) -> dict[str, Any]:
    """Returns events per second of a core, measured and bare; a core's time is the client's plus the server's."""
    # Processor time, not the clock: what else runs on the machine does not count.
    spent = np.zeros(2)
    for at in range(BATCHES):
        # Alternating, so that both meet the same state of the machine.
        for place, call in enumerate((measured, bare)):
            before = _core_seconds(client)
            call(at)
            if at:  # the first call loads the scripts
                spent[place] += _core_seconds(client) - before
    rate, bare_rate = (size * (BATCHES - 1) / spent).tolist()
    return {
        "events_per_core_second": round(rate),
        "bare_per_core_second": round(bare_rate),
        "ratio": round(bare_rate / rate, 2),
    }


def _core_seconds(client: redis.Redis) -> float:
    cpu = client.info("cpu")
    return time.process_time() + float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"])


def _us(call: Callable[[], object]) -> float:
    begun = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begun) / 1000
