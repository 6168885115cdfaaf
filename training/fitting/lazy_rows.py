"""Trains the rows of a large table at the cost of the rows that a step uses, with the weights that AdamW would give.

AdamW moves every row in every step: one without a gradient shrinks by the weight decay and goes on by its momentum. For
a row that steps leave out, both are sums that depend on when it was last used alone, so they are made up for when the
row is used next.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETAS = (0.9, 0.98)
"""As for other transformers (arXiv:1706.03762): squared gradients are remembered for 50 steps, not 1,000."""
EPSILON = 1e-8
_FADED = 256
"""Steps after which momentum moves a row no more: the ratio of both decays to this power is 3e-11."""
_BLOCK = 1 << 16


class LazyRows:
    """AdamW (arXiv:1711.05101) over a table, a step of which touches only the rows that it uses.

    The same as `torch.optim.AdamW` over the whole table to float32's rounding, but for the constant that keeps AdamW
    from dividing by zero: here it does not weigh more while a row rests.

    Attributes:
        weight: The table, float `[N, D]`; rows that no step has used lately lack their missed steps until `settle`.
    """

    def __init__(self, weight: Tensor, weight_decay: float) -> None:
        """Takes the table, which is trained in place, and the rate of its decay."""
        self.weight, self.weight_decay = weight.detach(), weight_decay
        self.mean, self.square = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.last = torch.zeros(self.weight.shape[0], dtype=torch.int64, device=self.weight.device)
        self.step = 0
        # By step: how far momentum moves a row last used there, per unit of mean over root of square, up to now, in
        # units of before the decay since; and the logarithm of all decay up to that step.
        self._tails = torch.zeros(1, dtype=torch.float64)
        self._decays = torch.zeros(1, dtype=torch.float64)

    def read(self, rows: Tensor) -> Tensor:
        """Returns rows as they are after the steps so far, ready for a gradient; float `[n, D]`.

        Args:
            rows: int64 `[n]` without repeats, on the table's device.
        """
        self._catch_up(rows)
        return self.weight[rows].requires_grad_()

    def update(self, rows: Tensor, read: Tensor, rate: float) -> None:
        """Makes a step at a learning rate.

        Args:
            rows: As in the last call of `read`.
            read: The result of that call, with its gradient.
            rate: The learning rate.
        """
        self._advance(rate)
        gradient = read.grad if read.grad is not None else torch.zeros_like(read)
        mean = self.mean[rows].mul_(BETAS[0]).add_(gradient, alpha=1 - BETAS[0])
        square = self.square[rows].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        self.mean[rows], self.square[rows] = mean, square
        bias, root = 1 - BETAS[0] ** self.step, math.sqrt(1 - BETAS[1] ** self.step)
        decayed = read.detach() * (1 - rate * self.weight_decay)
        self.weight[rows] = decayed.addcdiv_(mean, square.sqrt().div_(root).add_(EPSILON), value=-rate / bias)
        self.last[rows] = self.step

    def settle(self) -> None:
        """Makes up for the missed steps of all rows, so that `weight` is what AdamW would have."""
        for start in range(0, self.weight.shape[0], _BLOCK):
            end = min(start + _BLOCK, self.weight.shape[0])
            self._catch_up(torch.arange(start, end, device=self.weight.device))

    def state(self) -> dict[str, Tensor]:
        """Returns all that the next step depends on but the weights."""
        past = {"tails": self._tails[: self.step + 1], "decays": self._decays[: self.step + 1]}
        return {"mean": self.mean, "square": self.square, "last": self.last, **past}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` returned; the weights are restored by their owner."""
        for name in ("mean", "square", "last"):
            getattr(self, name).copy_(state[name])
        self._tails, self._decays = state["tails"].clone(), state["decays"].clone()
        self.step = self._tails.numel() - 1

    def _advance(self, rate: float) -> None:
        """Counts a step, and notes its part in what rows that it leaves out will miss."""
        step = self.step = self.step + 1
        if step >= self._tails.numel():
            grown = torch.zeros(self._tails.numel(), dtype=torch.float64)
            self._tails, self._decays = torch.cat([self._tails, grown]), torch.cat([self._decays, grown])
        # A rate that would decay a row to less than nothing is no reason to end here: the loss tells of it.
        self._decays[step] = self._decays[step - 1] + math.log(max(1 - rate * self.weight_decay, 1e-30))
        ratio = BETAS[0] / math.sqrt(BETAS[1])
        corrected = rate * math.sqrt(1 - BETAS[1] ** step) / (1 - BETAS[0] ** step)
        missing = slice(max(0, step - _FADED), step)
        decay = torch.exp(self._decays[missing] - self._decays[step])
        rests = torch.arange(step - missing.start, 0, -1, dtype=torch.float64)
        self._tails[missing] += corrected * ratio**rests * decay

    def _catch_up(self, rows: Tensor) -> None:
        """Makes up for the steps since the rows were last used, up to the newest step."""
        last = self.last[rows]
        missed = (last < self.step).nonzero()[:, 0]
        rows, past = rows[missed], last[missed].cpu()
        if not rows.numel():
            return
        device, kind = self.weight.device, self.weight.dtype
        tails = self._tails[past].to(device, kind).unsqueeze(1)
        kept = torch.exp(self._decays[self.step] - self._decays[past]).to(device, kind).unsqueeze(1)
        mean, square = self.mean[rows], self.square[rows]
        self.weight[rows] = (self.weight[rows] - mean / (square.sqrt() + EPSILON) * tails) * kept
        steps = (self.step - past).to(torch.float64)
        self.mean[rows] = mean * torch.pow(BETAS[0], steps).to(device, kind).unsqueeze(1)
        self.square[rows] = square * torch.pow(BETAS[1], steps).to(device, kind).unsqueeze(1)
        self.last[rows] = self.step
