"""RecBole's SASRec through its own data augmentation, loader and trainer: `python recbole_sasrec.py DATA.npz`.

`--settings` are RecBole's; without any it trains as RecBole ships SASRec (64 wide, two blocks, two heads, the newest 50
events, full softmax, batches of 2,048, dropout 0.5, Adam at 0.001). It trains on one target per sequence, so an event
is read once for every later event of its user.
"""

# This runs in an environment of its own, see recbole.txt.
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from recbole.config import Config
from recbole.data import create_dataset
from recbole.data.dataloader import TrainDataLoader
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed

from benchmarks.peers.trainer_clock import SharedHistories, TrainerClock, arguments

USERS_AT_ONCE = 256


class Over(Exception):
    """The caller gives the trainer no more time."""


class Watched:
    """A loader that counts what the trainer takes from it, validates by the clock, and stops when all is over."""

    def __init__(
        self, loader: Any, model: Any, histories: SharedHistories, clock: TrainerClock, inner: npt.NDArray[np.int64]
    ) -> None:
        self.loader, self.model, self.histories, self.clock, self.inner = loader, model, histories, clock, inner
        self.generator, self._sampler = loader.generator, loader._sampler

    def __len__(self) -> int:
        """Returns the number of batches of an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Yields the batches; a step is over when the next batch is requested."""
        for batch in self.loader:
            yield batch
            lengths = batch[self.model.ITEM_SEQ_LEN]
            goes_on = self.clock.step(int(lengths.sum()), lengths.numel())
            # Validation is off the clock: the peers' own evaluations differ from each other.
            if self.clock.due() or not goes_on:
                with self.clock.paused():
                    value = self.histories.ndcg(*vectors(self.model, self.histories, self.inner))
                    self.model.train()
                self.clock.report(value)
            if not goes_on:
                raise Over


def vectors(
    model: Any, histories: SharedHistories, inner: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Returns the vectors of the users who validate, and of all items, in the order of `histories`."""
    model.eval()
    length, users = model.max_seq_length, []
    with torch.no_grad():
        for start in range(0, histories.validated.size, USERS_AT_ONCE):
            chunk = histories.validated[start : start + USERS_AT_ONCE]
            newest = [inner[histories.of(user)][-length:] for user in chunk]
            x = np.zeros((chunk.size, length), np.int64)
            for line, rows in enumerate(newest):
                x[line, : rows.size] = rows
            lengths = torch.tensor([rows.size for rows in newest])
            users.append(model.forward(torch.from_numpy(x), lengths).numpy())
        items = model.item_embedding.weight.numpy()[inner].copy()
    items[inner == 0] = np.nan
    return np.concatenate(users), items


def write_inter(histories: SharedHistories, folder: Path) -> None:
    """Writes RecBole's own file of interactions, one line each."""
    (folder / "speed").mkdir()
    owner = np.repeat(np.arange(histories.offsets.size - 1), np.diff(histories.offsets))
    with (folder / "speed" / "speed.inter").open("w", encoding="utf-8") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        # The place in the history is time enough: RecBole only orders by it.
        position = np.arange(owner.size) - histories.offsets[owner]
        file.writelines(f"{u}\t{i}\t{t}\n" for u, i, t in zip(owner, histories.rows, position, strict=True))


def configuration(folder: Path, settings: dict[str, Any]) -> Any:
    """Returns RecBole's defaults for this data set, without negatives (the full softmax needs none), and `settings`."""
    described = {
        "data_path": str(folder),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "train_neg_sample_args": None,
        "use_gpu": False,
        "show_progress": False,
        "checkpoint_dir": str(folder),
        "seed": 1,
    }
    with contextlib.redirect_stdout(sys.stderr):
        return Config(model="SASRec", dataset="speed", config_dict=described | settings)


def main() -> None:
    """Trains in time slices until the input ends."""
    options = arguments()
    sys.argv = sys.argv[:1]  # RecBole reads the command line too
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    histories = SharedHistories.load(options.data)
    clock = TrainerClock(options.validate_every)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Over):
        write_inter(histories, Path(folder))
        config = configuration(Path(folder), options.settings)
        init_seed(config["seed"], config["reproducibility"])
        dataset = create_dataset(config)
        dataset._change_feat_format()  # orders the events and augments them
        loader = TrainDataLoader(config, dataset, None, shuffle=True)
        model = SASRec(config, dataset)
        token_ids = dataset.field2token_id["item_id"]
        inner = np.array([token_ids.get(str(item), 0) for item in range(histories.items)])
        watched, trainer = Watched(loader, model, histories, clock, inner), Trainer(config, model)
        epoch = 0
        # RecBole's own `fit` would validate and stop by its own measure; the clock decides here.
        while True:
            trainer._train_epoch(watched, epoch, show_progress=False)
            epoch += 1


if __name__ == "__main__":
    main()
