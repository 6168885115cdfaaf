"""Writes one self-contained page of load results: latency against rate, growth, overload, comparisons.

Plots are drawn into the page as SVG, and nothing is fetched, so the file can be kept and sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.load.compare import compare
from benchmarks.load.plot import Line, plot
from benchmarks.report import BenchmarkError, is_dirty

TEMPLATE = Path(__file__).with_name("report.html.jinja")
_PERCENTILES = ("p50", "p90", "p99", "p99.9")


@dataclass
class _Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class _Part:
    """A section of the page, as the template reads it."""

    title: str
    note: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    plot: str = ""
    tables: list[_Table] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    command: str = ""
    machine: str = ""
    commit: str = ""
    at: str = ""


def write_page(results: Sequence[Path], out: Path) -> Path:
    """Writes a page of results; returns its path.

    Args:
        results: Files of `bench latency --out`, `bench overload --out` and `bench growth --serving`; two of latency at
            one rate are also compared.
        out: The page.

    Raises:
        BenchmarkError: A file is no such result.
    """
    loaded = [(path, _read(path)) for path in results]
    parts = [_part(path.stem, result) for path, result in loaded]
    rates = [(path, result) for path, result in loaded if _kind(result) is _latency]
    if len(rates) == 2:
        parts.append(_comparison(rates[0], rates[1]))
    # Names come from files and services, so all text is escaped; an unknown name in the template is an error.
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    title = f"Load test: {', '.join(path.stem for path in results)}"
    subtitle = "latencies count from the intended start of each request; a local generator shares the machine"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page.render(title=title, subtitle=subtitle, parts=parts), encoding="utf-8")
    return out


def _read(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path} is no result ({error}): give what --out wrote") from None
    if _kind(result) is None:
        raise BenchmarkError(f"{path} is no result of bench latency, overload or growth --serving: give such a file")
    return result


_Section = Callable[[Mapping[str, Any]], _Part]


def _kind(result: Mapping[str, Any]) -> _Section | None:
    kinds: tuple[tuple[str, _Section], ...] = (("kept", _overload), ("serving_growth", _growth), ("windows", _latency))
    return next((section for name, section in kinds if name in result), None)


def _part(name: str, result: Mapping[str, Any]) -> _Part:
    section = _kind(result)
    assert section is not None
    part = section(result)
    part.title = f"{name}: {part.title}"
    part.command, part.commit, part.at = (str(result.get(key, "")) for key in ("command", "commit", "at"))
    machine = result.get("machine", {})
    part.machine = f"{machine.get('processor', 'unknown machine')}, {machine.get('cores', '?')} cores"
    if is_dirty(part.commit):
        part.warnings.append("The tree had changes, so the commit does not say what was measured.")
    return part


def _latency(result: Mapping[str, Any]) -> _Part:
    part = _Part("latency", str(result.get("method", "")))
    if "highest_rate" in result:
        part.facts.append(("highest rate", f"{result['highest_rate']:,.0f}/s"))
    if "promise" in result:
        part.facts.append(("at p99 of at most", f"{result['promise']['p99_ms']:g} ms"))
    if result.get("at_half", {}).get("p99_over_p50"):
        part.facts.append(("p99/p50 at half of it", f"{result['at_half']['p99_over_p50']:.1f}"))
    if result.get("cpu_ms"):
        part.facts.append(("CPU of a request", f"{result['cpu_ms']:.2f} ms"))
    part.facts += [("requests", f"{result['requests']:,}"), ("errors", f"{sum(result['errors'].values()):,}")]
    curve = result.get("curve", [])
    if curve:
        part.plot = _curve(curve, result.get("promise", {}).get("p99_ms"))
        part.tables.append(_rates(curve))
    part.tables.append(_methods(result))
    if "quality" in result:
        part.tables.append(_quality(result["quality"]))
    part.warnings += _doubts(result)
    return part


def _curve(curve: Sequence[Mapping[str, Any]], limit: float | None) -> str:
    points = [point for point in curve if point["latency_ms"]]
    lines = [
        Line(name, [point["rate"] for point in points], [point["latency_ms"][name] for point in points])
        for name in ("p50", "p99", "p99.9")
    ]
    return plot(lines, "latency against rate", "requests a second", "ms", log_y=True, limit=limit)


def _rates(curve: Sequence[Mapping[str, Any]]) -> _Table:
    rows = []
    for point in curve:
        times = [f"{point['latency_ms'][name]:.2f}" if point["latency_ms"] else "" for name in _PERCENTILES]
        cpu = f"{point['cpu_ms']:.2f}" if "cpu_ms" in point else ""
        errors, lag = sum(point["errors"].values()), point["generator"]["lag_p99_ms"]
        rows.append([f"{point['rate']:,.0f}", *times, cpu, f"{errors:,}", f"{lag:.2f}"])
    return _Table(
        ["requests/s", *(f"{name} ms" for name in _PERCENTILES), "CPU ms", "errors", "generator late, p99 ms"], rows
    )


def _methods(result: Mapping[str, Any]) -> _Table:
    rows = [
        [
            name,
            f"{figures['calls']:,}",
            f"{figures['errors']:,}",
            *(_number(figures["latency_ms"], p) for p in _PERCENTILES),
        ]
        for name, figures in {**result["by_method"], "all": _all(result)}.items()
    ]
    head = [f"at {result['rate']:,.0f} requests/s", "calls", "errors", *(f"{name} ms" for name in _PERCENTILES)]
    return _Table(head, rows)


def _all(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "calls": result["requests"],
        "errors": sum(result["errors"].values()),
        "latency_ms": result["latency_ms"],
    }


def _number(times: Mapping[str, float], name: str) -> str:
    return f"{times[name]:.2f}" if name in times else ""


def _quality(quality: Mapping[str, Any]) -> _Table:
    rows = [
        [name, ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in figures.items())]
        for name, figures in quality.items()
        if isinstance(figures, Mapping) and name != "skipped"
    ]
    return _Table(["quality while loaded", ""], rows)


def _doubts(result: Mapping[str, Any]) -> list[str]:
    doubts = []
    eligibility = result.get("quality", {}).get("eligibility", {})
    if eligibility.get("shown"):
        doubts.append(f"{eligibility['shown']:,} withdrawn items were shown.")
    for name, reason in result.get("quality", {}).get("skipped", {}).items():
        doubts.append(f"Not checked: {name} ({reason}).")
    if result.get("degraded"):
        doubts.append(f"Degraded answers: {', '.join(f'{part} {n:,}' for part, n in result['degraded'].items())}.")
    late = max((window["generator"]["lag_p99_ms"] for window in result["windows"]), default=0.0)
    if result["latency_ms"] and late > result["latency_ms"]["p50"]:
        doubts.append(
            f"The generator itself was {late:.1f} ms late at its p99, more than the median latency: the machine was "
            "too busy for these figures to be the service's alone."
        )
    return doubts


def _growth(result: Mapping[str, Any]) -> _Part:
    sizes = result["serving_growth"]
    part = _Part("growth with the catalogue", str(result.get("method", "")))
    items = [float(size["items"]) for size in sizes]
    latencies = [Line(name, items, [size["latency_ms"][name] for size in sizes]) for name in ("p50", "p99")]
    part.plot = plot(latencies, "latency against items", "items", "ms", log_x=True)
    memory = [
        Line(name, items, [size[key] / 2**20 for size in sizes])
        for name, key in (("service", "service_bytes"), ("each further worker", "worker_bytes"))
    ]
    part.plot += plot(memory, "memory against items", "items", "MiB", log_x=True)
    rows = [
        [
            f"{size['items']:,}",
            *(_number(size["latency_ms"], name) for name in ("p50", "p99")),
            f"{size['service_bytes'] / 2**20:,.0f}",
            f"{size['worker_bytes'] / 2**20:,.0f}",
            f"{size['start_s']:.1f}",
        ]
        for size in sizes
    ]
    head = ["items", "p50 ms", "p99 ms", "service MiB", "each further worker MiB", "ready after s"]
    part.tables.append(_Table(head, rows))
    return part


def _overload(result: Mapping[str, Any]) -> _Part:
    part = _Part("overload", f"offered {result['offered_rate']:,.0f} requests a second")
    part.facts = [("highest rate", f"{result['highest_rate']:,.0f}/s"), ("recovery", f"{result['recovery_s']:.2f} s")]
    rows = [
        [
            name.replace("_", " "),
            f"{entry['value']:,.4g}",
            f"{entry['limit']:g}",
            "kept" if entry["kept"] else "NOT KEPT",
        ]
        for name, entry in result["kept"].items()
    ]
    part.tables.append(_Table(["", "value", "limit", ""], rows))
    rows = []
    for phase in ("interactive", "mixed"):
        for priority, figures in result[phase]["by_priority"].items():
            times = [_number(figures["latency_ms"], name) for name in ("p50", "p99")]
            rows.append([f"{phase}: {priority}", f"{figures['calls']:,}", f"{figures['served']:.2%}", *times])
    part.tables.append(_Table(["phase: traffic", "calls", "served", "p50 ms", "p99 ms"], rows))
    return part


def _comparison(first: tuple[Path, Mapping[str, Any]], second: tuple[Path, Mapping[str, Any]]) -> _Part:
    part = _Part(f"comparison: {second[0].stem} against {first[0].stem}")
    try:
        outcome = compare(first[1], second[1])
    except BenchmarkError as error:
        part.note = f"not compared: {error}"
        return part
    part.note = f"{outcome['verdict']}; 95 % intervals for all metrics at once"
    rows = [
        [name, f"{m['first']:.3f}", f"{m['second']:.3f}", f"{m['ratio']:.3f}", f"{m['low']:.3f} to {m['high']:.3f}"]
        for name, m in outcome["metrics"].items()
    ]
    part.tables.append(_Table(["", first[0].stem, second[0].stem, "ratio", "interval"], rows))
    part.warnings = list(outcome["warnings"])
    return part
