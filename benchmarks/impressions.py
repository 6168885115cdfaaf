"""`penchant bench impressions`: the ranker on a feed's last day, beside plain rates and LightGBM on its features."""

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
    on the same lines.

    Args:
        run: A run with `protocol: temporal` whose ranker learned from impressions.
        python: An interpreter that has lightgbm.
        trials: Sets of settings that are tried for each action.
        data: The data set, where it has moved.

    Returns:
        What `evaluate --protocol impressions` answers, `lightgbm` among its baselines; `ahead` {`ACTION/METRIC`: ours
        minus LightGBM's, {mean, low, high}}; `lightgbm` {version, trials, choices}, `lines`, `seconds`.

    Raises:
        TrainingError: The run did not learn from impressions, or LightGBM failed.
        SettingsError: There is no such interpreter.
    """
    began = time.monotonic()
    if not python.exists():
        raise SettingsError(f"{python} is missing: make it as benchmarks/peers/lightgbm.txt says")
    loaded = load_run(run, data)
    if loaded.result["ranker_source"] != "impressions":
        raise TrainingError(f"{run}: its ranker did not learn from impressions, so there is nothing to compare")
    material, shown = read_test_material([loaded], data)
    with prepared(loaded.config.threads), exact(), torch.inference_mode():
        feed = _feed(loaded, material, shown)
        tested = predict_test([loaded], material.data, shown)
    peer, said = _lightgbm(feed, tested, python, trials, loaded.config.seed)
    beside = {"lightgbm": peer, **baselines(loaded, material.data, shown, tested.examples)}
    names = [action.name for action in material.actions]
    measured = compare([loaded], material.data.items, tested, beside)
    note_evaluation(run, measured)
    return {
        **measured,
        "ahead": _ahead(names, tested, peer),
        "lightgbm": said,
        "lines": {"train": int((~feed.validates).sum()), "validation": int(feed.validates.sum())},
        "seconds": round(time.monotonic() - began, 1),
        **facts(),
    }


def _feed(run: LoadedRun, material: Material, shown: Examples) -> RankerDataset:
    """What trained the ranker."""
    teller = PointInTimeStatistics(
        material.data, columns_of_run(run), material.actions, shown, material.division.fit_end
    )
    feed = read_ranker_dataset(teller, shown, run.user_encoder, torch.from_numpy(run.item_vectors), run.config)
    assert feed is not None
    return feed


def _lightgbm(
    feed: RankerDataset, tested: ScoredExamples, python: Path, trials: int, seed: int
) -> tuple[Probabilities, dict[str, Any]]:
    """What LightGBM says of the test, and how it was made."""
    features, labels = feed.lesson.features.numpy(), feed.lesson.labels.numpy()
    parts = {"train": ~feed.validates, "validation": feed.validates}
    given: dict[str, Any] = {f"{name}_x": features[mask] for name, mask in parts.items()}
    given |= {f"{name}_y": labels[mask] for name, mask in parts.items()}
    asked = np.concatenate([tested.live.features.numpy(), tested.slate.features.numpy()])
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(source, test_x=asked, trials=trials, seed=seed, **given)
        command = [str(python), str(_PEER), str(source), str(out)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise TrainingError(f"{python} {_PEER.name} failed: it needs an interpreter with numpy and lightgbm")
        with np.load(out) as answer:
            live, slate = np.split(answer["chances"].astype(np.float64), 2)
            said = {"version": done.stdout.split()[-1], "trials": trials, "choices": json.loads(str(answer["choices"]))}
    return Probabilities(live, slate), said


def _ahead(names: Sequence[str], tested: ScoredExamples, peer: Probabilities) -> dict[str, dict[str, float]]:
    """Every metric of ours minus LightGBM's, with intervals by drawing the same people for both."""
    labels, people = tested.examples.labels(), tested.examples.users
    found: dict[str, dict[str, float]] = {}
    for action, name in enumerate(names):
        both = tested.probabilities.of(action), peer.of(action)
        mine, theirs = (metric_values(labels[:, action], probabilities, people) for probabilities in both)
        my_draws, their_draws = (resample_metrics(labels[:, action], probabilities, people) for probabilities in both)
        found |= {f"{name}/{n}": value for n, value in with_intervals(mine - theirs, my_draws - their_draws).items()}
    return found
