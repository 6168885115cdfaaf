"""Checks if a data set can be trusted: PASS or FAIL per check, and for each failure the remedy and the first place.

Personalisation fails first at instrumentation: ids without a match, clocks an hour off, outcomes without a slate. Every
check compares the share of rows that are wrong with the share that may be (`LIMITS`). A check without a row to look at
is not passed: it is skipped where the data have nothing of the kind, and fails where they should.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import numbers, pc, to_mask
from features.errors import PenchantError, TablesError
from features.event_types import PASSIVE_EVENT_TYPES, hint, meaning
from features.tables.clock import AHEAD_MS
from features.tables.conform import Rejected, events_required
from features.tables.dataset import LoadedTable, read_info, read_table
from features.tables.event_reader import Events, fate_of_events
from features.tables.evidence import SPARED, Evidence, Finding
from features.tables.files import find_files, table_path
from features.tables.intake import summary, tell
from features.tables.order import codes, is_present
from features.tables.schema import (
    EVENTS,
    EVENTS_REQUIRED,
    IMPRESSIONS,
    IMPRESSIONS_REQUIRED,
    ITEMS,
    ITEMS_REQUIRED,
    JUDGMENTS,
    JUDGMENTS_REQUIRED,
    USERS,
    USERS_REQUIRED,
)
from features.tables.slate_join import SlateJoin, flattened
from features.tables.validate_clock import clock_skew
from features.tables.validate_split import split
from features.tables.written import MISSING_WORDS

LIMITS: Mapping[str, float] = {
    "types": 0.0,
    "order": 0.01,
    "unknown_items": 0.0,
    "unexplained_outcomes": 0.01,
    "positions": 0.01,
    "request_ids": 0.1,
    "clock_skew": 0.0,
    "duplicate_ids": 0.0,
}
"""The share of the checked rows that may be wrong, by the name of the check."""

_WAREHOUSE_LIMITS: Mapping[str, float] = {"split": 0.0}
"""The same for the checks that are made of a warehouse alone."""

LATE_MS = AHEAD_MS
"""The time by which an event may lie behind the one logged before it, or ahead of the clock of the log."""

ATTRIBUTION_MS = 7 * 24 * 3_600_000
"""Longest time between a slate and its outcomes."""

_FROM_A_SLATE = ("select_item",)
_SOME = 50

Check = Callable[[Evidence], Iterator[Finding]]


def validate(data: Path, allow: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Checks a data set.

    Args:
        data: Its directory.
        allow: Shares in place of those in `LIMITS`.

    Returns:
        See `judge`; with `features.tables.intake.summary`, and `time_units` where values had to tell them.

    Raises:
        TablesError: It is not a data set: it has no events.
        PenchantError: `allow` names no check.
    """
    if table_path(data, "events") is None:
        raise TablesError(f"{data} is not a data set: it needs events.parquet or events/")
    tables, unreadable, empty = _read_tables(data)
    events = tables.get("events", LoadedTable(EVENTS.empty_table(), []))
    items, impressions = tables.get("items"), tables.get("impressions")
    info = read_info(data)
    intakes = {name: loaded.intake for name, loaded in tables.items()}
    if "events" in intakes:
        intakes["events"] = fate_of_events(intakes["events"], Events.of(events.table))
    evidence = Evidence(
        warehouse=data if "until" in info else None,
        partitions=int(info.get("partitions", 0)),
        events=events.table,
        items=items.table["item_id"] if items else None,
        impressions=impressions.table if impressions else None,
        rejected=unreadable + [row for loaded in tables.values() for row in loaded.rejected],
        intakes=intakes,
        empty=empty,
        place=events.place,
    )
    units = {f"{name}.{column}": unit for name, loaded in tables.items() for column, unit in loaded.units.items()}
    verdict = judge(evidence, allow)
    tell(evidence.intakes, units)
    return verdict | summary(evidence.intakes) | ({"time_units": units} if units else {})


def _read_tables(data: Path) -> tuple[dict[str, LoadedTable], list[Rejected], list[str]]:
    """Returns the tables that can be read, the files that cannot, and the descriptions of tables without rows."""
    tables: dict[str, LoadedTable] = {}
    unreadable: list[Rejected] = []
    empty: list[str] = []
    for name, (schema, required) in _TABLES.items():
        path = table_path(data, name)
        # A warehouse makes its folders before it has anything to put there; a data set without events is none.
        if path is None or (path.is_dir() and name != "events" and not any(path.iterdir())):
            continue
        try:
            tables[name] = _read_events(path) if name == "events" else read_table(path, schema, required)
        except TablesError as error:
            # One table that cannot be read is a finding: the others are checked all the same.
            unreadable.append(Rejected(str(path), 0, str(error)))
            continue
        if not tables[name].table.num_rows:
            empty.append(f"{path} holds no row that can be read")
    return tables, unreadable, empty


