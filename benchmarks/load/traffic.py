"""The traffic of a measurement: which calls, of which users, at which moments.

A mix names the shares of the methods. Users are drawn by Zipf's law: the k-th most active user makes a share of the
calls that falls as 1 / k^s. Arrivals are a Poisson process, whose rate a burst multiplies for a while.
"""

from __future__ import annotations

import difflib
import itertools
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.load.generator import Generator
from benchmarks.load.window import CallPlan
from benchmarks.report import BenchmarkError
from penchant.v1 import common_pb2, event_pb2, ranking_pb2

PATHS = {
    "recommend": "/penchant.v1.RankingService/Recommend",
    "search": "/penchant.v1.RankingService/Search",
    "rank": "/penchant.v1.RankingService/Rank",
    "similar": "/penchant.v1.RankingService/SimilarItems",
    "ingest": "/penchant.v1.EventService/Ingest",
}
RECOMMEND_ONLY = {"recommend": 1.0}
PRIORITY_KEY = "penchant-priority"
"""Metadata key of the priority of a request: `interactive`, which is the default, or `batch`."""
BATCH = "batch"

_POOL = 256
"""Different candidate lists, seeds and queries that a traffic sends in turn."""
_EVENT_TYPE = "view_item"


@dataclass(frozen=True)
class RequestMaterial:
    """The contents of requests.

    Attributes:
        users: Ids of users.
        items: Ids of items; needed for rank, similar and ingest.
        queries: Queries; needed for search.
    """

    users: Sequence[str]
    items: Sequence[str] = ()
    queries: Sequence[str] = ()


@dataclass(frozen=True)
class Bursts:
    """Bursts of traffic; the mean rate stays as it was named.

    Attributes:
        factor: The rate within a burst over the rate outside, above 1.
        length_s: Length of a burst, in seconds.
        every_s: Seconds from the beginning of a burst to that of the next one.
    """

    factor: float
    length_s: float
    every_s: float


@dataclass(frozen=True)
class Shape:
    """The form of the traffic.

    Attributes:
        mix: Share of each method, by its name; any positive weights.
        zipf: The exponent s of the users' activity; 0 draws all users alike.
        bursts: The bursts; None for an even rate.
        page_size: Items asked for.
        candidates: Candidates of a Rank request.
        surface: Surface that the requests name.
        batch_share: Share of the calls that are marked as batch traffic.
        timeout_s: Deadline of each call, in seconds.
    """

    mix: Mapping[str, float] = field(default_factory=lambda: dict(RECOMMEND_ONLY))
    zipf: float = 1.0
    bursts: Bursts | None = None
    page_size: int = 10
    candidates: int = 200
    surface: str = ""
    batch_share: float = 0.0
    timeout_s: float = 1.0


class Traffic(Protocol):
    """A source of windows; `MixedTraffic` draws them, `RecordedTraffic` repeats what was logged."""

    def plan(self, rate: float, count: int) -> CallPlan:
        """Returns the next `count` calls at `rate` a second on average; each call returns another part."""
        ...

    def figures(self) -> dict[str, object]:
        """Returns what a result says of the traffic."""
        ...


