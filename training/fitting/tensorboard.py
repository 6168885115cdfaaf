"""Writes the learning curve for TensorBoard, if the setting `tensorboard` is on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from training.config import TrainConfig

LogLine: TypeAlias = Mapping[str, float | None]
"""A line of `log.jsonl`: `epoch`, `step`, `seconds`, `loss`, `validation_loss`, `ndcg@10`, `tokens`."""
Draw: TypeAlias = Callable[[LogLine], None]
_TITLES = {
    "loss": "training/loss",
    "validation_loss": "validation/loss",
    "ndcg@10": "validation/ndcg@10",
    "epoch": "training/epoch",
}
FOLDER = "tensorboard"


def open_tensorboard(out: Path, config: TrainConfig) -> Draw:
    """Returns a function that writes one line of `log.jsonl` into event files below `RUN/tensorboard`, or nowhere.

    The steps of the curves are events trained on: curves of different batch sizes can be compared.

    Raises:
        ModuleNotFoundError: The setting is on, and the package tensorboard (the extra of that name) is not installed.
    """
    if not config.tensorboard:
        return lambda line: None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / FOLDER))

    def draw(line: LogLine) -> None:
        for name, title in _TITLES.items():
            if line[name] is not None:
                writer.add_scalar(title, line[name], int(line["tokens"] or 0))
        writer.flush()

    return draw
