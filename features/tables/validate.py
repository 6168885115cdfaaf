"""Tells if a data set can be trusted: PASS or FAIL per check, and for each failure what to correct and where.

Personalisation fails first at instrumentation: ids that match nothing, clocks an hour off, outcomes that no answer
explains. Every check compares the share of rows that are wrong with the share that may be (`LIMITS`). A check that has
no row to look at is not passed: it is skipped where the data have nothing of the kind, and fails where they should.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import numbers, pc, to_mask
from features.errors import PenchantError, TablesError
from features.event_types import PASSIVE_EVENT_TYPES, hint, meaning
from features.subjects import is_anonymous
from features.tables.clock import AHEAD_MS
from features.tables.conform import Rejected
from features.tables.dataset import Loaded, read_info, read_table
from features.tables.evidence import SPARED, Evidence, Finding
from features.tables.files import table_path
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
"""The share of the rows a check looks at that may be wrong, by the name of the check."""

_OF_A_WAREHOUSE: Mapping[str, float] = {"split": 0.0}
"""The same of the checks that are made of a warehouse alone."""

LATE_MS = AHEAD_MS
"""How far an event may lie behind the one that was logged before it, or ahead of the clock of the log."""

ATTRIBUTION_MS = 7 * 24 * 3_600_000
"""Longest time between a slate and what a person did because of it."""

_FROM_A_SLATE = ("select_item",)
_SOME = 50

Look = Callable[[Evidence], Iterator[Finding]]


def validate(data: Path, allow: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Checks a data set.

    Args:
        data: Its directory.
        allow: Shares that take the place of those in `LIMITS`.

    Returns:
        See `judge`; with what `features.tables.intake.summary` says, and `time_units` where values had to tell them.

    Raises:
        TablesError: It is not a data set: it has no events.
        PenchantError: `allow` names no check.
    """
    where = table_path(data, "events")
    if where is None:
        raise TablesError(f"{data} is not a data set: it needs events.parquet or events/")
    tables: dict[str, Loaded] = {}
    wanted = {
        "events": (EVENTS, EVENTS_REQUIRED),
        "items": (ITEMS, ITEMS_REQUIRED),
        "users": (USERS, USERS_REQUIRED),
        "impressions": (IMPRESSIONS, IMPRESSIONS_REQUIRED),
        "judgments": (JUDGMENTS, JUDGMENTS_REQUIRED),
    }
    unreadable: list[Rejected] = []
    empty: list[str] = []
    for name, (schema, required) in wanted.items():
        path = table_path(data, name)
        # A warehouse makes its folders before it has anything to put there; a data set without events is none.
        if path is None or (path.is_dir() and name != "events" and not any(path.iterdir())):
            continue
        try:
            tables[name] = read_table(path, schema, required)
        except TablesError as error:
            unreadable.append(Rejected(str(path), 0, str(error)))
            continue
        if not tables[name].table.num_rows:
            empty.append(f"{path} holds no row that can be read")
    events = tables.get("events", Loaded(EVENTS.empty_table(), []))
    items, impressions = tables.get("items"), tables.get("impressions")
    rejected = [one for loaded in tables.values() for one in loaded.rejected]
    info = read_info(data)
    evidence = Evidence(
        warehouse=data if "until" in info else None,
        partitions=int(info.get("partitions", 0)),
        events=events.table,
        items=items.table["item_id"] if items else None,
        impressions=impressions.table if impressions else None,
        rejected=unreadable + rejected,
        intakes={name: loaded.intake for name, loaded in tables.items()},
        empty=empty,
        place=events.place,
    )
    units = {f"{name}.{column}": unit for name, loaded in tables.items() for column, unit in loaded.units.items()}
    verdict = judge(evidence, allow)
    tell(evidence.intakes, units)
    return verdict | summary(evidence.intakes) | ({"time_units": units} if units else {})


