"""Reads the events of a file as targets: a test of one's own, against the histories that a run knows.

The file is Parquet, CSV or TSV with `user_id`, `item_id` and perhaps `timestamp`, under the names and in the forms that
a data set may use.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pacsv

from features.arrays import pc
from features.errors import LeakError, TablesError, TrainingError
from features.tables.dataset import LoadedTable, conform, read_table
from features.tables.intake import require_few, tell
from features.tables.order import codes
from features.tables.schema import EVENTS, Required
from training.data.interactions import Interactions
from training.data.split import Split, Targets
from training.models.scoring import had_before
from training.run import ALLOW, LoadedRun

_COLUMNS = pa.schema([EVENTS.field(name) for name in ("user_id", "item_id", "timestamp")])
_REQUIRED: Required = ("user_id", "item_id")
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_USERS = 1 << 16
"""Users of the data set whose ids are compared together."""
_UNTIMED = np.iinfo(np.int64).max
"""The time of a row without one: after all events."""
_REASONS = {
    "unknown_users": "name users without an event in the data set",
    "unknown_items": "name items that the run's catalogue lacks",
    "without_history": "are earlier than all training events of their user",
    "had_before": "name items that their user had, which the run never recommends (repeats: false)",
}


@dataclass(frozen=True)
class FileTargets(Targets):
    """Targets that are no events of the data set.

    Attributes:
        items: Their items; int32 `[n]`.
        times: Their times, ms; int64 `[n]`.
    """

    items: npt.NDArray[np.int32]
    times: npt.NDArray[np.int64]

    def take(self, at: npt.NDArray[Any]) -> FileTargets:
        """Returns some of the targets."""
        return FileTargets(self.users[at], self.positions[at], self.items[at], self.times[at])

    def rows(self, data: Interactions) -> npt.NDArray[np.int32]:
        """Returns the items to predict; int32 `[n]`."""
        return self.items

    def time(self, data: Interactions, at: int) -> int:
        """Returns the time of a target, or of its user's newest event before it if the file names none; ms."""
        if self.times[at] != _UNTIMED:
            return int(self.times[at])
        return int(data.timestamps[data.offsets[self.users[at]] + self.positions[at] - 1])


def read_targets(
    file: Path, run: LoadedRun, data: Interactions, division: Split
) -> tuple[FileTargets, dict[str, int | str]]:
    """Reads each row of a file as a target after all training and validation events of its user.

    Those later than the row are left out of the history, if the row has a time. Rows that cannot be ranked are counted
    by reason, and told on stderr.

    Args:
        file: The file.
        run: The run, whose catalogue knows the items.
        data: The events of its data set.
        division: Their split.

    Returns:
        The targets; and `file`, `rows`, `rejected`, `unknown_users`, `unknown_items`, `without_history`, `had_before`
        (each row under the first of them that holds).

    Raises:
        TablesError: The file cannot be read, or too many of its rows are malformed.
        LeakError: A row is an event that the run was trained or validated on.
        TrainingError: No row can be ranked.
    """
    loaded = _read(file)
    tell({"test": loaded.intake})
    require_few({"test": loaded.intake}, run.config.max_rejected_share, ALLOW)
    rows = len(loaded.table)
    users = _user_numbers(loaded.table["user_id"], data)
    items = _item_rows(loaded.table["item_id"], run)
    targets = FileTargets(users, np.zeros(rows, np.int64), items, _times(loaded.table["timestamp"], data))
    counts: dict[str, int] = {}
    targets = _without(targets, users < 0, "unknown_users", counts)
    targets = _without(targets, targets.items < 0, "unknown_items", counts)
    targets = _after_training(targets, data, division)
    _refuse_known(file, targets, data)
    targets = _without(targets, targets.positions == 0, "without_history", counts)
    is_repeat = np.zeros(len(targets), np.bool_) if run.config.repeats else had_before(data, targets)
    targets = _without(targets, is_repeat, "had_before", counts)
    for name, count in counts.items():
        if count:
            print(f"test: {count:,} of {rows:,} rows {_REASONS[name]}: they are not ranked", file=sys.stderr)
    if not len(targets):
        raise TrainingError(f"{file}: none of its {rows:,} rows can be ranked, {counts}: test users whom the run knows")
    return targets, {"file": str(file), "rows": rows, "rejected": len(loaded.rejected), **counts}


