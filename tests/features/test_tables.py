"""Anybody's Parquet becomes the canonical tables; what is malformed is named and left out, the rest is kept."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.errors import TablesError
from features.tables.conform import Rejected, Unread
from features.tables.dataset import LoadedTable, conform, open_dataset, read_table, write_dataset
from features.tables.files import table_path
from features.tables.order import fingerprint, order_events
from features.tables.schema import (
    EVENTS,
    EVENTS_REQUIRED,
    IMPRESSIONS,
    IMPRESSIONS_REQUIRED,
    ITEMS,
    ITEMS_REQUIRED,
    USERS,
    USERS_REQUIRED,
)

MAP = EVENTS.field("attributes").type
NOON = 1_600_000_000_000  # ms; 2020-09-13 12:26:40 UTC
GOOD = {"user_id": "u", "item_id": "i", "event_type": "like", "timestamp": NOON}


def events(**columns: Any) -> LoadedTable:
    """The good event, once per value of the columns given, which replace its own."""
    length = len(next(iter(columns.values())))
    rows = {name: [value] * length for name, value in GOOD.items()} | columns
    if isinstance(rows.get("attributes"), list) and not isinstance(rows["attributes"][0], str):
        rows["attributes"] = pa.array(rows["attributes"], MAP)
    return conform(pa.table(rows), EVENTS, EVENTS_REQUIRED, "f")


def reasons(loaded: LoadedTable) -> list[tuple[int, str]]:
    return [(r.row, r.reason) for r in loaded.rejected]


def write(path: Path, columns: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


# ----------------------------------------------------------------------------------------------------- what fits


def test_a_loaded_table_has_exactly_the_schema(tmp_path: Path) -> None:
    file = write(tmp_path / "e.parquet", {k: [v] for k, v in GOOD.items()} | {"shoe_size": [42]})
    loaded = read_table(file, EVENTS, EVENTS_REQUIRED)
    assert loaded.table.schema.equals(EVENTS, check_metadata=True)
    assert loaded.table.to_pylist() == [dict.fromkeys(EVENTS.names) | GOOD]
    assert loaded.rejected == []


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        ("USER_ID", "user_id", "x"),
        ("ITEM_ID", "item_id", "x"),
        ("EVENT_TYPE", "event_type", "x"),
        ("TIMESTAMP", "timestamp", NOON),
        ("datetime", "timestamp", NOON),
        ("userId", "user_id", "x"),
        ("Item ID", "item_id", "x"),
        ("event-type", "event_type", "x"),
        ("rating", "value", 4.0),
        ("weight", "value", 4.0),
        ("EVENT_VALUE", "value", 4.0),
    ],
)
def test_usual_aliases_are_read(alias: str, name: str, value: Any) -> None:
    columns = {k: [v] for k, v in GOOD.items() if k != name} | {alias: [value]}
    assert conform(pa.table(columns), EVENTS, EVENTS_REQUIRED, "f").table[name].to_pylist() == [value]


def test_the_canonical_name_wins_and_two_aliases_are_refused() -> None:
    assert events(value=[1.0], rating=[2.0]).table["value"].to_pylist() == [1.0]
    with pytest.raises(TablesError, match=r"\['weight', 'rating'\] all mean value"):
        events(weight=[1.0], rating=[2.0])


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([7, 8], pa.int32()),
        pa.array([7, 8], pa.uint64()),
        pa.array([7.0, 8.0]),
        pa.array(["7", "8"], pa.large_string()),
        pa.array(["7", "8"], pa.string_view()),
        pa.array([b"7", b"8"]),
        pa.array(["7", "8"]).dictionary_encode(),
        pa.array([7, 8]).dictionary_encode(),
    ],
    ids=lambda a: str(a.type),
)
def test_ids_may_be_text_or_whole_numbers(ids: Any) -> None:
    assert events(user_id=ids).table["user_id"].to_pylist() == ["7", "8"]


def test_ids_are_opaque() -> None:
    strange = ["\0", "*", "{p00}", "\r\n", " ", "Zoë", "\U0001f600"]
    assert events(item_id=strange).table["item_id"].to_pylist() == strange


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (pa.array([NOON]), NOON),
        (pa.array([NOON // 1000]), NOON),
        (pa.array([NOON // 1000], pa.int32()), NOON),
        (pa.array([NOON / 1000 + 0.25]), NOON + 250),
        (pa.array([float(NOON)]), NOON),
        (pa.array([NOON * 1_000_000 + 999_999], pa.timestamp("ns")), NOON),
        (pa.array([NOON * 1000], pa.timestamp("us", tz="Europe/Berlin")), NOON),
        (pa.array([dt.date(2020, 9, 13)]), 1_599_955_200_000),
        (pa.array([str(NOON // 1000)]), NOON),
        (pa.array(["2020-09-13T12:26:40Z"]), NOON),
        (pa.array(["2020-09-13 12:26:40.5"]), NOON + 500),
        (pa.array(["2020-09-13"]), 1_599_955_200_000),
        (pa.array([decimal.Decimal(NOON)]), NOON),
    ],
    ids=str,
)
def test_times_in_every_usual_form_become_milliseconds(times: Any, expected: int) -> None:
    assert events(timestamp=times).table["timestamp"].to_pylist() == [expected]


def test_one_wrong_time_does_not_change_the_unit_of_the_others() -> None:
    loaded = events(timestamp=[NOON // 1000] * 3 + [NOON])
    assert loaded.table["timestamp"].to_pylist() == [NOON] * 3
    assert reasons(loaded) == [(3, "timestamp is 1600000000000, should be a time from 1970 up to 2100 in seconds UTC")]


def test_a_column_that_says_milliseconds_is_believed() -> None:
    rows = pa.table({k: [v] for k, v in (GOOD | {"timestamp": 1000}).items()})
    said = rows.cast(pa.schema([EVENTS.field(name) for name in GOOD]))
    assert conform(rows, EVENTS, EVENTS_REQUIRED, "f").table["timestamp"].to_pylist() == [1_000_000]
    assert conform(said, EVENTS, EVENTS_REQUIRED, "f").table["timestamp"].to_pylist() == [1000]


def test_lists_and_maps_in_every_usual_form() -> None:
    pairs = pa.list_(pa.struct([("key", pa.string()), ("value", pa.string())]))
    items = {
        "item_id": ["a", "b", "c"],
        "genres": ["Comedy|War", "", None],
        "attributes": pa.array([[{"key": "year", "value": "1999"}], [], None], pairs),
    }
    table = conform(pa.table(items), ITEMS, ITEMS_REQUIRED, "f").table
    assert table["categories"].to_pylist() == [["Comedy", "War"], None, None]
    assert table["attributes"].to_pylist() == [[("year", "1999")], [], None]
    numbers = pa.array([[("year", 1999)], None, []], pa.map_(pa.string(), pa.int64()))
    table = conform(pa.table({"item_id": [1, 2, 3], "attributes": numbers}), ITEMS, ITEMS_REQUIRED, "f").table
    assert table["attributes"].to_pylist() == [[("year", "1999")], None, []]


def test_a_directory_is_read_in_the_order_of_its_names_and_its_half_written_files_are_not(tmp_path: Path) -> None:
    for name in ("b/part-0.parquet", "a.parquet", "day=2/x.parquet"):
        write(tmp_path / name, {k: [v] for k, v in (GOOD | {"item_id": name}).items()})
    for name in (".half.parquet", "_temporary/x.parquet", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"PAR")
    loaded = read_table(tmp_path, EVENTS, EVENTS_REQUIRED)
    assert loaded.table["item_id"].to_pylist() == ["a.parquet", "b/part-0.parquet", "day=2/x.parquet"]


def test_files_of_one_table_may_have_different_columns(tmp_path: Path) -> None:
    write(tmp_path / "1.parquet", {k: [v] for k, v in GOOD.items()})
    write(tmp_path / "2.parquet", {k: [v] for k, v in (GOOD | {"value": 2}).items()})
    assert read_table(tmp_path, EVENTS, EVENTS_REQUIRED).table["value"].to_pylist() == [None, 2.0]


# ------------------------------------------------------------------------------------------------ what does not


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("user_id", ["u", None], "user_id is missing, should be given in every row"),
        ("user_id", ["u", ""], "user_id is '', should be given in every row"),
        ("user_id", [1.0, math.nan], "user_id is nan, should be given in every row"),
        ("user_id", [1.0, 1.5], "user_id is 1.5, should be text, or a whole number"),
        ("item_id", [b"i", b"\xff"], "item_id is '\\\\xff', should be text in UTF-8"),
        ("event_type", ["like", None], "event_type is missing, should be given in every row"),
        ("timestamp", [NOON, None], "timestamp is missing, should be given in every row"),
        ("timestamp", [NOON, -1], "timestamp is -1, should be a time from 1970 up to 2100"),
        ("timestamp", [NOON, 4_102_444_800_000], "timestamp is 4102444800000, should be a time from 1970 up to 2100"),
        ("timestamp", [NOON, 2**62], "timestamp is 4611686018427387904, should be a time"),
        ("timestamp", [float(NOON), math.nan], "timestamp is nan, should be given in every row"),
        ("timestamp", [NOON, 0], "timestamp is 0, should be given in every row"),
        ("timestamp", ["2020-09-13", ""], "timestamp is '', should be given in every row"),
        ("user_id", ["u", "é" * 257], "user_id is 'éééé"),
        ("timestamp", ["2020-09-13", "2020-13-09"], "timestamp is '2020-13-09', should be a time"),
    ],
)
def test_a_row_without_a_required_cell_is_rejected_with_its_field_and_what_would_be_right(
    column: str, values: list[Any], reason: str
) -> None:
    loaded = events(**{column: pa.array(values)})
    assert loaded.table.num_rows == 1
    assert [r.row for r in loaded.rejected] == [1]
    assert loaded.rejected[0].file == "f"
    assert loaded.rejected[0].reason.startswith(reason)
    assert loaded.unread == []


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("value", [1.0, math.inf], "value is inf, should be a finite number"),
        ("value", [1.0, 1e300], "value is 1e+300, should be a finite number"),
        ("value", ["1.5", "many"], "value is 'many', should be a finite number"),
        ("value", ["1.5", "1,5"], "value is '1,5', should be a finite number"),
        ("position", [0, -1], "position is -1, should be 0 or more"),
        ("position", [0, 2**31], "position is 2147483648, should be a whole number that fits int32"),
        ("position", [0.0, 0.5], "position is 0.5, should be a whole number that fits int32"),
        ("log_id", [1, -1], "log_id is -1, should be a whole number that fits uint64"),
        ("query", [b"tea", b"\xff"], "query is '\\\\xff', should be text in UTF-8"),
        ("session_id", ["s", "s" * 513], "session_id is 'sss"),
        ("ingested_at", [NOON, -5], "ingested_at is -5, should be a time from 1970 up to 2100"),
        ("attributes", ['{"a": "b"}', "red"], "attributes is 'red', should be a map from text to text, or a flat"),
        ("personal", ["yes", "perhaps"], "personal is 'perhaps', should be true or false"),
    ],
)
def test_an_optional_cell_that_cannot_be_read_costs_that_cell_only_and_is_counted(
    column: str, values: list[Any], reason: str
) -> None:
    loaded = events(**{column: pa.array(values)})
    assert loaded.rejected == []
    kept = loaded.table[column].to_pylist()
    assert kept[0] is not None
    assert kept[1] is (False if column == "personal" else None)
    (cells,) = loaded.unread
    assert (cells.file, cells.column, cells.count, cells.row) == ("f", column, 1, 1)
    assert cells.reason.startswith(reason)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("value", [1.0, math.nan]),
        ("value", ["1", ""]),
        ("value", ["1", "NaN"]),
        ("position", ["1", " "]),
        ("position", [1.0, math.nan]),
        ("ingested_at", [NOON, 0]),
        ("session_id", [1.0, math.nan]),
        ("attributes", ['{"a": "b"}', ""]),
        ("allow_train", ["true", ""]),
    ],
)
def test_a_cell_that_nobody_wrote_is_missing_and_not_unread(column: str, values: list[Any]) -> None:
    loaded = events(**{column: pa.array(values)})
    assert (loaded.rejected, loaded.unread) == ([], [])
    assert [value is None for value in loaded.table[column].to_pylist()] == [False, True]


def test_what_may_be_learned_from_is_not_guessed() -> None:
    loaded = events(allow_train=["yes", "no", "maybe", None], allow_measure=[1, 0, 7, None])
    assert loaded.table["allow_train"].to_pylist() == [True, False, False, None]
    assert loaded.table["allow_measure"].to_pylist() == [True, False, False, None]
    assert [(cells.column, cells.count, cells.row) for cells in loaded.unread] == [
        ("allow_measure", 1, 2),
        ("allow_train", 1, 2),
    ]


def test_a_row_with_two_faults_names_both() -> None:
    loaded = events(user_id=[None], item_id=[1.5], value=["many"])
    assert reasons(loaded) == [
        (
            0,
            "user_id is missing, should be given in every row; item_id is 1.5, should be text, or a whole number below "
            "9007199254740992, where double does not round it",
        )
    ]
    assert loaded.unread == []


def test_rows_are_counted_in_their_own_file(tmp_path: Path) -> None:
    for name in ("1.parquet", "2.parquet"):
        columns = {k: [v] * 3 for k, v in GOOD.items()} | {"user_id": ["u", "v", ""], "value": ["1", "x", "1"]}
        write(tmp_path / name, columns)
    loaded = read_table(tmp_path, EVENTS, EVENTS_REQUIRED)
    files = [str(tmp_path / name) for name in ("1.parquet", "2.parquet")]
    reason = "user_id is '', should be given in every row"
    assert loaded.rejected == [Rejected(file, 2, reason) for file in files]
    reason = "value is 'x', should be a finite number"
    assert loaded.unread == [Unread(file, "value", 1, 1, reason) for file in files]
    assert loaded.intake.kept == 4


def test_an_event_needs_a_time_or_a_place_in_an_order() -> None:
    columns = {k: [v] * 3 for k, v in GOOD.items()} | {"timestamp": [NOON, None, None], "sequence": [None, 5, None]}
    loaded = conform(pa.table(columns), EVENTS, EVENTS_REQUIRED, "f")
    assert loaded.table["sequence"].to_pylist() == [None, 5]
    assert reasons(loaded) == [(2, "timestamp or sequence is missing, should be given in every row")]


def test_the_second_row_of_an_id_is_rejected_across_files(tmp_path: Path) -> None:
    write(tmp_path / "1.parquet", {"item_id": ["a", "", "b"]})
    write(tmp_path / "2.parquet", {"item_id": ["c", "b", "a"]})
    loaded = read_table(tmp_path, ITEMS, ITEMS_REQUIRED)
    assert loaded.table["item_id"].to_pylist() == ["a", "b", "c"]
    first = tmp_path / "1.parquet"
    assert [(Path(r.file).name, r.row, r.reason) for r in loaded.rejected[1:]] == [
        ("2.parquet", 1, f"item_id 'b' stands already in {first} row 2: give each one row"),
        ("2.parquet", 2, f"item_id 'a' stands already in {first} row 0: give each one row"),
    ]


def test_a_broken_entry_breaks_its_list_only() -> None:
    items = {"item_id": ["a", "b", "c"], "categories": [["x"], ["x", None], []]}
    loaded = conform(pa.table(items), ITEMS, ITEMS_REQUIRED, "f")
    assert loaded.table["categories"].to_pylist() == [["x"], None, []]
    assert loaded.unread[0].reason == "categories is ['x', None], should be a list of text without missing entries"


def test_impressions_are_checked_as_a_whole() -> None:
    shown = {
        "request_id": ["a", "b", "c", "d"],
        "user_id": ["u"] * 4,
        "timestamp": [NOON] * 4,
        "item_ids": [["x", "y"]] * 4,
        "propensities": [[1.0, math.nan], [0.5], [0.5, 0.0], [1.5, 0.5]],
    }
    loaded = conform(pa.table(shown), IMPRESSIONS, IMPRESSIONS_REQUIRED, "f")
    assert loaded.table["request_id"].to_pylist() == ["a"]
    assert reasons(loaded) == [
        (1, "propensities is [0.5], should be as long as item_ids"),
        (2, "propensities is [0.5, 0.0], should be probabilities above 0 and up to 1, or NaN"),
        (3, "propensities is [1.5, 0.5], should be probabilities above 0 and up to 1, or NaN"),
    ]


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "events.parquet").write_text("user_id,item_id\n")
    with pytest.raises(TablesError, match=r"events\.parquet cannot be read as Parquet"):
        read_table(tmp_path / "events.parquet", EVENTS, EVENTS_REQUIRED)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "events.parquet", {k: [v] for k, v in GOOD.items()})
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(TablesError, match=r"events\.parquet cannot be read"):
        read_table(file, EVENTS, EVENTS_REQUIRED)


def test_a_missing_column_is_named_with_what_is_there(tmp_path: Path) -> None:
    file = write(tmp_path / "e.parquet", {"user_id": ["u"], "what": ["i"], "event_type": ["like"], "timestamp": [1]})
    with pytest.raises(TablesError, match=r"e\.parquet: no column item_id; it has \['user_id', 'what'"):
        read_table(file, EVENTS, EVENTS_REQUIRED)
    with pytest.raises(TablesError, match="no column timestamp or sequence"):
        conform(pa.table({"user_id": ["u"], "item_id": ["i"], "event_type": ["x"]}), EVENTS, EVENTS_REQUIRED, "f")


@pytest.mark.parametrize(
    ("column", "values", "should"),
    [
        ("user_id", [["u"]], "text, or a whole number"),
        ("user_id", [dt.date(2020, 1, 1)], "text, or a whole number"),
        ("timestamp", [["x"]], "a time"),
        ("value", [{"a": 1}], "a finite number"),
        ("attributes", pa.array([1]), "a map from text to text"),
        ("ingested_at", [dt.timedelta(1)], "a time"),
    ],
)
def test_a_column_of_a_type_that_cannot_fit_is_named(column: str, values: Any, should: str) -> None:
    with pytest.raises(TablesError, match=rf"f: column {column} is .*, should be {should}"):
        events(**{column: values})


def test_a_path_without_tables_is_named(tmp_path: Path) -> None:
    with pytest.raises(TablesError, match="does not exist"):
        read_table(tmp_path / "nothing", EVENTS, EVENTS_REQUIRED)
    with pytest.raises(TablesError, match=r"holds no \*\.parquet file"):
        read_table(tmp_path, EVENTS, EVENTS_REQUIRED)
    with pytest.raises(TablesError, match=r"is not a data set: it needs events\.parquet or events/, found nothing"):
        open_dataset(tmp_path)
    for number in range(9):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(TablesError, match=r"found 0\.txt, 1\.txt, 2\.txt, 3\.txt, 4\.txt, …$"):
        open_dataset(tmp_path)


# ------------------------------------------------------------------------------------------- whatever comes in


def is_finite(value: float | None) -> bool:
    with np.errstate(over="ignore"):
        return value is not None and bool(np.isfinite(np.float32(value)))


def is_good(row: dict[str, Any]) -> bool:
    """The plain twin of the checks, for millisecond times."""
    time = row["timestamp"]
    named = all(row[name] not in (None, "") for name in ("user_id", "item_id", "event_type"))
    timed = time is not None and 0 <= time < 4_102_444_800_000
    return named and timed


names = st.none() | st.text(st.characters(codec="utf-8"), max_size=4)
rows = st.fixed_dictionaries(
    {
        "user_id": names,
        "item_id": names,
        "event_type": names,
        "timestamp": st.none() | st.integers(-(2**63), 2**63 - 1) | st.integers(10**12, 4 * 10**12),
        "value": st.none() | st.floats(),
    }
)


@given(st.lists(rows, max_size=12))
def test_exactly_the_good_rows_are_kept_and_the_others_named(given_rows: list[dict[str, Any]]) -> None:
    good = [row for row in given_rows if is_good(row)]
    table = pa.Table.from_pylist(given_rows, pa.schema([EVENTS.field(n) for n in GOOD] + [("value", pa.float64())]))
    loaded = conform(table, EVENTS, EVENTS_REQUIRED, "f")
    assert [r.row for r in loaded.rejected] == [n for n, row in enumerate(given_rows) if row not in good]
    assert sum(cells.count for cells in loaded.unread) == sum(
        not is_finite(row["value"]) and row["value"] is not None and not math.isnan(row["value"]) for row in good
    )
    kept = loaded.table.select([*GOOD, "value"]).to_pylist()
    assert [row["value"] is None for row in kept] == [not is_finite(row["value"]) for row in good]
    assert [row | {"value": None} for row in kept] == [row | {"value": None} for row in good]
    loaded.table.validate(full=True)


COLUMNS: list[tuple[pa.DataType, list[Any]]] = [
    (pa.null(), [None]),
    (pa.bool_(), [None, True, False]),
    (pa.int8(), [None, 0, 1, -1, 100]),
    (pa.uint64(), [None, 0, 2**64 - 1]),
    (pa.float16(), [None, np.float16(0.5), np.float16(1)]),
    (pa.float64(), [None, 0.5, 1.0, -1.0, math.nan, math.inf, 1e300, 2.0**63]),
    (pa.decimal128(10, 2), [None, decimal.Decimal("1.50"), decimal.Decimal(7)]),
    (pa.string(), [None, "", "1", "x", "2020-01-01", "true", "9" * 30, "1e99"]),
    (pa.large_string(), [None, "a|b", "é"]),
    (pa.binary(), [None, b"", b"\xff", b"ok"]),
    (pa.binary(2), [None, b"\xc3\xa9", b"\xff\xff"]),
    (pa.date32(), [None, dt.date(2020, 1, 1), dt.date(1, 1, 1)]),
    (pa.time64("us"), [None, dt.time(1)]),
    (pa.timestamp("us"), [None, dt.datetime(2020, 1, 1), dt.datetime(1, 1, 1)]),
    (pa.timestamp("ns"), [None, 1, 2**62]),
    (pa.duration("s"), [None, dt.timedelta(1)]),
    (pa.list_(pa.int8()), [None, [], [1], [1, None]]),
    (pa.list_(pa.float64()), [None, [], [0.5], [1.0, math.nan]]),
    (pa.large_list(pa.string()), [None, [], ["a"], ["a", None]]),
    (pa.list_(pa.binary()), [None, [], [b"\xff"]]),
    (pa.list_(pa.float32(), 2), [None, [1.0, 2.0]]),
    (pa.list_(pa.list_(pa.float32())), [None, [], [[1.0], []]]),
    (pa.map_(pa.string(), pa.int8()), [None, [], [("a", 1)], [("a", None)]]),
    (pa.map_(pa.binary(), pa.string()), [None, [(b"\xff", "a")]]),
    (pa.map_(pa.date32(), pa.string()), [None, []]),
    (pa.struct([("a", pa.int8())]), [None, {"a": 1}]),
    (pa.list_(pa.struct([("a", pa.string()), ("b", pa.int8())])), [None, [], [{"a": "x", "b": 1}], [None]]),
]
TABLES = [(EVENTS, EVENTS_REQUIRED), (ITEMS, ITEMS_REQUIRED), (IMPRESSIONS, IMPRESSIONS_REQUIRED)]


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=300)
@given(st.data(), st.sampled_from(TABLES))
def test_any_column_of_any_type_is_read_rejected_or_refused(data: st.DataObject, kind: tuple[pa.Schema, Any]) -> None:
    schema, required = kind
    length = data.draw(st.integers(0, 4))
    needed = {f.name for f in schema if not f.nullable}
    columns = {}
    for name in needed | data.draw(st.sets(st.sampled_from(schema.names))):
        dtype, choice = data.draw(st.sampled_from(COLUMNS))
        values = data.draw(st.lists(st.sampled_from(choice), min_size=length + 1, max_size=length + 1))
        columns[name] = pa.array(values, dtype).slice(1)
    try:
        loaded = conform(pa.table(columns), schema, required, "f")
    except TablesError:
        return
    loaded.table.validate(full=True)
    assert loaded.table.num_rows + len(loaded.rejected) == length
    assert all(0 < cells.count <= loaded.table.num_rows + length for cells in loaded.unread)
    assert not {cells.column for cells in loaded.unread} & needed
    assert loaded.table.schema.equals(schema)
    assert all(loaded.table[name].null_count == 0 for name in needed)


# ------------------------------------------------------------------------------------------ order and content


def small(rows: list[tuple[str, str, int]]) -> pa.Table:
    who, what, when = zip(*rows, strict=True)
    return events(user_id=list(who), item_id=list(what), timestamp=list(when)).table


def pairs(table: pa.Table) -> list[tuple[str, str]]:
    return list(zip(table["user_id"].to_pylist(), table["item_id"].to_pylist(), strict=True))


def test_each_persons_events_stand_together_oldest_first() -> None:
    table = small([("b", "1", NOON + 2), ("a", "2", NOON + 5), ("b", "3", NOON + 1), ("a", "4", NOON + 4)])
    assert pairs(order_events(table)) == [("b", "3"), ("b", "1"), ("a", "4"), ("a", "2")]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"timestamp": [NOON, NOON, NOON], "sequence": [2, 0, 1]}, ["b", "c", "a"]),
        ({"timestamp": [NOON, NOON + 1, NOON], "sequence": [2, 0, 1]}, ["c", "a", "b"]),
        ({"timestamp": [NOON, NOON + 1, NOON + 2], "log_id": [30, 20, 10]}, ["c", "b", "a"]),
        ({"timestamp": [NOON, NOON + 1, NOON + 2], "log_id": [20, None, 10]}, ["b", "c", "a"]),
    ],
)
def test_log_order_comes_before_time_and_time_before_sequence(columns: dict[str, Any], expected: list[str]) -> None:
    assert order_events(events(item_id=["a", "b", "c"], **columns).table)["item_id"].to_pylist() == expected


def test_ties_are_broken_at_random_by_person_and_not_by_the_file() -> None:
    rows = [(str(user), str(item), NOON) for user in range(200) for item in range(8)]
    ordered = pairs(order_events(small(rows)))
    shuffled = sorted(rows, key=lambda row: (int(row[0]), random.Random(row[1] + row[0]).random()))
    assert pairs(order_events(small(shuffled))) == ordered
    assert pairs(order_events(small(rows), seed=1)) != ordered
    # The first item of a person says nothing about the first one of another: each is first about 25 times in 200.
    first = np.bincount([int(item) for _, item in ordered[::8]], minlength=8)
    assert first.min() >= 10
    assert first.max() <= 45


def test_ordering_twice_changes_nothing_and_copies_nothing() -> None:
    once = order_events(small([("a", str(i % 7), NOON + i % 3) for i in range(50)]))
    assert order_events(once) is once


def test_two_events_of_a_person_with_an_item_in_one_moment_keep_their_order() -> None:
    table = events(event_type=["view_item", "add_to_cart", "purchase"]).table
    assert order_events(table)["event_type"].to_pylist() == ["view_item", "add_to_cart", "purchase"]


def test_the_fingerprint_sees_rows_and_not_files(tmp_path: Path) -> None:
    table = events(item_id=["a", "b", "c"], value=[1.0, None, 3.0], attributes=[[("k", "v")], None, []]).table
    expected = fingerprint({"events": table})
    for version, size in (("1.0", 1), ("2.6", 2), ("2.4", 3)):
        pq.write_table(table, tmp_path / "t.parquet", version=version, row_group_size=size, compression="gzip")
        assert fingerprint({"events": read_table(tmp_path / "t.parquet", EVENTS, EVENTS_REQUIRED).table}) == expected
    pieces = pa.concat_tables([table.slice(0, 1), table.slice(1, 2)])
    assert fingerprint({"events": pieces}) == expected


def changed(column: str, values: list[Any]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        index = table.schema.get_field_index(column)
        return table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed("item_id", ["a", "c"]),
        changed("item_id", ["ab", ""]),
        changed("value", [1.0, None]),
        changed("value", [None, 1.0]),
        changed("value", [1.0, 0.0]),
        changed("attributes", [[("k", "w")], None]),
        changed("attributes", [[], [("k", "v")]]),
        lambda table: table.slice(1),
        lambda table: table.take([1, 0]),
    ],
)
def test_the_fingerprint_changes_with_any_value(change: Callable[[pa.Table], pa.Table]) -> None:
    table = events(item_id=["a", "b"], value=[1.0, 2.0], attributes=[[("k", "v")], None]).table
    assert fingerprint({"events": change(table)}) != fingerprint({"events": table})


# ------------------------------------------------------------------------------------------------- data sets


def items(*ids: str) -> pa.Table:
    return pa.table({"item_id": list(ids)})


def test_a_data_set_comes_back_as_it_was_written(tmp_path: Path) -> None:
    table = small([("b", "y", NOON + 2), ("a", "x", NOON), ("b", "x", NOON + 1)])
    users = pa.table({"user_id": ["a", "b"], "attributes": pa.array([[("k", "v")], None], USERS.field(1).type)})
    info = write_dataset(tmp_path / "d", table, items("x", "y", "z"), users, name="small", notes="by hand")
    data = open_dataset(tmp_path / "d")
    assert data.events.equals(order_events(table))
    assert data.items["item_id"].to_pylist() == ["x", "y", "z"]
    assert data.users["attributes"].to_pylist() == [[("k", "v")], None]
    assert data.info == info == json.loads((tmp_path / "d" / "dataset.json").read_text())
    assert data.rejected == []
    expected = {"name": "small", "users": 2, "items": 3, "events": 3, "ordered_only": False, "notes": "by hand"}
    assert {k: info[k] for k in expected} == expected
    assert info["event_types"] == {"like": 3}
    assert (info["first_timestamp"], info["last_timestamp"]) == (NOON, NOON + 2)
    assert pq.read_schema(tmp_path / "d" / "events.parquet").names == ["user_id", "item_id", "event_type", "timestamp"]


def test_a_data_set_with_order_only_says_so(tmp_path: Path) -> None:
    table = pa.table({"user_id": ["a", "a"], "item_id": ["x", "y"], "event_type": ["v", "v"], "sequence": [1, 0]})
    info = write_dataset(tmp_path / "d", table, items("x", "y"), name="ordered")
    assert info["ordered_only"] is True
    assert info["first_timestamp"] is None
    assert open_dataset(tmp_path / "d").events["item_id"].to_pylist() == ["y", "x"]


def test_a_data_set_of_somebody_else_needs_events_only(tmp_path: Path) -> None:
    columns = {
        "USER_ID": [1, 1],
        "ITEM_ID": [7, 8],
        "EVENT_TYPE": ["a", "b"],
        "TIMESTAMP": [1_600_000_001, 1_600_000_000],
    }
    write(tmp_path / "events" / "part.parquet", columns | {"EVENT_VALUE": [1.0, 2.0]})
    data = open_dataset(tmp_path)
    assert data.events["item_id"].to_pylist() == ["8", "7"]
    assert data.items["item_id"].to_pylist() == ["7", "8"]
    assert data.users.num_rows == 0
    assert data.info["name"] == tmp_path.name
    assert data.info["users"] == 1


def test_the_fingerprint_of_a_data_set_comes_from_its_rows_not_from_its_json(tmp_path: Path) -> None:
    info = write_dataset(tmp_path / "d", small([("a", "x", NOON)]), items("x"), name="n")
    (tmp_path / "d" / "dataset.json").write_text(json.dumps({"fingerprint": "lie", "name": "n"}))
    assert open_dataset(tmp_path / "d").info["fingerprint"] == info["fingerprint"]


def test_rejected_rows_of_all_tables_are_gathered(tmp_path: Path) -> None:
    write(tmp_path / "events.parquet", {k: [v, None] for k, v in GOOD.items()})
    write(tmp_path / "items.parquet", {"item_id": ["i", "i"]})
    write(tmp_path / "users.parquet", {"user_id": ["", "u"]})
    rejected = open_dataset(tmp_path).rejected
    assert [(Path(r.file).name, r.row) for r in rejected] == [
        ("events.parquet", 1),
        ("items.parquet", 1),
        ("users.parquet", 0),
    ]


def test_writing_again_replaces_the_whole_data_set(tmp_path: Path) -> None:
    out = tmp_path / "d"
    write_dataset(out, small([("a", "x", NOON)]), items("x"), pa.table({"user_id": ["a"]}), name="one")
    write_dataset(out, small([("b", "x", NOON)]), items("x"), name="two")
    assert sorted(p.name for p in out.iterdir()) == ["dataset.json", "events.parquet", "items.parquet"]
    assert open_dataset(out).info["name"] == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_somebody_elses_directory_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(TablesError, match="is not a data set: choose a new directory"):
        write_dataset(tmp_path, small([("a", "x", NOON)]), items("x"), name="n")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_failed_write_leaves_the_old_data_set(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", small([("a", "x", NOON)]), items("x"), name="one")
    with pytest.raises(TablesError, match="items: 1 malformed rows, first row 1"):
        write_dataset(tmp_path / "d", small([("a", "x", NOON)]), items("x", "x"), name="two")
    assert open_dataset(tmp_path / "d").info["name"] == "one"


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_dataset_json_is_named(tmp_path: Path, content: str) -> None:
    write_dataset(tmp_path / "d", small([("a", "x", NOON)]), items("x"), name="n")
    (tmp_path / "d" / "dataset.json").write_text(content)
    with pytest.raises(TablesError, match=r"dataset\.json .*JSON"):
        open_dataset(tmp_path / "d")


def test_a_table_is_a_file_or_a_directory(tmp_path: Path) -> None:
    assert table_path(tmp_path, "events") is None
    (tmp_path / "events").mkdir()
    assert table_path(tmp_path, "events") == tmp_path / "events"
    write(tmp_path / "users.parquet", {"user_id": ["u"]})
    assert read_table(tmp_path / "users.parquet", USERS, USERS_REQUIRED).table.num_rows == 1
    assert table_path(tmp_path, "users") == tmp_path / "users.parquet"
