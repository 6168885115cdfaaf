"""One history, read five ways: as it comes, replayed from Parquet, by plain twins, by an oracle, and by training.

A life is a list of steps that hypothesis draws. It is lived on real stores, by the roads of the service: events are
taken, applied (or left to the projector), folded by it, patched items change the keys of what follows, items are put
after events about them, some events are taken back, consent goes and comes, and the user asks for slates. After every
step the profile is kept as it was then. Whenever something is about to be taken back, and at the end, everything is
read from the sink's Parquet: by the replay, and by the road that a training takes.

    python -m tests.proofs.skew --lives 2000 --seed 1

prints one line of JSON with what the lives were made of.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import features.action_rates
import features.assemble
import features.decay_kernels
import features.decayed_counts
import features.declared_kernels
import features.kernels
import features.profile
import features.records
import training.data.histories
from features.bundle import open_bundle
from features.catalog import Catalog
from features.catalog_columns import CatalogColumns
from features.clock import now_ms
from features.controls import no_controls
from features.profile import EVERY_PURPOSE, Profile, Purpose
from features.profile_codec import encode
from penchant.v1 import common_pb2, event_pb2
from serving.bundle.tables import read_tables
from serving.config import ServeConfig
from serving.engine.engine import EngineRef, open_engine
from serving.engine.pipelines import Dependencies
from serving.jobs.skew import FeatureReplay, logged_slates
from serving.observability.telemetry import Telemetry
from serving.pipeline.request import Request
from serving.pipeline.side_effects import PendingSlate, logged_impression
from serving.privacy.certificates import Certificates
from serving.privacy.rights import SubjectRights
from serving.projection.histories import LoggedHistories
from serving.projection.projector import Projector
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.services.events import EventService
from serving.stores.catalog_log import CatalogLog, CatalogProgress
from serving.stores.event_log import EventLog
from serving.stores.profiles import ProfileStore
from serving.warehouse.files import WarehouseFiles
from serving.warehouse.items import ItemTable
from serving.warehouse.writer import WarehouseWriter
from tests.proofs import oracle
from tests.proofs.oracle import Told
from tests.proofs.trained import Trained
from tests.world import COUNT, MODEL, items, publish_world, vectors
from training.config import Action

PARTITIONS = 4
_CONTEXTS: tuple[dict[str, Any], ...] = (
    {"device": "phone", "time_zone": "America/St_Johns", "attributes": {"shelf": "5"}},
    {},
    {"device": "radio", "channel": "web", "attributes": {"shelf": "low", "more": "1"}},
    {"device": "tv", "time_zone": "Pacific/Auckland", "attributes": {"shelf": "1.5"}},
)
KINDS = ("view_item", "like", "purchase", "hide", "view_item_list", "search", "rating of my own")
LATE_MS = (0, 0, 0, -3_600_000, -23 * 3_600_000, 240_000, -1_200_000)
_FEW = {"category": 2, "creator": 3, "event_type": 3}
SMALL: tuple[tuple[ModuleType, str, Any], ...] = (
    (features.profile, "RING", 16),
    (training.data.histories, "RING", 16),
    (features.profile, "OLDER_ITEMS_CAP", 12),
    (features.decayed_counts, "DIMENSIONS", _FEW),
    (features.decayed_counts, "_CAPACITIES", np.array(list(_FEW.values()), np.int64)),
)
"""Sizes at which a short life goes through everything; every other life has the real ones."""

_HOUR_S = 3600.0
_LATER = 6
"""Items that events are about before the catalogue knows them; in each life others."""
_ACTIONS = tuple(Action(**action) for action in MODEL["actions"])


@dataclass(frozen=True)
class Burst:
    """Some events of a user in a row: about items that are `stride` apart, the last `unapplied` by the log alone."""

    person: int
    count: int
    item: int
    stride: int
    kind: int
    late: int
    value: float | None
    parts: int
    unapplied: bool


@dataclass(frozen=True)
class Patch:
    """An item gets another category and creator, or loses them; one of the last few is put with them, if only now."""

    item: int
    category: str
    creator: str


@dataclass(frozen=True)
class Fold:
    """The projector folds what is long."""


@dataclass(frozen=True)
class Ask:
    """A user gets a slate."""

    person: int


@dataclass(frozen=True)
class Undo:
    """A user removes one of their events."""

    person: int
    which: int


@dataclass(frozen=True)
class Consent:
    """A user withdraws the consent to personal slates, or gives it again."""

    person: int
    given: bool


Step = Burst | Patch | Fold | Ask | Undo | Consent

_people = st.integers(0, 1)


def _bursts(*counts: int) -> st.SearchStrategy[Burst]:
    return st.builds(
        Burst,
        _people,
        st.sampled_from(counts),
        st.integers(0, COUNT + _LATER - 1),
        st.integers(0, 7),
        st.integers(0, len(KINDS) - 1),
        st.integers(0, len(LATE_MS) - 1),
        st.sampled_from([None, 0.0, -1.5, 3.25]),
        st.integers(1, 3),
        st.integers(0, 5).map(lambda n: n == 0),
    )


_patches = st.builds(
    Patch,
    st.one_of(st.integers(0, COUNT - 1), st.integers(COUNT, COUNT + _LATER - 1)),
    st.sampled_from(["", "western", "noir"]),
    st.sampled_from(["", "c1", "c77"]),
)
_long = _bursts(2, 5, 20, 60, 130)
_short = _bursts(1, 1, 1, 2, 3, 7, 20)
_steps: st.SearchStrategy[Step] = st.one_of(
    _short,
    _short,
    _patches,
    _patches,
    st.just(Fold()),
    st.builds(Ask, _people),
    st.builds(Undo, _people, st.integers(0, 300)),
)
_last: st.SearchStrategy[Step] = st.one_of(_steps, st.builds(Consent, _people, st.booleans()))


@st.composite
def lives(draw: st.DrawFn) -> tuple[bool, list[Step]]:
    """A choice of small sizes, and the steps: three parts with a fold after each, and what consent may do then."""
    parts = [[draw(_long), *draw(st.lists(_steps, max_size=4)), Fold()] for _ in range(3)]
    return draw(st.booleans()), [*(step for part in parts for step in part), *draw(st.lists(_last, max_size=4))]


@dataclass(frozen=True)
class Moment:
    """A profile as it was read, up to where it had been made to forget, and the events that it holds."""

    person: int
    profile: Profile
    forgotten: int
    events: tuple[Told, ...]


@dataclass(frozen=True)
class Served:
    """A slate, the catalogue's columns and the rows of its items at that moment, and the events the user then had."""

    request_id: str
    columns: CatalogColumns
    rows: dict[str, int]
    size: int
    events: tuple[Told, ...]
    forgotten: int
    known: dict[str, dict[str, Any]]
    told: dict[str, str]


