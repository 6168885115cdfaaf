"""Builds the golden requests of a bundle, and compares training's and serving's path from events to model inputs.

The two paths share the functions that compute features, and differ in how they store what these read: arrays of all
events here, the bytes of a profile there. Their equality to the bit is a gate of every export.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.action_rates import ActionRates
from features.assemble import (
    History,
    Moment,
    chosen_rows,
    encoder_batch,
    encoder_inputs,
    history,
    moment_at,
    ranker_features,
    rows_read,
)
from features.catalog import Catalog
from features.controls import attribute_controls
from features.decayed_counts import DecayedCounts
from features.declared import Declared
from features.golden import TOP, profile_of
from features.histories import KEYS
from features.kernels import dot_rows
from features.keys import event_type_key, item_key
from features.linear import LinearTerm
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
class GoldenContext:
    """The parts that golden requests are built from, and the graphs that compute their results.

    Attributes:
        catalog: The bundle's catalogue.
        neighbors: Similar items by row, -1 padded; int32 [N, K].
        linear: The linear part of relevance.
        event_types: Names, in the model's order.
        config: The training's configuration.
        shapes: Shapes of the content encoders' inputs.
        action_rates: Reads the ranker's actions from events.
        declared: The declared features of the ranker.
        ask: Runs a graph, by its name, on named inputs.
    """

    catalog: Catalog
    neighbors: npt.NDArray[np.int32]
    linear: LinearTerm
    event_types: Sequence[str]
    config: TrainConfig
    shapes: ItemInputShapes
    action_rates: ActionRates
    declared: Declared
    ask: Ask


@dataclass(frozen=True, slots=True)
class Assembled:
    """One user as a path assembles them: the encoder's inputs, and the history that features are computed from."""

    rows: npt.NDArray[np.int64]
    types: npt.NDArray[np.int64]
    history: History


def make_histories(context: GoldenContext) -> list[list[Event]]:
    """Generates histories, oldest first, of every length that matters; every event type occurs.

    Each is a walk over similar items with leaps to popular ones, so its vector lies where those of real users do. Some
    events carry keys that their item no longer has, and some came before their item.
    """
    rng = np.random.default_rng(0)
    longest = context.config.max_length
    # Around the encoder's window and the profile's ring, where an off-by-one would show.
    lengths = sorted({1, 2, 5, longest - 1, longest, longest + 7, RING, RING + 20} - {0})
    users = [_walk(context, rng, length) for length in lengths]
    for at, name in enumerate(context.event_types):
        users[-1][at]["event_type"] = name
    for events in users:
        _diverge_from_catalog(events)
    return users


def online(context: GoldenContext, users: Sequence[Sequence[Event]]) -> list[Assembled]:
    """Takes serving's path: records, the stored bytes of a profile, and the history read from it."""
    index = {event_type_key(name): 1 + at for at, name in enumerate(context.event_types)}
    assembled = []
    for events in users:
        profile = profile_of(events, context.catalog)
        read = history(profile, context.catalog, index)
        assembled.append(Assembled(*encoder_inputs(rows_read(read), read.types, context.config.max_length), read))
    return assembled


def offline(context: GoldenContext, users: Sequence[Sequence[Event]]) -> list[Assembled]:
    """Takes training's path: a table of events, and the arrays made of it."""
    table = pa.Table.from_pylist(
        [{"user_id": f"golden-{at}", **event} for at, events in enumerate(users) for event in events], schema=EVENTS
    )
    dataset = Dataset(Events.of(table), items=table.slice(0, 0), users=table.slice(0, 0), info={})
    data = read_interactions(dataset, context.catalog.vocabulary, context.config)
    starts, ends = data.offsets[:-1], data.offsets[1:]
    rows, types, lengths = encoder_batch(data.rows, data.types, starts, ends, context.config.max_length)
    of_users = UserHistories(data, context.catalog.columns)
    histories = [of_users.before(at, len(events)) for at, events in enumerate(users)]
    return [
        Assembled(rows[at, :length], types[at, :length], read)
        for at, (length, read) in enumerate(zip(lengths.tolist(), histories, strict=True))
    ]


def differences(context: GoldenContext, left: Sequence[Assembled], right: Sequence[Assembled]) -> int:
    """Counts the values in which two paths differ, to the bit, from the events to the models' inputs."""
    columns = context.catalog.columns
    rows = np.arange(min(200, context.catalog.size), dtype=np.int32)
    relevance = columns.popularity[rows]
    count = 0
    for pair in zip(left, right, strict=True):
        count += _unequal(pair[0].rows, pair[1].rows) + _unequal(pair[0].types, pair[1].types)
        count += sum(history_differences(pair[0].history, pair[1].history).values())
        moment = moment_of(context)
        features = [
            ranker_features(user.history, rows, relevance, columns, context.action_rates, moment) for user in pair
        ]
        count += _unequal(*features)
    return count


def history_differences(left: History, right: History) -> dict[str, int]:
    """Counts the values in which two histories differ, to the bit, by the name of the field."""
    pairs: list[tuple[type, History | DecayedCounts, History | DecayedCounts]]
    pairs = [(History, left, right), (DecayedCounts, left.decayed_counts, right.decayed_counts)]
    counts = {
        field.name: _unequal(getattr(first, field.name), getattr(second, field.name))
        for part, first, second in pairs
        for field in dataclasses.fields(part)
        if field.name != "decayed_counts"
    }
    return {name: count for name, count in counts.items() if count}


