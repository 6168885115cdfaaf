"""A data set answers like profiles that were rebuilt from it, and says whom it does not know."""

from __future__ import annotations

import json
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cli import main as cli
from features.tables.dataset import write_dataset
from features.tables.schema import EVENTS, ITEMS
from serving.config import ServeConfig
from serving.errors import ConfigError
from serving.jobs.batch import recommend
from serving.jobs.from_data import recommend_from_data
from serving.projection.rebuild import rebuild
from tests.world import items, rows_of

DONE = {"data-ann": ["i0", "i4", "i8"], "data-bob": ["i1", "i5"]}
"""Views of two users, oldest first: of westerns, and of space films."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set of what `DONE` says, in the last minute."""
    now = int(time.time() * 1000)
    rows = [
        {"user_id": user, "item_id": item, "event_type": "view_item", "timestamp": now - 60_000 + place * 1000}
        for user, viewed in DONE.items()
        for place, item in enumerate(viewed)
    ]
    out = tmp_path_factory.mktemp("from-data") / "data"
    table = pa.Table.from_pylist(items(), schema=ITEMS)
    write_dataset(out, pa.Table.from_pylist(rows, schema=EVENTS), table, name="done")
    return out


def test_the_answers_are_those_of_profiles_that_were_rebuilt_from_it(
    world, data, log, store, profiles_server, events_server, tmp_path
):
    file, out = tmp_path / "users.txt", tmp_path / "out.parquet"
    users = [*DONE, "data-new"]
    file.write_text("\n".join(users))
    stores = {"redis": profiles_server.url, "events_redis": events_server.url}
    rebuild(data, *stores.values())
    recommend(ServeConfig.load(bundle=world, **stores), file, out, items=9, log=False, fields=["title"])
    result = recommend_from_data(
        ServeConfig.load(bundle=world), str(data), [*users, "data-ann"], items=9, fields=["title"]
    )
    assert len(result["answers"]) == 3
    for row, expected in zip(result["answers"], pq.read_table(out).to_pylist(), strict=True):
        for name in ("user_id", "item_ids", "rung", "profile_version", "bundle_id", "degraded", "items"):
            assert row[name] == expected[name]
        assert row["scores"] == pytest.approx(expected["scores"], abs=1e-4)  # at another moment
    assert [row["rung"] for row in result["answers"]] == ["sequence", "sequence", "popular"]
    assert set(result["answers"][0]["item_ids"][:7]) == rows_of("western") - set(DONE["data-ann"])
    assert result["unknown"] == ["data-new"]


def test_nobody_known_is_refused_with_an_id_that_the_data_has(world, data):
    config = ServeConfig.load(bundle=world)
    with pytest.raises(ConfigError, match=r"has no event of 'x', 'y', .* and 2 more, .* such as 'data-ann'"):
        recommend_from_data(config, data, ["x", "y", "z", "v", "w", "u", "t"])
    with pytest.raises(ConfigError, match="no user is named"):
        recommend_from_data(config, data, [])


def test_the_command_prints_a_line_for_each_user_and_all_as_json(world, data, tmp_path, monkeypatch, capsys):
    file = tmp_path / "users.txt"
    file.write_text("data-bob\n")

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["penchant", "recommend", str(world), *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0)

    given = ["--data", str(data), "--user", "data-ann", "--user", "data-lost", "--users", str(file), "--items", "3"]
    assert run(*given) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    result = json.loads(lines[-1])
    assert [row["user_id"] for row in result["answers"]] == ["data-ann", "data-lost", "data-bob"]
    assert lines[2].startswith("data-bob (sequence): ")
    assert result["answers"][2]["item_ids"][0] in lines[2]
    assert "has no event of 'data-lost': answered like new users" in captured.err
    assert run("--data", str(data), "--user", "data-lost") == 2
    assert "no history to answer from" in capsys.readouterr().err
    # Without a data set the command is the other one, which writes a file.
    assert run("--user", "data-ann") == 2
    assert run("--users", str(file)) == 2
    assert run("--data", str(data), "--users", str(file), "--out", str(tmp_path / "out.parquet")) == 2
