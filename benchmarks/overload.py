"""A service under more traffic than it can answer: what it still answers, how it refuses the rest, and how it recovers.

Three phases, each with a quiet one before and after: everything interactive at a multiple of the highest rate; half of
the highest rate interactive while batch traffic fills up to the same multiple; and the recovery, at half of the highest
rate, from the moment that the overload ends. Batch traffic says so in the metadata: `penchant-priority: batch`.

The same overload of a service without admission is the control: there the goodput has to collapse, or this measurement
could not tell.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.latency import CEILING_S, Bench, Target, bench_of
from benchmarks.load.ceiling import Promise
from benchmarks.load.figures import latency_ms, window_figures
from benchmarks.load.process_tree import ProcessTree
from benchmarks.load.traffic import MixedTraffic, Shape
from benchmarks.load.window import CallPlan, Window, refusals
from benchmarks.report import BenchmarkError

_SAMPLE_S = 0.25
_BIN_S = 0.25
"""Length of the moments by which the recovery is told."""
_QUIET_SHARE = 0.5
_LIMITS = {"goodput": 0.9, "refused_p99_ms": 10.0, "interactive_served": 0.999, "memory_ratio": 1.1, "recovery_s": 2.0}
"""Limits that a service with admission has to keep."""


@dataclass(frozen=True)
class Overload:
    """The overload to make.

    Attributes:
        times: Offered rate over the highest rate.
        seconds: Length of each overloaded phase.
        highest: The highest rate; None measures it with a closed loop.
        promise: Answers later than this are no goodput.
    """

    times: float = 10.0
    seconds: float = 10.0
    highest: float | None = None
    promise: Promise = field(default_factory=lambda: Promise(50.0))


def overload(target: Target, load: Overload, shape: Shape | None = None) -> dict[str, Any]:
    """Overloads a service.

    Args:
        target: The service.
        load: The overload.
        shape: The form of the traffic; None: `Recommend` only.

    Returns:
        `highest_rate`, `offered_rate`, `quiet`, `interactive` and `mixed` (each with `goodput`, answers a second within
        the promise, and `goodput_share` of the highest rate; `refused`, percentiles of the time until a refusal, from
        the intended start and from the sending; and
        `by_priority`), `recovery_s`, `memory_bytes` (before, highest, after), `limits` and `kept` (limit by limit), and
        the circumstances.

    Raises:
        BenchmarkError: There is no such service, or it does not even answer half of its highest rate.
    """
    with bench_of(target, shape or Shape()) as bench:
        highest = load.highest or bench.fill(CEILING_S)
        offered = load.times * highest
        quiet = bench.measure(_QUIET_SHARE * highest, _count(_QUIET_SHARE * highest, load.seconds))
        if not quiet.window.answered.any():
            raise BenchmarkError(f"half of the highest rate is not answered: {quiet.window.errors()}")
        with _memory(bench.tree) as memory:
            phases = {
                "interactive": _phase(bench, _overloaded(bench, offered, 0.0, load), highest, load),
                "mixed": _phase(bench, _overloaded(bench, offered, 1 - _QUIET_SHARE / load.times, load), highest, load),
            }
        figures = {
            "highest_rate": round(highest, 1),
            "offered_rate": round(offered, 1),
            "quiet": window_figures(quiet),
            **phases,
            "recovery_s": max(phase["recovery_s"] for phase in phases.values()),
            "memory_bytes": memory.figures(),
        }
        return {**figures, **_judged(figures), "promise": vars(load.promise), **bench.circumstances()}


def _overloaded(bench: Bench, offered: float, batch_share: float, load: Overload) -> CallPlan:
    """Returns the calls of an overload and of the quiet time after it, in one plan, so that neither waits."""
    shape = replace(bench.shape, batch_share=batch_share)
    burst = MixedTraffic(bench.generator, bench.material, shape).plan(offered, _count(offered, load.seconds))
    quiet_rate = _QUIET_SHARE * offered / load.times
    after = bench.traffic.plan(quiet_rate, _count(quiet_rate, load.seconds))
    return CallPlan(
        np.concatenate([burst.moments, burst.moments[-1] + after.moments]),
        [*burst.heads, *after.heads],
        [*burst.messages, *after.messages],
        np.concatenate([burst.kinds, after.kinds]),
        burst.names,
        burst.timeout_s,
    )


def _phase(bench: Bench, plan: CallPlan, highest: float, load: Overload) -> dict[str, Any]:
    window = bench.generator.open_loop(plan, endure=True)
    end = float(plan.moments[_count(load.times * highest, load.seconds) - 1])
    within = plan.moments <= end
    good = within & window.answered & (window.latency_s * 1000 <= load.promise.p99_ms)
    refused = within & window.sent & ~window.answered
    # A generator that is late itself must not be charged to the refusal.
    since_sent = (window.latency_s - window.lag_s)[refused] * 1000
    goodput = good.sum() / end
    return {
        "calls": int((within & window.sent).sum()),
        "seconds": round(end, 2),
        "goodput": round(float(goodput), 1),
        "goodput_share": round(float(goodput) / highest, 4),
        "refused": {
            "latency_ms": latency_ms(window.latency_s[refused] * 1000),
            "since_sent_ms": latency_ms(since_sent),
            "by_status": refusals(window),
        },
        "by_priority": _by_priority(bench, window, within),
        "recovery_s": _recovery(window, ~within, end, load.promise),
        "generator": {"cores": round(window.busy_s / window.seconds, 3), "lag_p99_ms": _lag_p99_ms(window)},
    }


def _by_priority(bench: Bench, window: Window, within: npt.NDArray[np.bool_]) -> dict[str, dict[str, Any]]:
    # The header block is the only place where a call says its priority.
    batch = np.array([b"penchant-priority" in head for head in window.plan.heads])
    figures = {}
    for name, chosen in (("interactive", within & ~batch), ("batch", within & batch)):
        calls = int((chosen & window.sent).sum())
        if calls:
            served = chosen & window.answered
            figures[name] = {
                "calls": calls,
                "served": round(int(served.sum()) / calls, 5),
                "latency_ms": latency_ms(window.latency_s[served] * 1000),
            }
    return figures


def _recovery(window: Window, after: npt.NDArray[np.bool_], end: float, promise: Promise) -> float:
    """Returns the seconds from the end of the overload until every later moment keeps the promise."""
    since = window.plan.moments - end
    bad = after & (~window.answered | (window.latency_s * 1000 > promise.p99_ms))
    last = 0.0
    for number in range(int(since[-1] / _BIN_S) + 1):
        of_bin = after & (since >= number * _BIN_S) & (since < (number + 1) * _BIN_S)
        # A single late answer is what the promise allows; a moment of which a tenth is late is not normal yet.
        if of_bin.any() and bad[of_bin].mean() > 0.1:
            last = (number + 1) * _BIN_S
    return last


def _judged(figures: dict[str, Any]) -> dict[str, Any]:
    interactive, mixed, memory = figures["interactive"], figures["mixed"], figures["memory_bytes"]
    refused = interactive["refused"]["since_sent_ms"].get("p99", 0.0)
    values = {
        "goodput": (interactive["goodput_share"], True),
        "refused_p99_ms": (refused, False),
        "interactive_served": (mixed["by_priority"].get("interactive", {"served": 0.0})["served"], True),
        "recovery_s": (figures["recovery_s"], False),
    }
    if memory:
        values["memory_ratio"] = (memory["highest"] / memory["before"], False)
    kept = {
        name: {"value": round(float(value), 4), "limit": _LIMITS[name], "kept": _keeps(value, _LIMITS[name], at_least)}
        for name, (value, at_least) in values.items()
    }
    return {"kept": kept, "all_kept": all(entry["kept"] for entry in kept.values())}


def _keeps(value: float, limit: float, at_least: bool) -> bool:
    return bool(value >= limit if at_least else value <= limit)


def _lag_p99_ms(window: Window) -> float:
    return round(float(np.nanpercentile(window.lag_s, 99)) * 1000, 3)


def _count(rate: float, seconds: float) -> int:
    return max(20, int(rate * seconds))


class MemoryWatch:
    """The resident memory of a service, read every quarter of a second by a thread."""

    def __init__(self, tree: ProcessTree | None) -> None:
        self._tree, self._sizes = tree, [tree.rss_bytes()] if tree else []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def start(self) -> None:
        """Begins to read."""
        if self._tree:
            self._thread.start()

    def stop(self) -> None:
        """Reads for the last time."""
        self._ended.set()
        if self._tree:
            self._thread.join()

    def figures(self) -> dict[str, int]:
        """Returns the memory before, the highest, and afterwards; empty if the service is not to be seen."""
        sizes = self._sizes
        return {"before": sizes[0], "highest": max(sizes), "after": sizes[-1]} if sizes else {}

    def _watch(self) -> None:
        assert self._tree is not None
        while not self._ended.wait(_SAMPLE_S):
            self._sizes.append(self._tree.rss_bytes())
        self._sizes.append(self._tree.rss_bytes())


@contextmanager
def _memory(tree: ProcessTree | None) -> Iterator[MemoryWatch]:
    memory = MemoryWatch(tree)
    memory.start()
    try:
        yield memory
    finally:
        memory.stop()
