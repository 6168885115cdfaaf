from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from features.errors import SettingsError
from training.config import TrainConfig, load_config
from training.run import read_config
from training.runtime import prepared


def test_the_command_line_beats_the_environment_beats_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("dim: 32\nlayers: 1\nepochs: 3\n")
    monkeypatch.setenv("PENCHANT_TRAIN_LAYERS", "3")
    monkeypatch.setenv("PENCHANT_TRAIN_EPOCHS", "4")
    config = load_config(file, ["epochs=5"], seed=7)
    assert (config.dim, config.layers, config.epochs, config.seed) == (32, 3, 5, 7)


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"learning_rat'.*did you mean 'learning_rate'"):
        load_config(None, ["learning_rat=1"])


@pytest.mark.parametrize(
    ("override", "told"),
    [("dim=zero", "dim"), ("max_length=257", "max_length"), ("dim=10", "must divide"), ("epochs", "KEY=VALUE")],
)
def test_a_value_that_cannot_work_is_refused(override: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        load_config(None, [override, "heads=4"] if told == "must divide" else [override])


def test_lists_and_actions_come_from_yaml() -> None:
    config = load_config(None, ["actions=[{name: like, event_type: rating, min_value: 4}]", "target_types=[rating]"])
    assert config.actions[0].min_value == 4
    assert config.target_types == ("rating",)


@pytest.mark.parametrize("name", ["default", "movielens", "amazon", "feed", "search"])
def test_the_shipped_configurations_load(name: str) -> None:
    assert load_config(Path(name)).epochs >= 1


def test_a_device_that_the_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert load_config(None, device="auto").resolved_device().type == "cpu"
    with pytest.raises(SettingsError, match="--device cpu"):
        load_config(None, device="cuda").resolved_device()


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("- 1\n")
    with pytest.raises(SettingsError, match="key: value"):
        load_config(file)


def test_a_service_called_penchant_train_sets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    services = {"PORT": "tcp://10.0.0.1:80", "SERVICE_HOST": "10.0.0.1", "PORT_80_TCP_ADDR": "10.0.0.1"}
    for name, value in services.items():
        monkeypatch.setenv(f"PENCHANT_TRAIN_{name}", value)
    assert load_config() == TrainConfig()


@pytest.mark.parametrize("value", ["many", "0", "[", ""])
def test_a_wrong_value_of_a_variable_names_the_variable(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PENCHANT_TRAIN_EPOCHS", value)
    with pytest.raises(SettingsError, match=r"^PENCHANT_TRAIN_EPOCHS: "):
        load_config()
    assert load_config(None, ["epochs=2"]).epochs == 2


def test_settings_that_do_not_fit_each_other_name_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENCHANT_TRAIN_HEADS", "3")
    with pytest.raises(SettingsError, match=r"must divide dim \(64\) \(set by PENCHANT_TRAIN_HEADS\)"):
        load_config()


def test_a_variable_that_looks_like_a_setting_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PENCHANT_TRAIN_EPOCH", "2")
    assert load_config().epochs == TrainConfig().epochs
    assert "did you mean PENCHANT_TRAIN_EPOCHS?" in caplog.text


def test_threads_are_as_many_as_the_container_grants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.runtime.cores", lambda: 3)
    before = torch.get_num_threads()
    with prepared(0):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


def test_a_run_with_the_earlier_names_of_settings_is_read(tmp_path: Path) -> None:
    settings = json.loads(TrainConfig(cold_item_share=0.2, validation_users=7).model_dump_json())
    settings["hide_items"], settings["validation_people"] = (
        settings.pop(name) for name in ("cold_item_share", "validation_users")
    )
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert read_config(tmp_path) == TrainConfig(cold_item_share=0.2, validation_users=7)
