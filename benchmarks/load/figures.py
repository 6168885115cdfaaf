"""The figures of windows: percentiles, errors, the answers' rungs and degraded parts, processor time per call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from hdrh.histogram import HdrHistogram

from benchmarks.load.process_tree import Usage
from benchmarks.load.window import Window
from penchant.v1 import common_pb2, event_pb2, ranking_pb2

MOST_US = 60_000_000
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}
_CHECKED = 2000
"""Answers of a window that are read, evenly spread; all of them are timed."""
_RESPONSES: dict[str, Any] = {
    "recommend": ranking_pb2.RecommendResponse,
    "search": ranking_pb2.SearchResponse,
    "rank": ranking_pb2.RankResponse,
    "similar": ranking_pb2.SimilarItemsResponse,
}


@dataclass(frozen=True)
class Measured:
    """A window, and the processor time of the service in it; None where its processes are not to be seen."""

    window: Window
    usage: Usage | None = None


def latency_ms(values: npt.NDArray[np.float64]) -> dict[str, float]:
    """Returns percentiles, mean and maximum of latencies in milliseconds; empty without any."""
    if not values.size:
        return {}
    # The sample itself and no value between two, so that a percentile is a latency that some call had.
    points = np.percentile(values, list(PERCENTILES.values()), method="higher")
    figures = {name: round(float(point), 3) for name, point in zip(PERCENTILES, points, strict=True)}
    return {**figures, "mean": round(float(values.mean()), 3), "max": round(float(values.max()), 3)}


def window_figures(measured: Measured) -> dict[str, Any]:
    """Returns the figures of one window, as `compare` and the report read them."""
    window = measured.window
    count, answered = int(window.sent.sum()), int(window.answered.sum())
    figures: dict[str, Any] = {
        "rate": round(window.plan.rate, 1),
        "calls": count,
        "achieved_rate": round(answered / window.seconds, 1) if window.seconds else 0.0,
        "latency_ms": latency_ms(window.latencies_ms()),
        "errors": window.errors(),
        "generator": generator_figures(window),
    }
    if window.gave_up:
        figures["gave_up"] = True
    if measured.usage and count:
        figures["cpu_ms"] = round(1000 * measured.usage.service_s / count, 3)
        figures["stores_cpu_ms"] = round(1000 * measured.usage.stores_s / count, 3)
    return figures


def generator_figures(window: Window) -> dict[str, float]:
    """Returns how late the generator itself was, in milliseconds, and its share of a core."""
    lags = window.lag_s[window.sent]
    p99 = float(np.percentile(lags, 99)) if lags.size else 0.0
    return {
        "lag_p99_ms": round(1000 * p99, 3),
        "cores": round(window.busy_s / window.seconds, 3) if window.seconds else 0.0,
    }


def answers_figures(windows: Sequence[Window], page_size: int) -> dict[str, Any]:
    """Returns what the answers of windows say of themselves.

    Args:
        windows: The windows.
        page_size: Items that were asked for.

    Returns:
        `rungs` (shares), `degraded` (counts by part), `short` (answers with fewer items), `refused_events`, and
        `checked`, the number of answers that were read.
    """
    rungs: Counter[str] = Counter()
    degraded: Counter[str] = Counter()
    short = refused = checked = 0
    for name, answer in _sample(windows):
        checked += 1
        if name == "ingest":
            statuses = event_pb2.IngestResponse.FromString(answer).statuses
            refused += sum(bool(status.code) and not status.profile_version for status in statuses)
            continue
        slate = _RESPONSES[name].FromString(answer).slate
        rungs[common_pb2.Rung.Name(slate.rung).removeprefix("RUNG_").lower()] += 1
        # A Rank has as many items as its candidates allow.
        short += len(slate.items) < page_size and name != "rank"
        for part in slate.degraded:
            degraded[common_pb2.Part.Name(part.part).removeprefix("PART_")] += 1
    slates = max(rungs.total(), 1)
    return {
        "rungs": {rung: round(count / slates, 4) for rung, count in rungs.items()},
        "degraded": dict(degraded),
        "short": short,
        "refused_events": refused,
        "checked": checked,
    }


def by_method(windows: Sequence[Window]) -> dict[str, dict[str, Any]]:
    """Returns calls, errors and latencies by method."""
    figures: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(windows[0].plan.names if windows else ()):
        chosen = [(window, window.plan.kinds == number) for window in windows]
        calls = sum(int((of_kind & window.sent).sum()) for window, of_kind in chosen)
        if calls:
            parts = [window.latency_s[of_kind & window.answered] for window, of_kind in chosen]
            values = np.concatenate(parts) * 1000
            figures[name] = {"calls": calls, "errors": calls - values.size, "latency_ms": latency_ms(values)}
    return figures


def histogram(windows: Sequence[Window]) -> str:
    """Returns the latencies of windows in microseconds as an encoded HdrHistogram, which other tools read."""
    recorded = HdrHistogram(1, MOST_US, 3)
    for window in windows:
        # The histogram refuses values outside its range; a minute is as bad as an hour here.
        for value in np.clip(window.latencies_ms() * 1000, 1, MOST_US).astype(np.int64).tolist():
            recorded.record_value(value)
    encoded: bytes = recorded.encode()
    return encoded.decode()


def read_answers(windows: Sequence[Window]) -> Iterator[tuple[str, ranking_pb2.Slate]]:
    """Yields the method and the slate of the answers that are read, those of ingest left out."""
    for name, answer in _sample(windows):
        if name in _RESPONSES:
            yield name, _RESPONSES[name].FromString(answer).slate


def _sample(windows: Sequence[Window]) -> list[tuple[str, bytes]]:
    """Returns the method and the message of some answers of each window."""
    sample = []
    for window in windows:
        answered = np.flatnonzero(window.answered)
        step = max(1, answered.size // _CHECKED)
        names, kinds = window.plan.names, window.plan.kinds
        sample += [(names[kinds[key]], window.answers[key]) for key in answered[::step].tolist()]
    return sample
