"""`RUN/report.html`: one self-contained page of what was run on what, how it learned, and how good it is.

Everything is read from the run's own files, so a report can be written at any time and says nothing that they do not.
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
        into: The run in whose directory it is written and whose evaluations are shown; the first, if not said.
    """
    run = into or runs[0]
    config, result = (json.loads((run / name).read_text(encoding="utf-8")) for name in ("config.json", "result.json"))
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    text = page.render(
        title=run.resolve().name,
        subtitle=f"{result['people']:,} people, {result['items']:,} items, {result['events']:,} events; "
        f"held out: {config['protocol']}; seed {config['seed']}",
        facts=_facts(result),
        curves=_curves({one: _lines(one / "log.jsonl") for one in runs}),
        left_out=_left_out(result),
        rejections=result.get("rejections", []),
        evaluations=[_evaluation(part) for found in _newest(run) for part in (found, *_parts(found))],
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
    """What of the data was not learned from, or not as it stands; empty where there is no such thing."""
    rejected, future = result.get("rejected", 0), result.get("future_events", 0)
    return [
        *([("rejected rows", f"{rejected:,}")] if rejected else []),
        *((f"unread cells of {column}", f"{count:,}") for column, count in result.get("unread", {}).items()),
        *([("events from wrong clocks", f"{future:,}")] if future else []),
        *((f"unit of {column}", str(unit)) for column, unit in result.get("time_units", {}).items()),
    ]


def _provenance(run: Path, result: Mapping[str, Any]) -> list[tuple[str, str]]:
    made = result.get("circumstances", {})
    return [
        ("run", str(run)),
        ("data", str(result["data"])),
        ("data fingerprint", str(result["data_fingerprint"])),
        ("feature fingerprint", str(result["feature_fingerprint"])),
        ("event types", ", ".join(result["event_types"])),
        *((name, str(value)) for name, value in made.items()),
        ("test evaluations so far", str(len(_lines(run / "evaluations.jsonl")))),
    ]


def _newest(run: Path) -> list[dict[str, Any]]:
    """The newest evaluation of each protocol, in the order of their names."""
    newest = {found["protocol"]: found for found in _lines(run / "evaluations.jsonl")}
    return [newest[name] for name in sorted(newest)]


def _parts(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of an evaluation, each as an evaluation of its own."""
    facts = {"at": found["at"], "seeds": found["seeds"]}
    return [
        {**facts, "protocol": f"{found['protocol']}: {name}", **part} for name, part in found.get("parts", {}).items()
    ]


def _evaluation(found: Mapping[str, Any]) -> dict[str, Any]:
    """One evaluation as the template wants it."""
    metrics = found["metrics"]
    rows = [{"name": "this model", "ours": True, "cells": [_cell(metrics[name]) for name in metrics]}]
    if "warm" in found:
        rows.append({"name": "trained items", "ours": False, "cells": [_cell(found["warm"][name]) for name in metrics]})
    for name, values in found["baselines"].items():
        rows.append({"name": name, "ours": False, "cells": [_cell(values.get(metric)) for metric in metrics]})
    note = ", ".join(f"{found[name]:,} {name}" for name in ("users", "targets", "items") if name in found)
    seeds = None
    if len(found["seeds"]) > 1 and "by_seed" in found:
        columns = list(found["by_seed"].values())
        lines = zip(found["seeds"], *([f"{value:.4f}" for value in column] for column in columns), strict=True)
        seeds = {"metrics": list(found["by_seed"]), "rows": list(lines)}
    return {
        "protocol": found["protocol"],
        "note": f"{note}; measured {found['at']}; 95 % intervals over people",
        "metrics": list(metrics),
        "rows": rows,
        "plot": _beside(found),
        "seeds": seeds,
        "segments": _segments(found.get("segments", {})),
    }


def _cell(figure: Mapping[str, float] | float | None) -> dict[str, str]:
    if isinstance(figure, Mapping):
        return {"value": f"{figure['mean']:.4f}", "interval": f"{figure['low']:.4f} to {figure['high']:.4f}"}
    return {"value": "" if figure is None else f"{figure:.4f}", "interval": ""}


def _curves(logs: Mapping[Path, Sequence[Mapping[str, float]]]) -> str:
    """Loss and validation against events, and validation against seconds; "" where nothing was logged."""
    logs = {run: log for run, log in logs.items() if log}
    if not logs:
        return ""
    panels = (("tokens", "loss", "training loss"), ("tokens", "ndcg@10", "validation NDCG@10"))
    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(9.2, 2.7), layout="constrained")
        axes = figure.subplots(1, 3)
        for ax, (x, y, title) in zip(axes, (*panels, ("seconds", "ndcg@10", "validation NDCG@10")), strict=True):
            for number, (run, log) in enumerate(logs.items()):
                colour = _SERIES[number % len(_SERIES)]
                xs = [line[x] / (1e6 if x == "tokens" else 1) for line in log]
                ax.plot(xs, [line[y] for line in log], color=colour, marker="o", markersize=3, label=run.name)
            ax.set(title=title, xlabel="million events" if x == "tokens" else "seconds")
        if len(logs) > 1:
            axes[0].legend(labelcolor=_INK)
        return _svg(figure)


def _beside(found: Mapping[str, Any]) -> str:
    """NDCG@10 of the model, with its interval, beside the baselines; "" where these have none."""
    names = [name for name, values in found["baselines"].items() if "ndcg@10" in values]
    if not names or "ndcg@10" not in found["metrics"]:
        return ""
    ours = found["metrics"]["ndcg@10"]
    named = sorted(((found["baselines"][name]["ndcg@10"], name) for name in names), key=lambda pair: pair[0])
    error = [[0.0] * len(named) + [ours["mean"] - ours["low"]], [0.0] * len(named) + [ours["high"] - ours["mean"]]]
    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(9.2, 0.6 + 0.32 * (len(named) + 1)), layout="constrained")
        ax = figure.subplots()
        values = [value for value, _ in named] + [ours["mean"]]
        colours = [_SOFT] * len(named) + [_SERIES[0]]
        bars = _bars(ax, [name for _, name in named] + ["this model"], values, colours)
        ax.errorbar(values, range(len(values)), xerr=error, fmt="none", ecolor=_INK, capsize=3)
        ax.bar_label(bars, [f"{value:.4f}" for value in values[:-1]] + [""], padding=4, color=_INK)
        ax.set_title("NDCG@10 beside the baselines")
        return _svg(figure)


def _segments(segments: Mapping[str, Mapping[str, float]]) -> str:
    """NDCG@10 by segment; "" where there is none."""
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
    """The figure as an element of the page, in the page's colours."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    element = text.getvalue()[text.getvalue().index("<svg") :]
    for colour, variable in _VARIABLES.items():
        element = element.replace(colour, f"var({variable})")
    # Ids are the page's, not the figure's: two figures must not share them.
    mark = f"f{zlib.crc32(element.encode()):08x}-"
    return re.sub(r'(id="|"#|url\(#)', lambda found: f"{found[1]}{mark}", element)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
