"""Reading by construction: tables written in every form, read by Penchant and by pyarrow or polars.

A case is a table of a data set in a folder: types, encodings, layouts and faulty cells are drawn from a seed. The
oracle finds its files with pyarrow's dataset, reads each with pyarrow or polars, and says in plain Python for each cell
if it is a value, missing, or unreadable. Penchant must give the same rows and cells, count the same cells as unread and
refuse the same rows, or refuse the table in words that name the file, row or column. Never a silently different value.

    python -m tests.proofs.reading --files 2000 --seed 1

prints one line of JSON with what the tables were made of. Then each of the planted reading faults has to be found.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import features.arrays
import features.tables.conform
import features.tables.convert
import features.tables.dataset
import features.tables.files
import features.tables.times
from features.errors import TablesError
from features.tables.dataset import LoadedTable, open_dataset, read_table
from features.tables.schema import EVENTS, EVENTS_REQUIRED, ITEMS, ITEMS_REQUIRED
from tests.proofs.reading_oracle import Expected, expect
from tests.proofs.reading_tables import Case, write_case

# ------------------------------------------------------------------------------------------------------ comparison


def compare(case: Case, expected: Expected | None) -> str:
    """Returns the difference of Penchant's reading from the expected one; "" if none."""
    schema, required = (EVENTS, EVENTS_REQUIRED) if case.table == "events" else (ITEMS, ITEMS_REQUIRED)
    try:
        loaded = read_table(case.path, schema, required)
    except TablesError as error:
        if case.refusal and case.refusal in str(error):
            return ""
        return f"refused: {error}"
    if expected is None:
        return f"not refused, though {case.refusal}"
    return _difference(expected, loaded)


def _difference(expected: Expected, loaded: LoadedTable) -> str:
    rejected = [(rejected.file, rejected.row) for rejected in loaded.rejected]
    if rejected != expected.rejected:
        return f"rows {rejected} are rejected, should be {expected.rejected}"
    unread = Counter[str]()
    for cells in loaded.unread:
        unread[cells.column] += cells.count
        if not (cells.file and cells.reason.startswith(cells.column) and ", should be " in cells.reason):
            return f"does not say what is wrong: {cells}"
    if unread != expected.unread:
        return f"unread are {dict(unread)}, should be {dict(expected.unread)}"
    rows = loaded.table.to_pylist()
    if len(rows) != len(expected.rows):
        return f"{len(rows)} rows, should be {len(expected.rows)}"
    for at, (row, wanted) in enumerate(zip(rows, expected.rows, strict=True)):
        for name, cell in row.items():
            if not _same(name, cell, wanted.get(name)):
                return f"row {at}: {name} is {cell!r}, should be {wanted.get(name)!r}"
    return ""


def _same(name: str, cell: Any, wanted: Any) -> bool:
    if wanted is None or cell is None:
        return cell is wanted
    if isinstance(wanted, tuple):
        return bool(abs(cell - wanted[0]) <= wanted[1])
    if name in ("value", "price"):
        return bool(np.float32(cell) == np.float32(wanted))
    return bool(dict(cell) == wanted if name == "attributes" else cell == wanted)


def compare_streamed(case: Case) -> str:
    """Returns the difference if events are read a part at a time; "" if none."""
    whole = open_dataset(case.path.parent)
    with (
        mock.patch.object(features.tables.dataset, "HELD_ROWS", 0),
        mock.patch.object(features.tables.dataset, "BATCH_ROWS", 5),
    ):
        parts = open_dataset(case.path.parent)
    if (whole.info, whole.intake) != (parts.info, parts.intake):
        return f"streamed: {parts.info} {parts.intake}, should be {whole.info} {whole.intake}"
    return "" if whole.events.equals(parts.events) and whole.items.equals(parts.items) else "streamed: other rows"


# -------------------------------------------------------------------------------------------------- planted faults


def _wrapped(module: Any, name: str, wrap: Callable[..., Any]) -> Any:
    true = getattr(module, name)
    return mock.patch.object(module, name, lambda *args, **options: wrap(true, *args, **options))


def _replaced(place: Any, name: str, answer: Any) -> Any:
    return mock.patch.object(place, name, return_value=answer)


def _no_fractions(true: Any, text: Any) -> Any:
    values, good = true(text)
    return values // 1000 * 1000, good


def _no_offsets(true: Any, text: Any) -> Any:
    return true(pc.replace_substring_regex(text, r"[+-]\d{2}:\d{2}$", ""))


def _no_links(true: Any, root: Path, below: Path, above: Any) -> Iterator[Path]:
    return (
        name
        for name in true(root, below, above)
        if not any((root / part).is_symlink() for part in (name, *name.parents))
    )


def _indices(true: Any, column: Any) -> Any:
    return true(column.indices if pa.types.is_dictionary(column.type) else column)


