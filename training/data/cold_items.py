"""Items whose events nobody trains on, so that a test can ask how well content alone places what is new."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from training.config import TrainConfig


def hidden_items(items: int, config: TrainConfig) -> npt.NDArray[np.bool_]:
    """The share `hide_items` of a catalogue of `items` rows, drawn by the seed; bool `[items]`."""
    hidden = np.zeros(items, bool)
    drawn = np.random.default_rng([config.seed, items]).permutation(items)
    hidden[drawn[: round(config.hide_items * items)]] = True
    return hidden
