"""Many people at once get what the service would answer each."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import TablesError
from penchant.client import event
from penchant.v1 import catalog_pb2
from serving.batch import recommend
from serving.errors import ProfileStoreUnavailable, Unavailable
from tests.world import rows_of


@pytest.fixture
def people(client):
    """Two who touched something, one whom nobody has met."""
    names = ["batch-western", "batch-space", "batch-nobody"]
    client.ingest([event(names[0], "i0", "view_item"), event(names[1], "i1", "view_item")])
    return names


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_the_answers_are_those_of_the_service(client, service, world, people, tmp_path, kind):
    file, out = tmp_path / f"people.{kind}", tmp_path / "out.parquet"
    if kind == "parquet":
        pq.write_table(pa.table({"user_id": people, "other": [1, 2, 3]}), file)
    else:
        lines = [json.dumps({"user_id": name}) if kind == "jsonl" else name for name in [*people, people[0]]]
        file.write_text("\n".join(lines) + "\n\n")
    client.put_items([catalog_pb2.Item(item_id="batched", title="b", categories=["western"])])
    client.set_availability([catalog_pb2.Availability(item_id="i5", available=False)])
    try:
        facts = recommend(world, file, out, service.ready["redis"], service.ready["events_redis"], items=9)
        answers = [client.recommend(user_id=name, page_size=9) for name in people]
    finally:
        client.set_availability([catalog_pb2.Availability(item_id="i5", available=True)])
        client.delete_items(["batched"])
    rows = pq.read_table(out).to_pylist()
    assert [row["user_id"] for row in rows] == people
    for row, slate in zip(rows, answers, strict=True):
        assert row["item_ids"] == [item.item_id for item in slate.items]
        assert row["scores"] == [item.score for item in slate.items]
        assert row["profile_version"] == slate.profile_version
        assert row["bundle_id"] == slate.bundle_id
    assert [row["rung"] for row in rows] == ["sequence", "sequence", "popular"]
    assert "batched" in rows[0]["item_ids"]
    assert set(rows[1]["item_ids"][:8]) == rows_of("space") - {"i1", "i5"}
    assert (facts["users"], facts["items_per_user"], facts["personal"]) == (3, 9, 2)


def test_nothing_is_written_while_profiles_are_away(service, world, tmp_path):
    file, out = tmp_path / "people.txt", tmp_path / "out.parquet"
    file.write_text("ann\n")
    with pytest.raises(ProfileStoreUnavailable):
        recommend(world, file, out, f"unix://{tmp_path}/none.sock", service.ready["events_redis"])
    with pytest.raises(Unavailable):
        recommend(world, file, out, service.ready["redis"], f"unix://{tmp_path}/none.sock")
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content"), [("e.txt", "\n\n"), ("e.jsonl", "nobody\n"), ("e.parquet", "text"), ("e.jsonl", "{}")]
)
def test_a_file_without_people_is_refused_by_name(world, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(TablesError, match=name):
        recommend(world, tmp_path / name, tmp_path / "out.parquet")
