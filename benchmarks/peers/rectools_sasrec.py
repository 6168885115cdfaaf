"""RecTools' SASRec through its own model, data preparation and Lightning trainer: `python rectools_sasrec.py DATA.npz`.

`--settings` are arguments of `SASRecModel`; without any it trains as RecTools recommends (its defaults: 256 wide, two
blocks, four heads, the newest 100 events, full softmax, batches of 128, Adam at 0.001).
"""

# This runs in an environment of its own, see rectools.txt.
# pyright: reportMissingImports=false

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

from benchmarks.peers.trainer_clock import SharedHistories, TrainerClock, arguments

MANY_EPOCHS = 100_000
USERS_AT_ONCE = 256


class Watch(Callback):  # type: ignore[misc]
    """Counts steps, validates by the clock, and stops when all is over."""

    def __init__(self, model: Any, histories: SharedHistories, clock: TrainerClock) -> None:
        self.model, self.histories, self.clock = model, histories, clock

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        """Returns itself."""
        # RecTools trains with a deep copy of the trainer that it is given, but there is one clock.
        return self

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts a step, after which Lightning calls it."""
        goes_on = self.clock.step(int((batch["x"] != 0).sum()), int((batch["y"] != 0).sum()))
        if self.clock.due() or not goes_on:
            with self.clock.paused():
                value = self.histories.ndcg(*vectors(self.model, self.histories))
                module.train()
            self.clock.report(value)
        trainer.should_stop = not goes_on
        if not goes_on:
            raise KeyboardInterrupt  # Lightning would finish its epoch first


def vectors(model: Any, histories: SharedHistories) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Returns the vectors of the users who validate, and of all items, in the order of `histories`."""
    net, preparator = model.lightning_model.torch_model.eval(), model.data_preparator
    item_numbers = preparator.item_id_map.to_internal
    inner = np.array([item_numbers.get(item, 0) for item in range(histories.items)])
    length = preparator.session_max_len
    users = []
    with torch.no_grad():
        table = net.item_model.get_all_embeddings()
        for start in range(0, histories.validated.size, USERS_AT_ONCE):
            chunk = histories.validated[start : start + USERS_AT_ONCE]
            x = np.zeros((chunk.size, length), np.int64)
            for line, user in enumerate(chunk):
                newest = inner[histories.of(user)][-length:]
                x[line, length - newest.size :] = newest
            users.append(net.encode_sessions({"x": torch.from_numpy(x)}, table)[:, -1].numpy())
    # An item that the trainer does not know has number 0, which is its padding.
    items = table.numpy()[inner].copy()
    items[inner == 0] = np.nan
    return np.concatenate(users), items


def main() -> None:
    """Trains in time slices until the input ends."""
    options = arguments()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    histories = SharedHistories.load(options.data)
    clock = TrainerClock(options.validate_every)
    owner = np.repeat(np.arange(histories.offsets.size - 1), np.diff(histories.offsets))
    # One made-up second per event keeps the order, which is all that RecTools reads of a date.
    order = pd.Timestamp("2000-01-01") + pd.to_timedelta(np.arange(owner.size), unit="s")
    columns = {Columns.User: owner, Columns.Item: histories.rows, Columns.Weight: 1.0, Columns.Datetime: order}
    model = SASRecModel(**options.settings)

    # Nothing but training on the clock.
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    watch = Watch(model, histories, clock)
    model._trainer = Trainer(
        max_epochs=MANY_EPOCHS, accelerator="cpu", callbacks=[watch], enable_model_summary=False, **quiet
    )
    try:
        model.fit(Dataset.construct(pd.DataFrame(columns)))
    except (KeyboardInterrupt, SystemExit):
        return


if __name__ == "__main__":
    main()
