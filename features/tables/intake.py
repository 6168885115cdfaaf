"""Reports the rows and cells of a data set that were left out, and refuses one with too many, in every command."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, TextIO

from features.errors import TablesError
from features.tables.conform import Intake, Unread

REJECTED_SHARE = 0.01
"""The share of a table's rows that may be rejected, unless a setting allows more."""

_SPELLED = 5  # rejected rows of a table that the answer spells out; all of them are counted
_NAMED = 12  # columns that a line names at most
_OWN = ("impressions", "searches")  # a service writes them, with columns that other tools read


_CLOSING = dict.fromkeys(
    ("available", "available_from", "available_until"), ", and these items are not shown"
) | dict.fromkeys(("allow_train", "allow_measure", "personal"), ", and these rows allow nothing")
"""By column, the consequence of a cell that cannot be read, where there is one."""


def admit(
    intakes: Mapping[str, Intake],
    share: float,
    allow: str,
    units: Mapping[str, str] | None = None,
    stream: TextIO | None = None,
) -> dict[str, Any]:
    """Reports rejected rows and the units of times, and refuses tables of which too many rows were rejected.

    Args:
        intakes: The fate of each table's rows, by the table's name.
        share: The share of a table's rows that may be rejected, 0 to 1.
        allow: The option that allows more, up to the number: "--set max_rejected_share=".
        units: Unit of the times of each column that did not name one, `TABLE.COLUMN`: unit.
        stream: The stream for the lines; None is stderr.

    Returns:
        See `summary`; with `time_units` where there are any.

    Raises:
        TablesError: See `require_few`.
    """
    tell(intakes, units, stream)
    require_few(intakes, share, allow)
    return summary(intakes) | ({"time_units": dict(units)} if units else {})


def tell(intakes: Mapping[str, Intake], units: Mapping[str, str] | None = None, stream: TextIO | None = None) -> None:
    """Prints a line for each table with rejected rows, ignored columns or unlisted items, and each with unread cells.

    The last line tells the units of times.
    """
    for line in lines(intakes, units):
        print(line, file=stream or sys.stderr)


def lines(intakes: Mapping[str, Intake], units: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yields the lines that `tell` prints."""
    for name, intake in intakes.items():
        if intake.rejected:
            rows, count = _rows(intake), len(intake.rejected)
            yield _line(f"{name}: {count:,} of {rows:,} rows rejected ({_percent(count / rows)}), {_first(intake)}")
        for column, cells in _by_column(intake).items():
            count, first = sum(part.count for part in cells), cells[0]
            example = f"first {first.file} row {first.row}: {first.reason}"
            then = _CLOSING.get(column, "")
            if count >= intake.kept:
                yield _line(f"warning: {name}.{column}: every cell is unread, so the column is empty{then}, {example}")
            else:
                yield _line(
                    f"{name}.{column}: {count:,} of {intake.kept:,} cells unread and left empty{then}, {example}"
                )
        if intake.ignored and name not in _OWN:
            more = f" and {len(intake.ignored) - _NAMED} more" if len(intake.ignored) > _NAMED else ""
            yield _line(f"{name}: no use for columns {', '.join(intake.ignored[:_NAMED])}{more}")
        if intake.renamed and name not in _OWN:
            yield _line(
                f"{name}: read {', '.join(f'{column} from {origin}' for column, origin in intake.renamed.items())}"
            )
        if intake.unordered:
            yield (
                f"{name}: neither timestamp nor sequence, so their order is unknown and drawn at random; if a column "
                "says when or in which order, call it so"
            )
        if intake.closed:
            yield f"warning: {name}: no item may be shown now: available is false, or none of its times is now"
        if intake.unlisted:
            yield _line(_unlisted(name, intake))
    if units:
        yield _line(f"times read as: {', '.join(f'{column} in {unit}' for column, unit in units.items())}")


def require_few(intakes: Mapping[str, Intake], share: float, allow: str) -> None:
    """Refuses tables of which more than a share of the rows was rejected, or every row whatever the share.

    Unread cells do not count: their rows stay, and every optional column may be absent.

    Raises:
        TablesError: Names the table, the share, the first such row, and what allows more.
    """
    for name, intake in intakes.items():
        if not intake.rejected:
            continue
        count, rows = len(intake.rejected), _rows(intake)
        if not intake.kept:
            raise TablesError(
                f"{name}: no row is left, all {count:,} were rejected, {_first(intake)}: correct the rows as it says"
            )
        if count > share * rows:
            enough = math.ceil(1000 * count / rows) / 1000
            raise TablesError(
                f"{name}: {count:,} of {rows:,} rows were rejected, {_percent(count / rows)} where "
                f"{_percent(share)} is allowed, {_first(intake)}: correct the rows, or allow it with {allow}{enough:g}"
            )


def summary(intakes: Mapping[str, Intake]) -> dict[str, Any]:
    """Returns the rows and cells that were left out, for the result of a command.

    Returns:
        `rejected` (count of rows), `rejections` [{`table`, `file`, `row`, `reason`}] (the first few of each table),
        `unread` {`TABLE.COLUMN`: count of cells}; where there are any, `unlisted_items` (their count).
    """
    unlisted = sum(len(intake.unlisted) for intake in intakes.values())
    return {
        "rejected": sum(len(intake.rejected) for intake in intakes.values()),
        "rejections": [
            {"table": name, **asdict(row)} for name, intake in intakes.items() for row in intake.rejected[:_SPELLED]
        ],
        "unread": {
            f"{name}.{column}": sum(part.count for part in cells)
            for name, intake in intakes.items()
            for column, cells in _by_column(intake).items()
        },
    } | ({"unlisted_items": unlisted} if unlisted else {})


def _unlisted(name: str, intake: Intake) -> str:
    count, example = f"{len(intake.unlisted):,}", f"such as {intake.unlisted[0]!r}"
    lacking = f"{name}: {count} items that events name are not in the table, {example}: models learn from them"
    if intake.hidden:
        return f"{lacking}, and they are not shown; give an item a row to show it"
    return f"{lacking}, and they are shown, because the table has no column that says when an item may be shown"


def _rows(intake: Intake) -> int:
    return intake.kept + len(intake.rejected)


def _by_column(intake: Intake) -> dict[str, list[Unread]]:
    """Returns the unread cells of each column, in the order of the files."""
    columns: dict[str, list[Unread]] = {}
    for cells in intake.unread:
        columns.setdefault(cells.column, []).append(cells)
    return columns


def _first(intake: Intake) -> str:
    row = intake.rejected[0]
    return f"first {row.file} row {row.row}: {row.reason}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _line(text: str) -> str:
    """Returns a text as one line, whatever a file's name or a cell holds."""
    return " ".join(text.splitlines())
