"""No skew: what is served, what is replayed from Parquet and what an oracle says are the same, bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import features.assemble
import features.decayed_counts
import features.declared
import features.profile
import training.data.histories
from features.catalog_columns import CatalogColumns
from features.declared_kernels import fill_declared
from features.histories import Logged, history_keys
from features.profile import RING
from features.ranker_kernels import RECENCY, fill_ranker_features
from penchant.client import event
from penchant.v1 import common_pb2
from serving.jobs.skew import replay
from serving.redis.client import connect
from tests.proofs.skew import KINDS, Ask, Burst, Consent, Fold, Life, Patch, Step, Undo, World, lived, prove
from tests.serving.test_loop import penchant
from tests.serving.test_warehouse import rows
from tests.world import COUNT


@pytest.fixture(scope="module")
def there(profiles_server: Any, events_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    for server in (profiles_server, events_server):
        with connect(server.url, 2.0) as client:
            client.flushall()  # another file's log may have another number of partitions
    with contextlib.ExitStack() as stack:
        yield World(stack, tmp_path_factory.mktemp("skew"), profiles_server.url, events_server.url)


def burst(count: int, item: int = 0, stride: int = 1, kind: int = 0, late: int = 0, person: int = 0) -> Burst:
    return Burst(person, count, item, stride, kind, late, None, 2, False)


LIFE = [
    burst(130, 0, 4, late=6),
    Fold(),
    Patch(4, "noir", "c77"),
    burst(130, 2, 6, kind=1, late=3),
    Ask(0),
    Fold(),
    Burst(0, 20, 1, 2, 4, 0, 3.25, 2, unapplied=True),
    Fold(),
    burst(60, 6, 8, kind=2, late=4),
    Fold(),
    Ask(0),
]
"""Long enough that the ring pushes events out; about every other item, so that there is something left to show."""


def test_lives_drawn_at_random(there: World) -> None:
    tally = prove(there, 20, 0)
    assert tally["fewest_compactions"] >= 3
    assert all(tally[what] for what in ("late", "before_patch", "early", "slates"))


@pytest.mark.parametrize(
    "life",
    [
        [burst(3, 4, 0), Patch(4, "noir", "c77"), Ask(0)],  # an event, and then its item is patched
        [burst(3, COUNT, 0), Patch(COUNT, "western", "c1"), burst(2), Ask(0)],  # an event that came before its item
    ],
)
def test_a_training_that_asks_todays_catalogue_is_caught(there: World, life: list[Step]) -> None:
    assert lived(there, False, life) == []

    def todays(rows: Any, columns: CatalogColumns, logged: Logged) -> Any:
        return history_keys(rows, columns, dataclasses.replace(logged, carried=np.zeros_like(logged.carried)))

    with mock.patch.object(training.data.histories, "history_keys", todays):
        found = lived(there, False, life)
    assert {"training remembers otherwise: categories", "training remembers otherwise: creators"} <= set(found)
    assert "training remembers otherwise: keys" in found
    assert any(one.startswith("training assembles otherwise: category") for one in found)
    assert all(one.startswith("training ") for one in found)


def test_a_ring_that_searches_fill_is_caught(there: World) -> None:
    life = [burst(30), burst(20, kind=KINDS.index("search")), Ask(0)]
    assert lived(there, True, life) == []
    with mock.patch.object(features.profile, "_about_items", lambda events: events):
        found = lived(there, True, life)
    assert "training remembers otherwise: rows" in found


@pytest.mark.parametrize("small", [True, False])
def test_a_life_with_everything_in_it(there: World, small: bool) -> None:
    taken_back = [Undo(0, 7), burst(9, 2), Ask(0), Consent(0, False), burst(5), Consent(0, True), burst(3, 8), Ask(0)]
    assert lived(there, small, [*LIFE, *taken_back]) == []


@contextlib.contextmanager
def altered(module: Any, name: str, value: Any) -> Iterator[None]:
    """Another constant, but only while Parquet is read: as if training had it."""
    compare = Life.compare

    def otherwise(life: Life) -> list[str]:
        with mock.patch.object(module, name, value):
            return compare(life)

    with mock.patch.object(Life, "compare", otherwise):
        yield


_DECAYS = features.assemble._DECAYS
_TASTE = _DECAYS._replace(taste=0.5 ** (np.arange(RING, dtype=np.float64) / 21))
_LONG = _DECAYS._replace(long=0.5 ** (np.arange(RING + 1, dtype=np.float64) / 41))


def _longer_hour(candidates: Any, events: Any, *rest: Any) -> Any:
    filled = fill_ranker_features(candidates, events, *rest)
    if events.timestamps.size:
        filled[:, RECENCY] = np.log1p(max(rest[-2] - int(events.timestamps[-1]), 0) / 3_600_100)
    return filled


def _heavier_prior(out: Any, first: int, rows: Any, items: Any, request: Any, past: Any, *rest: Any) -> None:
    fill_declared(out, first, rows, items, request, past._replace(prior=past.prior + 1), *rest)


_REQUEST_VALUES = features.declared.Declared.request_values


def _an_hour_later(self: Any, now_ms: int = 0, *rest: Any) -> Any:
    return _REQUEST_VALUES(self, now_ms + 3_600_000, *rest)


@pytest.mark.parametrize(
    ("module", "name", "value", "small"),
    [
        (features.profile, "RING", RING - 1, False),
        (features.profile, "RING", 15, True),
        (features.profile, "OLDER_ITEMS_CAP", 11, True),
        (features.profile, "_PASSIVE", np.empty(0, np.uint32), True),
        (features.decayed_counts, "TICK_MS", features.decayed_counts.TICK_MS + np.array([1, 0, 0]), False),
        (features.decayed_counts, "VISIT_MS", features.decayed_counts.VISIT_MS // 2, False),
        (features.decayed_counts, "_UNCHOSEN", features.decayed_counts._UNCHOSEN[1:], True),
        (features.assemble, "_UNCHOSEN", features.assemble._UNCHOSEN[-1:], False),
        (features.assemble, "_DECAYS", _TASTE, False),
        (features.assemble, "_DECAYS", _LONG, False),
        (features.assemble, "fill_ranker_features", _longer_hour, False),
        (features.assemble, "fill_declared", _heavier_prior, False),
        (features.declared.Declared, "request_values", _an_hour_later, False),
    ],
)
def test_one_changed_constant_offline_is_caught(there: World, module: Any, name: str, value: Any, small: bool) -> None:
    with altered(module, name, value):
        found = lived(there, small, LIFE)
    assert any("offline" in one for one in found), found


def test_the_service_logs_what_it_served_and_the_warehouse_gives_the_same(
    serve: Any, world: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    said = common_pb2.RequestContext(device="phone", channel="web", timestamp_ms=5, attributes={"shelf": "2", "b": "1"})
    with serve(state=state, warehouse=True, warehouse_flush_s=0.5, log_features=1.0) as service:
        with service.client(channels=1) as client:
            client.recommend(user_id="p0", surface="told", context=said)
            for number in range(30):
                person = f"p{number % 3}"
                client.ingest([event(person, f"i{number}", ("view_item", "like")[number % 2])])
                slate = client.recommend(user_id=person, page_size=5, surface="home")
                assert slate.rung == common_pb2.RUNG_SEQUENCE
        assert service.stop() == 0
    [told] = [row for row in rows(state / "warehouse", "impressions") if row["surface"] == "told"]
    assert [told[name] for name in ("device", "channel", "locale", "asked_at")] == ["phone", "web", None, 5]
    assert sorted(told["attributes"]) == [("b", "1"), ("shelf", "2")]
    said = replay(state / "warehouse", world)
    assert (said["slates"], said["differing"], said["elsewhere"]) == (30, 0, 0)
    allowed = ("--allow", "request_ids=1")  # nothing here follows from a slate
    answer, lines = penchant("validate", state / "warehouse", "--bundle", world, *allowed)
    assert "PASS  served_features: 0 of 30 slates" in lines
    assert answer["checks"][-1]["name"] == "served_features"
    with mock.patch.object(features.assemble, "_DECAYS", _TASTE):
        said = replay(state / "warehouse", world)
    assert not said["passed"]
    assert said["inputs"].keys() == {"category_affinity", "creator_affinity"}
