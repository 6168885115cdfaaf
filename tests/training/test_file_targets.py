from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from cli import main as cli
from features.errors import LeakError, TablesError, TrainingError
from tests.training.conftest import TINY
from training.config import TrainConfig
from training.data.interactions import Interactions, read_interactions
from training.data.split import Targets, held_out, split
from training.evaluation.evaluate import evaluate
from training.evaluation.file_targets import FileTargets, read_targets
from training.run import LoadedRun, load_run
from training.train import train


@pytest.fixture(scope="module")
def run(circles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tested") / "run"
    train(circles, out, TrainConfig(**{**TINY, "epochs": 10, "protocol": "leave-one-out"}))
    return out


@pytest.fixture(scope="module")
def known(run: Path) -> tuple[LoadedRun, Interactions]:
    loaded = load_run(run)
    return loaded, read_interactions(loaded.dataset, loaded.vocabulary, loaded.config)


def rows_of(targets: Targets, known: tuple[LoadedRun, Interactions]) -> dict[str, list[Any]]:
    loaded, data = known
    return {
        "user_id": [data.users[user] for user in targets.users.tolist()],
        "item_id": loaded.vocabulary.ids(targets.rows(data)),
        "timestamp": [targets.time(data, at) for at in range(len(targets))],
    }


def read(
    file: Path, known: tuple[LoadedRun, Interactions], rows: dict[str, list[Any]]
) -> tuple[FileTargets, dict[str, int | str]]:
    loaded, data = known
    pq.write_table(pa.table(rows), file)
    return read_targets(file, loaded, data, split(data, loaded.config))


@pytest.fixture(scope="module")
def by_protocol(run: Path) -> dict[str, Any]:
    return evaluate(run)


@pytest.mark.parametrize("timed", [True, False])
def test_the_held_out_events_as_a_file_give_the_figures_of_the_protocol(
    run: Path, known: tuple[LoadedRun, Interactions], by_protocol: dict[str, Any], tmp_path: Path, timed: bool
) -> None:
    rows = rows_of(held_out(known[1], known[0].config, "leave-one-out"), known)
    if not timed:
        del rows["timestamp"]
    # Text under other names, as in a file written by hand.
    names = {"user_id": "User ID", "item_id": "itemId", "timestamp": "datetime"}
    file = tmp_path / "test.csv"
    pacsv.write_csv(pa.table({names[name]: column for name, column in rows.items()}), file)
    by_file = evaluate(run, test=file)
    for name in ("users", "targets", "metrics", "baselines", "paired", "with_cold", "segments", "coverage@10"):
        assert by_file[name] == by_protocol[name], name
    assert by_file["protocol"] == "test-file"
    assert by_file["test"] == {
        "file": str(file), "rows": 160, "rejected": 0,
        "unknown_users": 0, "unknown_items": 0, "without_history": 0, "had_before": 0,
    }  # fmt: skip
    assert "test-file" in (run / "report.html").read_text()


def test_each_row_stands_after_the_training_events_that_are_not_later(
    known: tuple[LoadedRun, Interactions], tmp_path: Path
) -> None:
    data = known[1]
    ends = split(data, known[0].config).fit_end
    times = data.timestamps[data.offsets[3] : data.offsets[4]].tolist()
    rows: dict[str, list[Any]] = {
        "user_id": [data.users[3]] * 4,
        "item_id": ["i39"] * 4,
        "timestamp": [times[1], times[2] - 1, times[-1] + 5, None],
    }
    targets, _ = read(tmp_path / "test.parquet", known, rows)
    # After the second event, between the second and third, and twice after all but the event held out.
    assert targets.positions.tolist() == [2, 2, ends[3], ends[3]]
    assert ends[3] == len(times) - 1
    # The moment of a row without a time is that of the newest event before it.
    moments = [times[1], times[2] - 1, times[-1] + 5, times[-2]]
    assert [targets.time(data, at) for at in range(4)] == moments
    assert targets.take(np.array([3, 1])).time(data, 1) == times[2] - 1


def test_rows_that_cannot_be_ranked_are_counted_and_told(
    known: tuple[LoadedRun, Interactions], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = known[1]
    user, first = data.users[0], int(data.timestamps[0])
    had = known[0].vocabulary.ids(data.rows[:1])[0]
    rows: dict[str, list[Any]] = {
        "user_id": ["nobody", user, user, user, user, "nobody"] + [user] * 200,
        "item_id": ["i39", "nothing", "i39", had, "", "nothing"] + ["i39"] * 200,
        "timestamp": [None, None, first - 1, None, None, None] + [None] * 200,
    }
    targets, counts = read(tmp_path / "test.parquet", known, rows)
    assert len(targets) == 200
    del counts["file"]
    assert counts == {
        "rows": 205, "rejected": 1, "unknown_users": 2, "unknown_items": 1, "without_history": 1, "had_before": 1,
    }  # fmt: skip
    told = capsys.readouterr().err
    for words in ("1 of 206 rows rejected", "2 of 205 rows name users", "1 of 205 rows name items", "rows are earlier"):
        assert words in told


def test_an_event_of_the_training_is_refused(known: tuple[LoadedRun, Interactions], tmp_path: Path) -> None:
    division = split(known[1], known[0].config)
    rows = rows_of(division.validation.take(np.arange(3)), known)
    with pytest.raises(LeakError, match="3 rows are events that the run was trained or validated on"):
        read(tmp_path / "test.parquet", known, rows)
    # Control: a moment later it is another event, which the run may not recommend again.
    rows["timestamp"] = [time + 1 for time in rows["timestamp"]]
    with pytest.raises(TrainingError, match="none of its 3 rows can be ranked"):
        read(tmp_path / "test.parquet", known, rows)


def test_files_that_are_no_test_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("first,second\nu1,i1\n")
    with pytest.raises(TablesError, match=r"a\.csv: no column user_id"):
        evaluate(run, test=tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text('user_id,item_id\nu1,i1,"\n')
    with pytest.raises(TablesError, match=r"b\.csv cannot be read"):
        evaluate(run, test=tmp_path / "b.csv")
    with pytest.raises(TablesError, match=r"c\.parquet"):
        evaluate(run, test=tmp_path / "c.parquet")
    with pytest.raises(TrainingError, match="leave out search"):
        evaluate(run, "search", test=tmp_path / "a.csv")


def test_the_command_takes_a_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.tsv").write_text("user_id\titem_id\nu0\ti39\nu4\ti39\nnew\ti39\nu1\ti9\nu2\ti8\n")
    monkeypatch.setattr(sys, "argv", ["penchant", "evaluate", str(run), "--test", str(tmp_path / "a.tsv")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    assert not end.value.code, captured.err
    assert "test-file of run" in captured.err
    assert "1 of 5 rows name users without an event" in captured.err
    assert '"protocol": "test-file"' in captured.out
