"""The ranker learns from impressions, and nothing that it reads knows the future."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from features.catalog_columns import columns_of
from features.linear import NO_TERM
from features.tables.dataset import Dataset, open_dataset, write_dataset
from features.tables.schema import EVENTS, IMPRESSIONS, ITEMS
from tests.training.conftest import TINY, _complete
from training.config import Action, TrainConfig
from training.data.impressions import NEVER, Examples, _positions_by_time, read_examples
from training.data.interactions import Interactions, item_vocabulary, read_interactions
from training.data.point_in_time import PointInTimeStatistics, example_features
from training.fitting.ranker_impressions import (
    RankerDataset,
    fit_on_impressions,
    logits_of,
    ranker_batch,
    read_ranker_dataset,
)
from training.metrics import auc
from training.models.ranker import Ranker
from training.run import build_modules

HOUR = 3_600_000
START = 1_700_000_000_000
CLICK = Action(name="click", event_type="click", shown_types=("shown",), window_hours=1)
LIKE = Action(name="like", event_type="like", shown_types=("shown",), window_hours=1)
ACTIONS = (CLICK, LIKE)
CONFIG = TrainConfig(**{**TINY, "actions": ACTIONS, "target_types": ("click",)})


def write(
    folder: Path,
    events: list[tuple],
    slates: list[tuple],
    items: int,
    log_ids: list[int | None] | None = None,
    versions: list[int] | None = None,
) -> Path:
    """Events (user, item, type, hour, request) and slates (request, user, hour, items, surface), as logged or not."""
    table = {
        "user_id": [e[0] for e in events],
        "item_id": [e[1] for e in events],
        "event_type": [e[2] for e in events],
        "timestamp": [START + round(e[3] * HOUR) for e in events],
        "request_id": pa.array([e[4] for e in events], pa.string()),
        "log_id": pa.array(log_ids or [None] * len(events), pa.uint64()),
    }
    shown = {
        "request_id": [s[0] for s in slates],
        "user_id": [s[1] for s in slates],
        "timestamp": [START + round(s[2] * HOUR) for s in slates],
        "item_ids": [s[3] for s in slates],
        "propensities": [[float("nan")] * len(s[3]) for s in slates],
        "surface": [s[4] for s in slates],
        "profile_version": pa.array(versions or [None] * len(slates), pa.uint64()),
    }
    things = {"item_id": [f"i{n}" for n in range(items)], "creator_id": [f"c{n % 3}" for n in range(items)]}
    write_dataset(
        folder / "data",
        _complete(pa.table(table), EVENTS),
        _complete(pa.table(things), ITEMS),
        impressions=_complete(pa.table(shown), IMPRESSIONS),
        name="feed",
    )
    return folder / "data"


@dataclasses.dataclass
class World:
    dataset: Dataset
    data: Interactions
    shown: Examples
    teller: Callable[[Interactions, Examples], PointInTimeStatistics]


def world(path: Path) -> World:
    dataset = open_dataset(path)
    items, vocabulary = item_vocabulary(dataset)
    data = read_interactions(dataset, vocabulary, CONFIG)
    shown = read_examples(path, dataset, vocabulary, data, ACTIONS)
    assert shown is not None
    columns = columns_of(items, np.zeros((data.items, 4), np.float32))
    return World(dataset, data, shown, lambda d, s: PointInTimeStatistics(d, columns, ACTIONS, s, np.diff(d.offsets)))


def test_labels_join_by_request_inside_the_window(tmp_path: Path) -> None:
    events = [
        ("u", "i0", "shown", 0, "a"), ("u", "i0", "click", 0.5, "a"), ("u", "i1", "like", 1.5, "a"),
        ("u", "i0", "shown", 3, "b"), ("u", "i1", "click", 3.1, None), ("u", "i2", "click", 3.2, "b"),
    ]  # fmt: skip
    slates = [
        ("a", "u", 0, ["i0", "i1", "gone"], "x"),
        ("b", "u", 3, ["i0", "i1", "i2"], None),
        ("c", "?", 3, ["i0"], "x"),
    ]
    made = world(write(tmp_path, events, slates, 4))
    lines = made.shown
    assert [(int(r), int(p)) for r, p in zip(lines.rows, lines.places, strict=True)] == [
        (0, 0),
        (1, 1),
        (0, 0),
        (1, 1),
        (2, 2),
    ]
    # i1 was liked too late, and its click names no request.
    assert lines.labels().tolist() == [[True, False], [False, False], [False, False], [False, False], [True, False]]
    assert lines.positions.tolist() == [0, 0, 3, 3, 3]
    assert [lines.surfaces[at] for at in lines.surface_indices] == ["x", "x", "", "", ""]
    assert not lines.labels(START + HOUR // 4).any()


def test_the_events_of_hidden_items_leave_what_is_read_beside_them_too(tmp_path: Path) -> None:
    """What followed an impression is the same, whichever other items are hidden from training."""
    rng = np.random.default_rng(5)
    events, slates = [], []
    for number in range(60):
        user, hour = f"u{number % 6}", float(number)
        shown = [f"i{item}" for item in rng.permutation(12)[:4]]
        slates.append((f"r{number}", user, hour, shown, "x"))
        events += [(user, item, "click", hour + 0.1, f"r{number}") for item in shown if rng.random() < 0.6]
    log_ids = [2**60 + 10 * number for number in range(len(events))]
    versions = [max([0, *(at for at, event in zip(log_ids, events, strict=True) if event[3] < s[2])]) for s in slates]
    path = write(tmp_path, events, slates, 12, log_ids, versions)
    dataset = open_dataset(path)
    _, vocabulary = item_vocabulary(dataset)
    whole = read_interactions(dataset, vocabulary, CONFIG)
    some = read_interactions(dataset, vocabulary, CONFIG.model_copy(update={"cold_item_share": 0.4}))
    assert 0 < some.rows.size < whole.rows.size
    known = read_examples(path, dataset, vocabulary, whole, ACTIONS)
    hidden = read_examples(path, dataset, vocabulary, some, ACTIONS)
    assert known is not None
    assert hidden is not None
    left = np.isin(known.rows, some.rows)
    assert (hidden.action_times[left] == known.action_times[left]).all()
    assert (hidden.action_times[~np.isin(known.rows, some.rows)] == NEVER).all()
    for at in range(len(hidden)):
        own = some.rows[some.offsets[hidden.users[at]] :][: hidden.positions[at]]
        before = whole.rows[whole.offsets[known.users[at]] :][: known.positions[at]]
        assert own.tolist() == before[np.isin(before, some.rows)].tolist()


def test_a_slate_of_a_sample_has_its_weight_and_any_other_has_one(tmp_path: Path) -> None:
    slates = [("a", "u", 1, ["i0", "i1"], "x"), ("b", "u", 2, ["i2"], "x")]
    path = write(tmp_path, [("u", "i0", "click", 0.5, None)], slates, 3)
    assert world(path).shown.weights.tolist() == [1, 1, 1]
    file = path / "impressions.parquet"
    table = pq.read_table(file)
    names = [name for name in table.column_names if name != "weight"]
    weighted = table.select(names).append_column("weight", pa.array([4.0, None], pa.float32()))
    pq.write_table(weighted, file)
    assert world(path).shown.weights.tolist() == [4, 4, 1]
    pq.write_table(table.select(names), file)  # of an older release
    assert world(path).shown.weights.tolist() == [1, 1, 1]


def test_only_slates_of_the_methods_that_the_ranker_is_for_are_read(tmp_path: Path, caplog) -> None:
    slates = [(name, "u", hour, [f"i{hour}"], "x") for hour, name in enumerate("abcdef")]
    made = ["recommend", "search", "similar", "rank", "rank", None]
    path = write(tmp_path, [("u", "i0", "click", 0.5, None)], slates, 6)
    file = path / "impressions.parquet"
    table = pq.read_table(file)
    for name, values in (("method", made), ("query", [None, "q", "", "q", "", "q"])):
        table = table.append_column(name, pa.array(values, pa.string()))
    pq.write_table(table, file)
    dataset = open_dataset(path)
    _, vocabulary = item_vocabulary(dataset)
    data = read_interactions(dataset, vocabulary, CONFIG)

    def rows(*methods: str) -> list[int]:
        shown = read_examples(path, dataset, vocabulary, data, ACTIONS, methods)
        assert shown is not None
        return shown.rows.tolist()

    assert rows(*CONFIG.methods) == [0, 4, 5]
    assert "3 of 6 slates do not train the ranker" in caplog.text
    assert rows("search", "similar") == [1, 2, 5]
    pq.write_table(table.drop_columns(["method", "query"]), file)  # of a data set that does not tell
    assert rows(*CONFIG.methods) == list(range(6))


def test_labels_join_by_person_where_events_name_no_request(tmp_path: Path) -> None:
    events = [("u", "i0", "click", 0.5, None), ("v", "i0", "click", 2, None), ("v", "i0", "shown", 0, None)]
    slates = [
        ("a", "u", 0, ["i0"], "x"),
        ("b", "v", 0, ["i0"], "x"),
        ("c", "v", 1.5, ["i0"], "x"),
        ("d", "u", 1, ["i0"], "x"),
    ]
    lines = world(write(tmp_path, events, slates, 1)).shown
    asked = {
        (int(p), int(t - START) / HOUR): bool(done)
        for p, t, done in zip(lines.users, lines.times, lines.labels()[:, 0], strict=True)
    }
    assert [asked[key] for key in sorted(asked)] == [True, False, False, True]


def test_a_line_has_the_events_of_the_version_that_its_impression_names(tmp_path: Path) -> None:
    # Events in the order of the log: one that had happened before the slates came behind the first of them.
    hours = [0.0, 1.0, 0.5, 4.0]
    hours = [0.0, 1.0, 0.5, 4.0]
    events = [("ann", f"i{n}", "click", hour, None) for n, hour in enumerate(hours)] + [("bob", "i0", "click", 2, None)]
    slates = [(f"r{n}", "ann", 3 + n / 10, ["i5"], "home") for n in range(4)] + [("rb", "bob", 3.05, ["i5"], "home")]
    log_ids = [2**60 + n for n in (1, 5, 9, 12, 3)]
    versions = [2**60 + n for n in (5, 9, 11)]
    # Of an answer that did not read the profile nothing is known but its time.
    made = world(write(tmp_path, events, slates, 6, log_ids, [*versions, 0, 2**60 + 2]))
    assert made.shown.positions.tolist() == [2, 0, 3, 3, 3]


def test_by_time_no_later_event_is_in_a_history_whatever_the_order_of_the_log(tmp_path: Path) -> None:
    # Half of a day's events were sent at its end: in the order of the log they follow later ones.
    hours = [1.0, 2.0, 9.0, 3.0, 4.0, 5.0, 10.0]
    events = [("ann", f"i{n}", "click", hour, None) for n, hour in enumerate(hours)]
    log_ids = [2**60 + n for n in range(len(hours))]
    slates = [(f"r{n}", "ann", hour, ["i0"], "home") for n, hour in enumerate((2.5, 6.0, 9.5))]
    made = world(write(tmp_path, events, slates, 8, log_ids))
    assert made.shown.positions.tolist() == [2, 2, 6]
    # A clock that believes in the future hides nothing of what follows.
    wrong = dataclasses.replace(made.data, trusted_until=START + 8 * HOUR)
    assert _positions_by_time(wrong, made.shown.users, made.shown.times).tolist() == [2, 6, 6]


def random_feed(folder: Path, people: int = 60, items: int = 12, hours: int = 96) -> Path:
    """People who are shown items at random; the odd items are clicked by nearly everybody, others hardly ever."""
    rng = np.random.default_rng(0)
    events, slates = [], []
    for person in range(people):
        for number, hour in enumerate(np.sort(rng.uniform(0, hours, 24))):
            item, request = int(rng.integers(items)), f"r{person}-{number}"
            surface = "home" if rng.random() < 0.5 else "side"
            slates.append((request, f"u{person}", hour, [f"i{item}"], surface))
            events.append((f"u{person}", f"i{item}", "shown", hour, request))
            if rng.random() < (0.8 if item % 2 else 0.15) * (1 if surface == "home" else 0.5):
                events.append((f"u{person}", f"i{item}", "click", hour + 0.01, request))
            if rng.random() < 0.05:
                events.append((f"u{person}", f"i{item}", "like", hour + 0.02, request))
    return write(folder, events, slates, items)


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(random_feed(tmp_path_factory.mktemp("feed")))


def features(made: World, data: Interactions, shown: Examples, lines: Examples, every: float = 24.0) -> np.ndarray:
    users = np.zeros((len(lines), 4), np.float32)
    return example_features(made.teller(data, shown), lines, users, NO_TERM, every_hours=every, last=START + 96 * HOUR)


def without_the_future(made: World, moment: int) -> tuple[Interactions, Examples]:
    """The world as it was at a moment; what came later has other types, values and outcomes."""
    later = made.data.timestamps >= moment
    data = dataclasses.replace(
        made.data, types=np.where(later, 1 + made.data.types % 3, made.data.types).astype(np.int32)
    )
    after = made.shown.times >= moment
    done = np.where(
        (made.shown.action_times >= moment) | after[:, None],
        NEVER - made.shown.action_times % 2,
        made.shown.action_times,
    )
    return data, dataclasses.replace(
        made.shown, action_times=done, surface_indices=np.where(after, 0, made.shown.surface_indices)
    )


def leaks(made: World, read: Callable[[Interactions, Examples, Examples], np.ndarray]) -> bool:
    """Whether what is read of the early impressions changes when the future does."""
    moment = START + 50 * HOUR
    early = made.shown.between(0, moment)
    then = read(*without_the_future(made, moment), early)
    return read(made.data, made.shown, early).tobytes() != then.tobytes()


@pytest.mark.parametrize("every", [24.0, 5.0])
def test_no_feature_knows_the_future(feed: World, every: float) -> None:
    assert not leaks(feed, lambda data, shown, lines: features(feed, data, shown, lines, every))


def test_a_feature_that_knows_the_future_is_found(feed: World) -> None:
    def planted(data: Interactions, shown: Examples, lines: Examples) -> np.ndarray:
        whole = feed.teller(data, shown).at(START + 97 * HOUR).statistics
        return np.concatenate([features(feed, data, shown, lines), whole[lines.rows]], axis=1)

    assert leaks(feed, planted)


def test_statistics_are_those_of_the_events_so_far(feed: World) -> None:
    teller = feed.teller(feed.data, feed.shown)
    moment = START + 30 * HOUR
    statistics = teller.at(moment).statistics
    kinds = [1 + feed.data.event_types.index(name) for name in ("shown", "click")]
    for row in range(feed.data.items):
        mine = (feed.data.rows == row) & (feed.data.timestamps < moment)
        shown, clicked = (int((mine & (feed.data.types == kind)).sum()) for kind in kinds)
        assert statistics[row, 0] == pytest.approx(np.log1p(shown))
        # The rate is pulled to others', so it lies between them and what happened.
        rate = 1 / (1 + np.exp(-(statistics[row, 2] + teller.at(moment).action_rates.base[0])))
        assert abs(rate - clicked / max(shown, 1)) < 0.4
    assert not teller.at(START).statistics.any()


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({}, ""),
        ({"ranker_validation_days": 0.001}, "days that validate the ranker"),
        ({"ranker_validation_days": 9.0}, "days that train the ranker"),
    ],
)
def test_times_of_whole_days_train_and_validate_the_ranker(
    feed: World, caplog: pytest.LogCaptureFixture, settings: dict[str, float], warning: str
) -> None:
    """A quarter of the impressions has the newest time, so a part of no examples would have no loss."""
    day = 24 * HOUR
    days = dataclasses.replace(feed.shown, times=feed.shown.times // day * day)
    config = CONFIG.model_copy(update={"dim": 4, **settings})
    encoder = build_modules(config, feed.data.items, len(feed.data.event_types), 2, content=False).user
    statistics = feed.teller(feed.data, days)
    dataset = read_ranker_dataset(statistics, days, encoder, torch.zeros(feed.data.items, 4), NO_TERM, config)
    assert warning in caplog.text
    assert bool(warning) == (dataset is None)
    if dataset is not None:
        assert dataset.validates.tolist() == (days.times == days.times.max()).tolist()


def test_the_ranker_learns_rates_and_is_calibrated(feed: World) -> None:
    lines = feed.shown
    lesson = ranker_batch(
        np.zeros((len(lines), 4), np.float32), np.zeros((len(lines), 4), np.float32),
        features(feed, feed.data, feed.shown, lines), lines.labels(),
    )  # fmt: skip
    torch.manual_seed(0)
    ranker = Ranker(4, lesson.features.shape[1], 8, 2, members=2, bins=4, dropout=0.1)
    config = CONFIG.model_copy(update={"ranker_epochs": 30, "ranker_rate": 0.01})
    held = lines.times > START + 72 * HOUR
    said = fit_on_impressions(ranker, RankerDataset(lines, lesson, held), config)
    found = said["validation"]["0"]
    clicked = lines.labels()[held, 0]
    rates = np.array([0.8 if row % 2 else 0.15 for row in lines.rows[held]])
    best = auc(clicked, rates * np.where(lines.surface_indices[held] == lines.surfaces.index("home"), 1, 0.5))
    assert found["auc"] > best - 0.06
    assert found["log_loss"] < found["base_log_loss"]
    assert found["ece"] < 0.15
    assert said["lines"] == len(lines)
    mean = torch.sigmoid(logits_of(ranker, lesson)).mean(0)
    assert torch.allclose(mean, lesson.labels.mean(0), atol=1e-3)
