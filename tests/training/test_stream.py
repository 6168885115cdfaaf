"""Arrays on disk, blocks of people, and epochs planned in blocks."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import training.data.batches
import training.data.interactions
from benchmarks.growth import write_world
from benchmarks.kills import kills
from features.assemble import encoder_batch, encoder_inputs, pack
from features.errors import TrainingError
from features.tables.dataset import open_dataset
from tests.training.conftest import interactions
from training.config import TrainConfig
from training.data.batches import Plan, TrainingBatches
from training.data.interactions import Disk, item_vocabulary, read_interactions
from training.data.split import held_out, split
from training.models.baselines import counts_of, popularity_of
from training.models.transitions import Transitions

histories = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=12)
LEAVE_ONE_OUT = TrainConfig(protocol="leave-one-out")


@given(st.lists(st.lists(st.integers(-1, 5), max_size=9), min_size=1, max_size=6), st.integers(1, 6))
def test_a_batch_at_once_is_its_sequences_one_by_one(parts: list[list[int]], most: int) -> None:
    rows = np.array([row for part in parts for row in part], np.int32)
    types = (1 + np.arange(rows.size) % 3).astype(np.uint8)
    ends = np.cumsum([len(part) for part in parts])
    starts = ends - [len(part) for part in parts]
    one_by_one = [
        encoder_inputs(rows[s:e], types[s:e].astype(np.int32), most) for s, e in zip(starts, ends, strict=True)
    ]
    for at_once, alone in zip(encoder_batch(rows, types, starts, ends, most), pack(one_by_one), strict=True):
        assert at_once.dtype == alone.dtype
        assert np.array_equal(at_once, alone)


@given(histories)
def test_blocks_change_nothing(people: list[list[int]]) -> None:
    times = [sorted((7 * row + at) % 50 for at, row in enumerate(some)) for some in people]
    temporal = TrainConfig(protocol="temporal", test_share=0.4)

    def made(block: int) -> list[object]:
        data = interactions(people, items=10, times=times)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training.data.interactions, "BLOCK_EVENTS", block)
            ends = split(data, LEAVE_ONE_OUT).train_end
            test = held_out(data, temporal, "temporal-successive")
            steps = Transitions.count(data, ends)
            found = [ends, split(data, temporal).fit_end, test.users, test.positions, popularity_of(data, ends)]
            return [array.tolist() for array in (*found, counts_of(data, ends), steps.next, steps.starts, steps.counts)]

    assert made(3) == made(1 << 20)


@given(histories, st.sampled_from([0.1, 0.25, 0.5, 0.9]))
def test_the_cut_is_the_quantile(people: list[list[int]], share: float) -> None:
    rng = np.random.default_rng(len(people))
    times = [sorted(rng.integers(0, 10**12, len(some)).tolist()) for some in people]
    data = interactions(people, items=10, times=times)
    place = (data.timestamps.size - 1) * (1 - Fraction(str(share))) // 1
    early = data.timestamps <= np.sort(data.timestamps)[int(place)]
    expected = np.bincount(data.owner()[early], minlength=len(people))
    assert split(data, TrainConfig(protocol="temporal", test_share=share)).fit_end.tolist() == expected.tolist()


def test_any_inside_is_its_plain_twin() -> None:
    rng = np.random.default_rng(0)
    flags = rng.random(200) < 0.05
    starts = rng.integers(0, 190, 100)
    ends = starts + rng.integers(0, 10, 100)
    found = training.data.batches._any_inside(flags, starts, ends)
    assert found.tolist() == training.data.batches._any_inside_plain(flags, starts, ends).tolist()


@pytest.mark.parametrize("block", [64, 1 << 16])
def test_each_event_is_predicted_once_however_people_are_drawn(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.data.batches, "PLAN_USERS", block)
    rng = np.random.default_rng(0)
    data = interactions([rng.permutation(50)[: rng.integers(1, 40)].tolist() for _ in range(300)], items=50)
    config = TrainConfig(max_length=8, batch_tokens=64)
    ends = np.diff(data.offsets)
    plan = TrainingBatches(data, ends, config, torch.device("cpu")).epoch(3)
    predicted = np.zeros(data.rows.size, int)
    for windows in plan:
        for start, end in windows.tolist():
            predicted[start + 1 : end] += 1
        widest = (windows[:, 1] - windows[:, 0]).max() - 1
        assert len(windows) == 1 or widest * len(windows) <= config.batch_tokens
    first = np.zeros(data.rows.size, bool)
    first[data.offsets[:-1]] = True
    assert (predicted == ~first).all()
    again = TrainingBatches(data, ends, config, torch.device("cpu")).epoch(3)
    some = [len(plan) - 1, 0, len(plan) // 2]  # as a resumed training asks: not from the first on
    assert all(np.array_equal(again[at], plan[at]) for at in some)
    with pytest.raises(IndexError):
        plan[len(plan)]


def test_a_batch_holds_the_events_and_what_follows_them() -> None:
    data = interactions([[3, 1, 2, 1], [5, 4]], items=6)
    batches = TrainingBatches(data, np.diff(data.offsets), TrainConfig(max_length=3), torch.device("cpu"))
    batch = batches.batch(np.array([[0, 4], [4, 6]]))
    assert batch.rows.tolist() == [[3, 1, 2], [5, 0, 0]]
    assert batch.types.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.lengths.tolist() == [3, 1]
    assert batch.targets is not None
    assert batch.targets.tolist() == [[1, 2, -1], [4, -1, -1]]  # 1 came before, so it is no target again
    longer = TrainingBatches(data, np.diff(data.offsets), TrainConfig(max_length=9), torch.device("cpu"))
    wide = longer.batch(np.array([[0, 4], [4, 6]]))  # as long as a round number, and the same but for that
    assert wide.targets is not None
    for part in (wide.rows[:, 3:], wide.types[:, 3:], 1 + wide.targets[:, 3:]):
        assert part.shape == (2, 5)
        assert not part.any()
    assert torch.equal(wide.rows[:, :3], batch.rows)
    assert torch.equal(wide.targets[:, :3], batch.targets)


def test_a_sample_is_whole_people() -> None:
    data = interactions([[person, 9] for person in range(9)], items=10)
    whole = data.sample(np.ones(9, np.int64), 100, 0)
    assert whole.rows.tolist() == list(range(9))
    some = data.sample(np.full(9, 2), 8, 0)
    assert some.offsets.tolist() == [0, 2, 4, 6, 8]
    assert sorted(set(some.rows.tolist()) - {9}) == some.rows[::2].tolist()


def test_a_full_disk_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="needs room"):
        Disk(tmp_path).array(np.int64, 1 << 50)


def test_the_growing_world_has_the_size_asked_for(tmp_path: Path) -> None:
    write_world(tmp_path / "world", 20_000, 500)
    dataset = open_dataset(tmp_path / "world")
    assert dataset.info["events"] == pytest.approx(20_000, rel=0.05)
    assert dataset.info["users"] == 200
    _, vocabulary = item_vocabulary(dataset)
    data = read_interactions(dataset, vocabulary, LEAVE_ONE_OUT, tmp_path)
    assert data.items == 500
    assert [data.users[0], data.users[199]] == ["user-0", "user-199"]
    assert not [file for file in tmp_path.iterdir() if file.is_file()]  # its files have no names
    assert isinstance(
        TrainingBatches(data, split(data, LEAVE_ONE_OUT).train_end, LEAVE_ONE_OUT, torch.device("cpu")).epoch(0), Plan
    )


def test_killed_trainings_end_like_the_undisturbed_one() -> None:
    found = kills(3, users=150, epochs=4)
    assert found["identical"]
    assert sum(found["kills"].values()) >= 3
    json.dumps(found)
