"""Ranks the full catalogue for every test event, by runs and by the baselines, with intervals.

No negative is sampled, because sampled metrics order models wrongly (Krichene and Rendle, 2020); items that a user had
are masked (unless repeats count); ties count against the target; and the score that is measured is the one that is
served: relevance, and over the most relevant candidates the ranker's blend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from features.action_rates import ActionRates
from features.assemble import ranker_features
from features.errors import LeakError, TrainingError
from training.data.clock import report_future_events
from training.data.generations import division_of
from training.data.histories import UserHistories
from training.data.interactions import Interactions, read_interactions
from training.data.moments import user_moments
from training.data.split import Split, Targets, TestProtocol, held_out
from training.evaluation.file_targets import read_targets
from training.metrics import coverage, hit, interval, mrr, ndcg, novelty
from training.models.baselines import Baseline, EaseBaseline, Scores, build_baselines, counts_of, popularity_of
from training.models.linear import add_sums, linear_sums
from training.models.ranker import utility
from training.models.scoring import had_before, mask_seen, rank_slices, ranks_of, seen_before, slices, user_vectors
from training.run import LoadedRun, admit_run, columns_of_run, load_runs
from training.runtime import exact, prepared

TOP = 10
LOGIT_USERS = 64
"""Users whose candidates the ranker scores at once."""
EXACT_SCORES = 5_000_000_000
"""Scores of targets by items up to which all targets are ranked, minutes for each scorer; of more, a sample is."""
METRICS: Mapping[str, Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]] = {
    "hit@10": lambda ranks: hit(ranks, 10),
    "ndcg@10": lambda ranks: ndcg(ranks, 10),
    "mrr@10": lambda ranks: mrr(ranks, 10),
    "recall@100": lambda ranks: hit(ranks, 100),
}
_TRAINED_WITH = {"leave-one-out": "leave-one-out", "temporal-successive": "temporal", "temporal-last": "temporal"}
_HISTORY_BORDERS = (1, 10, 50, 200)
_Values = dict[str, npt.NDArray[np.float64]]
"""Values of each metric, one per target."""


@dataclass(frozen=True)
class Ranking:
    """The ranks that one scorer gave the targets, int64 `[n]`, and the page that it would show, int64 `[n, TOP]`.

    The best item stands first; -1 is a place for which no item is left that may be shown.
    """

    ranks: npt.NDArray[np.int64]
    top: npt.NDArray[np.int64]


class ModelScorer:
    """Relevance of a run, and its final order of the most relevant candidates."""

    name = "model"

    def __init__(self, run: LoadedRun, data: Interactions, targets: Targets) -> None:
        self.run, self.data, self.targets = run, data, targets
        table = torch.from_numpy(run.item_vectors)
        self.users = user_vectors(run.user_encoder, table, data, targets, run.config.max_length)
        # Without content, an item that training has not seen has a random vector: its score would be noise.
        self.unscored = ~run.trained & (not run.result["content"])
        self.columns = columns_of_run(run)
        self.histories = UserHistories(data, self.columns)
        self.action_rates = ActionRates.of(run.result)
        self.moments = user_moments(run.declared, run.dataset.users, data.users)
        self.sums = linear_sums(run.linear, data, targets)
        self.reads_time = run.result["ranker_source"] == "impressions"
        self.weights = torch.tensor(run.result["action_weights"])

    def relevance(self, part: slice) -> npt.NDArray[np.float32]:
        """Computes relevance; minus infinity for an item that has neither events nor content."""
        scores = add_sums(self.users[part] @ self.run.item_vectors.T, self.sums[part])
        scores[:, self.unscored] = -np.inf
        return scores

    def rank(self, scores: npt.NDArray[np.float32], part: slice) -> Ranking:
        """Ranks by relevance, and again by the final score among the most relevant."""
        numbers = np.arange(part.start, part.stop)
        rows = self.targets.take(numbers).rows(self.data)
        if not self.run.result["blend"]:
            return rank(scores, rows)
        # As in service: the ranker reorders the most relevant candidates, and no other item can enter among them.
        depth = min(self.run.config.candidates, scores.shape[1])
        best = np.argpartition(-scores, depth - 1, axis=1)[:, :depth]
        final = np.take_along_axis(scores, best, axis=1)  # what is masked stays at minus infinity
        for chunk in slices(numbers.size, LOGIT_USERS):
            logits = self.logits(numbers[chunk], best[chunk].astype(np.int32))
            final[chunk] += np.float32(float(self.run.result["blend"])) * utility(logits, self.weights).numpy()
        # A target among the candidates has the rank of its final score; one below them keeps that of its relevance,
        # as in service, where the ranker never sees it.
        ranks = ranks_of(scores, rows)
        at, place = np.nonzero(best == rows[:, None])
        target = final[at, place]
        ranks[at] = np.where(np.isfinite(target), np.sum(final[at] >= target[:, None], axis=1) - 1, ranks[at])
        return Ranking(ranks, _page(best, final))

    def logits(self, numbers: npt.NDArray[np.int64], rows: npt.NDArray[np.int32]) -> torch.Tensor:
        """Computes the logits of `rows` `[n, C]` just before the targets `numbers` `[n]`; float `[n, C, A]`."""
        targets, users, vectors = self.targets.take(numbers), self.users[numbers], self.columns.vectors[rows]
        linear = np.stack([self.sums[number].of(rows[at]) for at, number in enumerate(numbers)])
        relevance = np.einsum("nd,ncd->nc", users, vectors) + linear
        features = [
            ranker_features(
                self.histories.before(int(user), int(position)),
                rows[at],
                relevance[at],
                self.columns,
                self.action_rates,
                # A ranker that learned from candidates has seen no moment, so it gets none.
                self.moments.of(int(user), targets.time(self.data, at) if self.reads_time else 0),
            )
            for at, (user, position) in enumerate(zip(targets.users, targets.positions, strict=True))
        ]
        with torch.inference_mode():
            logits: torch.Tensor = self.run.ranker(
                torch.from_numpy(users).unsqueeze(1), torch.from_numpy(vectors), torch.from_numpy(np.stack(features))
            )
        return logits


def evaluate_events(
    runs: Sequence[Path], protocol: TestProtocol | Literal["test-file"], data: Path | None, file: Path | None = None
) -> dict[str, Any]:
    """Ranks the events that were held out, or those of a file, by the runs and the baselines; see `evaluate`."""
    loaded = load_runs(runs, data)
    # A file's own rows are compared with the events that its run knows, when both are read.
    if protocol != "test-file":
        _refuse_leak(loaded[0], protocol)
    left_out = admit_run(loaded[0])
    with prepared(loaded[0].config.threads), exact(), torch.inference_mode():
        return _measure(loaded, protocol, file) | left_out


def _refuse_leak(run: LoadedRun, protocol: str) -> None:
    protocol_of_run = run.config.protocol
    if protocol_of_run != _TRAINED_WITH[protocol]:
        raise LeakError(
            f"{run.path} was trained with protocol {protocol_of_run}, so it has seen the events that {protocol} tests: "
            f"train with --set protocol={_TRAINED_WITH[protocol]}"
        )


def _measure(
    runs: Sequence[LoadedRun], protocol: TestProtocol | Literal["test-file"], file: Path | None
) -> dict[str, Any]:
    run = runs[0]
    data = read_interactions(run.dataset, run.vocabulary, run.config, run.path)
    division = division_of(data, run.config, run.result)
    every, of_file = _targets(run, data, division, protocol, file)
    # A sample that is ranked among all items has wider intervals; all targets ranked among fewer items, or by an index
    # that misses some, would have a bias that no interval tells of.
    targets = every.sample(max(1, EXACT_SCORES // data.items), run.config.seed)
    if not len(targets):
        raise TrainingError(
            f"{run.path}: the data set has no event that {protocol} could test: its users need longer histories"
        )
    # A target that no training event names can be placed by content at best, and by no baseline: it would only lower
    # all of them, so it counts in `with_cold` alone.
    warm = np.flatnonzero(_known_rows(data, division)[targets.rows(data)])
    if not warm.size:
        raise TrainingError(
            f"{run.path}: no training event names an item of the {len(targets)} events that {protocol} tests, so "
            "nothing can be compared: hold out less, or measure new items with --protocol cold-items"
        )
    models = [ModelScorer(of_seed, data, targets) for of_seed in runs]
    # One set of baselines for all seeds: they have no random part but the sample that the first run has drawn.
    baselines, left_out = build_baselines(data, division, run.config, run.items)
    rankings = rank_all(models, baselines, data, targets, run.config.repeats)
    of_models, of_baselines = rankings[: len(models)], rankings[len(models) :]
    counts = popularity_of(data, division.train_end)
    by_name = {baseline.name: ranking for baseline, ranking in zip(baselines, of_baselines, strict=True)}
    summary = _summary(of_models, by_name, targets, warm)
    if parts := _parts(runs, baselines, rankings, data, targets, warm):
        summary["parts"] = parts
    facts = {one.name: one.facts for one in baselines if isinstance(one, EaseBaseline)}
    return {
        "protocol": protocol,
        "runs": [str(of_seed.path) for of_seed in runs],
        "seeds": [of_seed.config.seed for of_seed in runs],
        "users": int(np.unique(targets.users).size),
        "targets": len(targets),
        "held_out": len(every),
        "cold": len(targets) - warm.size,
        "items": data.items,
        "baselines_left_out": left_out,
        "ease": facts.get("ease"),
        "ease_local": facts.get("ease_local"),
        "blend": [of_seed.result["blend"] for of_seed in runs],
        **of_file,
        **summary,
        **report_future_events(data),
        "coverage@10": float(np.mean([coverage(ranking.top[warm], data.items) for ranking in of_models])),
        "novelty@10": float(np.mean([novelty(ranking.top[warm], counts) for ranking in of_models])),
    }


def _targets(
    run: LoadedRun,
    data: Interactions,
    division: Split,
    protocol: TestProtocol | Literal["test-file"],
    file: Path | None,
) -> tuple[Targets, dict[str, Any]]:
    """Returns the events that are tested; of a file also the counts of its rows, as `test`."""
    if protocol != "test-file":
        return held_out(data, run.config, protocol), {}
    assert file is not None
    targets, counts = read_targets(file, run, data, division)
    return targets, {"test": counts}


def _parts(
    runs: Sequence[LoadedRun],
    baselines: Sequence[Baseline],
    rankings: Sequence[Ranking],
    data: Interactions,
    targets: Targets,
    warm: npt.NDArray[np.int64],
) -> dict[str, Any]:
    """Measures apart what a mean over all would hide: cold targets, and where repeats count, repeats and new items.

    Repeats are most targets and easy ones, so new items are also ranked without those that their user had.
    """
    parts: dict[str, tuple[Sequence[Ranking], Targets, npt.NDArray[np.int64]]] = {}
    if runs[0].config.repeats:
        is_repeat = had_before(data, targets)[warm]
        alone = targets.take(warm[~is_repeat])
        models = [ModelScorer(run, data, alone) for run in runs]
        parts = {
            "repeats": (rankings, targets, warm[is_repeat]),
            "new": (rankings, targets, warm[~is_repeat]),
            "new_alone": (rank_all(models, baselines, data, alone, repeats=False), alone, np.arange(len(alone))),
        }
    parts["cold"] = (rankings, targets, np.setdiff1d(np.arange(len(targets)), warm))
    measured = {}
    for name, (of_part, part_targets, at) in parts.items():
        if at.size:
            pairs = zip(baselines, of_part[len(runs) :], strict=True)
            baseline_values = {baseline.name: _values(ranking) for baseline, ranking in pairs}
            compared = _compared(_mean_values(of_part[: len(runs)]), baseline_values, part_targets, at)
            measured[name] = {"targets": int(at.size), **compared}
    return measured


def _values(ranking: Ranking) -> _Values:
    return {metric: of(ranking.ranks) for metric, of in METRICS.items()}


def _mean_values(rankings: Sequence[Ranking]) -> _Values:
    return {metric: np.mean([of(ranking.ranks) for ranking in rankings], axis=0) for metric, of in METRICS.items()}


def _summary(
    of_models: Sequence[Ranking], by_name: Mapping[str, Ranking], targets: Targets, warm: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Returns means over seeds and users, with intervals, and the differences to each baseline."""
    model, baselines = _mean_values(of_models), {name: _values(ranking) for name, ranking in by_name.items()}
    return {
        **_compared(model, baselines, targets, warm),
        "by_seed": {
            metric: [float(of(ranking.ranks)[warm].mean()) for ranking in of_models] for metric, of in METRICS.items()
        },
        "with_cold": {
            name: {metric: float(values.mean()) for metric, values in metrics.items()}
            for name, metrics in {"model": model, **baselines}.items()
        },
        "segments": _by_history(targets.positions[warm], model["ndcg@10"][warm]),
    }


