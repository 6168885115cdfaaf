"""Scaling of the service with the catalogue: latency, memory and start at 10^4 to 10^7 items.

The bundles are grown from one template, so the models and the users are the same at every size. The service of the
smallest one keeps running, and its windows alternate with those of each other size: a ratio of two sizes is measured
within the same minute.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.grown_bundle import grow
from benchmarks.latency import METHOD, Bench, Target, bench_of
from benchmarks.load.figures import latency_ms
from benchmarks.load.material import titles_of
from benchmarks.load.process_tree import ProcessTree, private_bytes
from benchmarks.load.traffic import Shape
from benchmarks.report import BenchmarkError, facts
from benchmarks.service import running
from penchant.client import Client, event
from penchant.v1 import event_pb2

USERS = 200
EVENTS = 50
PAGE = 50
_WORKERS = 2
_BATCH = 500
_TIMEOUT_S = 30.0
_TRIES = 10


def serving_growth(
    template: Path,
    sizes: Sequence[int],
    folder: Path,
    *,
    rate: float = 20.0,
    requests: int = 200,
    rounds: int = 5,
    seed: int = 1,
) -> dict[str, Any]:
    """Measures services of several catalogue sizes.

    Args:
        template: The bundle that the others are grown from.
        sizes: Numbers of items.
        folder: Where the bundles are made and kept: about 400 bytes an item.
        rate: Requests a second; low, so that a request waits for no other one.
        requests: Requests of each window.
        rounds: Windows of each size.
        seed: Seed of users, events and arrivals.

    Returns:
        `serving_growth` [`items`, `bundle_bytes`, `index`, `start_s` (until the service is ready), `latency_ms`,
        `cpu_ms`, `ratio` of its median latency to the smallest size's, `service_bytes` (all processes but Redis, shared
        memory counted once), `worker_bytes` (of a further worker: private to it)], `latency_ratio` (largest to smallest
        size), `bytes_per_item` and `worker_bytes_per_item` (by the difference of largest and smallest), and the
        circumstances.

    Raises:
        BenchmarkError: There are fewer than two sizes, or the template is larger than one of them.
    """
    ordered = sorted(set(sizes))
    if len(ordered) < 2:
        raise BenchmarkError("one size says nothing of growth: name two or more, as 1e4,1e5,1e6")
    grown = [grow(template, items, folder / f"items-{items}") for items in ordered]
    results = _alternating(grown, list(titles_of(template)), rate, requests, rounds, seed)
    return {"serving_growth": results, **_slopes(results), "rate": rate, "method": METHOD, **facts()}


def _alternating(
    grown: Sequence[dict[str, Any]], item_ids: Sequence[str], rate: float, requests: int, rounds: int, seed: int
) -> list[dict[str, Any]]:
    """Measures each of the larger services in turn with the smallest one, which goes on running."""
    users = [f"user-{number}" for number in range(USERS)]
    results: list[dict[str, Any]] = []
    with _service(grown[0], item_ids, users, seed) as smallest:
        for size in grown[1:]:
            with _service(size, item_ids, users, seed) as larger:
                pairs = [(smallest.window(rate, requests), larger.window(rate, requests)) for _ in range(rounds)]
                # The smallest one's own figures are those of the first time.
                if not results:
                    results.append(smallest.figures() | {"ratio": 1.0})
                ratios = [second / first for first, second in pairs]
                results.append(larger.figures() | {"ratio": round(float(np.median(ratios)), 3)})
    return results


def _slopes(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    first, last = results[0], results[-1]
    items = last["items"] - first["items"]
    return {
        "latency_ratio": last["ratio"],
        "bytes_per_item": round((last["service_bytes"] - first["service_bytes"]) / items, 1),
        "worker_bytes_per_item": round((last["worker_bytes"] - first["worker_bytes"]) / items, 1),
    }


class _Measured:
    """A running service of one size, and its windows so far."""

    def __init__(self, grown: dict[str, Any], bench: Bench, ready: dict[str, Any], start_s: float) -> None:
        self._grown, self._bench, self._ready, self._start_s = grown, bench, ready, start_s

    def window(self, rate: float, requests: int) -> float:
        """Measures a window; returns its median latency in milliseconds."""
        window = self._bench.measure(rate, requests).window
        if not window.answered.all():
            raise BenchmarkError(
                f"{self._grown['items']:,} items at {rate:g}/s: {window.errors()}; give a lower --rate"
            )
        return float(np.median(window.latencies_ms()))

    def figures(self) -> dict[str, Any]:
        """Returns what was measured, and the memory now."""
        windows = self._bench.windows
        values = np.concatenate([measured.window.latencies_ms() for measured in windows])
        used = [measured.usage.service_s for measured in windows if measured.usage]
        tree, workers = ProcessTree(self._ready["pid"]), self._ready["workers"]
        return {
            "items": self._grown["items"],
            "bundle_bytes": self._grown["bytes"],
            "index": self._grown["index"],
            "start_s": round(self._start_s, 2),
            "latency_ms": latency_ms(values),
            "cpu_ms": round(1000 * sum(used) / values.size, 3),
            "service_bytes": sum(tree.proportional_bytes(stores=False).values()),
            "worker_bytes": max(map(private_bytes, workers)),
        }


@contextmanager
def _service(grown: dict[str, Any], item_ids: Sequence[str], users: Sequence[str], seed: int) -> Iterator[_Measured]:
    """Serves a bundle, and fills the profiles of the users."""
    begun = time.perf_counter()
    options = ("--workers", str(_WORKERS), "--access-log", "off")
    with (
        tempfile.TemporaryDirectory(prefix="growth") as state,
        running(Path(grown["path"]), *options, "--state-dir", state) as ready,
    ):
        start_s = time.perf_counter() - begun
        with Client(ready["listen"], timeout_s=_TIMEOUT_S) as client:
            _fill(client, item_ids, users, random.Random(seed))
        shape = Shape(zipf=0.0, page_size=PAGE, timeout_s=_TIMEOUT_S)
        target = Target(ready["listen"], users, pid=ready["pid"], seed=seed)
        with bench_of(target, shape) as bench:
            yield _Measured(grown, bench, ready, start_s)


def _fill(client: Client, item_ids: Sequence[str], users: Sequence[str], rng: random.Random) -> None:
    for start in range(0, len(users) * EVENTS, _BATCH):
        numbers = range(start, min(start + _BATCH, len(users) * EVENTS))
        batch = [event(users[number // EVENTS], rng.choice(item_ids), "view_item") for number in numbers]
        refused = [status.message for status in _ingest(client, batch) if status.code]
        if refused:
            raise BenchmarkError(f"{len(refused)} of {len(batch)} events were refused: {refused[0]}")


def _ingest(client: Client, batch: Sequence[event_pb2.Event]) -> Sequence[event_pb2.EventStatus]:
    """Sends events, again while the service cannot take them: by their ids each counts once."""
    for _ in range(_TRIES):
        try:
            return client.ingest(batch)
        except grpc.RpcError as error:
            if getattr(error, "code", lambda: None)() is not grpc.StatusCode.UNAVAILABLE:
                raise
            # The Redis of the service may be busy with an event log that has just been made.
            time.sleep(1.0)
    return client.ingest(batch)
