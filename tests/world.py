"""A small world whose right answers are known by construction, as a bundle that needs no training.

Forty items in four genres; the vector of an item points at its genre, the vector of a user is the mean of what they
touched, a query's that of the genres it names. So a user who touched westerns must be shown westerns, and a new
western must lie among them the moment it is put.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import onnx
import pyarrow as pa
from onnx import TensorProto, helper, numpy_helper

from features.action_rates import ActionRates
from features.assemble import encoder_inputs, history, moment_at, ranker_features, type_index
from features.bundle import publish
from features.catalog import Catalog
from features.catalog_columns import with_lists
from features.controls import attribute_controls
from features.declared import Declared
from features.golden import profile_of
from features.keys import item_keys
from features.model_inputs import FEATURES, ranker_names
from features.tables.schema import ITEMS
from features.transforms import item_text, text_tokens, token_buckets
from features.vocabulary import Vocabulary

GENRES = ("western", "space", "romance", "comedy")
SEGMENTS = GENRES[:3]
"""Genres whose users have a known taste: other items of the genre."""
ITEMS_PER_GENRE = 10
COUNT = len(GENRES) * ITEMS_PER_GENRE
DIM = 8
BUCKETS = 4096
MODEL: dict[str, Any] = {
    "dim": DIM,
    "max_length": 16,
    "event_types": ["view_item", "like", "purchase"],
    "actions": [
        {"name": "view_item", "event_type": "view_item", "min_value": None},
        {"name": "like", "event_type": "like", "min_value": None},
    ],
    "action_weights": [0.5, 0.5],
    "token_buckets": BUCKETS,
    "max_tokens": 12,
    "category_buckets": BUCKETS,
    "max_categories": 4,
    "creator_buckets": BUCKETS,
    "blend": 0.25,
    "seen_types": ["view_item", "like", "purchase"],
    "repeats": False,
    "features": [
        {"name": "cost", "form": "value", "of": "item.price", "log": True},
        {"name": "kind", "form": "bucket", "of": "item.categories", "values": ["western", "space"]},
        {"name": "handset", "form": "bucket", "of": "request.device", "values": ["phone", "tv"]},
        {"name": "clock", "form": "cycle", "of": "request.hour", "period": 24},
        {"name": "shelf", "form": "bucket", "of": "request.attributes.shelf", "edges": [2.0, 5.0]},
        {"name": "plan", "form": "bucket", "of": "user.attributes.plan", "values": ["family"]},
        {"name": "years", "form": "value", "of": "user.attributes.age"},
        {"name": "day_likes", "form": "count", "event_types": ["like"], "same": "category", "window_hours": 24},
        {"name": "fan", "form": "rate", "event_types": ["like"], "shown_types": ["view_item"], "same": "creator"},
    ],
}
DECLARED = Declared.of(MODEL["features"], MODEL["event_types"])
CONTEXT = {"device": "tv", "time_zone": "Asia/Kathmandu", "attributes": {"shelf": "3"}}
ATTRIBUTES = {"plan": "family", "age": "34"}
"""The context and the attributes of the golden request."""


def items() -> list[dict[str, Any]]:
    """The items in row order; the genre of row r is `GENRES[r % 4]`, row 0 is the most popular."""
    return [
        {
            "item_id": f"i{row}",
            "title": f"{GENRES[row % 4]} story number{row}",
            "description": f"a {GENRES[row % 4]} tale",
            "categories": [GENRES[row % 4]],
            "creator_id": f"c{row % 5}",
            "price": float(row + 1),
        }
        for row in range(COUNT)
    ]


def rows_of(genre: str) -> set[str]:
    """Ids of the items of a genre."""
    return {f"i{row}" for row in range(COUNT) if GENRES[row % 4] == genre}


def direction(genre: str) -> np.ndarray:
    """The vector of a genre; float32 [D]."""
    vector = np.zeros(DIM, np.float32)
    vector[GENRES.index(genre)] = 2.0
    return vector


def vectors() -> np.ndarray:
    """The items' vectors: the genre, and a little of their own; float32 [N, D]."""
    own = np.random.default_rng(7).normal(scale=0.05, size=(COUNT, DIM)).astype(np.float32)
    return np.stack([direction(GENRES[row % 4]) for row in range(COUNT)]) + own


