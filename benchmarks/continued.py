"""A day of new events: a full training on all of them against one that begins from yesterday's run.

The data is cut twice by time: TODAY is what there is before the last day of training, TOMORROW has that day too, and
what comes after both tests all runs alike (`evaluate --test`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.report import BenchmarkError, facts
from features.arrays import pc
from features.tables.dataset import Dataset, open_dataset, write_dataset
from features.tables.files import table_path
from training.config import TrainConfig
from training.data.split import DAY_MS
from training.evaluation.evaluate import evaluate
from training.train import train

METRIC = "ndcg@10"
_SHOWN = ("hit@10", METRIC)


def continued(
    data: Path,
    config: TrainConfig,
    out: Path,
    *,
    automatic: bool = False,
    seeds: Sequence[int] = (1,),
    new_days: float = 1.0,
    test_days: float = 1.0,
) -> dict[str, Any]:
    """Measures what a training from an earlier run saves and loses.

    Args:
        data: Directory of the canonical tables, with times.
        config: Settings of the full trainings, without a protocol.
        out: Keeps data sets and runs; a finished training stands.
        automatic: Choose by today's data what `config` does not set.
        seeds: Seeds to train.
        new_days: Days of events that the earlier run lacks.
        test_days: Days of events, the last, that test.

    Returns:
        `events`, `by_seed`, `share_of_time` (the largest), NDCG@10, and its `relative_difference` (full: 0).

    Raises:
        BenchmarkError: The data has no times, or a part of it is empty.
    """
    events = _divided(data, out, new_days, test_days)
    results = [_of_seed(out, config.model_copy(update={"seed": seed}), automatic) for seed in seeds]
    mean = {name: float(np.mean([result["metrics"][name][METRIC] for result in results])) for name in _RUNS}
    return {
        "events": events,
        "seeds": list(seeds),
        "by_seed": results,
        "share_of_time": max(result["share_of_time"] for result in results),
        METRIC: mean,
        "relative_difference": mean["continued"] / mean["full"] - 1,
        "method": "full and continued train on the same events, one after the other, and are tested on later ones",
        **facts(),
    }


_RUNS = ("earlier", "full", "continued")


def _of_seed(out: Path, config: TrainConfig, automatic: bool) -> dict[str, Any]:
    runs = {name: out / f"{name}-{config.seed}" for name in _RUNS}
    earlier = _trained(out / "today", runs["earlier"], config, automatic=automatic)
    # The settings that were chosen for today: a survey of tomorrow's data could choose a longer training.
    settled = TrainConfig.model_validate(json.loads((runs["earlier"] / "config.json").read_text(encoding="utf-8")))
    full = _trained(out / "tomorrow", runs["full"], settled)
    short = _trained(out / "tomorrow", runs["continued"], settled, start=runs["earlier"])
    measured = {name: evaluate(run, test=out / "test.parquet") for name, run in runs.items()}
    return {
        "seconds": {"earlier": earlier["seconds"], "full": full["seconds"], "continued": short["seconds"]},
        "share_of_time": round(short["seconds"] / full["seconds"], 4),
        "stage_seconds": {"full": full["stage_seconds"], "continued": short["stage_seconds"]},
        "start": short["start"],
        "targets": {name: result["targets"] for name, result in measured.items()},
        "metrics": {
            name: {metric: result["metrics"][metric]["mean"] for metric in _SHOWN} for name, result in measured.items()
        },
    }


def _trained(
    data: Path, run: Path, config: TrainConfig, *, automatic: bool = False, start: Path | None = None
) -> dict[str, Any]:
    if (run / "result.json").exists():
        result: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
        return result
    return train(data, run, config, automatic=automatic, start=start)


def _divided(data: Path, out: Path, new_days: float, test_days: float) -> dict[str, int]:
    """Writes `today`, `tomorrow` and `test.parquet` below `out`; returns their numbers of events."""
    dataset = open_dataset(data)
    events = dataset.events
    if dataset.info["ordered_only"]:
        raise BenchmarkError(f"{data} has order only, so it has no days: take a data set with timestamps")
    tested = int(pc.max(events["timestamp"]).as_py()) - round(test_days * DAY_MS)
    new = tested - round(new_days * DAY_MS)
    parts = {"today": _until(events, new), "tomorrow": _until(events, tested)}
    test = events.filter(pc.greater(events["timestamp"], tested)).select(["user_id", "item_id", "timestamp"])
    counts = {name: table.num_rows for name, table in parts.items()} | {"test": test.num_rows}
    if not counts["today"] or counts["today"] == counts["tomorrow"] or not counts["test"]:
        raise BenchmarkError(f"no event lies in one of the parts {counts}: take other --new-days or --test-days")
    for name, moment in (("today", new), ("tomorrow", tested)):
        if not (out / name).exists():
            _write(dataset, data, out / name, parts[name], moment)
    pq.write_table(test, out / "test.parquet")
    return counts


def _write(dataset: Dataset, data: Path, out: Path, events: pa.Table, moment: int) -> None:
    """Writes the events and slates up to a moment, with the items that the catalogue of that time could have named."""
    slates = None
    if table_path(data, "impressions") is not None:
        slates = _until(pq.read_table(data / "impressions.parquet"), moment)
    write_dataset(out, events, dataset.items, impressions=slates, name=out.name)


def _until(table: pa.Table, moment: int) -> pa.Table:
    return table.filter(pc.less_equal(table["timestamp"], moment))
