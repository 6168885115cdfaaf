"""The metrics of a service for Prometheus: each name with its type, labels and meaning, in one table.

docs/metrics.md is made from `FAMILIES`. Code counts under the name of a family without `penchant_`, see `Telemetry`. No
label holds a word of a request: methods, codes, rungs, stages and parts are names of the code, and surfaces come from a
list (`RequestObserver`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from serving.observability.telemetry import BUCKETS, bucket_limit

OTHER = "other"
"""Label of all values without a label of their own."""


class Family(NamedTuple):
    """A metric family.

    Attributes:
        name: Name of the family, that of a counter without `_total`.
        kind: Type of the family.
        help: Meaning, with the unit.
        labels: Names of the labels.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    help: str
    labels: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The name in the exposition."""
        return {"counter": f"{self.name}_total", "info": f"{self.name}_info"}.get(self.kind, self.name)


_PROCESS = ("process", "role")
_LAG = ("reader", "stream", "partition")
_LOG = ("stream", "partition")

FAMILIES = (
    Family(
        "penchant_requests", "counter", "Requests that ended, by how they ended.", ("method", "code", "surface", "rung")
    ),
    Family("penchant_request_seconds", "histogram", "Time from the message of a request to its response.", ("method",)),
    Family("penchant_requests_in_flight", "gauge", "Requests in progress, the waiting ones included.", _PROCESS),
    Family("penchant_requests_waiting", "gauge", "Rankings that wait for others to finish.", _PROCESS),
    Family("penchant_expected_wait_seconds", "gauge", "Time that a new ranking would wait for others.", _PROCESS),
    Family(
        "penchant_requests_refused",
        "counter",
        "Requests refused before any work: `overload`, a `batch` that gives way, `busy` (no place), no `token`, or a "
        "`message` that is missing or late.",
        ("reason",),
    ),
    Family("penchant_stage_seconds", "histogram", "Time of one stage of a ranking.", ("stage",)),
    Family("penchant_stage_failures", "counter", "Stages that failed while the ranking went on.", ("stage",)),
    Family("penchant_degraded", "counter", "Parts that responses had to do without.", ("part",)),
    Family("penchant_events", "counter", "Events of `Ingest`: `taken` or `refused`.", ("result",)),
    Family("penchant_events_unknown_item", "counter", "Events taken whose item the catalogue does not have."),
    Family("penchant_events_odd_type", "counter", "Events taken whose type only looks like a documented one."),
    Family("penchant_events_applied_later", "counter", "Events taken that only the projector applies to profiles."),
    Family(
        "penchant_slates",
        "counter",
        "Slates: `written` to the log, `dropped`, or `left_out` of its sample.",
        ("result",),
    ),
    Family("penchant_slates_waiting", "gauge", "Slates that wait to be written to the log.", _PROCESS),
    Family("penchant_profiles_corrupt", "counter", "Reads and writes of a profile that is damaged."),
    Family("penchant_projector_events", "counter", "Events that the projector was the first to apply to a profile."),
    Family("penchant_projector_damaged", "counter", "Events that the projector could not read."),
    Family("penchant_projector_profiles", "counter", "Profiles `compacted`, `evicted` or `restored`.", ("action",)),
    Family("penchant_warehouse_rows", "counter", "Rows written to Parquet.", ("table",)),
    Family("penchant_warehouse_damaged", "counter", "Entries of the log that the warehouse could not read."),
    Family("penchant_warehouse_erased", "counter", "Rows removed from Parquet by erasures."),
    Family("penchant_log_lag_entries", "gauge", "Entries that a reader of the log has not acknowledged.", _LAG),
    Family("penchant_log_lag_seconds", "gauge", "Age of the oldest such entry; 0 if there is none.", _LAG),
    Family("penchant_log_entries", "gauge", "Entries that a stream of the log holds.", _LOG),
    Family("penchant_log_bytes", "gauge", "Memory of a stream of the log, by an estimate of Redis.", _LOG),
    Family("penchant_catalog_version", "gauge", "Version of the catalogue that a worker answers from.", _PROCESS),
    Family("penchant_catalog_lag_versions", "gauge", "Versions that a worker is behind the catalogue log.", _PROCESS),
    Family(
        "penchant_catalog_lag_seconds",
        "gauge",
        "Time since a scrape first saw it behind, else 0.",
        _PROCESS,
    ),
    Family("penchant_redis_up", "gauge", "1 if the Redis of a store answers, else 0.", ("store",)),
    Family("penchant_redis_memory_bytes", "gauge", "Memory that Redis uses, all its nodes together.", ("store",)),
    Family("penchant_redis_data_bytes", "gauge", "Memory of its data, without buffers and overhead.", ("store",)),
    Family("penchant_redis_aof_bytes", "gauge", "Size of the append-only files of Redis.", ("store",)),
    Family("penchant_process_up", "gauge", "1 if a process of the service answered this scrape, else 0.", _PROCESS),
    Family("penchant_process_restarts", "counter", "Number of restarts of a process.", _PROCESS),
    Family("penchant_process_start_time_seconds", "gauge", "Start of the process, seconds since 1970.", _PROCESS),
    Family("penchant_process_cpu_seconds", "counter", "Processor time of the process.", (*_PROCESS, "mode")),
    Family(
        "penchant_process_resident_memory_bytes",
        "gauge",
        "Memory, that of shared files included.",
        _PROCESS,
    ),
    Family("penchant_process_threads", "gauge", "Threads of the process.", _PROCESS),
    Family("penchant_process_open_fds", "gauge", "Open files and connections of the process.", _PROCESS),
    Family("penchant_process_max_fds", "gauge", "Most files and connections that it may open.", _PROCESS),
    Family("penchant_process_gc_collections", "counter", "Its garbage collections.", (*_PROCESS, "generation")),
    Family(
        "penchant_build", "info", "Version of Penchant and id of the bundle; the value is 1.", ("version", "bundle_id")
    ),
)

_GAUGES: Mapping[str, str] = {
    name: f"penchant_{name}"
    for name in ("requests_in_flight", "requests_waiting", "expected_wait_seconds", "slates_waiting", "catalog_version")
}
_STATS: Mapping[str, str] = {
    "started": "penchant_process_start_time_seconds",
    "rss_bytes": "penchant_process_resident_memory_bytes",
    "threads": "penchant_process_threads",
    "open_fds": "penchant_process_open_fds",
    "max_fds": "penchant_process_max_fds",
}
_FIRST_POWER, _LAST_POWER = 4, 24
"""Buckets of the exposition: powers of two from 16 us to 17 s, as percentiles need no finer ones there."""


@dataclass(slots=True)
class ProcessState:
    """One process of the service.

    Attributes:
        name: Name of the process, such as "worker 0"; its role is the first word.
        is_up: The process answered.
        restarts: Number of its restarts.
        stats: Values of `process_stats`; empty before its first answer.
        gauges: Its gauges.
    """

    name: str
    is_up: bool
    restarts: int = 0
    stats: Mapping[str, Any] = field(default_factory=dict)
    gauges: Mapping[str, float] = field(default_factory=dict)


Sample = tuple[str, tuple[str, ...], Any]
"""Name of a family, values of its labels, and a number or the cells of a histogram."""


def counter_samples(counts: Mapping[tuple[str, ...], int]) -> Iterable[Sample]:
    """Yields the samples of the counters of `Telemetry`."""
    for (name, *labels), n in counts.items():
        yield f"penchant_{name}", tuple(labels), n


def time_samples(times: Mapping[tuple[str, ...], Sequence[int]]) -> Iterable[Sample]:
    """Yields the samples of the histograms of `Telemetry`: cells per bucket, then the sum in microseconds."""
    for (name, *labels), cells in times.items():
        if labels:
            yield f"penchant_{name}", tuple(labels), cells
        else:  # a stage has no labels: its name is the label
            yield "penchant_stage_seconds", (name,), cells


def process_samples(process: ProcessState) -> Iterable[Sample]:
    """Yields the samples of one process."""
    labels = (process.name, process.name.partition(" ")[0])
    yield "penchant_process_up", labels, int(process.is_up)
    yield "penchant_process_restarts", labels, process.restarts
    for name, value in process.gauges.items():
        yield _GAUGES[name], labels, value
    for name, family in _STATS.items():
        if name in process.stats:
            yield family, labels, process.stats[name]
    for mode, seconds in process.stats.get("cpu_seconds", {}).items():
        yield "penchant_process_cpu_seconds", (*labels, mode), seconds
    for generation, count in process.stats.get("gc_collections", {}).items():
        yield "penchant_process_gc_collections", (*labels, generation), count


def rendered(samples: Iterable[Sample], accept: str = "") -> tuple[bytes, str]:
    """Returns the exposition and its content type: OpenMetrics where `accept` asks for it, else the text format."""
    # A registry per page, because the samples are those of all processes and exist for this scrape only.
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(samples))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


def markdown() -> str:
    """Returns the table of docs/metrics.md."""
    rows = [
        f"| `{family.shown}` | {family.kind} | {', '.join(f'`{label}`' for label in family.labels)} | {family.help} |\n"
        for family in FAMILIES
    ]
    return "| name | type | labels | meaning |\n| --- | --- | --- | --- |\n" + "".join(rows)


class _Collector(Collector):
    """Hands samples to prometheus_client, family by family."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples: dict[str, dict[tuple[str, ...], Any]] = {}
        for name, labels, value in samples:
            self._samples.setdefault(name, {})[labels] = value

    def collect(self) -> Iterable[Metric]:
        for family in FAMILIES:
            samples = self._samples.get(family.name, {})
            # A family without samples is left out, as a scrape of zeros would tell that it had been measured.
            if samples:
                yield _metric(family, samples)


