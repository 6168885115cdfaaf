"""What people ask for reaches the Parquet: undone events, withdrawn consent, and the date on a certificate."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
from datetime import UTC, date, datetime, timedelta

import pyarrow.parquet as pq
import pytest

from features.errors import TablesError
from features.profile import EVERY_PURPOSE, Purpose
from features.subjects import partition_of
from features.tables.dataset import open_dataset
from serving.privacy.certificates import Certificates
from serving.privacy.rights import SubjectRights
from serving.projection.histories import LoggedHistories
from serving.stores.catalog_log import CatalogLog
from serving.stores.profiles import ProfileStore
from serving.warehouse.derived import derive
from serving.warehouse.files import WarehouseFiles
from serving.warehouse.items import ItemTable
from serving.warehouse.place import GROUP
from serving.warehouse.writer import WarehouseWriter
from tests.serving.faults import wait_until
from tests.serving.logged import PARTITIONS, event, ingest, logged, slate
from tests.serving.test_warehouse import ROOT, at, rows
from training.data.impressions import _read_training_slates


@pytest.fixture
def people(log, profiles_redis):
    return SubjectRights(log, ProfileStore(profiles_redis, PARTITIONS), Certificates(log))


@pytest.fixture
def warehouse(log, tmp_path):
    files = WarehouseFiles(tmp_path)
    made = WarehouseWriter(log, files, ItemTable(tmp_path / "items.parquet", CatalogLog(log.client)), flush_s=3600)
    made.open()
    yield made
    files.close()


def test_what_was_undone_is_gone(log, people, warehouse, tmp_path):
    ingest(log, event("ann", "i1", event_id="one"), event("ann", "i2", event_id="two"), event("bob", "i1"))
    warehouse.drain()
    people.undo("u:ann", "one")
    warehouse.drain()
    assert sorted(row["event_id"] for row in rows(tmp_path) if row["user_id"] == "ann") == ["two"]
    assert len(rows(tmp_path)) == 2


def test_a_table_whose_last_row_was_undone_is_no_table_rather_than_an_empty_one(log, people, warehouse, tmp_path):
    ingest(log, event("ann", "i1"), event("ann", "", "search", query="tea", event_id="asked"))
    warehouse.drain()
    people.undo("u:ann", "asked")
    warehouse.drain()
    assert not (tmp_path / "searches").exists()
    assert LoggedHistories(tmp_path).of("u:ann").records.size == 1


def test_who_allows_no_training_is_not_in_it(log, people, warehouse, tmp_path):
    ingest(log, event("ann", "i1"), event("bob", "i1"))
    log.append_impressions([slate("ann", "r1", [1]), slate("bob", "r2", [1])])
    warehouse.drain()
    people.set_consent("u:ann", Purpose.PERSONALISE)
    ingest(log, event("ann", "i2"))
    warehouse.drain()
    assert {row["user_id"] for table in ("events", "impressions") for row in rows(tmp_path, table)} == {"bob"}
    people.set_consent("u:ann", EVERY_PURPOSE)
    ingest(log, event("ann", "i3"))
    warehouse.drain()
    assert [row["item_id"] for row in rows(tmp_path) if row["user_id"] == "ann"] == ["i3"]


def test_the_certificate_gets_its_date_when_the_files_are_clean(log, people, warehouse, tmp_path):
    ingest(log, event("ann", "i1"))
    warehouse.drain()
    certificate = people.erase("u:ann")
    [before] = [one for one in certificate.receipts if one.store == GROUP]
    assert before.purged_at == 0
    warehouse.drain()
    [after] = [one for one in Certificates(log).get(certificate.certificate_id).receipts if one.store == GROUP]
    assert after.purged_at > 0
    assert rows(tmp_path) == []


def allowed(out, table: str = "events") -> dict[str, tuple[bool, bool]]:
    return {row["user_id"]: (row.get("allow_train"), row.get("allow_measure")) for row in rows(out, table)}


def trained_on(out) -> tuple[set[str], set[str]]:
    """Whose events and whose slates a training reads."""
    slates = _read_training_slates(out, ("recommend",))
    return set(open_dataset(out).events["user_id"].to_pylist()), set(slates["user_id"].to_pylist())


def measured(out) -> set[str]:
    return {row["user_id"] for row in rows(out, "sessions")}


def test_who_allows_only_measuring_is_measured_and_never_trained_on(log, people, warehouse, tmp_path):
    people.set_consent("u:ann", Purpose.MEASURE)
    people.set_consent("u:bob", Purpose.TRAIN)
    names = ("ann", "bob", "eve")
    ingest(log, *(event(who, "i1") for who in names), *(event(who, "", "search", query="tea") for who in names))
    log.append_impressions([slate(who, f"r-{who}", [1]) for who in names])
    warehouse.drain()
    for table in ("events", "searches", "impressions"):
        assert allowed(tmp_path, table) == {"ann": (False, True), "bob": (True, False), "eve": (True, True)}
    assert trained_on(tmp_path) == ({"bob", "eve"}, {"bob", "eve"})
    assert measured(tmp_path) == {"ann", "eve"}
    [day] = rows(tmp_path, "daily")
    assert (day["item_id"], day["shown"], day["events"], day["people"]) == ("i1", 2, 2, 2)
    assert set(open_dataset(tmp_path, include_withheld=True).events["user_id"].to_pylist()) == set(names)


def test_a_withdrawal_takes_a_purpose_from_the_rows_that_are_there(log, people, warehouse, tmp_path):
    ingest(log, event("ann", "i1"), event("bob", "i1"))
    log.append_impressions([slate("ann", "r1", [1]), slate("bob", "r2", [1])])
    warehouse.drain()
    people.set_consent("u:ann", Purpose.MEASURE)
    warehouse.drain()
    assert allowed(tmp_path) == allowed(tmp_path, "impressions") == {"ann": (False, True), "bob": (True, True)}
    assert (trained_on(tmp_path), measured(tmp_path)) == (({"bob"}, {"bob"}), {"ann", "bob"})
    # A grant concerns what comes after it, and the next withdrawal takes the rest.
    people.set_consent("u:ann", EVERY_PURPOSE)
    warehouse.drain()
    assert allowed(tmp_path)["ann"] == (False, True)
    people.set_consent("u:ann", Purpose.TRAIN)
    ingest(log, event("ann", "i2"))
    warehouse.drain()
    assert [(row["item_id"], row["allow_train"]) for row in rows(tmp_path) if row["user_id"] == "ann"] == [("i2", True)]
    assert measured(tmp_path) == {"bob"}


def test_files_of_before_say_nothing_and_allow_all(log, people, warehouse, tmp_path):
    ingest(log, event("ann", "i1"), event("bob", "i1"))
    warehouse.drain()
    for path in tmp_path.glob("events/*/*.parquet"):
        pq.write_table(pq.ParquetFile(path).read().drop_columns(["allow_train", "allow_measure"]), path)
    warehouse.drain()
    assert set(open_dataset(tmp_path).events["user_id"].to_pylist()) == measured(tmp_path) == {"ann", "bob"}
    people.set_consent("u:ann", Purpose.TRAIN)
    warehouse.drain()
    assert allowed(tmp_path)["ann"] == (True, False)
    assert measured(tmp_path) == {"bob"}


def test_an_erasure_does_not_wait_for_the_next_flush(log, people, warehouse, tmp_path):
    ingest(log, event("ann", "i1"), event("bob", "i1"))
    warehouse.drain()
    ingest(log, event("bob", "i2"))
    warehouse.step()
    assert len(rows(tmp_path)) == 2  # nothing is due for an hour
    people.erase("u:ann")
    warehouse.step()
    assert {row["user_id"] for row in rows(tmp_path)} == {"bob"}


def test_an_erasure_that_meets_a_damaged_file_keeps_nobody_else_waiting(log, people, warehouse, tmp_path):
    others = [f"user{number}" for number in range(20)]
    ingest(log, event("ann", "i1"), *(event(user, "i1") for user in others))
    warehouse.drain()
    [file] = tmp_path.glob(f"events/*/p{partition_of('u:ann', PARTITIONS):02d}-*.parquet")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TablesError, match=f"{file.name}.*from a copy, or remove it"):
        derive(warehouse._files)
    certificate = people.erase("u:ann")
    ingest(log, *(event(user, "i2") for user in others))
    warehouse.close()
    items = ItemTable(tmp_path / "items.parquet", CatalogLog(log.client))
    quick, stop = WarehouseWriter(log, WarehouseFiles(tmp_path), items, flush_s=0.1), threading.Event()
    process = threading.Thread(target=quick.run, args=(stop,))
    process.start()
    elsewhere = {user for user in others if partition_of(f"u:{user}", PARTITIONS) != partition_of("u:ann", PARTITIONS)}
    try:
        written = functools.partial(rows_of_others, tmp_path, file)
        wait_until(lambda: elsewhere <= {row["user_id"] for row in written() if row["item_id"] == "i2"})
        assert any(receipt.store == GROUP and not receipt.purged_at for receipt in confirmed(log, certificate))
        file.write_bytes(whole)
        wait_until(lambda: all(receipt.purged_at for receipt in confirmed(log, certificate) if receipt.store == GROUP))
    finally:
        stop.set()
        process.join()
    found = sorted((row["user_id"], row["item_id"]) for row in rows(tmp_path))
    assert found == sorted((user, item) for user in others for item in ("i1", "i2"))


def rows_of_others(out, damaged):
    files = [file for file in out.glob("events/date=*/*.parquet") if file != damaged]
    return [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]


def confirmed(log, certificate):
    return Certificates(log).get(certificate.certificate_id).receipts


@pytest.mark.parametrize("name", ["dataset.json", "items.parquet"])
def test_what_is_damaged_beside_the_rows_is_named(log, tmp_path, name, warehouse):
    warehouse.drain()
    warehouse._files.close()
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:3])
    again = WarehouseWriter(
        log, WarehouseFiles(tmp_path), ItemTable(tmp_path / "items.parquet", CatalogLog(log.client))
    )

    def goes_on():
        again.open()
        again.drain()

    with pytest.raises(TablesError, match=name):
        goes_on()
    again._files.close()


def test_days_past_retention_go_from_every_table(log, tmp_path, events_redis):
    [one] = logged(event("ann", "i1"))
    keys = log.keys_of("u:ann")
    for day in (0, 1):
        events_redis.xadd(keys.events, {"s": "u:ann", "e": f"e{day}", "r": one.record, "p": one.payload}, id=at(day))
    ingest(log, event("ann", "i2"))
    items = ItemTable(tmp_path / "items.parquet", CatalogLog(log.client))
    age = (datetime.now(UTC).date() - date(2026, 1, 2)) / timedelta(days=1)
    files = WarehouseFiles(tmp_path)
    made = WarehouseWriter(log, files, items, flush_s=3600, days=age)
    made.open()
    made.drain()
    files.close()
    days = {path.name for table in ("events", "sessions", "daily") for path in tmp_path.glob(f"{table}/*")}
    assert days == {"date=2026-01-02", f"date={datetime.now(UTC).date()}"}
    assert [row["item_id"] for row in rows(tmp_path)] == ["i1", "i2"]


def test_the_command_takes_the_default_and_drops_the_group(log, tmp_path, events_server):
    ingest(log, event("ann", "i1"))
    command = [sys.executable, "-m", "penchant", "warehouse", "--redis", events_server.url]
    command += ["--partitions", str(PARTITIONS)]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], capture_output=True, text=True, check=False, cwd=ROOT)

    out = ("--out", str(tmp_path), "--once")
    wrong = run(*out, "--default-purposes", "mesure")
    assert wrong.returncode == 2
    assert "mesure" in wrong.stderr
    done = run(*out, "--default-purposes", "measure", "--retention", "30")
    assert done.returncode == 0, done.stderr
    assert allowed(tmp_path) == {"ann": (False, True)}
    done = run("--forget")
    assert json.loads(done.stdout.splitlines()[-1]) == {"partitions": PARTITIONS, "groups": 2 * PARTITIONS}
