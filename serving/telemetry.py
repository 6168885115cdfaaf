"""Counters and latency histograms, cheap enough to be always on.

Each thread counts in dictionaries of its own, so the hot path takes no lock and loses nothing; a reader adds them up.
A histogram has eight buckets per power of two microseconds: percentiles are right to 12.5 %.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

    from prometheus_client.core import Metric

BUCKETS = 256


def bucket_of(microseconds: int) -> int:
    """Index of the bucket that holds a duration."""
    if microseconds < 16:
        return microseconds if microseconds > 0 else 0
    shift = microseconds.bit_length() - 4
    return min((shift << 3) + (microseconds >> shift), BUCKETS - 1)


def bucket_limit(index: int) -> int:
    """Smallest duration in microseconds that lies above a bucket."""
    if index < 16:
        return index + 1
    shift = (index >> 3) - 1
    return ((index & 7) + 9) << shift


class _Shard(threading.local):
    """What one thread counted; entered into `shards` so that readers find it."""

    def __init__(self, shards: list[tuple[dict[str, int], dict[str, list[int]]]]) -> None:
        self.counts: dict[str, int] = {}
        self.times: dict[str, list[int]] = {}
        shards.append((self.counts, self.times))


class Telemetry:
    """Counts things and times stages; any thread may call anything."""

    def __init__(self) -> None:
        self._shards: list[tuple[dict[str, int], dict[str, list[int]]]] = []
        self._local = _Shard(self._shards)

    def count(self, name: str, n: int = 1) -> None:
        """Adds n to a counter."""
        counts = self._local.counts
        counts[name] = counts.get(name, 0) + n

    def stage(self, name: str, microseconds: int) -> None:
        """Adds one duration to a histogram; its last cell is the sum."""
        times = self._local.times
        try:
            cells = times[name]
        except KeyError:
            cells = times[name] = [0] * (BUCKETS + 1)
        cells[bucket_of(microseconds)] += 1
        cells[BUCKETS] += microseconds

    def failure(self, name: str) -> None:
        """Counts a stage that failed while the request went on."""
        self.count(f"failed.{name}")

    def counters(self) -> dict[str, int]:
        """Every counter, all threads together."""
        total: Counter[str] = Counter()
        for counts, _ in list(self._shards):
            total.update(counts.copy())
        return dict(total)

    def histograms(self) -> dict[str, list[int]]:
        """Every histogram, all threads together: cells per bucket, then the sum in microseconds."""
        total: dict[str, list[int]] = {}
        for _, times in list(self._shards):
            for name, cells in times.copy().items():
                mine = total.setdefault(name, [0] * (BUCKETS + 1))
                for index, cell in enumerate(cells):
                    mine[index] += cell
        return total

    def summary(self) -> dict[str, dict[str, float]]:
        """Number, mean, p50 and p99 in microseconds of every histogram."""
        return {
            name: {
                "count": sum(cells[:BUCKETS]),
                "mean": cells[BUCKETS] / max(sum(cells[:BUCKETS]), 1),
                "p50": percentile(cells, 0.50),
                "p99": percentile(cells, 0.99),
            }
            for name, cells in self.histograms().items()
        }


def percentile(cells: list[int], share: float) -> int:
    """Upper limit in microseconds of the bucket where a share of the durations is reached."""
    wanted = share * sum(cells[:BUCKETS])
    reached = 0
    for index in range(BUCKETS):
        reached += cells[index]
        if cells[index] and reached >= wanted:
            return bucket_limit(index)
    return 0


class _Collector:
    """Shows a Telemetry to Prometheus."""

    def __init__(self, telemetry: Telemetry) -> None:
        self.telemetry = telemetry

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        counter = CounterMetricFamily("penchant_events", "What happened, by name.", labels=["name"])
        for name, value in self.telemetry.counters().items():
            counter.add_metric([name], value)
        yield counter
        histogram = HistogramMetricFamily("penchant_stage_seconds", "Time per stage.", labels=["stage"])
        for name, cells in self.telemetry.histograms().items():
            histogram.add_metric([name], _cumulative(cells), sum_value=cells[BUCKETS] / 1e6)
        yield histogram


def _cumulative(cells: list[int]) -> list[tuple[str, float]]:
    """Prometheus buckets: one per power of two microseconds."""
    buckets: list[tuple[str, float]] = []
    reached = 0
    for index in range(BUCKETS):
        reached += cells[index]
        if index % 8 == 7:
            buckets.append((str(bucket_limit(index) / 1e6), reached))
    return [*buckets, ("+Inf", reached)]


def expose(telemetry: Telemetry, port: int, host: str = "127.0.0.1") -> WSGIServer:
    """Serves the numbers for Prometheus on a port of its own, in a daemon thread; returns the server."""
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(_Collector(telemetry))
    return start_http_server(port, addr=host, registry=registry)[0]
