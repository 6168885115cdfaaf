"""Measures the ranker's probabilities on the impressions after the cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from features.action_rates import ActionRates, Rates
from features.errors import LeakError, TrainingError
from features.item_prior import blocks
from features.model_inputs import ranker_width
from training.data.clock import report_future_events
from training.data.histories import UserHistories
from training.data.impressions import NEVER, Examples, read_examples, read_slates
from training.data.interactions import Interactions
from training.data.point_in_time import features_of_example
from training.data.split import before_cut, cut_of
from training.fitting.ranker_impressions import RankerBatch, example_users, logits_of, ranker_batch
from training.metrics import RESAMPLES, Floats, auc, ece, gauc, log_loss, measure
from training.run import LoadedRun, admit_run, columns_of_run, load_runs
from training.runtime import exact, prepared
from training.train import Material, read_material

METRICS = ("auc", "gauc", "slate_gauc", "log_loss", "ece")
"""Metrics of probabilities: AUC; AUC within users; the same with a user's examples as one slate; log loss; ECE."""
DRAWS = RESAMPLES // 5
"""Bootstrap draws: fewer than elsewhere, because each needs a sort of all examples."""


@dataclass(frozen=True)
class Probabilities:
    """Probabilities of the actions on the same examples; float64 [n, A], or [n] of one action.

    Attributes:
        live: With each user's history up to the example, as in service.
        slate: With each user's history up to the cut: as if all their examples were the candidates of one request.
    """

    live: Floats
    slate: Floats

    def of(self, action: int) -> Probabilities:
        """Returns the probabilities of one action."""
        return Probabilities(self.live[:, action], self.slate[:, action])


@dataclass(frozen=True)
class ScoredExamples:
    """The impressions after the cut, with the probabilities of runs.

    Attributes:
        examples: The items shown, and the actions that followed.
        live: The same as the first run's ranker reads it.
        slate: The same with every user as they were at the cut.
        probabilities: The mean of the runs.
    """

    examples: Examples
    live: RankerBatch
    slate: RankerBatch
    probabilities: Probabilities


def evaluate_impressions(runs: Sequence[Path], data: Path | None = None) -> dict[str, Any]:
    """Measures how well the ranker's probabilities fit users' actions on the items shown after the temporal cut.

    Statistics of items and surfaces are those of the run, as its bundle serves them; a user's history goes up to each
    impression, as in service. If slates were logged of a share of users only (`weight`), each counts for as many as it
    stands for.

    Returns:
        `metrics` {`ACTION/METRIC`: {mean, low, high}} of the mean of the runs' probabilities, with `METRICS`;
        `baselines` {base_rate, item_rate, user_rate, item_user_surface: {`ACTION/METRIC`: value}}, learned before the
        cut, and their `baseline_intervals` {name: {`ACTION/METRIC`: [low, high]}}; `protocol`, `seeds`, `users`,
        `items`, `impressions`, `actions` {name: positives}.

    Raises:
        LeakError: A run was not trained with `protocol: temporal`.
        TrainingError: The data set has no impressions after the cut.
    """
    loaded = load_runs(runs, data)
    slates = read_slates(Path(data or loaded[0].result["data"]))
    left_out = admit_run(loaded[0], **({} if slates is None else {"impressions": slates.intake}))
    material, examples = read_test_material(loaded, data)
    first = loaded[0]
    with prepared(first.config.threads), exact(), torch.inference_mode():
        scored = predict_test(loaded, material.data, examples)
    left_out |= report_future_events(material.data)
    rates = baselines(first, material.data, examples, scored.examples)
    return compare(loaded, material.data.items, scored, rates) | left_out


def read_test_material(runs: Sequence[LoadedRun], data: Path | None) -> tuple[Material, Examples]:
    """Reads the data that the first run was trained on, and all impressions.

    Raises:
        LeakError: A run was not trained with `protocol: temporal`.
        TrainingError: The data set has no impressions.
    """
    for run in runs:
        if run.config.protocol != "temporal":
            raise LeakError(f"{run.path} was trained on the tested days: train with --set protocol=temporal")
    first = runs[0]
    path = Path(data or first.result["data"])
    material = read_material(first.dataset, first.config, torch.device("cpu"), first.path)
    examples = read_examples(
        path,
        material.dataset,
        material.vocabulary,
        material.data,
        material.actions,
        first.config.methods,
        material.moments,
    )
    if examples is None:
        raise TrainingError(f"{path} has no table impressions, which this protocol measures on: use another protocol")
    return material, examples


