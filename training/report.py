"""Writes `RUN/report.html`: one self-contained page of a run's data and versions, learning curves and metrics.

All of it is read from the run's own files, so a report can be written at any time and adds nothing to them.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

REPORT = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.jinja")
# Colours that nothing else uses stand for the page's own, which differ between light and dark.
_INK, _SOFT, _LINE = "#010203", "#010204", "#010205"
_SERIES = ("#010210", "#010211", "#010212", "#010213", "#010214")
_VARIABLES = {_INK: "--ink", _SOFT: "--soft", _LINE: "--line", **{c: f"--c{n}" for n, c in enumerate(_SERIES)}}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "penchant",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _SOFT,
    "axes.edgecolor": _LINE,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "legend.frameon": False,
    "figure.facecolor": "none",
}


def write_report(runs: Sequence[Path], into: Path | None = None) -> Path:
    """Writes the report of finished runs that differ by their seed; returns its path.

    Args:
        runs: Their curves are drawn together.
        into: The run in whose directory it is written and whose evaluations are shown; None is the first.
    """
    run = into or runs[0]
    config, result = (json.loads((run / name).read_text(encoding="utf-8")) for name in ("config.json", "result.json"))
    # Names come from the data, so all text is escaped; an unknown name in the template is an error.
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    text = page.render(
        title=run.resolve().name,
        subtitle=f"{result['people']:,} users, {result['items']:,} items, {result['events']:,} events; "
        f"held out: {config['protocol']}; seed {config['seed']}",
        facts=_facts(result),
        curves=_curves({path: _lines(path / "log.jsonl") for path in runs}),
        left_out=_left_out(result),
        rejections=result.get("rejections", []),
        evaluations=[_evaluation(part) for evaluation in _newest(run) for part in (evaluation, *_parts(evaluation))],
        provenance=_provenance(run, result),
        config=config.items(),
    )
    (run / REPORT).write_text(text, encoding="utf-8")
    return run / REPORT


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    validation = result["best_validation"].get("ndcg@10")
    return [
        ("validation NDCG@10", "none" if validation is None else f"{validation:.4f}"),
        ("training", f"{result['seconds']:,.0f} s"),
        ("events a second", f"{result['tokens_per_second']:,.0f}"),
        ("epochs", f"{result['epochs']:,}"),
        ("parameters", f"{result['parameters']:,}"),
        ("ranker's blend", f"{result['blend']:g}"),
    ]


def _left_out(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the parts of the data that were left out, or read differently; empty if there are none."""
    rejected, future = result.get("rejected", 0), result.get("future_events", 0)
    return [
        *([("rejected rows", f"{rejected:,}")] if rejected else []),
        *((f"unread cells of {column}", f"{count:,}") for column, count in result.get("unread", {}).items()),
        *([("events from wrong clocks", f"{future:,}")] if future else []),
        *((f"unit of {column}", str(unit)) for column, unit in result.get("time_units", {}).items()),
    ]


