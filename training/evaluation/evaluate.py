"""Measures runs: the full catalogue ranked for every test event, with intervals, and the baselines beside them.

Nothing is sampled; what a person had is masked (unless repeats count); ties count against the target; and the score
that is measured is the one that is served: relevance, and over the most relevant candidates the ranker's blend.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from features.action_rates import ActionRates
from features.assemble import Moment, ranker_features
from features.catalog_columns import CatalogColumns, columns_of
from features.errors import LeakError, TrainingError
from training.data.clock import tell_future
from training.data.interactions import Interactions, read_interactions
from training.data.split import Split, Targets, Which, held_out, split
from training.fitting.ranker_candidates import moment_of
from training.metrics import coverage, hit, interval, mrr, ndcg, novelty
from training.models.baselines import Baseline, Scores, build_baselines, counts_of, popularity_of
from training.models.ranker import utility
from training.models.scoring import UserHistories, had_before, lines, mask_seen, ranks_of, seen_before, user_vectors
from training.report import write_report
from training.run import LoadedRun, admit_run, load_run, note_evaluation
from training.runtime import exact, prepared

SHOWN = 10
LOGIT_PEOPLE = 64
"""People whose candidates the ranker scores at once."""
METRICS: Mapping[str, Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]] = {
    "hit@10": lambda ranks: hit(ranks, 10),
    "ndcg@10": lambda ranks: ndcg(ranks, 10),
    "mrr@10": lambda ranks: mrr(ranks, 10),
    "recall@100": lambda ranks: hit(ranks, 100),
}
_NEEDS = {"leave-one-out": "leave-one-out", "temporal-successive": "temporal", "temporal-last": "temporal"}
_HISTORY_BORDERS = (1, 10, 50, 200)
_Values = dict[str, npt.NDArray[np.float64]]
"""Values of each metric, one per target."""


@dataclass(frozen=True)
class Ranked:
    """Where one scorer put the targets: ranks int64 `[n]`, and what it showed, int64 `[n, SHOWN]`."""

    ranks: npt.NDArray[np.int64]
    shown: npt.NDArray[np.int64]


class ModelScorer:
    """Relevance of a run, and its final order of the most relevant candidates."""

    name = "model"

    def __init__(self, run: LoadedRun, data: Interactions, targets: Targets) -> None:
        self.run, self.data, self.targets = run, data, targets
        table = torch.from_numpy(run.item_vectors)
        self.users = user_vectors(run.user_encoder, table, data, targets, run.config.max_length)
        self.sunk = ~run.trained & (not run.result["content"])
        self.columns = columns_of_run(run)
        self.pasts = UserHistories(data, self.columns)
        self.outcomes, self.timed = ActionRates.of(run.result), run.result["ranker_source"] == "impressions"
        self.weights = torch.tensor(run.result["action_weights"])

    def relevance(self, part: slice) -> npt.NDArray[np.float32]:
        """Inner products; an item of which nothing at all is known sinks."""
        scores: npt.NDArray[np.float32] = self.users[part] @ self.run.item_vectors.T
        scores[:, self.sunk] = -np.inf
        return scores

    def place(self, scores: npt.NDArray[np.float32], part: slice) -> Ranked:
        """Ranks by relevance, and again by the final score among the most relevant."""
        numbers = np.arange(part.start, part.stop)
        rows = self.targets.take(numbers).rows(self.data)
        if not self.run.result["blend"]:
            return place(scores, rows)
        depth = min(self.run.config.candidates, scores.shape[1])
        best = np.argpartition(-scores, depth - 1, axis=1)[:, :depth]
        final = np.take_along_axis(scores, best, axis=1)  # what is masked stays at minus infinity
        for some in lines(numbers.size, LOGIT_PEOPLE):
            logits = self.logits(numbers[some], best[some].astype(np.int32))
            final[some] += np.float32(float(self.run.result["blend"])) * utility(logits, self.weights).numpy()
        order = np.argsort(-final, axis=1, kind="stable")[:, :SHOWN]
        ranks = ranks_of(scores, rows)
        at, place_in = np.nonzero(best == rows[:, None])
        mine = final[at, place_in]
        ranks[at] = np.where(np.isfinite(mine), np.sum(final[at] >= mine[:, None], axis=1) - 1, ranks[at])
        return Ranked(ranks, np.take_along_axis(best, order, axis=1))

    def logits(self, numbers: npt.NDArray[np.int64], rows: npt.NDArray[np.int32]) -> torch.Tensor:
        """The ranker's logits of `rows` `[n, C]` just before the targets `numbers` `[n]`; float `[n, C, A]`."""
        some, users, vectors = self.targets.take(numbers), self.users[numbers], self.columns.vectors[rows]
        relevance = np.einsum("nd,ncd->nc", users, vectors)
        features = [
            ranker_features(
                self.pasts.before(int(person), int(position)),
                rows[at],
                relevance[at],
                self.columns,
                self.outcomes,
                moment_of(self.data, some, at) if self.timed else Moment(),
            )
            for at, (person, position) in enumerate(zip(some.people, some.positions, strict=True))
        ]
        with torch.inference_mode():
            found: torch.Tensor = self.run.ranker(
                torch.from_numpy(users).unsqueeze(1), torch.from_numpy(vectors), torch.from_numpy(np.stack(features))
            )
        return found


