"""The three encoders of one shared space: a user's events, an item's content, a query's words.

An item's relevance to a user is the inner product of `UserEncoder`'s output and the item's vector. The user encoder
reads item *vectors*, never ids, so an item that came after training works in a history as soon as it has a vector.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from features.transforms import ItemInputShapes

QUIET = 0.1
"""Factor on the initial weights of the output that a block adds."""
MEAN = 4.0
"""Weight of the mean of the items, relative to the newest one, in what an order-free encoder starts from."""
TABLE_BLOCK = 1 << 18
"""Items whose vectors are computed at once where no gradient is needed."""


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of the user encoder; `types` counts event types without the padding type 0."""

    dim: int
    layers: int
    heads: int
    feed_forward: int
    max_length: int
    types: int
    dropout: float
    ordered: bool = True


class CheapDropout(nn.Module):
    """Dropout whose random numbers are bytes: on a CPU torch's own costs more than the matrix products around it.

    The rate is rounded to 1/256.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.threshold = round(rate * 256)

    def forward(self, x: Tensor) -> Tensor:
        """Zeroes each element with the given rate and scales up the others, in training mode only."""
        if not self.training or self.threshold == 0:
            return x
        if x.device.type != "cpu":
            return functional.dropout(x, self.threshold / 256)
        # Eight elements share one random number of 64 bits.
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
        keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self.threshold
        return x * keep * (256 / (256 - self.threshold))


class CausalAttention(nn.Module):
    """Multi-head attention to the same and earlier positions, with a learned bias by distance (arXiv:1910.10683).

    The bias learns a fact that content does not hold: how much less an event counts the longer ago it was.
    """

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.query = nn.Linear(shape.dim, shape.dim)
        self.key = nn.Linear(shape.dim, shape.dim)
        self.value = nn.Linear(shape.dim, shape.dim)
        self.output = nn.Linear(shape.dim, shape.dim)
        self.distances = nn.Parameter(torch.zeros(shape.heads, shape.max_length))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, L, D]` to `[B, L, D]`."""
        query, key, value = (self.split(part(x)) for part in (self.query, self.key, self.value))
        if self.training:
            mixed = attend(query, key, value, self.slanted_bias(x.shape[1]))
        else:
            bias = self.bias(x.shape[1]).to(query.dtype)
            mixed = functional.scaled_dot_product_attention(query, key, value, bias)
        return self.merge(mixed)

    def last(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Computes the output of `forward` at position `lengths - 1` alone; `[B, L, D]` to `[B, 1, D]`."""
        query = self.split(self.query(at_last(x, lengths)))
        key, value = self.split(self.key(x)), self.split(self.value(x))
        # Lines end at different positions, so each needs a bias of its own.
        back = (lengths - 1).clamp(min=0).unsqueeze(1) - torch.arange(x.shape[1], device=x.device)
        bias = self.by_distance(back).transpose(0, 1).unsqueeze(2)
        return self.merge(functional.scaled_dot_product_attention(query, key, value, bias))

    def split(self, x: Tensor) -> Tensor:
        """Maps `[B, L, D]` to `[B, H, L, D / H]`."""
        return x.view(x.shape[0], x.shape[1], self.heads, x.shape[2] // self.heads).transpose(1, 2)

    def merge(self, mixed: Tensor) -> Tensor:
        """Maps `[B, H, L, D / H]` to `[B, L, D]`."""
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return output

    def bias(self, length: int) -> Tensor:
        """Returns the addend to the scores of each position for each other one, -inf for the future; `[H, L, L]`."""
        at = torch.arange(length, device=self.distances.device)
        return self.by_distance(at.unsqueeze(1) - at)

    def slanted_bias(self, length: int) -> Tensor:
        """Returns the same as `bias`, as windows of one line: its gradient is a sum along diagonals, not a scatter."""
        past = self.distances[:, :length].flip(1)
        future = past.new_full((self.heads, length - 1), -torch.inf)
        return torch.cat([past, future], 1).unfold(1, length, 1).flip(1)

    def by_distance(self, back: Tensor) -> Tensor:
        """Returns the bias of events `back` positions ago, -inf where that is negative; `[..]` to `[H, ..]`."""
        # `where` evaluates both sides, so the distance to a future event needs a valid index as well.
        return torch.where(back >= 0, self.distances[:, back.clamp(min=0)], -torch.inf)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Computes the same as torch's fused attention, twice as fast with its gradient on a CPU with bf16 products.

    On a GPU its gradient is summed in a fixed order, which that of the fused attention with a learned bias is not.
    """
    batch = query.shape[0]
    scale = 1 / math.sqrt(query.shape[-1])
    scores = torch.baddbmm(
        bias.repeat(batch, 1, 1), query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), alpha=scale
    )
    return (scores.softmax(-1) @ value.flatten(0, 1)).view_as(query)