def parse_mix(text: str) -> dict[str, float]:
    """Returns the weights of a mix such as `recommend=70,search=10,rank=10,similar=5,ingest=5`.

    Raises:
        BenchmarkError: A method is unknown or named twice, or a weight is no positive number.
    """
    mix: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, weight = (piece.strip() for piece in part.partition("="))
        if name not in PATHS:
            close = difflib.get_close_matches(name, PATHS, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise BenchmarkError(f"--mix has no method {name!r}: {hint}it has {', '.join(PATHS)}")
        if name in mix:
            raise BenchmarkError(f"--mix names {name!r} twice: give each method one weight")
        try:
            value = float(weight) if equals else math.nan
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise BenchmarkError(f"--mix {part!r}: write METHOD=WEIGHT with a weight above 0, as recommend=70")
        mix[name] = value
    if not mix:
        raise BenchmarkError("--mix is empty: write METHOD=WEIGHT,..., as recommend=70,search=10,ingest=20")
    return mix


def parse_bursts(text: str) -> Bursts:
    """Returns the bursts of a text such as `5x2/10`: five times the rate for 2 of every 10 seconds.

    Raises:
        BenchmarkError: It is none.
    """
    factor, times, period = text.partition("x")
    length, slash, every = period.partition("/")
    try:
        bursts = Bursts(float(factor), float(length), float(every))
    except ValueError:
        bursts = Bursts(0, 0, 0)
    if not (times and slash and 1 < bursts.factor < math.inf and 0 < bursts.length_s < bursts.every_s < math.inf):
        raise BenchmarkError(
            f"--bursts {text!r}: write FACTORxSECONDS/EVERY, with a factor above 1 and bursts shorter than their "
            "period, as 5x2/10 for five times the rate in 2 of every 10 seconds"
        )
    return bursts


class MixedTraffic:
    """Calls drawn from a mix."""

    def __init__(self, generator: Generator, material: RequestMaterial, shape: Shape, seed: int = 1) -> None:
        """Prepares the messages.

        Raises:
            BenchmarkError: The material lacks something that the mix needs.
        """
        self._material, self._shape = material, shape
        self._rng = np.random.default_rng(seed)
        self._require()
        self._names = list(shape.mix)
        weights = np.array([shape.mix[name] for name in self._names], np.float64)
        self._shares = weights / weights.sum()
        self._heads = {
            name: tuple(
                generator.head(PATHS[name], shape.timeout_s, metadata) for metadata in ((), ((PRIORITY_KEY, BATCH),))
            )
            for name in self._names
        }
        # The most active users are not those whose ids come first.
        self._by_activity = self._rng.permutation(len(material.users))
        self._cumulative = np.cumsum(zipf_shares(len(material.users), shape.zipf))
        self._options: dict[int, bytes] = {}
        self._tails = {name: self._pool(name) for name in self._names}
        self._turns = {name: itertools.cycle(tails) for name, tails in self._tails.items()}

    def plan(self, rate: float, count: int) -> CallPlan:
        """Returns `count` calls at `rate` a second."""
        moments = arrivals(rate, count, self._rng, self._shape.bursts)
        kinds = self._rng.choice(len(self._names), count, p=self._shares).astype(np.int8)
        users = self._by_activity[np.searchsorted(self._cumulative, self._rng.random(count), "right")]
        batch = self._rng.random(count) < self._shape.batch_share
        heads, messages = [], []
        for kind, user, is_batch in zip(kinds.tolist(), users.tolist(), batch.tolist(), strict=True):
            name = self._names[kind]
            heads.append(self._heads[name][is_batch])
            messages.append(self._message(name, user))
        return CallPlan(moments, heads, messages, kinds, self._names, self._shape.timeout_s)

    def figures(self) -> dict[str, object]:
        """Returns the mix, the law of the users, bursts and sizes."""
        shape, bursts = self._shape, self._shape.bursts
        return {
            "mix": {name: round(float(share), 4) for name, share in zip(self._names, self._shares, strict=True)},
            "users": len(self._material.users),
            "zipf": shape.zipf,
            "bursts": None if bursts is None else [bursts.factor, bursts.length_s, bursts.every_s],
            "page_size": shape.page_size,
            **({"candidates": shape.candidates} if "rank" in shape.mix else {}),
            **({"batch_share": shape.batch_share} if shape.batch_share else {}),
        }

    def _require(self) -> None:
        shape, material = self._shape, self._material
        if not material.users:
            raise BenchmarkError("there is no user to request slates for: name at least one")
        if {"rank", "similar", "ingest"} & shape.mix.keys() and not material.items:
            raise BenchmarkError("no item is known to rank or to send events of: give --bundle, or fill the catalogue")
        if "rank" in shape.mix and len(material.items) < shape.candidates:
            raise BenchmarkError(
                f"{len(material.items):,} items are known, too few for {shape.candidates:,} different candidates of a "
                "Rank request: give --bundle, which has all of them, or fewer --candidates"
            )
        if "search" in shape.mix and not material.queries:
            raise BenchmarkError("no query is known to search for: give --queries, a file with one a line")

    def _message(self, name: str, user: int) -> bytes:
        if name == "ingest":
            # An event counts once by its id, so each needs its own.
            event = event_pb2.Event(event_id=uuid.uuid4().hex, subject=_subject(self._material.users[user]))
            # Fields of one message may be written one after the other: the constant part is serialised once.
            body = event.SerializeToString() + next(self._turns[name])
            return b"\x0a" + _varint(len(body)) + body
        options = self._options.get(user)
        if options is None:
            options = self._options[user] = _options_field(self._material.users[user], self._shape)
        return options + next(self._turns[name])

    def _pool(self, name: str) -> list[bytes]:
        """Returns the parts of a method's messages that do not depend on the user."""
        items, queries, rng = self._material.items, self._material.queries, self._rng
        if name == "search":
            return [ranking_pb2.SearchRequest(query=query).SerializeToString() for query in queries[: 16 * _POOL]]
        if name == "rank":
            lists = (rng.choice(len(items), self._shape.candidates, replace=False) for _ in range(_POOL))
            columns = (ranking_pb2.Candidates(item_ids=[items[row] for row in rows]) for rows in lists)
            return [ranking_pb2.RankRequest(candidates=column).SerializeToString() for column in columns]
        if name == "similar":
            seeds = (items[row] for row in rng.integers(0, len(items), 4 * _POOL))
            return [ranking_pb2.SimilarItemsRequest(seed_item_ids=[seed]).SerializeToString() for seed in seeds]
        if name == "ingest":
            chosen = (items[row] for row in rng.integers(0, len(items), 4 * _POOL))
            return [
                event_pb2.Event(item_id=item, event_type=_EVENT_TYPE, surface=self._shape.surface).SerializeToString()
                for item in chosen
            ]
        return [b""]


def arrivals(
    rate: float, count: int, rng: np.random.Generator, bursts: Bursts | None = None
) -> npt.NDArray[np.float64]:
    """Returns the first `count` moments, in seconds, of a Poisson process whose mean rate is `rate` a second."""
    even = np.cumsum(rng.exponential(1 / rate, count))
    if bursts is None or not count:
        return even
    # Time is rescaled: a process of an even rate, seen through a clock that runs faster within bursts.
    cycles = math.ceil(even[-1] / bursts.every_s) + 1
    share = bursts.length_s / bursts.every_s
    quiet = 1 / (1 + share * (bursts.factor - 1))
    in_burst = quiet * bursts.factor * bursts.length_s
    starts = np.arange(cycles) * bursts.every_s
    real = np.column_stack([starts, starts + bursts.length_s]).ravel()
    passed = np.column_stack([starts, starts + in_burst]).ravel()
    end = cycles * bursts.every_s
    rescaled: npt.NDArray[np.float64] = np.interp(even, np.append(passed, end), np.append(real, end))
    return rescaled


def zipf_shares(count: int, exponent: float) -> npt.NDArray[np.float64]:
    """Returns the shares of the calls of `count` users, the most active first; float64 [count].

    Raises:
        BenchmarkError: The exponent is negative or no number.
    """
    if not 0 <= exponent < math.inf:
        raise BenchmarkError(f"--zipf {exponent}: give 0 for users who are drawn alike, or about 1")
    shares = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    normal: npt.NDArray[np.float64] = shares / shares.sum()
    return normal


def _subject(user: str) -> common_pb2.Subject:
    return common_pb2.Subject(user_id=user)


def _options_field(user: str, shape: Shape) -> bytes:
    options = ranking_pb2.RankingOptions(subject=_subject(user), surface=shape.surface, page_size=shape.page_size)
    # Every ranking request has its options in field 1.
    return ranking_pb2.RecommendRequest(options=options).SerializeToString()


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value >= 128:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])
