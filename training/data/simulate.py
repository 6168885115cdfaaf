"""Simulates users of a small world whose truth is known: their preferences, and the chance of each click or purchase.

Training on real data shows that a model is good; training here shows that it is right, because `World` holds what no
log does: the utility of any item for any user at any time, the chance of every outcome, and the exact propensity of
every item shown.

A user comes in sessions. A session opens with a slate of ten items drawn by a known policy; the user takes one of them
or starts by themselves in a topic they like this season. Every next item either follows from the last one (each item
has a few known successors) or is chosen within the topic by utility. An item viewed may be liked, hidden, put in the
cart and then bought, each with a known chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from features.arrays import Array, pc
from features.tables.convert import pack_list, pack_map
from features.tables.schema import EVENTS, IMPRESSIONS, ITEMS, USERS
from training.data.world import DAY_MS, SLATE, START_MS, SUCCESSORS, TOPICS, Floats, Ints, World

__all__ = ["Simulated", "World", "simulate"]

_USERS_AT_ONCE = 1 << 14
_CANDIDATES = 8  # a user looks at so many before choosing
_FOLLOW = 0.5  # the chance that the next item is a successor of the last
_SESSION = 6  # views a session has on average
_EVENTS_PER_VIEW = 1.65
_ADJECTIVES = ("compact", "classic", "quiet", "bright", "modern", "little", "grand", "honest", "nordic", "daily")


@dataclass(frozen=True, slots=True)
class Simulated:
    """A world and its canonical tables; item row = row of the items table, user number likewise."""

    world: World
    events: pa.Table
    items: pa.Table
    users: pa.Table
    impressions: pa.Table


def simulate(world: World, advance: Callable[[int], Any] = lambda users: None) -> Simulated:
    """Plays the world's days, the same world in the same way; `advance` is called with the number of users finished."""
    events, impressions = [], []
    for users, user_impressions, user_events in _play(world):
        impressions.append(user_impressions)
        events.append(user_events)
        advance(users)
    tables = pa.concat_tables(events), pa.concat_tables(impressions)
    return Simulated(world, tables[0], _items_table(world), _users_table(world), tables[1])


# ------------------------------------------------------------------------------------------------------ sessions


@dataclass(frozen=True, slots=True)
class _Plan:
    """The sessions of users: arrays by session [S] and by view [V], users in order, times ascending."""

    user: Ints
    start: Ints
    first: Ints
    length: Ints
    number: Ints
    session: Ints
    time: Ints


def _plan(world: World, rng: np.random.Generator, users: Ints) -> _Plan:
    mean = world.events_per_user / _EVENTS_PER_VIEW
    views = np.maximum(rng.poisson(mean * rng.gamma(4, 0.25, len(users))), 1)
    viewer = np.repeat(users, views)
    opens = rng.random(len(viewer)) < 1 / _SESSION
    opens[np.cumsum(views) - views] = True
    session, first = np.cumsum(opens) - 1, np.flatnonzero(opens)
    user, length = viewer[first], np.diff(np.append(first, len(viewer)))
    # Two views lie far enough apart for all actions on the first.
    gap = (90_000 + rng.exponential(60_000, len(viewer))).astype(np.int64)
    before = np.cumsum(gap) - gap
    start = (rng.random(len(first)) * world.days * DAY_MS).astype(np.int64)
    start = _apart(user, start[np.lexsort((start, user))], np.add.reduceat(gap, first)) + START_MS
    time = start[session] + 3000 + before - before[first][session]
    number = np.arange(len(first)) - np.searchsorted(user, user)
    return _Plan(user, start, first, length, number, session, time)


def _apart(user: Ints, start: Ints, duration: Ints) -> Ints:
    """Moves sessions later until none begins before the same user's last one has ended."""
    busy = np.cumsum(duration) - duration
    # A user's constant outweighs every time, so the running maximum restarts with each user.
    era = (user - user[0]) * (1 << 42)
    return np.asarray(np.maximum.accumulate(start - busy + era) + busy - era)


def _play(world: World) -> Iterator[tuple[int, pa.Table, pa.Table]]:
    """Yields impressions and events of some thousand users at a time, so that memory stays small."""
    shelf = _Shelf.of(world)
    for number, low in enumerate(range(0, len(world.thrift), _USERS_AT_ONCE)):
        users = np.arange(low, min(low + _USERS_AT_ONCE, len(world.thrift)))
        rng = np.random.default_rng([world.seed, 1, number])
        plan = _plan(world, rng, users)
        slates, propensities = _slates(world, rng, plan)
        rows, place = _views(world, shelf, rng, plan, slates)
        yield len(users), _impressions_table(plan, slates, propensities), _events_table(world, rng, plan, rows, place)


