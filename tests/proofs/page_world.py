"""Bundles of any number of items in four genres, and the live items on top: the catalogues of `tests.proofs.pages`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from features.bundle import publish
from features.catalog import Catalog
from features.model_inputs import FEATURES
from features.tables.schema import ITEMS
from features.transforms import item_text, text_tokens
from features.vocabulary import Vocabulary
from serving.engine.engine import Engine
from tests import world
from training.export.index import build

LIVE = 80
"""Items put while the service runs, on top of those of the bundle."""

_EXACT = 1000
_HOUR_MS = 3_600_000


def item_of(number: int, prefix: str = "i") -> dict[str, Any]:
    """An item of a genre; the first words are of the genre."""
    genre = world.GENRES[number % 4]
    return {
        "item_id": f"{prefix}{number}",
        "title": f"{genre} story number{number}",
        "description": None,
        "categories": [genre],
        "creator_id": f"c{number % 5}",
        "price": 1.0,
    }


def _vectors(count: int) -> Any:
    """Vectors of items: their genre, and a little of their own; float32 [n, D]."""
    own = np.random.default_rng(count).normal(scale=0.05, size=(count, world.DIM)).astype(np.float32)
    genres = [world.direction(world.GENRES[number % 4]) for number in range(count)]
    return own + np.array(genres, np.float32).reshape(count, world.DIM)


def _index(vectors: Any) -> bytes:
    """An index as export makes it: exact for few items, an inverted file for many."""
    if len(vectors) > _EXACT:
        return build(vectors, _vectors(100), 0.98, exact_up_to=_EXACT).data
    index = faiss.IndexFlatIP(world.DIM)
    index.add(vectors)
    return bytes(faiss.serialize_index(index))


def publish_items(out: Path, count: int) -> None:
    """Writes a bundle of `count` items; a tenth of them are in the table of the popular ones."""
    staging = out.with_name(out.name + ".staging")
    staging.mkdir(parents=True)
    items, vectors = [item_of(number) for number in range(count)], _vectors(count)
    popularity = np.log1p(np.arange(count, 0, -1, dtype=np.float32))
    table = pa.Table.from_pylist(items, schema=ITEMS)
    for name, values in (("popularity", popularity), ("recent_popularity", popularity)):
        table = table.append_column(name, pa.array(values))
    table = table.append_column("trained", pa.array([True] * count, pa.bool_()))
    table = world.with_declared(table)
    world._write(staging / "items.arrow", table)
    vocabulary = Vocabulary.build([item["item_id"] for item in items])
    vocabulary.save(staging / "vocabulary.arrow")
    catalog = Catalog(table, vocabulary, vectors, declared=world.DECLARED)
    np.save(staging / "vectors.npy", vectors)
    (staging / "index.faiss").write_bytes(_index(vectors))
    top = np.arange(count // 10, dtype=np.int32)
    own = [top[top % 4 == at] for at in range(3)]
    segments = [""] * top.size + [world.GENRES[at] for at in range(3) for _ in own[at]]
    rows = np.concatenate([top, *own])
    world._write(
        staging / "popular.arrow",
        pa.table({"segment": pa.array(segments, pa.string()), "row": rows, "score": popularity[rows]}),
    )
    near = np.random.default_rng(1).integers(0, max(count, 1), (count, 5)).astype(np.int32)
    np.save(staging / "neighbors.npy", near)
    np.save(staging / "neighbor_scores.npy", np.full(near.shape, 0.5, np.float32))
    words = [text_tokens(item_text(item)) for item in items]
    np.save(staging / "token_offsets.npy", np.cumsum([0, *map(len, words)]).astype(np.int64))
    np.save(staging / "tokens.npy", np.concatenate([np.empty(0, np.uint32), *words]))
    world._models(staging)
    (staging / "golden.json").write_text(json.dumps(world.golden(catalog)))
    manifest = {
        "created": "2026-01-01T00:00:00Z",
        "model": world.MODEL,
        "configuration": {},
        "feature_set": {"fingerprint": world.DECLARED.fingerprint(), "features": list(FEATURES.names)},
        "data_fingerprint": "pages",
        "metrics": {},
        "gates": {},
        "catalog_version": 0,
    }
    publish(staging, out, manifest)


def put_live(engine: Engine, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Puts the live items, and changes the category of some of the bundle's; `items` are changed with them."""
    live = [item_of(number, "live") for number in range(LIVE)]
    for item in items[:: max(len(items) // 20, 1)]:
        item["categories"] = [world.GENRES[(world.GENRES.index(item["categories"][0]) + 1) % 4]]
        engine.catalog.put([item], np.zeros((1, world.DIM), np.float32), 0)
    now = int(time.time() * 1000)
    vectors = _vectors(LIVE)
    rows = [
        int(engine.catalog.put([item], vectors[at : at + 1], now - at * _HOUR_MS)[0]) for at, item in enumerate(live)
    ]
    engine.lexical.put(rows, [text_tokens(item_text(item)) for item in live])
    return live
