"""LightGBM on the ranker's own features, run by an interpreter that has it: `lightgbm_ranker.py IN.npz OUT.npz`.

IN holds `train_x`, `train_y`, `validation_x`, `validation_y`, `test_x`, `trials` and `seed`; the labels of the test
stay with the caller. For each action a random search over so many trials looks for the lowest log loss on validation,
with early stopping; the best one is trained again on training and validation. OUT holds `chances` [n, A], `trials`
[A, T] (log loss on validation) and `choices` (JSON, per action). Needs numpy and lightgbm and nothing of Penchant.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import sys
from typing import Any

import lightgbm as lgb
import numpy as np

ROUNDS, PATIENCE = 800, 30


def draw(rng: np.random.Generator) -> dict[str, Any]:
    """Returns a random set of settings."""
    return {
        "learning_rate": float(np.exp(rng.uniform(np.log(0.02), np.log(0.12)))),
        "num_leaves": int(np.exp(rng.uniform(np.log(4), np.log(96)))),
        "min_data_in_leaf": int(np.exp(rng.uniform(np.log(20), np.log(500)))),
        "feature_fraction": float(rng.uniform(0.2, 1.0)),
        "bagging_fraction": float(rng.uniform(0.5, 1.0)),
        "bagging_freq": 1,
        "lambda_l1": float(np.exp(rng.uniform(np.log(1e-3), np.log(10)))),
        "lambda_l2": float(np.exp(rng.uniform(np.log(1e-2), np.log(100)))),
        "min_gain_to_split": float(rng.choice([0.0, 0.01, 0.1])),
        "path_smooth": float(rng.choice([0.0, 1.0, 10.0])),
    }


def main(source: str, out: str) -> None:
    """Tunes, trains and predicts."""
    arrays = np.load(source)
    # The bins hold for every trial only if no trial's settings leave features out of them.
    binned = {"verbose": -1, "seed": int(arrays["seed"]), "feature_pre_filter": False}
    fixed = binned | {"objective": "binary", "deterministic": True, "force_col_wise": True}
    chances, losses, choices = [], [], []
    for action in range(arrays["train_y"].shape[1]):
        # Each action draws its own settings: the best for clicks are not the best for likes.
        rng = np.random.default_rng([int(arrays["seed"]), action])
        train_y, validation_y = arrays["train_y"][:, action], arrays["validation_y"][:, action]
        best: tuple[float, int, dict[str, Any]] | None = None
        tried = []
        train = lgb.Dataset(arrays["train_x"], train_y, params=binned)
        validation = lgb.Dataset(arrays["validation_x"], validation_y, reference=train)
        for trial in range(int(arrays["trials"])):
            settings = draw(rng)
            stop = lgb.early_stopping(PATIENCE, verbose=False)
            model = lgb.train(settings | fixed, train, ROUNDS, [validation], callbacks=[stop])
            loss = float(model.best_score["valid_0"]["binary_logloss"])
            tried.append(loss)
            if best is None or loss < best[0]:
                best = (loss, model.best_iteration, settings)
            print(f"action {action} trial {trial} log loss {loss:.5f} best {best[0]:.5f}", file=sys.stderr, flush=True)
        assert best is not None
        # The neural ranker is trained on both parts in the end, and so is this one.
        x, y = (np.concatenate([arrays[f"train_{part}"], arrays[f"validation_{part}"]]) for part in "xy")
        model = lgb.train(best[2] | fixed, lgb.Dataset(x, y[:, action], params=binned), best[1])
        chances.append(model.predict(arrays["test_x"]))
        losses.append(tried)
        choices.append({"log_loss": best[0], "rounds": best[1], **best[2]})
    np.savez(out, chances=np.stack(chances, 1), trials=np.array(losses), choices=json.dumps(choices))
    print(lgb.__version__)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
