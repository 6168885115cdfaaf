from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import LeakError, TrainingError
from tests.training.conftest import TINY
from training.config import TrainConfig
from training.datasets import prepare
from training.evaluate import evaluate
from training.train import train


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("simulated")
    prepare("simulated", None, base / "data", users=150, items=80, days=20)
    settings = {**TINY, "epochs": 4, "protocol": "temporal", "test_share": 0.3, "heads": 1}
    train(base / "data", base / "run", TrainConfig(**settings))
    return base / "data", base / "run"


def test_impressions_are_judged_by_what_followed(simulated: tuple[Path, Path]) -> None:
    found = evaluate([simulated[1]], "impressions")
    assert found["impressions"] > 1000
    actions = {name.partition("/")[0] for name in found["metrics"]}
    assert actions
    for action in actions:
        area = found["metrics"][f"{action}/auc"]
        assert 0 < area["low"] <= area["mean"] <= area["high"] < 1
        assert 0 <= found["metrics"][f"{action}/ece"]["mean"] < 1
        assert found["baselines"]["base_rate"][f"{action}/log_loss"] > 0
    json.dumps(found)


def test_search_ranks_the_catalogue_for_judged_queries(circles: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for file in circles.iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    judged = [("space", f"i{row}", 3.0 if 10 <= row < 20 else 0.0) for row in range(40)] + [("nothing", "i0", 0.0)]
    columns = list(zip(*judged, strict=True))
    names = ("query", "item_id", "grade")
    pq.write_table(pa.table(dict(zip(names, map(list, columns), strict=True))), data / "judgments.parquet")
    train(data, tmp_path / "run", TrainConfig(**TINY))
    found = evaluate([tmp_path / "run"], "search")
    assert found["queries"] == 1
    assert found["metrics"]["ndcg@10"]["mean"] > 0.9
    assert found["metrics"]["recall@100"]["mean"] == 1


def test_what_is_missing_is_said(simulated: tuple[Path, Path], circles: Path, tmp_path: Path) -> None:
    train(circles, tmp_path / "run", TrainConfig(**{**TINY, "epochs": 1}))
    with pytest.raises(TrainingError, match="no table judgments"):
        evaluate([tmp_path / "run"], "search")
    with pytest.raises(LeakError, match="protocol=temporal"):
        evaluate([tmp_path / "run"], "impressions")
    with pytest.raises(TrainingError, match="no protocol"):
        evaluate([simulated[1]], "guess")
