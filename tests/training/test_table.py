from __future__ import annotations

import math
from typing import Any

from training.evaluation.table import evaluation_table


def figure(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}


EVENTS: dict[str, Any] = {
    "protocol": "leave-one-out",
    "runs": ["/somewhere/runs/first", "second"],
    "users": 1600,
    "targets": 1600,
    "items": 40,
    "cold": 3,
    "metrics": {"hit@10": figure(0.5), "ndcg@10": figure(0.25)},
    "baselines": {"popular": {"hit@10": 0.1, "ndcg@10": 0.05}, "ease": {"hit@10": 0.6, "ndcg@10": 0.3}},
    "paired": {"popular": {"ndcg@10": figure(0.2)}, "ease": {"ndcg@10": figure(-0.05)}},
}


def test_baselines_stand_below_the_model_the_best_first() -> None:
    assert evaluation_table(EVENTS).splitlines() == [
        "leave-one-out of first, second: 1,600 users, 1,600 targets, 40 items; in brackets 95 % intervals over users",
        "            hit@10                     ndcg@10                    model ahead, ndcg@10",
        "this model  0.5000 (0.4900 to 0.5100)  0.2500 (0.2400 to 0.2600)  -",
        "ease        0.6000                     0.3000                     -0.0500 (-0.0600 to -0.0400)",
        "popular     0.1000                     0.0500                     +0.2000 (+0.1900 to +0.2100)",
        "3 targets are of items that no training event names; with_cold and cold count them",
    ]


def test_parts_have_tables_of_their_own() -> None:
    part = {name: EVENTS[name] for name in ("metrics", "baselines", "paired")}
    lines = evaluation_table({**EVENTS, "cold": 0, "parts": {"repeats": {"targets": 12, **part}}}).splitlines()
    assert lines[5:7] == ["", "repeats: 12 targets"]
    assert lines[1:5] == lines[7:]


def test_figures_by_user_and_verdicts_stand_below_each_table() -> None:
    figures = {name: EVENTS[name] for name in ("metrics", "baselines", "paired")}
    verdicts = {name: {"best_baseline": {"sentence": f"{name} is told."}} for name in ("targets", "users", "part")}
    part = {"targets": 12, **figures, **verdicts["part"]}
    by_user = {"users": 7, **figures, **verdicts["users"]}
    lines = evaluation_table(
        {**EVENTS, **verdicts["targets"], "cold": 0, "by_user": by_user, "parts": {"cold": part}}
    ).splitlines()
    assert lines[5:7] == ["targets is told.", "by user, each of the 7 counting once:"]
    assert lines[7:11] == lines[1:5]
    assert lines[11:14] == ["users is told.", "", "cold: 12 targets"]
    assert lines[-1] == "part is told."


def test_many_metrics_stand_below_one_another() -> None:
    metrics = {f"{action}/{name}": 0.5 for action in ("click", "like") for name in ("auc", "gauc", "ece", "log_loss")}
    evaluation = {
        "protocol": "impressions",
        "runs": ["run"],
        "users": 2,
        "impressions": 9,
        "items": 4,
        "metrics": {name: figure(value) for name, value in metrics.items()},
        "baselines": {"base_rate": {**metrics, "like/auc": math.nan}},
    }
    lines = evaluation_table(evaluation).splitlines()
    assert lines[1].split() == ["this", "model", "base_rate"]
    assert [line.split()[0] for line in lines[2:]] == list(metrics)
    assert next(line for line in lines if line.startswith("like/auc")).endswith("-")
    assert "9 impressions" in lines[0]


def test_protocols_without_baselines_have_tables_too() -> None:
    metrics = {"recall@10": figure(0.2), "ndcg@10": figure(0.1)}
    cold = {"protocol": "cold-items", "runs": ["run"], "users": 3, "targets": 4, "items": 5, "baselines": {}}
    lines = evaluation_table({**cold, "metrics": metrics, "warm": metrics}).splitlines()
    assert [line.partition("  ")[0] for line in lines[2:]] == ["this model", "trained items"]
    search = {"protocol": "search", "runs": ["run"], "users": 0, "queries": 7, "items": 5, "baselines": {}}
    assert "intervals over queries" in evaluation_table({**search, "metrics": metrics})
