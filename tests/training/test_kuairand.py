"""KuaiRand: a small one made by hand in the tidy form, then the real one against its known counts."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from features.tables.dataset import open_dataset, read_table
from features.tables.schema import IMPRESSIONS, IMPRESSIONS_REQUIRED
from tests.real_data import real_data
from training.config import load_config
from training.data.datasets import DatasetError, prepare
from training.data.impressions import read_examples
from training.data.interactions import item_vocabulary, read_interactions
from training.data.kuairand import ACTIONS
from training.data.split import cut_of

T = 1_650_000_000_000


@pytest.fixture
def tidy(tmp_path: Path) -> Path:
    shown = {
        "user_id": [1, 2], "video_id": [10, 11], "time_ms": [T + 50_000, T + 60_000], "tab": [1, 0],
        "play_time_ms": [9_000, 0], "duration_ms": [8_000, 20_000],
    } | {name: [int(name in ("is_click", "long_view", "is_like")), 0] for name in ACTIONS}  # fmt: skip
    history = {
        "user_id": [1], "last_time_ms": [T], "exposed_seq_last50": [[12, 10, 12]], "liked_seq": [[10]],
        "long_watch_seq": [[9, 12]],
    }  # fmt: skip
    videos = {
        "video_id": [10, 11, 12], "author_id": [5, 5, 6], "video_type": ["NORMAL"] * 3, "upload_type": ["Web"] * 3,
        "video_duration": [None, 20_000.0, 30_000.0], "tag": [["3", "4"], ["3"], ["7"]],
        "upload_dt": ["2022-04-10"] * 3,
    }  # fmt: skip
    users = {"user_id": [1, 2], "user_active_degree": ["full_active", None]}
    tables = {"impressions": shown, "user_history": history, "videos": videos, "users": users}
    for name, table in tables.items():
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    return tmp_path


def test_a_feed_becomes_events_impressions_items_and_users(tidy: Path) -> None:
    prepare("kuairand", tidy, tidy / "out")
    data = open_dataset(tidy / "out")
    columns = ("user_id", "item_id", "event_type", "timestamp", "value", "request_id", "surface")
    lines = list(zip(*(data.events[name].to_pylist() for name in columns), strict=True))
    past = [line[:4] for line in lines if line[0] == "1" and line[5] is None]
    # The first view of 12 was not long: the second is matched first. 9 was watched before what is remembered.
    assert past == [
        ("1", "9", "long_view", T),
        ("1", "12", "view_item", T),
        ("1", "10", "view_item", T), ("1", "10", "like", T),
        ("1", "12", "long_view", T), ("1", "12", "view_item", T),
    ]  # fmt: skip
    assert [line[1:] for line in lines if line[5] == "r0"] == [
        ("10", "view_item_list", T + 50_000, None, "r0", "tab1"),
        ("10", "select_item", T + 59_000, 9.0, "r0", "tab1"),
        ("10", "long_view", T + 59_000, 9.0, "r0", "tab1"),
        ("10", "like", T + 59_000, None, "r0", "tab1"),
    ]
    assert [line[2] for line in lines if line[0] == "2"] == ["view_item_list"]
    slates = read_table(tidy / "out" / "impressions.parquet", IMPRESSIONS, IMPRESSIONS_REQUIRED).table
    assert slates["item_ids"].to_pylist() == [["10"], ["11"]]
    assert slates["surface"].to_pylist() == ["tab1", "tab0"]
    items = {item["item_id"]: item for item in data.items.to_pylist()}
    assert dict(items["10"]["attributes"])["duration"] == "8"
    assert dict(items["12"]["attributes"])["duration"] == "30"
    assert (items["10"]["creator_id"], items["10"]["categories"]) == ("5", ["3", "4"])
    assert [dict(traits) for traits in data.users["attributes"].to_pylist()] == [
        {"user_active_degree": "full_active"},
        {},
    ]


def test_a_source_that_is_not_the_data_set_is_named(tidy: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="--from PATH"):
        prepare("kuairand", None, tmp_path / "out")
    (tidy / "videos.parquet").unlink()
    with pytest.raises(DatasetError, match=r"videos\.parquet cannot be read"):
        prepare("kuairand", tidy, tmp_path / "out")


def test_the_real_feed_has_its_known_size_and_days(tmp_path: Path) -> None:
    answer = prepare("kuairand", real_data("kuairand"), tmp_path / "out")
    assert (answer["rejected"], answer["items"]) == (0, 7_583)
    assert answer["event_types"]["view_item_list"] == 94_784
    raw = pq.read_table(real_data("kuairand", "impressions.parquet"))
    config = load_config(Path("feed"))
    dataset = open_dataset(tmp_path / "out")
    _, vocabulary = item_vocabulary(dataset)
    data = read_interactions(dataset, vocabulary, config)
    shown = read_examples(tmp_path / "out", dataset, vocabulary, data, config.actions)
    assert shown is not None
    sums = [pc.sum(raw[name]).as_py() for name in ("is_click", "long_view", "is_like", "is_hate")]
    assert shown.labels().sum(0).tolist() == sums
    # The last day by the clock is the publisher's 30 April but for a few minutes round midnight.
    assert len(shown.between(cut_of(data, config), 1 << 61)) == pytest.approx(21_204, rel=0.005)
