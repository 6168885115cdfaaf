"""Splits the events into training, validation and test: leave-one-out, or one cut through time for all users.

A target is an event to be predicted from the same user's earlier events. With `repeats: false` only events whose item
is new to their user are targets. Order inside one moment is the file's, which `features.tables.dataset` made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from features.errors import TrainingError
from training.config import TrainConfig
from training.data.clock import newest_of
from training.data.interactions import Interactions

TestProtocol: TypeAlias = Literal["leave-one-out", "temporal-successive", "temporal-last"]
DAY_MS = 86_400_000
FEWEST_EVENTS = 3
"""Leave-one-out holds out no event of users with fewer."""


@dataclass(frozen=True)
class Targets:
    """Events to predict: `positions[i]` counts the earlier events of user `users[i]`; both int64 `[n]`."""

    users: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """The number of targets."""
        return self.users.size

    def take(self, at: npt.NDArray[np.int64]) -> Targets:
        """Returns some of the targets."""
        return Targets(self.users[at], self.positions[at])

    def sample(self, most: int, seed: int) -> Targets:
        """Draws at most `most` of the targets at random; they keep their order."""
        if len(self) <= most:
            return self
        return self.take(np.sort(np.random.default_rng(seed).choice(len(self), most, replace=False)))

    def rows(self, data: Interactions) -> npt.NDArray[np.int32]:
        """Returns the items to predict; int32 `[n]`."""
        rows: npt.NDArray[np.int32] = data.rows[data.offsets[self.users] + self.positions]
        return rows

    def time(self, data: Interactions, at: int) -> int:
        """Returns the time of a target, ms."""
        return int(data.timestamps[data.offsets[self.users[at]] + self.positions[at]])


@dataclass(frozen=True)
class Split:
    """The use of each user's events.

    Attributes:
        train_end: Number of leading events that are trained on; int64 `[U]`.
        fit_end: Number of leading events that no test touches: training and validation; int64 `[U]`.
        validation: Held out from training, before every test event of its user.
    """

    train_end: npt.NDArray[np.int64]
    fit_end: npt.NDArray[np.int64]
    validation: Targets


def split(data: Interactions, config: TrainConfig) -> Split:
    """Divides the events as `config.protocol` says.

    Leave-one-out tests on each user's last target and validates on the one before. Temporal tests on the events after
    the cut, and with `ranker_days` leaves the days before it to the ranker. There, and without a protocol, the last
    target of some users (`validation_users`, but at most a quarter) validates; theirs are the only events of the
    training part that are not trained on.
    """
    # Validation comes from before the test in every protocol: choosing the best weights by later events would let the
    # test tell which to choose.
    counts = np.diff(data.offsets)
    if config.protocol == "leave-one-out":
        test = np.where(counts >= FEWEST_EVENTS, last_target(data, counts), -1)
        # A first event has no history to be predicted from: it tests nothing, so its user's events train.
        fit_end = np.where(test > 0, test, counts)
        newest = np.where(test > 0, last_target(data, fit_end), -1)
        users, encoder_end = np.flatnonzero(newest > 0), fit_end
    else:
        fit_end = counts if config.protocol == "none" else before_cut(data, config)
        encoder_end = fit_end
        if config.ranker_days and not data.ordered_only:
            # On days that the encoders were trained on, relevance looks better than it will be in service, and the
            # ranker would trust it too much: so its days come after theirs.
            days = config.ranker_days + config.ranker_validation_days
            encoder_end = before(data, cut_of(data, config) - round(days * DAY_MS))
        newest = last_target(data, encoder_end)
        users = np.flatnonzero(newest > 0)
        size = min(config.validation_users, users.size // 4)
        users = np.sort(np.random.default_rng(config.seed).choice(users, size, replace=False))
    train_end = encoder_end.copy()
    train_end[users] = newest[users]
    return Split(train_end, fit_end, Targets(users, newest[users]))


def held_out(data: Interactions, config: TrainConfig, protocol: TestProtocol) -> Targets:
    """Returns the events that a test predicts, in the order of users and time.

    Raises:
        TrainingError: The protocol needs times and the data set has order only.
    """
    counts = np.diff(data.offsets)
    if protocol == "leave-one-out":
        last = np.where(counts >= FEWEST_EVENTS, last_target(data, counts), -1)
        users = np.flatnonzero(last > 0)
        return Targets(users, last[users])
    cut = before_cut(data, config)
    if protocol == "temporal-last":
        last = last_target(data, counts)
        users = np.flatnonzero((last >= cut) & (last > 0))
        return Targets(users, last[users])
    owners, positions = [], []
    for block in data.blocks():
        # The first event of a user has no history to be predicted from.
        late = (block.position >= cut[block.owner]) & (block.position > 0)
        at = np.flatnonzero(data.target[block.events] & late)
        owners.append(block.owner[at])
        positions.append(block.position[at])
    return Targets(np.concatenate(owners), np.concatenate(positions))


def last_target(data: Interactions, ends: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the position of each user's last target among their leading `ends` events, -1 where there is none."""
    newest = np.full(ends.size, -1, np.int64)
    for block in data.blocks():
        at = np.flatnonzero(data.target[block.events] & (block.position < ends[block.owner]))
        # Positions ascend, and of several values for one user numpy keeps the last.
        newest[block.owner[at]] = block.position[at]
    return newest


