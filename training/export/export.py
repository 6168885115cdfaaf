"""From a finished run to a bundle: graphs, index and tables, published only if every gate is passed."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from features.action_rates import ActionRates
from features.assemble import moment_at, ranker_features
from features.bundle import open_bundle, publish
from features.catalog import Catalog
from features.catalog_columns import with_lists
from features.errors import ExportError
from features.model_inputs import ENCODER_FEATURES, ranker_names, ranker_width
from features.transforms import (
    WORDED,
    ItemInputShapes,
    item_inputs,
    item_text,
    query_inputs,
    remembering_token,
    text_tokens,
)
from training.data.clock import report_future_events
from training.data.interactions import Interactions, read_interactions
from training.data.split import Targets
from training.export import golden
from training.export.index import CUTOFFS, build
from training.export.onnx import Arrays, Graph, LastHidden, parity, session_of, to_onnx
from training.export.segments import popular_in_segments
from training.models.scoring import user_vectors
from training.run import LoadedRun, admit_run, input_shapes, linear_spec, load_run

PARITY = 1e-5
"""Largest difference allowed between torch and ONNX Runtime, relative to the largest number of the output."""

RECALL = 0.98
"""Share of the exactly best items that the index must find."""

POPULAR = 1000
"""Number of popular items kept."""

_QUERIES = 400
_F32 = npt.NDArray[np.float32]
_Axes = dict[str, Sequence[str | int]]


@dataclass
class ExportGates:
    """Values measured against their limits; the first gate that fails ends the export."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def at_most(self, name: str, value: float, limit: float) -> None:
        """Demands `value <= limit`.

        Raises:
            ExportError: It is more, or NaN.
        """
        self._check(name, value, limit, value <= limit, "above")

    def at_least(self, name: str, value: float, limit: float) -> None:
        """Demands `value >= limit`.

        Raises:
            ExportError: It is less, or NaN.
        """
        self._check(name, value, limit, value >= limit, "below")

    def _check(self, name: str, value: float, limit: float, passed: bool, side: str) -> None:
        self.results[name] = {"value": value, "limit": limit, "passed": passed}
        if not passed:
            measured, gap, edge = (
                f"{number}" if isinstance(number, int) else f"{number:.4g}"
                for number in (value, abs(value - limit), limit)
            )
            raise ExportError(f"gate {name}: {measured} is {gap} {side} the limit {edge}; nothing was published")


def export(
    run: str | Path, out: str | Path, *, data: str | Path | None = None, recall: float = RECALL
) -> dict[str, Any]:
    """Exports a run as a bundle.

    Args:
        run: Directory of a finished run.
        out: Directory of the bundle; must not exist, unless it holds this very bundle.
        data: The data set, if it has moved since the training.
        recall: Share of the exactly best items that the index must find.

    Returns:
        See `publish_run`; with the fields of `features.tables.intake.summary`.

    Raises:
        ExportError: A gate is not passed, or the run does not fit this version; nothing is published.
        BundleError: `out` does not hold this bundle.
    """
    loaded = load_run(run, data)
    # Features that changed since the training would give the ranker other numbers under the same names.
    if loaded.result["feature_fingerprint"] != loaded.declared.fingerprint():
        raise ExportError(f"{run} was trained on other features than this version has: train again")
    left_out = admit_run(loaded)
    return publish_run(loaded, Path(out), recall) | left_out


