"""A training that begins from an earlier run: what it takes over, what validates it, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cli import main as cli
from features.errors import LeakError
from features.tables.dataset import open_dataset, write_dataset
from features.tables.schema import EVENTS, ITEMS
from features.vocabulary import Vocabulary
from tests.training.conftest import CIRCLE, CIRCLES, TINY, interactions
from training.config import TrainConfig
from training.data import generations
from training.data.generations import Generation, division_of, generations_now, split_again
from training.data.interactions import Interactions
from training.data.split import split
from training.fitting.start import Course, EarlierRun, _mapped
from training.run import RunError, load_run, sha256_of
from training.train import initial_modules, read_material, train

FIRST, DAY = 1_600_000_000_000, 86_400_000
USERS = 480
CONFIG = TrainConfig(**{**TINY, "epochs": 5, "query_steps": 20, "ranker_steps": 20, "batch_tokens": 512})


def walks(path: Path, late: bool) -> Path:
    """Users who walk round a circle of items; `late` adds a day, an item, an event type and another order of items."""
    rng = np.random.default_rng(0)
    events: list[tuple[str, str, str, int]] = []
    for user in range(USERS):
        circle, start, steps = user % CIRCLES, int(rng.integers(CIRCLE)), int(rng.integers(5, 8))
        for step in range(steps + (late and user % 2)):
            item = f"i{circle * CIRCLE + (start + step) % CIRCLE}"
            moment = FIRST + user * 1000 + step * 10**6 + 2 * DAY * (step >= steps)
            events.append((f"u{user}", item, "purchase", moment))
    if late:
        events += [(f"u{user}", "new", "like", FIRST + 3 * DAY + user) for user in range(0, USERS, 9)]
    columns = dict(zip(("user_id", "item_id", "event_type", "timestamp"), zip(*events, strict=True), strict=True))
    names = [f"i{row}" for row in range(CIRCLES * CIRCLE)]
    names = [*reversed(names), "new"] if late else [*names, "gone"]
    items = [{"item_id": name, "title": f"title {name}"} for name in names]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    write_dataset(path, pa.Table.from_pylist(rows, schema=EVENTS), pa.Table.from_pylist(items, schema=ITEMS), name="w")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `today` and `tomorrow`, and `full`, a run on today's data."""
    root = tmp_path_factory.mktemp("start")
    train(walks(root / "today", late=False), root / "full", CONFIG)
    walks(root / "tomorrow", late=True)
    return root


@pytest.fixture(scope="module")
def continued(folder: Path) -> dict[str, Any]:
    """The result of a training on tomorrow's data that begins from `full`."""
    return train(folder / "tomorrow", folder / "continued", start=folder / "full", start_share=0.5)


def test_it_says_where_it_began_and_what_it_saved(folder: Path, continued: dict[str, Any]) -> None:
    start = continued["start"]
    full = json.loads((folder / "full" / "result.json").read_text())
    assert start["run"] == str(folder / "full")
    assert start["sha256"] == sha256_of(load_file(folder / "full" / "model.safetensors"))
    assert start["items"] == {"kept": 40, "new": 1, "vanished": 1}
    assert start["full"]["seconds"] == full["seconds"]
    assert start["share_of_time"] == pytest.approx(continued["seconds"] / full["seconds"], abs=1e-3)
    assert start["full"]["stages"] == full["stage_seconds"]
    assert sum(full["stage_seconds"].values()) <= full["seconds"]
    # A like can be predicted now, so the ranker has an action more than that of the earlier run.
    assert start["kept"] == []
    assert continued["epochs"] <= 0.5 * full["epochs"] + 0.2
    config = load_run(folder / "continued").config
    assert (config.dim, config.layers, config.start_share) == (16, 1, 0.5)


