"""The simulated world does what its own truth says, and its log says what it did."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from features.errors import SettingsError
from features.tables.dataset import conform
from features.tables.order import order_events
from features.tables.schema import (
    EVENTS,
    EVENTS_REQUIRED,
    IMPRESSIONS,
    IMPRESSIONS_REQUIRED,
    ITEMS,
    ITEMS_REQUIRED,
    USERS,
    USERS_REQUIRED,
)
from training.data import simulate as playing
from training.data.simulate import Simulated, World, simulate
from training.data.world import DAY_MS, SLATE, START_MS, TOPICS


@pytest.fixture(scope="module")
def played() -> Simulated:
    return simulate(World.make(seed=1, users=600, items=200, days=365, events_per_user=60))


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Users `u12` and items `i12` -> 12."""
    return np.array([int(name[1:]) for name in column.to_pylist()])


def views(played: Simulated) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """User, row, time and session of every view, in the order of the log."""
    table = played.events.filter(pc.equal(played.events["event_type"], "view_item"))
    session = table["session_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    return numbers(table["user_id"]), numbers(table["item_id"]), table["timestamp"].to_numpy(), session


def near(count: float, expected: float, variance: float) -> bool:
    """Within four and a half standard deviations: once in 150,000 by accident, and the seed is fixed."""
    return abs(count - expected) < 4.5 * np.sqrt(variance)


# ----------------------------------------------------------------------------------------------------- the truth


def world_of_two() -> World:
    """Two people, three items, two topics, in numbers that a hand can add."""
    return World(
        seed=0,
        days=1,
        events_per_user=1,
        preference=np.array([[1.0, 0.0], [0.5, 0.5]]),
        thrift=np.array([0.0, 1.0]),
        topics=np.array([[0, 1], [1, 0], [0, 0]]),
        quality=np.array([0.0, 2.0, 0.0]),
        price=np.exp([3.0, 4.0, 3.0]),
        creator=np.zeros(3, dtype=np.int64),
        arrival=START_MS + np.array([0, 0, 7 * DAY_MS]),
        season=np.array([0.0, 0.5]),
        successors=np.zeros((3, 5), dtype=np.int64),
    )


def test_utility_is_the_sum_it_says() -> None:
    world = world_of_two()
    # affinity 5 * .8, minus 1, season +.8
    assert world.utility(0, 0, START_MS) == pytest.approx(4 - 1 + 0.8)
    # affinity 5 * .2, minus 1, quality .5 * 2, season -.8
    assert world.utility(0, 1, START_MS) == pytest.approx(1 - 1 + 1 - 0.8)
    # the other person: affinity 5 * .5, minus 1, quality 1, season -.8, a price of e above the usual
    assert world.utility(1, 1, START_MS) == pytest.approx(2.5 - 1 + 1 - 0.8 - 1)
    # half a year later the season has turned
    assert world.utility(0, 0, START_MS + 365 * DAY_MS // 2) == pytest.approx(4 - 1 - 0.8)
    # not there yet; on its day it is as fresh as can be
    assert world.utility(0, 2, START_MS) == -np.inf
    season = 0.8 * np.cos(2 * np.pi * 7 / 365)
    assert world.utility(0, 2, START_MS + 7 * DAY_MS) == pytest.approx(5 - 1 + season + 1)
    assert world.utility(np.array([0, 1])[:, None], np.arange(2), START_MS).shape == (2, 2)


def test_chances_grow_with_utility_and_a_purchase_needs_a_cart() -> None:
    world = World.make(users=50, items=100)
    user, row = np.repeat(np.arange(50), 100), np.tile(np.arange(100), 50)
    at = START_MS + 400 * DAY_MS
    order = np.argsort(world.utility(user, row, at))
    chances = world.chances(user[order], row[order], at)
    for name in ("like", "add_to_cart", "purchase"):
        assert (np.diff(chances[name]) >= 0).all()
    assert (np.diff(chances["hide"]) <= 0).all()
    assert (chances["purchase"] < chances["add_to_cart"]).all()


def test_an_absent_item_has_no_chance() -> None:
    world = world_of_two()
    assert world.chances(0, 2, START_MS)["like"] == 0
    assert world.click_chances(np.array([0]), np.array([[2, 0]]), np.array([START_MS]))[0, 0] == 0


def test_the_logging_policy_is_a_distribution_in_every_place_over_what_is_there() -> None:
    world = World.make(items=200, days=100)
    for day in (0, 50, 99):
        policy = world.logging_policy(START_MS + day * DAY_MS + 12345)
        place = np.arange(200) % SLATE
        assert np.bincount(place, policy) == pytest.approx(np.ones(SLATE))
        assert ((policy > 0) == (world.arrival <= START_MS + day * DAY_MS)).all()


def test_topics_have_words_of_their_own() -> None:
    assert {len(words) for words in TOPICS} == {11}
    assert len({word for words in TOPICS for word in words}) == 11 * len(TOPICS)


def test_a_world_too_small_is_refused() -> None:
    for sizes in ({"users": 0}, {"items": 31}, {"days": 0}, {"events_per_user": 0}):
        with pytest.raises(SettingsError, match="a world needs 1 user, 32 items, 1 day"):
            World.make(**sizes)


# ------------------------------------------------------------------------------------------------------- the log


def test_the_tables_are_canonical(played: Simulated) -> None:
    for table, schema, required in (
        (played.events, EVENTS, EVENTS_REQUIRED),
        (played.items, ITEMS, ITEMS_REQUIRED),
        (played.users, USERS, USERS_REQUIRED),
        (played.impressions, IMPRESSIONS, IMPRESSIONS_REQUIRED),
    ):
        loaded = conform(table, schema, required, "t")
        assert loaded.rejected == []
        assert loaded.table.equals(table)
    assert order_events(played.events) is played.events


def test_the_same_seed_plays_the_same_way_in_pieces_of_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playing, "_USERS_AT_ONCE", 16)
    done: list[int] = []
    sizes = {"users": 40, "items": 64, "days": 20, "events_per_user": 10}
    one, two = simulate(World.make(seed=5, **sizes), done.append), simulate(World.make(seed=5, **sizes))
    assert done == [16, 16, 8]
    assert one.events.equals(two.events)
    assert one.impressions.equals(two.impressions)
    assert one.items.equals(two.items)
    assert not one.events.equals(simulate(World.make(seed=6, **sizes)).events)
    assert len(one.events["user_id"].unique()) == 40


def test_sizes_are_those_asked_for(played: Simulated) -> None:
    assert played.events.num_rows == pytest.approx(600 * 60, rel=0.1)
    assert played.items.num_rows == 200
    assert played.users.num_rows == 600
    times = played.events["timestamp"].to_numpy()
    assert times.min() >= START_MS
    assert times.max() < START_MS + 372 * DAY_MS


def test_nothing_is_touched_before_it_came(played: Simulated) -> None:
    rows, times = numbers(played.events["item_id"]), played.events["timestamp"].to_numpy()
    assert (times >= played.world.arrival[rows]).all()
    came = played.items["available_from"].to_pylist()
    assert [at or START_MS for at in came] == played.world.arrival.tolist()
    assert 20 < sum(at is not None for at in came) < 100


def test_what_follows_a_view_follows_it(played: Simulated) -> None:
    """Each session alone: a view, then what is done with that item, before the next view; a purchase after its cart."""
    allowed = {"view_item": set(), "hide": {"view_item"}, "like": {"view_item", "hide"}}
    allowed |= {"add_to_cart": {"view_item", "hide", "like"}, "purchase": {"add_to_cart"}}
    before: tuple[str, str, str] | None = None
    for event in played.events.to_pylist():
        kind, now = event["event_type"], (event["session_id"], event["item_id"], event["event_type"])
        if kind != "view_item":
            assert before is not None
            assert before[:2] == now[:2]
            assert before[2] in allowed[kind]
        before = now
    buys = np.array([kind == "purchase" for kind in played.events["event_type"].to_pylist()])
    value = played.events["value"]
    assert (value.is_valid().to_numpy() == buys).all()
    price = played.world.price[numbers(played.events["item_id"])][buys]
    assert value.drop_null().to_numpy() == pytest.approx(price, rel=1e-6)


def test_sessions_of_a_person_do_not_overlap(played: Simulated) -> None:
    user, _, _, session = views(played)
    same = user[1:] == user[:-1]
    changes = np.flatnonzero(session[1:] != session[:-1])
    assert len(changes) + 1 == len(np.unique(session))
    assert same[changes].sum() > 1000


def test_outcomes_come_with_their_true_chances(played: Simulated) -> None:
    user, row, time, _ = views(played)
    counts = {e["values"]: e["counts"] for e in played.events["event_type"].value_counts().to_pylist()}
    for name, chance in played.world.chances(user, row, time).items():
        assert near(counts[name], chance.sum(), (chance * (1 - chance)).sum()), name


def test_the_next_item_follows_from_the_last_half_of_the_time(played: Simulated) -> None:
    _, row, _, session = views(played)
    within = session[1:] == session[:-1]
    follows = (played.world.successors[row[:-1]] == row[1:, None]).any(axis=1)[within]
    assert 0.4 < follows.mean() < 0.65
    by_chance = (played.world.successors[np.roll(row, 17)[:-1]] == row[1:, None]).any(axis=1)[within]
    assert by_chance.mean() < 0.1


def test_people_take_what_they_like_and_when_it_is_in_season(played: Simulated) -> None:
    user, row, time, _ = views(played)
    world = played.world
    anybody = np.random.default_rng(0).permutation(user)
    topic = world.topics[row, 0]
    assert world.preference[user, topic].mean() > 3 * world.preference[anybody, topic].mean()
    high = world.wanted(topic, time) > 0.4
    low = world.wanted(topic, time) < -0.4
    assert high.sum() > 1.5 * low.sum()


# ------------------------------------------------------------------------------------------------ the impressions


def slates(played: Simulated) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    shown = played.impressions
    rows = numbers(shown["item_ids"].combine_chunks().flatten()).reshape(-1, SLATE)
    propensities = shown["propensities"].combine_chunks().flatten().to_numpy().reshape(-1, SLATE)
    return numbers(shown["user_id"]), rows, propensities, shown["timestamp"].to_numpy()


def test_propensities_are_those_of_the_policy(played: Simulated) -> None:
    _, rows, propensities, time = slates(played)
    assert (rows % SLATE == np.arange(SLATE)).all()
    for n in range(0, len(rows), 97):
        assert propensities[n] == pytest.approx(played.world.logging_policy(int(time[n]))[rows[n]])


def test_propensities_are_how_often_items_were_shown(played: Simulated) -> None:
    """The sum of 1 / propensity over an item's impressions estimates how many there were while it was there."""
    _, rows, propensities, _ = slates(played)
    for row in np.flatnonzero(played.world.arrival == START_MS):
        mine = propensities[:, row % SLATE][rows[:, row % SLATE] == row]
        assert near((1 / mine).sum(), len(rows), ((1 - mine) / mine**2).sum()), row


def test_slates_are_clicked_with_their_true_chances(played: Simulated) -> None:
    user, rows, _, time = slates(played)
    chances = played.world.click_chances(user, rows, time)
    taken = played.events.filter(pc.equal(played.events["event_type"], "view_item"))
    taken = taken.filter(taken["request_id"].is_valid())
    clicks = np.bincount(taken["position"].to_numpy(), minlength=SLATE)
    for place in range(SLATE):
        chance = chances[:, place]
        assert near(clicks[place], chance.sum(), (chance * (1 - chance)).sum()), place
    assert len(taken["request_id"].unique()) == taken.num_rows


def test_events_name_the_slate_that_they_came_from(played: Simulated) -> None:
    shown = {row["request_id"]: row for row in played.impressions.to_pylist()}
    events = [event for event in played.events.to_pylist() if event["request_id"]]
    assert len(events) > 500
    for event in events:
        slate = shown[event["request_id"]]
        assert slate["item_ids"][event["position"]] == event["item_id"]
        assert slate["user_id"] == event["user_id"]
        assert slate["timestamp"] < event["timestamp"]
        assert event["surface"] == slate["surface"] == "home"


# --------------------------------------------------------------------------------------------- items and people


def test_an_items_text_is_of_its_topics(played: Simulated) -> None:
    for item, (main, second) in zip(played.items.to_pylist(), played.world.topics.tolist(), strict=True):
        first, other = item["title"].split()[1:]
        assert first != other
        assert {first, other} <= set(TOPICS[main][1:])
        words = item["description"].split()
        assert set(words[:2]) <= set(TOPICS[main])
        assert set(words[2:4]) <= set(TOPICS[second])
        assert item["categories"] == list(dict.fromkeys((TOPICS[main][0], TOPICS[second][0])))


def test_a_creator_stays_in_one_topic(played: Simulated) -> None:
    for creator in np.unique(played.world.creator):
        assert len(np.unique(played.world.topics[played.world.creator == creator, 0])) == 1


def test_a_persons_segment_is_the_topic_they_like_best(played: Simulated) -> None:
    traits = [dict(traits) for traits in played.users["attributes"].to_pylist()]
    best = played.world.preference.argmax(axis=1)
    assert [t["segment"] for t in traits] == [TOPICS[topic][0] for topic in best]
    assert {t["spending"] for t in traits} == {"careful", "easy"}
