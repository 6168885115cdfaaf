"""Plots as SVG in the colours of the page that they stand in, without a library: a few lines on two axes."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 120, 28, 40
_SERIES = 5


@dataclass(frozen=True)
class Line:
    """A named line.

    Attributes:
        name: Its name.
        xs: Its points, ascending.
        ys: As many.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class _Axis:
    """A scale from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def at(self, value: float) -> float:
        """Returns the place of a value, in pixels."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        return self.start + (self._scaled(value) - low) / max(high - low, 1e-12) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Returns round values within the axis."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if self.high / self.low < 1000 else (1,)
            values = [step * 10.0**power for power in powers for step in steps]
        else:
            step = 10 ** math.floor(math.log10(max(self.high - self.low, 1e-9)))
            step *= 0.2 if (self.high - self.low) / step < 2 else 0.5 if (self.high - self.low) / step < 5 else 1
            values = [n * step for n in range(math.floor(self.low / step), math.ceil(self.high / step) + 1)]
        return [value for value in values if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, 1e-9)) if self.log else value


def plot(
    lines: Sequence[Line],
    title: str,
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    limit: float | None = None,
) -> str:
    """Returns a plot of lines as an SVG element; "" if there is no point.

    Args:
        lines: The lines.
        title: Its title.
        x_label: What x counts, with its unit.
        y_label: What y counts, with its unit.
        log_x: Powers of ten are equally far apart on the x axis.
        log_y: The same of the y axis.
        limit: A value of y that is marked by a dashed line.
    """
    xs = [x for line in lines for x in line.xs]
    ys = [y for line in lines for y in line.ys] + ([limit] if limit else [])
    if not xs:
        return ""
    x_axis = _axis(xs, _LEFT, _WIDTH - _RIGHT, log_x)
    y_axis = _axis(ys, _HEIGHT - _BOTTOM, _TOP, log_y)
    parts = [*_grid(x_axis, y_axis, x_label, y_label)]
    if limit:
        parts.append(_segment(_LEFT, y_axis.at(limit), _WIDTH - _RIGHT, y_axis.at(limit), "var(--c1)", "4 4"))
    for number, line in enumerate(lines):
        parts += _drawn(line, x_axis, y_axis, f"var(--c{number % _SERIES})")
    parts += _names(lines, y_axis)
    parts.append(_text(_LEFT, 14, title, "start", "var(--ink)"))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img" font-size="11" '
        f'font-family="system-ui, sans-serif"><title>{html.escape(title)}</title>{"".join(parts)}</svg>'
    )


def _axis(values: Sequence[float], start: float, end: float, log: bool) -> _Axis:
    low, high = (min(values), max(values)) if log else (min(0.0, *values), max(values))
    if low == high:
        low, high = (low / 2, high * 2) if log else (low, high + 1)
    return _Axis(max(low, 1e-9) if log else low, high, start, end, log)


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> list[str]:
    parts = []
    for value in y_axis.ticks():
        y = y_axis.at(value)
        parts += [
            _segment(_LEFT, y, _WIDTH - _RIGHT, y, "var(--line)"),
            _text(_LEFT - 6, y + 4, f"{value:,g}", "end"),
        ]
    for value in x_axis.ticks():
        x = x_axis.at(value)
        parts += [
            _segment(x, _TOP, x, _HEIGHT - _BOTTOM, "var(--line)"),
            _text(x, _HEIGHT - _BOTTOM + 15, f"{value:,.10g}", "middle"),
        ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    return [*parts, _text(middle, _HEIGHT - 8, x_label, "middle"), _text(_LEFT - 6, _TOP - 8, y_label, "end")]


def _drawn(line: Line, x_axis: _Axis, y_axis: _Axis, colour: str) -> list[str]:
    points = [(x_axis.at(x), y_axis.at(y)) for x, y in zip(line.xs, line.ys, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points]
    return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>', *dots]


def _names(lines: Sequence[Line], y_axis: _Axis) -> list[str]:
    # Each name stands at the end of its line, moved down where another one would cover it.
    ends = sorted((y_axis.at(line.ys[-1]), number, line.name) for number, line in enumerate(lines) if line.ys)
    parts, last = [], -math.inf
    for y, number, name in ends:
        last = max(y, last + 13)
        parts.append(_text(_WIDTH - _RIGHT + 8, last + 4, name, "start", f"var(--c{number % _SERIES})"))
    return parts


def _segment(x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{dashed}/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = "var(--soft)") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{html.escape(text)}</text>'
