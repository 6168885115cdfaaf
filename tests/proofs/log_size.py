"""The cost of an event and a slate: bytes of the events Redis, of its file, of Parquet; and that the memory levels off.

    python -m tests.proofs.log_size [ENTRIES [SECONDS]]

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import redis

from penchant.v1 import event_pb2
from serving.log_retention import PROFILES_GROUP, LogRetention
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.stores.consumer_group import Consumer
from serving.stores.event_log import EventLog
from serving.stores.log_entries import LoggedEvent, LoggedImpression
from serving.warehouse.tables import event_tables, impression_table
from tests.serving.logged import catalog, event, logged, slate

ITEMS = 20
"""Items of a slate."""
USERS = 200
SOURCES = {"nearest": 0.9, "popular": 0.4, "fresh": float("nan"), "neighbors": 0.7}
_CATALOG = catalog([{"item_id": f"item-{n:06d}", "categories": [f"c{n % 40}"], "creator_id": "m"} for n in range(5000)])
_TOGETHER = 500


def events_of(count: int, first: int = 0) -> list[LoggedEvent]:
    """Views with what a product sends: a session, the request that they follow from, the surface and the position."""
    made = [made_event(number) for number in range(first, first + count)]
    return logged(*made, of=_CATALOG)


def made_event(number: int) -> event_pb2.Event:
    """One of them."""
    of = {"session_id": f"session-{number // 10:09d}", "request_id": f"request-{number:016d}", "surface": "home"}
    return event(f"user-{number % USERS:07d}", f"item-{number % 5000:06d}", position=number % ITEMS, **of)


def slates_of(count: int, first: int = 0) -> list[LoggedImpression]:
    """Slates of `ITEMS` items, as `Recommend` logs them."""
    rng = np.random.default_rng(first)
    found = []
    for number in range(first, first + count):
        rows = rng.integers(0, 10, ITEMS).tolist()
        sources = {name: [value] * ITEMS for name, value in SOURCES.items()}
        one = slate(f"user-{number % USERS:07d}", f"request-{number:016d}", rows, sources=sources, method="recommend")
        said = json.loads(one.payload) | {
            "item_ids": [f"item-{n:06d}" for n in rng.integers(0, 5000, ITEMS).tolist()],
            "scores": [round(float(score), 7) for score in np.sort(rng.random(ITEMS))[::-1]],
            "session_id": f"session-{number // 10:09d}",
            "arm": "treatment",
            "bundle_id": "0123456789abcdef",
        }
        payload = json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()
        found.append(LoggedImpression(one.subject, one.timestamp, payload))
    return found


def used(client: redis.Redis) -> int:
    """Bytes of memory that the data of a server takes."""
    return int(client.info("memory")["used_memory_dataset"])


def file_bytes(folder: Path) -> int:
    """Bytes of the append-only file."""
    return sum(path.stat().st_size for path in folder.rglob("*.aof"))


def sizes(folder: Path, entries: int) -> dict[str, Any]:
    """Bytes an event and a slate, each in a server of its own."""
    found: dict[str, Any] = {"items_a_slate": ITEMS}
    made: dict[str, Any] = {"event": events_of, "slate": slates_of}
    for kind, make in made.items():
        with RedisServer(folder / kind, "events") as server, connect(server.url, 30) as client:
            assert isinstance(client, redis.Redis)
            log = EventLog(client, 16)
            log.open()
            before, disk = used(client), file_bytes(server.directory)
            for first in range(0, entries, _TOGETHER):
                batch = make(min(_TOGETHER, entries - first), first)
                log.append(batch) if kind == "event" else log.append_impressions(batch)
            names = ("read", "read_impressions")[kind == "slate"]
            rows = [one for partition in range(16) for one in getattr(log, names)(partition, count=10**6)]
            assert len(rows) == entries
            table = event_tables(rows)[0] if kind == "event" else impression_table(rows)[0]
            pq.write_table(table, folder / f"{kind}.parquet", compression="zstd")
            found[kind] = {
                "payload_bytes": round(sum(len(row.payload) for row in rows) / entries),
                "redis_bytes": round((used(client) - before) / entries),
                "file_bytes": round((file_bytes(server.directory) - disk) / entries),
                "parquet_bytes": round((folder / f"{kind}.parquet").stat().st_size / entries),
            }
    return found


def level(folder: Path, seconds: float, trims: bool) -> dict[str, Any]:
    """Memory of a log that is written to, read and trimmed: the most of each half of the time, less what was there."""
    with RedisServer(folder / f"level-{trims}", "events") as server, connect(server.url, 30) as client:
        assert isinstance(client, redis.Redis)
        log = EventLog(client, 1, times=LogRetention(int(250 * seconds), int(60 * seconds), True))
        log.open()
        readers = [Consumer(log, PROFILES_GROUP, "a"), Consumer(log, "warehouse", "b")]
        readers += [Consumer(log, "warehouse", "b", stream="impressions")]
        for reader in readers:
            reader.open()
        before, seen, begun, number = used(client), list[tuple[float, int]](), time.monotonic(), 0
        while (now := time.monotonic() - begun) < seconds:
            log.append(events_of(100, number))
            log.append_impressions(slates_of(100, number))
            number += 100
            for reader in readers:
                [entries] = reader.claim([None], 1000)
                reader.acknowledge(0, [entry.log_id for entry in entries or ()])
            if trims:
                log.trim(0)
            seen.append((now, used(client) - before))
            threading.Event().wait(0.02)
    halves = [max(size for at, size in seen if (at > seconds / 2) is late) for late in (False, True)]
    return {"trims": trims, "written": 2 * number, "first_half_bytes": halves[0], "second_half_bytes": halves[1]}


def trimming(folder: Path, entries: int) -> dict[str, Any]:
    """Returns the longest wait of other commands for a step of trimming, and the entries trimmed in a second."""
    with RedisServer(folder / "trim", "events") as server, connect(server.url, 30) as client:
        assert isinstance(client, redis.Redis)
        log = EventLog(client, 1, times=LogRetention(0, 0, True))
        log.open()
        for first in range(0, entries, _TOGETHER):
            log.append_impressions(slates_of(_TOGETHER, first))
        reader = Consumer(log, "warehouse", "b", stream="impressions")
        reader.open()
        while (found := reader.claim([None], 5000)[0]) and (names := [entry.log_id for entry in found]):
            reader.acknowledge(0, names)
        time.sleep(1.1)
        client.config_resetstat()
        begun = time.monotonic()
        log.trim(0)
        took = time.monotonic() - begun
        calls = client.info("commandstats")["cmdstat_xtrim"]
        left = len(log.read_impressions(0, count=10))
    step_ms = calls["usec"] / calls["calls"] / 1000 * 2
    return {"entries": entries, "left": left, "seconds": round(took, 3), "step_ms": round(step_ms, 2)}


def main(arguments: list[str]) -> int:
    """Measures; 0 where the memory levels off and the control, which trims nothing, does not."""
    entries = int(arguments[0]) if arguments else 50_000
    seconds = float(arguments[1]) if len(arguments) > 1 else 40.0
    with tempfile.TemporaryDirectory() as folder:
        found = sizes(Path(folder), entries)
        grown, control = (level(Path(folder), seconds, trims) for trims in (True, False))
        found |= {"level": grown, "control": control, "trim": trimming(Path(folder), entries)}
    print(json.dumps(found))
    levels = grown["second_half_bytes"] < 1.3 * grown["first_half_bytes"]
    return 0 if levels and control["second_half_bytes"] > 1.6 * control["first_half_bytes"] else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
