"""Training on a GPU: the CPU's weights in float32, the same ones twice, and checkpoints that move between devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from features.tables.dataset import open_dataset
from training.config import TrainConfig
from training.fitting.claims import claim
from training.fitting.encoders import EncoderTrainer
from training.models.encoders import ItemBags
from training.run import RunError, sha256_of
from training.runtime import exact, in_halves, prepared
from training.train import initial_modules, read_material

CPU = torch.device("cpu")
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA is absent"))
# On the CPU the same checks hold the loop's own promises.
DEVICES = ["cpu", CUDA]
LOSSES = [{"negatives": 0}, {"negatives": 8}, {"negatives": 8, "dense_items": 0}]
"""The full softmax, sampled negatives, and these with steps over the rows in use."""


def made(circles: Path, out: Path, config: TrainConfig, device: torch.device) -> EncoderTrainer:
    material = read_material(open_dataset(circles), config, device)
    torch.manual_seed(config.seed)
    modules = initial_modules(material, config, device, fresh=True)
    bags = None if material.inputs is None else ItemBags.build(modules.item, material.inputs)
    out.mkdir(exist_ok=True)
    return EncoderTrainer(out, config, material.data, material.division, modules, bags)


def steps(fit: EncoderTrainer, count: int) -> list[float]:
    torch.manual_seed(3)  # negatives are drawn on the CPU, whatever the device
    plan = fit.batches.epoch(0)
    return [float(fit._step(fit.batches.batch(plan[at % len(plan)]), len(plan))) for at in range(count)]


def apart(one: EncoderTrainer, other: EncoderTrainer) -> float:
    """The length of the difference over that of the weights; Adam makes whole steps of a gradient that is rounding."""
    a, b = (torch.cat([w.detach().cpu().double().flatten() for w in fit._weights().values()]) for fit in (one, other))
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("losses_of", LOSSES)
def test_float32_gives_the_weights_of_the_cpu(
    circles: Path, tmp_path: Path, tiny: TrainConfig, device: str, losses_of: dict[str, int]
) -> None:
    config = tiny.model_copy(update={"id_dropout": 0.0, **losses_of})
    with prepared(1, torch.device(device)), exact():
        assert not in_halves(torch.device(device))
        fits = [made(circles, tmp_path / name, config, torch.device(name)) for name in ("cpu", device)]
        losses = [steps(fit, 5) for fit in fits]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    assert apart(*fits) < 1e-4
    # Control: another step is no rounding.
    steps(fits[0], 1)
    assert apart(*fits) > 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("losses_of", LOSSES)
def test_the_same_seed_gives_the_same_weights(
    circles: Path, tmp_path: Path, tiny: TrainConfig, device: str, losses_of: dict[str, int]
) -> None:
    config = tiny.model_copy(update={"dropout": 0.2, **losses_of})
    with prepared(1, torch.device(device)):
        fits = [made(circles, tmp_path / name, config, torch.device(device)) for name in "ab"]
        digests = []
        for fit in fits:
            steps(fit, 4)
            digests.append(sha256_of(fit._weights() | fit._moments()))
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("cpu", "cpu"),
        pytest.param(*("cuda", "cpu"), marks=CUDA.marks),
        pytest.param(*("cpu", "cuda"), marks=CUDA.marks),
    ],
)
@pytest.mark.parametrize("losses_of", LOSSES)
def test_a_checkpoint_goes_on_on_another_device(
    circles: Path, tmp_path: Path, tiny: TrainConfig, first: str, second: str, losses_of: dict[str, int]
) -> None:
    config = tiny.model_copy(update={"id_dropout": 0.0, **losses_of})
    with prepared(1, torch.device(second)), exact():
        before = made(circles, tmp_path / "run", config, torch.device(first))
        steps(before, 3)
        before._save()
        after = made(circles, tmp_path / "run", config, torch.device(second))
        assert apart(before, after) > 1e-4
        after._resume()
        assert apart(before, after) == 0
        steps(before, 2)
        steps(after, 2)
    assert apart(before, after) < 1e-4


def test_an_unfinished_run_may_change_its_device_and_threads(circles: Path, tmp_path: Path, tiny: TrainConfig) -> None:
    dataset = open_dataset(circles)
    claim(tmp_path / "run", tiny, dataset)
    claim(tmp_path / "run", tiny.model_copy(update={"device": "auto", "threads": 2}), dataset)
    with pytest.raises(RunError, match="another configuration"):
        claim(tmp_path / "run", tiny.model_copy(update={"dim": 8}), dataset)


def test_what_training_sets_is_put_back() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    with prepared(1, CPU):
        pass
    assert before == (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())
