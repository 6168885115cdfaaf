"""Measures runs on tables beside the events: slates that were shown, and judged searches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from features.content import codes, is_present
from features.errors import LeakError, TrainingError
from features.schema import IMPRESSIONS, IMPRESSIONS_REQUIRED, JUDGMENTS, JUDGMENTS_REQUIRED, Required
from features.tables import read_table, table_path
from features.transforms import query_inputs
from training.config import Action
from training.data import Interactions, read_interactions
from training.evaluate import ModelScorer
from training.machine import exact, prepared
from training.metrics import RESAMPLES, auc, ece, gauc, graded_ndcg, interval, log_loss
from training.run import LoadedRun, input_shapes, load_run
from training.split import Targets, before_cut

ATTRIBUTION_MS = 86_400_000
"""An action counts for a slate within a day, where events do not name the request they follow from."""
SEARCH_DEPTH = 100


@dataclass(frozen=True)
class Shown:
    """One line per item of a slate: person, events before it, item, slate, and what followed; arrays of one length."""

    people: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int32]
    labels: npt.NDArray[np.bool_]


def evaluate_impressions(runs: Sequence[Path], data: Path | None = None) -> dict[str, Any]:
    """How well the ranker's probabilities fit what people did with slates shown after the temporal cut.

    Returns:
        `metrics` {`ACTION/auc`, `ACTION/gauc`, `ACTION/log_loss`, `ACTION/ece`: {mean, low, high}} of the mean of the
        runs' probabilities; `baselines` {base_rate, popular}; `protocol`, `seeds`, `users`, `items`, `impressions`.

    Raises:
        LeakError: A run was not trained with `protocol: temporal`.
        TrainingError: The data set has no impressions after the cut.
    """
    loaded = [load_run(run, data) for run in runs]
    for run in loaded:
        if run.config.protocol != "temporal":
            raise LeakError(f"{run.path} was trained on the days that are tested: train with --set protocol=temporal")
    first = loaded[0]
    events = read_interactions(first.dataset, first.vocabulary, first.config, first.path)
    slates = _table(Path(data or first.result["data"]), "impressions", IMPRESSIONS, IMPRESSIONS_REQUIRED)
    actions = [Action.model_validate(action) for action in first.result["actions"]]
    shown = _shown_lines(slates, first, events, actions)
    with prepared(first.config.threads), exact(), torch.inference_mode():
        found = np.mean([_probabilities(run, events, shown) for run in loaded], axis=0)
    popular = first.popularity[shown.rows].astype(np.float64)
    metrics: dict[str, Any] = {}
    baselines: dict[str, dict[str, float]] = {"base_rate": {}, "popular": {}}
    for number, action in enumerate(actions):
        labels = shown.labels[:, number]
        metrics |= {f"{action.name}/{name}": value for name, value in _judge(labels, found[:, number], shown).items()}
        rate = np.full(labels.size, labels.mean())
        baselines["base_rate"][f"{action.name}/log_loss"] = log_loss(labels, rate)
        baselines["popular"][f"{action.name}/auc"] = auc(labels, popular)
        baselines["popular"][f"{action.name}/gauc"] = gauc(labels, popular, shown.people)
    return {
        "protocol": "impressions",
        "runs": [str(run.path) for run in loaded],
        "seeds": [run.config.seed for run in loaded],
        "users": int(np.unique(shown.people).size),
        "items": events.items,
        "impressions": int(shown.rows.size),
        "metrics": metrics,
        "baselines": baselines,
    }


def _table(data: Path, name: str, schema: pa.Schema, required: Required) -> pa.Table:
    path = table_path(data, name)
    if path is None:
        raise TrainingError(f"{data} has no table {name}, which this protocol measures on")
    return read_table(path, schema, required).table


def _shown_lines(slates: pa.Table, run: LoadedRun, events: Interactions, actions: Sequence[Action]) -> Shown:
    """The items of the slates after the cut, and which actions followed."""
    cut = int(events.timestamps[_last_trained(events, run)].max(initial=0))
    numbers = {name: number for number, name in enumerate(events.people)}
    known = [numbers.get(str(name), -1) for name in slates["user_id"].to_pylist()]
    times = slates["timestamp"].to_numpy()
    chosen = np.flatnonzero((np.array(known) >= 0) & (times > cut))
    if not chosen.size:
        raise TrainingError("the data set has no impression of a known person after the cut")
    lists, requests = slates["item_ids"].to_pylist(), slates["request_id"].to_pylist()
    people, positions, rows, labels = [], [], [], []
    followed = _Followed(run, events, actions)
    for at in chosen.tolist():
        person, items = known[at], run.vocabulary.rows([str(name) for name in lists[at] or ()])
        items = items[items >= 0]
        part = slice(int(events.offsets[person]), int(events.offsets[person + 1]))
        position = int(np.searchsorted(events.timestamps[part], times[at], side="left"))
        people += [person] * items.size
        positions += [position] * items.size
        rows.append(items)
        labels.append(followed.labels(part, position, items, str(requests[at]), int(times[at])))
    return Shown(np.array(people), np.array(positions), np.concatenate(rows), np.concatenate(labels))


def _last_trained(events: Interactions, run: LoadedRun) -> npt.NDArray[np.int64]:
    """The newest event of each person before the cut."""
    ends = before_cut(events, run.config.test_share)
    return (events.offsets[:-1] + ends - 1)[ends > 0]


class _Followed:
    """Which items of a slate a person acted on."""

    def __init__(self, run: LoadedRun, events: Interactions, actions: Sequence[Action]) -> None:
        self.events = events
        column = run.dataset.events["request_id"]
        self.requests = codes(column.fill_null(""))  # type: ignore[arg-type]
        self.named = is_present(column)
        self.done = np.stack([_done(events, action) for action in actions], 1)
        self.numbers = {name: number for number, name in enumerate(self.requests[0])}

    def labels(
        self, part: slice, position: int, items: npt.NDArray[np.int32], request: str, time: int
    ) -> npt.NDArray[np.bool_]:
        """Bool `[items, actions]`."""
        later = np.arange(part.start + position, part.stop)
        if self.named:
            later = later[self.requests[1][later] == self.numbers.get(request, -1)]
        else:
            later = later[self.events.timestamps[later] <= time + ATTRIBUTION_MS]
        same = self.events.rows[later][None, :, None] == items[:, None, None]
        return np.asarray((same & self.done[later][None]).any(1))


def _done(events: Interactions, action: Action) -> npt.NDArray[np.bool_]:
    if action.event_type not in events.event_types:
        return np.zeros(events.rows.size, bool)
    done = np.asarray(events.types == 1 + events.event_types.index(action.event_type))
    return done if action.min_value is None else done & (events.values >= action.min_value)


def _probabilities(run: LoadedRun, events: Interactions, shown: Shown) -> npt.NDArray[np.float64]:
    """The ranker's probability of each action for each line; float64 `[n, A]`."""
    moments, inverse = np.unique(np.stack([shown.people, shown.positions], 1), axis=0, return_inverse=True)
    scorer = ModelScorer(run, events, Targets(moments[:, 0], moments[:, 1]))
    out = np.empty(shown.labels.shape, np.float64)
    order = np.argsort(inverse, kind="stable")
    for at, lines in enumerate(np.split(order, np.cumsum(np.bincount(inverse))[:-1])):
        logits = scorer.logits(np.array([at]), shown.rows[lines][None])[0]
        out[lines] = torch.sigmoid(logits).numpy()
    return out


