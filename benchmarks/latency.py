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
METHOD = f"open loop, Poisson arrivals, latency from the intended start, {CHANNELS} connections"
CALLERS = 16
WARM_UP_S = 2.0
CEILING_S = 6.0
MOST_US = 60_000_000
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}


@dataclass
class Tally:
    """The results of the calls.

    Attributes:
        histogram: Latencies from the intended start, in microseconds, three digits.
        errors: Number of failed calls, by gRPC status.
        rungs: Number of answers, by rung.
        degraded: Number of degraded answers, by part.
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
        # The histogram refuses values outside its range; a minute is as bad as an hour here.
        self.histogram.record_value(min(max(microseconds, 1), MOST_US))
        self.rungs[common_pb2.Rung.Name(slate.rung).removeprefix("RUNG_").lower()] += 1
        self.short += len(slate.items) < page_size
        for part in slate.degraded:
            self.degraded[common_pb2.Part.Name(part.part).removeprefix("PART_")] += 1

    def figures(self) -> dict[str, Any]:
        """Returns the figures of the report."""
        return {
            "latency_ms": self.latency_ms(),
            "errors": dict(self.errors),
            "rungs": {rung: round(count / max(self.answers, 1), 4) for rung, count in self.rungs.items()},
            "degraded": dict(self.degraded),
            "short": self.short,
        }

    def latency_ms(self) -> dict[str, float]:
        """Returns percentiles, mean and maximum in milliseconds."""
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
        users: Users to request slates for, drawn at random: ids, or a file of them (`features.tables.user_ids`).
        requests: Number of requests; 5,000 unless `duration` is given.
        rate: Requests per second, or "half" for half of the highest rate, measured first.
        duration: Length of the measurement in seconds, instead of `requests`.
        surface: Surface that the requests name.
        page_size: Number of items requested.
        timeout_s: Deadline of each request in seconds.
        seed: Seed of arrivals and users.

    Returns:
        `rate` (offered, per second), `achieved_rate`, `highest_rate` if it was measured, `latency_ms`, `errors`,
        `rungs` (shares), `degraded`, `short`, `requests`, and the circumstances.

    Raises:
        BenchmarkError: There are no users, there is no such service, or the rate is not a number.
    """
    user_ids = _user_ids(users)
    caller = _Caller(target, user_ids, surface, page_size, timeout_s, random.Random(seed))
    figures, tally = asyncio.run(_measure(caller, requests, rate, duration))
    return {**figures, **tally.figures(), "users": len(user_ids), "page_size": page_size, "method": METHOD, **facts()}


class _Caller:
    """Requests slates for random users, over connections that reach different workers."""

    def __init__(
        self, target: str, users: Sequence[str], surface: str, page_size: int, timeout_s: float, draw: random.Random
    ) -> None:
        self.target, self.page_size, self.draw = target, page_size, draw
        self._users, self._surface, self._timeout_s = users, surface, timeout_s
        self._channels: list[grpc.aio.Channel] = []
        self._stubs: list[Any] = []

    async def connect(self) -> None:
        """Opens the connections.

        Raises:
            BenchmarkError: No service answers at the target.
        """
        for number in range(CHANNELS):
            # Channels with equal options would share one connection, and so one worker.
            options = [("penchant.channel", number), ("grpc.use_local_subchannel_pool", 1)]
            options += channel_options(self.target)
            channel = grpc.aio.insecure_channel(self.target, options=options)
            self._channels.append(channel)
            self._stubs.append(ranking_pb2_grpc.RankingServiceStub(channel))
            try:
                await asyncio.wait_for(channel.channel_ready(), 10)
            except TimeoutError:
                raise BenchmarkError(
                    f"no service answers at {self.target}: start `penchant serve` there first"
                ) from None

    async def close(self) -> None:
        """Closes the connections."""
        for channel in self._channels:
            await channel.close(None)

    async def ask(self, tally: Tally, intended: float) -> None:
        """Sends one request and counts its answer or error, timed from the moment it was meant to start."""
        options = ranking_pb2.RankingOptions(
            subject=common_pb2.Subject(user_id=self.draw.choice(self._users)),
            surface=self._surface,
            page_size=self.page_size,
        )
        # A random connection per call, or one slow worker would delay only the calls of its own connection.
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
        # Connections, caches and the pages of the bundle are cold at first.
        await _closed_loop(caller, WARM_UP_S)
        if rate == "half":
            figures["highest_rate"] = round(await _closed_loop(caller, CEILING_S), 1)
            # Near the highest rate a queue grows without bound, and its length is all that would be measured.
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
    """Sends `count` requests at the moments of a Poisson process; returns the tally, and seconds to the last answer."""
    tally, waiting = Tally(), set()
    begun = intended = time.perf_counter()
    for _ in range(count):
        # The moments do not depend on the answers: a slow server delays no later request.
        intended += caller.draw.expovariate(rate)
        pause = intended - time.perf_counter()
        if pause > 0:
            await asyncio.sleep(pause)
        task = asyncio.create_task(caller.ask(tally, intended))
        # The event loop itself keeps only a weak reference to a task.
        waiting.add(task)
        task.add_done_callback(waiting.discard)
    await asyncio.gather(*waiting)
    return tally, time.perf_counter() - begun


async def _closed_loop(caller: _Caller, seconds: float) -> float:
    """Keeps the server full for some seconds; returns the answers per second.

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


def _user_ids(users: Path | Sequence[str]) -> list[str]:
    user_ids = read_user_ids(users) if isinstance(users, Path) else list(users)
    if not user_ids:
        raise BenchmarkError("there is no user to request slates for: name at least one")
    return user_ids


def _number(rate: str | float) -> float:
    try:
        value = float(rate)
    except ValueError:
        value = math.nan
    if not value > 0 or math.isinf(value):
        raise BenchmarkError(f"rate {rate!r}: give requests per second above 0, or 'half'")
    return value
