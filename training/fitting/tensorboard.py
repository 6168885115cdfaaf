"""Writes the learning curve for TensorBoard, if the setting `tensorboard` is on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from training.config import TrainConfig

Show: TypeAlias = Callable[[Mapping[str, float]], None]
FOLDER = "tensorboard"


def open_tensorboard(out: Path, config: TrainConfig) -> Show:
    """Returns a function that writes one line of `log.jsonl` into event files below `RUN/tensorboard`, or nowhere.

    The steps of the curves are events trained on: curves of different batch sizes can be compared.

    Raises:
        ModuleNotFoundError: The setting is on, and the package tensorboard (the extra of that name) is not installed.
    """
    if not config.tensorboard:
        return lambda line: None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / FOLDER))

    def show(line: Mapping[str, float]) -> None:
        for name, title in (("loss", "training/loss"), ("ndcg@10", "validation/ndcg@10"), ("epoch", "training/epoch")):
            writer.add_scalar(title, line[name], int(line["tokens"]))
        writer.flush()

    return show