def _read_events(path: Path) -> LoadedTable:
    return read_table(path, EVENTS, events_required([(file.schema(), str(file.path)) for file in find_files(path)]))


def judge(evidence: Evidence, allow: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Makes every check that the evidence allows.

    Returns:
        `checks` [{`name`, `passed`, `detail`}], `skipped` {name: the reason}, `passed` (True if a check was made and
        none failed), `events`, `impressions`.

    Raises:
        PenchantError: `allow` names no check.
    """
    limits = {**LIMITS, **_WAREHOUSE_LIMITS}
    for name in allow or {}:
        if name not in limits:
            raise PenchantError(f"there is no check {name!r}: choose one of {', '.join(limits)}")
    limits |= allow or {}
    checks, skipped = [], {}
    for name, check in _CHECKS.items():
        if name in _WAREHOUSE_LIMITS and evidence.warehouse is None:
            continue
        if reason := _reason_to_skip(name, evidence):
            skipped[name] = reason
            continue
        findings = list(check(evidence))
        # An "all well" about no row at all would be trusted like one about a million.
        if not any(finding.of for finding in findings):
            looked_for = "; ".join(finding.what for finding in findings)
            skipped[name] = f"there is nothing that it could look at ({looked_for})"
            continue
        failed = [finding for finding in findings if finding.fails(limits[name])]
        detail = [f"{finding.what}. To do: {finding.remedy}" for finding in failed]
        detail = detail or [finding.what for finding in findings]
        checks.append({"name": name, "passed": not failed, "detail": "; ".join(detail)})
    return {
        "checks": checks,
        "skipped": skipped,
        "passed": passed(checks),
        "events": evidence.events.num_rows,
        "impressions": evidence.impressions.num_rows if evidence.impressions is not None else 0,
    }


def passed(checks: Sequence[Mapping[str, Any]]) -> bool:
    """Returns True if some check was made and none failed: without a check, nothing is known."""
    return bool(checks) and all(check["passed"] for check in checks)


def _reason_to_skip(name: str, evidence: Evidence) -> str:
    """Returns the reason why a check cannot be made, "" if it can."""
    events = evidence.events
    if not events.num_rows and (name != "types" or not (evidence.rejected or evidence.empty)):
        return "there are no events"
    if name == "order" and not is_present(events["timestamp"]):
        return "the events have an order only, no times"
    if name == "unknown_items" and evidence.items is None:
        return "there is no catalogue: the data set lacks a table of items, or a live check its --bundle"
    if name == "unexplained_outcomes" and evidence.impressions is None:
        return "there are no impressions"
    if name == "unexplained_outcomes" and not is_present(events["request_id"]):
        return "no event names a request"
    if name == "positions" and not is_present(events["position"]):
        return "no event has a position"
    if name == "request_ids" and evidence.impressions is None and not is_present(events["request_id"]):
        return "there are no impressions, and no event names a request"
    if name == "clock_skew" and not is_present(events["timestamp"]):
        return "the events have an order only, no times"
    return ""


def _types(evidence: Evidence) -> Iterator[Finding]:
    """Every table has rows, every row and cell the right type, and names of event types are spelt alike."""
    for description in evidence.empty:
        yield Finding(1, 1, description, "write the table with its rows, or leave it out", certain=True)
    wrong, rows = len(evidence.rejected), evidence.events.num_rows + len(evidence.rejected)
    first = evidence.rejected[0] if wrong else None
    example = f", first {first.file} row {first.row}: {first.reason}" if first else ""
    yield Finding(
        wrong, rows, f"{wrong} malformed rows of {rows}{example}", "write the columns as the row's reason says"
    )
    for name, intake in evidence.intakes.items():
        for column in {cells.column: None for cells in intake.unread}:
            cells = [part for part in intake.unread if part.column == column]
            count, unread = sum(part.count for part in cells), cells[0]
            description = f"{count} of {intake.kept} cells of {name}.{column} cannot be read, first {unread.file} row "
            description += f"{unread.row}: {unread.reason}"
            # The rows stay: a few such cells cost nothing but themselves.
            yield Finding(count, intake.kept, description, "write the column as the cell's reason says", spared=SPARED)
    for column in ("user_id", "item_id"):
        ids = evidence.events[column]
        fake = to_mask(pc.is_in(ids, value_set=pa.array(MISSING_WORDS)))
        if fake.any():
            count, row = int(np.count_nonzero(fake)), int(np.argmax(fake))
            description = (
                f"{count} events have the {column} {ids[row].as_py()!r}, as programs write a missing value in text"
            )
            yield Finding(count, rows, f"{description}, first {evidence.place(row)}", "leave the cell empty instead")
    names, type_codes = codes(evidence.events["event_type"])
    for number, name in enumerate(names):
        # A product may call a type of its own "click"; a name for a showing, and another spelling, is a mistake.
        if hint(name, own_types=names):
            count = int(np.count_nonzero(type_codes == number))
            yield Finding(count, rows, f"{count} events of type {name!r}", f"call them {meaning(name)!r}")


def _order(evidence: Evidence) -> Iterator[Finding]:
    """Times of a user's events agree with the order in which they were written."""
    events = evidence.events
    _, users = codes(events["user_id"])
    written = next((name for name in ("log_id", "sequence") if is_present(events[name])), "")
    place = numbers(events[written]) if written else np.arange(events.num_rows)
    order = np.lexsort([place, users])
    times = numbers(events["timestamp"])[order]
    tolerance = LATE_MS if written == "log_id" else 0
    back = (users[order][1:] == users[order][:-1]) & (times[1:] < times[:-1] - tolerance)
    wrong, order_name = int(np.count_nonzero(back)), f"in the order of {written or 'rows'}"
    yield Finding(
        wrong,
        events.num_rows,
        f"{wrong} of {events.num_rows} events lie before the one that precedes them {order_name}",
        "send events as they happen and not in batches hours later"
        if written == "log_id"
        else "sort each user's rows by time, or correct the column that says when",
    )


def _unknown_items(evidence: Evidence) -> Iterator[Finding]:
    """Every event is about an item of the catalogue."""
    items = evidence.events["item_id"]
    named = to_mask(pc.not_equal(items, ""))
    unknown = named & ~to_mask(pc.is_in(items, value_set=flattened(evidence.items)))
    wrong = int(np.count_nonzero(unknown))
    examples = ", ".join(repr(name) for name in pc.unique(items.filter(pa.array(unknown))).to_pylist()[:3])
    examples = f", such as {examples}" if examples else ""
    yield Finding(
        wrong,
        int(np.count_nonzero(named)),
        f"{wrong} of {np.count_nonzero(named)} events are about unknown items{examples}",
        "send the id under which the item is in the catalogue, or put the item before its events",
    )


def _unexplained_outcomes(evidence: Evidence) -> Iterator[Finding]:
    """Outcomes of a slate are about its items, come from its user and follow it."""
    join = SlateJoin.of(evidence)
    outcome = join.named & ~_is_type(evidence.events, PASSIVE_EVENT_TYPES)
    times, shown_at = numbers(evidence.events["timestamp"]), join.shown_at
    after = times - shown_at
    faults = {
        "name a request that was never answered": ~join.answered,
        "are of another user than the slate": join.answered & ~join.same_user,
        "are about an item that was not in the slate": join.answered & (join.place < 0),
        "happened before the slate or over 7 days after it": join.answered
        & to_mask(evidence.events["timestamp"].is_valid())
        & ((after < -1000) | (after > ATTRIBUTION_MS)),
    }
    wrong = outcome & np.logical_or.reduce(list(faults.values()))
    counts = {fault: int(np.count_nonzero(outcome & rows)) for fault, rows in faults.items()}
    reasons = ", ".join(f"{count} {fault}" for fault, count in counts.items() if count) or "all explained"
    of = int(np.count_nonzero(outcome))
    yield Finding(
        int(np.count_nonzero(wrong)),
        of,
        f"{np.count_nonzero(wrong)} of {of} outcomes that name a request are not explained by it ({reasons})",
        "send back the request_id of the very answer that led to the event, with the item as it stood there; "
        "where no slate is found at all, look for dropped slates (metric penchant_slates_total, result dropped)",
    )


def _positions(evidence: Evidence) -> Iterator[Finding]:
    """Positions count from 0, differ, and are those of the slate."""
    has_position = to_mask(evidence.events["position"].is_valid())
    positions = numbers(evidence.events["position"])[has_position]
    count = positions.size
    top = int(np.count_nonzero(positions == 0))
    remedy = "send the item's place in the slate, 0 for the first"
    yield Finding(
        0, count, f"{count} positions, {top / max(count, 1):.0%} of them 0, highest {positions.max()}", remedy
    )
    if count >= _SOME and not top:
        description = f"none of {count} positions is 0, the lowest is {positions.min()}: they seem to count from 1"
        yield Finding(count, count, description, remedy, certain=True)
    if count >= _SOME and (positions == positions[0]).all():
        yield Finding(count, count, f"all {count} positions are {positions[0]}", remedy, certain=True)
    if evidence.impressions is not None:
        join = SlateJoin.of(evidence)
        judged = has_position & (join.place >= 0)
        wrong = judged & (numbers(evidence.events["position"]) != join.place)
        misplaced, of = int(np.count_nonzero(wrong)), int(np.count_nonzero(judged))
        yield Finding(misplaced, of, f"{misplaced} of {of} positions are not those of the item in its slate", remedy)


def _request_ids(evidence: Evidence) -> Iterator[Finding]:
    """Outcomes name the request that led to them."""
    events = evidence.events
    missing = ~(to_mask(events["request_id"].is_valid()) & to_mask(pc.not_equal(events["request_id"], "")))
    outcome = ~_is_type(events, PASSIVE_EVENT_TYPES)
    remedy = "send the answer's request_id back on every event that it leads to"
    wrong, of = int(np.count_nonzero(outcome & missing)), int(np.count_nonzero(outcome))
    yield Finding(wrong, of, f"{wrong} of {of} outcomes name no request", remedy)
    from_slate = _is_type(events, _FROM_A_SLATE) | to_mask(events["position"].is_valid())
    wrong, of = int(np.count_nonzero(from_slate & missing)), int(np.count_nonzero(from_slate))
    if of and wrong / of > LIMITS["unexplained_outcomes"]:
        description = (
            f"{wrong} of {of} events that say they come from a slate (select_item, or a position) do not say which"
        )
        yield Finding(wrong, of, description, remedy, certain=True)


def _duplicate_ids(evidence: Evidence) -> Iterator[Finding]:
    """No event is there twice, and no request was answered twice."""
    events = evidence.events
    if is_present(events["event_id"]):
        repeated = _doubled(events, ["user_id", "event_id"], to_mask(events["event_id"].is_valid()))
        remedy = "give each event an id of its own, and keep it when the call is repeated"
        yield Finding(
            repeated, events.num_rows, f"{repeated} of {events.num_rows} events repeat the id of another", remedy
        )
    else:
        when = "timestamp" if is_present(events["timestamp"]) else "sequence"
        repeated = _doubled(events, ["user_id", "item_id", "event_type", when, "value"])
        description = f"{repeated} of {events.num_rows} rows say again what another says"
        # A user who buys two of an item may send two equal events; a file that is there twice doubles more than these.
        yield Finding(
            repeated, events.num_rows, description, "give events an event_id, and write each once", spared=SPARED
        )
    if is_present(events["log_id"]):
        again = _doubled(events, ["user_id", "log_id"], to_mask(events["log_id"].is_valid()))
        remedy = "let one process write the warehouse, into one directory"
        yield Finding(again, events.num_rows, f"{again} rows repeat the log id of another of the same user", remedy)
    if evidence.impressions is not None and evidence.impressions.num_rows:
        slates = evidence.impressions.num_rows
        again = _doubled(evidence.impressions, ["request_id"])
        # A call that is repeated after its answer was lost shows, and logs, a second slate under the same id.
        description = f"{again} of {slates} slates repeat the request_id of another"
        yield Finding(again, slates, description, "give each ranking request an id of its own", spared=SPARED)


def _doubled(table: pa.Table, names: list[str], judged: npt.NDArray[np.bool_] | None = None) -> int:
    """Returns the number of rows that have the same values as an earlier row."""
    columns = [pc.dictionary_encode(pc.fill_null(table[name], _blank(table[name].type))) for name in names]
    parts = [column.combine_chunks().indices.to_numpy(zero_copy_only=False).astype(np.int64) for column in columns]
    rows = np.stack(parts, 1)[judged if judged is not None else slice(None)]
    return int(rows.shape[0] - np.unique(rows, axis=0).shape[0])


def _blank(dtype: pa.DataType) -> pa.Scalar[Any]:
    return pa.scalar("" if pa.types.is_string(dtype) else 0, dtype)


def _is_type(events: pa.Table, names: tuple[str, ...]) -> npt.NDArray[np.bool_]:
    return to_mask(pc.is_in(events["event_type"], value_set=pa.array(names)))


_TABLES = {
    "events": (EVENTS, EVENTS_REQUIRED),
    "items": (ITEMS, ITEMS_REQUIRED),
    "users": (USERS, USERS_REQUIRED),
    "impressions": (IMPRESSIONS, IMPRESSIONS_REQUIRED),
    "judgments": (JUDGMENTS, JUDGMENTS_REQUIRED),
}

_CHECKS: Mapping[str, Check] = {
    "types": _types,
    "order": _order,
    "unknown_items": _unknown_items,
    "unexplained_outcomes": _unexplained_outcomes,
    "positions": _positions,
    "request_ids": _request_ids,
    "clock_skew": clock_skew,
    "duplicate_ids": _duplicate_ids,
    "split": split,
}
