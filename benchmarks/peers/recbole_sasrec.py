"""RecBole's SASRec through its own data augmentation, loader and trainer: `python recbole_sasrec.py DATA.npz`.

`--settings` are RecBole's; without any it trains as RecBole ships SASRec (64 wide, two blocks, two heads, the newest 50
events, full softmax, batches of 2,048, dropout 0.5, Adam at 0.001). It trains on one target per sequence, so an event
is read once for every later event of its person.
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

from benchmarks.peers.turns import Histories, Turns, arguments

USERS_AT_ONCE = 256


class Over(Exception):
    """All turns are over."""


class Watched:
    """A loader that counts what the trainer takes from it, validates by the clock, and stops when all is over."""

    def __init__(
        self, loader: Any, model: Any, histories: Histories, turns: Turns, inner: npt.NDArray[np.int64]
    ) -> None:
        self.loader, self.model, self.histories, self.turns, self.inner = loader, model, histories, turns, inner
        self.generator, self._sampler = loader.generator, loader._sampler

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """The batches; a step is over when the next one is asked for."""
        for batch in self.loader:
            yield batch
            lengths = batch[self.model.ITEM_SEQ_LEN]
            goes_on = self.turns.step(int(lengths.sum()), lengths.numel())
            if self.turns.due() or not goes_on:
                with self.turns.paused():
                    value = self.histories.ndcg(*vectors(self.model, self.histories, self.inner))
                    self.model.train()
                self.turns.report(value)
            if not goes_on:
                raise Over


def vectors(
    model: Any, histories: Histories, inner: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The people who validate, and all items, in the order of `histories`."""
    model.eval()
    length, users = model.max_seq_length, []
    with torch.no_grad():
        for start in range(0, histories.people.size, USERS_AT_ONCE):
            people = histories.people[start : start + USERS_AT_ONCE]
            newest = [inner[histories.of(person)][-length:] for person in people]
            x = np.zeros((people.size, length), np.int64)
            for line, rows in enumerate(newest):
                x[line, : rows.size] = rows
            lengths = torch.tensor([rows.size for rows in newest])
            users.append(model.forward(torch.from_numpy(x), lengths).numpy())
        items = model.item_embedding.weight.numpy()[inner].copy()
    items[inner == 0] = np.nan
    return np.concatenate(users), items


def write_inter(histories: Histories, folder: Path) -> None:
    """RecBole's own file of interactions, one line each."""
    (folder / "speed").mkdir()
    owner = np.repeat(np.arange(histories.offsets.size - 1), np.diff(histories.offsets))
    with (folder / "speed" / "speed.inter").open("w", encoding="utf-8") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        position = np.arange(owner.size) - histories.offsets[owner]
        file.writelines(f"{u}\t{i}\t{t}\n" for u, i, t in zip(owner, histories.rows, position, strict=True))


def configuration(folder: Path, settings: dict[str, Any]) -> Any:
    """RecBole's defaults, this data set, no negatives (the full softmax needs none), and `settings` over all."""
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
    """Trains by turns until the input ends."""
    asked = arguments()
    sys.argv = sys.argv[:1]  # RecBole reads the command line too
    logging.disable(logging.WARNING)
    torch.set_num_threads(asked.threads)
    histories = Histories.load(asked.data)
    turns = Turns(asked.validate_every)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Over):
        write_inter(histories, Path(folder))
        config = configuration(Path(folder), asked.settings)
        init_seed(config["seed"], config["reproducibility"])
        dataset = create_dataset(config)
        dataset._change_feat_format()  # orders the events and augments them
        loader = TrainDataLoader(config, dataset, None, shuffle=True)
        model = SASRec(config, dataset)
        known = dataset.field2token_id["item_id"]
        inner = np.array([known.get(str(item), 0) for item in range(histories.items)])
        watched, trainer = Watched(loader, model, histories, turns, inner), Trainer(config, model)
        epoch = 0
        while True:
            trainer._train_epoch(watched, epoch, show_progress=False)
            epoch += 1


if __name__ == "__main__":
    main()