class AsOf(Catalog):
    """A catalogue that can be read as it was before."""

    _limit = 1 << 31

    @contextlib.contextmanager
    def as_of(self, columns: CatalogColumns, size: int) -> Iterator[None]:
        """Has the columns and the number of items of an earlier moment."""
        now, self.columns, self._limit = self.columns, columns, size
        try:
            yield
        finally:
            self.columns, self._limit = now, AsOf._limit

    def rows_of_keys(self, keys: Any) -> Any:
        rows = super().rows_of_keys(keys)
        return np.where(rows < self._limit, rows, -1).astype(np.int32)


class World:
    """The stores, the engine and the projector that all lives share; each has new users."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path, profiles_url: str, events_url: str) -> None:
        self.folder = folder
        self.log = EventLog(stack.enter_context(connect(events_url, 20)), PARTITIONS)
        self.store = ProfileStore(stack.enter_context(connect(profiles_url, 20)), PARTITIONS)
        self.log.open()
        bundle = publish_world(folder / "bundle")
        self.telemetry = Telemetry()
        config = ServeConfig.load(bundle=bundle, log_features=1.0)
        around = Dependencies(config, self.store, CatalogProgress(), Telemetry(), self)  # type: ignore[arg-type]
        self.engine = open_engine(bundle, around)
        self.events = EventService(EngineRef(self.engine), self.log, self.store, Telemetry(), None)  # type: ignore[arg-type]
        self.people = SubjectRights(self.log, self.store, Certificates(self.log))
        self.projector = Projector(self.log, self.store, compact_after=1, settle_s=0, telemetry=self.telemetry)
        self.projector.open()
        stack.callback(self.projector.close)
        opened = open_bundle(bundle)
        # Training's side: a catalogue of its own.
        tables = read_tables(opened)
        read = tables.catalog
        self.offline = AsOf(read._items, read.vocabulary, read.columns.vectors[: read.base_size])
        self.replay = FeatureReplay(opened, self.engine.model, self.offline, tables.neighbors.weights)

    def put(self, pending: PendingSlate) -> None:
        """Takes slates for the engine, as its writer does, but at once."""
        self.log.append_impressions([logged_impression(pending)])

    @contextlib.contextmanager
    def warehouse(self) -> Iterator[WarehouseWriter]:
        """A sink into a new directory, for what is logged from now on."""
        out = self.folder / uuid.uuid4().hex
        table = ItemTable(out / "items.parquet", CatalogLog(self.log.client), None)
        sink = WarehouseWriter(self.log, WarehouseFiles(out), table, flush_s=_HOUR_S, derive_s=_HOUR_S)
        sink.open()
        sink.out = out  # type: ignore[attr-defined]
        try:
            yield sink
        finally:
            sink.close()


@contextlib.contextmanager
def world() -> Iterator[World]:
    """A world with Redis servers of its own."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = [stack.enter_context(RedisServer(folder, role)) for role in ("profiles", "events")]
        yield World(stack, folder, servers[0].url, servers[1].url)