def _slates(world: World, rng: np.random.Generator, plan: _Plan) -> tuple[Ints, Floats]:
    """Draws the slate that opens each session, int64 [S, 10], and returns the propensity of each place too."""
    slates = np.empty((len(plan.start), SLATE), dtype=np.int64)
    propensities = np.empty(slates.shape)
    by_place = np.argsort(np.arange(len(world.quality)) % SLATE, kind="stable")
    days = (plan.start - START_MS) // DAY_MS
    for day in np.unique(days):
        sessions = np.flatnonzero(days == day)
        policy = world.logging_policy(START_MS + int(day) * DAY_MS)
        # Place k owns the interval (k, k + 1] of the cumulative sum; an impossible row adds nothing to it.
        reach = np.cumsum(policy[by_place])
        drawn = np.searchsorted(reach, np.arange(SLATE) + rng.random((len(sessions), SLATE)) * (1 - 1e-9), side="right")
        slates[sessions] = by_place[drawn]
        propensities[sessions] = policy[slates[sessions]]
    return slates, propensities


@dataclass(frozen=True, slots=True)
class _Shelf:
    """Items by topic and arrival, so that one binary search draws an item of a topic that has arrived."""

    rows: Ints
    keys: Ints
    reach: Floats

    @classmethod
    def of(cls, world: World) -> _Shelf:
        keys = world.topics[:, 0] * (1 << 44) + world.arrival
        rows = np.argsort(keys, kind="stable")
        return cls(rows, keys[rows], np.concatenate([[0], np.cumsum(np.exp(world.quality[rows]))]))

    def draw(self, rng: np.random.Generator, topic: Ints, time: Ints) -> Ints:
        """Draws eight items of each topic that have arrived by the time, better ones more often, int64 [n, 8]."""
        low = self.reach[np.searchsorted(self.keys, topic * (1 << 44))]
        high = self.reach[np.searchsorted(self.keys, topic * (1 << 44) + time, side="right")]
        at = low[:, None] + rng.random((len(topic), _CANDIDATES)) * (high - low)[:, None] * (1 - 1e-9)
        return self.rows[np.searchsorted(self.reach, at, side="right") - 1]


def _views(world: World, shelf: _Shelf, rng: np.random.Generator, plan: _Plan, slates: Ints) -> tuple[Ints, Ints]:
    """Returns the row of each view, and the place of the slate that it was taken from, -1 for none."""
    rows, place = np.empty(len(plan.time), dtype=np.int64), np.full(len(plan.time), -1)
    reach = np.cumsum(world.click_chances(plan.user, slates, plan.start), axis=1)
    choice = (reach < rng.random((len(slates), 1))).sum(axis=1)
    liked = np.log(world.preference[plan.user] + 1e-9) + world.wanted(np.arange(len(TOPICS)), plan.start[:, None])
    topic = np.argmax(liked + rng.gumbel(size=liked.shape), axis=1)
    clicked = choice < SLATE
    at = plan.first[clicked]
    rows[at], place[at] = slates[clicked, choice[clicked]], choice[clicked]
    topic[clicked] = world.topics[rows[at], 0]
    unled = np.flatnonzero(~clicked)
    rows[plan.first[unled]] = _choose(world, shelf, rng, plan.user[unled], topic[unled], plan.time[plan.first[unled]])
    for step in range(1, int(plan.length.max())):
        on = np.flatnonzero(plan.length > step)
        at = plan.first[on] + step
        rank = np.minimum(rng.geometric(0.5, len(on)), SUCCESSORS) - 1
        next_rows = world.successors[rows[at - 1], rank]
        stays = (rng.random(len(on)) >= _FOLLOW) | (world.arrival[next_rows] > plan.time[at])
        staying = on[stays]
        next_rows[stays] = _choose(world, shelf, rng, plan.user[staying], topic[staying], plan.time[at[stays]])
        rows[at] = next_rows
    return rows, place


def _choose(world: World, shelf: _Shelf, rng: np.random.Generator, user: Ints, topic: Ints, time: Ints) -> Ints:
    """Chooses of eight items of the topic the one worth most, with a user's usual inconstancy (Gumbel noise)."""
    candidates = shelf.draw(rng, topic, time)
    worth = world.utility(user[:, None], candidates, time[:, None]) + rng.gumbel(size=candidates.shape)
    return np.asarray(np.take_along_axis(candidates, np.argmax(worth, axis=1)[:, None], axis=1)[:, 0])


# -------------------------------------------------------------------------------------------------------- tables


def _arrow(values: Any, mask: Any = None) -> Array:
    return pa.array(values, mask=mask)


def _named(prefix: str, numbers: Ints) -> Array:
    return pc.binary_join_element_wise(prefix, pc.cast(_arrow(numbers), pa.string()), "")


def _complete(columns: dict[str, Array], schema: pa.Schema) -> pa.Table:
    length = len(next(iter(columns.values())))
    return pa.table([columns.get(f.name, pa.nulls(length, f.type)) for f in schema], schema=schema)


