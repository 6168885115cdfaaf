"""Finds out what a data set is before a model is trained on it: order or none, repeats or none, and its sizes.

Order carries signal if neighbouring events of a user are more alike than any two of the same user are. The likeness of
two items is that of the sets of users who chose them, so it knows no order: if a user's events could as well stand in
any other order, the mean difference is zero whatever the data, and a t statistic over users is all that is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from features.jit import kernel
from training.data.interactions import Interactions
from training.data.ratings import RatingScale, rating_scale

Order: TypeAlias = Literal["signal", "none", "sorted", "unclear", "unknown"]
ORDER_EVENTS = 1 << 18
"""Most events that order is judged by; of more, users are drawn at random."""
REPEAT_EVENTS = 1 << 20
"""Most events that repeats are counted in."""
SURE = 4.5
"""Value of t from which order carries signal: chance passes it in one of 300,000 data sets."""
DOUBTED = 3.0
"""Value of t from which order is at least not ruled out."""
SMALL_EFFECT = 0.055
"""Gain in likeness below which order does not pay, relative to that of any two events; real orders have 0.05 to 0.9."""
BOUND = 2.0
"""Standard errors above the measured gain that still have to be below `SMALL_EFFECT`."""
SORTED = 0.95
"""Share of neighbouring events in the order of an item's property from which the file is sorted by it, or agreement
of users about the order of two items from which they share one."""
REPEATS = 0.05
"""Share of repeated events from which repeats are worth recommending."""
SHARED = "an order of items that all users share"
"""Name of a property that is not among those of the data."""
_DRAWS = 4  # random pairs that a pair of neighbours is compared with
_FEWEST_COMPARED = 300  # pairs of users below which their agreement says nothing
_FEWEST = 30  # users below which a t statistic says nothing

_I64 = npt.NDArray[np.int64]
_F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class OrderEvidence:
    """Evidence for and against an order that carries signal.

    Attributes:
        order: `signal`: it carries signal; `none`: it carries none that would pay; `sorted`: the events without times
            are sorted by a property of their items, which is no order of time; `unclear`: too few users to tell;
            `unknown`: nothing says when or in which order, so nothing was judged.
        likeness: t of the gain in likeness of neighbouring events.
        transitions: t of the gain in transitions that other users made too.
        effect: Gain in likeness, relative to that of any two events of a user.
        error: Its standard error.
        users: Users with at least three different items, by whom it was judged.
        sorted_by: The property of items that the events are sorted by, empty for none.
    """

    order: Order
    likeness: float
    transitions: float
    effect: float
    error: float
    users: int
    sorted_by: str = ""


@dataclass(frozen=True)
class DataSurvey:
    """Facts about the training part of a data set.

    Attributes:
        users: Users with an event.
        items: Items with an event.
        events: Events.
        mean_length: Mean events of a user.
        median_length: Their median.
        long_length: Events that three quarters of the users do not exceed.
        order: What is known about order.
        repeated: Share of the events that could be repeats and are.
        ratings: Their scale if the values are ratings, else None.
    """

    users: int
    items: int
    events: int
    mean_length: float
    median_length: int
    long_length: int
    order: OrderEvidence
    repeated: float
    ratings: RatingScale | None = None

    @property
    def ordered(self) -> bool:
        """True unless order is known to carry no signal: an order that is unclear is taken as one."""
        return self.order.order in ("signal", "unclear")

    @property
    def repeats(self) -> bool:
        """True if repeats are worth recommending."""
        return self.repeated >= REPEATS


def survey(
    data: Interactions, ends: _I64, names: Sequence[str], seed: int = 0, *, has_order: bool = True
) -> DataSurvey:
    """Surveys the leading events of each user.

    Args:
        data: All events, read with `repeats`, so that each event of a type to predict is a target.
        ends: The leading events of each user that are looked at; int64 `[U]`.
        names: Item ids by row.
        seed: Seed of the draws.
        has_order: A column says in which order the events happened.
    """
    unknown = OrderEvidence("unknown", 0.0, 0.0, 0.0, 0.0, 0)
    present = np.zeros(data.items, np.bool_)
    for block in data.blocks():
        present[data.rows[block.events][block.position < ends[block.owner]]] = True
    lengths = ends[ends > 0]
    quartiles = np.percentile(lengths, (50, 75)) if lengths.size else (0, 0)
    return DataSurvey(
        users=int(lengths.size),
        items=int(present.sum()),
        events=int(ends.sum()),
        mean_length=float(lengths.mean()) if lengths.size else 0.0,
        median_length=int(quartiles[0]),
        long_length=math.ceil(quartiles[1]),
        order=evidence_of_order(data.sample(ends, ORDER_EVENTS, seed), names, seed) if has_order else unknown,
        repeated=repeated_share(data.sample(ends, REPEAT_EVENTS, seed)),
        ratings=rating_scale(data, ends),
    )


def repeated_share(data: Interactions) -> float:
    """Returns the share of targets that repeat an earlier event: the same user, item and type.

    The same item twice in a row counts on neither side, because that is mostly one act that was logged twice. First
    events cannot repeat, so they do not count either.
    """
    owner = data.owner()
    rows, at = data.rows.astype(np.int64), np.arange(owner.size)
    is_first = np.zeros(owner.size, np.bool_)
    keys = (owner * data.items + rows) * (1 + len(data.event_types)) + data.types
    is_first[np.unique(keys, return_index=True)[1]] = True
    counts = data.target & (at > data.offsets[owner])
    counts[1:] &= rows[1:] != rows[:-1]
    return float((~is_first[counts]).mean()) if counts.any() else 0.0


# ------------------------------------------------------------------------------------------------------- order


def evidence_of_order(data: Interactions, names: Sequence[str], seed: int = 0) -> OrderEvidence:
    """Judges if the order of users' events carries signal; takes a second for a quarter of a million events.

    Args:
        data: Events in memory.
        names: Item ids by row.
        seed: Seed of the draws.
    """
    rng = np.random.default_rng([seed, 13])
    pairs = _Pairs(data, rng)
    likeness, effect, error = pairs.likeness()
    transitions = pairs.transitions(rng)
    sorted_by = ""
    if data.ordered_only:
        sorted_by = _sorted_by(data, names) or (SHARED if pairs.agreement() >= SORTED else "")
    order: Order = "unclear"
    if sorted_by:
        order = "sorted"
    elif pairs.users >= _FEWEST and max(likeness, transitions) >= SURE:
        order = "signal"
    elif max(likeness, transitions) < DOUBTED and error > 0 and effect + BOUND * error < SMALL_EFFECT:
        order = "none"
    return OrderEvidence(order, likeness, transitions, effect, error, pairs.users, sorted_by)


class _Pairs:
    """Pairs of neighbouring events, and for each of them some random pairs of the same user."""

    def __init__(self, data: Interactions, rng: np.random.Generator) -> None:
        owner, rows = _distinct(data.owner(), data.rows.astype(np.int64), rng)
        counts = np.bincount(owner, minlength=1)
        starts = np.cumsum(counts) - counts
        # Of two events there is no pair but the neighbours.
        first = np.flatnonzero((owner[1:] == owner[:-1]) & (counts[owner[1:]] > 2))
        self.user = owner[first]
        self.users = np.unique(self.user).size
        # Items without an event here get no number, however large the catalogue.
        items, self.rows = np.unique(rows, return_inverse=True)
        self.items = items.size
        size = (first.size, _DRAWS)
        places = counts[self.user, None]
        one = rng.integers(0, np.broadcast_to(places, size))
        other = rng.integers(0, np.broadcast_to(places - 1, size))
        other += other >= one  # two different places, in either order
        self.near = np.stack([first, first + 1])
        self.random = np.stack([one, other]) + starts[self.user, None]
        by_item = np.argsort(self.rows, kind="stable")
        self.item_users = owner[by_item]
        self.sizes = np.bincount(self.rows, minlength=self.items)
        self.item_starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)

    def likeness(self) -> tuple[float, float, float]:
        """Returns t, the relative gain and its standard error."""
        near, random = self._cosines(self.near), self._cosines(self.random)
        _, gain, error = _t(_means(near - random.mean(1), self.user))
        expected = float(_means(random.mean(1), self.user).mean()) if self.users else 0.0
        # t by which pair is more alike, not by how much: a few rare items that are very much alike would decide, and
        # the tails of t would not be those of a normal distribution.
        t, _, _ = _t(_means(np.sign(near[:, None] - random).mean(1), self.user))
        # Where no two items have two users in common, all likeness is zero and nothing can be said.
        return (t, gain / expected, error / expected) if expected > 0 else (0.0, 0.0, 0.0)

    def transitions(self, rng: np.random.Generator) -> float:
        """Returns t of the gain in how often one half of the users made a transition that the other half makes.

        It sees an order that likeness cannot: one among items that all users choose.
        """
        if not self.users:
            return 0.0
        # Halves, because a user's own transitions would always be among those that were counted; one direction
        # alone, because the sums of both would not be independent.
        learned = rng.random(int(self.user.max()) + 1)[self.user] < 0.5
        code = self.rows[self.near[0]] * self.items + self.rows[self.near[1]]
        known, times = np.unique(code[learned], return_counts=True)
        judged = np.flatnonzero(~learned)
        if not known.size or not judged.size:
            return 0.0

        def counted(pairs: _I64) -> _F64:
            first, second = self.rows[pairs]
            wanted = first * self.items + second
            at = np.minimum(np.searchsorted(known, wanted), known.size - 1)
            weights = np.sqrt(self.sizes[first] * self.sizes[second])
            result: _F64 = np.where(known[at] == wanted, times[at], 0) / weights
            return result

        gains = counted(self.near[:, judged]) - counted(self.random[:, judged]).mean(1)
        return _t(_means(gains, self.user[judged]))[0]

    def agreement(self) -> float:
        """Returns the share of pairs of users who had the same two items in the same order; 0 if too few can tell.

        It is near 1 where each user's events are sorted by whatever the items have, even by something unknown.
        """
        places = np.sort(self.random.reshape(2, -1), axis=0)
        first, second = self.rows[places]
        user = np.repeat(self.user, _DRAWS)
        code = np.minimum(first, second) * self.items + np.maximum(first, second)
        # The two items of one user drawn twice would agree with themselves.
        once = np.unique(code * (int(user.max(initial=0)) + 1) + user, return_index=True)[1]
        _, pair = np.unique(code[once], return_inverse=True)
        counts = np.bincount(pair, minlength=1)
        ascending = np.bincount(pair, first[once] < second[once], counts.size)
        descending = counts - ascending
        compared = float((counts * (counts - 1)).sum())
        if compared < 2 * _FEWEST_COMPARED:
            return 0.0
        return float((ascending * (ascending - 1) + descending * (descending - 1)).sum()) / compared

    def _cosines(self, pairs: _I64) -> _F64:
        """Returns the cosines of the sets of other users who chose both events' items; `[2, ...]` to `[...]`."""
        first, second = self.rows[pairs[0]], self.rows[pairs[1]]
        common = common_users(self.item_starts, self.item_users, first.ravel(), second.ravel()).reshape(first.shape)
        # The user whose pair it is has chosen both, whatever the order, and says nothing about likeness.
        result: _F64 = (common - 1) / np.sqrt(self.sizes[first] * self.sizes[second])
        return result