def at_last(x: Tensor, lengths: Tensor) -> Tensor:
    """Returns the newest position of each line; `[B, L, D]` to `[B, 1, D]`."""
    return x[torch.arange(x.shape[0], device=x.device), (lengths - 1).clamp(min=0)].unsqueeze(1)


class TransformerBlock(nn.Module):
    """One pre-norm transformer block with a gated feed-forward part."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.dim)
        self.attention = CausalAttention(shape)
        self.feed_forward_norm = nn.LayerNorm(shape.dim)
        self.expand = nn.Linear(shape.dim, shape.feed_forward)
        self.contract = nn.Linear(shape.feed_forward, shape.dim)
        self.dropout = CheapDropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, L, D]` to `[B, L, D]`."""
        return self.feed(x + self.dropout(self.attention(self.attention_norm(x))))

    def last(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Computes the output of `forward` at position `lengths - 1` alone; `[B, L, D]` to `[B, 1, D]`."""
        return self.feed(at_last(x, lengths) + self.dropout(self.attention.last(self.attention_norm(x), lengths)))

    def feed(self, x: Tensor) -> Tensor:
        """The feed-forward part, position by position."""
        inner = functional.gelu(self.expand(self.feed_forward_norm(x)))
        output: Tensor = x + self.dropout(self.contract(inner))
        return output


class UserEncoder(nn.Module):
    """Reads a user's events, oldest first: vectors and types (SASRec, arXiv:1808.09781, with pre-norm blocks)."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.types = nn.Embedding(1 + shape.types, shape.dim, padding_idx=0)
        self.positions = nn.Embedding(shape.max_length, shape.dim)
        self.input_norm = nn.LayerNorm(shape.dim)
        self.dropout = CheapDropout(shape.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(shape) for _ in range(shape.layers))
        self.output_norm = nn.LayerNorm(shape.dim)
        self.apply(_initialise)
        with torch.no_grad():
            for block in self.blocks:
                # Near the identity at first, so that the output starts from the newest item's own vector.
                block.attention.output.weight.mul_(QUIET)  # type: ignore[union-attr, operator]
                block.contract.weight.mul_(QUIET)  # type: ignore[union-attr, operator]
            if not shape.ordered:
                # A set has no newest item: the output starts from the mean of the items instead.
                attention = self.blocks[0].attention
                attention.value.weight.copy_(torch.eye(shape.dim))  # type: ignore[union-attr, operator]
                attention.output.weight.copy_(torch.eye(shape.dim) * MEAN)  # type: ignore[union-attr, operator]
                self.positions.weight.zero_()

    def forward(self, vectors: Tensor, types: Tensor, lengths: Tensor) -> Tensor:
        """Predicts the item after each event.

        Args:
            vectors: float `[B, L, D]` item vectors, right padded with zeros.
            types: int64 `[B, L]` event types, 0 = padding.
            lengths: int64 `[B]`; not needed for a causal encoder, which never looks to the right.

        Returns:
            float `[B, L, D]`; position `i` has seen events `0..i`.
        """
        x = self.read(vectors, types)
        for block in self.blocks:
            x = block(x)
        hidden: Tensor = self.output_norm(x)
        return hidden

    def last(self, vectors: Tensor, types: Tensor, lengths: Tensor) -> Tensor:
        """Predicts the item after the newest event, float `[B, D]`: the last block computes that position alone."""
        # The other blocks need all positions: the last one attends to their outputs.
        x = self.read(vectors, types)
        for block in self.blocks[:-1]:
            x = block(x)
        hidden: Tensor = self.output_norm(self.blocks[-1].last(x, lengths))  # type: ignore[operator]
        return hidden.squeeze(1)

    def read(self, vectors: Tensor, types: Tensor) -> Tensor:
        """Returns the input of the first block; float `[B, L, D]`."""
        # Item vectors are short, so they are scaled up to the size of the type and position embeddings.
        x = vectors * math.sqrt(self.shape.dim) + self.types(types) + self.positions.weight[: types.shape[1]]
        read: Tensor = self.dropout(self.input_norm(x))
        return read


class ItemEncoder(nn.Module):
    """An item's vector: one from its content, plus one learned from its own events if it has any.

    Words, categories and creator share one table of embeddings; each kind is averaged, and the means are added.
    """

    def __init__(self, items: int, dim: int, shapes: ItemInputShapes, content: bool) -> None:
        super().__init__()
        self.content = content
        self.category_base = shapes.token_buckets
        self.creator_base = shapes.token_buckets + shapes.category_buckets
        self.ids = nn.Embedding(items, dim)
        self.words = nn.Embedding(1 + self.creator_base + shapes.creator_buckets, dim, padding_idx=0)
        self.mix = nn.Linear(dim + 2, dim)
        self.apply(_initialise)
        if not content:
            # Without content the mix would add one constant to all items.
            nn.init.zeros_(self.mix.weight)

    def forward(self, tokens: Tensor, categories: Tensor, creators: Tensor, prices: Tensor) -> Tensor:
        """Computes the vectors of items by content alone.

        Args:
            tokens: int64 `[B, T]`, 0 = padding.
            categories: int64 `[B, C]`, 0 = padding.
            creators: int64 `[B]`, 0 = unknown.
            prices: float `[B]`, log1p of the price, -1 = unknown.

        Returns:
            float `[B, D]`.
        """
        keys = self.keys(tokens, categories, creators)
        summed = sum((_mean(self.words(part), part > 0) for part in keys), self.words.weight.new_zeros(()))
        return self.finish(summed, prices)

    def keys(self, tokens: Tensor, categories: Tensor, creators: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns positions in the shared table of embeddings, 0 = padding."""
        return (
            tokens,
            torch.where(categories > 0, categories + self.category_base, 0),
            torch.where(creators > 0, creators + self.creator_base, 0).unsqueeze(1),
        )

    def finish(self, summed: Tensor, prices: Tensor) -> Tensor:
        """Adds the price to the sum of the means, and maps both into the space of items."""
        # Two inputs, so that an item of unknown price differs from one that is free.
        has_price = (prices >= 0).unsqueeze(1).to(summed.dtype)
        mixed: Tensor = self.mix(torch.cat([summed, prices.unsqueeze(1) * has_price, has_price], 1))
        return mixed

    def table(self, bags: ItemBags | None, keep: Tensor | None = None) -> Tensor:
        """Computes the vectors of all items, float `[N, D]`; where `keep` bool `[N]` is False, by content alone."""
        return self.vectors(self.ids.weight, bags, keep)

    def vectors(self, ids: Tensor, bags: ItemBags | None, keep: Tensor | None = None) -> Tensor:
        """Computes the vectors of some items.

        Args:
            ids: The vectors learned from their own events; float `[n, D]`.
            bags: Their content, None if items have none.
            keep: False for an item that is known by content alone; bool `[n]`, None for no such item.

        Returns:
            float `[n, D]`.
        """
        ids = ids if keep is None else ids * keep.unsqueeze(1)
        if bags is None:
            return ids
        return ids + self.finish(bags.sum(self.words.weight), bags.prices)

    @torch.no_grad()
    def finished_table(self, bags: ItemBags | None, keep: Tensor) -> Tensor:
        """Computes `table` without a gradient, a large one in blocks, which need less memory."""
        ids = self.ids.weight
        if ids.shape[0] <= TABLE_BLOCK:
            return self.table(bags, keep)
        table = torch.empty_like(ids)
        for start in range(0, ids.shape[0], TABLE_BLOCK):
            part = slice(start, min(start + TABLE_BLOCK, ids.shape[0]))
            content = None if bags is None else bags.take(torch.arange(part.start, part.stop, device=ids.device))
            table[part] = self.vectors(ids[part], content, keep[part])
        return table


@dataclass(frozen=True)
class ItemBags:
    """The content of some items as one sparse matrix over the shared table of embeddings, by row and by column.

    Both orders are needed because a gradient sums over the columns as the result sums over the rows: the same sums as
    in `ItemEncoder.forward`, ten times as fast with the gradient.

    Attributes:
        by_item: The keys of each item after those of the one before, int64 `[K]`; the start of each item's, int64
            `[n]`; the weight of each key, float `[K]`.
        prices: float `[n]`, as `ItemEncoder.forward` reads them.
        size: Rows of the shared table.
    """

    by_item: tuple[Tensor, Tensor, Tensor]
    prices: Tensor
    size: int

    @classmethod
    def build(cls, encoder: ItemEncoder, inputs: Mapping[str, Tensor]) -> ItemBags:
        """Builds the matrix from the tensors of `features.transforms.item_inputs`, one row per item."""
        keys = encoder.keys(inputs["tokens"], inputs["categories"], inputs["creators"])
        items, columns, weights = [], [], []
        for part in keys:
            present = part > 0
            share = 1 / present.sum(1).clamp(min=1)
            rows = present.nonzero()[:, 0]
            items.append(rows)
            columns.append(part[present])
            weights.append(share[rows])
        item, key, weight = torch.cat(items), torch.cat(columns), torch.cat(weights).float()
        return cls(_grouped(item, key, weight, len(keys[0])), inputs["prices"], encoder.words.num_embeddings)

    @functools.cached_property
    def by_key(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same matrix by column; made when a gradient first needs it."""
        return _grouped(self.by_item[0], self._items(), self.by_item[2], self.size)

    def take(self, rows: Tensor) -> ItemBags:
        """Returns the content of some of the items, in their order; `rows` int64 `[m]`."""
        keys, starts, weights = self.by_item
        counts = self._counts[rows]
        offsets = torch.cumsum(counts, 0) - counts
        at = torch.repeat_interleave(starts[rows] - offsets, counts)
        at += torch.arange(at.numel(), device=at.device)
        return ItemBags((keys[at], offsets, weights[at]), self.prices[rows], self.size)

    def sum(self, table: Tensor) -> Tensor:
        """Returns sums of the means, with their gradient; float `[n, D]`."""
        summed: Tensor = _BagSum.apply(table, self)  # type: ignore[no-untyped-call]
        return summed

    @functools.cached_property
    def _counts(self) -> Tensor:
        keys, starts, _ = self.by_item
        return torch.diff(starts, append=starts.new_tensor([keys.numel()]))

    def _items(self) -> Tensor:
        counts = self._counts
        return torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)


class _BagSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, bags: ItemBags) -> Tensor:
        ctx.bags = bags
        return _weighted_sums(table, bags.by_item)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _weighted_sums(gradients[0].contiguous(), ctx.bags.by_key), None


