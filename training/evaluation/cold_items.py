"""Measures how well content alone places items that nobody was trained on.

A run trained with `cold_item_share` has never met some of the items: not in a history, not as a target, not as a
negative, not in a count. Here their events become targets, each predicted from the events before it that the run may
know, and ranked among the whole catalogue, where the other items compete with all that their own history taught.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from features.errors import LeakError, TrainingError
from training.data.clock import newest_of, report_future_events
from training.data.interactions import Interactions, draw_cold_items, read_interactions
from training.data.split import Targets, TestProtocol, held_out, split
from training.metrics import hit, interval, ndcg
from training.models.scoring import mask_seen, ranks_of, seen_before, slices, user_vectors
from training.run import LoadedRun, admit_run, load_run
from training.runtime import exact, prepared

NEAR = 50
"""How far down a cold item may stand and still be found."""
_METRICS: Mapping[str, Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]] = {
    "recall@10": lambda ranks: hit(ranks, 10),
    f"recall@{NEAR}": lambda ranks: hit(ranks, NEAR),
    "ndcg@10": lambda ranks: ndcg(ranks, 10),
}


@dataclass(frozen=True)
class Asked:
    """Targets among what a run may know, the items that were right, and what the run may know."""

    visible: Interactions
    targets: Targets
    rows: npt.NDArray[np.int32]


def evaluate_cold_items(runs: Sequence[Path], data: Path | None = None) -> dict[str, Any]:
    """How often a hidden item stands among the first 50 of the catalogue for a person who then chose it.

    Each run hides the items that its seed drew; their targets are pooled.

    Returns:
        `metrics` {`recall@10`, `recall@50`, `ndcg@10`: {mean, low, high}} of the hidden items, `by_seed`, `warm` (the
        same of the items that were trained on, on their held-out events), `chance` (recall@50 of a random order:
        50 / items), `over_chance`; `protocol`, `runs`, `seeds`, `users`, `targets`, `warm_targets`, `items`, `hidden`.

    Raises:
        LeakError: A run held nothing out.
        TrainingError: A run hid no item, its items say nothing of themselves, or no hidden item was chosen later.
    """
    loaded = [load_run(run, data) for run in runs]
    for run in loaded:
        _refuse(run)
    left_out = admit_run(loaded[0])
    asked = [cold_targets(run) for run in loaded]
    if not all(len(one.targets) for one in asked):
        raise TrainingError(
            "nobody chose a hidden item after the training part: hide more with --set cold_item_share=0.1"
        )
    known = [warm_targets(run, one.visible) for run, one in zip(loaded, asked, strict=True)]
    with prepared(loaded[0].config.threads), exact(), torch.inference_mode():
        cold = [_ranks(run, one) for run, one in zip(loaded, asked, strict=True)]
        warm = [_ranks(run, one) for run, one in zip(loaded, known, strict=True)]
    items = asked[0].visible.items
    metrics = _pooled(cold, asked)
    chance = NEAR / items
    return {
        "protocol": "cold-items",
        "runs": [str(run.path) for run in loaded],
        "seeds": [run.config.seed for run in loaded],
        "users": int(np.unique(np.concatenate([one.targets.users for one in asked])).size),
        "targets": sum(len(one.targets) for one in asked),
        "warm_targets": sum(len(one.targets) for one in known),
        "items": items,
        "hidden": [int(draw_cold_items(items, run.config).sum()) for run in loaded],
        "metrics": metrics,
        "by_seed": {name: [float(of(ranks).mean()) for ranks in cold] for name, of in _METRICS.items()},
        "warm": _pooled(warm, known),
        "chance": chance,
        "over_chance": metrics[f"recall@{NEAR}"]["mean"] / chance,
        "baselines": {},
        **left_out,
        **report_future_events(asked[0].visible),
    }


def cold_targets(run: LoadedRun) -> Asked:
    """The events of hidden items after all that the run was trained and validated on."""
    config = run.config
    visible = read_interactions(run.dataset, run.vocabulary, config)
    whole = read_interactions(run.dataset, run.vocabulary, config.model_copy(update={"cold_item_share": 0.0}))
    hidden, owner = draw_cold_items(whole.items, config)[whole.rows], whole.owner()
    before = np.cumsum(~hidden) - ~hidden - visible.offsets[owner]
    ends = split(visible, config).fit_end
    chosen = hidden & whole.target & (before > 0) & (before >= ends[owner])
    if config.protocol == "temporal":
        chosen &= whole.timestamps > newest_of(visible, ends)
    at = np.flatnonzero(chosen)
    return Asked(visible, Targets(owner[at], before[at]), whole.rows[at])


def warm_targets(run: LoadedRun, visible: Interactions) -> Asked:
    """The held-out events of items that the run was trained on."""
    protocol: TestProtocol = "leave-one-out" if run.config.protocol == "leave-one-out" else "temporal-successive"
    targets = held_out(visible, run.config, protocol)
    targets = targets.take(np.flatnonzero(run.trained[targets.rows(visible)]))
    return Asked(visible, targets, targets.rows(visible))


def _refuse(run: LoadedRun) -> None:
    if run.config.protocol == "none":
        raise LeakError(f"{run.path} was trained on everything: train with --set protocol=leave-one-out")
    if not run.config.cold_item_share:
        raise TrainingError(f"{run.path} hid no item from its training: train with --set cold_item_share=0.1")
    if not run.result["content"]:
        raise TrainingError(f"{run.path} learned nothing from what items say of themselves, so it cannot place them")


def _ranks(run: LoadedRun, asked: Asked) -> npt.NDArray[np.int64]:
    """Where relevance puts each right item in the whole catalogue, what the person had masked; int64 `[n]`."""
    table = torch.from_numpy(run.item_vectors)
    users = user_vectors(run.user_encoder, table, asked.visible, asked.targets, run.config.max_length)
    ranks = np.empty(asked.rows.size, np.int64)
    for part in slices(asked.rows.size):
        scores = users[part] @ run.item_vectors.T
        if not run.config.repeats:
            mask_seen(scores, seen_before(asked.visible, asked.targets.take(np.arange(part.start, part.stop))))
        ranks[part] = ranks_of(scores, asked.rows[part])
    return ranks


def _pooled(ranks: Sequence[npt.NDArray[np.int64]], asked: Sequence[Asked]) -> dict[str, dict[str, float]]:
    people, places = np.concatenate([one.targets.users for one in asked]), np.concatenate(ranks)
    return {name: interval(of(places), people) for name, of in _METRICS.items()}
