from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from features.errors import ExportError
from tests.training.conftest import TINY
from training.config import TrainConfig
from training.data.interactions import read_interactions
from training.data.split import Targets
from training.export.embeddings import embeddings
from training.models.scoring import user_vectors
from training.run import LoadedRun, RunError, load_run
from training.runtime import exact
from training.train import train


@pytest.fixture(scope="module")
def run(circles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embedded") / "run"
    train(circles, out, TrainConfig(**{**TINY, "epochs": 20}))
    return out


def read(file: Path) -> tuple[list[str], npt.NDArray[np.float32]]:
    with pa.memory_map(str(file)) as source:
        table = pa.ipc.open_file(source).read_all()
    name, vector = table.schema
    assert name.type == pa.string()
    assert pa.types.is_fixed_size_list(vector.type)
    assert vector.type.value_type == pa.float32()
    flat = table["vector"].combine_chunks().flatten().to_numpy()
    return table[0].to_pylist(), flat.reshape(len(table), vector.type.list_size)


def newest(loaded: LoadedRun) -> dict[str, npt.NDArray[np.float32]]:
    """Each user's vector after all of their events, one user at a time."""
    data = read_interactions(loaded.dataset, loaded.vocabulary, loaded.config)
    table, counts = torch.from_numpy(loaded.item_vectors), np.diff(data.offsets)
    with exact():
        return {
            user: user_vectors(
                loaded.user_encoder, table, data, Targets(np.array([at]), counts[[at]]), loaded.config.max_length
            )[0]
            for at, user in enumerate(data.users)
        }


@pytest.mark.parametrize("rows", [7, 1 << 14])
def test_users_stand_after_their_newest_event(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr("training.export.embeddings.BATCH_ROWS", rows)
    answer = embeddings(str(run), str(tmp_path / "vectors"))
    loaded = load_run(run)
    expected = newest(loaded)
    users, vectors = read(tmp_path / "vectors" / "users.arrow")
    assert users == list(expected)
    assert vectors == pytest.approx(np.stack(list(expected.values())), abs=1e-5)
    items, table = read(tmp_path / "vectors" / "items.arrow")
    assert items == loaded.vocabulary.ids(np.arange(len(loaded.vocabulary)))
    assert np.array_equal(table, loaded.item_vectors)
    assert (answer["users"], answer["items"], answer["dim"]) == (160, 40, 16)
    assert answer["bytes"] == sum(file.stat().st_size for file in (tmp_path / "vectors").iterdir())
    assert {file.name for file in tmp_path.iterdir()} == {"vectors"}


def test_inner_products_foretell_the_next_item(run: Path, circles: Path, tmp_path: Path) -> None:
    """A user of the circles goes on to the next place: an earlier moment's vector would foretell what they had."""
    embeddings(run, tmp_path / "vectors")
    users, vectors = read(tmp_path / "vectors" / "users.arrow")
    items, table = read(tmp_path / "vectors" / "items.arrow")
    events = pq.read_table(circles / "events.parquet").sort_by("timestamp").to_pylist()
    had: dict[str, list[str]] = {}
    for event in events:
        had.setdefault(event["user_id"], []).append(event["item_id"])
    hits = 0
    for user, vector in zip(users, vectors, strict=True):
        scores = table @ vector
        scores[[items.index(item) for item in had[user]]] = -np.inf
        last = int(had[user][-1][1:])
        length = 9 if last >= 30 else 10
        hits += items[int(np.argmax(scores))] == f"i{last // 10 * 10 + (last % 10 + 1) % length}"
    assert hits / len(users) > 0.8


def test_items_and_users_that_nothing_places_are_left_out_and_counted(
    circles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    # u0 to u19 walk over six items; `lone` had one item alone, which is cold with this seed. No item has content.
    rows = [(f"u{user}", f"i{(user + step) % 6}", step) for user in range(20) for step in range(5)]
    settings = {**TINY, "epochs": 1, "cold_item_share": 0.3, "protocol": "none", "query_steps": 0}
    cold = sorted(np.random.default_rng([0, 7]).permutation(7)[:2].tolist())
    # Rows follow the ids in order of their bytes, since there is no items table.
    names = sorted([*(f"i{at}" for at in range(6)), "z"])
    rows.append(("lone", names[cold[0]], 9))
    rows.append(("u0", "z", 9))
    columns = {
        name: list(column)
        for name, column in zip(("user_id", "item_id", "sequence"), zip(*rows, strict=True), strict=True)
    }
    pq.write_table(pa.table({**columns, "event_type": ["purchase"] * len(rows)}), data / "events.parquet")
    train(data, tmp_path / "run", TrainConfig(**settings))
    loaded = load_run(tmp_path / "run")
    untrained = [
        name for name, seen in zip(loaded.vocabulary.ids(np.arange(7)), loaded.trained, strict=True) if not seen
    ]
    answer = embeddings(tmp_path / "run", tmp_path / "vectors")
    assert answer["items_without_vector"] == len(untrained) == 2
    assert answer["users_without_events"] == 1
    told = capsys.readouterr().err
    assert "users without events: 1 are left out" in told
    assert "items without vector: 2 are left out" in told
    assert set(read(tmp_path / "vectors" / "items.arrow")[0]) == {*names} - {*untrained}
    assert "lone" not in read(tmp_path / "vectors" / "users.arrow")[0]


def test_a_place_that_holds_something_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in ("full", "file"):
        with pytest.raises(ExportError, match="not an empty directory"):
            embeddings(run, tmp_path / place)
    (tmp_path / "empty").mkdir()
    assert embeddings(run, tmp_path / "empty")["users"] == 160
    with pytest.raises(RunError, match="holds no finished run"):
        embeddings(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vector_that_is_no_number_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> npt.NDArray[np.float32]:
        return np.full((160, 16), np.nan, np.float32)

    monkeypatch.setattr("training.export.embeddings.user_vectors", broken)
    with pytest.raises(ExportError, match="NaN"):
        embeddings(run, tmp_path / "vectors")
    assert not list(tmp_path.iterdir())


def test_moved_data_is_followed(circles: Path, run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    (tmp_path / "run" / "result.json").write_text(json.dumps({**result, "data": str(tmp_path / "gone")}))
    shutil.copytree(circles, tmp_path / "moved")
    answer = embeddings(tmp_path / "run", tmp_path / "vectors", data=str(tmp_path / "moved"))
    assert answer["users"] == 160