def test_it_never_ends_worse_than_it_began(folder: Path, continued: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in (folder / "continued" / "log.jsonl").read_text().splitlines()]
    assert (lines[0]["epoch"], lines[0]["step"], lines[0]["loss"]) == (0, 0, None)
    validation = continued["start"]["validation"]
    assert validation["before"] == lines[0]["ndcg@10"] > 0.6
    assert validation["after"] == continued["best_validation"]["ndcg@10"] == max(line["ndcg@10"] for line in lines)
    assert validation["earlier"] == validation["full"] > 0.6


def test_a_rate_that_ruins_the_weights_leaves_those_of_the_start(folder: Path, tmp_path: Path) -> None:
    ruinous: dict[str, Any] = {"learning_rate": 5.0, "start_rate": 1.0, "ranker_steps": 0, "query_steps": 0}
    result = train(folder / "tomorrow", tmp_path / "run", start=folder / "full", **ruinous)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["ndcg@10"] < lines[0]["ndcg@10"] == result["best_validation"]["ndcg@10"]
    kept, earlier = (load_file(path / "model.safetensors") for path in (tmp_path / "run", folder / "full"))
    assert torch.equal(kept["user.positions.weight"], earlier["user.positions.weight"])


def test_ranker_and_linear_part_are_kept_where_nothing_new_can_judge_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generations, "FEWEST_TARGETS", USERS)
    result = train(folder / "today", tmp_path / "run", start=folder / "full", query_steps=5)
    full = json.loads((folder / "full" / "result.json").read_text())
    assert result["start"]["kept"] == ["linear", "ranker"]
    assert result["best_validation"] == {}
    assert result["start"]["validation"]["before"] is None
    assert result["start"]["items"] == {"kept": 40, "new": 1, "vanished": 0}
    for name in ("linear", "blend", "ranker_source"):
        assert result[name] == full[name]
    ranker, then = (load_file(path / "ranker.safetensors") for path in (tmp_path / "run", folder / "full"))
    assert ranker.keys() == then.keys()
    assert all(torch.equal(ranker[name], then[name]) for name in ranker)
    run, before = load_run(tmp_path / "run"), load_run(folder / "full")
    assert np.array_equal(run.neighbors, before.neighbors)
    assert np.array_equal(run.neighbor_scores, before.neighbor_scores)
    # The last weights, since none can be told to be the best.
    assert not np.array_equal(run.item_vectors, before.item_vectors)


def test_weights_move_with_their_items_and_event_types(folder: Path) -> None:
    earlier = EarlierRun.open(folder / "full")
    material = read_material(open_dataset(folder / "tomorrow"), CONFIG, torch.device("cpu"), None, earlier)
    assert material.data.event_types == ["like", "purchase"]
    torch.manual_seed(0)
    modules = initial_modules(material, CONFIG, torch.device("cpu"), fresh=False)
    first_type = modules.user.types.weight[1].detach().clone()
    earlier.copy_into(modules, material.vocabulary, material.data, material.division, CONFIG)
    then = load_file(folder / "full" / "model.safetensors")
    for name in ("i0", "i17", "i39"):
        row, place = material.vocabulary.rows([name])[0], earlier.vocabulary.rows([name])[0]
        assert row != place
        assert torch.equal(modules.item.ids.weight[row], then["item.ids.weight"][place])
    assert torch.equal(modules.user.types.weight[2], then["user.types.weight"][1])
    assert torch.equal(modules.user.types.weight[1], first_type)
    assert torch.equal(modules.user.positions.weight, then["user.positions.weight"])
    assert torch.equal(modules.item.words.weight, then["item.words.weight"])


def test_first_vectors_of_new_items_are_turned_into_the_learned_space() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(60, 8, generator=generator)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0] * 3
    kept = torch.arange(60) < 50
    learned = torch.where(kept[:, None], first @ turn, 0.0)
    assert torch.allclose(_mapped(first, learned, kept), first[50:] @ turn, rtol=0.01, atol=0.05)