def _sessions_named(plan: _Plan) -> Array:
    return pc.binary_join_element_wise(_named("u", plan.user), pc.cast(_arrow(plan.number), pa.string()), "-")


def _impressions_table(plan: _Plan, slates: Ints, propensities: Floats) -> pa.Table:
    ends = _arrow(np.arange(0, slates.size + 1, SLATE, dtype=np.int32))
    length = len(slates)
    columns = {
        "request_id": pc.binary_join_element_wise("r", _sessions_named(plan), "-"),
        "user_id": _named("u", plan.user),
        "timestamp": _arrow(plan.start),
        "item_ids": pa.ListArray.from_arrays(ends, _named("i", slates.ravel())),
        "propensities": pa.ListArray.from_arrays(ends, _arrow(propensities.ravel())),
        "surface": pa.repeat("home", length),
        "arm": pa.repeat("logging", length),
    }
    return _complete(columns, IMPRESSIONS)


# Events of a view, and the milliseconds after which they follow; a purchase comes last.
_ACTS = {"view_item": 0, "hide": 4_000, "like": 8_000, "add_to_cart": 20_000, "purchase": 60_000}


def _events_table(world: World, rng: np.random.Generator, plan: _Plan, rows: Ints, place: Ints) -> pa.Table:
    user = plan.user[plan.session]
    chances = world.chances(user, rows, plan.time)
    # One draw for the cart and the purchase: an item bought was in the cart before.
    luck = {name: rng.random(len(rows)) for name in ("hide", "like", "add_to_cart")}
    luck |= {"purchase": luck["add_to_cart"]}
    views = [np.arange(len(rows)), *(np.flatnonzero(luck[name] < chances[name]) for name in list(_ACTS)[1:])]
    kind = np.repeat(np.arange(len(_ACTS)), [len(of_kind) for of_kind in views])
    view = np.concatenate(views)
    time = plan.time[view] + np.array(list(_ACTS.values()))[kind]
    order = np.lexsort((time, user[view]))
    view, kind, time = view[order], kind[order], time[order]
    session, from_slate = plan.session[view], place[view] >= 0
    names = _sessions_named(plan).take(_arrow(session))
    buys = kind == list(_ACTS).index("purchase")
    columns = {
        "user_id": _named("u", user[view]),
        "item_id": _named("i", rows[view]),
        "event_type": _arrow(list(_ACTS)).take(_arrow(kind)),
        "timestamp": _arrow(time),
        "value": _arrow(world.price[rows[view]].astype(np.float32), mask=~buys),
        "session_id": names,
        "request_id": pc.if_else(_arrow(from_slate), pc.binary_join_element_wise("r", names, "-"), None),
        "surface": pc.if_else(_arrow(from_slate), "home", "browse"),
        "position": _arrow(place[view].astype(np.int32), mask=~from_slate),
    }
    return _complete(columns, EVENTS)


def _items_table(world: World) -> pa.Table:
    rng = np.random.default_rng([world.seed, 2])
    words, length = _arrow([word for topic in TOPICS for word in topic]), len(world.quality)
    width = len(TOPICS[0])

    start = rng.integers(width - 1, size=length)

    def word(topic: int, nth: int) -> Array:
        """A word of each item's main (0) or second (1) topic, not the topic's name; no two `nth` are the same."""
        return words.take(_arrow(world.topics[:, topic] * width + 1 + (start + 3 * nth) % (width - 1)))

    adjective = _arrow(_ADJECTIVES).take(_arrow(rng.integers(len(_ADJECTIVES), size=length)))
    topics = [_arrow([topic[0] for topic in TOPICS]).take(_arrow(world.topics[:, n])) for n in (0, 1)]
    distinct = pc.if_else(pc.equal(*topics), None, topics[1])
    late = _arrow(world.arrival > START_MS)
    columns = {
        "item_id": _named("i", np.arange(length)),
        "title": pc.binary_join_element_wise(adjective, word(0, 0), word(0, 1), " "),
        "description": pc.binary_join_element_wise(word(0, 2), word(0, 3), word(1, 0), word(1, 1), topics[0], " "),
        "categories": pack_list([topics[0], distinct]),
        "creator_id": _named("c", world.creator),
        "price": _arrow(world.price.astype(np.float32)),
        "available": pa.repeat(True, length),
        "available_from": pc.if_else(late, _arrow(world.arrival), None),
    }
    return _complete(columns, ITEMS)


def _users_table(world: World) -> pa.Table:
    names = _arrow([topic[0] for topic in TOPICS])
    best = np.argsort(-world.preference, axis=1)
    traits = {
        "segment": names.take(_arrow(best[:, 0])),
        "second_segment": names.take(_arrow(best[:, 1])),
        "spending": pc.if_else(_arrow(world.thrift > 0.3), "careful", "easy"),
    }
    columns = {"user_id": _named("u", np.arange(len(world.thrift))), "attributes": pack_map(traits)}
    return _complete(columns, USERS)