def compare(
    runs: Sequence[LoadedRun], items: int, scored: ScoredExamples, scorers: Mapping[str, Probabilities]
) -> dict[str, Any]:
    """Returns the result of `evaluate_impressions`; `scorers` are the baselines to compare with."""
    labels, users, weights = scored.examples.labels(), scored.examples.users, scored.examples.unequal_weights
    names = [action["name"] for action in runs[0].result["actions"]]

    def metrics(probabilities: Probabilities) -> dict[str, dict[str, float]]:
        return {
            f"{name}/{metric}": value
            for number, name in enumerate(names)
            for metric, value in measure_action(labels[:, number], probabilities.of(number), users, weights).items()
        }

    by_scorer = {name: metrics(probabilities) for name, probabilities in scorers.items()}
    return {
        "protocol": "impressions",
        "runs": [str(run.path) for run in runs],
        "seeds": [run.config.seed for run in runs],
        "users": int(np.unique(users).size),
        "items": items,
        "impressions": len(scored.examples),
        "actions": {name: int(count) for name, count in zip(names, labels.sum(0), strict=True)},
        "metrics": metrics(scored.probabilities),
        "baselines": {
            scorer: {name: value["mean"] for name, value in values.items()} for scorer, values in by_scorer.items()
        },
        "baseline_intervals": {
            scorer: {name: [value["low"], value["high"]] for name, value in values.items()}
            for scorer, values in by_scorer.items()
        },
    }


def predict_test(runs: Sequence[LoadedRun], data: Interactions, examples: Examples) -> ScoredExamples:
    """Predicts the actions on the impressions after the cut.

    Raises:
        TrainingError: There are none.
    """
    config = runs[0].config
    tested = examples.between(cut_of(data, config), NEVER)
    if not len(tested):
        raise TrainingError(
            "the data set has no impression of a user with events after the cut: hold out more with --set test_days=N"
        )
    # GAUC keeps users with positives and negatives. For them, live histories tell against the truth: of two examples
    # with one action, the second was acted on if the first was not, and a history with the first action rightly raises
    # the second's probability (docs/decisions/0006). So the slate metric stops every history at the cut.
    at_cut = np.minimum(tested.positions, before_cut(data, config)[tested.users])
    as_slate = dataclasses.replace(tested, positions=at_cut)
    batches = [[_batch(run, data, some_examples) for some_examples in (tested, as_slate)] for run in runs]
    probabilities = [
        [torch.sigmoid(logits_of(run.ranker, batch)).double().numpy() for batch in live_and_slate]
        for run, live_and_slate in zip(runs, batches, strict=True)
    ]
    live, slate = batches[0]
    return ScoredExamples(tested, live, slate, Probabilities(*np.mean(probabilities, axis=0)))


def _batch(run: LoadedRun, data: Interactions, examples: Examples) -> RankerBatch:
    """Assembles examples as the run's bundle would read them."""
    columns, action_rates = columns_of_run(run), ActionRates.of(run.result)
    table = torch.from_numpy(run.item_vectors)
    users = example_users(run.user_encoder, table, data, examples, run.config)
    features = np.empty((len(examples), ranker_width(len(action_rates), len(run.declared))), np.float32)
    histories = UserHistories(data, columns)
    for at in range(len(examples)):
        features[at] = features_of_example(histories, examples, at, users[at], run.linear, columns, action_rates)
    return ranker_batch(users, run.item_vectors[examples.rows], features, examples.labels())


def baselines(run: LoadedRun, data: Interactions, examples: Examples, tested: Examples) -> dict[str, Probabilities]:
    """Predicts by plain rates, all learned before the cut: of all examples, of items, of users, and of all at once.

    Args:
        run: Holds the rates of items and surfaces.
        data: The events, for the rates of users.
        examples: All impressions, for the rate of all examples.
        tested: The examples to predict.

    Returns:
        Probabilities by name.
    """
    cut = cut_of(data, run.config)
    before = examples.between(-1, cut)
    rate = np.average(before.labels(cut), axis=0, weights=before.unequal_weights)
    action_rates = ActionRates.of(run.result)
    # An action that never or always followed still has log-odds, so that the log loss is finite.
    base = np.log((rate + 1e-6) / (1 - rate + 1e-6))
    item = blocks(run.statistics)[0][tested.rows].astype(np.float64)
    ends = before_cut(data, run.config)
    users, user_indices = np.unique(tested.users, return_inverse=True)
    columns = columns_of_run(run)
    rates, histories = np.empty((users.size, len(action_rates))), UserHistories(data, columns)
    for at, number in enumerate(users.tolist()):
        history = histories.before(number, int(ends[number]))
        rates[at] = Rates.of(action_rates, history.types, history.values).long - action_rates.base
    user = rates[user_indices]
    surfaces = np.stack([action_rates.surface(name) for name in tested.surfaces])[tested.surface_indices]
    logits = {
        "base_rate": np.broadcast_to(base, item.shape),
        "item_rate": base + item,
        "user_rate": base + user,
        "item_user_surface": action_rates.base + surfaces + item + user,
    }
    probabilities = {name: 1 / (1 + np.exp(-of_scorer)) for name, of_scorer in logits.items()}
    # Rates do not change within the test, so the live probabilities are those of the slate.
    return {name: Probabilities(of_scorer, of_scorer) for name, of_scorer in probabilities.items()}


