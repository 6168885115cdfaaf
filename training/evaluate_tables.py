"""Measures runs on tables beside the events: slates that were shown, and judged searches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from features.assemble import ranker_width
from features.catalog import blocks
from features.errors import LeakError, TrainingError
from features.outcomes import Outcomes, Rates
from features.schema import JUDGMENTS, JUDGMENTS_REQUIRED, Required
from features.tables import read_table, table_path
from features.transforms import query_inputs
from training.data import Interactions
from training.evaluate import columns_of_run
from training.feed import Lesson, lesson_of, line_users, logits_of
from training.impressions import NEVER, Shown, read_impressions, shown_lines
from training.machine import exact, prepared
from training.metrics import RESAMPLES, Floats, auc, ece, graded_ndcg, interval, log_loss, measure
from training.ranking import past_of
from training.run import LoadedRun, append_line, input_shapes, load_run
from training.split import before_cut, cut_of
from training.statistics import features_of_line
from training.train import Material, read_material

SEARCH_DEPTH = 100


@dataclass(frozen=True)
class Tested:
    """The impressions after the cut, as runs judge them.

    Attributes:
        lines: What was shown, when and where, and what followed.
        lesson: The same as the first run's ranker reads it.
        probabilities: Of each action, the mean of the runs; float64 [n, A].
    """

    lines: Shown
    lesson: Lesson
    probabilities: Floats


def evaluate_impressions(runs: Sequence[Path], data: Path | None = None) -> dict[str, Any]:
    """How well the ranker's probabilities fit what people did with what they were shown after the temporal cut.

    Statistics of items and surfaces are those of the run, as its bundle serves them; a person's history goes up to each
    impression, as the service would know it.

    Returns:
        `metrics` {`ACTION/auc`, `ACTION/gauc`, `ACTION/log_loss`, `ACTION/ece`: {mean, low, high}} of the mean of the
        runs' probabilities; `baselines` {base_rate, item_rate, user_rate, item_user_surface: {metric: value}}, learned
        before the cut; `protocol`, `seeds`, `users`, `items`, `impressions`, `actions` {name: positives}.

    Raises:
        LeakError: A run was not trained with `protocol: temporal`.
        TrainingError: The data set has no impressions after the cut.
    """
    loaded = [load_run(run, data) for run in runs]
    for run in loaded:
        if run.config.protocol != "temporal":
            raise LeakError(f"{run.path} was trained on the days that are tested: train with --set protocol=temporal")
    first = loaded[0]
    material = read_material(first.dataset, first.config, torch.device("cpu"), first.path)
    shown = read_shown(Path(data or first.result["data"]), material)
    if shown is None:
        raise TrainingError(f"{data or first.result['data']} has no table impressions, which this protocol measures on")
    with prepared(first.config.threads), exact(), torch.inference_mode():
        tested = test(loaded, material.data, shown)
    names = [action.name for action in material.actions]
    known = shown.between(-1, cut_of(material.data, first.config))
    compared = baselines(first, material.data, known.labels(cut_of(material.data, first.config)), tested.lines)
    labels, people = tested.lines.labels(), tested.lines.people
    metrics: dict[str, Any] = {}
    beside: dict[str, dict[str, float]] = {name: {} for name in compared}
    for number, name in enumerate(names):
        metrics |= {
            f"{name}/{n}": v for n, v in judge(labels[:, number], tested.probabilities[:, number], people).items()
        }
        for baseline, chances in compared.items():
            found = measure(labels[:, number], chances[:, number], people)
            beside[baseline] |= {f"{name}/{n}": value for n, value in found.items()}
    answer = {
        "protocol": "impressions",
        "runs": [str(run.path) for run in loaded],
        "seeds": [run.config.seed for run in loaded],
        "users": int(np.unique(people).size),
        "items": material.data.items,
        "impressions": len(tested.lines),
        "actions": {name: int(count) for name, count in zip(names, labels.sum(0), strict=True)},
        "metrics": metrics,
        "baselines": beside,
    }
    for run in loaded:
        append_line(run.path / "evaluations.jsonl", {"at": datetime.now(UTC).isoformat(timespec="seconds")} | answer)
    return answer


def read_shown(path: Path, material: Material) -> Shown | None:
    """The impressions of a data set that a training has read, None where it has none."""
    slates = read_impressions(path)
    if slates is None:
        return None
    return shown_lines(slates, material.dataset, material.vocabulary, material.data, material.actions)


def test(runs: Sequence[LoadedRun], data: Interactions, shown: Shown) -> Tested:
    """Asks runs for the impressions after the cut.

    Raises:
        TrainingError: There are none.
    """
    cut = cut_of(data, runs[0].config)
    lines = shown.between(cut, NEVER)
    if not len(lines):
        raise TrainingError("the data set has no impression of a known person after the cut")
    lessons = [_lesson(run, data, lines) for run in runs]
    chances = [
        torch.sigmoid(logits_of(run.ranker, lesson)).double().numpy() for run, lesson in zip(runs, lessons, strict=True)
    ]
    return Tested(lines, lessons[0], np.mean(chances, axis=0))


def _lesson(run: LoadedRun, data: Interactions, lines: Shown) -> Lesson:
    """Lines as the run's bundle would read them."""
    columns, outcomes = columns_of_run(run), Outcomes.of(run.result)
    table = torch.from_numpy(run.item_vectors)
    users = line_users(run.user_encoder, table, data, lines, run.config)
    features = np.empty((len(lines), ranker_width(len(outcomes))), np.float32)
    for at in range(len(lines)):
        features[at] = features_of_line(data, lines, at, users[at], columns, outcomes)
    return lesson_of(users, run.item_vectors[lines.rows], features, lines.labels())


