"""The latency of a running service, as its callers feel it, and the highest rate at which it still holds.

Calls start at the moments of a Poisson process, whether or not earlier ones have come back, and each latency counts
from the moment its call was meant to start (`benchmarks.load.generator`). The highest rate is either searched for by a
promise, or measured with a closed loop of as many callers as fill the server.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load.figures import Measured, answers_figures, by_method, histogram, latency_ms, window_figures
from benchmarks.load.generator import CONNECTIONS, Generator
from benchmarks.load.material import gather
from benchmarks.load.process_tree import ProcessTree
from benchmarks.load.quality import Checks, Quality, reserved
from benchmarks.load.recorded import RecordedTraffic
from benchmarks.load.traffic import MixedTraffic, RequestMaterial, Shape, Traffic
from benchmarks.report import BenchmarkError, facts

METHOD = (
    f"open loop, Poisson arrivals, latency from the intended start, {CONNECTIONS} connections, equally many to each "
    "worker and used in turn"
)
CALLERS = 16
WARM_UP_S = 2.0
CEILING_S = 4.0
REQUESTS = 5000
WINDOWS = 10


@dataclass(frozen=True)
class Target:
    """A service to measure, and what is asked of it.

    Attributes:
        address: `HOST:PORT`, or `unix:PATH`.
        users: Users to request slates for: ids, or a file of them (`features.tables.user_ids`).
        bundle: Its bundle, if it lies on this machine: its items, their titles, and the truth for the index's recall.
        queries: File of queries, one a line.
        recorded: A warehouse whose traffic is repeated, instead of a mix.
        pid: The service's first process; None: the one that listens at the address.
        seed: Seed of arrivals and users.
    """

    address: str
    users: Path | Sequence[str]
    bundle: Path | None = None
    queries: Path | None = None
    recorded: Path | None = None
    pid: int | None = None
    seed: int = 1


@dataclass
class Bench:
    """A service under measurement.

    Attributes:
        generator: The connections.
        traffic: The calls.
        shape: Their form.
        material: Their contents.
        tree: The service's processes; None if they are not on this machine.
        probed: Contents of the requests that check the quality; their users get no events.
        bundle: The service's bundle, if it is at hand.
        windows: Everything measured since it was emptied last.
    """

    generator: Generator
    traffic: Traffic
    shape: Shape
    material: RequestMaterial
    tree: ProcessTree | None
    probed: RequestMaterial
    bundle: Path | None = None
    windows: list[Measured] = field(default_factory=list)

    def measure(self, rate: float, count: int) -> Measured:
        """Measures one window."""
        plan = self.traffic.plan(rate, count)
        before = self.tree.usage() if self.tree else None
        window = self.generator.open_loop(plan)
        usage = self.tree.usage() - before if self.tree and before else None
        self.windows.append(Measured(window, usage))
        return self.windows[-1]

    def fill(self, seconds: float) -> float:
        """Keeps the server full for some seconds; returns the answers per second.

        Raises:
            BenchmarkError: No request was answered.
        """
        plan = self.traffic.plan(1.0, math.ceil(seconds * _MOST_PER_SECOND))
        window = self.generator.closed_loop(plan, CALLERS, seconds)
        if not window.answered.any():
            raise BenchmarkError(f"{self.generator.target} answers none of the requests: {window.errors()}")
        return float(window.answered.sum() / window.seconds)

    @contextmanager
    def checked(self, checks: Checks | None) -> Iterator[Quality | None]:
        """Checks the quality while the block runs; the service must be idle before it."""
        if checks is None:
            yield None
            return
        with Quality.of(self.generator, self.probed, checks, self.bundle) as quality:
            yield quality

    def circumstances(self) -> dict[str, Any]:
        """Returns what a result says of how it was measured."""
        workers = self.generator.workers
        return {
            "traffic": self.traffic.figures(),
            "users": len(self.material.users),
            "page_size": self.shape.page_size,
            "connections_by_worker": workers or "the service does not name its workers",
            "cpu_of": f"the tree of process {self.tree.pid}" if self.tree else "not to be seen from this machine",
            "method": METHOD,
            **facts(),
        }


_MOST_PER_SECOND = 2000
"""Calls that a closed loop is prepared for; one that needs more of them ends early."""


@contextmanager
def bench_of(target: Target, shape: Shape, *, checked: bool = False) -> Iterator[Bench]:
    """Connects to a service, and prepares its traffic.

    Args:
        target: The service.
        shape: The form of the traffic.
        checked: Keeps some users out of the traffic, whose answers are compared.

    Raises:
        BenchmarkError: There is no service, there are no users, or the mix needs something that is not known.
    """
    with Generator(target.address, token=os.environ.get("PENCHANT_TOKEN", "")) as generator:
        # The checks send events, and search, whatever the mix does.
        needed = {*shape.mix, "ingest", "search"} if checked else set(shape.mix)
        contents = gather(generator, target.users, needed, bundle=target.bundle, queries=target.queries)
        loaded, probed = reserved(contents.users) if checked else (contents.users, ())
        material = replace(contents, users=loaded)
        traffic: Traffic
        if target.recorded:
            traffic = RecordedTraffic(generator, target.recorded, shape.timeout_s)
        else:
            traffic = MixedTraffic(generator, material, shape, target.seed)
        tree = ProcessTree(target.pid) if target.pid else ProcessTree.listening_at(target.address)
        bench = Bench(generator, traffic, shape, material, tree, replace(contents, users=probed), target.bundle)
        # Connections, caches and the pages of the bundle are cold at first.
        bench.fill(WARM_UP_S)
        if isinstance(traffic, RecordedTraffic):
            traffic.rewind()
        yield bench


def latency(
    target: str | Target,
    users: Path | Sequence[str] = (),
    *,
    requests: int | None = None,
    rate: str | float = "half",
    duration: float | None = None,
    windows: int = WINDOWS,
    shape: Shape | None = None,
    checks: Checks | None = None,
) -> dict[str, Any]:
    """Measures a service at one rate, in several windows.

    Args:
        target: The service, or its `HOST:PORT`.
        users: Users, if `target` is an address.
        requests: Number of requests; 5,000 unless `duration` is given.
        rate: Requests per second, "half" for half of the highest rate, measured first, or "2x" for recorded traffic at
            twice its speed.
        duration: Length of the measurement in seconds, instead of `requests`.
        windows: Number of windows of equal length, so that `compare` can tell a difference from noise.
        shape: The form of the traffic; None: `Recommend` only.
        checks: Quality to check meanwhile; None checks none.

    Returns:
        `rate` (offered, per second), `achieved_rate`, `highest_rate` if it was measured, `latency_ms`, `errors`,
        `cpu_ms` (processor time of the service per request), `rungs` (shares), `degraded`, `short`, `requests`,
        `windows` (the figures of each), `quality` if it was checked, and the circumstances.

    Raises:
        BenchmarkError: There are no users, there is no such service, or the rate is not a number.
    """
    named = target if isinstance(target, Target) else Target(target, users)
    with bench_of(named, shape or Shape(), checked=bool(checks)) as bench:
        figures: dict[str, Any] = {}
        per_second = rate_of(bench, rate, figures)
        count = requests or (math.ceil(duration * per_second) if duration else REQUESTS)
        with bench.checked(checks) as quality:
            for size in sizes_of(count, windows):
                bench.measure(per_second, size)
            if quality:
                figures["quality"] = quality.figures([measured.window for measured in bench.windows])
        return {"rate": round(per_second, 1), **figures, **summary(bench), **bench.circumstances()}


def save(file: Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def summary(bench: Bench) -> dict[str, Any]:
    """Returns the figures of all windows of a bench together, and of each."""
    windows = [measured.window for measured in bench.windows]
    errors: dict[str, int] = {}
    for window in windows:
        for name, count in window.errors().items():
            errors[name] = errors.get(name, 0) + count
    seconds = sum(window.seconds for window in windows)
    calls = sum(int(window.sent.sum()) for window in windows)
    values = np.concatenate([window.latencies_ms() for window in windows])
    used = [measured.usage.service_s for measured in bench.windows if measured.usage]
    return {
        "requests": calls,
        "achieved_rate": round(values.size / seconds, 1),
        "latency_ms": latency_ms(values),
        "errors": errors,
        "cpu_ms": round(1000 * sum(used) / calls, 3) if used else None,
        **answers_figures(windows, bench.shape.page_size),
        "by_method": by_method(windows),
        "histogram": histogram(windows),
        "windows": [window_figures(measured) for measured in bench.windows],
    }


def rate_of(bench: Bench, rate: str | float, figures: dict[str, Any]) -> float:
    """Returns the calls a second that a rate names; notes the highest rate where it is measured for that.

    Raises:
        BenchmarkError: It is no rate.
    """
    text = str(rate)
    if text == "half":
        figures["highest_rate"] = round(bench.fill(CEILING_S), 1)
        # Near the highest rate a queue grows without bound, and its length is all that would be measured.
        return float(figures["highest_rate"]) / 2
    if text.endswith("x") and isinstance(bench.traffic, RecordedTraffic):
        figures["speed"] = _number(text.removesuffix("x"), text)
        return float(figures["speed"]) * bench.traffic.rate
    return _number(text, text)


def sizes_of(count: int, windows: int) -> list[int]:
    """Returns the calls of each window, as equal as they can be; none is empty."""
    windows = max(1, min(windows, count))
    return [count // windows + (number < count % windows) for number in range(windows)]


def _number(text: str, named: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0 or math.isinf(value):
        raise BenchmarkError(
            f"rate {named!r}: give requests per second above 0, 'half', or a multiple of recorded traffic such as 2x"
        )
    return value
