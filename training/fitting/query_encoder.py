"""Trains the query encoder on finished item vectors.

No log of searches is needed: a query is a few words of an item, and the item is what it should find.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from training.config import TrainConfig
from training.data.batches import to_device
from training.models.encoders import ItemEncoder, QueryEncoder
from training.models.losses import sample_items, softmax_loss

QUERY_BATCH = 512
"""Items of a step."""
QUERY_RATE = 3e-3
QUERY_NEGATIVES = 2048
QUERY_SHARPNESS = 20.0
"""Factor on cosines before the softmax: they end at 1, which would leave the loss without a clear winner."""
QUERY_WORDS = 8
"""Most words of a training query: users type few."""


def fit_query_encoder(
    query: QueryEncoder,
    item: ItemEncoder,
    table: Tensor,
    inputs: Mapping[str, Tensor] | None,
    config: TrainConfig,
    *,
    begins_trained: bool = False,
) -> None:
    """Teaches the query encoder to find an item by some of its words.

    Args:
        query: Trained in place; starts from the item encoder's word vectors.
        item: The trained item encoder.
        table: All item vectors, which do not change; float `[N, D]`.
        inputs: The item encoder's inputs, None if items have no content: then there are no words to learn from.
        config: The number of steps.
        begins_trained: Its weights are those of an earlier run, so it goes on for `start_share` of the steps.
    """
    if inputs is None or not config.query_steps:
        return
    tokens = inputs["tokens"].cpu()
    with_words = (tokens > 0).any(1).nonzero()[:, 0]
    if not with_words.numel():
        return
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    steps = max(1, round(config.start_share * config.query_steps)) if begins_trained else config.query_steps
    highest = QUERY_RATE * (config.start_rate if begins_trained else 1)
    with torch.no_grad():
        # The words stand first in the table that they share with categories and creators.
        if not begins_trained:
            query.words.weight.copy_(item.words.weight[: query.words.num_embeddings])
    # Directions matter, not lengths, which grow with popularity: a query asks for the item that it names.
    goal = functional.normalize(table, dim=1)
    uniform = torch.full((table.shape[0],), 1 / table.shape[0])
    optimizer = torch.optim.AdamW(query.parameters(), lr=QUERY_RATE, weight_decay=0.01, fused=True)
    query.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = highest * (1 - step / steps)
        size = min(QUERY_BATCH, with_words.numel())
        chosen = with_words[torch.randint(with_words.numel(), (size,), generator=generator)]
        words = to_device(_draw_words(tokens[chosen], generator), goal.device)
        queries = functional.normalize(query(words), dim=1) * QUERY_SHARPNESS
        # All items are drawn alike here, so the sample needs no correction.
        rows, positions, _ = sample_items(chosen, uniform, QUERY_NEGATIVES, len(table) > config.dense_items)
        items, positions = goal[to_device(rows, goal.device)], to_device(positions, goal.device)
        loss = softmax_loss(queries, items, positions, chunk=config.loss_chunk)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    query.eval()


def _draw_words(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Draws one to `QUERY_WORDS` of each item's words, earlier ones (the title's) more often; `[B, QUERY_WORDS]`."""
    size = min(QUERY_WORDS, tokens.shape[1])
    places = torch.arange(tokens.shape[1])
    noise = torch.rand(tokens.shape, generator=generator) + 0.5 * (places < size)
    order = torch.where(tokens > 0, noise, -1.0).argsort(1, descending=True)[:, :size]
    kept = tokens.gather(1, order)
    lengths = torch.randint(1, size + 1, (tokens.shape[0], 1), generator=generator)
    return kept * (torch.arange(size) < lengths)
