"""Tests of the search for settings: where it starts, how it ends, that kills change nothing, and what it refuses."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import training.tuning.trials as trials_module
from features.errors import SettingsError, TrainingError
from features.tables.dataset import write_dataset
from features.tables.schema import EVENTS, ITEMS
from tests.proofs.tuning import differences
from tests.training.conftest import TINY
from training.config import TrainConfig, load_config
from training.run import RunError, read_config
from training.train import train
from training.tuning.journal import TrialRecord, best_of, curve_of, read_log, read_records, trial_folder
from training.tuning.search import FIRST_TRIALS, propose, study_of
from training.tuning.space import as_document, default_space, read_space
from training.tuning.tune import tune

USERS, ITEM_COUNT = 120, 40
PINS = {name: value for name, value in TINY.items() if name not in ("dropout", "learning_rate", "batch_tokens")}
PINS |= {"checkpoint_seconds": 0.5, "epochs": 3, "content": False, "protocol": "leave-one-out"}
# Rates from hopeless to good, so that some trials are pruned and the best is not the start.
SPACE = {
    "learning_rate": {"low": "1e-6", "high": "3e-2", "log": True},
    "dropout": {"low": 0, "high": 0.5},
    "batch_tokens": [64, 256],
}
TRIALS = 5


def walks(replaced: int | None = None) -> pa.Table:
    """Users who mostly go on to the next item, each item once; one event of each, from the end, may be another."""
    rng = np.random.default_rng(7)
    events = []
    for user in range(USERS):
        item, history = int(rng.integers(ITEM_COUNT)), []
        for _ in range(int(rng.integers(6, 10))):
            item = (item + 1) % ITEM_COUNT if rng.random() < 0.7 else int(rng.integers(ITEM_COUNT))
            if item not in history:
                history.append(item)
        if replaced is not None:
            others = np.setdiff1d(np.arange(ITEM_COUNT), history)
            history[-replaced] = int(others[user % others.size])
        events += [(f"u{user}", f"i{item}", 1_600_000_000_000 + user + 1000 * at) for at, item in enumerate(history)]
    names = ("user_id", "item_id", "timestamp")
    table = pa.table({name: [event[at] for event in events] for at, name in enumerate(names)})
    columns = {"event_type": pa.array(["purchase"] * len(events)), "value": pa.nulls(len(events))}
    return table.append_column("event_type", columns["event_type"])


def write_walks(out: Path, replaced: int | None = None) -> Path:
    items = pa.table({"item_id": [f"i{row}" for row in range(ITEM_COUNT)]})
    write_dataset(out, _complete(walks(replaced), EVENTS), _complete(items, ITEMS), name="walks")
    return out


def _complete(table: pa.Table, schema: pa.Schema) -> pa.Table:
    names = table.column_names
    columns = [table[f.name].cast(f.type) if f.name in names else pa.nulls(len(table), f.type) for f in schema]
    return pa.table(columns, schema=schema)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_walks(tmp_path_factory.mktemp("walks") / "data")


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "run"
    tune(data, out, trials=TRIALS, space=SPACE, **PINS)
    return out


def without_times(records: list[TrialRecord]) -> list[TrialRecord]:
    return [replace(record, seconds=0.0, tail_seconds=0.0) for record in records]


def test_the_first_trial_is_the_automatic_choice(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    result = train(data, tmp_path / "run", TrainConfig(**PINS), automatic=True, report=False)
    automatic = read_config(tmp_path / "run").model_dump()
    first = read_records(undisturbed)[0]
    assert first.settings == {name: automatic[name] for name in SPACE}
    # A trial leaves out what comes after relevance, and has the very value of the whole training.
    assert first.value == result["linear"]["with"]
    assert first.encoder == result["best_validation"]["ndcg@10"]


def test_the_winner_validates_best_and_its_file_trains_it(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    records = read_records(undisturbed)
    assert {record.state for record in records} == {"complete", "pruned"}
    result = json.loads((undisturbed / "tuning.json").read_text())
    values = [record.value for record in records if record.value is not None]
    assert result["best"]["value"] == max(values)
    assert result["gain"] == max(values) - values[0] > 0
    assert result["trials"] == {"complete": len(values), "pruned": TRIALS - len(values), "failed": 0}
    config = load_config(undisturbed / "config.yaml", device="cpu").model_copy(update={"threads": 1})
    assert train(data, tmp_path / "run", config, report=False)["linear"]["with"] == max(values)
    assert not list(undisturbed.glob("trial-*"))


def has_reached(out: Path, ended: int, validated: int) -> bool:
    """Returns True once so many trials have ended, and the next has been validated so often, or has ended too."""
    count = len(read_records(out))
    return count > ended or (count == ended and len(read_log(trial_folder(out, ended))) >= validated)


def test_a_killed_search_ends_as_if_it_had_not_been(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    command = [sys.executable, "-m", "penchant", "tune", str(data), "--out", str(tmp_path / "run")]
    command += ["--space", str(tmp_path / "space.yaml"), "--trials", str(TRIALS)]
    command += [
        part for name, value in PINS.items() for part in ("--set", f"{name}={json.dumps(value).strip(chr(34))}")
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        rng = np.random.default_rng()
        ended, validated = int(rng.integers(1, TRIALS - 1)), int(rng.integers(3))
        while process.poll() is None and not has_reached(tmp_path / "run", ended, validated):
            time.sleep(0.002)
        time.sleep(float(rng.random()) * 0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert 1 <= len(read_records(tmp_path / "run")) < TRIALS
    result = tune(data, tmp_path / "run", trials=TRIALS, space=SPACE, **PINS)
    expected = read_records(undisturbed)
    assert result["best"]["trial"] == best_of(expected).number
    assert differences(tmp_path / "run", undisturbed) == []


class Stopped(Exception):
    pass


def test_a_search_goes_on_from_every_point_of_a_trial(
    data: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search() -> dict[str, Any]:
        return tune(data, tmp_path / "run", trials=3, space=SPACE, **{**PINS, "checkpoint_seconds": 1e-9})

    def stop(*arguments: object) -> None:
        raise Stopped

    def train_and_stop(*arguments: Any, **options: Any) -> None:
        train(*arguments, **options)
        raise Stopped

    def train_some(
        data: Path, out: Path, config: TrainConfig, on_step: Any, on_validation: Any, **options: Any
    ) -> None:
        def stop_later(line: Mapping[str, Any]) -> None:
            on_validation(line)
            if line["epoch"] >= 2:
                raise Stopped

        train(data, out, config, on_step, stop_later, **options)

    # In the middle of the first trial, between the end of its training and its record, and between the record and the
    # removal of the training; the last leaves a training whose trial has ended.
    for name, interruption, ended in (
        ("train", train_some, 0),
        ("train", train_and_stop, 0),
        ("remove_ended", lambda out, records: stop() if records else None, 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(trials_module, name, interruption)
            with pytest.raises(Stopped):
                search()
        assert len(read_records(tmp_path / "run")) == ended
        assert trial_folder(tmp_path / "run", 0).exists()
    with monkeypatch.context() as patch:
        patch.setattr(trials_module, "train", train_some)
        with pytest.raises(Stopped):
            search()
    search()
    assert without_times(read_records(tmp_path / "run")) == without_times(read_records(undisturbed))[:3]
    assert not list((tmp_path / "run").glob("trial-*"))


def test_no_test_target_decides_anything(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    values = []
    for replaced in (1, 2):
        other = write_walks(tmp_path / f"data-{replaced}", replaced)
        tune(other, tmp_path / f"run-{replaced}", trials=1, space=SPACE, **PINS)
        values.append(without_times(read_records(tmp_path / f"run-{replaced}")))
    # Other test targets change nothing; the control, other validation targets, all values.
    expected = without_times(read_records(undisturbed))[:1]
    assert values[0] == expected
    assert values[1][0].value != expected[0].value


def test_a_time_budget_lets_the_first_trial_end_and_the_search_go_on(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    seen: list[int] = []
    space = {"learning_rate": [0.01, 1e30]}
    result = tune(data, out, minutes=1e-6, space=space, **PINS, on_trial=lambda trial: seen.append(trial["number"]))
    assert (result["ended_by"], result["best"]["trial"], seen) == ("minutes", 0, [0])
    # The start lies outside, two values are all there is, and one of them is no rate to train with.
    result = tune(data, out, trials=9, space=space, **PINS, on_trial=lambda trial: seen.append(trial["number"]))
    assert (result["ended_by"], seen) == ("space", [0, 1, 2])
    assert result["trials"] == {"complete": 2, "pruned": 0, "failed": 1}
    failed = next(record for record in read_records(out) if record.state == "failed")
    assert failed.settings == {"learning_rate": 1e30}
    assert "the loss is" in str(failed.reason)
    for name, change in (
        ("settings", {"space": space, **PINS, "dim": 8}),
        ("space", {"space": {"dropout": [0.1, 0.2]}, **PINS}),
        ("config", {"space": space, "config": "movielens", **PINS}),
    ):
        with pytest.raises(RunError, match=f"a study of another {name}"):
            tune(data, out, trials=1, **change)
    with pytest.raises(RunError, match="a study of another data set"):
        tune(write_walks(tmp_path / "other", 1), out, trials=1, space=space, **PINS)


def test_a_directory_in_use_or_with_a_training_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match="holds a training"):
        tune(data, tmp_path, trials=1, **PINS)
    with (tmp_path / "tune.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another penchant tune"):
            tune(data, tmp_path, trials=1, **PINS)


def test_a_missing_optuna_is_named_with_its_extra(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(TrainingError, match=r"pip install 'penchant\[tune\]'"):
        tune(data, tmp_path / "run", trials=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("budget", [{"minutes": 0}, {"trials": 0}])
def test_a_budget_of_nothing_is_refused(data: Path, tmp_path: Path, budget: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match="a budget"):
        tune(data, tmp_path / "run", **budget)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "the space is empty"),
        ({"dropuot": [0, 0.1]}, "unknown setting 'dropuot'; did you mean 'dropout'"),
        ({"protocol": ["none", "temporal"]}, "protocol decides which events validate"),
        ({"ranker_hidden": [16, 32]}, "does not depend on ranker_hidden"),
        ({"epochs": [3, 4]}, "epochs has a value by --set"),
        ({"dropout": [0.1, 1.5]}, r"dropout: .*less than 1.*1\.5"),
        ({"dropout": {"low": 0.1, "high": "much"}}, "dropout: .*valid number.*much"),
        ({"dropout": {"low": 0.1}}, "dropout: a range needs high"),
        ({"dropout": {"low": 0.1, "high": 0.4, "lgo": True}}, "dropout: unknown 'lgo'"),
        ({"dropout": {"low": 0.4, "high": 0.1}}, r"dropout: low \(0.4\) must be below high"),
        ({"dropout": {"low": 0.0, "high": 0.4, "log": True}}, "dropout: log is"),
        ({"dropout": {"low": 0.0, "high": 0.4, "step": 0.15}}, "dropout: high must lie a whole number of steps"),
        ({"dim": {"low": 16, "high": 64, "step": 0.5}}, "dim: step must be an integer"),
        ({"dim": [64]}, "dim: needs two values"),
        ({"dim": 64}, "dim: write a list of values"),
        ({"content": {"low": False, "high": True}}, "content is no number"),
    ],
)
def test_a_space_that_cannot_be_is_refused_by_name(document: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_space(document, TrainConfig(), frozenset({"epochs"}))


def test_a_space_is_read_from_a_file_and_written_as_one(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("learning_rate: {low: 1e-3, high: 1e-2, log: true}\ndim: [64, 96]\nheads: [2, 3]\n")
    space = read_space(file, TrainConfig(), frozenset())
    assert as_document(space) == {
        "learning_rate": {"low": 0.001, "high": 0.01, "log": True},
        "dim": [64, 96],
        "heads": [2, 3],
    }
    assert read_space(as_document(space), TrainConfig(), frozenset()) == space
    # Three heads fit 96 only, so no trial has 64 with them.
    origin = {"learning_rate": 0.002, "dim": 64, "heads": 2}
    plans = [propose([_record(0, origin)], space, {}, origin, seed) for seed in range(30)]
    pairs = {(plan.settings["dim"], plan.settings["heads"]) for plan in plans if plan is not None}
    assert pairs == {(64, 2), (96, 2), (96, 3)}
    file.write_text("- dim")
    with pytest.raises(SettingsError, match="must hold lines"):
        read_space(file, TrainConfig(), frozenset())


def test_the_default_space_lies_around_its_start() -> None:
    for start in (
        TrainConfig(),
        TrainConfig(dim=16, batch_tokens=16, layers=1, dropout=0.7),
        load_config(Path("amazon")),
    ):
        space = default_space(start, frozenset({"epochs"}))
        assert "epochs" not in space
        assert all(values.holds(getattr(start, name)) for name, values in space.items())
        # A file may hold whatever a mapping holds.
        assert read_space(as_document(space), start, frozenset()) == space
    with pytest.raises(SettingsError, match="every setting that tune searches has a value"):
        default_space(TrainConfig(), frozenset(TrainConfig.model_fields))


def _record(number: int, tried: dict[str, Any], value: float = 0.1) -> TrialRecord:
    return TrialRecord(number, "complete", tried, value, value, dict.fromkeys(range(11), value), 1.0, 0.1)


@given(st.lists(st.floats(0.01, 0.9), min_size=1, max_size=9), st.integers(0, 3))
@settings(max_examples=8)
def test_what_a_trial_tries_depends_on_the_ended_ones_alone(values: list[float], seed: int) -> None:
    start = TrainConfig()
    space = default_space(start, frozenset())
    origin = {name: getattr(start, name) for name in space}
    records: list[TrialRecord] = []
    for number, value in enumerate(values):
        plan = propose(records, space, {}, origin, seed)
        again = propose([TrialRecord(**json.loads(json.dumps(asdict(r)))) for r in records], space, {}, origin, seed)
        assert plan is not None
        assert again is not None
        assert plan.settings == again.settings
        assert plan.settings not in [record.settings for record in records]
        assert all(values.holds(plan.settings[name]) for name, values in space.items())
        if number == 0:
            assert plan.settings == origin
        records.append(_record(number, plan.settings, value))
    assert len(study_of(records, space).trials) == len(records)


def test_a_trial_below_the_median_is_pruned_and_none_at_its_end() -> None:
    start = TrainConfig()
    space = default_space(start, frozenset())
    origin = {name: getattr(start, name) for name in space}
    records: list[TrialRecord] = []
    for number in range(FIRST_TRIALS):
        plan = propose(records, space, {}, origin, 0)
        assert plan is not None
        records.append(_record(number, plan.settings, 0.1 + number / 100))
    plan = propose(records, space, {}, origin, 0)
    assert plan is not None
    assert not plan.is_hopeless({1: 0.01})
    assert not plan.is_hopeless({1: 0.01, 4: 0.125})
    low = propose(records, space, {}, origin, 0)
    assert low is not None
    assert low.is_hopeless({1: 0.01, 4: 0.119})
    assert not low.is_hopeless({1: 0.01, 4: 0.119, 10: 0.119})


def test_curves_of_any_length_are_compared_by_their_share() -> None:
    log = [{"epoch": epoch, "ndcg@10": value} for epoch, value in ((1, 0.1), (2, 0.3), (3, 0.2), (4, 0.4))]
    assert curve_of(log, 4) == {2: 0.1, 5: 0.3, 7: 0.3, 10: 0.4}
    assert curve_of(log, 40) == {0: 0.1, 1: 0.4}
    assert best_of([_record(0, {}, 0.2), _record(1, {}, 0.3), _record(2, {}, 0.3)]).number == 1