def answers(context: GoldenContext, users: Sequence[Sequence[Event]]) -> dict[str, Any]:
    """Returns the content of `golden.json`: requests of users, of queries and of new items, with the right results.

    One more user has an item and an event type that the bundle lacks: serving meets such events, training never does.
    """
    unknown = [dict(event) for event in users[-1][:6]]
    unknown[2]["item_id"], unknown[4]["event_type"] = "golden:unknown", "golden_unknown"
    users = [*users, unknown]
    return {
        "people": [_user_request(context, *pair) for pair in zip(users, online(context, users), strict=True)],
        "queries": [_query_request(context, text) for text in (*_QUERIES, *_titles(context))],
        "items": [
            {"item": item, "vector": _numbers(context.ask("item_encoder", item_inputs([item], context.shapes))[0])}
            for item in _ITEMS
        ],
    }


def moment_of(context: GoldenContext) -> Moment:
    """Returns the moment of golden requests: long after the last event, on a surface that makes a difference."""
    _, request_context, attributes = context.declared.example()
    controls = attribute_controls(attributes)
    return moment_at(context.declared, _FIRST_MOMENT + _DAY, _surface_of(context), request_context, controls)


def _surface_of(context: GoldenContext) -> str:
    """Returns a surface that a declared feature tells from others, else the last that has rates, by name."""
    return context.declared.example()[0] or max(context.action_rates.surfaces, default="")


def user_vector(context: GoldenContext, user: Assembled) -> _F32:
    """Returns the vector of a user; float32 [D]."""
    inputs: dict[str, npt.NDArray[Any]] = {
        "vectors": context.catalog.columns.vectors[user.rows][None],
        "types": user.types[None],
        "lengths": np.array([user.rows.size], np.int64),
    }
    vector: _F32 = context.ask("user_encoder", inputs)[0]
    return vector


def _walk(context: GoldenContext, rng: np.random.Generator, length: int) -> list[Event]:
    share = np.exp(context.catalog.columns.popularity[: context.catalog.base_size].astype(np.float64))
    leaps = rng.choice(share.size, length, p=share / share.sum())
    events: list[Event] = []
    row = int(leaps[0])
    for at in range(length):
        near = context.neighbors[row][context.neighbors[row] >= 0]
        row = int(rng.choice(near)) if near.size and rng.random() < 0.7 else int(leaps[at])
        name = context.event_types[int(rng.integers(len(context.event_types)))]
        value = float(rng.integers(1, 6)) if rng.random() < 0.5 else None
        moment = _FIRST_MOMENT + at * _MINUTE
        (item,) = context.catalog.ids([row])
        events.append({"item_id": item, "event_type": name, "timestamp": moment, "value": value})
    return events


def _diverge_from_catalog(events: list[Event]) -> None:
    """Gives some events other keys than the catalogue's: their item was patched since, or put only later."""
    patched, early = {name: item_key("golden") for name in KEYS}, dict.fromkeys(KEYS, 0)
    for event in events[1::4]:
        event.update(patched)
    for event in events[3::4]:
        event.update(early)


def _user_request(context: GoldenContext, events: Sequence[Event], assembled: Assembled) -> dict[str, Any]:
    columns = context.catalog.columns
    user = user_vector(context, assembled)
    rows, relevance = _best(context, user)
    moment = moment_of(context)
    features = ranker_features(assembled.history, rows, relevance, columns, context.action_rates, moment)
    logits = context.ask("ranker", {"user": user[None], "items": columns.vectors[rows], "features": features})
    return {
        "events": list(events),
        "now_ms": moment.now_ms,
        "surface": moment.surface,
        "context": context.declared.example()[1],
        "user_attributes": context.declared.example()[2],
        "vector": _numbers(user),
        "item_ids": context.catalog.ids(rows),
        "relevance": _numbers(relevance),
        "linear": _numbers(context.linear.scores(chosen_rows(assembled.history)).of(rows)),
        "features": [_numbers(line) for line in features],
        "logits": [_numbers(line) for line in logits],
    }


def _query_request(context: GoldenContext, text: str) -> dict[str, Any]:
    vector = context.ask("query_encoder", query_inputs(text, context.shapes))[0]
    rows, relevance = _best(context, vector)
    return {
        "text": text,
        "tokens": text_tokens(text).tolist(),
        "vector": _numbers(vector),
        "item_ids": context.catalog.ids(rows),
        "relevance": _numbers(relevance),
    }


def _titles(context: GoldenContext) -> list[str]:
    """Returns titles of a few popular items, as queries."""
    popular = np.argsort(-context.catalog.columns.popularity, kind="stable")[:3]
    titles = [context.catalog.item(int(row)).get("title") for row in popular]
    return [title for title in titles if title]


def _best(context: GoldenContext, vector: _F32) -> tuple[npt.NDArray[np.int32], _F32]:
    """Returns the exactly best rows by relevance, ties by row."""
    all_rows = np.arange(context.catalog.size, dtype=np.int32)
    scores = dot_rows(context.catalog.columns.vectors, all_rows, vector)
    rows = np.lexsort((all_rows, -scores))[:TOP].astype(np.int32)
    return rows, scores[rows]


def _numbers(values: _F32) -> list[float]:
    """Returns the numbers as JSON writes them: a float32 is read back as itself."""
    return [float(value) for value in values]


def _unequal(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> int:
    if left.shape != right.shape or left.dtype != right.dtype:
        return max(left.size, right.size, 1)
    if not left.size:
        return 0
    # Bits, not values: NaN equals itself here, and 0 differs from -0.
    bits = [np.ascontiguousarray(array).reshape(array.size, -1).view(np.uint8) for array in (left, right)]
    return int((bits[0] != bits[1]).any(axis=1).sum())