def test_the_linear_part_moves_with_its_items(folder: Path) -> None:
    earlier = EarlierRun.open(folder / "full")
    names = [f"i{row}" for row in range(CIRCLES * CIRCLE)]
    now = Vocabulary.build(["new", *reversed(names[:-1])])
    part, then = earlier.linear_part(now), load_run(folder / "full")
    assert part.spec == then.linear.spec
    assert (part.neighbors[0] == -1).all()
    place = then.vocabulary.rows(["i12"])[0]
    expected = {
        name: float(score)
        for name, score in zip(
            then.vocabulary.ids(np.maximum(then.neighbors[place], 0)), then.neighbor_scores[place], strict=True
        )
        if score and name not in ("i39", "gone")
    }
    [row] = now.rows(["i12"])
    real = part.neighbors[row] >= 0
    assert dict(zip(now.ids(part.neighbors[row][real]), part.scores[row][real].tolist(), strict=True)) == expected
    assert np.array_equal(real, np.sort(real)[::-1])


def test_a_killed_one_goes_on_as_if_nothing_had_happened_and_from_no_other_run(
    folder: Path, tmp_path: Path, continued: dict[str, Any]
) -> None:
    class Interrupted(Exception):
        pass

    def kill(step: int) -> None:
        if step == 4:
            raise Interrupted

    shutil.copytree(folder / "full", tmp_path / "copy")
    options: dict[str, Any] = {"start": tmp_path / "copy", "start_share": 0.5, "checkpoint_seconds": 1e-9}
    with pytest.raises(Interrupted):
        train(folder / "tomorrow", tmp_path / "run", on_step=kill, **options)
    with pytest.raises(RunError, match="another start"):
        train(folder / "tomorrow", tmp_path / "run", **options | {"start": folder / "continued"})
    resumed = train(folder / "tomorrow", tmp_path / "run", **options)
    assert resumed["sha256"] == continued["sha256"]
    assert resumed["start"] == continued["start"] | {
        "run": str(tmp_path / "copy"), "share_of_time": resumed["start"]["share_of_time"],
    }  # fmt: skip


def test_settings_that_the_weights_do_not_fit_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    wide = CONFIG.model_copy(update={"dim": 32, "layers": 2})
    with pytest.raises(RunError, match=r"with dim 16 and layers 1, this training has dim 32 and layers 2, .* --from"):
        train(folder / "tomorrow", tmp_path / "run", wide, start=folder / "full")
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunError, match=r"with items with content, this training has items without content \(setting"):
        train(folder / "tomorrow", tmp_path / "run", start=folder / "full", content=False)
    assert not (tmp_path / "run").exists()
    for held_out, message in (
        ({"protocol": "leave-one-out"}, r"holds out the last events of users .* was trained on"),
        ({"cold_item_share": 0.1}, "holds out cold items"),
        ({"protocol": "temporal", "test_days": 30}, "trained on events that this training holds out as its test"),
    ):
        with pytest.raises(LeakError, match=message):
            train(folder / "tomorrow", tmp_path / "run", start=folder / "full", **held_out)
        assert not (tmp_path / "run").exists()
    with pytest.raises(RunError, match="holds no finished run"):
        train(folder / "tomorrow", tmp_path / "run", start=tmp_path)


def test_the_time_is_divided_among_the_stages() -> None:
    stages = {"read": 2.0, "encoders": 80.0, "linear": 2.0, "query": 1.0, "ranker": 15.0}
    course = Course(seconds=100.0, epochs=10, stages=stages, validation=0.1)
    # Of ten seconds, 2 + 2 go to what costs what it cost, and .1 to a tenth of the query encoder's steps.
    assert course.epochs_within(0.1) == pytest.approx((10 - 4.1) / 8)
    slow = dataclasses.replace(course, stages=stages | {"encoders": 10.0, "read": 72.0})
    assert slow.epochs_within(0.1) == pytest.approx(0.25)
    kept = dataclasses.replace(course, stages=stages | {"encoders": 10.0, "ranker": 85.0})
    assert kept.epochs_within(0.1) == pytest.approx(1.0)
    assert dataclasses.replace(course, stages={}).epochs_within(0.1) == pytest.approx(0.5)
    assert Course.of({"start": {"full": course.as_json()}, "seconds": 9.0}) == course


