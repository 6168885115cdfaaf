"""What is left out of a data set is told in one line each, counted, and refused where it is too much."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.errors import TablesError
from features.tables.conform import Intake, Rejected, Unread
from features.tables.intake import REJECTED_SHARE, admit, require_few, summary, tell


def rejected(count: int, file: str = "events.parquet") -> list[Rejected]:
    return [Rejected(file, 7 + row, f"timestamp is 'x{row}', should be a time") for row in range(count)]


def told(intakes: dict[str, Intake], units: dict[str, str] | None = None) -> list[str]:
    stream = io.StringIO()
    tell(intakes, units, stream)
    return stream.getvalue().splitlines()


def test_a_clean_data_set_says_nothing():
    assert told({"events": Intake(10), "items": Intake(0)}, {}) == []
    assert summary({"events": Intake(10)}) == {"rejected": 0, "rejections": [], "unread": {}}


def test_one_line_a_table_and_one_a_column_with_the_first_and_the_count():
    cells = [Unread("a.parquet", "price", 2, 3, "price is '', should be a number")]
    cells += [Unread("b.parquet", "price", 1, 0, "price is 'free', should be a number")]
    cells += [Unread("a.parquet", "available_until", 5, 0, "available_until is 'soon', should be a time")]
    intakes = {"events": Intake(997, rejected(3)), "items": Intake(5, [], cells), "users": Intake(4)}
    assert told(intakes, {"events.timestamp": "s"}) == [
        "events: 3 of 1,000 rows rejected (0.3 %), first events.parquet row 7: timestamp is 'x0', should be a time",
        "items.price: 3 of 5 cells unread and left empty, first a.parquet row 3: price is '', should be a number",
        "warning: items.available_until: every cell is unread, so the column is empty, and these items are not shown, "
        "first a.parquet row 0: available_until is 'soon', should be a time",
        "times read as: events.timestamp in s",
    ]
    answer = admit(intakes, REJECTED_SHARE, "--set max_rejected_share=", {"events.timestamp": "s"}, io.StringIO())
    assert answer == {
        "rejected": 3,
        "rejections": [
            {"table": "events", "file": row.file, "row": row.row, "reason": row.reason} for row in rejected(3)
        ],
        "unread": {"items.price": 3, "items.available_until": 5},
        "time_units": {"events.timestamp": "s"},
    }


def test_a_line_is_one_line_whatever_a_name_holds():
    assert len(told({"events": Intake(1, [Rejected("a\nb\r\x85c", 0, "bad\u2028cell")])})) == 1


def test_twenty_bad_rows_are_one_line_and_the_first_few_are_spelt_out():
    intakes = {"events": Intake(1, rejected(20)), "items": Intake(1, rejected(20, "items.parquet"))}
    assert len(told(intakes)) == 2
    assert [(row["table"], row["row"]) for row in summary(intakes)["rejections"]] == [
        (name, 7 + row) for name in intakes for row in range(5)
    ]
    assert summary(intakes)["rejected"] == 40


def test_too_much_is_refused_with_the_share_the_row_and_what_allows_it():
    intakes = {"events": Intake(1000), "items": Intake(58, rejected(2, "items.parquet"))}
    message = (
        r"items: 2 of 60 rows were rejected, 3\.33 % where 1 % is allowed, first items\.parquet row 7: timestamp is .*"
        r"allow it with --set max_rejected_share=0\.034"
    )
    with pytest.raises(TablesError, match=message):
        require_few(intakes, REJECTED_SHARE, "--set max_rejected_share=")
    require_few(intakes, 0.034, "")


def test_a_table_of_which_nothing_is_left_is_refused_at_any_share():
    with pytest.raises(TablesError, match=r"events: no row is left, all 4 were rejected, first events\.parquet row 7"):
        require_few({"events": Intake(0, rejected(4))}, 1.0, "")


def test_unread_cells_are_not_rejected_rows():
    require_few({"items": Intake(3, [], [Unread("i.parquet", "price", 3, 0, "price is ''")])}, 0.0, "")


@given(kept=st.integers(1, 500), bad=st.integers(0, 500), share=st.floats(0, 1))
def test_the_share_that_a_refusal_names_is_enough(kept: int, bad: int, share: float):
    intakes = {"events": Intake(kept, rejected(bad))}
    try:
        require_few(intakes, share, "SHARE=")
    except TablesError as error:
        assert bad / (kept + bad) > share
        require_few(intakes, float(str(error).rpartition("SHARE=")[2]), "")
    else:
        assert bad <= share * (kept + bad)


def test_columns_without_a_use_and_items_without_a_row_are_told():
    intakes = {
        "items": Intake(5, ignored=["stock", "brand"], unlisted=["g7", "g8"], hidden=True),
        "impressions": Intake(5, ignored=["page_size"]),
    }
    assert told(intakes) == [
        "items: no use for columns stock, brand",
        "items: 2 items that events name are not in the table, such as 'g7': models learn from them, and they "
        "are not shown; give an item a row to show it",
    ]
    assert summary(intakes)["unlisted_items"] == 2
    assert told({"events": Intake(1, ignored=[f"c{n}" for n in range(15)])})[0].endswith("c11 and 3 more")
    assert told({"items": Intake(5, unlisted=["g7"])})[0].endswith(
        "and they are shown, because the table has no column that says when an item may be shown"
    )
