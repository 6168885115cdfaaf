from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.training.conftest import TINY
from training.config import TrainConfig
from training.evaluation.evaluate import evaluate
from training.report import _curves, write_report
from training.train import train


@pytest.fixture(scope="module")
def runs(circles: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base, made = tmp_path_factory.mktemp("reports"), []
    for seed in (0, 1):
        made.append(base / f"seed<{seed}>")
        settings = {**TINY, "epochs": 4, "protocol": "leave-one-out", "seed": seed, "tensorboard": seed == 0}
        train(circles, made[-1], TrainConfig(**settings))
    return made


def test_training_writes_the_curves_and_what_was_run(runs: list[Path]) -> None:
    page = (runs[0] / "report.html").read_text()
    assert "Learning curves" in page
    for said in (
        "data fingerprint",
        "learning_rate",
        "torch",
        "training loss, dashed: validation",
        "validation NDCG@10",
    ):
        assert said in page
    assert "seed&lt;0&gt;" in page
    assert "seed<0>" not in page


def test_evaluating_adds_the_figures_of_all_seeds(runs: list[Path]) -> None:
    found = evaluate(runs, "leave-one-out")
    for run in runs:
        page = (run / "report.html").read_text()
        assert f"{found['metrics']['ndcg@10']['mean']:.4f}" in page
        for name, values in found["baselines"].items():
            assert name in page
            assert f"{values['hit@10']:.4f}" in page
        for value in found["by_seed"]["ndcg@10"]:
            assert f"{value:.4f}" in page
        for segment in found["segments"]:
            assert segment in page


def test_the_page_stands_alone_and_its_figures_are_whole(runs: list[Path]) -> None:
    page = write_report(runs).read_text()
    assert not re.search(r'(src|href)="(?!#)(?!\w+-)[^"#]*//', page.replace("http://www.w3.org/", ""))
    assert "<script" not in page
    assert "#0102" not in page, "a stand-in colour is left"
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert figures
    names: list[str] = []
    for figure in figures:
        root = ElementTree.fromstring(figure)
        mine = [one.attrib["id"] for one in root.iter() if "id" in one.attrib]
        links = re.findall(r'(?:href="#|url\(#)([^")]+)', figure)
        assert set(links) <= set(mine)
        names += mine
    assert len(names) == len(set(names)), "two figures share an id"


def test_the_log_of_an_older_version_is_still_drawn() -> None:
    new = [{"tokens": 10.0, "seconds": 1.0, "loss": 2.0, "validation_loss": 3.0, "ndcg@10": 0.1}]
    new.append({**new[0], "tokens": 20.0, "validation_loss": 2.5})
    old = [{name: value for name, value in line.items() if name != "validation_loss"} for line in new]
    none = [{**line, "validation_loss": None} for line in new]
    drawn = [_curves({Path("run"): log}) for log in (new, old, none)]
    assert [len(re.findall(r'<path d="M[^"]*"[^>]*stroke-dasharray', page)) for page in drawn] == [1, 0, 0]


def test_tensorboard_reads_the_same_curve(runs: list[Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from training.report import _lines

    events, log = EventAccumulator(str(runs[0] / "tensorboard")).Reload(), _lines(runs[0] / "log.jsonl")
    titles = {"ndcg@10": "validation/ndcg@10", "loss": "training/loss", "validation_loss": "validation/loss"}
    for name, title in titles.items():
        curve = events.Scalars(title)
        assert [point.step for point in curve] == [line["tokens"] for line in log]
        assert [point.value for point in curve] == pytest.approx([line[name] for line in log], abs=1e-6)
    assert not (runs[1] / "tensorboard").exists()


def test_without_the_package_the_switch_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: TrainConfig
) -> None:
    import sys

    from training.fitting.tensorboard import open_tensorboard

    for name in [
        name for name in sys.modules if name.partition(".")[0] == "tensorboard" or "utils.tensorboard" in name
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    open_tensorboard(tmp_path, tiny)
    with pytest.raises(ModuleNotFoundError, match="tensorboard"):
        open_tensorboard(tmp_path, tiny.model_copy(update={"tensorboard": True}))
