"""Trains the ranker on impressions: the actions of users on the items shown to them, replayed in the order of time.

Selection bias stays: only what some earlier policy showed has labels, so a probability means "if shown as things were
shown". The place in the slate is an input that serving fixes at the first, where the log knows places at all.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from features.errors import TrainingError
from features.linear import LinearTerm
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
EXAMPLES_AT_ONCE = 8192
FEWEST_EXAMPLES = 1000
"""With fewer impressions the ranker learns from retrieved candidates instead."""
STEADY = 30.0
"""Precision of the prior that holds the slope of the calibration at 1: few events cannot move it far."""
_WARM_UP = 0.1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankerBatch:
    """Examples as the ranker reads them, on a CPU: users, items `[n, D]`, features `[n, F]`, labels `[n, A]`; float."""

    users: Tensor
    items: Tensor
    features: Tensor
    labels: Tensor

    def take(self, at: Tensor) -> RankerBatch:
        """Returns some of the examples."""
        return RankerBatch(self.users[at], self.items[at], self.features[at], self.labels[at])

    def __len__(self) -> int:
        """The number of examples."""
        return self.labels.shape[0]


@dataclass(frozen=True)
class RankerDataset:
    """The examples that train and validate; `validates` is True for the latter, bool [n]."""

    examples: Examples
    batch: RankerBatch
    validates: npt.NDArray[np.bool_]


def read_ranker_dataset(
    statistics: PointInTimeStatistics,
    impressions: Examples,
    encoder: UserEncoder,
    table: Tensor,
    linear: LinearTerm,
    config: TrainConfig,
) -> RankerDataset | None:
    """Reads the examples before the test, each with the features of its time; None if too few train or validate.

    Args:
        statistics: The statistics at any moment; their columns hold the item vectors.
        impressions: All impressions.
        encoder: Computes the users' vectors.
        table: All item vectors, on the encoder's device; float `[N, D]`.
        linear: The linear part of relevance.
        config: The days that train and those that validate.
    """
    cut = cut_of(statistics.data, config)
    early = impressions.times[impressions.times <= cut]
    if early.size < FEWEST_EXAMPLES:
        return None
    validation = _validation_moment(early, cut, config)
    first = validation - round(config.ranker_days * DAY_MS) if config.ranker_days else -1
    examples = impressions.between(first, cut)
    validates = examples.times > validation
    if validates.all() or not validates.any():
        _log.warning(
            "no impression lies in the days that %s the ranker, so it learns from retrieved candidates instead: see "
            "ranker_days and ranker_validation_days",
            "train" if validates.any() else "validate",
        )
        return None
    users = example_users(encoder, table, statistics.data, examples, config)
    features = example_features(statistics, examples, users, linear, every_hours=config.statistics_hours, last=cut)
    # An action after the cut is a test's, even if it follows an impression before it.
    labels = examples.labels(cut)
    batch = ranker_batch(users, statistics.columns.vectors[examples.rows], features, labels)
    return RankerDataset(examples, batch, validates)


def _validation_moment(early: npt.NDArray[np.int64], cut: int, config: TrainConfig) -> int:
    """Returns the moment, ms, after which the examples before the cut validate."""
    if config.ranker_validation_days:
        return cut - round(config.ranker_validation_days * DAY_MS)
    # Where times are whole days, more than a tenth may have the newest time: then all of these validate.
    return min(int(np.quantile(early, 0.9)), int(early.max()) - 1)


def ranker_batch(
    users: npt.NDArray[np.float32],
    items: npt.NDArray[np.float32],
    features: npt.NDArray[np.float32],
    labels: npt.NDArray[np.bool_],
) -> RankerBatch:
    """Returns arrays as tensors."""
    return RankerBatch(*(torch.from_numpy(array) for array in (users, items, features, labels.astype(np.float32))))


def example_users(
    encoder: UserEncoder, table: Tensor, data: Interactions, examples: Examples, config: TrainConfig
) -> npt.NDArray[np.float32]:
    """Returns the user's vector just before each example, zeros for a user without a history; float32 [n, D]."""
    users = np.zeros((len(examples), table.shape[1]), np.float32)
    with_history = np.flatnonzero(examples.positions > 0)
    targets = Targets(examples.users[with_history], examples.positions[with_history])
    users[with_history] = user_vectors(encoder.eval(), table, data, targets, config.max_length)
    return users


