"""Trains the ranker on impressions: what people did with what they were shown, replayed in the order of time.

Selection bias stays: only what some earlier policy showed has labels, so a probability means "if shown as things were
shown". The place in the slate is an input that serving fixes at the first, where the log knows places at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from training.config import TrainConfig
from training.data.impressions import Examples
from training.data.interactions import Interactions
from training.data.point_in_time import PointInTimeStatistics, example_features
from training.data.split import DAY_MS, Targets, cut_of
from training.metrics import log_loss, measure
from training.models.encoders import UserEncoder
from training.models.ranker import Ranker, level, platt
from training.models.scoring import user_vectors

BATCH = 256
LINES_AT_ONCE = 8192
FEWEST_LINES = 1000
"""With fewer impressions the ranker learns from retrieved candidates instead."""
STEADY = 30.0
"""Precision of the prior that holds the slope of the calibration at 1: few events cannot move it far."""
_WARM_UP = 0.1


@dataclass(frozen=True)
class RankerBatch:
    """Lines as the ranker reads them, on the CPU: users, items `[n, D]`, features `[n, F]`, labels `[n, A]`; float."""

    users: Tensor
    items: Tensor
    features: Tensor
    labels: Tensor

    def take(self, at: Tensor) -> RankerBatch:
        """Some of the lines."""
        return RankerBatch(self.users[at], self.items[at], self.features[at], self.labels[at])

    def __len__(self) -> int:
        """The number of lines."""
        return self.labels.shape[0]


@dataclass(frozen=True)
class RankerDataset:
    """The lines that train and validate, and what of them validates; bool [n]."""

    lines: Examples
    lesson: RankerBatch
    validates: npt.NDArray[np.bool_]


def read_ranker_dataset(
    teller: PointInTimeStatistics, shown: Examples, encoder: UserEncoder, table: Tensor, config: TrainConfig
) -> RankerDataset | None:
    """What the ranker may learn from, as it was known then; None where that is too little.

    Args:
        teller: Tells what was known at a moment; its columns hold the item vectors.
        shown: All impressions.
        encoder: Places people.
        table: All item vectors, on the encoder's device; float `[N, D]`.
        config: Which days train and which validate.
    """
    cut = cut_of(teller.data, config)
    early = shown.times[shown.times <= cut]
    if early.size < FEWEST_LINES:
        return None
    validation = cut - round(config.ranker_validation_days * DAY_MS)
    if not config.ranker_validation_days:
        validation = int(np.quantile(early, 0.9))
    first = validation - round(config.ranker_days * DAY_MS) if config.ranker_days else -1
    lines = shown.between(first, cut)
    users = example_users(encoder, table, teller.data, lines, config)
    features = example_features(teller, lines, users, every_hours=config.statistics_hours, last=cut)
    labels = lines.labels(cut)
    return RankerDataset(
        lines, ranker_batch(users, teller.columns.vectors[lines.rows], features, labels), lines.times > validation
    )


def ranker_batch(
    users: npt.NDArray[np.float32],
    items: npt.NDArray[np.float32],
    features: npt.NDArray[np.float32],
    labels: npt.NDArray[np.bool_],
) -> RankerBatch:
    """Arrays as tensors."""
    return RankerBatch(*(torch.from_numpy(array) for array in (users, items, features, labels.astype(np.float32))))


def example_users(
    encoder: UserEncoder, table: Tensor, data: Interactions, lines: Examples, config: TrainConfig
) -> npt.NDArray[np.float32]:
    """The person's vector just before each line, zeros for somebody without a history; float32 [n, D]."""
    users = np.zeros((len(lines), table.shape[1]), np.float32)
    known = np.flatnonzero(lines.positions > 0)
    targets = Targets(lines.users[known], lines.positions[known])
    users[known] = user_vectors(encoder.eval(), table, data, targets, config.max_length)
    return users


