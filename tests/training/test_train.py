from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from features.catalog_columns import CatalogColumns
from features.errors import TrainingError
from features.tables.dataset import open_dataset
from features.transforms import item_inputs, query_inputs
from tests.training.conftest import CIRCLE
from training.config import Action, TrainConfig
from training.data.batches import Batch, Plan, TrainingBatches
from training.data.interactions import item_vocabulary, read_interactions
from training.data.split import split
from training.fitting.ranker_candidates import CandidateBuilder, RankerCandidates
from training.fitting.step import EncoderStep
from training.fitting.tensorboard import LogLine
from training.models.scoring import user_vectors
from training.run import RunError, input_shapes, load_run
from training.runtime import exact
from training.train import train


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def finished(circles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.training.conftest import TINY

    out = tmp_path_factory.mktemp("run") / "run"
    train(circles, out, TrainConfig(**{**TINY, "epochs": 25, "protocol": "leave-one-out"}))
    return out


def test_it_learns_what_comes_next(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["best_validation"]["ndcg@10"] > 0.8
    assert result["tokens_per_second"] > 0
    assert result["event_types"] == ["purchase"]
    assert result["action_weights"] == [1.0]


def test_a_loaded_run_answers(finished: Path) -> None:
    run = load_run(finished)
    rows = run.vocabulary.rows(["i0", "i1", "i2"])
    vectors = torch.from_numpy(run.item_vectors[rows])[None]
    with torch.inference_mode():
        user = run.user_encoder.last(vectors, torch.ones(1, 3, dtype=torch.int64), torch.tensor([3]))[0].numpy()
    scores = run.item_vectors @ user
    scores[rows] = -np.inf
    assert run.vocabulary.ids([int(np.argmax(scores))]) == ["i3"]


def test_an_item_nobody_touched_lies_by_its_content(finished: Path) -> None:
    run = load_run(finished)
    assert not run.trained[39]
    inputs = item_inputs([run.items.slice(39, 1).to_pylist()[0]], input_shapes(run.config))
    with torch.inference_mode():
        by_content = run.item_encoder(**{name: torch.from_numpy(array) for name, array in inputs.items()})[0].numpy()
    assert run.item_vectors[39] == pytest.approx(by_content, abs=1e-5)
    closest = np.argsort(-(run.item_vectors[:39] @ by_content))[:5]
    assert np.mean(closest // CIRCLE == 3) >= 0.6


def test_a_query_finds_the_items_it_names(finished: Path) -> None:
    run = load_run(finished)
    with torch.inference_mode():
        query = run.query_encoder(torch.from_numpy(query_inputs("romance", input_shapes(run.config))["tokens"]))[0]
    directions = run.item_vectors / np.linalg.norm(run.item_vectors, axis=1, keepdims=True)
    assert np.mean(np.argsort(-(directions @ query.numpy()))[:10] // CIRCLE == 2) >= 0.8


@pytest.mark.parametrize(("stop", "dense_items"), [(3, 50_000), (7, 50_000), (7, 0)])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(
    circles: Path, tmp_path: Path, tiny: TrainConfig, stop: int, dense_items: int
) -> None:
    changes = {"dropout": 0.2, "epochs": 4, "checkpoint_seconds": 1e-9, "negatives": 12, "dense_items": dense_items}
    config = tiny.model_copy(update=changes)

    def kill(step: int) -> None:
        if step == stop:
            raise Interrupted

    undisturbed = train(circles, tmp_path / "one", config)
    with pytest.raises(Interrupted):
        train(circles, tmp_path / "two", config, kill)
    assert not (tmp_path / "two" / "result.json").exists()
    resumed = train(circles, tmp_path / "two", config)
    for name in ("model", "query", "ranker", "tables"):
        one, two = (load_file(tmp_path / which / f"{name}.safetensors") for which in ("one", "two"))
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            assert torch.equal(tensor, two[key]), key
    assert undisturbed["best_validation"] == resumed["best_validation"]
    assert undisturbed["blend"] == resumed["blend"]
    # The mean loss too, although its sum was cut in two.
    assert log_of(tmp_path / "one") == log_of(tmp_path / "two")


def log_of(run: Path) -> list[dict[str, float]]:
    """The log of a run but for the time, which cannot be repeated."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize("negatives", [0, 12])
def test_the_log_keeps_the_mean_loss_of_all_targets_since_the_last_validation(
    circles: Path, tmp_path: Path, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, negatives: int
) -> None:
    read: list[tuple[float, int]] = []
    make = EncoderStep.make

    def watched(step: EncoderStep, batch: Batch, rate: float) -> torch.Tensor:
        loss = make(step, batch, rate)
        assert batch.targets is not None
        read.append((float(loss), int((batch.targets >= 0).sum())))
        return loss

    monkeypatch.setattr(EncoderStep, "make", watched)
    lines: list[LogLine] = []
    config = tiny.model_copy(update={"epochs": 3, "negatives": negatives})
    train(circles, tmp_path / "run", config, on_validation=lines.append)
    assert [dict(line) for line in lines] == [
        json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 3
    begin = 0
    for line in lines:
        since, begin = read[begin : line["step"]], line["step"]
        assert len(since) > 1
        mean = sum(loss * count for loss, count in since) / sum(count for _, count in since)
        assert line["loss"] == pytest.approx(mean, rel=1e-5)
        assert line["loss"] != pytest.approx(since[-1][0], rel=1e-5)


def test_the_validation_loss_is_the_cross_entropy_of_the_validation_targets(
    circles: Path, tmp_path: Path, tiny: TrainConfig
) -> None:
    config = tiny.model_copy(update={"epochs": 1, "protocol": "leave-one-out"})
    lines: list[LogLine] = []
    train(circles, tmp_path / "run", config, on_validation=lines.append)
    run = load_run(tmp_path / "run")
    data = read_interactions(run.dataset, run.vocabulary, config)
    targets = split(data, config).validation
    assert not run.trained.all()
    table = torch.from_numpy(run.item_vectors)
    with exact():
        users = user_vectors(run.user_encoder, table, data, targets, config.max_length)
    # Among the items with training events: no step has pushed away the one without.
    place = np.cumsum(run.trained) - 1
    logits = torch.from_numpy(users @ run.item_vectors[run.trained].T)
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(place[targets.rows(data)]))
    assert lines[0]["validation_loss"] == pytest.approx(float(expected), rel=2e-2)  # products in bf16 where there are


def test_a_callback_that_raises_ends_a_training_that_can_go_on(
    circles: Path, tmp_path: Path, tiny: TrainConfig
) -> None:
    def prune(line: LogLine) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        train(circles, tmp_path / "run", tiny, on_validation=prune)
    with pytest.raises(RunError, match="no finished run"):
        load_run(tmp_path / "run")
    assert train(str(circles), str(tmp_path / "run"), tiny)["epochs"] == tiny.epochs


def test_a_directory_of_another_run_is_refused(
    circles: Path, tmp_path: Path, finished: Path, tiny: TrainConfig
) -> None:
    with pytest.raises(RunError, match="another --out"):
        train(circles, finished, tiny)

    def kill(step: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        train(circles, tmp_path / "run", tiny, kill)
    with pytest.raises(RunError, match="another configuration"):
        train(circles, tmp_path / "run", tiny.model_copy(update={"dim": 32}))
    with pytest.raises(RunError, match="holds no finished run"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize("validate_every", [1.0, 100.0])
def test_a_loss_that_is_no_number_ends_the_training(
    circles: Path, tmp_path: Path, tiny: TrainConfig, validate_every: float
) -> None:
    wild = {"learning_rate": 1e30, "warmup_steps": 0, "validate_every": validate_every}
    with pytest.raises(TrainingError, match="learning_rate below"):
        train(circles, tmp_path / "run", tiny.model_copy(update=wild))


def test_a_training_is_validated_at_its_end_at_least(circles: Path, tmp_path: Path, tiny: TrainConfig) -> None:
    result = train(circles, tmp_path / "run", tiny.model_copy(update={"epochs": 2, "validate_every": 100.0}))
    assert 0 <= result["best_validation"]["ndcg@10"] <= 1
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 1


def test_histories_of_one_event_teach_nothing(tmp_path: Path, tiny: TrainConfig) -> None:
    events = pa.table({"user_id": ["a", "b"], "item_id": ["x", "y"], "event_type": ["like"] * 2, "timestamp": [1, 2]})
    (tmp_path / "data").mkdir()
    pq.write_table(events, tmp_path / "data" / "events.parquet")
    with pytest.raises(TrainingError, match="two training events"):
        train(tmp_path / "data", tmp_path / "run", tiny)


def test_the_statistics_of_candidates_do_not_count_the_targets(
    circles: Path, tmp_path: Path, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation event of a user raised the rate of its own item, among candidates that it was to be told from."""
    read: list[CatalogColumns] = []

    class Watched(CandidateBuilder):
        def candidates(self, *given: Any) -> RankerCandidates:
            read.append(self.columns)
            return super().candidates(*given)

    monkeypatch.setattr("training.train.CandidateBuilder", Watched)
    purchase = Action(name="purchase", event_type="purchase", shown_types=("purchase",))
    changed = {"epochs": 1, "protocol": "leave-one-out", "actions": (purchase,)}
    train(circles, tmp_path / "run", tiny.model_copy(update=changed))
    # Every event shows its item here, so the number of showings is that of the training events.
    assert read
    assert read[0].statistics[:, 0] == pytest.approx(read[0].popularity)
    # A bundle knows validation too, as its service has seen it.
    exported = np.expm1(load_run(tmp_path / "run").statistics[:, 0]).sum()
    assert exported == pytest.approx(np.expm1(read[0].popularity).sum() + 160)


def test_repeats_that_are_no_targets_teach_nothing(tmp_path: Path, tiny: TrainConfig) -> None:
    """Where repeats are not recommended, the same item again is nothing to predict."""
    columns = {"user_id": ["a", "a", "b", "b"], "item_id": ["x", "x", "y", "y"], "timestamp": [1, 2, 3, 4]}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({**columns, "event_type": ["like"] * 4}), tmp_path / "data" / "events.parquet")
    with pytest.raises(TrainingError, match="second could be predicted"):
        train(tmp_path / "data", tmp_path / "run", tiny)
    trained = train(tmp_path / "data", tmp_path / "other", tiny.model_copy(update={"repeats": True, "epochs": 1}))
    assert trained["steps"] == 1


def test_every_event_is_in_exactly_one_window_of_an_epoch(circles: Path, tiny: TrainConfig) -> None:
    config = tiny.model_copy(update={"max_length": 3})
    dataset = open_dataset(circles)
    _, vocabulary = item_vocabulary(dataset)
    data = read_interactions(dataset, vocabulary, config)
    division = split(data, config)
    batches = TrainingBatches(data, division.train_end, config, torch.device("cpu"))
    for epoch in range(3):
        predicted = np.zeros(data.rows.size, int)
        for windows in batches.epoch(epoch):
            for start, end in windows.tolist():
                predicted[start + 1 : end] += 1
                assert end - start <= config.max_length + 1
        position = np.arange(data.rows.size) - data.offsets[data.owner()]
        expected = (position > 0) & (position < division.train_end[data.owner()])
        assert (predicted == expected).all()
    assert same(batches.epoch(1), batches.epoch(1))
    assert not same(batches.epoch(1), batches.epoch(2))


def same(one: Plan, other: Plan) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
