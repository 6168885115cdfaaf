"""Every check passes on a sound stream and finds the one defect that is planted for it, and says what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import PenchantError, TablesError
from features.tables.conform import Intake, Rejected, Unread
from features.tables.evidence import Evidence
from features.tables.schema import EVENTS, IMPRESSIONS
from features.tables.validate import LATE_MS, LIMITS, judge, validate

NOW = 1_790_000_000_000
HOUR = 3_600_000
ITEMS = [f"i{n}" for n in range(12)]


def slates() -> list[dict]:
    return [
        {
            "request_id": f"r{person}-{turn}",
            "user_id": f"p{person}",
            "timestamp": NOW - 100 * HOUR + turn * HOUR,
            "item_ids": [ITEMS[(person + turn + at) % 12] for at in range(6)],
            "propensities": [1.0] * 6,
        }
        for person in range(20)
        for turn in range(10)
    ]


def events() -> list[dict]:
    """One outcome per slate, at positions 0 to 5, arriving a second after it happened."""
    rows = []
    for number, slate in enumerate(slates()):
        position = number % 6 if number % 3 else 0
        at = slate["timestamp"] + 60_000
        rows.append(
            {
                "user_id": slate["user_id"],
                "item_id": slate["item_ids"][position],
                "event_type": "select_item",
                "timestamp": at,
                "event_id": f"e{number}",
                "log_id": (at + 1000) << 20 | number % 1000,
                "ingested_at": at + 1000,
                "request_id": slate["request_id"],
                "position": position,
            }
        )
    return rows


def verdict(rows: list[dict], shown: list[dict] | None = None, items: list[str] | None = ITEMS, **more) -> dict:
    evidence = Evidence(
        events=pa.Table.from_pylist(rows, EVENTS),
        items=None if items is None else pa.array(items),
        impressions=pa.Table.from_pylist(slates() if shown is None else shown, IMPRESSIONS),
        now_ms=NOW,
        **more,
    )
    return {check["name"]: check for check in judge(evidence)["checks"]}


def failing(found: dict) -> set[str]:
    return {name for name, check in found.items() if not check["passed"]}


def test_a_sound_stream_passes_every_check():
    found = verdict(events())
    assert list(found) == list(LIMITS)
    assert failing(found) == set()


def swap_times(rows: list[dict]) -> None:
    for one, other in zip(rows[::10], rows[5::10], strict=True):
        one["timestamp"], other["timestamp"] = other["timestamp"], one["timestamp"]


def each(rows: list[dict], every: int, **change) -> None:
    for row in rows[::every]:
        row.update({name: value(row) if callable(value) else value for name, value in change.items()})


DEFECTS = {
    "an item that is nowhere": (lambda rows: each(rows, 200, item_id="ghost"), "unknown_items", "'ghost'"),
    "times against the log": (swap_times, "order", "order of log_id"),
    "a request never answered": (
        lambda rows: each(rows, 50, request_id="r?"),
        "unexplained_outcomes",
        "never answered",
    ),
    "an item that was not shown": (
        lambda rows: each(rows, 50, item_id=lambda row: ITEMS[(ITEMS.index(row["item_id"]) + 6) % 12]),
        "unexplained_outcomes",
        "not in the slate",
    ),
    "somebody else's slate": (lambda rows: each(rows, 50, user_id="p99"), "unexplained_outcomes", "another user"),
    "an outcome before its slate": (
        lambda rows: each(rows, 1, timestamp=lambda row: row["timestamp"] - 62_000, position=None),
        "unexplained_outcomes",
        "before the slate",
    ),
    "positions from 1": (
        lambda rows: each(rows, 1, position=lambda row: row["position"] + 1),
        "positions",
        "count from 1",
    ),
    "one position for all": (lambda rows: each(rows, 1, position=0), "positions", "all 200 positions are 0"),
    "positions of something else": (
        lambda rows: each(rows, 20, position=lambda row: (row["position"] + 3) % 6),
        "positions",
        "not those of the item",
    ),
    "no request ids": (lambda rows: each(rows, 4, request_id=None, position=None), "request_ids", "name no request"),
    "clicks without a request": (lambda rows: each(rows, 40, request_id=None), "request_ids", "do not say which"),
    "a clock that is ahead": (
        lambda rows: each(rows, 30, ingested_at=lambda row: row["timestamp"] - 2 * LATE_MS),
        "clock_skew",
        "ahead",
    ),
    "local time": (
        lambda rows: each(rows, 1, ingested_at=lambda row: row["timestamp"] + 2 * HOUR),
        "clock_skew",
        "2.0 hours behind",
    ),
    "local time of some": (
        lambda rows: each(rows, 10, ingested_at=lambda row: row["timestamp"] + 5 * HOUR + 1000),
        "clock_skew",
        "20 of 200 events are whole half hours away",
    ),
    "local time of some, half an hour ahead": (
        lambda rows: each(rows, 10, ingested_at=lambda row: row["timestamp"] - 5.5 * HOUR + 1000),
        "clock_skew",
        "20 of 200 events are whole half hours away",
    ),
    "one clock of 200 in the future": (
        lambda rows: rows[77].update(timestamp=NOW + HOUR),
        "clock_skew",
        "row 77: timestamp 1790003600000 (2026-09-21T15:13:20Z, logged ",
    ),
    "one clock of 200 that stands at 1980": (
        lambda rows: rows[78].update(timestamp=315_532_800_000),
        "clock_skew",
        "1 of 200 events are from the future or from before 1990, first row 78: timestamp 315532800000 (1980-01-01T00:",
    ),
    "one clock that is two minutes ahead of the log": (
        lambda rows: rows[79].update(ingested_at=rows[79]["timestamp"] - 2 * LATE_MS),
        "clock_skew",
        "1 of 200 events are over 60 s ahead of the clock of the log, first row 79: timestamp ",
    ),
    "the future": (lambda rows: each(rows, 30, timestamp=NOW + HOUR), "clock_skew", "from the future"),
    "an event id used twice": (
        lambda rows: rows[7].update(event_id=rows[6]["event_id"], user_id=rows[6]["user_id"]),
        "duplicate_ids",
        "repeat the id",
    ),
    "a row written twice": (lambda rows: rows.append(dict(rows[-1])), "duplicate_ids", "repeat the log id"),
    "a name for what is shown": (
        lambda rows: each(rows, 60, event_type="impression"),
        "types",
        "call them 'view_item_list'",
    ),
    "another spelling": (lambda rows: each(rows, 60, event_type="Select Item"), "types", "call them 'select_item'"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found_and_the_line_says_what_to_do(name):
    plant, check, words = DEFECTS[name]
    rows = events()
    plant(rows)
    found = verdict(rows)
    assert not found[check]["passed"]
    assert words in found[check]["detail"]
    assert "To do: " in found[check]["detail"]


def test_defects_stay_where_they_are():
    """What one check finds, the others do not blame on something else."""
    for name, allowed in {
        "an item that is nowhere": {"unknown_items"},
        "positions from 1": {"positions"},
        "local time": {"clock_skew"},
        "clicks without a request": {"request_ids"},
    }.items():
        rows = events()
        DEFECTS[name][0](rows)
        assert failing(verdict(rows)) == allowed, name


def test_malformed_rows_are_named():
    found = verdict(events(), rejected=[Rejected("events.parquet", 7, "timestamp is 'x', should be a time")])
    assert failing(found) == {"types"}
    assert "events.parquet row 7: timestamp is 'x'" in found["types"]["detail"]


def test_slates_logged_twice_are_found():
    assert failing(verdict(events(), shown=[*slates(), *slates()[:20]])) == {"duplicate_ids"}
    assert failing(verdict(events(), shown=[*slates(), *slates()[:2]])) == set()


def test_a_moved_limit_holds_for_slates_logged_twice_too():
    evidence = Evidence(
        pa.Table.from_pylist(events(), EVENTS),
        impressions=pa.Table.from_pylist([*slates(), *slates()[:20]], IMPRESSIONS),
        now_ms=NOW,
    )
    assert all(check["passed"] for check in judge(evidence, {"duplicate_ids": 0.5})["checks"])


def test_a_slate_shown_before_the_login_explains_what_came_after():
    shown = [slate | {"user_id": "a:visitor"} for slate in slates()]
    assert failing(verdict(events(), shown=shown)) == set()


def test_what_cannot_be_checked_is_said_and_not_passed():
    rows = [{"user_id": "p", "item_id": "i1", "event_type": "like", "sequence": n} for n in range(3)]
    said = judge(Evidence(pa.Table.from_pylist(rows, EVENTS)))
    assert {check["name"] for check in said["checks"]} == {"types", "duplicate_ids"}
    assert set(said["skipped"]) == set(LIMITS) - {"types", "duplicate_ids"}


def test_an_empty_stream_is_no_defect_and_not_sound_either():
    said = judge(Evidence(EVENTS.empty_table(), pa.array([], pa.string()), IMPRESSIONS.empty_table()))
    assert said["checks"] == []
    assert said["skipped"] == dict.fromkeys(LIMITS, "there are no events")


def test_outcomes_without_times_are_explained_by_their_slates():
    rows = [{k: v for k, v in row.items() if k not in ("timestamp", "ingested_at", "log_id")} for row in events()]
    each(rows, 1, sequence=lambda row: rows.index(row))
    assert failing(verdict(rows)) == set()
    each(rows, 50, request_id="r?")
    assert failing(verdict(rows)) == {"unexplained_outcomes"}


def test_what_comes_late_by_any_time_is_no_local_time():
    rows = events()
    for number, row in enumerate(rows[::3]):
        row["ingested_at"] = row["timestamp"] + HOUR + number * 100_000
    assert failing(verdict(rows)) == set()


def test_equal_rows_without_ids_are_a_few_purchases_or_a_file_that_is_there_twice():
    rows = [{k: row[k] for k in ("user_id", "item_id", "event_type", "timestamp")} for row in events()]
    assert failing(verdict([*rows, rows[-1]], shown=[])) == {"request_ids"}
    assert failing(verdict(sorted(rows * 2, key=lambda row: row["timestamp"]), shown=[])) == {
        "request_ids",
        "duplicate_ids",
    }


def test_limits_can_be_moved():
    rows = events()
    each(rows, 4, request_id=None, position=None, event_type="purchase")
    evidence = Evidence(pa.Table.from_pylist(rows, EVENTS), impressions=pa.Table.from_pylist(slates(), IMPRESSIONS))
    strict, loose = judge(evidence), judge(evidence, {"request_ids": 0.5})
    name = {check["name"]: check["passed"] for check in strict["checks"]}
    assert (name["request_ids"], {c["name"]: c["passed"] for c in loose["checks"]}["request_ids"]) == (False, True)
    with pytest.raises(PenchantError, match="no check 'nonsense'"):
        judge(evidence, {"nonsense": 1})


def test_one_wrong_clock_is_found_among_many_and_a_share_may_be_allowed():
    count = 100_000
    times = NOW - 900 * 24 * HOUR + np.arange(count) * 60_000
    times[54_321] = NOW - 300 * 24 * HOUR  # not in the future: only the others tell
    columns = {"user_id": ["p"] * count, "item_id": ["i1"] * count, "event_type": ["like"] * count, "timestamp": times}
    table = pa.table(columns)
    full = pa.table([table[f.name] if f.name in columns else pa.nulls(count, f.type) for f in EVENTS], schema=EVENTS)
    found = {check["name"]: check for check in judge(Evidence(full, now_ms=NOW))["checks"]}["clock_skew"]
    assert not found["passed"]
    assert "1 of 100000 events lie far behind 2024-" in found["detail"]
    assert f"first row 54321: timestamp {NOW - 300 * 24 * HOUR} (2025-11-25T14:13:20Z) of user 'p'" in found["detail"]
    allowed = judge(Evidence(full, now_ms=NOW), {"clock_skew": 1e-5})
    assert {check["name"]: check["passed"] for check in allowed["checks"]}["clock_skew"]


def test_few_unread_cells_are_let_pass_and_many_fail_the_types():
    for count, passes in ((1, True), (3, False)):
        cells = [Unread("items.parquet", "price", count, 5, "price is 'free', should be a number")]
        found = verdict(events(), intakes={"items": Intake(100, [], cells)})
        assert found["types"]["passed"] == passes
        assert (
            f"{count} of 100 cells of items.price cannot be read, first items.parquet row 5" in found["types"]["detail"]
        )


def test_a_check_without_a_row_to_look_at_is_not_passed():
    rows = events()
    each(rows, 1, event_type="view_item_list", position=None)
    said = judge(Evidence(pa.Table.from_pylist(rows, EVENTS), pa.array(ITEMS), IMPRESSIONS.empty_table(), now_ms=NOW))
    assert "nothing that it could look at" in said["skipped"]["request_ids"]
    assert "request_ids" not in {check["name"] for check in said["checks"]}
    assert said["passed"]
    assert not judge(Evidence(EVENTS.empty_table()))["passed"]


class TestDirectory:
    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        pq.write_table(pa.Table.from_pylist(events(), EVENTS), tmp_path / "events.parquet")
        pq.write_table(pa.table({"item_id": ITEMS}), tmp_path / "items.parquet")
        pq.write_table(pa.Table.from_pylist(slates(), IMPRESSIONS), tmp_path / "impressions.parquet")
        return tmp_path

    def test_is_read_as_everybody_reads_it(self, data):
        said = validate(data)
        assert (said["events"], said["impressions"], said["skipped"]) == (200, 200, {})
        assert all(check["passed"] for check in said["checks"])

    def test_malformed_rows_fail_the_types(self, data):
        table = pq.read_table(data / "events.parquet")
        times = table["timestamp"].to_pylist()
        broken = table.set_column(3, "timestamp", pa.array([str(time) for time in times[:-1]] + ["yesterday"]))
        pq.write_table(broken, data / "events.parquet")
        [types] = [check for check in validate(data)["checks"] if not check["passed"]]
        assert types["name"] == "types"
        assert "row 199: timestamp is 'yesterday'" in types["detail"]

    def test_a_column_that_cannot_be_right_fails_the_types(self, data):
        pq.write_table(pa.table({"item_id": ITEMS, "price": [{"eur": 1}] * 12}), data / "items.parquet")
        failed = [check for check in validate(data)["checks"] if not check["passed"]]
        assert [check["name"] for check in failed] == ["types"]
        assert "price" in failed[0]["detail"]

    def test_rows_out_of_order_are_found_in_files_without_a_log(self, data):
        rows = [{k: row[k] for k in ("user_id", "item_id", "event_type", "timestamp")} for row in events()]
        pq.write_table(pa.Table.from_pylist(rows[::-1]), data / "events.parquet")
        (data / "impressions.parquet").unlink()
        assert [check["name"] for check in validate(data)["checks"] if not check["passed"]] == ["order"]

    def test_what_is_no_data_set_is_a_mistake(self, tmp_path):
        with pytest.raises(TablesError, match="not a data set"):
            validate(tmp_path)

    @pytest.mark.parametrize(
        ("name", "write", "words"),
        [
            ("events", lambda file: pq.write_table(EVENTS.empty_table(), file), "events.parquet holds no row"),
            ("events", lambda file: file.with_suffix("").mkdir(), "holds no *.parquet file"),
            ("items", lambda file: pq.write_table(pa.table({"item_id": pa.array([], pa.string())}), file), "no row"),
            (
                "impressions",
                lambda file: pq.write_table(IMPRESSIONS.empty_table(), file),
                "impressions.parquet holds no",
            ),
        ],
    )
    def test_a_table_that_is_there_and_holds_nothing_fails(self, data, name, write, words):
        file = data / f"{name}.parquet"
        file.unlink()
        write(file)
        said = validate(data)
        assert not said["passed"]
        [types] = [check for check in said["checks"] if check["name"] == "types"]
        assert not types["passed"]
        assert words in types["detail"]

    def test_a_folder_made_for_impressions_that_are_to_come_is_none(self, data):
        (data / "impressions.parquet").unlink()
        (data / "impressions").mkdir()
        assert "unexplained_outcomes" in validate(data)["skipped"]

    def test_rows_of_which_none_is_readable_fail(self, data):
        rows = {"user_id": ["a"] * 3, "item_id": ["x"] * 3, "event_type": ["like"] * 3, "timestamp": ["soon"] * 3}
        pq.write_table(pa.table(rows), data / "events.parquet")
        said = validate(data)
        assert not said["passed"]
        assert [check["name"] for check in said["checks"]] == ["types"]
        assert "3 malformed rows of 3" in said["checks"][0]["detail"]

    def test_a_wrong_clock_is_named_by_its_file_and_row(self, data):
        rows = events()
        rows[150]["timestamp"] = 4_000_000_000_000
        (data / "events.parquet").unlink()
        (data / "events").mkdir()
        parts = [rows[:100], [{**rows[0], "user_id": None}, *rows[100:]]]
        schema = pa.schema([f.with_nullable(True) for f in EVENTS]).with_metadata(EVENTS.metadata)
        for number, part in enumerate(parts):
            pq.write_table(pa.Table.from_pylist(part, schema), data / "events" / f"{number}.parquet")
        [clock] = [check for check in validate(data)["checks"] if check["name"] == "clock_skew"]
        assert not clock["passed"]
        assert (
            f"first {data / 'events' / '1.parquet'} row 51: timestamp 4000000000000 (2096-10-02T07:06:40Z"
            in clock["detail"]
        )


def test_a_missing_id_that_went_through_text_is_found():
    rows = events()
    rows[3]["user_id"] = "nan"
    found = verdict(rows)["types"]
    assert not found["passed"]
    assert "1 events have the user_id 'nan', as programs write a missing value in text, first row 3" in found["detail"]


def test_every_table_that_a_training_reads_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pq.write_table(pa.Table.from_pylist(events(), EVENTS), tmp_path / "events.parquet")
    pq.write_table(pa.table({"user_id": ["p1", None]}), tmp_path / "users.parquet")
    pq.write_table(pa.table({"query": ["tea"], "item_id": ["i1"], "grade": ["good"]}), tmp_path / "judgments.parquet")
    said = validate(tmp_path)
    (types,) = [check for check in said["checks"] if check["name"] == "types"]
    assert not types["passed"]
    assert (said["rejected"], [row["table"] for row in said["rejections"]]) == (2, ["users", "judgments"])
    assert "users: 1 of 2 rows rejected (50 %)" in capsys.readouterr().err
    (tmp_path / "users.parquet").unlink()
    (tmp_path / "judgments.parquet").unlink()
    assert validate(tmp_path)["rejected"] == 0


def test_the_unit_of_times_is_said(tmp_path: Path):
    rows = [{name: row[name] for name in ("user_id", "item_id", "event_type")} for row in events()]
    seconds = [{**row, "timestamp": NOW // 1000 - 10**6 + n} for n, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(seconds), tmp_path / "events.parquet")
    assert validate(tmp_path)["time_units"] == {"events.timestamp": "s"}
