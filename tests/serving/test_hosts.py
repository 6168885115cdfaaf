"""Several hosts on one log: one warehouse, and erasures that are complete when every copy has confirmed them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.errors import SettingsError, TablesError
from features.spans import Hole, Spans, read_spans
from features.subjects import partition_of
from features.tables.dataset import conform
from features.tables.evidence import Evidence
from features.tables.schema import EVENTS, EVENTS_REQUIRED
from features.tables.validate import validate
from features.tables.validate_split import split
from serving.config import ServeConfig
from serving.errors import ConfigError, InUse, NotFound
from serving.folder_identity import FolderIdentity, local_folder, read_identity, write_identity
from serving.jobs.copies import hold_in, register_made
from serving.jobs.host_keeper import HostKeeper
from serving.jobs.hosts import hosts, replay_everywhere
from serving.privacy.certificates import Certificates
from serving.privacy.ledger import Erasure, Ledger
from serving.privacy.rights import SubjectRights
from serving.projection.projector import Projector
from serving.projection.store_owner import OtherStore, StoreOwner
from serving.stores import registry as registries
from serving.stores.catalog_log import CatalogLog
from serving.stores.registry import Claim, Copy, Heartbeat, Registry
from serving.warehouse.files import TakenOver, WarehouseFiles
from serving.warehouse.items import ItemTable
from serving.warehouse.place import OtherPlace, WarehousePlace
from serving.warehouse.process import run
from serving.warehouse.writer import WarehouseWriter
from tests.serving.faults import wait_until
from tests.serving.logged import PARTITIONS, event, ingest

USERS = [f"user{number}" for number in range(8)]


@pytest.fixture
def people(log, store):
    return SubjectRights(log, store, Certificates(log))


@pytest.fixture
def once(log, events_server):
    """Brings a folder up to date, as the command does."""
    return lambda out: run(events_server.url, Path(out), partitions=PARTITIONS, once=True)


@pytest.fixture
def opened(log):
    """Opens warehouses; all are closed at the end."""
    with contextlib.ExitStack() as stack:

        def build(out: Path, *, registered: bool = True) -> WarehouseWriter:
            files = WarehouseFiles(out)
            place = WarehousePlace(log, files) if registered else None
            made = WarehouseWriter(log, files, ItemTable(out / "items.parquet", CatalogLog(log.client)), place=place)
            stack.callback(made.close)
            made.open(wait_s=0.0)
            return made

        yield build


def keeper(log, store, state: Path, **settings) -> HostKeeper:
    config = ServeConfig(bundle=state.parent, state_dir=state, warehouse=False, **settings)
    return HostKeeper(config, log, store, "redis://here")


def users_in(out: Path) -> set[str]:
    files = sorted(out.glob("events/date=*/*.parquet"))
    return {row["user_id"] for file in files for row in pq.ParquetFile(file).read(["user_id"]).to_pylist()}


def split_between(log, opened, first: Path, second: Path) -> None:
    """What two hosts left that knew nothing of each other: each has a part of the rows of every user."""
    for out, item in ((first, "i1"), (second, "i2")):
        ingest(log, *(event(user, item) for user in USERS))
        other = opened(out, registered=False)
        other.drain()
        other.close()


def receipts(log, certificate_id: str) -> dict[str, int]:
    return {one.store: one.purged_at for one in Certificates(log).get(certificate_id).receipts}


class TestOnePlace:
    def test_names_of_one_folder_are_one_place(self, log, once, tmp_path, monkeypatch):
        out = tmp_path / "a folder"
        (tmp_path / "link").symlink_to(tmp_path)
        monkeypatch.chdir(tmp_path)
        url = "file://" + str(out).replace(" ", "%20")
        for name in (
            out,
            "a folder",
            f"{out}/",
            tmp_path / "link" / "a folder",
            local_folder(url),
            local_folder(Path(url)),
        ):
            ingest(log, event("ann", "i1"))
            once(name)
        [copy] = Registry(log).copies("warehouse")
        assert copy.own
        assert read_identity(out).copy_id == copy.copy_id
        assert not list(read_spans(out).holes())

    @pytest.mark.parametrize("place", ["s3://bucket/parquet", "gs://b/p", "memory://w"])
    def test_a_place_that_cannot_hold_a_warehouse_is_refused_with_what_to_do(self, place, tmp_path):
        with pytest.raises(SettingsError, match=r"warehouse_dir.*mount"):
            ServeConfig.load(bundle=tmp_path, warehouse_dir=place)
        with pytest.raises(ConfigError, match="mount"):
            local_folder(Path(place))

    def test_another_folder_is_refused_and_takes_nothing_from_the_log(self, log, once, tmp_path):
        ingest(log, event("ann", "i1"))
        once(tmp_path / "one")
        ingest(log, event("bob", "i1"))
        with pytest.raises(OtherPlace, match=r"one on .*another folder.*warehouse_dir.*hosts --retire"):
            once(tmp_path / "two")
        assert users_in(tmp_path / "two") == set()
        once(tmp_path / "one")
        assert users_in(tmp_path / "one") == {"ann", "bob"}

    def test_a_refused_warehouse_waits_without_noise_until_the_other_one_is_retired(self, log, once, tmp_path, caplog):
        ingest(log, event("ann", "i1"))
        once(tmp_path / "one")
        files = WarehouseFiles(tmp_path / "two")
        items = ItemTable(tmp_path / "two" / "items.parquet", CatalogLog(log.client))
        other = WarehouseWriter(log, files, items, flush_s=0.05, place=WarehousePlace(log, files))
        stop = threading.Event()
        thread = threading.Thread(target=other.run, args=(stop,))
        thread.start()
        try:
            wait_until(lambda: "no Parquet is written by this host" in caplog.text)
            time.sleep(2.5)
            assert caplog.text.count("no Parquet is written by this host") == 1
            ingest(log, event("ann", "i2"))
            Registry(log).retire(Registry(log).own("warehouse").copy_id)
            wait_until(lambda: users_in(tmp_path / "two") == {"ann"})
        finally:
            stop.set()
            thread.join()
        # The new one says that it is not all.
        assert list(read_spans(tmp_path / "two").holes())

    def test_the_next_process_stands_by_and_takes_the_folder_over(self, log, opened, tmp_path):
        first = opened(tmp_path)
        with pytest.raises(InUse):
            opened(tmp_path)
        ingest(log, event("ann", "i1"))
        first.drain()
        first.close()
        ingest(log, event("bob", "i1"))
        second = opened(tmp_path)
        second.drain()
        assert users_in(tmp_path) == {"ann", "bob"}

    def test_a_copy_of_a_folder_in_use_is_another_folder(self, log, opened, tmp_path, monkeypatch):
        monkeypatch.setattr(registries, "BEAT_S", 0.05)
        ingest(log, event("ann", "i1"))
        first = opened(tmp_path / "one")
        first.drain()
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        files = WarehouseFiles(tmp_path / "two")
        files.open()
        place = WarehousePlace(log, files)

        def refused() -> bool:
            with contextlib.suppress(InUse):
                with pytest.raises(OtherPlace, match="is a copy of the warehouse"):
                    place.take()
                return True
            time.sleep(0.05)
            return False

        wait_until(refused)
        files.close()
        one, two = (read_identity(tmp_path / name).copy_id for name in ("one", "two"))
        assert one != two
        assert {copy.copy_id for copy in Registry(log).copies("warehouse")} == {one, two}

    def test_the_same_folder_through_a_mount_without_locks_is_not_taken_for_a_copy(self, log, tmp_path, monkeypatch):
        """The control of the one before."""
        monkeypatch.setattr(registries, "BEAT_S", 0.05)
        registry, identity = Registry(log), FolderIdentity("a" * 32, "process.0")
        write_identity(tmp_path, identity)
        registry.register("warehouse", identity.copy_id, "elsewhere")
        heartbeat, claim = Heartbeat(registry), Claim()
        heartbeat.say(tmp_path, identity, "writing")
        for _ in range(20):
            assert claim.verdict(tmp_path, registry.get(identity.copy_id), registry.now_ms()) == "busy"
            time.sleep(0.03)
        heartbeat.end()
        assert claim.verdict(tmp_path, registry.get(identity.copy_id), registry.now_ms()) == "free"

    def test_who_stood_still_while_another_took_the_folder_writes_nothing_more(self, log, opened, tmp_path):
        ingest(log, event("ann", "i1"))
        first = opened(tmp_path)
        first.drain()
        ingest(log, event("ann", "i2"))
        write_identity(tmp_path, replace(read_identity(tmp_path), token="other.0"))
        with pytest.raises(TakenOver):
            first.step(flush=True)
        assert len(pq.read_table(tmp_path / "events").to_pylist()) == 1

    def test_an_empty_folder_does_not_follow_one_that_is_not_registered(self, log, once, opened, tmp_path):
        """As after an upgrade of the host that has no Parquet, and with a mount that is missing."""
        ingest(log, event("ann", "i1"))
        before = opened(tmp_path / "old", registered=False)
        before.drain()
        before.close()
        with pytest.raises(OtherPlace, match="holds nothing of it"):
            once(tmp_path / "new")
        ingest(log, event("bob", "i1"))
        once(tmp_path / "old")
        assert users_in(tmp_path / "old") == {"ann", "bob"}
        assert not list(read_spans(tmp_path / "old").holes())

    def test_a_damaged_identity_is_named(self, log, once, tmp_path):
        (tmp_path / ".identity").write_text("{")
        with pytest.raises(ConfigError, match=r"\.identity is no identity"):
            once(tmp_path)

    def test_a_second_profile_store_is_refused_while_a_projector_fills_the_first(self, log, store):
        registry = Registry(log)
        assert StoreOwner(log, store, "redis://one").claim(registry, "store-1") is None
        registry.seen("store-1", "process", "projecting")
        refusal = StoreOwner(log, store, "redis://two").claim(registry, "store-2")
        assert isinstance(refusal, OtherStore)
        assert "redis://one" in str(refusal)
        registry.seen("store-1", "", "stopped")
        assert StoreOwner(log, store, "redis://two").claim(registry, "store-2") is None
        assert registry.own("profiles").copy_id == "store-2"

    def test_a_projector_whose_place_was_taken_while_it_stood_still_ends(self, log, store, monkeypatch):
        monkeypatch.setattr("serving.projection.projector._OWNER_S", 0.0)
        registry = Registry(log)
        assert StoreOwner(log, store, "redis://one").claim(registry, store.store_id()) is None
        owner = StoreOwner(log, store, "redis://one")
        owner.require()
        registry.register("profiles", "store-2", "redis://two")
        registry.choose("profiles", "store-2", instead_of=store.store_id())
        projector = Projector(log, store, require_own=owner.require)
        with pytest.raises(OtherStore, match="redis://two"):
            projector.run(threading.Event())


class TestErasures:
    def test_a_receipt_waits_for_every_folder(self, log, store, people, once, opened, tmp_path):
        one, two = tmp_path / "one", tmp_path / "h2" / "warehouse"
        split_between(log, opened, one, two)
        once(one)
        away = keeper(log, store, tmp_path / "h2")
        away.catch_up()
        away.close()
        certificate = people.erase(f"u:{USERS[0]}").certificate_id
        once(one)
        assert USERS[0] not in users_in(one)
        assert USERS[0] in users_in(two)
        assert (receipts(log, certificate)["warehouse"], receipts(log, certificate)["events"]) == (0, 0)
        back = keeper(log, store, tmp_path / "h2")
        back.catch_up()
        back.close()
        assert receipts(log, certificate)["warehouse"] > 0
        assert USERS[0] not in users_in(two)
        assert users_in(two) == set(USERS[1:])
        [noted] = Ledger(tmp_path / "h2" / "erasures.jsonl").erasures()
        assert noted.certificate_id == certificate
        copies = {copy.store: copy.purged_at for copy in Certificates(log).get(certificate).copies}
        assert copies["ledger"] > 0

    def test_a_folder_that_comes_while_the_host_runs_goes_through_what_was_erased_before(
        self, log, store, people, once, opened, tmp_path
    ):
        one, backup, two = tmp_path / "one", tmp_path / "backup", tmp_path / "h2" / "warehouse"
        split_between(log, opened, one, backup)
        once(one)
        host = keeper(log, store, tmp_path / "h2")
        host.catch_up()
        certificate = people.erase(f"u:{USERS[0]}").certificate_id
        once(one)
        host._follow()
        assert receipts(log, certificate)["warehouse"] > 0
        shutil.copytree(backup, two)
        host._register(now=True)
        host._follow()
        host.close()
        assert users_in(two) == set(USERS[1:])
        assert not host._behind

    def test_an_erasure_just_before_a_folder_is_registered_reaches_it(
        self, log, store, people, once, opened, tmp_path, monkeypatch
    ):
        one, two = tmp_path / "one", tmp_path / "h2" / "warehouse"
        split_between(log, opened, one, two)
        once(one)
        host = keeper(log, store, tmp_path / "h2")
        register = host._register

        def late(*, now: bool = False) -> None:
            people.erase(f"u:{USERS[0]}")
            register(now=now)

        monkeypatch.setattr(host, "_register", late)
        host.catch_up()
        host.close()
        assert users_in(two) == set(USERS[1:])

    def test_without_registration_a_receipt_is_false(self, log, people, opened, tmp_path):
        """The control."""
        one, two = tmp_path / "one", tmp_path / "two"
        split_between(log, opened, one, two)
        certificate = people.erase(f"u:{USERS[0]}").certificate_id
        opened(one, registered=False).drain()
        assert receipts(log, certificate)["warehouse"] > 0
        assert USERS[0] in users_in(two)

    def test_a_ledger_that_only_one_host_has_reaches_all(self, log, store, tmp_path):
        erasure = Erasure("0001-" + "a" * 32, b"p" * 16, b"a" * 16, log.now_ms() << 20)
        (tmp_path / "h1").mkdir()
        Ledger(tmp_path / "h1" / "erasures.jsonl").note(erasure)
        for name in ("h1", "h2"):
            host = keeper(log, store, tmp_path / name)
            host.catch_up()
            host.close()
        noted = Ledger(tmp_path / "h2" / "erasures.jsonl").erasures()
        assert {one.certificate_id for one in noted} == {erasure.certificate_id}
        assert Certificates(log).erasures() != []

    def test_a_retired_copy_is_named_and_waited_for_no_more(self, log, store, people, events_server, tmp_path):
        gone = keeper(log, store, tmp_path / "gone")
        gone.catch_up()
        [ledger] = Registry(log).copies("ledger")
        with pytest.raises(ConfigError, match="in use"):
            hosts(events_server.url, [ledger.copy_id])
        gone.close()
        certificate = people.erase("u:ann").certificate_id
        with pytest.raises(NotFound, match="0 copies"):
            hosts(events_server.url, ["no-such"])
        [line] = [one for one in hosts(events_server.url)["copies"] if one["kind"] == "ledger"]
        assert (line["waiting"], line["state"]) == (1, "not running")
        said = hosts(events_server.url, [ledger.copy_id[:10]])
        assert (said["retired"], said["completed"]) == ([ledger.copy_id], 1)
        [copy] = [one for one in Certificates(log).get(certificate).copies if one.store == "ledger"]
        assert (copy.copy_id, copy.retired_at > 0, copy.purged_at) == (ledger.copy_id, True, 0)
        # Of a later erasure the certificate says so from the beginning; and it is in use again when it comes back.
        later = [one for one in people.erase("u:bob").copies if one.store == "ledger"]
        assert [one.retired_at for one in later] == [copy.retired_at]
        back = keeper(log, store, tmp_path / "gone")
        back.catch_up()
        back.close()
        assert [one.retired_at for one in Registry(log).copies("ledger")] == [0]
        assert len(Ledger(tmp_path / "gone" / "erasures.jsonl").erasures()) == 2

    def test_a_cloned_host_is_a_host_of_its_own(self, log, store, tmp_path, monkeypatch):
        monkeypatch.setattr(registries, "BEAT_S", 0.05)
        monkeypatch.setattr("serving.jobs.host_keeper.BEAT_S", 0.05)
        first = keeper(log, store, tmp_path / "one")
        first.catch_up()
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        second = keeper(log, store, tmp_path / "two")

        def apart() -> bool:
            second._join()
            return len({read_identity(tmp_path / name / ".host").copy_id for name in ("one", "two")}) == 2

        wait_until(apart)
        assert len(Registry(log).copies("ledger")) == 2
        for host in (first, second):
            host.close()

    def test_a_damaged_folder_keeps_a_host_from_nothing_but_its_receipt(
        self, log, store, people, once, opened, tmp_path
    ):
        two = tmp_path / "h2" / "warehouse"
        split_between(log, opened, tmp_path / "one", two)
        once(tmp_path / "one")
        certificate = people.erase(f"u:{USERS[0]}").certificate_id
        for file in two.glob("events/*/*.parquet"):
            file.write_bytes(b"PAR1")
        host = keeper(log, store, tmp_path / "h2")
        host.catch_up()
        [copy] = [one for one in Registry(log).copies("warehouse") if one.place == str(two)]
        with pytest.raises(TablesError):
            hold_in(two, copy, Certificates(log).erasures(), Registry(log), host._heartbeat)
        host.close()
        assert Certificates(log).get(certificate)

    def test_a_replay_goes_to_every_place_that_can_be_reached(
        self, log, people, once, opened, events_server, profiles_server, tmp_path
    ):
        one, two = tmp_path / "one", tmp_path / "two"
        ledger = Ledger(tmp_path / "erasures.jsonl")
        split_between(log, opened, one, two)
        once(one)
        for place in (two, tmp_path / "nowhere"):
            copy_id = "b" * 32 if place == two else "c" * 32
            if place == two:
                write_identity(two, FolderIdentity(copy_id, "x.0"))
            Registry(log).register("warehouse", copy_id, str(place))
        shutil.copytree(two, tmp_path / "backup")
        certificate = (
            SubjectRights(log, people._store, Certificates(log), ledger=ledger).erase(f"u:{USERS[0]}").certificate_id
        )
        said = replay_everywhere([ledger.path], profiles_server.url, events_server.url, PARTITIONS)
        results = {place["place"]: (place["result"], place["rows"]) for place in said["places"]}
        assert results[str(two)] == ("erased", 1)
        assert results[str(tmp_path / "nowhere")] == ("not reachable from this host", 0)
        assert USERS[0] not in users_in(two)
        # The same path is not enough: the folder of that id must be there.
        shutil.rmtree(two)
        shutil.copytree(tmp_path / "backup", two)
        os.unlink(two / ".identity")
        said = replay_everywhere([ledger.path], profiles_server.url, events_server.url, PARTITIONS)
        assert {place["result"] for place in said["places"] if place["place"] == str(two)} == {
            "not reachable from this host"
        }
        assert receipts(log, certificate)["warehouse"] == 0

    def test_a_replay_confirms_no_erasure_that_came_meanwhile_and_passes_a_place_that_fails(
        self, log, people, once, opened, events_server, profiles_server, tmp_path, monkeypatch
    ):
        one, two, three = (tmp_path / name for name in ("one", "two", "three"))
        split_between(log, opened, one, two)
        once(one)
        shutil.copytree(two, three)
        for number, place in enumerate((three, two)):
            write_identity(place, FolderIdentity(f"{number}" * 32, "x.0"))
            Registry(log).register("warehouse", f"{number}" * 32, str(place))
        meanwhile = list[str]()

        def slow(folder: Path, *arguments: Any) -> int | None:
            if folder == three:
                raise PermissionError("not yours")
            removed = hold_in(folder, *arguments)
            if folder == two:
                meanwhile.append(people.erase(f"u:{USERS[0]}").certificate_id)
            return removed

        monkeypatch.setattr("serving.jobs.hosts.hold_in", slow)
        said = replay_everywhere([], profiles_server.url, events_server.url, PARTITIONS)
        results = {place["place"]: place["result"] for place in said["places"]}
        assert (results[str(two)], results[str(three)]) == ("erased", "failed: not yours")
        assert USERS[0] in users_in(two)
        [certificate_id] = meanwhile
        [copy] = [copy for copy in Certificates(log).get(certificate_id).copies if copy.place == str(two)]
        assert copy.open

    def test_what_no_erasure_reaches_is_named_with_what_to_do(self, log, store, people, tmp_path):
        output = tmp_path / "mail.parquet"
        output.write_bytes(b"")
        register_made(Registry(log), "batch", output)
        host = keeper(log, store, tmp_path / "state")
        host.catch_up()
        host.close()
        named = {one.kind: one for one in people.erase("u:ann").remainders}
        assert named["batch"].place == str(output)
        assert "Delete it" in named["batch"].advice
        assert "Train from the warehouse after this erasure" in named["bundle"].advice
        output.unlink()
        again = keeper(log, store, tmp_path / "state")
        again.catch_up()
        again.close()
        assert {one.kind for one in people.erase("u:ann").remainders} == {"bundle"}


def test_a_copy_lives_as_long_as_its_process_says_so():
    copy = Copy("id", "ledger", "host", "/x", 0, seen_at=1000, token="t.0", kernel="another", pid=1)
    assert copy.alive(1000 + registries.LEASE_MS - 1)
    assert not copy.alive(1000 + registries.LEASE_MS)
    assert not replace(copy, token="").alive(1000)


class TestSplits:
    def test_a_warehouse_that_lacks_a_part_is_found(self, log, opened, tmp_path):
        one, two = tmp_path / "one", tmp_path / "two"
        split_between(log, opened, one, two)
        ingest(log, *(event(user, "i3") for user in USERS))
        opened(one, registered=False).drain()
        for out in (one, two):
            [check] = [check for check in validate(out)["checks"] if check["name"] == "split"]
            assert not check["passed"]
            assert "went elsewhere" in check["detail"]

    @pytest.mark.parametrize("lacking", ["", "partition", "minutes"])
    @pytest.mark.parametrize("seed", range(5))
    def test_one_that_noted_nothing_is_judged_by_its_silences(self, tmp_path, lacking, seed):
        rng = np.random.default_rng(seed)
        users = np.array([f"p{number}" for number in rng.permutation(200)])[rng.integers(0, 200, 3000)]
        times = np.sort(rng.integers(0, 3_600_000, users.size)) + 1_790_000_000_000
        home = np.array([partition_of(f"u:{user}", PARTITIONS) for user in users])
        minute = (times - times[0]) // 60_000
        gone = {"": 0, "partition": 1, "minutes": (minute > 20) & (minute < 40)}[lacking]
        kept = ~((home == 1) & np.asarray(gone, bool))
        rows = {"user_id": users[kept], "log_id": times[kept].astype(np.uint64) << 20, "item_id": users[kept]}
        rows |= {"event_type": np.full(kept.sum(), "like"), "timestamp": times[kept]}
        table = conform(pa.table(rows), EVENTS, EVENTS_REQUIRED, "events").table
        findings = list(split(Evidence(table, warehouse=tmp_path, partitions=PARTITIONS)))
        assert any(one.fails(0.0) for one in findings) == bool(lacking)

    def test_batches_in_the_order_of_partitions_are_no_silence(self, log, opened, tmp_path):
        names = [f"p{number}" for number in range(150)]
        for item in ("i1", "i2", "i3"):
            ingest(log, *(event(name, item) for name in names))
        whole = opened(tmp_path, registered=False)
        whole.drain()
        [check] = [check for check in validate(tmp_path)["checks"] if check["name"] == "split"]
        assert check["passed"], check

    @given(st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.booleans()), max_size=30))
    def test_spans_have_a_hole_where_and_only_where_another_one_wrote(self, steps):
        """Each step takes some ids, is this warehouse's or another's, and is perhaps delivered twice."""
        spans, at, ours, known = Spans(), 0, [], 0
        for count, own, twice in steps:
            for again in range(1 + twice):
                if own:
                    spans.add("events", 0, known, at + count)
                    ours += [] if again else range(at + 1, at + count + 1)
                known = at + count
            at += count
        if not ours:
            assert list(spans.holes()) == []
            return
        lacking = set(range(1, max(ours) + 1)) - set(ours)
        found = {number for hole in spans.holes() for number in range(hole.after + 1, hole.until + 1)}
        assert found == lacking

    def test_spans_survive_their_file(self, tmp_path):
        spans = Spans()
        spans.add("events", 3, None, 10)
        spans.add("events", 3, 15, 20)
        (tmp_path / "spans.json").write_text(spans.to_json())
        assert list(read_spans(tmp_path).holes()) == [Hole("events", 3, 10, 15)]
        (tmp_path / "spans.json").write_text(json.dumps([1]))
        with pytest.raises(TablesError, match=r"spans\.json cannot be read"):
            read_spans(tmp_path)
