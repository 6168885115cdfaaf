"""Training and encoding on a GPU: equal weights in float32, reproducible runs, checkpoints that move, and rates."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from features.tables.dataset import open_dataset, write_dataset
from features.tables.schema import EVENTS, ITEMS
from training.config import TrainConfig, load_config
from training.data.split import held_out
from training.fitting.encoders import EncoderTrainer
from training.metrics import hit, ndcg
from training.models.encoders import EncoderShape, ItemBags, UserEncoder
from training.models.scoring import mask_seen, rank_slices, ranks_of, seen_before, user_vectors
from training.run import load_modules, sha256_of
from training.runtime import exact, prepared
from training.train import Material, initial_modules, read_material

USERS, FILMS, RATINGS = 6040, 3416, 1_000_000
CLOSE = 1e-4
_LARGE = 32768
_STEPS = 4
_WARM = 30
_CPU = torch.device("cpu")


def training(device: torch.device, data: Path | None, seconds: float, epochs: int = 0) -> dict[str, Any]:
    """Checks the loop on the device, and measures it.

    Args:
        device: The GPU, or the CPU for a rehearsal.
        data: Canonical tables; None draws random ones of MovieLens-1M's shape.
        seconds: Longest time of each rate.
        epochs: Epochs of the training to quality; 0: those of the configuration.

    Returns:
        `apart` {loss, weights}: relative difference from the CPU after some steps in float32; `control`, that of
        weights one step apart; `same_twice`; `moved`, that of a checkpoint that continues on the other device;
        `tokens_per_second` {training: rate}; `quality`, as configured and with larger batches.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = data or drawn(Path(folder) / "data")
        config = load_config(Path("movielens"), {"threads": 0, "checkpoint_seconds": 1e6})
        with prepared(config.threads, device):
            material = {kind: read_material(open_dataset(path), config, kind) for kind in {_CPU, device}}
            trial = _Trial(material, config, Path(folder))
            apart, moved = trial.apart(device), trial.moved(device)
            checks: dict[str, Any] = {
                "control": apart.pop("control"),
                "apart": apart,
                "same_twice": trial.digest(device) == trial.digest(device),
                "moved": moved,
            }
            measured = trial.measured(device, seconds, epochs)
    return {
        "data": "drawn" if data is None else data.name,
        **checks,
        **measured,
        "faults": list(_faults(**checks)),
    }


def _faults(apart: dict[str, float], control: float, same_twice: bool, moved: dict[str, float]) -> Iterator[str]:
    if max(apart.values()) > CLOSE:
        yield f"float32 training differs from the CPU's: {apart}"
    if control <= CLOSE:
        yield f"control: weights one step apart are only {control} apart"
    if not same_twice:
        yield "the same seed gave other weights"
    if max(moved.values()) > CLOSE:
        yield f"a checkpoint did not move between devices: {moved}"


