"""Splits the data of a training that continues an earlier one, so that no event validates that the earlier one learned.

Without a protocol, and by time, the users that validate are drawn at random, and another draw on grown data would name
users whose newest event the earlier run was trained on. Such events look best to the weights as they were: validation
would stop every continued training before its first step. So the earlier draws are made again, and added to are users
with events since.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from features.errors import LeakError
from training.config import TrainConfig
from training.data.clock import newest_of
from training.data.interactions import Interactions
from training.data.split import DAY_MS, Split, Targets, before, cut_of, last_target, split

FEWEST_TARGETS = 100
"""With fewer targets that no run has learned, nothing validates: chance would choose."""
_SHARE = 0.25  # of the users with new events; the newest events of the others teach


@dataclasses.dataclass(frozen=True)
class Generation:
    """The part of a data set that one run of a line was trained on.

    Attributes:
        newest: The time of its newest event, ms.
        trained_until: The last moment, ms, whose events trained the encoders.
        users: Users with an event up to `newest`.
        events: Events up to `newest`.
        validation_users: The setting of that run; 0 if it held out by place.
        seed: The setting of that run.
    """

    newest: int
    trained_until: int
    users: int
    events: int
    validation_users: int
    seed: int

    @classmethod
    def of(cls, data: Interactions, config: TrainConfig) -> Generation | None:
        """Returns that of a training which starts now; None where events have no times to tell them apart by."""
        if data.ordered_only:
            return None
        newest = newest_of(data)
        counts = before(data, newest)
        return cls(
            newest, _trained_until(data, config), int((counts > 0).sum()), int(counts.sum()),
            # Leave-one-out draws no users, so there is no draw to make again.
            0 if config.protocol == "leave-one-out" else config.validation_users, config.seed,
        )  # fmt: skip

    @classmethod
    def read(cls, result: Mapping[str, Any]) -> tuple[Generation, ...]:
        """Returns those of a run's result, the oldest first; empty for a run of an earlier version."""
        return tuple(cls(**generation) for generation in result.get("generations", []))


def generations_now(data: Interactions, config: TrainConfig, earlier: Sequence[Generation]) -> dict[str, Any]:
    """Returns what the result of a run says, for one that continues it: what its line, and it, were trained on."""
    now = Generation.of(data, config)
    return {} if now is None else {"generations": [dataclasses.asdict(part) for part in (*earlier, now)]}


def _trained_until(data: Interactions, config: TrainConfig) -> int:
    days = config.ranker_days + config.ranker_validation_days if config.ranker_days else 0
    return cut_of(data, config) - round(days * DAY_MS)


def division_of(data: Interactions, config: TrainConfig, result: Mapping[str, Any]) -> Split:
    """Returns the division of the events that the run of a result was trained with."""
    if "start" not in result:
        return split(data, config)
    # The last of the line is the run itself.
    return split_again(data, config, Generation.read(result)[:-1])


def split_again(data: Interactions, config: TrainConfig, generations: Sequence[Generation]) -> Split:
    """Divides the events for a training that continues a line of runs, see `split`.

    Leave-one-out stays as it is: it holds out by place, and an event that trains once its user has another was held
    out before. Else those users validate that did so before, and a part of those with events since the last run;
    none does if they are fewer than `FEWEST_TARGETS`, and then all events train.

    Args:
        data: All events.
        config: The settings of the new training.
        generations: What the runs of the line were trained on, the oldest first.

    Raises:
        LeakError: One of them was trained on events that `config` tests.
    """
    division = split(data, config)
    if config.protocol == "leave-one-out":
        return division
    now = Generation.of(data, config)
    if config.protocol == "temporal" and any(part.trained_until > cut_of(data, config) for part in generations):
        raise LeakError(
            "the earlier run was trained on events that this training holds out as its test: train without --from, or "
            "hold out only what is newer (protocol, test_share, test_days)"
        )
    train_end = division.fit_end.copy()
    if now is not None and config.ranker_days:
        train_end = np.minimum(train_end, before(data, now.trained_until))
    newest = last_target(data, train_end)
    users = np.empty(0, np.int64)
    if now is not None and generations:
        users = _drawn(data, now, newest, generations)
    if users.size < FEWEST_TARGETS:
        users = users[:0]
    train_end[users] = newest[users]
    return Split(train_end, division.fit_end, Targets(users, newest[users]))


def _drawn(
    data: Interactions, now: Generation, newest: npt.NDArray[np.int64], earlier: Sequence[Generation]
) -> npt.NDArray[np.int64]:
    """Returns the users that validate a run, none of whose newest targets an earlier run of the line was trained on.

    Args:
        data: All events, which may be more than the run had.
        now: The part of them that the run had.
        newest: The position of each user's newest target in that part, -1 where there is none; int64 `[U]`.
        earlier: The runs of the line before it.
    """
    # Users are counted among those of that time, so that the same are drawn when others have come since.
    users = np.flatnonzero(before(data, now.newest))
    rng = np.random.default_rng(now.seed)
    if not earlier:
        candidates = users[newest[users] > 0]
        return np.sort(rng.choice(candidates, min(now.validation_users, candidates.size // 4), replace=False))
    is_fresh = newest[users] >= np.maximum(1, before(data, earlier[-1].trained_until)[users])
    drawn = np.union1d(users[is_fresh & (rng.random(users.size) < _SHARE)], _drawn_before(data, earlier))
    most = min(now.validation_users, users.size // 4)
    return drawn if drawn.size <= most else np.sort(rng.choice(drawn, most, replace=False))


def _drawn_before(data: Interactions, generations: Sequence[Generation]) -> npt.NDArray[np.int64]:
    """Returns the users that validated the last run of a line; none if its part of the data is no longer the same."""
    last = generations[-1]
    counts = before(data, last.newest)
    if (int((counts > 0).sum()), int(counts.sum())) != (last.users, last.events):
        return np.empty(0, np.int64)
    newest = last_target(data, np.minimum(counts, before(data, last.trained_until)))
    return _drawn(data, last, newest, generations[:-1])
