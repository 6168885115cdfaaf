"""The comparison of two results: whether they differ by more than noise, and by how much.

The windows of a result are the sample: calls of one window wait in the same queue and are no independent observations,
so counting them one by one would find a difference between any two runs. Labels of windows are exchanged at random, in
pairs where the two services were measured in turn, and the largest studentised difference of any metric is recorded
each time. Its 95th percentile bounds all intervals at once, so that of two equal runs at most one in twenty is called
different, whichever metric it is (Westfall and Young, "Resampling-Based Multiple Testing", 1993).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.report import BenchmarkError, is_dirty

_F64 = npt.NDArray[np.float64]

METRICS = ("p50", "p90", "p99", "cpu_ms")
LEVEL = 0.95
LEAST_WINDOWS = 6
"""With fewer pairs there are not enough ways to exchange the labels to be sure of anything."""
EXCHANGES = 4000
_SELF_EXCHANGES = 1000
_SAME_RATE = 0.03
_MOST_CORRELATION = 0.8


@dataclass(frozen=True)
class Outcome:
    """The comparison of the windows of two runs, metric by metric, on a log scale; all float64 [M].

    Attributes:
        difference: Mean log of the second run's windows less that of the first one's.
        half_width: Half of the width of the interval that holds for all metrics at once.
        correlation: Correlation of a window with the one before it, which widens the interval.
    """

    difference: _F64
    half_width: _F64
    correlation: float

    @property
    def different(self) -> npt.NDArray[np.bool_]:
        """The metrics whose interval does not hold zero; bool [M]."""
        excluded: npt.NDArray[np.bool_] = np.abs(self.difference) > self.half_width
        return excluded


def compare(first: Mapping[str, Any], second: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """Compares two results of `bench latency`.

    Args:
        first: A result.
        second: The result that may be slower or faster.
        seed: Seed of the exchanges.

    Returns:
        `different` (any metric), `verdict` in words, `paired`, `windows` of each, `metrics` {name: `first`, `second`
        (geometric means), `ratio`, `low`, `high` (second over first, 95 % for all metrics at once), `different`},
        `correlation` of successive windows, `errors` of each, `commits`, and `warnings`.

    Raises:
        BenchmarkError: The results have too few windows, or were measured at different rates or with other traffic.
    """
    _require_comparable(first, second)
    names = [name for name in METRICS if all(_has(result, name) for result in (first, second))]
    samples = [_sample(result, names) for result in (first, second)]
    paired = bool(first.get("pairing")) and first.get("pairing") == second.get("pairing")
    if paired:
        count = min(map(len, samples))
        samples = [sample[:count] for sample in samples]
    outcome = outcome_of(samples[0], samples[1], paired=paired, rng=np.random.default_rng(seed))
    metrics = _metrics(names, samples, outcome)
    return {
        "different": any(metric["different"] for metric in metrics.values()),
        "verdict": _verdict(metrics),
        "paired": paired,
        "windows": [len(sample) for sample in samples],
        "metrics": metrics,
        "correlation": round(outcome.correlation, 3),
        "errors": [first.get("errors", {}), second.get("errors", {})],
        "commits": [first.get("commit"), second.get("commit")],
        "warnings": _warnings(first, second, paired),
    }


def _metrics(names: Sequence[str], samples: Sequence[_F64], outcome: Outcome) -> dict[str, dict[str, Any]]:
    # Of logs a difference is a ratio, and a mean is that of the factors.
    return {
        name: {
            "first": round(float(np.exp(samples[0][:, at].mean())), 3),
            "second": round(float(np.exp(samples[1][:, at].mean())), 3),
            "ratio": round(float(np.exp(outcome.difference[at])), 4),
            "low": round(float(np.exp(outcome.difference[at] - outcome.half_width[at])), 4),
            "high": round(float(np.exp(outcome.difference[at] + outcome.half_width[at])), 4),
            "different": bool(outcome.different[at]),
        }
        for at, name in enumerate(names)
    }


def outcome_of(
    first: _F64, second: _F64, *, paired: bool, rng: np.random.Generator, exchanges: int = EXCHANGES
) -> Outcome:
    """Compares the windows of two runs.

    Args:
        first: Logs of the metrics of the windows, in the order of measurement; float64 [N, M].
        second: Those of the other run; float64 [K, M], and K = N if they are paired.
        paired: True if window n of both was measured at about the same time.
        rng: Draws the exchanges.
        exchanges: Number of them.
    """
    if paired:
        differences = second - first
        center, error = differences.mean(0), _standard_error(differences)
        residuals = [differences - center]
        signs = rng.choice([-1.0, 1.0], (exchanges, len(differences)))
        # The mean of the squares does not change with the signs, so each exchange is one product.
        means = signs @ differences / len(differences)
        squares = (differences**2).sum(0)
        spread = np.sqrt(np.maximum(squares - len(differences) * means**2, 0) / (len(differences) - 1))
        largest = _largest(means, spread / np.sqrt(len(differences)))
    else:
        center = second.mean(0) - first.mean(0)
        error = np.hypot(_standard_error(first), _standard_error(second))
        residuals = [first - first.mean(0), second - second.mean(0)]
        largest = _exchanged(np.concatenate([first, second]), len(first), rng, exchanges)
    correlation = _correlation(residuals)
    # Windows that resemble the ones before them say less than as many independent ones.
    inflation = np.sqrt((1 + correlation) / (1 - correlation))
    return Outcome(center, float(np.quantile(largest, LEVEL)) * error * inflation, correlation)


def self_check(result: Mapping[str, Any], *, slowdown: float = 1.1, trials: int = 400, seed: int = 0) -> dict[str, Any]:
    """Checks `compare` on a result's own windows: random halves of one run are equal, and one made slower is not.

    Args:
        result: A result with at least twice `LEAST_WINDOWS` windows.
        slowdown: The factor of the planted slowdown.
        trials: Number of random halves.
        seed: Seed of the halves.

    Returns:
        `false_alarms` and `found`, shares of the trials, `windows` of each half, `slowdown`, `trials`.

    Raises:
        BenchmarkError: There are too few windows.
    """
    names = [name for name in METRICS if _has(result, name)]
    sample, rng = _sample(result, names), np.random.default_rng(seed)
    half = len(sample) // 2
    if half < LEAST_WINDOWS:
        raise BenchmarkError(
            f"{len(sample)} windows make halves of {half}, too few: measure with --windows {2 * LEAST_WINDOWS} or more"
        )
    false_alarms = slower_runs = 0
    for _ in range(trials):
        order = rng.permutation(len(sample))
        first, second = sample[order[:half]], sample[order[half : 2 * half]]
        equal, slower = (
            outcome_of(first, second + np.log(factor), paired=False, rng=rng, exchanges=_SELF_EXCHANGES)
            for factor in (1.0, slowdown)
        )
        false_alarms += bool(equal.different.any())
        slower_runs += bool((slower.different & (slower.difference > 0)).any())
    return {
        "false_alarms": round(false_alarms / trials, 4),
        "found": round(slower_runs / trials, 4),
        "windows": half,
        "slowdown": slowdown,
        "trials": trials,
    }


def _exchanged(windows: _F64, first: int, rng: np.random.Generator, exchanges: int) -> _F64:
    """Returns the largest studentised difference of each exchange of labels; float64 [exchanges]."""
    count = len(windows)
    chosen = rng.random((exchanges, count)).argsort(1) < first
    means, variances = [], []
    for mask, size in ((chosen, first), (~chosen, count - first)):
        weights = mask.astype(np.float64)
        mean = weights @ windows / size
        square = weights @ windows**2 / size
        means.append(mean)
        variances.append(np.maximum(square - mean**2, 0) / (size - 1))
    return _largest(means[1] - means[0], np.sqrt(variances[0] + variances[1]))


def _largest(differences: _F64, errors: _F64) -> _F64:
    ratios: _F64 = (np.abs(differences) / np.maximum(errors, 1e-12)).max(1)
    return ratios


def _standard_error(values: _F64) -> _F64:
    error: _F64 = values.std(0, ddof=1) / np.sqrt(len(values))
    return error


def _correlation(residuals: Sequence[_F64]) -> float:
    """Returns the correlation of successive windows, the mean of all metrics, never below 0."""
    products = sum((values[1:] * values[:-1]).sum(0) for values in residuals)
    squares = sum((values**2).sum(0) for values in residuals)
    raw = float(np.mean(products / np.maximum(squares, 1e-12)))
    # Residuals of few windows resemble one another less than the windows do (Kendall, 1954).
    count = min(map(len, residuals))
    estimate = (raw + 1 / count) / (1 - 3 / count)
    return min(max(estimate, 0.0), _MOST_CORRELATION)


def _has(result: Mapping[str, Any], name: str) -> bool:
    return all(_value(window, name) for window in result["windows"])


def _value(window: Mapping[str, Any], name: str) -> float:
    return float(window.get(name) or window["latency_ms"].get(name) or 0.0)


def _sample(result: Mapping[str, Any], names: Sequence[str]) -> _F64:
    return np.log(np.array([[_value(window, name) for name in names] for window in result["windows"]], np.float64))


def _require_comparable(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    for result in (first, second):
        if "windows" not in result or "rate" not in result:
            raise BenchmarkError("a file is no result of bench latency: give what --out wrote")
        if len(result["windows"]) < LEAST_WINDOWS:
            raise BenchmarkError(
                f"{len(result['windows'])} windows say nothing of their noise: measure with --windows {LEAST_WINDOWS} "
                "or more, best 20"
            )
    rates = [float(result["rate"]) for result in (first, second)]
    if abs(rates[0] / rates[1] - 1) > _SAME_RATE:
        raise BenchmarkError(
            f"the results were measured at {rates[0]:g} and {rates[1]:g} requests a second{_highest(first, second)}, "
            "and latency depends on the rate: measure both with the same --rate"
        )
    if first.get("traffic") != second.get("traffic"):
        raise BenchmarkError("the results were measured with different traffic: measure both with the same options")


def _highest(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Returns the highest rates of two results, in words; "" where they were not searched for."""
    if not all("highest_rates" in result for result in (first, second)):
        return ""
    texts = [", ".join(f"{rate:g}" for rate in result["highest_rates"]) for result in (first, second)]
    return f" (half of their highest rates: {texts[0]} and {texts[1]})"


def _warnings(first: Mapping[str, Any], second: Mapping[str, Any], paired: bool) -> list[str]:
    warnings = []
    if first.get("machine") != second.get("machine"):
        warnings.append("the results come from different machines")
    if first.get("versions") != second.get("versions"):
        warnings.append("the results come from different versions of the packages")
    warnings += [
        f"commit {result['commit']} does not say what was measured: its tree had changes"
        for result in (first, second)
        if is_dirty(str(result.get("commit", "")))
    ]
    if not paired:
        warnings.append("measured one after the other, so a change of the machine counts; --against avoids that")
    return warnings


def _verdict(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    parts = [
        f"{name} is {abs(metric['ratio'] - 1):.1%} {'higher' if metric['ratio'] > 1 else 'lower'} "
        f"({metric['low'] - 1:+.1%} to {metric['high'] - 1:+.1%})"
        for name, metric in metrics.items()
        if metric["different"]
    ]
    if parts:
        return "the second differs: " + "; ".join(parts)
    widest = max((max(metric["high"], 1 / metric["low"]) - 1 for metric in metrics.values()), default=0.0)
    return f"no difference beyond noise; one of up to {widest:.0%} could hide in it"
