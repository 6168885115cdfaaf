"""Makes the golden requests of a bundle, and compares the two roads from events to model inputs on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.action_rates import ActionRates
from features.assemble import History, Moment, encoder_batch, encoder_inputs, history, ranker_features, rows_read
from features.catalog import Catalog
from features.decayed_counts import DecayedCounts
from features.golden import TOP, profile_of
from features.histories import KEYS
from features.kernels import dot_rows
from features.keys import event_type_key, item_key
from features.profile import RING
from features.tables.dataset import Dataset
from features.tables.event_reader import Events
from features.tables.schema import EVENTS
from features.transforms import ItemInputShapes, item_inputs, query_inputs, text_tokens
from training.config import TrainConfig
from training.data.histories import UserHistories
from training.data.interactions import read_interactions

Event = dict[str, Any]
Ask = Callable[[str, Mapping[str, npt.NDArray[Any]]], npt.NDArray[np.float32]]

_F32 = npt.NDArray[np.float32]
_FIRST_MOMENT = 1_700_000_000_000
_MINUTE, _DAY = 60_000, 86_400_000
# Letters that Unicode knows twice, a fraction, capitals; and no word at all.
_QUERIES = ("Ｃａｆé ½ Shoes NAÏVE ﬁlms", "!?")
_ITEMS: tuple[dict[str, Any], ...] = (
    {"item_id": "golden:1", "title": "Golden ﬁlms", "categories": ["golden"], "creator_id": "golden", "price": 9.5},
    {"item_id": "golden:2"},
)


@dataclass(frozen=True, slots=True)
class World:
    """What golden requests are made from, and what answers them.

    Attributes:
        catalog: The bundle's catalogue.
        neighbors: Similar items by row, -1 padded; int32 [N, K].
        event_types: Names, in the model's order.
        config: The training's configuration.
        shapes: Shapes of the content encoders' inputs.
        outcomes: How the ranker's actions are read from events.
        ask: Answers with a graph, by its name, to named inputs.
    """

    catalog: Catalog
    neighbors: npt.NDArray[np.int32]
    event_types: Sequence[str]
    config: TrainConfig
    shapes: ItemInputShapes
    action_rates: ActionRates
    ask: Ask


@dataclass(frozen=True, slots=True)
class Assembled:
    """What a road made of one person: the encoder's inputs, and what the ranker's features are computed from."""

    rows: npt.NDArray[np.int64]
    types: npt.NDArray[np.int64]
    past: History


def make_people(world: World) -> list[list[Event]]:
    """Made-up histories, oldest first, of every length that matters; every event type occurs.

    Each is a walk over similar items with leaps to popular ones, so its vector lies where those of real people do. Some
    items were others when their events came, and some events came before their item.
    """
    rng = np.random.default_rng(0)
    longest = world.config.max_length
    lengths = sorted({1, 2, 5, longest - 1, longest, longest + 7, RING, RING + 20} - {0})
    people = [_walk(world, rng, length) for length in lengths]
    for at, name in enumerate(world.event_types):
        people[-1][at]["event_type"] = name
    for events in people:
        _apart_from_catalog(events)
    return people


def online(world: World, people: Sequence[Sequence[Event]]) -> list[Assembled]:
    """The road of serving: records, the stored bytes of a profile, and what is read of it."""
    index = {event_type_key(name): 1 + at for at, name in enumerate(world.event_types)}
    made = []
    for events in people:
        profile = profile_of(events, world.catalog)
        past = history(profile, world.catalog, index)
        made.append(Assembled(*encoder_inputs(rows_read(past), past.types, world.config.max_length), past))
    return made


def offline(world: World, people: Sequence[Sequence[Event]]) -> list[Assembled]:
    """The road of training: a table of events, and the arrays made of it."""
    table = pa.Table.from_pylist(
        [{"user_id": f"golden-{at}", **event} for at, events in enumerate(people) for event in events], schema=EVENTS
    )
    dataset = Dataset(Events.of(table), items=table.slice(0, 0), users=table.slice(0, 0), info={})
    data = read_interactions(dataset, world.catalog.vocabulary, world.config)
    starts, ends = data.offsets[:-1], data.offsets[1:]
    rows, types, lengths = encoder_batch(data.rows, data.types, starts, ends, world.config.max_length)
    known = UserHistories(data, world.catalog.columns)
    histories = [known.before(at, len(events)) for at, events in enumerate(people)]
    return [
        Assembled(rows[at, :length], types[at, :length], past)
        for at, (length, past) in enumerate(zip(lengths.tolist(), histories, strict=True))
    ]


def differences(world: World, mine: Sequence[Assembled], others: Sequence[Assembled]) -> int:
    """The number of values in which two roads differ, to the bit, from the events to the models' inputs."""
    columns = world.catalog.columns
    rows = np.arange(min(200, world.catalog.size), dtype=np.int32)
    relevance = columns.popularity[rows]
    count = 0
    for one, other in zip(mine, others, strict=True):
        count += _unequal(one.rows, other.rows) + _unequal(one.types, other.types)
        count += sum(past_differences(one.past, other.past).values())
        moment = moment_of(world)
        features = [ranker_features(o.past, rows, relevance, columns, world.action_rates, moment) for o in (one, other)]
        count += _unequal(*features)
    return count


