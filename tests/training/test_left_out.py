"""Every command tells what was left out of the data, in words, in its answer and in the run, and refuses too much."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cli import main as cli
from features.errors import TablesError
from features.tables.dataset import open_dataset
from tests.training.conftest import TINY
from training.config import TrainConfig
from training.data.interactions import Interactions, item_vocabulary, read_interactions
from training.data.split import before_cut, cut_of, held_out, split
from training.export.segments import popular_in_segments
from training.models.baselines import recent_popularity_of
from training.train import train

IN_2099 = int(datetime(2099, 12, 31, tzinfo=UTC).timestamp() * 1000)
BAD = 20


def planted(circles: Path, out: Path, bad: int, future: int = 0) -> Path:
    """The circles with some malformed rows at the end, and some events whose clock believes in 2099 at the front."""
    events = pq.read_table(circles / "events.parquet").select(["user_id", "item_id", "event_type", "timestamp"])
    rows = [
        {"user_id": f"u{n}", "item_id": f"i{n}", "event_type": "purchase", "timestamp": IN_2099} for n in range(future)
    ]
    faults = [{"user_id": "u0", "item_id": "i0", "event_type": "purchase", "timestamp": None} for _ in range(bad)]
    schema = pa.schema([events.schema.field(name).with_nullable(True) for name in events.column_names])
    schema = schema.with_metadata(events.schema.metadata)
    parts = [pa.Table.from_pylist(rows, schema), events.cast(schema), pa.Table.from_pylist(faults, schema)]
    out.mkdir()
    pq.write_table(pa.concat_tables(parts), out / "events.parquet")
    pq.write_table(pq.read_table(circles / "items.parquet"), out / "items.parquet")
    return out


def penchant(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The status with which a command line ends the process."""
    monkeypatch.setattr(sys, "argv", ["penchant", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_training_evaluation_and_export_tell_what_was_left_out(
    circles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = planted(circles, tmp_path / "data", BAD, future=1), tmp_path / "run"
    rows = pq.read_metadata(data / "events.parquet").num_rows
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump({**TINY, "epochs": 2, "protocol": "temporal", "test_days": 0.05}))
    command = ("train", data, "--out", run, "--config", settings)
    first = f"{data / 'events.parquet'} row {rows - BAD}: timestamp is missing, should be given in every row"

    assert penchant(monkeypatch, *command) == 2
    said = capsys.readouterr()
    share = f"{100 * BAD / rows:.3g} %"
    assert (
        f"error: events: {BAD} of {rows:,} rows were rejected, {share} where 1 % is allowed, first {first}" in said.err
    )
    assert "allow it with penchant train --set max_rejected_share=0.0" in said.err
    assert said.out == ""
    assert not (run / "config.json").exists()

    answers = []
    for arguments in (
        (*command, "--set", "max_rejected_share=0.05"),
        ("evaluate", run, "--protocol", "temporal-successive"),
        ("export", run, "--out", tmp_path / "bundle"),
    ):
        assert penchant(monkeypatch, *arguments) == 0
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line.startswith("events: ")]
        assert lines[0] == f"events: {BAD} of {rows:,} rows rejected ({share}), first {first}"
        assert lines[1].startswith(f"events: 1 of {rows - BAD:,} are from wrong clocks, after 2020-09-14T05:09:18Z")
        assert "up to 2099-12-31T00:00:00Z" in lines[1]
        assert len(lines) == 2
        answers.append(json.loads(said.out.splitlines()[-1]))
    for answer in [*answers, json.loads((run / "result.json").read_text())]:
        assert (answer["rejected"], answer["unread"], answer["future_events"]) == (BAD, {}, 1)
        assert answer["rejections"][0] == {
            "table": "events",
            "file": str(data / "events.parquet"),
            "row": rows - BAD,
            "reason": "timestamp is missing, should be given in every row",
        }
    assert answers[1]["targets"] > 50
    page = (run / "report.html").read_text()
    assert f"<td>rejected rows</td><td>{BAD}</td>" in page
    assert "<td>events from wrong clocks</td><td>1</td>" in page
    assert "timestamp is missing, should be given in every row" in page


def test_a_clean_data_set_says_nothing_of_the_kind(
    circles: Path, tmp_path: Path, tiny: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(circles, tmp_path / "run", tiny.model_copy(update={"epochs": 1}))
    assert (result["rejected"], result["rejections"], result["unread"], result["future_events"]) == (0, [], {}, 0)
    assert not [line for line in capsys.readouterr().err.splitlines() if line.startswith(("events", "items", "users"))]
    assert "How the data was read" not in (tmp_path / "run" / "report.html").read_text()


def test_a_data_set_of_which_every_row_is_refused_says_so(tmp_path: Path, tiny: TrainConfig) -> None:
    data = tmp_path / "data"
    data.mkdir()
    events = {"user_id": ["a"] * 4, "item_id": ["x"] * 4, "event_type": ["like"] * 4, "timestamp": ["soon"] * 4}
    pq.write_table(pa.table(events), data / "events.parquet")
    with pytest.raises(TablesError, match=r"no row is left, all 4 were rejected, first .* row 0: timestamp is 'soon'"):
        train(data, tmp_path / "run", tiny.model_copy(update={"max_rejected_share": 1.0}))
    assert not (tmp_path / "run").exists()


def test_impressions_are_judged_before_the_encoders_are_trained(
    circles: Path, tmp_path: Path, tiny: TrainConfig
) -> None:
    data = planted(circles, tmp_path / "data", 0)
    slates = {"request_id": ["r"] * 4, "user_id": ["u1"] * 4, "timestamp": [1_600_000_000_000] * 3 + [None]}
    pq.write_table(
        pa.table(slates | {"item_ids": [["i1"]] * 4, "propensities": [[1.0]] * 4}), data / "impressions.parquet"
    )

    def no_step(step: int) -> None:
        raise AssertionError("the training began")

    with pytest.raises(TablesError, match="impressions: 1 of 4 rows were rejected, 25 % where 1 % is allowed"):
        train(data, tmp_path / "run", tiny, no_step)


def read(data: Path, config: TrainConfig) -> tuple[Interactions, Any]:
    dataset = open_dataset(data)
    items, vocabulary = item_vocabulary(dataset)
    return read_interactions(dataset, vocabulary, config), items


@pytest.mark.parametrize("future", [1, 4])
@pytest.mark.parametrize(
    "settings", [{"test_days": 0.05}, {"test_share": 0.1}, {"test_days": 0.05, "ranker_days": 0.02}]
)
def test_wrong_clocks_move_neither_what_is_recent_nor_what_is_tested(
    circles: Path, tmp_path: Path, tiny: TrainConfig, future: int, settings: dict[str, float]
) -> None:
    config = tiny.model_copy(update={"protocol": "temporal", "recent_days": 0.2, "validation_users": 0, **settings})
    clean, _ = read(circles, config)
    mixed, _ = read(planted(circles, tmp_path / "data", 0, future), config)
    assert clean.trusted_until == clean.timestamps.max() == mixed.trusted_until
    # By share, the cut may move by as many ranks as there are more events, which is as nothing.
    assert abs(cut_of(mixed, config) - cut_of(clean, config)) <= (0 if "test_days" in settings else 60_000)
    whole = [np.diff(data.offsets) for data in (clean, mixed)]
    recent = [recent_popularity_of(data, ends, 0.02) for data, ends in zip((clean, mixed), whole, strict=True)]
    assert recent[0].sum() > 20
    assert recent[0].tolist() == recent[1].tolist()
    for protocol in ("temporal-successive", "temporal-last"):
        targets = [held_out(data, config, protocol) for data in (clean, mixed)]  # type: ignore[arg-type]
        times = [
            data.timestamps[data.offsets[own.users] + own.positions]
            for data, own in zip((clean, mixed), targets, strict=True)
        ]
        assert times[1].max() <= mixed.trusted_until
        assert len(targets[1]) == pytest.approx(len(targets[0]), abs=3 * future)
        assert len(targets[0]) > 50
    division = split(mixed, config)
    assert division.fit_end.tolist() == before_cut(mixed, config).tolist()


def test_wrong_clocks_leave_the_tables_of_segments_as_they_are(
    circles: Path, tmp_path: Path, tiny: TrainConfig
) -> None:
    from features.catalog_columns import columns_of

    tables = []
    for data in (circles, planted(circles, tmp_path / "data", 0, 2)):
        events, items = read(data, tiny)
        columns = columns_of(items, np.zeros((items.num_rows, 1), np.float32))
        found = popular_in_segments(events, columns, 0.02)
        tables.append(
            {key: {row for row, score in zip(*table, strict=True) if score > 0.1} for key, table in found.items()}
        )
    assert tables[0] == tables[1]
    assert any(tables[0].values())


def test_control_without_the_end_of_the_data_one_clock_empties_what_is_recent(
    circles: Path, tmp_path: Path, tiny: TrainConfig
) -> None:
    import dataclasses

    mixed, _ = read(planted(circles, tmp_path / "data", 0, 1), tiny)
    fooled = dataclasses.replace(mixed, trusted_until=IN_2099)
    assert recent_popularity_of(fooled, np.diff(fooled.offsets), 0.02).sum() == 1
