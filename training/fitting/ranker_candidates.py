"""What is trained once the encoders stand still: the query encoder on item vectors, the ranker on candidates.

The ranker learns from validation targets, which the encoders have not seen: on the events that they were trained on,
relevance looks better than it will ever be in service.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from features.action_rates import ActionRates
from features.assemble import RANKER_FEATURES, Moment, ranker_features
from features.catalog_columns import CatalogColumns
from training.config import Action, TrainConfig
from training.data.histories import UserHistories
from training.data.interactions import Interactions
from training.data.split import Split, Targets, moment_of
from training.metrics import ndcg
from training.models.ranker import BLENDS, Ranker, platt, utility
from training.models.scoring import mask_seen, ranks_of, seen_before, slices, user_vectors
from training.run import Modules

RANKER_BATCH = 64
RANKER_RATE = 2e-3
RANKER_NEGATIVES = 64
FEWEST_TARGETS = 100
"""Below this many validation targets the ranker passes relevance through, for nothing could be learned or measured."""
_SELECTING = 4  # each fourth person chooses the blend and calibrates


@dataclass(frozen=True)
class RankerCandidates:
    """What the ranker is asked for some targets, all on the CPU.

    Attributes:
        users: float `[n, D]`.
        rows: Items to score, the target first; int64 `[n, C]`.
        features: float `[n, C, F]`.
        labels: Whether the person did each action with the item; float `[n, C, A]`.
        real: False where a place only repeats the target's item; bool `[n, C]`.
    """

    users: Tensor
    rows: Tensor
    features: Tensor
    labels: Tensor
    real: Tensor


def fit_ranker(asker: CandidateBuilder, division: Split, weights: list[float]) -> tuple[float, dict[str, float]]:
    """Trains the ranker and calibrates it, where no impressions have taught it, and chooses how much it may say.

    Returns:
        The blend, and NDCG@10 of the choosing people by blend. A blend above 0 must beat relevance alone by more than
        one standard error of the difference.
    """
    config, ranker = asker.config, asker.ranker
    targets = division.validation.sample(config.validation_users, config.seed)
    if not config.ranker_steps or len(targets) < FEWEST_TARGETS:
        return 0.0, {}
    chooses = targets.users % _SELECTING == 0
    if not asker.learned:
        drawn = asker.candidates(targets.take(np.flatnonzero(~chooses)), RANKER_NEGATIVES)
        _learn(ranker, asker.table, drawn, config)
    whole = asker.candidates(targets.take(np.flatnonzero(chooses)), config.candidates)
    with torch.no_grad():
        # What impressions taught is calibrated on impressions.
        logits = asker.logits(whole)
        for action in range(0 if asker.learned else logits.shape[2]):
            slope, shift = platt(logits[..., action][whole.real], whole.labels[..., action][whole.real])
            ranker.recalibrate(action, slope, shift)
        return _choose_blend(whole, utility(asker.logits(whole), torch.tensor(weights)))


class CandidateBuilder:
    """Builds what the ranker reads, along the road that serving takes."""

    def __init__(
        self,
        modules: Modules,
        table: Tensor,
        data: Interactions,
        columns: CatalogColumns,
        action_rates: ActionRates,
        actions: tuple[Action, ...],
        config: TrainConfig,
        learned: bool = False,
    ) -> None:
        """Takes what a training made; `learned` where impressions have taught the ranker and time is known to it."""
        self.user, self.ranker = modules.user.eval(), modules.ranker.cpu()
        self.device_table, self.table = table, table.cpu()
        self.data, self.columns, self.actions, self.config = data, columns, actions, config
        self.histories = UserHistories(data, columns)
        self.action_rates, self.learned = action_rates, learned
        self.popular = np.argsort(-columns.popularity, kind="stable")[:RANKER_NEGATIVES].astype(np.int32)

    def candidates(self, targets: Targets, count: int) -> RankerCandidates:
        """The most relevant items of each person, beside the target.

        Fewer than `config.candidates` are drawn at random from these, an eighth of them from the popular items.
        """
        users = user_vectors(self.user, self.device_table, self.data, targets, self.config.max_length)
        rng = np.random.default_rng(self.config.seed)
        truth = targets.rows(self.data)
        rows = np.empty((len(targets), count + 1), np.int32)
        for part in slices(len(targets)):
            scores = users[part] @ self.columns.vectors.T
            if not self.config.repeats:
                mask_seen(scores, seen_before(self.data, targets.take(np.arange(part.start, part.stop))))
            scores[np.arange(scores.shape[0]), truth[part]] = -np.inf
            rows[part] = self._choose(scores, truth[part], count, rng)
        features = np.stack([self._features(targets, users, rows, at) for at in range(len(targets))])
        real = rows != truth[:, None]
        real[:, 0] = True
        return RankerCandidates(
            users=torch.from_numpy(users),
            rows=torch.from_numpy(rows.astype(np.int64)),
            features=torch.from_numpy(features),
            labels=torch.from_numpy(self._labels(targets, rows.shape[1])),
            real=torch.from_numpy(real),
        )

    def logits(self, asked: RankerCandidates) -> Tensor:
        """The ranker's logits, a few people at a time; float `[n, C, A]`."""
        parts = [
            self.ranker(asked.users[part].unsqueeze(1), self.table[asked.rows[part]], asked.features[part])
            for part in slices(asked.users.shape[0], RANKER_BATCH)
        ]
        return torch.cat(parts)

    def _choose(
        self,
        scores: npt.NDArray[np.float32],
        truth: npt.NDArray[np.int32],
        count: int,
        rng: np.random.Generator,
    ) -> npt.NDArray[np.int32]:
        """The target, then `count` items that the person has not had; the target again where there are too few."""
        depth = min(max(count, self.config.candidates), scores.shape[1])
        best = np.argpartition(-scores, depth - 1, axis=1)[:, :depth]
        chosen = np.repeat(truth[:, None], count + 1, axis=1)
        for line in range(scores.shape[0]):
            pool = best[line]
            if count < depth:
                few = self.popular[rng.permutation(self.popular.size)[: count // 8]]
                pool = np.concatenate([few, rng.permutation(np.setdiff1d(pool, few))])
            pool = pool[np.isfinite(scores[line, pool])][:count]
            chosen[line, 1 : 1 + pool.size] = pool
        return chosen

    def _features(
        self, targets: Targets, users: npt.NDArray[np.float32], rows: npt.NDArray[np.int32], at: int
    ) -> npt.NDArray[np.float32]:
        past = self.histories.before(int(targets.users[at]), int(targets.positions[at]))
        relevance = self.columns.vectors[rows[at]] @ users[at]
        moment = moment_of(self.data, targets, at) if self.learned else Moment()
        return ranker_features(past, rows[at], relevance, self.columns, self.action_rates, moment)

    def _labels(self, targets: Targets, width: int) -> npt.NDArray[np.float32]:
        events = self.data.offsets[targets.users] + targets.positions
        labels = np.zeros((len(targets), width, len(self.actions)), np.float32)
        for number, action in enumerate(self.actions):
            names = self.data.event_types
            kind = 1 + names.index(action.event_type) if action.event_type in names else -1
            done = self.data.types[events] == kind
            if action.min_value is not None:
                done &= self.data.values[events] >= action.min_value
            labels[:, 0, number] = done
        return labels


def _learn(ranker: Ranker, table: Tensor, drawn: RankerCandidates, config: TrainConfig) -> None:
    """Binary cross-entropy per action, from relevance on."""
    generator = torch.Generator().manual_seed(config.seed)
    ranker.standardise(drawn.features[drawn.real])
    with torch.no_grad():
        spread = drawn.features[..., 0][drawn.real].std().clamp(min=1e-3)
        ranker.scale.fill_(1 / float(spread))
        share = drawn.labels[drawn.real].mean(0).clamp(1e-4, 1 - 1e-4)
        ranker.bias.copy_(torch.logit(share) - drawn.features[..., 0][drawn.real].mean() / spread)
    optimizer = torch.optim.AdamW(ranker.parameters(), lr=RANKER_RATE, weight_decay=0.1, fused=True)
    ranker.train()
    for step in range(config.ranker_steps):
        for group in optimizer.param_groups:
            group["lr"] = RANKER_RATE * (1 - step / config.ranker_steps)
        some = torch.randint(drawn.users.shape[0], (RANKER_BATCH,), generator=generator)
        logits = ranker(drawn.users[some].unsqueeze(1), table[drawn.rows[some]], drawn.features[some])
        losses = functional.binary_cross_entropy_with_logits(logits, drawn.labels[some], reduction="none")
        loss = (losses * drawn.real[some].unsqueeze(2)).sum() / RANKER_BATCH
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(ranker.parameters(), 1.0)
        optimizer.step()
    ranker.eval()


def _choose_blend(whole: RankerCandidates, worth: Tensor) -> tuple[float, dict[str, float]]:
    """The blend whose final score ranks the targets best among the candidates."""
    relevance = whole.features[..., 0]
    # A target that relevance leaves out of the candidates never reaches the ranker.
    found = ((relevance[:, 1:] >= relevance[:, :1]) & whole.real[:, 1:]).sum(1) < relevance.shape[1] - 1
    values = {}
    for blend in BLENDS:
        scores = (relevance + blend * worth).numpy()
        scores[~whole.real.numpy()] = -np.inf
        values[blend] = ndcg(ranks_of(scores, np.zeros(scores.shape[0], np.int32)), 10) * found.numpy()
    best = max(BLENDS, key=lambda blend: (values[blend].mean(), -blend))
    difference = values[best] - values[0.0]
    certain = difference.mean() > difference.std() / max(1.0, np.sqrt(difference.size))
    return (best if certain else 0.0), {f"{blend:g}": round(float(v.mean()), 5) for blend, v in values.items()}


assert RANKER_FEATURES.names[0] == "relevance"