def _read(file: Path) -> LoadedTable:
    delimiter = _DELIMITERS.get(file.suffix.lower())
    if delimiter is None:
        return read_table(file, _COLUMNS, _REQUIRED)
    parsing = pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    try:
        names = pacsv.open_csv(file, parse_options=parsing).schema.names
        # As text, which the conversion of a data set reads: an id of digits is no number.
        as_text = pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
        table = pacsv.read_csv(file, parse_options=parsing, convert_options=as_text)
    except (pa.ArrowException, OSError) as error:
        raise TablesError(f"{file} cannot be read: {error}") from error
    return conform(table, _COLUMNS, _REQUIRED, str(file))


def _user_numbers(column: pa.ChunkedArray[Any], data: Interactions) -> npt.NDArray[np.int64]:
    """Returns the number of each row's user, -1 for an unknown one; int64 `[n]`."""
    names, indices = codes(column)
    wanted, numbers = set(names), dict.fromkeys(names, -1)
    for start in range(0, len(data.users), _USERS):
        part = data.users[start : start + _USERS]
        numbers.update({name: start + at for at, name in enumerate(part) if name in wanted})
    # A user may be listed whose events all are of cold items.
    known = np.array([numbers[name] for name in names], np.int64)[indices]
    return np.where((known >= 0) & (np.diff(data.offsets)[known] > 0), known, -1)


def _item_rows(column: pa.ChunkedArray[Any], run: LoadedRun) -> npt.NDArray[np.int32]:
    names, indices = codes(column)
    return np.asarray(run.vocabulary.rows(names), np.int32)[indices]


def _times(column: pa.ChunkedArray[Any], data: Interactions) -> npt.NDArray[np.int64]:
    if data.ordered_only and column.null_count < len(column):
        print("test: the data set has order only, so the times of the rows are not read", file=sys.stderr)
        return np.full(len(column), _UNTIMED)
    times: npt.NDArray[np.int64] = pc.fill_null(column, _UNTIMED).to_numpy()
    return times


def _without(targets: FileTargets, left_out: npt.NDArray[np.bool_], name: str, counts: dict[str, int]) -> FileTargets:
    """Returns the other targets, and counts those left out."""
    counts[name] = int(left_out.sum())
    return targets.take(np.flatnonzero(~left_out))


def _after_training(targets: FileTargets, data: Interactions, division: Split) -> FileTargets:
    """Returns the targets, each after the training and validation events of its user that are not later."""
    positions = division.fit_end[targets.users].copy()
    for at in np.flatnonzero(targets.times != _UNTIMED).tolist():
        start = int(data.offsets[targets.users[at]])
        times = data.timestamps[start : start + int(positions[at])]
        positions[at] = np.searchsorted(times, targets.times[at], side="right")
    return FileTargets(targets.users, positions, targets.items, targets.times)


def _refuse_known(file: Path, targets: FileTargets, data: Interactions) -> None:
    """Refuses rows that are events of the histories, item and time alike: their figures would be memory."""
    known = 0
    for user, position, item, time in zip(targets.users, targets.positions, targets.items, targets.times, strict=True):
        start = int(data.offsets[user])
        part = slice(
            start + int(np.searchsorted(data.timestamps[start : start + int(position)], time)), start + position
        )
        known += bool((data.rows[part] == item).any())
    if known:
        raise LeakError(
            f"{file}: {known:,} rows are events that the run was trained or validated on: leave them out of the file, "
            "or out of the data set and train again"
        )
