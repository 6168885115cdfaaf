"""Bundles of the whole road and of the small world: what is served is what a plain loop over all items would say."""

from __future__ import annotations

import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from features.action_rates import ActionRates
from features.assemble import chosen_rows, encoder_inputs, history, moment_at, ranker_features
from features.keys import event_type_key, event_type_keys, item_keys
from features.linear import ItemWeights, sum_weights_plain
from features.profile import Profile, fold
from features.profile import empty as nobody
from features.records import make_records
from penchant.client import event
from penchant.v1 import catalog_pb2, common_pb2
from serving.config import ServeConfig
from serving.engine.engine import Engine, open_engine
from serving.engine.pipelines import Dependencies
from serving.observability.telemetry import Telemetry
from serving.pipeline.request import Request
from serving.stores.catalog_log import CatalogProgress
from serving.stores.profiles import ProfileStore
from tests.fixtures import PATIENCE_S

NOW = 1_800_000_000_000


@pytest.fixture(params=["world", "trained"])
def engine(request, profiles_redis) -> Engine:
    path = request.getfixturevalue(request.param)
    path = path / "bundle" if request.param == "trained" else path
    around = Dependencies(ServeConfig.load(bundle=path), ProfileStore(profiles_redis), CatalogProgress(), Telemetry())
    return open_engine(path, around)


def plain_sums(engine: Engine, chosen: np.ndarray) -> np.ndarray:
    """The sums of the linear part by row, by the bundle's files."""
    path, sums = engine.bundle.path, np.zeros(engine.catalog.size, np.float32)
    table = ItemWeights.of(np.load(path / "neighbors.npy"), np.load(path / "neighbor_scores.npy"))
    for row, total in sum_weights_plain(chosen, table, engine.bundle.model.linear).items():
        sums[row] = total
    return sums


def expected(engine: Engine, profile: Profile, page: int) -> list[int]:
    """The best rows for a user by the definition of the score, without index, pipeline or kernels for retrieval."""
    spec, columns = engine.bundle.model, engine.catalog.columns
    places = {event_type_key(name): place for place, name in enumerate(spec.event_types, 1)}
    past = history(profile, engine.catalog, places)
    rows, types = encoder_inputs(past.rows, past.types, spec.max_length)
    user = engine.model.encode_user(columns.vectors[rows], types)
    every = np.setdiff1d(np.arange(engine.catalog.size, dtype=np.int32), past.rows)
    linear = plain_sums(engine, chosen_rows(past))
    relevance = columns.vectors[every] @ user + linear[every]
    depth = engine.bundle.manifest.candidates or 500
    best = every[np.argsort(-relevance, kind="stable")[:depth]]
    close = (columns.vectors[best] @ user).astype(np.float32) + linear[best]
    features = ranker_features(past, best, close, columns, ActionRates.of_model(spec), moment_at(spec.declared, NOW))
    logits = engine.model.rank(user, columns.vectors[best], features)
    worth = (
        (1 / (1 + np.exp(-logits.astype(np.float64))) * np.array(spec.action_weights)).sum(axis=1).clip(1e-6, 1 - 1e-6)
    )
    final = close + spec.blend * np.log(worth / (1 - worth))
    return best[np.argsort(-final, kind="stable")[:page]].tolist()


def test_the_feed_is_that_of_the_definition(engine, profiles_redis):
    rng = np.random.default_rng(5)
    store = ProfileStore(profiles_redis)
    types = engine.bundle.model.seen_types
    for number in range(10):
        length = int(rng.integers(1, 30))
        rows = rng.integers(0, engine.catalog.size, length)
        ids = engine.catalog.ids(rows)
        category, creator = engine.catalog.columns.category[rows], engine.catalog.columns.creator[rows]
        kinds = event_type_keys([types[at] for at in rng.integers(0, len(types), length)])
        records = make_records(item_keys(ids), category, creator, NOW, np.nan, kinds)
        profile = fold(nobody(), records, length)
        store.put_states([(f"u:{number}", profile)])
        slate = engine.pipelines["recommend"].run(Request("r", f"u:{number}", NOW, time.monotonic() + PATIENCE_S, 10))
        assert slate.rung == "sequence"
        assert not slate.degraded
        assert slate.rows.tolist() == expected(engine, profile, 10)


def test_the_whole_road_is_served(trained, serve):
    events = pq.read_table(trained / "data" / "events.parquet").to_pylist()
    items = {item["item_id"]: item for item in pq.read_table(trained / "data" / "items.parquet").to_pylist()}
    person = events[0]["user_id"]
    mine = [one for one in events if one["user_id"] == person and one["event_type"] == "view_item"][:20]
    with serve(trained / "bundle", workers=2) as service, service.client(channels=6) as client:
        before = client.recommend(user_id=person, page_size=10)
        assert before.rung == common_pb2.RUNG_POPULAR
        status = client.ingest([event(person, one["item_id"], one["event_type"]) for one in mine])[-1]
        after = client.recommend(user_id=person, page_size=10, min_profile_version=status.profile_version)
        assert after.rung == common_pb2.RUNG_SEQUENCE
        assert len(after.items) == 10
        assert not {item.item_id for item in after.items} & {one["item_id"] for one in mine}

        some = items[mine[0]["item_id"]]
        assert some["item_id"] in [item.item_id for item in client.search(some["title"], page_size=10).items]
        twin = catalog_pb2.Item(item_id="twin", title=some["title"], categories=some["categories"])
        assert client.put_items([twin]).visible_everywhere
        for _ in range(8):
            assert "twin" in [item.item_id for item in client.search(some["title"], page_size=10).items]
            assert len(client.similar_items(["twin"], page_size=10).items) == 10
