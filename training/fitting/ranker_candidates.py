"""Trains the ranker on retrieved candidates, and chooses the weight of its utility in the final score.

The ranker learns from validation targets, which the encoders have not seen: on the events that they were trained on,
relevance looks better than it will ever be in service.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from features.action_rates import ActionRates
from features.assemble import ranker_features
from features.catalog_columns import CatalogColumns
from features.linear import LinearScores, LinearTerm
from features.model_inputs import RANKER_FEATURES
from training.config import Action, TrainConfig
from training.data.histories import UserHistories
from training.data.interactions import Interactions
from training.data.moments import UserMoments
from training.data.split import Split, Targets
from training.metrics import ndcg
from training.models.linear import add_sums, linear_sums
from training.models.ranker import BLENDS, Ranker, platt, utility
from training.models.scoring import mask_seen, rank_slices, ranks_of, seen_before, slices, user_vectors
from training.run import Modules

RANKER_BATCH = 64
RANKER_RATE = 2e-3
RANKER_NEGATIVES = 64
FEWEST_TARGETS = 100
"""Below this many validation targets the ranker passes relevance through: they are too few to learn or to measure."""
_SELECTING = 4  # each fourth user chooses the blend and calibrates; the others train


@dataclass(frozen=True)
class RankerCandidates:
    """The ranker's inputs and labels for some targets, all on the CPU.

    Attributes:
        users: float `[n, D]`.
        rows: Items to score, the target first; int64 `[n, C]`.
        features: float `[n, C, F]`.
        labels: 1 for each action of the user on the item; float `[n, C, A]`.
        real: False where a place only repeats the target's item; bool `[n, C]`.
    """

    users: Tensor
    rows: Tensor
    features: Tensor
    labels: Tensor
    real: Tensor


def fit_ranker(builder: CandidateBuilder, division: Split, weights: list[float]) -> tuple[float, dict[str, float]]:
    """Trains and calibrates the ranker, unless impressions have trained it, and chooses the blend.

    Returns:
        The blend, and NDCG@10 of the selecting users by blend. A blend above 0 must beat relevance alone by more than
        one standard error of the difference.
    """
    config, ranker = builder.config, builder.ranker
    targets = division.validation.sample(config.validation_users, config.seed)
    if not config.ranker_steps or len(targets) < FEWEST_TARGETS:
        return 0.0, {}
    # The blend is chosen on users that the ranker has not seen, or a ranker that overfits would be trusted most.
    is_selecting = targets.users % _SELECTING == 0
    if not builder.from_impressions:
        sample = builder.candidates(targets.take(np.flatnonzero(~is_selecting)), RANKER_NEGATIVES)
        _train_on_candidates(ranker, builder.table, sample, config)
    full = builder.candidates(targets.take(np.flatnonzero(is_selecting)), config.candidates)
    with torch.no_grad():
        # A ranker that impressions trained is calibrated on them already: candidates that were never shown have no
        # true rate of an action.
        logits = builder.logits(full)
        for action in range(0 if builder.from_impressions else logits.shape[2]):
            slope, shift = platt(logits[..., action][full.real], full.labels[..., action][full.real])
            ranker.recalibrate(action, slope, shift)
        return _choose_blend(full, utility(builder.logits(full), torch.tensor(weights)))


class CandidateBuilder:
    """Builds the ranker's inputs from targets, by the functions that serving uses."""

    def __init__(
        self,
        modules: Modules,
        table: Tensor,
        linear: LinearTerm,
        data: Interactions,
        columns: CatalogColumns,
        action_rates: ActionRates,
        actions: tuple[Action, ...],
        config: TrainConfig,
        moments: UserMoments,
        from_impressions: bool = False,
    ) -> None:
        """Takes the parts of a training; with `from_impressions`, impressions have trained the ranker, on times too."""
        self.user, self.ranker = modules.user.eval(), modules.ranker.cpu()
        self.device_table, self.table, self.linear = table, table.cpu(), linear
        self.data, self.columns, self.actions, self.config = data, columns, actions, config
        self.histories = UserHistories(data, columns)
        self.action_rates, self.moments, self.from_impressions = action_rates, moments, from_impressions
        # Ties by row, so that a training gives the same candidates again.
        self.popular = np.argsort(-columns.popularity, kind="stable")[:RANKER_NEGATIVES].astype(np.int32)

    def candidates(self, targets: Targets, count: int) -> RankerCandidates:
        """Returns the most relevant items of each user, next to the target.

        If `count` is below `config.candidates`, that many are drawn from these at random, and an eighth of them from
        the popular items.
        """
        users = user_vectors(self.user, self.device_table, self.data, targets, self.config.max_length)
        rng = np.random.default_rng(self.config.seed)
        truth, sums = targets.rows(self.data), linear_sums(self.linear, self.data, targets)
        rows = np.empty((len(targets), count + 1), np.int32)
        for part in rank_slices(len(targets), self.data.items):
            scores = add_sums(users[part] @ self.columns.vectors.T, sums[part])
            if not self.config.repeats:
                mask_seen(scores, seen_before(self.data, targets.take(np.arange(part.start, part.stop))))
            # The target has its own place, the first, and must not come again as a negative.
            scores[np.arange(scores.shape[0]), truth[part]] = -np.inf
            rows[part] = self._choose(scores, truth[part], count, rng)
        features = np.stack([self._features(targets, users, rows, sums, at) for at in range(len(targets))])
        real = rows != truth[:, None]
        real[:, 0] = True
        return RankerCandidates(
            users=torch.from_numpy(users),
            rows=torch.from_numpy(rows.astype(np.int64)),
            features=torch.from_numpy(features),
            labels=torch.from_numpy(self._labels(targets, rows.shape[1])),
            real=torch.from_numpy(real),
        )

    def logits(self, candidates: RankerCandidates) -> Tensor:
        """Returns the ranker's logits, computed for a few users at a time; float `[n, C, A]`."""
        users, rows, features = candidates.users, candidates.rows, candidates.features
        parts = [
            self.ranker(users[part].unsqueeze(1), self.table[rows[part]], features[part])
            for part in slices(users.shape[0], RANKER_BATCH)
        ]
        return torch.cat(parts)

    def _choose(
        self,
        scores: npt.NDArray[np.float32],
        truth: npt.NDArray[np.int32],
        count: int,
        rng: np.random.Generator,
    ) -> npt.NDArray[np.int32]:
        """Returns the target, then `count` items that the user has not had; the target again if these are too few."""
        depth = min(max(count, self.config.candidates), scores.shape[1])
        best = np.argpartition(-scores, depth - 1, axis=1)[:, :depth]
        chosen = np.repeat(truth[:, None], count + 1, axis=1)
        for line in range(scores.shape[0]):
            pool = best[line]
            if count < depth:
                # Negatives are what serving will rank: retrieved candidates. Popular items come among those of other
                # sources, and without some of them the ranker would not learn how far popularity carries.
                popular = self.popular[rng.permutation(self.popular.size)[: count // 8]]
                pool = np.concatenate([popular, rng.permutation(np.setdiff1d(pool, popular))])
            pool = pool[np.isfinite(scores[line, pool])][:count]
            chosen[line, 1 : 1 + pool.size] = pool
        return chosen

    def _features(
        self,
        targets: Targets,
        users: npt.NDArray[np.float32],
        rows: npt.NDArray[np.int32],
        sums: Sequence[LinearScores],
        at: int,
    ) -> npt.NDArray[np.float32]:
        history = self.histories.before(int(targets.users[at]), int(targets.positions[at]))
        relevance = self.columns.vectors[rows[at]] @ users[at] + sums[at].of(rows[at])
        # Only a ranker that impressions trained has seen times, and so knows what they mean.
        now_ms = targets.time(self.data, at) if self.from_impressions else 0
        moment = self.moments.of(int(targets.users[at]), now_ms)
        return ranker_features(history, rows[at], relevance, self.columns, self.action_rates, moment)

    def _labels(self, targets: Targets, width: int) -> npt.NDArray[np.float32]:
        events = self.data.offsets[targets.users] + targets.positions
        labels = np.zeros((len(targets), width, len(self.actions)), np.float32)
        for number, action in enumerate(self.actions):
            names = self.data.event_types
            event_type = 1 + names.index(action.event_type) if action.event_type in names else -1
            acted = self.data.types[events] == event_type
            if action.min_value is not None:
                acted &= self.data.values[events] >= action.min_value
            labels[:, 0, number] = acted
        return labels


def _train_on_candidates(ranker: Ranker, table: Tensor, sample: RankerCandidates, config: TrainConfig) -> None:
    """Minimises binary cross-entropy per action, starting from relevance."""
    generator = torch.Generator().manual_seed(config.seed)
    ranker.standardise(sample.features[sample.real])
    with torch.no_grad():
        # The first logits order items by relevance and have the actions' rates as their mean, so that the steps are
        # spent on what relevance does not know.
        spread = sample.features[..., 0][sample.real].std().clamp(min=1e-3)
        ranker.scale.fill_(1 / float(spread))
        share = sample.labels[sample.real].mean(0).clamp(1e-4, 1 - 1e-4)
        ranker.bias.copy_(torch.logit(share) - sample.features[..., 0][sample.real].mean() / spread)
    optimizer = torch.optim.AdamW(ranker.parameters(), lr=RANKER_RATE, weight_decay=0.1, fused=True)
    ranker.train()
    for step in range(config.ranker_steps):
        for group in optimizer.param_groups:
            group["lr"] = RANKER_RATE * (1 - step / config.ranker_steps)
        at = torch.randint(sample.users.shape[0], (RANKER_BATCH,), generator=generator)
        logits = ranker(sample.users[at].unsqueeze(1), table[sample.rows[at]], sample.features[at])
        losses = functional.binary_cross_entropy_with_logits(logits, sample.labels[at], reduction="none")
        loss = (losses * sample.real[at].unsqueeze(2)).sum() / RANKER_BATCH
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(ranker.parameters(), 1.0)
        optimizer.step()
    ranker.eval()


def _choose_blend(full: RankerCandidates, worth: Tensor) -> tuple[float, dict[str, float]]:
    """Chooses the blend whose final score ranks the targets best among the candidates."""
    relevance = full.features[..., 0]
    # A target that relevance leaves out of the candidates never reaches the ranker.
    is_retrieved = ((relevance[:, 1:] >= relevance[:, :1]) & full.real[:, 1:]).sum(1) < relevance.shape[1] - 1
    values = {}
    for blend in BLENDS:
        scores = (relevance + blend * worth).numpy()
        scores[~full.real.numpy()] = -np.inf
        values[blend] = ndcg(ranks_of(scores, np.zeros(scores.shape[0], np.int32)), 10) * is_retrieved.numpy()
    best = max(BLENDS, key=lambda blend: (values[blend].mean(), -blend))
    # The best of several blends looks good by chance, so a gain within one standard error is none.
    difference = values[best] - values[0.0]
    is_significant = difference.mean() > difference.std() / max(1.0, np.sqrt(difference.size))
    return (best if is_significant else 0.0), {f"{blend:g}": round(float(v.mean()), 5) for blend, v in values.items()}


assert RANKER_FEATURES.names[0] == "relevance"
