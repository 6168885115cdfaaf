"""The warehouse on a real Redis and a real disk: what the log holds is in Parquet once, whatever dies meanwhile."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features import decayed_counts as memory
from features.bundle import open_bundle
from features.clock import now_ms
from features.controls import ControlKind
from features.errors import TablesError
from features.keys import item_key
from features.profile import Purpose, Retention, empty, fold
from features.records import RECORD
from features.subjects import partition_of, subject_of, user_id_of
from features.tables.dataset import open_dataset, read_table, write_dataset
from features.tables.schema import EVENTS
from serving.errors import ConfigError
from serving.experiments import Assignment
from serving.observability.telemetry import Telemetry
from serving.privacy.certificates import Certificates
from serving.privacy.controls import BlockControl
from serving.privacy.rights import SubjectRights
from serving.projection.eviction import Eviction
from serving.projection.histories import LoggedHistories
from serving.projection.projector import Projector
from serving.projection.rebuild import rebuild
from serving.projection.restore import restore_profiles
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.services.items import item_record
from serving.stores.catalog_log import CatalogLog, Change
from serving.stores.consumer_group import Consumer
from serving.stores.event_log import EventLog
from serving.stores.keys import log_id
from serving.stores.log_erasure import LogErasure
from serving.stores.profile_eviction import Evictions
from serving.stores.profiles import ProfileStore
from serving.stores.restore_requests import RestoreRequests
from serving.warehouse.derived import derive
from serving.warehouse.files import TABLES, WarehouseFiles
from serving.warehouse.items import ItemTable
from serving.warehouse.parquet import put_table
from serving.warehouse.process import run
from serving.warehouse.tables import (
    DAILY_ROWS,
    IMPRESSION_ROWS,
    SESSION_GAP_MS,
    SESSION_ROWS,
)
from serving.warehouse.writer import WarehouseWriter, _Interval
from tests.serving.faults import insist, kill, wait_until
from tests.serving.logged import CATALOG, NOTHING_KEPT, PARTITIONS, catalog, event, ingest, logged, slate
from tests.world import publish_world

ROOT = Path(__file__).parents[2]
DAY_MS = 86_400_000


@pytest.fixture
def make(log, tmp_path):
    """Makes warehouses on the log and one directory, closed at the end; each finds what the last one left."""
    with contextlib.ExitStack() as stack:

        def build(out: Path = tmp_path / "warehouse", **options) -> WarehouseWriter:
            files = WarehouseFiles(out)
            stack.callback(files.close)
            bundle = options.pop("bundle", None)
            items = ItemTable(out / "items.parquet", CatalogLog(log.client), bundle and open_bundle(bundle))
            warehouse = WarehouseWriter(log, files, items, flush_s=3600, **options)
            warehouse.open()
            return warehouse

        yield build


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "warehouse"


def rows(out: Path, table: str = "events") -> list[dict]:
    """All rows of a table, as any reader finds them."""
    files = sorted(out.glob(f"{table}/date=*/*.parquet"))
    return [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]


def contents(out: Path, *tables: str) -> dict[str, bytes]:
    """Every file of some tables, byte by byte."""
    tables = tables or ("events", "searches", "impressions")
    return {str(f.relative_to(out)): f.read_bytes() for name in tables for f in sorted(out.glob(f"{name}/**/*.*"))}


def crash(warehouse: WarehouseWriter) -> None:
    """What a kill leaves: the directory free, the lease run out, nothing acknowledged."""
    warehouse._files.close()
    warehouse._events.consumer.release()


def test_what_was_sent_is_what_stands_there(log, make, out):
    at = now_ms() - 5000
    told = {"session_id": "s1", "request_id": "r1", "surface": "home", "query": "", "position": 3, "value": 2.5}
    ids = ingest(
        log,
        event("ann", "i1", "purchase", event_id="e1", timestamp_ms=at, attributes={"b": "1", "a": "2"}, **told),
        event("ann", "i9", "view_item", event_id="e2", timestamp_ms=at + 1),
        event("ann", "", "search", event_id="e3", query="red shoes", timestamp_ms=at + 2),
    )
    log.append_impressions(
        [slate("ann", "r1", [1, 2], session_id="s1", assignment=Assignment("control", bucket=7), text="red")]
    )
    make().drain()
    first, second = rows(out)
    first["attributes"] = dict(first["attributes"])
    assert first == {
        "user_id": "ann", "item_id": "i1", "event_type": "purchase", "timestamp": at, "event_id": "e1",
        "log_id": ids[0], "ingested_at": ids[0] >> 20, "value": 2.5, "session_id": "s1", "request_id": "r1",
        "surface": "home", "query": None, "position": 3, "attributes": {"b": "1", "a": "2"},
        "category_key": item_key("c1"), "creator_key": item_key("m1"), "personal": True,
        "allow_train": True, "allow_measure": True,
    }  # fmt: skip
    told = ("value", "session_id", "request_id", "surface", "query", "position", "attributes")
    assert [second[name] for name in told] == [None] * 7
    [search] = rows(out, "searches")
    assert (search["query"], search["log_id"], search["event_type"]) == ("red shoes", ids[2], "search")
    assert "item_id" not in search
    [shown] = rows(out, "impressions")
    assert shown["item_ids"] == ["i1", "i2"]
    assert shown["propensities"] == [1.0, 1.0]
    assert [shown[name] for name in ("request_id", "user_id", "surface", "arm", "bucket", "query", "session_id")] == [
        "r1", "ann", "home", "control", 7, "red", "s1",
    ]  # fmt: skip
    assert len(shown["feature_fingerprint"]) == 64
    assert not read_table(out / "events", EVENTS, ("user_id", "item_id", "event_type", "timestamp")).rejected


def test_it_is_a_data_set_that_duckdb_and_polars_read_as_it_is(log, make, out):
    for n in range(60):
        ingest(log, event(f"p{n % 7}", f"i{n % 10}", ("view_item", "like")[n % 2], request_id=f"r{n % 7}"))
    log.append_impressions([slate(f"p{n}", f"r{n}", range(10)) for n in range(7)])
    make().drain()
    data = open_dataset(out)
    assert (data.info["events"], data.info["users"], data.rejected) == (60, 7, [])
    assert data.info["event_types"] == {"like": 30, "view_item": 30}
    joined = duckdb.sql(
        f"SELECT count(*), count(DISTINCT e.date) FROM '{out}/events/**/*.parquet' e "
        f"JOIN '{out}/impressions/**/*.parquet' s USING (request_id, user_id) "
        "WHERE list_contains(s.item_ids, e.item_id)"
    ).fetchall()
    assert joined == [(60, 1)]
    frame = pl.scan_parquet(f"{out}/events/**/*.parquet", hive_partitioning=True)
    counts = frame.group_by("user_id").len().sort("user_id").collect()
    assert counts["len"].to_list() == [9, 9, 9, 9, 8, 8, 8]
    assert frame.select(pl.struct("user_id", "log_id").n_unique()).collect().item() == 60
    days = duckdb.sql(f"SELECT item_id, shown, events, people, event_types FROM '{out}/daily/**/*.parquet'").fetchall()
    assert [(item, shown, events) for item, shown, events, _, _ in days] == [(f"i{n}", 7, 6) for n in range(10)]
    assert days[0][4] == {"view_item": 6}
    assert pl.read_parquet(out / "sessions")["events"].sum() == 60


IDS = st.text(min_size=1, max_size=8) | st.sampled_from(["a:x", "u:x", "x", "a:", "u:", "\0{}*", "😀"])


@given(IDS, IDS, st.booleans(), st.booleans())
def test_no_two_people_share_a_name(one, other, one_anonymous, other_anonymous):
    subjects = [
        ("a:" if anonymous else "u:") + name for name, anonymous in ((one, one_anonymous), (other, other_anonymous))
    ]
    names = [user_id_of(subject) for subject in subjects]
    assert (names[0] == names[1]) == (subjects[0] == subjects[1])
    assert [subject_of(name) for name in names] == subjects


def test_a_repeat_rewrites_the_same_files_with_the_same_bytes(log, make, out, monkeypatch):
    for n in range(50):
        ingest(log, event(f"p{n % 9}", f"i{n % 10}"), event(f"p{n % 9}", "", "search", query="tea"))
    log.append_impressions([slate(f"p{n % 9}", f"r{n}", [n % 10]) for n in range(20)])
    first = make()

    def killed(_, log_ids):
        if log_ids:
            raise OSError("killed here")

    monkeypatch.setattr(first._events.consumer, "acknowledge", killed)
    with pytest.raises(OSError, match="killed here"):
        first.drain()
    written = contents(out)
    assert written  # of the first partition; nothing of it is acknowledged
    crash(first)
    ingest(log, event("p0", "i0", event_id="later"))
    again = make()
    again.drain()
    after = contents(out)
    assert {name: after[name] for name in written} == written
    found = [row["event_id"] for table in ("events", "searches") for row in rows(out, table)]
    assert len(found) == len(set(found)) == 101
    assert len(rows(out, "impressions")) == 20
    assert again.lag() == [0] * PARTITIONS


def test_what_is_pending_is_never_joined_with_what_is_new(log, make, out):
    """Had the last owner written it already, a longer file would hold its rows a second time."""
    old = ingest(log, *(event("ann", f"i{n}") for n in range(5)))
    first = make()
    assert [first.step(), first.step()] == [0, 5]
    crash(first)
    new = ingest(log, *(event("ann", f"i{n}") for n in range(5, 8)))
    make(batch=2).drain()
    spans = [tuple(map(int, file.stem.split("-")[1:])) for file in sorted(out.glob("events/*/*.parquet"))]
    assert spans[0] == (old[0], old[-1])
    assert spans[1][0] == new[0]
    assert [row["log_id"] for row in rows(out)] == old + new


def test_rows_of_another_file_are_not_written_again(log, make, out, events_redis):
    """As after a loss of acknowledgements: the log delivers once more what was written in other pieces."""
    first = make(flush_rows=1)
    first.step()
    for n in range(6):
        ingest(log, event("ann", f"i{n}"))
        first.step()
    crash(first)
    before = contents(out)
    events_redis.xgroup_setid(log.keys[partition_of("u:ann", PARTITIONS)].events, "warehouse", "0")
    make().drain()
    assert contents(out) == before
    assert len(rows(out)) == 6


def test_a_disk_that_takes_nothing_costs_nothing(log, make, out):
    ingest(log, event("ann", "i1"))
    warehouse = make()
    (out / "events").write_text("in the way")
    for _ in range(2):
        with pytest.raises(OSError, match="events"):
            warehouse.drain()
    assert sum(warehouse.lag()) == 1
    (out / "events").unlink()
    warehouse.drain()
    assert len(rows(out)) == 1
    assert sum(warehouse.lag()) == 0


def test_damaged_entries_are_counted_and_passed(log, make, out, events_redis):
    keys = log.keys[partition_of("u:ann", PARTITIONS)]
    [good] = logged(event("ann", "i1"))
    spoiled = bytearray(good.record)
    spoiled[3] ^= 1
    events_redis.xadd(keys.events, {"s": "u:ann", "e": "x", "r": bytes(spoiled), "p": good.payload})
    events_redis.xadd(keys.events, {"s": "u:ann", "e": "y", "r": good.record, "p": b"{no json"})
    events_redis.xadd(keys.events, {"s": "u:ann", "e": "z", "r": good.record, "p": b"[]"})
    events_redis.xadd(keys.impressions, {"s": "u:ann", "p": b'{"half'})
    log.append([good])
    telemetry = Telemetry()
    warehouse = make(telemetry=telemetry)
    warehouse.drain()
    assert [row["event_id"] for row in rows(out)] == [good.event_id]
    assert telemetry.counters()["warehouse_damaged"] == 4
    assert sum(warehouse.lag()) == 0


class TestErasure:
    def test_nothing_of_an_erased_person_is_left_in_any_file(self, log, make, out):
        warehouse = make()
        people = ["canary", "bird"]
        for number in range(3):
            ingest(log, *(event(who, f"i{number}", session_id=f"visit-{who}") for who in people))
            ingest(log, *(event(who, "", "search", query=f"song of {who}") for who in people))
            log.append_impressions([slate(who, f"r-{who}-{number}", [number]) for who in people])
            warehouse.drain()
        before = b"".join(contents(out, "events", "searches", "impressions", "sessions").values())
        assert b"canary" in before
        LogErasure(log).erase("u:canary")
        ingest(log, event("bird", "i9"))
        warehouse.drain()
        files = contents(out, "events", "searches", "impressions", "sessions", "daily")
        assert not [name for name, content in files.items() if b"canary" in content]
        left = {table: rows(out, table) for table in ("events", "searches", "impressions", "sessions")}
        assert {row["user_id"] for table in left.values() for row in table} == {"bird"}
        assert [len(left[table]) for table in ("events", "searches", "impressions")] == [4, 3, 3]
        assert sum(day["events"] for day in rows(out, "daily")) == 4

    def test_what_comes_after_it_stays(self, log, make, out):
        warehouse = make()
        ingest(log, event("ann", "i1"))
        log.append_impressions([slate("ann", "old", [1])])
        warehouse.drain()
        LogErasure(log).erase("u:ann")
        time.sleep(0.005)
        [new] = ingest(log, event("ann", "i2"))
        log.append_impressions([slate("ann", "new", [2])])
        warehouse.drain()
        assert [row["log_id"] for row in rows(out)] == [new]
        assert [row["request_id"] for row in rows(out, "impressions")] == ["new"]

    def test_what_was_read_before_it_is_not_written_after_it(self, log, make, out):
        telemetry = Telemetry()
        warehouse = make(telemetry=telemetry)
        ingest(log, event("ann", "i1"), event("bob", "i1"))
        log.append_impressions([slate("ann", "old", [1]), slate("bob", "his", [1])])
        assert [warehouse.step(), warehouse.step()] == [0, 4]
        LogErasure(log).erase("u:ann")
        warehouse.drain()
        assert [row["user_id"] for row in rows(out)] == ["bob"]
        assert [row["user_id"] for row in rows(out, "impressions")] == ["bob"]

    def test_a_crash_amid_it_leaves_it_to_the_next_owner(self, log, make, out, monkeypatch):
        first = make()
        ingest(log, event("ann", "i1"))
        first.drain()
        LogErasure(log).erase("u:ann")
        monkeypatch.setattr(
            "serving.warehouse.partition_writer.revise", lambda *_: (_ for _ in ()).throw(OSError("killed here"))
        )
        with pytest.raises(OSError, match="killed here"):
            first.drain()
        crash(first)
        monkeypatch.undo()
        make().drain()
        assert rows(out) == []
        assert not list(out.glob("events/*/*.parquet"))


def at(day: int, number: int = 0) -> bytes:
    """A stream id on a day of 2026, as the log would have given it then."""
    return b"%d-%d" % (1_767_225_600_000 + day * DAY_MS + number, number)


def test_days_that_are_over_are_packed_and_the_rows_stay(log, make, out, events_redis):
    [one] = logged(event("ann", "i1"))
    keys = log.keys[partition_of("u:ann", PARTITIONS)]
    warehouse = make(flush_rows=1)
    warehouse.step()
    for number in range(12):
        name = {
            "s": "u:ann",
            "e": f"e{number}",
            "r": one.record,
            "p": json.dumps(json.loads(one.payload) | {"event_id": f"e{number}"}),
        }
        events_redis.xadd(keys.events, name, id=at(number // 4, number))
        warehouse.step()
    log.append_impressions([slate("ann", "now", [1])])
    warehouse.drain()
    before = rows(out)
    days = sorted(path.name for path in out.glob("events/*"))
    assert days == ["date=2026-01-01", "date=2026-01-02", "date=2026-01-03"]
    assert len(list(out.glob("events/*/*.parquet"))) == 12
    until = log_id(at(2))
    assert warehouse._files.pack(until) == 2
    assert [len(list((out / "events" / day).glob("*.parquet"))) for day in days] == [1, 1, 4]
    assert rows(out) == before
    assert [row["log_id"] for row in before] == [log_id(at(number // 4, number)) for number in range(12)]
    [packed] = (out / "events" / days[0]).glob("*.parquet")
    assert packed.stem == f"p{partition_of('u:ann', PARTITIONS):02d}-{log_id(at(0)):020d}-{log_id(at(0, 3)):020d}"
    assert warehouse._files.pack(until) == 0
    assert derive(warehouse._files) == 2
    assert [row["events"] for row in rows(out, "sessions")] == [4, 4, 4]


def test_a_table_whose_days_have_all_expired_is_a_table_no_more(log, make, out, events_redis):
    [search] = logged(event("ann", "", "search", query="tea"))
    keys = log.keys[partition_of("u:ann", PARTITIONS)]
    entry = {"s": "u:ann", "e": "old", "r": search.record, "p": search.payload}
    warehouse = make(days=30)
    warehouse.step()
    events_redis.xadd(keys.events, entry, id=at(0))
    warehouse.step(flush=True)
    assert len(rows(out, "searches")) == 1
    ingest(log, event("ann", "i1"))
    warehouse.drain()
    assert not (out / "searches").exists()
    assert LoggedHistories(out).of("u:ann").records.size == 1


def test_a_day_that_could_not_be_put_back_is_put_back_by_the_next_try(tmp_path, monkeypatch):
    files, schema = WarehouseFiles(tmp_path), TABLES["events"]
    files.open()
    day = tmp_path / "events" / "date=2026-01-01"
    for name in ("p00-1-2", "p00-3-4"):
        put_table(day / f"{name}.parquet", schema.empty_table())
    rename = Path.rename

    def refusing(path: Path, target: Path) -> Path:
        if path.name.endswith(".new"):
            raise OSError("the disk is gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(OSError, match="gone"):
        files.pack(1 << 63)
    monkeypatch.undo()
    assert not day.exists()
    files.open()
    files.repair()
    assert sorted(path.name for path in day.iterdir()) == ["p00-1-2.parquet", "p00-3-4.parquet"]
    files.close()


@pytest.mark.parametrize("renamed", [False, True])
def test_a_crash_amid_packing_is_mended(tmp_path, renamed):
    day = tmp_path / "events" / "date=2026-01-01"
    for folder, names in {day: ["a"], day.with_name(f".{day.name}.new"): ["packed"]}.items():
        folder.mkdir(parents=True)
        for name in names:
            (folder / f"{name}.parquet").write_text(name)
    (day / ".half.parquet.tmp").write_text("half")
    day.rename(day.with_name(f".{day.name}.old"))
    if renamed:
        day.with_name(f".{day.name}.new").rename(day)
    files = WarehouseFiles(tmp_path)
    files.open()
    files.close()
    assert [path.name for path in (tmp_path / "events").iterdir()] == [day.name]
    assert [path.name for path in day.iterdir()] == ["packed.parquet" if renamed else "a.parquet"]


def test_rows_go_to_the_day_of_their_arrival(log, make, out, events_redis):
    [one] = logged(event("ann", "i1"))
    keys = log.keys[partition_of("u:ann", PARTITIONS)]
    for number in range(6):
        fields = {"s": "u:ann", "e": "e", "r": one.record, "p": one.payload}
        events_redis.xadd(keys.events, fields, id=at(number // 2, number))
    make().drain()
    found = {path.parent.name: pq.ParquetFile(path).metadata.num_rows for path in out.glob("events/*/*.parquet")}
    assert found == {f"date=2026-01-0{day}": 2 for day in (1, 2, 3)}


def test_readers_go_as_far_as_everything_is_there(log, make, out):
    warehouse = make()
    ingest(log, *(event(f"p{n}", "i1") for n in range(20)))
    warehouse.drain()
    moment = open_dataset(out)
    assert moment.info["events"] == 20
    time.sleep(0.005)
    ingest(log, *(event(f"p{n}", "i2") for n in range(30)))
    # Some partitions are ahead: their new rows are not for readers yet.
    for partition in range(2):
        warehouse._events.read(1000, [0] * PARTITIONS)
        warehouse._partition_writer.write(partition)
    assert len(rows(out)) > 20
    assert open_dataset(out).info["fingerprint"] == moment.info["fingerprint"]
    assert not crash(warehouse)
    make().drain()
    later = open_dataset(out)
    assert later.info["events"] == 50
    assert later.info["until"] > moment.info["until"]
    assert open_dataset(out, until=moment.info["until"]).info["fingerprint"] == moment.info["fingerprint"]


def test_a_warehouse_is_not_replaced_by_a_data_set(log, make, out):
    ingest(log, event("ann", "i1"))
    make().drain()
    data = open_dataset(out)
    with pytest.raises(TablesError, match="warehouse"):
        write_dataset(out, data.events, data.items, name="other")
    assert len(rows(out)) == 1


def test_the_directory_has_one_writer(log, make, out, monkeypatch):
    make()
    monkeypatch.setattr("serving.files._LOCK_S", 0.05)
    with pytest.raises(ConfigError, match="in use"):
        make()


def put(item_id: str, **fields) -> Change:
    from penchant.v1 import catalog_pb2

    record = item_record(catalog_pb2.Item(item_id=item_id, **fields))
    return Change("put", item_id, json.dumps({"item_id": item_id, **record, "put_at": 1}).encode())


def test_the_items_are_those_of_the_bundle_and_of_every_change_since(log, make, out, tmp_path):
    changes = CatalogLog(log.client)
    changes.put([put("new", title="A new one", categories=["x", "y"], price=0.0, attributes={"k": "v"})])
    changes.put([put("i1", title="Renamed", available=False)])
    warehouse = make(bundle=publish_world(tmp_path / "bundle"))
    warehouse.drain()
    items = {row["item_id"]: row for row in pq.read_table(out / "items.parquet").to_pylist()}
    assert len(items) == 41
    assert items["i0"]["title"] == "western story number0"
    told = [items["new"][name] for name in ("title", "categories", "price", "attributes", "available_from")]
    assert told == ["A new one", ["x", "y"], 0.0, [("k", "v")], None]
    assert (items["i1"]["title"], items["i1"]["available"], items["i1"]["categories"]) == ("Renamed", False, None)
    assert json.loads((out / "dataset.json").read_text())["catalog_version"] == 2
    same = (out / "items.parquet").read_bytes()
    warehouse.drain()
    assert (out / "items.parquet").read_bytes() == same

    window = {"available": True, "available_from": 5, "available_until": 9}
    fields = {"title": "Patched", "price": None, "attributes": {"k": "w"}, "available_until": 9}
    changes.put([Change("patch", name, json.dumps(fields).encode()) for name in ("i4", "?")])
    changes.put(
        [Change("availability", "i2", json.dumps(window).encode()), Change("delete", "i3"), Change("delete", "?")]
    )
    warehouse.drain()
    crash(warehouse)
    for _ in range(2):
        items = {row["item_id"]: row for row in pq.read_table(out / "items.parquet").to_pylist()}
        assert len(items) == 41
        assert [items["i2"][name] for name in window] == [True, 5, 9]
        assert items["i3"]["available"] is False
        assert items["i3"]["title"]
        patched = [items["i4"][name] for name in (*fields, "categories")]
        assert patched == ["Patched", None, [("k", "w")], 9, ["western"]]
        # Without a bundle, the items that the file has stay.
        last = make()
        last.drain()
        crash(last)
    assert list(items) == sorted(items)


def test_sessions_and_daily_figures_by_hand(log, make, out):
    start = now_ms() - 4 * SESSION_GAP_MS
    pause = SESSION_GAP_MS + 1
    ingest(
        log,
        event("ann", "i1", timestamp_ms=start),
        event("ann", "i2", "like", timestamp_ms=start + SESSION_GAP_MS),
        event("ann", "i1", timestamp_ms=start + SESSION_GAP_MS + pause),
        event("ann", "", "search", query="tea", timestamp_ms=start + SESSION_GAP_MS + pause + 1),
        event("bob", "i1", session_id="v", timestamp_ms=start),
        event("bob", "i1", session_id="v", timestamp_ms=start + 2 * pause),
        event("bob", "i3", session_id="w", timestamp_ms=start + 1),
    )
    log.append_impressions([slate("ann", "r1", [1, 2]), slate("bob", "r2", [1])])
    warehouse = make()
    warehouse.drain()
    # By partition, as no more than one is held at once; within it by user and start.
    found = sorted(rows(out, "sessions"), key=lambda row: (row["user_id"], row["started_at"]))
    assert [
        (row["user_id"], row["session_id"], row["started_at"] - start, row["ended_at"] - start) for row in found
    ] == [
        ("ann", None, 0, SESSION_GAP_MS),
        ("ann", None, SESSION_GAP_MS + pause, SESSION_GAP_MS + pause + 1),
        ("bob", "v", 0, 2 * pause),
        ("bob", "w", 1, 1),
    ]
    assert [(row["events"], row["items"], dict(row["event_types"])) for row in found] == [
        (2, 2, {"like": 1, "view_item": 1}),
        (2, 1, {"search": 1, "view_item": 1}),
        (2, 1, {"view_item": 2}),
        (1, 1, {"view_item": 1}),
    ]
    assert [(row["item_id"], row["shown"], row["events"], row["people"]) for row in rows(out, "daily")] == [
        ("i1", 2, 4, 2), ("i2", 1, 1, 1), ("i3", 0, 1, 1),
    ]  # fmt: skip
    schemas = {"sessions": SESSION_ROWS, "daily": DAILY_ROWS, "impressions": IMPRESSION_ROWS}
    for name, schema in schemas.items():
        [file] = out.glob(f"{name}/*/*.parquet") if name != "impressions" else list(out.glob("impressions/*/*"))[:1]
        assert pq.ParquetFile(file).schema_arrow.names == schema.names
    before = contents(out, "sessions", "daily")
    assert derive(warehouse._files) == 0
    for file in out.glob("sessions/*/*.parquet"):
        file.unlink()
    assert derive(warehouse._files) == 1
    assert contents(out, "sessions", "daily") == before


def test_deriving_takes_a_small_share_of_the_time():
    interval = _Interval(every_s=60.0)
    now = time.monotonic()
    interval.rest(now - 1.0, share=0.05)
    assert interval.last <= now  # 20 s: the pause of a minute is longer
    interval.rest(now - 30.0, share=0.05)
    assert interval.last + interval.every_s == pytest.approx(now - 30.0 + 600.0, abs=1.0 / 0.05)


def test_profiles_made_of_it_are_those_that_live_folding_made(
    log, make, out, profiles_redis, profiles_server, events_server
):
    """Bit by bit: searches, anonymous people and items that changed since are all in it."""
    rng = random.Random(3)
    store = ProfileStore(profiles_redis, PARTITIONS)
    other = catalog([{"item_id": f"i{n}", "categories": ["moved"], "creator_id": None} for n in range(10)])
    told = {}
    for number in range(700):
        who, anonymous = rng.choice(["ann", "x", "a:x", "u:x"]), rng.random() < 0.3
        kind = rng.choice(["view_item", "like", "search"])
        item = "" if kind == "search" else f"i{rng.randrange(12)}"
        value = {"value": rng.random()} if rng.random() < 0.5 else {}
        late = now_ms() - rng.randrange(10_000)
        one = event(who, item, kind, anonymous=anonymous, query="q", event_id=f"e{number}", timestamp_ms=late, **value)
        [entry] = logged(one, of=rng.choice([CATALOG, other]))
        [done] = log.append([entry])
        told.setdefault(entry.subject, []).append((done.log_id, entry.record))
    make().drain()
    answer = rebuild(out, profiles_server.url, events_server.url, partitions=PARTITIONS)
    assert (answer["profiles"], answer["events"], answer["rejected"]) == (len(told), 700, 0)
    for subject, entries in told.items():
        records = np.frombuffer(b"".join(record for _, record in entries), RECORD)
        expected = fold(empty(), records, entries[-1][0])
        found = store.read(subject)
        assert found.records.tobytes() == expected.records.tobytes()
        assert (found.version, found.count) == (expected.version, expected.count)
        assert found.older_items.tolist() == expected.older_items.tolist()
        assert memory.encode(found.decayed_counts) == memory.encode(expected.decayed_counts)


def test_a_row_that_differs_by_one_key_is_another_profile(
    log, make, out, profiles_server, events_server, profiles_redis
):
    """The control of the test above: a warehouse without the keys as logged would be told from one with them."""
    [entry] = logged(event("ann", "i1"), of=catalog([{"item_id": "i1", "categories": ["moved"]}]))
    log.append([entry])
    make().drain()
    [file] = out.glob("events/*/*.parquet")
    table = pq.ParquetFile(file).read()
    pq.write_table(table.drop_columns(["category_key"]), file)
    rebuild(out, profiles_server.url, events_server.url, partitions=PARTITIONS)
    assert ProfileStore(profiles_redis, PARTITIONS).read("u:ann").records.tobytes() != entry.record[:40]


class TestRebuilding:
    """What the log holds and the warehouse does not yet counts as well."""

    @pytest.fixture
    def again(self, out, profiles_server, events_server):
        return partial(rebuild, out, profiles_server.url, events_server.url, partitions=PARTITIONS)

    def test_lost_profiles_are_those_of_the_warehouse_and_the_log(self, log, make, out, again, profiles_redis):
        store = ProfileStore(profiles_redis, PARTITIONS)
        ingest(log, *(event(user, f"i{n}", event_id=f"{n}") for n in range(5) for user in ("ann", "bob")))
        make().drain()
        ingest(log, *(event("ann", f"i{n % 10}", event_id=f"late-{n}") for n in range(4200)))  # more than a tail takes
        [damaged] = logged(event("bob", "i1"))
        log.append([replace(damaged, record=bytes([damaged.record[0] ^ 1]) + damaged.record[1:])])
        SubjectRights(log, store, Certificates(log)).set_consent("u:cleo", Purpose.TRAIN)
        ingest(log, event("cleo", "i1"))
        projecting(log, store, None)
        before = {user: store.read(f"u:{user}") for user in ("ann", "bob")}
        profiles_redis.flushall()
        for applied in (4200, 0):
            assert again()["applied"] == applied
        for user, profile in before.items():
            found = store.read(f"u:{user}")
            assert (found.version, found.count) == (profile.version, profile.count)
            assert found.records.tobytes() == profile.records.tobytes()
            assert memory.encode(found.decayed_counts) == memory.encode(profile.decayed_counts)
        assert store.read("u:cleo").count == 0

    def test_what_was_undone_does_not_come_back(self, log, make, out, again, profiles_redis):
        store = ProfileStore(profiles_redis, PARTITIONS)
        ingest(log, *(event("ann", f"i{n}", event_id=f"e{n}") for n in range(5)))
        projecting(log, store, None)
        make().drain()
        SubjectRights(log, store, Certificates(log)).undo("u:ann", "e2")
        again()
        assert store.read("u:ann").records["item"].tolist() == [item_key(f"i{n}") for n in (0, 1, 3, 4)]

    def test_a_damaged_profile_gets_its_rules_and_its_newest_events_again(self, log, make, out, again, profiles_redis):
        store, rule = ProfileStore(profiles_redis, PARTITIONS), BlockControl(ControlKind.ITEM, "i9")
        people = SubjectRights(log, store, Certificates(log))
        people.set_controls("u:ann", [rule])
        ingest(log, *(event("ann", f"i{n}") for n in range(3)))
        make().drain()
        ingest(log, event("ann", "i4"), event("cleo", "i4"))
        projecting(log, store, None)
        for user in ("ann", "cleo"):  # she is in no file yet
            store.compact(f"u:{user}", store.read(f"u:{user}").version)
        whole = store.read("u:ann")
        for key in map(store.key_of, ("u:ann", "u:cleo")):
            profiles_redis.setrange(key, 100, bytes([profiles_redis.get(key)[100] ^ 1]))
        again()
        found = store.read("u:ann")
        assert (found.count, found.records.tobytes()) == (4, whole.records.tobytes())
        assert found.controls.tobytes() == whole.controls.tobytes()


class TestComingBack:
    def test_a_state_that_was_dropped_is_made_anew_when_the_person_returns(self, log, make, out, profiles_redis):
        store = ProfileStore(profiles_redis, PARTITIONS)
        people = SubjectRights(log, store, Certificates(log))
        who = ["ann", "bob", "cleo", "dan"]
        ingest(log, *(event(user, f"i{n % 10}", timestamp_ms=now_ms() - 400 + n) for n in range(300) for user in who))
        ingest(log, event("ann", "", "search", query="tea"))
        people.set_controls("u:ann", [BlockControl(ControlKind.ITEM, "i3")])
        projecting(log, store, None)
        assert people.undo("u:dan", entry_of(log, "u:dan", 7))
        sink = make()
        sink.drain()
        before = {user: store.read(f"u:{user}") for user in who}
        for user in who:
            store.compact(f"u:{user}", before[user].version)
        assert Evictions(store).evict(now_ms() + 1000) == 4
        people.erase("u:bob")
        people.set_consent("u:cleo", Purpose.TRAIN)
        sink.drain()
        assert store.read("u:ann").count == 0
        assert store.read("u:ann").controls.size == 1
        time.sleep(0.01)
        ingest(log, *(event(user, "i1", "like") for user in who))
        telemetry = Telemetry()
        projecting(log, store, Eviction(1, partial(restore_profiles, out, Retention({}))), telemetry)
        assert telemetry.counters()["projector_profiles.restored"] == 2  # of the others nothing may come back
        assert [store.read(f"u:{user}").count for user in who] == [302, 1, 0, 300]
        for user in ("ann", "dan"):
            found, old = store.read(f"u:{user}"), before[user]
            like = logged(event(user, "i1", "like"))[0].record
            again = fold(old, np.frombuffer(like, RECORD), found.version)
            assert found.records[:-1].tobytes() == again.records[:-1].tobytes()
            assert found.older_items.tolist() == again.older_items.tolist()
            assert found.controls.tobytes() == old.controls.tobytes()
            assert found.decayed_counts.keys.tolist() == again.decayed_counts.keys.tolist()
            np.testing.assert_allclose(found.decayed_counts.counts, again.decayed_counts.counts, rtol=0.02)

    def test_who_only_asks_is_called_back_too(self, log, make, out, profiles_redis):
        store = ProfileStore(profiles_redis, PARTITIONS)
        who = ["ann", "bob", "cleo", "dan"]
        ingest(log, *(event(user, f"i{n}") for n in range(9) for user in who))
        projecting(log, store, None)
        make().drain()
        before = {user: store.read(f"u:{user}") for user in who}
        for user in who:
            store.compact(f"u:{user}", before[user].version)
        assert Evictions(store).evict(now_ms() + 1000) == 4
        assert all(store.read(f"u:{user}").emptied for user in who)
        RestoreRequests(log).add(dict.fromkeys(["u:ann", "u:bob", "u:cleo", "u:nobody"], now_ms() + 1000))
        SubjectRights(log, store, Certificates(log)).erase("u:bob")
        assert sorted(RestoreRequests(log).take()) == ["u:ann", "u:cleo", "u:nobody"]  # an erased name waits nowhere
        RestoreRequests(log).add(dict.fromkeys(["u:ann", "u:bob", "u:cleo", "u:nobody"], now_ms() + 1000))
        projecting(log, store, Eviction(1, partial(restore_profiles, out, Retention({}))))
        assert [store.read(f"u:{user}").count for user in who] == [9, 0, 9, 0]
        assert store.read("u:ann").records.tobytes() == before["ann"].records.tobytes()
        assert store.read("u:nobody").version == 0

    @pytest.mark.parametrize("damaged", ["events/*/*.parquet", "dataset.json"])
    def test_a_damaged_warehouse_keeps_nobody_else_waiting(self, log, make, out, profiles_redis, damaged):
        store = ProfileStore(profiles_redis, PARTITIONS)
        ingest(log, *(event("ann", f"i{n}") for n in range(5)))
        projecting(log, store, None)
        make().drain()
        assert Evictions(store).evict(now_ms() + 1000) == 1
        [file] = out.glob(damaged)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        ingest(log, event("ann", "i1", "like"), event("bob", "i1"))
        projecting(log, store, Eviction(1, partial(restore_profiles, out, Retention({}))))
        assert [store.read(user).count for user in ("u:ann", "u:bob")] == [1, 1]
        file.write_bytes(whole)
        ingest(log, event("ann", "i2", "like"))
        projecting(log, store, Eviction(1, partial(restore_profiles, out, Retention({}))))
        assert store.read("u:ann").count == 7

    def test_a_damaged_file_keeps_the_past_from_nobody_of_other_partitions(self, log, make, out, profiles_redis):
        store, who = ProfileStore(profiles_redis, PARTITIONS), [f"user{n}" for n in range(12)]
        ingest(log, *(event(user, f"i{n}") for n in range(5) for user in who))
        projecting(log, store, None)
        make().drain()
        assert Evictions(store).evict(now_ms() + 1000) == len(who)
        damaged = partition_of("u:user0", PARTITIONS)
        [file] = out.glob(f"events/*/p{damaged:02d}-*.parquet")
        file.write_bytes(file.read_bytes()[:-9])
        ingest(log, *(event(user, "i1", "like") for user in who))
        telemetry = Telemetry()
        projecting(log, store, Eviction(1, partial(restore_profiles, out, Retention({}))), telemetry)
        restored = [store.read(f"u:{user}").count == 6 for user in who]
        assert restored == [partition_of(f"u:{user}", PARTITIONS) != damaged for user in who]
        assert any(restored)

    def test_a_warehouse_that_is_not_there_loses_nothing(self, log, profiles_redis, tmp_path):
        store = ProfileStore(profiles_redis, PARTITIONS)
        ingest(log, *(event("ann", f"i{n}") for n in range(5)))
        projecting(log, store, None)
        store.compact("u:ann", store.read("u:ann").version)
        assert Evictions(store).evict(now_ms() + 1000) == 1
        ingest(log, *(event("ann", f"i{n}") for n in range(9)))
        projecting(log, store, Eviction(1, partial(restore_profiles, tmp_path / "nothing", Retention({}))))
        assert Evictions(store).evicted(["u:ann"])
        assert store.read("u:ann").count == 9  # what is new is there, and is not folded without the past

    def test_who_did_little_is_dropped_and_comes_back_as_well(self, log, make, out, profiles_redis):
        """Their events were never folded into a state; those of most people are not."""
        store, telemetry = ProfileStore(profiles_redis, PARTITIONS), Telemetry()
        people = SubjectRights(log, store, Certificates(log))
        people.set_consent("u:cleo", Purpose.PERSONALISE)  # whom no warehouse may keep
        ingest(log, *(event(user, f"i{n}") for n in range(5) for user in ("ann", "bob", "cleo")))
        projecting(log, store, None)
        make().drain()
        before = store.read("u:ann")
        time.sleep(1.1)  # the server tells its time in seconds
        projector = Projector(
            log,
            store,
            settle_s=0,
            eviction=Eviction(1e-9, partial(restore_profiles, out, Retention({}))),
            telemetry=telemetry,
        )
        projector.open()
        projector._evictor.sweep()
        assert telemetry.counters()["projector_profiles.evicted"] == 2
        assert [store.read(f"u:{user}").count for user in ("ann", "bob", "cleo")] == [0, 0, 5]
        RestoreRequests(log).add({"u:ann": now_ms()})
        projector.step()
        projector.close()
        assert store.read("u:ann").records.tobytes() == before.records.tobytes()
        assert memory.encode(store.read("u:ann").decayed_counts) == memory.encode(before.decayed_counts)

    def test_one_whose_past_cannot_be_had_keeps_nobody_waiting(self, log, make, out, profiles_redis, tmp_path):
        store = ProfileStore(profiles_redis, PARTITIONS, tail_cap=50)
        ingest(log, event("ann", "i1"))
        projecting(log, store, None)
        assert Evictions(store).evict(now_ms() + 1000) == 1
        ingest(log, *(event("ann", f"i{n % 10}", event_id=f"e{n}") for n in range(120)), event("bob", "i1"))
        projector = Projector(
            log,
            store,
            settle_s=0,
            batch=20,
            eviction=Eviction(1, partial(restore_profiles, tmp_path / "nothing", Retention({}))),
        )
        projector.open()
        wait_until(lambda: projector.step() == 0 and sum(projector.lag()) == 0)
        projector.close()
        assert store.read("u:bob").count == 1
        assert Evictions(store).evicted(["u:ann"])
        make().drain()
        RestoreRequests(log).add({"u:ann": now_ms()})
        projecting(log, store, Eviction(1, partial(restore_profiles, out, Retention({}))))
        assert store.read("u:ann").count == 121


def entry_of(log, subject, place) -> str:
    return [entry.event_id for entries in log.history(subject) for entry in entries][place]


def projecting(log, store, eviction, telemetry=None) -> None:
    """A projector brings all that is pending and new, and ends."""
    projector = Projector(log, store, settle_s=0, lease_ms=1, compact_after=4, eviction=eviction, telemetry=telemetry)
    projector.open()
    idle = 0
    while idle < 3:
        idle = 0 if projector.step() else idle + 1
    projector.close()


class TestTrimming:
    def test_each_stream_waits_for_the_slowest_of_its_own_groups(self, events_redis, tmp_path):
        log = EventLog(events_redis, 1, times=NOTHING_KEPT)
        readers = [Consumer(log, name, "a", stream=s) for name, s in (("x", "events"), ("y", "impressions"))]
        for reader in readers:
            reader.open()
        for number in range(6):
            time.sleep(0.002)
            ingest(log, event("ann", f"i{number}"))
            time.sleep(0.002)  # an entry of the same millisecond as the oldest one needed is kept too
            log.append_impressions([slate("ann", f"r{number}", [number])])
        time.sleep(1.1)  # the server tells its time in seconds
        for reader, count in zip(readers, (6, 4), strict=True):
            [entries] = reader.claim([None], count=count)
            reader.acknowledge(0, [entry.log_id for entry in entries])
        log.trim(0)
        assert [json.loads(entry.payload)["request_id"] for entry in log.read_impressions(0)] == ["r3", "r4", "r5"]
        assert log.read(0) == []
        [entries] = readers[1].claim([None])
        readers[1].acknowledge(0, [entry.log_id for entry in entries])
        log.trim(0)
        assert log.read(0) == log.read_impressions(0) == []

    def test_a_stream_to_which_nothing_comes_holds_nothing_back(self, events_redis):
        log = EventLog(events_redis, 1, times=NOTHING_KEPT)
        readers = [Consumer(log, "x", "a", stream=stream) for stream in ("events", "impressions")]
        for reader in readers:
            reader.open()
        ingest(log, event("ann", "i1"))
        time.sleep(1.1)
        assert log.trim(0) == 0
        [entries] = readers[0].claim([None])
        readers[0].acknowledge(0, [entries[0].log_id])
        assert log.trim(0) == 1


def test_the_command_writes_what_is_there_and_ends(log, out, events_server, tmp_path):
    ingest(log, *(event(f"p{n}", "i1") for n in range(9)))
    log.append_impressions([slate("p1", "r", [1])])
    command = [sys.executable, "-c", "from cli.main import main; main()", "warehouse", "--redis", events_server.url]
    command += ["--out", str(out), "--partitions", str(PARTITIONS), "--bundle", str(publish_world(tmp_path / "b"))]
    done = subprocess.run([*command, "--once"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said | {"out": ""} == {
        "out": "", "partitions": PARTITIONS, "lag": 0, "events": 9, "impressions": 1, "erased": 0, "damaged": 0,
    }  # fmt: skip
    assert open_dataset(out).info["events"] == 9
    assert open_dataset(out).info["items"] == 40
    with subprocess.Popen([*command, "--flush", "0.1"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert json.loads(process.stdout.readline())["lag"] == 0
        ingest(log, event("p1", "i2"))
        wait_until(lambda: len(rows(out)) == 10)
        ingest(log, event("p1", "i3"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert json.loads(process.stdout.read().splitlines()[-1])["lag"] == 0
    assert len(rows(out)) == 11


def test_kills_of_sink_and_redis_lose_and_double_nothing(tmp_path):
    """While events and slates come in, the process that writes Parquet and the log it reads are killed at random."""
    rng = random.Random(11)
    out = tmp_path / "warehouse"
    program = (
        "import sys; from pathlib import Path; from serving.warehouse.process import run; "
        "run(sys.argv[1], Path(sys.argv[2]), partitions=4, flush_s=0.05)"
    )
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RedisServer(tmp_path, "events"))
        client = stack.enter_context(connect(server.url, 0.5))
        log = EventLog(client, PARTITIONS, cooldown_s=0.05)
        sink: list[subprocess.Popen] = []

        def start() -> None:
            sink[:] = [subprocess.Popen([sys.executable, "-c", program, server.url, str(out)], cwd=ROOT)]

        def end() -> None:
            sink[0].kill()
            sink[0].wait()

        start()
        stack.callback(end)
        ledger: dict[str, int] = {}
        kills = 0
        for batch in range(400):
            events = [event(f"p{n}", f"i{n}", event_id=f"e{batch}-{n}") for n in range(8)]
            entries = logged(*events)
            for entry, done in zip(entries, insist(lambda entries=entries: log.append(entries)), strict=True):
                ledger[entry.event_id] = done.log_id
            if batch % 40 == 20:
                kills += 1
                if rng.random() < 0.7:
                    end()
                    start()
                else:
                    kill(server)
            time.sleep(rng.random() * 0.05)
        end()
        assert kills == 10
        said = insist(lambda: run(server.url, out, partitions=PARTITIONS, once=True))
        assert said["lag"] == 0
    found = [(row["event_id"], row["log_id"]) for row in rows(out)]
    assert len(found) == len(set(found)) == 3200
    assert dict(found) == ledger


def test_it_waits_for_a_log_that_is_away(tmp_path):
    out = tmp_path / "warehouse"
    with RedisServer(tmp_path, "events") as server, connect(server.url, 0.5) as client:
        log = EventLog(client, 1, cooldown_s=0.05)
        items = ItemTable(out / "items.parquet", CatalogLog(client, cooldown_s=0.05))
        warehouse = WarehouseWriter(log, WarehouseFiles(out), items, flush_s=0.05, derive_s=0.05)
        stop = threading.Event()
        thread = threading.Thread(target=warehouse.run, args=(stop,))
        thread.start()
        try:
            insist(lambda: ingest(log, event("ann", "i1", event_id="one")))
            wait_until(lambda: len(rows(out)) == 1)
            kill(server)
            insist(lambda: ingest(log, event("ann", "i2", event_id="two")))
            wait_until(lambda: len(rows(out)) == 2)
        finally:
            stop.set()
            thread.join()
    assert sorted(row["event_id"] for row in rows(out)) == ["one", "two"]
