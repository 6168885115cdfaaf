from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from features.errors import TrainingError
from features.transforms import item_inputs
from tests.training.conftest import TINY
from training.config import TrainConfig
from training.data.batches import Batch
from training.data.datasets import prepare
from training.evaluation import events
from training.evaluation.evaluate import evaluate
from training.fitting.step import EncoderStep
from training.models.encoders import ItemBags
from training.run import build_modules, input_shapes
from training.train import train


def made(items: int, content: bool, **changes: Any) -> EncoderStep:
    config = TrainConfig(**{**TINY, "id_dropout": 0.0, "negatives": 64, **changes})
    torch.manual_seed(0)
    modules = build_modules(config, items, 1, 1, content)
    bags = None
    if content:
        described = [{"item_id": f"i{row}", "title": f"word{row % 7} word{row % 11}"} for row in range(items)]
        arrays = item_inputs(described, input_shapes(config))
        bags = ItemBags.build(modules.item, {name: torch.from_numpy(array) for name, array in arrays.items()})
    # The first item has no training event.
    counts = np.concatenate([[0.0], np.ones(items - 1)])
    return EncoderStep(config, modules, bags, counts, counts)


def batch(items: int, seed: int, lines: int = 4, length: int = 10) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    walk = 1 + torch.randint(items - 1, (lines, length + 1), generator=generator)
    types = torch.ones(lines, length, dtype=torch.int64)
    types[0, length // 2 :] = 0
    targets = torch.where(types > 0, walk[:, 1:], -1)
    return Batch(walk[:, :-1] * types, types, types.sum(1), int(types.sum()), targets)


def test_a_small_catalogue_is_updated_as_a_whole() -> None:
    assert made(200, False, dense_items=200).lazy is None
    assert made(200, False, dense_items=199).lazy is not None
    # The full softmax needs all vectors in any case.
    assert made(200, False, dense_items=0, negatives=0).lazy is None
    assert made(200, False, dense_items=0, negatives=199).lazy is None


@pytest.mark.parametrize("content", [False, True])
def test_a_step_reads_and_updates_the_rows_of_its_batch(content: bool) -> None:
    items = 5_000
    step = made(items, content, dense_items=0)
    assert step.lazy is not None
    before = step.modules.item.ids.weight.clone()
    of_batch = batch(items, 1)
    assert torch.isfinite(step.make(of_batch, 1e-2))
    touched = (step.lazy.last > 0).nonzero()[:, 0]
    # The items read, the targets, at most 64 negatives, and row 0, which stands for padding and is not trained.
    named = torch.cat([of_batch.rows.flatten(), of_batch.targets.flatten()])  # type: ignore[union-attr]
    assert set(named[named >= 0].tolist()) <= set(touched.tolist())
    assert touched.numel() <= named.unique().numel() + 64
    changed = (step.modules.item.ids.weight != before).any(1).nonzero()[:, 0]
    assert set(changed.tolist()) <= set(touched.tolist())
    # Weight decay alone, as of any row.
    assert torch.allclose(step.modules.item.ids.weight[0], before[0], rtol=2e-4)
    assert step.modules.item.ids.weight.grad is None


@pytest.mark.parametrize("content", [False, True])
def test_rows_in_use_learn_like_all_rows(content: bool) -> None:
    # With as many negatives as there are items less one, nearly all are scored, so both losses are nearly the same.
    losses = []
    for dense_items in (300, 0):
        step = made(300, content, dense_items=dense_items, negatives=298)
        losses.append([float(step.make(batch(300, number % 5), 1e-2)) for number in range(60)])
    dense, lazy = (np.array(values) for values in losses)
    assert lazy[:5].mean() == pytest.approx(dense[:5].mean(), rel=0.02)
    assert dense[-5:].mean() < 0.5 * dense[:5].mean()
    assert lazy[-5:].mean() == pytest.approx(dense[-5:].mean(), rel=0.1)


def test_gradients_of_the_rows_in_use_are_clipped_with_the_others() -> None:
    step = made(500, False, dense_items=0, clip=1e-6)
    step.make(batch(500, 1), 1e-2)
    assert step.lazy is not None
    squares = sum(float(p.grad.square().sum()) for p in step.parameters if p.grad is not None)
    rows = float((step.lazy.mean / 0.1).square().sum())
    assert rows > 0
    assert squares + rows == pytest.approx(1e-12, rel=0.01)


def test_a_checkpoint_of_steps_over_all_items_is_refused() -> None:
    whole, used = made(300, False, dense_items=300), made(300, False, dense_items=0)
    whole.make(batch(300, 1), 1e-2)
    with pytest.raises(TrainingError, match=r"delete checkpoint\.safetensors"):
        used.restore(whole.state())


def test_a_step_costs_what_its_batch_touches() -> None:
    def seconds(step: EncoderStep, items: int) -> float:
        began = time.perf_counter()
        for number in range(5):
            step.make(batch(items, number), 1e-3)
        return time.perf_counter() - began

    # Forty times the items; the first two steps are made in turns, so that a slow moment meets both.
    small, large = made(5_000, False, dense_items=0), made(200_000, False, dense_items=0)
    whole = made(200_000, False, dense_items=200_000)
    rounds = [(seconds(small, 5_000), seconds(large, 200_000), seconds(whole, 200_000)) for _ in range(6)]
    least = [min(times) for times in zip(*rounds, strict=True)]
    assert least[1] < 2 * least[0]
    assert least[2] > 3 * least[1]  # the control: a step over all items does cost them


SIMULATED = {
    **TINY,
    **{"dim": 32, "feed_forward": 64, "max_length": 50, "batch_tokens": 512, "epochs": 4, "protocol": "leave-one-out"},
    **{"target_types": ("view_item",), "seen_types": ("view_item",), "ranker_steps": 0, "query_steps": 0},
    **{"dropout": 0.1, "token_buckets": 1024, "checkpoint_seconds": 1e6, "learning_rate": 0.005},
}


def test_a_simulated_world_is_learned_as_well_from_the_rows_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare("simulated", None, tmp_path / "data", users=500, items=300, events_per_user=40)
    values = []
    for name, changes in (("full", {"negatives": 0}), ("lazy", {"negatives": 64, "dense_items": 0})):
        train(tmp_path / "data", tmp_path / name, TrainConfig(**{**SIMULATED, **changes}))
        values.append(evaluate([tmp_path / name], "leave-one-out"))
    full, lazy = values
    assert full["targets"] == full["held_out"] == lazy["targets"]
    # Within the noise of the users who are asked: half of an interval, which is wider than that of the difference.
    noise = (full["metrics"]["ndcg@10"]["high"] - full["metrics"]["ndcg@10"]["low"]) / 2
    assert lazy["metrics"]["ndcg@10"]["mean"] > full["metrics"]["ndcg@10"]["mean"] - noise
    assert lazy["paired"]["popular"]["ndcg@10"]["low"] > 0
    assert lazy["paired"]["item_to_item"]["ndcg@10"]["low"] > 0
    # Where all targets would be too dear, some are ranked, each as exactly as before, and the report says so.
    monkeypatch.setattr(events, "EXACT_SCORES", 100 * lazy["items"])
    some = evaluate([tmp_path / "lazy"], "leave-one-out")
    assert (some["targets"], some["held_out"]) == (100, lazy["held_out"])
    mean, interval = lazy["metrics"]["ndcg@10"]["mean"], some["metrics"]["ndcg@10"]
    assert interval["low"] < mean < interval["high"]
    assert "the targets are a random sample of the" in (tmp_path / "lazy" / "report.html").read_text()