def _distinct(owner: _I64, rows: _I64, rng: np.random.Generator) -> tuple[_I64, _I64]:
    """Keeps one event of each user and item, in their order.

    A random one: the first would put the items that are chosen most often first, which is an order, but not of time.
    """
    drawn = rng.permutation(rows.size)
    width = int(rows.max(initial=0)) + 1
    kept = np.sort(drawn[np.unique(owner[drawn] * width + rows[drawn], return_index=True)[1]])
    return owner[kept], rows[kept]


def _means(values: _F64, user: _I64) -> _F64:
    """Returns the mean of each user's values, of the users that have some."""
    counts = np.bincount(user, minlength=1)
    sums = np.bincount(user, values, counts.size)
    result: _F64 = sums[counts > 0] / counts[counts > 0]
    return result


def _t(values: _F64) -> tuple[float, float, float]:
    """Returns t, mean and standard error of the mean; 0 where there are too few values."""
    if values.size < 2:
        return 0.0, 0.0, 0.0
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(values.size)
    return (mean / error if error > 0 else 0.0), mean, error


def _sorted_by(data: Interactions, names: Sequence[str]) -> str:
    """Returns the property that the events of (nearly) all users ascend or descend by, empty if there is none."""
    owner, rows = data.owner(), data.rows
    together = owner[1:] == owner[:-1]
    ids = [str(name) for name in names]
    as_numbers = np.array([int(name) if name.isascii() and name.isdigit() else -1 for name in ids], np.float64)
    by_text = np.empty(len(ids), np.int64)
    by_text[np.argsort(np.array(ids))] = np.arange(len(ids))
    properties: dict[str, npt.NDArray[Any]] = {
        "item id": as_numbers[rows],
        "item id, as text": by_text[rows],
        "the items table": rows,
        "popularity": np.bincount(rows, minlength=data.items)[rows],
        "value": data.values,
    }
    for name, values in properties.items():
        step = np.diff(values.astype(np.float64))[together]
        step = step[step != 0]
        # A value that is missing, or nearly always the same, orders nothing: most steps have to say something.
        told = np.isfinite(step)
        if told.sum() * 2 > together.sum() and max((step[told] > 0).mean(), (step[told] < 0).mean()) >= SORTED:
            return name
    return ""


