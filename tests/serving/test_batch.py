"""Many users at once get what the service would answer each, and what they got is in the log."""

from __future__ import annotations

import fcntl
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import TablesError
from penchant.client import event
from penchant.v1 import catalog_pb2
from serving.config import ServeConfig
from serving.errors import ConfigError, EventLogUnavailable, ProfileStoreUnavailable, Unavailable
from serving.jobs.batch import recommend
from serving.jobs.batch_log import SlateFile, deliver, finish
from serving.redis.client import connect
from serving.stores.event_log import EventLog
from tests.proofs import batch as proof
from tests.serving.logged import slate
from tests.world import rows_of


@pytest.fixture
def users(client):
    """Two users with events, and a new one."""
    names = ["batch-western", "batch-space", "batch-nobody"]
    client.ingest([event(names[0], "i0", "view_item"), event(names[1], "i1", "view_item")])
    return names


@pytest.fixture
def config(service, world):
    """The settings of the service that runs."""
    return of(world, service.ready["redis"], service.ready["events_redis"])


def of(world, redis, events_redis, **settings):
    return ServeConfig.load(bundle=world, redis=redis, events_redis=events_redis, **settings)


def slates_of(url, names):
    """The slates that a log holds of each user, in its order."""
    with connect(url, 2.0) as client:
        log = EventLog(client)
        return {
            name: [
                json.loads(entry.payload) for entries in log.history(f"u:{name}", impressions=True) for entry in entries
            ]
            for name in names
        }


FIELDS = ("title", "price", "categories", "available", "attributes", "attributes.image")


def test_a_field_that_no_item_has_is_refused_before_anything_is_done(config, tmp_path):
    with pytest.raises(ConfigError, match=r"'prize' is no field of an item: .* did you mean 'price'"):
        recommend(config, tmp_path / "none", tmp_path / "out.parquet", fields=["title", "prize"])


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_the_answers_are_those_of_the_service_and_are_logged(client, config, users, tmp_path, kind):
    file, out = tmp_path / f"people.{kind}", tmp_path / "out.parquet"
    if kind == "parquet":
        pq.write_table(pa.table({"user_id": users, "other": [1, 2, 3]}), file)
    else:
        lines = [json.dumps({"user_id": name}) if kind == "jsonl" else name for name in [*users, users[0]]]
        file.write_text("\n".join(lines) + "\n\n")
    attributes = {"image": "b.png", "colour": "red"}
    client.put_items([catalog_pb2.Item(item_id="batched", title="b", categories=["western"], attributes=attributes)])
    client.set_availability([catalog_pb2.Availability(item_id="i5", available=False)])
    try:
        facts = recommend(config, file, out, items=9, channel=f"email-{kind}", surface="weekly", fields=FIELDS)
        answers = [client.recommend(user_id=name, page_size=9, surface="weekly", fields=FIELDS) for name in users]
    finally:
        client.set_availability([catalog_pb2.Availability(item_id="i5", available=True)])
        client.delete_items(["batched"])
    rows = pq.read_table(out).to_pylist()
    assert [row["user_id"] for row in rows] == users
    for row, answer in zip(rows, answers, strict=True):
        assert row["item_ids"] == [item.item_id for item in answer.items]
        for told, item in zip(row["items"], answer.items, strict=True):
            assert list(told) == list(FIELDS)
            assert (told["title"], told["categories"]) == (item.item.title, list(item.item.categories))
            assert (told["price"] or 0, told["available"]) == (item.item.price, True)
            assert dict(told["attributes"]) == dict(item.item.attributes)
            assert told["attributes.image"] == item.item.attributes.get("image")
        assert row["scores"] == [item.score for item in answer.items]
        assert (row["profile_version"], row["bundle_id"]) == (answer.profile_version, answer.bundle_id)
        assert (row["arm"], row["degraded"]) == (answer.experiment.arm, [])
    assert [row["rung"] for row in rows] == ["sequence", "sequence", "popular"]
    assert "batched" in rows[0]["item_ids"]
    assert set(rows[1]["item_ids"][:8]) == rows_of("space") - {"i1", "i5"}
    counts = ("users", "items_per_user", "personal", "held_out", "logged", "not_logged", "finished")
    assert [facts[name] for name in counts] == [3, 9, 2, 0, 3, 0, 0]
    logged = slates_of(config.events_redis, users)
    for row in rows:
        [own] = [one for one in logged[row["user_id"]] if one.get("channel") == f"email-{kind}"]
        assert {name: own[name] for name in ("item_ids", "request_id", "arm", "rung", "bundle_id")} == {
            name: row[name] for name in ("item_ids", "request_id", "arm", "rung", "bundle_id")
        }
        assert (own["method"], own["surface"], own["page_size"]) == ("recommend", "weekly", 9)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out.parquet"]
    assert out.stat().st_mode & 0o777 == 0o600


def test_nothing_is_written_while_profiles_are_away(config, world, tmp_path):
    file, out = tmp_path / "people.txt", tmp_path / "out.parquet"
    file.write_text("nobody-reached\n")
    nowhere = f"unix://{tmp_path}/none.sock"
    with pytest.raises(ProfileStoreUnavailable):
        recommend(of(world, nowhere, config.events_redis), file, out)
    with pytest.raises(Unavailable):
        recommend(of(world, config.redis, nowhere), file, out)
    assert not out.exists()
    assert not list(tmp_path.glob("*.slates*"))
    assert slates_of(config.events_redis, ["nobody-reached"]) == {"nobody-reached": []}