def measure_action(
    labels: npt.NDArray[np.bool_],
    probabilities: Probabilities,
    users: npt.NDArray[np.int64],
    weights: Floats | None = None,
) -> dict[str, dict[str, float]]:
    """Returns the `METRICS` of one action's probabilities with intervals over users: {mean, low, high} each."""
    values = metric_values(labels, probabilities, users, weights)
    return with_intervals(values, resample_metrics(labels, probabilities, users, weights))


def with_intervals(values: Floats, drawn: Floats) -> dict[str, dict[str, float]]:
    """Returns {mean, low, high} of each of the `METRICS`; values [M], drawn [draws, M]."""
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    return {
        name: {"mean": float(values[at]), "low": float(low[at]), "high": float(high[at])}
        for at, name in enumerate(METRICS)
    }


def metric_values(
    labels: npt.NDArray[np.bool_],
    probabilities: Probabilities,
    users: npt.NDArray[np.int64],
    weights: Floats | None = None,
) -> Floats:
    """Returns the `METRICS` of one action's probabilities; float64 [M]."""
    values = measure(labels, probabilities.live, users, weights)
    values["slate_gauc"] = gauc(labels, probabilities.slate, users, weights)
    return np.array([values[name] for name in METRICS])


def resample_metrics(
    labels: npt.NDArray[np.bool_],
    probabilities: Probabilities,
    users: npt.NDArray[np.int64],
    weights: Floats | None = None,
) -> Floats:
    """Draws users with replacement and measures each draw, the same draws for every action and scorer.

    Returns:
        The `METRICS` by draw; float64 [draws, M], NaN where a draw has none.
    """
    rng = np.random.default_rng(0)
    _, groups, sizes = np.unique(users, return_inverse=True, return_counts=True)
    masses = sizes if weights is None else np.bincount(groups, weights)
    # A user's AUC is the same in every draw, so it is computed once and weighted by how often the user is drawn.
    by_user = [_auc_by_user(labels, scores, groups, weights) for scores in (probabilities.live, probabilities.slate)]
    # One sort for all draws: a repeated element of a sorted array stays in place.
    order = np.argsort(probabilities.live, kind="stable")
    out = np.empty((DRAWS, len(METRICS)))
    for draw in out:
        times = np.bincount(rng.integers(0, sizes.size, sizes.size), minlength=sizes.size)
        at = np.repeat(order, times[groups[order]])
        y, p = labels[at], probabilities.live[at]
        w = None if weights is None else weights[at]
        gaucs = [_weighted_mean(values, times * masses) for values in by_user]
        draw[:] = auc(y, p, w), *gaucs, log_loss(y, p, w), ece(y, p, weights=w)
    return out


def _auc_by_user(
    labels: npt.NDArray[np.bool_], scores: Floats, groups: npt.NDArray[np.int64], weights: Floats | None
) -> Floats:
    """Returns the AUC inside each user's examples, NaN without positives or negatives; users are numbered from 0."""
    order = np.argsort(groups, kind="stable")
    by_user = np.split(order, np.cumsum(np.bincount(groups))[:-1])
    return np.array([auc(labels[at], scores[at], None if weights is None else weights[at]) for at in by_user])


def _weighted_mean(values: Floats, weights: npt.NDArray[Any]) -> float:
    """Returns the weighted mean of the values that are not NaN; NaN if all are."""
    is_number = ~np.isnan(values)
    mass = weights[is_number].sum()
    return float(values[is_number] @ weights[is_number] / mass) if mass else float("nan")
