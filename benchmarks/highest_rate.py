"""The highest rate at which a service keeps a promise, and its latency below and above that rate."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import latency as tool
from benchmarks.latency import Bench, Target, bench_of, summary
from benchmarks.load.ceiling import Promise, Search, Trial
from benchmarks.load.figures import generator_figures, latency_ms, window_figures
from benchmarks.load.quality import Checks
from benchmarks.load.traffic import Shape
from benchmarks.report import BenchmarkError

HALF_WINDOWS = 5
"""Windows at half of the highest rate: one stall is a large part of the p99 of a short one."""
CURVE = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1)
"""Shares of the highest rate at which the curve of the latency is measured."""
_LEAST_CALLS = 8


def find_max(
    target: Target,
    promise: Promise,
    *,
    window_s: float = 8.0,
    shape: Shape | None = None,
    checks: Checks | None = None,
    repeats: int = 1,
    curve: Sequence[float] = CURVE,
) -> dict[str, Any]:
    """Finds the highest rate at which a service keeps a promise, and measures it below and above.

    Args:
        target: The service.
        promise: What has to hold.
        window_s: Length of each window, in seconds.
        shape: The form of the traffic; None: `Recommend` only.
        checks: Quality to check at three quarters of the highest rate; None checks none.
        repeats: Number of searches; the highest rate is their median.
        curve: Shares of the highest rate at which the latency is measured afterwards.

    Returns:
        `highest_rate`, `highest_rates` (of each search), `promise`, `trials`, `curve` (figures at each share),
        `at_half` (percentiles at half of it, and `p99_over_p50`), what `latency` returns of the windows at half of it,
        and `quality`.

    Raises:
        BenchmarkError: There is no such service, or no rate holds.
    """
    with bench_of(target, shape or Shape(), checked=bool(checks)) as bench:
        start = 0.7 * bench.fill(tool.CEILING_S)
        searches = [Search(promise, lambda rate: _trial(bench, rate, window_s)) for _ in range(repeats)]
        rates = [search.highest(start) for search in searches]
        highest, trials = float(np.median(rates)), [vars(trial) for search in searches for trial in search.trials]
        if not highest:
            raise BenchmarkError(
                f"no rate holds p99 <= {promise.p99_ms:g} ms with at most {promise.errors:.2%} errors; the last "
                f"window: {trials[-1]}. Give a looser --slo-p99 or --slo-errors"
            )
        figures = {
            "highest_rate": round(highest, 1),
            "highest_rates": [round(rate, 1) for rate in rates],
            "promise": vars(promise),
            "trials": trials,
            **_around(bench, highest, window_s, checks, curve),
        }
        return {"rate": round(highest / 2, 1), **figures, **summary(bench), **bench.circumstances()}


def _around(
    bench: Bench, highest: float, window_s: float, checks: Checks | None, curve: Sequence[float]
) -> dict[str, Any]:
    """Measures the curve, the quality, and half of the highest rate, whose windows are left in the bench."""
    points = [(share, bench.measure(share * highest, _calls(share * highest, window_s))) for share in curve]
    figures: dict[str, Any] = {"curve": [{"share": share, **window_figures(measured)} for share, measured in points]}
    if checks:
        figures["quality"] = _checked_at(bench, 0.75 * highest, checks, window_s)
    # The windows that the result keeps, and that `compare` reads, are all of one rate.
    bench.windows.clear()
    for _ in range(HALF_WINDOWS):
        bench.measure(highest / 2, _calls(highest / 2, window_s))
    times = summary(bench)["latency_ms"]
    ratio = round(times["p99"] / times["p50"], 2) if times else None
    figures["at_half"] = {"rate": round(highest / 2, 1), **times, "p99_over_p50": ratio}
    return figures


def _trial(bench: Bench, rate: float, window_s: float) -> Trial:
    window = bench.measure(rate, _calls(rate, window_s)).window
    values = window.latencies_ms()
    p99 = latency_ms(values)["p99"] if values.size else math.inf
    if window.gave_up:
        # The queue that it left behind would be charged to the next window.
        time.sleep(1.0)
    calls = int(window.sent.sum())
    lag_ms = generator_figures(window)["lag_p99_ms"]
    return Trial(round(rate, 2), p99, 1 - values.size / max(calls, 1), window.gave_up, lag_ms)


def _checked_at(bench: Bench, rate: float, checks: Checks, window_s: float) -> dict[str, Any]:
    with bench.checked(checks) as quality:
        windows = [bench.measure(rate, _calls(rate, window_s)).window for _ in range(2)]
        assert quality is not None
        return {"rate": round(rate, 1), **quality.figures(windows)}


def _calls(rate: float, seconds: float) -> int:
    # A slow service needs longer windows, or a few calls would decide.
    return max(_LEAST_CALLS, int(rate * seconds))