def test_the_settings_must_fit_the_log(config, world, tmp_path, profiles_server):
    file, out = tmp_path / "people.txt", tmp_path / "out.parquet"
    file.write_text("ann\n")
    with pytest.raises(ConfigError, match="in 16 partitions and 4 were asked for"):
        recommend(of(world, config.redis, config.events_redis, partitions=4), file, out)
    with connect(profiles_server.url, 2.0) as client:
        client.flushall()
    with pytest.raises(ConfigError, match="no event log"):
        recommend(of(world, config.redis, profiles_server.url), file, out)
    with pytest.raises(ConfigError, match="channel"):
        recommend(config, file, out, channel="c" * 65)
    assert not out.exists()


def test_without_logging_nothing_is_logged(config, tmp_path):
    file = tmp_path / "people.txt"
    file.write_text("batch-quiet\n")
    assert recommend(config, file, tmp_path / "out.parquet", log=False)["logged"] == 0
    assert slates_of(config.events_redis, ["batch-quiet"]) == {"batch-quiet": []}


def test_what_was_delivered_is_logged_once_whatever_happens_in_between(config, tmp_path, monkeypatch):
    """A log that fails before, in the middle and after; then the next run into the same output."""
    names = [f"batch-crash-{n}" for n in range(300)]
    file, out = tmp_path / "people.txt", tmp_path / "out.parquet"
    file.write_text("\n".join(names))
    append, left = EventLog.append_impressions, [0]

    def lossy(log, slates):
        left[0] -= 1
        if left[0] == 0:
            raise EventLogUnavailable("the request was lost")
        written = append(log, slates)
        if left[0] < 0:
            raise EventLogUnavailable("the reply was lost")
        return written

    monkeypatch.setattr("serving.jobs.batch_log._PAUSE_S", 0.0)
    monkeypatch.setattr("serving.jobs.batch_log._ATTEMPTS", 3)
    monkeypatch.setattr(EventLog, "append_impressions", lossy)
    left[0] = 1  # everything is lost: the first request, then the replies
    with pytest.raises(EventLogUnavailable, match="in its place, and not all of its slates are logged"):
        recommend(config, file, out, items=1)
    first = pq.read_table(out).to_pylist()
    assert len(first) == 300
    out.unlink()  # sent, and moved elsewhere
    left[0] = 1_000_000
    facts = recommend(config, file, out, items=1)
    assert (facts["finished"], facts["logged"]) == (300, 300)
    wanted = {row["user_id"]: [row["request_id"]] for row in first}
    for row in pq.read_table(out).to_pylist():
        wanted[row["user_id"]].append(row["request_id"])
    logged = slates_of(config.events_redis, names)
    assert {name: [one["request_id"] for one in own] for name, own in logged.items()} == wanted


def test_slates_of_a_file_that_never_came_are_not_logged(config, tmp_path):
    out = tmp_path / "[out].parquet"
    other = tmp_path / "out.parquet.x.slates"
    lost, taken = tmp_path / f"{out.name}.1.slates", tmp_path / f"{out.name}.2.slates"
    for path in (lost, other):
        path.write_bytes(slate("batch-lost", "r1", [1]).payload + b"\n")
    with connect(config.events_redis, 2.0) as client:
        log = EventLog(client)
        assert finish(out, log) == 0
        assert not lost.exists()
        assert other.exists()
        shutil.copy(other, taken)
        with taken.open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with pytest.raises(ConfigError, match="another process"):
                finish(out, log)
        assert slates_of(config.events_redis, ["batch-lost"]) == {"batch-lost": []}
        assert deliver(taken, log) == (1, 0)
    assert [one["request_id"] for one in slates_of(config.events_redis, ["batch-lost"])["batch-lost"]] == ["r1"]


def test_of_two_that_begin_in_the_same_moment_one_writes(tmp_path):
    out = tmp_path / "out.parquet"
    with SlateFile(out, "1") as first:
        with pytest.raises(ConfigError, match="another process"):
            SlateFile(out, "2")
        assert list(tmp_path.iterdir()) == [first.path]
    assert not list(tmp_path.iterdir())


def test_batch_and_service_answer_the_same(world, tmp_path, profiles_server, events_server):
    """The proof in small: held-out users, blocks, dials, consent, unknown users, an identity that was merged."""
    for server in (profiles_server, events_server):
        with connect(server.url, 2.0) as client:
            client.flushall()
    facts = proof.compare(world, profiles_server.url, events_server.url, tmp_path, users=60)
    assert facts["differences"] == []
    assert facts["held_out"] > 5
    assert facts["control"] > 0
    assert facts["merged_arms"] > 3


@pytest.mark.parametrize(
    ("name", "content"), [("e.txt", "\n\n"), ("e.jsonl", "nobody\n"), ("e.parquet", "text"), ("e.jsonl", "{}")]
)
def test_a_file_without_people_is_refused_by_name(world, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(TablesError, match=name):
        recommend(ServeConfig.load(bundle=world), tmp_path / name, tmp_path / "out.parquet")