def columns_of_run(run: LoadedRun) -> CatalogColumns:
    """The catalogue as the run's bundle will hold it."""
    learned = {name: getattr(run, name) for name in ("popularity", "recent_popularity", "trained", "statistics")}
    return replace(columns_of(run.items, run.item_vectors), **learned)


def evaluate(runs: Sequence[Path], protocol: str, data: Path | None = None) -> dict[str, Any]:
    """Measures one run, or several that differ by their seed, on the events that were held out from training.

    Args:
        runs: Directories of finished runs of one data set.
        protocol: `leave-one-out`, `temporal-successive`, `temporal-last`, `impressions`, `search` or
            `cold-items`.
        data: Where the data set is now, if it has moved.

    Returns:
        `protocol`, `runs`, `seeds`, `users`, `targets`, `items`, `cold` (targets that no training event names; they are
        left out of everything but `with_cold`), `metrics` {name: {mean, low, high}}, `by_seed`, `baselines` {name:
        {metric: value}}, `paired` {baseline: {metric: interval of model minus baseline}}, `with_cold`, `segments`,
        `coverage@10`, `novelty@10`, `blend`, `future_events`, `seconds`; with those of `intake.summary`.
        Where repeats count also `parts`, of which each has `targets`, `metrics`, `baselines` and `paired`: "repeats",
        the items that their user had before, and "new", those that are new to them, both ranked among all items as they
        are served; and "new_alone", the new ones ranked among what is new to their user.

    Raises:
        LeakError: A run was trained on what the protocol tests.
        TrainingError: The runs cannot be measured together, or the data set lacks what the protocol asks for.
    """
    if not runs:
        raise TrainingError("name at least one run")
    began = time.monotonic()
    answer = _events(runs, protocol, data) if protocol in _NEEDS else _tables(runs, protocol, data)
    answer["seconds"] = round(time.monotonic() - began, 3)
    for run in map(Path, runs):
        note_evaluation(run, answer)
        write_report(list(map(Path, runs)), run)
    return answer


def _tables(runs: Sequence[Path], protocol: str, data: Path | None) -> dict[str, Any]:
    """What other files measure; they need this one."""
    from training.evaluation.cold_items import evaluate_cold
    from training.evaluation.impressions import evaluate_impressions, evaluate_search

    other = {"impressions": evaluate_impressions, "search": evaluate_search, "cold-items": evaluate_cold}
    if protocol not in other:
        raise TrainingError(f"no protocol {protocol!r}: known are {', '.join([*_NEEDS, *other])}")
    answer: dict[str, Any] = other[protocol](runs, data)
    return answer


