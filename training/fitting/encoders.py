"""Trains the user and item encoders: steps, validations, checkpoints, and an exact resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from features.errors import TrainingError
from training.config import TrainConfig
from training.data.batches import Batch, TrainingBatches
from training.data.interactions import Interactions
from training.data.split import Split, Targets
from training.fitting.progress import ProgressDisplay, TrainingState
from training.fitting.step import EncoderStep
from training.fitting.tensorboard import LogLine, open_tensorboard
from training.metrics import ndcg
from training.models.baselines import counts_of
from training.models.encoders import ItemBags
from training.models.scoring import mask_seen, rank_slices, ranks_of, seen_before, user_vectors
from training.run import Modules, append_line, keep_lines, save_modules, sha256_of, write_tensors

OnStep: TypeAlias = Callable[[int], None]
OnValidation: TypeAlias = Callable[[LogLine], None]
FINAL_RATE = 0.01
"""Share of the learning rate that is left at the end."""


@dataclass(frozen=True)
class Schedule:
    """The course of the learning rate: it rises over the warm-up, then falls along a cosine.

    Attributes:
        epochs: Passes over the events, not always whole ones.
        rate: The highest learning rate.
        warm_up: Steps over which it rises; below 1 a share of all.
        begins_trained: The weights are those of an earlier run, so they are measured before the first step too: the
            training never ends with worse ones. The last ones are measured in any case.
    """

    epochs: float
    rate: float
    warm_up: float
    begins_trained: bool = False

    @classmethod
    def of(cls, config: TrainConfig) -> Schedule:
        """Returns that of a full training."""
        return cls(config.epochs, config.learning_rate, config.warmup_steps)

    def rate_at(self, step: int, passed: float, per_epoch: int) -> float:
        """Returns the learning rate of a step, `passed` epochs of `per_epoch` steps after the first one."""
        warm_up = self.warm_up if self.warm_up >= 1 else self.warm_up * self.epochs * per_epoch
        rise = min(1.0, (step + 1) / max(1, warm_up))
        share = min(1.0, passed / self.epochs)
        return self.rate * (rise * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * share))))


class EncoderTrainer:
    """Trains `modules.user` and `modules.item`; the best by validation end up in `RUN/model.safetensors`."""

    def __init__(
        self,
        out: Path,
        config: TrainConfig,
        data: Interactions,
        division: Split,
        modules: Modules,
        bags: ItemBags | None,
        on_step: OnStep | None = None,
        on_validation: OnValidation | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self.schedule = schedule or Schedule.of(config)
        self.out, self.config, self.data, self.division, self.bags = out, config, data, division, bags
        self.modules, self.on_step, self.on_validation = modules, on_step, on_validation
        self.device = modules.item.ids.weight.device
        self.batches = TrainingBatches(data, division.train_end, config, self.device)
        targets = counts_of(data, division.train_end, data.target)
        self.step = EncoderStep(config, modules, bags, counts_of(data, division.train_end), targets)
        self.trained = self.step.trained
        self.state = TrainingState()
        # Of all targets since the last validation; on the device, because reading a number waits for it.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.draw = open_tensorboard(out, config)

    def run(self) -> dict[str, Any]:
        """Trains to the end, or from the checkpoint on.

        Returns:
            `tokens_per_second`, `best_validation`, `epochs`, `steps`, `sha256` of weights and optimizer after the last
            step, and `seconds_before`, the seconds spent before an interruption; with weights of an earlier run also
            `first_validation`.
        """
        self._resume()
        before, began = self.state.seconds, time.monotonic()
        saved = began
        with ProgressDisplay(self.schedule.epochs) as display:
            if self.schedule.begins_trained and not self.state.step and len(self.division.validation):
                self._tell(display, self._validate(0.0))
                self.state.first = self.state.best
            while not self.state.finished:
                plan = self.batches.epoch(self.state.epoch)
                while self.state.batch < len(plan) and not self.state.finished:
                    self._step(self.batches.batch(plan[self.state.batch], self.state.epoch), len(plan))
                    self.state.batch += 1
                    self.state.seconds = before + time.monotonic() - began
                    passed = self.state.passed(len(plan))
                    # At the end at least, or a loss that is no number would never be seen.
                    is_end = passed >= self.schedule.epochs - 1e-9
                    is_last = is_end and (self.schedule.begins_trained or not self.state.best_step)
                    if is_last or passed >= self.state.validated + self.config.validate_every - 1e-9:
                        self._tell(display, self._validate(passed))
                    self.state.finished |= is_end and self.schedule.begins_trained
                    # A checkpoint writes all weights and moments, so the clock decides: a step may take milliseconds.
                    if time.monotonic() - saved > self.config.checkpoint_seconds:
                        self._save()
                        saved = time.monotonic()
                    display.step(self.state, len(plan))
                    if self.on_step is not None:
                        self.on_step(self.state.step)
                self.state.epoch, self.state.batch = self.state.epoch + 1, 0
                self.state.finished |= self.state.epoch >= self.schedule.epochs
        self._save_end()
        begun = {"first_validation": self.state.first} if self.schedule.begins_trained else {}
        return begun | {
            "tokens_per_second": round(self.state.rate(), 1),
            "best_validation": {"ndcg@10": self.state.best} if len(self.division.validation) else {},
            "epochs": round(self.state.validated, 3) if self.schedule.begins_trained else self.state.epoch,
            "steps": self.state.step,
            "sha256": {"weights": sha256_of(self._weights()), "optimizer": sha256_of(self._moments())},
            "seconds_before": before,
        }

    def _tell(self, display: ProgressDisplay, line: LogLine) -> None:
        display.validation(self.state, line)
        if self.on_validation is not None:
            self.on_validation(line)

    def _step(self, batch: Batch, per_epoch: int) -> Tensor:
        """Makes one step of the optimizer and returns the loss."""
        rate = self.schedule.rate_at(self.state.step, self.state.passed(per_epoch), per_epoch)
        loss = self.step.make(batch, rate)
        self.state.step += 1
        self.state.tokens += batch.tokens
        assert batch.targets is not None
        targets = int((batch.targets >= 0).sum())
        self.loss_sum += loss.double() * targets
        self.state.targets += targets
        return loss

    def _validate(self, passed: float) -> LogLine:
        """Measures the held-out events, keeps the best weights, and decides if the training goes on.

        Returns:
            The line of `log.jsonl`: `loss` is the mean over the targets since the last validation, None before the
            first step.

        Raises:
            TrainingError: The loss is no longer a number.
        """
        # Reading a number waits for the device, so the loss is read at validations and checkpoints alone.
        loss = float(self.loss_sum) / max(1, self.state.targets)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.state.step}: train again with a learning_rate below "
                f"{self.config.learning_rate:g}"
            )
        self.loss_sum.zero_()
        self.state.targets, self.state.validated = 0, passed
        self.step.settle()
        value, validation_loss = self._measure(self.division.validation)
        line: LogLine = {
            "epoch": round(passed, 3),
            "step": self.state.step,
            "seconds": round(self.state.seconds, 1),
            "loss": loss if self.state.step else None,
            "validation_loss": validation_loss,
            "ndcg@10": value,
            "tokens": self.state.tokens,
        }
        append_line(self.out / "log.jsonl", line)
        self.draw(line)
        if value > self.state.best or not len(self.division.validation):
            self._keep_best(value)
        else:
            self.state.waited += 1
            self.state.finished = self.state.waited >= self.config.patience
        return line

    def _keep_best(self, value: float) -> None:
        self.state.best, self.state.best_step, self.state.waited = value, self.state.step, 0
        # Written at once: after an interruption the best weights are still on the disk, outside the checkpoint.
        save_modules(self.out / "model.safetensors", {"user": self.modules.user, "item": self.modules.item})

    def _measure(self, targets: Targets) -> tuple[float, float | None]:
        """Returns mean NDCG@10 of relevance alone, and the mean loss, over at most `validation_users` of the targets.

        The loss is None if no training event names the item of any target.
        """
        if not len(targets):
            return 0.0, None
        # The same sample at every validation, or chance would choose the best weights.
        targets = targets.sample(self.config.validation_users, self.config.seed)
        self.modules.user.eval()
        with torch.inference_mode():
            table = self.modules.item.eval().finished_table(self.bags, self.trained)
        users = torch.from_numpy(user_vectors(self.modules.user, table, self.data, targets, self.config.max_length))
        values, losses = [], []
        for part in rank_slices(len(targets), self.data.items):
            batch = targets.take(np.arange(part.start, part.stop))
            device_scores = (users[part].to(self.device) @ table.T).float()
            losses.append(self._losses(device_scores, batch.rows(self.data)))
            scores = device_scores.cpu().numpy()
            if not self.config.repeats:
                mask_seen(scores, seen_before(self.data, batch))
            values.append(ndcg(ranks_of(scores, batch.rows(self.data)), 10))
        loss = torch.cat(losses)
        return float(np.concatenate(values).mean()), float(loss.mean()) if loss.numel() else None

    def _losses(self, scores: Tensor, rows: npt.NDArray[np.int32]) -> Tensor:
        """Computes the cross-entropy of the targets that training can know; float64 `[m]`.

        It is that of a step over all items, or what a step with sampled negatives estimates; without dropout.
        """
        targets = torch.from_numpy(rows.astype(np.int64)).to(self.device)
        # Among the items that have training events alone, as in a step: no step has pushed the others away.
        known = scores if self.trained.all() else scores.masked_fill(~self.trained, -torch.inf)
        losses = known.logsumexp(1).double() - scores.gather(1, targets[:, None])[:, 0]
        return losses[self.trained[targets]]

    def _save(self) -> None:
        """Writes all that the next step depends on: weights, moments, random states, and the place in the epoch.

        Batches are not written, since the seed and the epoch's number give them again. So a resumed training ends with
        the weights of one that was never interrupted, bit for bit.
        """
        tensors: dict[str, Tensor] = {"random": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random_cuda"] = torch.cuda.get_rng_state(self.device)
        tensors |= self._weights() | self._moments() | {"loss_sum": self.loss_sum}
        write_tensors(self.out / "checkpoint.safetensors", tensors, {"state": json.dumps(asdict(self.state))})

    def _save_end(self) -> None:
        """Writes the last checkpoint; its weights lack no step."""
        self.step.settle()
        self._save()

    def _weights(self) -> dict[str, Tensor]:
        networks = (("user", self.modules.user), ("item", self.modules.item))
        return {f"{name}.{key}": value for name, module in networks for key, value in module.state_dict().items()}

    def _moments(self) -> dict[str, Tensor]:
        return self.step.state()

    def _resume(self) -> None:
        """Restores the checkpoint, if there is one; else empties the log of an earlier attempt."""
        path = self.out / "checkpoint.safetensors"
        if not path.exists():
            keep_lines(self.out / "log.jsonl", lambda line: False)
            return
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            self.state = TrainingState(**json.loads(file.metadata()["state"]))
        # Validations after the checkpoint will happen again, so their lines go.
        keep_lines(self.out / "log.jsonl", lambda line: line["step"] <= self.state.step)
        for name, module in (("user", self.modules.user), ("item", self.modules.item)):
            prefix = f"{name}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        self.step.restore(tensors)
        # An older version kept none, and its state counts no targets: the mean then begins at the checkpoint.
        if "loss_sum" in tensors:
            self.loss_sum.copy_(tensors["loss_sum"])
        torch.set_rng_state(tensors["random"])
        if "random_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random_cuda"], self.device)