@dataclass
class Life:
    """The steps so far, and their effects; `tally` counts the kinds of steps."""

    world: World
    sink: WarehouseWriter
    tally: Counter[str]
    events: list[list[Told]] = field(default_factory=lambda: [[], []])
    ids: dict[int, str] = field(default_factory=dict)
    forgotten: list[int] = field(default_factory=lambda: [0, 0])
    allowed: list[bool] = field(default_factory=lambda: [True, True])
    behind: set[int] = field(default_factory=set)
    moments: list[Moment] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = name = uuid.uuid4().hex
        self.subjects = [f"u:{name}", f"a:{name}"]
        self.known = {one["item_id"]: one for one in items()}
        self._put(list(self.known.values()), vectors())

    def _put(self, some: list[dict[str, Any]], vectors: Any) -> None:
        for catalog in (self.world.engine.catalog, self.world.offline):
            catalog.put(some, vectors, 0)

    def _item(self, number: int) -> str:
        return f"i{number}" if number < COUNT else f"n{number}-{self.name}"

    def live(self, steps: Sequence[Step]) -> list[str]:
        """Goes through the steps; what differs anywhere, nothing where all agree."""
        differences: list[str] = []
        for step in steps:
            if isinstance(step, (Undo, Consent)):
                self.fold()
                differences += self.compare()
            self._do(step)
            self._look()
        self.fold()
        self._look()
        return differences + self.compare()

    def end(self) -> None:
        """Takes the items that were put later away from the lives to come."""
        catalog = self.world.engine.catalog
        for row in catalog.rows([name for name in self.known if not name.startswith("i")]).tolist():
            catalog.delete(row)

    def _do(self, step: Step) -> None:
        match step:
            case Burst():
                self._burst(step)
            case Patch():
                self._patch(step)
            case Fold():
                self.fold()
            case Ask(person):
                self._ask(person)
            case Undo(person, which):
                self._undo(person, which)
            case Consent(person, given):
                self._consent(person, given)

    def _patch(self, patch: Patch) -> None:
        name, at = self._item(patch.item), patch.item % COUNT
        had = [event for own in self.events for event in own if event.item == name]
        if name not in self.known:
            self.tally["put"] += 1
            self.tally["early"] += len(had)
        else:
            self.tally["patched"] += 1
            self.tally["before_patch"] += len(had)
        kin = {"categories": [patch.category] if patch.category else [], "creator_id": patch.creator}
        self.known[name] = self.known.get(name, {"item_id": name, "title": "put later"}) | kin
        self._put([self.known[name]], vectors()[at : at + 1])

    def fold(self) -> None:
        """Lets the projector catch up: it applies what is missing, and folds what is long."""
        before = self.world.telemetry.counters().get("projector_profiles.compacted", 0)
        idle = 0
        while idle < 2:
            idle = 0 if self.world.projector.step() else idle + 1
        self.tally["compactions"] += self.world.telemetry.counters().get("projector_profiles.compacted", 0) - before
        self.behind.clear()

    def _burst(self, burst: Burst) -> None:
        kind = KINDS[burst.kind]
        at = [(burst.item + number * burst.stride) % (COUNT + _LATER) for number in range(burst.count)]
        late = LATE_MS[burst.late]
        self.tally["late"] += burst.count * (late < 0)
        for part in np.array_split(np.array(at), min(burst.parts, burst.count)):
            now = now_ms()
            sent = [self._event(burst, kind, int(item), now + late) for item in part]
            if burst.unapplied:
                with mock.patch.object(self.world.events, "_apply", lambda good, _: [False] * len(good)):
                    statuses = self.world.events._take(sent)
                self.behind.add(burst.person)
            else:
                statuses = self.world.events._take(sent)
            for one, status in zip(sent, statuses, strict=True):
                assert not status.code, status
                self.ids[status.profile_version] = one.event_id
                if self.allowed[burst.person]:
                    self.events[burst.person].append(self._told(one, status.profile_version))
            self.tally["events"] += len(sent)
            self._look()

    def _event(self, burst: Burst, kind: str, item: int, timestamp: int) -> event_pb2.Event:
        name = self.subjects[burst.person][2:]
        subject = common_pb2.Subject(anonymous_id=name) if burst.person else common_pb2.Subject(user_id=name)
        about: dict[str, Any] = {"query": "words"} if kind == "search" else {"item_id": self._item(item)}
        about |= {} if burst.value is None else {"value": burst.value}
        return event_pb2.Event(
            subject=subject, event_id=uuid.uuid4().hex, event_type=kind, timestamp_ms=timestamp, **about
        )

    def _told(self, event: event_pb2.Event, log_id: int) -> Told:
        item = self.known.get(event.item_id, {"categories": [], "creator_id": ""})
        value = event.value if event.HasField("value") else None
        category = (item["categories"] or [""])[0]
        return Told(log_id, event.item_id, category, item["creator_id"], event.timestamp_ms, value, event.event_type)

    def _ask(self, person: int) -> None:
        if person in self.behind:
            return
        subject, deadline = self.subjects[person], time.monotonic() + 60
        told: dict[str, str] = {}
        if self.allowed[person]:  # each slate finds other attributes than the one before
            told = {"plan": ("family", "single")[len(self.served) % 2], "age": str(30 + len(self.served))}
            assert self.world.people.set_attributes(subject, told)[1]
        request = Request(
            uuid.uuid4().hex,
            subject,
            now_ms(),
            deadline,
            5,
            surface="home",
            context=_CONTEXTS[len(self.served) % len(_CONTEXTS)],
        )
        slate = self.world.engine.pipelines["recommend"].run(request)
        if slate.user.vector is None or not slate.rows.size:
            return
        assert not slate.degraded
        catalog = self.world.engine.catalog
        columns = catalog.columns
        then = dataclasses.replace(
            columns, **{f.name: getattr(columns, f.name).copy() for f in dataclasses.fields(columns)}
        )
        facts = {
            name: {
                "item_id": name,
                "category": (one["categories"] or [""])[0],
                "creator": one["creator_id"],
                "price": one.get("price"),
            }
            for name, one in self.known.items()
        }
        rows = dict(zip(facts, catalog.rows(list(facts)).tolist(), strict=True))
        events = tuple(self.events[person])
        self.served.append(
            Served(request.request_id, then, rows, catalog.size, events, self.forgotten[person], facts, told)
        )

    def _undo(self, person: int, which: int) -> None:
        if not self.events[person]:
            return
        gone = self.events[person].pop(which % len(self.events[person]))
        self.world.people.undo(self.subjects[person], self.ids[gone.log_id])
        self.tally["undone"] += 1

    def _consent(self, person: int, given: bool) -> None:
        if given == self.allowed[person]:
            return
        purposes = EVERY_PURPOSE if given else Purpose.TRAIN | Purpose.MEASURE
        at, applied = self.world.people.set_consent(self.subjects[person], purposes)
        assert applied
        self.allowed[person] = given
        self.tally["consents"] += 1
        if not given:
            self.forgotten[person], self.events[person] = at, []

    def _look(self) -> None:
        """Keeps the profiles as they are read now; not of whom the projector has still to bring events."""
        for person, subject in enumerate(self.subjects):
            if person not in self.behind:
                profile = self.world.store.read(subject)
                self.moments.append(Moment(person, profile, self.forgotten[person], tuple(self.events[person])))

    def compare(self) -> list[str]:
        """Reads the sink's Parquet and compares it with what was seen; then forgets what was seen."""
        self.sink.drain()
        out: Path = self.sink.out  # type: ignore[attr-defined]
        histories = LoggedHistories(out) if any(out.glob("events/*/*.parquet")) else None
        found: list[str] = []
        for moment in self.moments:
            found += self._compare_profile(moment, histories)
        slates = {one["request_id"]: one for file in out.glob("impressions/*/*.parquet") for one in logged_slates(file)}
        for served in self.served:
            found += self._compare_slate(served, slates[served.request_id], histories)
        if histories is not None:
            found += self._compare_trained(out, slates)
        self.tally["prefixes"] += len(self.moments)
        self.tally["slates"] += len(self.served)
        self.moments.clear()
        self.served.clear()
        return found

    def _compare_profile(self, moment: Moment, histories: LoggedHistories | None) -> Iterator[str]:
        profile = dataclasses.replace(moment.profile, consent=None, controls=no_controls())
        rooms = features.decayed_counts.DIMENSIONS
        expected = oracle.state(moment.events, features.profile.RING, features.profile.OLDER_ITEMS_CAP, rooms)
        if expected != {
            "count": profile.count,
            "records": profile.records.tobytes(),
            "evicted": profile.older_items.tolist(),
            "past": _past(profile),
        }:
            yield "online is not what the oracle says"
        if histories is None:
            return
        own = histories.of(self.subjects[moment.person])
        if encode(own.replayed(profile.version, moment.forgotten)) != encode(profile):
            yield "offline is not online"
        with plain_kernels():
            if encode(own.replayed(profile.version, moment.forgotten)) != encode(profile):
                yield "the plain twins fold otherwise"

    def _compare_trained(self, out: Path, slates: dict[str, dict[str, Any]]) -> Iterator[str]:
        """Training's own road: every past at every version, and what the ranker reads of every slate."""
        forgotten = dict(zip(self.subjects, self.forgotten, strict=True))
        trained = Trained(out, forgotten, KINDS, self.world.engine.catalog)
        for moment in self.moments:
            assert moment.forgotten == self.forgotten[moment.person]
            for name in trained.differing(self.subjects[moment.person], moment.profile):
                yield f"training remembers otherwise: {name}"
        if self.served:
            then = [(served.columns, served.size) for served in self.served]
            rows = [slates[served.request_id] for served in self.served]
            for name in trained.differing_slates(rows, then, _ACTIONS, MODEL["event_types"]):
                yield f"training assembles otherwise: {name}"

    def _compare_slate(self, served: Served, slate: dict[str, Any], histories: LoggedHistories | None) -> Iterator[str]:
        assert histories is not None
        subject = next(one for one in self.subjects if one.removeprefix("u:") == slate["user_id"])
        profile = histories.of(subject).replayed(slate["profile_version"], served.forgotten)
        with self.world.offline.as_of(served.columns, served.size):
            yield from self._compare_served(served, slate, profile)

    def _compare_served(self, served: Served, slate: dict[str, Any], profile: Profile) -> Iterator[str]:
        for name in self.world.replay.differing(slate, profile):
            yield f"served otherwise than assembled offline: {name}"
        with plain_kernels():
            for name in self.world.replay.differing(slate, profile):
                yield f"the plain twins assemble otherwise: {name}"
        past = oracle.remembered(served.events, features.profile.RING)
        lasts = oracle.past_of(served.events, features.decayed_counts.DIMENSIONS)
        if oracle.encoder(past, served.rows, MODEL["event_types"], MODEL["max_length"]) != list(
            zip(*_encoded(self.world, profile), strict=True)
        ):
            yield "the oracle encodes another sequence"
        names = self.world.replay.names
        for item, values in zip(slate["item_ids"], slate["features"], strict=True):
            asked = past, served.known[item], slate["timestamp"], MODEL["event_types"]
            told = oracle.ranker(past, lasts, *asked[1:]) | oracle.declared(*asked[:3], slate, served.told)
            for name, value in told.items():
                if np.float32(value) != np.float32(values[names.index(name)]):
                    yield f"the oracle says otherwise: {name}"