def fit_on_impressions(ranker: Ranker, feed: RankerDataset, config: TrainConfig) -> dict[str, Any]:
    """Trains the ranker in place: validation says how long and how surely, then all lines train it anew.

    Validation tells how steep the logits should be, but not how high: one day's rate of an action says less of the next
    day's than the rate of all days, which is what the mean of the probabilities becomes.

    Returns:
        `epochs`, `lines`, and `validation` {action number: {auc, gauc, log_loss, ece, base_log_loss}} of the ranker
        that validation has not trained.
    """
    trains, validates = (torch.from_numpy(np.flatnonzero(mask)) for mask in (~feed.validates, feed.validates))
    start = {name: value.clone() for name, value in ranker.state_dict().items()}
    train, held = feed.lesson.take(trains), feed.lesson.take(validates)
    epochs, best = _pass(ranker, train, config, config.ranker_epochs, held)
    ranker.load_state_dict(best)
    logits = logits_of(ranker, held)
    slopes = [platt(logits[:, a], held.labels[:, a], steady=STEADY)[0] for a in range(logits.shape[1])]
    report = _report(logits, held, train, feed.lines.users[feed.validates])
    ranker.load_state_dict(start)
    _pass(ranker, feed.lesson, config, epochs, None)
    # Half an event more of both kinds, for what nobody has done yet may still be done.
    rates = (feed.lesson.labels.sum(0) + 0.5) / (len(feed.lesson) + 1)
    for action, own in enumerate(logits_of(ranker, feed.lesson).T):
        ranker.recalibrate(action, slopes[action], level(slopes[action] * own, float(rates[action])))
    return {"epochs": epochs, "lines": len(feed.lesson), "validation": report}


@torch.no_grad()
def logits_of(ranker: Ranker, lesson: RankerBatch) -> Tensor:
    """The ranker's logits of each line; float `[n, A]`."""
    ranker.eval()
    parts = [lesson.take(some) for some in torch.arange(len(lesson)).split(LINES_AT_ONCE)]  # type: ignore[no-untyped-call]
    # As one person with many candidates, but each line with its own user.
    return torch.cat([ranker(part.users, part.items, part.features) for part in parts])


def _pass(
    ranker: Ranker, lesson: RankerBatch, config: TrainConfig, epochs: int, held: RankerBatch | None
) -> tuple[int, dict[str, Tensor]]:
    """Trains for some epochs of a schedule of `ranker_epochs`; the best number of them on `held`, and its weights."""
    torch.manual_seed(config.seed)
    with torch.no_grad():
        ranker.standardise(lesson.features)
        ranker.scale.zero_()
        ranker.bias.copy_(torch.logit(lesson.labels.mean(0).clamp(1e-4, 1 - 1e-4)))
    optimizer = torch.optim.AdamW(
        ranker.parameters(), lr=config.ranker_rate, weight_decay=config.ranker_decay, fused=True
    )
    steps = max(1, len(lesson) // BATCH)
    best, kept, chosen = float("inf"), {}, epochs
    for epoch in range(epochs):
        ranker.train()
        for step, some in enumerate(torch.randperm(len(lesson))[: steps * BATCH].split(BATCH)):  # type: ignore[no-untyped-call]
            done = (epoch * steps + step) / (config.ranker_epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = config.ranker_rate * min(1.0, (done + 1e-3) / _WARM_UP, (1 - done) / (1 - _WARM_UP))
            optimizer.zero_grad(set_to_none=True)
            _loss(ranker, lesson.take(some)).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(ranker.parameters(), 1.0)
            optimizer.step()
        if held is not None:
            loss = float(functional.binary_cross_entropy_with_logits(logits_of(ranker, held), held.labels))
            if loss < best:
                best, chosen = loss, epoch + 1
                kept = {name: value.clone() for name, value in ranker.state_dict().items()}
    ranker.eval()
    return chosen, kept


def _loss(ranker: Ranker, some: RankerBatch) -> Tensor:
    """Binary cross-entropy of every member by itself: members that differ are worth more together."""
    logits = ranker.each(some.users, some.items, some.features)
    labels = some.labels.expand_as(logits)
    return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean((0, 1)).sum()


def _report(
    logits: Tensor, held: RankerBatch, train: RankerBatch, people: npt.NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    found = {}
    for action in range(logits.shape[1]):
        labels = held.labels[:, action].numpy() > 0
        chances = torch.sigmoid(logits[:, action]).double().numpy()
        base = np.full(labels.size, float(train.labels[:, action].mean()))
        found[str(action)] = measure(labels, chances, people) | {"base_log_loss": log_loss(labels, base)}
    return found