def publish_world(out: Path, salt: str = "") -> Path:
    """Writes the bundle; another `salt` makes another bundle of the same world."""
    staging = out.with_name(out.name + ".staging")
    staging.mkdir(parents=True)
    catalog = _tables(staging)
    _models(staging)
    (staging / "golden.json").write_text(json.dumps(golden(catalog)))
    manifest = {
        "created": "2026-01-01T00:00:00Z",
        "model": MODEL,
        "configuration": {"salt": salt},
        "feature_set": {"fingerprint": DECLARED.fingerprint(), "features": list(FEATURES.names)},
        "data_fingerprint": "world",
        "metrics": {},
        "gates": {},
        "catalog_version": 0,
    }
    publish(staging, out, manifest)
    return out


def golden(catalog: Catalog) -> dict[str, Any]:
    """A user of a few events, a query for each genre that has items, and an item for each, with their right answers."""
    space, now_ms = catalog.columns.vectors, 1_700_000_000_000
    people: list[dict[str, Any]] = []
    queries: list[dict[str, Any]] = []
    if catalog.size:
        names = catalog.ids(np.arange(min(3, catalog.size)))
        events = [
            {"item_id": name, "event_type": "view_item", "timestamp": now_ms - 60_000 * (at + 1), "value": None}
            for at, name in enumerate(names)
        ][::-1]
        past = history(profile_of(events, catalog), catalog, type_index(MODEL["event_types"]))
        rows, _ = encoder_inputs(past.rows, past.types, MODEL["max_length"])
        user = space[rows].mean(axis=0, dtype=np.float32)
        best, answer = _best(catalog, user)
        relevance, moment = (
            np.array(answer["relevance"], np.float32),
            moment_at(DECLARED, now_ms, "home", CONTEXT, attribute_controls(ATTRIBUTES)),
        )
        features = ranker_features(past, best, relevance, catalog.columns, ActionRates.of(MODEL), moment)
        logits = features @ _judgement()[0] + _judgement()[1]
        people.append(
            {
                "events": events,
                "now_ms": now_ms,
                "surface": "home",
                "context": CONTEXT,
                "user_attributes": ATTRIBUTES,
                **answer,
            }
        )
        people[-1] |= {"features": features.tolist(), "logits": logits.tolist()}
        for genre in GENRES[: catalog.size]:
            answer = _best(catalog, direction(genre))[1]
            queries.append({"text": genre, "tokens": text_tokens(genre).tolist(), **answer})
    new = [{"item": {"item_id": "new", "categories": [genre]}, "vector": direction(genre).tolist()} for genre in GENRES]
    return {"people": people, "queries": queries, "items": new}


