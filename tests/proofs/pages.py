"""The page is full whenever enough is eligible: generated users, catalogues and requests against plain sets.

    python -m tests.proofs.pages --examples 2000 --seed 1

Bundles of 0 to 5,000 items, with live items, are served by the real engine and the real service over a real Redis; only
the network is left out. Each example has its own availability, rules, seen items, exclusions, seeds and candidates, and
asks all four methods, with and without personalisation. What may be on a page is computed from those with Python sets.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from features.controls import CONTROL, ControlKind, dial_controls, encode
from features.controls import Dial as DialKind
from features.keys import event_type_keys, item_key, item_keys
from features.profile import RING, empty, fold
from features.records import make_records
from features.subjects import partition_of
from penchant.v1 import common_pb2, ranking_pb2
from serving.bundle.bitmap import Bitmap
from serving.concurrency import ConcurrencyLimit
from serving.config import ServeConfig
from serving.engine.engine import Engine, EngineRef, open_engine
from serving.engine.pipelines import Dependencies
from serving.experiments import Holdout
from serving.observability.telemetry import Telemetry
from serving.pipeline.filters import BlockedFilter, EligibilityFilter, SeenFilter
from serving.pipeline.request import NO_ROWS, Request, UserState
from serving.pipeline.results import HeldBack
from serving.pipeline.runner import Pipeline
from serving.pipeline.sources import PopularSource
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.services.ranking import RankingService
from serving.stores.catalog_log import CatalogProgress
from serving.stores.keys import address_of
from serving.stores.log_entries import Mark
from serving.stores.profiles import ProfileStore
from tests import world
from tests.proofs.page_world import item_of, publish_items, put_live

SIZES = (0, 1, 7, 60, 700, 5000)
_HOUR_MS = 3_600_000
_PARTITIONS = 16
_SEEN_TYPES = ("view_item", "like", "purchase", "hide")
_RUNG_SOURCE = {
    common_pb2.RUNG_SEQUENCE: "nearest",
    common_pb2.RUNG_ITEM_TO_ITEM: "neighbors",
    common_pb2.RUNG_SEGMENT: "popular_in_segment",
    common_pb2.RUNG_POPULAR: "popular",
}
_TIERS = list(_RUNG_SOURCE.values())


@dataclass(frozen=True)
class Case:
    """One user, one catalogue, one request; `seed` draws everything whose number is given.

    Attributes:
        size: Number of items of the bundle.
        depth: Number of candidates a source proposes; 0 as many as in evaluation.
        base, live: Share of the bundle's and of the live items that may be shown.
        events: Number of the user's events; `focused` on items of one genre.
        rules: What the user blocks: kind and number within it, below 0 for a rule that is over.
        dial: A weight of the first genre, 0 for none.
        excluded, seeds, candidates: Numbers of ids in the request, every fifth unknown to the catalogue.
        scored: Whether the candidates come with scores, many of them equal.
    """

    size: int
    depth: int
    seed: int
    base: float
    live: float
    events: int
    focused: bool
    rules: tuple[tuple[ControlKind, int], ...]
    dial: float
    excluded: int
    seeds: int
    candidates: int
    scored: bool
    page: int


CASES = st.builds(
    Case,
    size=st.sampled_from((*SIZES, 700, 5000)),
    depth=st.sampled_from((0, 20)),
    seed=st.integers(0, 2**32 - 1),
    base=st.sampled_from((0.0, 0.02, 0.5, 1.0)),
    live=st.sampled_from((0.0, 0.5, 1.0)),
    events=st.sampled_from((0, 1, 5, 60, 400)),
    focused=st.booleans(),
    rules=st.lists(
        st.tuples(st.sampled_from((ControlKind.CATEGORY, ControlKind.CREATOR, ControlKind.ITEM)), st.integers(-2, 30)),
        max_size=8,
    ).map(tuple),
    dial=st.sampled_from((0.0, 0.0, 1.0, -1.0)),
    excluded=st.sampled_from((0, 3, 200)),
    seeds=st.integers(1, 6),
    candidates=st.sampled_from((1, 6, 40, 300)),
    scored=st.booleans(),
    page=st.integers(1, 100),
)


HARD_CASES = st.builds(
    lambda case, size, base, events, page: replace(
        case, size=size, depth=20, base=base, events=events, focused=True, page=page
    ),
    CASES,
    st.sampled_from((700, 5000)),
    st.sampled_from((0.5, 1.0)),
    st.sampled_from((60, 400)),
    st.integers(20, 100),
)
"""Cases in which most of what is near to the user may not be shown: the controls need few of them."""


@dataclass
class Tally:
    """Counts of the kinds of examples, so that a proof of nothing shows."""

    pages: Counter[str] = field(default_factory=Counter)

    def note(self, method: str, size: int, wanted: int) -> None:
        """Counts a page by method, full or short or empty."""
        self.pages[f"{method} {'full' if size == wanted else 'short' if size else 'empty'}"] += 1


class _Call:
    """The only thing of a gRPC call that the service reads."""

    def time_remaining(self) -> float:
        return 60.0


class Served:
    """The engine of one size, the items behind it, and what makes them eligible."""

    def __init__(self, engine: Engine, items: list[dict[str, Any]]) -> None:
        self.engine, self.items = engine, items
        self.service = RankingService(EngineRef(engine), Holdout(0.0, ""), 60.0, CatalogProgress(), ConcurrencyLimit(1))
        self.eligible: set[str] = set()

    def offer(self, case: Case, draw: np.random.Generator) -> None:
        """Sets which items may be shown: some are unavailable, some are over, some have not begun."""
        catalog, count = self.engine.catalog, len(self.items)
        shares = np.where(np.arange(count) < catalog.base_size, case.base, case.live)
        shown, how, now = draw.random(count) < shares, draw.integers(0, 3, count), int(time.time() * 1000)
        available = shown | (how > 0)
        begin = np.where(~shown & (how == 2), now + _HOUR_MS, 0)
        end = np.where(~shown & (how == 1), now - 1000, now + _HOUR_MS)
        # One by one, as changes of the catalogue come: each alters the bitmap that sources read.
        for row in range(count):
            catalog.set_available(row, bool(available[row]), int(begin[row]), int(end[row]))
        self.eligible = {item["item_id"] for item, may in zip(self.items, shown.tolist(), strict=True) if may}


class Proof:
    """Serves cases and says what is wrong with the pages."""

    def __init__(self, root: Path, store: ProfileStore) -> None:
        self._root, self._store = root, store
        self._served: dict[tuple[int, int], Served] = {}
        self._users = 0
        self.tally = Tally()

    def served(self, size: int, depth: int) -> Served:
        """The engine of a size, opened once."""
        if (size, depth) not in self._served:
            path = self._root / f"{size}"
            if not path.exists():
                publish_items(path, size)
            config = ServeConfig.load(bundle=path, candidates=depth)
            engine = open_engine(path, Dependencies(config, self._store, CatalogProgress(), Telemetry()))
            items = [item_of(number) for number in range(size)]
            self._served[size, depth] = Served(engine, [*items, *put_live(engine, items)])
        return self._served[size, depth]

    def faults(self, case: Case) -> list[str]:
        """Yields the faults of the slates of a case."""
        draw = np.random.default_rng(case.seed)
        served = self.served(case.size, case.depth)
        served.offer(case, draw)
        user = _User(case, served, draw)
        self._users += 1
        subject = f"u:user-{self._users}"
        self._remember(subject, user)
        faults: list[str] = []
        for personal in (True, False):
            for answer in _answers(case, served, user, subject, personal, draw):
                faults += [f"{answer.method}, personal {personal}: {fault}" for fault in answer.faults()]
                self.tally.note(answer.method, len(answer.ids), case.page)
        return faults

    def _remember(self, subject: str, user: _User) -> None:
        if user.events:
            records = make_records(
                item_keys(user.events),
                item_keys([world.GENRES[0]] * len(user.events)),
                0,
                int(time.time() * 1000) - 1000,
                np.nan,
                event_type_keys(user.types),
            )
            self._store.put_states([(subject, fold(empty(), records, len(user.events)))])
        mark = Mark(1 << 51, address_of(subject), controls=encode(user.rules))
        self._store.mark(partition_of(subject, _PARTITIONS), mark)


class _User:
    """The events and requests of one user, and the sets that follow from them."""

    def __init__(self, case: Case, served: Served, draw: np.random.Generator) -> None:
        items, now = served.items, int(time.time() * 1000)
        pool = [item["item_id"] for item in items if item["categories"][0] == world.GENRES[0]]
        pool = pool if case.focused else [item["item_id"] for item in items]
        self.events = [str(name) for name in draw.choice(pool, case.events)] if pool else []
        self.types = [str(name) for name in draw.choice([*_SEEN_TYPES, "scroll"], len(self.events))]
        # Of what is older than the ring only the item is known, so it counts whatever was done.
        old = len(self.events) - RING
        lived = list(enumerate(zip(self.events, self.types, strict=True)))
        self.seen = {name for at, (name, kind) in lived if kind != "scroll" or at < old}
        # Who only refused or was only shown something is not known by it.
        self.chosen = {name for at, (name, kind) in lived if kind not in ("scroll", "hide") and at >= old}
        ended = [(kind, number) for kind, number in case.rules if number < 0]
        holding = [(kind, number) for kind, number in case.rules if number >= 0]
        rules = [(item_key(_about(kind, number)), 0, kind) for kind, number in holding]
        rules += [(item_key(_about(kind, -number)), now - _HOUR_MS, kind) for kind, number in ended]
        dials = dial_controls([(DialKind.CATEGORY_WEIGHT, item_key(world.GENRES[0]), case.dial)] if case.dial else [])
        self.rules = np.concatenate([np.array(rules, CONTROL), dials])
        names = {kind: {_about(kind, number) for of, number in holding if of is kind} for kind in ControlKind}
        self.blocked = names[ControlKind.ITEM] | {
            item["item_id"]
            for item in items
            if item["categories"][0] in names[ControlKind.CATEGORY] or item["creator_id"] in names[ControlKind.CREATOR]
        }


@dataclass
class _Answer:
    """A slate, what may be in it, and how many could."""

    method: str
    slate: ranking_pb2.Slate
    page: int
    allowed: set[str]
    total: int
    explained: bool = False
    rung: int = 0
    dialled: bool = False

    @property
    def ids(self) -> list[str]:
        return [item.item_id for item in self.slate.items]

    def faults(self) -> Iterator[str]:
        """Yields its faults."""
        ids, wanted = self.ids, min(self.page, len(self.allowed))
        dropped = sum(self.slate.dropped.values())
        if len(ids) != wanted:
            yield f"{len(ids)} items, {len(self.allowed)} may be shown, {self.page} wanted"
        if not set(ids) <= self.allowed:
            yield f"holds {sorted(set(ids) - self.allowed)[:3]}, which may not be shown"
        if len(set(ids)) < len(ids):
            yield "holds an item twice"
        if self.slate.degraded:
            yield f"degraded: {self.slate.degraded[0].reason}"
        if len(ids) < self.page and len(ids) + dropped != self.total and not self.explained:
            yield f"{len(ids)} items and {dict(self.slate.dropped)} do not add up to {self.total}"
        scores = np.array([item.score for item in self.slate.items])
        if (np.diff(scores[~np.isnan(scores)]) > 0).any():
            yield "scores rise"
        yield from self._tiers()

    def _tiers(self) -> Iterator[str]:
        """The rung is that of the first item, and lower tiers only fill up behind it."""
        if self.method != "recommend" or not self.slate.items:
            return
        if self.slate.rung not in (self.rung, 0) and self.rung:
            yield f"rung {self.slate.rung} where {self.rung} can serve"
        tiers = [
            min((_TIERS.index(name) for name in item.sources if name in _TIERS), default=-1)
            for item in self.slate.items
        ]
        known = [tier for tier in tiers if tier >= 0]
        if not known or self.dialled:
            return  # extras alone have no tier, and a dial may lift any item
        if known != sorted(known) or known[0] != _TIERS.index(_RUNG_SOURCE[self.slate.rung]):
            yield f"rung {self.slate.rung}, tiers {known}"


def _answers(
    case: Case, served: Served, user: _User, subject: str, personal: bool, draw: np.random.Generator
) -> Iterator[_Answer]:
    every = [item["item_id"] for item in served.items]
    excluded = set(_some(every, case.excluded, draw))
    mode = ranking_pb2.PERSONALIZATION_AUTO if personal else ranking_pb2.PERSONALIZATION_DISABLED
    options = ranking_pb2.RankingOptions(
        subject=common_pb2.Subject(user_id=subject[2:]), page_size=case.page, personalization=mode
    )
    options.exclude_item_ids.extend(sorted(excluded))
    free = served.eligible - user.blocked - excluded
    call: Any = _Call()

    known = set(every) & user.chosen
    feed = free - user.seen if personal else free
    rung = common_pb2.RUNG_SEQUENCE if personal and known and feed else 0
    slate = served.service.Recommend(ranking_pb2.RecommendRequest(options=options), call).slate
    yield _Answer("recommend", slate, case.page, feed, len(every), rung=rung, dialled=bool(case.dial))

    request = ranking_pb2.SearchRequest(options=options, query=f"{draw.choice(world.GENRES)} story")
    yield _Answer("search", served.service.Search(request, call).slate, case.page, free, len(every))

    seeds = _some(every, case.seeds, draw)
    similar = ranking_pb2.SimilarItemsRequest(options=options, seed_item_ids=seeds)
    slate = served.service.SimilarItems(similar, call).slate
    found = free - set(seeds) if set(seeds) & set(every) else set()
    yield _Answer("similar", slate, case.page, found, len(every), explained=not found and bool(slate.missing_item_ids))

    ids = _some(every, case.candidates, draw)
    scores = draw.integers(0, 9, len(ids)).tolist() if case.scored else []
    candidates = ranking_pb2.Candidates(item_ids=ids, upstream_scores=scores)
    words = str(draw.choice(["", "space story"]))
    ranked = ranking_pb2.RankRequest(options=options, candidates=candidates, query=words)
    may = {name for name in ids if name not in excluded | user.blocked and (name in free or name not in every)}
    yield _Answer("rank", served.service.Rank(ranked, call).slate, case.page, may, len(set(ids)))


def _about(kind: ControlKind, number: int) -> str:
    """Returns the target of a control; some of the items are in no catalogue."""
    if kind is ControlKind.CATEGORY:
        return [*world.GENRES, "nothing"][number % 5]
    return f"c{number % 5}" if kind is ControlKind.CREATOR else (f"?{number}" if number % 5 == 4 else f"i{number}")


def _some(every: list[str], count: int, draw: np.random.Generator) -> list[str]:
    """Some ids, with repeats; about every fifth is unknown."""
    unknown = [f"?{number}" for number in range(40)]
    pools = [unknown if not every or chance < 0.2 else every for chance in draw.random(count).tolist()]
    return [str(pool[draw.integers(len(pool))]) for pool in pools]


def hold_nothing_back(self: Any, request: Request, user: UserState) -> HeldBack:
    """A filter that only judges retrieved candidates."""
    return HeldBack(NO_ROWS)


def _table_only(self: PopularSource, request: Request, user: UserState, allowed: Bitmap) -> Any:
    """The popular items of the table and no others."""
    return _RETRIEVE(self, request, user._replace(blocks_unread=True), allowed)


def _everything(self: EligibilityFilter, request: Request) -> tuple[Bitmap, int]:
    bits, held = _BITMAP(self, request)
    return np.full_like(bits, 255), held


def _no_proof(self: EligibilityFilter, request: Request, user: UserState, rows: Any) -> Any:
    return np.ones(rows.size, np.bool_)


def _nobody_seated(self: Pipeline, run: Any, kept: Any) -> tuple[()]:
    return ()


_RETRIEVE, _BITMAP = PopularSource.retrieve, EligibilityFilter.bitmap
CONTROLS: dict[str, tuple[Any, str, Any]] = {
    "blocks are filtered after retrieval": (BlockedFilter, "hold_back", hold_nothing_back),
    "seen items are filtered after retrieval": (SeenFilter, "hold_back", hold_nothing_back),
    "availability is filtered after retrieval": (EligibilityFilter, "bitmap", _everything),
    "the popular are those of the table": (PopularSource, "retrieve", _table_only),
    "unknown candidates are dropped": (Pipeline, "_seated", _nobody_seated),
}
"""Faults that the proof must find: where, and what stands there instead."""


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Plants one of the faults."""
    where, attribute, fault = CONTROLS[name]
    healthy = getattr(where, attribute)
    setattr(where, attribute, fault)
    try:
        yield
    finally:
        setattr(where, attribute, healthy)


