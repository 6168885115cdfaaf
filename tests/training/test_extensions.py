"""Losses and encoders of another package are found by name, tried before a training, and named in its result."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from features.errors import SettingsError
from tests.training.conftest import TINY
from training.config import TrainConfig
from training.models.encoders import UserEncoder
from training.models.extensions import extensions_of, loss_of, require_extensions
from training.models.losses import softmax_loss
from training.run import build_modules, load_run
from training.train import train

CODE = '''
import torch
from torch import nn
from training.models.losses import softmax_loss

calls = []

def sharp(users, items, targets, correction, chunk):
    calls.append(len(targets))
    return softmax_loss(users * 1.5, items, targets, correction, chunk)

def vector(users, items, targets, correction, chunk):
    return users.sum(1)

def constant(users, items, targets, correction, chunk):
    return items.sum()

class Mean(nn.Module):
    """The mean of the vectors so far."""
    def __init__(self, shape):
        super().__init__()
        self.turn = nn.Linear(shape.dim, shape.dim)
    def forward(self, vectors, types, lengths):
        steps = torch.cumsum(torch.ones_like(vectors[..., :1]), 1)
        return self.turn(torch.cumsum(vectors, 1) / steps)
    def last(self, vectors, types, lengths):
        at = torch.arange(vectors.shape[0], device=vectors.device)
        return self.forward(vectors, types, lengths)[at, (lengths - 1).clamp(min=0)]

class Peeking(Mean):
    def forward(self, vectors, types, lengths):
        return self.turn(vectors.mean(1, keepdim=True).expand_as(vectors))

class Wide(Mean):
    def forward(self, vectors, types, lengths):
        return torch.cat([vectors, vectors], 2)

number = 3
'''
POINTS = """[penchant.losses]
sharp = own_models:sharp
vector = own_models:vector
constant = own_models:constant
lost = own_models:nothing
number = own_models:number

[penchant.encoders]
mean = own_models:Mean
peeking = own_models:Peeking
wide = own_models:Wide
plain = builtins:dict
"""


def install(folder: Path, name: str, points: str) -> None:
    """Puts a distribution into a folder, as an installation would."""
    info = folder / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(points)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with the package own-models in it."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "own_models.py").write_text(CODE)
    install(folder, "own-models", POINTS)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    importlib.invalidate_caches()
    return folder


def test_a_training_uses_them_and_says_where_they_are_from(package: Path, circles: Path, tmp_path: Path) -> None:
    small = {"epochs": 2, "query_steps": 1, "ranker_steps": 0, "content": False}
    config = TrainConfig(**{**TINY, **small, "loss": "sharp", "encoder": "mean"})
    result = train(circles, tmp_path / "run", config)
    assert result["extensions"] == {
        "encoder": {"name": "mean", "distribution": "own-models", "version": "1.2"},
        "loss": {"name": "sharp", "distribution": "own-models", "version": "1.2"},
    }
    assert len(sys.modules["own_models"].calls) > result["steps"]
    run = load_run(tmp_path / "run")
    assert type(run.user_encoder).__name__ == "Mean"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["encoder"] == "mean"


def test_a_try_leaves_the_first_weights_as_they_are(package: Path) -> None:
    weights = []
    for loss in ("softmax", "sharp"):
        torch.manual_seed(0)
        config = TrainConfig(**{**TINY, "loss": loss, "encoder": "mean"})
        require_extensions(config)
        weights.append(build_modules(config, 5, 1, 1, content=False).item.ids.weight)
    assert torch.equal(*weights)


def test_penchants_own_need_no_package() -> None:
    config = TrainConfig(**TINY)
    assert loss_of(config) is softmax_loss
    assert type(build_modules(config, 5, 1, 1, content=False).user) is UserEncoder
    assert extensions_of(config) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "sharq"}, r"no loss is named 'sharq': known are constant, .*softmax, vector .*mean 'sharp'"),
        ({"encoder": "sharp"}, r"no encoder is named 'sharp': known are mean, peeking, plain, transformer, wide"),
        ({"loss": "lost"}, r"own_models:nothing of own-models 1\.2 cannot be loaded .* reinstall"),
        ({"loss": "number"}, "is neither a function nor a class"),
        ({"loss": "vector"}, "'vector' has to return a finite scalar"),
        ({"loss": "constant"}, "'constant' has to have a gradient by users"),
        ({"encoder": "peeking"}, "'peeking' must not look at later events"),
        ({"encoder": "wide"}, r"'wide' has to return float32 \[2, 3, 16\] by forward, and returns .* \[2, 3, 32\]"),
        ({"encoder": "plain"}, "cannot be made|has to be a torch.nn.Module"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_claimed(
    package: Path, circles: Path, tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        train(circles, tmp_path / "run", TrainConfig(**{**TINY, **settings}))
    assert not (tmp_path / "run").exists()


def test_a_name_that_clashes_is_refused(package: Path) -> None:
    install(package, "other-models", "[penchant.losses]\nsharp = own_models:sharp\n")
    importlib.invalidate_caches()
    with pytest.raises(SettingsError, match=r"(own|other)-models 1\.2 and (own|other)-models 1\.2 both have a loss"):
        require_extensions(TrainConfig(loss="sharp"))
    install(package, "shadow", "[penchant.encoders]\ntransformer = own_models:Mean\n")
    importlib.invalidate_caches()
    with pytest.raises(SettingsError, match=r"'transformer' is Penchant's own, and shadow 1\.2 has another"):
        require_extensions(TrainConfig())