def publish_run(loaded: LoadedRun, out: Path, recall: float = RECALL) -> dict[str, Any]:
    """Exports a run in memory as a bundle; see `export`.

    Returns:
        `bundle_id`, `path`, `gates` {name: {`value`, `limit`, `passed`}}, `index` {`kind`, `lists`, `probes`,
        `curve`}, `items`, `bytes`, `future_events`.
    """
    if out.exists():
        open_bundle(out)  # a place that cannot be published to is refused now, not after minutes of work
    gates = ExportGates()
    with _staging(out) as staging:
        catalog = _write_items(loaded, staging)
        context, sessions = _golden_context(loaded, catalog)
        # The cheapest gates come first; the index, which takes longest, after the graphs whose outputs search it.
        _check_assembly(context, gates)
        _write_models(loaded, context, sessions, staging, gates)
        data = read_interactions(loaded.dataset, loaded.vocabulary, loaded.config)
        index = _write_index(loaded, data, context, staging, recall, gates)
        requests = golden.answers(context, golden.make_histories(context))
        (staging / "golden.json").write_text(json.dumps(requests, allow_nan=False), encoding="utf-8")
        _write_tables(loaded, data, catalog, staging)
        future = report_future_events(data)
        size = sum(file.stat().st_size for file in staging.iterdir())
        bundle_id = publish(staging, out, _manifest(loaded, gates, index))
    return {
        "bundle_id": bundle_id,
        "path": str(out),
        "gates": gates.results,
        "index": index,
        "items": catalog.size,
        "bytes": size,
        **future,
    }


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A private directory next to `out`, gone at the end unless it was published."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_items(loaded: LoadedRun, staging: Path) -> Catalog:
    # In one piece: a read of some rows of a table in pieces looks for each in all of them.
    items = loaded.items.combine_chunks()
    for name in ("popularity", "recent_popularity", "trained"):
        items = items.append_column(name, pa.array(getattr(loaded, name)))
    items = with_lists(items, "statistics", loaded.statistics)
    # Computed here and not when a service starts, which has a million items and seconds.
    if loaded.declared.item_width:
        items = with_lists(items, "declared", loaded.declared.item_values(items))
    with pa.OSFile(str(staging / "items.arrow"), "wb") as sink, pa.ipc.new_file(sink, items.schema) as writer:
        writer.write_table(items)
    loaded.vocabulary.save(staging / "vocabulary.arrow")
    # Checked before any graph or index: a NaN would fail their gates with a message that hides the cause.
    vectors = np.ascontiguousarray(loaded.item_vectors, np.float32)
    if not np.isfinite(vectors).all():
        raise ExportError(f"{loaded.path}: item vectors hold NaN or infinity; the training went wrong, train again")
    np.save(staging / "vectors.npy", vectors)
    return Catalog(items, loaded.vocabulary, vectors, declared=loaded.declared)


def _golden_context(loaded: LoadedRun, catalog: Catalog) -> tuple[golden.GoldenContext, dict[str, Any]]:
    """Returns the context of golden requests, and the sessions that it runs, by name; still none."""
    sessions: dict[str, Any] = {}

    def ask(name: str, inputs: Arrays) -> _F32:
        output: _F32 = sessions[name].run(None, dict(inputs))[0]
        return output

    types, shapes = loaded.result["event_types"], input_shapes(loaded.config)
    action_rates = ActionRates.of(loaded.result)
    context = golden.GoldenContext(
        catalog, loaded.neighbors, loaded.linear, types, loaded.config, shapes, action_rates, loaded.declared, ask
    )
    return context, sessions


def _check_assembly(context: golden.GoldenContext, gates: ExportGates) -> None:
    users = golden.make_histories(context)
    differences = golden.differences(context, golden.offline(context, users), golden.online(context, users))
    gates.at_most("assembly_differences", differences, 0)


def _write_models(
    loaded: LoadedRun, context: golden.GoldenContext, sessions: dict[str, Any], staging: Path, gates: ExportGates
) -> None:
    for make in (_user_graph, _item_graph, _query_graph, _ranker_graph):
        graph = make(loaded, context)
        data = to_onnx(graph)
        gates.at_most(f"parity_{graph.name}", parity(graph, data), PARITY)
        (staging / f"{graph.name}.onnx").write_bytes(data)
        sessions[graph.name] = session_of(data)


