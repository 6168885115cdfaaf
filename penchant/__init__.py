"""Learns what users like from what they do, and answers what next, for this user, here, now.

`penchant.client` calls a running service. What the command line does is here as functions, each loaded when it is
first used: `prepare`, `train`, `tune`, `evaluate`, `embeddings`, `export`, `serve`, `recommend`, `recommend_from_data`
and `rebuild`; `evaluation_table` lays out what `evaluate` returns.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.jobs.batch import recommend as recommend
    from serving.jobs.from_data import recommend_from_data as recommend_from_data
    from serving.processes.supervisor import serve as serve
    from serving.projection.rebuild import rebuild as rebuild
    from training.data.datasets import prepare as prepare
    from training.evaluation.evaluate import evaluate as evaluate
    from training.evaluation.table import evaluation_table as evaluation_table
    from training.export.embeddings import embeddings as embeddings
    from training.export.export import export as export
    from training.train import train as train
    from training.tuning.tune import tune as tune

_HOME = {
    "embeddings": "training.export.embeddings",
    "evaluate": "training.evaluation.evaluate",
    "evaluation_table": "training.evaluation.table",
    "export": "training.export.export",
    "prepare": "training.data.datasets",
    "rebuild": "serving.projection.rebuild",
    "recommend": "serving.jobs.batch",
    "recommend_from_data": "serving.jobs.from_data",
    "serve": "serving.processes.supervisor",
    "train": "training.train",
    "tune": "training.tuning.tune",
}


def __getattr__(name: str) -> Any:
    """Loads a function's module when the function is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
