"""The command line answers at once, ends in one line of JSON, and meets a mistake with a message."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import penchant
from cli import main as cli
from cli import options
from cli.options import parse_settings
from features.errors import BundleError, PenchantError
from features.profile import Retention

HEAVY = (
    "numpy",
    "pyarrow",
    "numba",
    "torch",
    "grpc",
    "redis",
    "faiss",
    "onnxruntime",
    "training",
    "serving",
)
COMMANDS = [
    "data",
    "validate",
    "features",
    "train",
    "tune",
    "evaluate",
    "embeddings",
    "export",
    "serve",
    "recommend",
    "projector",
]
COMMANDS += ["warehouse", "erase", "hosts", "demo", "profiles rebuild", "profiles show"]
COMMANDS += [
    "bench compare",
    "bench continued",
    "bench fidelity",
    "bench freshness",
    "bench growth",
    "bench impressions",
    "bench kills",
    "bench latency",
    "bench load-report",
    "bench overload",
    "bench profiles",
    "bench sizing",
    "bench stages",
    "bench training",
]


def penchant_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from cli.main import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"})


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Status with which `main` ends the process."""
    monkeypatch.setattr(sys, "argv", ["penchant", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_nothing_heavy(command: str) -> None:
    probe = (
        "import sys\nfrom cli.main import main\n"
        "try:\n    main()\nfinally:\n"
        f"    print('loaded', *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    begun = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", probe, *command.split(), "--help"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines()[-1] == "loaded"
    assert time.monotonic() - begun < 10  # far above the quarter of a second it takes, for a machine that is busy


@pytest.mark.parametrize("command", COMMANDS)
def test_every_parameter_is_explained(command: str) -> None:
    found = typer.main.get_command(cli.app)
    for name in command.split():
        found = found.commands[name]  # type: ignore[attr-defined]
    assert found.help
    for parameter in found.params:
        assert getattr(parameter, "help", None), f"{command}: {parameter.name} says nothing"


def test_every_command_is_listed() -> None:
    def names(app: typer.Typer) -> set[str]:
        own = {one.name or one.callback.__name__ for one in app.registered_commands if one.callback}
        # The commands of a group without a name are those of the group around it.
        nested = [group for group in app.registered_groups if not isinstance(group.name, str)]
        return own.union(*(names(group.typer_instance) for group in nested if group.typer_instance))

    listed = names(cli.app)
    for group in cli.app.registered_groups:
        assert group.typer_instance
        prefix = f"{group.name} " if isinstance(group.name, str) else ""
        listed |= {f"{prefix}{name}" for name in names(group.typer_instance)}
    assert listed == set(COMMANDS)


def test_answer_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    options.print_result({
        "users": np.int64(3), "mean": np.float32(0.5), "rows": np.arange(2), "out": Path("a/b"),
        "nothing": math.nan, "nested": {"high": [math.inf, 1.5], 7: None}, "name": "Käse\n",
    })  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0]) == {
        "users": 3, "mean": 0.5, "rows": [0, 1], "out": "a/b",
        "nothing": None, "nested": {"high": [None, 1.5], "7": None}, "name": "Käse\n",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PenchantError("no such thing: do this"), "error: no such thing: do this"),
        (BundleError("index.faiss: checksum differs"), "error: index.faiss: checksum differs"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "pip install 'penchant[training]'"),
        (ModuleNotFoundError("No module named 'faiss.x'", name="faiss.x"), "pip install 'penchant[cpu]'"),
    ],
)
def test_mistakes_end_with_2_and_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, message: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert run_main(monkeypatch) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["validate", "DATA", "--allow", "duplicates=true"], "write CHECK=SHARE"),
        (["profiles", "rebuild", "DATA", "--redis", "redis://x", "--retention", "like=true"], "a number of days"),
    ],
)
def test_true_is_no_number(tmp_path: Path, words: list[str], message: str) -> None:
    ended = penchant_command(*(str(tmp_path) if word == "DATA" else word for word in words))
    assert ended.returncode == 2
    assert message in ended.stderr


@pytest.mark.parametrize("text", ["a=[", "a={b", "a='c"])
def test_a_setting_that_cannot_be_read_is_the_caller_s_to_correct(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="not YAML"):
        parse_settings([text])


def test_a_projector_restores_as_serve_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    evictions: list[Any] = []
    monkeypatch.setattr("serving.projection.process.run", lambda *_, eviction, **__: evictions.append(eviction) or 0)
    words = ["--evict-after-days", "30", "--warehouse", str(tmp_path), "--retention", "search=7"]
    assert run_main(monkeypatch, "projector", "--redis", "redis://x", *words) == 0
    [eviction] = evictions
    assert eviction.restore.args == (tmp_path, Retention({"search": 7.0}))


@pytest.mark.parametrize("error", [RuntimeError("a defect"), ModuleNotFoundError("No module named 'x'", name="x")])
def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(type(error)):
        cli.main()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "no-such-data", "--out", "run"],
        ["serve", "no-such-bundle"],
        ["evaluate", ".", "--protocol", "guess"],
        ["nonsense"],
        ["data", "no-such-data-set", "--out", "never-made"],
    ],
)
def test_wrong_arguments(arguments: list[str]) -> None:
    run = penchant_command(*arguments)
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""
    assert not Path("never-made").exists()


def test_broken_bundle_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    run = penchant_command("bench", "stages", str(tmp_path))
    assert run.returncode == 2, run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: ")


def test_a_check_of_nothing_does_not_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "validate", str(tmp_path)) == 2
    assert "is not a data set" in capsys.readouterr().err
    (tmp_path / "events").mkdir()
    assert run_main(monkeypatch, "validate", str(tmp_path)) == 1
    said = capsys.readouterr().out
    assert said.startswith("FAIL  types: ")
    assert "PASS" not in said
    assert json.loads(said.splitlines()[-1])["passed"] is False


def test_cores_are_set_unless_the_caller_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "ORT_DISABLE_TELEMETRY",
        "OMP_WAIT_POLICY",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "NUMBA_NUM_THREADS",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    options.use_cores(1)
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["MKL_NUM_THREADS"] == "1"


@pytest.mark.parametrize("name", sorted(penchant._HOME))
def test_functions_are_lazy_names_of_the_package(name: str) -> None:
    assert name in dir(penchant)
    function = getattr(penchant, name)
    assert function.__module__ == penchant._HOME[name]


def test_unknown_name_of_the_package() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = penchant.nonsense
