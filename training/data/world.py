"""The truth of a simulated world: the worth of an item to a user, and the chance of each event."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from features.errors import SettingsError

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]

START_MS = 1_704_067_200_000  # 2024-01-01 UTC
DAY_MS = 86_400_000
SLATE = 10
SUCCESSORS = 5
_OUTSIDE = 3.0  # log weight of taking no item from a slate
_EXPLORE = 0.1  # the share of the logging policy that is uniform

# The first word names the topic; a user's segment is the topic they like best.
TOPICS = tuple(
    line.split()
    for line in """garden tomato trellis seedling compost shovel rose hedge watering orchard herb
kitchen skillet whisk oven recipe saffron knife pastry simmer broth spice
cycling saddle derailleur gravel helmet pedal touring velodrome wheel sprint brake
chess gambit rook endgame tactic bishop opening checkmate pawn castling tournament
astronomy telescope nebula comet orbit eclipse galaxy crater lens aurora planet
knitting yarn needle cable merino pattern stitch cardigan wool purl loom
photography aperture shutter tripod portrait exposure darkroom filter macro negative flash
jazz trumpet swing bebop saxophone quartet vinyl improvisation brass ballad drummer
climbing rope belay granite harness boulder summit carabiner crag chalk ridge
sailing regatta keel spinnaker harbor compass anchor tide rudder mast knot
coffee espresso roast grinder arabica filterbag crema barista brew kettle bean
history empire manuscript revolution dynasty archive fortress treaty medieval chronicle monarch
robotics servo sensor actuator gripper firmware gyroscope drone lidar motor circuit
poetry sonnet verse haiku stanza metaphor rhyme ode elegy anthology lyric
football striker goalkeeper penalty stadium midfield derby offside jersey tackle league
travel passport hostel itinerary island railway suitcase border temple market ferry""".splitlines()
)


@dataclass(frozen=True, slots=True)
class World:
    """The truth. Arrays are by user [P], item row [N] or topic [T]; times are ms UTC.

    Attributes:
        seed: All random numbers follow from it and from the sizes.
        days: Length of the year that is played.
        events_per_user: Mean number of events of a user, give or take a tenth.
        preference: float64 [P, T], each user's share of liking, rows sum to 1.
        thrift: float64 [P], a user's aversion to high prices, 0 or more.
        topics: int64 [N, 2], an item's main and second topic.
        quality: float64 [N], standard normal.
        price: float64 [N].
        creator: int64 [N].
        arrival: int64 [N], the item's first moment.
        season: float64 [T], the part of the year at which a topic is most wanted, in [0, 1).
        successors: int64 [N, 5], items that often follow, most often first.
    """

    seed: int
    days: int
    events_per_user: float
    preference: Floats
    thrift: Floats
    topics: Ints
    quality: Floats
    price: Floats
    creator: Ints
    arrival: Ints
    season: Floats
    successors: Ints

    @classmethod
    def make(
        cls, seed: int = 0, users: int = 1000, items: int = 1000, days: int = 180, events_per_user: float = 50
    ) -> World:
        """Draws a world.

        Raises:
            SettingsError: A size is too small for a world.
        """
        least = 2 * len(TOPICS)
        if users < 1 or items < least or days < 1 or events_per_user < 1:
            raise SettingsError(f"a world needs 1 user, {least} items, 1 day and 1 event per user, or more of each")
        rng = np.random.default_rng([seed, 0])
        main = np.concatenate([np.arange(least) % len(TOPICS), rng.integers(len(TOPICS), size=items - least)])
        # Each topic keeps two items that are there from the start, so that no topic is ever empty.
        late = (rng.random(items) < 0.3) & (np.arange(items) >= least)
        price_level = rng.normal(3, 0.7, len(TOPICS))
        return cls(
            seed=seed,
            days=days,
            events_per_user=events_per_user,
            preference=rng.dirichlet(np.full(len(TOPICS), 0.25), users),
            thrift=rng.gamma(2.0, 0.15, users),
            topics=np.stack([main, rng.integers(len(TOPICS), size=items)], axis=1),
            quality=rng.normal(size=items),
            price=np.round(np.exp(price_level[main] + rng.normal(0, 0.5, items)), 2),
            creator=main * 1000 + rng.integers(max(items // 200, 2), size=items),
            arrival=START_MS + np.where(late, (rng.random(items) * days * DAY_MS).astype(np.int64), 0),
            season=rng.random(len(TOPICS)),
            successors=_successors(rng, main),
        )

    def wanted(self, topic: Any, time: Any) -> Floats:
        """Returns the season's effect on a topic's worth, from -0.8 to 0.8; arguments broadcast."""
        year = (np.asarray(time) - START_MS) / (365 * DAY_MS)
        return np.asarray(0.8 * np.cos(2 * np.pi * (year - self.season[topic])))

    def utility(self, user: Any, item_rows: Any, time: Any) -> Floats:
        """Computes the worth of an item to a user at a time: the truth that a recommender tries to learn.

        Args:
            user: Number of the user, or an array of them.
            item_rows: Rows of the items table.
            time: Ms UTC.

        Returns:
            float64 in the arguments' common shape, about -3 to 5. An item that has not arrived is worth -inf.
        """
        main, second = self.topics[item_rows, 0], self.topics[item_rows, 1]
        affinity = 0.8 * self.preference[user, main] + 0.2 * self.preference[user, second]
        age = (np.asarray(time) - self.arrival[item_rows]) / DAY_MS
        fresh = np.where(self.arrival[item_rows] > START_MS, np.exp(-np.maximum(age, 0) / 14), 0)
        cost = self.thrift[user] * (np.log(self.price[item_rows]) - 3)
        worth = 5 * affinity - 1 + 0.5 * self.quality[item_rows] + self.wanted(main, time) + fresh - cost
        return np.asarray(np.where(age < 0, -np.inf, worth))

    def chances(self, user: Any, item_rows: Any, time: Any) -> dict[str, Floats]:
        """Computes the chance of each action of a user who views an item.

        `purchase` includes the step through the cart: it is below `add_to_cart`.
        """
        worth = self.utility(user, item_rows, time)
        cart = _sigmoid(worth - 2)
        return {
            "like": _sigmoid(worth - 2.5),
            "hide": _sigmoid(-worth - 3),
            "add_to_cart": cart,
            "purchase": cart * _sigmoid(worth - 0.5),
        }

    def click_chances(self, user: Ints, slates: Ints, time: Ints) -> Floats:
        """Computes the chance of each place of each slate to be taken, float64 [n, k]; at most one is."""
        places = 1 / np.log2(np.arange(slates.shape[1]) + 2)
        weights = places * np.exp(self.utility(user[:, None], slates, time[:, None]))
        return np.asarray(weights / (np.exp(_OUTSIDE) + weights.sum(axis=1, keepdims=True)))

    def logging_policy(self, time: int) -> Floats:
        """Computes the chance of each row to stand in its place (row % 10) of a slate drawn on the day of `time`.

        Each place draws from the rows of its own, so places are independent and no item comes twice: the propensity
        of every item shown is known exactly, which a policy that draws without replacement could not give.
        """
        day = START_MS + (time - START_MS) // DAY_MS * DAY_MS
        has_arrived = self.arrival <= day
        weights = np.where(has_arrived, np.exp(self.quality + self.wanted(self.topics[:, 0], day)), 0)
        place = np.arange(len(has_arrived)) % SLATE
        share = weights / np.bincount(place, weights)[place]
        return np.asarray((1 - _EXPLORE) * share + _EXPLORE * has_arrived / np.bincount(place, has_arrived)[place])


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-x)))


def _successors(rng: np.random.Generator, main: Ints) -> Ints:
    """Draws four items of the same topic and one of any topic, with which a session may change its topic."""
    order = np.argsort(main, kind="stable")
    first = np.searchsorted(main[order], main)
    size = np.bincount(main)[main]
    of_topic = order[first[:, None] + (rng.random((len(main), SUCCESSORS - 1)) * size[:, None]).astype(np.int64)]
    return np.concatenate([of_topic, rng.integers(len(main), size=(len(main), 1))], axis=1)
