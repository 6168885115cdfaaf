"""No single wrong clock is the end of the data, and honest data end where they end."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.tables.clock import AHEAD_MS, DAY_MS, FEWEST, is_ahead, newest_moment
from tests.real_data import real_data

START = 1_700_000_000_000
IN_2099 = int(datetime(2099, 12, 31, tzinfo=UTC).timestamp() * 1000)


def events(times: np.ndarray, logged: np.ndarray | None = None) -> pa.Table:
    ingested = pa.nulls(len(times), pa.int64()) if logged is None else pa.array(logged, pa.int64())
    return pa.table({"timestamp": pa.array(times, pa.int64()), "ingested_at": ingested})


def newest(times: np.ndarray, logged: np.ndarray | None = None) -> int | None:
    return newest_moment([events(times, logged)])


def shop(count: int, days: float, seed: int = 0) -> np.ndarray:
    """Times of a shop that is closed at night and at weekends."""
    random = np.random.default_rng(seed)
    times = START + (random.random(4 * count + 100) * days * DAY_MS).astype(np.int64)
    open_ = (times % DAY_MS > DAY_MS / 3) & (times // DAY_MS % 7 < 5)
    return np.sort(times[open_][:count])


@pytest.mark.parametrize("count", [FEWEST, 50, 1_000, 100_000])
@pytest.mark.parametrize("wrong", [[IN_2099], [IN_2099, IN_2099 - 3_000 * DAY_MS]])
def test_single_events_from_2099_move_nothing(count: int, wrong: list[int]):
    times = shop(count, 60)
    assert newest(times) == times.max()
    assert newest(np.random.default_rng(1).permutation([*times, *wrong])) == times.max()


def test_the_more_events_the_nearer_a_wrong_clock_may_be():
    times = shop(100_000, 60)
    assert newest(np.append(times, times.max() + 12 * DAY_MS)) == times.max()
    # Neither do 30 devices that are a month ahead, nor clocks that stand at 1990.
    ahead = times.max() + 30 * DAY_MS + np.arange(30) * 60_000
    assert newest(np.concatenate([times, ahead, [631_200_000_000]])) == times.max()


def test_a_time_of_its_own_is_the_end():
    """Control: a month after a long pause is no wrong clock if more than a few events lie in it."""
    before, after = shop(5_000, 60), shop(400, 20) + 300 * DAY_MS
    assert newest(np.concatenate([before, after])) == after.max()
    # Nor is anything told of less than a handful of events.
    assert newest(np.array([START, START + 1, IN_2099])) == IN_2099
    assert newest(np.array([], np.int64)) is None


def test_a_sparse_last_day_is_the_end():
    times = shop(20_000, 60)
    for hours in (20, 60):  # the night, and a weekend that is longer than those before
        assert newest(np.append(times, times.max() + hours * 3_600_000)) == times.max() + hours * 3_600_000


def test_an_event_ahead_of_its_own_ingestion_is_never_the_end():
    times = shop(200, 10)
    logged = times + 1000
    times[5] = times.max() + 3_600_000  # an hour: no gap tells it
    assert newest(times) == times[5]
    assert newest(times, logged) == np.delete(times, 5).max()
    assert np.flatnonzero(is_ahead(events(times, logged))).tolist() == [5]
    # Within the tolerance it is taken, and where all are ahead it is the clock of the log that is wrong.
    times = shop(200, 10)
    assert newest(times, times - AHEAD_MS) == times.max()
    assert newest(times, times - 10 * AHEAD_MS) == times.max()


@given(
    counts=st.lists(st.integers(0, 30), min_size=30, max_size=60),
    parts=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    wrong=st.integers(START + 4_000 * DAY_MS, IN_2099),
)
@settings(max_examples=30, deadline=None)
def test_any_daily_data_end_at_their_newest_event_with_and_without_a_wrong_clock(
    counts: list[int], parts: int, seed: int, wrong: int
):
    random = np.random.default_rng(seed)
    days = np.repeat(np.arange(len(counts)), [max(count, 1) for count in counts])
    times = START // DAY_MS * DAY_MS + days * DAY_MS + random.integers(0, DAY_MS, days.size)
    mixed = random.permutation(np.append(times, wrong))
    assert newest_moment(events(part) for part in np.array_split(random.permutation(times), parts)) == times.max()
    assert newest_moment(events(part) for part in np.array_split(mixed, parts)) == times.max()


@pytest.mark.parametrize(
    ("name", "column", "scale"),
    [(("ml-1m", "ratings.parquet"), "timestamp", 1000), (("kuairand", "impressions.parquet"), "time_ms", 1)],
)
def test_published_data_end_where_they_end(name: tuple[str, str], column: str, scale: int):
    times = pq.read_table(real_data(*name), columns=[column])[column].to_numpy().astype(np.int64)
    if scale == 1000 and times.max() > 10**11:
        scale = 1
    times = times * scale
    assert newest(times) == times.max()
    assert newest(np.append(times, IN_2099)) == times.max()