def _past(profile: Profile) -> oracle.Past:
    """The memory of a profile as the oracle tells it."""
    memory = profile.decayed_counts
    cells = {name: memory.of(name) for name in features.decayed_counts.DIMENSIONS}
    counts = {
        name: dict(zip(memory.keys[part].tolist(), memory.counts[part].tolist(), strict=True))
        for name, part in cells.items()
    }
    return oracle.Past(memory.newest, memory.visit_began, memory.visit_events, counts)


def _encoded(world: World, profile: Profile) -> tuple[list[int], list[int]]:
    """Returns the user encoder's inputs of a profile."""
    types = features.assemble.type_index(MODEL["event_types"])
    past = features.assemble.history(profile, world.offline, types)
    rows, kinds = features.assemble.encoder_inputs(features.assemble.rows_read(past), past.types, MODEL["max_length"])
    return rows.tolist(), kinds.tolist()


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Every kernel replaced by its plain twin, wherever it is used."""
    with contextlib.ExitStack() as stack:
        users: Sequence[ModuleType] = (
            features.profile,
            features.records,
            features.decayed_counts,
            features.assemble,
            features.action_rates,
        )
        kernels = vars(features.kernels) | vars(features.decay_kernels) | vars(features.declared_kernels)
        for name, module in itertools.product(kernels, users):
            twin = kernels.get(f"{name}_plain")
            if twin is not None and hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, twin))
        yield


def lived(world: World, small: bool, steps: Sequence[Step], tally: Counter[str] | None = None) -> list[str]:
    """Lives one life; what differs."""
    tally = Counter() if tally is None else tally
    with contextlib.ExitStack() as stack:
        for change in SMALL if small else ():
            stack.enter_context(mock.patch.object(*change))
        life = Life(world, stack.enter_context(world.warehouse()), tally)
        try:
            found = life.live(steps)
        finally:
            life.end()
    tally["lives"] += 1
    return found


def prove(world: World, count: int, number: int) -> Counter[str]:
    """Lives many lives drawn from a seed.

    Raises:
        AssertionError: In one of them something differs; the steps of that life are in its notes.
    """
    tally: Counter[str] = Counter()

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )
    @given(lives())
    def property_holds(life: tuple[bool, list[Step]]) -> None:
        before = tally["compactions"]
        assert lived(world, *life, tally) == []
        tally["fewest_compactions"] = min(tally["compactions"] - before, tally.get("fewest_compactions", 1 << 30))
        if tally["lives"] % 50 == 0:
            print(json.dumps(tally), file=sys.stderr, flush=True)

    property_holds()
    return tally


def main() -> None:
    """The proof at full size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--lives", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    begun = time.monotonic()
    with world() as there:
        tally = prove(there, asked.lives, asked.seed)
    print(json.dumps({**tally, "differences": 0, "seed": asked.seed, "seconds": round(time.monotonic() - begun, 1)}))


if __name__ == "__main__":
    sys.exit(main())
