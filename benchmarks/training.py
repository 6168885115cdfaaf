"""Training: its speed against other trainers, its quality, its placing of new items, its share of peak arithmetic.

speed       Penchant, RecTools and RecBole alternate on the same threads, data and validation targets; real tokens a
            second, and seconds to the highest validation NDCG@10 that all of them reach within their time
quality     several seeds of one configuration, measured by `training.evaluation.evaluate`
cold        the same with a share of the items held out as cold ones, measured by its protocol `cold-items`
arithmetic  floating point operations of the model a second, over those of the machine's own matrix products
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.report import facts
from benchmarks.side_by_side import speed
from features.errors import SettingsError
from features.tables.dataset import open_dataset
from training.config import TrainConfig
from training.data.batches import TrainingBatches
from training.evaluation.evaluate import evaluate
from training.run import build_modules, read_config
from training.runtime import exact, prepared
from training.train import Material, read_material, train

PRODUCT_SIZE = 2048
PRODUCT_ROUNDS = 12
PRODUCT_SECONDS = 10.0
WARM_UP = 20


def training(part: str, data: Path, config: TrainConfig, **options: Any) -> dict[str, Any]:
    """Runs one part of the benchmark and adds its circumstances.

    Args:
        part: `speed`, `quality`, `cold` or `arithmetic`.
        data: Directory of the canonical tables.
        config: Penchant's configuration.
        options: Further arguments of the part.
    """
    parts: dict[str, Callable[..., dict[str, Any]]] = {
        "speed": speed,
        "quality": quality,
        "cold": cold,
        "arithmetic": arithmetic,
    }
    return {"part": part, **parts[part](data, config, **options), **facts()}


def quality(data: Path, config: TrainConfig, seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """Trains each seed into `OUT/seed-N` (a finished one stands) and measures them together on the test part."""
    runs = _runs(data, config, seeds, out)
    protocol = {"leave-one-out": "leave-one-out", "temporal": "temporal-successive"}.get(config.protocol)
    if protocol is None:
        raise SettingsError("protocol is none, so nothing is held out to measure: take a configuration that holds out")
    return {**evaluate(runs, protocol, data), "training": _trained(runs), "config": config.model_dump()}


def cold(data: Path, config: TrainConfig, seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """Trains with cold items (a tenth of all, unless the configuration says) and measures as `cold-items`."""
    config = config if config.cold_item_share else config.model_copy(update={"cold_item_share": 0.1})
    runs = _runs(data, config, seeds, out)
    return {**evaluate(runs, "cold-items", data), "training": _trained(runs), "config": config.model_dump()}


def _runs(data: Path, config: TrainConfig, seeds: Sequence[int], out: Path) -> list[Path]:
    runs = []
    for seed in seeds:
        run, wanted = out / f"seed-{seed}", config.model_copy(update={"seed": seed})
        # A finished training stands, so that a benchmark of hours can be continued.
        if (run / "result.json").exists():
            if read_config(run) != wanted:
                raise SettingsError(f"{run} was trained with another configuration: give another --out, or delete it")
        else:
            train(data, run, wanted)
        runs.append(run)
    return runs


def _trained(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Returns the cost of each training."""
    results = [json.loads((run / "result.json").read_text(encoding="utf-8")) for run in runs]
    names = ("seconds", "tokens_per_second", "epochs", "best_validation", "parameters")
    return [{name: result[name] for name in names} for result in results]


