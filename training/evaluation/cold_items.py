"""Measures how well content alone places items that training has never seen.

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
from training.models.scoring import mask_seen, rank_slices, ranks_of, seen_before, user_vectors
from training.run import LoadedRun, admit_run, load_runs
from training.runtime import exact, prepared

NEAR = 50
"""Deepest place at which a cold item still counts as recalled."""
_METRICS: Mapping[str, Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]] = {
    "recall@10": lambda ranks: hit(ranks, 10),
    f"recall@{NEAR}": lambda ranks: hit(ranks, NEAR),
    "ndcg@10": lambda ranks: ndcg(ranks, 10),
}


@dataclass(frozen=True)
class KnownTargets:
    """Targets, their items, and the events that a run may know: positions count those events alone."""

    events: Interactions
    targets: Targets
    rows: npt.NDArray[np.int32]


def evaluate_cold_items(runs: Sequence[Path], data: Path | None = None) -> dict[str, Any]:
    """Measures how often a cold item stands among the first 50 of the catalogue for a user who then chose it.

    Each run holds out the items that its seed drew; their targets are pooled.

    Returns:
        `metrics` {`recall@10`, `recall@50`, `ndcg@10`: {mean, low, high}} of the cold items, `by_seed`, `warm` (the
        same of the items that were trained on, on their held-out events), `chance` (recall@50 of a random order:
        50 / items), `over_chance`; `protocol`, `runs`, `seeds`, `users`, `targets`, `warm_targets`, `items`,
        `cold_items`.

    Raises:
        LeakError: A run held no event out.
        TrainingError: A run has no cold item, its items have no content, or no cold item was chosen later.
    """
    loaded = load_runs(runs, data)
    for run in loaded:
        _refuse_unfit(run)
    left_out = admit_run(loaded[0])
    cold = [cold_targets(run) for run in loaded]
    if not all(len(of_run.targets) for of_run in cold):
        raise TrainingError(
            "no user chose a cold item after the training part: hold out more with --set cold_item_share=0.1"
        )
    warm = [warm_targets(run, of_run.events) for run, of_run in zip(loaded, cold, strict=True)]
    with prepared(loaded[0].config.threads), exact(), torch.inference_mode():
        cold_ranks = [_ranks(run, of_run) for run, of_run in zip(loaded, cold, strict=True)]
        warm_ranks = [_ranks(run, of_run) for run, of_run in zip(loaded, warm, strict=True)]
    items = cold[0].events.items
    metrics = _pooled(cold_ranks, cold)
    # Masking the items that a user had raises the chance of a random order a little; that is left out.
    chance = NEAR / items
    return {
        "protocol": "cold-items",
        "runs": [str(run.path) for run in loaded],
        "seeds": [run.config.seed for run in loaded],
        "users": int(np.unique(np.concatenate([of_run.targets.users for of_run in cold])).size),
        "targets": sum(len(of_run.targets) for of_run in cold),
        "warm_targets": sum(len(of_run.targets) for of_run in warm),
        "items": items,
        "cold_items": [int(draw_cold_items(items, run.config).sum()) for run in loaded],
        "metrics": metrics,
        "by_seed": {name: [float(of(ranks).mean()) for ranks in cold_ranks] for name, of in _METRICS.items()},
        "warm": _pooled(warm_ranks, warm),
        "chance": chance,
        "over_chance": metrics[f"recall@{NEAR}"]["mean"] / chance,
        "baselines": {},
        **left_out,
        **report_future_events(cold[0].events),
    }


def cold_targets(run: LoadedRun) -> KnownTargets:
    """Returns the events of cold items after all events that the run was trained and validated on."""
    config = run.config
    events = read_interactions(run.dataset, run.vocabulary, config)
    whole = read_interactions(run.dataset, run.vocabulary, config.model_copy(update={"cold_item_share": 0.0}))
    is_cold, owner = draw_cold_items(whole.items, config)[whole.rows], whole.owner()
    # Positions among the events that the run may know: the user encoder must not read another cold item either.
    position = np.cumsum(~is_cold) - ~is_cold - events.offsets[owner]
    ends = split(events, config).fit_end
    is_target = is_cold & whole.target & (position > 0) & (position >= ends[owner])
    # By position alone, an event may be later than its user's others and earlier than the end of training.
    if config.protocol == "temporal":
        is_target &= whole.timestamps > newest_of(events, ends)
    at = np.flatnonzero(is_target)
    return KnownTargets(events, Targets(owner[at], position[at]), whole.rows[at])


def warm_targets(run: LoadedRun, events: Interactions) -> KnownTargets:
    """Returns the held-out events of items that the run was trained on."""
    protocol: TestProtocol = "leave-one-out" if run.config.protocol == "leave-one-out" else "temporal-successive"
    targets = held_out(events, run.config, protocol)
    targets = targets.take(np.flatnonzero(run.trained[targets.rows(events)]))
    return KnownTargets(events, targets, targets.rows(events))


def _refuse_unfit(run: LoadedRun) -> None:
    if run.config.protocol == "none":
        raise LeakError(f"{run.path} was trained on all events: train with --set protocol=leave-one-out")
    if not run.config.cold_item_share:
        raise TrainingError(f"{run.path} held no item out of its training: train with --set cold_item_share=0.1")
    if not run.result["content"]:
        raise TrainingError(
            f"{run.path} was trained without content, so it cannot place new items: use a data set whose items have "
            "titles or categories, and content=true"
        )


def _ranks(run: LoadedRun, measured: KnownTargets) -> npt.NDArray[np.int64]:
    """Ranks each target's item in the whole catalogue by relevance; the items that the user had are masked."""
    table = torch.from_numpy(run.item_vectors)
    users = user_vectors(run.user_encoder, table, measured.events, measured.targets, run.config.max_length)
    ranks = np.empty(measured.rows.size, np.int64)
    for part in rank_slices(measured.rows.size, measured.events.items):
        scores = users[part] @ run.item_vectors.T
        if not run.config.repeats:
            mask_seen(scores, seen_before(measured.events, measured.targets.take(np.arange(part.start, part.stop))))
        ranks[part] = ranks_of(scores, measured.rows[part])
    return ranks


def _pooled(ranks: Sequence[npt.NDArray[np.int64]], measured: Sequence[KnownTargets]) -> dict[str, dict[str, float]]:
    users, places = np.concatenate([of_run.targets.users for of_run in measured]), np.concatenate(ranks)
    return {name: interval(of(places), users) for name, of in _METRICS.items()}