def _provenance(run: Path, result: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = result.get("circumstances", {})
    return [
        ("run", str(run)),
        ("data", str(result["data"])),
        *([("began from", str(result["start"]["run"]))] if "start" in result else []),
        ("data fingerprint", str(result["data_fingerprint"])),
        ("feature fingerprint", str(result["feature_fingerprint"])),
        ("event types", ", ".join(result["event_types"])),
        *((name, str(value)) for name, value in versions.items()),
        ("test evaluations so far", str(len(_lines(run / "evaluations.jsonl")))),
    ]


def _newest(run: Path) -> list[dict[str, Any]]:
    """Returns the newest evaluation of each protocol, in the order of their names."""
    newest = {evaluation["protocol"]: evaluation for evaluation in _lines(run / "evaluations.jsonl")}
    return [newest[name] for name in sorted(newest)]


def _parts(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the figures by user and the parts of an evaluation, each as an evaluation of its own."""
    facts = {"at": evaluation["at"], "seeds": evaluation["seeds"]}
    parts = []
    for name, part in {"": evaluation, **evaluation.get("parts", {})}.items():
        protocol = f"{evaluation['protocol']}: {name}" if name else evaluation["protocol"]
        if name:
            parts.append({**facts, "protocol": protocol, **part})
        if "by_user" in part:
            parts.append({**facts, "protocol": f"{protocol}, each user counting once", **part["by_user"]})
    return parts


def _evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one evaluation as the template reads it."""
    metrics = evaluation["metrics"]
    scorers = {"this model": metrics}
    if "warm" in evaluation:
        scorers["trained items"] = evaluation["warm"]
    scorers |= evaluation["baselines"]
    rows: list[dict[str, Any]] = [
        {"name": name, "ours": values is metrics, "cells": [_cell(values.get(metric)) for metric in metrics]}
        for name, values in scorers.items()
    ]
    columns = list(metrics)
    paired = evaluation.get("paired", {})
    if any("ndcg@10" in differences for differences in paired.values()):
        columns.append("model ahead, ndcg@10")
        for row in rows:
            row["cells"].append(_cell(paired.get(row["name"], {}).get("ndcg@10"), sign="+"))
    note = ", ".join(f"{evaluation[name]:,} {name}" for name in ("users", "targets", "items") if name in evaluation)
    if evaluation.get("held_out", 0) > evaluation.get("targets", 0):
        note += f"; the targets are a random sample of the {evaluation['held_out']:,} that were held out"
    left_out = evaluation.get("baselines_left_out", {})
    remarks = [evaluation.get("best_baseline", {}).get("sentence", "")]
    remarks += [f"Left out: {name}, as {why}." for name, why in left_out.items()]
    if evaluation.get("cold"):
        model = evaluation["with_cold"]["model"]
        means = ", ".join(f"{metric} {value:.4f}" for metric, value in model.items())
        remarks.append(f"With the {evaluation['cold']:,} targets of items that no training event names: {means}.")
    return {
        "protocol": evaluation["protocol"],
        "note": f"{note}; measured {evaluation['at']}; 95 % intervals over users",
        "metrics": columns,
        "rows": rows,
        "remarks": [remark for remark in remarks if remark],
        "plot": _plot_baselines(evaluation),
        "seeds": _seeds(evaluation),
        "segments": _segments(evaluation.get("segments", {})),
    }


def _seeds(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the metrics of each seed as the template reads them, None of a single one."""
    if len(evaluation["seeds"]) < 2 or "by_seed" not in evaluation:
        return None
    # A figure of each seed, not only their mean: it shows how far a gain lies above the noise of a training.
    columns = ([f"{value:.4f}" for value in column] for column in evaluation["by_seed"].values())
    lines = list(zip(evaluation["seeds"], *columns, strict=True))
    return {"metrics": list(evaluation["by_seed"]), "rows": lines}


def _cell(figure: Mapping[str, float] | float | None, sign: str = "") -> dict[str, str]:
    if isinstance(figure, Mapping):
        mean, low, high = (f"{figure[name]:{sign}.4f}" for name in ("mean", "low", "high"))
        return {"value": mean, "interval": f"{low} to {high}"}
    return {"value": "" if figure is None else f"{figure:{sign}.4f}", "interval": ""}


def _curves(logs: Mapping[Path, Sequence[Mapping[str, float | None]]]) -> str:
    """Plots losses and validation against events, and validation against seconds; "" if no validation was logged."""
    logs = {run: log for run, log in logs.items() if log}
    if not logs:
        return ""
    panels = (("tokens", "loss", "training loss, dashed: validation"), ("tokens", "ndcg@10", "validation NDCG@10"))
    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(9.2, 2.7), layout="constrained")
        axes = figure.subplots(1, 3)
        for ax, (x, y, title) in zip(axes, (*panels, ("seconds", "ndcg@10", "validation NDCG@10")), strict=True):
            for number, (run, log) in enumerate(logs.items()):
                colour = _SERIES[number % len(_SERIES)]
                xs = _numbers(log, x) / (1e6 if x == "tokens" else 1)
                ax.plot(xs, _numbers(log, y), color=colour, marker="o", markersize=3, label=run.name)
                if y == "loss":
                    ax.plot(xs, _numbers(log, "validation_loss"), color=colour, linestyle="--")
            ax.set(title=title, xlabel="million events" if x == "tokens" else "seconds")
        if len(logs) > 1:
            axes[0].legend(labelcolor=_INK)
        return _svg(figure)


def _numbers(log: Sequence[Mapping[str, float | None]], name: str) -> npt.NDArray[np.float64]:
    """Returns a figure of each line of a log; NaN, which is not drawn, where a line or an older version has none."""
    return np.array([np.nan if line.get(name) is None else line[name] for line in log], np.float64)


def _plot_baselines(evaluation: Mapping[str, Any]) -> str:
    """Plots NDCG@10 of the model, with its interval, and of the baselines; "" if these have none."""
    names = [name for name, values in evaluation["baselines"].items() if "ndcg@10" in values]
    if not names or "ndcg@10" not in evaluation["metrics"]:
        return ""
    model = evaluation["metrics"]["ndcg@10"]
    named = sorted(((evaluation["baselines"][name]["ndcg@10"], name) for name in names), key=lambda pair: pair[0])
    error = [[0.0] * len(named) + [model["mean"] - model["low"]], [0.0] * len(named) + [model["high"] - model["mean"]]]
    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(9.2, 0.6 + 0.32 * (len(named) + 1)), layout="constrained")
        ax = figure.subplots()
        values = [value for value, _ in named] + [model["mean"]]
        colours = [_SOFT] * len(named) + [_SERIES[0]]
        bars = _bars(ax, [name for _, name in named] + ["this model"], values, colours)
        ax.errorbar(values, range(len(values)), xerr=error, fmt="none", ecolor=_INK, capsize=3)
        ax.bar_label(bars, [f"{value:.4f}" for value in values[:-1]] + [""], padding=4, color=_INK)
        ax.set_title("NDCG@10 and the baselines")
        return _svg(figure)


def _segments(segments: Mapping[str, Mapping[str, float]]) -> str:
    """Plots NDCG@10 by segment; "" if there is none."""
    if not segments:
        return ""
    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(9.2, 0.6 + 0.32 * len(segments)), layout="constrained")
        ax = figure.subplots()
        names = [f"{name} ({values['targets']:,} targets)" for name, values in segments.items()]
        bars = _bars(ax, names[::-1], [values["ndcg@10"] for values in segments.values()][::-1], _SERIES[:1])
        ax.bar_label(bars, fmt="%.4f", padding=4, color=_INK)
        ax.set_title("NDCG@10")
        return _svg(figure)


def _bars(ax: Axes, names: Sequence[str], values: Sequence[float], colours: Sequence[str]) -> BarContainer:
    bars = ax.barh(range(len(names)), values, color=colours, height=0.62)
    ax.set_yticks(range(len(names)), names)
    ax.grid(axis="y", visible=False)
    return bars


def _svg(figure: Figure) -> str:
    """Returns the figure as an element of the page, in the page's colours."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    element = text.getvalue()[text.getvalue().index("<svg") :]
    for colour, variable in _VARIABLES.items():
        element = element.replace(colour, f"var({variable})")
    # Ids are the page's, not the figure's: two figures must not share them.
    mark = f"f{zlib.crc32(element.encode()):08x}-"
    return re.sub(r'(id="|"#|url\(#)', lambda match: f"{match[1]}{mark}", element)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
