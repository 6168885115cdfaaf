"""The losses of the encoders: softmax over all items, or over negatives that a batch shares.

The scores of all users for all items are never in memory at once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from training.models.kernels import exponentials_of
from training.runtime import in_halves

ROUND = 512
"""Sampled items are filled up to a multiple of this, since matrix products are compiled for each different size."""


class _ChunkedSoftmax(torch.autograd.Function):
    """Cross-entropy whose gradient is computed in the forward pass, chunk by chunk (as in arXiv:2410.10989)."""

    @staticmethod
    def forward(
        ctx: Any, users: Tensor, items: Tensor, targets: Tensor, correction: Tensor | None, chunk: int
    ) -> Tensor:
        # With E = exp(scores - top) and Z its row sums, the gradient of a user is E @ items / Z - target, and that of
        # the items (users / Z).T @ E less the users at their targets: E itself is written once and never normalised.
        # The targets' own part is kept apart in float32, where nothing of it is rounded away.
        count, kind = users.shape[0], product_type(users.device)
        table, vectors = items.detach().to(kind), users.detach()
        if correction is not None:  # how many items a batch draws differs; what fills up to a round number never counts
            table = _at_least(table, -(-table.shape[0] // ROUND) * ROUND)
            correction = functional.pad(correction, (0, table.shape[0] - correction.numel()), value=torch.inf)
        columns = table.T.contiguous()
        target_vectors = items.detach()[targets]
        target_scores = (vectors * target_vectors).sum(1)
        users_gradient = torch.empty_like(users)
        columns_gradient = torch.zeros_like(columns, dtype=items.dtype)
        total = -target_scores.sum()
        # Every chunk has the same size, since matrix products are compiled for each size that comes up.
        scores = columns.new_empty(chunk, columns.shape[1])
        for start in range(0, count, chunk):
            padded = _at_least(vectors[start : start + chunk], chunk)
            part, real = torch.mm(padded.to(kind), columns, out=scores), slice(start, min(start + chunk, count))
            if correction is not None:
                # A user's own target is there for certain, so its score is not corrected.
                part -= correction.to(kind)
                target_columns = targets[real]
                rows = torch.arange(target_columns.numel(), device=part.device)
                part[rows, target_columns] += correction[target_columns].to(kind)
            tops, sums = exponentials_of(part)
            size = real.stop - start
            total += (tops[:size] + sums[:size].log()).sum()
            users_gradient[real] = (part @ table)[:size] / sums[:size, None] - target_vectors[real]
            columns_gradient += (padded / sums[:, None]).T.to(kind).contiguous() @ part
        items_gradient = columns_gradient.T[: items.shape[0]].contiguous().index_add_(0, targets, vectors, alpha=-1)
        ctx.save_for_backward(users_gradient.div_(count), items_gradient.div_(count))
        return total / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        users_gradient, items_gradient = ctx.saved_tensors
        return users_gradient * gradients[0], items_gradient * gradients[0], None, None, None


def _at_least(part: Tensor, rows: int) -> Tensor:
    """Pads with rows of zeros, which are users without a direction and add nothing to any gradient."""
    return part if part.shape[0] == rows else functional.pad(part, (0, 0, 0, rows - part.shape[0]))


def product_type(device: torch.device) -> torch.dtype:
    """Returns the type in which scores for all items are computed and kept: bf16 if the hardware multiplies it.

    Sums are in float32 either way, and so are the resulting losses and gradients. The scores are most of a step's
    memory traffic, so halving them nearly halves its time.
    """
    return torch.bfloat16 if in_halves(device) else torch.float32


def softmax_loss(
    users: Tensor, items: Tensor, targets: Tensor, correction: Tensor | None = None, chunk: int = 1024
) -> Tensor:
    """Computes the mean cross-entropy of each user's target among `items`.

    Args:
        users: float `[T, D]`.
        items: float `[N, D]`; all of them, or the targets and the negatives that a batch shares, each once.
        targets: Position of the right one among `items`; int64 `[T]`.
        correction: log of the probability that an item is among `items` (`inclusion`), subtracted from the score of
            every item but the user's own target, which is always there. float `[N]`; None for all items.
        chunk: Number of users whose scores are in memory at once.

    Returns:
        A scalar.
    """
    loss: Tensor = _ChunkedSoftmax.apply(users, items, targets, correction, chunk)  # type: ignore[no-untyped-call]
    return loss


def inclusion(popularity: Tensor, drawn: int, targets: int) -> Tensor:
    """Computes the log of the probability that an item is among a batch's targets or its uniformly drawn negatives.

    Dividing by it makes the sampled sum an unbiased estimate of the whole (Horvitz and Thompson, 1952; known as the
    logQ correction, Bengio and Senecal, 2008).

    Args:
        popularity: Share of each item among all targets; float `[n]`.
        drawn: Share of all items that is drawn uniformly, given as a number of items over `popularity`'s length.
        targets: Number of targets in the batch.
    """
    return _inclusion(popularity, drawn / popularity.numel(), targets)


def sample_items(
    targets: Tensor, popularity: Tensor, negatives: int, replace: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws the items that a batch is scored against: its targets, and uniform negatives that all its users share.

    Args:
        targets: Rows to predict; int64 `[T]`, on the CPU.
        popularity: Share of each item among all targets; float `[N]`, on the CPU.
        negatives: Number of items to draw.
        replace: Draws with replacement, which costs the items that are drawn and not the catalogue; an item that is
            drawn twice still stands once.

    Returns:
        rows int64 `[n]` without repeats, the position of each target among them int64 `[T]`, and their `inclusion`
        float `[n]`.
    """
    # Drawn without regard to the targets, as `inclusion` assumes: an item that is both stands once.
    items = popularity.numel()
    if replace:
        rows, inverse = torch.unique(torch.cat([targets, torch.randint(items, (negatives,))]), return_inverse=True)
        drawn = -math.expm1(negatives * math.log1p(-1 / items)) if items > 1 else 1.0
        return rows, inverse[: targets.numel()], _inclusion(popularity[rows], drawn, targets.numel())
    rows, inverse = torch.unique(torch.cat([targets, torch.randperm(items)[:negatives]]), return_inverse=True)
    probability = inclusion(popularity, negatives, targets.numel())[rows]
    return rows, inverse[: targets.numel()], probability


def _inclusion(popularity: Tensor, drawn: float, targets: int) -> Tensor:
    """Computes `inclusion` for the items whose popularity is given; `drawn` is the share of all items drawn."""
    missed = (1 - min(1.0, drawn)) * torch.exp(targets * torch.log1p(-popularity.clamp(max=0.999)))
    # Kept finite for an item that is no target and is hardly ever drawn.
    return torch.log1p(-missed.clamp(max=1 - 1e-7))
