"""Measures the resources to provide: memory, disk and processor time by item, user, event, slate and request.

Sizes are differences of the figures of Redis, the kernel and the file system before and after. Rates are requests by
second of processor time, which other work on the machine changes little; start and rebuild are seconds of its clock.
"""

from __future__ import annotations

import random
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.report import BenchmarkError, facts
from benchmarks.service import running
from penchant.client import Client, event
from serving.processes.store_metrics import FRESH_S
from serving.projection.rebuild import rebuild
from serving.redis.embedded import RedisServer

BATCH = 500
PAGE = 20
PATIENCE_S = 120.0
_OPTIONS = ("--workers", "1", "--metrics-listen", "127.0.0.1:0", "--access-log", "off")


def sizing(
    bundles: Sequence[Path], *, users: int = 2000, events: int = 100, requests: int = 5000, seed: int = 1
) -> dict[str, Any]:
    """Measures services of one worker, profiles, events and slates in embedded Redis, and Parquet.

    Args:
        bundles: Directories of bundles of different sizes: their difference is the memory of their items.
        users: Users to create, with `events` events each, through `Ingest`.
        events: Events of each user.
        requests: Requests for slates of 20 items.
        seed: Seed of users, items and moments.

    Returns:
        `bundles` (of each: `items`, `bundle_bytes`, `start_s`, `worker_rss`, `worker_own` and `shared` bytes),
        `worker_bytes_per_item`, `shared_bytes_per_item` (None of bundles of one size), `user_bytes`, `event_bytes`,
        `slate_bytes` (Redis), `event_disk`, `slate_disk` (append-only file), `event_parquet`, `slate_parquet`,
        `requests_per_core_second`, `events_per_core_second`, `rss` by process, `rebuild_s`,
        `rebuild_events_per_second`, and the circumstances.

    Raises:
        BenchmarkError: There is no bundle.
        BundleError: A bundle is refused.
    """
    if not bundles:
        raise BenchmarkError("nothing to measure: name a bundle, or two of different sizes")
    measured = [_started(bundle) for bundle in bundles]
    small, large = (pick(measured, key=lambda figures: figures["items"]) for pick in (min, max))
    with tempfile.TemporaryDirectory(prefix="sizing") as folder:
        state = Path(folder)
        figures = _filled(bundles[measured.index(large)], state, users, events, requests, random.Random(seed))
        figures |= _on_disk(state / "warehouse", users * events, requests)
        figures |= _rebuilt(state)
    return {
        "bundles": measured,
        "worker_bytes_per_item": _bytes_per_item(small, large, "worker_own"),
        "shared_bytes_per_item": _bytes_per_item(small, large, "shared"),
        **{"users": users, "events": events, "requests": requests, "page": PAGE},
        **figures,
        **facts(),
    }


def _bytes_per_item(small: dict[str, Any], large: dict[str, Any], name: str) -> int | None:
    # The part of the memory that does not depend on items cancels in the difference of two bundles.
    more = large["items"] - small["items"]
    return round((large[name] - small[name]) / more) if more else None


def _own_memory(pid: int) -> int:
    """Returns the bytes of a process that no other process shares and no file holds."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    [kilobytes] = [line.split()[1] for line in lines if line.startswith("Pss_Anon:")]
    return int(kilobytes) * 1024


def _shared_memory(pid: int) -> int:
    """Returns the bytes of the tables that a supervisor keeps for its workers."""
    handles = Path(f"/proc/{pid}/fd")
    names = [handle for handle in handles.iterdir() if "memfd:penchant" in str(handle.readlink())]
    return sum(handle.stat().st_blocks * 512 for handle in names)


def _started(bundle: Path) -> dict[str, Any]:
    """Returns the resources of a bundle's service after its first calls."""
    items = _item_ids(bundle)
    begun = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="sizing") as state,
        running(bundle, *_OPTIONS, "--state-dir", state) as ready,
    ):
        start_s = time.perf_counter() - begun
        with Client(ready["listen"], timeout_s=30.0) as client:
            # Memory that a worker only takes at its first calls counts as well.
            client.recommend(user_id="u0", page_size=PAGE)
            client.search("something", user_id="u0", page_size=PAGE)
        rss = _scrape(ready["metrics"])["penchant_process_resident_memory_bytes worker 0"]
        own, shared = _own_memory(ready["workers"][0]), _shared_memory(ready["pid"])
    return {
        "items": len(items),
        "bundle_bytes": sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()),
        "start_s": round(start_s, 1),
        "worker_rss": int(rss),
        "worker_own": own,
        "shared": shared,
    }


