"""`penchant bench impressions`: the ranker on a feed's last day, beside plain rates and LightGBM on its features."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.report import facts
from features.errors import TrainingError
from training.evaluate import columns_of_run
from training.evaluate_tables import Tested, baselines, judge, read_shown, test
from training.feed import Feed, read_feed
from training.machine import exact, prepared
from training.metrics import Floats, auc, log_loss, measure
from training.run import LoadedRun, load_run
from training.split import cut_of
from training.statistics import Teller
from training.train import read_material

TRIALS = 30
_PEER = Path(__file__).parent / "peers" / "lightgbm_ranker.py"
_RESAMPLES = 200


def impressions(run: Path, python: Path, *, trials: int = TRIALS, data: Path | None = None) -> dict[str, Any]:
    """Measures a run on the impressions after its cut.

    LightGBM gets the very matrix that the ranker reads, is tuned on the validation day by random search, and is trained
    on the same lines.

    Args:
        run: A run with `protocol: temporal` whose ranker learned from impressions.
        python: An interpreter that has lightgbm.
        trials: Sets of settings that are tried for each action.
        data: The data set, where it has moved.

    Returns:
        `actions` {name: {positives, penchant, lightgbm and plain rates {metric: value}, ahead_of_lightgbm {auc,
        log_loss: interval}}},
        `lightgbm` {version, trials, choices}, `lines`, `seconds`.

    Raises:
        TrainingError: The run did not learn from impressions, or LightGBM failed.
    """
    began = time.monotonic()
    loaded = load_run(run, data)
    if loaded.result["ranker_source"] != "impressions":
        raise TrainingError(f"{run}: its ranker did not learn from impressions, so there is nothing to compare")
    with prepared(loaded.config.threads), exact():
        feed, tested, plain = _read(loaded, Path(data or loaded.result["data"]))
    chances, peer = _lightgbm(feed, tested, python, trials, loaded.config.seed)
    judged = {"lightgbm": chances, **plain}
    names = [action["name"] for action in loaded.result["actions"]]
    return {
        "run": str(run),
        "actions": {name: _compared(number, tested, judged) for number, name in enumerate(names)},
        "lightgbm": peer,
        "lines": {"train": int((~feed.validates).sum()), "validation": int(feed.validates.sum())}
        | {"test": len(tested.lines), "people": int(np.unique(tested.lines.people).size)},
        "seconds": round(time.monotonic() - began, 1),
        **facts(),
    }


def _read(run: LoadedRun, path: Path) -> tuple[Feed, Tested, dict[str, Floats]]:
    """What trained the ranker, what tests it, and what plain rates say of the test."""
    material = read_material(run.dataset, run.config, torch.device("cpu"))
    actions, events, config = material.actions, material.data, run.config
    shown = read_shown(path, material)
    assert shown is not None
    teller = Teller(events, columns_of_run(run), actions, shown, material.division.fit_end)
    feed = read_feed(teller, shown, run.user_encoder, torch.from_numpy(run.item_vectors), config)
    assert feed is not None
    cut = cut_of(events, config)
    with torch.inference_mode():
        tested = test([run], events, shown)
    return feed, tested, baselines(run, events, shown.between(-1, cut).labels(cut), tested.lines)


def _lightgbm(feed: Feed, tested: Tested, python: Path, trials: int, seed: int) -> tuple[Floats, dict[str, Any]]:
    features, labels = feed.lesson.features.numpy(), feed.lesson.labels.numpy()
    parts = {"train": ~feed.validates, "validation": feed.validates}
    given: dict[str, Any] = {f"{name}_x": features[mask] for name, mask in parts.items()}
    given |= {f"{name}_y": labels[mask] for name, mask in parts.items()}
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(source, test_x=tested.lesson.features.numpy(), trials=trials, seed=seed, **given)
        command = [str(python), str(_PEER), str(source), str(out)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise TrainingError(f"{python} {_PEER.name} failed: it needs an interpreter with numpy and lightgbm")
        answer = np.load(out)
        said = {"version": done.stdout.split()[-1], "trials": trials, "choices": json.loads(str(answer["choices"]))}
        return answer["chances"].astype(np.float64), said


def _compared(number: int, tested: Tested, others: dict[str, Floats]) -> dict[str, Any]:
    """One action: every scorer's figures, and how far the ranker is ahead of LightGBM."""
    people, labels = tested.lines.people, tested.lines.labels()[:, number]
    mine, theirs = tested.probabilities[:, number], others["lightgbm"][:, number]
    return {
        "positives": int(labels.sum()),
        "penchant": judge(labels, mine, people),
        **{name: measure(labels, chances[:, number], people) for name, chances in others.items()},
        "ahead_of_lightgbm": _ahead(labels, mine, theirs, people),
    }


def _ahead(
    labels: npt.NDArray[np.bool_], mine: Floats, theirs: Floats, people: npt.NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    """AUC and log loss of ours minus theirs, with intervals by drawing people."""

    def difference(some: npt.NDArray[np.int64]) -> list[float]:
        y = labels[some]
        return [auc(y, mine[some]) - auc(y, theirs[some]), log_loss(y, mine[some]) - log_loss(y, theirs[some])]

    rng = np.random.default_rng(0)
    order = np.argsort(people, kind="stable")
    _, sizes = np.unique(people, return_counts=True)
    each = np.split(order, np.cumsum(sizes)[:-1])
    drawn = [
        difference(np.concatenate([each[at] for at in rng.integers(0, len(each), len(each))]))
        for _ in range(_RESAMPLES)
    ]
    low, high = np.nanquantile(np.array(drawn), [0.025, 0.975], axis=0)
    whole = difference(np.arange(labels.size))
    return {
        name: {"mean": whole[i], "low": float(low[i]), "high": float(high[i])}
        for i, name in enumerate(("auc", "log_loss"))
    }
