"""The whole circle: what a service logs is the data set that its next model is trained on, and served from."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import grpc
import numpy as np
import pyarrow.parquet as pq
import pytest

from features.clock import now_ms
from features.tables.dataset import open_dataset
from features.tables.validate import validate
from penchant.client import event
from penchant.v1 import catalog_pb2, common_pb2
from serving.config import ServeConfig
from serving.redis.client import connect
from serving.stores.profile_eviction import Evictions
from serving.stores.profiles import ProfileStore
from tests.serving.faults import wait_until
from tests.world import GENRES, rows_of

SETTINGS = ["epochs=1", "dim=8", "layers=1", "heads=1", "max_length=16", "query_steps=5", "ranker_steps=5"]
SETTINGS += ["warmup_steps=2", "candidates=20"]


def penchant(*words: str, status: int = 0) -> tuple[dict, str]:
    command = [sys.executable, "-c", "from cli.main import main; main()", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def live_through(client, people: range, turns: int = 6) -> int:
    """Everybody asks, and takes something of their genre from the answer; the number of events."""
    rng, sent = np.random.default_rng(people.start), 0
    for turn in range(turns):
        for person in people:
            who, taste = f"p{person}", rows_of(GENRES[person % 4])
            slate = client.recommend(user_id=who, page_size=20, surface="home", session_id=f"s{person}-{turn // 3}")
            place = next((at for at, item in enumerate(slate.items) if item.item_id in taste), 0)
            told = {"request_id": slate.request_id, "position": place, "surface": "home"}
            kind = ("select_item", "like", "purchase")[int(rng.integers(3))]
            one = event(who, slate.items[place].item_id, kind, session_id=f"s{person}-{turn // 3}", **told)
            sent += sum(not status.code for status in client.ingest([one]))
    return sent


@pytest.mark.timeout(900)
def test_train_on_what_the_service_wrote_export_and_serve_again(serve, world, tmp_path):
    state, warehouse = tmp_path / "state", tmp_path / "state" / "warehouse"
    assert ServeConfig.model_fields["warehouse"].default is True
    with serve(state=state, warehouse=True, warehouse_flush_s=0.5) as service, service.client(channels=4) as client:
        assert service.ready["warehouse"] == str(warehouse)
        new = catalog_pb2.Item(item_id="fresh", title="western story fresh", categories=["western"])
        assert client.put_items([new]).statuses[0].code == 0
        sent = live_through(client, range(24))
        said, lines = penchant("validate", "--live", service.ready["events_redis"], "--bundle", world)
        assert {check["name"] for check in said["checks"]} >= {"unexplained_outcomes", "positions", "clock_skew"}
        assert "FAIL" not in lines
        # A planted defect: outcomes that name an answer nobody was given.
        lost = [event("p1", "i1", "like", request_id=f"never-{n}") for n in range(20)]
        client.ingest(lost)
        said, lines = penchant("validate", "--live", service.ready["events_redis"], "--bundle", world, status=1)
        assert [check["name"] for check in said["checks"] if not check["passed"]] == ["unexplained_outcomes"]
        assert "FAIL  unexplained_outcomes: 20 of" in lines
        assert service.stop() == 0
    sent += len(lost)
    data = open_dataset(warehouse)
    assert data.info["events"] == sent
    assert data.info["items"] == 41
    assert data.info["catalog_version"] == 1
    assert data.rejected == []
    failed = {check["name"] for check in validate(warehouse)["checks"] if not check["passed"]}
    assert failed == {"unexplained_outcomes"}
    listed, _ = penchant("features", "--data", warehouse)
    assert {one["name"]: one["coverage"] for one in listed["features"]}["item_vector"] == 1.0

    run, bundle = tmp_path / "run", tmp_path / "bundle"
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    trained, _ = penchant("train", warehouse, "--out", run, "--device", "cpu", "--seed", "1", *words)
    assert trained["events"] == sent
    # The service goes on, and with it the warehouse: the run stays what it was trained on.
    with serve(state=state, warehouse=True, warehouse_flush_s=0.5) as service, service.client(channels=4) as client:
        more = live_through(client, range(24, 30), turns=1)
        client.put_items([catalog_pb2.Item(item_id="later", title="space story later", categories=["space"])])
        assert service.stop() == 0
    assert open_dataset(warehouse).info["events"] == sent + more
    exported, _ = penchant("export", run, "--out", bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["catalog_version"] == 1
    assert pq.read_table(run / "items.parquet").num_rows == 41
    # Nothing was served by it yet: there is nothing to replay, and that is not said to be sound.
    said, lines = penchant("validate", warehouse, "--bundle", bundle, status=1)
    assert "SKIP  served_features: no slate of this bundle" in lines
    assert said["checks"][-1]["name"] != "served_features"

    with serve(bundle, state=state, warehouse=True) as service, service.client(channels=4) as client:
        assert service.ready["bundle_id"] == exported["bundle_id"]
        slate = client.recommend(user_id="p1", page_size=10)
        assert (slate.bundle_id, slate.rung) == (exported["bundle_id"], common_pb2.RUNG_SEQUENCE)
        assert len(slate.items) == 10
        assert not slate.degraded
        # What was put is known from the bundle or from the changes since; each is there once.
        for item in ("fresh", "later"):
            found = [one.item_id for one in client.search(f"story {item}", page_size=50).items]
            assert found.count(item) == 1
        with pytest.raises(grpc.RpcError):
            client.search("")


def test_who_stayed_away_is_known_again_once_they_ask(serve, tmp_path):
    """The state is dropped as after long idleness; the answers to somebody who does nothing bring it back."""
    warehouse = tmp_path / "state" / "warehouse"
    with serve(warehouse=True, warehouse_flush_s=0.2, evict_after_days=1) as service, service.client() as client:
        client.ingest([event("ann", item, "like") for item in sorted(rows_of(GENRES[0]))[:6]])
        version = client.get_profile("ann").profile_version
        before = client.recommend(user_id="ann", page_size=5)
        assert before.rung == common_pb2.RUNG_SEQUENCE
        until = warehouse / "dataset.json"
        wait_until(lambda: until.exists() and json.loads(until.read_text())["until"] >= version)
        with connect(service.ready["redis"], 5) as profiles:
            store = ProfileStore(profiles)
            store.compact("u:ann", version)
            assert Evictions(store).evict(now_ms() + 60_000) == 1
        # The answer that meets the dropped state, and those before the projector has looked, know nothing of them.
        answers = [client.recommend(user_id="ann", page_size=5)]
        assert answers[0].rung != common_pb2.RUNG_SEQUENCE
        wait_until(lambda: client.recommend(user_id="ann", page_size=5).rung == common_pb2.RUNG_SEQUENCE)
        after = client.recommend(user_id="ann", page_size=5)
        assert after.profile_version == version
        assert [one.item_id for one in after.items] == [one.item_id for one in before.items]