@kernel()
def common_users(starts: Any, users: Any, first: Any, second: Any) -> npt.NDArray[np.int64]:
    """Counts the users that two items have in common.

    Args:
        starts: Item `i` was chosen by `users[starts[i]:starts[i + 1]]`; int64 `[N + 1]`.
        users: Ascending for each item; int64 `[E]`.
        first: Items; int64 `[n]`.
        second: Items; int64 `[n]`.

    Returns:
        int64 `[n]`.
    """
    result = np.zeros(first.size, np.int64)
    for pair in range(first.size):
        left, left_end = starts[first[pair]], starts[first[pair] + 1]
        right, right_end = starts[second[pair]], starts[second[pair] + 1]
        while left < left_end and right < right_end:
            if users[left] == users[right]:
                result[pair] += 1
                left += 1
                right += 1
            elif users[left] < users[right]:
                left += 1
            else:
                right += 1
    return result


def common_users_plain(starts: _I64, users: _I64, first: _I64, second: _I64) -> _I64:
    """Plain twin of `common_users`."""
    chosen = [users[starts[item] : starts[item + 1]] for item in range(starts.size - 1)]
    pairs = zip(first.tolist(), second.tolist(), strict=True)
    return np.array([np.intersect1d(chosen[one], chosen[other]).size for one, other in pairs], np.int64)