def fit_on_impressions(ranker: Ranker, dataset: RankerDataset, config: TrainConfig) -> dict[str, Any]:
    """Trains the ranker in place: validation chooses epochs and slope, then all examples train it from the start.

    Validation tells how steep the logits should be, but not how high: one day's rate of an action predicts the next
    day's less well than the rate of all days, which the mean of the probabilities is set to.

    Returns:
        `epochs`, `lines` (the number of examples), and `validation` {action number: {auc, gauc, log_loss, ece,
        base_log_loss}} of the ranker that validation has not trained.
    """
    # The newest days train too in the end: in service, the next day is most like them.
    trains, validates = (torch.from_numpy(np.flatnonzero(mask)) for mask in (~dataset.validates, dataset.validates))
    start = {name: value.clone() for name, value in ranker.state_dict().items()}
    train, validation = dataset.batch.take(trains), dataset.batch.take(validates)
    epochs, best = _train_epochs(ranker, train, config, config.ranker_epochs, validation)
    ranker.load_state_dict(best)
    logits = logits_of(ranker, validation)
    slopes = [platt(logits[:, a], validation.labels[:, a], steady=STEADY)[0] for a in range(logits.shape[1])]
    report = _report(logits, validation, train, dataset.examples.users[dataset.validates])
    ranker.load_state_dict(start)
    _train_epochs(ranker, dataset.batch, config, epochs, None)
    # Half an event more of either outcome: an action that has not happened yet still may, and must keep a logit.
    rates = (dataset.batch.labels.sum(0) + 0.5) / (len(dataset.batch) + 1)
    for action, of_action in enumerate(logits_of(ranker, dataset.batch).T):
        ranker.recalibrate(action, slopes[action], level(slopes[action] * of_action, float(rates[action])))
    return {"epochs": epochs, "lines": len(dataset.batch), "validation": report}


@torch.no_grad()
def logits_of(ranker: Ranker, batch: RankerBatch) -> Tensor:
    """Returns the ranker's logits of each example; float `[n, A]`."""
    ranker.eval()
    parts = [batch.take(at) for at in torch.arange(len(batch)).split(EXAMPLES_AT_ONCE)]  # type: ignore[no-untyped-call]
    # The shapes of one user with many candidates, but each example with its own user.
    return torch.cat([ranker(part.users, part.items, part.features) for part in parts])


def _train_epochs(
    ranker: Ranker, batch: RankerBatch, config: TrainConfig, epochs: int, validation: RankerBatch | None
) -> tuple[int, dict[str, Tensor]]:
    """Trains for some epochs of a schedule of `ranker_epochs`.

    Returns:
        The number of epochs that was best on `validation`, and its weights.

    Raises:
        TrainingError: The loss is no longer a number.
    """
    torch.manual_seed(config.seed)
    with torch.no_grad():
        ranker.standardise(batch.features)
        # The training starts from the actions' rates: relevance is a feature among others here.
        ranker.scale.zero_()
        ranker.bias.copy_(torch.logit(batch.labels.mean(0).clamp(1e-4, 1 - 1e-4)))
    optimizer = torch.optim.AdamW(
        ranker.parameters(), lr=config.ranker_rate, weight_decay=config.ranker_decay, fused=True
    )
    steps = max(1, len(batch) // BATCH)
    best_loss, best_weights, best_epochs = float("inf"), {}, epochs
    for epoch in range(epochs):
        ranker.train()
        for step, at in enumerate(torch.randperm(len(batch))[: steps * BATCH].split(BATCH)):  # type: ignore[no-untyped-call]
            # Progress along the whole schedule: the second training follows the one that its epochs were chosen on.
            progress = (epoch * steps + step) / (config.ranker_epochs * steps)
            rate = min(1.0, (progress + 1e-3) / _WARM_UP, (1 - progress) / (1 - _WARM_UP))
            for group in optimizer.param_groups:
                group["lr"] = config.ranker_rate * rate
            optimizer.zero_grad(set_to_none=True)
            _loss(ranker, batch.take(at)).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(ranker.parameters(), 1.0)
            optimizer.step()
        if validation is not None:
            loss = float(functional.binary_cross_entropy_with_logits(logits_of(ranker, validation), validation.labels))
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the ranker's loss is {loss} after epoch {epoch + 1}: train again with a ranker_rate below "
                    f"{config.ranker_rate:g}"
                )
            if loss < best_loss:
                best_loss, best_epochs = loss, epoch + 1
                best_weights = {name: value.clone() for name, value in ranker.state_dict().items()}
    ranker.eval()
    return best_epochs, best_weights


def _loss(ranker: Ranker, batch: RankerBatch) -> Tensor:
    """Returns binary cross-entropy, summed over actions, as the mean over members and examples."""
    # Each member has its own loss, not their mean one: members that fit the labels each in their own way are worth
    # more together than members that only fill one another's gaps.
    logits = ranker.each(batch.users, batch.items, batch.features)
    labels = batch.labels.expand_as(logits)
    return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean((0, 1)).sum()


def _report(
    logits: Tensor, validation: RankerBatch, train: RankerBatch, users: npt.NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    report = {}
    for action in range(logits.shape[1]):
        labels = validation.labels[:, action].numpy() > 0
        probabilities = torch.sigmoid(logits[:, action]).double().numpy()
        base = np.full(labels.size, float(train.labels[:, action].mean()))
        report[str(action)] = measure(labels, probabilities, users) | {"base_log_loss": log_loss(labels, base)}
    return report