def grown(seed: int, users: int, moment: int) -> Interactions:
    """The events of a random world up to a moment; its users are numbered by their ids."""
    rng = np.random.default_rng(seed)
    histories: dict[str, tuple[list[int], list[int]]] = {}
    for user in range(users):
        times = np.sort(rng.integers(0, 100, int(rng.integers(1, 12))))
        rows = rng.permutation(20)[: times.size].tolist()
        kept = [(row, int(time)) for row, time in zip(rows, times, strict=True) if time <= moment]
        if kept:
            histories[f"u{user:03}"] = ([row for row, _ in kept], [time for _, time in kept])
    data = interactions([rows for rows, _ in histories.values()], 20, [times for _, times in histories.values()])
    return dataclasses.replace(data, users=list(histories))


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(30, 90), st.lists(st.integers(20, 99), min_size=2, max_size=4, unique=True))
def test_no_event_validates_that_an_earlier_run_learned(seed: int, users: int, moments: list[int]) -> None:
    config = TrainConfig(validation_users=1000, seed=seed % 3)
    line: list[Generation] = []
    learned: set[tuple[str, int]] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generations, "FEWEST_TARGETS", 1)
        for moment in sorted(moments):
            data = grown(seed, users, moment)
            division = split_again(data, config, line) if line else split(data, config)
            names = [data.users[user] for user in division.validation.users]
            targets = set(zip(names, division.validation.positions.tolist(), strict=True))
            assert not targets & learned
            learned |= {
                (data.users[user], place) for user, end in enumerate(division.train_end) for place in range(int(end))
            }
            assert not targets & learned
            generation = Generation.of(data, config)
            assert generation is not None
            line.append(generation)


def test_a_plain_split_would_validate_with_learned_events_and_the_held_out_users_stay() -> None:
    config = TrainConfig(validation_users=1000)
    early, late = grown(1, 900, 80), grown(1, 900, 85)
    first = split(early, config)
    learned = {(early.users[user], place) for user, end in enumerate(first.train_end) for place in range(int(end))}

    def targets(data: Interactions, division: Any) -> set[tuple[str, int]]:
        users = (data.users[user] for user in division.validation.users)
        return set(zip(users, division.validation.positions.tolist(), strict=True))

    generation = Generation.of(early, config)
    assert generation is not None
    again = split_again(late, config, [generation])
    assert len(targets(late, split(late, config)) & learned) > 50  # the control
    assert not targets(late, again) & learned
    # Users who validated before do so again, with those who have come or come back since.
    before = {early.users[user] for user in first.validation.users}
    now = {late.users[user] for user in again.validation.users}
    assert len(before & now) > 0.8 * len(now)
    assert now - before
    # An evaluation chooses the forms of its baselines by the targets that validated the run.
    result = {"start": {}, **generations_now(late, config, [generation])}
    assert targets(late, division_of(late, config, result)) == targets(late, again)
    assert targets(late, division_of(late, config, {})) == targets(late, split(late, config))
    # Data that is no longer what the earlier run had: only new events validate.
    other = dataclasses.replace(generation, events=generation.events + 1)
    assert {late.users[user] for user in split_again(late, config, [other]).validation.users} <= now - before
    # Too few of them: nothing validates, and all train.
    alone = split_again(early, config, [generation])
    assert len(alone.validation) >= 100
    none = split_again(grown(1, 200, 85), config, [other])
    assert not len(none.validation)
    assert np.array_equal(none.train_end, none.fit_end)


def test_the_command_passes_the_run_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("training.train.train", lambda *_, **options: calls.append(options) or {})
    words = ["train", str(folder / "tomorrow"), "--out", "run", "--from", str(folder / "full")]
    monkeypatch.setattr(sys, "argv", ["penchant", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert calls == [{"automatic": True, "start": folder / "full"}]
