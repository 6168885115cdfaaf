"""What a profile costs: its bytes, reading and folding it, bringing events into it, and whether more people cost more.

Everything is measured on embedded servers of its own and beside something bare that was measured in turn with it: a
read beside a GET of a string as long, an ingested event beside the server's own commands.
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
from features.profile import RECORD, Profile, Records, empty, fold, make_records
from serving.redis.client import PipelinedConnection, connect_one
from serving.redis.embedded import RedisServer
from serving.stores.event_log import EventLog
from serving.stores.keys import LIVE
from serving.stores.log_entries import LoggedEvent
from serving.stores.profiles import ProfileStore

FEW = 10_000
"""People in the smaller population."""
TAIL = 256
"""Events that are folded at a read."""
BYTES_A_PERSON = 300
SHARE_OF_RAW = 1.3
BATCH = 500
BATCHES = 40
_CHUNK = 1000
_ITEMS, _CREATORS, _CATEGORIES = 1_000_000, 20_000, 40
_KINDS = np.array([event_type_key(name) for name in ("view_item_list", "view_item", "like", "purchase", "hide")])
_OFTEN = (0.5, 0.4, 0.05, 0.04, 0.01)
_NOW = 1_700_000_000_000


def profiles(*, people: int = 1_000_000, events: int = 100, reads: int = 2000) -> dict[str, Any]:
    """Stores made-up people through the scripts that serve, and measures on them.

    Args:
        people: Number of people.
        events: Events of each, folded.
        reads: Turns of each measurement of reading.

    Returns:
        `bytes_per_person` of Redis memory, the `limit_bytes_per_person` and their `ratio_to_limit`; `few` and `many`
        {`people`, `read_us`, `get_us`, `ratio`} for the smaller and the whole population; `tail` the same with 256
        events to fold, and `fold_us` of those alone; `ingest` {`events_per_core_second`, `bare_per_core_second`,
        `ratio`} for the log and for the profiles; and the circumstances.

    Raises:
        BenchmarkError: The server has not enough memory for so many.
    """
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        room = int((people + FEW) * (SHARE_OF_RAW * events * RECORD.itemsize + BYTES_A_PERSON) * 1.5) + (1 << 28)
        with (
            RedisServer(Path(folder), "profiles", max_memory=room) as server,
            RedisServer(Path(folder), "events") as log_server,
            connect_one(server.url, timeout_s=60.0) as client,
            connect_one(log_server.url, timeout_s=60.0) as log_client,
        ):
            # The files are not what is measured: writing gigabytes would only make the load slower.
            client.config_set("appendonly", "no")
            measured = _measure(client, log_client, people, events, reads)
    return {
        "people": people,
        "events": events,
        **measured,
        "seconds": round(time.monotonic() - begun, 1),
        "method": "embedded servers on unix sockets, one client; medians of turns taken with the bare command; "
        "append-only file of the profiles off; a core's time is the client's plus the server's",
        **facts(),
    }


def _measure(client: redis.Redis, log_client: redis.Redis, people: int, events: int, reads: int) -> dict[str, Any]:
    store, draw = ProfileStore(client), np.random.default_rng(0)
    store.open()
    few = min(FEW, people)
    empty_server = _memory(client)
    store.put_states(_states(draw, range(few), events))
    few_read = _reading(client, store, few, reads)
    store.put_states(_states(draw, range(few, people), events))
    each = (_memory(client) - empty_server) / people
    limit = SHARE_OF_RAW * events * RECORD.itemsize + BYTES_A_PERSON
    return {
        "bytes_per_person": round(each, 1),
        "raw_bytes_per_person": events * RECORD.itemsize,
        "limit_bytes_per_person": limit,
        "ratio_to_limit": round(each / limit, 4),
        "few": few_read,
        "many": _reading(client, store, people, reads),
        "tail": _tail(client, store, draw, reads),
        "ingest": {"profiles": _applying(client, store, draw, people), "log": _logging(log_client, draw, people)},
    }


def _name(person: int) -> str:
    return f"u:bench-{person}"


def _history(draw: np.random.Generator, count: int) -> Records:
    """Events of people with tastes: a few categories and creators often, many seldom; visits with pauses between."""
    category, creator = (1 + draw.zipf(1.3, count) % size for size in (_CATEGORIES, _CREATORS))
    pauses = draw.choice([20_000, 4_000_000, 90_000_000], count, p=[0.85, 0.1, 0.05])
    kinds = draw.choice(_KINDS, count, p=_OFTEN)
    return make_records(draw.integers(1, _ITEMS, count), category, creator, _NOW + np.cumsum(pauses), np.nan, kinds)


def _states(draw: np.random.Generator, people: range, events: int) -> Iterator[tuple[str, Profile]]:
    for start in range(people.start, people.stop, _CHUNK):
        some = range(start, min(start + _CHUNK, people.stop))
        records = _history(draw, events * len(some))
        for place, person in enumerate(some):
            yield _name(person), fold(empty(), records[place * events : (place + 1) * events], events)


def _memory(client: redis.Redis) -> int:
    return int(client.info("memory")["used_memory"])


def _reading(client: redis.Redis, store: ProfileStore, people: int, reads: int) -> dict[str, Any]:
    """A read of somebody by chance, beside a GET of the same string, in turn."""
    chosen = [_name(int(person)) for person in np.random.default_rng(1).integers(0, people, reads)]
    if not store.read(chosen[0]).count:
        raise BenchmarkError("a profile that was stored is not there: has the server too little memory?")
    return {"people": people, **_beside_get(client, store, chosen)}


def _beside_get(client: redis.Redis, store: ProfileStore, chosen: list[str]) -> dict[str, Any]:
    line = PipelinedConnection(client)
    keys = [store.key_of(name) for name in chosen]
    times = []
    for name, key in zip(chosen, keys, strict=True):
        times.append((_us(partial(store.read, name)), _us(partial(line.ask, b"GET", key))))
    read, bare = np.median(np.array(times), axis=0).tolist()
    return {"read_us": round(read, 1), "get_us": round(bare, 1), "ratio": round(read / bare, 2)}


def _tail(client: redis.Redis, store: ProfileStore, draw: np.random.Generator, reads: int) -> dict[str, Any]:
    """Reading people with events that are not folded yet, and the folding alone."""
    names = [f"u:bench-tail-{number}" for number in range(20)]
    for name in names:
        store.apply(name, _entries(_history(draw, TAIL), LIVE))
    chosen = [names[at % len(names)] for at in range(reads)]
    known, records = store.read(names[0]), _history(draw, TAIL)
    alone = [_us(lambda: fold(known, records, 1)) for _ in range(reads)]
    return {"events": TAIL, **_beside_get(client, store, chosen), "fold_us": round(float(np.median(alone)), 1)}


def _entries(records: Records, first: int) -> list[tuple[int, bytes]]:
    return [(first + at, record.tobytes()) for at, record in enumerate(records)]


def _applying(client: redis.Redis, store: ProfileStore, draw: np.random.Generator, people: int) -> dict[str, Any]:
    """Events into profiles, in batches of many people, beside APPENDs of as many bytes to strings as long."""
    batches = []
    for number in range(BATCHES):
        records = _history(draw, BATCH)
        who = draw.choice(people, min(BATCH, people), replace=False)
        pairs = zip(who.tolist(), records[: who.size], strict=True)
        batches.append([(_name(one), [(LIVE + number, record.tobytes())]) for one, record in pairs])
    keys = [[b"bare:" + store.key_of(name) for name, _ in batch] for batch in batches]
    line, blob = PipelinedConnection(client), bytes(int(client.strlen(store.key_of(_name(0)))))
    line.ask_all([("SET", key, blob) for key in {key for batch in keys for key in batch}])

    def bare(at: int) -> None:
        pairs = zip(keys[at], batches[at], strict=True)
        line.ask_all([("APPEND", key, own[0][0].to_bytes(8, "big") + own[0][1]) for key, (_, own) in pairs])

    return _rates(client, lambda at: store.apply_many(batches[at]), bare, len(batches[0]))


def _logging(client: redis.Redis, draw: np.random.Generator, people: int) -> dict[str, Any]:
    """Events into the log, durable, beside XADDs of the same words to a stream that is synced alike."""
    log = EventLog(client)
    log.open()
    now = now_ms()
    batches = []
    for number in range(BATCHES):
        records = _history(draw, BATCH)
        records["timestamp"] = now
        who = map(_name, draw.integers(0, people, BATCH).tolist())
        payload = b'{"event_type": "view_item", "item_id": "item-%d", "timestamp": 1700000000000, "user_id": "bench"}'
        events = enumerate(zip(who, records, strict=True))
        batches.append([LoggedEvent(one, f"{number}-{at}", r.tobytes(), payload % at) for at, (one, r) in events])

    line = PipelinedConnection(client)

    def bare(at: int) -> None:
        line.ask_all(
            [
                ("XADD", "bare", "*", "s", one.subject, "e", one.event_id, "r", one.record, "p", one.payload)
                for one in batches[at]
            ]
        )

    return _rates(client, lambda at: log.append(batches[at]), bare, BATCH)


def _rates(
    client: redis.Redis, ours: Callable[[int], object], bare: Callable[[int], object], size: int
) -> dict[str, Any]:
    """Events per second of a core, ours and bare, in turn; a core's time is the client's plus the server's."""
    spent = np.zeros(2)
    for at in range(BATCHES):
        for place, call in enumerate((ours, bare)):
            before = _core_seconds(client)
            call(at)
            if at:  # the first teaches the scripts
                spent[place] += _core_seconds(client) - before
    mine, theirs = (size * (BATCHES - 1) / spent).tolist()
    return {
        "events_per_core_second": round(mine),
        "bare_per_core_second": round(theirs),
        "ratio": round(theirs / mine, 2),
    }


def _core_seconds(client: redis.Redis) -> float:
    cpu = client.info("cpu")
    return time.process_time() + float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"])


def _us(call: Callable[[], object]) -> float:
    begun = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begun) / 1000
