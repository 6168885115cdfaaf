"""The definition of a sound bundle, in plain pyarrow, numpy, onnx and FAISS: no code is shared with serving."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
from onnx import numpy_helper

from features.keys import item_key
from features.transforms import text_tokens

_TOLERANCE = 2e-3
_GRAPHS = ("user_encoder", "item_encoder", "query_encoder", "ranker")


def faults(path: Path) -> list[str]:
    """Returns what is wrong with a bundle that was accepted, and so can be read without harm."""
    return list(_faults(path))


def _faults(path: Path) -> Iterator[str]:
    manifest = json.loads((path / "manifest.json").read_text())
    model = manifest["model"]
    items, ids = _table(path, "items.arrow"), _table(path, "vocabulary.arrow")
    names = items["item_id"].to_pylist()
    count, dim = len(names), model["dim"]
    if names != ids["id"].to_pylist() or len(set(names)) != count or not all(names):
        yield "items and vocabulary differ"
    keys = [item_key(name) for name in names]
    if keys != ids["key"].to_pylist() or sorted(keys) != ids["sorted_key"].to_pylist():
        yield "keys of the vocabulary"
    if [keys[row] for row in ids["sorted_row"].to_pylist()] != sorted(keys):
        yield "rows of the vocabulary"
    vectors = np.load(path / "vectors.npy")
    if vectors.shape != (count, dim) or not np.isfinite(vectors).all():
        yield "vectors"
    near, scores = np.load(path / "neighbors.npy"), np.load(path / "neighbor_scores.npy")
    if near.min(initial=0) < -1 or near.max(initial=-1) >= count or not np.isfinite(scores).all():
        yield "neighbours"
    if near.shape != scores.shape or len(near) != count:
        yield "shapes of the neighbours"
    popular = _table(path, "popular.arrow").to_pydict()
    if not all(0 <= row < count for row in popular["row"]) or not np.isfinite(popular["score"]).all():
        yield "popular rows"
    offsets, tokens = np.load(path / "token_offsets.npy"), np.load(path / "tokens.npy")
    steps = [b - a for a, b in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)]
    if len(offsets) != count + 1 or min(steps, default=0) < 0 or int(offsets[0]) or int(offsets[-1]) != len(tokens):
        yield "words"
    yield from _numbers(model)
    index = faiss.deserialize_index(np.frombuffer((path / "index.faiss").read_bytes(), np.uint8))
    if (index.ntotal, index.d, index.metric_type) != (count, dim, faiss.METRIC_INNER_PRODUCT):
        yield "index"
    for name in _GRAPHS:
        yield from _graph(path / f"{name}.onnx")
    yield from _golden(path, items)


def _table(path: Path, name: str) -> pa.Table:
    table = pa.ipc.open_file(pa.py_buffer((path / name).read_bytes())).read_all()
    table.validate(full=True)
    return table


def _numbers(model: dict[str, Any]) -> Iterator[str]:
    whole = (
        "dim",
        "max_length",
        "max_tokens",
        "max_categories",
        "token_buckets",
        "category_buckets",
        "creator_buckets",
    )
    for name in whole:
        if isinstance(model[name], bool) or not isinstance(model[name], int) or model[name] < 1:
            yield f"model.{name}"
    if len(model["action_weights"]) != len(model["actions"]) or not np.isfinite(model["action_weights"]).all():
        yield "weights of actions"
    if len(set(model["event_types"])) != len(model["event_types"]):
        yield "event types"


def _graph(path: Path) -> Iterator[str]:
    graph = onnx.load_model_from_string(path.read_bytes())
    onnx.checker.check_model(graph, full_check=True)
    if graph.functions or {entry.domain for entry in graph.opset_import} != {""}:
        yield f"{path.name}: domains"
    for tensor in graph.graph.initializer:
        if tensor.external_data or tensor.data_location == tensor.EXTERNAL:
            yield f"{path.name}: data outside"
        elif np.isnan(numbers := numpy_helper.to_array(tensor)).any() if tensor.data_type == 1 else False:
            yield f"{path.name}: {numbers.shape} with NaN"


def _golden(path: Path, items: pa.Table) -> Iterator[str]:
    """Asks the query encoder again, without anything of serving, and scores the best items."""
    golden = json.loads((path / "golden.json").read_text())
    session = onnxruntime.InferenceSession((path / "query_encoder.onnx").read_bytes())
    vectors, rows = np.load(path / "vectors.npy"), {name: at for at, name in enumerate(items["item_id"].to_pylist())}
    model = json.loads((path / "manifest.json").read_text())["model"]
    for at, query in enumerate(golden["queries"]):
        tokens = np.zeros((1, model["max_tokens"]), np.int64)
        words = text_tokens(query["text"])[: model["max_tokens"]].astype(np.int64)
        tokens[0, : words.size] = 1 + words % model["token_buckets"]
        vector = session.run(None, {session.get_inputs()[0].name: tokens})[0][0]
        if not _near(vector, query["vector"]):
            yield f"golden query {at}"
        best = [rows[name] for name in query["item_ids"]]
        if not _near(vectors[best] @ vector, query["relevance"]):
            yield f"golden scores {at}"


def _near(found: np.ndarray, expected: list[float]) -> bool:
    wanted = np.array(expected, np.float64)
    return bool(np.abs(found - wanted).max(initial=0) <= _TOLERANCE * max(1.0, np.abs(wanted).max(initial=0)))
