"""A training run on disk, and how everything after training reads it back.

    RUN/config.json          TrainConfig
    RUN/model.safetensors    user encoder (`user.`) and item encoder (`item.`), best by validation
    RUN/query.safetensors    query encoder
    RUN/ranker.safetensors   ranker, its calibration folded in
    RUN/tables.safetensors   item vectors, popularity, item-to-item neighbours, by row
    RUN/vocabulary.arrow     item id <-> row
    RUN/result.json          what `penchant train` printed, and what a bundle must know
    RUN/evaluations.jsonl    every test evaluation ever made of this run
    RUN/log.jsonl            one line per validation
    RUN/checkpoint.safetensors   only while training: everything that an exact resume needs
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from features.tables import Dataset
    from features.vocabulary import Vocabulary
    from training.config import TrainConfig
    from training.encoders import ItemEncoder, QueryEncoder, UserEncoder
    from training.ranker import Ranker


class RunError(Exception):
    """A run directory is missing, unfinished or does not fit what is asked of it."""


@dataclass(frozen=True)
class LoadedRun:
    """A finished run: modules in eval mode on the CPU, tables by catalogue row.

    Attributes:
        item_vectors: float32 `[N, dim]`; rows follow `vocabulary`, which follows the data set's items table.
        popularity: float32 `[N]`, log1p of the row's events in the training part.
        recent_popularity: float32 `[N]`, log1p of its events in the last `recent_days` of the training part.
        trained: bool `[N]`, whether the row was seen in training (else its vector comes from content alone).
        neighbors: int32 `[N, K]` item-to-item, best first, -1 padded; `neighbor_scores` float32 beside it.
        result: `result.json`: run, seconds, tokens_per_second, best_validation, parameters, blend, data,
            data_fingerprint, feature_fingerprint, event_types, actions, action_weights, seen_types, ordered_only.
    """

    path: Path
    config: TrainConfig
    user_encoder: UserEncoder
    item_encoder: ItemEncoder
    query_encoder: QueryEncoder
    ranker: Ranker
    vocabulary: Vocabulary
    item_vectors: npt.NDArray[np.float32]
    popularity: npt.NDArray[np.float32]
    recent_popularity: npt.NDArray[np.float32]
    trained: npt.NDArray[np.bool_]
    neighbors: npt.NDArray[np.int32]
    neighbor_scores: npt.NDArray[np.float32]
    result: dict[str, Any]
    dataset: Dataset


def load_run(run: Path, data: Path | None = None) -> LoadedRun:
    """Reads a finished run; `data` replaces the data set's path when the data has moved.

    Raises:
        RunError: no finished run at `run`, or `data` is not the data set that it was trained on.
    """
    result_file = run / "result.json"
    if not result_file.is_file():
        raise RunError(f"{run} holds no finished run (result.json is missing): run `penchant train DATA --out {run}`")
    result = json.loads(result_file.read_text())
    raise RunError(f"{run}: format {result.get('format')} is not readable yet")
