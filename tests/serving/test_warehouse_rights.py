"""What people ask for reaches the Parquet: undone events, withdrawn consent, and the date on a certificate."""

from __future__ import annotations

import pytest

from features.profile import EVERY_PURPOSE, Purpose
from serving.catalog_log import CatalogLog
from serving.erasure import Certificates
from serving.events import EventLog
from serving.people import People
from serving.profiles import ProfileStore
from serving.rebuild import Histories
from serving.warehouse import GROUP, Warehouse
from serving.warehouse_files import WarehouseFiles
from serving.warehouse_items import ItemTable
from tests.serving.logged import event, ingest, slate
from tests.serving.test_warehouse import PARTITIONS, rows


@pytest.fixture
def log(events_redis):
    log = EventLog(events_redis, PARTITIONS)
    log.open()
    return log


@pytest.fixture
def people(log, profiles_redis):
    return People(log, ProfileStore(profiles_redis, PARTITIONS), Certificates(log))


@pytest.fixture
def warehouse(log, tmp_path):
    files = WarehouseFiles(tmp_path)
    made = Warehouse(log, files, ItemTable(tmp_path / "items.parquet", CatalogLog(log.client)), flush_s=3600)
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
    assert Histories(tmp_path).of("u:ann").records.size == 1


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
