"""Tests of tables of users and items without any time: they are read as sets, and every command says so."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import TablesError, TrainingError
from features.tables.dataset import open_dataset
from features.tables.intake import tell
from features.tables.validate import validate
from serving.projection.histories import read_history
from tests.training.conftest import TINY
from training.config import TrainConfig, load_config
from training.data.interactions import item_vocabulary, read_interactions
from training.data.split import held_out
from training.evaluation.evaluate import evaluate
from training.train import train

UNKNOWN = "events: neither timestamp nor sequence, so their order is unknown and drawn at random"


def pairs(users: int = 60) -> list[tuple[str, str]]:
    """Each user has six of the eight items of one of three shelves, sorted by item."""
    rng = np.random.default_rng(1)
    return [(f"u{user}", f"i{item}") for user in range(users) for item in sorted(user % 3 * 8 + rng.permutation(8)[:6])]


def write(folder: Path, rows: list[tuple[str, str]], name: str = "events.parquet", **more: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    table = {"user_id": [user for user, _ in rows], "item_id": [item for _, item in rows], **more}
    pq.write_table(pa.table(table), file)
    return folder


def test_a_table_of_pairs_is_read_and_told(tmp_path: Path) -> None:
    data = write(tmp_path / "data", pairs(), when=["monday"] * 360)
    dataset = open_dataset(data)
    assert dataset.info["events"] == 360
    assert dataset.info["ordered_only"]
    assert not dataset.stream.has_order
    stream = io.StringIO()
    tell(dataset.intake, stream=stream)
    lines = stream.getvalue().splitlines()
    # A column of an unusual name that says when would be lost without these two lines.
    assert "events: no use for columns when" in lines
    assert f"{UNKNOWN}; if a column says when or in which order, call it so" in lines
    timed = open_dataset(write(tmp_path / "timed", pairs(), sequence=list(range(360))))
    stream = io.StringIO()
    tell(timed.intake, stream=stream)
    assert UNKNOWN not in stream.getvalue()


def test_the_order_is_that_of_the_pairs_and_not_of_the_rows(tmp_path: Path) -> None:
    rows = pairs()
    shuffled = [rows[at] for at in np.random.default_rng(2).permutation(len(rows))]
    config = TrainConfig(ordered=False, protocol="leave-one-out")
    tested = []
    for name, some in (("a", rows), ("b", shuffled)):
        dataset = open_dataset(write(tmp_path / name, some))
        _, vocabulary = item_vocabulary(dataset)
        data = read_interactions(dataset, vocabulary, config)
        targets = held_out(data, config, "leave-one-out")
        items = targets.rows(data)
        tested.append(
            {
                data.users[int(user)]: vocabulary.names[int(row)].as_py()
                for user, row in zip(targets.users, items, strict=True)
            }
        )
        again = read_interactions(dataset, vocabulary, config)
        assert again.rows.tolist() == data.rows.tolist()
    last = dict(rows)
    # Not the last row of a user, which is the item that sorts last: one in six by chance.
    assert sum(tested[0][user] == item for user, item in last.items()) < 30
    assert sum(tested[1][user] == item for user, item in last.items()) < 30


def test_one_file_with_times_makes_them_required_of_all(tmp_path: Path) -> None:
    data = write(tmp_path / "data", pairs()[:180], "events/0.parquet")
    assert open_dataset(data).info["events"] == 180
    write(data, pairs()[180:], "events/1.parquet", sequence=list(range(180)))
    with pytest.raises(TablesError, match=r"0\.parquet: no column timestamp or sequence"):
        open_dataset(data)


def test_a_training_in_order_is_refused_with_what_to_do(tmp_path: Path) -> None:
    data = write(tmp_path / "data", pairs())
    with pytest.raises(TrainingError, match=r"neither timestamp nor sequence.*set ordered=false"):
        train(data, tmp_path / "run", TrainConfig(**TINY))
    with pytest.raises(TrainingError, match=r"neither timestamp nor sequence.*set ordered=false"):
        train(data, tmp_path / "automatic", load_config(None, {**TINY, "ordered": True}), automatic=True)
    with pytest.raises(TrainingError, match="a temporal split needs timestamps"):
        train(data, tmp_path / "temporal", TrainConfig(**{**TINY, "ordered": False, "protocol": "temporal"}))
    with pytest.raises(TablesError, match="no profile can be made of them"):
        read_history(data)


def test_a_training_without_a_configuration_takes_a_set_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data", pairs())
    settings = {**TINY, "epochs": 3, "protocol": "leave-one-out"}
    result = train(data, tmp_path / "run", load_config(None, settings), automatic=True)
    told = capsys.readouterr().err
    assert UNKNOWN in told
    assert "found: no time and no sequence, so the order of events is unknown and those held out are drawn" in told
    assert "ordered false" in told
    assert result["ordered_only"]
    evaluation = evaluate(tmp_path / "run")
    assert evaluation["targets"] == 60
    assert "transition_rings" in evaluation["baselines_left_out"]
    assert evaluation["baselines"]["item_knn"]["hit@10"] > evaluation["baselines"]["popular"]["hit@10"]


def test_validate_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = validate(write(tmp_path / "data", pairs()))
    assert UNKNOWN in capsys.readouterr().err
    assert verdict["passed"]
    assert {"order", "clock_skew"} <= set(verdict["skipped"])
    doubled = validate(write(tmp_path / "twice", pairs() * 2))
    assert not doubled["passed"]
