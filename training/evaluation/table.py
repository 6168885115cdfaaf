"""Lays out the result of an evaluation as a table for a reader."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

MODEL = "this model"
WIDE = 6
"""Metrics in one row at most; with more, each metric is a row."""
_COUNTS = ("users", "targets", "impressions", "queries", "items")
_DECISIVE = "ndcg@10"
"""The metric by which the baselines are put in order, and whose difference is shown."""


def evaluation_table(evaluation: Mapping[str, Any]) -> str:
    """Returns the metrics of an evaluation next to those of the baselines, the best first, as lines of text.

    Args:
        evaluation: The result of `evaluate`.

    Returns:
        A heading and a table for the whole, by user where this differs, and for each of its `parts`.
    """
    runs = ", ".join(PurePath(run).name for run in evaluation["runs"])
    counts = ", ".join(f"{evaluation[name]:,} {name}" for name in _COUNTS if evaluation.get(name))
    of = "queries" if "queries" in evaluation else "users"
    lines = [f"{evaluation['protocol']} of {runs}: {counts}; in brackets 95 % intervals over {of}", *_table(evaluation)]
    if evaluation.get("cold"):
        lines.append(
            f"{evaluation['cold']:,} targets are of items that no training event names; with_cold and cold count them"
        )
    lines += [*_verdict(evaluation), *_by_user(evaluation)]
    lines += [f"left out: {name}, as {why}" for name, why in evaluation.get("baselines_left_out", {}).items()]
    for name, part in evaluation.get("parts", {}).items():
        lines += ["", f"{name}: {part['targets']:,} targets", *_table(part), *_verdict(part), *_by_user(part)]
    return "\n".join(lines)


def _verdict(figures: Mapping[str, Any]) -> list[str]:
    best = figures.get("best_baseline")
    return [best["sentence"]] if best else []


def _by_user(evaluation: Mapping[str, Any]) -> list[str]:
    figures = evaluation.get("by_user")
    if not figures:
        return []
    return [f"by user, each of the {figures['users']:,} counting once:", *_table(figures), *_verdict(figures)]


def _table(evaluation: Mapping[str, Any]) -> list[str]:
    metrics = list(evaluation["metrics"])
    scorers = {MODEL: evaluation["metrics"], **_named("trained items", evaluation.get("warm"))}
    baselines = evaluation["baselines"]
    if all(_DECISIVE in values for values in baselines.values()):
        baselines = dict(sorted(baselines.items(), key=lambda pair: -pair[1][_DECISIVE]))
    scorers |= baselines
    rows = [["", *metrics], *([name, *(_cell(values.get(m)) for m in metrics)] for name, values in scorers.items())]
    paired = evaluation.get("paired", {})
    if any(_DECISIVE in differences for differences in paired.values()):
        rows[0].append(f"model ahead, {_DECISIVE}")
        for row in rows[1:]:
            row.append(_cell(paired.get(row[0], {}).get(_DECISIVE), signed=True))
    if len(metrics) > WIDE:
        rows = [list(column) for column in zip(*rows, strict=True)]
    return _aligned(rows)


def _named(name: str, metrics: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    return {} if metrics is None else {name: metrics}


def _cell(figure: Mapping[str, float] | float | None, signed: bool = False) -> str:
    """Returns a figure with its interval, if it has one; "-" for none, as for a rate of nothing."""
    sign = "+" if signed else ""
    if isinstance(figure, Mapping):
        return f"{_cell(figure['mean'], signed)} ({_cell(figure['low'], signed)} to {_cell(figure['high'], signed)})"
    return "-" if figure is None or not math.isfinite(figure) else f"{figure:{sign}.4f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]
