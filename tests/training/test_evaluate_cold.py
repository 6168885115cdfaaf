from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from features.errors import LeakError, TrainingError
from tests.training.conftest import CIRCLE, CIRCLES, TINY
from training.config import TrainConfig
from training.data.interactions import Interactions, draw_cold_items, read_interactions
from training.data.split import split
from training.evaluation.cold_items import cold_targets
from training.evaluation.evaluate import evaluate
from training.fitting.encoders import EncoderTrainer
from training.run import build_modules, load_run
from training.train import read_material, train

ITEMS = CIRCLES * CIRCLE
HIDING = {**TINY, "epochs": 25, "protocol": "leave-one-out", "cold_item_share": 0.15, "id_dropout": 0.3}


@pytest.fixture(scope="module")
def run(circles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cold") / "run"
    train(circles, out, TrainConfig(**HIDING))
    return out


@pytest.fixture(scope="module")
def whole(run: Path) -> Interactions:
    loaded = load_run(run)
    return read_interactions(
        loaded.dataset, loaded.vocabulary, loaded.config.model_copy(update={"cold_item_share": 0.0})
    )


def test_the_seed_draws_the_share(tiny: TrainConfig) -> None:
    config = tiny.model_copy(update={"cold_item_share": 0.15})
    hidden = draw_cold_items(ITEMS, config)
    assert hidden.sum() == 6
    assert (hidden == draw_cold_items(ITEMS, config)).all()
    assert (hidden != draw_cold_items(ITEMS, config.model_copy(update={"seed": 1}))).any()
    assert not draw_cold_items(ITEMS, tiny).any()


def test_nothing_but_their_events_is_missing(run: Path, whole: Interactions) -> None:
    loaded = load_run(run)
    visible = read_interactions(loaded.dataset, loaded.vocabulary, loaded.config)
    kept = ~draw_cold_items(ITEMS, loaded.config)[whole.rows]
    assert list(visible.users) == list(whole.users)
    assert 0 < kept.sum() < kept.size
    for name in ("rows", "types", "timestamps", "target", "seen"):
        assert (getattr(visible, name) == getattr(whole, name)[kept]).all(), name
    assert (visible.owner() == whole.owner()[kept]).all()


def test_hidden_items_leave_no_trace_in_a_run(run: Path) -> None:
    loaded = load_run(run)
    hidden = np.flatnonzero(draw_cold_items(ITEMS, loaded.config))
    assert not loaded.trained[hidden].any()
    assert not loaded.popularity[hidden].any()
    assert not loaded.recent_popularity[hidden].any()
    assert not np.isin(loaded.neighbors, hidden).any()
    assert (loaded.neighbors[hidden] == -1).all()
    # Their vectors are what content alone says; an id would have added to it.
    with torch.inference_mode():
        assert np.abs(loaded.item_vectors[hidden]).max() > 0
    trained = np.flatnonzero(loaded.trained)
    assert loaded.item_encoder.ids.weight[trained].abs().max() > 0


@pytest.mark.parametrize("negatives", [0, 8])
def test_hidden_items_get_no_gradient_not_even_as_negatives(
    circles: Path, tmp_path: Path, tiny: TrainConfig, negatives: int
) -> None:
    from features.tables.dataset import open_dataset
    from training.models.encoders import ItemBags

    config = TrainConfig(**{**HIDING, "negatives": negatives})
    material = read_material(open_dataset(circles), config, torch.device("cpu"))
    modules = build_modules(config, ITEMS, len(material.data.event_types), 1, content=True)
    assert material.inputs is not None
    bags = ItemBags.build(modules.item, material.inputs)
    hidden = torch.from_numpy(draw_cold_items(ITEMS, config))
    touched = torch.zeros(ITEMS, dtype=torch.bool)
    inner = modules.item.table

    def look(gradient: torch.Tensor) -> None:
        touched.logical_or_(gradient.abs().sum(1) > 0)

    def table(*given: object) -> torch.Tensor:
        made = inner(*given)  # type: ignore[arg-type]
        made.register_hook(look)
        return made

    modules.item.table = table  # type: ignore[method-assign]
    fit = EncoderTrainer(tmp_path, config, material.data, material.division, modules, bags)
    plan = fit.batches.epoch(0)
    for windows in plan:
        fit._step(fit.batches.batch(windows), len(plan))
    assert not touched[hidden].any()
    assert touched[~hidden].sum() > ITEMS // 2


def test_targets_come_after_all_that_was_trained_on(run: Path, whole: Interactions) -> None:
    loaded = load_run(run)
    asked = cold_targets(loaded)
    hidden = draw_cold_items(ITEMS, loaded.config)
    assert len(asked.targets) > 10
    assert hidden[asked.rows].all()
    ends = split(asked.events, loaded.config).fit_end
    assert (asked.targets.positions >= ends[asked.targets.users]).all()
    newest: dict[int, int] = {}
    for person in range(len(whole.users)):
        part = slice(whole.offsets[person], whole.offsets[person + 1])
        rows = whole.rows[part]
        # By hand: hidden items that follow the last but one visible event or stand at the end.
        shown = np.flatnonzero(~hidden[rows])
        fitted = shown[ends[person] - 1] if ends[person] else -1
        newest[person] = sum(1 for at, row in enumerate(rows) if hidden[row] and at > fitted and (shown < at).any())
    found = np.bincount(asked.targets.users, minlength=len(whole.users))
    assert found.tolist() == [newest[person] for person in range(len(whole.users))]


def test_content_places_hidden_items_where_they_belong(run: Path) -> None:
    found = evaluate([run], "cold-items")
    assert found["items"] == ITEMS
    assert found["cold_items"] == [6]
    assert found["chance"] == 50 / ITEMS
    assert found["metrics"]["recall@50"]["mean"] == 1.0  # forty items in all
    # Title and category name the circle, so a hidden item of the right circle stands before three quarters of all.
    assert found["metrics"]["recall@10"]["mean"] > 0.5
    assert found["warm"]["ndcg@10"]["mean"] > found["metrics"]["ndcg@10"]["mean"]
    logged = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert logged["protocol"] == "cold-items"


def test_what_cannot_be_asked_is_refused(run: Path, circles: Path, tmp_path: Path) -> None:
    loaded = load_run(run)
    for change, error, message in (
        ({"protocol": "none"}, LeakError, "protocol=leave-one-out"),
        ({"cold_item_share": 0.0}, TrainingError, "cold_item_share=0.1"),
    ):
        from training.evaluation.cold_items import _refuse_unfit

        with pytest.raises(error, match=message):
            _refuse_unfit(dataclasses.replace(loaded, config=loaded.config.model_copy(update=change)))
