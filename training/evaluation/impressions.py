"""Measures runs on tables beside the events: slates that were shown, and judged searches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from features.action_rates import ActionRates, Rates
from features.assemble import ranker_width
from features.errors import LeakError, TrainingError
from features.item_prior import blocks
from features.tables.dataset import Loaded, read_table
from features.tables.files import table_path
from features.tables.schema import JUDGMENTS, JUDGMENTS_REQUIRED, Required
from features.transforms import query_inputs
from training.data.clock import tell_future
from training.data.impressions import NEVER, Shown, read_shown, read_slates
from training.data.interactions import Interactions
from training.data.point_in_time import features_of_line
from training.data.split import before_cut, cut_of
from training.evaluation.evaluate import columns_of_run
from training.fitting.ranker_impressions import RankerBatch, lesson_of, line_users, logits_of
from training.metrics import RESAMPLES, Floats, auc, ece, gauc, graded_ndcg, interval, log_loss, measure
from training.models.scoring import UserHistories
from training.run import LoadedRun, admit_run, input_shapes, load_run
from training.runtime import exact, prepared
from training.train import Material, read_material

METRICS = ("auc", "gauc", "slate_gauc", "log_loss", "ece")
"""What probabilities are judged by: AUC; AUC within people; the same with their lines as one slate; log loss; ECE."""
DRAWS = RESAMPLES // 5
SEARCH_DEPTH = 100


@dataclass(frozen=True)
class Chances:
    """Probabilities of the actions on the same lines; float64 [n, A], or [n] of one action.

    Attributes:
        live: By what was known just before each line, as the service would say.
        slate: By what was known of each person at the cut: as if all their lines were the candidates of one request.
    """

    live: Floats
    slate: Floats

    def of(self, action: int) -> Chances:
        """Those of one action."""
        return Chances(self.live[:, action], self.slate[:, action])


@dataclass(frozen=True)
class Tested:
    """The impressions after the cut, as runs judge them.

    Attributes:
        lines: What was shown, when and where, and what followed.
        live: The same as the first run's ranker reads it.
        slate: The same with every person as they were at the cut.
        chances: The mean of the runs.
    """

    lines: Shown
    live: RankerBatch
    slate: RankerBatch
    chances: Chances


def evaluate_impressions(runs: Sequence[Path], data: Path | None = None) -> dict[str, Any]:
    """How well the ranker's probabilities fit what people did with what they were shown after the temporal cut.

    Statistics of items and surfaces are those of the run, as its bundle serves them; a person's history goes up to each
    impression, as the service would know it. Where slates were logged of a share of users (`weight`), each counts for
    as many as it stands for.

    Returns:
        `metrics` {`ACTION/METRIC`: {mean, low, high}} of the mean of the runs' probabilities, with `METRICS`;
        `baselines` {base_rate, item_rate, user_rate, item_user_surface: {`ACTION/METRIC`: value}}, learned before the
        cut, and their `baseline_intervals` {name: {`ACTION/METRIC`: [low, high]}}; `protocol`, `seeds`, `users`,
        `items`, `impressions`, `actions` {name: positives}.

    Raises:
        LeakError: A run was not trained with `protocol: temporal`.
        TrainingError: The data set has no impressions after the cut.
    """
    loaded = [load_run(run, data) for run in runs]
    slates = read_slates(Path(data or loaded[0].result["data"]))
    left_out = admit_run(loaded[0], **({} if slates is None else {"impressions": slates.intake}))
    material, shown = read_tested(loaded, data)
    first = loaded[0]
    with prepared(first.config.threads), exact(), torch.inference_mode():
        tested = test(loaded, material.data, shown)
    left_out |= tell_future(material.data)
    return (
        compared(loaded, material.data.items, tested, baselines(first, material.data, shown, tested.lines)) | left_out
    )


def read_tested(runs: Sequence[LoadedRun], data: Path | None) -> tuple[Material, Shown]:
    """What the first run learned from, and all impressions.

    Raises:
        LeakError: A run was not trained with `protocol: temporal`.
        TrainingError: The data set has no impressions.
    """
    for run in runs:
        if run.config.protocol != "temporal":
            raise LeakError(f"{run.path} was trained on the days that are tested: train with --set protocol=temporal")
    first = runs[0]
    path = Path(data or first.result["data"])
    material = read_material(first.dataset, first.config, torch.device("cpu"), first.path)
    shown = read_shown(
        path, material.dataset, material.vocabulary, material.data, material.actions, first.config.methods
    )
    if shown is None:
        raise TrainingError(f"{path} has no table impressions, which this protocol measures on")
    return material, shown


def compared(runs: Sequence[LoadedRun], items: int, tested: Tested, beside: Mapping[str, Chances]) -> dict[str, Any]:
    """Returns what `evaluate_impressions` answers; `beside` are the scorers to compare."""
    labels, people, weights = tested.lines.labels(), tested.lines.people, tested.lines.unequal
    names = [action["name"] for action in runs[0].result["actions"]]

    def figures(chances: Chances) -> dict[str, dict[str, float]]:
        return {
            f"{name}/{metric}": value
            for number, name in enumerate(names)
            for metric, value in judge(labels[:, number], chances.of(number), people, weights).items()
        }

    others = {name: figures(chances) for name, chances in beside.items()}
    answer = {
        "protocol": "impressions",
        "runs": [str(run.path) for run in runs],
        "seeds": [run.config.seed for run in runs],
        "users": int(np.unique(people).size),
        "items": items,
        "impressions": len(tested.lines),
        "actions": {name: int(count) for name, count in zip(names, labels.sum(0), strict=True)},
        "metrics": figures(tested.chances),
        "baselines": {name: {n: value["mean"] for n, value in one.items()} for name, one in others.items()},
        "baseline_intervals": {
            name: {n: [value["low"], value["high"]] for n, value in one.items()} for name, one in others.items()
        },
    }
    return answer


def test(runs: Sequence[LoadedRun], data: Interactions, shown: Shown) -> Tested:
    """Asks runs for the impressions after the cut.

    Raises:
        TrainingError: There are none.
    """
    config = runs[0].config
    lines = shown.between(cut_of(data, config), NEVER)
    if not len(lines):
        raise TrainingError("the data set has no impression of a known person after the cut")
    known = np.minimum(lines.positions, before_cut(data, config)[lines.people])
    slate = dataclasses.replace(lines, positions=known)
    lessons = [[_lesson(run, data, some) for some in (lines, slate)] for run in runs]
    chances = [
        [torch.sigmoid(logits_of(run.ranker, lesson)).double().numpy() for lesson in both]
        for run, both in zip(runs, lessons, strict=True)
    ]
    live, still = lessons[0]
    return Tested(lines, live, still, Chances(*np.mean(chances, axis=0)))


def _lesson(run: LoadedRun, data: Interactions, lines: Shown) -> RankerBatch:
    """Lines as the run's bundle would read them."""
    columns, outcomes = columns_of_run(run), ActionRates.of(run.result)
    table = torch.from_numpy(run.item_vectors)
    users = line_users(run.user_encoder, table, data, lines, run.config)
    features = np.empty((len(lines), ranker_width(len(outcomes))), np.float32)
    pasts = UserHistories(data, columns)
    for at in range(len(lines)):
        features[at] = features_of_line(pasts, lines, at, users[at], columns, outcomes)
    return lesson_of(users, run.item_vectors[lines.rows], features, lines.labels())