def _compared(
    model: _Values, baselines: Mapping[str, _Values], targets: Targets, at: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Returns the metrics of the model and of the baselines on some targets, and the differences between them.

    If some user has several targets, also `by_user`: the same with one value for each user, the mean of their targets,
    since a few users with many targets can decide a mean over targets.
    """
    users = targets.users[at]
    chosen = [{metric: of[at] for metric, of in values.items()} for values in (model, *baselines.values())]
    compared = _figures(chosen[0], dict(zip(baselines, chosen[1:], strict=True)), users)
    distinct, inverse, sizes = np.unique(users, return_inverse=True, return_counts=True)
    if distinct.size < users.size:
        means = [{metric: np.bincount(inverse, of) / sizes for metric, of in values.items()} for values in chosen]
        compared["by_user"] = {
            "users": int(distinct.size),
            **_figures(means[0], dict(zip(baselines, means[1:], strict=True)), distinct),
        }
    return compared


def _figures(model: _Values, baselines: Mapping[str, _Values], users: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Returns means with intervals by drawing users, and how the model stands to the best baseline."""
    # A difference is paired before its interval is taken: the targets' own spread, which is most of either interval,
    # cancels.
    figures: dict[str, dict[str, Any]] = {
        "metrics": {metric: interval(values, users) for metric, values in model.items()},
        "baselines": {
            name: {metric: float(values.mean()) for metric, values in metrics.items()}
            for name, metrics in baselines.items()
        },
        "paired": {
            name: {metric: interval(model[metric] - values, users) for metric, values in metrics.items()}
            for name, metrics in baselines.items()
        },
    }
    return figures | {"best_baseline": best_baseline(figures)}


def best_baseline(compared: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the baseline with the highest NDCG@10.

    Returns:
        Its `name`, its `ndcg@10`, `ahead` (the interval of model minus baseline), and `sentence`, which says in words
        how the model stands to it.
    """
    metric = "ndcg@10"
    name = max(compared["baselines"], key=lambda of: compared["baselines"][of][metric])
    value, ahead = compared["baselines"][name][metric], compared["paired"][name][metric]
    numbers = f"{compared['metrics'][metric]['mean']:.4f} against {value:.4f} of {name}, the best baseline"
    if ahead["low"] > 0:
        sentence = f"The model is ahead: NDCG@10 is {numbers}."
    elif ahead["high"] < 0:
        sentence = f"The model is worse than a baseline of a few lines: NDCG@10 is {numbers}. Do not serve it as it is."
    else:
        sentence = (
            f"The model is not ahead for certain: NDCG@10 is {numbers}, within the interval of the difference. "
            "Train with more events or other settings, or test on more users."
        )
    return {"name": name, metric: value, "ahead": ahead, "sentence": sentence}


def rank_all(
    models: Sequence[ModelScorer], baselines: Sequence[Baseline], data: Interactions, targets: Targets, repeats: bool
) -> list[Ranking]:
    """Ranks the targets by every scorer, a slice of the targets at a time: all scores do not fit into memory."""
    parts: list[list[Ranking]] = []
    for part in rank_slices(len(targets), data.items):
        batch = targets.take(np.arange(part.start, part.stop))
        seen_items = None if repeats else seen_before(data, batch)

        def masked(scores: Any, seen_items: list[npt.NDArray[np.int32]] | None = seen_items) -> Any:
            if seen_items is not None:
                mask_seen(scores, seen_items)
            return scores

        rankings = [model.rank(masked(model.relevance(part)), part) for model in models]
        rankings += [rank(masked(baseline.scores(batch)), batch.rows(data)) for baseline in baselines]
        parts.append(rankings)
    return [
        Ranking(
            np.concatenate([ranking.ranks for ranking in of_scorer]),
            np.concatenate([ranking.top for ranking in of_scorer]),
        )
        for of_scorer in zip(*parts, strict=True)
    ]


def rank(scores: Scores, rows: npt.NDArray[np.int32]) -> Ranking:
    """Ranks by one score; scores `[n, N]`."""
    size = min(TOP, scores.shape[1])
    top = np.argpartition(-scores, size - 1, axis=1)[:, :size]
    return Ranking(ranks_of(scores, rows), _page(top, np.take_along_axis(scores, top, axis=1)))


def _page(rows: npt.NDArray[np.int64], scores: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Returns the `TOP` of the rows `[n, C]` with the highest scores, best first; -1 for one that is masked."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    is_shown = np.isfinite(np.take_along_axis(scores, order, axis=1))
    return np.where(is_shown, np.take_along_axis(rows, order, axis=1), -1)


def _known_rows(data: Interactions, division: Split) -> npt.NDArray[np.bool_]:
    """Returns True for the items that training or validation events name; bool `[N]`."""
    return counts_of(data, division.fit_end) > 0


def _by_history(positions: npt.NDArray[np.int64], values: npt.NDArray[np.float64]) -> dict[str, dict[str, float]]:
    """Returns NDCG@10 by the number of events before the target."""
    segments = {}
    for low, high in zip(_HISTORY_BORDERS, (*_HISTORY_BORDERS[1:], 1 << 62), strict=True):
        inside = (positions >= low) & (positions < high)
        if inside.any():
            name = f"history {low}-{high - 1}" if high < 1 << 62 else f"history {low}+"
            segments[name] = {"ndcg@10": float(values[inside].mean()), "targets": int(inside.sum())}
    return segments