def _best(catalog: Catalog, vector: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    scores = catalog.columns.vectors @ vector
    best = np.lexsort((np.arange(catalog.size), -scores))[:3].astype(np.int32)
    return best, {"vector": vector.tolist(), "item_ids": catalog.ids(best), "relevance": scores[best].tolist()}


def _tables(staging: Path) -> Catalog:
    world, space = items(), vectors()
    popularity = np.log1p(np.arange(COUNT, 0, -1, dtype=np.float32))
    table = pa.Table.from_pylist(world, schema=ITEMS)
    table = table.append_column("popularity", pa.array(popularity))
    table = table.append_column("recent_popularity", pa.array(popularity))
    table = table.append_column("trained", pa.array([True] * COUNT))
    table = with_declared(table)
    _write(staging / "items.arrow", table)
    vocabulary = Vocabulary.build([item["item_id"] for item in world])
    vocabulary.save(staging / "vocabulary.arrow")
    np.save(staging / "vectors.npy", space)
    index = faiss.IndexFlatIP(DIM)
    index.add(space)
    (staging / "index.faiss").write_bytes(faiss.serialize_index(index).tobytes())
    own = [np.array([row for row in range(COUNT) if GENRES[row % 4] == genre], np.int32) for genre in SEGMENTS]
    rows = np.concatenate([np.arange(COUNT, dtype=np.int32), *own])
    segments = [""] * COUNT + [genre for genre in SEGMENTS for _ in range(ITEMS_PER_GENRE)]
    popular = {"segment": segments, "row": rows, "score": popularity[rows]}
    _write(staging / "popular.arrow", pa.table(popular))
    lengths = np.linalg.norm(space, axis=1, keepdims=True)
    cosines = (space / lengths) @ (space / lengths).T
    np.fill_diagonal(cosines, -1)
    near = np.argsort(-cosines, axis=1)[:, :5].astype(np.int32)
    np.save(staging / "neighbors.npy", near)
    np.save(staging / "neighbor_scores.npy", np.take_along_axis(cosines, near.astype(np.int64), 1).astype(np.float32))
    words = [text_tokens(item_text(item)) for item in world]
    np.save(staging / "token_offsets.npy", np.cumsum([0, *map(len, words)]).astype(np.int64))
    np.save(staging / "tokens.npy", np.concatenate(words))
    return Catalog(table, vocabulary, space, declared=DECLARED)


def with_declared(items: pa.Table) -> pa.Table:
    """Returns items with the column of their declared features."""
    return with_lists(items, "declared", DECLARED.item_values(items))


def _write(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _models(staging: Path) -> None:
    floats, whole = TensorProto.FLOAT, TensorProto.INT64
    people = [
        helper.make_node("ReduceSum", ["vectors", "one"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["lengths"], ["count"], to=floats),
        helper.make_node("Unsqueeze", ["count", "one"], ["column"]),
        helper.make_node("Div", ["sum", "column"], ["user"]),
    ]
    inputs = {"vectors": (floats, ["b", "l", DIM]), "types": (whole, ["b", "l"]), "lengths": (whole, ["b"])}
    _save(staging / "user_encoder.onnx", people, inputs, ("user", ["b", DIM]), {"one": np.array([1])})

    lookup = [
        helper.make_node("Gather", ["table", "categories"], ["each"]),
        helper.make_node("ReduceSum", ["each", "one"], ["item"], keepdims=0),
    ]
    inputs = {
        "tokens": (whole, ["b", "t"]),
        "categories": (whole, ["b", "c"]),
        "creators": (whole, ["b"]),
        "prices": (floats, ["b"]),
    }
    named = {"table": _table(token_buckets(item_keys(list(GENRES)), BUCKETS)), "one": np.array([1])}
    _save(staging / "item_encoder.onnx", lookup, inputs, ("item", ["b", DIM]), named)

    ask = [
        helper.make_node("Gather", ["table", "tokens"], ["each"]),
        helper.make_node("ReduceSum", ["each", "one"], ["query"], keepdims=0),
    ]
    named = {"table": _table(token_buckets(text_tokens(" ".join(GENRES)), BUCKETS)), "one": np.array([1])}
    _save(staging / "query_encoder.onnx", ask, {"tokens": (whole, ["b", "t"])}, ("query", ["b", DIM]), named)

    weights, bias = _judgement()
    judge = [
        helper.make_node("MatMul", ["features", "weights"], ["raw"]),
        helper.make_node("Add", ["raw", "bias"], ["logits"]),
    ]
    inputs = {
        "user": (floats, [1, DIM]),
        "items": (floats, ["n", DIM]),
        "features": (floats, ["n", len(weights)]),
    }
    named = {"weights": weights, "bias": bias}
    _save(staging / "ranker.onnx", judge, inputs, ("logits", ["n", 2]), named)


def _judgement() -> tuple[np.ndarray, np.ndarray]:
    """The ranker's weights of features: weights float32 [F, 2] and bias float32 [2]."""
    names = ranker_names([action["name"] for action in MODEL["actions"]], DECLARED.names)
    weights = np.zeros((len(names), 2), np.float32)
    weights[names.index("category_affinity")] = (1.0, 2.0)
    return weights, np.array([-1, -2], np.float32)


def _table(buckets: np.ndarray) -> np.ndarray:
    table = np.zeros((BUCKETS + 1, DIM), np.float32)
    for genre, bucket in zip(GENRES, buckets.tolist(), strict=True):
        table[bucket] = direction(genre)
    return table


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[Any]]],
    output: tuple[str, list[Any]],
    constants: dict[str, np.ndarray],
) -> None:
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(output[0], TensorProto.FLOAT, output[1])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
