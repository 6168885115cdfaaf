"""Makes the steps of the encoders' training: the loss of a batch, its gradients, and the optimizer's update."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from features.errors import TrainingError
from training.config import TrainConfig
from training.data.batches import Batch, to_device
from training.fitting.lazy_rows import BETAS, LazyRows
from training.models.encoders import ItemBags
from training.models.extensions import loss_of
from training.models.losses import ROUND, sample_items
from training.models.scoring import gather
from training.run import Modules

FULL_SOFTMAX_ITEMS = 20_000
"""Items up to which the loss is the full softmax: exact, and up to here affordable."""
MANY_NEGATIVES = 4_096
CUDA_SCORES = 1 << 27
"""Scores that a GPU holds at once at least: it is faster with few large products."""


class EncoderStep:
    """Steps of `modules.user` and `modules.item`, over all item vectors or over those that the batch uses.

    Attributes:
        trained: True for an item with a training event; bool `[N]`, on the training device.
        parameters: The weights that the optimizer updates as wholes.
        lazy: The items' own vectors, if steps touch only the rows that they use; else they are among `parameters`.
    """

    def __init__(
        self,
        config: TrainConfig,
        modules: Modules,
        bags: ItemBags | None,
        events: npt.NDArray[np.float64],
        targets: npt.NDArray[np.float64],
    ) -> None:
        """Takes the networks, and each item's training events and targets among them; float64 `[N]` each."""
        self.config, self.modules, self.bags, self.loss = config, modules, bags, loss_of(config)
        ids = modules.item.ids.weight
        self.device = ids.device
        self.trained = torch.from_numpy(events > 0).to(self.device)
        self.trained_rows = self.trained.nonzero()[:, 0]
        self.trained_place = torch.cumsum(self.trained.cpu(), 0) - 1
        self.popularity = torch.from_numpy(targets / max(1, targets.sum())).float()[self.trained_rows.cpu()]
        items = events.size
        negatives = config.negatives or (0 if items <= FULL_SOFTMAX_ITEMS else MANY_NEGATIVES)
        # Shared by a batch are all items that were trained, or fewer: an item without a training event is never a
        # target, so as a negative it would only learn to be refused. Validation and test items, and cold ones, would
        # sink before anyone has chosen them.
        self.negatives = negatives if negatives < self.trained_rows.numel() else 0
        self.lazy = LazyRows(ids, config.weight_decay) if self.negatives and items > config.dense_items else None
        if self.lazy is not None:
            ids.requires_grad_(False)
        self.parameters = [p for p in (*modules.user.parameters(), *modules.item.parameters()) if p.requires_grad]
        # Weight decay is for matrices: pulled to zero, a norm's gain or a bias would only lose what it has learned.
        decayed = [p for p in self.parameters if p.ndim > 1]
        plain = [p for p in self.parameters if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=BETAS,
            fused=True,
        )

    def make(self, batch: Batch, rate: float) -> Tensor:
        """Makes one step at a learning rate and returns the loss.

        Over all item vectors no line here waits for a GPU, which computes earlier steps while the CPU prepares this
        one.
        """
        self.modules.user.train()
        self.modules.item.train()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return self._over_all(batch) if self.lazy is None else self._over_used(self.lazy, batch, rate)

    def settle(self) -> None:
        """Brings the weights up to date for a reader: until then rows may lack the steps that left them out."""
        if self.lazy is not None:
            self.lazy.settle()

    def state(self) -> dict[str, Tensor]:
        """Returns all that the next step depends on but the weights."""
        states = [self.optimizer.state.get(parameter, {}) for parameter in self.parameters]
        moments = {f"adam.{number}.{key}": value for number, state in enumerate(states) for key, value in state.items()}
        lazy = {} if self.lazy is None else self.lazy.state()
        return moments | {f"rows.{key}": value for key, value in lazy.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `state` returned, from among other tensors.

        Raises:
            TrainingError: An older version wrote them, which kept no moments by row.
        """
        rows = _below(tensors, "rows.")
        if self.lazy is not None and not rows:
            raise TrainingError(
                "the checkpoint was written by an older version, which updated all items in each step: delete "
                "checkpoint.safetensors in the run's directory to train from the start"
            )
        for number, parameter in enumerate(self.parameters):
            state = _below(tensors, f"adam.{number}.")
            if state:
                # The fused optimizer counts its steps on the weights' device, and a checkpoint may change devices.
                self.optimizer.state[parameter] = {key: value.to(self.device) for key, value in state.items()}
        if self.lazy is not None:
            self.lazy.restore(rows)

    def _over_all(self, batch: Batch) -> Tensor:
        """Makes a step that computes the vectors of all items, and updates all of them."""
        table = self.modules.item.table(self.bags, self._kept(self.trained))
        users, targets = self._users(gather(table, batch), batch)
        if self.trained_rows.numel() < table.shape[0]:
            table, targets = table[self.trained_rows], self.trained_place[targets]
        # Sampled negatives are uniform and shared by the batch: one matrix product scores them for every user, and the
        # correction makes up for the targets among them, which come as often as they are popular.
        correction = None
        if self.negatives:
            rows, targets, correction = sample_items(targets, self.popularity, self.negatives)
            table, correction = table[to_device(rows, self.device)], to_device(correction, self.device)
        loss = self._loss(users, table, targets, correction)
        self._update(loss)
        return loss.detach()

    def _over_used(self, lazy: LazyRows, batch: Batch, rate: float) -> Tensor:
        """Makes a step that computes and updates only the vectors of the batch's items, targets and negatives."""
        assert batch.targets is not None
        wanted = batch.targets[batch.targets >= 0]
        places, targets, correction = sample_items(
            self.trained_place[wanted], self.popularity, self.negatives, replace=True
        )
        scored = self.trained_rows[to_device(places, self.device)]
        used, place = torch.unique(torch.cat([batch.rows.flatten(), scored]), return_inverse=True)
        ids = lazy.read(used)
        table = self._vectors(used, ids)
        read, scored = place[: batch.rows.numel()].view_as(batch.rows), place[batch.rows.numel() :]
        vectors = functional.embedding(read, table) * (batch.types > 0).unsqueeze(2)
        users, _ = self._users(vectors, batch)
        loss = self._loss(users, functional.embedding(scored, table), targets, to_device(correction, self.device))
        self._update(loss, ids)
        lazy.update(used, ids, rate)
        return loss.detach()

    def _vectors(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Computes the vectors of some items, and of some more that fill them up; float `[n, D]`."""
        item = self.modules.item
        if self.bags is None:
            return item.vectors(ids, None, self._kept(self.trained[rows]))
        # How many items a batch uses differs, and matrix products are compiled for each different size.
        more = -rows.numel() % ROUND
        rows, ids = functional.pad(rows, (0, more)), functional.pad(ids, (0, 0, 0, more))
        return item.vectors(ids, self.bags.take(rows), self._kept(self.trained[rows]))

    def _kept(self, trained: Tensor) -> Tensor:
        """Returns False for the items that are known by content alone in this step."""
        if self.bags is None or not self.config.id_dropout:
            return trained
        # A random part of them is, so that content learns to place an item whose own vector says nothing yet, as a new
        # item's will.
        return trained & (torch.rand(trained.shape, device=self.device) >= self.config.id_dropout)

    def _users(self, vectors: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the users at the positions that have a target, float `[T, D]`, and the targets' rows, on the CPU."""
        assert batch.targets is not None
        hidden = self.modules.user(vectors, batch.types, batch.lengths)
        targets = batch.targets.flatten()
        counted = (targets >= 0).nonzero()[:, 0]
        return hidden.flatten(0, 1).index_select(0, to_device(counted, self.device)), targets[counted]

    def _loss(self, users: Tensor, table: Tensor, targets: Tensor, correction: Tensor | None) -> Tensor:
        chunk = self.config.loss_chunk
        if self.device.type == "cuda":
            chunk = min(max(chunk, CUDA_SCORES // table.shape[0]), users.shape[0])
        return self.loss(users, table, to_device(targets, self.device), correction, chunk)

    def _update(self, loss: Tensor, *more: Tensor) -> None:
        """Updates `parameters`, by gradients that are clipped together with those of `more`."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        # A batch with one long, odd history must not throw the weights far away. Rows that the batch leaves out have
        # no gradient, so they have no part in the norm.
        clip_grad_norm_([*self.parameters, *more], self.config.clip)
        self.optimizer.step()


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
