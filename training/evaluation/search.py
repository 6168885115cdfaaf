"""Measures how well the query encoder ranks the catalogue for judged queries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from features.errors import TrainingError
from features.tables.dataset import LoadedTable, read_table
from features.tables.files import table_path
from features.tables.order import codes
from features.tables.schema import JUDGMENTS, JUDGMENTS_REQUIRED
from features.transforms import query_inputs
from training.metrics import graded_ndcg, interval
from training.run import LoadedRun, admit_run, input_shapes, load_runs
from training.runtime import exact, prepared

SEARCH_DEPTH = 100
"""Number of best items of a query that are looked at."""
_METRICS = ("ndcg@10", f"recall@{SEARCH_DEPTH}")


def evaluate_search(runs: Sequence[Path], data: Path | None = None) -> dict[str, Any]:
    """Measures how well the query encoder alone ranks the whole catalogue for judged queries.

    An item that is not judged for a query counts as irrelevant.

    Returns:
        `metrics` {`ndcg@10` (gains 2^grade - 1), `recall@100` (of grades above 0): {mean, low, high}} over the queries
        that have a relevant item, averaged over runs; `protocol`, `seeds`, `queries`, `items`, `baselines` (none).

    Raises:
        TrainingError: The data set has no judgments, or none with a relevant item.
    """
    loaded = load_runs(runs, data)
    judgments = _read_judgments(Path(data or loaded[0].result["data"]))
    left_out = admit_run(loaded[0], judgments=judgments.intake)
    grades = _grades(loaded[0], judgments)
    queries = [query for query, of_query in grades.items() if any(grade > 0 for grade in of_query.values())]
    if not queries:
        raise TrainingError("no judged query has a relevant item, so nothing can be measured: judge some above grade 0")
    with prepared(loaded[0].config.threads), exact(), torch.inference_mode():
        values = np.mean([[_measure(run, query, grades[query]) for query in queries] for run in loaded], axis=0)
    # Each query is its own group: the interval is over queries.
    groups = np.arange(len(queries))
    return {
        "protocol": "search",
        "runs": [str(run.path) for run in loaded],
        "seeds": [run.config.seed for run in loaded],
        "users": 0,
        "queries": len(queries),
        "items": len(loaded[0].vocabulary),
        "metrics": {name: interval(values[:, column], groups) for column, name in enumerate(_METRICS)},
        "baselines": {},
        **left_out,
    }


def _read_judgments(data: Path) -> LoadedTable:
    path = table_path(data, "judgments")
    if path is None:
        raise TrainingError(f"{data} has no table judgments, which this protocol measures on: add judgments.parquet")
    return read_table(path, JUDGMENTS, JUDGMENTS_REQUIRED)


def _grades(run: LoadedRun, judgments: LoadedTable) -> dict[str, dict[int, float]]:
    """Returns the grades of judged items by query and row; each item that the run lacks has a row below 0."""
    table = judgments.table
    item_ids, item_codes = codes(table["item_id"])
    found = run.vocabulary.rows(item_ids)
    # No answer can hold an item that the run does not know, but the ideal one does: it must not be easier to reach.
    rows = np.where(found >= 0, found, -1 - np.arange(found.size))[item_codes].tolist()
    grades: dict[str, dict[int, float]] = {}
    for query, row, grade in zip(table["query"].to_pylist(), rows, table["grade"].to_numpy().tolist(), strict=True):
        grades.setdefault(str(query), {})[row] = grade
    return grades


def _measure(run: LoadedRun, query: str, grades: dict[int, float]) -> tuple[float, float]:
    """Returns NDCG@10 and recall@`SEARCH_DEPTH` of one query."""
    tokens = torch.from_numpy(query_inputs(query, input_shapes(run.config))["tokens"])
    vector = run.query_encoder(tokens)[0].numpy()
    # The query encoder learned directions alone (see fitting/query_encoder.py), so an item's length, which tells of
    # its popularity, must not count here either.
    lengths = np.maximum(np.linalg.norm(run.item_vectors, axis=1), 1e-12)
    best = np.argsort(-(run.item_vectors @ vector) / lengths, kind="stable")[:SEARCH_DEPTH].tolist()
    gains = [2.0 ** grades.get(row, 0.0) - 1 for row in best]
    relevant = [row for row, grade in grades.items() if grade > 0]
    recall = len(set(best) & set(relevant)) / len(relevant)
    return graded_ndcg(gains[:10], [2.0**grade - 1 for grade in grades.values()], 10), recall
