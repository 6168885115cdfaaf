"""Bundles of any size, grown from a real one: its models and its items, and more that are like them.

The items of the template keep their rows. Each further one is a copy of one of them under an id of its own, with a
vector near that of its original. A copy that would be among the best answers of a golden request is moved back, so that
these requests keep the answers that every service checks before it serves.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks.report import BenchmarkError
from features.bundle import FILES, MANIFEST, open_bundle, publish
from features.vocabulary import Vocabulary
from training.export.index import BuiltIndex, build

_F32 = npt.NDArray[np.float32]
_BATCH = 500_000
_SPREAD = 0.3
"""Length of the random part of a copy's vector, as a share of the length of its original's."""
_MARGIN = 0.05
_QUERIES = 400
_OF_ROWS = ("items.arrow", "vocabulary.arrow", "vectors.npy", "index.faiss", "neighbors.npy", "neighbor_scores.npy")
_OF_WORDS = ("token_offsets.npy", "tokens.npy")


def grow(template: Path, items: int, out: Path, *, recall: float = 0.98, seed: int = 0) -> dict[str, Any]:
    """Publishes a bundle of `items` items.

    Args:
        template: A bundle, as `penchant export` made it.
        items: Number of items, at least those of the template.
        out: Directory of the new bundle; one that is there already is kept.
        recall: Recall that its index has to reach, as export demands it.
        seed: Seed of the copies.

    Returns:
        `path`, `items`, `bytes`, `index` (its kind, lists and probes, and the recall that it reached).

    Raises:
        BenchmarkError: The template has more items.
        BundleError: The template is no bundle, or `out` holds something else.
    """
    bundle = open_bundle(template)
    table = _table(template)
    if items < table.num_rows:
        raise BenchmarkError(f"{template} has {table.num_rows:,} items, more than {items:,}: name a smaller template")
    rng = np.random.default_rng(seed)
    originals = np.concatenate(
        [np.arange(table.num_rows), rng.integers(0, table.num_rows, items - table.num_rows)]
    ).astype(np.int64)
    golden = json.loads(bundle.read("golden.json"))
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        built = _write(template, table, originals, golden, rng, recall, staging)
        manifest = json.loads((template / MANIFEST).read_text(encoding="utf-8"))
        kept = {name: value for name, value in manifest.items() if name not in ("format", "bundle_id", "files")}
        size = sum(path.stat().st_size for path in staging.iterdir())
        publish(staging, out, kept)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    index = {"kind": built.kind, "lists": built.lists, "probes": built.probes, "recall": built.recall}
    return {"path": str(out), "items": items, "bytes": size, "index": index}


def _write(
    template: Path,
    table: pa.Table,
    originals: npt.NDArray[np.int64],
    golden: dict[str, Any],
    rng: np.random.Generator,
    recall: float,
    staging: Path,
) -> BuiltIndex:
    """Writes every file but the manifest; returns the index."""
    for name in FILES:
        if name not in (*_OF_ROWS, *_OF_WORDS):
            shutil.copyfile(template / name, staging / name)
    Vocabulary.build(_write_items(table, originals, staging)).save(staging / "vocabulary.arrow")
    vectors = _vectors(np.load(template / "vectors.npy"), originals, golden, rng)
    np.save(staging / "vectors.npy", vectors)
    for name in ("neighbors.npy", "neighbor_scores.npy"):
        np.save(staging / name, np.load(template / name)[originals])
    _write_words(template, originals, staging)
    built = build(vectors, vectors[rng.integers(0, len(vectors), _QUERIES)], recall)
    (staging / "index.faiss").write_bytes(built.data)
    return built


def _table(bundle: Path) -> pa.Table:
    with pa.memory_map(str(bundle / "items.arrow"), "rb") as source:
        return pa.ipc.open_file(source).read_all()


def _write_items(table: pa.Table, originals: npt.NDArray[np.int64], staging: Path) -> list[str]:
    """Writes the items in batches, so that ten million of them are never in memory at once; returns their ids."""
    ids: list[str] = []
    item_ids = table.column("item_id").to_pylist()
    with pa.OSFile(str(staging / "items.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for start, rows in _batches(originals):
            # A copy is named by its original and its row, so no two have one name.
            names = [
                item_ids[row] if start + at < len(item_ids) else f"{item_ids[row]}~{start + at}"
                for at, row in enumerate(rows.tolist())
            ]
            part = table.take(rows)
            column = table.schema.get_field_index("item_id")
            writer.write_table(part.set_column(column, table.schema.field(column), pa.array(names, pa.string())))
            ids += names
    return ids


def _vectors(
    vectors_of_template: _F32, originals: npt.NDArray[np.int64], golden: dict[str, Any], rng: np.random.Generator
) -> _F32:
    # A query without words has no direction: every item is equally near, and the first rows come first.
    requests = [request for request in (*golden["people"], *golden["queries"]) if any(request["vector"])]
    request_vectors = np.array([request["vector"] for request in requests], np.float32).reshape(
        -1, vectors_of_template.shape[1]
    )
    # The last of the answers that a golden request names: no copy may come up to it.
    bars = np.array([min(request["relevance"], default=np.inf) for request in requests], np.float32)
    vectors = np.empty((originals.size, vectors_of_template.shape[1]), np.float32)
    for start, rows in _batches(originals):
        part = vectors_of_template[rows]
        lengths = np.linalg.norm(part, axis=1, keepdims=True) / np.sqrt(np.float32(part.shape[1]))
        part += _SPREAD * lengths * rng.standard_normal(part.shape).astype(np.float32)
        vectors[start : start + rows.size] = _moved_back(part, request_vectors, bars)
    vectors[: len(vectors_of_template)] = vectors_of_template
    return vectors


def _moved_back(vectors: _F32, request_vectors: _F32, bars: _F32) -> _F32:
    """Returns the vectors, shortened where a golden request would rank them too high.

    Raises:
        BenchmarkError: A request is content with a relevance of 0, which no shortening falls below.
    """
    if (bars <= 0).any():
        raise BenchmarkError("a golden request of the template has answers of relevance 0: name a larger template")
    scores = vectors @ request_vectors.T
    allowed = ((1 - _MARGIN) * bars / np.maximum(scores, 1e-12)).min(axis=1)
    moved: _F32 = vectors * np.minimum(allowed, 1.0)[:, None]
    return moved


def _write_words(template: Path, originals: npt.NDArray[np.int64], staging: Path) -> None:
    offsets, tokens = np.load(template / "token_offsets.npy"), np.load(template / "tokens.npy")
    counts = np.diff(offsets)[originals]
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    np.save(staging / "token_offsets.npy", ends)
    # The place of each token in the template: the beginning of its item's, and its number within them.
    places = np.repeat(offsets[originals] - ends[:-1], counts) + np.arange(ends[-1])
    np.save(staging / "tokens.npy", tokens[places])


def _batches(rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    for start in range(0, rows.size, _BATCH):
        yield start, rows[start : start + _BATCH]