def _user_graph(loaded: LoadedRun, context: golden.GoldenContext) -> Graph:
    longest, dim, vectors = loaded.config.max_length, loaded.config.dim, loaded.item_vectors
    rng = np.random.default_rng(0)
    cases: list[Arrays] = []
    # Shortest and longest histories, one user and several: an exporter may take any of these sizes for a constant.
    for batch, length in ((3, min(longest, 5)), (1, 1), (2, 1), (1, longest), (4, longest), (16, -(-longest // 2))):
        lengths = rng.integers(1, length + 1, batch) if batch > 2 else np.full(batch, length)
        real = np.arange(length) < lengths[:, None]
        picked = vectors[rng.integers(0, len(vectors), (batch, length))]
        types = rng.integers(0, len(context.event_types) + 1, (batch, length))
        cases.append(
            {"vectors": picked * real[..., None].astype(np.float32), "types": types * real, "lengths": lengths}
        )
    axes: _Axes = {"vectors": ["people", "length", dim], "types": ["people", "length"], "lengths": ["people"]}
    return Graph("user_encoder", LastHidden(loaded.user_encoder).eval(), "user", axes, ["people", dim], cases)


def _item_graph(loaded: LoadedRun, context: golden.GoldenContext) -> Graph:
    rows = np.random.default_rng(0).permutation(context.catalog.size)[:32]
    items = [context.catalog.item(int(row)) for row in rows]
    longest = {
        "item_id": "everything",
        "title": " ".join(f"word{at}" for at in range(2 * context.shapes.max_tokens)),
        "categories": [f"category{at}" for at in range(2 * context.shapes.max_categories)],
        "creator_id": "creator",
        "price": 1e6,
    }
    empty = {"item_id": "nothing"}
    groups = ([*items, longest, empty], [longest], [empty])
    cases: list[Arrays] = [item_inputs(group, context.shapes) for group in groups]
    cases.append({name: array[:, :1] if array.ndim == 2 else array for name, array in cases[0].items()})
    axes: _Axes = {
        "tokens": ["items", "words"],
        "categories": ["items", "labels"],
        "creators": ["items"],
        "prices": ["items"],
    }
    return Graph("item_encoder", loaded.item_encoder, "item", axes, ["items", loaded.config.dim], cases)


def _query_graph(loaded: LoadedRun, context: golden.GoldenContext) -> Graph:
    texts = ("red shoes", "!?", "word", " ".join(f"word{at}" for at in range(2 * context.shapes.max_tokens)))
    every = [query_inputs(text, context.shapes)["tokens"] for text in texts]
    cases: list[Arrays] = [{"tokens": tokens} for tokens in (np.concatenate(every), *every, every[0][:, :1])]
    axes: _Axes = {"tokens": ["queries", "words"]}
    return Graph("query_encoder", loaded.query_encoder, "query", axes, ["queries", loaded.config.dim], cases)


def _ranker_graph(loaded: LoadedRun, context: golden.GoldenContext) -> Graph:
    dim, catalog = loaded.config.dim, context.catalog
    users = golden.online(context, golden.make_histories(context))
    rng = np.random.default_rng(0)
    cases: list[Arrays] = []
    moment = moment_at(loaded.declared)
    for assembled, count in zip(users, (2, 1, 20, 500), strict=False):
        rows = rng.integers(0, catalog.size, count).astype(np.int32)
        user = golden.user_vector(context, assembled)
        relevance = catalog.columns.vectors[rows] @ user
        features = ranker_features(assembled.history, rows, relevance, catalog.columns, context.action_rates, moment)
        cases.append({"user": user[None], "items": catalog.columns.vectors[rows], "features": features})
    actions = len(loaded.result["actions"])
    width = ranker_width(actions, len(loaded.declared))
    axes: _Axes = {"user": [1, dim], "items": ["candidates", dim], "features": ["candidates", width]}
    return Graph("ranker", loaded.ranker, "logits", axes, ["candidates", actions], cases)


def _write_index(
    loaded: LoadedRun,
    data: Interactions,
    context: golden.GoldenContext,
    staging: Path,
    target: float,
    gates: ExportGates,
) -> dict[str, Any]:
    built = build(loaded.item_vectors, _likely_queries(loaded, data, context), target)
    for cut in CUTOFFS:
        gates.at_least(f"index_recall@{cut}", built.recall[cut], target)
    (staging / "index.faiss").write_bytes(built.data)
    curve = [point.as_json() for point in built.curve]
    return {"kind": built.kind, "lists": built.lists, "probes": built.probes, "curve": curve}


def _likely_queries(loaded: LoadedRun, data: Interactions, context: golden.GoldenContext) -> _F32:
    """Returns vectors like those that the index will search: of real users, of texts as queries, and of items.

    Recall on random vectors would say little: real ones lie where the items are, and crowd some lists of the index.
    """
    rng = np.random.default_rng(0)
    numbers = rng.permutation(len(data.users))[:_QUERIES]
    targets = Targets(numbers, np.diff(data.offsets)[numbers])
    table = torch.from_numpy(loaded.item_vectors)
    users = user_vectors(loaded.user_encoder, table, data, targets, loaded.config.max_length)
    rows = rng.permutation(context.catalog.size)[: _QUERIES // 4]
    texts = [item_text(context.catalog.item(int(row))) for row in rows]
    tokens = np.concatenate([query_inputs(text, context.shapes)["tokens"] for text in texts])
    return np.concatenate([users, context.ask("query_encoder", {"tokens": tokens}), loaded.item_vectors[rows]])


def _write_tables(loaded: LoadedRun, data: Interactions, catalog: Catalog, staging: Path) -> None:
    """Writes the tables of the lower rungs and of lexical search."""
    np.save(staging / "neighbors.npy", loaded.neighbors.astype(np.int32))
    np.save(staging / "neighbor_scores.npy", loaded.neighbor_scores.astype(np.float32))
    # Recent popularity, and among equals popularity of all time.
    scores = (loaded.recent_popularity + 1e-3 * loaded.popularity).astype(np.float32)
    rows = np.argsort(-scores, kind="stable")[:POPULAR].astype(np.int32)
    tables = {"": (rows, scores[rows])}
    keys, first = np.unique(catalog.columns.category, return_index=True)
    named = dict(zip(keys.tolist(), first.tolist(), strict=True))
    for key, table in popular_in_segments(data, catalog.columns, loaded.config.recent_days).items():
        # A category that no item has any more may still be in histories, but it has lost its name.
        if key in named:
            tables[catalog.item(named[key])["categories"][0]] = table
    popular = pa.table(
        {
            "segment": np.repeat(list(tables), [segment_rows.size for segment_rows, _ in tables.values()]),
            "row": np.concatenate([segment_rows for segment_rows, _ in tables.values()]),
            "score": np.concatenate([segment_scores for _, segment_scores in tables.values()]),
        }
    )
    with pa.OSFile(str(staging / "popular.arrow"), "wb") as sink, pa.ipc.new_file(sink, popular.schema) as writer:
        writer.write_table(popular)
    # Of the columns that the words are made of, a part at a time: a million items as dictionaries are gigabytes.
    lengths, words = [np.zeros(1, np.int64)], [np.empty(0, np.uint32)]
    token_of = remembering_token()
    worded = loaded.items.select([name for name in WORDED if name in loaded.items.column_names])
    for batch in worded.to_batches(max_chunksize=10_000):
        tokens = [text_tokens(item_text(item), token_of) for item in batch.to_pylist()]
        lengths.append(np.array([item_tokens.size for item_tokens in tokens], np.int64))
        words.append(np.concatenate([np.empty(0, np.uint32), *tokens]))
    np.save(staging / "token_offsets.npy", np.cumsum(np.concatenate(lengths)))
    np.save(staging / "tokens.npy", np.concatenate(words))


def _manifest(loaded: LoadedRun, gates: ExportGates, index: Mapping[str, Any]) -> dict[str, Any]:
    config, result = loaded.config, loaded.result
    # The model part is what serving reads; the others are for readers who look into a bundle.
    names = [
        *ENCODER_FEATURES.names,
        *ranker_names([action["name"] for action in result["actions"]], loaded.declared.names),
    ]
    model = {
        **{name: result[name] for name in ("event_types", "actions", "action_weights", "seen_types", "blend")},
        **{name: result[name] for name in ("base_rates", "surface_rates")},
        "linear": linear_spec(result).as_json(),
        "features": loaded.declared.as_json(),
        **{name: getattr(config, name) for name in (*ItemInputShapes.__slots__, "dim", "max_length", "repeats")},
    }
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "feature_set": {"fingerprint": loaded.declared.fingerprint(), "features": names},
        "data_fingerprint": result["data_fingerprint"],
        "configuration": config.model_dump(mode="json"),
        "metrics": {"best_validation": result["best_validation"]},
        "gates": gates.results,
        "index": dict(index),
        "catalog_version": int(loaded.dataset.info.get("catalog_version", 0)),
        "model": model,
    }