def _weighted_sums(table: Tensor, groups: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    members, offsets, weights = groups
    return functional.embedding_bag(members, table, offsets, mode="sum", per_sample_weights=weights)


def _grouped(group: Tensor, member: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the members sorted by group, the start of each group, and the weights."""
    # Stable, so that the sums of a group are added in the same order, and to the same bits, in each run.
    order = torch.argsort(group, stable=True)
    offsets = torch.zeros(groups, dtype=torch.int64, device=group.device)
    offsets[1:] = torch.bincount(group, minlength=groups).cumsum(0)[:-1]
    return member[order], offsets, weight[order]


class QueryEncoder(nn.Module):
    """A query's words as a point in the space of items: a weighted mean of word vectors and a small network."""

    def __init__(self, token_buckets: int, dim: int) -> None:
        super().__init__()
        self.words = nn.Embedding(1 + token_buckets, dim, padding_idx=0)
        self.weights = nn.Embedding(1 + token_buckets, 1, padding_idx=0)
        self.hidden = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(2 * dim, dim)
        self.apply(_initialise)
        # Their exponentials are the weights: all words weigh alike at first, and no weight ever falls below 0.
        nn.init.zeros_(self.weights.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps words int64 `[B, T]` (0 = padding) to float `[B, D]`; no word at all gives a constant."""
        weights = torch.exp(self.weights(tokens)) * (tokens > 0).unsqueeze(2)
        mean = (self.words(tokens) * weights).sum(1) / weights.sum(1).clamp(min=1e-6)
        output: Tensor = self.output(functional.gelu(self.hidden(mean)))
        return output


def _mean(vectors: Tensor, present: Tensor) -> Tensor:
    """Returns the mean over dimension 1 of the vectors present, zeros if none is."""
    mask = present.unsqueeze(2).to(vectors.dtype)
    return (vectors * mask).sum(1) / mask.sum(1).clamp(min=1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