def arithmetic(data: Path, config: TrainConfig, budget: float) -> dict[str, Any]:
    """Measures the model's operations a second over at most `budget` seconds of an epoch, and those of bare products.

    Counted are two operations per weight of every linear map of the user encoder and per element of the scores of
    attention (twice: scores and mixture) and of the softmax over all items, three times over for the gradients; nothing
    for content, norms or the optimizer.

    Returns:
        `tokens_per_second`, `flops_per_token`, `achieved_gflops`, `product_gflops` {product: rate}, `share` {product:
        achieved over it}, and the figures they are computed from.
    """
    material = read_material(open_dataset(data), config, torch.device("cpu"))
    batches = TrainingBatches(material.data, material.division.train_end, config, torch.device("cpu"))
    plan = [[end - start - 1 for start, end in windows] for windows in batches.epoch(0)]
    flops = _flops(material, config, np.array([length for lengths in plan for length in lengths], np.float64))
    # Before and after: the machine's own rate changes with its temperature and its neighbours.
    with prepared(config.threads):
        before = _products(config.dim, material.data.items)
    seconds, tokens = _train_for(data, config, [sum(lengths) for lengths in plan], budget)
    with prepared(config.threads):
        after = _products(config.dim, material.data.items)
    achieved = tokens / seconds * sum(flops.values())
    products = {name: max(before[name], after[name]) for name in before}
    return {
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds": round(seconds, 1),
        "flops_per_token": flops,
        "achieved_gflops": round(achieved / 1e9, 2),
        "product_gflops": {name: round(rate / 1e9, 2) for name, rate in products.items()},
        "share": {name: round(achieved / rate, 4) for name, rate in products.items()},
        "config": config.model_dump(),
        "method": f"float32, bfloat16: products of {PRODUCT_SIZE} x {PRODUCT_SIZE}; scores: bfloat16, a chunk of users "
        "by the vectors of all items, the largest product of a step; the better of before and after the training",
    }


def _flops(material: Material, config: TrainConfig, lengths: Any) -> dict[str, float]:
    """Returns operations per token, forwards and backwards; `lengths` are float64, of all windows."""
    data = material.data
    modules = build_modules(config, data.items, len(data.event_types), len(material.actions), content=False)
    linear = sum(layer.weight.numel() for layer in modules.user.modules() if isinstance(layer, nn.Linear))
    attended = float((lengths * (lengths + 1) / 2).sum() / lengths.sum())
    return {
        "linear": 6.0 * linear,
        "attention": 12.0 * attended * config.dim * config.layers,
        "softmax": 6.0 * config.dim * (config.negatives or data.items),
    }


def _train_for(data: Path, config: TrainConfig, sizes: Sequence[int], budget: float) -> tuple[float, int]:
    """Returns the seconds of steady steps and their tokens, at most to the end of the first epoch."""
    marks: list[tuple[float, int]] = []
    warm = min(WARM_UP, len(sizes) // 4)

    class _EnoughError(Exception):
        pass

    def on_step(step: int) -> None:
        if step == warm:
            marks.append((time.monotonic(), step))
        elif step > warm and (time.monotonic() - marks[0][0] >= budget or step >= len(sizes)):
            marks.append((time.monotonic(), step))
            raise _EnoughError

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_EnoughError):
        # Validations and checkpoints are no arithmetic of the model.
        undisturbed = config.model_copy(update={"validate_every": 1e6, "checkpoint_seconds": 1e6})
        train(data, Path(folder) / "run", undisturbed, on_step)
    if len(marks) < 2:
        raise SettingsError(
            f"an epoch has {len(sizes)} steps, too few to measure: take more data or a lower batch_tokens"
        )
    (began, first), (ended, last) = marks
    return ended - began, sum(sizes[first:last])


def _products(dim: int, items: int) -> dict[str, float]:
    """Returns the operations a second of matrix products."""
    square = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE)
    with exact():
        rates = {"float32": _rate(square, square)}
    rates["bfloat16"] = _rate(square.bfloat16(), square.bfloat16())
    rates["scores"] = _rate(torch.randn(1024, dim).bfloat16(), torch.randn(dim, items).bfloat16())
    return rates


def _rate(left: torch.Tensor, right: torch.Tensor) -> float:
    out, seconds = torch.empty(left.shape[0], right.shape[1], dtype=left.dtype), []
    for _ in range(PRODUCT_ROUNDS):
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        seconds.append(time.perf_counter() - began)
        if sum(seconds) > PRODUCT_SECONDS:  # a processor without bfloat16 takes minutes for one
            break
    return 2.0 * left.shape[0] * left.shape[1] * right.shape[1] / float(np.median(seconds))