def _decimals_as_floats(true: Any, column: Any, is_id: bool) -> Any:
    return pc.cast(
        pc.if_else(column.is_valid(), pa.array([str(float(v or 0)) for v in column.to_pylist()]), None), pa.string()
    ), np.zeros(len(column), bool)


def _nan_as_zero(true: Any, column: Any, *args: Any, **options: Any) -> Any:
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(pc.cast(column, pa.float64())), pa.scalar(0, column.type), column)
    return true(column, *args, **options)


def _short_lists(true: Any, column: Any, *args: Any) -> Any:
    return true(pc.list_slice(column, 0, 1) if pa.types.is_list(column.type) else column, *args)


def _later(true: Any, column: Any) -> Any:
    values = true(column)
    return values + 1 if pa.types.is_timestamp(column.type) and column.type.tz else values


def _no_dashes(true: Any, storage: Any) -> Any:
    return pc.replace_substring(true(storage), "-", "")


FAULTS: dict[str, Callable[[], Any]] = {
    "fractions of a second are dropped": lambda: _wrapped(features.tables.times, "_iso", _no_fractions),
    "offsets from UTC are ignored": lambda: _wrapped(features.tables.times, "_iso", _no_offsets),
    "every number is in milliseconds": lambda: _replaced(features.tables.times.UnitVotes, "unit", "ms"),
    "links are skipped": lambda: _wrapped(features.tables.files, "_walk", _no_links),
    "the index of a dictionary is its value": lambda: _wrapped(features.tables.convert, "plain", _indices),
    "a decimal is a float": lambda: _wrapped(features.tables.convert, "_text_of_decimals", _decimals_as_floats),
    "NaN is 0": lambda: _wrapped(features.tables.convert, "_numbers", _nan_as_zero),
    "lists are cut": lambda: _wrapped(features.tables.convert, "_list", _short_lists),
    "folders' names are ignored": lambda: _replaced(features.tables.files, "_partition", {}),
    "times with a zone are a millisecond late": lambda: _wrapped(features.tables.times, "_typed", _later),
    "a UUID has no dashes": lambda: _wrapped(features.arrays, "_uuid_text", _no_dashes),
    "what cannot be read permits": lambda: _replaced(features.tables.conform, "_close", None),
    "an end for ever is an end in 1978": lambda: mock.patch.object(
        features.tables.times, "_is_far", lambda v: np.zeros(v.size, bool)
    ),
    "a price of one comma is thousands": lambda: _wrapped(
        features.tables.convert, "prices", lambda true, text: true(pc.replace_substring(text, ",", ""))
    ),
}
"""Reading faults, each of which the comparison must find."""


# ------------------------------------------------------------------------------------------------------- the proof


@dataclass
class Proof:
    """The results of reading many tables."""

    cases: list[tuple[Case, Expected | None]]
    tally: Counter[str]
    differences: list[str]

    def finds(self, fault: str) -> int:
        """Returns after how many tables a planted fault is found; 0 if it is not."""
        with FAULTS[fault]():
            for number, (case, expected) in enumerate(self.cases, 1):
                if compare(case, expected):
                    return number
        return 0


def prove(folder: Path, files: int, number: int) -> Proof:
    """Writes tables until there are as many files, and reads them."""
    draw, proof = random.Random(number), Proof([], Counter(), [])
    while proof.tally["files"] < files:
        case = write_case(draw, folder / str(len(proof.cases)))
        expected = None if case.refusal else expect(case, len(proof.cases))
        different = compare(case, expected)
        if not different and case.table == "events" and expected and expected.rows and len(proof.cases) % 3 == 0:
            different = compare_streamed(case)
            proof.tally["streamed tables"] += 1
        if different:
            proof.differences.append(f"{case.path} ({', '.join(case.kinds)}): {different}")
        proof.cases.append((case, expected))
        proof.tally.update({"files": case.files, "tables": 1, "refused tables": int(bool(case.refusal))})
        if expected is not None:
            proof.tally.update({"rows": len(expected.rows), "rejected rows": len(expected.rejected)})
            proof.tally["unread cells"] += expected.unread.total()
        proof.tally.update(case.kinds)
    return proof


def main() -> int:
    """The proof at full size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="penchant-") as folder:
        proof = prove(Path(folder), asked.files, asked.seed)
        for different in proof.differences[:20]:
            print(different, file=sys.stderr)
        faults = {fault: proof.finds(fault) for fault in FAULTS}
    figures = {name: count for name, count in proof.tally.items() if ":" not in name}
    answer = {
        **figures,
        "kinds": sum(":" in name for name in proof.tally),
        "differences": len(proof.differences),
        "faults": len(faults),
        "faults_found": sum(map(bool, faults.values())),
        "found_after_tables": faults,
        "seed": asked.seed,
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(json.dumps(answer))
    return int(bool(proof.differences) or not all(faults.values()))


if __name__ == "__main__":
    sys.exit(main())
