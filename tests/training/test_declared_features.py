"""Declared features through the whole road: data, training, evaluation, export, and a bundle that answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from features.bundle import open_bundle
from features.errors import SettingsError
from features.feature_report import features as feature_report
from features.tables.dataset import write_dataset
from features.tables.schema import EVENTS, IMPRESSIONS, ITEMS, USERS
from serving.config import ServeConfig
from serving.engine.engine import open_engine
from serving.engine.pipelines import Dependencies
from serving.jobs.from_data import DataProfiles
from serving.observability.telemetry import Telemetry
from serving.projection.histories import read_history
from serving.stores.catalog_log import CatalogProgress
from tests.training.conftest import TINY, _complete
from training.config import TrainConfig, load_config
from training.evaluation.evaluate import evaluate
from training.export.export import export
from training.train import train

HOUR = 3_600_000
START = 1_767_225_600_000  # 1 January 2026 in UTC
CLICK = {"name": "click", "event_type": "click", "shown_types": ["shown"], "window_hours": 1}
DECLARED = [
    {"name": "phone", "form": "bucket", "of": "request.device", "values": ["phone"]},
    {"name": "night", "form": "bucket", "of": "request.hour", "edges": [6, 18]},
    {"name": "brand", "form": "bucket", "of": "item.attributes.brand", "values": ["acme"]},
    {"name": "plan", "form": "bucket", "of": "user.attributes.plan", "values": ["family"]},
    {"name": "day_clicks", "form": "count", "event_types": ["click"], "same": "creator", "window_hours": 24},
    {"name": "fan", "form": "rate", "event_types": ["click"], "shown_types": ["shown"], "same": "creator"},
]


def made(folder: Path) -> Path:
    """Whether an item is clicked depends on the device of the slate and on its user's plan, and on nothing else."""
    rng = np.random.default_rng(1)
    events: list[tuple[Any, ...]] = []
    slates: list[tuple[Any, ...]] = []
    for user in range(50):
        for number, hour in enumerate(np.sort(rng.uniform(0, 120, 40))):
            item, request, phone = int(rng.integers(20)), f"r{user}-{number}", bool(rng.random() < 0.5)
            moment = START + round(hour * HOUR)
            slates.append((request, f"u{user}", moment, [f"i{item}"], [1.0], "phone" if phone else "tv"))
            events.append((f"u{user}", f"i{item}", "shown", moment, request))
            if rng.random() < 0.05 + 0.45 * phone + 0.45 * (user % 2 == 0):
                events.append((f"u{user}", f"i{item}", "click", moment + 60_000, request))
    names = ("user_id", "item_id", "event_type", "timestamp", "request_id")
    shown = ("request_id", "user_id", "timestamp", "item_ids", "propensities", "device")
    rows, lines = (
        pa.table(dict(zip(heads, map(list, zip(*table, strict=True)), strict=True)))
        for heads, table in ((names, events), (shown, slates))
    )
    items = [
        {"item_id": f"i{n}", "creator_id": f"c{n % 3}", "attributes": [("brand", ("acme", "other")[n % 2])]}
        for n in range(20)
    ]
    users = [{"user_id": f"u{n}", "attributes": [("plan", ("family", "single")[n % 2])]} for n in range(50)]
    write_dataset(
        folder / "data",
        _complete(rows, EVENTS),
        pa.Table.from_pylist(items, ITEMS),
        pa.Table.from_pylist(users, USERS),
        impressions=_complete(lines, IMPRESSIONS),
        name="declared",
    )
    return folder / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("declared"))


def trained(data: Path, out: Path, features: list[dict[str, Any]]) -> Path:
    settings = {
        **TINY,
        "epochs": 1,
        "actions": [CLICK],
        "target_types": ["click"],
        "repeats": True,
        "ranker_hidden": 16,
    }
    train(data, out, TrainConfig(**settings, protocol="temporal", test_days=1, features=features))
    return out


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(data, tmp_path_factory.mktemp("run") / "run", DECLARED)


def test_they_tell_the_ranker_what_nothing_else_does(data: Path, run: Path, tmp_path: Path) -> None:
    without = trained(data, tmp_path / "without", [])
    with_them, plain = (evaluate([one], "impressions")["metrics"] for one in (run, without))
    assert with_them["click/auc"]["mean"] > plain["click/auc"]["mean"] + 0.03
    assert with_them["click/slate_gauc"]["mean"] > plain["click/slate_gauc"]["mean"] + 0.1
    prints = [json.loads((one / "result.json").read_text())["feature_fingerprint"] for one in (run, without)]
    assert prints[0] != prints[1]


def test_a_bundle_answers_with_them(data: Path, run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "bundle", recall=0.5)
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.model.declared.features == open_bundle(tmp_path / "bundle").model.declared.features
    assert [one["name"] for one in bundle.model.declared.as_json()] == [one["name"] for one in DECLARED]
    profiles = DataProfiles(read_history(data))
    assert [profiles.read(f"u:u{number}").controls.size for number in (0, 1)] == [1, 1]
    config = ServeConfig.load(bundle=tmp_path / "bundle")
    engine = open_engine(config.bundle, Dependencies(config, profiles, CatalogProgress(), Telemetry()))
    assert engine.catalog.columns.declared.shape[1] == 1
    listed = {one["name"]: one for one in feature_report(data, tmp_path / "bundle")["features"]}
    assert listed["brand/acme"]["coverage"] == 0.5
    assert listed["phone/phone"]["coverage"] is None
    assert listed["day_clicks"]["coverage"] > 0.5


def test_an_event_type_that_the_data_set_lacks_is_refused_before_the_training(data: Path, tmp_path: Path) -> None:
    wrong = [{"name": "likes", "form": "count", "event_types": ["like"]}]
    with pytest.raises(SettingsError, match="features: likes: no event has the type 'like', there are click, shown"):
        trained(data, tmp_path / "run", wrong)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_file_of_settings_declares_them(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("features:\n  - {name: cost, form: value, of: item.price}\n")
    assert load_config(file).features == ({"name": "cost", "form": "value", "of": "item.price"},)
    file.write_text("features:\n  - {name: cost, form: worth, of: item.price}\n")
    with pytest.raises(SettingsError, match="cost: form is 'worth'"):
        load_config(file)