def _judge(labels: npt.NDArray[np.bool_], found: npt.NDArray[np.float64], shown: Shown) -> dict[str, dict[str, float]]:
    """Quality of one action's probabilities; intervals by drawing people."""
    rng = np.random.default_rng(0)
    order = np.argsort(shown.people, kind="stable")
    by_person = np.split(order, np.cumsum(np.bincount(np.unique(shown.people, return_inverse=True)[1]))[:-1])

    def measure(lines: npt.NDArray[np.int64], groups: npt.NDArray[np.int64]) -> list[float]:
        some, p = labels[lines], found[lines]
        return [auc(some, p), gauc(some, p, groups), log_loss(some, p), ece(some, p)]

    whole = measure(np.arange(labels.size), shown.people)
    drawn = []
    for _ in range(RESAMPLES // 10):
        picked = [by_person[at] for at in rng.integers(0, len(by_person), len(by_person))]
        drawn.append(measure(np.concatenate(picked), np.repeat(np.arange(len(picked)), [p.size for p in picked])))
    low, high = np.nanquantile(np.array(drawn), [0.025, 0.975], axis=0)
    names = ("auc", "gauc", "log_loss", "ece")
    return {n: {"mean": whole[i], "low": float(low[i]), "high": float(high[i])} for i, n in enumerate(names)}


def evaluate_search(runs: Sequence[Path], data: Path | None = None) -> dict[str, Any]:
    """How well the query encoder alone ranks the whole catalogue for judged queries; unjudged counts as irrelevant.

    Returns:
        `metrics` {`ndcg@10` (gains 2^grade - 1), `recall@100` (of grades above 0): {mean, low, high}} over the queries
        that have a relevant item, averaged over runs; `protocol`, `seeds`, `queries`, `items`, `baselines` (none).

    Raises:
        TrainingError: The data set has no judgments, or none with a relevant item.
    """
    loaded = [load_run(run, data) for run in runs]
    table = _table(Path(data or loaded[0].result["data"]), "judgments", JUDGMENTS, JUDGMENTS_REQUIRED)
    grades: dict[str, dict[int, float]] = {}
    rows = loaded[0].vocabulary.rows([str(name) for name in table["item_id"].to_pylist()])
    grade_of = table["grade"].to_numpy()
    for query, row, grade in zip(table["query"].to_pylist(), rows.tolist(), grade_of.tolist(), strict=True):
        grades.setdefault(str(query), {})[row] = grade
    asked = [query for query, judged in grades.items() if any(grade > 0 for grade in judged.values())]
    if not asked:
        raise TrainingError("no judged query has a relevant item")
    with prepared(loaded[0].config.threads), exact(), torch.inference_mode():
        values = np.mean([[_search(run, query, grades[query]) for query in asked] for run in loaded], axis=0)
    queries = np.arange(len(asked))
    return {
        "protocol": "search",
        "runs": [str(run.path) for run in loaded],
        "seeds": [run.config.seed for run in loaded],
        "users": 0,
        "queries": len(asked),
        "items": len(loaded[0].vocabulary),
        "metrics": {name: interval(values[:, i], queries) for i, name in enumerate(("ndcg@10", "recall@100"))},
        "baselines": {},
    }


def _search(run: LoadedRun, query: str, judged: dict[int, float]) -> tuple[float, float]:
    tokens = torch.from_numpy(query_inputs(query, input_shapes(run.config))["tokens"])
    asked = run.query_encoder(tokens)[0].numpy()
    lengths = np.maximum(np.linalg.norm(run.item_vectors, axis=1), 1e-12)
    best = np.argsort(-(run.item_vectors @ asked) / lengths, kind="stable")[:SEARCH_DEPTH].tolist()
    gains = [2.0 ** judged.get(row, 0.0) - 1 for row in best]
    relevant = [row for row, grade in judged.items() if grade > 0]
    recall = len(set(best) & set(relevant)) / len(relevant)
    return graded_ndcg(gains[:10], [2.0**grade - 1 for grade in judged.values()], 10), recall
