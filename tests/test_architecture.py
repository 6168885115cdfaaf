"""The import rules hold, and each is named when a violation is planted in a copy of the tree."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.architecture_rules import PACKAGES, rule_7, rule_8

ROOT = Path(__file__).parent.parent
LINTER, SCRIPT = "import-linter", "architecture_rules.py"
DOWNWARD = "Rule 4: serving imports downward only"
TRAINING = "Rule 4: training imports downward only"
PROTOCOLS = "Rule 4: the protocols of an evaluation never import one another"
STAGES = "Rule 4: the stages of the pipeline never import one another"


@dataclass(frozen=True)
class Planted:
    """A statement that breaks a rule, the file it is appended to, and who must say so."""

    rule: str
    file: str
    statement: str
    by: str = LINTER


PLANTED = [
    Planted("Rule 1: features imports no sibling", "features/planted.py", "import training"),
    Planted("Rule 1: features imports no sibling", "features/planted.py", "from penchant.v1 import common_pb2"),
    Planted("Rule 1: features computes", "features/profile.py", "from features.tables import dataset"),
    Planted("Rule 1: features needs numpy, pyarrow and numba only", "features/planted.py", "import redis", SCRIPT),
    Planted("Rule 2: training and serving meet in the bundle only", "training/planted.py", "import serving.errors"),
    Planted("Rule 2: training and serving meet in the bundle only", "serving/errors.py", "import training"),
    Planted("Rule 2: serving never imports torch", "serving/pipeline/runner.py", "import torch"),
    Planted("Rule 2: importing this loads torch", "serving/pipeline/runner.py", "import torch", SCRIPT),
    Planted("Rule 3: penchant.v1", "serving/planted.py", "from penchant.v1 import common_pb2"),
    Planted("Rule 3: penchant.v1", "serving/pipeline/runner.py", "from penchant.v1 import common_pb2"),
    Planted("Rule 3: penchant.v1", "cli/main.py", "from penchant.v1 import common_pb2"),
    Planted("Rule 3: penchant.v1", "training/planted.py", "from penchant.v1 import common_pb2"),
    Planted(DOWNWARD, "serving/pipeline/runner.py", "from serving.processes import supervisor"),
    Planted(DOWNWARD, "serving/errors.py", "from serving.redis import client"),
    Planted(DOWNWARD, "serving/redis/client.py", "from serving.stores import profiles"),
    Planted(DOWNWARD, "serving/bundle/vector_index.py", "from serving.pipeline import scorers"),
    Planted(DOWNWARD, "serving/bundle/model.py", "from serving.stores import profiles"),
    Planted(DOWNWARD, "serving/privacy/ledger.py", "from serving.pipeline import request"),
    Planted(DOWNWARD, "serving/warehouse/items.py", "from serving.projection import rebuild"),
    Planted(DOWNWARD, "serving/services/events.py", "from serving.jobs import hosts"),
    Planted(DOWNWARD, "serving/planted.py", "import os"),
    Planted(STAGES, "serving/pipeline/filters.py", "from serving.pipeline import sources"),
    Planted(STAGES, "serving/pipeline/request.py", "from serving.pipeline import runner"),
    Planted(TRAINING, "training/models/ranker.py", "from training.fitting import encoders"),
    Planted(TRAINING, "training/data/point_in_time.py", "from training.models import scoring"),
    Planted(TRAINING, "training/run.py", "from training import train"),
    Planted(TRAINING, "training/train.py", "from training.evaluation import evaluate"),
    Planted(TRAINING, "training/export/export.py", "from training.evaluation import events"),
    Planted(TRAINING, "training/metrics.py", "from training import config"),
    Planted(TRAINING, "training/planted.py", "import os"),
    Planted(PROTOCOLS, "training/evaluation/search.py", "from training.evaluation import evaluate"),
    Planted(PROTOCOLS, "training/evaluation/impressions.py", "from training.evaluation import events"),
    Planted("Rule 5: the client and the contract", "penchant/client.py", "import features.errors"),
    Planted("Rule 5: import numpy inside the command", "cli/main.py", "import numpy", SCRIPT),
    Planted("Rule 5: import training.train inside the command", "cli/main.py", "import training.train", SCRIPT),
    Planted("Rule 5: import numpy inside the command", "cli/options.py", "import numpy", SCRIPT),
    Planted("Rule 5: import serving.config inside the command", "cli/serve.py", "import serving.config", SCRIPT),
    Planted("Rule 5: write an import statement", "serving/pipeline/runner.py", "X = __import__('torch')", SCRIPT),
    Planted("Rule 6: an __init__.py holds a docstring", "features/__init__.py", "from features import keys", SCRIPT),
    Planted("Rule 6: nothing happens at import", "features/keys.py", "print('hello')", SCRIPT),
    Planted("Rule 6: nothing happens at import", "training/planted.py", "for x in range(3):\n    pass", SCRIPT),
    Planted("Rule 6: say in a docstring", "training/planted.py", "X = 1", SCRIPT),
]


def check(root: Path, by: str) -> str:
    """Returns the output of the check, without the names of rules that held."""
    command = ["lint-imports", "--no-cache"] if by == LINTER else ["python", str(ROOT / "tests" / SCRIPT), str(root)]
    command[0] = str(Path(sys.executable).parent / command[0])
    environment = os.environ | {"PYTHONPATH": str(root), "COLUMNS": "500"}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if " KEPT" not in line]
    assert run.returncode == (1 if "Rule" in "".join(lines) else 0), run.stdout + run.stderr
    return "\n".join(lines)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("by", [LINTER, SCRIPT])
def test_rules_hold(by: str) -> None:
    assert "Rule" not in check(ROOT, by)


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: f"{planted.rule} <- {planted.statement[:30]}")
def test_planted_violation_is_named(copy: Path, planted: Planted) -> None:
    file = copy / planted.file
    old = file.read_text() if file.exists() else ""
    file.write_text(f"{old}\n{planted.statement}\n")
    assert planted.rule in check(copy, planted.by)


@pytest.mark.parametrize(
    ("rule", "wrong", "right"),
    [
        (rule_7, "path.read_text()", "path.read_text(encoding='utf-8')"),
        (rule_7, "path.write_text(text)", "path.write_bytes(text)"),
        (rule_7, "path.open('w')", "path.open('wb')"),
        (rule_7, "open(path)", "open(path, 'rb')"),
        (rule_8, "@nb.njit(cache=True)\ndef f(): ...", "@kernel()\ndef f(): ..."),
    ],
)
def test_what_depends_on_the_machine_is_named(rule: Callable[..., Any], wrong: str, right: str) -> None:
    assert len(list(rule("features/planted.py", ast.parse(wrong)))) == 1
    assert not list(rule("features/planted.py", ast.parse(right)))


def test_contracts_have_the_one_exception_that_a_gpu_needs() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    exceptions = [line for line in lines if line.startswith("ignore_imports")]
    assert exceptions == ['ignore_imports = ["serving.bundle.device_scan -> torch"]']