def _filled(bundle: Path, state: Path, users: int, events: int, requests: int, rng: random.Random) -> dict[str, Any]:
    """Measures sizes in Redis and processor time, before and after events, then before and after slates."""
    items = _item_ids(bundle)
    with (
        running(bundle, *_OPTIONS, "--state-dir", str(state)) as ready,
        Client(ready["listen"], timeout_s=30.0) as client,
    ):
        empty = _settled(ready["metrics"])
        for start in range(0, users * events, BATCH):
            _ingest(client, rng, items, range(start, min(start + BATCH, users * events)), users)
        # Profiles take their memory once the projector has applied the log, not when the events are acknowledged.
        _wait(lambda: not _behind(ready["metrics"], "projector"))
        full = _settled(ready["metrics"])
        for _ in range(requests):
            client.recommend(user_id=f"u{rng.randrange(users)}", page_size=PAGE, surface="home")
        # Slates are logged after their answer, and in Parquet when the warehouse has come to them.
        _wait(lambda: _scrape(ready["metrics"])["penchant_slates_total written"] >= requests)
        _wait(lambda: not _behind(ready["metrics"], "warehouse"))
        served = _settled(ready["metrics"])
    count = users * events

    def each(name: str, before: Counter[str], after: Counter[str], n: int) -> float:
        return round((after[name] - before[name]) / n, 1)

    return {
        "user_bytes": each("penchant_redis_data_bytes profiles", empty, full, users),
        "event_bytes": each("penchant_redis_data_bytes events", empty, full, count),
        "slate_bytes": each("penchant_redis_data_bytes events", full, served, requests),
        "event_disk": each("penchant_redis_aof_bytes events", empty, full, count),
        "slate_disk": each("penchant_redis_aof_bytes events", full, served, requests),
        "events_per_core_second": round(count / _worker_seconds(empty, full)),
        "requests_per_core_second": round(requests / _worker_seconds(full, served)),
        "rss": {
            name.rpartition("_bytes ")[2]: int(value)
            for name, value in served.items()
            if name.startswith("penchant_process_resident_memory_bytes")
        },
    }


def _worker_seconds(before: Counter[str], after: Counter[str]) -> float:
    names = [f"penchant_process_cpu_seconds_total worker 0 {mode}" for mode in ("user", "system")]
    return sum(after[name] - before[name] for name in names)


def _ingest(client: Client, rng: random.Random, items: Sequence[str], numbers: range, users: int) -> None:
    """Sends a batch of events, those of a user spread over the whole."""
    kinds = ("view_item", "view_item", "select_item", "like")
    batch = [event(f"u{n % users}", rng.choice(items), rng.choice(kinds), session_id=f"s{n // 20}") for n in numbers]
    refused = [status.message for status in client.ingest(batch) if status.code]
    if refused:
        raise BenchmarkError(f"{len(refused)} of {len(batch)} events were refused: {refused[0]}")


def _on_disk(warehouse: Path, events: int, slates: int) -> dict[str, float]:
    """Returns the bytes of Parquet of an event and of a slate, once the warehouse has written them."""
    sizes = {
        name: sum(path.stat().st_size for path in warehouse.rglob("*.parquet") if name in path.parts[-3:][0])
        for name in ("events", "impressions")
    }
    return {
        "event_parquet": round(sizes["events"] / events, 1),
        "slate_parquet": round(sizes["impressions"] / slates, 1),
    }


def _rebuilt(state: Path) -> dict[str, float]:
    """Measures a rebuild of all profiles from the Parquet, into an empty Redis."""
    with (
        tempfile.TemporaryDirectory(prefix="sizing") as folder,
        RedisServer(Path(folder), "profiles") as profiles,
        RedisServer(state, "events") as log,
    ):
        begun = time.perf_counter()
        counts = rebuild(state / "warehouse", profiles.url, log.url)
        seconds = time.perf_counter() - begun
    return {"rebuild_s": round(seconds, 1), "rebuild_events_per_second": round(counts["events"] / seconds)}


def _item_ids(bundle: Path) -> list[str]:
    with pa.OSFile(str(bundle / "items.arrow"), "rb") as source:
        return [str(item) for item in pa.ipc.open_file(source).read_all().column("item_id").to_pylist()]


def _behind(address: str, reader: str) -> float:
    return sum(n for name, n in _settled(address).items() if name.startswith(f"penchant_log_lag_entries {reader}"))


def _settled(address: str) -> Counter[str]:
    """Returns the samples after the service has looked at its stores again."""
    # The page keeps its figures of the stores for some seconds.
    time.sleep(FRESH_S + 1)
    return _scrape(address)


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise BenchmarkError(f"the service is not done within {PATIENCE_S:.0f} s: see its log")
        time.sleep(1.0)


def _scrape(address: str) -> Counter[str]:
    """Returns the samples of the metrics, by name and the values of the labels, without `role`."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as page:
        text = page.read().decode()
    samples: Counter[str] = Counter()
    order = ("reader", "stream", "partition", "process", "mode", "store", "result")
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = (sample.labels[name] for name in order if name in sample.labels)
            samples[" ".join((sample.name, *labels))] += sample.value  # type: ignore[assignment]
    return samples
