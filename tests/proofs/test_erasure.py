"""A user who asks to be erased is in every store before and in none after, and no restored data brings them back."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from penchant.client import Client, event
from penchant.v1 import common_pb2
from serving.config import ServeConfig
from serving.errors import ConfigError, FailedPrecondition
from serving.jobs.host_keeper import HostKeeper
from serving.log_retention import PROFILES_GROUP
from serving.privacy.certificates import Certificates
from serving.privacy.ledger import Ledger
from serving.privacy.purge import Purger
from serving.privacy.replay import replay, replay_ledgers
from serving.privacy.rights import SubjectRights
from serving.projection.projector import Projector
from serving.projection.rebuild import rebuild
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.stores.catalog_log import CatalogLog
from serving.stores.consumer_group import Consumer
from serving.stores.event_log import EventLog
from serving.stores.log_erasure import LogErasure
from serving.stores.profiles import ProfileStore
from serving.warehouse.files import WarehouseFiles
from serving.warehouse.process import run
from serving.warehouse.revision import hold_erasures
from tests.fixtures import serving
from tests.proofs.scan import Traces, found
from tests.serving.faults import wait_until
from tests.serving.logged import logged

PARTITIONS = 4
CANARY, BIRD = "canary-5fa1c9", "starling-77d0b2"
ITEMS = {CANARY: "i3", BIRD: "i5"}
DUE_S = 24.0
SERVED = {"partitions": PARTITIONS, "warehouse": True, "warehouse_flush_s": 0.3, "purge_hours": DUE_S / 3600}
LOGGED = {"events", "impressions", "index", "seen", "events file"}
PROFILE = {"profile", "profiles file"}
PARQUET = {"warehouse events", "warehouse searches", "warehouse impressions", "warehouse sessions"}


def places(state: Path, name: str) -> set[str]:
    """The places that hold a user; the words of the user contain their name."""
    ids = [f"{name}-event-{number}" for number in range(6)]
    words = [f"visitor-{name}", f"mood of {name}", f"song of {name}", f"visit-{name}"]
    return found(state, Traces.of(f"u:{name}", ids, words, [ITEMS[name]], PARTITIONS))


def live(client: Client, name: str) -> None:
    """An anonymous user becomes a known one, and leaves a trace of every kind."""
    first = event("", ITEMS[name], "view_item", event_id=f"{name}-event-0")
    first.subject.anonymous_id = f"visitor-{name}"
    client.ingest([first])
    client.merge_identities(f"visitor-{name}", name, timeout_s=60.0)
    slate = client.recommend(user_id=name, session_id=f"visit-{name}", surface="home", page_size=5)
    told = {"request_id": slate.request_id, "attributes": {"mood": f"mood of {name}"}, "session_id": f"visit-{name}"}
    acts = [event(name, ITEMS[name], "like", event_id=f"{name}-event-{number}", **told) for number in range(1, 5)]
    acts.append(event(name, "", "search", event_id=f"{name}-event-5", query=f"song of {name}"))
    assert [status.code for status in client.ingest(acts)] == [0] * len(acts)
    client.search(f"song of {name}", user_id=name)


@pytest.fixture(scope="module")
def backup(tmp_path_factory, world) -> Path:
    """The state of a service that two users have used."""
    state = tmp_path_factory.mktemp("erasure") / "state"
    with serving(world, state, **SERVED) as service, service.client(channels=2, timeout_s=60.0) as client:
        for name in (CANARY, BIRD):
            live(client, name)
        assert service.stop() == 0
    with opened(state) as stores:  # the last slate may have come when the Parquet was already closed
        stores.warehouse()
    return state


@pytest.fixture
def state(backup, tmp_path) -> Path:
    """A copy of it."""
    return put_back(backup, tmp_path / "state")


def put_back(backup: Path, to: Path, *names: str) -> Path:
    """Puts a backup in the place of a state, or some of its folders."""
    for name in names or [path.name for path in backup.iterdir()]:
        shutil.rmtree(to / name, ignore_errors=True)
        copy = shutil.copytree if (backup / name).is_dir() else shutil.copy
        to.mkdir(exist_ok=True)
        copy(backup / name, to / name)
    return to


class Stores:
    """The stores of a state, opened by hand."""

    def __init__(self, state: Path, profiles: RedisServer, events: RedisServer, stack: contextlib.ExitStack) -> None:
        self.state, self.out, self.urls = state, state / "warehouse", (profiles.url, events.url)
        self.profiles, self.events = (stack.enter_context(connect(url, 20.0)) for url in self.urls)
        self.log, self.store = EventLog(self.events, PARTITIONS), ProfileStore(self.profiles, PARTITIONS)
        self.ledger = Ledger(state / "erasures.jsonl")
        self.certificates = Certificates(self.log)
        self.people = SubjectRights(self.log, self.store, self.certificates, ledger=self.ledger)

    def purge(self) -> int:
        """Lets both servers rewrite their files if something was erased."""
        return Purger(self.certificates, self.events, self.profiles, 1.0).purge()

    def warehouse(self, **options: Any) -> dict[str, Any]:
        """Brings the Parquet up to date."""
        return run(self.urls[1], self.out, partitions=PARTITIONS, once=True, **options)

    def host(self) -> None:
        """Lets the host come back, which catches up before it is ready."""
        config = ServeConfig(bundle=self.state, state_dir=self.state)
        keeper = HostKeeper(config, self.log, self.store, "redis://here")
        keeper.catch_up()
        keeper.close()

    def project(self) -> None:
        """Replays the whole log, as a projector that knows nothing yet."""
        for keys in self.log.keys:
            if self.events.exists(keys.events):
                self.events.xgroup_setid(keys.events, PROFILES_GROUP, "0")
        projector = Projector(self.log, self.store, settle_s=0.0)
        projector.open()
        idle = 0
        while idle < 3:  # a step finds what is pending, one that there is no more of it, and one the news
            idle = 0 if projector.step() else idle + 1
        projector.close()

    def count(self, name: str) -> int:
        """Number of events in a profile."""
        return self.store.read(f"u:{name}").count


@contextlib.contextmanager
def opened(state: Path) -> Iterator[Stores]:
    with (
        RedisServer(state, "profiles") as profiles,
        RedisServer(state, "events") as events,
        contextlib.ExitStack() as stack,
    ):
        yield Stores(state, profiles, events, stack)


@pytest.fixture(scope="module")
def erased(backup, tmp_path_factory) -> Path:
    """The state after the erasure of one of the two, step by step: each step leaves what is not its own."""
    state = put_back(backup, tmp_path_factory.mktemp("erased") / "state")
    everywhere = LOGGED | PROFILE | PARQUET
    assert places(state, CANARY) == places(state, BIRD) == everywhere
    with opened(state) as stores:
        certificate = stores.people.erase(f"u:{CANARY}")
        counts = {one.store: one.entries for one in certificate.receipts}
        assert counts == {"profiles": 6, "events": 6, "impressions": 2, "warehouse": 0}
    # What is left out is found: the files of Redis are not rewritten yet, nor is the Parquet.
    assert places(state, CANARY) == {"profiles file", "events file"} | PARQUET
    with opened(state) as stores:
        assert stores.purge() == 1
    assert places(state, CANARY) == PARQUET
    with opened(state) as stores:
        assert stores.warehouse()["erased"] == 8
        assert stores.certificates.pending() == []
        dated = stores.certificates.get(certificate.certificate_id)
        assert all(one.erased_at and one.purged_at for one in dated.receipts)
    assert places(state, CANARY) == set()
    assert places(state, BIRD) == everywhere
    return state


def test_a_service_erases_at_once_and_from_the_disks_by_schedule(state, world):
    # Files that are written every ten minutes: an erasure does not wait for that.
    settings = SERVED | {"warehouse_flush_s": 600.0}
    with serving(world, state, **settings) as service, service.client(timeout_s=60.0) as client:
        assert client.recommend(user_id=CANARY).rung == common_pb2.RUNG_SEQUENCE
        began = int(time.time() * 1000)
        erased = client.erase(CANARY, timeout_s=60.0)
        assert not client.get_profile(CANARY).found
        # Not asked for a slate: that would be the first one of a new history, and rightly found.
        kinds = {one["kind"] for one in client.export_subject(CANARY, timeout_s=60.0)}
        assert kinds == {"consent", "controls", "attributes", "profile", "counts"}
        assert client.get_profile(BIRD).event_count == 6

        def receipts() -> dict[str, Any]:
            certificate = client.get_erasure_certificate(erased.certificate_id, timeout_s=60.0)
            return {one.store: one for one in certificate.receipts}

        in_call = [one.erased_at_ms for one in receipts().values() if one.store != "warehouse"]
        assert len(in_call) == 3
        assert all(0 <= at - began <= 5_000 for at in in_call)
        wait_until(lambda: receipts()["warehouse"].erased_at_ms)
        wait_until(lambda: all(one.purged_at_ms for one in receipts().values()), 3 * DUE_S)
        assert service.stop() == 0
    assert places(state, CANARY) == set()
    assert places(state, BIRD) == LOGGED | PROFILE | PARQUET
    lines = (state / "erasures.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert CANARY not in lines[0]


def test_neither_a_replay_nor_a_rebuild_brings_anybody_back(erased, tmp_path):
    state = put_back(erased, tmp_path / "state")
    with opened(state) as stores:
        stores.profiles.flushall()
        stores.project()
        # The control: who was not erased is back.
        assert (stores.count(CANARY), stores.count(BIRD)) == (0, 6)
        stores.profiles.flushall()
        rebuild(stores.out, *stores.urls, partitions=PARTITIONS)
        assert (stores.count(CANARY), stores.count(BIRD)) == (0, 6)
        # Nor does a client that sends again what it sent before.
        old = logged(
            event(CANARY, "i3", "like", event_id=f"{CANARY}-event-1", timestamp_ms=stores.log.now_ms() - 60_000)
        )
        assert isinstance(stores.log.append(old)[0].error, FailedPrecondition)
    assert places(state, CANARY) == set()


def test_a_backup_of_everything_is_put_back_and_the_ledger_wins(backup, erased, tmp_path, world):
    state = put_back(backup, tmp_path / "state")
    shutil.copy(erased / "erasures.jsonl", state)
    assert places(state, CANARY) == LOGGED | PROFILE | PARQUET
    with serving(world, state, **SERVED) as service, service.client(timeout_s=60.0) as client:
        assert "1 of 1 erasures did not hold" in service.log.read_text()
        assert not client.get_profile(CANARY).found
        assert client.get_profile(BIRD).event_count == 6
        [erasure] = Ledger(state / "erasures.jsonl").erasures()

        def purged() -> bool:
            receipts = client.get_erasure_certificate(erasure.certificate_id, timeout_s=60.0).receipts
            return all(one.purged_at_ms for one in receipts)

        wait_until(purged, 3 * DUE_S)
        assert service.stop() == 0
    assert places(state, CANARY) == set()
    assert places(state, BIRD) == LOGGED | PROFILE | PARQUET
    with opened(state) as stores:  # once it holds, a replay has nothing to do
        assert replay_ledgers([state / "erasures.jsonl"], *stores.urls, PARTITIONS) == {"erasures": 1, "again": 0}


@pytest.mark.parametrize("folder", ["profiles", "events", "warehouse"])
def test_a_backup_of_one_store_is_put_back_and_the_ledger_wins(backup, erased, tmp_path, folder):
    state = put_back(backup, put_back(erased, tmp_path / "state"), folder)
    own = {"profiles": PROFILE, "events": LOGGED, "warehouse": PARQUET}[folder]
    assert places(state, CANARY) == own
    with opened(state) as stores:
        again = replay(stores.ledger.erasures(), stores.log, stores.store)
        assert again == (folder != "warehouse")
        stores.purge()
        stores.warehouse(ledger=stores.ledger)
        stores.host()
        assert stores.certificates.pending() == []
        assert (stores.count(CANARY), stores.count(BIRD)) == (0, 6)
    assert places(state, CANARY) == set()
    assert places(state, BIRD) == LOGGED | PROFILE | PARQUET


def test_without_the_ledger_a_backup_brings_them_back(backup, tmp_path):
    """The control."""
    state = put_back(backup, tmp_path / "state")
    with opened(state) as stores:
        assert replay(stores.ledger.erasures(), stores.log, stores.store) == 0
        stores.project()
        stores.warehouse(ledger=stores.ledger)
        assert stores.count(CANARY) == 6
    assert places(state, CANARY) == LOGGED | PROFILE | PARQUET


def test_the_keys_of_retries_left_out_are_found(state, monkeypatch):
    """The control: the one part of an erasure that no other step makes good."""
    monkeypatch.setattr(LogErasure, "_forget_retries", lambda *_: None)
    with opened(state) as stores:
        stores.people.erase(f"u:{CANARY}")
        stores.purge()
        stores.warehouse()
    assert places(state, CANARY) == {"seen", "events file"}


def test_who_is_in_no_stream_any_more_is_erased_by_their_address(backup, erased, tmp_path):
    state = put_back(backup, tmp_path / "state")
    with opened(state) as stores:
        for keys in stores.log.keys:
            for stream in (keys.events, keys.impressions):
                if stores.events.exists(stream):
                    stores.events.xtrim(stream, maxlen=0)
        assert stores.count(CANARY) == 6
        assert replay(Ledger(erased / "erasures.jsonl").erasures(), stores.log, stores.store) == 1
        assert (stores.count(CANARY), stores.count(BIRD)) == (0, 6)
        stores.warehouse()
        rows = [
            row for file in stores.out.glob("events/*/*.parquet") for row in pq.ParquetFile(file).read().to_pylist()
        ]
        assert {row["user_id"] for row in rows} == {BIRD}


def test_files_that_were_through_an_erasure_are_not_looked_through_again(erased, tmp_path):
    state = put_back(erased, tmp_path / "state")
    erasures = Ledger(state / "erasures.jsonl").erasures()
    files = WarehouseFiles(state / "warehouse")
    hold_erasures(files, erasures)
    assert hold_erasures(files, erasures) == 0
    assert erasures[0].certificate_id in (state / "warehouse" / ".erasures").read_text()


def test_a_damaged_ledger_is_refused(tmp_path):
    (tmp_path / "ledger").write_text('{"certificate_id": "0001-')
    with pytest.raises(ConfigError, match="line 1"):
        Ledger(tmp_path / "ledger").erasures()


def test_the_warehouse_can_be_dropped_for_good(erased, tmp_path):
    from serving.warehouse.process import drop

    state = put_back(erased, tmp_path / "state")
    with opened(state) as stores:
        reader = Consumer(stores.log, "warehouse", "somebody", lease_ms=60_000)
        reader.open()
        reader.claim([None] * PARTITIONS)
        with pytest.raises(ConfigError, match="stop its process"):
            drop(stores.urls[1], PARTITIONS)
        reader.release()
        stores.people.erase(f"u:{BIRD}")
        with pytest.raises(ConfigError, match="1 erasures have not reached"):
            drop(stores.urls[1], PARTITIONS)
        stores.warehouse()
        assert drop(stores.urls[1], PARTITIONS)["groups"] > 0
        assert drop(stores.urls[1], PARTITIONS)["groups"] == 0
        left = [group["name"] for keys in stores.log.keys for group in stores.events.xinfo_groups(keys.events)]
        assert b"warehouse" not in left
        assert CatalogLog(stores.events).snapshot()