def run(proof: Proof, examples: int, number: int = 1, *, control: bool = False) -> None:
    """Serves generated cases; for a control, hard ones.

    Raises:
        AssertionError: A page of one is wrong; the message holds the smallest such case.
    """

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate] if control else [Phase.generate, Phase.shrink],
    )
    @given(HARD_CASES if control else CASES)
    def serve(case: Case) -> None:
        faults = proof.faults(case)
        assert not faults, "; ".join(faults[:5])

    serve()


def _found(proof: Proof, name: str, number: int) -> str:
    """Returns the verdict of the proof on a planted fault."""
    with planted(name):
        try:
            run(proof, 400, number, control=True)
        except AssertionError as fault:
            return str(fault).splitlines()[0][:120]
    return "not found"


def main() -> int:
    """Runs the proof and its controls at full size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--examples", type=int, default=2000, help="number of generated cases")
    parser.add_argument("--seed", type=int, default=1, help="seed of the cases")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        RedisServer(Path(folder) / "redis", "profiles") as server,
        connect(server.url, 5.0) as client,
    ):
        proof = Proof(Path(folder), ProfileStore(client, _PARTITIONS))
        run(proof, arguments.examples, arguments.seed)
        pages = dict(sorted(proof.tally.pages.items()))
        controls = {name: _found(proof, name, arguments.seed) for name in CONTROLS}
    print(json.dumps({"examples": arguments.examples, "seed": arguments.seed, "pages": pages, "controls": controls}))
    return int("not found" in controls.values())


if __name__ == "__main__":
    raise SystemExit(main())