def _events(runs: Sequence[Path], protocol: str, data: Path | None) -> dict[str, Any]:
    """The events that were held out, ranked by the runs and the baselines."""
    loaded = [load_run(run, data) for run in runs]
    for run in loaded:
        _refuse_leak(run, protocol)
        if run.result["data_fingerprint"] != loaded[0].result["data_fingerprint"]:
            raise TrainingError(f"{run.path} and {loaded[0].path} were trained on different data sets")
    left_out = admit_run(loaded[0])
    with prepared(loaded[0].config.threads), exact(), torch.inference_mode():
        return _measure(loaded, protocol) | left_out  # type: ignore[arg-type]


def _refuse_leak(run: LoadedRun, protocol: str) -> None:
    trained = run.config.protocol
    if trained != _NEEDS[protocol]:
        raise LeakError(
            f"{run.path} was trained with protocol {trained}, so it has seen what {protocol} tests: "
            f"train with --set protocol={_NEEDS[protocol]}"
        )


def _measure(runs: Sequence[LoadedRun], protocol: Which) -> dict[str, Any]:
    run = runs[0]
    data = read_interactions(run.dataset, run.vocabulary, run.config, run.path)
    division = split(data, run.config)
    targets = held_out(data, run.config, protocol)
    if not len(targets):
        raise TrainingError(f"{run.path}: the data set has no event that {protocol} could test")
    models = [ModelScorer(one, data, targets) for one in runs]
    baselines = build_baselines(data, division, run.config, (run.neighbors, run.neighbor_scores))
    placed = place_all(models, baselines, data, targets, run.config.repeats)
    ours, beside = placed[: len(models)], placed[len(models) :]
    warm = np.flatnonzero(_known_rows(data, division)[targets.rows(data)])
    counts = popularity_of(data, division.train_end)
    answer = _summary(ours, {one.name: ranked for one, ranked in zip(baselines, beside, strict=True)}, targets, warm)
    if run.config.repeats:
        answer["parts"] = _parts(runs, baselines, placed, data, targets, warm)
    return {
        "protocol": protocol,
        "runs": [str(one.path) for one in runs],
        "seeds": [one.config.seed for one in runs],
        "users": int(np.unique(targets.people).size),
        "targets": len(targets),
        "cold": len(targets) - warm.size,
        "items": data.items,
        "blend": [one.result["blend"] for one in runs],
        **answer,
        **tell_future(data),
        "coverage@10": float(np.mean([coverage(one.shown[warm], data.items) for one in ours])),
        "novelty@10": float(np.mean([novelty(one.shown[warm], counts) for one in ours])),
    }


def _parts(
    runs: Sequence[LoadedRun],
    baselines: Sequence[Baseline],
    placed: Sequence[Ranked],
    data: Interactions,
    targets: Targets,
    warm: npt.NDArray[np.int64],
) -> dict[str, Any]:
    """Repeats and new items apart, as they are served together, and new items without what their user had."""
    again = had_before(data, targets)[warm]
    alone = targets.take(warm[~again])
    models = [ModelScorer(one, data, alone) for one in runs]
    parts = {
        "repeats": (placed, targets, warm[again]),
        "new": (placed, targets, warm[~again]),
        "new_alone": (place_all(models, baselines, data, alone, repeats=False), alone, np.arange(len(alone))),
    }
    answer = {}
    for name, (ranked, those, at) in parts.items():
        if at.size:
            pairs = zip(baselines, ranked[len(runs) :], strict=True)
            beside = {baseline.name: _values(one) for baseline, one in pairs}
            compared = _compared(_mean_values(ranked[: len(runs)]), beside, those, at)
            answer[name] = {"targets": int(at.size), **compared}
    return answer


