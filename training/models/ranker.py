"""The ranker, which predicts the probability of each action on the candidates, and its calibration."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

BLENDS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Weights of the ranker's utility, added to relevance, that are tried on validation."""
_SMALLEST = 1e-6
_CONSTANT = 1e-6  # a feature that varies less in training taught nothing, so it is not read in service either
_SAMPLE = 20_000


class MemberLinear(nn.Module):
    """One linear layer per member: `[..., M, n, i]` to `[..., M, n, o]`."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(members, inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Applies each member's layer to its part."""
        return x @ self.weight + self.bias


class Ranker(nn.Module):
    """Logits per action: `scale * relevance + bias + wide(features) + mean of members(user, item, features)`.

    The last layers start at zero, so that training starts from relevance. The user's part of the first layer is
    computed once for all candidates. `relevance` is feature 0. With `bins`, the networks read each feature also by the
    part of each of its quantile bins that it fills, so that they can bend where most values lie (Gorishniy et al.,
    arXiv:2203.05556).
    """

    def __init__(
        self,
        dim: int,
        features: int,
        hidden: int,
        actions: int,
        members: int = 1,
        bins: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.mean: Tensor
        self.spread: Tensor
        self.edges: Tensor
        self.widths: Tensor
        self.members, self.hidden, self.bins = members, hidden, bins
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))
        self.register_buffer("edges", torch.zeros(bins, features))
        self.register_buffer("widths", torch.full((bins, features), torch.inf))
        self.scale = nn.Parameter(torch.ones(actions))
        self.bias = nn.Parameter(torch.zeros(actions))
        self.wide = nn.Linear(features, actions, bias=False)
        self.user = nn.Linear(dim, members * hidden)
        self.item = nn.Linear(dim, members * hidden, bias=False)
        self.features = nn.Linear(features * (1 + bins), members * hidden, bias=False)
        self.inner = MemberLinear(members, hidden, hidden)
        self.output = MemberLinear(members, hidden, actions)
        self.dropout = nn.Dropout(dropout)
        for last in (self.wide, self.output):
            nn.init.zeros_(last.weight)

    def forward(self, user: Tensor, items: Tensor, features: Tensor) -> Tensor:
        """Scores the candidates of one user, or of several users at once.

        Args:
            user: float `[1, D]` or `[B, 1, D]`.
            items: float `[n, D]` or `[B, n, D]`.
            features: float `[n, F]` or `[B, n, F]`, as `features.assemble.ranker_features` makes them.

        Returns:
            float `[n, A]` or `[B, n, A]`, calibrated logits.
        """
        return self.each(user, items, features).mean(-3)

    def each(self, user: Tensor, items: Tensor, features: Tensor) -> Tensor:
        """Returns the logits of every member; float `[M, n, A]` or `[B, M, n, A]`."""
        # A value far from all that training saw counts as the most extreme one: a linear layer would follow it.
        scaled = ((features - self.mean) / self.spread).clamp(-8.0, 8.0)
        read = scaled
        if self.bins:
            filled = ((features.unsqueeze(-2) - self.edges) / self.widths).clamp(0.0, 1.0)
            read = torch.cat([scaled, filled.flatten(-2)], -1)
        first = self.user(user) + self.item(items) + self.features(read)
        first = self.dropout(functional.gelu(first)).unflatten(-1, (self.members, self.hidden)).transpose(-3, -2)
        network: Tensor = self.output(self.dropout(functional.gelu(self.inner(first))))
        shared: Tensor = self.scale * features[..., :1] + self.bias + self.wide(scaled)
        return network + shared.unsqueeze(-3)

    def standardise(self, features: Tensor) -> None:
        """Takes mean, spread and quantiles of the features from a sample `[n, F]`."""
        spread = features.std(0)
        self.mean.copy_(features.mean(0))
        self.spread.copy_(torch.where(spread < _CONSTANT, torch.inf, spread.clamp(min=1e-3)))
        if self.bins:
            # A sample: quantiles need a sort, and torch refuses one of more than 16 million values.
            step = -(-features.shape[0] // _SAMPLE)
            borders = torch.quantile(features[::step], torch.linspace(0, 1, self.bins + 1), dim=0)
            widths = borders[1:] - borders[:-1]
            self.edges.copy_(borders[:-1])
            self.widths.copy_(torch.where(widths < 1e-4, torch.inf, widths))

    @torch.no_grad()
    def recalibrate(self, action: int, slope: float, shift: float) -> None:
        """Maps the logits of an action to `slope * logit + shift`."""
        for part in (self.scale, self.bias, self.wide.weight):
            part[action] *= slope
        for part in (self.output.weight, self.output.bias):
            part[..., action] *= slope
        self.bias[action] += shift


def level(logits: Tensor, rate: float, steps: int = 50) -> float:
    """Returns the shift of the logits that makes `rate`, between 0 and 1, their mean probability; by bisection."""
    x = logits.double()
    target_logit = float(torch.logit(torch.tensor(rate, dtype=torch.float64)))
    low, high = target_logit - float(x.max()), target_logit - float(x.min())
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if float(torch.sigmoid(x + middle).mean()) < rate else (low, middle)
    return (low + high) / 2


def utility(logits: Tensor, weights: Tensor) -> Tensor:
    """Computes the worth of showing an item: the log-odds of the weighted sum of the actions' probabilities.

    Log-odds are on the scale of relevance, the logits of a softmax, so that a blend can add them.

    Args:
        logits: float `[..., A]`.
        weights: float `[A]`, the worth of each action; positive ones sum to at most 1.

    Returns:
        float `[...]`.
    """
    share = (torch.sigmoid(logits) * weights).sum(-1)
    return torch.logit(share.clamp(_SMALLEST, 1 - _SMALLEST))


def platt(logits: Tensor, labels: Tensor, steady: float = 1e-2, steps: int = 25) -> tuple[float, float]:
    """Finds the slope (at least 0.05) and shift of the logits with the highest likelihood, by Newton's method.

    A slope at or below zero would reverse the ranker's order. The slope is pulled to 1 by a normal prior of precision
    `steady` (Platt, 1999).
    """
    x, y = logits.double(), labels.double()
    centre = x.mean()
    design = torch.stack([x - centre, torch.ones_like(x)], 1)
    # A weak pull to slope 1 and the mean rate keeps the result finite if all labels are alike.
    prior = torch.stack([torch.ones_like(centre), torch.logit(y.mean().clamp(1e-6, 1 - 1e-6))])
    pull = torch.diag(torch.tensor([steady, 1e-2], dtype=torch.float64))
    solution = prior.clone()
    for _ in range(steps):
        p = torch.sigmoid(design @ solution)
        gradient = design.T @ (p - y) + pull @ (solution - prior)
        curvature = (design * (p * (1 - p)).unsqueeze(1)).T @ design + pull
        # Newton's step from far away may overshoot, so it is limited.
        solution = solution - torch.linalg.solve(curvature, gradient).clamp(-1.0, 1.0)
    slope = float(solution[0].clamp(min=0.05))
    return slope, float(solution[1]) - slope * float(centre)