def baselines(run: LoadedRun, data: Interactions, shown: Shown, lines: Shown) -> dict[str, Chances]:
    """What plain rates say, all learned before the cut: of everybody, of items, of people, and of all at once.

    Args:
        run: Holds the rates of items and surfaces.
        data: The events, for the rates of people.
        shown: All impressions, for everybody's rates.
        lines: What to judge.

    Returns:
        Probabilities by name.
    """
    cut = cut_of(data, run.config)
    before = shown.between(-1, cut)
    rate = np.average(before.labels(cut), axis=0, weights=before.unequal)
    outcomes = ActionRates.of(run.result)
    base = np.log((rate + 1e-6) / (1 - rate + 1e-6))
    item = blocks(run.statistics)[0][lines.rows].astype(np.float64)
    ends = before_cut(data, run.config)
    people, which = np.unique(lines.people, return_inverse=True)
    columns = columns_of_run(run)
    rates, pasts = np.empty((people.size, len(outcomes))), UserHistories(data, columns)
    for at, person in enumerate(people.tolist()):
        past = pasts.before(person, int(ends[person]))
        rates[at] = Rates.of(outcomes, past.types, past.values).long - outcomes.base
    user = rates[which]
    surfaces = np.stack([outcomes.surface(name) for name in lines.surfaces])[lines.where]
    odds = {
        "base_rate": np.broadcast_to(base, item.shape),
        "item_rate": base + item,
        "user_rate": base + user,
        "item_user_surface": outcomes.base + surfaces + item + user,
    }
    chances = {name: 1 / (1 + np.exp(-logits)) for name, logits in odds.items()}
    return {name: Chances(one, one) for name, one in chances.items()}


