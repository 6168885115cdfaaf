"""The functions as a caller in Python uses them: paths and settings as text, and the notebook of the docs."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import penchant
from cli import main as cli
from features.errors import SettingsError
from training.config import TrainConfig, load_config, resolve_config

NOTEBOOK = Path(__file__).parents[2] / "docs" / "example.ipynb"


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The directory in which the notebook's cells have run, their variables, and what they printed."""
    folder = tmp_path_factory.mktemp("notebook")
    cells: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells), "clear the outputs of docs/example.ipynb"
    variables: dict[str, Any] = {}
    printed = io.StringIO()
    # One thread: next to other tests, two that wait for each other take many times as long.
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENCHANT_TRAIN_THREADS", "1")
        for cell in cells:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), cell["id"], "exec"), variables)
    return folder, variables, printed.getvalue()


def test_the_notebook_runs_from_data_to_a_bundle(played: tuple[Path, dict[str, Any], str]) -> None:
    folder, variables, printed = played
    assert (folder / "bundle" / "manifest.json").is_file()
    assert len(variables["curve"]) == variables["trained"]["epochs"] == 8
    assert variables["curve"][-1]["validation_loss"] < variables["curve"][0]["validation_loss"]
    assert printed == penchant.evaluation_table(variables["figures"]) + "\n"
    assert variables["figures"]["metrics"]["hit@10"]["mean"] > variables["figures"]["baselines"]["popular"]["hit@10"]
    assert all(gate["passed"] for gate in variables["bundle"]["gates"].values())
    assert len(variables["users"]) == 300


def test_the_command_prints_the_table_for_the_reader_and_one_line_for_programs(
    played: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, printed = played
    monkeypatch.setattr(sys, "argv", ["penchant", "evaluate", str(folder / "run")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    captured = capsys.readouterr()
    [line] = captured.out.splitlines()
    assert json.loads(line)["protocol"] == "leave-one-out"
    assert printed in captured.err


def test_settings_are_keywords_over_a_file_a_name_or_an_object(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("epochs: 5\ndim: 32\n")
    assert resolve_config(str(file), {"epochs": 7}) == TrainConfig(epochs=7, dim=32)
    assert resolve_config("movielens", {}) == load_config(Path("movielens"))
    assert resolve_config(None, {"target_types": ["like"]}) == TrainConfig(target_types=("like",))
    made = TrainConfig(epochs=5, actions=({"name": "like", "event_type": "rating"},))
    assert resolve_config(made, {}) is made
    assert resolve_config(made, {"seed": 3}) == made.model_copy(update={"seed": 3})


@pytest.mark.parametrize("config", [None, "movielens", TrainConfig()])
def test_a_wrong_setting_is_refused_before_anything_is_read(tmp_path: Path, config: TrainConfig | str | None) -> None:
    with pytest.raises(SettingsError, match="did you mean 'epochs'"):
        penchant.train(str(tmp_path / "no data"), str(tmp_path / "run"), config, epoch=3)
    with pytest.raises(SettingsError, match="dim"):
        penchant.train(str(tmp_path / "no data"), str(tmp_path / "run"), config, dim="wide")
    assert not list(tmp_path.iterdir())


def test_an_object_of_settings_hears_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENCHANT_TRAIN_EPOCHS", "9")
    assert resolve_config(None, {"seed": 1}).epochs == 9
    assert resolve_config(TrainConfig(epochs=5), {"seed": 1}).epochs == 5
