"""`penchant bench impressions`: the ranker on a feed's last day, compared with plain rates and with LightGBM."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import facts
from features.errors import SettingsError, TrainingError
from training.data.impressions import Examples
from training.data.point_in_time import PointInTimeStatistics
from training.evaluation.impressions import (
    Probabilities,
    ScoredExamples,
    baselines,
    compare,
    metric_values,
    predict_test,
    read_test_material,
    resample_metrics,
    with_intervals,
)
from training.fitting.ranker_impressions import RankerDataset, read_ranker_dataset
from training.run import LoadedRun, columns_of_run, load_run, note_evaluation
from training.runtime import exact, prepared
from training.train import Material

TRIALS = 30
_PEER = Path(__file__).parent / "peers" / "lightgbm_ranker.py"


def impressions(run: Path, python: Path, *, trials: int = TRIALS, data: Path | None = None) -> dict[str, Any]:
    """Measures a run on the impressions after its cut, and logs that in the run.

    LightGBM gets the very matrix that the ranker reads, is tuned on the validation day by random search, and is trained
    on the same examples.

    Args:
        run: A run with `protocol: temporal` whose ranker learned from impressions.
        python: An interpreter that has lightgbm.
        trials: Sets of settings that are tried for each action.
        data: The data set, if it has moved.

    Returns:
        The result of `evaluate --protocol impressions`, with `lightgbm` among its baselines; `ahead` {`ACTION/METRIC`:
        Penchant's minus LightGBM's, {mean, low, high}}; `lightgbm` {version, trials, choices}, `lines` (examples of
        each part), `seconds`.

    Raises:
        TrainingError: The run did not learn from impressions, or LightGBM failed.
        SettingsError: There is no such interpreter.
    """
    began = time.monotonic()
    if not python.exists():
        raise SettingsError(f"{python} is missing: make it as benchmarks/peers/lightgbm.txt says")
    loaded = load_run(run, data)
    # A ranker that learned from retrieved candidates has no features of impressions to compare.
    if loaded.result["ranker_source"] != "impressions":
        raise TrainingError(f"{run}: its ranker did not learn from impressions, so there is nothing to compare")
    material, shown = read_test_material([loaded], data)
    # In float32, so that LightGBM trains on the very numbers that the ranker reads.
    with prepared(loaded.config.threads), exact(), torch.inference_mode():
        feed = _feed(loaded, material, shown)
        tested = predict_test([loaded], material.data, shown)
    peer, peer_facts = _lightgbm(feed, tested, python, trials, loaded.config.seed)
    rivals = {"lightgbm": peer, **baselines(loaded, material.data, shown, tested.examples)}
    names = [action.name for action in material.actions]
    measured = compare([loaded], material.data.items, tested, rivals)
    note_evaluation(run, measured)
    return {
        **measured,
        "ahead": _ahead(names, tested, peer),
        "lightgbm": peer_facts,
        "lines": {"train": int((~feed.validates).sum()), "validation": int(feed.validates.sum())},
        "seconds": round(time.monotonic() - began, 1),
        **facts(),
    }


def _feed(run: LoadedRun, material: Material, shown: Examples) -> RankerDataset:
    """Returns the examples that trained the ranker."""
    statistics = PointInTimeStatistics(
        material.data, columns_of_run(run), material.actions, shown, material.division.fit_end
    )
    table = torch.from_numpy(run.item_vectors)
    feed = read_ranker_dataset(statistics, shown, run.user_encoder, table, run.linear, run.config)
    assert feed is not None
    return feed


def _lightgbm(
    feed: RankerDataset, tested: ScoredExamples, python: Path, trials: int, seed: int
) -> tuple[Probabilities, dict[str, Any]]:
    """Returns LightGBM's probabilities for the test, and its version and settings."""
    # One matrix for both: live and slate features of the test are predicted together, and split again below.
    features, labels = feed.batch.features.numpy(), feed.batch.labels.numpy()
    parts = {"train": ~feed.validates, "validation": feed.validates}
    arrays: dict[str, Any] = {f"{name}_x": features[mask] for name, mask in parts.items()}
    arrays |= {f"{name}_y": labels[mask] for name, mask in parts.items()}
    test_x = np.concatenate([tested.live.features.numpy(), tested.slate.features.numpy()])
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in.npz", Path(folder) / "out.npz"
        # The labels of the test are not handed over.
        np.savez(source, test_x=test_x, trials=trials, seed=seed, **arrays)
        # A process of its own interpreter: Penchant does not depend on LightGBM.
        command = [str(python), str(_PEER), str(source), str(out)]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if run.returncode:
            raise TrainingError(f"{python} {_PEER.name} failed: it needs an interpreter with numpy and lightgbm")
        with np.load(out) as predictions:
            live, slate = np.split(predictions["chances"].astype(np.float64), 2)
            choices = json.loads(str(predictions["choices"]))
    return Probabilities(live, slate), {"version": run.stdout.split()[-1], "trials": trials, "choices": choices}


def _ahead(names: Sequence[str], tested: ScoredExamples, peer: Probabilities) -> dict[str, dict[str, float]]:
    """Returns Penchant's metrics minus LightGBM's, with intervals by drawing the same users for both."""
    labels, users, weights = tested.examples.labels(), tested.examples.users, tested.examples.unequal_weights
    margins: dict[str, dict[str, float]] = {}
    for action, name in enumerate(names):
        pair = tested.probabilities.of(action), peer.of(action)
        values, peer_values = (metric_values(labels[:, action], chances, users, weights) for chances in pair)
        draws, peer_draws = (resample_metrics(labels[:, action], chances, users, weights) for chances in pair)
        intervals = with_intervals(values - peer_values, draws - peer_draws)
        margins |= {f"{name}/{n}": value for n, value in intervals.items()}
    return margins
