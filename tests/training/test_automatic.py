"""Tests of the settings that are chosen by the data: the rules, their file, explicit settings and the resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

import training.automatic as automatic
from training.automatic import choose
from training.config import TrainConfig, load_config
from training.data.survey import DataSurvey, OrderEvidence
from training.run import RunError, read_config
from training.train import train

SIGNAL = OrderEvidence("signal", 50.0, 20.0, 0.3, 0.01, 1000)
FAST = yaml.safe_load("""
dim: 16
feed_forward: 32
epochs: 1
token_buckets: 64
category_buckets: 16
creator_buckets: 16
query_steps: 2
ranker_steps: 5
candidates: 20
threads: 1
device: cpu
""")


def _survey(users: int, items: int, events: int, long_length: int) -> DataSurvey:
    mean = events / users
    return DataSurvey(users, items, events, mean, round(mean), long_length, SIGNAL, 0.0)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("movielens", _survey(6040, 3416, 987_000, 208)),
        ("amazon", _survey(22_363, 12_101, 192_000, 9)),
    ],
)
def test_the_choice_comes_out_at_the_shipped_configurations(name: str, facts: DataSurvey) -> None:
    chosen, shipped = TrainConfig(**choose(facts)), load_config(Path(name))
    # Validation reads more users where they are short; else each setting is that of the file.
    close = {"validation_users", "protocol", "warmup_steps"}
    assert chosen.model_dump(exclude=close) == shipped.model_dump(exclude=close)
    assert shipped.validation_users * 0.9 <= chosen.validation_users <= shipped.validation_users * 1.1


def test_sizes_decide_between_and_beyond_them() -> None:
    tiny, huge = choose(_survey(290, 300, 6_960, 24)), choose(_survey(10**6, 10**6, 10**8, 150))
    assert (tiny["layers"], tiny["batch_tokens"], tiny["max_length"]) == (1, 256, 50)
    assert 1_000 <= tiny["epochs"] * 6_960 / tiny["batch_tokens"] <= 3_000
    assert (huge["batch_tokens"], huge["epochs"]) == (8192, 1)
    for chosen, events in ((tiny, 6_960), (huge, 10**8)):
        assert chosen["warmup_steps"] <= chosen["epochs"] * events / chosen["batch_tokens"] / 10 + 1
    again = choose(dataclasses.replace(_survey(290, 300, 6_960, 24), repeated=0.4))
    assert again["repeats"]
    assert again["candidates"] == 1000


def test_a_training_without_a_configuration_tells_what_it_chose_and_the_file_repeats_it(
    circles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = load_config(None, FAST)
    first = train(circles, tmp_path / "one", given, automatic=True)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("found:", "chose:", "wrote:"))]
    assert [line[:6] for line in told] == ["found:", "chose:", "wrote:"]
    assert "order carries signal" in told[0]
    config = read_config(tmp_path / "one")
    # Explicit settings stand, and all others were chosen.
    assert (config.dim, config.epochs) == (16, 1)
    assert (config.max_length, config.layers, config.batch_tokens) == (50, 1, 256)
    repeated = load_config(tmp_path / "one" / "config.yaml", device="cpu").model_copy(update={"threads": 1})
    assert repeated == config
    assert train(circles, tmp_path / "two", repeated)["sha256"] == first["sha256"]
    assert not (tmp_path / "two" / "config.yaml").exists()


class _KilledError(Exception):
    pass


def test_a_resume_takes_the_recorded_settings_without_a_second_survey(
    circles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = load_config(None, {**FAST, "epochs": 3, "ordered": False, "checkpoint_seconds": 1e-6})
    undisturbed = train(circles, tmp_path / "one", given, automatic=True)

    def kill(step: int) -> None:
        if step == 5:
            raise _KilledError

    with pytest.raises(_KilledError):
        train(circles, tmp_path / "two", given, kill, automatic=True)

    def refuse(*arguments: object) -> DataSurvey:
        raise AssertionError("a resumed run was surveyed")

    monkeypatch.setattr(automatic, "survey_dataset", refuse)
    with pytest.raises(RunError, match="another configuration"):
        train(circles, tmp_path / "two", given.model_copy(update={"dim": 32}), automatic=True)
    # Bit for bit, though each epoch reads the histories in another order.
    assert train(circles, tmp_path / "two", given, automatic=True)["sha256"] == undisturbed["sha256"]


def test_a_refused_training_leaves_nothing_claimed(circles: Path, tmp_path: Path) -> None:
    from features.errors import TrainingError

    with pytest.raises(TrainingError, match="no event is of a type to predict"):
        train(circles, tmp_path / "run", load_config(None, {**FAST, "target_types": ["like"]}), automatic=True)
    assert not list((tmp_path / "run").glob("*"))