def judge(
    labels: npt.NDArray[np.bool_],
    chances: Chances,
    people: npt.NDArray[np.int64],
    weights: Floats | None = None,
) -> dict[str, dict[str, float]]:
    """The `METRICS` of one action's probabilities with intervals, by drawing people: {mean, low, high} each."""
    return spread(values_of(labels, chances, people, weights), resampled(labels, chances, people, weights))


def spread(values: Floats, drawn: Floats) -> dict[str, dict[str, float]]:
    """{mean, low, high} of each of the `METRICS`; values [M], drawn [draws, M]."""
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    return {
        name: {"mean": float(values[at]), "low": float(low[at]), "high": float(high[at])}
        for at, name in enumerate(METRICS)
    }


def values_of(
    labels: npt.NDArray[np.bool_],
    chances: Chances,
    people: npt.NDArray[np.int64],
    weights: Floats | None = None,
) -> Floats:
    """The `METRICS` of one action's probabilities; float64 [M]."""
    found = measure(labels, chances.live, people, weights)
    found["slate_gauc"] = gauc(labels, chances.slate, people, weights)
    return np.array([found[name] for name in METRICS])


def resampled(
    labels: npt.NDArray[np.bool_],
    chances: Chances,
    people: npt.NDArray[np.int64],
    weights: Floats | None = None,
) -> Floats:
    """The `METRICS` of one action in each of the same draws of people; float64 [draws, M], NaN where there is none."""
    rng = np.random.default_rng(0)
    _, who, sizes = np.unique(people, return_inverse=True, return_counts=True)
    masses = sizes if weights is None else np.bincount(who, weights)
    within = [_within(labels, scores, who, weights) for scores in (chances.live, chances.slate)]
    order = np.argsort(chances.live, kind="stable")
    out = np.empty((DRAWS, len(METRICS)))
    for draw in out:
        times = np.bincount(rng.integers(0, sizes.size, sizes.size), minlength=sizes.size)
        some = np.repeat(order, times[who[order]])
        y, p = labels[some], chances.live[some]
        w = None if weights is None else weights[some]
        grouped = [_weighted(alone, times * masses) for alone in within]
        draw[:] = auc(y, p, w), *grouped, log_loss(y, p, w), ece(y, p, weights=w)
    return out


def _within(
    labels: npt.NDArray[np.bool_], scores: Floats, who: npt.NDArray[np.int64], weights: Floats | None
) -> Floats:
    """AUC inside each person's lines, NaN where one kind is missing; people are numbered from 0."""
    order = np.argsort(who, kind="stable")
    own = np.split(order, np.cumsum(np.bincount(who))[:-1])
    return np.array([auc(labels[at], scores[at], None if weights is None else weights[at]) for at in own])


def _weighted(values: Floats, weights: npt.NDArray[Any]) -> float:
    """Weighted mean of what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    mass = weights[known].sum()
    return float(values[known] @ weights[known] / mass) if mass else float("nan")


def _table(data: Path, name: str, schema: pa.Schema, required: Required) -> Loaded:
    path = table_path(data, name)
    if path is None:
        raise TrainingError(f"{data} has no table {name}, which this protocol measures on")
    return read_table(path, schema, required)


def evaluate_search(runs: Sequence[Path], data: Path | None = None) -> dict[str, Any]:
    """How well the query encoder alone ranks the whole catalogue for judged queries; unjudged counts as irrelevant.

    Returns:
        `metrics` {`ndcg@10` (gains 2^grade - 1), `recall@100` (of grades above 0): {mean, low, high}} over the queries
        that have a relevant item, averaged over runs; `protocol`, `seeds`, `queries`, `items`, `baselines` (none).

    Raises:
        TrainingError: The data set has no judgments, or none with a relevant item.
    """
    loaded = [load_run(run, data) for run in runs]
    judged_by = _table(Path(data or loaded[0].result["data"]), "judgments", JUDGMENTS, JUDGMENTS_REQUIRED)
    left_out = admit_run(loaded[0], judgments=judged_by.intake)
    table = judged_by.table
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
        **left_out,
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