def _values(ranked: Ranked) -> _Values:
    return {metric: of(ranked.ranks) for metric, of in METRICS.items()}


def _mean_values(ranked: Sequence[Ranked]) -> _Values:
    return {metric: np.mean([of(one.ranks) for one in ranked], axis=0) for metric, of in METRICS.items()}


def _summary(
    ours: Sequence[Ranked], beside: Mapping[str, Ranked], targets: Targets, warm: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Means over seeds and users, with intervals, and the differences to each baseline."""
    model, others = _mean_values(ours), {name: _values(one) for name, one in beside.items()}
    return {
        **_compared(model, others, targets, warm),
        "by_seed": {metric: [float(of(one.ranks)[warm].mean()) for one in ours] for metric, of in METRICS.items()},
        "with_cold": {
            name: {metric: float(values.mean()) for metric, values in metrics.items()}
            for name, metrics in {"model": model, **others}.items()
        },
        "segments": _by_history(targets.positions[warm], model["ndcg@10"][warm]),
    }


def _compared(
    model: _Values, others: Mapping[str, _Values], targets: Targets, at: npt.NDArray[np.int64]
) -> dict[str, dict[str, Any]]:
    """The model's metrics on some targets, the baselines', and the differences between them."""
    people = targets.people[at]
    return {
        "metrics": {metric: interval(values[at], people) for metric, values in model.items()},
        "baselines": {
            name: {metric: float(values[at].mean()) for metric, values in metrics.items()}
            for name, metrics in others.items()
        },
        "paired": {
            name: {metric: interval(model[metric][at] - values[at], people) for metric, values in metrics.items()}
            for name, metrics in others.items()
        },
    }


def place_all(
    models: Sequence[ModelScorer], baselines: Sequence[Baseline], data: Interactions, targets: Targets, repeats: bool
) -> list[Ranked]:
    """Ranks the targets by every scorer, some targets at a time."""
    parts: list[list[Ranked]] = []
    for part in lines(len(targets)):
        some = targets.take(np.arange(part.start, part.stop))
        seen = None if repeats else seen_before(data, some)

        def masked(scores: Any, seen: list[npt.NDArray[np.int32]] | None = seen) -> Any:
            if seen is not None:
                mask_seen(scores, seen)
            return scores

        ranked = [model.place(masked(model.relevance(part)), part) for model in models]
        ranked += [place(masked(baseline.scores(some)), some.rows(data)) for baseline in baselines]
        parts.append(ranked)
    return [
        Ranked(np.concatenate([one.ranks for one in column]), np.concatenate([one.shown for one in column]))
        for column in zip(*parts, strict=True)
    ]


def place(scores: Scores, rows: npt.NDArray[np.int32]) -> Ranked:
    """Ranks by one score; scores `[n, N]`."""
    size = min(SHOWN, scores.shape[1])
    shown = np.argpartition(-scores, size - 1, axis=1)[:, :size]
    return Ranked(ranks_of(scores, rows), shown)


def _known_rows(data: Interactions, division: Split) -> npt.NDArray[np.bool_]:
    """The items that training or validation events name; bool `[N]`."""
    return counts_of(data, division.fit_end) > 0


def _by_history(positions: npt.NDArray[np.int64], values: npt.NDArray[np.float64]) -> dict[str, dict[str, float]]:
    """NDCG@10 by the number of events before the target."""
    segments = {}
    for low, high in zip(_HISTORY_BORDERS, (*_HISTORY_BORDERS[1:], 1 << 62), strict=True):
        inside = (positions >= low) & (positions < high)
        if inside.any():
            name = f"history {low}-{high - 1}" if high < 1 << 62 else f"history {low}+"
            segments[name] = {"ndcg@10": float(values[inside].mean()), "targets": int(inside.sum())}
    return segments


__all__ = ["METRICS", "CatalogColumns", "ModelScorer", "evaluate", "place"]