def before_cut(data: Interactions, config: TrainConfig) -> npt.NDArray[np.int64]:
    """Counts each user's events that are not after `cut_of`; int64 `[U]`.

    Raises:
        TrainingError: The data set has order only.
    """
    return before(data, cut_of(data, config))


def before(data: Interactions, moment: int) -> npt.NDArray[np.int64]:
    """Counts each user's events that are not after a moment; int64 `[U]`."""
    counts = np.zeros(len(data.users), np.int64)
    for block in data.blocks():
        early = block.owner[data.timestamps[block.events] <= moment]
        counts[block.users] = np.bincount(early - block.users.start, minlength=block.users.stop - block.users.start)
    return counts


def cut_of(data: Interactions, config: TrainConfig) -> int:
    """Returns the last moment, ms, that is not tested: `test_days` from the end, or the quantile `1 - test_share`.

    Without a protocol, the last moment of all. Events from wrong clocks are not the end (`training.data.clock`).

    Raises:
        TrainingError: The data set has order only.
    """
    if data.ordered_only:
        raise TrainingError("a temporal split needs timestamps, and this data set has order only: use leave-one-out")
    last = newest_of(data)
    if config.protocol != "temporal":
        return last
    if config.test_days:
        return last - round(config.test_days * DAY_MS)
    # `1 - 0.9` is a little below 0.1, and the place of a quantile that falls on an event must not lie before it.
    return _time_of_rank(data, int((data.timestamps.size - 1) * (1 - config.test_share) + 1e-6))


_BINS = 1 << 16


def _time_of_rank(data: Interactions, rank: int) -> int:
    """Returns the time at place `rank`, counted from 0, of all times in ascending order.

    Times are counted in ever finer bins around the result, so no array as long as the events is made.
    """
    parts = [data.timestamps[block.events] for block in data.blocks()]
    low, high = min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)
    # Sixteen bits of the answer a round: three rounds for times in ms.
    while low < high:
        width = (high - low) // _BINS + 1
        counts = np.zeros(_BINS, np.int64)
        for part in parts:
            inside = part[(part >= low) & (part <= high)]
            counts += np.bincount((inside - low) // width, minlength=_BINS)
        chosen = int(np.searchsorted(np.cumsum(counts), rank, side="right"))
        rank -= int(counts[:chosen].sum())
        low, high = low + chosen * width, min(high, low + (chosen + 1) * width - 1)
    return low