def baselines(run: LoadedRun, data: Interactions, known: npt.NDArray[np.bool_], lines: Shown) -> dict[str, Floats]:
    """What plain rates say, all learned before the cut: of everybody, of items, of people, and of all at once.

    Args:
        run: Holds the rates of items and surfaces.
        data: The events, for the rates of people.
        known: Labels of the impressions before the cut; bool [m, A].
        lines: What to judge.

    Returns:
        Probabilities by name; float64 [n, A].
    """
    outcomes = Outcomes.of(run.result)
    base = np.log((known.mean(0) + 1e-6) / (1 - known.mean(0) + 1e-6))
    item = blocks(run.statistics)[0][lines.rows].astype(np.float64)
    ends = before_cut(data, run.config)
    people, which = np.unique(lines.people, return_inverse=True)
    columns = columns_of_run(run)
    rates = np.empty((people.size, len(outcomes)))
    for at, person in enumerate(people.tolist()):
        past = past_of(data, person, int(ends[person]), columns)
        rates[at] = Rates.of(outcomes, past.types, past.values).long - outcomes.base
    user = rates[which]
    surfaces = np.stack([outcomes.surface(name) for name in lines.surfaces])[lines.where]
    odds = {
        "base_rate": np.broadcast_to(base, item.shape),
        "item_rate": base + item,
        "user_rate": base + user,
        "item_user_surface": outcomes.base + surfaces + item + user,
    }
    return {name: 1 / (1 + np.exp(-logits)) for name, logits in odds.items()}


def judge(labels: npt.NDArray[np.bool_], chances: Floats, people: npt.NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """`measure` with intervals, by drawing people."""
    rng = np.random.default_rng(0)
    order = np.argsort(people, kind="stable")
    _, sizes = np.unique(people, return_counts=True)
    mine = np.split(order, np.cumsum(sizes)[:-1])
    alone = np.array([auc(labels[some], chances[some]) for some in mine])
    weight = np.where(np.isnan(alone), 0, sizes)
    drawn = []
    for _ in range(RESAMPLES // 5):
        picked = rng.integers(0, sizes.size, sizes.size)
        some = np.concatenate([mine[at] for at in picked])
        mass = weight[picked].sum()
        grouped = float(weight[picked] @ np.nan_to_num(alone[picked])) / mass if mass else float("nan")
        y, p = labels[some], chances[some]
        drawn.append([auc(y, p), grouped, log_loss(y, p), ece(y, p)])
    low, high = np.nanquantile(np.array(drawn), [0.025, 0.975], axis=0)
    whole = measure(labels, chances, people)
    return {n: {"mean": v, "low": float(low[i]), "high": float(high[i])} for i, (n, v) in enumerate(whole.items())}


def _table(data: Path, name: str, schema: pa.Schema, required: Required) -> pa.Table:
    path = table_path(data, name)
    if path is None:
        raise TrainingError(f"{data} has no table {name}, which this protocol measures on")
    return read_table(path, schema, required).table


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
