"""The demo, gone through on a small simulated world, and what it says of figures that are known."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import demo as module
from benchmarks import latency
from benchmarks.demo import STORIES, demo
from benchmarks.report import BenchmarkError
from penchant.v1 import ranking_pb2
from training.config import load_config

# No two items of this world have the same title.
SMALL = {"users": 100, "items": 120, "days": 60, "seed": 1}
QUICK: dict[str, Any] = {"dim": 16, "layers": 1, "heads": 1, "feed_forward": 32, "epochs": 1, "batch_tokens": 1024}
QUICK |= {"token_buckets": 256, "query_steps": 20, "ranker_steps": 20, "ranker_hidden": 4, "candidates": 50}


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "WARM_UP_S", 0.2)
        patch.setattr(latency, "CEILING_S", 0.5)
        patch.setattr(module, "HISTORY", 30)
        patch.setitem(STORIES, "simulated", replace(STORIES["simulated"], options=SMALL, settings=QUICK))
        patch.setattr("sys.stdin", io.StringIO())  # no terminal, so that it ends by itself
        return demo("simulated", tmp_path_factory.mktemp("demo"))


def test_the_demo_goes_from_data_to_answers(answer: dict[str, Any]) -> None:
    json.dumps(answer)
    assert answer["rate"] > 0
    # Every user is known by what they did. Only an answer whose profile came too late may be another, and it is marked.
    assert set(answer["rungs"]) == {"sequence"} or "PROFILE_STORE" in answer["degraded"]
    assert answer["rungs"]["sequence"] >= 0.9
    assert answer["other_unchanged"] is True
    assert list(answer["phases"]) == ["data", "training", "evaluation", "export", "service", "requests"]
    assert answer["seconds"] == pytest.approx(sum(answer["phases"].values()), abs=0.1)


def test_no_title_stands_twice_on_a_page(answer: dict[str, Any]) -> None:
    assert answer["same_titles"] == 0
    # Control: a page that says the same twice is counted.
    cast = module._Cast.__new__(module._Cast)
    cast._titles = {"1": "Psycho", "2": "Psycho", "3": "Vertigo"}
    slate = ranking_pb2.Slate(items=[{"item_id": item} for item in ("1", "3", "2")])  # type: ignore[list-item]
    assert cast.same_titles(slate) == 1


def test_every_baseline_has_its_margin(answer: dict[str, Any]) -> None:
    assert set(answer["margins"]) == set(answer["baselines"])
    for name, margin in answer["margins"].items():
        assert margin["low"] <= margin["mean"] <= margin["high"]
        difference = answer["quality"]["ndcg@10"]["mean"] - answer["baselines"][name]["ndcg@10"]
        assert math.isclose(margin["mean"], difference, abs_tol=1e-9)
    assert answer["ahead"] == all(margin["low"] > 0 for margin in answer["margins"].values())
    assert answer["parts"] == {}


def figures(low: float, high: float = 0.3) -> dict[str, Any]:
    """An evaluation in which the model is ahead of popularity, and of Markov by `low` to `high`."""
    value = {"ndcg@10": {"mean": 0.3, "low": 0.2, "high": 0.4}, "hit@10": {"mean": 0.5, "low": 0.4, "high": 0.6}}
    baseline = {"ndcg@10": 0.1, "hit@10": 0.2}
    paired = {"popular": (0.1, 0.3), "markov": (low, high)}
    return {
        "metrics": value,
        "baselines": dict.fromkeys(paired, baseline),
        "paired": {name: {"ndcg@10": {"mean": 0.2, "low": at, "high": to}} for name, (at, to) in paired.items()},
    }


@pytest.mark.parametrize(
    ("low", "says"),
    [
        (0.001, "ahead of every baseline, the 95 % interval of each difference above zero"),
        (0.0, "NOT surely ahead of markov: 0.200 (0.000 to 0.300)."),
        (-0.1, "NOT surely ahead of markov: 0.200 (-0.100 to 0.300)."),
    ],
)
def test_it_says_no_more_than_is_true(low: float, says: str) -> None:
    screen = Console(record=True, width=200)
    module._judge(figures(low), "", screen)
    assert says in screen.export_text()
    assert module._figures(figures(low))["ahead"] is (low > 0)
    module._judge(figures(-0.3, -0.1), "", screen)
    assert "BEHIND markov: 0.200 (-0.300 to -0.100)." in screen.export_text()


def test_every_story_has_settings_that_train_and_hold_out() -> None:
    for story in STORIES.values():
        config = load_config(story.config, {"protocol": module.PROTOCOL, **story.settings})
        assert config.protocol == "leave-one-out"
    assert load_config(STORIES["completejourney"].config).repeats is True


def test_a_data_set_without_a_story_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="choose one of movielens-1m, completejourney, simulated"):
        demo("kuairand", tmp_path)
