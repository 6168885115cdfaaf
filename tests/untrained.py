"""A small world and a run whose models were never trained: enough to test everything behind training in seconds."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from features.linear import LinearSpec
from features.model_inputs import FEATURES, statistics_width
from features.tables.dataset import Dataset, open_dataset, write_dataset
from features.tables.schema import EVENTS, ITEMS
from features.vocabulary import Vocabulary
from tests.once import once
from training.config import Action, TrainConfig
from training.export.export import publish_run
from training.run import LoadedRun, build_modules

CONFIG = TrainConfig(
    dim=16, layers=2, heads=2, feed_forward=32, max_length=10, token_buckets=64, max_tokens=8, category_buckets=16,
    max_categories=3, creator_buckets=8, ranker_hidden=8, actions=(Action(name="buy", event_type="purchase"),),
)  # fmt: skip
TYPES = ["like", "purchase", "view_item"]
COLORS = ("red", "blue", "green", "black")
THINGS = ("shoes", "wine", "lamps", "books", "films")


def dataset(people: int = 40, items: int = 80, seed: int = 0) -> Dataset:
    """Users who walk among items of few kinds; some items say little of themselves."""
    rng = np.random.default_rng(seed)
    things = [
        {
            "item_id": f"item-{at}",
            "title": f"{COLORS[at % 4]} {THINGS[at % 5]} {at}" if at % 9 else None,
            "categories": [THINGS[at % 5], COLORS[at % 4]] if at % 7 else None,
            "creator_id": f"maker-{at % 6}" if at % 5 else None,
            "price": float(at) if at % 3 else None,
        }
        for at in range(items)
    ]
    events = [
        {
            "user_id": f"user-{person}",
            "item_id": f"item-{rng.integers(items)}",
            "event_type": str(rng.choice(TYPES)),
            "timestamp": 1_600_000_000_000 + turn * 1000,
            "value": None,
        }
        for person in range(people)
        for turn in range(rng.integers(3, 30))
    ]
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(
            Path(folder) / "data",
            pa.Table.from_pylist(events, EVENTS),
            pa.Table.from_pylist(things, ITEMS),
            name="untrained",
        )
        return open_dataset(Path(folder) / "data")


def untrained_run(config: TrainConfig = CONFIG, **options: int) -> LoadedRun:
    """A run of that world with random weights."""
    torch.manual_seed(0)
    data = dataset(**options)
    ids = data.items["item_id"].to_pylist()
    count, rng = len(ids), np.random.default_rng(1)
    modules = build_modules(config, count, len(TYPES), len(config.actions), content=True)
    torch.nn.init.normal_(modules.ranker.output.weight)
    near = np.argsort(rng.random((count, count)), axis=1)[:, :5].astype(np.int32)
    near[::4, 3:] = -1
    result: dict[str, Any] = {
        "event_types": TYPES,
        "actions": [action.model_dump() for action in config.actions],
        "action_weights": [1.0],
        "base_rates": [-1.0],
        "surface_rates": {"home": [0.25]},
        "ranker_source": "candidates",
        "linear": {"spec": LinearSpec(2.0, 0.9, 0.5, 0.25, 0.5).as_json()},
        "seen_types": ["purchase"],
        "blend": 0.25,
        "data_fingerprint": data.info["fingerprint"],
        "feature_fingerprint": FEATURES.fingerprint(),
        "best_validation": {"ndcg@10": 0.0},
    }
    return LoadedRun(
        path=Path("untrained"),
        config=config,
        user_encoder=modules.user.eval(),
        item_encoder=modules.item.eval(),
        query_encoder=modules.query.eval(),
        ranker=modules.ranker.eval(),
        vocabulary=Vocabulary.build(ids),
        items=data.items,
        item_vectors=rng.normal(size=(count, config.dim)).astype(np.float32),
        popularity=np.log1p(rng.integers(0, 50, count)).astype(np.float32),
        recent_popularity=np.log1p(rng.integers(0, 5, count)).astype(np.float32),
        statistics=rng.normal(size=(count, statistics_width(len(config.actions)))).astype(np.float32),
        trained=rng.random(count) < 0.9,
        neighbors=near,
        neighbor_scores=np.where(near >= 0, rng.normal(size=near.shape), 0).astype(np.float32),
        result=result,
        dataset=data,
    )


def untrained_bundle() -> Path:
    """The bundle of that run, made once; never change it, copy it."""
    return once("untrained", lambda folder: publish_run(untrained_run(), folder / "bundle")) / "bundle"