def _metric(family: Family, samples: Mapping[tuple[str, ...], Any]) -> Metric:
    if family.kind == "info":
        metric: Any = InfoMetricFamily(family.name, family.help)
        for labels in samples:
            metric.add_metric([], dict(zip(family.labels, labels, strict=True)))
        return metric  # type: ignore[no-any-return]
    classes = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    metric = classes[family.kind](family.name, family.help, labels=family.labels)
    # Sorted, so that two scrapes can be compared line by line.
    for labels, value in sorted(samples.items()):
        if family.kind == "histogram":
            metric.add_metric(labels, _cumulative(value), sum_value=value[BUCKETS] / 1e6)
        else:
            metric.add_metric(labels, value)
    return metric  # type: ignore[no-any-return]


def _cumulative(cells: Sequence[int]) -> list[tuple[str, float]]:
    buckets: list[tuple[str, float]] = []
    reached = 0
    for index in range(BUCKETS):
        reached += cells[index]
        limit = bucket_limit(index)
        # Telemetry has eight buckets per power of two; so many series per stage would burden Prometheus.
        if limit & (limit - 1) == 0 and 1 << _FIRST_POWER <= limit <= 1 << _LAST_POWER:
            buckets.append((str(limit / 1e6), reached))
    return [*buckets, ("+Inf", reached)]
