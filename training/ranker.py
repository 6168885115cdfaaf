"""The ranker: how probable each action is, for the candidates that the user encoder found."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

BLENDS = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Weights of the ranker's utility beside relevance that are tried on validation."""
_SMALLEST = 1e-6


class Ranker(nn.Module):
    """Logits per action: `scale * relevance + bias + network(user, item, features)`.

    The network's last layer starts at zero, so that training starts from relevance. The user's part of the first layer
    is computed once for all candidates. `relevance` is feature 0.
    """

    def __init__(self, dim: int, features: int, hidden: int, actions: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.spread: Tensor
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))
        self.scale = nn.Parameter(torch.ones(actions))
        self.bias = nn.Parameter(torch.zeros(actions))
        self.user = nn.Linear(dim, hidden)
        self.item = nn.Linear(dim, hidden, bias=False)
        self.features = nn.Linear(features, hidden, bias=False)
        self.inner = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, actions)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, user: Tensor, items: Tensor, features: Tensor) -> Tensor:
        """Scores the candidates of one person, or of several people at once.

        Args:
            user: float `[1, D]` or `[B, 1, D]`.
            items: float `[n, D]` or `[B, n, D]`.
            features: float `[n, F]` or `[B, n, F]`, as `features.assemble.ranker_features` makes them.

        Returns:
            float `[n, A]` or `[B, n, A]`, calibrated logits.
        """
        scaled = ((features - self.mean) / self.spread).clamp(-8.0, 8.0)
        first = self.user(user) + self.item(items) + self.features(scaled)
        network: Tensor = self.output(functional.gelu(self.inner(functional.gelu(first))))
        return self.scale * features[..., :1] + self.bias + network

    def standardise(self, features: Tensor) -> None:
        """Takes mean and spread of the features from a sample `[n, F]`."""
        self.mean.copy_(features.mean(0))
        self.spread.copy_(features.std(0).clamp(min=1e-3))

    @torch.no_grad()
    def recalibrate(self, action: int, slope: float, shift: float) -> None:
        """Maps the logits of an action to `slope * logit + shift`."""
        for part in (self.scale, self.bias, self.output.weight, self.output.bias):
            part[action] *= slope
        self.bias[action] += shift


def utility(logits: Tensor, weights: Tensor) -> Tensor:
    """What showing an item is worth: the log-odds of the weighted sum of the actions' probabilities.

    Args:
        logits: float `[..., A]`.
        weights: float `[A]`, the worth of each action; positive ones sum to at most 1.

    Returns:
        float `[...]`.
    """
    share = (torch.sigmoid(logits) * weights).sum(-1)
    return torch.logit(share.clamp(_SMALLEST, 1 - _SMALLEST))