def judge(evidence: Evidence, allow: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Makes every check that the evidence allows.

    Returns:
        `checks` [{`name`, `passed`, `detail`}], `skipped` {name: why it could not be made}, `passed` (whether some
        check was made, and none failed), `events`, `impressions`.

    Raises:
        PenchantError: `allow` names no check.
    """
    for name in allow or {}:
        if name not in (known := {**LIMITS, **_OF_A_WAREHOUSE}):
            raise PenchantError(f"there is no check {name!r}: choose one of {', '.join(known)}")
    limits = {**LIMITS, **_OF_A_WAREHOUSE, **(allow or {})}
    looks: dict[str, Look] = {
        "types": _types,
        "order": _order,
        "unknown_items": _unknown_items,
        "unexplained_outcomes": _unexplained_outcomes,
        "positions": _positions,
        "request_ids": _request_ids,
        "clock_skew": clock_skew,
        "duplicate_ids": _duplicate_ids,
    }
    if evidence.warehouse is not None:
        looks["split"] = split
    checks, skipped = [], {}
    for name, look in looks.items():
        lacking = _lacking(name, evidence)
        if lacking:
            skipped[name] = lacking
            continue
        findings = list(look(evidence))
        if not any(one.of for one in findings):
            skipped[name] = f"there is nothing that it could look at ({'; '.join(one.what for one in findings)})"
            continue
        failed = [one for one in findings if one.fails(limits[name])]
        detail = "; ".join(f"{one.what}. To do: {one.mend}" for one in failed) or "; ".join(
            one.what for one in findings
        )
        checks.append({"name": name, "passed": not failed, "detail": detail})
    shown = evidence.impressions.num_rows if evidence.impressions is not None else 0
    return {
        "checks": checks,
        "skipped": skipped,
        "passed": passed(checks),
        "events": evidence.events.num_rows,
        "impressions": shown,
    }


def passed(checks: Sequence[Mapping[str, Any]]) -> bool:
    """Returns True if some check was made and none failed: where nothing was looked at, nothing is known."""
    return bool(checks) and all(check["passed"] for check in checks)


def _lacking(name: str, evidence: Evidence) -> str:
    """Why a check cannot be made, "" where it can."""
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
    for lacking in evidence.empty:
        yield Finding(1, 1, lacking, "write the table with its rows, or leave it out", certain=True)
    wrong, rows = len(evidence.rejected), evidence.events.num_rows + len(evidence.rejected)
    first = evidence.rejected[0] if wrong else None
    example = f", first {first.file} row {first.row}: {first.reason}" if first else ""
    yield Finding(
        wrong, rows, f"{wrong} malformed rows of {rows}{example}", "write the columns as the row's reason says"
    )
    for name, intake in evidence.intakes.items():
        for column in {cells.column: None for cells in intake.unread}:
            cells = [one for one in intake.unread if one.column == column]
            count, unread = sum(one.count for one in cells), cells[0]
            what = f"{count} of {intake.kept} cells of {name}.{column} cannot be read, first {unread.file} row "
            what += f"{unread.row}: {unread.reason}"
            # The rows stay: a few such cells cost nothing but themselves.
            yield Finding(count, intake.kept, what, "write the column as the cell's reason says", spared=SPARED)
    for column in ("user_id", "item_id"):
        ids = evidence.events[column]
        fake = to_mask(pc.is_in(ids, value_set=pa.array(MISSING_WORDS)))
        if fake.any():
            count, row = int(np.count_nonzero(fake)), int(np.argmax(fake))
            what = f"{count} events have the {column} {ids[row].as_py()!r}, as programs write a missing value in text"
            yield Finding(count, rows, f"{what}, first {evidence.place(row)}", "leave the cell empty instead")
    names, which = codes(evidence.events["event_type"])
    for number, name in enumerate(names):
        # A type of the product's own may be called a click; what is only shown, and another spelling, is a mistake.
        if hint(name, known=names):
            count = int(np.count_nonzero(which == number))
            yield Finding(count, rows, f"{count} events of type {name!r}", f"call them {meaning(name)!r}")


def _order(evidence: Evidence) -> Iterator[Finding]:
    """Times of a person's events agree with the order in which they were written."""
    events = evidence.events
    _, who = codes(events["user_id"])
    written = next((name for name in ("log_id", "sequence") if is_present(events[name])), "")
    place = numbers(events[written]) if written else np.arange(events.num_rows)
    order = np.lexsort([place, who])
    times = numbers(events["timestamp"])[order]
    tolerance = LATE_MS if written == "log_id" else 0
    back = (who[order][1:] == who[order][:-1]) & (times[1:] < times[:-1] - tolerance)
    wrong, what = int(np.count_nonzero(back)), f"in the order of {written or 'rows'}"
    yield Finding(
        wrong,
        events.num_rows,
        f"{wrong} of {events.num_rows} events lie before the one that precedes them {what}",
        "send events as they happen and not in batches hours later"
        if written == "log_id"
        else "sort each person's rows by time, or correct the column that says when",
    )


def _unknown_items(evidence: Evidence) -> Iterator[Finding]:
    """Every event is about an item of the catalogue."""
    items = evidence.events["item_id"]
    named = to_mask(pc.not_equal(items, ""))
    unknown = named & ~to_mask(pc.is_in(items, value_set=_flat(evidence.items)))
    wrong = int(np.count_nonzero(unknown))
    some = ", ".join(repr(name) for name in pc.unique(items.filter(pa.array(unknown))).to_pylist()[:3])
    yield Finding(
        wrong,
        int(np.count_nonzero(named)),
        f"{wrong} of {np.count_nonzero(named)} events are about unknown items{', such as ' + some if some else ''}",
        "send the id under which the item is in the catalogue, or put the item before its events",
    )


def _unexplained_outcomes(evidence: Evidence) -> Iterator[Finding]:
    """What a person did because of a slate was in that slate, which was shown to them before."""
    join = _Join.of(evidence)
    outcome = join.named & ~_is_type(evidence.events, PASSIVE_EVENT_TYPES)
    times, shown_at = numbers(evidence.events["timestamp"]), join.shown_at
    after = times - shown_at
    faults = {
        "name a request that was never answered": ~join.known,
        "are of another person than the slate": join.known & ~join.same_person,
        "are about an item that was not in the slate": join.known & (join.place < 0),
        "happened before the slate or over 7 days after it": join.known
        & to_mask(evidence.events["timestamp"].is_valid())
        & ((after < -1000) | (after > ATTRIBUTION_MS)),
    }
    wrong = outcome & np.logical_or.reduce(list(faults.values()))
    counts = {what: int(np.count_nonzero(outcome & fault)) for what, fault in faults.items()}
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "all explained"
    of = int(np.count_nonzero(outcome))
    yield Finding(
        int(np.count_nonzero(wrong)),
        of,
        f"{np.count_nonzero(wrong)} of {of} outcomes that name a request are not explained by it ({told})",
        "send back the request_id of the very answer that led to the event, with the item as it stood there; "
        "where no slate is found at all, look for dropped slates (metric penchant_slates_total, result dropped)",
    )


def _positions(evidence: Evidence) -> Iterator[Finding]:
    """Positions count from 0, differ, and are those of the slate."""
    given = to_mask(evidence.events["position"].is_valid())
    positions = numbers(evidence.events["position"])[given]
    count = positions.size
    top = int(np.count_nonzero(positions == 0))
    mend = "send the item's place in the slate, 0 for the first"
    yield Finding(0, count, f"{count} positions, {top / max(count, 1):.0%} of them 0, highest {positions.max()}", mend)
    if count >= _SOME and not top:
        what = f"none of {count} positions is 0, the lowest is {positions.min()}: they seem to count from 1"
        yield Finding(count, count, what, mend, certain=True)
    if count >= _SOME and (positions == positions[0]).all():
        yield Finding(count, count, f"all {count} positions are {positions[0]}", mend, certain=True)
    if evidence.impressions is not None:
        join = _Join.of(evidence)
        judged = given & (join.place >= 0)
        wrong = judged & (numbers(evidence.events["position"]) != join.place)
        found, of = int(np.count_nonzero(wrong)), int(np.count_nonzero(judged))
        yield Finding(found, of, f"{found} of {of} positions are not those of the item in its slate", mend)


def _request_ids(evidence: Evidence) -> Iterator[Finding]:
    """What people do because of an answer names that answer."""
    events = evidence.events
    missing = ~(to_mask(events["request_id"].is_valid()) & to_mask(pc.not_equal(events["request_id"], "")))
    outcome = ~_is_type(events, PASSIVE_EVENT_TYPES)
    mend = "send the answer's request_id back on every event that it leads to"
    wrong, of = int(np.count_nonzero(outcome & missing)), int(np.count_nonzero(outcome))
    yield Finding(wrong, of, f"{wrong} of {of} outcomes name no request", mend)
    from_slate = _is_type(events, _FROM_A_SLATE) | to_mask(events["position"].is_valid())
    wrong, of = int(np.count_nonzero(from_slate & missing)), int(np.count_nonzero(from_slate))
    if of and wrong / of > LIMITS["unexplained_outcomes"]:
        what = f"{wrong} of {of} events that say they come from a slate (select_item, or a position) do not say which"
        yield Finding(wrong, of, what, mend, certain=True)


def _duplicate_ids(evidence: Evidence) -> Iterator[Finding]:
    """No event is there twice, and no request was answered twice."""
    events = evidence.events
    if is_present(events["event_id"]):
        own = _doubled(events, ["user_id", "event_id"], to_mask(events["event_id"].is_valid()))
        mend = "give each event an id of its own, and keep it when the call is repeated"
        yield Finding(own, events.num_rows, f"{own} of {events.num_rows} events repeat the id of another", mend)
    else:
        when = "timestamp" if is_present(events["timestamp"]) else "sequence"
        own = _doubled(events, ["user_id", "item_id", "event_type", when, "value"])
        what = f"{own} of {events.num_rows} rows say again what another says"
        # Who buys two of a thing says so twice; a file that is there twice doubles more than these.
        yield Finding(own, events.num_rows, what, "give events an event_id, and write each once", spared=SPARED)
    if is_present(events["log_id"]):
        again = _doubled(events, ["user_id", "log_id"], to_mask(events["log_id"].is_valid()))
        mend = "let one process write the warehouse, into one directory"
        yield Finding(again, events.num_rows, f"{again} rows repeat the log id of another of the same person", mend)
    if evidence.impressions is not None and evidence.impressions.num_rows:
        slates = evidence.impressions.num_rows
        again = _doubled(evidence.impressions, ["request_id"])
        # A call that is repeated after its answer was lost shows, and logs, a second slate under the same id.
        what = f"{again} of {slates} slates repeat the request_id of another"
        yield Finding(again, slates, what, "give each ranking request an id of its own", spared=SPARED)


def _doubled(table: pa.Table, names: list[str], judged: npt.NDArray[np.bool_] | None = None) -> int:
    """Number of rows that have the same values as an earlier one."""
    columns = [pc.dictionary_encode(pc.fill_null(table[name], _blank(table[name].type))) for name in names]
    parts = [column.combine_chunks().indices.to_numpy(zero_copy_only=False).astype(np.int64) for column in columns]
    rows = np.stack(parts, 1)[judged if judged is not None else slice(None)]
    return int(rows.shape[0] - np.unique(rows, axis=0).shape[0])


def _blank(dtype: pa.DataType) -> pa.Scalar[Any]:
    return pa.scalar("" if pa.types.is_string(dtype) else 0, dtype)


@dataclass(frozen=True, slots=True)
class _Join:
    """Events beside the slate they name; arrays by event.

    Attributes:
        named: Names a request.
        known: That request was answered; false where it names none.
        same_person: The slate was the person's, or was shown before they had a name.
        shown_at: When, ms; 0 where it is not known.
        place: Position of the item in the slate, -1 where it is not in it.
    """

    named: npt.NDArray[np.bool_]
    known: npt.NDArray[np.bool_]
    same_person: npt.NDArray[np.bool_]
    shown_at: npt.NDArray[np.int64]
    place: npt.NDArray[np.int64]

    @classmethod
    def of(cls, evidence: Evidence) -> _Join:
        events, slates = evidence.events, evidence.impressions
        assert slates is not None
        named = to_mask(pc.not_equal(events["request_id"], ""))
        found = pc.fill_null(pc.index_in(events["request_id"], value_set=_flat(slates["request_id"])), -1)
        slate = found.to_numpy().astype(np.int64)
        known = named & (slate >= 0)
        # What is not known is looked up in a row of its own, behind the last.
        people, who = codes(pa.chunked_array([*events["user_id"].chunks, *slates["user_id"].chunks], pa.string()))
        whose = np.append(who[events.num_rows :], -1)
        anonymous = np.array([is_anonymous(name) for name in people] + [False])
        shown_at = np.append(numbers(slates["timestamp"]), 0)
        lengths = pc.fill_null(pc.list_value_length(slates["item_ids"]), 0).to_numpy().astype(np.int64)
        flat = pc.list_flatten(slates["item_ids"])
        things, what = codes(pa.chunked_array([*events["item_id"].chunks, *flat.chunks], pa.string()))
        width = len(things) + 1
        inside = np.repeat(np.arange(slates.num_rows), lengths) * width + what[events.num_rows :]
        places = np.arange(inside.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        order = np.argsort(inside, kind="stable")
        wanted = slate * width + what[: events.num_rows]
        at = np.minimum(np.searchsorted(inside[order], wanted), max(inside.size - 1, 0))
        hit = known & (inside[order][at] == wanted) if inside.size else np.zeros(events.num_rows, bool)
        return cls(
            named=named,
            known=known,
            same_person=(whose[slate] == who[: events.num_rows]) | anonymous[whose[slate]],
            shown_at=shown_at[slate],
            place=np.where(hit, places[order][at] if inside.size else 0, -1),
        )


def _is_type(events: pa.Table, names: tuple[str, ...]) -> npt.NDArray[np.bool_]:
    return to_mask(pc.is_in(events["event_type"], value_set=pa.array(names)))


def _flat(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