def past_differences(one: History, other: History) -> dict[str, int]:
    """Returns the number of values in which two pasts differ, to the bit, by the name of what differs."""
    pairs: list[tuple[type, History | DecayedCounts, History | DecayedCounts]]
    pairs = [(History, one, other), (DecayedCounts, one.decayed_counts, other.decayed_counts)]
    found = {
        field.name: _unequal(getattr(left, field.name), getattr(right, field.name))
        for part, left, right in pairs
        for field in dataclasses.fields(part)
        if field.name != "decayed_counts"
    }
    return {name: count for name, count in found.items() if count}


def answers(world: World, people: Sequence[Sequence[Event]]) -> dict[str, Any]:
    """What `golden.json` holds: requests of people, of queries and of new items, with their right answers.

    One more person has an item and an event type that nobody knows, which training never meets and serving does.
    """
    stranger = [dict(event) for event in people[-1][:6]]
    stranger[2]["item_id"], stranger[4]["event_type"] = "golden:unknown", "golden_unknown"
    people = [*people, stranger]
    return {
        "people": [_person(world, *pair) for pair in zip(people, online(world, people), strict=True)],
        "queries": [_query(world, text) for text in (*_QUERIES, *_titles(world))],
        "items": [
            {"item": item, "vector": _numbers(world.ask("item_encoder", item_inputs([item], world.shapes))[0])}
            for item in _ITEMS
        ],
    }


def moment_of(world: World) -> Moment:
    """When and where golden requests are made: long after the last event, on the last surface that is known."""
    return Moment(_FIRST_MOMENT + _DAY, sorted(world.action_rates.surfaces)[-1] if world.action_rates.surfaces else "")


def user_vector(world: World, made: Assembled) -> _F32:
    """The vector of a person; float32 [D]."""
    inputs: dict[str, npt.NDArray[Any]] = {
        "vectors": world.catalog.columns.vectors[made.rows][None],
        "types": made.types[None],
        "lengths": np.array([made.rows.size], np.int64),
    }
    vector: _F32 = world.ask("user_encoder", inputs)[0]
    return vector


def _walk(world: World, rng: np.random.Generator, length: int) -> list[Event]:
    share = np.exp(world.catalog.columns.popularity[: world.catalog.base_size].astype(np.float64))
    leaps = rng.choice(share.size, length, p=share / share.sum())
    events: list[Event] = []
    row = int(leaps[0])
    for at in range(length):
        near = world.neighbors[row][world.neighbors[row] >= 0]
        row = int(rng.choice(near)) if near.size and rng.random() < 0.7 else int(leaps[at])
        name = world.event_types[int(rng.integers(len(world.event_types)))]
        value = float(rng.integers(1, 6)) if rng.random() < 0.5 else None
        moment = _FIRST_MOMENT + at * _MINUTE
        (item,) = world.catalog.ids([row])
        events.append({"item_id": item, "event_type": name, "timestamp": moment, "value": value})
    return events


def _apart_from_catalog(events: list[Event]) -> None:
    """Makes some events carry other keys than the catalogue has: their item was patched since, or put only later."""
    patched, early = {name: item_key("golden") for name in KEYS}, dict.fromkeys(KEYS, 0)
    for event in events[1::4]:
        event.update(patched)
    for event in events[3::4]:
        event.update(early)


def _person(world: World, events: Sequence[Event], made: Assembled) -> dict[str, Any]:
    columns = world.catalog.columns
    user = user_vector(world, made)
    rows, relevance = _best(world, user)
    moment = moment_of(world)
    features = ranker_features(made.past, rows, relevance, columns, world.action_rates, moment)
    logits = world.ask("ranker", {"user": user[None], "items": columns.vectors[rows], "features": features})
    return {
        "events": list(events),
        "now_ms": moment.now_ms,
        "surface": moment.surface,
        "vector": _numbers(user),
        "item_ids": world.catalog.ids(rows),
        "relevance": _numbers(relevance),
        "features": [_numbers(line) for line in features],
        "logits": [_numbers(line) for line in logits],
    }


def _query(world: World, text: str) -> dict[str, Any]:
    vector = world.ask("query_encoder", query_inputs(text, world.shapes))[0]
    rows, relevance = _best(world, vector)
    return {
        "text": text,
        "tokens": text_tokens(text).tolist(),
        "vector": _numbers(vector),
        "item_ids": world.catalog.ids(rows),
        "relevance": _numbers(relevance),
    }


def _titles(world: World) -> list[str]:
    """Titles of a few popular items, as queries."""
    popular = np.argsort(-world.catalog.columns.popularity, kind="stable")[:3]
    titles = [world.catalog.item(int(row)).get("title") for row in popular]
    return [title for title in titles if title]


def _best(world: World, vector: _F32) -> tuple[npt.NDArray[np.int32], _F32]:
    """The exactly best rows by relevance, ties by row."""
    everything = np.arange(world.catalog.size, dtype=np.int32)
    scores = dot_rows(world.catalog.columns.vectors, everything, vector)
    rows = np.lexsort((everything, -scores))[:TOP].astype(np.int32)
    return rows, scores[rows]


def _numbers(values: _F32) -> list[float]:
    """As JSON writes them: a float32 comes back as itself."""
    return [float(value) for value in values]


def _unequal(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> int:
    if one.shape != other.shape or one.dtype != other.dtype:
        return max(one.size, other.size, 1)
    if not one.size:
        return 0
    bits = [np.ascontiguousarray(array).reshape(array.size, -1).view(np.uint8) for array in (one, other)]
    return int((bits[0] != bits[1]).any(axis=1).sum())