class _Trial:
    """Trainings of one configuration on one data set."""

    def __init__(self, material: dict[torch.device, Material], config: TrainConfig, folder: Path) -> None:
        self.material, self.config, self.folder, self.number = material, config, folder, 0

    def measured(self, device: torch.device, seconds: float, epochs: int) -> dict[str, Any]:
        """Returns the rates on both devices, and the quality on this one."""
        rates = {
            "cpu": self.rate(_CPU, seconds),
            "gpu": self.rate(device, seconds),
            # A small model keeps a GPU busy only with large batches.
            f"gpu, {_LARGE} tokens a batch": self.rate(device, seconds, batch_tokens=_LARGE),
        }
        quality = [
            self.quality(device, epochs or self.config.epochs, **changes)
            for changes in ({}, {"batch_tokens": 8192, "learning_rate": 0.006})
        ]
        return {"tokens_per_second": rates, "quality": quality}

    def fit(self, device: torch.device, out: Path | None = None, **changes: Any) -> EncoderTrainer:
        """Returns a training that has not begun; in a folder of its own unless `out` is given."""
        self.number += 1
        out = out or self.folder / f"run-{self.number}"
        out.mkdir(exist_ok=True)
        material, config = self.material[device], self.config.model_copy(update=changes)
        torch.manual_seed(config.seed)
        modules = initial_modules(material, config, device, fresh=True)
        bags = None if material.inputs is None else ItemBags.build(modules.item, material.inputs)
        return EncoderTrainer(out, config, material.data, material.division, modules, bags)

    def steps(self, fit: EncoderTrainer, count: int) -> list[float]:
        """Continues by some steps; returns their losses."""
        plan = fit.batches.epoch(fit.state.epoch)
        losses = []
        for _ in range(count):
            losses.append(fit._step(fit.batches.batch(plan[fit.state.batch % len(plan)]), len(plan)))
            fit.state.batch += 1
        return [float(loss) for loss in losses]

    def apart(self, device: torch.device) -> dict[str, float]:
        """Returns the largest differences of losses and weights from the CPU's, in float32 and without dropout."""
        # Dropout draws from each device's own generator, so with it the two could not agree.
        with exact():
            fits = [self.fit(kind, dropout=0.0, id_dropout=0.0) for kind in (_CPU, device)]
            losses = [self.steps(fit, _STEPS) for fit in fits]
            loss = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
            weights = _weights_apart(*fits)
            self.steps(fits[0], 1)
        return {"loss": loss, "weights": weights, "control": _weights_apart(*fits)}

    def moved(self, device: torch.device) -> dict[str, float]:
        """Returns the difference of the weights if a checkpoint of one device continues on the other or on its own."""
        apart = {}
        with exact():
            for begin, end in ((device, _CPU), (_CPU, device)):
                first = self.fit(begin, dropout=0.0, id_dropout=0.0)
                self.steps(first, _STEPS)
                first._save()
                second = self.fit(end, first.out, dropout=0.0, id_dropout=0.0)
                second._resume()
                self.steps(first, 1)
                self.steps(second, 1)
                apart[f"{begin.type} to {end.type}"] = _weights_apart(first, second)
        return apart

    def digest(self, device: torch.device) -> dict[str, str] | str:
        """Returns a digest of the weights after some steps as trainings take them: with dropout and fast products."""
        fit = self.fit(device)
        self.steps(fit, _STEPS * 2)
        return sha256_of(fit._weights())

    def rate(self, device: torch.device, seconds: float, **changes: Any) -> float:
        """Returns the real tokens a second, after steps that compile kernels and fill caches for the others."""
        fit = self.fit(device, **changes)
        plan = fit.batches.epoch(0)
        warm = min(_WARM, len(plan) // 2)
        self.steps(fit, warm)
        # A GPU works on after its calls return: the clock starts and stops when it is idle.
        _wait(device)
        began, tokens, at = time.monotonic(), fit.state.tokens, warm
        while at < len(plan) and time.monotonic() - began < seconds:
            fit._step(fit.batches.batch(plan[at]), len(plan))
            at += 1
        _wait(device)
        return round((fit.state.tokens - tokens) / (time.monotonic() - began), 1)

    def quality(self, device: torch.device, epochs: int, **changes: Any) -> dict[str, Any]:
        """Trains the encoders to the end and places the test's targets by relevance alone, seen items masked.

        Returns:
            `batch_tokens`, `seconds` of the encoders, `epochs`, `best_validation`, `hit@10`, `ndcg@10`, and
            `utilisation`, the mean share of time in which the GPU was at work, None if its driver does not say.
        """
        fit = self.fit(device, epochs=epochs, **changes)
        with _watched(device) as shares:
            progress = fit.run()
        _wait(device)
        # The weights of the best validation, not those of the last step.
        load_modules(fit.out / "model.safetensors", {"user": fit.modules.user, "item": fit.modules.item})
        with exact():
            ranks = self._ranks(fit)
        return {
            "batch_tokens": fit.config.batch_tokens,
            "seconds": round(fit.state.seconds, 1),
            "epochs": progress["epochs"],
            "best_validation": progress["best_validation"],
            "tokens_per_second": progress["tokens_per_second"],
            "hit@10": round(float(hit(ranks, 10).mean()), 4),
            "ndcg@10": round(float(ndcg(ranks, 10).mean()), 4),
            "utilisation": round(float(np.mean(shares)), 3) if shares else None,
        }

    def _ranks(self, fit: EncoderTrainer) -> Any:
        targets = held_out(fit.data, self.config, "leave-one-out")
        fit.modules.user.eval()
        with torch.inference_mode():
            table = fit.modules.item.eval().table(fit.bags, fit.trained)
        users = user_vectors(fit.modules.user, table, fit.data, targets, self.config.max_length)
        vectors, ranks = table.float().cpu().numpy(), []
        for part in rank_slices(len(targets), fit.data.items):
            chunk = targets.take(np.arange(part.start, part.stop))
            scores = users[part] @ vectors.T
            mask_seen(scores, seen_before(fit.data, chunk))
            ranks.append(ranks_of(scores, chunk.rows(fit.data)))
        return np.concatenate(ranks)


def encoding(device: torch.device, users: int = 4096, length: int = 200) -> dict[str, Any]:
    """Measures a user encoder of MovieLens's size over whole histories: users a second, difference from the CPU."""
    torch.manual_seed(0)
    encoder = UserEncoder(EncoderShape(64, 2, 2, 256, length, 3, 0.2)).eval()
    vectors, types = 0.1 * torch.randn(users, length, 64), torch.randint(1, 4, (users, length))
    lengths = torch.randint(1, length + 1, (users,))
    few = 64  # as many as the CPU encodes in a moment
    with torch.inference_mode(), exact():
        expected = encoder.last(vectors[:few], types[:few], lengths[:few])
        on_device = encoder.to(device)
        inputs = [tensor.to(device) for tensor in (vectors, types, lengths)]
        apart = float((on_device.last(*(tensor[:few] for tensor in inputs)).cpu() - expected).abs().max())
        rates = {}
        for name, kind, size in (("gpu", device, users), ("cpu", _CPU, few)):
            encoder.to(kind)
            batch = [tensor[:size].to(kind) for tensor in inputs]
            encoder.last(*batch)
            _wait(kind)
            began = time.monotonic()
            for _ in range(3):
                encoder.last(*batch)
            _wait(kind)
            rates[name] = round(3 * size / (time.monotonic() - began))
    faults = [f"user vectors on the GPU are {apart} away from the CPU's"] * (apart > CLOSE)
    return {"apart": apart, "users_per_second": rates, "events": length, "faults": faults}


def drawn(out: Path, users: int = USERS, items: int = FILMS, events: int = RATINGS) -> Path:
    """Writes a data set of MovieLens-1M's shape: an item is followed by one of a few neighbours or by a popular one."""
    rng = np.random.default_rng(0)
    popular = rng.zipf(1.3, 4 * events)
    popular = popular[popular <= items][:events] - 1
    # MovieLens-1M has users of 20 ratings and more, with a long tail of heavy ones.
    lengths = np.maximum(20, rng.lognormal(4.6, 0.9, users) * events / users / 150).astype(int)
    user = np.repeat(np.arange(users), lengths)
    item = popular[np.arange(user.size) % popular.size]
    # Half of the events follow a rule, so that there is something to learn.
    follows = rng.random(user.size) < 0.5
    for at in np.flatnonzero(follows[1:] & (user[1:] == user[:-1])) + 1:
        item[at] = (item[at - 1] + 1 + at % 3) % items
    table = {
        "user_id": [f"u{number}" for number in user],
        "item_id": [f"i{number}" for number in item],
        "event_type": ["view_item"] * user.size,
        "timestamp": 1_600_000_000_000 + np.arange(user.size) * 1000,
    }
    films = {"item_id": [f"i{number}" for number in range(items)]}
    write_dataset(out, _complete(pa.table(table), EVENTS), _complete(pa.table(films), ITEMS), name="drawn")
    return out


def _complete(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _weights_apart(first: EncoderTrainer, second: EncoderTrainer) -> float:
    """Returns the length of the difference over that of the weights."""
    # One norm of all weights, not the largest difference: Adam takes whole steps of a gradient that is mere rounding.
    a, b = (
        torch.cat([w.detach().cpu().double().flatten() for w in fit._weights().values()]) for fit in (first, second)
    )
    return float((a - b).norm() / a.norm())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _watched(device: torch.device) -> Iterator[list[float]]:
    """Yields shares of time in which the GPU was at work while the block runs; none if its driver does not say."""
    shares: list[float] = []
    end = threading.Event()

    def watch() -> None:
        # torch reads it through the NVIDIA driver's own library, which not every machine has.
        with contextlib.suppress(ModuleNotFoundError, RuntimeError):
            while not end.wait(0.2):
                shares.append(torch.cuda.utilization(device) / 100)

    thread = threading.Thread(target=watch, daemon=True)
    if device.type == "cuda":
        thread.start()
    try:
        yield shares
    finally:
        end.set()
        if thread.is_alive():
            thread.join()
