"""The latency of a running service, as its callers feel it.

The loop is open: requests start at the moments of a Poisson process, whether or not earlier ones have come back, and
each latency counts from the moment its request was meant to start. A closed loop would wait for a slow server and so
hide its slowness (Tene, "How NOT to measure latency", 2013). The highest rate, which `rate="half"` halves, is measured
first with a closed loop of as many callers as fill the server.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from hdrh.histogram import HdrHistogram

from benchmarks.report import BenchmarkError, facts
from features.tables.user_ids import read_user_ids
from penchant.channels import channel_options
from penchant.v1 import common_pb2, ranking_pb2, ranking_pb2_grpc

CHANNELS = 8
CALLERS = 16
WARM_UP_S = 2.0
CEILING_S = 6.0
MOST_US = 60_000_000
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}


@dataclass
class Tally:
    """What came back.

    Attributes:
        histogram: Latencies from the intended start, in microseconds, three digits.
        errors: Number of failed calls, by gRPC status.
        rungs: Number of answers, by rung.
        degraded: Number of answers that gave something up, by part.
        short: Number of answers with fewer items than were asked for.
    """

    histogram: Any = field(default_factory=lambda: HdrHistogram(1, MOST_US, 3))
    errors: Counter[str] = field(default_factory=Counter)
    rungs: Counter[str] = field(default_factory=Counter)
    degraded: Counter[str] = field(default_factory=Counter)
    short: int = 0

    @property
    def answers(self) -> int:
        """The number of calls that were answered."""
        return int(self.histogram.get_total_count())

    def take(self, slate: ranking_pb2.Slate, microseconds: int, page_size: int) -> None:
        """Counts one answer."""
        self.histogram.record_value(min(max(microseconds, 1), MOST_US))
        self.rungs[common_pb2.Rung.Name(slate.rung).removeprefix("RUNG_").lower()] += 1
        self.short += len(slate.items) < page_size
        for part in slate.degraded:
            self.degraded[common_pb2.Part.Name(part.part).removeprefix("PART_")] += 1

    def latency_ms(self) -> dict[str, float]:
        """Percentiles, mean and maximum in milliseconds."""
        read = self.histogram.get_value_at_percentile
        figures = {name: read(percentile) / 1000 for name, percentile in PERCENTILES.items()}
        figures["mean"] = round(self.histogram.get_mean_value() / 1000, 3)
        figures["max"] = self.histogram.get_max_value() / 1000
        return figures


def latency(
    target: str,
    users: Path | Sequence[str],
    *,
    requests: int | None = None,
    rate: str | float = "half",
    duration: float | None = None,
    surface: str = "",
    page_size: int = 10,
    timeout_s: float = 1.0,
    seed: int = 1,
) -> dict[str, Any]:
    """Measures `Recommend` of the service at `target`.

    Args:
        target: `HOST:PORT`.
        users: Users to ask for, drawn at random: their ids, or a file of users (`features.tables.user_ids`).
        requests: Number of requests; 5,000 unless `duration` says otherwise.
        rate: Requests per second, or "half" for half of the highest rate, measured first.
        duration: Length of the measurement in seconds, instead of `requests`.
        surface: Surface that the requests name.
        page_size: Number of items asked for.
        timeout_s: Deadline of each request in seconds.
        seed: Seed of arrivals and people.

    Returns:
        `rate` (offered, per second), `achieved_rate`, `highest_rate` where it was measured, `latency_ms`, `errors`,
        `rungs` (shares), `degraded`, `short`, `requests`, and the circumstances.

    Raises:
        BenchmarkError: Nobody to ask for, no such service, or a rate that is not a number.
    """
    people = _people(users)
    caller = _Caller(target, people, surface, page_size, timeout_s, random.Random(seed))
    figures, tally = asyncio.run(_measure(caller, requests, rate, duration))
    return {
        **figures,
        "latency_ms": tally.latency_ms(),
        "errors": dict(tally.errors),
        "rungs": {rung: round(count / max(tally.answers, 1), 4) for rung, count in tally.rungs.items()},
        "degraded": dict(tally.degraded),
        "short": tally.short,
        "people": len(people),
        "page_size": page_size,
        "method": f"open loop, Poisson arrivals, latency from the intended start, {CHANNELS} connections",
        **facts(),
    }


class _Caller:
    """Asks for one random person at a time, over connections that reach different workers."""

    def __init__(
        self, target: str, people: Sequence[str], surface: str, page_size: int, timeout_s: float, draw: random.Random
    ) -> None:
        self.target, self.page_size, self.draw = target, page_size, draw
        self._people, self._surface, self._timeout_s = people, surface, timeout_s
        self._channels: list[grpc.aio.Channel] = []
        self._stubs: list[Any] = []

    async def connect(self) -> None:
        """Opens the connections.

        Raises:
            BenchmarkError: Nobody answers at the target.
        """
        for number in range(CHANNELS):
            options = [("penchant.channel", number), ("grpc.use_local_subchannel_pool", 1)]
            options += channel_options(self.target)
            channel = grpc.aio.insecure_channel(self.target, options=options)
            self._channels.append(channel)
            self._stubs.append(ranking_pb2_grpc.RankingServiceStub(channel))
            try:
                await asyncio.wait_for(channel.channel_ready(), 10)
            except TimeoutError:
                raise BenchmarkError(f"nobody answers at {self.target}: start `penchant serve` there first") from None

    async def close(self) -> None:
        """Closes the connections."""
        for channel in self._channels:
            await channel.close(None)

    async def ask(self, tally: Tally, intended: float) -> None:
        """Sends one request and counts what comes back, from the moment it was meant to start."""
        options = ranking_pb2.RankingOptions(
            subject=common_pb2.Subject(user_id=self.draw.choice(self._people)),
            surface=self._surface,
            page_size=self.page_size,
        )
        stub = self._stubs[self.draw.randrange(CHANNELS)]
        try:
            answer = await stub.Recommend(ranking_pb2.RecommendRequest(options=options), timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            tally.errors[error.code().name] += 1
        else:
            tally.take(answer.slate, int((time.perf_counter() - intended) * 1e6), self.page_size)


async def _measure(
    caller: _Caller, requests: int | None, rate: str | float, duration: float | None
) -> tuple[dict[str, Any], Tally]:
    await caller.connect()
    try:
        figures: dict[str, Any] = {}
        await _closed_loop(caller, WARM_UP_S)
        if rate == "half":
            figures["highest_rate"] = round(await _closed_loop(caller, CEILING_S), 1)
            per_second = figures["highest_rate"] / 2
        else:
            per_second = _number(rate)
        count = requests or (math.ceil(duration * per_second) if duration else 5000)
        tally, seconds = await _open_loop(caller, per_second, count)
    finally:
        await caller.close()
    figures |= {"requests": count, "rate": round(per_second, 1), "achieved_rate": round(tally.answers / seconds, 1)}
    return figures, tally


async def _open_loop(caller: _Caller, rate: float, count: int) -> tuple[Tally, float]:
    """Sends `count` requests at the moments of a Poisson process; the tally, and the seconds until the last answer."""
    tally, waiting = Tally(), set()
    begun = intended = time.perf_counter()
    for _ in range(count):
        intended += caller.draw.expovariate(rate)
        pause = intended - time.perf_counter()
        if pause > 0:
            await asyncio.sleep(pause)
        task = asyncio.create_task(caller.ask(tally, intended))
        waiting.add(task)
        task.add_done_callback(waiting.discard)
    await asyncio.gather(*waiting)
    return tally, time.perf_counter() - begun


async def _closed_loop(caller: _Caller, seconds: float) -> float:
    """Keeps the server full for some seconds; the answers per second.

    Raises:
        BenchmarkError: No request was answered.
    """
    tally, end = Tally(), time.perf_counter() + seconds

    async def one_caller() -> None:
        while (now := time.perf_counter()) < end:
            await caller.ask(tally, now)

    begun = time.perf_counter()
    await asyncio.gather(*(one_caller() for _ in range(CALLERS)))
    if not tally.answers:
        raise BenchmarkError(f"{caller.target} answers none of the requests: {dict(tally.errors)}")
    return tally.answers / (time.perf_counter() - begun)


def _people(users: Path | Sequence[str]) -> list[str]:
    people = read_user_ids(users) if isinstance(users, Path) else list(users)
    if not people:
        raise BenchmarkError("no user to ask for: name at least one")
    return people


def _number(rate: str | float) -> float:
    try:
        value = float(rate)
    except ValueError:
        value = math.nan
    if not value > 0 or math.isinf(value):
        raise BenchmarkError(f"rate {rate!r}: give requests per second above 0, or 'half'")
    return value
